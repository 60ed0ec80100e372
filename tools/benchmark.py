"""Time the repo's parts beside torchvision's, and beside the floor, on the same inputs, in one run.

    python tools/benchmark.py                                    prints a table, writes benchmark.json
    python tools/benchmark.py --only=metric --repeats=15
    SSD_TEST_DATA=../shared/data python tools/benchmark.py       on real detections and photos

Sections: data (JPEG to augmented image), loss, network (forward pass and training step of each network, SSDLite
beside torchvision's own), training (train.py as a whole), detection, metric. Small operations are timed on one thread,
as CPU time; networks with all cores, and all that a GPU does, as time on the clock. The versions of a case take turns,
so that whatever else the machine does falls on all of them alike. The table gives medians, and how many times as long
as this code each version takes: look at these ratios, not at the milliseconds, which are the machine's.
Any parameter below can be overridden with --name=value.
"""

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from convert_weights import convert_state
from make_sample import make_sample
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou
from torchvision.transforms import v2

import create_data_lists
import datasets
import train
import utils
from annotations import parse_annotation
from datasets import FILLER, read_image, resize, transform
from eval import calculate_mAP, read_voc_detections
from model import NETWORKS, SSD300, MultiBoxLoss, detect_objects
from utils import cxcy_to_gcxgcy, cxcy_to_xy, find_jaccard_overlap, make_label_map, override_parameters

only = ""  # sections to run, such as "loss,metric"; "": all
repeats = 9  # times that each version of a case runs
network_repeats = 3  # the same, for the network on a CPU, where it takes seconds
threads = 1  # of PyTorch, on the CPU; the network has one for each core
n_photos = 20  # that the data section prepares
batch_size = 0  # images of a training step; 0: 32 on a GPU, 8 on a CPU
networks = ()  # those to time; (): all
write_json_to = "benchmark.json"  # "": not written


def main():
    torch.set_num_threads(threads)
    sections = {
        "data": benchmark_data,
        "loss": benchmark_loss,
        "network": benchmark_network,
        "training": benchmark_training,
        "detection": benchmark_detection,
        "metric": benchmark_metric,
    }
    chosen = [name.strip() for name in only.split(",")] if only else list(sections)
    unknown = set(chosen) - set(sections)
    if unknown:
        raise SystemExit(f"error: no section {', '.join(sorted(unknown))}; there are {', '.join(sections)}")
    report = {"hardware": describe_hardware(), "cases": []}
    print(report["hardware"])
    for name, section in sections.items():
        if name in chosen:
            report["cases"] += section()
    if write_json_to:
        Path(write_json_to).write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwritten to {write_json_to}")


# --- Measuring ------------------------------------------------------------------------------------


def compare(case, versions, note="", per_call=1, n_times=None, clock=time.process_time):
    """Time versions of one computation in turns, and print a table of them.

    case: what is computed, on what. versions: dict of name to function without arguments; the first is this
    code. note: printed below the title. per_call: how many images a call handles, to state the time of one.
    n_times: how often each version runs, `repeats` by default. clock: a function that returns seconds; with a GPU
    it is always the one on the wall.
    Returns a dict for the report: medians in milliseconds, and their ratios to the first version's.
    """
    if torch.cuda.is_available():
        clock = time.perf_counter
    times = {name: [] for name in versions}
    for turn in range((n_times or repeats) + 1):
        for name, function in versions.items():
            started = clock()
            function()
            synchronize()
            if turn > 0:  # turn 0 warms up
                times[name].append(1000 * (clock() - started) / per_call)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = medians[next(iter(versions))]
    ratios = {name: median / base for name, median in medians.items()}
    print(f"\n{case}" + (f"\n({note})" if note else ""))
    width = max(map(len, versions))
    for name, median in medians.items():
        print(f"  {name:<{width}} {median:12.2f} ms {ratios[name]:9.2f} x")
    return {"case": case, "note": note, "median_ms": medians, "ratio": ratios, "all_ms": times}


def synchronize():
    """Wait until a GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_mb(function):
    """Memory that a call needs beyond what was in use before, in MB, as Linux counts it; None elsewhere."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not os.access(clear, os.W_OK):
        return None

    def read(field):
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field)) / 1024

    function()  # what is allocated once and for all does not count
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # give freed memory back, or its use again would not show
    clear.write_text("5")  # resets the peak to what is in use
    before = read("VmRSS")
    function()
    return round(read("VmHWM") - before, 1)


