"""Evaluate a network on the TEST lists: the average precision of each class, their mean, images a second.

    python eval.py
    python eval.py --split=VAL --write_results_to=results.json
    python eval.py --metric=coco --write_detections_to=found.json
    python eval.py --read_detections_from=found.json            score the detections of any detector: no network

Reads the lists of `split` in `data_folder`, and a checkpoint or detections. Detections are a folder of Pascal VOC's
text files, or one .json file in the format of COCO's results; what was read in one can be written in the other.
Any parameter below can be overridden on the command line with --name=value.

Shapes in comments: D detections and M objects, of all images or of one class.
"""

import contextlib
import importlib.util
import io
import json
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from datasets import PascalVOCDataset
from model import hide_classes, load_model
from utils import find_jaccard_overlap, printable

# Data
data_folder = "data"  # where create_data_lists.py wrote its lists
split = "TEST"  # whose lists; or "VAL", or "TRAIN" (not augmented)
skip_corrupt = False  # True: leave out images that cannot be read, instead of stopping
checkpoint = "checkpoint_ssd300.pth.tar"
read_detections_from = ""  # a folder of comp4_det_test_<class>.txt, or a .json file, to score; "": use the network
write_detections_to = ""  # a folder, or a file that ends in .json, that gets the detections; "": not written
write_results_to = ""  # a .json file that gets the numbers, and what they were computed from; "": not written

# Detection: what the paper evaluates with
min_score = 0.01  # lower scores are no detections
max_overlap = 0.45  # of two boxes of a class that overlap more than this, the better one stays
top_k = 200  # detections kept in an image, of all classes together
max_candidates = 0  # best boxes of a class that enter suppression; 0: all. (The Caffe code takes 400.)

# Metric
metric = "11 points"  # VOC2007's; "area": that of VOC2010 and later; "coco": COCO's twelve numbers, by pycocotools
min_overlap = 0.5  # overlap from which a detection finds an object; "coco" takes 0.50, 0.55, ... 0.95

# Speed
device = ""  # "cpu", "cuda", "cuda:1", "mps", ...; "": an accelerator where there is one
batch_size = 32  # images at a time; less needs less memory
workers = min(4, utils.count_cores())  # processes that read images; 0: this process itself
bf16 = False  # bfloat16 autocast: faster on a GPU, detections differ in the third digit

METRICS = ("11 points", "area", "coco")
# The parameters that mean nothing where detections are read.
OF_NETWORKS = (
    "checkpoint", "min_score", "max_overlap", "top_k", "max_candidates", "device", "batch_size", "workers", "bf16",
    "skip_corrupt",
)  # fmt: skip


def main(given=()):
    """Get detections, from a network or from files, score them, and write and print the results.

    given: names of the parameters that are set on the command line.
    """
    check_metric(metric, min_overlap)
    ignored = [name for name in OF_NETWORKS if name in given]
    if read_detections_from and ignored:
        raise ValueError(f"--{ignored[0]} is for a network; detections that are read are scored as they are")
    if read_detections_from:
        dataset = PascalVOCDataset(data_folder, split, keep_difficult=True, augment=())
    else:
        model = load_model(checkpoint, utils.choose_device(device))
        test_loader = make_test_loader(data_folder, batch_size, workers, model, skip_corrupt, split)
        dataset = test_loader.dataset
        print_notes_on_classes(model.label_map, dataset.label_map)
    parameters = utils.script_parameters(globals())
    check_output_files(write_detections_to, write_results_to, dataset, parameters)

    # Detect.
    start = time.perf_counter()
    if read_detections_from:
        detections = read_detections(read_detections_from, dataset)
    else:
        detections = detect_all(test_loader, model, min_score, max_overlap, top_k, max_candidates or None, bf16)
    seconds = time.perf_counter() - start
    if write_detections_to:
        write_detections(write_detections_to, dataset, detections)
        print(f"detections written to {printable(write_detections_to)}")

    # Score.
    average_precisions, summary = score(detections, dataset, metric, min_overlap)
    if write_results_to:
        write_results(write_results_to, dataset, parameters, average_precisions, summary)
        print(f"results written to {printable(write_results_to)}")
    print_table(average_precisions, summary)
    print_notes_on_images(detections, dataset, metric)
    verb = "read" if read_detections_from else "detected"
    rate = f"{len(dataset)} images {verb} in {seconds:.1f} s, {len(dataset) / seconds:.1f} a second"
    print(f"{describe_metric(metric, min_overlap, dataset)}; {rate}")


