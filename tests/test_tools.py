"""The demo and the benchmark, as far as they can be tried in seconds; lint among what scripts leave behind."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import ablations
import demo
import gpu_check
import pytest
import torch
from helpers import REPO, finish, run_script, script, start

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


def test_benchmark_of_the_loss(tmp_path):
    run_script(script("tools/benchmark.py", only="loss", repeats=1), tmp_path)
    case = json.loads((tmp_path / "benchmark.json").read_text())["cases"][0]
    assert "MultiBoxLoss" in case["median_ms"] and len(case["median_ms"]) == 4


def test_ablations_in_short(tmp_path):
    settings = {"choices": "no_ownership,", "seeds": "0,", "iterations": 2, "n_train": 8, "n_test": 2}
    run_script(script("tools/ablations.py", output_folder=tmp_path, **settings), tmp_path)
    with open(tmp_path / "results.csv") as file:
        assert sorted(line.split(",")[:3] for line in file) == [["baseline", "0", "2"], ["no_ownership", "0", "2"]]


@pytest.mark.parametrize("choice", ablations.CHOICES)
def test_choices_of_the_ablations(monkeypatch, choice):
    words, parameters, patch = ablations.CHOICES[choice]
    assert words and (parameters or patch or choice == "baseline")
    override_parameters(dict(vars(train)), [f"--{name}={value}" for name, value in parameters.items()])
    monkeypatch.setattr(model, "NETWORKS", dict(model.NETWORKS))
    for owner, name in (
        (model, "l2_normalize"), (model, "match_priors"), (model.SourceMap, "n_priors"),
        (model.SSD300, "create_prior_boxes"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, owner.__dict__[name])  # given back after the test
    if patch:
        patch()
    network = model.SSD300(5, ablations.NETWORK)
    locs, scores = network(torch.zeros(1, 3, 300, 300))
    boxes_xy, labels = [torch.tensor([[0.1, 0.1, 0.6, 0.6]])], [torch.tensor([1])]
    loss = model.MultiBoxLoss(network.priors_cxcy)(locs, scores, boxes_xy, labels)
    assert locs.shape[1] == len(network.priors_cxcy) and loss.isfinite()


def test_gpu_check_needs_a_gpu_and_reports_where_the_time_goes(monkeypatch):
    """Here on the CPU: the parts are measured alike."""
    for name, value in {"batch_size": 2, "n_steps": 1}.items():
        monkeypatch.setattr(gpu_check, name, value)
    lines = gpu_check.time_training("ssd300_tiny", torch.device("cpu"))
    assert "images a second" in lines[0] and all(f"{part} " in lines[1] for part in gpu_check.PARTS_OF_A_STEP)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        gpu_check.main()


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
    (tmp_path / "train_log.csv").write_text("iteration\n")
    assert lint() == before
