"""Check and measure the program on a machine with a CUDA GPU, and write a report.

    python tools/gpu_check.py                          or: make gpu-check
    python tools/gpu_check.py --parts=tests,speed      some of the parts

Parts: tests (tests/test_cuda.py), speed (tools/benchmark.py: images a second, peak memory, and where the time of a
training step goes, for each network), demo (3,000 iterations on ssd300_vgg16, with its mAP). Each adds its lines to
`report`. The tests and the demo take some minutes, each network two or three, most of it to compile it. The exit status
is 1 if a part has failed.
Any parameter below can be overridden on the command line with --name=value.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from utils import exit_with_message, override_parameters  # noqa: E402 (the path to it has to be set first)

parts = ("tests", "speed", "demo")
report = "gpu_report.md"  # lines are appended
compile_model = True  # False: where there is no C compiler


def main():
    compiled = f"--compile_model={compile_model}"
    commands = {
        "tests": ["-m", "pytest", "-q", "tests/test_cuda.py"],
        "speed": ["tools/benchmark.py", "--only=network", compiled],
        "demo": ["tools/demo.py", compiled],
    }
    unknown = sorted(set(parts) - set(commands))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not a part; these are: {', '.join(commands)}")
    if not torch.cuda.is_available():
        raise ValueError("no CUDA GPU here")
    gpu = torch.cuda.get_device_properties(0)
    add(f"# {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, PyTorch {torch.__version__}")
    failed = [part for part in parts if run(part, commands[part]) != 0]
    if failed:
        raise SystemExit(f"error: {', '.join(failed)} failed: see {report}")


def add(*lines):
    """Print lines and append them to the report."""
    text = "\n\n".join(lines) + "\n\n"
    print(text, end="", flush=True)
    with open(REPO / report, "a", encoding="utf-8") as file:
        file.write(text)


def run(part, arguments):
    """Run Python in the repository, and report its time and the last of what it printed; returns its exit status."""
    start = time.perf_counter()
    process = subprocess.run([sys.executable, *arguments], cwd=REPO, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    errors = process.stderr[-400:] if process.returncode else ""
    add(f"## {part.capitalize()}", f"{seconds:.0f} s", f"```\n{process.stdout[-8000:]}{errors}\n```")
    return process.returncode


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    with exit_with_message():
        main()
