import math

import pytest

from hf_compress.metrics.accuracy import Accuracy
from hf_compress.metrics.functions import accuracy, perplexity


def test_accuracy_is_the_share_of_equal_entries():
    assert accuracy([1, 2, 3, 0], [1, 0, 3, 1]) == 0.5
    assert accuracy([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 0.75


@pytest.mark.parametrize("wrong", [([[0.1, 0.9]], [1]), ([], []), ([1], [1, 2])])
def test_accuracy_needs_class_numbers(wrong):
    with pytest.raises(ValueError, match="argmax"):
        accuracy(*wrong)


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e6) == math.inf


def test_the_metric_gathers_batches_offline():
    metric = Accuracy(keep_in_memory=True)
    metric.add_batch(predictions=[1, 2], references=[1, 1])
    metric.add(prediction=0, reference=0)
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}
