"""Time the parts of this code, beside torchvision's where it has the same, and print tables.

    python tools/benchmark.py                                               or: make benchmark
    python tools/benchmark.py --only=loss,detection --repeats=15
    python tools/benchmark.py --only=network --networks=ssd300_vgg16,ssd300_tiny

Sections: data (JPEG to augmented image), loss and detection (beside torchvision's), network (images a second of each
network, and where the time of a training step goes).

All but the network is timed as CPU time of one thread. The versions of a case take turns, so that whatever else the
machine does falls on all of them alike. The tables give medians, and how many times as long as this code each version
takes: look at these ratios, not at the milliseconds, which are the machine's. Networks run on the GPU, or on all cores
where there is none, and are timed by the clock.
Any parameter below can be overridden with --name=value.
"""

import platform
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torchvision
from make_sample import make_sample
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

import train
import utils
from datasets import read_image, transform
from model import NETWORKS, SSD300, MultiBoxLoss, detect_objects
from utils import cxcy_to_gcxgcy, cxcy_to_xy, find_jaccard_overlap

only = ()  # sections to run, such as loss,detection; (): all
repeats = 9  # times that each version of a case runs
network_repeats = 5  # the same, for networks: on a CPU these take seconds
batch_size = 0  # images of a training step; 0: 32 on a GPU, 8 on a CPU
networks = ()  # those to time; (): all
compile_model = True  # on a GPU; False: where there is no C compiler

N_PICTURES = 20  # that the data section prepares
PARTS = ("normalise", "forward", "loss", "backward", "optimiser")  # of a training step

# Of detection: the limits of eval.py
MIN_SCORE = 0.01
MAX_OVERLAP = 0.45
TOP_K = 200


def main():
    sections = {
        "data": benchmark_data,
        "loss": benchmark_loss,
        "detection": benchmark_detection,
        "network": benchmark_networks,
    }
    unknown = sorted(set(only) - set(sections))
    if unknown:
        raise ValueError(f"there is no section {', '.join(unknown)}; there are {', '.join(sections)}")
    print_machine()
    for name in only or sections:
        sections[name]()


def print_machine():
    """Say what the numbers below depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{utils.count_cores()} cores with {torch.backends.cpu.get_cpu_capability()}; {gpu}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}")


# --- Measuring ------------------------------------------------------------------------------------


def measure_in_turns(versions, n_times, clock):
    """Run versions of one computation in turns.

    versions: dict of name to function without arguments. n_times: how often each of them is measured.
    clock: a function that returns seconds.
    Returns a dict of name to the median of the seconds.
    """
    seconds = {name: [] for name in versions}
    for turn in range(n_times + 1):
        for name, function in versions.items():
            started = clock()
            function()
            ended = clock()
            if turn > 0:  # turn 0 warms up
                seconds[name].append(ended - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(case, versions, n_images=1):
    """Print the CPU time of versions of one computation, on one thread; the first version is this code.

    n_images: how many a call handles, to state the time of one.
    """
    torch.set_num_threads(1)
    medians = measure_in_turns(versions, repeats, time.process_time)
    first = next(iter(medians.values()))
    print(f"\n{case}")
    for name, median in medians.items():
        milliseconds = 1000 * median / n_images
        print(f"  {name:<30} {milliseconds:9.2f} ms {median / first:7.2f} x")


def read_wall_clock():
    """Seconds, when a GPU, if there is one, has done what it was told."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


# --- Data: from JPEG to augmented image -----------------------------------------------------------


def benchmark_data():
    """Decoding and transform() of generated pictures, about as large as VOC's, with three objects each."""
    boxes = torch.tensor([[50.0, 60.0, 200.0, 300.0], [10.0, 10.0, 30.0, 40.0], [150.0, 100.0, 310.0, 310.0]])
    labels = torch.tensor([1, 2, 3])
    difficulties = torch.zeros(3, dtype=torch.uint8)
    rng = np.random.default_rng(0)

    def prepare(path):
        transform(read_image(path), boxes, labels, difficulties, "TRAIN", rng)

    with tempfile.TemporaryDirectory() as folder:
        make_sample(folder, N_PICTURES, 0, seed=0)
        paths = list(Path(folder, "JPEGImages").iterdir())
        versions = {
            "read_image() and transform()": lambda: [prepare(path) for path in paths],
            "read_image() alone": lambda: [read_image(path) for path in paths],
        }
        compare("data: one training image", versions, n_images=len(paths))


