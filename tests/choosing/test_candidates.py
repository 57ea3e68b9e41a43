import pytest

from hf_compress.choosing.candidates import Candidate, candidates_of, default_space


def test_a_space_is_all_combinations_each_once():
    found = candidates_of({"layers": [None, 3], "bits": [None, 8, 4], "distil": True})
    assert [each.name for each in found] == ["8bit", "4bit", "3layers", "3layers-8bit", "3layers-4bit"]
    assert candidates_of([{"layers": 3}, {"layers": [3, 2]}]) == [
        Candidate(layers=3),
        Candidate(layers=2),
    ]


def test_every_candidate_of_a_space_has_a_name_of_its_own():
    space = {
        "layers": [None, 2],
        "ffn": [0, 0.25, 0.5],
        "heads": [0, 0.5],
        "vocabulary": [False, True],
        "sparsity": [0, 0.8],
        "bits": [None, 8, 4],
        "distil": [True, False],
    }
    found = candidates_of([space, {"student_layers": 2}])
    assert len({each.name for each in found}) == len(found) == 2 * 3 * 2 * 2 * 2 * 3 * 2 - 2 + 1


def test_the_default_space_compresses_in_each_way():
    space = default_space(6, texts=True)
    assert space["layers"] == [None, 4, 3, 2]
    assert len(candidates_of(space)) == 4 * 2 * 2 * 3 - 1
    assert default_space(1, texts=False)["layers"] == [None]
    assert not any(each.vocabulary for each in candidates_of(default_space(2, texts=False)))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"layer": [3]}, r"unknown keys \['layer'\]; there are layers, student_layers"),
        ({"bits": []}, "`bits` has an empty list"),
        ({}, "the space is empty"),
        ([], "the space is empty"),
        ({"distil": [True, False]}, "the space is empty"),
        ("layers", "a space is a mapping such as"),
        ([{"layers": 3}, 4], "a space is a mapping such as"),
        (None, "a space is a mapping such as"),
        ({"ffn": [50]}, r"`ffn` is 50: pass a fraction in \[0, 1\)"),
        ({"sparsity": [True]}, "`sparsity` is True"),
        ({"bits": [1]}, "`bits` is 1: pass 2 to 8"),
        ({"bits": ["8"]}, "`bits` is '8'"),
        ({"layers": [0]}, "`layers` is 0: pass how many stay"),
        ({"layers": [2.5]}, "`layers` is 2.5"),
        ({"vocabulary": ["yes"]}, "`vocabulary` is 'yes': pass true or false"),
        ({"layers": 3, "student_layers": 3}, "both choose the depth"),
    ],
)
def test_refusals(space, message):
    with pytest.raises(ValueError, match=message):
        candidates_of(space)