def describe_hardware():
    """Processor, cores, threads in use, GPU and versions, in a line."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{processor}, {os.cpu_count()} cores, {threads} in use; {gpu}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    )


# --- Data: from JPEG to augmented image -----------------------------------------------------------


def benchmark_data():
    """decode + transform() of photos of 500 x 375 pixels, beside the usual ways and the time of decoding alone."""
    with tempfile.TemporaryDirectory() as folder:
        kind, paths = write_photos(Path(folder))
        boxes = torch.tensor([[50.0, 60.0, 200.0, 300.0], [10.0, 10.0, 30.0, 40.0], [300.0, 100.0, 480.0, 370.0]])
        objects = boxes, torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.uint8)
        usual = make_torchvision_transform()

        def ours(turn):
            for i, path in enumerate(paths):
                transform(read_image(path), *objects, "TRAIN", np.random.default_rng((0, turn, i)))

        def theirs():
            for path in paths:
                image = Image.open(path).convert("RGB")
                theirs = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(image.height, image.width))
                usual({"image": image, "boxes": theirs, "labels": objects[1]})

        turns = iter(range(10**9))  # another augmentation in every turn, as for the other versions
        versions = {
            "read_image() + transform()": lambda: ours(next(turns)),
            "torchvision v2": theirs,
            "floor: read_image() alone": lambda: [read_image(path) for path in paths],
            "floor: read_image() + resize()": lambda: [resize(read_image(path), 300, 300) for path in paths],
        }
        shares = time_parts(lambda: [ours(turn) for turn in range(5)])
        parts = ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares.items())
        note = f"{len(paths)} {kind} of 500 x 375 pixels, 3 objects each; of the first version's time: {parts}"
        return [compare("data: one training image, one core", versions, note=note, per_call=len(paths))]


def write_photos(folder):
    """JPEGs of VOC's usual size: of real photos where SSD_TEST_DATA is set, else of generated pictures."""
    source = os.environ.get("SSD_TEST_DATA")
    if source:
        kind, photos = "real photos", sorted(Path(source, "indoor", "JPEGImages").glob("*.jpg"))[:n_photos]
    else:
        make_sample(folder / "sample", n_photos, 0, seed=0)
        kind, photos = "generated pictures", sorted((folder / "sample" / "JPEGImages").glob("*.jpg"))
    paths = [folder / f"{i}.jpg" for i in range(len(photos))]
    for photo, path in zip(photos, paths, strict=True):
        Image.open(photo).convert("RGB").resize((500, 375), Image.Resampling.LANCZOS).save(path, quality=92)
    return kind, [str(path) for path in paths]


def make_torchvision_transform():
    """SSD's augmentation as torchvision's transforms offer it, with the parameters of `transform()`."""
    fill = {tv_tensors.Image: FILLER, "others": 0}
    return v2.Compose([
        v2.ToImage(),
        v2.RandomPhotometricDistort((1 - 32 / 255, 1 + 32 / 255), (0.5, 1.5), (0.5, 1.5), (-0.1, 0.1)),
        v2.RandomZoomOut(fill),
        v2.RandomIoUCrop(),
        v2.RandomHorizontalFlip(),
        v2.SanitizeBoundingBoxes(),
        v2.Resize((300, 300), antialias=True),
    ])  # fmt: skip


def time_parts(function):
    """Which share of a call of `function` is spent in which part of the preparation of images."""
    seconds, originals = {}, {name: getattr(datasets, name) for name in ("distort", "resize")}

    def timed(name, original):
        def wrapper(*args, **keywords):
            started = time.perf_counter()
            result = original(*args, **keywords)
            seconds[name] = seconds.get(name, 0) + time.perf_counter() - started
            return result

        return wrapper

    function()  # warms up
    try:
        for name, original in originals.items():
            setattr(datasets, name, timed(name, original))
        started = time.perf_counter()
        function()
        all_seconds = time.perf_counter() - started
    finally:
        for name, original in originals.items():
            setattr(datasets, name, original)
    shares = {f"{name}()": value / all_seconds for name, value in seconds.items()}
    return {**shares, "the rest": 1 - sum(shares.values())}


# --- Loss -----------------------------------------------------------------------------------------


