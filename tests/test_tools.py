"""The demo and the benchmark, as far as they can be tried in seconds; lint among what scripts leave behind."""

import importlib
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import ablations
import benchmark
import demo
import gpu_check
import pytest
import torch
from helpers import REPO, finish, read_log, run_script, script, start

import model
import train
from utils import override_parameters


def test_commands_of_the_demo_on_a_gpu_are_understood(monkeypatch):
    commands = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(demo, "fullest_picture", lambda data: Path("fullest.jpg"))
    monkeypatch.setattr(demo, "sum_up", lambda *_: None)
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(demo.subprocess, "run", lambda command, **_: commands.append(command[1:]) or done)
    demo.main()
    names = [Path(path).stem for path, *_ in commands]
    assert names == ["make_sample", "create_data_lists", "train", "eval", "detect"]
    for (_, *arguments), name in zip(commands, names, strict=True):
        assert arguments
        override_parameters(dict(vars(importlib.import_module(name))), arguments)


def test_a_step_of_the_demo_that_fails_ends_it_with_its_own_words(tmp_path, capfd):
    """As train.py does where torch.compile finds no C compiler: its advice, not a traceback of the demo."""
    with pytest.raises(SystemExit) as caught:
        demo.run("train.py", data_folder=tmp_path / "nothing here")
    output = capfd.readouterr().err
    assert caught.value.code == 1 and output.startswith("error: ") and "Traceback" not in output
    assert "label_map.json" in output and "create_data_lists.py" in output


def test_the_demo_in_short(tmp_path):
    """All its steps, where an earlier one was."""
    (tmp_path / "checkpoint_ssd300.pth.tar").write_bytes(b"of an earlier demo")
    output = run_script(script("tools/demo.py", folder=tmp_path, minutes=0.01, n_train=8, n_test=2), tmp_path)
    assert "Next, your own photos" in output and list((tmp_path / "detections").glob("*.jpg"))


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_demo_names_the_commands_of_the_manual(tmp_path, capsys, on_gpu):
    (tmp_path / "checkpoint_ssd300.csv").write_text("iteration,loss,mAP\n10,9.5,\n800,1.1,\n800,,0.95\n")
    demo.sum_up(tmp_path, tmp_path / "fullest.jpg", on_gpu)
    printed = capsys.readouterr().out.partition("Next, your own photos")[2]
    commands = [line.strip() for line in printed.splitlines() if line.startswith("    ")]
    assert len(commands) == 4 and all(command.startswith("python ") for command in commands)
    assert "\n".join(commands) in (REPO / "docs" / "manual.md").read_text(encoding="utf-8")


def test_benchmark_beside_torchvision(tmp_path):
    """A table for each case, this code first; the reference's cap drops what the measurements say."""
    output = run_script(script("tools/benchmark.py", only="loss,detection", repeats=1), tmp_path)
    rows = re.findall(r"^  (\S.*?) +([\d.]+) ms +([\d.]+) x$", output, re.MULTILINE)
    losses = ["MultiBoxLoss", "torchvision"]
    detections = ["detect_objects()", "torchvision as shipped", "torchvision uncapped"]
    assert [name for name, _, _ in rows] == losses * 3 + detections * 2
    assert all(ratio == "1.00" for name, _, ratio in rows if not name.startswith("torchvision"))
    assert all(float(milliseconds) > 0 for _, milliseconds, _ in rows)
    assert "drops 13% of the boxes" in output


def test_benchmark_of_data(tmp_path):
    output = run_script(script("tools/benchmark.py", only="data,", repeats=1), tmp_path)
    assert re.search(r"read_image\(\) and transform\(\) +[\d.]+ ms +1.00 x", output)


def test_ablations_in_short(tmp_path, lists):
    """Two baselines and a choice; started again, with one choice more, it goes on where it was."""
    settings = {"data_folder": lists, "output_folder": tmp_path, "baseline_seeds": "0,1", "iterations": 2}
    run_script(script("tools/ablations.py", choices="no_step_1,", **settings), tmp_path)
    rows = read_log(tmp_path / "results.csv")
    assert [(row["choice"], row["seed"]) for row in rows] == [("baseline", "0"), ("baseline", "1"), ("no_step_1", "0")]
    output = run_script(script("tools/ablations.py", choices="squares_only,", **settings), tmp_path)
    assert read_log(tmp_path / "results.csv")[:3] == rows and len(read_log(tmp_path / "results.csv")) == 4
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[-1] for line in lines] == ["the paper |", "74.3 |", " |", "71.6 |"]
    assert lines[3].startswith("| square priors only |")
    spread = ablations.find_spread([float(row["mAP"]) for row in rows[:2]], 1)
    assert f"The spread, of 2 baselines: ±{spread:.3f} for a choice" in output


