"""Scores against scikit-learn and values computed by hand, and as `evaluate` loads them."""

import functools
import math

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

import hf_compress.metrics
from hf_compress.metrics.accuracy import Accuracy
from hf_compress.metrics.functions import (
    AVERAGES,
    accuracy,
    agreement,
    f1,
    matthews,
    mean_loss,
    perplexity,
)
from hf_compress.metrics.text import answer_f1, exact_match, normalise_answer, word_error_rate


def test_accuracy_is_the_share_of_equal_entries():
    assert accuracy([1, 2, 3, 0], [1, 0, 3, 1]) == 0.5
    assert accuracy([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 0.75
    assert agreement([1, 2, 3, 0], [1, 0, 3, 1]) == 0.5


@pytest.mark.parametrize("score", [accuracy, agreement, f1, matthews])
@pytest.mark.parametrize("wrong", [([[0.1, 0.9]], [1]), ([], []), ([1], [1, 2])])
def test_class_numbers_are_needed(score, wrong):
    with pytest.raises(ValueError, match="argmax"):
        score(*wrong)


# Classes of labels and of predictions: what is predicted need not occur, nor be predicted what occurs.
DRAWN = [(2, 2), (5, 5), (4, 2), (2, 4), (1, 1), (1, 3), (3, 1)]


@pytest.mark.filterwarnings("ignore:F-score is ill-defined", "ignore:A single label was found")
@pytest.mark.parametrize("classes", DRAWN)
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_scores_equal_those_of_scikit_learn(classes, rows):
    generator = np.random.default_rng(rows)
    wanted, found = (generator.integers(0, count, rows) for count in classes)
    assert accuracy(found, wanted) == pytest.approx(accuracy_score(wanted, found))
    assert matthews(found, wanted) == pytest.approx(matthews_corrcoef(wanted, found), abs=1e-12)
    for average in AVERAGES[1:]:
        expected = f1_score(wanted, found, average=average, zero_division=0)
        assert f1(found, wanted, average=average) == pytest.approx(expected)
    expected = f1_score(wanted == 1, found == 1, zero_division=0)
    assert f1(found, wanted, average="binary") == pytest.approx(expected)


def test_another_average_is_refused():
    with pytest.raises(ValueError, match="'samples'; allowed are 'binary'"):
        f1([1], [1], average="samples")


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e6) == math.inf


def test_a_mean_loss_does_not_depend_on_the_parts():
    losses = np.random.default_rng(0).random(12)
    whole = mean_loss([losses.mean()], [12])
    assert mean_loss(losses, np.ones(12)) == pytest.approx(whole)
    parts = [losses[:3].mean(), math.nan, losses[3:].mean()]
    assert mean_loss(parts, [3, 0, 9]) == pytest.approx(whole)
    for wrong in (([1.0], [0]), ([1.0], [1, 2]), ([1.0, 2.0], [2, -1]), ([], [])):
        with pytest.raises(ValueError, match="of one length"):
            mean_loss(*wrong)


def test_answers_are_compared_as_squad_does():
    assert normalise_answer("  The Cat's\tan  A-theme, the ") == "cats atheme"
    assert exact_match(["the cat!", "dog"], [["a Cat", "x"], ["dogs"]]) == 0.5
    # 2 of 3 words given and 2 of 4 wanted: precision 2/3, recall 1/2.
    assert answer_f1(["black cat sat"], [["dog", "the cat sat down here"]]) == pytest.approx(4 / 7)
    # A word that is given twice counts once where it is wanted once.
    assert answer_f1(["cat cat"], [["cat dog"]]) == pytest.approx(0.5)
    # A question without an answer: nothing is right but to say nothing.
    assert exact_match(["", "x"], [[], []]) == answer_f1(["", "x"], [[], []]) == 0.5
    for wrong in (([], []), (["a"], [["a"], ["b"]])):
        with pytest.raises(ValueError, match="must be as many"):
            exact_match(*wrong)
    with pytest.raises(ValueError, match=r"lists of accepted answers.*\[\['Paris'\]\]"):
        answer_f1(["a"], ["a"])


def naive_distance(first, second):
    """Levenshtein's recursion as it is defined."""

    @functools.cache
    def distance(i, j):
        if not i or not j:
            return i + j
        replaced = distance(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        return min(replaced, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(first), len(second))


def test_word_errors_are_counted_over_all_words():
    generator = np.random.default_rng(0)
    pairs = [
        [" ".join(generator.choice(["a", "b", "c"], generator.integers(0, 9))) for _ in range(2)]
        for _ in range(60)
    ]
    found, wanted = zip(*pairs, strict=True)
    errors = sum(naive_distance(given.split(), text.split()) for given, text in pairs)
    assert word_error_rate(found, wanted) == errors / sum(len(text.split()) for text in wanted)
    assert word_error_rate(["the cat sat"], ["the cat sat"]) == 0
    # One replaced, one missing, one too many, of four words.
    assert word_error_rate(["a bat sat on on"], ["the cat sat on"]) == 3 / 4
    assert word_error_rate(["x y z"], ["w"]) == 3
    for wrong in (([""], [""]), (["a"], ["a", "b"]), ([], [])):
        with pytest.raises(ValueError, match="must have a word"):
            word_error_rate(*wrong)


def test_the_metric_gathers_batches_offline():
    metric = Accuracy(keep_in_memory=True)
    metric.add_batch(predictions=[1, 2], references=[1, 1])
    metric.add(prediction=0, reference=0)
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}


LABELS = {"predictions": [0, 1, 2, 1], "references": [0, 1, 1, 1]}
LOADED = {
    "accuracy": (LABELS, {"accuracy": 3 / 4}),
    "agreement": (LABELS, {"agreement": 3 / 4}),
    "f1": (LABELS | {"average": "binary"}, {"f1": 4 / 5}),
    "matthews": (LABELS, {"matthews_correlation": matthews_corrcoef([0, 1, 1, 1], [0, 1, 2, 1])}),
    "perplexity": (
        {"predictions": [math.log(2), math.log(16)], "references": [3, 1]},
        {"perplexity": 2**1.75},
    ),
    "answers": (
        {"predictions": ["the cat", "x"], "references": [["Cat"], []]},
        {"exact_match": 0.5, "f1": 0.5},
    ),
    "wer": ({"predictions": ["a b c"], "references": ["a x"]}, {"wer": 1.0}),
}


@pytest.fixture(scope="session")
def modules(tmp_path_factory):
    """`evaluate` copies a file before it imports it, to one place for each process: Python keeps the
    package it first imported, and a worker may leave this file and come back to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.mark.parametrize("name", LOADED)
def test_evaluate_loads_each_from_its_file(name, modules):
    (folder,) = hf_compress.metrics.__path__
    metric = evaluate.load(f"{folder}/{name}.py", keep_in_memory=True)
    inputs, expected = LOADED[name]
    assert metric.compute(**inputs) == pytest.approx(expected)