def check_metric(metric, min_overlap):
    """ValueError if there is no such metric, its package is missing, or `min_overlap` is out of range."""
    if metric not in METRICS:
        raise ValueError(f'metric is "{printable(metric)}"; it is "11 points", "area" or "coco"')
    if metric == "coco" and importlib.util.find_spec("pycocotools") is None:
        raise ValueError('the metric "coco" is computed by pycocotools, which is missing: pip install pycocotools')
    check_min_overlap(min_overlap)


def check_min_overlap(min_overlap):
    if not 0 < min_overlap <= 1:
        raise ValueError(f"min_overlap is {min_overlap}; it is more than 0, and 1 at most")


def check_output_files(write_detections_to, write_results_to, dataset, parameters):
    """Try to write the files: one that cannot be written is an error now, not after the detection of all images."""
    if write_detections_to:
        write_detections(write_detections_to, dataset, detections=None)  # None: it only tries
    if write_results_to:
        # The results must not replace the detections.
        detection_files = (write_detections_to, parameters["read_detections_from"])
        if Path(write_results_to).resolve() in [Path(name).resolve() for name in detection_files if name]:
            raise ValueError(f"write_results_to is {printable(write_results_to)}, which is the file of detections")
        write_results(write_results_to, dataset, parameters, average_precisions=None, summary=None)


def evaluate(
    test_loader, model, metric="11 points", min_overlap=0.5, min_score=0.01, max_overlap=0.45, top_k=200,
    max_candidates=None, bf16=False,
):  # fmt: skip
    """Average precision of a model on the images of a loader.

    test_loader: from `make_test_loader()`. model: an SSD300 with a label map, on any device; left in evaluation mode.
    metric: one of METRICS. The other arguments are explained at the top of this file.
    Returns a dict of class name to average precision (NaN without an object to find), and the mean (COCO: the AP).
    """
    detections = detect_all(test_loader, model, min_score, max_overlap, top_k, max_candidates, bf16)
    average_precisions, summary = score(detections, test_loader.dataset, metric, min_overlap)
    mean = summary["AP" if metric == "coco" else "mean"]
    return average_precisions, mean


# --- From images to detections --------------------------------------------------------------------


def make_test_loader(data_folder, batch_size, workers, model, skip_corrupt=False, split="TEST"):
    """Read the images of a split in order, as the model wants them, with difficult objects and not augmented."""
    dataset = PascalVOCDataset(
        data_folder, split, keep_difficult=True, skip_corrupt=skip_corrupt, augment=(), size=model.input_size,
        antialias=model.antialias,
    )  # fmt: skip
    pin_memory = model.mean.device.type == "cuda"
    return DataLoader(dataset, batch_size, collate_fn=dataset.collate_fn, num_workers=workers, pin_memory=pin_memory)


@torch.inference_mode()
def detect_all(test_loader, model, min_score=0.01, max_overlap=0.45, top_k=200, max_candidates=None, bf16=False):
    """Detect the objects in all images of a loader.

    Classes of the model and of the data set are the same if they have the same name. Classes that the data set
    does not have are not detected.

    Returns three lists with an entry an image: boxes (n, 4) float32, boundary form, in pixels of the original
    image, labels (n,) of the data set's label map, and scores (n,), falling; on the CPU.
    Raises ValueError if the model knows no class of the data set.
    """
    dataset = test_loader.dataset
    # new_labels[i] is the data set's label of the class that the model calls i; 0 if the data set does not have it.
    new_labels = match_classes(model.label_map, dataset.label_map)
    unknown = [label for label, new_label in enumerate(new_labels.tolist()) if label > 0 and new_label == 0]
    device = model.mean.device
    memory_format = utils.fastest_memory_format(device, model)
    model.eval()

    all_boxes = []
    all_labels = []
    all_scores = []
    for images, _, _, _ in tqdm(test_loader, unit="batch", leave=False):
        images = model.normalize(images).contiguous(memory_format=memory_format)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            predicted_locs, predicted_scores = model(images)
        # Classes that the data set lacks count as background: it gets their probability, and other scores stay.
        predicted_scores = hide_classes(predicted_scores, unknown)
        boxes, labels, scores = model.detect_objects(
            predicted_locs, predicted_scores, min_score, max_overlap, top_k, max_candidates
        )
        all_boxes += [part.cpu() for part in boxes]
        all_labels += [new_labels[part.cpu()] for part in labels]  # the model's labels -> the data set's
        all_scores += [part.cpu() for part in scores]

    for i, (width, height) in enumerate(dataset.sizes.tolist()):
        all_boxes[i] = all_boxes[i] * torch.tensor([width, height, width, height])
    return all_boxes, all_labels, all_scores


