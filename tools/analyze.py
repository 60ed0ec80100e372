"""Show how a training run went, and what a detector gets wrong.

    python tools/analyze.py --checkpoint=checkpoint_ssd300.pth.tar --log_file=checkpoint_ssd300.csv
    python tools/analyze.py --read_detections_from=found.json     the detections of any detector: no network is run
    python tools/analyze.py --log_file=checkpoint_ssd300.csv      the log alone: no data lists are read

Reads the log of train.py, the lists of `split` in `data_folder`, and a checkpoint or detections (eval.py writes them,
and says in which formats). Writes into `output_folder`:

    loss.png              losses, learning rate and average precisions over the iterations, from the log
    precision_recall.png  the curve of each class
    errors.png            what the detections of each class are, and how many of its objects are missed
    sizes.png             recall and average precision by the size of the objects, and by their aspect ratio
    worst.jpg             the most confident false detections and the largest missed objects, each with the reason
    summary.csv           the counts behind errors.png, a row a class

Images are needed for worst.jpg alone; without them it is left out. Needs matplotlib.
Any parameter below can be overridden on the command line with --name=value.

What a detection is. The first line that is true of it decides:

    "right", "ignored" or "duplicate": the object of its class that it overlaps most, it overlaps by 0.5 or more.
                    It is ignored if that object is difficult, right if no better-scored detection was right about that
                    object, and a duplicate else: the rule of Pascal VOC's metric, as in eval.py
    "localization"  it overlaps an object of its class by 0.1 or more
    "other_class"   it overlaps an object of another class by 0.5 or more
    "background"    neither

The kinds of errors are those of Hoiem et al., "Diagnosing Error in Object Detectors", 2012, and of Bolya et al.,
"TIDE: A General Toolbox for Identifying Object Detection Errors", 2020; here every detection has exactly one, and
similar classes are no kind of their own. An object is missed if no detection is right about it.

Shapes in comments: D detections and M objects, those of all images one after the other.
"""

import csv
import importlib.util
import io
import math
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils
from datasets import PascalVOCDataset, read_image
from eval import calculate_mAP, detect_all, make_test_loader, read_detections
from model import load_model
from utils import find_jaccard_overlap, printable

# Input
data_folder = "data"  # where create_data_lists.py wrote its lists
split = "TEST"  # or "VAL", "TRAIN"
checkpoint = ""  # a network to analyze; "": none
read_detections_from = ""  # or detections: a folder of comp4_det_test_<class>.txt, or a .json file; "": none
log_file = ""  # a log of train.py; "": none

# Output
output_folder = "analysis"
n_worst = 20  # false detections, and missed objects, on worst.jpg

# Metric
metric = "11 points"  # or "area": see eval.py
min_overlap = 0.5  # overlap from which a detection finds an object

# Detection by the network of `checkpoint`: as in eval.py
min_score = 0.01
max_overlap = 0.45
top_k = 200
batch_size = 32
workers = 4
skip_corrupt = False  # True: take images that are missing or damaged for blank ones, instead of stopping
device = ""  # such as "cpu"; "": the GPU, if there is one

ERRORS = ("localization", "other_class", "duplicate", "background")
KINDS = ("right", *ERRORS, "ignored")
MIN_LOCALIZATION_OVERLAP = 0.1  # Hoiem's and TIDE's: what overlaps an object less is not about it

# Hoiem's groups of the objects of a class, by their rank in size: the smallest 10%, the next 20%, 40%, 20%, 10%.
GROUP_LIMITS = (0.1, 0.3, 0.7, 0.9)
SIZE_GROUPS = ("XS", "S", "M", "L", "XL")  # extra small to extra large
ASPECT_GROUPS = ("XT", "T", "M", "W", "XW")  # extra tall to extra wide


