"""train.py: exact resume after kills and signals, its files and settings, several processes, the log, what it says.

What needs a process of its own runs the script; all else calls `train.main()` here, as the script would.
"""

import contextlib
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import REPO, assert_same_state, finish, read_files, read_log, script, start, training

import train
from model import NETWORKS, SSD300
from utils import load_checkpoint, load_label_map, save_checkpoint, script_parameters

CPU, LITE = torch.device("cpu"), "ssdlite320_mobilenet_v3_large"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def run_with(tmp_path, monkeypatch):
    """A function that runs train.py in this process, in `tmp_path`, with a command line; returns what it saved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(train, "end_workers", lambda: None)  # an earlier test's loader may still have some
    defaults = script_parameters(vars(train))

    def run_with(*arguments):
        for name, value in defaults.items():
            monkeypatch.setattr(train, name, value)
        train.set_parameters(arguments)
        train.main()
        return load_checkpoint(train.save_to)

    return run_with


@pytest.fixture
def run(lists, run_with):
    """The same with the command line of `helpers.training()`, changed by the parameters that it is given."""

    def run(data_folder=lists, **parameters):
        return run_with(*training(data_folder, **{"workers": 0, **parameters})[2:])

    return run


@pytest.fixture
def keep_all(monkeypatch):
    """Every checkpoint is kept: that of iteration 2 as 2.pth.tar, too."""

    def save_twice(state, path):
        for name in (path, f"{state['iteration']}.pth.tar"):
            save_checkpoint(state, name)

    monkeypatch.setattr(train.utils, "save_checkpoint", save_twice)


def with_lists(lists, folder, **changed):
    """A copy of the data lists with some of them changed."""
    for path in lists.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    for name, contents in changed.items():
        (folder / f"{name}.json").write_text(json.dumps(contents))
    return folder


def patched(folder, code, command):
    """The arguments of a script, to run it after some code has changed its modules."""
    script, *arguments = command[1:]
    run = f"runpy.run_path({script!r}, run_name='__main__')"
    (folder / "patched.py").write_text(f"import runpy, sys\nsys.path.insert(0, {str(REPO)!r})\n{code}\n{run}")
    return [str(folder / "patched.py"), *arguments]


# The first process sends a signal in the first step; steps are slow enough that a run of 1000 takes long.
SEND_SIGNAL = """
import os, time, torch
step, sent = torch.optim.SGD.step, []
def step_and_send(optimizer):
    step(optimizer)
    time.sleep(0.1)
    if not sent and os.environ.get("RANK", "0") == "0":
        sent.append({})
