"""The real client in a process of its own: which Hub it speaks to, it reads when it is imported."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

TESTS = Path(__file__).parents[1]


def environment(url: str, home: Path, token: str | None = None, **more: str) -> dict[str, str]:
    """Of a process that knows no other Hub, and nothing that another has fetched."""
    known = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    known |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS, TESTS.parent))),
    }
    return known | ({"HF_TOKEN": token} if token else {}) | more


class Client:
    """Runs pieces of Python, one after the other, in one process. `said` is what it has written to
    its streams: logs, bars and tracebacks.

    A process for each would import torch and transformers each time.
    """

    def __init__(self, folder: Path, url: str, token: str | None = None, **more: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "client.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=environment(url, folder / "home", token, **more),
                text=True,
            )

    def run(self, code: str, **given: object) -> object:
        """The value of `result` that `code` leaves, from JSON. given: names that `code` may use; paths
        become text. Raises RuntimeError with the type and the message of an error there."""
        self._process.stdin.write(json.dumps([code, given], default=str) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client has ended: {self.said[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    @property
    def said(self) -> str:
        return self._log.read_text()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=300)


def _serve() -> None:
    # What the code prints goes to the log: the answers have this stream for themselves.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        code, given = json.loads(line)
        try:
            exec(code, given)
            answer = {"result": given.get("result")}
        except BaseException as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