def main():
    check_parameters()
    folder = Path(output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    if log_file:
        save_figure(draw_log(read_log(log_file)), folder / "loss.png")
    if not checkpoint and not read_detections_from:
        return
    dataset = PascalVOCDataset(data_folder, split, keep_difficult=True)
    detections = read_detections(read_detections_from, dataset) if read_detections_from else run_network()
    average_precisions = find_average_precisions(detections, dataset)
    verdicts = judge_detections(detections, dataset, min_overlap)
    rows = count_by_class(verdicts, dataset, average_precisions)
    write_summary(rows, folder / "summary.csv")
    save_figure(draw_precision_recall(verdicts, dataset, average_precisions), folder / "precision_recall.png")
    save_figure(draw_errors(verdicts, dataset, rows), folder / "errors.png")
    save_figure(draw_sizes(verdicts, dataset), folder / "sizes.png")
    write_worst(verdicts, dataset, folder / "worst.jpg")
    print_totals(rows)


def check_parameters():
    """Refuse now what would be an error after the detection of all images."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the pictures are drawn by matplotlib, which is missing: pip install matplotlib")
    if not checkpoint and not read_detections_from and not log_file:
        raise ValueError("nothing to analyze: give --checkpoint, --read_detections_from or --log_file")
    if checkpoint and read_detections_from:
        raise ValueError("--checkpoint and --read_detections_from are both given: the detections are of one of them")
    if metric not in ("11 points", "area"):
        raise ValueError(f'metric is "{printable(metric)}"; here it is "11 points" or "area"')
    if not MIN_LOCALIZATION_OVERLAP < min_overlap <= 1:
        raise ValueError(f"min_overlap is {min_overlap}; it is more than {MIN_LOCALIZATION_OVERLAP}, and 1 at most")
    if n_worst < 0:
        raise ValueError(f"n_worst is {n_worst}; it is 0 or more")


def run_network():
    """Detect the objects in all images of the split with the network of `checkpoint`: see eval.detect_all()."""
    model = load_model(checkpoint, utils.choose_device(device))
    loader = make_test_loader(data_folder, batch_size, workers, model, skip_corrupt, split)
    return detect_all(loader, model, min_score, max_overlap, top_k)


def find_average_precisions(detections, dataset):
    """The average precision of each class, by the metric itself: a dict of class name to number."""
    counts = np.diff(dataset.starts).tolist()  # objects of each image
    true_boxes = dataset.boxes_xy_pixels.split(counts)
    true_labels = dataset.labels.split(counts)
    true_difficulties = dataset.difficulties.split(counts)
    average_precisions, _ = calculate_mAP(
        *detections, true_boxes, true_labels, true_difficulties, dataset.label_map, min_overlap, metric
    )
    return average_precisions


# --- What each detection is -----------------------------------------------------------------------


class Verdicts(NamedTuple):
    """What each detection is, and which objects are found. Detections stand by falling score."""

    images: np.ndarray  # (D,) int64, the image that each detection is in
    boxes_xy_pixels: np.ndarray  # (D, 4) float64, boundary form
    labels: np.ndarray  # (D,) int64
    scores: np.ndarray  # (D,) float64
    kinds: np.ndarray  # (D,) strings out of KINDS
    objects: np.ndarray  # (D,) int64, the number of the object that the kind speaks of, -1 for background
    overlaps: np.ndarray  # (D,) float64, with that object
    is_found: np.ndarray  # (M,) bool


def judge_detections(detections, dataset, min_overlap=0.5):
    """Decide what each detection is, by the rules at the top of this file, and which objects are found.

    detections: three lists with a tensor an image, as from `eval.detect_all()`. dataset: a PascalVOCDataset with
    difficult objects. min_overlap: from which a detection finds an object. Returns Verdicts.
    """
    boxes_xy_pixels = torch.cat(list(detections[0])).double().numpy()  # (D, 4)
    labels = torch.cat(list(detections[1])).numpy()  # (D,)
    scores = torch.cat(list(detections[2])).double().numpy()  # (D,)
    images = np.repeat(np.arange(len(dataset)), [len(image_labels) for image_labels in detections[1]])  # (D,)
    own, own_overlaps, other, other_overlaps = find_nearest_objects(detections, dataset)  # (D,) each
    is_difficult = dataset.difficulties.numpy() != 0  # (M,)

    kinds = np.full(len(labels), "background", dtype="U12")
    objects = np.full(len(labels), -1)
    overlaps = np.zeros(len(labels))
    is_found = np.zeros(len(is_difficult), bool)
    order = np.argsort(-scores, kind="stable")  # equal scores keep their order, as in the metric
    for d in order:
        if own_overlaps[d] >= min_overlap:
            if is_difficult[own[d]]:
                kinds[d] = "ignored"
            elif is_found[own[d]]:
                kinds[d] = "duplicate"
            else:
                kinds[d] = "right"
                is_found[own[d]] = True
            objects[d] = own[d]
            overlaps[d] = own_overlaps[d]
        elif own_overlaps[d] >= MIN_LOCALIZATION_OVERLAP:
            kinds[d] = "localization"
            objects[d] = own[d]
            overlaps[d] = own_overlaps[d]
        elif other_overlaps[d] >= min_overlap:
            kinds[d] = "other_class"
            objects[d] = other[d]
            overlaps[d] = other_overlaps[d]
    return Verdicts(
        images=images[order], boxes_xy_pixels=boxes_xy_pixels[order], labels=labels[order], scores=scores[order],
        kinds=kinds[order], objects=objects[order], overlaps=overlaps[order], is_found=is_found,
    )  # fmt: skip


def find_nearest_objects(detections, dataset):
    """For each detection the object of its class that it overlaps most, and the one of any other class.

    Returns four arrays (D,): the number of the object of its class (the first of equals; without meaning where the
    overlap is 0) and the overlap with it, and the same two for other classes.
    """
    own, own_overlaps, other, other_overlaps = [], [], [], []
    for image, (boxes_xy, labels, _) in enumerate(zip(*detections, strict=True)):
        first = dataset.starts[image]
        last = dataset.starts[image + 1]
        objects_xy = dataset.boxes_xy_pixels[first:last]
        table = find_jaccard_overlap(boxes_xy.double(), objects_xy.double()).numpy()  # a row a detection of the image
        is_own_class = (labels[:, None] == dataset.labels[first:last]).numpy()  # the same shape
        columns, highest = find_highest(table, is_own_class)
        own.append(first + columns)
        own_overlaps.append(highest)
        columns, highest = find_highest(table, ~is_own_class)
        other.append(first + columns)
        other_overlaps.append(highest)
    return np.concatenate(own), np.concatenate(own_overlaps), np.concatenate(other), np.concatenate(other_overlaps)


def find_highest(table, is_candidate):
    """The column and the value of the highest candidate in each row of a table; 0 and 0 without a candidate."""
    n_rows, n_columns = table.shape
    if n_columns == 0:
        return np.zeros(n_rows, np.int64), np.zeros(n_rows)
    candidates = np.where(is_candidate, table, 0.0)
    return candidates.argmax(axis=1), candidates.max(axis=1)


def find_easy_objects(dataset, label):
    """The objects of a class that are to be found, those that are not difficult: (M,) bool."""
    return ((dataset.labels == label) & (dataset.difficulties == 0)).numpy()


def count_by_class(verdicts, dataset, average_precisions):
    """The rows of summary.csv, a dict for each class of column to value."""
    rows = []
    for name, label in dataset.label_map.items():
        if label == 0:  # background
            continue
        is_easy = find_easy_objects(dataset, label)
        kinds = verdicts.kinds[verdicts.labels == label]
        row = {"class": name, "objects": int(is_easy.sum()), "detections": len(kinds)}
        for kind in KINDS:
            row[kind] = int((kinds == kind).sum())
        row["missed"] = int((is_easy & ~verdicts.is_found).sum())
        row["average_precision"] = average_precisions[name]
        rows.append(row)
    return rows


def add_up(rows):
    """The sums of the columns that are counts, over all rows."""
    columns = [column for column, value in rows[0].items() if isinstance(value, int)]
    return {column: sum(row[column] for row in rows) for column in columns}


def write_summary(rows, path):
    """Write the counts as a table; a class without an object to find has no average precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    for row in rows:
        score = row["average_precision"]
        shown = "" if math.isnan(score) else f"{score:.6f}"
        writer.writerow({**row, "class": printable(row["class"]), "average_precision": shown})
    utils.write_file(path, text.getvalue())
    print(f"written: {path}")


def print_totals(rows):
    """Say in two lines what the counts are over all classes."""
    total = add_up(rows)
    print(f"{total['objects']} objects: {total['right']} found, {total['missed']} missed")
    counts = ", ".join(f"{total[kind]} {kind}" for kind in KINDS)
    print(f"{total['detections']} detections: {counts}")


# --- Recall and precision -------------------------------------------------------------------------


def make_curve(verdicts, dataset, label, is_member):
    """Recall and precision of a class over its detections, from the best-scored one on.

    is_member: (M,) bool, the objects to find: all of the class that are not difficult, or some of these. What is right
    about another object is left out; every false detection counts.
    The precision of a group is Hoiem's normalised one: as if the class's objects were all found as often as those of
    the group. It can be compared between groups of different sizes; of all objects together it is the usual one.
    Returns two arrays with an entry a detection that counts.
    """
    is_class = verdicts.labels == label
    kinds = verdicts.kinds[is_class]
    objects = verdicts.objects[is_class]
    is_right = (kinds == "right") & is_member[objects]
    is_false = np.isin(kinds, ERRORS)
    counts = is_right | is_false
    n_right = is_right[counts].cumsum()
    n_false = is_false[counts].cumsum()
    recall = n_right / is_member.sum()
    n_right_of_all = recall * find_easy_objects(dataset, label).sum()
    return recall, n_right_of_all / (n_right_of_all + n_false)


def average_precision(recall, precision, metric):
    """The average precision of a curve of `make_curve()`: see `eval.calculate_mAP()` for the two metrics."""
    if metric == "11 points":
        points = [0.1 * i for i in range(11)]
        return sum(precision[recall >= point].max(initial=0.0) for point in points) / 11
    highest_from_here = np.maximum.accumulate(precision[::-1])[::-1]  # the highest precision at this recall or more
    return float(np.sum(np.diff(recall, prepend=0.0) * highest_from_here))


def group_objects(values):
    """The group of each object by its rank in size or aspect ratio, 0 to 4: see GROUP_LIMITS. values: (n,)."""
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))  # values 30, 10, 20 have the ranks 2, 0, 1
    return np.searchsorted(GROUP_LIMITS, (ranks + 0.5) / len(values))