def benchmark_loss():
    """MultiBoxLoss forward and backward beside torchvision's matching and loss, and a log-softmax alone."""
    priors_cxcy = SSD300.create_prior_boxes()
    locs, scores = trained_like_predictions(32, priors_cxcy)
    cases = []
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for n_images, fewest, most in ((32, 1, 12), (8, 20, 20), (8, 100, 100)):
            objects = make_up_objects(n_images, fewest, most)
            predictions = [part[:n_images].to(device).requires_grad_() for part in (locs, scores)]
            case = f"loss: forward and backward, {n_images} images of {fewest} to {most} objects, {device}"
            cases.append(compare_losses(case, priors_cxcy, predictions, objects))
    return cases


def compare_losses(case, priors_cxcy, predictions, objects):
    locs, scores = predictions
    criterion = MultiBoxLoss(priors_cxcy).to(locs.device)
    theirs = TorchvisionLoss(priors_cxcy.to(locs.device))

    def run(loss_of):
        locs.grad = scores.grad = None
        loss_of(locs, scores, *objects).backward()

    versions = {
        "MultiBoxLoss": lambda: run(criterion),
        "torchvision": lambda: run(theirs),
        "floor: log-softmax alone": lambda: F.log_softmax(scores.detach(), dim=2),
    }
    return compare(case, versions)


class TorchvisionLoss:
    """torchvision's matching and SSD.compute_loss(): an object may lose its best prior to another."""

    def __init__(self, priors_cxcy):
        self.anchors = cxcy_to_xy(priors_cxcy)
        self.box_coder, self.matcher = BoxCoder((10.0, 10.0, 5.0, 5.0)), SSDMatcher(0.5)
        self.neg_to_pos_ratio = 3

    def __call__(self, locs, scores, boxes, labels):
        objects = [
            {"boxes": b.to(locs.device), "labels": n.to(locs.device)} for b, n in zip(boxes, labels, strict=True)
        ]
        matched = [self.matcher(box_iou(image["boxes"], self.anchors)) for image in objects]
        outputs = {"bbox_regression": locs, "cls_logits": scores}
        return sum(SSD.compute_loss(self, objects, outputs, [self.anchors] * len(boxes), matched).values())


def make_up_objects(n_images, fewest=1, most=6, seed=0):
    """Boxes (n, 4), boundary form, fractional, and labels (n,) of `fewest` to `most` objects an image: two lists."""
    generator = torch.Generator().manual_seed(seed)
    boxes, labels = [], []
    for _ in range(n_images):
        n = int(torch.randint(fewest, most + 1, (1,), generator=generator))
        sizes = 0.05 + 0.6 * torch.rand(n, 2, generator=generator)
        corners = torch.rand(n, 2, generator=generator) * (1 - sizes)
        boxes.append(torch.cat([corners, corners + sizes], dim=1))
        labels.append(torch.randint(1, 21, (n,), generator=generator))
    return boxes, labels


# --- Network and training -------------------------------------------------------------------------


def benchmark_network():
    """Forward pass and training step of each network as train.py takes them; SSDLite beside torchvision's."""
    device = train.set_up_device()
    torch.set_num_threads(os.cpu_count())
    n_images, n_times = images_of_a_step(), None if device.type == "cuda" else network_repeats
    peak = measure_matmul_peak(device)
    cases = []
    for name in networks or NETWORKS:
        forms = {"as train.py does it": {}}
        if device.type == "cuda":  # one change at a time
            forms |= {
                "not compiled": {"is_compiled": False},
                "TF32, not compiled": {"is_compiled": False, "bf16": False},
            }
        steps = {form: Step(name, device, **changes) for form, changes in forms.items()}
        first = steps["as train.py does it"]
        for what, passes in (("forward pass", 1), ("training step", 3)):
            versions = {form: step.predict if passes == 1 else step for form, step in steps.items()}
            title = f"network: {name}, {what}, batch of {n_images}, {device.type}"
            case = compare(title, versions, n_times=n_times, clock=time.perf_counter)
            n_flops, best = (
                passes * count_flops_of_image(name) * n_images,
                peak["bfloat16" if first.bf16 else "float32"],
            )
            median = next(iter(case["median_ms"].values()))
            case |= {"images_per_second": 1000 * n_images / median, "tflops": n_flops / median / 1e9}
            case["matmul_tflops"] = best
            print(f"  {case['images_per_second']:.1f} img/s, {case['tflops']:.3g} TFLOP/s, ", end="")
            print(f"{100 * case['tflops'] / best:.0f}% of the {best:.3g} of a large matrix product")
            cases.append(case)
        case["shares"], case["peak_memory_gb"] = first.measure_shares()
        print("  of the step: " + ", ".join(f"{part} {100 * share:.0f}%" for part, share in case["shares"].items()))
        if case["peak_memory_gb"]:
            print(f"  GPU memory in use at most: {case['peak_memory_gb']:.2f} GiB")
        del steps, first, versions
    if not networks or "ssdlite320_mobilenet_v3_large" in networks:
        cases.append(compare_ssdlite(device, n_images, n_times))
    torch.set_num_threads(threads)
    return cases


