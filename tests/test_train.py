"""train.py: exact resume after kills, signals, bad losses, several processes, the log.

The network is the small stand-in of tests/standin.py; everything else is what a user runs.
"""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO
from make_sample import make_sample
from torch import nn

import train
from create_data_lists import create_data_lists
from utils import load_checkpoint, save_checkpoint

STANDIN = [sys.executable, str(REPO / "tests" / "standin.py"), "train.py"]


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """A folder with the lists of a small generated sample."""
    folder = tmp_path_factory.mktemp("train")
    make_sample(folder / "sample", n_train=12, n_test=4, seed=0)
    create_data_lists(train_data=folder / "sample", output_folder=folder / "lists")
    return folder / "lists"


def command(lists, **parameters):
    """The command of a short run; `parameters` override its settings."""
    settings = {
        "data_folder": lists, "pretrained": "", "batch_size": 4, "iterations": 24, "lr": 1e-4, "warmup": 4,
        "decay_lr_at": (16, 20), "workers": 1, "save_every": 4, "log_every": 2, "save_to": "last.pth.tar",
        **parameters,
    }  # fmt: skip
    return STANDIN + [f"--{name}={value}" for name, value in settings.items()]


def start(arguments, folder):
    """Start a run in `folder` as a process group of its own (so that its workers die with it)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, cwd=folder, env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process, timeout=240):
    """Wait for a run; returns its exit code and what it printed."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def run(arguments, folder):
    """Run to the end, which must be a good one."""
    code, output = finish(start(arguments, folder))
    assert code == 0, output
    return output


def assert_same_state(path, other):
    """Weights, optimizer, iteration and random states of two checkpoints are the same, to the last bit."""
    one, two = load_checkpoint(path), load_checkpoint(other)
    assert one["iteration"] == two["iteration"]
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][name]), name
    momenta, other_momenta = one["optimizer"]["state"], two["optimizer"]["state"]
    assert momenta.keys() == other_momenta.keys() and momenta
    for key, entry in momenta.items():
        assert torch.equal(entry["momentum_buffer"], other_momenta[key]["momentum_buffer"])
    assert torch.equal(one["rng"]["cpu"], two["rng"]["cpu"])


@pytest.fixture(scope="module")
def unbroken(lists, tmp_path_factory):
    """A folder in which a run went from its first to its last iteration."""
    folder = tmp_path_factory.mktemp("unbroken")
    run(command(lists), folder)
    return folder


def test_resume_after_kills_takes_the_same_steps(lists, unbroken, tmp_path):
    n_kills = int(os.environ.get("SSD_KILLS", 3))
    rng = random.Random(n_kills)
    kills, checkpoint = 0, tmp_path / "last.pth.tar"
    while True:
        resume = {"checkpoint": "last.pth.tar"} if checkpoint.exists() else {}
        # The number of workers changes at each start: it must not matter.
        process = start(command(lists, workers=kills % 3, **resume), tmp_path)
        if kills == n_kills:
            break
        modified = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == modified):
            time.sleep(0.01)  # at least one checkpoint further, so that the test comes to an end
        time.sleep(rng.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        if load_checkpoint(checkpoint)["iteration"] == 24:  # a late kill: take it from an earlier one
            checkpoint.unlink()
    code, output = finish(process)
    assert code == 0, output
    assert_same_state(unbroken / "last.pth.tar", checkpoint)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_with_its_exit_code(lists, unbroken, tmp_path, number):
    process = start(command(lists, save_every=0, log_every=1), tmp_path)
    log = tmp_path / "train_log.csv"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 4):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    code, output = finish(process)
    assert code == 128 + number, output
    assert "--checkpoint=last.pth.tar" in output
    stopped_at = load_checkpoint(tmp_path / "last.pth.tar")["iteration"]
    assert 3 <= stopped_at < 24
    run(command(lists, checkpoint="last.pth.tar"), tmp_path)
    assert_same_state(unbroken / "last.pth.tar", tmp_path / "last.pth.tar")