def match_classes(model_label_map, label_map):
    """Translate a model's labels into a data set's: classes of the same name are the same.

    Returns new_labels (C,) int64: the class with the label i in the model has new_labels[i] in the data set. This is
    0 for the background and for classes that the data set does not have.
    Raises ValueError if the model knows no class of the data set, or has no label map.
    """
    if not model_label_map:
        raise ValueError("this model has no label_map; load_model() reads it from the checkpoint")
    utils.check_label_map(model_label_map)
    names = sorted(model_label_map, key=model_label_map.get)  # by label
    new_labels = torch.tensor([label_map.get(name, 0) for name in names])
    if not new_labels.any():
        known = printable(", ".join(names[1:]))
        wanted = printable(", ".join(name for name in label_map if name != "background"))
        raise ValueError(f"the model knows none of the data set's classes: it knows {known}; the data set has {wanted}")
    return new_labels


# --- From detections to the average precision -----------------------------------------------------


def score(detections, dataset, metric="11 points", min_overlap=0.5):
    """Compare detections with the objects of a data set.

    detections: three lists as from `detect_all()`. dataset: a `PascalVOCDataset` with difficult objects.
    metric: one of METRICS. min_overlap: see `calculate_mAP()`.
    Returns a dict of class name to average precision, and a dict of the numbers that sum it up: "mean", or COCO's
    twelve.
    """
    if metric == "coco":
        return calculate_coco(*detections, dataset)
    counts = np.diff(dataset.starts).tolist()  # objects in each image
    true_boxes = dataset.boxes_xy_pixels.split(counts)
    true_labels = dataset.labels.split(counts)
    true_difficulties = dataset.difficulties.split(counts)
    average_precisions, mean = calculate_mAP(
        *detections, true_boxes, true_labels, true_difficulties, dataset.label_map, min_overlap, metric
    )
    return average_precisions, {"mean": mean}


# 0.1 * 3 is 0.30000000000000004, so a recall of just 3/10 does not reach the fourth point. (0.1 * 6 and 0.1 * 7 are too
# high as well.) That is on purpose: so the numbers equal those of the Python ports of VOC's development kit.
RECALL_POINTS = tuple(0.1 * i for i in range(11))


def calculate_mAP(
    det_boxes, det_labels, det_scores, true_boxes, true_labels, true_difficulties,
    label_map=None, min_overlap=0.5, metric="11 points",
):  # fmt: skip
    """Average precision of each class, and their mean, as Pascal VOC's development kit computes them.

    A detection is compared with the object of its class and image that it overlaps most. If they overlap by
    `min_overlap` or more it has found the object, unless a better-scored detection had found it already:
    then it is false, as are all others. A difficult object neither helps nor hurts, nor do its detections.
    Detections of equal scores count in their order.

    det_boxes, det_labels, det_scores: lists with a tensor an image: (n, 4) float, boundary form, fractional
        or in pixels, (n,) int64 and (n,) float; on any device; n may be 0.
    true_boxes, true_labels, true_difficulties: the same for the objects; 1 or True for a difficult one.
    label_map: dict of name to label; None takes Pascal VOC's.
    metric: "11 points": the mean of the highest precisions at a recall of 0, 0.1, ... 1 or more (VOC2007);
        "area": the area under the precision-recall curve, made monotonic (VOC2010 and later).
    Returns a dict of class name to average precision, NaN for a class without an object that is not difficult,
    and the mean over the other classes (NaN if there is none).
    Raises ValueError if lists differ in length, a label is not in the label map, the metric is unknown, or min_overlap
    is not in (0, 1].
    Source: Everingham et al. 2010, section 4.2; VOCevaldet.m of the development kits of 2007 and 2012.
    """
    if metric not in ("11 points", "area"):
        raise ValueError(f'metric is {metric!r}; it is "11 points" or "area"')
    check_min_overlap(min_overlap)
    if len(det_boxes) != len(true_boxes):
        raise ValueError(f"{len(det_boxes)} images with detections, but {len(true_boxes)} with objects")
    if label_map is None:
        label_map = utils.make_label_map(utils.voc_labels)
    # All images in one tensor each: (D,), (D, 4), (D,), (D,) and (M,), (M, 4), (M,), (M,).
    det_images, det_boxes, det_labels, det_scores = join_images(det_boxes, det_labels, det_scores, label_map)
    true_images, true_boxes, true_labels, difficulties = join_images(
        true_boxes, true_labels, true_difficulties, label_map
    )
    if det_scores.isnan().any():
        raise ValueError("a detection's score is not a number")

    average_precisions = {}
    for name, label in label_map.items():
        if label == 0:  # background
            continue
        detections = det_labels == label  # (D,) bool: those of the class
        objects = true_labels == label  # (M,) bool
        average_precisions[name] = calculate_average_precision(
            det_images[detections], det_boxes[detections], det_scores[detections],
            true_images[objects], true_boxes[objects], difficulties[objects] != 0, min_overlap, metric,
        )  # fmt: skip
    known = [value for value in average_precisions.values() if not math.isnan(value)]
    mean = sum(known) / len(known) if known else math.nan
    return average_precisions, mean


