"""The pruned model: the same outputs for the tokens that stay, and what is refused."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_bert
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    ByT5Tokenizer,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)
from vocabularies import SMALL, SPECIAL, TEXTS, bare, bytes_of_gpt2, kept

from hf_compress import quantized
from hf_compress.pruning.vocabulary.prune import prune_vocabulary
from hf_compress.samples import minilm


def test_a_real_model_gives_the_same_outputs():
    before, model = AutoTokenizer.from_pretrained(minilm()), AutoModel.from_pretrained(minilm())
    state = before.backend_tokenizer.to_str()
    weights = copy.deepcopy(model.state_dict())
    smaller, after = prune_vocabulary(model, before, TEXTS[:200])
    assert type(after) is type(before)
    assert type(smaller) is type(model)
    assert before.backend_tokenizer.to_str() == state
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert len(after) == smaller.config.vocab_size < 6000
    batches = (
        each(TEXTS[:4], padding=True, truncation=True, return_tensors="pt") for each in (before, after)
    )
    with torch.no_grad():
        expected, found = (
            each.eval()(**batch).last_hidden_state
            for each, batch in zip((model, smaller), batches, strict=True)
        )
    assert torch.equal(expected, found)


PAIR = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
MODELS = {
    "bert": (AutoModelForMaskedLM, BertConfig(**SMALL)),
    "bert untied": (AutoModelForMaskedLM, BertConfig(tie_word_embeddings=False, **SMALL)),
    "bert classifier": (AutoModelForSequenceClassification, BertConfig(num_labels=3, **SMALL)),
    "electra": (AutoModelForMaskedLM, ElectraConfig(embedding_size=8, **SMALL)),
    "llama": (AutoModelForCausalLM, LlamaConfig(**SMALL)),
    "llama tied": (AutoModelForCausalLM, LlamaConfig(tie_word_embeddings=True, **SMALL)),
    "gpt2": (AutoModelForCausalLM, GPT2Config(n_embd=16, n_layer=1, n_head=2)),
    "t5": (AutoModelForSeq2SeqLM, T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
    "bart": (
        AutoModelForSeq2SeqLM,
        BartConfig(decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, **PAIR),
    ),
}


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return bytes_of_gpt2()


def build(name, tokenizer, **ids):
    auto_class, config = MODELS[name]
    config = copy.deepcopy(config)
    number = tokenizer.convert_tokens_to_ids
    config.vocab_size = len(tokenizer) + 7  # rows beyond the tokens, as padded embeddings have them
    config.pad_token_id, config.bos_token_id, config.eos_token_id = number(["<pad>", "<s>", "</s>"])
    if config.is_encoder_decoder:
        config.decoder_start_token_id = number("<|im_start|>")
    model = auto_class.from_config(config).eval()
    # Biases of heads begin at zero, where a wrong order would not show.
    torch.manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.shape[-1:] == (config.vocab_size,):
            tensor.data.normal_()
    return auto_class, model


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_equal_at_the_kept_tokens(name, bytes_tokenizer, tmp_path):
    auto_class, model = build(name, bytes_tokenizer)
    texts = [*TEXTS[:20], "<tool> oil"]
    smaller, tokenizer = prune_vocabulary(model, bytes_tokenizer, texts)
    old = kept(bytes_tokenizer, tokenizer)
    assert smaller.config.vocab_size == len(tokenizer) < len(bytes_tokenizer)
    smaller.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = auto_class.from_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts[-3:]:
        before = bytes_tokenizer(text[:80], return_tensors="pt", return_token_type_ids=False)
        for each, new in ((tokenizer, smaller), (reloaded, again)):
            after = each(text[:80], return_tensors="pt", return_token_type_ids=False)
            more = {}, {}
            if model.config.is_encoder_decoder:
                more = {"decoder_input_ids": before.input_ids}, {"decoder_input_ids": after.input_ids}
            with torch.no_grad():
                expected, found = model(**before, **more[0]).logits, new(**after, **more[1]).logits
            if expected.shape[-1] == model.config.vocab_size:
                expected = expected[..., old]
            torch.testing.assert_close(found, expected)
    tied = smaller.config.tie_word_embeddings and smaller.get_output_embeddings() is not None
    if tied:
        assert smaller.get_output_embeddings().weight is smaller.get_input_embeddings().weight


def test_ids_in_configs_are_renumbered(bytes_tokenizer, tmp_path):
    _, model = build("bart", bytes_tokenizer)
    number = bytes_tokenizer.convert_tokens_to_ids
    settings = model.generation_config
    settings.eos_token_id = number(["</s>", "<tool>"])
    settings.forced_bos_token_id = number("\u0120said")  # used by no text here
    settings.suppress_tokens = number(["\u0120oil", "\u0120trade"])
    model.config.forced_eos_token_id = number("</s>")
    model.config.mask_token_id = len(bytes_tokenizer) + 3  # a row without a token
    model.config.sep_token_id = -1
    smaller, tokenizer = prune_vocabulary(model, bytes_tokenizer, [" the oil"])
    number = tokenizer.convert_tokens_to_ids
    for each in (smaller.config, smaller.generation_config):
        assert each.pad_token_id == number("<pad>")
        assert each.bos_token_id == number("<s>")
        assert each.decoder_start_token_id == number("<|im_start|>")
    assert smaller.generation_config.eos_token_id == number(["</s>", "<tool>"])
    assert smaller.generation_config.forced_bos_token_id == number("\u0120said")
    assert smaller.generation_config.suppress_tokens == [number("\u0120oil")]
    assert smaller.config.forced_eos_token_id == number("</s>")
    assert smaller.config.mask_token_id == len(tokenizer) == smaller.config.vocab_size - 1
    assert smaller.config.sep_token_id == -1
    table = smaller.get_input_embeddings()
    assert table.padding_idx == number("<pad>")
    row = model.get_input_embeddings().weight[len(bytes_tokenizer) + 3]
    assert torch.equal(table.weight[smaller.config.mask_token_id], row)


def test_dtypes_and_mode_stay(bytes_tokenizer):
    _, model = build("llama tied", bytes_tokenizer)
    model.to(torch.bfloat16)
    model.lm_head.weight.requires_grad_(False)
    smaller, _ = prune_vocabulary(model, bytes_tokenizer, ["oil"])
    assert {p.dtype for p in smaller.parameters()} == {torch.bfloat16}
    assert not smaller.training
    smaller.get_input_embeddings().weight.data.zero_()
    assert model.get_input_embeddings().weight.any()


def test_wrong_inputs_are_refused(bytes_tokenizer, tmp_path):
    auto_class, model = build("llama", bytes_tokenizer)
    with pytest.raises(ValueError, match="`texts` hold no token"):
        prune_vocabulary(model, bytes_tokenizer, [])
    with pytest.raises(ValueError, match="`texts` hold no token"):
        prune_vocabulary(model, bytes_tokenizer, ["", ""])
    with pytest.raises(TypeError, match="one string"):
        prune_vocabulary(model, bytes_tokenizer, "oil")
    with pytest.raises(TypeError, match="no string"):
        prune_vocabulary(model, bytes_tokenizer, [None])
    with pytest.raises(TypeError, match="fast one"):
        prune_vocabulary(model, ByT5Tokenizer(), ["oil"])
    with pytest.raises(TypeError, match="transformers model"):
        prune_vocabulary(torch.nn.Linear(2, 2), bytes_tokenizer, ["oil"])
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        prune_vocabulary(tiny_bert(), bytes_tokenizer, ["oil"])
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        prune_vocabulary(model, bare(["oil", *SPECIAL]), ["oil"])
    with pytest.raises(ValueError, match="merge_and_unload"):
        prune_vocabulary(get_peft_model(copy.deepcopy(model), LoraConfig()), bytes_tokenizer, ["oil"])
    hidden = copy.deepcopy(model)
    hidden.add_adapter(LoraConfig())
    with pytest.raises(ValueError, match="lora"):
        prune_vocabulary(hidden, bytes_tokenizer, ["oil"])
    model.generation_config.bad_words_ids = [[3, 4]]
    with pytest.raises(ValueError, match="bad_words_ids"):
        prune_vocabulary(model, bytes_tokenizer, ["oil"])


def test_a_quantized_model_is_refused(bytes_tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    auto_class, model = build("llama", bytes_tokenizer)
    model.save_pretrained(tmp_path)
    packed = auto_class.from_pretrained(tmp_path, quantization_config=quantized(8))
    with pytest.raises(ValueError, match="quantized"):
        prune_vocabulary(packed, bytes_tokenizer, ["oil"])
