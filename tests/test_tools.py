"""The demo and the benchmark, as far as they can be tried in seconds."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import demo
import pytest
import torch
from conftest import REPO

from utils import override_parameters


@pytest.mark.parametrize("on_gpu", [False, True])
def test_commands_of_the_demo_are_understood(monkeypatch, on_gpu):
    commands = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(demo, "iterations_in", lambda minutes, batch_size: 39)
    monkeypatch.setattr(demo, "fullest_image", lambda data: Path("fullest.jpg"))
    monkeypatch.setattr(demo, "sum_up", lambda *_: None)
    monkeypatch.setattr(demo.subprocess, "run", lambda command, **_: commands.append(command[1:]))
    demo.main()
    scripts = ["make_sample", "create_data_lists", "train", "eval", "detect"]
    assert [Path(script).stem for script, *_ in commands] == scripts
    for (_, *arguments), script in zip(commands, scripts, strict=True):
        before = vars(importlib.import_module(script))
        after = dict(before)
        override_parameters(after, arguments)
        assert arguments and any(after[name] != before[name] for name in before)


def test_benchmark_of_the_loss(tmp_path):
    command = [sys.executable, REPO / "tools" / "benchmark.py", "--only=loss", "--repeats=1"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "benchmark.json").read_text())
    case = report["cases"][0]
    assert "MultiBoxLoss" in case["median_ms"] and len(case["median_ms"]) == 3
    assert "plain, image by image" in process.stdout
