"""Run by two ranks: trainings on grids, each rank with its half of every batch and of the calibration.
Each writes its weights and grids to a file of its own, as `results` of one process tells them."""

import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from accelerate import PartialState
from safetensors.torch import save_file
from tiny import classification_rows, tiny_bert
from transformers import Trainer, TrainingArguments

from hf_compress import QuantizationCallback, quantize_oneshot_

METHODS = {
    "fixed inputs": {"bits": 8, "activations": 8, "start": 3, "end": 9},
    "fixed inputs of few bits": {"bits": (8, 4), "group_size": 16, "activations": 4, "end": 9},
    "dynamic inputs": {"bits": 4, "activations": 8},
    "groups": {"bits": (8, 3), "group_size": 16, "symmetric": False, "grid": "auto", "interval": 3},
    "learned": {"bits": 3, "learn_scale": True, "end": 9},
    "given": {"bits": 3, "symmetric": False, "grid": "median"},
}


def results(folder, method, rank=0, ranks=1):
    """The weights after a training, and the grids of weights and inputs, by name."""
    model, settings = tiny_bert(), METHODS[method] | {}
    if method == "given":
        settings["grids"] = quantize_oneshot_(model, **settings)
    if method.startswith("fixed inputs"):
        rows = classification_rows(rows=16, seed=7).with_format("torch")
        # Of so different ranges that each rank by itself would find another one.
        settings["calibration"] = [rows[:2], rows[2:16]][rank::ranks]
    callback = QuantizationCallback(**({"grid": "minmax"} | settings))
    arguments = TrainingArguments(
        str(folder),
        max_steps=12,
        per_device_train_batch_size=4,
        # What two ranks do at once, one does after the other.
        gradient_accumulation_steps=2 // ranks,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=classification_rows(rows=96), callbacks=[callback]).train()
    found = {name: value.clone() for name, value in model.state_dict().items()}
    for kind, grids in (("weights", callback.grids), ("inputs", callback.input_grids)):
        for name, grid in grids.items():
            found[f"{kind} {name} scale"] = grid.scale
            if grid.zero_point is not None:
                found[f"{kind} {name} zero point"] = grid.zero_point
    callback.remove_hooks()
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    PartialState(cpu=True)
    for method in METHODS:
        found = results(folder, method, PartialState().process_index, ranks=2)
        assert dist.get_world_size() == 2
        save_file(found, folder / f"{method} {dist.get_rank()}")
    dist.destroy_process_group()