torch.optim.SGD.step = step_and_send
"""


def test_resume_after_kills_takes_the_same_steps(lists, unbroken, tmp_path):
    n_kills, rng, path = int(os.environ.get("SSD_KILLS", 1)), random.Random(0), tmp_path / "last.pth.tar"
    for kills in range(n_kills + 1):
        workers = 2 * kills % 3  # another number at each start: it must not matter
        if path.exists():
            modified = path.stat().st_mtime_ns
            command = script("train.py", checkpoint=path.name, workers=workers)
        else:
            modified = 0
            command = training(lists, workers=workers, overwrite=True)  # the log of a run killed early is there
        process = start(command, tmp_path)
        if kills < n_kills:
            while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == modified):
                time.sleep(0.01)  # at least one checkpoint further, so that the test comes to an end
            time.sleep(rng.uniform(0, 0.5))
            with contextlib.suppress(ProcessLookupError):  # on a busy machine it may have come to its end
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if load_checkpoint(path)["iteration"] == 8:  # a late kill: start again
                path.unlink()
    code, output = finish(process)
    assert code == 0, output
    assert_same_state(unbroken / "last.pth.tar", path)
    rows, expected = read_log(tmp_path / "last.csv"), read_log(unbroken / "last.csv")
    assert [row["iteration"] for row in rows] == [str(i) for i in range(1, 9)]  # every row once
    for name in ("loss", "conf_loss", "loc_loss"):
        assert [row[name] for row in rows] == [row[name] for row in expected]
    assert [float(row["lr"]) for row in rows[3:]] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6])


def test_a_signal_saves_and_ends_with_its_exit_code(lists, unbroken, tmp_path, run_with):
    code = SEND_SIGNAL.format(f"os.killpg(0, {int(signal.SIGINT)})")  # to the workers, too, as Ctrl-C
    code, output = finish(start([sys.executable, *patched(tmp_path, code, training(lists, save_every=0))], tmp_path))
    assert code == 128 + signal.SIGINT and "after iteration 1; go on with --checkpoint=last.pth.tar" in output, output
    run_with("--checkpoint=last.pth.tar")
    assert_same_state(unbroken / "last.pth.tar", "last.pth.tar")


@pytest.mark.parametrize("recipe", [
    {"evaluate_every": 2},
    {"optimizer_name": "adamw", "schedule": "cosine", "grad_clip": 1, "ema_decay": 0.9, "evaluate_every": 2},
    {"minutes": 0.06, "iterations": 1000, "schedule": "cosine", "optimizer_name": "adamw", "warmup": 0},
    {"freeze_up_to": "conv4_3", "momentum": 0.5, "seed": 7, "augment": "flip", "keep_difficult": False},
])  # fmt: skip
def test_a_run_resumes_from_any_checkpoint(run, run_with, keep_all, monkeypatch, recipe):
    """With its own settings, which the checkpoint holds."""
    monkeypatch.setattr(train, "time", Mock(perf_counter=Mock(side_effect=itertools.count())))  # a look takes a second
    whole = run(save_every=1, **{"iterations": 4, **recipe})
    Path("2.pth.tar").rename("half.pth.tar")
    again = run_with("--checkpoint=half.pth.tar")
    assert_same_state("last.pth.tar", "half.pth.tar")
    assert whole["iteration"] == 4 and whole["seconds"] == again["seconds"] and whole["best_map"] == again["best_map"]
    rows = [row for row in read_log("last.csv") if int(row["iteration"]) > 2]
    assert len(rows) >= 2 and rows == read_log("half.csv")


def test_evaluation_changes_no_step_and_keeps_the_best(run, unbroken):
    run(evaluate_every=3)
    assert_same_state("last.pth.tar", unbroken / "last.pth.tar")
    rows = [row for row in read_log("last.csv") if row["mAP"]]
    assert [row["iteration"] for row in rows] == ["3", "6", "8"]  # every third one, and the last
    best = load_checkpoint("best_last.pth.tar")
    assert max(float(row["mAP"]) for row in rows) == pytest.approx(best["best_map"], abs=1e-6)
    assert all(row["circle"] and not row["loss"] for row in rows) and list(rows[0])[7:] == [
        "mAP", "circle", "rectangle", "star", "triangle"
    ]  # fmt: skip


def test_a_run_that_is_killed_while_it_evaluates_does_those_iterations_again(run, run_with, monkeypatch):
    evaluate = Mock(side_effect=[({}, 0.2), KeyboardInterrupt])  # as a kill: nothing can be saved any more
    monkeypatch.setattr(train, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        run(iterations=6, evaluate_every=3, save_every=0)
    assert load_checkpoint("last.pth.tar")["iteration"] == 3
    evaluate.side_effect = [({}, 0.1)]
    saved = run_with("--checkpoint=last.pth.tar")
    assert saved["iteration"] == 6 and saved["best_map"] == 0.2
    assert [row["iteration"] for row in read_log("last.csv")] == ["1", "2", "3", "3", "4", "5", "6", "6"]


def test_averaged_weights_are_evaluated_and_saved(run, keep_all, monkeypatch):
    """Of the old value 1/10 stays in the first iteration, 2/11 in the second, then 1/4, which is the limit here."""
    torch.manual_seed(0)
    average = SSD300(5, "ssd300_tiny").state_dict()
    run(iterations=3, save_every=1)
    steps = [load_checkpoint(f"{iteration}.pth.tar")["model"] for iteration in (1, 2, 3)]
    evaluated = []
    monkeypatch.setattr(train, "evaluate", lambda _, model, **__: (evaluated.append(model.state_dict()), 0.5))
    monkeypatch.setattr(train.TrainingLog, "write_evaluation", lambda *_: None)
    saved = run(iterations=3, save_every=1, evaluate_every=3, ema_decay=0.25, overwrite=True)
    for share, step in zip((1 / 10, 2 / 11, 1 / 4), steps, strict=True):
        average = {name: share * average[name] + (1 - share) * step[name] for name in average}
    for name, expected in average.items():
        assert torch.equal(saved["training_model"][name], steps[-1][name])  # the steps are the same
        if "running" in name or "num_batches" in name:
            expected = steps[-1][name]
        torch.testing.assert_close(saved["model"][name], expected)
        assert torch.equal(saved["model"][name], evaluated[0][name])


def test_the_gradient_is_clipped(run):
    torch.manual_seed(7)
    first = SSD300(5, "ssd300_tiny")
    saved = run(iterations=1, grad_clip=1e-9, weight_decay=0.0, seed=7)
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(saved["model"][name], parameter.detach(), rtol=0, atol=1e-12)


def test_biases_learn_at_a_rate_of_their_own(run):
    torch.manual_seed(0)
    first = SSD300(5, "ssd300_tiny")
    saved = run(iterations=1, bias_lr_factor=0.0)["model"]
    for name, head in first.pred_convs.named_children():
        assert torch.equal(saved[f"pred_convs.{name}.bias"], head.bias), name
    assert not torch.equal(saved["pred_convs.cl_conv4_3.weight"], first.pred_convs.cl_conv4_3.weight)


def test_a_moving_average_by_hand():
    average, model = torch.nn.BatchNorm2d(1), torch.nn.BatchNorm2d(1)
    for iteration, share in ((0, 1 / 10), (1, 2 / 11), (10_000, 0.9)):
        torch.nn.init.zeros_(average.weight)  # the model's is 1
        model.running_mean += 5
        train.update_average(average, model, 0.9, iteration)
        assert average.weight.item() == pytest.approx(1 - share)
        assert torch.equal(average.running_mean, model.running_mean)


def test_a_run_goes_on_in_its_own_files_with_its_own_settings(run_with, run, lists, tmp_path, capsys):
    run(save_to="other.pth.tar", iterations=1)
    others = read_files(tmp_path)
    run(save_to="a.pth.tar", iterations=2, optimizer_name="adamw", evaluate_every=2)
    capsys.readouterr()
    saved = run_with("--checkpoint=a.pth.tar", "--iterations=3", "--lr=0.002", "--workers=0")
    assert saved["parameters"]["optimizer_name"] == "adamw" and saved["iteration"] == 3
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [note.split()[1] for note in notes] == ["iterations", "lr", "as"]
    assert "0.0001" in notes[1] and "0.002" in notes[1]
    assert "--optimizer_name=adamw" in notes[2] and "--batch_size=2" in notes[2] and "iterations" not in notes[2]
    assert read_files(tmp_path).items() >= others.items()
    assert {path.name for path in tmp_path.iterdir()} == {*others, "a.pth.tar", "best_a.pth.tar", "a.csv"}
    # From the best one it goes on in the file of the last one.
    with pytest.raises(ValueError, match=r"a\.pth\.tar is at iteration 3, further than best_a"):
        run_with("--checkpoint=best_a.pth.tar", "--iterations=4")
    with pytest.raises(ValueError, match=r"a\.pth\.tar is at iteration 3, further than best_a"):
        run_with("--checkpoint=best_a.pth.tar", "--iterations=4", "--save_to=a.pth.tar")
    assert run_with("--checkpoint=best_a.pth.tar", "--iterations=4", "--overwrite=True")["iteration"] == 4
    assert load_checkpoint("a.pth.tar")["iteration"] == 4
    # Elsewhere, if asked for; but not in the files of another run.
    run_with("--checkpoint=a.pth.tar", "--iterations=5", "--save_to=b.pth.tar", "--evaluate_every=0")
    output = capsys.readouterr().out
    assert "b.pth.tar, the log in b.csv" in output and "best_b" not in output  # there is no such file
    assert load_checkpoint("a.pth.tar")["iteration"] == 4
    with pytest.raises(ValueError, match=r"other\.pth\.tar is there already"):
        run_with("--checkpoint=a.pth.tar", "--save_to=other.pth.tar")
    Path("other.pth.tar").unlink()
    with pytest.raises(ValueError, match=r"other\.csv is there already"):
        run_with("--checkpoint=a.pth.tar", "--save_to=other.pth.tar")


@pytest.mark.parametrize("source", ["checkpoint", "finetune_from"])
@pytest.mark.parametrize("name, value", [("network", "ssd300_vgg16"), ("pretrained", "IMAGENET1K_FEATURES")])
def test_weights_come_from_one_place(run_with, lists, unbroken, source, name, value):
    given = f"--{source}={unbroken}/last.pth.tar", f"--data_folder={lists}"
    with pytest.raises(ValueError, match=rf"^--{name}={value} .*last\.pth\.tar.*leave it out"):
        run_with(*given, f"--{name}={value}")
    train.set_parameters([*given, "--network=ssd300_tiny", "--pretrained="])  # what it was is no contradiction


def test_old_settings_that_are_gone_are_named(run, run_with, capsys):
    saved = run(iterations=1)
    parameters = {**saved["parameters"], "freeze_base": True, "lr": "fast", "\x1b": 1}
    save_checkpoint({**saved, "parameters": parameters}, "last.pth.tar")
    run_with("--checkpoint=last.pth.tar", "--iterations=2")
    output = capsys.readouterr().out
    assert "freeze_base was True" in output and "lr was 'fast'" in output and "\x1b" not in output


def test_a_run_by_the_clock(run, run_with, capsys, monkeypatch):
    """It ends in time, with the rate at its end, and a resumed one goes on where the clock was."""
    monkeypatch.setattr(train, "time", Mock(perf_counter=Mock(side_effect=itertools.count())))  # a look takes a second
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: ({}, train.time.perf_counter() / 1000))
    saved = run(minutes=0.1, iterations=100_000, schedule="cosine", warmup=0, save_every=0, evaluate_every=4)
    assert saved["seconds"] == saved["iteration"] == 6  # evaluations do not count
    rates = [float(row["lr"]) for row in read_log("last.csv") if row["lr"]]
    assert rates[0] == pytest.approx(1e-4) and rates == sorted(rates, reverse=True) and rates[-1] < 1e-5
    output = capsys.readouterr()
    assert "run      0.1 minutes, in batches of 2 images" in output.out and "epochs" not in output.out
    assert "0.1 of 0.1 minutes" in output.err and "100000" not in output.err
    run_with("--checkpoint=last.pth.tar")
    assert "nothing to do" in capsys.readouterr().out
    longer = run_with("--checkpoint=last.pth.tar", "--minutes=0.15")
    assert longer["seconds"] == longer["iteration"] == 9
    assert "0.15 minutes, 0.1 of them used" in capsys.readouterr().out


@pytest.mark.parametrize("name, other", [("sgd", "adamw"), ("adamw", "sgd")])
def test_an_optimizer_resumes_in_the_memory_format_of_its_machine(run, lists, monkeypatch, name, other):
    """Its state, and not another's."""
    monkeypatch.setattr(train.utils, "fastest_memory_format", lambda *_: torch.contiguous_format)
    saved = run(iterations=2, optimizer_name=name)["optimizer"]["state"]
    monkeypatch.setattr(train.utils, "fastest_memory_format", lambda *_: torch.channels_last)
    monkeypatch.setattr(train, "checkpoint", "last.pth.tar")
    _, optimizer, start = train.start_or_resume(load_label_map(lists), CPU)
    assert start.iteration == 2 and start.seconds > 0
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for old, parameter in zip(saved.values(), parameters, strict=True):
        state = optimizer.state[parameter]
        assert state.keys() == old.keys() and all(torch.equal(value, old[key]) for key, value in state.items())
        assert all(value.stride() == parameter.stride() for key, value in state.items() if key != "step")
    with pytest.raises(ValueError, match=rf"it was not saved by {other}.*--finetune_from="):
        run(optimizer_name=other, checkpoint="last.pth.tar")