# --- torchvision's SSD, on our priors -------------------------------------------------------------


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
            targets.append({"boxes": image_boxes, "labels": image_labels})
            matched.append(self.matcher(box_iou(image_boxes, self.anchors)))
        outputs = {"bbox_regression": locs, "cls_logits": scores}
        return sum(SSD.compute_loss(self, targets, outputs, [self.anchors] * len(locs), matched).values())

    @torch.no_grad()
    def detect(self, locs, scores):
        outputs = {"bbox_regression": locs, "cls_logits": scores}
        sizes = [(1, 1)] * len(locs)  # of the images: boxes are fractional
        return SSD.postprocess_detections(self, outputs, [self.anchors] * len(locs), sizes)


# --- Loss -----------------------------------------------------------------------------------------


def benchmark_loss():
    """MultiBoxLoss forward and backward, beside torchvision's matching and loss."""
    priors_cxcy = SSD300.create_prior_boxes()
    locs, scores = trained_like_predictions(32, priors_cxcy)
    criteria = {"MultiBoxLoss": MultiBoxLoss(priors_cxcy), "torchvision": TorchvisionSSD(priors_cxcy).compute_loss}
    for n_images, fewest, most in ((32, 1, 12), (8, 20, 20), (8, 100, 100)):
        predictions = (locs[:n_images].requires_grad_(), scores[:n_images].requires_grad_())
        objects = make_up_objects(n_images, fewest, most)
        versions = {name: partial(find_gradients, loss, predictions, objects) for name, loss in criteria.items()}
        compare(f"loss: forward and backward, {n_images} images of {fewest} to {most} objects", versions)


def find_gradients(criterion, predictions, objects):
    return torch.autograd.grad(criterion(*predictions, *objects), predictions)


def make_up_objects(n_images, fewest, most):
    """Boxes (n, 4), boundary form, fractional, and labels (n,) of `fewest` to `most` objects an image: two lists."""
    generator = torch.Generator().manual_seed(0)
    boxes = []
    labels = []
    for _ in range(n_images):
        n = int(torch.randint(fewest, most + 1, (1,), generator=generator))
        sizes = 0.05 + 0.6 * torch.rand(n, 2, generator=generator)
        corners = torch.rand(n, 2, generator=generator) * (1 - sizes)
        boxes.append(torch.cat([corners, corners + sizes], dim=1))
        labels.append(torch.randint(1, 21, (n,), generator=generator))
    return boxes, labels


# --- Detection ------------------------------------------------------------------------------------


def benchmark_detection():
    """detect_objects() on a batch like a trained model's, and on the worst image, beside torchvision's."""
    priors_cxcy = SSD300.create_prior_boxes()
    locs, scores = trained_like_predictions(8, priors_cxcy)
    compare_detections("batch of 8 like a trained model's", priors_cxcy, locs, scores)
    generator = torch.Generator().manual_seed(0)
    locs = torch.randn(1, len(priors_cxcy), 4, generator=generator)
    scores = torch.rand(1, len(priors_cxcy), 21, generator=generator)
    compare_detections(f"one image, all 8732 x 20 above {MIN_SCORE}", priors_cxcy, locs, scores)


def compare_detections(name, priors_cxcy, locs, scores):
    """Time detection, and say how much of what it should return torchvision's cap costs."""
    capped = TorchvisionSSD(priors_cxcy).detect
    uncapped = TorchvisionSSD(priors_cxcy, topk_candidates=10**9).detect
    versions = {
        "detect_objects()": lambda: detect_objects(locs, scores, priors_cxcy, MIN_SCORE, MAX_OVERLAP, TOP_K),
        "torchvision as shipped": lambda: capped(locs, scores),
        "torchvision uncapped": lambda: uncapped(locs, scores),
    }
    compare(f"detection: {name}", versions)
    all_boxes = list_boxes(uncapped(locs, scores))
    lost = all_boxes - list_boxes(capped(locs, scores))
    share = (scores.softmax(dim=2)[:, :, 1:] > MIN_SCORE).float().mean()
    print(f"  {share:.1%} of the pairs of prior and class have scores above {MIN_SCORE}")
    print(f"  torchvision as shipped drops {len(lost) / len(all_boxes):.0%} of the boxes that are detected")


