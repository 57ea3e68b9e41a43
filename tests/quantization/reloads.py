"""Models on integer grids, and what a process without this package reads from their files."""

import os
import subprocess
import sys

import torch

from hf_compress.quantization.grids import fake_quantize, grouped
from hf_compress.quantization.schemes import Scheme, fit
from hf_compress.targets import find_targets

INPUT = torch.arange(5, 29).view(2, 12)

# For each folder what the model there holds after its first forward, with its logits.
RELOAD = """
import json, sys
sys.modules["hf_compress"] = sys.modules["callbacks"] = None
import torch, transformers
from safetensors.torch import save_file

torch.set_num_threads(int(sys.argv[1]))
for folder in sys.argv[2:]:
    config = json.load(open(f"{folder}/config.json"))
    kind = getattr(transformers, config["architectures"][0])
    ways = {"plain": {}}
    if config.get("quantization_config", {}).get("quant_method") == "compressed-tensors":
        dequantize = transformers.CompressedTensorsConfig(dequantize=True)
        ways["dequantized"] = {"quantization_config": dequantize}
    for name, settings in ways.items():
        model = kind.from_pretrained(folder, **settings).eval()
        with torch.no_grad():
            logits = model(torch.arange(5, 29).view(2, 12)).logits
        output, table = model.get_output_embeddings(), model.get_input_embeddings()
        tied = torch.tensor(output is not None and output.weight is table.weight)
        tensors = {
            name: value.dequantize() if hasattr(value, "qdata") else value.clone()
            for name, value in model.state_dict().items()
        }
        save_file(tensors | {"logits": logits, "tied": tied}, f"{folder}/{name}.reloaded")
"""


def reload(root, folders):
    """Writes `plain.reloaded` into each folder, and for compressed-tensors `dequantized.reloaded`."""
    names = [str(folder) for folder in folders]
    command = [sys.executable, "-c", RELOAD, str(torch.get_num_threads()), *names]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, cwd=root)


@torch.no_grad()
def rounded(model, bits=4, group_size=None, symmetric=True):
    """`model` on grids, in place and untrained, and the grids."""
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=symmetric, grid="minmax")
    grids = {}
    for name, target in find_targets(model).targets.items():
        groups = grouped(target.param, input_dim=target.input_dim, group_size=group_size)
        grids[name] = fit(groups, scheme)
        groups.copy_(fake_quantize(groups, grids[name]))
    return model.eval(), grids


def tensor_bytes(folder):
    """Of the file without its header, which grows with the number of tensors and not with theirs."""
    file = folder / "model.safetensors"
    return file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
