"""Where the weights of students and teachers are: in shards, on devices of their own."""

import pytest
from distillation.test_teachers import SPREAD, losses, trainer_of
from distributed.test_two_ranks import launch
from tiny import language_rows, tiny_llama
from transformers import LlamaForCausalLM


def test_shards_train_as_copies_do(tmp_path):
    launch("../distillation/fsdp_ranks.py", str(tmp_path))


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_teacher_stays_on_the_devices_that_it_was_loaded_to(place, tmp_path):
    tiny_llama(seed=1, layers=3, **SPREAD).save_pretrained(tmp_path / "teacher")
    whole = losses(
        trainer_of(tmp_path, tiny_llama(**SPREAD), str(tmp_path / "teacher"), language_rows(rows=16))
    )
    rest = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    layers = {f"model.layers.{i}": place for i in (1, 2)}
    spread = LlamaForCausalLM.from_pretrained(
        tmp_path / "teacher",
        device_map={"": "cpu"} if place == "cpu" else {**dict.fromkeys(rest, "cpu"), **layers},
        offload_folder=tmp_path / "offloaded",
    )
    trainer = trainer_of(tmp_path, tiny_llama(**SPREAD), spread, language_rows(rows=16))
    assert losses(trainer) == pytest.approx(whole, rel=1e-5)
    there = {parameter.device.type for parameter in trainer.teacher.parameters()}
    assert there == ({"cpu"} if place == "cpu" else {"cpu", "meta"})
