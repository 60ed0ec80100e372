"""train.py: exact resume after kills, signals, bad losses, several processes, the log, what it says.

What needs a process of its own runs the script; all else calls `train.main()` here, as the script would.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import REPO, assert_same_state, finish, read_log, run_script, start, training
from torch import nn

import train
from model import NETWORKS, SSD300
from utils import load_checkpoint, override_parameters, save_checkpoint, script_parameters

CPU = torch.device("cpu")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def run(lists, tmp_path, monkeypatch):
    """A function that runs train.py in this process, in `tmp_path`, with the parameters that it is given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
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
    """The command of a script that runs after some code has changed its modules."""
    script, *arguments = command[1:]
    lines = ["import runpy, sys", f"sys.path.insert(0, {str(REPO)!r})", code]
    lines.append(f"runpy.run_path({script!r}, run_name='__main__')")
    (folder / "patched.py").write_text("\n".join(lines))
    return [str(folder / "patched.py"), *arguments]


# ----------------------------------------------------------------------------------------------
# Resuming
# ----------------------------------------------------------------------------------------------


def test_resume_after_kills_takes_the_same_steps(lists, unbroken, tmp_path):
    n_kills = int(os.environ.get("SSD_KILLS", 2))
    rng = random.Random(n_kills)
    kills, checkpoint = 0, tmp_path / "last.pth.tar"
    while True:
        resume = {"checkpoint": "last.pth.tar"} if checkpoint.exists() else {}
        # The number of workers changes at each start: it must not matter.
        process = start(training(lists, workers=kills % 3, **resume), tmp_path)
        if kills == n_kills:
            break
        modified = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == modified):
            time.sleep(0.01)  # at least one checkpoint further, so that the test comes to an end
        time.sleep(rng.uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        if load_checkpoint(checkpoint)["iteration"] == 12:  # a late kill: take it from an earlier one
            checkpoint.unlink()
    code, output = finish(process)
    assert code == 0, output
    assert_same_state(unbroken / "last.pth.tar", checkpoint)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_with_its_exit_code(lists, unbroken, tmp_path, run, number):
    slow = "import torch, time; step = torch.optim.SGD.step\n"
    slow += "torch.optim.SGD.step = lambda *arguments: (time.sleep(0.2), step(*arguments))"
    process = start([sys.executable, *patched(tmp_path, slow, training(lists, save_every=0))], tmp_path)
    log = tmp_path / "train_log.csv"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 4):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    code, output = finish(process)
    assert code == 128 + number, output
    stopped_at = load_checkpoint(tmp_path / "last.pth.tar")["iteration"]
    assert 3 <= stopped_at < 12
    assert f"after iteration {stopped_at}; go on with --checkpoint=last.pth.tar" in output
    run(checkpoint="last.pth.tar")
    assert_same_state(unbroken / "last.pth.tar", tmp_path / "last.pth.tar")


@pytest.mark.parametrize("settings", [{"evaluate_every": 3}, {"optimizer_name": "adamw", "schedule": "cosine"}])
def test_a_run_resumes_from_any_checkpoint(run, unbroken, tmp_path, monkeypatch, settings):
    """Also with AdamW; and evaluation in between leaves the statistics of batch normalisation alone."""

    def save_all(state, path):
        save_checkpoint(state, path)
        save_checkpoint(state, f"{state['iteration']}.pth.tar")

    monkeypatch.setattr(train, "save_checkpoint", save_all)
    run(**settings)
    whole = (tmp_path / "last.pth.tar").rename("whole.pth.tar")
    run(**settings, checkpoint="6.pth.tar")
    assert_same_state(whole, "last.pth.tar")
    if "evaluate_every" in settings:
        assert_same_state(whole, unbroken / "last.pth.tar")


def test_the_log_has_every_row_once(run, unbroken):
    run(iterations=4)
    run(checkpoint="last.pth.tar")
    rows, expected = read_log("train_log.csv"), read_log(unbroken / "train_log.csv")
    assert [row["iteration"] for row in rows] == [str(i) for i in range(1, 13)]
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    assert [float(row["lr"]) for row in rows[6:]] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6])


