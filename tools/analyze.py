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
import io
import math
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle
except ImportError:
    matplotlib = None

import utils
from datasets import PascalVOCDataset, read_image
from eval import area_under_curve, average_of_11_points, detect_all, make_test_loader, read_detections, score
from model import load_model
from utils import find_jaccard_overlap, printable

# Input
data_folder = "data"  # where create_data_lists.py wrote its lists
split = "TEST"  # or "VAL", "TRAIN"
checkpoint = ""  # a network to analyze; "": none
read_detections_from = ""  # or detections: a folder of comp4_det_test_<class>.txt, or a .json file; "": none
log_file = ""  # a log of train.py; "": none

output_folder = "analysis"

metric = "11 points"  # or "area": see eval.py

# The network of `checkpoint` detects as in eval.py, with its default limits
batch_size = 32
workers = 4
device = ""  # such as "cpu"; "": the GPU, if there is one

ERRORS = ("localization", "other_class", "duplicate", "background")
KINDS = ("right", *ERRORS, "ignored")
MIN_OVERLAP = 0.5  # from which a detection finds an object
MIN_LOCALIZATION_OVERLAP = 0.1  # Hoiem's and TIDE's: what overlaps an object less is not about it

# Hoiem's groups of the objects of a class, by their rank in size: the smallest 10%, the next 20%, 40%, 20%, 10%.
GROUP_LIMITS = (0.1, 0.3, 0.7, 0.9)
SIZE_GROUPS = ("XS", "S", "M", "L", "XL")  # extra small to extra large
ASPECT_GROUPS = ("XT", "T", "M", "W", "XW")  # extra tall to extra wide

N_WORST = 20  # false detections, and missed objects, on worst.jpg


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
    average_precisions, _ = score(detections, dataset, metric, MIN_OVERLAP)
    verdicts = judge_detections(detections, dataset)
    rows = count_by_class(verdicts, dataset, average_precisions)
    write_summary(rows, folder / "summary.csv")
    save_figure(draw_precision_recall(verdicts, dataset, average_precisions), folder / "precision_recall.png")
    save_figure(draw_errors(verdicts, dataset, rows), folder / "errors.png")
    save_figure(draw_sizes(verdicts, dataset), folder / "sizes.png")
    write_worst(verdicts, dataset, folder / "worst.jpg")
    print_totals(rows)


def check_parameters():
    """Refuse now what would be an error after the detection of all images."""
    if matplotlib is None:
        raise ValueError("the pictures are drawn by matplotlib, which is missing: pip install matplotlib")
    if not checkpoint and not read_detections_from and not log_file:
        raise ValueError("nothing to analyze: give --checkpoint, --read_detections_from or --log_file")
    if checkpoint and read_detections_from:
        raise ValueError("--checkpoint and --read_detections_from are both given: the detections are of one of them")
    if metric not in ("11 points", "area"):
        raise ValueError(f'metric is "{printable(metric)}"; here it is "11 points" or "area"')


def run_network():
    """Detect the objects in all images of the split with the network of `checkpoint`: see eval.detect_all()."""
    model = load_model(checkpoint, utils.choose_device(device))
    return detect_all(make_test_loader(data_folder, batch_size, workers, model, split=split), model)


# --- What each detection is -----------------------------------------------------------------------

# A row of the table of verdicts: one detection.
VERDICT = np.dtype([
    ("image", int),  # the number of its image
    ("box_xy_pixels", float, 4),
    ("label", int),
    ("score", float),
    ("kind", "U12"),  # out of KINDS
    ("object", int),  # the number of the object that the kind speaks of, 0 to M - 1; -1 for background
    ("overlap", float),  # with that object
])  # fmt: skip


