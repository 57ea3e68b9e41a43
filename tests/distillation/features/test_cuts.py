"""Match losses and their gradients do not depend on how a batch is cut."""

import pytest
from distillation.features.grid import CASES, run_cuts


@pytest.fixture(scope="module")
def one_process():
    return run_cuts([(8, 1), (2, 4)])


@pytest.mark.parametrize("case", CASES)
def test_accumulation_changes_nothing(one_process, case):
    assert one_process[case]["2x4"] == pytest.approx(one_process[case]["8x1"], rel=1e-5)