def calculate_average_precision(
    det_images, det_boxes, det_scores, true_images, true_boxes, is_difficult, min_overlap, metric
):
    """Average precision of one class; NaN if it has no object that is not difficult.

    det_images (D,), det_boxes (D, 4), det_scores (D,): its detections; the image of each is a number.
    true_images (M,), true_boxes (M, 4), is_difficult (M,) bool: its objects, image by image.
    """
    n_objects = int((~is_difficult).sum())  # to be found
    if n_objects == 0:
        return math.nan

    # 1. Sort the detections by score. Equal scores stay in their order.
    order = det_scores.argsort(descending=True, stable=True)
    det_images = det_images[order]
    det_boxes = det_boxes[order]

    # 2. Find the object that each detection overlaps most, among those of its image.
    best_objects, best_overlaps = find_best_objects(det_images, det_boxes, true_images, true_boxes)

    # 3. From the best detection on: is it true, false, or to be ignored?
    outcomes = judge_detections(best_objects, best_overlaps, is_difficult, min_overlap)

    # 4. After each detection: which share of the detections was true, and which share of the objects is found?
    is_true = [outcome == "true" for outcome in outcomes if outcome != "ignored"]
    n_true = torch.tensor(is_true, dtype=torch.float64).cumsum(dim=0)  # so far
    precision = n_true / torch.arange(1, len(n_true) + 1)
    recall = n_true / n_objects

    # 5. Sum up the curve of precision and recall in one number.
    if metric == "11 points":
        return average_of_11_points(precision, recall)
    return area_under_curve(precision, recall)


def find_best_objects(det_images, det_boxes, true_images, true_boxes):
    """For each detection, the object in its image that it overlaps most, the first if there are several.

    det_images (D,), det_boxes (D, 4), true_images (M,), true_boxes (M, 4): as in `calculate_average_precision()`.
    (tools/analyze.py asks for all classes at once: there a number stands for a class in an image.)
    Returns the numbers of the objects, (D,) int64, and the overlaps, (D,); in an image without objects -1 and 0.
    """
    best_objects = torch.full((len(det_images),), -1)
    best_overlaps = torch.zeros(len(det_images), dtype=torch.float64)
    detections_of = group_by_image(det_images)
    objects_of = group_by_image(true_images)
    for image in detections_of.keys() & objects_of.keys():  # the images that have both
        detections = detections_of[image]  # (d,)
        objects = objects_of[image]  # (m,)
        overlaps = find_jaccard_overlap(det_boxes[detections], true_boxes[objects])  # (d, m)
        overlaps = overlaps.nan_to_num(0)  # of boxes whose coordinates are not finite
        highest_overlaps, columns = overlaps.max(dim=1)  # (d,) each: of every row the highest overlap, and its column
        best_objects[detections] = objects[columns]
        best_overlaps[detections] = highest_overlaps
    return best_objects, best_overlaps


def group_by_image(images):
    """Which entries belong to each image: for entries of the images [7, 2, 7] it is {7: [0, 2], 2: [1]}, as tensors."""
    entries = {}
    for entry, image in enumerate(images.tolist()):
        entries.setdefault(image, []).append(entry)
    return {image: torch.tensor(of_image) for image, of_image in entries.items()}