def read_log(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_log_has_every_row_once(lists, unbroken, tmp_path):
    run(command(lists, iterations=8), tmp_path)
    run(command(lists, checkpoint="last.pth.tar"), tmp_path)
    rows, expected = read_log(tmp_path / "train_log.csv"), read_log(unbroken / "train_log.csv")
    assert [row["iteration"] for row in rows] == [str(i) for i in range(2, 25, 2)]
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    assert [float(row["lr"]) for row in rows[7:]] == pytest.approx([1e-4, 1e-5, 1e-5, 1e-6, 1e-6])


def test_several_processes_take_the_same_steps(lists, tmp_path):
    settings = {"iterations": 6, "log_every": 1, "save_every": 0, "warmup": 0, "workers": 0}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    run(command(lists, **settings), tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run(torchrun + command(lists, **settings)[1:], tmp_path / "two")
    losses, expected = (
        [float(row["loss"]) for row in read_log(tmp_path / name / "train_log.csv")] for name in ("two", "one")
    )
    assert len(losses) == 6
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_and_names_the_images(lists, tmp_path):
    run(command(lists, iterations=4), tmp_path)
    before = (tmp_path / "last.pth.tar").read_bytes()
    process = start(command(lists, checkpoint="last.pth.tar", lr=1e30, warmup=0, log_every=1), tmp_path)
    code, output = finish(process)
    assert code != 0
    assert "the loss of iteration" in output and "JPEGImages" in output
    assert (tmp_path / "last.pth.tar").read_bytes() == before


def test_evaluation_keeps_the_best_model(lists, tmp_path):
    run(command(lists, iterations=4, evaluate_every=2), tmp_path)
    best = load_checkpoint(tmp_path / "best_last.pth.tar")
    assert best["iteration"] in (2, 4) and best["best_map"] >= 0
    rows = [row for row in read_log(tmp_path / "train_log.csv") if row["mAP"]]
    assert [row["iteration"] for row in rows] == ["2", "4"]
    assert max(float(row["mAP"]) for row in rows) == pytest.approx(best["best_map"], abs=1e-6)


def test_resuming_with_other_classes_names_both(lists, unbroken, tmp_path):
    label_map = {"background": 0, **{f"class {i}": i for i in range(1, 5)}}
    for path in lists.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "label_map.json").write_text(json.dumps(label_map))
    checkpoint = unbroken / "last.pth.tar"
    code, output = finish(start(command(tmp_path, checkpoint=checkpoint), tmp_path))
    assert code != 0
    assert "class 1" in output and "circle" in output and f"--finetune_from={checkpoint}" in output
    output = run(command(tmp_path, finetune_from=checkpoint, iterations=1), tmp_path)
    assert "but for the class heads" in output


def test_a_corrupt_image_is_named_or_skipped(lists, tmp_path):
    for path in lists.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    images = json.loads((lists / "TRAIN_images.json").read_text())
    broken = tmp_path / "broken image.jpg"
    broken.write_bytes(Path(images[3]).read_bytes()[:3000])
    images[3] = str(broken)
    (tmp_path / "TRAIN_images.json").write_text(json.dumps(images))
    code, output = finish(start(command(tmp_path), tmp_path))
    assert code != 0 and f"error: {broken}" in output and "Traceback" not in output
    (tmp_path / "TEST_images.json").write_text(json.dumps([str(broken)] * 4))
    output = run(command(tmp_path, iterations=4, skip_corrupt=True, evaluate_every=4), tmp_path)
    assert "skipped 1 images" in output and str(broken) in output
    assert "4 TEST images could not be decoded" in output


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(lists, tmp_path):
    """A checkpoint says when an evaluation was to come next; a resumed run begins with it."""
    run(command(lists, iterations=4), tmp_path)
    saved = load_checkpoint(tmp_path / "last.pth.tar")
    assert saved["to_evaluate"] is False and saved["best_map"] == -1
    save_checkpoint({**saved, "to_evaluate": True}, tmp_path / "last.pth.tar")
    run(command(lists, iterations=4, evaluate_every=4, checkpoint="last.pth.tar"), tmp_path)
    with open(tmp_path / "train_log.csv", newline="") as file:
        assert [row["iteration"] for row in csv.DictReader(file) if row["mAP"]] == ["4"]
    saved = load_checkpoint(tmp_path / "last.pth.tar")
    assert saved["to_evaluate"] is False and saved["best_map"] >= 0
    assert (tmp_path / "best_last.pth.tar").exists()


def test_training_learns_by_heart(lists, tmp_path):
    """The stand-in network, taught a few images without augmentation: the loss falls to a part of what it was."""
    run(command(lists, augment=False, iterations=90, lr=1e-3, decay_lr_at=(), save_every=0), tmp_path)
    with open(tmp_path / "train_log.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5]), losses


def test_learning_rate_schedule(monkeypatch):
    monkeypatch.setattr(train, "warmup", 10)
    optimizer = train.make_optimizer(torch.nn.Linear(2, 2), torch.device("cpu"))
    expected = {0: 1e-4, 4: 5e-4, 9: 1e-3, 79_999: 1e-3, 80_000: 1e-4, 99_999: 1e-4, 100_000: 1e-5}
    for iteration, rate in expected.items():
        train.set_learning_rate(optimizer, iteration)
        weights, biases = optimizer.param_groups
        assert weights["lr"] == pytest.approx(rate) and biases["lr"] == pytest.approx(2 * rate)
    assert weights["weight_decay"] == 5e-4 and biases["weight_decay"] == 0
    assert [p.dim() for p in weights["params"]] == [2] and [p.dim() for p in biases["params"]] == [1]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    path = tmp_path / "last.pth.tar"
    save_checkpoint({"iteration": 1}, path)
    before = path.read_bytes()
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="iteration 7"):
        train.save(path, model, None, done=7, best_map=0.0)
    assert path.read_bytes() == before


def test_bfloat16_and_channels_last_train_alike(lists, unbroken, tmp_path, monkeypatch):
    """The way of machines that have units for bfloat16, on one that may have none."""
    monkeypatch.setenv("STANDIN_BF16", "1")
    run(command(lists), tmp_path)
    paths = tmp_path / "last.pth.tar", unbroken / "last.pth.tar"
    one, other = (load_checkpoint(path)["model"]["base.conv.weight"] for path in paths)
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other, rtol=0, atol=0.02)


