"""Run by two ranks: a Trainer with a callback that prunes. Each rank checks its zeros and writes its
weights to a file of its own."""

import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from safetensors.torch import save_file
from tiny import classification_rows, tiny_bert
from transformers import Trainer, TrainingArguments

from hf_compress import PruningCallback
from hf_compress.callbacks.structured import StructuredPruningCallback
from hf_compress.pruning.structure.removal import alive
from hf_compress.pruning.structure.units import find_units
from hf_compress.targets import find_targets


def check_weights(model):
    parameters = find_targets(model).parameters.values()
    zeros = sum(int((p == 0).sum()) for p in parameters)
    assert zeros == round(0.7 * sum(p.numel() for p in parameters))


def check_units(model):
    assert [int(alive(u).sum()) for u in find_units(model, ["ffn"])] == [32, 32]


METHODS = {
    "weights": (PruningCallback(0.7, interval=3), check_weights),
    "units": (StructuredPruningCallback(ffn=0.5), check_units),
}

if __name__ == "__main__":
    folder, method = Path(sys.argv[1]), sys.argv[2]
    callback, check = METHODS[method]
    trainer = Trainer(
        tiny_bert(),
        TrainingArguments(
            str(folder),
            max_steps=12,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_steps=12,
        ),
        train_dataset=classification_rows(),
        callbacks=[callback],
    )
    trainer.train()
    assert dist.get_world_size() == 2
    check(trainer.model)
    # `save_pretrained` writes on the first rank only.
    save_file(trainer.model.state_dict(), folder / f"{dist.get_rank()}.safetensors", {"format": "pt"})
    trainer.end()
