"""train.py: exact resume after kills, signals, bad losses, several processes, the log, what it says.

What needs a process of its own runs the script; all else calls `train.main()` here, as the script would.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from helpers import REPO, assert_same_state, finish, read_log, run_script, start, training
from torch import nn

import train
from model import NETWORKS, SSD300
from utils import load_checkpoint, load_label_map, override_parameters, save_checkpoint, script_parameters

CPU, LITE = torch.device("cpu"), "ssdlite320_mobilenet_v3_large"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def run(lists, tmp_path, monkeypatch):
    """A function that runs train.py in this process, in `tmp_path`, with the parameters that it is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    # A loader of an earlier test may still have workers: they are not the run's to kill.
    monkeypatch.setattr(train.multiprocessing, "active_children", lambda: [])
    defaults = script_parameters(vars(train))

    def run(data_folder=lists, **parameters):
        for name, value in defaults.items():
            monkeypatch.setattr(train, name, value)
        override_parameters(vars(train), training(data_folder, **{"workers": 0, **parameters})[2:])
        train.main()
        return load_checkpoint("last.pth.tar")

    return run


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
        modified = path.stat().st_mtime_ns if path.exists() else 0
        # The number of workers changes at each start: it must not matter.
        process = start(training(lists, workers=2 * kills % 3, checkpoint=path.name if modified else ""), tmp_path)
        if kills < n_kills:
            while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == modified):
                time.sleep(0.01)  # at least one checkpoint further, so that the test comes to an end
            time.sleep(rng.uniform(0, 0.5))
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if load_checkpoint(path)["iteration"] == 12:  # a late kill: start again
                path.unlink()
    assert finish(process)[0] == 0
    assert_same_state(unbroken / "last.pth.tar", path)
    rows, expected = read_log(tmp_path / "train_log.csv"), read_log(unbroken / "train_log.csv")
    assert [row["iteration"] for row in rows] == [str(i) for i in range(1, 13)]  # every row once
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    assert [float(row["lr"]) for row in rows[6:]] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6])


def test_a_signal_saves_and_ends_with_its_exit_code(lists, unbroken, tmp_path, run):
    code = SEND_SIGNAL.format(f"os.killpg(0, {int(signal.SIGINT)})")  # to the workers, too, as Ctrl-C
    code, output = finish(start([sys.executable, *patched(tmp_path, code, training(lists, save_every=0))], tmp_path))
    assert code == 128 + signal.SIGINT and "after iteration 1; go on with --checkpoint=last.pth.tar" in output, output
    run(checkpoint="last.pth.tar")
    assert_same_state(unbroken / "last.pth.tar", "last.pth.tar")


@pytest.mark.parametrize("settings", [{"evaluate_every": 5}, {"optimizer_name": "adamw", "schedule": "cosine"}])
def test_a_run_resumes_from_any_checkpoint(run, unbroken, tmp_path, monkeypatch, settings):
    """Also with AdamW; and evaluation in between leaves the statistics of batch normalisation alone."""

    def save_all(state, path):
        for name in (path, f"{state['iteration']}.pth.tar"):
            save_checkpoint(state, name)

    monkeypatch.setattr(train.utils, "save_checkpoint", save_all)
    run(**settings)
    whole = (tmp_path / "last.pth.tar").rename("whole.pth.tar")
    run(**settings, checkpoint="6.pth.tar")
    assert_same_state(whole, "last.pth.tar")
    if "evaluate_every" in settings:
        assert_same_state(whole, unbroken / "last.pth.tar")
        rows = [row for row in read_log("train_log.csv") if row["mAP"]]
        assert [row["iteration"] for row in rows] == ["5", "10", "12"]  # every fifth one, and the last
        best = load_checkpoint("best_last.pth.tar")["best_map"]
        assert max(float(row["mAP"]) for row in rows) == pytest.approx(best, abs=1e-6)


