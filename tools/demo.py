"""The whole pipeline on generated pictures: sample -> lists -> training -> evaluation -> annotated picture.

    python tools/demo.py          or: make demo

Needs no data and no download. Writes everything into `folder`; an earlier demo there is written over. Each
step is a command that is printed before it runs, and could be typed in its place. On a CPU it trains the small
network, for as many iterations on every machine, so that what it finds does not depend on the processor; only the
time does. With a CUDA GPU it trains the paper's network.
Any parameter below can be overridden on the command line with --name=value.
"""

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from utils import exit_with_message, override_parameters  # noqa: E402 (the path to it has to be set first)

folder = "demo"  # everything is written here
n_train = 1000  # pictures to train on
n_test = 100  # pictures to evaluate on
iterations = 800  # of training on a CPU
minutes = 0.0  # of training on a CPU after which it ends, however far it is; 0: no clock
gpu_iterations = 3000  # of training on a CUDA GPU
compile_model = True  # on a CUDA GPU; False: where there is no C compiler
seed = 0

# On a CPU: from random weights, a batch norm network bears a high rate, and each picture is seen too few times to
# overfit: little augmentation is enough.
ON_CPU = {
    "network": "ssd300_tiny", "batch_size": 8, "optimizer_name": "adamw", "lr": 3e-3, "warmup": 30,
    "schedule": "cosine", "augment": "flip", "workers": 1, "log_every": 5, "evaluate_every": 200,
}  # fmt: skip
ON_GPU = {
    "network": "ssd300_vgg16", "batch_size": 32, "lr": 2e-3, "warmup": 100, "workers": 8, "log_every": 10,
    "evaluate_every": 500,
}  # fmt: skip

# What to type next: the manual's recipes for 500 photos, in "Your own data".
YOUR_PHOTOS_ON_CPU = (
    "python train.py --network=ssd300_tiny --minutes=20 --batch_size=8 --optimizer_name=adamw --lr=3e-3 --warmup=30 "
    "--schedule=cosine --grad_clip=10 --evaluate_every=600"
)
YOUR_PHOTOS_ON_GPU = (
    "python train.py --freeze_up_to=conv5_3 --batch_size=16 --iterations=6000 --lr=5e-4 --warmup=200 "
    '--decay_lr_at="(4000, 5000)" --evaluate_every=500'
)

USUAL_MAP = 0.9  # or more, on pictures that the network has not seen


def main():
    on_gpu = torch.cuda.is_available()
    out = Path(folder)
    sample, data, checkpoint = out / "sample", out / "lists", out / "checkpoint_ssd300.pth.tar"
    if on_gpu:
        decay_lr_at = (int(gpu_iterations * 0.8), int(gpu_iterations * 0.95))
        recipe = {**ON_GPU, "iterations": gpu_iterations, "decay_lr_at": decay_lr_at, "compile_model": compile_model}
    else:
        recipe = {**ON_CPU, "iterations": iterations, "minutes": minutes}

    run("tools/make_sample.py", output_folder=sample, n_train=n_train, n_test=n_test, seed=seed)
    run("create_data_lists.py", train_data=sample, output_folder=data)
    run(
        "train.py",
        data_folder=data, save_to=checkpoint, pretrained="", overwrite=True, seed=seed,
        grad_clip=10.0, save_every=0, **recipe,
    )  # fmt: skip
    run("eval.py", data_folder=data, checkpoint=checkpoint, batch_size=recipe["batch_size"], workers=1)
    picture = fullest_picture(data)
    run("detect.py", checkpoint=checkpoint, images=picture, min_score=0.5, output_folder=out / "detections")
    sum_up(out, out / "detections" / picture.name, on_gpu)


def run(script, **parameters):
    """Print one command of the pipeline and run it; the demo ends here if it fails, after the script's own words."""
    command = [script, *(f"--{name}={value}" for name, value in parameters.items())]
    print(f"\n$ python {shlex.join(map(str, command))}", flush=True)
    # PASSIVE: threads that wait for each other sleep. By default they keep the core, which other programs may need.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    process = subprocess.run([sys.executable, *command], cwd=REPO, env=environment)
    if process.returncode:
        raise SystemExit(process.returncode)


def fullest_picture(data):
    """The test picture with most objects."""
    images = json.loads((REPO / data / "TEST_images.json").read_text())
    objects = json.loads((REPO / data / "TEST_objects.json").read_text())
    n_objects = [len(entry["labels"]) for entry in objects]
    return Path(images[n_objects.index(max(n_objects))])


def sum_up(out, picture, on_gpu):
    """Say what was learned, whether that is usual, what to look at, and what to try next."""
    with open(REPO / out / "checkpoint_ssd300.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    test_pictures = out / "sample/JPEGImages/test_*.jpg"
    losses = [row["loss"] for row in rows if row["loss"]]
    mean_ap = float([row["mAP"] for row in rows if row["mAP"]][-1])
    n_iterations = int(rows[-1]["iteration"])
    print(f"""
{n_iterations} iterations took the loss from {losses[0]} to {losses[-1]}.
mAP {mean_ap:.2f} on pictures that the network has not seen. {judge(mean_ap, n_iterations, on_gpu)}

Look at
    {picture}    what the network finds in a test picture, with scores
    {out / "lists" / "data_report.txt"}    what is in the data
    {out / "checkpoint_ssd300.csv"}    loss and mAP as they went
More pictures: python detect.py --checkpoint={out / "checkpoint_ssd300.pth.tar"} --images="{test_pictures}"

Next, your own photos, with boxes in Pascal VOC's, YOLO's or COCO's format (docs/manual.md, "Your own data"):
    python create_data_lists.py --train_data=my_data --val_fraction=0.2
    {YOUR_PHOTOS_ON_GPU if on_gpu else YOUR_PHOTOS_ON_CPU}
    python eval.py --checkpoint=best_checkpoint_ssd300.pth.tar
    python detect.py --checkpoint=best_checkpoint_ssd300.pth.tar --images=my_photos""")


def judge(mean_ap, n_iterations, on_gpu):
    """Whether the demo's mAP is what one expects, and what to type if it is not."""
    if mean_ap >= USUAL_MAP:
        return f"({USUAL_MAP} or more is usual.)"
    if on_gpu:
        way_out = f"Train longer: python tools/demo.py --gpu_iterations={2 * gpu_iterations}"
    elif n_iterations < iterations:
        way_out = f"The clock ended the training after {n_iterations} of {iterations} iterations: leave out --minutes."
    else:
        way_out = f"Train longer: python tools/demo.py --iterations={2 * iterations}"
    return f"({USUAL_MAP} or more is usual. {way_out})"


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    with exit_with_message():
        main()
