"""Evaluate a network on the TEST lists: the average precision of each class, their mean, images a second.

    python eval.py
    python eval.py --metric=coco --write_detections_to=found.json
    python eval.py --read_detections_from=found.json            score the detections of any detector: no network

Reads the TEST lists in `data_folder`, and a checkpoint or detections. Detections are a folder of Pascal VOC's text
files, or one .json file in the format of COCO's results; what was read in one can be written in the other.
Any parameter below can be overridden on the command line with --name=value.
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
from model import load_model
from utils import find_paired_overlap, printable

# Data
data_folder = "data"  # where create_data_lists.py wrote its lists
checkpoint = "checkpoint_ssd300.pth.tar"
read_detections_from = ""  # a folder of comp4_det_test_<class>.txt, or a .json file, to score; "": use the network
write_detections_to = ""  # a folder, or a file that ends in .json, that gets the detections; "": not written

# Detection: what the paper evaluates with
min_score = 0.01  # lower scores are no detections
max_overlap = 0.45  # of two boxes of a class that overlap more than this, the better one stays
top_k = 200  # detections kept in an image, of all classes together
max_candidates = 0  # best boxes of a class that enter suppression; 0: all. (The Caffe code takes 400.)

# Metric
metric = "11 points"  # VOC2007's; "area": that of VOC2010 and later; "coco": COCO's twelve numbers, by pycocotools
min_overlap = 0.5  # overlap from which a detection finds an object; "coco" takes 0.50, 0.55, ... 0.95

# Speed
batch_size = 32  # images at a time; less needs less memory
workers = 4  # processes that read images; 0: this process itself
bf16 = False  # bfloat16 autocast: faster on a GPU, detections differ in the third digit


def main():
    check_parameters()
    if read_detections_from:
        dataset = PascalVOCDataset(data_folder, "TEST", keep_difficult=True)
        verb, find = "read", lambda: read_detections(read_detections_from, dataset)
    else:
        model = load_model(checkpoint, "cuda" if torch.cuda.is_available() else "cpu")
        test_loader = make_test_loader(data_folder, batch_size, workers, model)
        dataset = test_loader.dataset
        verb, find = "detected", lambda: detect_all(test_loader, model)
    if write_detections_to:
        write_detections(write_detections_to, dataset)  # a trial: errors now, not after the detection of all images
    start = time.perf_counter()
    detections = find()
    seconds = time.perf_counter() - start
    if write_detections_to:
        write_detections(write_detections_to, dataset, detections)
        print(f"detections written to {printable(write_detections_to)}")
    print_table(*score(detections, dataset))
    overlaps = "overlaps from 0.50 to 0.95" if metric == "coco" else f"overlap {min_overlap:g} or more"
    if metric == "coco" and dataset.image_ids is None:
        overlaps += ", difficult objects as crowds"
    rate = f"{len(dataset)} images {verb} in {seconds:.1f} s, {len(dataset) / seconds:.1f} a second"
    print(f"{metric}, {overlaps}; {rate}")


def check_parameters():
    """Refuse now what would be an error after the detection of all images."""
    if metric not in ("11 points", "area", "coco"):
        raise ValueError(f'metric is "{printable(metric)}"; it is "11 points", "area" or "coco"')
    if metric == "coco" and importlib.util.find_spec("pycocotools") is None:
        raise ValueError('the metric "coco" is computed by pycocotools, which is missing: pip install pycocotools')
    if not 0 < min_overlap <= 1:
        raise ValueError(f"min_overlap is {min_overlap}; it is more than 0, and 1 at most")


def evaluate(test_loader, model):
    """Average precision of a model on the TEST lists, with the parameters at the top of this file.

    test_loader: from `make_test_loader()`. model: an SSD300 with a label map, on any device; left in evaluation mode.
    Returns a dict of class name to average precision (NaN without an object to find), and the mean (COCO: the AP).
    """
    average_precisions, summary = score(detect_all(test_loader, model), test_loader.dataset)
    return average_precisions, next(iter(summary.values()))


def make_test_loader(data_folder, batch_size, workers, model, skip_corrupt=False):
    """Read the TEST lists in order, with difficult objects, the images as the model wants them."""
    as_model_wants = {"size": model.input_size, "antialias": model.antialias}
    dataset = PascalVOCDataset(data_folder, "TEST", keep_difficult=True, skip_corrupt=skip_corrupt, **as_model_wants)
    pin_memory = model.mean.device.type == "cuda"
    return DataLoader(dataset, batch_size, collate_fn=dataset.collate_fn, num_workers=workers, pin_memory=pin_memory)


@torch.inference_mode()
def detect_all(test_loader, model):
    """Detect the objects in all images of a loader.

    Returns three lists with an entry an image: boxes (n, 4) float32, boundary form, in pixels of the original
    image, labels (n,) and scores (n,); on the CPU. Raises ValueError if the model's classes are not the data set's.
    """
    dataset, device = test_loader.dataset, model.mean.device
    if model.label_map != dataset.label_map:
        known, wanted = (f"{len(x)} labels ({printable(', '.join(x))})" for x in (model.label_map, dataset.label_map))
        raise ValueError(f"the model knows {known}, the data set has {wanted}: evaluate on the model's classes")
    memory_format = utils.fastest_memory_format(device, model)
    model.eval()
    detections = [], [], []  # boxes, labels, scores
    for images, *_ in tqdm(test_loader, unit="batch", leave=False):
        images = model.normalize(images).contiguous(memory_format=memory_format)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            predicted = model(images)  # locs, scores
        found = model.detect_objects(*predicted, min_score, max_overlap, top_k, max_candidates or None)
        counts = [len(scores) for scores in found[2]]
        for part, parts in zip(detections, found, strict=True):
            part += torch.cat(parts).cpu().split(counts)  # one copy a batch, not one an image
    scales = torch.from_numpy(dataset.sizes).repeat(1, 2)  # (n_images, 4): W, H, W, H
    return [boxes * scale for boxes, scale in zip(detections[0], scales, strict=True)], *detections[1:]


def score(detections, dataset):
    """Average precision of each class, and the numbers that sum it up, the mean first: two dicts of name to number."""
    if metric == "coco":
        return calculate_coco(*detections, dataset)
    counts = np.diff(dataset.starts).tolist()
    objects = (part.split(counts) for part in (dataset.boxes_xy_pixels, dataset.labels, dataset.difficulties))
    average_precisions, mean = calculate_mAP(*detections, *objects, dataset.label_map, min_overlap, metric)
    return average_precisions, {"mean": mean}


def print_table(average_precisions, summary):
    """Print the average precision of each class, and the numbers that sum it up."""
    rows = [(printable(name, 40), value) for name, value in [*average_precisions.items(), *summary.items()]]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {'no object to find' if math.isnan(value) else f'{value:.4f}'}")


# --- The metrics of Pascal VOC and COCO -----------------------------------------------------------

# As in the Python ports of the development kit: 3, 6 and 7 tenths come out a little above 0.3, 0.6 and 0.7, so
# that a recall of just 3/10 does not reach the fourth point.
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
    Raises ValueError if lists differ in length, a label is not in the label map, or the metric is unknown.
    Source: Everingham et al. 2010, section 4.2; VOCevaldet.m of the development kits of 2007 and 2012.
    """
    if metric not in ("11 points", "area"):
        raise ValueError(f'metric is {metric!r}; it is "11 points" or "area"')
    if len(det_boxes) != len(true_boxes):
        raise ValueError(f"{len(det_boxes)} images with detections, but {len(true_boxes)} with objects")
    label_map = label_map or utils.make_label_map(utils.voc_labels)
    n_labels = max(label_map.values()) + 1
    det_groups, det_boxes, det_labels, det_scores = _concatenate(n_labels, det_boxes, det_labels, det_scores)
    groups, true_boxes, true_labels, difficulties = _concatenate(n_labels, true_boxes, true_labels, true_difficulties)
    if np.isnan(det_scores).any():
        raise ValueError("a detection's score is not a number")
    is_easy = difficulties == 0
    n_easy = np.bincount(true_labels[is_easy], minlength=n_labels)  # objects to find, by label

    best_objects, overlaps = _find_best_objects(det_boxes, det_groups, true_boxes, groups)
    best_objects[overlaps < min_overlap] = -1
    order = np.lexsort((-det_scores, det_labels))  # by class, then by falling score; equal ones stay as they were
    by_label = np.split(best_objects[order], np.bincount(det_labels, minlength=n_labels).cumsum())
    average_precisions = {
        name: _average_precision(by_label[label], is_easy, n_easy[label], metric)
        for name, label in label_map.items()
        if label > 0
    }
    counted = [value for value in average_precisions.values() if not math.isnan(value)]
    return average_precisions, sum(counted) / len(counted) if counted else math.nan


