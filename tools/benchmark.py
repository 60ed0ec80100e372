"""Time the repo's parts beside torchvision's, and beside the floor, on the same inputs, in one run.

    python tools/benchmark.py                                    prints a table, writes benchmark.json
    python tools/benchmark.py --only=loss,metric --repeats=15
    SSD_TEST_DATA=../shared/data python tools/benchmark.py       on real detections and photos

Sections: data (JPEG to augmented image), loss, network (forward pass and training step of each network, SSDLite
beside torchvision's own), training (train.py as a whole), detection, metric. Small operations are timed on one thread,
as CPU time; networks with all cores, and all that a GPU does, as time on the clock. The versions of a case take turns,
so that whatever else the machine does falls on all of them alike. The table gives medians, and how many times as long
as this code each version takes: look at these ratios, not at the milliseconds, which are the machine's.
Any parameter below can be overridden with --name=value.
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from convert_weights import convert_state
from make_sample import make_sample
from PIL import Image
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou
from torchvision.transforms import v2

import train
import utils
from annotations import parse_annotation
from create_data_lists import create_data_lists
from datasets import FILLER, read_image, resize, transform
from eval import calculate_mAP, read_voc_detections
from model import NETWORKS, SSD300, MultiBoxLoss, detect_objects
from utils import cxcy_to_gcxgcy, cxcy_to_xy, find_jaccard_overlap, make_label_map

only = ()  # sections to run, such as loss,metric; (): all
repeats = 9  # times that each version of a case runs
network_repeats = 3  # the same, for the network on a CPU, where it takes seconds
batch_size = 0  # images of a training step; 0: 32 on a GPU, 8 on a CPU
networks = ()  # those to time; (): all
compile_model = True  # on a GPU; False: where there is no C compiler
write_json_to = "benchmark.json"  # "": not written

N_PHOTOS = 20  # that the data section prepares


def main():
    sections = {
        "data": benchmark_data,
        "loss": benchmark_loss,
        "network": benchmark_networks,
        "training": benchmark_training,
        "detection": benchmark_detection,
        "metric": benchmark_metric,
    }
    unknown = sorted(set(only) - set(sections))
    if unknown:
        raise ValueError(f"there is no section {', '.join(unknown)}; there are {', '.join(sections)}")
    torch.set_num_threads(1)
    report = {"hardware": describe_hardware(), "cases": []}
    print(report["hardware"])
    for name in only or sections:
        report["cases"] += sections[name]()
    if write_json_to:
        Path(write_json_to).write_text(json.dumps(report, indent=1) + "\n")
        print(f"\nwritten to {write_json_to}")


# --- Measuring ------------------------------------------------------------------------------------


def compare(case, versions, note="", n_images=1, n_times=None, clock=time.process_time):
    """Time versions of one computation in turns, and print a table of them.

    case: what is computed, on what. versions: dict of name to function without arguments; the first is this
    code. note: printed below the title. n_images: how many a call handles, to state the time of one.
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
                times[name].append(1000 * (clock() - started) / n_images)
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    ratios = {name: median / first for name, median in medians.items()}
    print(f"\n{case}" + (f"\n({note})" if note else ""))
    width = max(map(len, versions))
    for name, median in medians.items():
        print(f"  {name:<{width}} {median:12.2f} ms {ratios[name]:9.2f} x")
    return {"case": case, "note": note, "median_ms": medians, "ratio": ratios, "all_ms": times}


