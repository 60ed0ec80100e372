"""Checkpoints: whole or not at all, and read without running code."""

import os
import resource
import subprocess
import sys

import pytest
import torch
from conftest import REPO

from utils import load_checkpoint, save_checkpoint

CONTENTS = {"iteration": 3, "label_map": {"background": 0, "cat": 1}, "model": {"w": torch.arange(5.0)}}


def test_round_trip(tmp_path):
    save_checkpoint(CONTENTS, tmp_path / "c.pth.tar")
    loaded = load_checkpoint(tmp_path / "c.pth.tar")
    assert loaded["iteration"] == 3 and loaded["label_map"] == CONTENTS["label_map"]
    assert torch.equal(loaded["model"]["w"], CONTENTS["model"]["w"])
    assert [path.name for path in tmp_path.iterdir()] == ["c.pth.tar"]  # no temporary file stays


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.tar"):
        load_checkpoint(tmp_path / "nothing.tar")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file(tmp_path, share):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(CONTENTS, path)
    contents = path.read_bytes()
    path.write_bytes(contents[: int(share * len(contents))])
    with pytest.raises(ValueError, match=r"c\.pth\.tar"):
        load_checkpoint(path)


@pytest.mark.parametrize("contents", [{"state_dict": {}}, [1, 2], torch.zeros(3), {"format": "other/1"}])
def test_foreign_file(tmp_path, contents):
    torch.save(contents, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match=r"foreign\.pth: not a checkpoint of this repo"):
        load_checkpoint(tmp_path / "foreign.pth")


def test_text_file(tmp_path):
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"page\.pth"):
        load_checkpoint(tmp_path / "page.pth")


class Payload:
    """Unpickling it runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickled_payload_does_not_run(tmp_path):
    torch.save({**CONTENTS, "format": "ssd300/1", "extra": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth"):
        load_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # the payload is a real one
    assert (tmp_path / "ran").exists()


def test_the_old_checkpoint_survives_a_full_disk(tmp_path):
    """A limit on the size of files stands for the disk: the write breaks off in the middle."""
    path = tmp_path / "c.pth.tar"
    save_checkpoint(CONTENTS, path)
    before = path.read_bytes()
    code = (
        f"import sys; sys.path.insert(0, {str(REPO)!r})\n"
        "import resource, signal, torch\n"
        "from utils import save_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"  # then write() fails, as on a full disk
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))\n"
        f"save_checkpoint({{'model': {{'w': torch.zeros(1_000_000)}}}}, {str(path)!r})\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode != 0
    assert "could not write the checkpoint, the one before it is unchanged" in process.stderr
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["c.pth.tar"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(OSError, match="no_such_folder"):
        save_checkpoint(CONTENTS, tmp_path / "no_such_folder" / "c.pth.tar")
