"""Check and measure the program on a machine with a CUDA GPU, and write a report.

    python tools/gpu_check.py                          or: make gpu-check
    python tools/gpu_check.py --parts=tests,speed      within ten minutes ...
    python tools/gpu_check.py --parts=demo             ... and so is the rest

Parts: tests (tests/test_cuda.py), speed (images a second, peak memory, and where the time of a training step goes, for
each network), demo (3,000 iterations on ssd300_vgg16, with its mAP). Each adds its lines to `report`.
Any parameter below can be overridden on the command line with --name=value.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from model import NETWORKS, SSD300, MultiBoxLoss, fuse_batch_norm  # noqa: E402 (the path to it has to be set first)
from utils import exit_with_message, fastest_memory_format, has_bf16_units, override_parameters  # noqa: E402

parts = "tests,speed,demo"
report = "gpu_report.md"  # lines are appended
batch_size = 32
n_steps = 20  # that are timed, after three to warm up
compile_model = True  # False: where there is no C compiler

N_WARM_UP = 3
PARTS_OF_A_STEP = ("normalise", "forward", "loss", "backward", "optimizer")


def main():
    if not torch.cuda.is_available():
        raise ValueError("no CUDA GPU here")
    device = torch.device("cuda")
    # As train.py sets it up.
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    gpu = torch.cuda.get_device_properties(device)
    add(f"# {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, PyTorch {torch.__version__}")
    chosen = parts.split(",")
    if "tests" in chosen:
        add("## Tests", run("-m", "pytest", "-q", "tests/test_cuda.py"))
    if "speed" in chosen:
        add("## Speed")
        for network in NETWORKS:
            add(*time_training(network, device), time_detection(network, device))
    if "demo" in chosen:
        start = time.perf_counter()
        output = run("tools/demo.py", f"--compile_model={compile_model}")
        add("## Demo", f"{time.perf_counter() - start:.0f} s", output)


def add(*lines):
    """Print lines and append them to the report."""
    text = "\n\n".join(lines) + "\n\n"
    print(text, end="", flush=True)
    with open(REPO / report, "a", encoding="utf-8") as file:
        file.write(text)


def run(*arguments):
    """Run Python in the repository; returns the last of what it printed, as a block of code."""
    process = subprocess.run([sys.executable, *arguments], cwd=REPO, capture_output=True, text=True)
    errors = process.stderr[-400:] if process.returncode else ""
    return f"```\n{process.stdout[-2500:]}{errors}\n```"


def make_model(network, device):
    """A network with random weights, as the scripts place it on a device; and its memory format."""
    torch.manual_seed(0)
    model = SSD300(21, network)
    memory_format = fastest_memory_format(device, model)
    return model.to(device, memory_format=memory_format), memory_format


def make_images(model, device):
    """A batch of images as the data loader leaves it."""
    images = torch.randint(0, 256, (batch_size, 3, model.input_size, model.input_size), dtype=torch.uint8)
    return images.pin_memory() if device.type == "cuda" else images


def read_clock(device, is_waiting=True):
    """The time in seconds, after the device has done what it was given, if `is_waiting`."""
    if is_waiting and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_training(network, device):
    """Time training steps as train.py takes them. Returns lines: speed and memory, and each part's share of a step.

    The shares come from steps that wait after each part; the speed from steps that do not.
    """
    model, memory_format = make_model(network, device)
    model.train()
    forward = torch.compile(model) if compile_model and device.type == "cuda" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=True)
    criterion = MultiBoxLoss(model.priors_cxcy).to(device)
    images = make_images(model, device)
    boxes = [torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.5, 0.5, 0.8, 0.9]])] * batch_size
    labels = [torch.tensor([1, 2])] * batch_size

    def take_step(is_waiting):
        """One step; returns the times at its start and after each part."""
        times = [read_clock(device, is_waiting)]
        batch = model.normalize(images).contiguous(memory_format=memory_format)
        times.append(read_clock(device, is_waiting))
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16_units(device)):
            predicted_locs, predicted_scores = forward(batch)
        times.append(read_clock(device, is_waiting))
        loss = criterion(predicted_locs, predicted_scores, boxes, labels)
        times.append(read_clock(device, is_waiting))
        optimizer.zero_grad()
        loss.backward()
        times.append(read_clock(device, is_waiting))
        optimizer.step()
        times.append(read_clock(device, is_waiting))
        return times

    for _ in range(N_WARM_UP):
        take_step(is_waiting=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = read_clock(device)
    for _ in range(n_steps):
        take_step(is_waiting=False)
    speed = batch_size * n_steps / (read_clock(device) - start)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0

    times = torch.tensor([take_step(is_waiting=True) for _ in range(n_steps)], dtype=torch.float64)
    seconds = times.diff(dim=1).sum(dim=0)  # of each part, over all steps
    shares = (seconds / seconds.sum()).tolist()
    line = ", ".join(f"{part} {share:.0%}" for part, share in zip(PARTS_OF_A_STEP, shares, strict=True))
    return f"{network}, training, batch {batch_size}: {speed:.0f} images a second, {memory:.1f} GiB at most", line


@torch.inference_mode()
def time_detection(network, device):
    """Time forward pass and detection, in float32 as eval.py has it. Returns a line."""
    model, memory_format = make_model(network, device)
    fuse_batch_norm(model.eval())
    images = make_images(model, device)
    for turn in range(N_WARM_UP + n_steps):
        if turn == N_WARM_UP:
            start = read_clock(device)
        batch = model.normalize(images).contiguous(memory_format=memory_format)
        predicted_locs, predicted_scores = model(batch)
        # Scores that are farther apart than those of random weights, as after training.
        _, _, scores = model.detect_objects(predicted_locs, 8 * predicted_scores, 0.01, 0.45, 200)
        torch.cat(scores).cpu()
    speed = batch_size * n_steps / (read_clock(device) - start)
    return f"{network}, detection: {speed:.0f} images a second"


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    with exit_with_message():
        main()