class Step:
    """A training step as train.py takes it, on made-up images; `predict()` is the forward pass of detection."""

    def __init__(self, name, device, is_compiled=True, bf16=True):
        self.device, self.bf16 = device, bf16 and utils.has_bf16_units(device)
        self.model = SSD300(21, name)
        self.memory_format = utils.fastest_memory_format(device, self.model)
        self.model.to(device, memory_format=self.memory_format)
        self.network = torch.compile(self.model) if is_compiled and device.type == "cuda" else self.model
        self.criterion = MultiBoxLoss(self.model.priors_cxcy).to(device)
        self.optimizer = train.make_optimizer(self.model, device)
        self.objects = make_up_objects(images_of_a_step())
        size = self.model.input_size
        pixels = torch.randint(256, (images_of_a_step(), 3, size, size), dtype=torch.uint8)
        self.pixels = pixels.pin_memory() if device.type == "cuda" else pixels

    def normalize(self):
        return self.model.normalize(self.pixels).contiguous(memory_format=self.memory_format)

    def forward(self, images):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network(images)

    @torch.inference_mode()
    def predict(self):
        self.model.eval()
        predictions = self.forward(self.normalize())
        self.model.train()
        return predictions

    def __call__(self, mark=lambda part: None):
        self.optimizer.zero_grad()
        mark("start")
        images = self.normalize()
        mark("normalise")
        predictions = self.forward(images)
        mark("forward")
        loss = self.criterion(*predictions, *self.objects)
        mark("loss")
        loss.backward()
        mark("backward")
        self.optimizer.step()
        mark("optimiser")

    def measure_shares(self):
        """The share of each part in a step, which is waited for after each; and GPU memory in GiB at most, or None."""
        marks = []

        def mark(part):
            synchronize()
            marks.append((part, time.perf_counter()))

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self(mark)
        seconds = {part: now - before for (_, before), (part, now) in pairwise(marks)}
        memory = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None
        return {part: value / sum(seconds.values()) for part, value in seconds.items()}, memory


@torch.inference_mode()
def compare_ssdlite(device, n_images, n_times):
    """Our SSDLite and torchvision's on the same (random) weights and images of 320 x 320: raw outputs."""
    theirs = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21).eval()
    ours = convert_state(theirs.state_dict(), "torchvision", class_names=utils.voc_labels).eval()
    memory_format = utils.fastest_memory_format(device, ours)
    ours, theirs = ours.to(device, memory_format=memory_format), theirs.to(device, memory_format=memory_format)
    images = torch.rand(n_images, 3, 320, 320, device=device).contiguous(memory_format=memory_format)

    def run_theirs():
        outputs = theirs.head(list(theirs.backbone(images).values()))
        return outputs["bbox_regression"], outputs["cls_logits"]

    for our, their in zip(ours(images), run_theirs(), strict=True):
        difference = float((our - their).abs().max())
        assert difference <= 1e-3 * float(their.abs().max()) + 1e-6, difference
    versions = {"SSD300(network='ssdlite320...')": lambda: ours(images), "torchvision's": run_theirs}
    title = f"network: SSDLite and torchvision's, batch of {n_images}, {device.type}"
    case = compare(title, versions, n_times=n_times, clock=time.perf_counter)
    case["images_per_second"] = {name: 1000 * n_images / median for name, median in case["median_ms"].items()}
    print("  " + ", ".join(f"{name} {rate:.1f} img/s" for name, rate in case["images_per_second"].items()))
    return case


