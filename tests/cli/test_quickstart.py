import pytest

from hf_compress.cli.quickstart import evaluate_as_a_stranger, main
from hf_compress.samples import corpus


@pytest.mark.slow
def test_end_to_end_on_a_few_rows(tmp_path, capsys):
    main(["--rows", "64", "--output_dir", str(tmp_path), "--student_epochs", "1"])
    table = {row.split()[0]: row.split()[1:] for row in capsys.readouterr().out.splitlines()[-6:-1]}
    assert set(table) == {"accuracy", "megabytes", "parameters", "nonzeros", "latency_ms"}
    assert table["parameters"][:2] == ["22,716,296", "17,392,904"]
    rows = corpus("reuters-r8")["test"].select(range(8))
    score = evaluate_as_a_stranger(tmp_path / "minilm-r8-3layers-sparse80", rows)
    assert 0 <= score <= 1


def test_a_model_that_does_not_load_alone_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="does not load without hf_compress"):
        evaluate_as_a_stranger(tmp_path, corpus("reuters-r8")["test"].select(range(2)))


def test_a_wrong_sparsity_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(ValueError, match="pass 0.8"):
        main(["--sparsity", "80", "--output_dir", str(tmp_path)])
    assert not list(tmp_path.iterdir())
