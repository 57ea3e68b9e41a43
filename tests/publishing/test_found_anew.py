"""What `verify` finds with: grids told from numbers alone, scores of its own loop, differences."""

import math

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from tiny import classification_rows, language_rows, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch.utils.data import DataLoader
from transformers import default_data_collator

from hf_compress.publishing.differences import float_weights, structure_of
from hf_compress.publishing.evenness import fewest_bits
from hf_compress.publishing.naming import cached_revision
from hf_compress.publishing.scores import scores_of


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", [False, True])
def test_the_bits_of_a_grid_are_told_from_its_values(bits, zero_point):
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.randint(lowest, highest + 1, (50, 4, 16)).float()
    codes[..., 0], codes[..., 1] = lowest, highest
    zero = torch.randint(lowest, highest + 1, (50, 4, 1)) if zero_point else 0
    values = torch.rand(50, 4, 1) * (codes - zero)
    assert fewest_bits(values) == bits
    # One value between two codes is enough.
    values[7, 2, 3] += 0.3 * values[7, 2].abs().max() / 2**bits
    assert fewest_bits(values) != bits


def test_half_precision_is_rounded_and_still_told():
    codes = torch.randint(-8, 8, (200, 16)).float()
    codes[:, 0], codes[:, 1] = -8, 7
    scale = torch.rand(200, 1) + 0.1
    for dtype in (torch.float16, torch.bfloat16):
        assert fewest_bits((codes * scale.to(dtype)).to(dtype)) == 4
    assert fewest_bits(torch.randn(64, 16)) is None
    assert fewest_bits(torch.randn(64, 16).half()) is None
    assert fewest_bits(torch.zeros(3, 4)) == 0
    assert fewest_bits(torch.tensor([[0.0, 0.5, 0.5, 0.0]])) == 1


def loader(rows, size):
    return DataLoader(rows, batch_size=size, collate_fn=default_data_collator)


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_of_a_classifier(classes):
    model, rows = tiny_bert(classes), classification_rows(21, num_labels=classes)
    data = rows.with_format("torch")
    with torch.no_grad():
        logits = model.eval()(data["input_ids"][:], data["attention_mask"][:]).logits
    chosen, wanted = logits.argmax(-1), data["labels"][:]
    loss = torch.nn.functional.cross_entropy(logits, wanted).item()
    found = scores_of(model.train(), loader(rows, 4))
    expected = {
        "loss": loss,
        "loss_task": loss,
        "accuracy": accuracy_score(wanted, chosen),
        "f1": f1_score(wanted, chosen, average="macro", zero_division=0),
        "f1_weighted": f1_score(wanted, chosen, average="weighted", zero_division=0),
        "matthews_correlation": matthews_corrcoef(wanted, chosen),
    }
    if classes == 2:
        expected["f1_binary"] = f1_score(wanted, chosen, zero_division=0)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_scores_of_a_language_model_count_tokens_and_batches():
    model, rows = tiny_llama().eval(), language_rows(10)
    losses, tokens, means = [], 0, []
    with torch.no_grad():
        for row in rows.with_format("torch"):
            logits = model(row["input_ids"][None], attention_mask=row["attention_mask"][None]).logits
            wanted = row["labels"][1:]
            each = torch.nn.functional.cross_entropy(logits[0, :-1], wanted, reduction="none")
            counted = wanted != -100
            losses.append(each[counted].sum().item())
            tokens += int(counted.sum())
            means.append(each[counted].mean().item())
    one_by_one = scores_of(model, loader(rows, 1))
    assert one_by_one["loss"] == pytest.approx(sum(means) / len(means), rel=1e-5)
    for size in (1, 4):
        found = scores_of(model, loader(rows, size))
        assert found["loss_task"] == pytest.approx(sum(losses) / tokens, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss_task"]))


def test_other_heads_and_no_rows_are_refused():
    with pytest.raises(
        ValueError, match="a T5ForConditionalGeneration cannot be evaluated here.*causal"
    ):
        scores_of(tiny_t5(), [])
    with pytest.raises(ValueError, match="no rows"):
        scores_of(tiny_bert(), [])
    with pytest.raises(ValueError, match="multi_label_classification cannot"):
        scores_of(tiny_bert(problem_type="multi_label_classification"), [])


def test_sizes_that_differ_are_the_structure():
    dense = tiny_bert(layers=2)
    found = structure_of(tiny_bert(layers=1, hidden=16, num_labels=5), dense)
    assert found == {
        "hidden_size": {"dense": 32, "compressed": 16},
        "intermediate_size": {"dense": 64, "compressed": 32},
        "num_hidden_layers": {"dense": 2, "compressed": 1},
    }
    assert structure_of(dense, None) == structure_of(dense, tiny_gpt2()) == {}
    name = "bert.pooler.dense.weight"
    assert [w.shape for w in float_weights(dense, [name, "nowhere"])] == [(32, 32)]


def test_a_revision_is_told_where_only_one_was_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_compress.publishing.naming.constants.HF_HUB_CACHE", str(tmp_path))
    assert cached_revision(None) is cached_revision("org/model") is None
    commits = tmp_path / "models--org--model" / "snapshots"
    (commits / "abc").mkdir(parents=True)
    assert cached_revision("org/model") == "abc"
    (commits / "def").mkdir()
    assert cached_revision("org/model") is None
