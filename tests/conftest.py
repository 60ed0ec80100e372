"""The fixtures of all test files; one thread for each process (the tests run side by side)."""

import errno
import itertools
import os
from pathlib import Path

import pytest
import torch
from helpers import run_script, training
from make_sample import make_sample

from create_data_lists import create_data_lists
from model import SSD300, model_state
from utils import load_label_map, save_checkpoint

os.environ["OMP_NUM_THREADS"] = "1"  # of the scripts that tests start
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data sets that SSD_TEST_DATA names; without it the test is skipped."""
    folder = os.environ.get("SSD_TEST_DATA")
    if not folder:
        pytest.skip("SSD_TEST_DATA is not set: no real data to test on")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"SSD_TEST_DATA names {folder}, which is not a folder")
    return path.resolve()


@pytest.fixture
def run_main(monkeypatch):
    """Runs a script's main() with parameters as from the command line."""

    def run(script, **parameters):
        for name, value in parameters.items():
            monkeypatch.setattr(script, name, value)
        script.main()

    return run


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(after=n): the disk is full when n more files have been forced to it."""

    def fill(after):
        written = itertools.count()

        def fsync(_):
            if next(written) >= after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)

    return fill


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A folder in VOC's layout with 8 generated pictures to train on and 4 to test on; not to be changed."""
    folder = tmp_path_factory.mktemp("data") / "sample"
    make_sample(folder, n_train=8, n_test=4, seed=0)
    return folder


@pytest.fixture(scope="session")
def lists(sample):
    """A folder with the data lists of `sample`; not to be changed."""
    create_data_lists(train_data=sample, output_folder=sample.parent / "lists")
    return sample.parent / "lists"


@pytest.fixture(scope="session")
def tiny_checkpoint(lists):
    """The path of a checkpoint of ssd300_tiny, random weights, with the label map of `lists`; not to be changed."""
    torch.manual_seed(0)
    label_map = load_label_map(lists)
    model = SSD300(len(label_map), network="ssd300_tiny")
    model.label_map = label_map
    path = lists.parent / "tiny.pth.tar"
    save_checkpoint(model_state(model), path)
    return path


@pytest.fixture(scope="session")
def unbroken(lists, tmp_path_factory):
    """A folder in which a run of `helpers.training(lists)` went from its first to its last iteration."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_script(training(lists), folder)
    return folder
