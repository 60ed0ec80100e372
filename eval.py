"""Evaluate SSD300 on the TEST lists: average precision by class, their mean (VOC07 mAP), images a second.

    python eval.py
    python eval.py --checkpoint=best_checkpoint_ssd300.pth.tar --write_detections_to=detections
    python eval.py --read_detections_from=detections            score such files, of any detector: no model

Reads the TEST lists in `data_folder`, and a checkpoint or detections in Pascal VOC's text format.
Any parameter below can be overridden on the command line with --name=value.
"""

import itertools
import math
import os
import re
import sys
import time

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import PascalVOCDataset
from model import fastest_memory_format, load_model
from utils import exit_with_message, make_label_map, override_parameters, voc_labels

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
        images = model.normalize(images).contiguous(memory_format=fastest_memory_format(device, model.network))
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


# ----------------------------------------------------------------------------------------------
# The VOC metric
# ----------------------------------------------------------------------------------------------

COCO_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))  # 0.5, 0.55, ... 0.95
# As in the Python ports of the development kit: 3, 6 and 7 tenths come out a little above 0.3, 0.6 and 0.7, so
# that a recall of just 3/10 does not reach the fourth point. (On real detections this can cost 0.001.)
RECALL_POINTS = tuple(0.1 * i for i in range(11))


def calculate_mAP(
    det_boxes,
    det_labels,
    det_scores,
    true_boxes,
    true_labels,
    true_difficulties,
    label_map=None,
    threshold=0.5,
    metric="11 points",
):
    """Average precision of each class, and their mean, as Pascal VOC's development kit computes them.

    A detection is compared with the object of its class and image that it overlaps most. If they overlap by
    the threshold or more it has found the object, unless a better-scored detection had found it already:
    then it is false, as are all others. A difficult object neither helps nor hurts, nor do its detections.
    Detections of equal scores count in their order.

    det_boxes, det_labels, det_scores: lists with a tensor an image: (n, 4) float, boundary form, fractional
        or in pixels, (n,) int64 and (n,) float; on any device; n may be 0.
    true_boxes, true_labels, true_difficulties: the same for the objects, in the same unit; the last is 1 or
        True for a difficult object.
    label_map: dict of name to label; None takes Pascal VOC's.
    threshold: an overlap, or several, such as COCO_THRESHOLDS, over which the precisions are averaged.
    metric: "11 points": the mean of the highest precisions at a recall of 0, 0.1, ... 1 or more (VOC2007);
        "area": the area under the precision-recall curve, made monotonic (VOC2010 and later).
    Returns a dict of class name to average precision, NaN for a class without an object that is not difficult,
    and the mean over the other classes (NaN if there is none).
    Raises ValueError if lists differ in length, a label is not in the label map, or the metric is unknown.
    Source: Everingham et al. 2010, section 4.2; VOCevaldet.m of the development kits of 2007 and 2012.
    """
    if metric not in ("11 points", "area"):
        raise ValueError(f'metric is {metric!r}; it is "11 points" or "area"')
    label_map = label_map or make_label_map(voc_labels)
    if len(det_boxes) != len(true_boxes):
        raise ValueError(f"{len(det_boxes)} images with detections, but {len(true_boxes)} with objects")
    n_labels = max(label_map.values()) + 1
    det_image, det_boxes, det_labels, det_scores = _flatten(n_labels, det_boxes, det_labels, det_scores)
    true_image, true_boxes, true_labels, is_difficult = _flatten(n_labels, true_boxes, true_labels, true_difficulties)
    if np.isnan(det_scores).any():
        raise ValueError("a detection's score is not a number")
    is_difficult = is_difficult.astype(bool)
    n_easy = np.bincount(true_labels[~is_difficult], minlength=n_labels)  # objects to find, by label

    det_group, true_group = det_image * n_labels + det_labels, true_image * n_labels + true_labels
    best_object, best_overlap = _find_best_objects(det_boxes, det_group, true_boxes, true_group)
    order = _order_by_class_and_score(det_labels, det_scores)
    best_object, best_overlap = best_object[order], best_overlap[order]
    class_starts = np.append(0, np.bincount(det_labels, minlength=n_labels).cumsum())  # in this order

    precisions = np.full((n_labels, np.size(threshold)), np.nan)
    for column, overlap in enumerate(np.atleast_1d(threshold)):
        is_true, is_false = _judge(best_object, best_overlap >= overlap, is_difficult)
        for label in np.flatnonzero(n_easy[1:]) + 1:
            these = slice(class_starts[label], class_starts[label + 1])
            found, wrong = np.cumsum(is_true[these]), np.cumsum(is_false[these])
            precisions[label, column] = _average_precision(found, wrong, n_easy[label], metric)
    precisions = precisions.mean(axis=1)
    average_precisions = {name: float(precisions[label]) for name, label in label_map.items() if label > 0}
    counted = [value for value in average_precisions.values() if not math.isnan(value)]
    return average_precisions, sum(counted) / len(counted) if counted else math.nan