def judge_detections(best_objects, best_overlaps, is_difficult, min_overlap):
    """Go through the detections of a class, best first: a list of "true", "false" and "ignored"."""
    is_difficult = is_difficult.tolist()
    found = set()  # numbers of objects
    outcomes = []
    for best_object, overlap in zip(best_objects.tolist(), best_overlaps.tolist(), strict=True):
        if overlap < min_overlap:  # it is on no object. (Object -1, which is none, has an overlap of 0.)
            outcomes.append("false")
        elif is_difficult[best_object]:
            outcomes.append("ignored")
        elif best_object in found:  # by a better detection
            outcomes.append("false")
        else:
            found.add(best_object)
            outcomes.append("true")
    return outcomes


def average_of_11_points(precision, recall):
    """The mean of the best precision at a recall of 0 or more, of 0.1 or more, ... of 1."""
    total = 0.0
    for point in RECALL_POINTS:
        is_reached = recall >= point
        if is_reached.any():
            total += float(precision[is_reached].max())
    return total / len(RECALL_POINTS)


def area_under_curve(precision, recall):
    """The area under the curve of the best precision at each recall or a higher one.

    In the README's example, recall grows in four steps of 1/6, and the area is (1 + 1 + 3/4 + 4/7) / 6 = 0.554.
    """
    best_precision = precision.flip(0).cummax(dim=0).values.flip(0)  # running maximum from the right
    steps = recall.diff(prepend=torch.zeros(1))  # width of each step
    return float((best_precision * steps).sum())


def join_images(boxes, labels, values, label_map):
    """Join lists that have one tensor for each image. values: scores or difficulties.

    Returns images (n,), the number of each entry's image; boxes (n, 4); labels (n,); values (n,).
    """
    counts = [len(part) for part in labels]
    if [len(part) for part in boxes] != counts or [len(part) for part in values] != counts:
        raise ValueError("boxes, labels, and scores or difficulties differ in number in at least one image")
    images = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    if len(images) == 0:
        return images, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)  # no tensors to join
    boxes = torch.cat(list(boxes)).cpu().double()
    labels = torch.cat(list(labels)).cpu()
    values = torch.cat(list(values)).cpu().double()
    known = [label for label in label_map.values() if label > 0]
    unknown = labels[~torch.isin(labels, torch.tensor(known))]
    if len(unknown):
        raise ValueError(f"the label {unknown[0]} is not in the label map, which has {printable(sorted(known), 200)}")
    return images, boxes, labels, values


# --- COCO's metric --------------------------------------------------------------------------------

COCO_NUMBERS = (
    "AP", "AP50", "AP75", "AP small", "AP medium", "AP large",
    "AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large",
)  # fmt: skip
COCO_LIMIT = 100  # detections of a class in an image that it looks at