def test_a_training_state_that_cannot_be_right_is_refused(run, unbroken):
    saved = load_checkpoint(unbroken / "last.pth.tar")
    weights = {**saved["model"], "rescale_factors": torch.full((1, 64, 1, 1), torch.nan)}
    momenta = {**saved["optimizer"]["state"], 0: {"momentum_buffer": torch.zeros(3)}}
    for wrong in (
        {"iteration": -1}, {"iteration": 2.0}, {"best_map": 1}, {"best_map": None}, {"seconds": 1},
        {"training_model": weights}, {"optimizer": {**saved["optimizer"], "state": momenta}},
    ):  # fmt: skip
        save_checkpoint({**saved, **wrong}, "last.pth.tar")
        with pytest.raises(ValueError, match=r"^last\.pth\.tar: its training state cannot be .*--finetune_from=last"):
            run(checkpoint="last.pth.tar")


def test_random_numbers_go_on_where_they_were(run, lists, monkeypatch):
    """As a network with dropout wants them."""
    saved = run(iterations=1)
    torch.manual_seed(9)
    saved["rng"]["cpu"] = torch.get_rng_state()
    save_checkpoint(saved, "last.pth.tar")
    monkeypatch.setattr(train, "checkpoint", "last.pth.tar")
    train.start_or_resume(load_label_map(lists), CPU)
    assert torch.equal(torch.get_rng_state(), saved["rng"]["cpu"])


