"""What only a CUDA device shows; `python benchmarks/gpu.py` runs all tests marked `gpu`, and more."""

import pytest
import torch
from short import arguments
from tiny import language_rows, tiny_llama
from transformers import Trainer

from hf_compress import DistillationArguments, DistillationTrainer, PruningCallback, find_targets
from hf_compress.devices import own_device, peak_allocated
from hf_compress.distillation.chunked import chunked_sums
from hf_compress.distillation.divergences import Divergence
from hf_compress.distillation.output_layer import OutputLayer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def zeros(model):
    parameters = find_targets(model).parameters.values()
    return sum(int((p == 0).sum()) for p in parameters) / sum(p.numel() for p in parameters)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
def test_pruning_hits_its_target_in_every_precision(precision, tmp_path):
    args = arguments(tmp_path, max_steps=12, use_cpu=False, **precision)
    model = tiny_llama()
    Trainer(model, args, train_dataset=language_rows(), callbacks=[PruningCallback(0.75)]).train()
    assert model.device.type == "cuda"
    assert zeros(model) == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_teacher_in_few_bits_teaches_on_the_device(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden=64).save_pretrained(tmp_path / "teacher")
    args = arguments(tmp_path, DistillationArguments, max_steps=3, use_cpu=False, bf16=True)
    student, teacher = tiny_llama(hidden=64, seed=1), str(tmp_path / "teacher")
    trainer = DistillationTrainer(
        student, args, teacher=teacher, teacher_bits=bits, train_dataset=language_rows()
    )
    trainer.train()
    losses = [entry["loss_kd"] for entry in trainer.state.log_history if "loss_kd" in entry]
    assert len(losses) == 3
    assert all(0 < loss < 100 for loss in losses)


def test_a_loss_in_chunks_is_the_whole_one_in_less_memory():
    device, tokens, width, vocabulary = own_device(), 512, 256, 128_000
    torch.manual_seed(0)
    taught = torch.randn(tokens, width, device=device)
    theirs, weight = (torch.randn(vocabulary, width, device=device) / width**0.5 for _ in range(2))
    weight.requires_grad_()
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,), device=device)
    divergence = Divergence(temperature=2.0)
    found = {}
    for size in (tokens, 32):
        torch.cuda.reset_peak_memory_stats()
        sums = chunked_sums(
            hidden,
            OutputLayer(weight=weight),
            [(taught, OutputLayer(weight=theirs))],
            labels,
            torch.ones_like(labels, dtype=torch.bool),
            divergence=divergence,
            alpha=0.5,
            chunk_size=size,
        )
        (sums.task + sums.distillation).backward()
        found[size] = float(sums.distillation), hidden.grad.clone(), peak_allocated(device)
        hidden.grad = weight.grad = None
    assert found[32][0] == pytest.approx(found[tokens][0], rel=1e-4)
    torch.testing.assert_close(found[32][1], found[tokens][1], rtol=1e-3, atol=1e-4)
    # Of 512 x 128,000 logits in floats of 32 bits, 262 MB, there are several.
    assert found[32][2] < found[tokens][2] - 262e6
