"""What several test files need: the repo on the import path, the real data, one torch thread."""

import os
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
sys.path.insert(0, str(REPO / "tools"))

torch.set_num_threads(2)


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