def synchronize():
    """Wait until a GPU, if there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def describe_hardware():
    """Processor, cores, GPU and versions, in a line."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux
    found = re.search("model name.*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = found[1] if found else platform.processor()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{processor}, {os.cpu_count()} cores; {gpu}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    )


# --- Data: from JPEG to augmented image -----------------------------------------------------------


def benchmark_data():
    """decode + transform() of photos of 500 x 375 pixels, beside the usual ways and the time of decoding alone."""
    boxes = torch.tensor([[50.0, 60.0, 200.0, 300.0], [10.0, 10.0, 30.0, 40.0], [300.0, 100.0, 480.0, 370.0]])
    labels = torch.tensor([1, 2, 3])
    difficulties = torch.zeros(3, dtype=torch.uint8)
    torchvision_transform = make_torchvision_transform()
    rng = np.random.default_rng(0)

    def ours(path, steps=("distort", "zoom_out", "crop", "flip")):
        transform(read_image(path), boxes, labels, difficulties, "TRAIN", rng, augment=steps)

    def theirs(path):
        image = Image.open(path).convert("RGB")
        their_boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(image.height, image.width))
        torchvision_transform({"image": image, "boxes": their_boxes, "labels": labels})

    with tempfile.TemporaryDirectory() as folder:
        kind, paths = write_photos(Path(folder))
        versions = {
            "read_image() + transform()": lambda: [ours(path) for path in paths],
            "the same without colours": lambda: [ours(path, ("zoom_out", "crop", "flip")) for path in paths],
            "torchvision v2": lambda: [theirs(path) for path in paths],
            "floor: read_image() alone": lambda: [read_image(path) for path in paths],
            "floor: read_image() + resize()": lambda: [resize(read_image(path), 300, 300) for path in paths],
        }
        note = f"{len(paths)} {kind} of 500 x 375 pixels, 3 objects each"
        return [compare("data: one training image, one core", versions, note, n_images=len(paths))]


def write_photos(folder):
    """JPEGs of VOC's usual size: of real photos where SSD_TEST_DATA is set, else of generated pictures."""
    source = os.environ.get("SSD_TEST_DATA")
    if source:
        kind = "real photos"
        photos = sorted(Path(source, "indoor", "JPEGImages").glob("*.jpg"))[:N_PHOTOS]
    else:
        kind = "generated pictures"
        make_sample(folder / "sample", N_PHOTOS, 0, seed=0)
        photos = sorted((folder / "sample" / "JPEGImages").glob("*.jpg"))
    paths = [str(folder / f"{i}.jpg") for i in range(len(photos))]
    for photo, path in zip(photos, paths, strict=True):
        Image.open(photo).convert("RGB").resize((500, 375), Image.Resampling.LANCZOS).save(path, quality=92)
    return kind, paths


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


# --- torchvision's SSD, on our priors -------------------------------------------------------------

MIN_SCORE, MAX_OVERLAP, TOP_K = 0.01, 0.45, 200


class TorchvisionSSD:
    """Its matching and loss (an object may lose its best prior to another), and its post-processing.

    As shipped, at most 400 candidates of a class enter suppression. With the cap lifted it computes what
    `detect_objects()` does but for the clipping of boxes.
    """

    def __init__(self, priors_cxcy, topk_candidates=400):
        self.anchors = cxcy_to_xy(priors_cxcy)
        self.box_coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        self.matcher = SSDMatcher(0.5)
        self.neg_to_pos_ratio = 3
        self.score_thresh = MIN_SCORE
        self.nms_thresh = MAX_OVERLAP
        self.detections_per_img = TOP_K
        self.topk_candidates = topk_candidates

    def compute_loss(self, locs, scores, boxes, labels):
        targets = []
        matched = []
        for image_boxes, image_labels in zip(boxes, labels, strict=True):
            target = {"boxes": image_boxes.to(locs.device), "labels": image_labels.to(locs.device)}
            targets.append(target)
            matched.append(self.matcher(box_iou(target["boxes"], self.anchors)))
        outputs = {"bbox_regression": locs, "cls_logits": scores}
        return sum(SSD.compute_loss(self, targets, outputs, [self.anchors] * len(locs), matched).values())

    @torch.no_grad()
    def detect(self, locs, scores):
        outputs = {"bbox_regression": locs, "cls_logits": scores}
        sizes = [(1, 1)] * len(locs)  # of the images: boxes are fractional
        return SSD.postprocess_detections(self, outputs, [self.anchors] * len(locs), sizes)


# --- Loss -----------------------------------------------------------------------------------------