def test_a_run_by_the_clock(run, capsys):
    """It ends in time, with the rate at its end, and a resumed one goes on where the clock was."""
    saved = run(minutes=0.03, iterations=100_000, schedule="cosine", warmup=0)
    assert 1.8 <= saved["seconds"] < 60 and saved["iteration"] < 100_000
    rates = [float(row["lr"]) for row in read_log("train_log.csv")]
    assert rates[0] == pytest.approx(1e-4) and rates == sorted(rates, reverse=True) and rates[-1] < 5e-5
    assert "by the clock: 0.0 of its 0.03 minutes are used" in capsys.readouterr().out
    again = run(minutes=0.03, iterations=100_000, checkpoint="last.pth.tar")
    assert again["iteration"] == saved["iteration"] and "nothing to do" in capsys.readouterr().out
    longer = run(minutes=0.04, iterations=100_000, checkpoint="last.pth.tar")
    assert longer["iteration"] > saved["iteration"] and 2.4 <= longer["seconds"] < 60


@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
def test_an_optimizer_resumes_in_the_memory_format_of_its_machine(monkeypatch, optimizer_name):
    monkeypatch.setattr(train, "optimizer_name", optimizer_name)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    saved = optimizer_after_a_step(model)
    model = model.to(memory_format=torch.channels_last)  # this machine has bfloat16 units, the last had none
    optimizer = train.make_optimizer(model, CPU)
    train.restore_training_state(training_state(saved), optimizer)
    for old, parameter in zip(saved.state.values(), optimizer.param_groups[0]["params"], strict=False):
        state = optimizer.state[parameter]
        assert state.keys() == old.keys()
        assert all(torch.equal(value, old[name]) for name, value in state.items())
        assert all(value.stride() == parameter.stride() for name, value in state.items() if name != "step")


