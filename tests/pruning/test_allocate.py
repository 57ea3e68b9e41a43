import pytest
import torch
from tiny import classification_rows, tiny_bert
from transformers import Trainer, TrainingArguments

from hf_compress import PruningCallback
from hf_compress.pruning.allocate import by_sensitivity, erk, owl, uniform
from hf_compress.targets import find_targets


def weights(**shapes):
    return {name: torch.empty(shape) for name, shape in shapes.items()}


def zeros(fractions, given):
    """What a pruner makes of the fractions: it rounds each to whole weights."""
    return {name: round(fraction * given[name].numel()) for name, fraction in fractions.items()}


TWO = weights(small=(4, 4), large=(8, 8))
LEVELS = (0.5, 0.7, 0.9, 0.99)


def curves(given, generator):
    """Random harm that mostly rises, with plateaus and dips."""
    harm = (4 * torch.rand(len(given), len(LEVELS), generator=generator)).round().tolist()
    return {name: dict(zip(LEVELS, row, strict=True)) for name, row in zip(given, harm, strict=True)}


ALLOCATIONS = {
    "uniform": lambda given, sparsity, generator: uniform(given, sparsity),
    "erk": lambda given, sparsity, generator: erk(given, sparsity),
    "owl": lambda given, sparsity, generator: owl(
        given, sparsity, {name: torch.rand(1, generator=generator).item() for name in given}
    ),
    "by_sensitivity": lambda given, sparsity, generator: by_sensitivity(
        given, sparsity, curves(given, generator)
    ),
}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_all_weights_together_are_as_sparse_as_asked_to_the_last_zero(allocation):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(1, 60, (6, 2), generator=generator).tolist()
        given = {f"layer.{place}": torch.empty(*size) for place, size in enumerate(sizes)}
        sparsity = 0.95 * torch.rand(1, generator=generator).item()
        total = sum(weight.numel() for weight in given.values())
        fractions = ALLOCATIONS[allocation](given, sparsity, generator)
        assert list(fractions) == list(given)
        assert all(0 <= fraction < 1 for fraction in fractions.values())
        assert sum(zeros(fractions, given).values()) == round(sparsity * total)


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.57, 0.9])
def test_uniform_is_the_same_fraction_everywhere(sparsity):
    given = weights(a=(10, 10), b=(20, 50), c=(30, 30))
    assert zeros(uniform(given, sparsity), given) == {
        name: round(sparsity * weight.numel()) for name, weight in given.items()
    }


def test_erk_by_hand():
    # Parts are in the ratio (4 + 4) / 16 = 1/2 to (8 + 8) / 64 = 1/4, so of 80 weights 40 are kept as
    # e * 16 / 2 + e * 64 / 4 = 24 e: e = 5/3, hence 13.33 of 16 and 26.67 of 64.
    assert zeros(erk(TWO, 0.5), TWO) == {"small": 16 - 13, "large": 64 - 27}
    # At 20 % the small one would keep 64 / 24 / 2 > 1: it stays dense, and the large one gives all 16.
    assert zeros(erk(TWO, 0.2), TWO) == {"small": 0, "large": 16}
    # A transposed layout is the same matrix, and stacked experts are so many of them.
    given = weights(small=(4, 4), large=(8, 8), experts=(3, 8, 8), wide=(2, 16), turned=(16, 2))
    fractions = erk(given, 0.7)
    assert fractions["experts"] == pytest.approx(fractions["large"], abs=1 / 64)
    assert fractions["wide"] == pytest.approx(fractions["turned"], abs=1 / 32)
    # A 3x3 kernel: (8 + 4 + 3 + 3) / (8 * 4 * 9) = 1/16 against 1/4: a quarter of the density.
    given = weights(kernel=(8, 4, 3, 3), large=(8, 8))
    kept = {name: given[name].numel() - n for name, n in zeros(erk(given, 0.9), given).items()}
    # e * 288 / 16 + e * 64 / 4 = 34 e = 35 of 352
    assert kept == {"kernel": 19, "large": 16}