@pytest.mark.parametrize("network, last", [("ssd300_tiny", "conv4_3"), (LITE, "features")])
def test_a_frozen_base_stays_until_a_run_goes_on_without(run, run_with, monkeypatch, network, last):
    """Frozen layers have no momentum in the checkpoint; fused SGD, which a GPU takes, makes it only if all lack it."""
    torch.manual_seed(0)
    first = SSD300(5, network)
    names = [name for name, _ in first.base.named_children()]
    frozen_layers = names[: names.index(last) + 1]
    frozen = run(network=network, freeze_up_to=last, iterations=2, evaluate_every=2)["model"]
    changed = {name for name, tensor in first.state_dict().items() if not torch.equal(tensor, frozen[name])}
    changed_layers = {name.split(".")[1] for name in changed if name.startswith("base.")}
    trained_layers = {name for name, layer in first.base.named_children() if list(layer.parameters())}
    assert changed_layers == trained_layers - set(frozen_layers)

    class FusedSGD(torch.optim.SGD):
        def __init__(self, groups, **options):
            super().__init__(groups, **{**options, "fused": True})

    monkeypatch.setattr(torch.optim, "SGD", FusedSGD)
    thawed = run_with("--checkpoint=last.pth.tar", "--freeze_up_to=", "--iterations=3", "--evaluate_every=0")["model"]
    name = next(name for name in thawed if name.startswith("base."))
    assert not torch.equal(thawed[name], frozen[name])


