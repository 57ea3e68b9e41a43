"""The teacher asked, and a student trained from its answers, on as many processes as there are.

Run under `accelerate launch`; writes what `run` returns to the file named on the command line.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from distillation.cache.pairs import losses, pair, rows_of, trainer_of
from transformers import default_data_collator

from hf_compress.distillation.cache.cells import OUTPUTS, from_bytes
from hf_compress.distillation.cache.precompute import precompute_teacher

ROWS = 12


class Counting:
    def __init__(self):
        self.rows = 0

    def __call__(self, rows):
        self.rows += len(rows)
        return default_data_collator(rows)


def run(folder, batch_size, accumulation):
    """Rows asked about here, keys, and the losses of two steps, of 8 rows and of 4."""
    counting = Counting()
    student, teacher = pair("causal lm")
    rows = precompute_teacher(
        rows_of("causal lm", ROWS),
        teacher,
        data_collator=counting,
        batch_size=2,
        rows_per_file=4,
        folder=folder,
    )
    trainer = trainer_of(
        student,
        "cached",
        rows,
        folder,
        eval_rows=rows.select(range(9)),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        learning_rate=0.0,
    )
    measured = losses(trainer).tolist()
    evaluated = trainer.evaluate()
    return {
        "asked": counting.rows - 4,  # two looks at the first two
        "keys": [from_bytes(cell).key for cell in rows[OUTPUTS]],
        "losses": measured,
        "eval": {name: evaluated[name] for name in ("eval_loss", "eval_loss_kd", "eval_agreement")},
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    result = run(folder, 4, 1)
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
