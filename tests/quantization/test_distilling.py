"""Training on a grid with the dense model as the teacher, and pruning beside it."""

import pytest
import torch
from quantization.test_callback import on_grid
from short import arguments
from tiny import classification_rows, language_rows, tiny_bert, tiny_llama

from hf_compress import (
    DistillationArguments,
    DistillationTrainer,
    PruningCallback,
    QuantizationCallback,
)
from hf_compress.targets import find_targets

MODELS = {"BERT": (tiny_bert, classification_rows), "Llama in chunks": (tiny_llama, language_rows)}


def trainer(folder, name, callbacks):
    make, rows = MODELS[name]
    settings = {"max_steps": 24, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 10}
    model = make()
    with torch.no_grad():  # at random it would have nothing to teach
        (model.classifier if name == "BERT" else model.lm_head).weight.mul_(20)
    return DistillationTrainer(
        model,
        arguments(folder, DistillationArguments, alpha=1.0, **settings),
        teacher="self",
        train_dataset=rows(rows=96),
        callbacks=callbacks,
    )


@pytest.mark.parametrize(("name", "sparsity"), [("BERT", 0.3), ("Llama in chunks", None)])
def test_the_dense_model_teaches_itself_in_few_bits(tmp_path, name, sparsity):
    def start():
        quantization = QuantizationCallback(2, group_size=16, activations=8, end=16)
        pruning = [] if sparsity is None else [PruningCallback(sparsity, interval=2, end=8)]
        return trainer(tmp_path, name, [*pruning, quantization]), quantization

    run, callback = start()
    dense = {key: value.clone() for key, value in run.model.state_dict().items()}
    run.train()
    assert on_grid(run.model, callback)
    parameters = find_targets(run.model).parameters
    zeros = sum(int((param == 0).sum()) for param in parameters.values())
    assert zeros >= round((sparsity or 0) * sum(param.numel() for param in parameters.values()))
    # Neither the grid nor the rounding of inputs has come over the teacher, which knows no labels.
    taught = [row["loss_kd"] for row in run.state.log_history if "loss_kd" in row]
    assert 0 < sum(taught[-8:]) < 0.9 * sum(taught[8:16])
    assert all(value.equal(dense[key]) for key, value in run.teacher.state_dict().items())
    assert not any(module._forward_pre_hooks for module in run.teacher.modules())

    rest, its = start()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    expected = run.model.state_dict()
    assert all(value.equal(expected[key]) for key, value in rest.model.state_dict().items())
    assert all(grid.scale.equal(its.grids[key].scale) for key, grid in callback.grids.items())