def _concatenate(n_labels, boxes, labels, values):
    """Lists with a tensor an image as groups (n,), image * n_labels + label, boxes (n, 4), labels (n,), values (n,)."""
    counts = [part.numel() for part in labels]  # numel() is several times as fast as len()
    if [part.numel() // 4 for part in boxes] != counts or [part.numel() for part in values] != counts:
        raise ValueError("boxes, labels, and scores or difficulties differ in number in at least one image")
    if not counts:
        return np.zeros(0, np.int64), torch.zeros(0, 4), np.zeros(0, np.int64), np.zeros(0)
    boxes, labels, values = (torch.cat(list(parts)).cpu() for parts in (boxes, labels, values))
    unknown = labels[(labels <= 0) | (labels >= n_labels)]
    if len(unknown):
        raise ValueError(f"the label {unknown[0]} is not in the label map, which has 1 to {n_labels - 1}")
    labels = labels.long().numpy()
    groups = np.repeat(np.arange(len(counts)), counts) * n_labels + labels
    return groups, boxes.double(), labels, values.double().numpy()


def _find_best_objects(det_boxes, det_groups, true_boxes, groups):
    """For each detection the first object of its group that it overlaps most, -1 for none, and that overlap: (D,)."""
    best_objects, best_overlaps = np.full(len(det_groups), -1), np.zeros(len(det_groups))
    by_group = np.argsort(groups, kind="stable")  # objects, group by group
    counts = np.bincount(groups, minlength=det_groups.max(initial=0) + 1)
    first, count = (counts.cumsum() - counts)[det_groups], counts[det_groups]  # (D,): a group's place, and its size
    for i in range(count.max(initial=0)):  # the first object of each group, then the second, ...
        here = np.flatnonzero(count > i)
        objects = by_group[first[here] + i]
        overlaps = find_paired_overlap(det_boxes[here], true_boxes[objects]).numpy()
        is_better = overlaps > best_overlaps[here]
        best_objects[here[is_better]] = objects[is_better]
        best_overlaps[here[is_better]] = overlaps[is_better]
    return best_objects, best_overlaps


def _average_precision(objects, is_easy, n_easy, metric):
    """Average precision of one class. objects: what each detection, by falling score, is near to; -1: none."""
    if n_easy == 0:
        return math.nan
    # Those near a difficult object do not count. Of those near an easy one the first, the best-scored, is true.
    objects = objects[(objects < 0) | is_easy[objects]]
    near, firsts = np.unique(objects, return_index=True)
    is_true = np.zeros(len(objects), bool)
    is_true[firsts[near >= 0]] = True

    found = is_true.cumsum()
    recall, precision = found / n_easy, found / np.arange(1, len(found) + 1)
    highest_from = np.maximum.accumulate(precision[::-1])[::-1]  # the highest precision at this recall or more
    if metric == "11 points":
        first = np.searchsorted(recall, RECALL_POINTS)  # where the recall reaches them
        return float(np.append(highest_from, 0.0)[first].sum() / 11)
    return float(np.sum(np.diff(recall, prepend=0.0) * highest_from))


COCO_NUMBERS = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
COCO_NUMBERS += ("AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large")


def calculate_coco(det_boxes, det_labels, det_scores, dataset):
    """COCO's average precision of each class and its twelve numbers, by pycocotools, the reference itself.

    AP is the mean over 101 points of recall and the overlaps 0.50, 0.55, ... 0.95; AR the recall with at most 1, 10
    or 100 detections of a class in an image (AP takes 100). Small are objects up to 32 x 32 pixels of the original
    image, large from 96 x 96, by COCO's `area` or else the box's. Difficult objects are ignored as COCO's crowds are.

    det_boxes, det_labels, det_scores: as from `detect_all()`. dataset: a `PascalVOCDataset` with difficult objects.
    Returns a dict of class name to average precision, and one of COCO_NUMBERS; NaN where there is no object.
    """
    from pycocotools.coco import COCO  # only who wants these numbers needs it
    from pycocotools.cocoeval import COCOeval

    # pycocotools ranks equal scores by the ids of the images: these have the same order as those of the file.
    image_ids = np.argsort(np.argsort(dataset.image_ids or range(len(dataset)), kind="stable"))

    def index(boxes_xy, labels, counts, **columns):
        """Objects or detections of all images, `counts` in each, as pycocotools takes them."""
        corners, sides = boxes_xy[:, :2].double(), boxes_xy[:, 2:].double() - boxes_xy[:, :2].double()
        columns = {"area": sides.prod(dim=1), "bbox": torch.cat([corners, sides], dim=1), **columns}
        columns |= {"image_id": image_ids.repeat(counts), "id": np.arange(1, len(labels) + 1), "category_id": labels}
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        coco = COCO()
        coco.dataset = {"annotations": [dict(zip(columns, row, strict=True)) for row in rows]}
        coco.dataset["images"] = [{"id": image_id} for image_id in image_ids.tolist()]
        coco.dataset["categories"] = [{"id": label} for label in range(1, len(dataset.label_map))]
        coco.createIndex()
        return coco

    objects = {"iscrowd": dataset.difficulties} | ({} if dataset.areas is None else {"area": dataset.areas})
    boxes, labels, scores = (torch.cat(list(parts)) for parts in (det_boxes, det_labels, det_scores))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        truth = index(dataset.boxes_xy_pixels, dataset.labels, np.diff(dataset.starts), **objects)
        evaluation = COCOeval(truth, index(boxes, labels, list(map(len, det_labels)), score=scores), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # (overlaps, recalls, classes, areas, numbers of detections); all -1 for a class without objects
    by_class = evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))
    by_class, twelve = (np.where(values < 0, np.nan, values).tolist() for values in (by_class, evaluation.stats))
    return dict(zip(list(dataset.label_map)[1:], by_class, strict=True)), dict(zip(COCO_NUMBERS, twelve, strict=True))


