"""What must not lose a run, and what inputs must not be able to do: issue by issue, with the real scripts.

Resuming and signals are tested in test_train.py, checkpoint files in test_checkpoints.py, damaged inputs in
test_fuzz.py.
"""

import ast
import errno
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import REPO
from PIL import Image
from test_checkpoints import Payload
from test_detect import FakeModel, png
from test_train import assert_same_state, command, finish, lists, read_log, run, start, unbroken  # noqa: F401

import datasets
import model
import train
from datasets import PascalVOCDataset, read_image
from detect import detect
from utils import advice_for, load_checkpoint, save_checkpoint, write_file


def wait_for(process, path):
    """Wait until a run has written a file, or has ended."""
    while process.poll() is None and not path.exists():
        time.sleep(0.01)


def worker_pids(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# ----------------------------------------------------------------------------------------------
# Workers
# ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_ends_the_run_with_advice(lists, tmp_path):  # noqa: F811
    process = start(command(lists, workers=2, iterations=100_000), tmp_path)
    wait_for(process, tmp_path / "last.pth.tar")
    os.kill(worker_pids(process.pid)[0], signal.SIGKILL)
    code, output = finish(process)
    assert code == 1
    assert "a process that prepares images died" in output and "fewer --workers" in output
    assert "--checkpoint=last.pth.tar" in output and "Traceback" not in output
    assert load_checkpoint(tmp_path / "last.pth.tar")["iteration"] % 4 == 0


def test_few_open_files_are_enough(lists, tmp_path):  # noqa: F811
    """A batch passes from a worker in a handful of files, not in some for each of its images."""
    code = "import resource, os, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (150, 150)); "
    code += "os.execv(sys.argv[1], sys.argv[1:])"
    settings = {"batch_size": 48, "iterations": 6, "save_every": 0, "warmup": 0}
    run([sys.executable, "-c", code, *command(lists, **settings)], tmp_path)
    assert len(read_log(tmp_path / "train_log.csv")) == 3


def test_an_error_while_a_batch_is_handed_over_reaches_the_run(lists, tmp_path, monkeypatch):  # noqa: F811
    """Shared memory that is full, as in a small container: an error, where the loader would wait for ever."""
    dataset = PascalVOCDataset(lists, "TRAIN")
    monkeypatch.setattr(torch.Tensor, "share_memory_", full_memory)
    loader = torch.utils.data.DataLoader(
        dataset, 4, num_workers=1, collate_fn=dataset.collate_fn, timeout=100, multiprocessing_context="fork"
    )
    with pytest.raises(RuntimeError, match="No space left on device") as caught:
        next(iter(loader))
    assert "docker run --shm-size" in advice_for(caught.value)


def full_memory(_tensor):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_a_worker_that_ignores_sigterm_does_not_outlive_an_error(lists, tmp_path):  # noqa: F811
    """The script's own steps, with an error in the middle: it ends at once and takes its workers with it."""
    for path in lists.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    images = json.loads((lists / "TRAIN_images.json").read_text())
    images[5] = str(tmp_path / "moved away.jpg")
    (tmp_path / "TRAIN_images.json").write_text(json.dumps(images))
    process = start(command(tmp_path, workers=3, skip_corrupt=True), tmp_path)
    code, output = finish(process)
    assert code == 1 and f"{images[5]}: no such image" in output
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody of the group is left


# ----------------------------------------------------------------------------------------------
# Memory, disks, signals
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "--batch_size"),
        (MemoryError(), "--batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "on the CPU; fewer --workers"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "--batch_size"),
        (torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no gcc"), []), "--compile_model=False"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "--workers"),
        (RuntimeError("DataLoader timed out after 600 seconds"), "--workers"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "--shm-size"),
        (OSError("last.pth.tar: could not write the checkpoint: [Errno 28] No space left on device"), "--save_to"),
    ],
)
def test_errors_of_the_machine_say_what_to_change(lists, tmp_path, monkeypatch, error, advice):  # noqa: F811
    def fail(*_arguments):
        raise error

    settings = {"data_folder": str(lists), "workers": 0, "save_to": str(tmp_path / "last.pth.tar")}
    for name, value in {**settings, "log_file": str(tmp_path / "log.csv")}.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(train, "train", fail)
    monkeypatch.setattr(train, "start_or_resume", lambda *_: (model.SSD300(5), None, 0, -1.0, False))
    monkeypatch.setattr(train, "end_workers", lambda: None)
    with pytest.raises(SystemExit, match=r"^error: (.|\n)*go on with --checkpoint=") as caught:
        train.main()
    assert advice in str(caught.value) and caught.value.__cause__ is error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_out_of_memory(lists, tmp_path):  # noqa: F811
    code = "import torch, sys; torch.cuda.set_per_process_memory_fraction(0.0005); sys.argv = sys.argv[1:]; "
    code += (
        f"sys.path.insert(0, {str(REPO / 'tests')!r}); import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = command(lists, batch_size=512, compile_model=False)
    process = start([sys.executable, "-c", code, *arguments[1:]], tmp_path)
    code, output = finish(process)
    assert code == 1 and "error: out of memory on cuda:0; a smaller --batch_size" in output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full stands for a full disk")
def test_a_full_disk_for_the_log_does_not_end_the_run(lists, unbroken, tmp_path):  # noqa: F811
    log = tmp_path / "log.csv"
    log.symlink_to("/dev/full")
    output = run(command(lists, log_file=log), tmp_path)
    assert "warning" in output and "the run goes on" in output
    assert_same_state(unbroken / "last.pth.tar", tmp_path / "last.pth.tar")
    assert Path("/dev/full").is_char_device()


COLUMNS = train.TrainingLog.columns
HEADER = b",".join(name.encode() for name in COLUMNS) + b"\r\n"


def test_a_resumed_log_keeps_whole_rows_up_to_the_checkpoint(tmp_path):
    path = tmp_path / "log.csv"
    row = "{},0.1,2.0,1e-3,9.9,\r\n"
    path.write_text(row.format(5) + "not a row\n" + row.format(10) + row.format(15) + "1,0.2,", newline="")
    train.open_log(path, COLUMNS, 10).close()
    assert path.read_bytes() == HEADER + (row.format(5) + row.format(10)).encode()
    train.open_log(path, COLUMNS, 0).close()  # a run that starts anew
    assert path.read_bytes() == HEADER


def test_a_log_that_cannot_be_written_anew_stays_as_it_is(tmp_path, monkeypatch, capsys):
    def fail(_source, _target):
        raise OSError(28, "No space left on device")

    path = tmp_path / "log.csv"
    path.write_bytes(HEADER + b"5,0.1,2.0,1e-3,9.9,\r\n15,0.1,2.0,1e-3,9.9,\r\n")
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    assert train.open_log(path, COLUMNS, 10) is None
    assert "warning: no log is written" in capsys.readouterr().out
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_sigterm_may_come_twice(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    stop = train.StopRequest()
    stop.receive(signal.SIGTERM, None)
    stop.receive(signal.SIGTERM, None)
    stop.receive(signal.SIGINT, None)
    assert stop.signal == signal.SIGTERM
    stop = train.StopRequest()
    stop.receive(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop.receive(signal.SIGINT, None)


def test_a_failed_evaluation_costs_no_iteration(lists, tmp_path):  # noqa: F811
    broken = tmp_path / "lists"
    shutil.copytree(lists, broken)
    paths = json.loads((broken / "TEST_images.json").read_text())
    (broken / "TEST_images.json").write_text(json.dumps([str(tmp_path / "gone.jpg"), *paths[1:]]))
    settings = {"iterations": 4, "evaluate_every": 4, "save_every": 0, "workers": 0}
    code, output = finish(start(command(broken, **settings), tmp_path))
    assert code == 1 and "gone.jpg" in output, output
    assert load_checkpoint(tmp_path / "last.pth.tar")["iteration"] == 4


def test_lists_to_evaluate_on_are_looked_at_first(lists, tmp_path):  # noqa: F811
    broken = tmp_path / "lists"
    shutil.copytree(lists, broken)
    (broken / "TEST_objects.json").unlink()
    code, output = finish(start(command(broken, iterations=4, evaluate_every=4), tmp_path))
    assert code == 1 and "error: " in output and "TEST_objects.json" in output and "Traceback" not in output, output
    assert not (tmp_path / "last.pth.tar").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("warmup", -5), ("lr", math.nan), ("lr", 0.0), ("grad_clip", -1.0), ("weight_decay", math.inf), ("iterations", 0)],
)
def test_parameters_out_of_range_are_refused(monkeypatch, name, value):
    monkeypatch.setattr(train, name, value)
    with pytest.raises(ValueError, match=rf"{name} is {value}"):
        train.check_parameters()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_errors_of_the_machine_skip_no_image(lists, monkeypatch, number):  # noqa: F811
    def fail(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(datasets, "check_image_file", fail)
    dataset = PascalVOCDataset(lists, "TRAIN", skip_corrupt=True)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        dataset[0]
    assert str(dataset.image_paths[0]) in str(caught.value)
    assert dataset.skipped_images() == []


def test_a_signal_stops_between_two_rows_of_the_log(lists, tmp_path):  # noqa: F811
    """The step is finished, not the ten until the log's next row."""
    settings = {"iterations": 100_000, "log_every": 100_000, "save_every": 3}
    process, checkpoint = start(command(lists, **settings), tmp_path), tmp_path / "last.pth.tar"
    wait_for(process, checkpoint)
    os.killpg(process.pid, signal.SIGTERM)
    code, output = finish(process)
    assert code == 128 + signal.SIGTERM, output
    assert f"stopped by SIGTERM after iteration {load_checkpoint(checkpoint)['iteration']}" in output


@pytest.mark.parametrize("name", ["no_such_folder/last.pth.tar", "", "a_folder"])
def test_a_checkpoint_that_could_not_be_written_is_refused_at_the_start(tmp_path, monkeypatch, name):
    (tmp_path / "a_folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "save_to", name)
    with pytest.raises(ValueError, match="save_to"):
        train.main()


def test_losses_are_checked_now_and_then(monkeypatch):
    monkeypatch.setattr(train, "log_every", 0)
    with pytest.raises(ValueError, match="log_every is 0"):
        train.check_parameters()


def test_what_a_killed_save_left_behind_goes_with_the_next(tmp_path):
    (tmp_path / "c.pth.tar.4321.tmp").write_bytes(b"half")
    (tmp_path / "other.pth.tar.4321.tmp").write_bytes(b"half")
    save_checkpoint({"iteration": 1}, tmp_path / "c.pth.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pth.tar", "other.pth.tar.4321.tmp"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    def write_half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "file"
    write_file(path, b"old")
    with pytest.raises(KeyboardInterrupt):
        write_file(path, write_half)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------------------------------
# Checkpoints of other machines and settings
# ----------------------------------------------------------------------------------------------


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_moves_from_the_gpu_to_the_cpu(lists, tmp_path):  # noqa: F811
    run(command(lists, iterations=8, compile_model=False), tmp_path)
    arguments = command(lists, iterations=12, checkpoint="last.pth.tar")
    result = subprocess.run(
        arguments, cwd=tmp_path, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(tmp_path / "last.pth.tar")["iteration"] == 12


def test_a_resumed_run_keeps_momentum_and_takes_new_settings(monkeypatch):
    layer = torch.nn.Linear(2, 2)
    optimizer = train.make_optimizer(layer, torch.device("cpu"))
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = {"optimizer": optimizer.state_dict(), "rng": train.rng_states(), "iteration": 7, "best_map": 0.5}
    monkeypatch.setattr(train, "weight_decay", 0.25)
    monkeypatch.setattr(train, "momentum", 0.5)
    resumed = train.make_optimizer(layer, torch.device("cpu"))
    assert train.restore_training_state(saved, resumed) == (7, 0.5)
    assert [group["momentum"] for group in resumed.param_groups] == [0.5, 0.5]
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.25, 0]
    momentum = resumed.state[layer.weight]["momentum_buffer"]
    assert torch.equal(momentum, optimizer.state[layer.weight]["momentum_buffer"])


def test_compressed_archives_are_refused_unread(tmp_path):
    """A gigabyte of zeros makes a file of one megabyte; nothing of it is unpacked."""
    path = tmp_path / "bomb.pth.tar"
    save_checkpoint({"model": {"w": torch.zeros(10)}}, path)
    stream = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, bytes(10**6) if name.endswith("data/0") else source.read(name))
    path.write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match=r"bomb\.pth\.tar: damaged.*compressed"):
        load_checkpoint(path)


# ----------------------------------------------------------------------------------------------
# No code from data
# ----------------------------------------------------------------------------------------------


def test_nothing_unpickles_and_nothing_evaluates():
    """Every torch.load says weights_only=True; what could run code from data is called nowhere."""
    loads = 0
    for path in [*REPO.glob("*.py"), *REPO.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, keywords = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
            place = f"{path.name}, line {node.lineno}: {name}"
            if name == "torch.load":
                loads += 1
                assert getattr(keywords.get("weights_only"), "value", None) is True, place
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "np.load", "yaml.load", "os.system"), (
                place
            )
            assert "shell" not in keywords and "allow_pickle" not in keywords, place
    assert loads >= 2


def readers_of_weights():
    """Every way in which a script reads a file of weights."""
    return {
        "a model": model.load_model,
        "a resumed run": lambda path: start_from("checkpoint", path),
        "a fine-tuned run": lambda path: start_from("finetune_from", path),
        "pretrained weights": lambda path: start_from("pretrained", path),
    }


def start_from(parameter, path):
    settings = {"checkpoint": "", "finetune_from": "", "pretrained": "", parameter: str(path)}
    before = {name: getattr(train, name) for name in settings}
    try:
        vars(train).update(settings)
        train.start_or_resume({"background": 0, "cat": 1}, torch.device("cpu"))
    finally:
        vars(train).update(before)


@pytest.mark.parametrize("kind", readers_of_weights())
def test_a_payload_runs_in_no_reader(tmp_path, kind):
    path = tmp_path / "evil.pth"
    torch.save({"format": "ssd300/1", "model": {}, "extra": Payload(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match=r"evil\.pth"):
        readers_of_weights()[kind](path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # the payload is a real one
    assert (tmp_path / "ran").exists()


# ----------------------------------------------------------------------------------------------
# Images and their paths
# ----------------------------------------------------------------------------------------------


def write_lists(folder, paths, size=(40, 30)):
    """Lists of images with one object each, without looking at the images."""
    entry = {"boxes": [[1, 2, 20, 29]], "labels": [1], "difficulties": [0], "size": list(size)}
    (folder / "label_map.json").write_text(json.dumps({"background": 0, "cat": 1}))
    (folder / "TRAIN_images.json").write_text(json.dumps([str(path) for path in paths]))
    (folder / "TRAIN_objects.json").write_text(json.dumps([entry] * len(paths)))
    return PascalVOCDataset(folder, "TRAIN", keep_difficult=True)


@pytest.mark.parametrize("name", ["with spaces.jpg", "ünïcödé 狗.jpg", "quote'\"s.jpg", "%41 &amp;.jpg", "-n.jpg"])
def test_odd_file_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((40, 30), 50).convert("RGB").save(tmp_path / name)
    (tmp_path / "link.jpg").symlink_to(name)
    dataset = write_lists(tmp_path, [tmp_path / name, name, "link.jpg"])  # absolute, relative, by a link
    assert all(dataset[i][0].shape == (3, 300, 300) for i in range(3))
    assert detect(name, model=FakeModel()).size == (40, 30)


@pytest.mark.parametrize(
    "name", ["gone.jpg", "loop.jpg", "folder.jpg", "pipe.jpg", "a\0b.jpg", "x" * 300, "\ud800.jpg"]
)
def test_paths_that_lead_to_no_image_are_named(tmp_path, name):
    """A pipe would be waited for, and a device could be read for ever: neither is opened."""
    path = f"{tmp_path}/{name}"
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    dataset = write_lists(tmp_path, [path])
    for action in (lambda: dataset[0], lambda: detect(path, model=FakeModel()), lambda: read_image(path)):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            action()
        assert type(caught.value) in (ValueError, FileNotFoundError)
        assert path in str(caught.value) or repr(path) in str(caught.value)


def test_a_device_is_no_image():
    with pytest.raises(ValueError, match="/dev/zero"):
        read_image("/dev/zero")
    with pytest.raises(ValueError, match="/dev/zero"):
        detect("/dev/zero", model=FakeModel())


@pytest.mark.parametrize("skip_corrupt", [False, True])
def test_a_bomb_is_refused_or_skipped(tmp_path, skip_corrupt):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(60_000, 60_000))
    dataset = write_lists(tmp_path, [path])
    dataset.skip_corrupt = skip_corrupt
    if skip_corrupt:
        assert len(dataset[0][1]) == 0 and dataset.skipped_images() == [str(path)]
    else:
        with pytest.raises(ValueError, match=r"bomb\.png.*pixels"):
            dataset[0]


def test_the_largest_images_take_bounded_memory(tmp_path):
    """The costliest kinds, as large as they may be, one after the other in a process that may take 2 GB more."""
    size, folder = (8900, 8900), tmp_path
    Image.new("I;16", size).save(folder / "grey16.png", compress_level=1)
    Image.new("RGBA", size).save(folder / "transparent.png", compress_level=1)
    code = (
        f"import sys; sys.path[:0] = {[str(REPO / folder) for folder in ('', 'tests', 'tools')]}\n"
        "import resource, torch\n"
        "from test_detect import FakeModel\n"
        "from detect import detect\n"
        "from datasets import read_image, transform\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)\n"
        "transform(read_image(sys.argv[1]), *nothing, 'TRAIN')\n"
        "print('grey, read and augmented, MB:', (peak() - before) // 1000)\n"
        "detect(sys.argv[2], model=FakeModel())\n"
        "print('transparent, detect(), MB:', (peak() - before) // 1000)\n"
        "assert peak() - before < 2_000_000, peak() - before\n"
    )
    paths = [str(path) for path in sorted(folder.iterdir())]
    result = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=300)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e39, 2.0])
def test_boxes_that_would_hurt_the_loss_name_their_image(tmp_path, bad):
    """Not finite, beyond the image, or without area (x from 20 to 20, or to less)."""
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (40, 30)).save(path)
    write_lists(tmp_path, [path])
    entry = {"boxes": [[20, 2, bad, 29]], "labels": [1], "difficulties": [0], "size": [40, 30]}
    (tmp_path / "TRAIN_objects.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=r"photo\.jpg: the box"):
        PascalVOCDataset(tmp_path, "TRAIN")