def test_an_evaluation_that_fails_costs_no_training(run, monkeypatch):
    def fail(*_):
        raise ValueError("no such image")

    monkeypatch.setattr(train, "evaluate_and_log", fail)
    with pytest.raises((ValueError, SystemExit), match="no such image"):
        run(iterations=2, evaluate_every=2, save_every=0)
    assert load_checkpoint("last.pth.tar")["iteration"] == 2


def test_an_image_with_more_objects_than_priors_is_named():
    dataset = SimpleNamespace(starts=np.array([0, 2, 7]), image_paths=["a.jpg", "b.jpg"])
    train.check_numbers_of_objects(dataset, SimpleNamespace(priors_cxcy=torch.zeros(5, 4), network="net"))
    with pytest.raises(ValueError, match=r"b\.jpg has 5 objects, more than the 4 priors of net"):
        train.check_numbers_of_objects(dataset, SimpleNamespace(priors_cxcy=torch.zeros(4, 4), network="net"))


def test_a_new_run_replaces_no_earlier_one(run):
    run(iterations=2)
    with pytest.raises(ValueError, match=r"last\.pth\.tar is there.*--checkpoint=last\.pth\.tar .*--overwrite=True"):
        run(iterations=2)
    best = Path("last.pth.tar").rename("best_last.pth.tar")
    before = best.read_bytes()
    with pytest.raises(ValueError, match="best_last"):
        run(iterations=2)
    assert best.read_bytes() == before
    best.unlink()
    with pytest.raises(ValueError, match=r"last\.csv is there"):
        run(iterations=2)
    run(iterations=1, overwrite=True)
    assert [row["iteration"] for row in read_log("last.csv")] == ["1"]


def test_resuming_with_other_classes_names_both(run, lists, unbroken, tmp_path, capsys):
    label_map = {"background": 0, **{f"class {i}\x1b[31m": i for i in range(1, 6)}}
    other, checkpoint = with_lists(lists, tmp_path, label_map=label_map), unbroken / "last.pth.tar"
    with pytest.raises(ValueError, match=rf"circle.*class 1.*--finetune_from={checkpoint}") as caught:
        run(other, checkpoint=checkpoint)
    cases = (other, "the class heads start anew for class 1", 6), (lists, "the class heads included", 5)
    for data, heads, n_classes in cases:
        saved = run(data, finetune_from=checkpoint, iterations=1, overwrite=True)
        assert len(saved["model"]["pred_convs.cl_conv11_2.bias"]) == 4 * n_classes
        output = capsys.readouterr().out
        assert f"5 classes; {heads}" in output and "\x1b" not in output + str(caught.value)


def test_several_processes_take_the_same_steps_and_stop_together(run, lists, tmp_path, monkeypatch):
    """They take the steps of one process (without batch normalisation, which sees each one's share of the batch alone).

    torchrun, which passes signals on, kills its processes 30 s later: all agree at every iteration, not at every log.
    """
    code = "import model as m; row = m.NETWORKS['ssd300_tiny']\n"
    code += "m.NETWORKS['ssd300_tiny'] = row._replace(base='vgg16', batch_norm=False)\n"
    code += SEND_SIGNAL.format("os.kill(os.getppid(), 15)")
    settings = {"iterations": 1000, "save_every": 0, "log_every": 1000, "warmup": 0, "workers": 0, "bf16": False}
    _, output = finish(start(TORCHRUN + patched(tmp_path, code, training(lists, **settings)), tmp_path))
    saved = load_checkpoint(tmp_path / "last.pth.tar")
    iteration = saved["iteration"]
    assert output.count(f"stopped by SIGTERM after iteration {iteration}") == 1 and "2 x cpu" in output, output
    assert 1 <= iteration < 1000
    (row,) = read_log("last.csv")
    plain = NETWORKS["ssd300_tiny"]._replace(base="vgg16", batch_norm=False)
    monkeypatch.setitem(NETWORKS, "ssd300_tiny", plain)
    run(**{**settings, "iterations": iteration}, overwrite=True)
    (expected,) = read_log("last.csv")
    assert row["iteration"] == expected["iteration"] == str(iteration)
    for name in ("loss", "conf_loss", "loc_loss"):
        assert float(row[name]) == pytest.approx(float(expected[name]), rel=1e-4)


