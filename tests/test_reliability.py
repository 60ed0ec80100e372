"""What must not lose a run (resuming, signals: test_train.py) and what inputs must not do (damaged: test_fuzz.py)."""

import ast
import errno
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import (
    LABEL_MAP,
    REPO,
    FakeModel,
    Payload,
    assert_same_state,
    finish,
    read_log,
    run_script,
    start,
    training,
    write,
)  # fmt: skip
from PIL import Image
from torch.utils.data import DataLoader

import datasets
import model
import train
from datasets import PascalVOCDataset, read_image
from detect import detect
from utils import advice_for, exit_with_message, load_checkpoint, save_checkpoint, script_parameters

# --- Workers, memory, disks -----------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_ends_the_run_with_advice(lists, tmp_path):
    process = start(training(lists, workers=2, iterations=100_000), tmp_path)
    while process.poll() is None and not (tmp_path / "last.pth.tar").exists():
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    code, output = finish(process)
    assert code == 1 and "a process that prepares images died" in output and "fewer --workers" in output, output
    assert "--checkpoint=last.pth.tar" in output and "Traceback" not in output, output
    assert load_checkpoint(tmp_path / "last.pth.tar")["iteration"] % 2 == 0


@pytest.mark.parametrize("moment", ["in the handler of the first error", "when that is done"])
def test_a_dead_worker_is_reported_once_wherever_its_signal_comes(monkeypatch, moment):
    """A connection breaks; torch's handler of SIGCHLD raises a second error while the first is on its way out."""
    dead = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    before = signal.signal(signal.SIGCHLD, Mock(side_effect=dead))
    reset = signal.signal

    def reset_late(number, handler):
        monkeypatch.setattr(signal, "signal", reset)
        os.kill(os.getpid(), signal.SIGCHLD)  # before the handler is reset

    try:
        if moment == "in the handler of the first error":
            monkeypatch.setattr(signal, "signal", reset_late)
        hint = "--checkpoint=last.pth.tar goes on"
        advice = r"a process that prepares images died(.|\n)*--checkpoint=last"
        with pytest.raises(SystemExit, match=advice), exit_with_message(hint):
            raise EOFError
        os.kill(os.getpid(), signal.SIGCHLD)  # now it does nothing
    finally:
        reset(signal.SIGCHLD, before)


def test_few_open_files_are_enough(lists, tmp_path):
    """A batch passes from a worker in a handful of files, not in some for each of its images."""
    settings = {"batch_size": 48, "iterations": 1, "save_every": 0, "freeze_up_to": "conv5_3"}
    run_script(["sh", "-c", 'ulimit -n 150; exec "$@"', "sh", *training(lists, **settings)], tmp_path)
    assert load_checkpoint(tmp_path / "last.pth.tar")["iteration"] == 1


def test_an_error_while_a_batch_is_handed_over_reaches_the_run(lists, monkeypatch):
    """Shared memory that is full, as in a small container: an error, where the loader would wait for ever."""
    dataset, settings = PascalVOCDataset(lists, "TRAIN"), {"timeout": 100, "multiprocessing_context": "fork"}
    error = RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")
    monkeypatch.setattr(torch.Tensor, "share_memory_", Mock(side_effect=error))
    loader = DataLoader(dataset, 4, num_workers=1, collate_fn=dataset.collate_fn, **settings)
    with pytest.raises(RuntimeError, match="No space left on device") as caught:
        next(iter(loader))
    assert "docker run --shm-size" in advice_for(caught.value)


def test_workers_do_not_outlive_an_error(lists, tmp_path):
    shutil.copytree(lists, tmp_path / "lists")
    images = json.loads((lists / "TRAIN_images.json").read_text())
    images[5] = str(tmp_path / "moved away.jpg")
    write(tmp_path / "lists/TRAIN_images.json", images)
    process = start(training("lists", workers=3), tmp_path)
    code, output = finish(process)
    assert code == 1 and images[5] in output and "Traceback" not in output, output
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody of the group is left


