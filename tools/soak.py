"""Does memory stay flat? Train for thousands of iterations and watch the processes.

    python tools/soak.py                              2,000 iterations, minutes on a CPU
    python tools/soak.py --iterations=20000

Runs train.py on generated pictures, with the small network of tests/standin.py in VGG-16's place; the loader
and its workers, the augmentation, the loss, the log, the evaluation and the checkpoints are the real ones.
Reads the memory of each process from /proc (Linux only), and prints how it changes, in kB per 1000
iterations: the slope of a straight line through the samples after the first ones.
Any parameter below can be overridden on the command line with --name=value.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
sys.path.insert(0, str(REPO / "tools"))

from make_sample import make_sample  # noqa: E402 (the paths to them have to be set first)

from create_data_lists import create_data_lists  # noqa: E402
from utils import override_parameters  # noqa: E402

iterations = 2000
batch_size = 4
workers = 2
n_images = 60  # generated pictures, read again and again
save_every = 20  # iterations between two checkpoints
evaluate_every = 500  # iterations between two evaluations, whose workers come and go
settle = 500  # iterations until caches are full; samples before them do not count
seconds = 0.5  # between two samples


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_sample(folder / "sample", n_images, n_images // 5, seed=0)
        create_data_lists(train_data=folder / "sample", output_folder=folder / "lists")
        samples = watch(start_training(folder), folder / "train_log.csv")
    report(samples)


def start_training(folder):
    """Start train.py with the stand-in network; returns the process."""
    settings = {
        "data_folder": folder / "lists", "pretrained": "", "batch_size": batch_size, "iterations": iterations,
        "lr": 1e-4, "warmup": 10, "workers": workers, "save_every": save_every, "evaluate_every": evaluate_every,
        "log_every": 5, "log_file": folder / "train_log.csv", "save_to": folder / "last.pth.tar",
    }  # fmt: skip
    command = [sys.executable, str(REPO / "tests" / "standin.py"), "train.py"]
    return subprocess.Popen(command + [f"--{name}={value}" for name, value in settings.items()], cwd=folder)


def watch(process, log):
    """Sample the memory of a process and its children until it ends.

    Returns a dict of process id to a list of (iteration, kB); the main process is the first.
    """
    samples = {process.pid: []}
    while process.poll() is None:
        iteration = last_iteration(log)
        for pid in (process.pid, *children(process.pid)):
            memory = resident_kb(pid)
            if iteration and memory:
                samples.setdefault(pid, []).append((iteration, memory))
        time.sleep(seconds)
    if process.returncode:
        raise SystemExit(f"error: train.py ended with exit code {process.returncode}")
    return samples


def last_iteration(log):
    """The iteration of the log's last row, 0 before there is one."""
    lines = log.read_text().splitlines() if log.is_file() else []
    first = lines[-1].split(",")[0] if lines else ""
    return int(first) if first.isdecimal() else 0


def children(pid):
    """Process ids of the children of a process."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it ended
        return []


def resident_kb(pid):
    """Memory of a process that is its own (not shared with others, such as batches on their way), in kB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def report(samples):
    """Print, for each process that lived through the run, the slope, and its memory at seven moments."""
    for number, pairs in enumerate(samples.values()):
        points = np.array([pair for pair in pairs if pair[0] >= settle], dtype=np.float64).reshape(-1, 2)
        if len(points) < 3 or np.ptp(points[:, 0]) < (iterations - settle) / 2:
            continue  # a worker of one evaluation
        slope = 1000 * np.polyfit(points[:, 0], points[:, 1], 1)[0]
        name = "main" if number == 0 else "worker"
        marks = points[np.linspace(0, len(points) - 1, 7).round().astype(int), 1] / 1000
        print(f"{name:6} {slope:+7.0f} kB per 1000 iterations; in MB: " + ", ".join(f"{mark:.1f}" for mark in marks))


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    main()