def score_groups(verdicts, dataset, label, values):
    """Recall and average precision of the five groups of a class's objects. values: (M,), sizes or aspect ratios.

    Returns two lists of five numbers, NaN for a group without objects.
    """
    easy_objects = np.flatnonzero(find_easy_objects(dataset, label))
    groups = group_objects(values[easy_objects])
    recalls, precisions = [], []
    for group in range(5):
        is_member = np.zeros(len(dataset.labels), bool)
        is_member[easy_objects[groups == group]] = True
        if is_member.any():
            recalls.append(verdicts.is_found[is_member].mean())
            recall, precision = make_curve(verdicts, dataset, label, is_member)
            precisions.append(average_precision(recall, precision, metric))
        else:
            recalls.append(math.nan)
            precisions.append(math.nan)
    return recalls, precisions


# --- The figures ----------------------------------------------------------------------------------

COLORS = {  # Okabe and Ito's, which the colour-blind can tell apart
    "right": "#009e73", "localization": "#e69f00", "other_class": "#cc79a7", "duplicate": "#56b4e9",
    "background": "#d55e00", "missed": "#999999",
}  # fmt: skip
INK = "#1f2328"


def make_figure(width, height):
    """An empty matplotlib figure; sides in inches."""
    from matplotlib.figure import Figure  # only who draws needs matplotlib

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    """Write a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    utils.write_file(path, buffer.getvalue())
    print(f"written: {path}")


def show_name(name):
    """A class name as a figure can show it: short, and a dollar sign starts no formula."""
    return printable(name, 24).replace("$", r"\$")


def read_log(path):
    """Read a log of train.py: a dict of column to two lists, the iterations of its entries, and their numbers."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such log; train.py writes it beside its checkpoint")
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        if "iteration" not in (reader.fieldnames or ()):
            raise ValueError(f'{path}: not a log of train.py, it has no column "iteration"')
        columns = {name: ([], []) for name in reader.fieldnames if name not in ("iteration", "epoch")}
        for row in reader:
            for name, (iterations, values) in columns.items():
                if not row[name]:
                    continue  # losses and evaluations come at different iterations
                try:
                    iterations.append(int(row["iteration"]))
                    values.append(float(row[name]))
                except ValueError:
                    place = f"{path}, line {reader.line_num}, {printable(name, 40)}"
                    raise ValueError(f"{place}: '{printable(row[name], 40)}' is not a number") from None
    return columns