def test_each_machine_downloads_once(monkeypatch):
    steps = []
    monkeypatch.setattr(train, "load_pretrained", lambda *_: steps.append("load"))
    monkeypatch.setattr(train, "max_over_processes", lambda *_: steps.append("wait"))
    for rank in (0, 1):
        monkeypatch.setattr(train, "LOCAL_RANK", rank)
        train.load_base(Mock(network="ssd300_vgg16"), "IMAGENET1K_V1")
    assert steps == ["load", "wait", "wait", "load"]
    for network, weights in (("ssd300_vgg16", ""), ("ssd300_tiny", "IMAGENET1K_V1")):
        assert train.load_base(Mock(network=network), weights) == "random" and len(steps) == 4


def test_a_run_says_what_it_does(run, capsys):
    run(warmup=500, iterations=12)
    output = capsys.readouterr().out
    for line in ("8 images, ", "classes  4: circle, rectangle, star, triangle", "weights  random",
                 "network  ssd300_tiny, 0.", "iterations 0 to 12 of 2 images, 3.0 epochs in all",
                 "saves    last.pth.tar, the log in last.csv", "the warm-up, 500, is longer",
                 " s an iteration: about 0:", "done after iteration 12, 0:", "python eval.py --data_f"):  # fmt: skip
        assert line in output, line
    assert "best_last" not in output and "TEST" not in output


@pytest.mark.parametrize("has_val", [True, False])
def test_it_evaluates_on_val_where_it_exists(run, lists, tmp_path, capsys, monkeypatch, has_val):
    others = [({"circle": 0.5}, mean_ap) for mean_ap in (0.125, 0.25)]  # the second one is as good as the first
    evaluate = Mock(side_effect=[({"star": math.nan, "circle": 0.5}, 0.25), *others])
    monkeypatch.setattr(train, "evaluate", evaluate)
    changed = {}
    if has_val:
        for kind in ("images", "objects"):
            changed[f"VAL_{kind}"] = json.loads((lists / f"TEST_{kind}.json").read_text())[:3]
    saved = run(with_lists(lists, tmp_path, **changed), iterations=3, evaluate_every=1, metric="area")
    for call in evaluate.call_args_list:
        loader, model = call.args
        assert loader.dataset.split == ("VAL" if has_val else "TEST") and len(loader.dataset) == (3 if has_val else 4)
        assert isinstance(model, SSD300) and call.kwargs == {"metric": "area"}
    assert saved["best_map"] == 0.25 and load_checkpoint("best_last.pth.tar")["iteration"] == 1
    output = capsys.readouterr().out
    assert output.count("its score there then flatters") == (not has_val)
    assert "best_last.pth.tar, the best so far, mAP 0.2500" in output
    rows = [(row["mAP"], row["circle"], row["star"]) for row in read_log("last.csv") if row["mAP"]]
    assert rows == [(mean_ap, "0.500000", "") for mean_ap in ("0.250000", "0.125000", "0.250000")]


def test_the_best_by_another_metric_is_not_compared(run, run_with, monkeypatch):
    monkeypatch.setattr(train, "evaluate", Mock(side_effect=[({}, 0.5), ({}, 0.25)]))
    run(iterations=1, evaluate_every=1)
    resume = ("--checkpoint=last.pth.tar", "--iterations=2", "--metric=area")
    with pytest.raises(ValueError, match=r"best_last\.pth\.tar is the best by the metric 11 points.*--overwrite=True"):
        run_with(*resume)
    assert load_checkpoint("best_last.pth.tar")["iteration"] == 1
    saved = run_with(*resume, "--overwrite=True")
    assert saved["best_map"] == 0.25 and load_checkpoint("best_last.pth.tar")["iteration"] == 2


def test_the_best_of_another_file_is_not_compared(run, run_with, monkeypatch):
    monkeypatch.setattr(train, "evaluate", Mock(side_effect=[({}, 0.5), ({}, 0.25)]))
    run(iterations=1, evaluate_every=1)
    saved = run_with("--checkpoint=last.pth.tar", "--iterations=2", "--save_to=new.pth.tar")
    assert saved["best_map"] == 0.25 and load_checkpoint("best_new.pth.tar")["iteration"] == 2


def test_a_best_file_that_is_gone_is_not_compared(run, run_with, monkeypatch):
    monkeypatch.setattr(train, "evaluate", Mock(side_effect=[({}, 0.5), ({}, 0.25)]))
    run(iterations=1, evaluate_every=1)
    Path("best_last.pth.tar").unlink()
    saved = run_with("--checkpoint=last.pth.tar", "--iterations=2")
    assert saved["best_map"] == 0.25 and load_checkpoint("best_last.pth.tar")["iteration"] == 2


def test_a_run_goes_on_from_its_best_if_that_is_its_last(run, run_with, monkeypatch):
    monkeypatch.setattr(train, "evaluate", Mock(return_value=({}, 0.5)))
    run(iterations=1, evaluate_every=1)
    assert run_with("--checkpoint=best_last.pth.tar", "--iterations=2")["iteration"] == 2


