import pytest

from hf_compress.distillation.features.layer_maps import layer_pairs


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "expected"),
    [
        # TinyBERT: g(m) = m * N / M, counted from 1
        ("uniform", 4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),
        ("uniform", 3, 6, [(0, 1), (1, 3), (2, 5)]),
        ("uniform", 2, 5, [(0, 1), (1, 4)]),
        ("uniform", 4, 4, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ("closest", 3, 6, [(0, 1), (1, 3), (2, 5)]),
        # PKD from 12 to 6 layers: 2, 4, 6, 8, 10 and 7, 8, 9, 10, 11, counted from 1
        ("skip", 6, 12, [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9)]),
        ("last", 6, 12, [(0, 6), (1, 7), (2, 8), (3, 9), (4, 10)]),
        ("final", 3, 12, [(2, 11)]),
        ("final", 12, 3, [(11, 2)]),
        ([(0, 5), (-1, -2)], 3, 12, [(0, 5), (2, 10)]),
        ([[1, 1]], 2, 2, [(1, 1)]),
    ],
)
def test_by_hand(layers, student, teacher, expected):
    assert layer_pairs(layers, student, teacher) == expected


def test_uniform_rises_and_ends_with_the_last():
    for teacher in range(1, 20):
        for student in range(1, teacher + 1):
            ours, theirs = zip(*layer_pairs("uniform", student, teacher), strict=True)
            assert list(ours) == list(range(student))
            assert sorted({*theirs}) == list(theirs)
            assert theirs[0] >= 0
            assert theirs[-1] == teacher - 1


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "message"),
    [
        ("uniform", 5, 4, "student has 5 layers and the teacher only 4"),
        ("skip", 5, 12, "5 layers do not divide the teacher's 12"),
        ("skip", 1, 12, "student has only one: pass 'final'"),
        ("last", 1, 12, "student has only one: pass 'final'"),
        ([(0, 12)], 6, 12, r"\(0, 12\), but the teacher has 12 layers: 0 to 11"),
        ([(-7, 0)], 6, 12, r"but the student has 6 layers: 0 to 5, or -1 to -6"),
        ([(0, 1.0)], 6, 12, "but the teacher has 12 layers"),
        ([(True, 1)], 6, 12, "but the student has 6 layers"),
        ([3], 6, 12, "holds 3: pass pairs"),
        ([], 6, 12, "is empty"),
    ],
)
def test_maps_that_do_not_fit(layers, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        layer_pairs(layers, student, teacher)