def test_spread_of_the_baselines_by_hand():
    """0.50, 0.52, 0.54: deviation 0.02, 4.30 the t of 2 degrees of freedom."""
    assert ablations.find_spread([0.50, 0.52, 0.54], 1) == pytest.approx(4.30 * 0.02 * (1 + 1 / 3) ** 0.5)
    assert ablations.find_spread([0.50, 0.52, 0.54], 3) == pytest.approx(4.30 * 0.02 * (2 / 3) ** 0.5)


def test_rows_within_the_spread_say_nothing_else():
    results = {"baseline": {"0": 0.50, "1": 0.52, "2": 0.54}}  # 0.52, and 0.0993 of spread
    results |= {"no_crop": {"0": 0.43}, "flip_only": {"0": 0.40}, "no_zoom_out": {"0": 0.63}}
    rows = ablations.make_rows(results)
    assert rows[0]["each run"] == "0.500 0.520 0.540"
    assert {row["what is changed"]: row["difference"] for row in rows} == {
        "everything as it is": "", "flips as the only augmentation": "-0.120", "no zoom-out": "+0.110",
        "no crop": "within the spread",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"choices": ("no_crop", "none_such")}, "none_such"),
        ({"choices": ("no_l2_norm",), "network": "ssd300_resnet50"}, "ssd300_resnet50 has no L2 norm"),
        ({"baseline_seeds": (1, 1)}, "two seeds"),
        ({"network": "ssd"}, "'ssd'"),
        ({"data_folder": "nowhere"}, "nowhere: no data lists; `make demo`"),
    ],
)
def test_ablations_that_cannot_be_made(run_main, parameters, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        run_main(ablations, **parameters)


@pytest.fixture
def unchanged_model(monkeypatch):
    """What a choice changes in model.py is given back after the test."""
    monkeypatch.setattr(model, "NETWORKS", dict(model.NETWORKS))
    for owner, name in (
        (model, "l2_normalize"), (model, "match_priors"), (model.SourceMap, "n_priors"),
        (model.SSD300, "create_prior_boxes"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, owner.__dict__[name])


def compute_loss(network):
    """The loss of one image, with an object that no prior overlaps by half, under random weights."""
    torch.manual_seed(0)
    boxes_xy = [torch.tensor([[0.1, 0.1, 0.6, 0.6], [0.8, 0.8, 0.82, 0.85]])]
    labels = [torch.tensor([1, 2])]
    ssd = model.SSD300(5, network)
    with torch.no_grad():
        locs, scores = ssd(torch.rand(1, 3, ssd.input_size, ssd.input_size))
        return model.MultiBoxLoss(ssd.priors_cxcy)(locs, scores, boxes_xy, labels).item()


@pytest.mark.parametrize("name", list(ablations.CHOICES)[1:])
def test_each_choice_changes_something(monkeypatch, unchanged_model, name):
    choice = ablations.CHOICES[name]
    monkeypatch.setattr(ablations, "network", "ssd300_vgg16" if name == "no_l2_norm" else "ssd300_tiny")
    if choice.change_model:
        before = compute_loss(ablations.network)
        choice.change_model()
        after = compute_loss(ablations.network)
        assert math.isfinite(after) and after != before
    else:
        parameters = dict(vars(train))
        override_parameters(parameters, [f"--{key}={value}" for key, value in choice.parameters.items()])
        assert all(parameters[key] != vars(train)[key] for key in choice.parameters) and choice.parameters


@pytest.mark.parametrize(
    ("name", "n_priors", "n_shapes"),
    # 1444 + 9 + 1 cells have four priors, 361 + 100 + 25 have six.
    [
        ("squares_only", 2 * 1940, 6 * 2), ("no_thirds", 4 * 1940, 6 * 4),
        ("no_extra_square", 3 * 1454 + 5 * 486, 3 * 3 + 3 * 5),
    ],
)  # fmt: skip
def test_priors_that_are_left(unchanged_model, name, n_priors, n_shapes):
    all_priors = model.SSD300.create_prior_boxes("ssd300_tiny")
    ablations.CHOICES[name].change_model()
    priors = model.SSD300.create_prior_boxes("ssd300_tiny")
    assert len(priors) == n_priors
    assert {tuple(prior) for prior in priors.tolist()} < {tuple(prior) for prior in all_priors.tolist()}
    shapes = {tuple(shape) for shape in priors[:, 2:].tolist()}
    assert len(shapes) == n_shapes
    ratios = {round(width / height, 3) for width, height in shapes}
    assert ratios == {"squares_only": {1}, "no_thirds": {1, 2, 0.5}, "no_extra_square": {1, 2, 3, 0.5, 0.333}}[name]


def test_without_step_1_priors_below_the_threshold_are_background(unchanged_model):
    priors_xy = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]])
    boxes_xy = torch.tensor([[0.5, 0.5, 0.9, 1.0], [0.0, 0.0, 0.1, 0.1]])
    assert model.match_priors(boxes_xy, priors_xy, 0.5).tolist() == [1, 0]
    ablations.leave_out_step_1()
    assert model.match_priors(boxes_xy, priors_xy, 0.5).tolist() == [model.BACKGROUND, 0]
    assert model.match_priors(boxes_xy[:0], priors_xy, 0.5).tolist() == [model.BACKGROUND] * 2