def test_owl_by_hand():
    given = weights(a=(10, 30), b=(10, 30), c=(10, 30))
    # Offsets 0, -0.04 and -0.16 from 0.5 + their mean, 0.0667.
    fractions = owl(given, 0.5, {"a": 0.0, "b": 0.01, "c": 0.04})
    assert zeros(fractions, given) == {"a": 170, "b": 158, "c": 122}
    # Large weights weigh more in the mean: (100 a + 400 b) / 500 = 0.5 with a - b = 0.16.
    given = weights(a=(10, 10), b=(20, 20))
    fractions = owl(given, 0.5, {"a": 0.02, "b": 0.03})
    assert fractions == pytest.approx({"a": 0.628, "b": 0.468}, abs=0.005)
    # Nothing falls below dense: the other takes over what it cannot give.
    fractions = owl(given, 0.04, {"a": 0.03, "b": 0.02})
    assert zeros(fractions, given) == {"a": 0, "b": 20}
    assert owl(given, 0.5, {"a": 0.1, "b": 0.1}) == {"a": 0.5, "b": 0.5}


def test_by_sensitivity_by_hand():
    given = weights(a=(10, 10), b=(10, 10))
    # Straight lines of slope 1 and 3: equal harm where a is three times as sparse.
    straight = {"a": {0.8: 0.8}, "b": {0.8: 2.4}}
    assert by_sensitivity(given, 0.4, straight) == {"a": 0.6, "b": 0.2}
    # b is worth nothing up to a half, whatever noise says, and then as much as a.
    noisy = {"a": {0.9: 0.9}, "b": {0.25: -0.3, 0.5: -0.1, 0.9: 0.4}}
    assert by_sensitivity(given, 0.45, noisy) == {"a": 0.2, "b": 0.7}
    # Less than what costs nothing: only there.
    assert by_sensitivity(given, 0.1, noisy) == {"a": 0.0, "b": 0.2}
    # A curve ends where the metric is not finite any more.
    broken = {"a": {0.5: 0.1, 0.9: float("inf")}, "b": {0.9: 5.0}}
    assert by_sensitivity(given, 0.65, broken) == {"a": 0.5, "b": 0.8}


def test_the_callback_takes_them(tmp_path):
    model = tiny_bert()
    given = find_targets(model).parameters
    fractions = erk(given, 0.8)
    args = TrainingArguments(
        str(tmp_path), max_steps=3, report_to="none", save_strategy="no", disable_tqdm=True
    )
    callbacks = [PruningCallback(fractions, end=2)]
    Trainer(model, args, train_dataset=classification_rows(16), callbacks=callbacks).train()
    found = {name: int((weight == 0).sum()) for name, weight in given.items()}
    assert found == zeros(fractions, given)
    assert sum(found.values()) == round(0.8 * sum(weight.numel() for weight in given.values()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform(TWO, 80), "`sparsity` is 80"),
        (lambda: uniform({}, 0.5), "no weights"),
        (lambda: erk({}, 0.5), "no weights"),
        (lambda: erk(TWO, float("nan")), "`sparsity` is nan"),
        (lambda: uniform(TWO, 0.999), "0.9750 at most"),
        (lambda: owl({}, 0.5, {}), "no weights"),
        (lambda: uniform(tiny_bert(), 0.5), r"`weights` is a Bert.*pass `find_targets\(model\)"),
        (lambda: erk(tiny_bert(), 0.5), r"`weights` is a Bert.*pass `find_targets\(model\)"),
        (lambda: owl(TWO, 0.5, {"small": 0.1, "large": float("nan")}), "`outliers` has nan for large"),
        (lambda: owl(TWO, 0.5, {"small": 10, "large": 20}), "`outliers` has 10 for small"),
        (lambda: by_sensitivity(TWO, 0.5, dict.fromkeys(TWO, {50: 1, 90: 2})), "pass 0.8"),
        (lambda: owl(TWO, 0.5, {"small": 0.1}), r"`outliers` lacks 1 weights, \['large'\]"),
        (lambda: owl(TWO, 0.5, {"small": 0.1, "large": 0.2}, spread=8), "`spread` is 8"),
        (lambda: by_sensitivity(TWO, 0.5, {"large": {0.5: 1}}), "`curves` lacks 1 weights"),
        (lambda: by_sensitivity(TWO, 0.9, dict.fromkeys(TWO, {0.8: 1})), "0.8000 at most"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
