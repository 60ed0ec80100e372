"""The scripts as a user runs them, one after the other, on a tiny data set."""

import sys

import pytest
import torch
from helpers import REPO, read_log, run_script, script
from PIL import Image

from create_data_lists import create_data_lists
from datasets import PascalVOCDataset
from eval import calculate_mAP
from model import SSD300, MultiBoxLoss, l2_normalize, load_pretrained
from utils import load_checkpoint


def test_lists_train_resume_eval_detect(sample, tmp_path):
    def run(name, **parameters):
        return run_script(script(name, **parameters), tmp_path)

    output = run("create_data_lists.py", train_data=sample, output_folder="my lists")
    assert "TRAIN: 8 images" in output and "TEST: 4 images" in output

    settings = {"data_folder": "my lists", "network": "ssd300_tiny", "batch_size": 2, "workers": 1, "log_every": 1}
    run("train.py", iterations=2, **settings)
    run("train.py", iterations=3, checkpoint="checkpoint_ssd300.pth.tar")
    assert load_checkpoint(tmp_path / "checkpoint_ssd300.pth.tar")["iteration"] == 3
    assert [row["iteration"] for row in read_log(tmp_path / "checkpoint_ssd300.csv")] == ["1", "2", "3"]

    assert "mean" in run("eval.py", data_folder="my lists", batch_size=2, workers=0)
    run("detect.py", images=sample / "JPEGImages/test_00001.jpg", output_folder="shown", min_score=0.01)
    with Image.open(tmp_path / "shown/test_00001.jpg") as annotated:
        assert min(annotated.size) >= 320


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
    load_pretrained(model, str(weights))
    with torch.no_grad():
        conv4_3, conv7 = model.base(model.normalize(images))  # each (4, channels, grid, grid)
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
    assert mean_aps[0] < 0.2 and mean_aps[1] > 0.95, mean_aps


def test_importing_a_module_does_nothing(tmp_path):
    """Nothing is printed, written, seeded, downloaded or moved to a device; each takes from those before it alone."""
    modules = ["utils", "datasets", "model", "detect", "annotations", "create_data_lists", "eval", "train"]
    code = f"""
import importlib, random, socket, sys, numpy, torch
sys.path.insert(0, {str(REPO)!r})
modules, socket.socket.connect = {modules}, None
def state():
    seeds = random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()
    return seeds, torch.get_num_threads()
for number, name in enumerate(modules):
    before = state()
    importlib.import_module(name)
    assert state() == before, name
    assert not torch.cuda.is_initialized(), name
    assert not sys.modules.keys() & set(modules[number + 1 :]), name
"""
    assert run_script([sys.executable, "-B", "-c", code], tmp_path) == "" and list(tmp_path.iterdir()) == []
