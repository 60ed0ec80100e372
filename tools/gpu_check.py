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

import train  # noqa: E402 (the path to it has to be set first)
from model import NETWORKS, SSD300, MultiBoxLoss  # noqa: E402
from utils import fastest_memory_format, has_bf16_units, override_parameters  # noqa: E402

parts = "tests,speed,demo"
report = "gpu_report.md"  # lines are appended
batch_size = 32
n_steps = 20  # that are timed, after three to warm up
compile_model = True  # False: where there is no C compiler

PARTS_OF_A_STEP = ("normalise", "forward", "loss", "backward", "optimizer")


def main():
    if not torch.cuda.is_available():
        raise SystemExit("error: no CUDA GPU here")
    device = train.set_up_device()
    gpu = torch.cuda.get_device_properties(device)
    add(f"# {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, PyTorch {torch.__version__}")
    chosen = parts.split(",")
    if "tests" in chosen:
        add("## Tests", run("-m", "pytest", "-q", "tests/test_cuda.py")[-3000:])
    if "speed" in chosen:
        add("## Speed")
        for network in NETWORKS:
            add(*time_training(network, device), *time_detection(network, device))
    if "demo" in chosen:
        start = time.perf_counter()
        output = run("tools/demo.py", f"--compile_model={compile_model}")
        add("## Demo", f"{time.perf_counter() - start:.0f} s", output[-3000:])


def add(*lines):
    """Print lines and append them to the report."""
    text = "\n\n".join(lines) + "\n\n"
    print(text, end="", flush=True)
    with open(REPO / report, "a", encoding="utf-8") as file:
        file.write(text)


def run(*arguments):
    """Run Python in the repository; returns what it printed, as a block of code."""
    process = subprocess.run([sys.executable, *arguments], cwd=REPO, capture_output=True, text=True)
    return f"```\n{process.stdout[-2500:]}{process.stderr[-400:] if process.returncode else ''}\n```"


def time_training(network, device):
    """Time training steps as train.py takes them. Returns lines: speed and memory, and each part's share of a step.

    The shares come from steps that wait after each part; the speed from steps that do not.
    """
    torch.manual_seed(0)
    model = SSD300(21, network)
    memory_format = fastest_memory_format(device, model)
    model = model.to(device, memory_format=memory_format).train()
    optimizer = train.make_optimizer(model, device)
    criterion = MultiBoxLoss(model.priors_cxcy).to(device)
    on_gpu = device.type == "cuda"
    forward = torch.compile(model) if compile_model and on_gpu else model
    images = torch.randint(0, 256, (batch_size, 3, model.input_size, model.input_size), dtype=torch.uint8)
    images = images.pin_memory() if on_gpu else images
    boxes = [torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.5, 0.5, 0.8, 0.9]])] * batch_size
    labels = [torch.tensor([1, 2])] * batch_size
    wait = torch.cuda.synchronize if on_gpu else lambda: None

    def step(seconds=None):
        def count(part, start):
            if seconds is not None:
                wait()
                seconds[part] += time.perf_counter() - start
            return time.perf_counter()

        start = time.perf_counter()
        batch = model.normalize(images).contiguous(memory_format=memory_format)
        start = count("normalise", start)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16_units(device)):
            predictions = forward(batch)
        start = count("forward", start)
        loss = criterion(*predictions, boxes, labels)
        start = count("loss", start)
        optimizer.zero_grad()
        loss.backward()
        start = count("backward", start)
        optimizer.step()
        count("optimizer", start)

    for _ in range(3):
        step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    wait()
    start = time.perf_counter()
    for _ in range(n_steps):
        step()
    wait()
    speed = batch_size * n_steps / (time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0
    seconds = dict.fromkeys(PARTS_OF_A_STEP, 0.0)
    for _ in range(n_steps):
        step(seconds)
    shares = ", ".join(f"{part} {spent / sum(seconds.values()):.0%}" for part, spent in seconds.items())
    return f"{network}, training, batch {batch_size}: {speed:.0f} images a second, {memory:.1f} GiB at most", shares


def time_detection(network, device):
    """Time forward pass and detection, batches of `batch_size`, in float32 as eval.py has it. Returns lines."""
    model = SSD300(21, network)
    memory_format = fastest_memory_format(device, model)
    model = model.to(device, memory_format=memory_format).eval()
    images = torch.randint(0, 256, (batch_size, 3, model.input_size, model.input_size), dtype=torch.uint8)
    with torch.inference_mode():
        for turn in range(n_steps + 3):
            if turn == 3:
                start = time.perf_counter()
            batch = model.normalize(images).contiguous(memory_format=memory_format)
            # Scores that are farther apart than those of random weights, as after training.
            locs, scores = model(batch)
            found = model.detect_objects(locs, 8 * scores, 0.01, 0.45, 200)
            [part.cpu() for part in found[2]]
    return [f"{network}, detection: {batch_size * n_steps / (time.perf_counter() - start):.0f} images a second"]


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    main()
