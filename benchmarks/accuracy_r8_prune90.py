"""R8, six layers, 90 % unstructured, one epoch from the fine-tuned MiniLM.

python benchmarks/accuracy_r8_prune90.py --seeds 0 1 2
"""

import argparse
import json
import tempfile

import minilm
from transformers import set_seed

from hf_compress import PruningCallback


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--score", default="obd")
    parser.add_argument("--end", type=float, default=0.6)
    parser.add_argument("--interval", type=int)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--length", type=int, default=128, help="tokens for each row")
    parser.add_argument("--dense_epochs", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="autocast, faster where the CPU has it")
    options = parser.parse_args()
    tokenizer, train, test, names = minilm.load("reuters-r8", options.length)
    folder = minilm.dense(
        "reuters-r8",
        tokenizer,
        train,
        test,
        names,
        length=options.length,
        epochs=options.dense_epochs,
        learning_rate=2e-4,
        bf16=options.bf16,
    )
    with tempfile.TemporaryDirectory() as output:
        baseline = minilm.trainer(minilm.classifier(folder, names), output, tokenizer, train, test)
        result = {**vars(options), "dense": baseline.evaluate()["eval_accuracy"], "pruned": []}
        for seed in options.seeds:
            set_seed(seed)
            callback = PruningCallback(
                options.sparsity, score=options.score, end=options.end, interval=options.interval
            )
            run = minilm.trainer(
                minilm.classifier(folder, names),
                output,
                tokenizer,
                train,
                test,
                callbacks=[callback],
                seed=seed,
                learning_rate=options.learning_rate,
                bf16=options.bf16,
            )
            run.train()
            result["pruned"].append(run.evaluate()["eval_accuracy"])
            result["sparsity_found"] = callback.measurements()["sparsity"]
    result["mean"] = sum(result["pruned"]) / len(result["pruned"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