def optimizer_after_a_step(model):
    optimizer = train.make_optimizer(model, CPU)
    model(torch.rand(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    return optimizer


def training_state(optimizer):
    """What a checkpoint holds besides the model."""
    rng = {"cpu": torch.get_rng_state(), "cuda": []}
    return {"optimizer": optimizer.state_dict(), "rng": rng, "iteration": 7, "best_map": 0.5, "seconds": 3.0}


def test_a_run_goes_on_with_layers_that_were_frozen():
    """They have no momentum in the checkpoint, and fused SGD, which a GPU takes, makes buffers only if all lack."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    model[0].requires_grad_(False)
    saved = training_state(optimizer_after_a_step(model))
    model[0].requires_grad_(True)
    optimizer = train.make_optimizer(model, CPU)
    begin = train.restore_training_state(saved, optimizer)
    assert (begin.iteration, begin.best_map, begin.seconds) == (7, 0.5, 3.0)
    for group in optimizer.param_groups:
        group["fused"] = True
    before = model[0].weight.clone()
    model(torch.rand(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_another_optimizer_cannot_go_on(monkeypatch):
    model = nn.Conv2d(3, 4, 3)
    saved = training_state(optimizer_after_a_step(model))
    monkeypatch.setattr(train, "optimizer_name", "adamw")
    with pytest.raises(ValueError, match=r"it was not saved by adamw.*--finetune_from="):
        train.restore_training_state(saved, train.make_optimizer(model, CPU))


def test_a_new_run_replaces_no_earlier_one(run, tmp_path):
    run(iterations=2)
    before = (tmp_path / "last.pth.tar").read_bytes()
    with pytest.raises(
        ValueError, match=r"last\.pth\.tar is there.*--checkpoint=last\.pth\.tar goes on.*--overwrite=True"
    ):
        run(iterations=2)
    (tmp_path / "last.pth.tar").rename(tmp_path / "best_last.pth.tar")
    with pytest.raises(ValueError, match="best_last"):
        run(iterations=2)
    assert (tmp_path / "best_last.pth.tar").read_bytes() == before
    assert run(iterations=4, overwrite=True)["iteration"] == 4


def test_resuming_with_other_classes_names_both(run, lists, unbroken, tmp_path, capsys):
    label_map = {"background": 0, **{f"class {i}\x1b[31m": i for i in range(1, 5)}}
    other = with_lists(lists, tmp_path, label_map=label_map)
    checkpoint = unbroken / "last.pth.tar"
    with pytest.raises(ValueError, match=r"circle.*class 1") as caught:
        run(other, checkpoint=checkpoint)
    assert f"--finetune_from={checkpoint}" in str(caught.value) and "\x1b" not in str(caught.value)
    run(other, finetune_from=checkpoint, iterations=1)
    output = capsys.readouterr().out
    assert "but for the class heads" in output and "\x1b" not in output


# ----------------------------------------------------------------------------------------------
# Signals, several processes, the console
# ----------------------------------------------------------------------------------------------


def test_several_processes_take_the_same_steps(run, lists, tmp_path):
    """Without batch normalisation, which sees each process's share of the batch alone."""
    plain = "from model import NETWORKS; "
    plain += "NETWORKS['ssd300_tiny'] = NETWORKS['ssd300_tiny']._replace(base='vgg16')"
    settings = {"iterations": 4, "save_every": 0, "warmup": 0, "workers": 0, "bf16": False}
    output = run_script(TORCHRUN + patched(tmp_path, plain, training(lists, **settings)), tmp_path)
    assert "2 x cpu" in output and output.count("done after iteration 4") == 1
    losses = [float(row["loss"]) for row in read_log(tmp_path / "train_log.csv")]
    original = NETWORKS["ssd300_tiny"]
    try:
        NETWORKS["ssd300_tiny"] = original._replace(base="vgg16")
        run(**settings, overwrite=True)
    finally:
        NETWORKS["ssd300_tiny"] = original
    expected = [float(row["loss"]) for row in read_log(tmp_path / "train_log.csv")]
    assert len(losses) == 4 and losses == pytest.approx(expected, rel=1e-4)


def test_a_signal_under_torchrun_saves_before_the_next_row_of_the_log(lists, tmp_path):
    """The steps are slow, and torchrun kills its processes 30 s after a signal: all agree at every iteration."""
    slow = "import time, model; loss = model.MultiBoxLoss.forward\n"
    slow += "model.MultiBoxLoss.forward = lambda *a: (time.sleep(1), open('step', 'w').close(), loss(*a))[2]"
    settings = {"iterations": 1000, "save_every": 0, "log_every": 1000, "workers": 0}
    process = start(TORCHRUN + patched(tmp_path, slow, training(lists, **settings)), tmp_path)
    while process.poll() is None and not (tmp_path / "step").exists():
        time.sleep(0.01)
    process.terminate()  # torchrun alone: it passes the signal on
    _, output = finish(process)
    iteration = load_checkpoint(tmp_path / "last.pth.tar")["iteration"]
    assert f"stopped by SIGTERM after iteration {iteration}" in output and 1 <= iteration < 40


def test_each_machine_downloads_once(monkeypatch):
    steps = []
    monkeypatch.setattr(train, "load_pretrained", lambda *_: steps.append("load"))
    monkeypatch.setattr(train, "highest_of_all", lambda *_: steps.append("wait"))
    train.load_base(None)
    monkeypatch.setattr(train, "LOCAL_RANK", 1)
    train.load_base(None)
    assert steps == ["load", "wait", "wait", "wait", "load", "wait"]


def test_sync_batch_norm_needs_cuda(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sync_batch_norm is True; PyTorch has it on CUDA only"):
        run(sync_batch_norm=True)


@pytest.mark.parametrize("console", ["> /dev/full 2>&1", "2>&1 | head -1", ">&- 2>&-"])
def test_a_console_that_takes_no_output_does_not_end_the_run(lists, tmp_path, console):
    command = " ".join(f"'{part}'" for part in training(lists, iterations=4))
    script = f"set -o pipefail; {command} {console}"
    code, output = finish(start(["bash", "-c", script], tmp_path))
    assert code == 0, output
    assert load_checkpoint(tmp_path / "last.pth.tar")["iteration"] == 4


# ----------------------------------------------------------------------------------------------
# What happens in a run
# ----------------------------------------------------------------------------------------------


def test_a_run_says_what_it_does(run, capsys):
    run(warmup=500)
    output = capsys.readouterr().out
    for line in (
        "8 images, ", "classes  4: circle, rectangle, star, triangle", "network  ssd300_tiny, 0.5 million weights",
        "weights  random", "iterations 0 to 12 of 2 images, 3.0 epochs in all", "the warm-up of 500 ",
        " s an iteration: about 0:", "done after iteration 12, 0:", "saved    last.pth.tar, ",
        "python eval.py --data_folder=",
    ):  # fmt: skip
        assert line in output


def test_a_loss_that_is_not_finite_stops_and_names_the_images(run, tmp_path):
    run(iterations=2)
    before = (tmp_path / "last.pth.tar").read_bytes()
    with pytest.raises(SystemExit, match=r"the loss of iteration(.|\n)*JPEGImages(.|\n)*--checkpoint=last"):
        run(checkpoint="last.pth.tar", lr=1e30, warmup=0)
    assert (tmp_path / "last.pth.tar").read_bytes() == before


def test_evaluation_keeps_the_best_model(run):
    run(iterations=3, evaluate_every=2)
    best = load_checkpoint("best_last.pth.tar")
    assert best["iteration"] in (2, 3) and best["best_map"] >= 0
    rows = [row for row in read_log("train_log.csv") if row["mAP"]]
    assert [row["iteration"] for row in rows] == ["2", "3"]  # every second one, and the last
    assert max(float(row["mAP"]) for row in rows) == pytest.approx(best["best_map"], abs=1e-6)


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


def test_evaluation_takes_the_share_of_its_process(monkeypatch, lists):
    def record(data_folder, batch_size, *_):
        raise LookupError(f"a batch of {batch_size}")

    monkeypatch.setattr(train, "N_PROCESSES", 8)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(train, "make_test_loader", record)
    with pytest.raises(LookupError, match="a batch of 4"):
        train.Run(None, None, None, train.Begin("")).evaluate()


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
    assert "skipped 1 images" in output and str(broken) in output
    assert "4 TEST images could not be decoded" in output


def test_training_learns_by_heart(run):
    run(augment="", iterations=40, optimizer_name="adamw", lr=2e-3, schedule="cosine", grad_clip=10, save_every=0)
    losses = [float(row["loss"]) for row in read_log("train_log.csv")]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5]), losses


def test_bfloat16_and_channels_last_train_alike(run, monkeypatch):
    """The way of machines that have units for bfloat16, and that of the others."""
    weights = {}
    for has_units in (True, False):
        monkeypatch.setattr(train, "has_bf16_units", lambda _, answer=has_units: answer)
        memory_format = torch.channels_last if has_units else torch.contiguous_format
        monkeypatch.setattr(train, "fastest_memory_format", lambda *_, answer=memory_format: answer)
        weights[has_units] = run(iterations=6, overwrite=True)["model"]["base.conv1_1.weight"]
    assert not torch.equal(weights[True], weights[False])
    torch.testing.assert_close(weights[True], weights[False], rtol=0, atol=0.02)


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
    monkeypatch.setattr(train, "minutes", 10.0)  # by the clock: half of the time is used, then a tenth
    train.set_learning_rate(optimizer, 20, seconds=300.0)
    assert weights["lr"] == pytest.approx(5e-4)
    train.set_learning_rate(optimizer, 60_000, seconds=60.0)
    assert weights["lr"] == pytest.approx(5e-4)


@pytest.mark.parametrize(("optimizer_name", "factor"), [("sgd", 2.0), ("adamw", 1.0)])
def test_groups_of_parameters(monkeypatch, optimizer_name, factor):
    """Only weights of convolutions decay; of biases only those of convolutions learn faster, and only in SGD."""
    monkeypatch.setattr(train, "optimizer_name", optimizer_name)
    model = SSD300(3, "ssd300_tiny")
    groups = train.make_optimizer(model, CPU).param_groups
    assert [group["weight_decay"] for group in groups] == [5e-4, 0, 0]
    assert [group["lr_factor"] for group in groups] == [1, factor, 1]
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    weights, biases, norms = ({named[id(parameter)] for parameter in group["params"]} for group in groups)
    assert weights | biases | norms == set(named.values()) and "rescale_factors" in weights
    assert norms == {name for name in named.values() if ".norm." in name}
    assert biases == {name for name in named.values() if name.endswith(".bias")} - norms
    assert len(train.make_optimizer(SSD300(3, "ssd300_tiny").pred_convs, CPU).param_groups) == 2  # as before


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    path = tmp_path / "last.pth.tar"
    save_checkpoint({"iteration": 1}, path)
    before = path.read_bytes()
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="iteration 7"):
        train.Run(model, None, None, train.Begin("", iteration=7)).save(path)
    assert path.read_bytes() == before


def test_frozen_layers_stay_as_they_are(monkeypatch):
    """Their weights, and the statistics of their batch normalisation, also after an evaluation."""
    for name, value in {"network": "ssd300_tiny", "freeze_base": True}.items():
        monkeypatch.setattr(train, name, value)
    model, optimizer, _ = train.start_or_resume({"background": 0, "cat": 1}, CPU)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    locs, scores = model.eval().train()(torch.randn(2, 3, 300, 300))
    (locs.sum() + scores.square().sum()).backward()
    train.set_learning_rate(optimizer, 1000)
    optimizer.step()
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    frozen = {name for name in before if name.startswith("base.") and name[5:10] not in ("conv6", "conv7")}
    assert len(frozen) == 13 * 7 and frozen <= same and not [name for name in same - frozen if "weight" in name]
