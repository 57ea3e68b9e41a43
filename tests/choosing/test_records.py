import errno
import json
import os
import resource
import subprocess
import sys

import pytest

from hf_compress.choosing.records import Records, digest_of, write_whole


def counted(calls, value=1):
    def make():
        calls.append(value)
        return {"value": value}

    return make


def test_nothing_is_made_twice(tmp_path):
    calls = []
    for _ in range(3):
        assert Records(tmp_path / "records").once("a", counted(calls)) == {"value": 1}
    assert calls == [1]


@pytest.mark.parametrize("content", ["", '{"value": 1', "[1]", "null", "\x00\x00"])
def test_a_damaged_record_is_told_and_made_again(tmp_path, caplog, content):
    calls = []
    records = Records(tmp_path)
    records.once("a", counted(calls))
    (tmp_path / "a.json").write_text(content)
    assert records.once("a", counted(calls, 2)) == {"value": 2}
    assert "a.json is damaged, and what it held is done again" in caplog.text
    assert json.loads((tmp_path / "a.json").read_text()) == {"value": 2}


def test_what_no_longer_holds_is_made_again(tmp_path):
    calls = []
    records = Records(tmp_path)
    for _ in range(2):
        records.once("a", counted(calls), holds=lambda found: False)
    assert calls == [1, 1]


def test_what_failed_leaves_no_record(tmp_path):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Records(tmp_path).once("a", fail)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_leaves_the_earlier_record(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, {"value": 1})
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from hf_compress.choosing.records import write_whole\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "write_whole(Path(sys.argv[1]), {'value': 'x' * 100})\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, env={**os.environ}
    )
    assert run.returncode != 0
    assert os.strerror(errno.EFBIG) in run.stderr
    assert json.loads(path.read_text()) == {"value": 1}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_digest_is_of_the_bytes_alone():
    assert digest_of([b"ab", b"c"]) == digest_of([b"a", b"bc"]) != digest_of([b"abd"])