def benchmark_loss():
    """MultiBoxLoss forward and backward beside torchvision's matching and loss, and a log-softmax alone."""
    priors_cxcy = SSD300.create_prior_boxes()
    locs, scores = trained_like_predictions(32, priors_cxcy)
    cases = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for n_images, fewest, most in ((32, 1, 12), (8, 20, 20), (8, 100, 100)):
            case = f"loss: forward and backward, {n_images} images of {fewest} to {most} objects, {device}"
            objects = make_up_objects(n_images, fewest, most)
            some_locs = locs[:n_images].to(device).requires_grad_()
            some_scores = scores[:n_images].to(device).requires_grad_()
            cases.append(compare_losses(case, priors_cxcy.to(device), some_locs, some_scores, objects))
    return cases


def compare_losses(case, priors_cxcy, locs, scores, objects):
    ours = MultiBoxLoss(priors_cxcy)
    theirs = TorchvisionSSD(priors_cxcy).compute_loss

    def run(criterion):
        locs.grad = None
        scores.grad = None
        criterion(locs, scores, *objects).backward()

    versions = {
        "MultiBoxLoss": lambda: run(ours),
        "torchvision": lambda: run(theirs),
        "floor: log-softmax alone": lambda: F.log_softmax(scores.detach(), dim=2),
    }
    return compare(case, versions)


def make_up_objects(n_images, fewest=1, most=6, seed=0):
    """Boxes (n, 4), boundary form, fractional, and labels (n,) of `fewest` to `most` objects an image: two lists."""
    generator = torch.Generator().manual_seed(seed)
    boxes = []
    labels = []
    for _ in range(n_images):
        n = int(torch.randint(fewest, most + 1, (1,), generator=generator))
        sizes = 0.05 + 0.6 * torch.rand(n, 2, generator=generator)
        corners = torch.rand(n, 2, generator=generator) * (1 - sizes)
        boxes.append(torch.cat([corners, corners + sizes], dim=1))
        labels.append(torch.randint(1, 21, (n,), generator=generator))
    return boxes, labels


# --- Network and training -------------------------------------------------------------------------


def benchmark_networks():
    """Forward pass and training step of each network as train.py takes them; SSDLite beside torchvision's."""
    device = train.set_up_device()
    torch.set_num_threads(os.cpu_count())
    peak = measure_matmul_peak(device)
    cases = []
    for name in networks or NETWORKS:
        cases += benchmark_network(name, device, peak)
    if not networks or "ssdlite320_mobilenet_v3_large" in networks:
        cases.append(compare_ssdlite(device))
    torch.set_num_threads(1)
    return cases


def benchmark_network(name, device, peak):
    """Time one network. peak: TFLOP/s of `measure_matmul_peak()`."""
    steps = {"as train.py does it": Step(name, device, compile_model)}
    if device.type == "cuda":  # one change at a time
        steps["not compiled"] = Step(name, device, is_compiled=False)
        steps["TF32, not compiled"] = Step(name, device, is_compiled=False, bf16=False)
    first = steps["as train.py does it"]
    forward = compare_steps(f"{name}, forward pass", {form: step.predict for form, step in steps.items()}, device)
    training = compare_steps(f"{name}, training step", steps, device)
    highest = peak["bfloat16" if first.bf16 else "float32"]
    for case, n_passes in ((forward, 1), (training, 3)):  # the way back costs two forward passes
        case["tflops"] = n_passes * count_flops_of_image(name) * case["images_per_second"] / 1e12
        case["matmul_tflops"] = highest
        share = case["tflops"] / highest
        print(f"  {case['case']}: {case['tflops']:.3g} TFLOP/s, {share:.0%} of the {highest:.3g} of a matrix product")
    training["shares"], training["peak_memory_gb"] = first.measure_shares()
    print("  of the step: " + ", ".join(f"{part} {share:.0%}" for part, share in training["shares"].items()))
    if training["peak_memory_gb"]:
        print(f"  GPU memory in use at most: {training['peak_memory_gb']:.2f} GiB")
    return [forward, training]


