"""`README.md`: what the card says, and that it is refused where that is not what was measured."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from publishing.runs import IDS, read
from tiny import tiny_bert

from hf_compress import publish
from hf_compress.publishing.recipe import recipe_of
from hf_compress.publishing.validate import validate


def test_the_card_says_what_a_reader_asks(published):
    card = ModelCard.load(published / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "finetune"
    assert data["pipeline_tag"] == "text-classification"
    assert {"pruned", "knowledge-distillation"} <= set(data["tags"])
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_type) == ("accuracy", "counting")
    report = read(published)
    assert result.metric_value == report["compressed"]["metrics"]["accuracy"]
    first = card.content.split("# me/tiny-sparse80")[1].strip().splitlines()[0]
    for side in ("compressed", "dense"):
        assert f"{report[side]['metrics']['accuracy']:.4f}" in first
    assert "save no bytes and no time" in card.content
    assert "| peak memory, bytes | not measured | not measured |" in card.content
    assert "https://huggingface.co/papers/1503.02531" in card.content


def test_the_snippet_of_the_card_runs_without_this_package(trained, published):
    text = (published / "README.md").read_text()
    snippet = text.split("```python\n")[1].split("```")[0]
    assert snippet.count('"me/tiny-sparse80"') == 2
    script = "import sys\nsys.modules['hf_compress'] = None\n" + snippet.replace(
        "me/tiny-sparse80", str(published)
    )
    script += f"print(model(input_ids=__import__('torch').tensor({IDS.tolist()})).logits.tolist())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    logits = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
    with torch.no_grad():
        torch.testing.assert_close(logits, trained.model.eval()(input_ids=IDS).logits)


def test_a_base_on_this_machine_is_named_without_its_folder(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "my-base")
    model = type(tiny_bert()).from_pretrained(tmp_path / "my-base")
    folder = publish(model, folder=tmp_path / "out")
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert "compressed from my-base." in (folder / "README.md").read_text()
    for file in ("README.md", "report.json", "config.json"):
        assert str(tmp_path) not in (folder / file).read_text()


def test_a_card_that_is_not_fit_is_not_published(tmp_path):
    with pytest.raises(ValueError, match="'/data/mine/rows' is a path of this machine"):
        publish(tiny_bert(), folder=tmp_path / "out", dataset="/data/mine/rows")
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_called_by_a_bare_name_too(tmp_path):
    for given, name in (("tiny-sparse80", "tiny-sparse80"), (None, "out")):
        text = (
            publish(tiny_bert(), given, folder=tmp_path / "out", push=False) / "README.md"
        ).read_text()
        assert f"# {name}\n" in text
        assert f'from_pretrained("{name}")' in text


def test_the_command_can_be_run_where_it_was_given(tmp_path, monkeypatch):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "show.py").write_text(
        "from hf_compress.publishing.recipe import recipe_of\nshown = recipe_of(None).command\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    given = ["--out", str(tmp_path / "runs" / "a b"), "--rows", "/data/mine/rows.csv", "--model", "x/y"]
    rest = "--out 'runs/a b' --rows rows.csv --model x/y"
    monkeypatch.setattr(sys, "argv", ["", *given])
    script = tmp_path / "tools" / "show.py"
    for path in (script, script.relative_to(tmp_path)):
        run = runpy.run_path(str(path), run_name="__main__")
        assert run["shown"] == f"python tools/show.py {rest}"
    run = runpy.run_module("tools.show", run_name="__main__", alter_sys=True)
    assert run["shown"] == f"python -m tools.show {rest}"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of two")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    run = runpy.run_path("tools/show.py", run_name="__main__")
    assert run["shown"] == f"torchrun --nproc_per_node=2 tools/show.py {rest}"


def test_a_notebook_has_no_command(tmp_path, monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    assert recipe_of(None).command is None
    text = (publish(tiny_bert(), folder=tmp_path / "out") / "README.md").read_text()
    assert "Command" not in text


BREAKS = {
    "a score": ("| accuracy | ", "| accuracy | 9", r"accuracy is '90?\.\d+', the report has"),
    "a size": ("| parameters | ", "| parameters | 1", "parameters is"),
    "a row": ("| bytes on disk |", "| bytes |", "the row 'bytes on disk' is missing"),
    "a relation": ("relation: finetune", "relation: shrunk", "'shrunk' is none of finetune"),
    "a licence": ("license: apache-2.0", "license: mine", "license: `license` 'mine'"),
    "a base": ("base_model: org/base", "base_model: ./base/x", "no 'org/name'"),
    "the index": ("      value: 0.", "      value: 7.", "model-index: accuracy is 7"),
    "a mark": ("## Limits", "## Limits {{ x }}", "'{{' was left over"),
    "a path": ("## Limits", "see /home/me/x", "'/home/me/x' is a path of this machine"),
    "a link": ("(layers.png)", "(lost.png)", "'lost.png' is neither"),
    "the yaml": ("library_name: transformers", "library_name: [", "front matter: cannot be read"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_card_that_says_something_else_is_refused(what, published, tmp_path):
    before, after, message = BREAKS[what]
    for file in published.iterdir():
        if file.suffix in (".md", ".json", ".png"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    validate(tmp_path)
    card = tmp_path / "README.md"
    text = card.read_text()
    assert before in text
    card.write_text(text.replace(before, after, 1))
    with pytest.raises(ValueError, match=message):
        validate(tmp_path)


@pytest.mark.parametrize(
    ("dense", "compressed", "sentence"),
    [
        # Three classes: guessing is right once in three times.
        (0.25, 0.95, "hardly better than guessing (0.3333)"),
        (0.35, 0.34, "hardly better than guessing (0.3333)"),
        (0.50, 0.95, "much the worse of the two here"),
        (0.95, 0.96, None),
        (0.95, 0.90, None),
    ],
)
def test_a_poor_dense_model_is_told_instead_of_boasted_of(tmp_path, dense, compressed, sentence):
    small, large = tiny_bert(), tiny_bert(seed=1)
    folder = publish(
        small,
        folder=tmp_path / "out",
        baseline=large,
        evaluate=lambda model: {"accuracy": compressed if model is small else dense},
    )
    first = (folder / "README.md").read_text().split("# out\n")[1].strip().splitlines()[0]
    if sentence is None:
        assert first.endswith(f"(recovery {100 * compressed / dense:.2f} %).")
    else:
        assert sentence in first
        assert "(recovery" not in first