def test_a_best_that_could_not_be_saved_has_not_to_be_beaten(run, monkeypatch):
    errors = [OSError("No space left")]

    def save_all_but_one(state, path):
        if path.startswith("best_") and errors:
            raise errors.pop()
        save_checkpoint(state, path)

    monkeypatch.setattr(train.utils, "save_checkpoint", save_all_but_one)
    monkeypatch.setattr(train, "evaluate", Mock(side_effect=[({}, 0.5), ({}, 0.25)]))
    saved = run(iterations=2, evaluate_every=1)
    assert saved["best_map"] == 0.25 and load_checkpoint("best_last.pth.tar")["iteration"] == 2


def test_a_run_does_not_replace_what_it_starts_from(run, run_with, lists, monkeypatch):
    monkeypatch.setattr(train, "evaluate", Mock(return_value=({}, 0.5)))
    run(iterations=1, evaluate_every=1)
    for name in ("last.pth.tar", "best_last.pth.tar"):
        with pytest.raises(ValueError, match=rf"finetune_from is {name}, which this run would replace"):
            run(finetune_from=name, overwrite=True)
        assert load_checkpoint(name)["iteration"] == 1


def test_machines_with_different_checkpoints_do_not_go_on(monkeypatch):
    monkeypatch.setattr(train, "max_over_processes", lambda *values: [4.0, -2.0])
    with pytest.raises(ValueError, match="at iterations 2 to 4"):
        train.check_same_iteration(train.Start("", 4))
    monkeypatch.undo()
    train.check_same_iteration(train.Start("", 4))


def test_lists_without_images_to_train_on(run, lists, tmp_path):
    with pytest.raises(ValueError, match="there is no image to train on"):
        run(with_lists(lists, tmp_path, TRAIN_images=[], TRAIN_objects=[]))


def test_adamws_steps_go_to_the_device_of_a_fused_optimizer():
    """A GPU's is fused, a CPU's is not: the state comes from one, and goes to the other."""
    model = torch.nn.Conv2d(1, 1, 1)
    saved = train.make_optimizer(model, CPU, "adamw")
    model(torch.ones(1, 1, 1, 1)).sum().backward()
    saved.step()
    optimizer = train.make_optimizer(torch.nn.Conv2d(1, 1, 1, device="meta"), CPU, "adamw")
    for group in optimizer.param_groups:
        group["fused"] = True
    train.restore_optimizer(optimizer, saved.state_dict())
    assert len(optimizer.state) == 2
    assert all(value.device.type == "meta" for state in optimizer.state.values() for value in state.values())


def test_the_log_holds_both_parts_of_the_loss(run, run_with, lists, tmp_path):
    """Whatever the classes are called; of a log that goes on only half rows are taken out."""
    label_map = {"background": 0, 'a, "b"': 1, "猫": 2, "c\nd": 3, "\ud800": 4}
    run(with_lists(lists, tmp_path, label_map=label_map), iterations=4, log_every=2, alpha=2, evaluate_every=4)
    before = Path("last.csv").read_bytes()
    rows = read_log("last.csv")
    assert [row["iteration"] for row in rows] == ["2", "4", "4"]
    assert list(rows[0])[8:] == ['a, "b"', "猫", "c\nd", "\\ud800"]
    for row in rows[:2]:
        assert float(row["loss"]) == pytest.approx(float(row["conf_loss"]) + 2 * float(row["loc_loss"]), abs=1e-5)
    with open("last.csv", "a") as file:
        file.write("5,1.5,\0")
    run_with("--checkpoint=last.pth.tar", "--iterations=5", "--evaluate_every=0")
    after = Path("last.csv").read_bytes()
    assert after.startswith(before) and after.removeprefix(before).startswith(b"5,1.250,") and after.count(b"\n") == 6


@pytest.mark.parametrize("settings, message", [
    ({"lr": 1e30}, r"the loss of iteration(.|\n)*JPEGImages(.|\n)*--checkpoint=last"),
    ({"lr": 1e38, "weight_decay": 1e10, "iterations": 3}, "weights are no longer finite at iteration 3"),
])  # fmt: skip
def test_what_is_not_finite_is_not_saved(run, settings, message):
    run(iterations=2)
    before = Path("last.pth.tar").read_bytes()
    with pytest.raises(SystemExit, match=message):
        run(checkpoint="last.pth.tar", warmup=0, **settings)
    assert Path("last.pth.tar").read_bytes() == before


