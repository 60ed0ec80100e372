"""Evaluate SSD300 on the TEST lists: average precision by class, their mean (VOC07 mAP), images a second.

    python eval.py
    python eval.py --checkpoint=best_checkpoint_ssd300.pth.tar --write_detections_to=detections
    python eval.py --read_detections_from=detections            score such files, of any detector: no model

Reads the TEST lists in `data_folder`, and a checkpoint or detections in Pascal VOC's text format.
Any parameter below can be overridden on the command line with --name=value.
"""

import itertools
import math
import sys
import time

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import PascalVOCDataset
from model import fastest_memory_format, load_model
from utils import (
    COCO_THRESHOLDS,
    calculate_mAP,
    check_image_names,
    errors_in_words,
    override_parameters,
    read_voc_detections,
    write_voc_detections,
)

# Data
data_folder = "data"  # where create_data_lists.py wrote its lists
checkpoint = "checkpoint_ssd300.pth.tar"
read_detections_from = ""  # folder of comp4_det_test_<class>.txt to score in place of a model; "": use the model
write_detections_to = ""  # folder that gets the detections as comp4_det_test_<class>.txt; "": not written

# Detection: what the paper evaluates with
min_score = 0.01  # lower scores are no detections
max_overlap = 0.45  # of two boxes of a class that overlap more than this, the better one stays
top_k = 200  # detections kept in an image, of all classes together
max_candidates = 0  # best boxes of a class that enter suppression; 0: all. (The Caffe code takes 400.)

# Metric
metric = "11 points"  # VOC2007's; "area" is that of VOC2010 and later
threshold = 0.5  # overlap from which a detection finds an object
coco_style = False  # also the mean over the overlaps 0.50, 0.55, ... 0.95

# Speed
batch_size = 32  # images at a time; less needs less memory
workers = 4  # processes that read images; 0: this process itself
bf16 = False  # bfloat16 autocast: faster on a GPU, detections differ in the third digit


def main():
    dataset = PascalVOCDataset(data_folder, "TEST", keep_difficult=True)
    if write_detections_to:
        check_image_names(dataset.image_names())  # an error now, not after the detection of all images
    seconds = Stopwatch()
    if read_detections_from:
        detections = read_voc_detections(read_detections_from, dataset.image_names(), dataset.label_map)
        seconds.lap("reading the detections")
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_model(checkpoint, device)
        check_same_classes(model.label_map, dataset.label_map)
        loader = make_test_loader(data_folder, batch_size, workers)
        seconds.lap("loading the model", device)
        detections = detect_all(loader, model, seconds)
    if write_detections_to:
        write_voc_detections(write_detections_to, dataset.image_names(), *detections, dataset.label_map)
        print(f"detections written to {write_detections_to}")
        seconds.lap("writing the detections")
    average_precisions, mean_ap = score(detections, dataset)
    seconds.lap("the metric")
    print_table(average_precisions, mean_ap)
    if coco_style:
        print(f"mean over the overlaps 0.50, 0.55, ... 0.95: {score(detections, dataset, COCO_THRESHOLDS)[1]:.4f}")
    seconds.report(len(dataset))


def evaluate(test_loader, model):
    """Average precision of a model on the TEST lists, with the parameters at the top of this file.

    test_loader: from `make_test_loader()`. model: an SSD300 with a label map, on any device.
    Returns a dict of class name to average precision (NaN for a class without an object to find), and the
    mean over the other classes. The model is left in evaluation mode.
    """
    check_same_classes(model.label_map, test_loader.dataset.label_map)
    return score(detect_all(test_loader, model), test_loader.dataset)


def make_test_loader(data_folder, batch_size, workers, skip_corrupt=False):
    """Read the TEST lists in order, difficult objects included; the parameters are those of train.py."""
    dataset = PascalVOCDataset(data_folder, "TEST", keep_difficult=True, skip_corrupt=skip_corrupt)
    return DataLoader(
        dataset,
        batch_size,
        collate_fn=dataset.collate_fn,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


@torch.inference_mode()
def detect_all(test_loader, model, seconds=None):
    """Detect the objects in all images of a loader.

    test_loader: yields batches of `PascalVOCDataset`'s items, in the order of the data set.
    model: an SSD300, on any device. seconds: a Stopwatch to tell where the time goes, or None.
    Returns three lists with an entry an image: boxes (n, 4) float32, boundary form, in pixels of the original
    image, labels (n,) and scores (n,); on the CPU.
    """
    seconds = seconds or Stopwatch()
    device = model.mean.device
    model.eval()
    det_boxes, det_labels, det_scores = [], [], []
    for images, *_ in tqdm(test_loader, unit="batch", leave=False):
        seconds.lap("waiting for images")
        images = model.normalize(images).contiguous(memory_format=fastest_memory_format(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            predicted_locs, predicted_scores = model(images)
        seconds.lap("the network", device)
        boxes, labels, scores = model.detect_objects(
            predicted_locs, predicted_scores, min_score, max_overlap, top_k, max_candidates or None
        )
        det_boxes += [image_boxes.cpu() for image_boxes in boxes]
        det_labels += [image_labels.cpu() for image_labels in labels]
        det_scores += [image_scores.cpu() for image_scores in scores]
        seconds.lap("finding objects")
    scales = torch.from_numpy(test_loader.dataset.sizes).repeat(1, 2)  # (n_images, 4): W, H, W, H
    det_boxes = [boxes * scale for boxes, scale in zip(det_boxes, scales, strict=True)]
    return det_boxes, det_labels, det_scores


def score(detections, dataset, overlaps=None):
    """Average precisions of detections on a data set, and their mean.

    detections: three lists with an entry an image, as from `detect_all()`. overlaps: in place of `threshold`.
    """
    starts = dataset.starts.tolist()
    objects = [slice(first, last) for first, last in itertools.pairwise(starts)]
    return calculate_mAP(
        *detections,
        [dataset.boxes_xy_pixels[these] for these in objects],
        [dataset.labels[these] for these in objects],
        [dataset.difficulties[these] for these in objects],
        label_map=dataset.label_map,
        threshold=overlaps or threshold,
        metric=metric,
    )


def check_same_classes(model_map, data_map):
    """Refuse to score a model on a data set whose labels mean something else."""
    if model_map != data_map:
        raise ValueError(
            f"the model knows {len(model_map)} classes ({', '.join(model_map)}), the data set has "
            f"{len(data_map)} ({', '.join(data_map)}): train on lists of the same classes, or evaluate on them"
        )


def print_table(average_precisions, mean_ap):
    """Print the average precision of each class, and the mean."""
    width = max(len(name) for name in [*average_precisions, "mean"])
    for name, value in average_precisions.items():
        print(f"{name:<{width}}  {'no object to find: left out of the mean' if math.isnan(value) else f'{value:.4f}'}")
    print(f"{'mean':<{width}}  {mean_ap:.4f}    ({metric}, overlap {threshold:g} or more)")


class Stopwatch:
    """Adds up where the time goes, lap by lap."""

    def __init__(self):
        self.seconds = {}
        self.last = time.perf_counter()

    def lap(self, what, device=None):
        """Count the time since the last lap as time for `what`, done by `device`, which is waited for."""
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self.last
        self.last = now

    def report(self, n_images):
        """Print the total, and the share of each kind of lap."""
        total = sum(self.seconds.values())
        shares = ", ".join(f"{what} {100 * spent / total:.0f}%" for what, spent in self.seconds.items())
        print(f"{n_images} images in {total:.1f} s, {n_images / total:.1f} a second: {shares}")


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    with errors_in_words():
        main()