def test_a_run_by_the_clock(run, capsys, monkeypatch):
    """It ends in time, with the rate at its end, and a resumed one goes on where the clock was."""
    monkeypatch.setattr(train, "time", Mock(perf_counter=Mock(side_effect=itertools.count())))  # a look takes a second
    saved = run(minutes=0.3, iterations=100_000, schedule="cosine", warmup=0)
    assert 18 <= saved["seconds"] < 21 and saved["iteration"] < 18
    rates = [float(row["lr"]) for row in read_log("train_log.csv")]
    assert rates[0] == pytest.approx(1e-4) and rates == sorted(rates, reverse=True) and rates[-1] < 1e-5
    assert "by the clock: 0.0 of its 0.3 minutes are used" in capsys.readouterr().out
    again = run(minutes=0.3, iterations=100_000, checkpoint="last.pth.tar")
    assert again["iteration"] == saved["iteration"] and "nothing to do" in capsys.readouterr().out
    longer = run(minutes=0.5, iterations=100_000, checkpoint="last.pth.tar")
    assert longer["iteration"] > saved["iteration"] and 30 <= longer["seconds"] < 33


@pytest.mark.parametrize("name, other", [("sgd", "adamw"), ("adamw", "sgd")])
def test_an_optimizer_resumes_in_the_memory_format_of_its_machine(run, lists, monkeypatch, name, other):
    """Its state, and not another's."""
    monkeypatch.setattr(train.utils, "fastest_memory_format", lambda *_: torch.contiguous_format)
    saved = run(iterations=2, optimizer_name=name)["optimizer"]["state"]
    monkeypatch.setattr(train.utils, "fastest_memory_format", lambda *_: torch.channels_last)
    monkeypatch.setattr(train, "checkpoint", "last.pth.tar")
    _, optimizer, begin = train.start_or_resume(load_label_map(lists), CPU)
    assert begin.iteration == 2 and begin.seconds > 0
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for old, parameter in zip(saved.values(), parameters, strict=True):
        state = optimizer.state[parameter]
        assert state.keys() == old.keys() and all(torch.equal(value, old[key]) for key, value in state.items())
        assert all(value.stride() == parameter.stride() for key, value in state.items() if key != "step")
    with pytest.raises(ValueError, match=rf"it was not saved by {other}.*--finetune_from="):
        run(optimizer_name=other, checkpoint="last.pth.tar")


@pytest.mark.parametrize("network, left", [("ssd300_tiny", {"conv6", "conv7"}), (LITE, set())])
def test_a_frozen_base_stays_until_a_run_goes_on_without(run, monkeypatch, network, left):
    """Frozen layers have no momentum in the checkpoint; fused SGD, which a GPU takes, makes it only if all lack it."""
    torch.manual_seed(0)
    first = SSD300(5, network).state_dict()
    frozen = run(network=network, freeze_base=True, iterations=2, evaluate_every=1)["model"]
    changed = {name for name, tensor in frozen.items() if not torch.equal(tensor, first[name])}
    assert {name.split(".")[1] for name in changed if name.startswith("base.")} == left
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *groups, **options: sgd(*groups, **{**options, "fused": True}))
    thawed = run(checkpoint="last.pth.tar", iterations=4)["model"]
    name = next(name for name in thawed if name.startswith("base."))
    assert not torch.equal(thawed[name], frozen[name])


def test_a_new_run_replaces_no_earlier_one(run):
    run(iterations=2)
    with pytest.raises(ValueError, match=r"last\.pth\.tar is there.*--checkpoint=last\.pth\.tar .*--overwrite=True"):
        run(iterations=2)
    best = Path("last.pth.tar").rename("best_last.pth.tar")
    before = best.read_bytes()
    with pytest.raises(ValueError, match="best_last"):
        run(iterations=2)
    assert best.read_bytes() == before and run(iterations=4, overwrite=True)["iteration"] == 4


def test_resuming_with_other_classes_names_both(run, lists, unbroken, tmp_path, capsys):
    label_map = {"background": 0, **{f"class {i}\x1b[31m": i for i in range(1, 5)}}
    other, checkpoint = with_lists(lists, tmp_path, label_map=label_map), unbroken / "last.pth.tar"
    with pytest.raises(ValueError, match=rf"circle.*class 1.*--finetune_from={checkpoint}") as caught:
        run(other, checkpoint=checkpoint)
    for data, heads in ((other, "but for the class heads"), (lists, "the class heads included")):
        run(data, finetune_from=checkpoint, iterations=1, overwrite=True)
        output = capsys.readouterr().out
        assert f"5 classes, {heads}" in output and "\x1b" not in output + str(caught.value)