def judge_detections(detections, dataset):
    """Decide what each detection is, by the rules at the top of this file.

    detections: three lists with a tensor an image, as from `eval.detect_all()`. dataset: a PascalVOCDataset with
    difficult objects.
    Returns a structured array (D,) of VERDICT, by falling score.
    """
    is_difficult = dataset.difficulties.tolist()
    found = set()  # numbers of objects
    rows = []
    for image, (boxes_xy, labels, scores) in enumerate(zip(*detections, strict=True)):
        first = dataset.starts[image]  # the number of the image's first object
        last = dataset.starts[image + 1]
        objects_xy = dataset.boxes_xy_pixels[first:last].double()
        overlaps = find_jaccard_overlap(boxes_xy.double(), objects_xy).numpy()  # a row a detection, a column an object
        is_own_class = (labels[:, None] == dataset.labels[first:last]).numpy()  # the same shape
        for i in scores.argsort(descending=True, stable=True).tolist():  # equal scores stay in their order
            own, own_overlap = find_highest(np.where(is_own_class[i], overlaps[i], 0.0))
            other, other_overlap = find_highest(np.where(is_own_class[i], 0.0, overlaps[i]))
            number, overlap = first + own, own_overlap
            if own_overlap >= MIN_OVERLAP and is_difficult[number]:
                kind = "ignored"
            elif own_overlap >= MIN_OVERLAP and number in found:
                kind = "duplicate"
            elif own_overlap >= MIN_OVERLAP:
                kind = "right"
                found.add(number)
            elif own_overlap >= MIN_LOCALIZATION_OVERLAP:
                kind = "localization"
            elif other_overlap >= MIN_OVERLAP:
                kind = "other_class"
                number, overlap = first + other, other_overlap
            else:
                kind = "background"
                number, overlap = -1, 0.0
            rows.append((image, boxes_xy[i].tolist(), labels[i].item(), scores[i].item(), kind, number, overlap))
    rows.sort(key=lambda row: -row[3])
    return np.array(rows, dtype=VERDICT)


def find_highest(overlaps):
    """The place and the value of the highest number of an array; 0 and 0.0 if it is empty."""
    if len(overlaps) == 0:
        return 0, 0.0
    place = overlaps.argmax()
    return place, overlaps[place]


def find_easy_objects(dataset, label):
    """The objects of a class that are to be found, those that are not difficult: (M,) bool."""
    return ((dataset.labels == label) & (dataset.difficulties == 0)).numpy()


def find_missed_objects(verdicts, dataset):
    """The objects that are to be found, and that no detection is right about: (M,) bool."""
    is_missed = (dataset.difficulties == 0).numpy()
    is_missed[verdicts["object"][verdicts["kind"] == "right"]] = False
    return is_missed


def count_by_class(verdicts, dataset, average_precisions):
    """The rows of summary.csv, a dict for each class of column to value."""
    is_missed = find_missed_objects(verdicts, dataset)
    rows = []
    for name, label in dataset.label_map.items():
        if label == 0:  # background
            continue
        is_easy = find_easy_objects(dataset, label)
        kinds = verdicts["kind"][verdicts["label"] == label]
        row = {"class": name, "objects": int(is_easy.sum()), "detections": len(kinds)}
        for kind in KINDS:
            row[kind] = int((kinds == kind).sum())
        row["missed"] = int((is_easy & is_missed).sum())
        value = average_precisions[name]
        row["average_precision"] = "" if math.isnan(value) else f"{value:.6f}"  # "": it has no object to find
        rows.append(row)
    return rows


def add_up(rows):
    """The sums of the columns that are counts, over all rows."""
    columns = [column for column, value in rows[0].items() if isinstance(value, int)]
    return {column: sum(row[column] for row in rows) for column in columns}