def compare_steps(what, versions, device):
    """Time versions of what is done with a batch; adds images a second to what `compare()` returns."""
    n_images = images_of_a_step()
    n_times = repeats if device.type == "cuda" else network_repeats
    title = f"network: {what}, batch of {n_images}, {device.type}"
    case = compare(title, versions, n_times=n_times, clock=time.perf_counter)
    case["images_per_second"] = 1000 * n_images / next(iter(case["median_ms"].values()))
    print(f"  {case['images_per_second']:.1f} images a second")
    return case


class Step:
    """A training step as train.py takes it, on made-up images; `predict()` is the forward pass of detection."""

    def __init__(self, name, device, is_compiled=True, bf16=True):
        self.device = device
        self.bf16 = bf16 and utils.has_bf16_units(device)
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
        self.forward(self.normalize())
        self.model.train()

    def __call__(self, end_part=lambda name: None):
        """Take a step. end_part: called with the name of each part when it is done."""
        images = self.normalize()
        end_part("normalise")
        predicted_locs, predicted_scores = self.forward(images)
        end_part("forward")
        loss = self.criterion(predicted_locs, predicted_scores, *self.objects)
        end_part("loss")
        self.optimizer.zero_grad()
        loss.backward()
        end_part("backward")
        self.optimizer.step()
        end_part("optimiser")

    def measure_shares(self):
        """The share of each part in a step, which is waited for after each; and GPU memory in GiB at most, or None."""
        has_gpu = self.device.type == "cuda"
        if has_gpu:
            torch.cuda.reset_peak_memory_stats()
        names = []
        times = [time.perf_counter()]

        def end_part(name):
            synchronize()
            names.append(name)
            times.append(time.perf_counter())

        self(end_part)
        shares = np.diff(times) / (times[-1] - times[0])
        memory = torch.cuda.max_memory_allocated() / 2**30 if has_gpu else None
        return dict(zip(names, shares.tolist(), strict=True)), memory


@torch.inference_mode()
def compare_ssdlite(device):
    """Our SSDLite and torchvision's on the same (random) weights and images of 320 x 320: raw outputs."""
    theirs = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21).eval()
    ours, _ = convert_state(theirs.state_dict(), utils.voc_labels)
    memory_format = utils.fastest_memory_format(device, ours)
    ours = ours.eval().to(device, memory_format=memory_format)
    theirs = theirs.to(device, memory_format=memory_format)
    images = torch.rand(images_of_a_step(), 3, 320, 320, device=device).contiguous(memory_format=memory_format)

    def run_theirs():
        outputs = theirs.head(list(theirs.backbone(images).values()))
        return outputs["bbox_regression"], outputs["cls_logits"]

    for our, their in zip(ours(images), run_theirs(), strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-3 * float(their.abs().max()) + 1e-6)
    versions = {"SSD300(network='ssdlite320...')": lambda: ours(images), "torchvision's": run_theirs}
    return compare_steps("SSDLite and torchvision's", versions, device)


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
    n = 8192 if device.type == "cuda" else 2048
    peak = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        matrix = torch.randn(n, n, device=device, dtype=dtype)
        timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
        peak[name] = 2 * n**3 / min(timer.blocked_autorange().times) / 1e12
    return peak