@pytest.mark.parametrize(("error", "advice"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate."), "--batch_size"), (MemoryError(), "--batch_size"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "--batch_size"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "out of memory on the GPU"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), "--workers"),
    (torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no gcc"), []), "--compile_model=False"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "--workers"),
    (RuntimeError("DataLoader timed out after 600 seconds"), "--workers"),
    # A worker died while it sent a batch.
    (ConnectionResetError(104, "Connection reset by peer"), "--workers"), (EOFError(), "EOFError"),
    (ConnectionRefusedError(111, "Connection refused"), "--workers"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--shm-size"),
    (OSError("last.pth.tar: could not write the checkpoint: [Errno 28] No space left on device"), "to another disk"),
])  # fmt: skip
def test_errors_of_the_machine_say_what_to_change(error, advice):
    with pytest.raises(SystemExit, match=r"^error: (.|\n)*go on so$") as caught, exit_with_message("go on so"):
        raise error
    assert advice in str(caught.value) and caught.value.__cause__ is error


def test_a_file_that_cannot_be_written_does_not_end_the_run(lists, unbroken, tmp_path, monkeypatch, capsys):
    """A full disk, or another program that has the file open on Windows: rows of the log are lost, checkpoints wait."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(train, "end_workers", lambda: None)  # an earlier test's loader may still have some
    refused = []

    def refuse(state, path):
        if state["iteration"] < 6:
            refused.append(path)
            raise PermissionError(13, "used by another process", path)
        save_checkpoint(state, path)

    def open_or_not(path, *mode, **options):
        if str(path).endswith(".csv") and len(refused) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open(path, *mode, **options)

    monkeypatch.setattr(train.utils, "save_checkpoint", refuse)
    monkeypatch.setattr(train, "open", open_or_not, raising=False)
    for name, value in script_parameters(vars(train)).items():
        monkeypatch.setattr(train, name, value)
    train.set_parameters(training(lists, workers=0)[2:])
    train.main()
    output = capsys.readouterr().out
    assert output.count("used by another process") == 2 and output.count("last.csv lacks a row") == 2
    assert [row["iteration"] for row in read_log("last.csv")] == ["1", "2", "5", "6", "7", "8"]
    assert_same_state(unbroken / "last.pth.tar", tmp_path / "last.pth.tar")
    monkeypatch.setattr(train.utils, "save_checkpoint", Mock(side_effect=OSError("full")))
    train.set_parameters(["--checkpoint=last.pth.tar", "--iterations=9"])
    with pytest.raises(SystemExit, match="error: full"):  # at the end it has to be
        train.main()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_errors_of_the_machine_skip_no_image(lists, monkeypatch, number):
    monkeypatch.setattr(datasets, "check_image_file", Mock(side_effect=OSError(number, os.strerror(number))))
    dataset = PascalVOCDataset(lists, "TRAIN", skip_corrupt=True)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        dataset[0]
    assert str(dataset.image_paths[0]) in str(caught.value) and dataset.skipped_images() == []


@pytest.mark.parametrize(("name", "value"), [
    ("warmup", -5), ("lr", float("nan")), ("lr", 0.0), ("grad_clip", -1.0), ("weight_decay", float("inf")),
    ("iterations", 0), ("log_every", 0), ("optimizer_name", "adam"), ("schedule", "linear"), ("minutes", -1.0),
    ("save_to", "no_such_folder/last.pth.tar"), ("save_to", ""), ("save_to", "a_folder"), ("sync_batch_norm", True),
    ("ema_decay", 1.0), ("ema_decay", -0.1), ("save_every", -1), ("momentum", 1.0),
])  # fmt: skip
def test_parameters_that_cannot_work_are_refused(tmp_path, monkeypatch, name, value):
    (tmp_path / "a_folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "device", "cpu")  # sync_batch_norm needs CUDA, and counts with several processes
    monkeypatch.setattr(train, "N_PROCESSES", 2)
    monkeypatch.setattr(train, name, value)
    with pytest.raises(ValueError, match=rf"^{name} is {value!r}"):
        train.main()


# --- Checkpoints and weights: of other machines, and no code from data ----------------------------


def test_a_checkpoint_of_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    """Storages tagged as a GPU's, as torch.save tags them there."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    save_checkpoint({"model": {"w": torch.arange(4.0)}}, tmp_path / "gpu.pth.tar")
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA device"):
            torch.load(tmp_path / "gpu.pth.tar", weights_only=True)  # the tag is a real one
    weights = load_checkpoint(tmp_path / "gpu.pth.tar")["model"]["w"]
    assert weights.device.type == "cpu" and torch.equal(weights, torch.arange(4.0))


def test_nothing_unpickles_and_nothing_evaluates():
    """Every torch.load says weights_only=True, but for one that makes nothing of what it reads; no eval, no pickle; of
    YAML only text and containers."""
    loads, never = 0, ("eval", "exec", "pickle.load", "pickle.loads", "np.load", "yaml.unsafe_load", "os.system")
    for path in [*REPO.glob("*.py"), *REPO.glob("tools/*.py")]:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for node in (node for node in nodes if isinstance(node, ast.Call)):
            name, keywords = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
            place = f"{path.name}, line {node.lineno}: {name}"
            if name == "torch.load":
                loads += 1
                inert = "InertPickle" in ast.unparse(keywords.get("pickle_module", node))  # it makes no object
                assert inert or getattr(keywords.get("weights_only"), "value", None) is True, place
            if name == "yaml.load":
                assert ast.unparse(keywords["Loader"]) == "yaml.BaseLoader", place
            assert name not in never and "shell" not in keywords and "allow_pickle" not in keywords, place
    assert loads >= 2


@pytest.mark.parametrize("reader", ["load_model", "checkpoint", "finetune_from", "pretrained"])
def test_a_payload_runs_in_no_reader(tmp_path, monkeypatch, reader):
    """Every way in which a script reads a file of weights."""
    path = tmp_path / "evil.pth"
    torch.save({"format": "ssd300/1", "model": {}, "extra": Payload(tmp_path / "ran")}, path)
    if reader != "load_model":
        monkeypatch.setattr(train, reader, str(path))
    with pytest.raises(ValueError, match=r"evil\.pth"):
        model.load_model(path) if reader == "load_model" else train.start_or_resume(LABEL_MAP, torch.device("cpu"))
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # the payload is a real one
    assert (tmp_path / "ran").exists()


# --- Images and their paths -----------------------------------------------------------------------


def write_lists(folder, paths):
    """Lists of images with one object each, without looking at the images."""
    entry = {"boxes": [[1, 2, 20, 29]], "labels": [1], "difficulties": [0], "size": [40, 30]}
    write(folder / "label_map.json", {"background": 0, "cat": 1})
    write(folder / "TRAIN_images.json", [str(path) for path in paths])
    write(folder / "TRAIN_objects.json", [entry] * len(paths))
    return PascalVOCDataset(folder, "TRAIN", keep_difficult=True)


@pytest.mark.parametrize("name", ["with spaces.jpg", "ünïcödé 狗.jpg", "quote'\"s.jpg", "%41 &amp;.jpg", "-n.jpg"])
def test_odd_file_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((40, 30), 50).convert("RGB").save(tmp_path / name)
    (tmp_path / "link.jpg").symlink_to(name)
    dataset = write_lists(tmp_path, [tmp_path / name, name, "link.jpg"])  # absolute, relative, by a link
    assert all(dataset[i][0].shape == (3, 300, 300) for i in range(3))
    assert detect(name, model=FakeModel()).size == (40, 30)


@pytest.mark.parametrize("name", ["gone", "loop", "folder", "pipe", "a\0b", "x" * 300, "\ud800", "/dev/zero"])
def test_paths_that_lead_to_no_image_are_named(tmp_path, name):
    """A pipe would be waited for, and a device could be read for ever: neither is opened."""
    path = name if name == "/dev/zero" else f"{tmp_path}/{name}.jpg"
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    dataset = write_lists(tmp_path, [path])
    for action in (lambda: dataset[0], lambda: detect(path, model=FakeModel()), lambda: read_image(path)):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            action()
        assert type(caught.value) in (ValueError, FileNotFoundError)
        assert str(tmp_path) in str(caught.value) or name in str(caught.value)


def test_the_largest_images_take_bounded_memory(tmp_path):
    """The costliest kinds, as large as they may be, one after the other in a process that may take 2 GB more."""
    for name, mode in (("grey16.png", "I;16"), ("transparent.png", "RGBA")):
        Image.new(mode, (8900, 8900)).save(tmp_path / name, compress_level=1)
    code = (
        f"import resource, sys\nsys.path[:0] = {[str(REPO / folder) for folder in ('', 'tests', 'tools')]}\n"
        "from helpers import FakeModel\nfrom detect import detect\n"
        "from datasets import NO_OBJECTS, read_image, transform\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nbefore = peak()\n"
        "transform(read_image('grey16.png'), *NO_OBJECTS, 'TRAIN')\n"
        "detect('transparent.png', model=FakeModel())\n"
        "assert peak() - before < 2_000_000, peak() - before\n"
    )
    run_script([sys.executable, "-c", code], tmp_path)