def _flatten(n_labels, boxes, labels, values):
    """Lists with a tensor an image as four arrays: image (n,), boxes (n, 4), labels (n,) and values (n,).

    Boxes and values come out as float64, the others as int64.
    """
    counts = list(map(torch.Tensor.numel, labels))  # numel() is several times as fast as len()
    if [n // 4 for n in map(torch.Tensor.numel, boxes)] != counts or list(map(torch.Tensor.numel, values)) != counts:
        raise ValueError("boxes, labels, and scores or difficulties differ in number in at least one image")
    if sum(counts) == 0:
        return np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0)
    boxes, labels, values = (torch.cat(list(parts)).cpu() for parts in (boxes, labels, values))
    if not (labels.min() > 0 and labels.max() < n_labels):
        unknown = labels[(labels <= 0) | (labels >= n_labels)][0]
        raise ValueError(f"the label {unknown} is not in the label map, which has 1 to {n_labels - 1}")
    images = np.repeat(np.arange(len(counts)), counts)
    return images, boxes.double().numpy(), labels.long().numpy(), values.double().numpy()


def _order_by_class_and_score(labels, scores):
    """Order (n,) of detections by class, then by falling score; equal ones stay as they were.

    labels: (n,) int64. scores: (n,) float64, none of them NaN.
    """
    # The bits of a float, read as an integer, order as the float does (for negative ones the other way
    # round), and integers are sorted several times as fast.
    bits = (scores + 0.0).view(np.int64)  # + 0.0 turns -0 into 0
    bits = np.where(bits < 0, bits ^ np.iinfo(np.int64).max, bits)
    by_score = torch.from_numpy(~bits).sort(stable=True).indices
    by_class = torch.from_numpy(labels)[by_score].sort(stable=True).indices
    return by_score[by_class].numpy()


def _find_best_objects(det_boxes, det_group, true_boxes, true_group):
    """For each detection the object that it overlaps most, of those in its group (its image and class).

    det_boxes (D, 4), true_boxes (T, 4): boundary form. det_group (D,), true_group (T,): ints from 0.
    Returns its index (D,), the first one of equals, and the overlap (D,); -1 and 0 if the group has none.
    """
    best_object, best_overlap = np.full(len(det_group), -1), np.zeros(len(det_group))
    by_group = np.argsort(true_group, kind="stable")  # objects, group by group
    group_counts = np.bincount(true_group, minlength=det_group.max(initial=0) + 1)
    group_starts = np.cumsum(group_counts) - group_counts
    with_objects = np.flatnonzero(group_counts[det_group])  # detections
    if len(with_objects) == 0:
        return best_object, best_overlap

    # All pairs of a detection and an object of its group, one detection after the other.
    groups = det_group[with_objects]
    counts = group_counts[groups]
    first_pair = np.cumsum(counts) - counts  # where the pairs of a detection begin
    pair_object = by_group[np.arange(counts.sum()) + np.repeat(group_starts[groups] - first_pair, counts)]
    overlaps = _pairwise_overlap(det_boxes, true_boxes, np.repeat(with_objects, counts), pair_object)
    highest = np.maximum.reduceat(overlaps, first_pair)
    is_highest = np.flatnonzero(overlaps == np.repeat(highest, counts))
    best_pair = is_highest[np.searchsorted(is_highest, first_pair)]  # the first one of each detection
    best_object[with_objects], best_overlap[with_objects] = pair_object[best_pair], highest
    return best_object, best_overlap


def _pairwise_overlap(boxes_1, boxes_2, index_1, index_2):
    """Overlaps (n,) of pairs of boxes: (n1, 4) and (n2, 4) float64, boundary form; the indices (n,) of each pair."""
    x_min_1, y_min_1, x_max_1, y_max_1 = (column[index_1] for column in boxes_1.T)
    x_min_2, y_min_2, x_max_2, y_max_2 = (column[index_2] for column in boxes_2.T)
    widths = np.minimum(x_max_1, x_max_2) - np.maximum(x_min_1, x_min_2)
    heights = np.minimum(y_max_1, y_max_2) - np.maximum(y_min_1, y_min_2)
    intersection = np.maximum(widths, 0) * np.maximum(heights, 0)
    union = (x_max_1 - x_min_1) * (y_max_1 - y_min_1) + (x_max_2 - x_min_2) * (y_max_2 - y_min_2) - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)


def _judge(best_object, is_near, is_difficult):
    """Which detections, in falling order of score, are true and which are false; those of difficult objects
    are neither. best_object (D,): index of an object; is_near (D,): whether it is overlapped enough.
    """
    candidates = np.flatnonzero(is_near & (best_object >= 0))
    finder = np.full(len(is_difficult), -1)  # of each object: the detection that finds it
    finder[best_object[candidates[::-1]]] = candidates[::-1]  # the last one written, the best-scored one, stays
    is_true = np.zeros(len(best_object), bool)
    is_true[finder[~is_difficult & (finder >= 0)]] = True
    is_ignored = np.zeros(len(best_object), bool)
    is_ignored[candidates] = is_difficult[best_object[candidates]]
    return is_true, ~is_true & ~is_ignored