def calculate_coco(det_boxes, det_labels, det_scores, dataset):
    """COCO's average precision of each class and its twelve numbers, by pycocotools, the reference itself.

    AP is the mean over 101 points of recall and the overlaps 0.50, 0.55, ... 0.95; AR the recall with at most 1, 10
    or 100 detections of a class in an image (AP takes 100). Small are objects up to 32 x 32 pixels of the original
    image, large from 96 x 96, by COCO's `area` or else the box's. Difficult objects are ignored as COCO's crowds are.

    det_boxes, det_labels, det_scores: as from `detect_all()`. dataset: a `PascalVOCDataset` with difficult objects.
    Returns a dict of class name to average precision, and one of COCO_NUMBERS; NaN where there is no object.
    """
    from pycocotools.cocoeval import COCOeval  # only who wants these numbers needs it

    class_names = [name for name in dataset.label_map if name != "background"]
    # pycocotools ranks equal scores by the ids of the images: these have the same order as those of the file.
    # With the ids 30, 10, 20 the images get 2, 0, 1.
    ids = dataset.image_ids or list(range(len(dataset)))
    image_ids = np.argsort(np.argsort(ids, kind="stable"))

    true_images = image_ids.repeat(np.diff(dataset.starts))
    objects = to_coco_annotations(true_images, dataset.boxes_xy_pixels, dataset.labels)
    for i, is_crowd in enumerate(dataset.difficulties.tolist()):
        objects[i]["iscrowd"] = is_crowd
        if dataset.areas is not None:
            objects[i]["area"] = float(dataset.areas[i])

    det_images = image_ids.repeat([len(labels) for labels in det_labels])
    detections = to_coco_annotations(det_images, torch.cat(list(det_boxes)), torch.cat(list(det_labels)))
    for detection, confidence in zip(detections, torch.cat(list(det_scores)).tolist(), strict=True):
        detection["score"] = confidence

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        n_images = len(dataset)
        n_classes = len(class_names)
        truth = make_coco(objects, n_images, n_classes)
        evaluation = COCOeval(truth, make_coco(detections, n_images, n_classes), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()

    precision = evaluation.eval["precision"]  # (overlaps, recalls, classes, sizes of object, numbers of detections)
    by_class = precision[:, :, :, 0, -1].mean(axis=(0, 1))  # objects of all sizes, COCO_LIMIT detections
    by_class = np.where(by_class < 0, np.nan, by_class).tolist()  # -1 stands for a class without objects
    twelve = np.where(evaluation.stats < 0, np.nan, evaluation.stats).tolist()
    return dict(zip(class_names, by_class, strict=True)), dict(zip(COCO_NUMBERS, twelve, strict=True))


def to_coco_annotations(images, boxes_xy, labels):
    """Boxes of all images, end to end, as COCO has them: a list of dicts. images (n,), boxes_xy (n, 4), labels (n,)."""
    annotations = []
    for image, box, label in zip(images.tolist(), boxes_xy.tolist(), labels.tolist(), strict=True):
        x_min, y_min, x_max, y_max = box
        width = x_max - x_min
        height = y_max - y_min
        annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": label}
        annotation["bbox"] = [x_min, y_min, width, height]
        annotation["area"] = width * height
        annotations.append(annotation)
    return annotations


def make_coco(annotations, n_images, n_classes):
    """pycocotools' COCO, of images 0, 1, ... and categories 1, 2, ..."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(n_images)],
        "categories": [{"id": label} for label in range(1, n_classes + 1)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


# --- What is printed, and the file of results -----------------------------------------------------


def print_table(average_precisions, summary):
    """Print the average precision of each class, and the numbers that sum it up."""
    rows = [*average_precisions.items(), *summary.items()]
    width = max(len(printable(name, 40)) for name, _ in rows)
    for name, value in rows:
        text = "no object to find" if math.isnan(value) else f"{value:.4f}"
        print(f"{printable(name, 40):<{width}}  {text}")


def describe_metric(metric, min_overlap, dataset):
    """What the numbers in the table are, in words."""
    if metric != "coco":
        return f"{metric}, overlap {min_overlap:g} or more"
    if dataset.image_ids is None:  # no data set of COCO's
        return f"{metric}, overlaps from 0.50 to 0.95, difficult objects as crowds"
    return f"{metric}, overlaps from 0.50 to 0.95"


def print_notes_on_classes(model_label_map, label_map):
    """Say which classes of the data set a model does not know, and which of its own are not in the data set."""
    lacking = [name for name in label_map if name not in model_label_map]
    if lacking:
        names = printable(", ".join(lacking))
        print(f"note: classes of the data set that the model does not know; their objects count as missed: {names}")
    unused = [name for name in model_label_map if name not in label_map]
    if unused:
        names = printable(", ".join(unused))
        print(f"note: classes of the model that the data set does not have; they are not detected: {names}")


def print_notes_on_images(detections, dataset, metric):
    """Say which images could not be read, and whether COCO's metric leaves detections out."""
    skipped = dataset.skipped_images()
    if skipped:
        names = printable(", ".join(skipped))
        print(f"note: images that could not be read ({len(skipped)}); their objects count as missed: {names}")
    if metric == "coco":
        counts = np.diff(dataset.starts).tolist()
        _, det_labels, _ = detections
        most_detections = most_of_a_class(det_labels)
        most_objects = most_of_a_class(dataset.labels.split(counts))
        if most_detections > COCO_LIMIT:
            print(
                f"note: there are up to {most_detections} detections of a class in an image, and up to {most_objects} "
                f"objects; COCO's metric takes the best {COCO_LIMIT} detections. Objects beyond them count as missed"
            )


def most_of_a_class(labels):
    """The highest number of equal labels in an image; labels: a list with a tensor an image."""
    return max((int(part.bincount().max()) for part in labels if len(part)), default=0)


def write_results(path, dataset, parameters, average_precisions=None, summary=None):
    """Write the numbers of an evaluation, and what they were computed from, to a .json file.

    Numbers that are not known are null. Without numbers this only tries whether it can be done.
    Raises ValueError or OSError, naming the file, if it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".json" or path.is_dir():
        raise ValueError(f"write_results_to is {printable(repr(str(path)))}; it must be a file that ends in .json")
    is_read = parameters["read_detections_from"] != ""
    results = {
        "split": parameters["split"],
        "metric": parameters["metric"],
        "checkpoint": None if is_read else parameters["checkpoint"],
        "detections": parameters["read_detections_from"] if is_read else None,
        "images": len(dataset),
        **none_for_nan(summary or {}),
        "average_precisions": none_for_nan(average_precisions or {}),
        "parameters": {name: value for name, value in parameters.items() if not (is_read and name in OF_NETWORKS)},
    }
    is_trial = summary is None
    utils.write_files(path.parent, {path.name: json.dumps(results, indent=1) + "\n"}, is_trial)


def none_for_nan(numbers):
    """A dict of numbers as JSON can hold it: None, which is null there, for NaN."""
    return {name: None if math.isnan(value) else value for name, value in numbers.items()}


# --- Files of detections: COCO's where the name ends in .json, else a folder with Pascal VOC's ----

VOC_FORM = "`image score x_min y_min x_max y_max`"
COCO_FORM = '{"image_id": ..., "category_id": ..., "bbox": [x, y, width, height], "score": ...}'


def write_detections(path, dataset, detections=None):
    """Write detections, three lists as from `detect_all()`: all files or none. Without them, only try whether it works.

    A .json file gets the format of COCO's results: a list of {"image_id", "category_id", "bbox", "score"}. In a folder
    each class gets a file comp4_det_test_<class>.txt, as Pascal VOC's development kit reads it: lines of `image score
    x_min y_min x_max y_max`, in pixels that count from 1 and include both ends.
    Raises OSError, naming the path; ValueError for names or ids that the format cannot hold.
    """
    path = Path(path)
    rows = []  # (number of the image, label, score, box)
    if detections is not None:
        for image, (boxes, labels, scores) in enumerate(zip(*detections, strict=True)):
            for box, label, confidence in zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True):
                rows.append((image, label, confidence, box))
    is_trial = detections is None
    if is_coco_file(path):
        utils.write_files(path.parent, {path.name: make_coco_text(rows, dataset)}, is_trial)
    else:
        utils.write_files(path, make_voc_texts(rows, dataset), is_trial)


def read_detections(path, dataset):
    """Read the detections of any detector, from a .json file or a folder: see `read_voc_detections()`."""
    if is_coco_file(path):
        return read_coco_detections(path, dataset)
    return read_voc_detections(path, dataset.image_names(), dataset.label_map)


def is_coco_file(path):
    return str(path).lower().endswith(".json")


def make_coco_text(rows, dataset):
    """Detections in the format of COCO's results, one a line."""
    image_ids = list(coco_image_ids(dataset))
    category_ids = read_category_ids(dataset)
    lines = []
    for image, label, confidence, (x_min, y_min, x_max, y_max) in rows:
        detection = {
            "image_id": image_ids[image],
            "category_id": category_ids[label],
            "bbox": [x_min, y_min, x_max - x_min, y_max - y_min],
            "score": confidence,
        }
        lines.append(json.dumps(detection))
    return "[" + ",\n".join(lines) + "]\n"


def read_coco_detections(path, dataset):
    """Read detections from a file in the format of COCO's results: see `read_voc_detections()`."""
    images = {image_id: number for number, image_id in enumerate(coco_image_ids(dataset))}
    labels = {category_id: label for label, category_id in read_category_ids(dataset).items()}
    rows = []
    for number, detection in enumerate(utils.read_json(path, list), start=1):
        try:
            x, y, width, height = [float(value) for value in detection["bbox"]]
            image = images[detection["image_id"]]
            label = labels[detection["category_id"]]
            rows.append(make_row(image, label, float(detection["score"]), x, y, x + width, y + height))
        except (KeyError, OverflowError, TypeError, ValueError):
            raise ValueError(describe_fault(f"{path}, entry {number}", detection, COCO_FORM)) from None
    return split_by_image(rows, len(images))


def make_voc_texts(rows, dataset):
    """Detections in Pascal VOC's format: a dict of file name to text, with every class."""
    image_names = list(number_voc_names(dataset.image_names()))
    file_names = voc_file_names(dataset.label_map)
    lines = {name: [] for name in file_names.values()}
    for image, label, confidence, (x_min, y_min, x_max, y_max) in rows:
        box = f"{x_min + 1:.9g} {y_min + 1:.9g} {x_max:.9g} {y_max:.9g}"
        lines[file_names[label]].append(f"{image_names[image]} {confidence:.9g} {box}\n")
    return {name: "".join(of_class) for name, of_class in lines.items()}


def read_voc_detections(folder, image_names, label_map):
    """Read detections from a folder in Pascal VOC's format.

    Returns three lists with a tensor for each of `image_names`: boxes (n, 4) float64, boundary form, in
    continuous pixels, labels (n,) and scores (n,) float64. In an image they keep the order of the lines.
    Raises FileNotFoundError or ValueError, naming file and line, for what is missing or not a detection.
    """
    images = number_voc_names(image_names)
    paths = {label: Path(folder, name) for label, name in voc_file_names(label_map).items()}
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a class without detections has an empty one")
    rows = []
    for label, path in paths.items():
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    name, *numbers = line.rsplit(maxsplit=5)  # a name may have spaces
                    confidence, x_min, y_min, x_max, y_max = [float(value) for value in numbers]
                    image = images[name.strip()]
                    rows.append(make_row(image, label, confidence, x_min - 1, y_min - 1, x_max, y_max))
                except (KeyError, ValueError):
                    raise ValueError(describe_fault(f"{path}, line {number}", line, VOC_FORM)) from None
    return split_by_image(rows, len(images))


def make_row(*values):
    """A detection as (image, label, score, x_min, y_min, x_max, y_max); ValueError if a number is not finite."""
    if not all(math.isfinite(value) for value in values):
        raise ValueError("not finite")
    return values


def describe_fault(place, entry, form):
    return f"{place}: '{printable(entry)}' is not {form} with finite numbers, an image and a class of the lists"


def split_by_image(rows, n_images):
    """Boxes, labels and scores, lists with a tensor an image, from rows as `make_row()` returns them."""
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 7)
    table = table[table[:, 0].argsort(stable=True)]
    counts = table[:, 0].long().bincount(minlength=n_images).tolist()
    boxes = table[:, 3:].split(counts)
    labels = table[:, 1].long().split(counts)
    scores = table[:, 2].split(counts)
    return list(boxes), list(labels), list(scores)


def number_voc_names(image_names):
    """A dict of image name to number; ValueError for names that files in VOC's format cannot hold."""
    images = {}
    for number, name in enumerate(image_names):
        is_bad = re.search(r"^\s|\s$|[\n\r\ud800-\udc7f\udd00-\udfff]", name)
        if is_bad or name in images:
            problem = "two images are" if name in images else "an image is"
            raise ValueError(
                f"{problem} named '{printable(name)}', which files in VOC's format cannot hold; a .json file can"
            )
        images[name] = number
    return images


def voc_file_names(label_map):
    """A dict of label to the name of the class's file."""
    file_names = {}
    for name, label in label_map.items():
        if label > 0:
            # What no file name can have becomes %2F and the like.
            safe_name = re.sub(r"[%/\\\0\ud800-\udfff]", lambda found: f"%{ord(found[0]):02X}", name)
            file_names[label] = f"comp4_det_test_{safe_name}.txt"
    return file_names


def coco_image_ids(dataset):
    """The id of each image: COCO's, or else 1, 2, ..."""
    return dataset.image_ids or range(1, len(dataset) + 1)


def read_category_ids(dataset):
    """A dict of label to category id: COCO's, or else the label."""
    path = dataset.data_folder / "category_ids.json"
    ids_by_name = utils.read_json(path, dict) if path.exists() else {}
    if any(isinstance(value, dict) for value in ids_by_name.values()):  # by split; not so in lists of earlier versions
        ids_by_name = ids_by_name.get(dataset.split)
    ids_by_name = ids_by_name or dataset.label_map  # an empty file: a data set that is not COCO's
    category_ids = {label: ids_by_name.get(name) for name, label in dataset.label_map.items() if label > 0}
    if None in category_ids.values() or len(set(category_ids.values())) < len(category_ids):
        raise ValueError(f"{path}: two classes have one of COCO's ids, or a class has none")
    return category_ids


if __name__ == "__main__":
    given = utils.override_parameters(globals(), sys.argv[1:])
    with utils.exit_with_message():
        main(given)