def test_several_processes_take_the_same_steps(run, lists, tmp_path, monkeypatch):
    """Without batch normalisation, which sees each process's share of the batch alone."""
    plain = "import model as m; m.NETWORKS['ssd300_tiny'] = m.NETWORKS['ssd300_tiny']._replace(base='vgg16')"
    settings = {"iterations": 3, "save_every": 0, "warmup": 0, "workers": 0, "bf16": False}
    output = run_script(TORCHRUN + patched(tmp_path, plain, training(lists, **settings)), tmp_path)
    assert "2 x cpu" in output and output.count("done after iteration 3") == 1
    losses = [float(row["loss"]) for row in read_log("train_log.csv")]
    monkeypatch.setitem(NETWORKS, "ssd300_tiny", NETWORKS["ssd300_tiny"]._replace(base="vgg16"))
    run(**settings, overwrite=True)
    expected = [float(row["loss"]) for row in read_log("train_log.csv")]
    assert len(losses) == 3 and losses == pytest.approx(expected, rel=1e-4)


def test_a_signal_under_torchrun_saves_before_the_next_row_of_the_log(lists, tmp_path):
    """torchrun, which passes signals on, kills its processes 30 s later: all agree at every iteration."""
    code = SEND_SIGNAL.format("os.kill(os.getppid(), 15)")
    settings = {"iterations": 1000, "save_every": 0, "log_every": 1000, "workers": 0}
    _, output = finish(start(TORCHRUN + patched(tmp_path, code, training(lists, **settings)), tmp_path))
    iteration = load_checkpoint(tmp_path / "last.pth.tar")["iteration"]
    assert f"stopped by SIGTERM after iteration {iteration}" in output and 1 <= iteration < 1000


def test_each_machine_downloads_once(monkeypatch):
    steps = []
    monkeypatch.setattr(train, "load_pretrained", lambda *_: steps.append("load"))
    monkeypatch.setattr(train, "highest_of_all", lambda *_: steps.append("wait"))
    for rank in (0, 1):
        monkeypatch.setattr(train, "LOCAL_RANK", rank)
        train.load_base(None)
    assert steps == ["load", "wait", "wait", "wait", "load", "wait"]


@pytest.mark.parametrize("console", ["2>&1 >/dev/full | head -1", ">&- 2>&-", "--help 2>&1 | head -1"])
def test_a_console_that_takes_no_output_does_not_end_the_run(lists, tmp_path, console):
    command = " ".join(f"'{part}'" for part in training(lists, iterations=2))
    code, output = finish(start(["bash", "-c", f"set -o pipefail; {command} {console}"], tmp_path))
    assert code == 0 and "Traceback" not in output, output
    assert "--help" in console or load_checkpoint(tmp_path / "last.pth.tar")["iteration"] == 2


def test_a_run_says_what_it_does(run, capsys):
    run(warmup=500)
    output = capsys.readouterr().out
    for line in ("8 images, ", "classes  4: circle, rectangle, star, triangle", "weights  random",
                 "network  ssd300_tiny, 0.5 million weights", "iterations 0 to 12 of 2 images, 3.0 epochs in all",
                 "the warm-up of 500 ", " s an iteration: about 0:", "done after iteration 12, 0:",
                 "saved    last.pth.tar, ", "python eval.py --data_folder="):  # fmt: skip
        assert line in output


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


def test_an_evaluation_that_did_not_come_about_is_made_up_for(run, lists, tmp_path):
    """A resumed run begins with it; but if that fails, too, the next does not: it may be what killed the run."""
    saved = run(iterations=4)
    assert saved["to_evaluate"] is False and saved["best_map"] == -1
    settings = {"iterations": 4, "evaluate_every": 4, "checkpoint": "last.pth.tar"}
    save_checkpoint({**saved, "to_evaluate": True}, "last.pth.tar")
    with pytest.raises(SystemExit, match="no such image"):
        run(with_lists(lists, tmp_path, TEST_images=["no such image.jpg"] * 4), **settings)
    assert load_checkpoint("last.pth.tar")["to_evaluate"] is False
    save_checkpoint({**saved, "to_evaluate": True}, "last.pth.tar")
    saved = run(**settings)
    assert [row["iteration"] for row in read_log("train_log.csv") if row["mAP"]] == ["4"]
    assert saved["to_evaluate"] is False and saved["best_map"] >= 0 and Path("best_last.pth.tar").exists()