def _average_precision(found, wrong, n_objects, metric):
    """Average precision from the running numbers of true and false detections, (n,) each, by falling score."""
    judged = found + wrong
    recall = found / n_objects
    precision = np.divide(found, judged, out=np.zeros(len(found)), where=judged > 0)
    highest_from = np.maximum.accumulate(precision[::-1])[::-1]  # the highest precision at this recall or more
    if metric == "11 points":
        first = np.searchsorted(recall, RECALL_POINTS)  # where the recall reaches them
        return np.append(highest_from, 0.0)[first].sum() / 11
    return float(np.sum(np.diff(recall, prepend=0.0) * highest_from))


def write_voc_detections(folder, image_names, boxes, labels, scores, label_map):
    """Write detections as Pascal VOC's development kit reads them: a file comp4_det_test_<class>.txt a class.

    A line is `image score x_min y_min x_max y_max`, in pixels that count from 1 and include both ends.

    folder: made where it is missing. image_names: list of N names, without extension.
    boxes, labels, scores: lists of N tensors as `calculate_mAP()` takes them; boxes in pixels.
    label_map: dict of name to label. A class without detections gets an empty file.
    Raises ValueError if two images have one name.
    """
    check_image_names(image_names)
    os.makedirs(folder, exist_ok=True)
    lines = {label: [] for label in label_map.values()}
    for name, *detections in zip(image_names, boxes, labels, scores, strict=True):
        for (x_min, y_min, x_max, y_max), label, score in zip(*(part.tolist() for part in detections), strict=True):
            lines[label].append(f"{name} {score:.9g} {x_min + 1:.9g} {y_min + 1:.9g} {x_max:.9g} {y_max:.9g}\n")
    for class_name, label in label_map.items():
        if label > 0:
            with open(_voc_detections_path(folder, class_name), "w", encoding="utf-8") as file:
                file.writelines(lines[label])


def read_voc_detections(folder, image_names, label_map):
    """Read detections, of any detector, from files in Pascal VOC's format: see `write_voc_detections()`.

    Returns three lists with a tensor for each of `image_names`: boxes (n, 4) float64, boundary form, in
    continuous pixels, labels (n,) int64 and scores (n,) float64. In an image they keep the order of the lines.
    (`calculate_mAP()` then ranks equal scores by image first, the development kit by line alone; the two differ
    only where a file is not in the order of the images.)
    Raises FileNotFoundError, naming it, if a class has no file; ValueError, naming file and line, if a line
    is no detection, or its image is not in `image_names`, or naming the image, if two have one name.
    """
    check_image_names(image_names)
    index_of = {name: index for index, name in enumerate(image_names)}
    rows = []  # arrays (n, 7): image, label, score, box
    for class_name, label in label_map.items():
        if label > 0:
            rows.append(_read_class_detections(_voc_detections_path(folder, class_name), label, index_of))
    rows = np.concatenate(rows)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    counts = np.bincount(rows[:, 0].astype(np.int64), minlength=len(image_names))
    columns = rows[:, 3:], rows[:, 1].astype(np.int64), rows[:, 2]
    return tuple(list(torch.from_numpy(part.copy()).split(counts.tolist())) for part in columns)


def _voc_detections_path(folder, class_name):
    """The file of a class, by the name that the development kit expects; what no file name can have, as %2F."""
    safe_name = re.sub(r"[%/\\\0]", lambda character: f"%{ord(character[0]):02X}", class_name)
    return os.path.join(folder, f"comp4_det_test_{safe_name}.txt")


def check_image_names(image_names):
    """Refuse two images of one name, from two folders, which Pascal VOC's format cannot tell apart."""
    if len(set(image_names)) < len(image_names):
        seen = set()
        name = next(name for name in image_names if name in seen or seen.add(name))
        raise ValueError(f"two images are named {name!r}: files of detections in VOC's format cannot tell them apart")


def _read_class_detections(path, label, index_of):
    """The detections of one file as an (n, 7) float64 array: image, label, score, box in continuous pixels."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; a class without detections has an empty one")
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        lines = [line.rsplit(maxsplit=5) for line in file]  # a name may have spaces
    while lines and not lines[-1]:
        lines.pop()
    rows = np.empty((len(lines), 7))
    for i, fields in enumerate(lines):
        try:
            name, *numbers = fields
            rows[i] = index_of[name.strip()], label, *map(float, numbers)
        except KeyError:
            raise ValueError(f"{path}, line {i + 1}: the image {fields[0]!r} is not in the TEST lists") from None
        except ValueError:
            line = " ".join(fields)[:100]
            raise ValueError(f"{path}, line {i + 1}: {line!r} is no `image score x_min y_min x_max y_max`") from None
    if not np.isfinite(rows).all():
        line = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0]) + 1
        raise ValueError(f"{path}, line {line}: a number is not finite")
    rows[:, 3:5] -= 1  # pixels that count from 1 -> continuous coordinates
    return rows


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    with exit_with_message():
        main()