def test_benchmark_says_where_the_time_of_a_training_step_goes(tmp_path):
    settings = {"networks": "ssd300_tiny,", "batch_size": 2, "network_repeats": 1}
    output = run_script(script("tools/benchmark.py", only="network,", **settings), tmp_path)
    rates = re.findall(r"([\d.]+) images a second", output)
    assert len(rates) == 2 and all(float(rate) > 0 for rate in rates)
    shares = re.findall(r"(\w+) (\d+)%", output)
    assert [part for part, _ in shares] == ["normalise", "forward", "loss", "backward", "optimiser"]
    assert sum(int(share) for _, share in shares) == pytest.approx(100, abs=3)  # rounded


def test_the_clock_of_the_benchmark_waits_for_any_accelerator(monkeypatch):
    """For MPS and XPU as well: without it only the launching of their work is timed."""
    synchronize = Mock()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    benchmark.read_wall_clock()
    synchronize.assert_called_once_with()


def test_gpu_check_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA GPU"):
        gpu_check.main()


def test_gpu_check_names_parts_that_do_not_exist(run_main):
    with pytest.raises(ValueError, match="test: not a part; these are: tests, speed, demo"):
        run_main(gpu_check, parts=("test", "demo"))


@pytest.fixture
def fake_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Mock(total_memory=2**34))
    monkeypatch.setattr(gpu_check, "report", tmp_path / "report.md")


def test_gpu_check_fails_if_a_part_does(monkeypatch, fake_gpu):
    results = iter([1, 0, 2])
    done = Mock(side_effect=lambda *_, **__: subprocess.CompletedProcess([], next(results), stdout="", stderr="why"))
    monkeypatch.setattr(gpu_check.subprocess, "run", done)
    with pytest.raises(SystemExit, match=r"error: tests, demo failed: see .*report\.md"):
        gpu_check.main()
    assert Path(gpu_check.report).read_text().count("why") == 2


def test_commands_of_gpu_check_are_understood(monkeypatch, tmp_path, fake_gpu):
    commands = []
    done = subprocess.CompletedProcess([], 0, stdout="42 images a second", stderr="")
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda command, **_: commands.append(command[1:]) or done)
    gpu_check.main()
    assert commands[0][-1] == "tests/test_cuda.py"
    for path, *arguments in commands[1:]:
        override_parameters(dict(vars(importlib.import_module(Path(path).stem))), arguments)
    report = (tmp_path / "report.md").read_text()
    assert [line for line in report.splitlines() if line.startswith("##")] == ["## Tests", "## Speed", "## Demo"]
    assert "42 images a second" in report


def test_what_scripts_leave_behind_does_not_change_lint(tmp_path):
    """Folders named like modules, data, a virtual environment of any name with anything in it."""
    makefile = (REPO / "Makefile").read_text()
    sources = makefile.partition("SOURCES = ")[2].partition("\n")[0]
    assert "ruff check $(SOURCES)\n" in makefile and "ruff format --check $(SOURCES)\n" in makefile
    for path in [*REPO.glob("*.py"), REPO / "pyproject.toml"]:
        shutil.copy(path, tmp_path)
    for name in ("tools", "tests", "notebooks"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))

    def lint():
        command = f'"{sys.executable}" -m ruff check --no-cache --output-format=concise {sources}'
        return finish(start(["sh", "-c", command], tmp_path))

    before = lint()
    for name in ("demo", "make_sample", "helpers", "data", "onnx", "torch", "env/lib/python3/site-packages/pytest"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("import sys, os\n")
    (tmp_path / "checkpoint_ssd300.csv").write_text("iteration\n")
    assert lint() == before
