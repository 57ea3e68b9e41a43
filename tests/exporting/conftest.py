import pytest
import torch
from publishing.runs import tokenizer
from tiny import classification_rows, tiny_bert

from hf_compress import publish, quantize_oneshot_, save_quantized


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """File of the rows that exports are compared on."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    classification_rows(20, seed=1).to_json(file)
    return str(file)


@pytest.fixture
def published(tmp_path):
    """A model with its card."""
    return publish(
        tiny_bert(), folder=tmp_path / "tiny", base_model="org/base", processing_class=tokenizer()
    )


def on_grids(folder, **scheme):
    """A model whose weights lie on integer grids, saved as integers; and its grids."""
    model = tiny_bert().eval()
    grids = quantize_oneshot_(model, None, **scheme)
    save_quantized(model, folder, grids=grids)
    return model, grids


@pytest.fixture(autouse=True)
def _seed_of_inputs():
    torch.manual_seed(0)