def test_evaluation_takes_the_share_of_its_process(run, monkeypatch):
    loader = Mock(side_effect=LookupError)
    monkeypatch.setattr(train, "N_PROCESSES", 8)
    monkeypatch.setattr(train, "max_over_processes", lambda *values: values)
    monkeypatch.setattr(train, "start_process", lambda _: CPU)
    monkeypatch.setattr(train, "make_test_loader", loader)
    with pytest.raises(LookupError):
        run(batch_size=20, evaluate_every=1)
    assert loader.call_args.args[1] == 3


def test_a_corrupt_image_is_named_or_skipped(run, lists, tmp_path, capsys):
    images = json.loads((lists / "TRAIN_images.json").read_text())
    broken = tmp_path / "broken image.jpg"
    broken.write_bytes(Path(images[3]).read_bytes()[:3000])
    images[3] = str(broken)
    changed = with_lists(lists, tmp_path, TRAIN_images=images, TEST_images=[str(broken)] * 4)
    with pytest.raises(SystemExit, match=f"^error: {broken}"):
        run(changed)
    run(changed, iterations=4, skip_corrupt=True, evaluate_every=4, overwrite=True)
    output = capsys.readouterr().out
    assert f"skipped 1 images that were missing or damaged:\n  {broken}" in output
    assert "4 TEST images were missing or damaged" in output


def test_training_can_overfit(run):
    run(augment="", iterations=30, optimizer_name="adamw", lr=2e-3, schedule="cosine", grad_clip=10, save_every=0)
    losses = [float(row["loss"]) for row in read_log("last.csv")]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5]), losses


def test_learning_rate_schedules():
    steps = {0: 1e-4, 4: 5e-4, 9: 1e-3, 10: 1e-3, 79_999: 1e-3, 80_000: 1e-4, 99_999: 1e-4, 100_000: 1e-5}
    cosine = {0: 1e-4, 30_000: 1e-3 * (0.5 + 0.5**1.5), 60_000: 5e-4, 120_000: 0}
    for schedule, expected in (("steps", steps), ("cosine", cosine)):
        learning_rate = train.LearningRate(1e-3, 10, schedule, (80_000, 100_000), 0.1, 120_000, minutes=0.0)
        for iteration, rate in expected.items():
            assert learning_rate.at(iteration, seconds=1e9) == pytest.approx(rate, abs=1e-9)
    by_the_clock = learning_rate._replace(minutes=10.0)
    for iteration, seconds in ((20, 300.0), (60_000, 60.0)):  # half of the time is used, or of the iterations
        assert by_the_clock.at(iteration, seconds) == pytest.approx(5e-4)
    assert by_the_clock.at(20, 700.0) == 0  # the last step ends a little late
    assert by_the_clock.at(4, 300.0) == pytest.approx(5 / 10 * 5e-4)  # the warm-up is by steps alone


@pytest.mark.parametrize(("iteration", "parameters", "stopped_by", "expected"), [
    (1, {}, 0, ""), (2, {}, 0, "log"), (3, {"save_every": 3}, 0, "log save"), (12, {}, 0, "log save stop"),
    (3, {"evaluate_every": 3}, 0, "log evaluate save"), (12, {"evaluate_every": 5}, 0, "log evaluate save stop"),
    (3, {"evaluate_every": 3}, 15, "log save stop"), (12, {"evaluate_every": 3}, 15, "log save stop"),
    (1, {"minutes": 2}, 0, ""), (1, {"minutes": 1, "evaluate_every": 3}, 0, "log evaluate save stop"),
])  # fmt: skip
def test_what_it_is_time_for(iteration, parameters, stopped_by, expected):
    """In a run of 12 iterations, after a minute."""
    settings = {"minutes": 0, "log_every": 2, "evaluate_every": 0, "save_every": 0, **parameters}
    progress = train.Progress(train.Start("", iteration, seconds=60.0), 12, **settings)
    progress.stopped_by = stopped_by
    times = [name for name in ("log", "evaluate", "save", "stop") if getattr(progress, f"is_time_to_{name}")()]
    assert " ".join(times) == expected


@pytest.mark.parametrize(("optimizer_name", "factor"), [("sgd", 2.0), ("adamw", 1.0)])
def test_groups_of_parameters(optimizer_name, factor):
    """Only weights of convolutions decay; of biases only those of convolutions learn faster, and only in SGD."""
    model = SSD300(3, "ssd300_tiny")
    groups = train.make_optimizer(model, CPU, optimizer_name).param_groups
    assert [(group["weight_decay"], group["lr_factor"]) for group in groups] == [(5e-4, 1), (0, factor), (0, 1)]
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    weights, biases, norms = ({named[id(parameter)] for parameter in group["params"]} for group in groups)
    assert weights | biases | norms == set(named.values()) and norms
    assert norms == {name for name in named.values() if ".norm." in name}
    assert biases == {name for name in named.values() if name.endswith(".bias")} - norms
