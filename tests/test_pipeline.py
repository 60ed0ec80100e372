"""The scripts as a user runs them, one after the other, with the real network on a tiny data set."""

import csv
import subprocess
import sys

import pytest
import torch
from conftest import REPO
from make_sample import make_sample
from PIL import Image

from create_data_lists import create_data_lists
from datasets import PascalVOCDataset
from eval import calculate_mAP
from model import SSD300, MultiBoxLoss, l2_normalize
from utils import load_checkpoint


def run(script, folder, **parameters):
    """Run a script in `folder`; returns what it printed on standard output."""
    arguments = [f"--{name}={value}" for name, value in parameters.items()]
    process = subprocess.run(
        [sys.executable, REPO / script, *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_lists_train_resume_eval_detect(tmp_path):
    make_sample(tmp_path / "my data", n_train=2, n_test=2, seed=1)
    output = run("create_data_lists.py", tmp_path, train_data="my data", output_folder="lists")
    assert "TRAIN: 2 images" in output and "TEST: 2 images" in output

    settings = {"data_folder": "lists", "pretrained": "", "batch_size": 1, "workers": 1, "log_every": 1}
    run("train.py", tmp_path, iterations=2, **settings)
    assert load_checkpoint(tmp_path / "checkpoint_ssd300.pth.tar")["iteration"] == 2
    run("train.py", tmp_path, iterations=3, checkpoint="checkpoint_ssd300.pth.tar", **settings)
    assert load_checkpoint(tmp_path / "checkpoint_ssd300.pth.tar")["iteration"] == 3
    with open(tmp_path / "train_log.csv", newline="") as file:
        assert [row["iteration"] for row in csv.DictReader(file)] == ["1", "2", "3"]

    evaluation = {"data_folder": "lists", "batch_size": 2, "workers": 0}
    scored = run("eval.py", tmp_path, write_detections_to="found", **evaluation)
    mean = next(line for line in scored.splitlines() if line.startswith("mean"))
    assert "a second" in scored
    rescored = run("eval.py", tmp_path, read_detections_from="found", **evaluation)
    assert mean in rescored  # the files hold the same detections

    photo = sorted((tmp_path / "my data" / "JPEGImages").glob("test_*.jpg"))[0]
    run("detect.py", tmp_path, images=photo, output_folder="shown", min_score=0.01)
    with Image.open(photo) as image, Image.open(tmp_path / "shown" / photo.name) as annotated:
        assert image.size == annotated.size


def test_the_heads_overfit_four_photos(real_data, tmp_path):
    """The small version of a run that the README records: ImageNet's features stay, only the heads learn."""
    weights = real_data.parent / "weights" / "vgg16_features_imagenet_fp16.pth"
    if not weights.exists():
        pytest.skip(f"{weights}: not there")
    photos = real_data / "voc_photos" / "VOC2012"
    create_data_lists(output_folder=tmp_path, train_data=photos, test_split="trainval")
    dataset = PascalVOCDataset(tmp_path, "TEST", keep_difficult=True)
    images, boxes, labels, difficulties = dataset.collate_fn([dataset[i] for i in range(len(dataset))])
    torch.manual_seed(0)
    model = SSD300(n_classes=len(dataset.label_map))
    model.load_pretrained(str(weights))
    with torch.no_grad():
        conv4_3, conv7 = model.base(model.normalize(images))
        source_maps = (l2_normalize(conv4_3) * model.rescale_factors, conv7, *model.aux_convs(conv7))
    criterion, optimizer = MultiBoxLoss(model.priors_cxcy), torch.optim.Adam(model.pred_convs.parameters(), lr=1e-3)
    losses, mean_aps = [], []
    for iteration in range(41):
        predictions = model.pred_convs(source_maps)
        if iteration in (0, 40):
            with torch.no_grad():
                found = model.detect_objects(*predictions, min_score=0.01, max_overlap=0.45, top_k=200)
            mean_aps.append(calculate_mAP(*found, boxes, labels, difficulties, label_map=dataset.label_map)[1])
        loss = criterion(*predictions, boxes, labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0], losses
    assert mean_aps[0] < 0.2, mean_aps
    assert mean_aps[1] > 0.95, mean_aps


def test_without_a_label_map_train_names_the_missing_file(tmp_path):
    process = subprocess.run(
        [sys.executable, REPO / "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert process.returncode != 0
    assert "label_map.json" in process.stderr and "create_data_lists.py" in process.stderr


def test_importing_a_module_does_nothing(tmp_path):
    """Nothing is printed, written, seeded, downloaded or moved to a device; and the directory is any."""
    modules = ["utils", "model", "datasets", "eval", "detect", "create_data_lists", "train"]  # none imports a later one
    code = (
        "import importlib, random, socket, sys, numpy, torch\n"
        f"sys.path.insert(0, {str(REPO)!r})\n"
        "def refuse(*arguments): raise AssertionError('a connection at import')\n"
        "socket.socket.connect = refuse\n"
        "def state(): return random.getstate(), str(numpy.random.get_state()), torch.get_num_threads()\n"
        f"for name in {modules}:\n"
        "    before, before_torch = state(), torch.get_rng_state()\n"
        "    importlib.import_module(name)\n"
        "    assert state() == before and torch.equal(torch.get_rng_state(), before_torch), name\n"
        "    assert not torch.cuda.is_initialized(), name\n"
    )
    process = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "" and process.stderr == ""
    assert list(tmp_path.iterdir()) == []