def write_summary(rows, path):
    """Write the counts as a table, summary.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
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
    Returns two tensors with an entry a detection that counts.
    """
    of_class = verdicts[verdicts["label"] == label]
    is_right = (of_class["kind"] == "right") & is_member[of_class["object"]]
    is_false = np.isin(of_class["kind"], ERRORS)
    counts = is_right | is_false
    n_right = is_right[counts].cumsum()
    n_false = is_false[counts].cumsum()
    recall = n_right / is_member.sum()
    n_right_of_all = recall * find_easy_objects(dataset, label).sum()
    precision = n_right_of_all / (n_right_of_all + n_false)
    return torch.from_numpy(recall), torch.from_numpy(precision)


def find_average_precision(recall, precision):
    """The average precision of a curve of `make_curve()`, by `metric`."""
    if metric == "11 points":
        return average_of_11_points(precision, recall)
    return area_under_curve(precision, recall)


def group_objects(values):
    """The group of each object by its rank in size or aspect ratio, 0 to 4: see GROUP_LIMITS. values: (n,)."""
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))  # values 30, 10, 20 have the ranks 2, 0, 1
    return np.searchsorted(GROUP_LIMITS, (ranks + 0.5) / len(values))


def score_groups(verdicts, dataset, label, values):
    """Recall and average precision of the five groups of a class's objects. values: (M,), sizes or aspect ratios.

    Returns two lists of five numbers, NaN for a group without objects.
    """
    is_missed = find_missed_objects(verdicts, dataset)
    easy_objects = np.flatnonzero(find_easy_objects(dataset, label))
    groups = group_objects(values[easy_objects])
    recalls = []
    precisions = []
    for group in range(5):
        members = easy_objects[groups == group]
        if len(members) == 0:
            recalls.append(math.nan)
            precisions.append(math.nan)
            continue
        is_member = np.zeros(len(dataset.labels), bool)
        is_member[members] = True
        recalls.append(1 - is_missed[members].mean())
        precisions.append(find_average_precision(*make_curve(verdicts, dataset, label, is_member)))
    return recalls, precisions


# --- The figures ----------------------------------------------------------------------------------

COLORS = {  # Okabe and Ito's, which the colour-blind can tell apart
    "right": "#009e73", "localization": "#e69f00", "other_class": "#cc79a7", "duplicate": "#56b4e9",
    "background": "#d55e00", "missed": "#999999",
}  # fmt: skip
INK = "#1f2328"


def make_figure(width, height):
    """An empty figure; sides in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    """Write a figure, a PNG or JPEG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=110)
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
            losses.legend(frameon=False)
        if values and name == "loss":
            losses.set_ylim(0, 1.1 * np.quantile(values, 0.98))  # the first few may be far above the others

    rates.plot(*columns.get("lr", ([], [])), color=INK)
    rates.set_ylabel("learning rate")

    set_class_colors(scores)
    for name in classes:
        scores.plot(*columns[name], linewidth=1.2, marker=".", label=show_name(name))
    iterations, values = columns.get("mAP", ([], []))
    if values:
        scores.plot(iterations, values, color=INK, linewidth=2.5, marker="o", markersize=4, label="mean")
        scores.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8, ncols=n_columns)
    else:
        scores.text(0.5, 0.5, "no evaluations in the log", ha="center", transform=scores.transAxes)
    scores.set(ylabel="average precision", xlabel="iteration", ylim=(0, 1))
    for axis in (losses, rates, scores):
        tidy(axis)
    return figure


def set_class_colors(axis):
    """Let the lines of an axis have 20 colours, and another style for each 20 more."""
    pairs = matplotlib.colormaps["tab20"].colors  # a strong colour, its pale one, the next strong one, ...
    colors = matplotlib.cycler(color=pairs[::2] + pairs[1::2])
    styles = matplotlib.cycler(linestyle=("-", "--", ":", "-."))
    axis.set_prop_cycle(styles * colors)