def draw_log(columns):
    """loss.png: the losses, the learning rate, the average precisions."""
    names = list(columns)
    classes = names[names.index("mAP") + 1 :] if "mAP" in names else []
    n_columns = math.ceil((len(classes) + 1) / 22)  # of the legend
    figure = make_figure(7.5 + 2 * n_columns, 10)
    losses, rates, scores = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 3))

    highest = 0.0
    for name, label, color in (
        ("loss", "loss", INK),
        ("conf_loss", "its confidence part", COLORS["background"]),
        ("loc_loss", "its localisation part", COLORS["duplicate"]),
    ):
        iterations, values = columns.get(name, ([], []))
        if values:
            losses.plot(iterations, values, color=color, alpha=0.25, linewidth=0.8)
            window = max(1, len(values) // 40)
            smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
            losses.plot(iterations[window - 1 :], smooth, color=color, label=label)
            losses.set_ylabel("loss" if window == 1 else f"loss (bold: mean of {window} rows)")
            highest = max(highest, np.quantile(values, 0.98))  # the first few may be far above the others
    if highest:
        losses.set_ylim(0, 1.1 * highest)
        losses.legend(frameon=False)

    rates.plot(*columns.get("lr", ([], [])), color=INK)
    rates.set_ylabel("learning rate")

    draw_class_lines(scores, [(show_name(name), *columns[name]) for name in classes], marker=".")
    iterations, values = columns.get("mAP", ([], []))
    if values:
        scores.plot(iterations, values, color=INK, linewidth=2.5, marker="o", markersize=4, label="mean")
        scores.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8, ncols=n_columns)
        scores.set_ylim(0, 1)
    else:
        scores.text(0.5, 0.5, "no evaluations in the log", ha="center", transform=scores.transAxes)
    scores.set(ylabel="average precision", xlabel="iteration")
    for axis in (losses, rates, scores):
        tidy(axis)
    return figure