def test_frozen_layers_stay_as_they_are(monkeypatch):
    for name, value in {"pretrained": "", "freeze_vgg": True, "warmup": 0}.items():
        monkeypatch.setattr(train, name, value)
    device = torch.device("cpu")
    model, optimizer, *_ = train.start_or_resume({"background": 0, "cat": 1}, device)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    locs, scores = model(torch.randn(1, 3, 300, 300))
    (locs.sum() + scores.square().sum()).backward()
    optimizer.step()
    same = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    frozen = {
        name for name in before if name.startswith("base.conv") and not name.startswith(("base.conv6", "base.conv7"))
    }
    assert len(frozen) == 26 and same == frozen


def test_a_run_resumes_in_the_memory_format_of_its_machine():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    saved = train.make_optimizer(model, torch.device("cpu"))
    model(torch.rand(1, 3, 8, 8)).sum().backward()
    saved.step()
    state = {"optimizer": saved.state_dict(), "rng": train.rng_states(), "iteration": 1, "best_map": -1.0}
    model = model.to(memory_format=torch.channels_last)  # this machine has bfloat16 units, the last had none
    optimizer = train.make_optimizer(model, torch.device("cpu"))
    train.restore_training_state(state, optimizer)
    for old, parameter in zip(saved.state.values(), optimizer.param_groups[0]["params"], strict=False):
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert momentum.stride() == parameter.stride()
        assert torch.equal(momentum, old["momentum_buffer"])
