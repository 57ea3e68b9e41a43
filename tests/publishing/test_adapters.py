"""Adapters: pushed without their base, loaded on it by strangers, and checked as any other model."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from publishing.runs import IDS, read, score, settings, tokenizer
from tiny import classification_rows, tiny_bert
from transformers import AutoModelForSequenceClassification, Trainer

from hf_compress import load_quantized, publish
from hf_compress.cli.verify import main as verify
from hf_compress.publishing.card import render

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_bert(hidden=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A trainer of adapters, and of the head, on the base in 4 bit."""
    torch.manual_seed(0)
    model = load_quantized(base, 4, AutoModelForSequenceClassification)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    trainer = Trainer(
        peft.get_peft_model(model, config),
        settings(tmp_path_factory.mktemp("run"), learning_rate=1e-2),
        train_dataset=classification_rows(),
        eval_dataset=classification_rows(40, seed=1),
        compute_metrics=score,
        processing_class=tokenizer(),
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def folder(tuned, base, tmp_path_factory):
    return publish(
        tuned,
        "me/adapters",
        push=False,
        folder=tmp_path_factory.mktemp("published") / "adapters",
        base_model="me/base",
        baseline=AutoModelForSequenceClassification.from_pretrained(base),
        dataset="counting",
    )


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_only_the_adapters_are_written_and_the_card_says_so(folder, base):
    assert {path.name for path in folder.glob("*.safetensors")} == {"adapter_model.safetensors"}
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("me/base", "adapter")
    assert data["library_name"] == "peft"
    assert {"adapter", "lora", "quantized", "bitsandbytes", "4-bit"} <= set(data["tags"])
    report, card = read(folder), (folder / "README.md").read_text()
    assert report["adapters"]["parameters"] < report["compressed"]["parameters"]
    assert report["compressed"]["weight_bytes"] < report["dense"]["weight_bytes"]
    assert report["compressed"]["bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert "The bytes on disk are those of the adapters alone" in card
    # Nobody could load the folder of this machine.
    for path in (folder / "README.md", folder / "adapter_config.json", folder / "report.json"):
        assert str(base) not in path.read_text()


def test_a_stranger_loads_them_from_a_hub_as_the_card_says(folder, base, tuned, hub, client, tmp_path):
    upload = "from huggingface_hub import HfApi\napi = HfApi()\napi.create_repo('me/base')\n"
    client.run(f"{upload}api.upload_folder(repo_id='me/base', folder_path=folder)", folder=base)
    send = "from hf_compress.publishing.push import push_folder\npush_folder(folder, 'me/adapters')"
    client.run(send, folder=folder)
    assert [seen.route for seen in hub.log].count("commit") == 2
    assert "adapter_model.safetensors" in hub.store.files("me/adapters")
    snippet = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    result = f"result = model.eval()(input_ids=__import__('torch').tensor({IDS.tolist()})).logits"
    found = client.run(f"import sys\n{snippet}{result}.tolist()")
    # The stranger's 4-bit kernel is not the guarded one of here, and rounds otherwise.
    torch.testing.assert_close(torch.tensor(found), logits_of(tuned.model), atol=2e-3, rtol=0)
    with tuned.model.disable_adapter():
        assert (torch.tensor(found) - logits_of(tuned.model)).abs().max() > 0.1


def test_each_number_is_found_again_and_a_lie_is_told(folder, base, tmp_path, capsys):
    classification_rows(40, seed=1).to_json(tmp_path / "rows.jsonl")
    words = ["--base", str(base), "--dense", str(base), "--data", str(tmp_path / "rows.jsonl")]
    words += ["--batch_size", "8"]
    with pytest.raises(SystemExit) as ended:
        verify([str(folder), *words])
    said = capsys.readouterr().out
    assert (ended.value.code, " NO" in said) == (0, False)
    lie = shutil.copytree(folder, tmp_path / "lie")
    report = read(lie)
    report["adapters"]["parameters"] += 1
    (lie / "report.json").write_text(json.dumps(report))
    pictures = [path.name for path in lie.glob("*.png")]
    (lie / "README.md").write_text(render(report, pictures=pictures))
    with pytest.raises(SystemExit) as ended:
        verify([str(lie), *words])
    assert ended.value.code == 1
    assert "parameters of the adapters" in capsys.readouterr().out


def test_adapters_on_a_float_base_too(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="SEQ_CLS"))
    out = publish(adapted, folder=tmp_path / "out", base_model="org/base")
    report = read(out)
    assert (report["relation"], report["quantized"]) == ("adapter", None)
    code = (
        "import sys; sys.modules['hf_compress'] = None\n"
        "from transformers import AutoModelForSequenceClassification\nfrom peft import PeftModel\n"
        f"base = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / 'base')!r})\n"
        f"model = PeftModel.from_pretrained(base, {str(out)!r}).eval()\n"
        f"print(model(input_ids=__import__('torch').tensor({IDS.tolist()})).logits.tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, logits_of(adapted))


def test_adapters_that_nobody_could_load_are_refused(tmp_path):
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS")
    made_here = peft.get_peft_model(tiny_bert(), config)
    with pytest.raises(ValueError, match="was made here, and they are nothing without it"):
        publish(made_here, folder=tmp_path / "out", base_model="org/base")
    tiny_bert().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="pass its name on the Hub as `base_model`"):
        publish(adapted, folder=tmp_path / "out")
    adapted.add_adapter("other", config)
    with pytest.raises(ValueError, match="has the adapters default, other"):
        publish(adapted, folder=tmp_path / "out", base_model="org/base")
    assert not (tmp_path / "out").exists()