def draw_class_lines(axis, curves, marker=""):
    """Draw lines of 20 colours, of another style for each 20 more. curves: a list of (label, x, y), one a class."""
    import matplotlib

    pairs = matplotlib.colormaps["tab20"].colors  # a strong colour, its pale one, the next strong one, ...
    palette = pairs[::2] + pairs[1::2]
    styles = ("-", "--", ":", "-.")
    for place, (label, x, y) in enumerate(curves):
        style = styles[place // len(palette) % len(styles)]
        color = palette[place % len(palette)]
        axis.plot(x, y, style, color=color, linewidth=1.2, marker=marker, label=label)


def tidy(axis):
    """Leave out the frame's upper and right line, and draw a faint grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#d0d7de", linewidth=0.6)
    axis.set_axisbelow(True)


def draw_precision_recall(verdicts, dataset, average_precisions):
    """precision_recall.png: the curve of each class, the one with the highest average precision first."""
    scored = {name: value for name, value in average_precisions.items() if not math.isnan(value)}
    curves = []
    for name, value in sorted(scored.items(), key=lambda item: -item[1]):
        label = dataset.label_map[name]
        recall, precision = make_curve(verdicts, dataset, label, find_easy_objects(dataset, label))
        curves.append((f"{value:.3f}  {show_name(name)}", recall, precision))
    mean = sum(scored.values()) / len(scored) if scored else math.nan
    n_columns = math.ceil(len(curves) / 30)  # of the legend
    figure = make_figure(7.5 + 2.2 * n_columns, 6.5)
    axis = figure.subplots()
    draw_class_lines(axis, curves)
    axis.set_title(f"{split}: mean average precision {mean:.3f} ({metric}, overlap {min_overlap:g} or more)")
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    tidy(axis)
    if curves:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8, ncols=n_columns, title="average precision")
    return figure


def draw_errors(verdicts, dataset, rows):
    """errors.png: of each class the N best-scored detections (N: its objects), all detections, and its objects.

    Detections of difficult objects, which do not count, are left out of both.
    """
    counts_of_best = []
    for row in rows:
        kinds = verdicts.kinds[verdicts.labels == dataset.label_map[row["class"]]]
        kinds = kinds[kinds != "ignored"][: row["objects"]]
        counts_of_best.append({kind: int((kinds == kind).sum()) for kind in KINDS})
    counts_of_best.append(add_up(counts_of_best))
    rows = [*rows, {"class": "all", **add_up(rows)}]
    names = [f"{show_name(row['class'])} ({row['objects']})" for row in rows]
    totals_of_all = [row["detections"] - row["ignored"] for row in rows]
    totals_of_objects = [row["objects"] for row in rows]

    figure = make_figure(13, 2.2 + 0.3 * len(rows))
    figure.get_layout_engine().set(wspace=0.04)
    best, all_scores, objects = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2))
    draw_shares(best, names, counts_of_best, totals_of_objects, ("right", *ERRORS))
    draw_shares(all_scores, names, rows, totals_of_all, ("right", *ERRORS))
    draw_shares(objects, names, rows, totals_of_objects, ("right", "missed"))
    best.set(xlabel="% of N", title="The N best-scored detections of a class\nN: its objects, in brackets")
    all_scores.set(xlabel="% of the detections", title="All detections")
    objects.set(xlabel="% of the objects", title="Objects: found and missed")
    best.invert_yaxis()  # the first class on top
    labels = {
        "right": "right", "localization": f"localised badly (overlap {MIN_LOCALIZATION_OVERLAP} to {min_overlap:g})",
        "other_class": "another class", "duplicate": "duplicate", "background": "background",
        "missed": "missed by all detections",
    }  # fmt: skip
    patches = [best.bar(0, 0, color=COLORS[kind], label=text) for kind, text in labels.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False)
    return figure


def draw_shares(axis, names, counts, totals, kinds):
    """Draw a bar a class, whose parts are the shares of some kinds. counts: a dict a class of kind to number."""
    left = np.zeros(len(names))
    totals = np.maximum(totals, 1)
    for kind in kinds:
        shares = 100 * np.array([row[kind] for row in counts]) / totals
        axis.barh(names, shares, left=left, color=COLORS[kind], height=0.75)
        for place, share in enumerate(shares):
            if share >= 6:  # room for its number
                axis.text(left[place] + share / 2, place, f"{share:.0f}", ha="center", va="center", fontsize=8)
        left += shares
    axis.set(xlim=(0, 100), xticks=range(0, 101, 25))
    axis.margins(y=0.01)
    axis.spines[["top", "right"]].set_visible(False)


def draw_sizes(verdicts, dataset):
    """sizes.png: recall and average precision of each class, by the size of its objects and by their aspect ratio."""
    sides = dataset.boxes_xy_pixels[:, 2:] - dataset.boxes_xy_pixels[:, :2]  # (M, 2)
    areas = (sides[:, 0] * sides[:, 1]).numpy()
    aspect_ratios = (sides[:, 0] / sides[:, 1]).numpy()  # width : height
    classes = {
        name: label for name, label in dataset.label_map.items() if label and find_easy_objects(dataset, label).any()
    }
    figure = make_figure(13, 2.6 + 0.3 * len(classes))
    axes = figure.subplots(1, 4, sharey=True)
    for pair, values, groups, title in (
        (axes[:2], areas, SIZE_GROUPS, "by size"),
        (axes[2:], aspect_ratios, ASPECT_GROUPS, "by aspect ratio"),
    ):
        recalls, precisions = [], []
        for label in classes.values():
            recall, precision = score_groups(verdicts, dataset, label, values)
            recalls.append(recall)
            precisions.append(precision)
        draw_table(pair[0], recalls, list(classes), groups, f"Recall {title}")
        draw_table(pair[1], precisions, list(classes), groups, f"Average precision {title}")
    figure.supxlabel(
        "Groups of a class's objects, Hoiem's: the lowest 10% by area (extra small) or by width : height (extra tall), "
        "then 20%, 40%, 20%, 10% (extra large, extra wide).\nPrecision is normalised: every group as if it had all of "
        "the class's objects.",
        fontsize=9,
    )
    return figure


def draw_table(axis, numbers, classes, groups, title):
    """Draw a table of numbers from 0 to 1, with colours: a row a class, and the mean below; a column a group."""
    numbers = np.array(numbers).reshape(-1, len(groups))
    has_number = ~np.isnan(numbers)
    sums = np.where(has_number, numbers, 0.0).sum(axis=0)
    counts = has_number.sum(axis=0)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    numbers = np.vstack([numbers, means])
    axis.imshow(numbers, cmap="RdYlGn", vmin=0, vmax=1, alpha=0.75, aspect="auto")
    for row, column in np.ndindex(*numbers.shape):
        value = numbers[row, column]
        text = "–" if math.isnan(value) else f"{value:.2f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=9)
    axis.axhline(len(classes) - 0.5, color=INK, linewidth=1.5)
    axis.set_xticks(range(len(groups)), groups)
    axis.set_yticks(range(len(numbers)), [*map(show_name, classes), "mean"])
    axis.tick_params(length=0)
    axis.set_title(title, fontsize=11)


# --- The worst cases ------------------------------------------------------------------------------

TILE_WIDTH, TILE_HEIGHT = 300, 225  # of a crop on worst.jpg, in pixels
N_COLUMNS = 5
N_LINES = 2  # of text below a crop
TEXT_SIZE = 14
LINE_HEIGHT = TEXT_SIZE + 4
HEADING_HEIGHT = 2 * LINE_HEIGHT
DETECTION_COLOR, OBJECT_COLOR = "#ff3030", "#30e050"


class Case(NamedTuple):
    """One crop on worst.jpg."""

    image: int  # its number in the data set
    detection_xy: object  # (4,) array, in pixels, boundary form; None: no detection to show
    object_xy: object  # the same for an object
    reason: str


def write_worst(verdicts, dataset, path):
    """Write worst.jpg, or say why it is left out."""
    false_cases = list_false_detections(verdicts, dataset, n_worst)
    missed_cases = list_missed_objects(verdicts, dataset, n_worst)
    try:
        sheet = draw_cases(false_cases, missed_cases, dataset)
    except (OSError, ValueError) as error:
        path.unlink(missing_ok=True)  # that of an earlier analysis shows other detections
        print(f"left out: {path}, for which the images are needed: {printable(error)}")
        return
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    utils.write_file(path, buffer.getvalue())
    print(f"written: {path}")


def list_false_detections(verdicts, dataset, n):
    """The n best-scored false detections, as Cases."""
    names = utils.rev_label_map(dataset.label_map)
    cases = []
    for d in np.flatnonzero(np.isin(verdicts.kinds, ERRORS))[:n]:  # detections stand by falling score
        name = printable(names[verdicts.labels[d]], 30)
        overlap = f"overlap {verdicts.overlaps[d]:.2f}"
        number = verdicts.objects[d]
        if verdicts.kinds[d] == "localization":
            reason = f"localised badly, {overlap} with the nearest {name}"
        elif verdicts.kinds[d] == "duplicate":
            reason = f"duplicate, a better-scored detection has found this {name} ({overlap})"
        elif verdicts.kinds[d] == "other_class":
            reason = f"it is of another class, {printable(names[int(dataset.labels[number])], 30)} ({overlap})"
        else:
            reason = "background, no object overlaps it enough"
        object_xy = dataset.boxes_xy_pixels[number].numpy() if number >= 0 else None
        reason = f"{name} {verdicts.scores[d]:.2f}: {reason}"
        cases.append(Case(verdicts.images[d], verdicts.boxes_xy_pixels[d], object_xy, reason))
    return cases


def list_missed_objects(verdicts, dataset, n):
    """The n largest objects, by their area in pixels, that no detection is right about, as Cases."""
    is_missed = (dataset.difficulties == 0).numpy() & ~verdicts.is_found  # (M,)
    missed = np.flatnonzero(is_missed)
    sides = (dataset.boxes_xy_pixels[:, 2:] - dataset.boxes_xy_pixels[:, :2]).numpy()
    areas = (sides[:, 0] * sides[:, 1])[missed]
    cases = []
    for number in missed[np.argsort(-areas, kind="stable")][:n]:
        image = np.searchsorted(dataset.starts, number, side="right") - 1
        d, reason = explain_missed(number, image, verdicts, dataset)
        detection_xy = None if d is None else verdicts.boxes_xy_pixels[d]
        cases.append(Case(image, detection_xy, dataset.boxes_xy_pixels[number].numpy(), reason))
    return cases


def explain_missed(number, image, verdicts, dataset):
    """Why an object is missed: the number of the best-scored detection that is about it, None for none, and words."""
    names = utils.rev_label_map(dataset.label_map)
    label = int(dataset.labels[number])
    name = printable(names[label], 30)
    object_xy = dataset.boxes_xy_pixels[number].double()
    in_image = np.flatnonzero(verdicts.images == image)  # detections, by falling score
    boxes_xy = torch.from_numpy(verdicts.boxes_xy_pixels[in_image])
    overlaps = find_jaccard_overlap(boxes_xy, object_xy[None])[:, 0].tolist()
    for d, overlap in zip(in_image, overlaps, strict=True):
        is_same_class = verdicts.labels[d] == label
        found = f"{printable(names[verdicts.labels[d]], 30)} {verdicts.scores[d]:.2f}"
        if is_same_class and overlap >= min_overlap:
            return d, f"{name} missed: {found} overlaps another {name} more (this one {overlap:.2f})"
        if is_same_class and overlap >= MIN_LOCALIZATION_OVERLAP:
            return d, f"{name} missed: {found} localised badly, overlap {overlap:.2f}"
        if not is_same_class and overlap >= min_overlap:
            return d, f"{name} missed: taken for {found} (overlap {overlap:.2f})"
    return None, f"{name} missed: no detection of it"


def draw_cases(false_cases, missed_cases, dataset):
    """The contact sheet of both lists of Cases: a PIL image. Raises OSError or ValueError where an image is missing."""
    parts = [
        (f"The most confident false detections (red), and the objects that they are compared with (green): {split}",
         false_cases),
        (f"The largest missed objects (green), and the best-scored detections that are about them (red): {split}",
         missed_cases),
    ]  # fmt: skip
    cell_height = TILE_HEIGHT + N_LINES * LINE_HEIGHT + 8
    n_rows = sum(math.ceil(len(cases) / N_COLUMNS) for _, cases in parts)
    sheet = Image.new("RGB", (N_COLUMNS * TILE_WIDTH, n_rows * cell_height + 2 * HEADING_HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(TEXT_SIZE)
    top = 0
    for heading, cases in parts:
        draw.text((6, top + HEADING_HEIGHT // 4), heading, fill="black", font=ImageFont.load_default(TEXT_SIZE + 4))
        top += HEADING_HEIGHT
        for place, case in enumerate(cases):
            x = place % N_COLUMNS * TILE_WIDTH
            y = top + place // N_COLUMNS * cell_height
            sheet.paste(draw_tile(case, dataset), (x, y))
            lines = wrap_text(case.reason, font)
            for number, line in enumerate(lines[:N_LINES]):
                draw.text((x + 4, y + TILE_HEIGHT + 2 + number * LINE_HEIGHT), line, fill="black", font=font)
        top += math.ceil(len(cases) / N_COLUMNS) * cell_height
    return sheet


def wrap_text(text, font):
    """Break a text into lines that fit below a crop."""
    n_letters = int((TILE_WIDTH - 8) / font.getlength(text) * len(text))  # that fit, if they are as wide as the mean
    return textwrap.wrap(text, n_letters - 2)


def draw_tile(case, dataset):
    """The part of a Case's image around its boxes, with the boxes: a PIL image of TILE_WIDTH x TILE_HEIGHT."""
    image = to_pil_image(read_image(str(dataset.image_paths[case.image])))
    shown = [box for box in (case.detection_xy, case.object_xy) if box is not None]
    x_min, y_min = np.min(shown, axis=0)[:2]
    x_max, y_max = np.max(shown, axis=0)[2:]
    # The crop has the tile's shape where the image allows, and its boxes take half of it.
    width = 2 * max(x_max - x_min, (y_max - y_min) * TILE_WIDTH / TILE_HEIGHT, 20)
    height = width * TILE_HEIGHT / TILE_WIDTH
    left = max(0, int((x_min + x_max - width) / 2))
    upper = max(0, int((y_min + y_max - height) / 2))
    right = min(image.width, math.ceil((x_min + x_max + width) / 2))
    lower = min(image.height, math.ceil((y_min + y_max + height) / 2))
    crop = image.crop((left, upper, max(right, left + 1), max(lower, upper + 1)))
    scale = min((TILE_WIDTH - 8) / crop.width, (TILE_HEIGHT - 4) / crop.height)
    crop = crop.resize((max(1, round(crop.width * scale)), max(1, round(crop.height * scale))))
    draw = ImageDraw.Draw(crop)
    for box, color in ((case.object_xy, OBJECT_COLOR), (case.detection_xy, DETECTION_COLOR)):
        if box is not None:
            corners = (box.reshape(2, 2) - (left, upper)) * scale
            (x_0, y_0), (x_1, y_1) = corners.clip(0, (crop.width - 1, crop.height - 1))  # some reach beyond the image
            draw.rectangle([x_0, y_0, max(x_0, x_1), max(y_0, y_1)], outline=color, width=3)
    tile = Image.new("RGB", (TILE_WIDTH, TILE_HEIGHT), "white")
    tile.paste(crop, ((TILE_WIDTH - crop.width) // 2, (TILE_HEIGHT - crop.height) // 2))
    return tile


if __name__ == "__main__":
    utils.override_parameters(globals(), sys.argv[1:])
    with utils.exit_with_message():
        main()
