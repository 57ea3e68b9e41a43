"""Tiny models in folders, with the tokenizer of all-MiniLM-L6-v2."""

import json

import pytest
from tiny import tiny_llama
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from hf_compress.samples import corpus, minilm


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """Folder of a BERT for the classes of R8: 4 layers, 4 heads, 64 neurons, width 32."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    tokenizer.save_pretrained(folder)
    names = corpus("reuters-r8")["train"].features["label"].names
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """Folder of a Llama: 2 layers, 4 heads in 2 groups, 64 neurons, width 32."""
    folder = tmp_path_factory.mktemp("language_model")
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    tokenizer.save_pretrained(folder)
    llama = tiny_llama()
    llama.resize_token_embeddings(len(tokenizer))
    llama.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """File of texts without labels."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = corpus("reuters-r8")["train"].select(range(40))
    file.write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    return str(file)
