"""The whole pipeline on generated pictures: sample -> lists -> training -> evaluation -> annotated image.

    python tools/demo.py          or: make demo

Needs no data and no download. Writes everything into `folder`. Each step is a command that is printed before
it runs, and could be typed in its place. With a CUDA GPU the model is trained until it is good; on a CPU for
as many iterations as fit into `cpu_minutes`, to see that it learns.
Any parameter below can be overridden on the command line with --name=value.
"""

import csv
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from model import SSD300, MultiBoxLoss  # noqa: E402 (the path to them has to be set first)
from utils import override_parameters  # noqa: E402

folder = "demo"  # everything is written here
n_train = 1000  # images to train on
n_test = 100  # images to evaluate on
gpu_iterations = 3000  # of 32 images
cpu_minutes = 5.0  # training time without a GPU
seed = 0


def main():
    on_gpu = torch.cuda.is_available()
    out = Path(folder)
    data, checkpoint, log = out / "lists", out / "checkpoint_ssd300.pth.tar", out / "train_log.csv"
    batch_size, iterations = (32, gpu_iterations) if on_gpu else (4, iterations_in(cpu_minutes, batch_size=4))
    test_images = n_test if on_gpu else min(n_test, 40)

    sample = out / "sample"
    run("tools/make_sample.py", output_folder=sample, n_train=n_train, n_test=test_images, seed=seed)
    run("create_data_lists.py", train_data=sample, output_folder=data)
    run(
        "train.py",
        data_folder=data, save_to=checkpoint, log_file=log, pretrained="", seed=seed,
        batch_size=batch_size, iterations=iterations, lr=2e-3, warmup=min(100, iterations // 3 + 1),
        decay_lr_at=(int(iterations * 0.8), int(iterations * 0.95)), grad_clip=10.0,
        workers=8 if on_gpu else 1, log_every=10 if on_gpu else 1, save_every=0,
    )  # fmt: skip
    run("eval.py", data_folder=data, checkpoint=checkpoint, batch_size=batch_size, workers=1)
    shown = fullest_image(data)
    run("detect.py", checkpoint=checkpoint, images=shown, output_folder=out / "detections")
    sum_up(log, iterations, batch_size, on_gpu, out / "detections" / shown.name)


def iterations_in(minutes, batch_size):
    """How many training iterations this CPU does in so many minutes, by timing two of them."""
    model = SSD300(n_classes=5)
    criterion = MultiBoxLoss(model.priors_cxcy)
    images = torch.rand(batch_size, 3, 300, 300)
    boxes, labels = [torch.tensor([[0.1, 0.1, 0.6, 0.6]])] * batch_size, [torch.tensor([1])] * batch_size
    for _ in range(2):  # the first one also warms up
        start = time.perf_counter()
        criterion(*model(images), boxes, labels).backward()
        seconds = time.perf_counter() - start
    return max(10, int(minutes * 60 / seconds))


def fullest_image(data):
    """The test image with most objects."""
    images, objects = (json.loads((REPO / data / f"TEST_{kind}.json").read_text()) for kind in ("images", "objects"))
    return Path(max(zip(objects, images, strict=True), key=lambda pair: len(pair[0]["labels"]))[1])


def run(script, **parameters):
    """Print one command of the pipeline and run it; the demo ends here if it fails."""
    command = [script, *(f"--{name}={value}" for name, value in parameters.items())]
    print(f"\n$ python {shlex.join(map(str, command))}", flush=True)
    subprocess.run([sys.executable, *command], cwd=REPO, check=True)


def sum_up(log, iterations, batch_size, on_gpu, picture):
    """Say what was learned, where the picture is, and what a longer run is for."""
    with open(REPO / log, newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    print(f"\nThe loss went from {first:.1f} to {last:.1f} in {iterations} iterations of {batch_size} images.")
    print(f"An image with what was found in it: {picture}")
    if not on_gpu:
        print(
            f"{iterations} iterations are a beginning: few objects are found as yet, or none. To see it learn on, "
            f"give it more time, e.g. python tools/demo.py --cpu_minutes=60; a CUDA GPU does {gpu_iterations} "
            "iterations of 32 images."
        )


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    main()