def images_of_a_step():
    return batch_size or (32 if torch.cuda.is_available() else 8)


def count_flops_of_image(name):
    """Floating-point operations of the forward pass of one image; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        size = NETWORKS[name].input_size
        SSD300(21, name).eval()(torch.empty(1, 3, size, size))
    return counter.get_total_flops()


def measure_matmul_peak(device):
    """TFLOP/s of a large matrix product in each number format: more, no convolution can be expected to reach."""
    n, n_times = (8192, 20) if device.type == "cuda" else (2048, 3)
    peak = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(n, n, device=device, dtype=dtype)
        seconds = []
        for _ in range(n_times + 1):
            synchronize()
            started = time.perf_counter()
            matrix @ matrix
            synchronize()
            seconds.append(time.perf_counter() - started)
        peak[str(dtype).removeprefix("torch.")] = 2 * n**3 / min(seconds[1:]) / 1e12
    return peak


def benchmark_training():
    """Images a second of train.py as a user runs it, on generated pictures, with all that it does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n_images, n_iterations = images_of_a_step(), 400 if device.type == "cuda" else 6
    n_workers = max(1, min(16, os.cpu_count() - 1))
    with tempfile.TemporaryDirectory() as folder:
        make_sample(Path(folder, "sample"), 40 if device.type == "cpu" else 1000, 10, seed=0)
        create_data_lists.create_data_lists(output_folder=folder, train_data=str(Path(folder, "sample")))
        parameters = {
            "data_folder": folder, "save_to": f"{folder}/checkpoint", "pretrained": "",
            "iterations": n_iterations, "batch_size": n_images, "workers": n_workers, "grad_clip": 10,
            "log_every": max(1, n_iterations // 6), "save_every": 0,
        }  # fmt: skip
        command = [sys.executable, train.__file__, *(f"--{name}={value}" for name, value in parameters.items())]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        rows = Path(folder, "checkpoint.csv").read_text().splitlines()
    column = rows[0].split(",").index("images_per_second")
    rates = [float(row.split(",")[column]) for row in rows[3:]]  # the first two rows are the start
    rate = statistics.median(rates)
    hours = 120_000 * 32 / rate / 3600
    case = f"training: train.py, batch of {n_images}, {n_workers} workers, {device.type}"
    print(f"\n{case}\n  {rate:.2f} img/s; the paper's 120,000 iterations of 32 images would take {hours:,.1f} hours")
    return [{"case": case, "images_per_second": rate, "all_images_per_second": rates}]


# --- Detection ------------------------------------------------------------------------------------

MIN_SCORE, MAX_OVERLAP, TOP_K = 0.01, 0.45, 200


class TorchvisionDetection:
    """torchvision's SSD.postprocess_detections() as shipped: 400 candidates a class, 200 detections an image.

    Its cap can be lifted; then it computes what `detect_objects()` does but for the clipping of boxes.
    """

    def __init__(self, priors_cxcy, capped):
        self.anchors = cxcy_to_xy(priors_cxcy) * 300
        self.box_coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        self.score_thresh, self.nms_thresh, self.detections_per_img = MIN_SCORE, MAX_OVERLAP, TOP_K
        self.topk_candidates = 400 if capped else 10**9

    @torch.no_grad()
    def __call__(self, locs, scores):
        n_images = len(locs)
        outputs = {"bbox_regression": locs, "cls_logits": scores}
        return SSD.postprocess_detections(self, outputs, [self.anchors] * n_images, [(300, 300)] * n_images)


def trained_like_predictions(n_images, priors_cxcy, n_classes=21, seed=0):
    """Offsets and scores like a trained model's for photos: 4.5% of the pairs of prior and class above 0.01.

    Each prior points, not quite exactly, at the nearest of some objects and look-alikes. It takes over their
    likes and dislikes of classes; two classes are likely everywhere in an image.
    """
    generator = torch.Generator().manual_seed(seed)
    priors_xy = cxcy_to_xy(priors_cxcy)
    locs = 0.5 * torch.randn(n_images, len(priors_cxcy), 4, generator=generator)
    scores = 0.6 * torch.randn(n_images, len(priors_cxcy), n_classes, generator=generator)
    for i in range(n_images):
        n_objects = int(torch.randint(4, 10, (1,), generator=generator))
        centers = 0.1 + 0.8 * torch.rand(n_objects, 2, generator=generator)
        sizes = 0.07 + 0.6 * torch.rand(n_objects, 2, generator=generator).square()
        objects_cxcy = torch.cat([centers, sizes], dim=1)
        overlap, nearest = find_jaccard_overlap(priors_xy, cxcy_to_xy(objects_cxcy)).max(dim=1)  # (P,)
        locs[i] += cxcy_to_gcxgcy(objects_cxcy[nearest], priors_cxcy).clamp(-4, 4)
        likes = 1.7 * torch.randn(n_objects, n_classes, generator=generator)
        classes = torch.randint(1, n_classes, (n_objects,), generator=generator)
        likes[torch.arange(n_objects), classes] += 6 * (0.2 + 0.8 * torch.rand(n_objects, generator=generator))
        scores[i] += likes[nearest] * ((overlap / 0.5).clamp(max=1) + 0.4 * (overlap > 0.5))[:, None]
        scores[i, :, 1 + torch.randperm(n_classes - 1, generator=generator)[:2]] += 2
    low, high = -5.0, 20.0  # of the background's score: bisected until the share is right
    for _ in range(20):
        shifted = scores.clone()
        shifted[:, :, 0] += (low + high) / 2
        share = (shifted.softmax(dim=2)[:, :, 1:] > MIN_SCORE).float().mean()
        low, high = ((low + high) / 2, high) if share > 0.045 else (low, (low + high) / 2)
    return locs, shifted


def benchmark_detection():
    """detect_objects() on a batch like a trained model's, and on the worst image; on a GPU against the network."""
    priors_cxcy = SSD300.create_prior_boxes()
    generator = torch.Generator().manual_seed(0)
    n_priors = len(priors_cxcy)
    inputs = {
        "batch of 8 like a trained model's": trained_like_predictions(8, priors_cxcy),
        f"one image, all {n_priors} x 20 candidates above {MIN_SCORE}": (
            torch.randn(1, n_priors, 4, generator=generator),
            torch.rand(1, n_priors, 21, generator=generator),
        ),
    }
    capped, uncapped = (TorchvisionDetection(priors_cxcy, is_capped) for is_capped in (True, False))
    cases = []
    for name, (locs, scores) in inputs.items():
        versions = {
            "detect_objects()": lambda: detect_objects(locs, scores, priors_cxcy, MIN_SCORE, MAX_OVERLAP, TOP_K),  # noqa: B023
            "torchvision as shipped": lambda: capped(locs, scores),  # noqa: B023
            "torchvision uncapped": lambda: uncapped(locs, scores),  # noqa: B023
            "floor: softmax alone": lambda: F.softmax(scores, dim=2),  # noqa: B023
        }
        share = float((scores.softmax(dim=2)[:, :, 1:] > MIN_SCORE).float().mean())
        note = f"{100 * share:.1f}% of the pairs above {MIN_SCORE}; {describe_loss(capped, uncapped, locs, scores)}; "
        note += f"peak memory of detect_objects() {peak_memory_mb(versions['detect_objects()'])} MB"
        cases.append(compare(f"detection: {name}", versions, note=note))
    if torch.cuda.is_available():
        cases.append(benchmark_detection_on_gpu(priors_cxcy))
    return cases


def describe_loss(capped, uncapped, locs, scores):
    """How much of what it should return torchvision's cap of 400 candidates a class costs."""
    n_lost = n_all = 0
    for ours, theirs in zip(uncapped(locs, scores), capped(locs, scores), strict=True):
        kept = set(map(tuple, theirs["boxes"].tolist()))
        n_lost += sum(tuple(box) not in kept for box in ours["boxes"].tolist())
        n_all += len(ours["boxes"])
    return f"torchvision as shipped drops {100 * n_lost / n_all:.0f}% of the detections"


def benchmark_detection_on_gpu(priors_cxcy):
    """Detection in a batch of 32 beside the network's forward pass in bfloat16."""
    model = SSD300(n_classes=21).cuda().to(memory_format=torch.channels_last).eval()
    images = torch.randn(32, 3, 300, 300, device="cuda").contiguous(memory_format=torch.channels_last)
    locs, scores = (part.cuda() for part in trained_like_predictions(32, priors_cxcy))

    @torch.inference_mode()
    def forward():
        with torch.autocast("cuda", torch.bfloat16):
            return model(images)

    versions = {
        "detect_objects()": lambda: model.detect_objects(locs, scores, MIN_SCORE, MAX_OVERLAP, TOP_K),
        "forward pass of the network": forward,
    }
    return compare("detection on the GPU: batch of 32", versions)


# --- Metric ---------------------------------------------------------------------------------------

N_IMAGES = 4952  # VOC2007's test images


def benchmark_metric():
    """calculate_mAP() on real detections where SSD_TEST_DATA is set, else on as many made-up ones; its growth."""
    folder = os.environ.get("SSD_TEST_DATA")
    if folder:
        name, (detections, objects) = "101,139 real detections on VOC2007 test", read_real_case(Path(folder))
    else:
        name, (detections, objects) = "as many made-up detections", make_up_case(101_139)
        print("\nSSD_TEST_DATA is not set: no real detections to score")
    label_map = make_label_map(utils.voc_labels)
    versions = {"calculate_mAP()": lambda: calculate_mAP(*detections, *objects, label_map=label_map)}
    cases = [compare(f"metric: {name}", versions)]
    growth = {}
    for n in (100_000, 200_000, 500_000, 1_000_000):
        case = make_up_case(n)
        growth[f"{n:,} detections"] = lambda case=case: calculate_mAP(*case[0], *case[1], label_map=label_map)
    cases.append(compare("metric: growth, made-up detections", growth))
    return cases


def read_real_case(folder):
    """The real detections and the objects of VOC2007 test: three lists each, as calculate_mAP() takes them."""
    with tempfile.TemporaryDirectory() as unpacked:
        for archive in ("voc_annotations.tar.xz", "voc07_test_detections.tar.xz"):
            with tarfile.open(folder / archive, "r|xz") as files:
                for entry in files:
                    if "VOC2012" not in entry.name:
                        files.extract(entry, unpacked, filter="data")
        voc07 = Path(unpacked) / "VOCdevkit" / "VOC2007"
        names = (voc07 / "ImageSets" / "Main" / "test.txt").read_text().split()
        label_map = make_label_map(utils.voc_labels)
        annotations = [parse_annotation(voc07 / "Annotations" / f"{name}.xml") for name in names]
        detections = read_voc_detections(Path(unpacked) / "det", names, label_map)
    objects = (
        [torch.tensor(annotation["boxes"], dtype=torch.float64) for annotation in annotations],
        [torch.tensor([label_map[name] for name in annotation["names"]]) for annotation in annotations],
        [torch.tensor(annotation["difficulties"]) for annotation in annotations],
    )
    return detections, objects


def make_up_case(n_detections, n_objects=14_976, seed=0):
    """Detections near objects and elsewhere, over 4,952 images: three lists each, as calculate_mAP() takes them."""
    generator = torch.Generator().manual_seed(seed)

    def spread(n):
        """How many of n fall to each image."""
        images = torch.randint(N_IMAGES, (n,), generator=generator)
        return torch.bincount(images, minlength=N_IMAGES).tolist()

    def boxes(n):
        corners = 300 * torch.rand(n, 2, generator=generator)
        return torch.cat([corners, corners + 20 + 180 * torch.rand(n, 2, generator=generator)], dim=1)

    n_here = spread(n_objects)
    objects = boxes(n_objects).split(n_here), torch.randint(1, 21, (n_objects,), generator=generator).split(n_here)
    difficulties = (torch.rand(n_objects, generator=generator) < 0.2).split(n_here)
    n_here = spread(n_detections)
    det_boxes = list(boxes(n_detections).split(n_here))
    det_labels = list(torch.randint(1, 21, (n_detections,), generator=generator).split(n_here))
    det_scores = list(torch.rand(n_detections, generator=generator).split(n_here))
    for i in range(N_IMAGES):  # half of an image's detections are of its objects
        n = len(det_labels[i]) // 2
        if n and len(objects[1][i]):
            chosen = torch.randint(len(objects[1][i]), (n,), generator=generator)
            det_boxes[i] = det_boxes[i].clone()
            det_boxes[i][:n] = objects[0][i][chosen] + 8 * torch.randn(n, 4, generator=generator)
            det_labels[i] = torch.cat([objects[1][i][chosen], det_labels[i][n:]])
    return (det_boxes, det_labels, det_scores), (list(objects[0]), list(objects[1]), list(difficulties))


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    main()