# --- Files of detections: COCO's where the name ends in .json, else a folder with Pascal VOC's ----


def write_detections(path, dataset, detections=None):
    """Write detections, three lists as from `detect_all()`, all files or none; None only tries whether it can be done.

    A .json file gets the format of COCO's results: a list of {"image_id", "category_id", "bbox", "score"}. In a folder
    each class gets a file comp4_det_test_<class>.txt, as Pascal VOC's development kit reads it: lines of `image score
    x_min y_min x_max y_max`, in pixels that count from 1 and include both ends.
    Raises OSError, naming the path; ValueError for names or ids that the format cannot hold.
    """
    path, is_coco = Path(path), str(path).endswith(".json")
    images, classes = coco_ids(dataset) if is_coco else voc_names(dataset.image_names(), dataset.label_map)
    files = {path.name: []} if is_coco else {name: [] for name in classes.values()}
    for image, *found in zip(images, *detections, strict=True) if detections else ():
        for (x_min, y_min, x_max, y_max), label, score in zip(*(part.tolist() for part in found), strict=True):
            if is_coco:
                bbox = [x_min, y_min, x_max - x_min, y_max - y_min]
                entry = {"image_id": image, "category_id": classes[label], "bbox": bbox, "score": score}
                files[path.name].append(json.dumps(entry))
            else:
                line = f"{image} {score:.9g} {x_min + 1:.9g} {y_min + 1:.9g} {x_max:.9g} {y_max:.9g}\n"
                files[classes[label]].append(line)
    begin, between, end = ("[", ",\n", "]\n") if is_coco else ("", "", "")
    texts = {name: begin + between.join(lines) + end for name, lines in files.items()}
    utils.write_files(path.parent if is_coco else path, texts, trial=detections is None)


