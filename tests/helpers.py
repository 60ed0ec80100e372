"""What several test files use: runs of the scripts, a model that finds what it is told, odd files."""

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils import load_checkpoint

REPO = Path(__file__).resolve().parents[1]
LABEL_MAP = {"background": 0, "cat": 1, "dog": 2, "grandfather clock": 3}
DIFFICULT = "<difficult>1</difficult>"

# --- Runs of the scripts --------------------------------------------------------------------------


def script(name, **parameters):
    """The command that runs a script of the repo with these parameters."""
    return [sys.executable, str(REPO / name), *(f"--{name}={value}" for name, value in parameters.items())]


def training(lists, **parameters):
    """The command of a short run of train.py, 8 iterations of 2 images; `parameters` override its settings."""
    settings = {
        "network": "ssd300_tiny", "data_folder": lists, "pretrained": "", "batch_size": 2, "iterations": 8,
        "lr": 1e-4, "warmup": 2, "decay_lr_at": (5, 7), "workers": 1, "save_every": 2, "log_every": 1,
        "save_to": "last.pth.tar", **parameters,
    }  # fmt: skip
    return script("train.py", **settings)


def start(command, folder):
    """Start a command in `folder` as a process group of its own (so that its workers die with it)."""
    return subprocess.Popen(
        command, cwd=folder, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process, timeout=900):
    """Wait for a process of `start()`; returns its exit code and what it printed. `timeout` is for one that hangs."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def run_script(command, folder):
    """Run a command in `folder` to the end, which must be a good one; returns what it printed."""
    code, output = finish(start(command, folder))
    assert code == 0, output
    return output


def read_log(path):
    """The rows of train.py's log, a dict each."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_same_state(path, other):
    """Iteration, weights, optimizer and random states of two checkpoints are the same, to the last bit."""
    one, two = load_checkpoint(path), load_checkpoint(other)
    assert one["iteration"] == two["iteration"]
    assert ("training_model" in one) == ("training_model" in two)  # with a moving average, which is "model" then
    for weights in ("model", "training_model") if "training_model" in one else ("model",):
        assert one[weights].keys() == two[weights].keys()
        for name, tensor in one[weights].items():
            assert torch.equal(tensor, two[weights][name]), name
    states, other_states = one["optimizer"]["state"], two["optimizer"]["state"]
    assert states.keys() == other_states.keys() and states
    for key, state in states.items():
        assert state.keys() == other_states[key].keys() and state
        assert all(torch.equal(tensor, other_states[key][name]) for name, tensor in state.items()), key
    assert torch.equal(one["rng"]["cpu"], two["rng"]["cpu"])


# --- A model, files -------------------------------------------------------------------------------


class FakeModel:
    """Stands in for SSD300: finds the same objects in every image, and remembers what it was given."""

    label_map, network, input_size, antialias = LABEL_MAP, "ssd300_vgg16", 300, True
    mean, training = torch.zeros(1, 3, 1, 1), False

    def __init__(self, boxes_xy=((0.1, 0.2, 0.5, 0.6),), labels=(1,), scores=(0.9,)):
        self.boxes_xy = torch.tensor(boxes_xy, dtype=torch.float32).reshape(-1, 4)
        self.labels, self.scores = torch.tensor(labels, dtype=torch.int64), torch.tensor(scores)
        self.batches, self.arguments = [], []

    def eval(self):
        self.train(False)

    def train(self, mode):
        self.training = mode

    def normalize(self, images):
        self.batches.append(images)
        return images.float()

    def __call__(self, images):
        assert images.shape[1:] == (3, 300, 300)
        return torch.zeros(len(images), 10, 4), torch.zeros(len(images), 10, len(self.label_map))

    def detect_objects(self, predicted_locs, predicted_scores, min_score, max_overlap, top_k, max_candidates=None):
        self.arguments.append((min_score, max_overlap, top_k))
        is_candidate = (self.scores > min_score) & (predicted_scores[0, 0, self.labels] > -torch.inf)
        keep = is_candidate.nonzero().squeeze(1)[:top_k]
        n_images = len(predicted_locs)
        return tuple([values[keep]] * n_images for values in (self.boxes_xy, self.labels, self.scores))


class Payload:
    """Unpickling it runs a command, which makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def png(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def write(path, content):
    """Write a string, or anything else as JSON, to a file whose folder need not exist yet; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def read_files(folder):
    """The contents of all files in a folder and in those below it, by their path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- Annotated data -------------------------------------------------------------------------------


def object_xml(name="dog", box=(11, 21, 40, 60), difficult="<difficult>0</difficult>", extra=""):
    tags = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    corners = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    return f"<object><name>{name}</name>{difficult}<bndbox>{corners}</bndbox>{extra}</object>"


def annotation_xml(*objects, size=(100, 80)):
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def write_annotation(folder, *objects, size=(100, 80), name="a"):
    return write(folder / f"{name}.xml", annotation_xml(*objects, size=size))


def write_image(path, size=(100, 80), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path, **options)
    return path
