"""What needs no package but torch and transformers, where none of the others is there."""

import os
import subprocess
import sys
from pathlib import Path

ALONE = """
import sys
for package in ("bitsandbytes", "torchao", "compressed_tensors", "peft", "trl"):
    sys.modules[package] = None
import torch
from short import trainer
from tiny import tiny_bert
from hf_compress import QuantizationCallback, analyse, quantize_oneshot_, save_quantized

folder = sys.argv[1]
callback = QuantizationCallback((8, 4), group_size=16, activations=8, learn_scale=True)
run = trainer(folder, callback, max_steps=4)
run.train()
save_quantized(run.model, f"{folder}/dense", grids=callback.grids, format="dense")
model = tiny_bert()
batches = [{"input_ids": torch.arange(5, 29).view(2, 12)}]
quantize_oneshot_(model, batches, bits=4, method="gptq")
analyse(model, bits=4).draw(f"{folder}/pictures")
try:
    save_quantized(run.model, f"{folder}/packed", grids=callback.grids)
except ImportError as error:
    print(error)
"""


def test_training_rounding_and_analysis_need_no_extra(tmp_path):
    paths = [str(Path(__file__).parents[1]), *sys.path]
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "dense" / "model.safetensors").exists()
    assert (tmp_path / "pictures" / "grid_errors.png").exists()
    assert 'pip install "hf-compress[quantization]"' in run.stdout