def read_detections(path, dataset):
    """Read the detections of any detector, from a .json file or a folder: see `read_voc_detections()`."""
    if not str(path).endswith(".json"):
        return read_voc_detections(path, dataset.image_names(), dataset.label_map)
    images, classes = coco_ids(dataset)
    label_of = {category_id: label for label, category_id in classes.items()}

    def parse(entry, _):
        x, y, width, height = map(float, entry["bbox"])
        image, label = images[entry["image_id"]], label_of[entry["category_id"]]
        return image, label, float(entry["score"]), x, y, x + width, y + height

    form = '{"image_id": ..., "category_id": ..., "bbox": [x, y, width, height], "score": ...}'
    entries = (((path, f"entry {number}"), entry) for number, entry in enumerate(utils.read_json(path, list), start=1))
    return _parse(entries, parse, form, len(images))


def read_voc_detections(folder, image_names, label_map):
    """Read detections from a folder in Pascal VOC's format.

    Returns three lists with a tensor for each of `image_names`: boxes (n, 4) float64, boundary form, in
    continuous pixels, labels (n,) and scores (n,) float64. In an image they keep the order of the lines.
    Raises FileNotFoundError or ValueError, naming file and line, for what is missing or not a detection.
    """
    images, classes = voc_names(image_names, label_map)
    paths = {Path(folder, name): label for label, name in classes.items()}

    def lines():  # one at a time: there may be a million
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file; a class without detections has an empty one")
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                yield from (((path, f"line {number}"), line) for number, line in enumerate(file, start=1))

    def parse(line, path):
        name, *numbers = line.rsplit(maxsplit=5)  # a name may have spaces
        score, x_min, y_min, x_max, y_max = map(float, numbers)
        return images[name.strip()], paths[path], score, x_min - 1, y_min - 1, x_max, y_max

    return _parse(lines(), parse, "`image score x_min y_min x_max y_max`", len(images))


