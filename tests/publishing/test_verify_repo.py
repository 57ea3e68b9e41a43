"""`verify` of a repository, by the real client against a Hub."""

import json
import shutil

from publishing.runs import read
from tiny import classification_rows

UPLOAD = """
from huggingface_hub import HfApi
HfApi().create_repo(repo, exist_ok=True)
HfApi().upload_folder(repo_id=repo, folder_path=folder)
"""
VERIFY = """
import contextlib, io
from hf_compress.cli.verify import main
out = io.StringIO()
with contextlib.redirect_stdout(out):
    try:
        main(words)
    except SystemExit as ended:
        result = [ended.code, out.getvalue()]
"""


def test_a_repository_is_downloaded_and_checked(hub, client, published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "tiny")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    rows = tmp_path / "rows.jsonl"
    classification_rows(40, seed=1).to_json(rows)
    client.run(UPLOAD, repo="me/told", folder=folder)
    words = ["me/told", "--data", str(rows)]
    status, said = client.run(VERIFY, words=words)
    assert (status, " 0 do not" in said) == (0, True), said
    assert "compressed: accuracy" in said
    assert not [seen for seen in hub.log if seen.route == "resolve" and "training_args" in str(seen)]
    report = read(folder)
    report["compressed"]["bytes"] -= 8
    (folder / "report.json").write_text(json.dumps(report))
    client.run(UPLOAD, repo="me/told", folder=folder)
    status, said = client.run(VERIFY, words=words)
    assert status == 1
    assert "bytes on disk" in said