def list_boxes(found):
    """The boxes of all images, a set of tuples. found: a dictionary for each image, as torchvision returns it."""
    return {tuple(box) for image in found for box in image["boxes"].tolist()}


def trained_like_predictions(n_images, priors_cxcy):
    """Offsets and scores like a trained model's for photos: 4.5% of the pairs of prior and class above 0.01.

    Each prior points, not quite exactly, at the nearest of some objects and look-alikes. It takes over their
    likes and dislikes of classes; two classes are likely everywhere in an image.
    """
    n_classes = 21
    generator = torch.Generator().manual_seed(0)
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
    scores[:, :, 0] += 6.99  # the background's: so that the share is the one above
    return locs, scores


# --- Networks -------------------------------------------------------------------------------------


def benchmark_networks():
    """Images a second of each network in detection and training, and where the time of a training step goes."""
    device = train.set_up_device()
    torch.set_num_threads(utils.count_cores())
    for name in networks or NETWORKS:
        benchmark_network(name, device)


def benchmark_network(name, device):
    n_images = batch_size or (32 if device.type == "cuda" else 8)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    network = TimedNetwork(name, n_images, device)
    tasks = {"detection (forward pass)": network.predict, "training": network.take_step}
    seconds = measure_in_turns(tasks, network_repeats, read_wall_clock)
    print(f"\nnetwork: {name}, batch of {n_images}, {device.type}")
    for task, median in seconds.items():
        print(f"  {task:<30} {n_images / median:9.1f} images a second")
    parts = network.take_step(read_wall_clock)
    shares = [f"{part} {part_seconds / sum(parts.values()):.0%}" for part, part_seconds in parts.items()]
    print(f"  of a training step: {', '.join(shares)}")
    if device.type == "cuda":
        print(f"  GPU memory in use at most: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


class TimedNetwork:
    """A network with what train.py needs for a training step, on made-up images."""

    def __init__(self, name, n_images, device):
        self.device = device
        self.use_bf16 = utils.has_bf16_units(device)
        self.model = SSD300(21, name)
        self.memory_format = utils.fastest_memory_format(device, self.model)
        self.model.to(device, memory_format=self.memory_format)
        self.network = train.wrap_model(self.model, compile_model)
        self.criterion = MultiBoxLoss(self.model.priors_cxcy).to(device)
        self.optimizer = train.make_optimizer(self.model, device)
        self.objects = make_up_objects(n_images, 1, 6)
        size = self.model.input_size
        shape = (n_images, 3, size, size)
        self.pixels = torch.randint(256, shape, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def normalize(self):
        return self.model.normalize(self.pixels).contiguous(memory_format=self.memory_format)

    def forward(self, images):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.use_bf16):
            return self.network(images)

    @torch.inference_mode()
    def predict(self):
        """The forward pass of detection."""
        self.model.eval()
        self.forward(self.normalize())
        self.model.train()

    def take_step(self, clock=time.perf_counter):
        """A training step as in train.py. Returns the seconds of each of its parts by this clock, a dict."""
        times = [clock()]
        images = self.normalize()
        times.append(clock())
        predicted_locs, predicted_scores = self.forward(images)
        times.append(clock())
        loss = self.criterion(predicted_locs, predicted_scores, *self.objects)
        times.append(clock())
        self.optimizer.zero_grad()
        loss.backward()
        times.append(clock())
        self.optimizer.step()
        times.append(clock())
        return dict(zip(PARTS, np.diff(times), strict=True))


if __name__ == "__main__":
    utils.override_parameters(globals(), sys.argv[1:])
    with utils.exit_with_message():
        main()