def _parse(entries, parse, form, n_images):
    """Boxes, labels and scores, lists with a tensor an image, from (place, entry) pairs that should have this form."""
    rows = []
    for (path, place), entry in entries:
        try:
            rows.append(parse(entry, path))
            if not math.isfinite(sum(rows[-1])):
                raise ValueError("not finite")
        except (KeyError, OverflowError, TypeError, ValueError):
            form += " with finite numbers, an image and a class of the TEST lists"
            raise ValueError(f"{path}, {place}: '{printable(entry)}' is not {form}") from None
    rows = np.array(rows, dtype=np.float64).reshape(-1, 7)
    rows = torch.from_numpy(rows[np.argsort(rows[:, 0], kind="stable")])
    counts = rows[:, 0].long().bincount(minlength=n_images).tolist()
    return tuple(list(part.split(counts)) for part in (rows[:, 3:], rows[:, 1].long(), rows[:, 2]))


def voc_names(image_names, label_map):
    """A dict of image name to number, and one of label to file name; ValueError for images that VOC cannot name."""
    images = {}
    for number, name in enumerate(image_names):
        if name in images or re.search(r"^\s|\s$|[\n\r\ud800-\udc7f\udd00-\udfff]", name):
            problem = f"{'two images are' if name in images else 'an image is'} named '{printable(name)}'"
            raise ValueError(f"{problem}, which files in VOC's format cannot hold; a .json file can")
        images[name] = number
    unsafe = re.compile(r"[%/\\\0\ud800-\udfff]")  # what no file name can have becomes %2F
    safe_names = {label: unsafe.sub(lambda found: f"%{ord(found[0]):02X}", name) for name, label in label_map.items()}
    return images, {label: f"comp4_det_test_{name}.txt" for label, name in safe_names.items() if label > 0}


def coco_ids(dataset):
    """A dict of image id to number, and one of label to category id: COCO's, or else 1, 2, ... and the labels."""
    path = dataset.data_folder / "category_ids.json"
    category_ids = (utils.read_json(path, dict) if path.exists() else {}) or dataset.label_map
    classes = {label: category_ids.get(name) for name, label in dataset.label_map.items() if label > 0}
    if None in classes.values() or len(set(classes.values())) < len(classes):
        raise ValueError(f"{path}: two classes have one of COCO's ids, or a class has none")
    images = dataset.image_ids or range(1, len(dataset) + 1)
    return {image_id: number for number, image_id in enumerate(images)}, classes


if __name__ == "__main__":
    utils.override_parameters(globals(), sys.argv[1:])
    with utils.exit_with_message():
        main()