def tidy(axis):
    """Leave out the frame's upper and right line, and draw a faint grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#d0d7de", linewidth=0.6)
    axis.set_axisbelow(True)


def draw_precision_recall(verdicts, dataset, average_precisions):
    """precision_recall.png: the curve of each class, the one with the highest average precision first."""
    scored = {name: value for name, value in average_precisions.items() if not math.isnan(value)}
    mean = sum(scored.values()) / len(scored) if scored else math.nan
    n_columns = math.ceil(len(scored) / 30)  # of the legend
    figure = make_figure(7.5 + 2.2 * n_columns, 6.5)
    axis = figure.subplots()
    set_class_colors(axis)
    for name, value in sorted(scored.items(), key=lambda item: -item[1]):
        label = dataset.label_map[name]
        recall, precision = make_curve(verdicts, dataset, label, find_easy_objects(dataset, label))
        axis.plot(recall, precision, linewidth=1.2, label=f"{value:.3f}  {show_name(name)}")
    axis.set_title(f"{split}: mean average precision {mean:.3f} ({metric}, overlap {MIN_OVERLAP:g} or more)")
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    tidy(axis)
    if scored:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8, ncols=n_columns, title="average precision")
    return figure


def draw_errors(verdicts, dataset, rows):
    """errors.png: of each class the N best-scored detections (N: its objects), all detections, and its objects.

    Detections of difficult objects, which do not count, are left out of both.
    """
    counts_of_best = []
    for row in rows:
        kinds = verdicts["kind"][verdicts["label"] == dataset.label_map[row["class"]]]
        kinds = kinds[kinds != "ignored"][: row["objects"]]
        counts_of_best.append({kind: int((kinds == kind).sum()) for kind in KINDS})
    counts_of_best.append(add_up(counts_of_best))
    rows = [*rows, {"class": "all", **add_up(rows)}]
    names = [f"{show_name(row['class'])} ({row['objects']})" for row in rows]
    n_detections = [row["detections"] - row["ignored"] for row in rows]
    n_objects = [row["objects"] for row in rows]

    figure = make_figure(13, 2.2 + 0.3 * len(rows))
    best, all_scores, objects = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2))
    draw_shares(best, names, counts_of_best, n_objects, ("right", *ERRORS))
    draw_shares(all_scores, names, rows, n_detections, ("right", *ERRORS))
    draw_shares(objects, names, rows, n_objects, ("right", "missed"))
    best.set(xlabel="% of N", title="The N best-scored detections of a class\nN: its objects, in brackets")
    all_scores.set(xlabel="% of the detections", title="All detections")
    objects.set(xlabel="% of the objects", title="Objects: found and missed")
    best.invert_yaxis()  # the first class on top
    labels = {
        "right": "right", "localization": f"localised badly (overlap {MIN_LOCALIZATION_OVERLAP} to {MIN_OVERLAP:g})",
        "other_class": "another class", "duplicate": "duplicate", "background": "background",
        "missed": "missed by all detections",
    }  # fmt: skip
    patches = [Patch(color=COLORS[kind], label=text) for kind, text in labels.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False)
    return figure


def draw_shares(axis, names, counts, totals, kinds):
    """Draw a bar a class, whose parts are the shares of some kinds. counts: a dict a class of kind to number."""
    left = np.zeros(len(names))
    for kind in kinds:
        shares = 100 * np.array([row[kind] for row in counts]) / np.maximum(totals, 1)
        bars = axis.barh(names, shares, left=left, color=COLORS[kind], height=0.75)
        numbers = [f"{share:.0f}" if share >= 6 else "" for share in shares]  # where there is room
        axis.bar_label(bars, numbers, label_type="center", fontsize=8)
        left += shares
    axis.set(xlim=(0, 100), xticks=range(0, 101, 25))
    axis.spines[["top", "right"]].set_visible(False)


def draw_sizes(verdicts, dataset):
    """sizes.png: recall and average precision of each class, by the size of its objects and by their aspect ratio."""
    sides = (dataset.boxes_xy_pixels[:, 2:] - dataset.boxes_xy_pixels[:, :2]).numpy()  # (M, 2)
    areas = sides[:, 0] * sides[:, 1]
    aspect_ratios = sides[:, 0] / sides[:, 1]  # width : height
    classes = {
        name: label for name, label in dataset.label_map.items() if label and find_easy_objects(dataset, label).any()
    }
    figure = make_figure(13, 2.6 + 0.3 * len(classes))
    axes = figure.subplots(1, 4, sharey=True)
    for pair, values, groups, title in (
        (axes[:2], areas, SIZE_GROUPS, "by size"),
        (axes[2:], aspect_ratios, ASPECT_GROUPS, "by aspect ratio"),
    ):
        scores = [score_groups(verdicts, dataset, label, values) for label in classes.values()]
        recalls = [recall for recall, _ in scores]
        precisions = [precision for _, precision in scores]
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
    means = np.ma.masked_invalid(numbers).mean(axis=0).filled(np.nan)  # of the classes that have such objects
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

N_COLUMNS = 5  # of worst.jpg
TILE_SIZE = (480, 360)  # of a crop, in pixels
DETECTION_COLOR = "#ff3030"
OBJECT_COLOR = "#30e050"


class Case(NamedTuple):
    """One crop on worst.jpg."""

    image: int  # its number in the data set
    detection_xy: object  # (4,) array, in pixels, boundary form; None: no detection to show
    object_xy: object  # the same for an object
    reason: str


def write_worst(verdicts, dataset, path):
    """Write worst.jpg, or say why it is left out."""
    false_cases = list_false_detections(verdicts, dataset, N_WORST)
    missed_cases = list_missed_objects(verdicts, dataset, N_WORST)
    try:
        figure = draw_cases(false_cases, missed_cases, dataset)
    except (OSError, ValueError) as error:
        path.unlink(missing_ok=True)  # that of an earlier analysis shows other detections
        print(f"left out: {path}, for which the images are needed: {printable(error)}")
        return
    save_figure(figure, path)


REASONS = {  # why a detection is false
    "localization": "localised badly, overlap {overlap:.2f} with the nearest {name}",
    "duplicate": "duplicate, a better-scored detection has found this {name} (overlap {overlap:.2f})",
    "other_class": "it is of another class, {other} (overlap {overlap:.2f})",
    "background": "background, no object overlaps it enough",
}


def list_false_detections(verdicts, dataset, n):
    """The n best-scored false detections, as Cases."""
    names = [show_name(name) for name in dataset.label_map]  # by label
    cases = []
    for verdict in verdicts[np.isin(verdicts["kind"], ERRORS)][:n]:
        name = names[verdict["label"]]
        object_xy = None
        other = ""
        if verdict["kind"] != "background":
            object_xy = dataset.boxes_xy_pixels[verdict["object"]].numpy()
            other = names[dataset.labels[verdict["object"]]]
        reason = REASONS[verdict["kind"]].format(name=name, other=other, overlap=verdict["overlap"])
        reason = f"{name} {verdict['score']:.2f}: {reason}"
        cases.append(Case(verdict["image"], verdict["box_xy_pixels"], object_xy, reason))
    return cases


def list_missed_objects(verdicts, dataset, n):
    """The n largest objects, by their area in pixels, that no detection is right about, as Cases."""
    missed = np.flatnonzero(find_missed_objects(verdicts, dataset))
    sides = (dataset.boxes_xy_pixels[:, 2:] - dataset.boxes_xy_pixels[:, :2]).numpy()
    areas = (sides[:, 0] * sides[:, 1])[missed]
    cases = []
    for number in missed[np.argsort(-areas, kind="stable")][:n]:
        image = np.searchsorted(dataset.starts, number, side="right") - 1
        detection_xy, reason = explain_missed(number, verdicts[verdicts["image"] == image], dataset)
        cases.append(Case(image, detection_xy, dataset.boxes_xy_pixels[number].numpy(), reason))
    return cases


def explain_missed(number, verdicts, dataset):
    """Why an object is missed: the box of the best-scored detection that is about it, None for none, and words.

    verdicts: those of the object's image, by falling score.
    """
    names = [show_name(name) for name in dataset.label_map]  # by label
    label = dataset.labels[number]
    name = names[label]
    object_xy = dataset.boxes_xy_pixels[number].double()
    boxes_xy = torch.from_numpy(verdicts["box_xy_pixels"].copy())
    overlaps = find_jaccard_overlap(boxes_xy, object_xy[None])[:, 0].tolist()
    for verdict, overlap in zip(verdicts, overlaps, strict=True):
        box_xy = verdict["box_xy_pixels"]
        is_same_class = verdict["label"] == label
        found = f"{names[verdict['label']]} {verdict['score']:.2f}"
        if is_same_class and overlap >= MIN_OVERLAP:
            return box_xy, f"{name} missed: {found} overlaps another {name} more (this one {overlap:.2f})"
        if is_same_class and overlap >= MIN_LOCALIZATION_OVERLAP:
            return box_xy, f"{name} missed: {found} localised badly, overlap {overlap:.2f}"
        if not is_same_class and overlap >= MIN_OVERLAP:
            return box_xy, f"{name} missed: taken for {found} (overlap {overlap:.2f})"
    return None, f"{name} missed: no detection of it"


def draw_cases(false_cases, missed_cases, dataset):
    """worst.jpg: both lists of Cases. Raises OSError or ValueError where an image is missing."""
    parts = (
        (false_cases, "The most confident false detections (red), and the objects that they are compared with (green)"),
        (missed_cases, "The largest missed objects (green), and the best-scored detections that are about them (red)"),
    )
    n_rows = [max(1, math.ceil(len(cases) / N_COLUMNS)) for cases, _ in parts]
    figure = make_figure(15, 0.8 + 2.9 * sum(n_rows))
    subfigures = figure.subfigures(2, 1, height_ratios=n_rows)
    for subfigure, n, (cases, heading) in zip(subfigures, n_rows, parts, strict=True):
        subfigure.suptitle(f"{heading}: {split}")
        axes = list(subfigure.subplots(n, N_COLUMNS).flat)
        for axis in axes:
            axis.set_axis_off()
        for axis, case in zip(axes, cases, strict=False):
            draw_case(axis, case, dataset)
    return figure


def draw_case(axis, case, dataset):
    """Show the part of a Case's image around its boxes, with the boxes and the reason; white lies beyond the image."""
    image = to_pil_image(read_image(str(dataset.image_paths[case.image])))
    boxes = [(case.object_xy, OBJECT_COLOR), (case.detection_xy, DETECTION_COLOR)]
    boxes = [(box, color) for box, color in boxes if box is not None]
    x_min, y_min = np.min([box for box, _ in boxes], axis=0)[:2]
    x_max, y_max = np.max([box for box, _ in boxes], axis=0)[2:]
    # The part has the tile's shape, and the boxes take half of it.
    shape = TILE_SIZE[0] / TILE_SIZE[1]
    width = 2 * max(x_max - x_min, (y_max - y_min) * shape, 20)
    height = width / shape
    left = (x_min + x_max - width) / 2
    upper = (y_min + y_max - height) / 2
    part = (left, upper, left + width, upper + height)
    tile = image.transform(TILE_SIZE, Image.Transform.EXTENT, part, Image.Resampling.BICUBIC, fillcolor="white")
    axis.imshow(tile, extent=(left, left + width, upper + height, upper))
    for (x_0, y_0, x_1, y_1), color in boxes:
        axis.add_patch(Rectangle((x_0, y_0), x_1 - x_0, y_1 - y_0, fill=False, edgecolor=color, linewidth=2))
    axis.set_title(textwrap.fill(case.reason, 45), fontsize=9)


if __name__ == "__main__":
    utils.override_parameters(globals(), sys.argv[1:])
    with utils.exit_with_message():
        main()