def benchmark_training():
    """Images a second of train.py as a user runs it, on generated pictures, with all that it does."""
    has_gpu = torch.cuda.is_available()
    n_iterations = 400 if has_gpu else 6
    n_workers = max(1, min(16, os.cpu_count() - 1))
    with tempfile.TemporaryDirectory() as folder:
        make_sample(Path(folder, "sample"), 1000 if has_gpu else 40, 10, seed=0)
        create_data_lists(output_folder=folder, train_data=str(Path(folder, "sample")))
        parameters = {
            "data_folder": folder, "save_to": f"{folder}/checkpoint", "pretrained": "", "iterations": n_iterations,
            "batch_size": images_of_a_step(), "workers": n_workers, "grad_clip": 10,
            "log_every": max(1, n_iterations // 6), "save_every": 0, "compile_model": compile_model,
        }  # fmt: skip
        command = [sys.executable, train.__file__, *(f"--{name}={value}" for name, value in parameters.items())]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        rows = Path(folder, "checkpoint.csv").read_text().splitlines()
    column = rows[0].split(",").index("images_per_second")
    rates = [float(row.split(",")[column]) for row in rows[3:]]  # the first two rows are the start
    rate = statistics.median(rates)
    hours = 120_000 * 32 / rate / 3600
    case = f"training: train.py, batch of {images_of_a_step()}, {n_workers} workers, {'cuda' if has_gpu else 'cpu'}"
    print(f"\n{case}\n  {rate:.2f} img/s; the paper's 120,000 iterations of 32 images would take {hours:,.1f} hours")
    return [{"case": case, "images_per_second": rate, "all_images_per_second": rates}]


# --- Detection ------------------------------------------------------------------------------------


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
    # The background's score is raised until the share is right.
    background = scores[:, :, 0].clone()
    low, high = -5.0, 20.0
    for _ in range(20):
        middle = (low + high) / 2
        scores[:, :, 0] = background + middle
        if find_share(scores) > 0.045:
            low = middle
        else:
            high = middle
    return locs, scores


def find_share(scores):
    """Which share of the pairs of prior and class has a score above MIN_SCORE."""
    return float((scores.softmax(dim=2)[:, :, 1:] > MIN_SCORE).float().mean())


def benchmark_detection():
    """detect_objects() on a batch like a trained model's, and on the worst image; on a GPU against the network."""
    priors_cxcy = SSD300.create_prior_boxes()
    locs, scores = trained_like_predictions(8, priors_cxcy)
    cases = [compare_detections("batch of 8 like a trained model's", priors_cxcy, locs, scores)]
    generator = torch.Generator().manual_seed(0)
    locs = torch.randn(1, len(priors_cxcy), 4, generator=generator)
    scores = torch.rand(1, len(priors_cxcy), 21, generator=generator)
    cases.append(compare_detections(f"one image, all 8732 x 20 above {MIN_SCORE}", priors_cxcy, locs, scores))
    if torch.cuda.is_available():
        cases.append(compare_with_network(priors_cxcy))
    return cases


def compare_detections(name, priors_cxcy, locs, scores):
    """Time detection, and say how much of what it should return torchvision's cap costs."""
    capped = TorchvisionSSD(priors_cxcy).detect
    uncapped = TorchvisionSSD(priors_cxcy, topk_candidates=10**9).detect
    n_lost = 0
    n_all = 0
    for all_found, found in zip(uncapped(locs, scores), capped(locs, scores), strict=True):
        found_boxes = set(map(tuple, found["boxes"].tolist()))
        n_lost += sum(tuple(box) not in found_boxes for box in all_found["boxes"].tolist())
        n_all += len(all_found["boxes"])
    note = f"{find_share(scores):.1%} of the pairs above {MIN_SCORE}; "
    note += f"torchvision as shipped drops {n_lost / n_all:.0%} of the detections"
    versions = {
        "detect_objects()": lambda: detect_objects(locs, scores, priors_cxcy, MIN_SCORE, MAX_OVERLAP, TOP_K),
        "torchvision as shipped": lambda: capped(locs, scores),
        "torchvision uncapped": lambda: uncapped(locs, scores),
        "floor: softmax alone": lambda: F.softmax(scores, dim=2),
    }
    return compare(f"detection: {name}", versions, note)


def compare_with_network(priors_cxcy):
    """Detection in a batch beside the network's forward pass, on the GPU."""
    gpu = torch.device("cuda")
    locs, scores = trained_like_predictions(images_of_a_step(), priors_cxcy)
    inputs = locs.to(gpu), scores.to(gpu), priors_cxcy.to(gpu)
    versions = {
        "detect_objects()": lambda: detect_objects(*inputs, MIN_SCORE, MAX_OVERLAP, TOP_K),
        "forward pass of the network": Step("ssd300_vgg16", gpu, is_compiled=False).predict,
    }
    return compare(f"detection on the GPU: batch of {images_of_a_step()}", versions)


# --- Metric ---------------------------------------------------------------------------------------

N_IMAGES = 4952  # VOC2007's test images


def benchmark_metric():
    """calculate_mAP() on real detections where SSD_TEST_DATA is set, else on as many made-up ones; its growth."""
    folder = os.environ.get("SSD_TEST_DATA")
    if folder:
        name = "101,139 real detections on VOC2007 test"
        case = read_real_case(Path(folder))
    else:
        name = "101,139 made-up detections (SSD_TEST_DATA, which has real ones, is not set)"
        case = make_up_case(101_139)
    cases = [compare(f"metric: {name}", {"calculate_mAP()": lambda: calculate_mAP(*case)})]
    growth = {}
    for n in (100_000, 200_000, 500_000, 1_000_000):
        growth[f"{n:,} detections"] = partial(calculate_mAP, *make_up_case(n))
    cases.append(compare("metric: growth, made-up detections", growth))
    return cases


def read_real_case(folder):
    """The real detections and the objects of VOC2007 test: six lists, as calculate_mAP() takes them."""
    label_map = make_label_map(utils.voc_labels)
    with tempfile.TemporaryDirectory() as unpacked:
        for archive in ("voc_annotations.tar.xz", "voc07_test_detections.tar.xz"):
            with tarfile.open(folder / archive, "r|xz") as files:
                for entry in files:
                    if "VOC2012" not in entry.name:
                        files.extract(entry, unpacked, filter="data")
        voc07 = Path(unpacked, "VOCdevkit", "VOC2007")
        names = (voc07 / "ImageSets" / "Main" / "test.txt").read_text().split()
        annotations = [parse_annotation(voc07 / "Annotations" / f"{name}.xml") for name in names]
        detections = read_voc_detections(Path(unpacked, "det"), names, label_map)
    boxes = [torch.tensor(annotation["boxes"], dtype=torch.float64) for annotation in annotations]
    labels = [torch.tensor([label_map[name] for name in annotation["names"]]) for annotation in annotations]
    difficulties = [torch.tensor(annotation["difficulties"]) for annotation in annotations]
    return *detections, boxes, labels, difficulties


def make_up_case(n_detections, n_objects=14_976, seed=0):
    """Detections, half of them near objects, over 4,952 images: six lists, as calculate_mAP() takes them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        """Images, boxes and labels of n boxes."""
        images = torch.randint(N_IMAGES, (n,), generator=generator)
        corners = 300 * torch.rand(n, 2, generator=generator)
        sizes = 20 + 180 * torch.rand(n, 2, generator=generator)
        return images, torch.cat([corners, corners + sizes], dim=1), torch.randint(1, 21, (n,), generator=generator)

    true_images, true_boxes, true_labels = draw(n_objects)
    difficulties = torch.rand(n_objects, generator=generator) < 0.2
    images, boxes, labels = draw(n_detections)
    scores = torch.rand(n_detections, generator=generator)
    n_near = n_detections // 2
    near = torch.randint(n_objects, (n_near,), generator=generator)  # the object of each of them
    images[:n_near] = true_images[near]
    boxes[:n_near] = true_boxes[near] + 8 * torch.randn(n_near, 4, generator=generator)
    labels[:n_near] = true_labels[near]
    detections = split_by_image(images, boxes, labels, scores)
    return *detections, *split_by_image(true_images, true_boxes, true_labels, difficulties)


def split_by_image(images, *columns):
    """Each of some tensors as a list with a tensor an image. images: (n,), the number of each entry's image."""
    order = images.argsort()
    counts = images.bincount(minlength=N_IMAGES).tolist()
    return [list(column[order].split(counts)) for column in columns]


if __name__ == "__main__":
    utils.override_parameters(globals(), sys.argv[1:])
    with utils.exit_with_message():
        main()