def test_evaluation_takes_the_share_of_its_process(monkeypatch):
    loader = Mock(side_effect=LookupError)
    monkeypatch.setattr(train, "N_PROCESSES", 8)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(train, "make_test_loader", loader)
    with pytest.raises(LookupError):
        train.Run(None, None, None, train.Begin("")).evaluate()
    assert loader.call_args.args[1] == 4  # of 32


def test_a_corrupt_image_is_named_or_skipped(run, lists, tmp_path, capsys):
    images = json.loads((lists / "TRAIN_images.json").read_text())
    broken = tmp_path / "broken image.jpg"
    broken.write_bytes(Path(images[3]).read_bytes()[:3000])
    images[3] = str(broken)
    changed = with_lists(lists, tmp_path, TRAIN_images=images, TEST_images=[str(broken)] * 4)
    with pytest.raises(SystemExit, match=f"^error: {broken}"):
        run(changed)
    run(changed, iterations=4, skip_corrupt=True, evaluate_every=4)
    output = capsys.readouterr().out
    assert f"skipped 1 images that could not be decoded:\n  {broken}" in output and "4 TEST images could not" in output


def test_training_learns_by_heart(run):
    run(augment="", iterations=40, optimizer_name="adamw", lr=2e-3, schedule="cosine", grad_clip=10, save_every=0)
    losses = [float(row["loss"]) for row in read_log("train_log.csv")]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5]), losses


def test_learning_rate_schedules(monkeypatch):
    monkeypatch.setattr(train, "warmup", 10)
    optimizer = train.make_optimizer(nn.Conv2d(2, 2, 1), CPU)
    weights, biases = optimizer.param_groups
    steps = {0: 1e-4, 4: 5e-4, 9: 1e-3, 79_999: 1e-3, 80_000: 1e-4, 99_999: 1e-4, 100_000: 1e-5}
    cosine = {0: 1e-4, 30_000: 1e-3 * (0.5 + 0.5**1.5), 60_000: 5e-4, 120_000: 0}
    for schedule, expected in (("steps", steps), ("cosine", cosine)):
        monkeypatch.setattr(train, "schedule", schedule)
        for iteration, rate in expected.items():
            train.set_learning_rate(optimizer, iteration)
            assert weights["lr"] == pytest.approx(rate, abs=1e-9) and biases["lr"] == pytest.approx(2 * rate, abs=1e-9)
    monkeypatch.setattr(train, "minutes", 10.0)
    for iteration, seconds in ((20, 300.0), (60_000, 60.0)):  # half of the time is used, or of the iterations
        train.set_learning_rate(optimizer, iteration, seconds)
        assert weights["lr"] == pytest.approx(5e-4)


@pytest.mark.parametrize(("optimizer_name", "factor"), [("sgd", 2.0), ("adamw", 1.0)])
def test_groups_of_parameters(monkeypatch, optimizer_name, factor):
    """Only weights of convolutions decay; of biases only those of convolutions learn faster, and only in SGD."""
    monkeypatch.setattr(train, "optimizer_name", optimizer_name)
    model = SSD300(3, "ssd300_tiny")
    groups = train.make_optimizer(model, CPU).param_groups
    assert [(group["weight_decay"], group["lr_factor"]) for group in groups] == [(5e-4, 1), (0, factor), (0, 1)]
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    weights, biases, norms = ({named[id(parameter)] for parameter in group["params"]} for group in groups)
    assert weights | biases | norms == set(named.values()) and "rescale_factors" in weights
    assert norms == {name for name in named.values() if ".norm." in name}
    assert biases == {name for name in named.values() if name.endswith(".bias")} - norms
