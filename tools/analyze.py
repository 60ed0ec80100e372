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
    worst.jpg             the best-scored false detections and the largest missed objects, each with the reason
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
from eval import average_of_11_points, detect_all, make_test_loader, read_detections, score
from model import load_model
from utils import find_jaccard_overlap, printable

# Input
data_folder = "data"  # where create_data_lists.py wrote its lists
split = "TEST"  # or "VAL", "TRAIN"
checkpoint = ""  # a network to analyze; "": none
read_detections_from = ""  # detections in its place: a folder of comp4_det_test_<class>.txt, or a .json file; "": none
log_file = ""  # a log of train.py; "": none

output_folder = "analysis"

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
    average_precisions, _ = score(detections, dataset)
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
        overlaps = find_jaccard_overlap(boxes_xy.double(), objects_xy)  # a row a detection, a column an object
        is_own_class = labels[:, None] == dataset.labels[first:last]  # the same shape
        own_overlaps, own_objects = find_highest(overlaps * is_own_class)
        other_overlaps, other_objects = find_highest(overlaps * ~is_own_class)
        for i in scores.argsort(descending=True, stable=True).tolist():  # equal scores stay in their order
            number = first + own_objects[i]
            overlap = own_overlaps[i]
            if overlap >= MIN_OVERLAP and is_difficult[number]:
                kind = "ignored"
            elif overlap >= MIN_OVERLAP and number in found:
                kind = "duplicate"
            elif overlap >= MIN_OVERLAP:
                kind = "right"
                found.add(number)
            elif overlap >= MIN_LOCALIZATION_OVERLAP:
                kind = "localization"
            elif other_overlaps[i] >= MIN_OVERLAP:
                kind = "other_class"
                number = first + other_objects[i]
                overlap = other_overlaps[i]
            else:
                kind = "background"
                number = -1
                overlap = 0.0
            rows.append((image, boxes_xy[i].tolist(), labels[i].item(), scores[i].item(), kind, number, overlap))
    rows.sort(key=lambda row: -row[3])
    return np.array(rows, dtype=VERDICT)


def find_highest(overlaps):
    """The highest number of each row of a table and its column, two lists; 0.0 and column 0 if there are no columns."""
    if overlaps.shape[1] == 0:
        overlaps = torch.zeros(len(overlaps), 1)
    values, columns = overlaps.max(dim=1)
    return values.tolist(), columns.tolist()


def find_objects(dataset, label):
    """The numbers of a class's objects that are to be found, those that are not difficult."""
    return np.flatnonzero((dataset.labels == label) & (dataset.difficulties == 0))


def find_missed_objects(verdicts, dataset):
    """The objects that are to be found, and that no detection is right about: (M,) bool."""
    is_missed = (dataset.difficulties == 0).numpy()
    is_missed[verdicts["object"][verdicts["kind"] == "right"]] = False
    return is_missed


def count_by_class(verdicts, dataset, average_precisions):
    """The rows of summary.csv, a dict for each class of column to value."""
    is_missed = find_missed_objects(verdicts, dataset)
    rows = []
    for name, value in average_precisions.items():
        label = dataset.label_map[name]
        objects = find_objects(dataset, label)
        kinds = verdicts["kind"][verdicts["label"] == label].tolist()
        row = {"class": name, "objects": len(objects), "detections": len(kinds)}
        for kind in KINDS:
            row[kind] = kinds.count(kind)
        row["missed"] = int(is_missed[objects].sum())
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


def make_curve(verdicts, dataset, label, objects):
    """Recall and precision of a class over its detections, from the best-scored one on.

    objects: the numbers of those to find: all of `find_objects()`, or some of these. What is right about another object
    is left out; every false detection counts.
    The precision of a group is Hoiem's normalised one: as if the class's objects were all found as often as those of
    the group. It can be compared between groups of different sizes; of all objects together it is the usual one.
    Returns two tensors with an entry a detection that counts.
    """
    of_class = verdicts[verdicts["label"] == label]
    is_right = (of_class["kind"] == "right") & np.isin(of_class["object"], objects)
    is_false = np.isin(of_class["kind"], ERRORS)
    counts = is_right | is_false
    n_right = is_right[counts].cumsum()
    n_false = is_false[counts].cumsum()
    recall = n_right / len(objects)
    n_right_of_all = recall * len(find_objects(dataset, label))
    precision = n_right_of_all / (n_right_of_all + n_false)
    return torch.from_numpy(recall), torch.from_numpy(precision)


def group_objects(values):
    """The group of each object by its rank in size or aspect ratio, 0 to 4: see GROUP_LIMITS. values: (n,)."""
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))  # values 30, 10, 20 have the ranks 2, 0, 1
    return np.searchsorted(GROUP_LIMITS, (ranks + 0.5) / len(values))


def score_groups(verdicts, dataset, label, values):
    """Recall and average precision of the five groups of a class's objects. values: (M,), sizes or aspect ratios.

    Returns an array (2, 5): recalls and average precisions, NaN for a group without objects.
    """
    is_missed = find_missed_objects(verdicts, dataset)
    objects = find_objects(dataset, label)
    groups = group_objects(values[objects])
    scores = np.full((2, 5), np.nan)
    for group in np.unique(groups):
        members = objects[groups == group]
        scores[0, group] = 1 - is_missed[members].mean()
        recall, precision = make_curve(verdicts, dataset, label, members)
        scores[1, group] = average_of_11_points(precision, recall)
    return scores


# --- The figures ----------------------------------------------------------------------------------

COLORS = {  # Okabe and Ito's, which the colour-blind can tell apart
    "right": "#009e73", "localization": "#e69f00", "other_class": "#cc79a7", "duplicate": "#56b4e9",
    "background": "#d55e00", "missed": "#999999",
}  # fmt: skip
WORDS = {  # for figures
    "right": "right", "localization": "localised badly", "other_class": "another class", "duplicate": "duplicate",
    "background": "background", "missed": "missed by all detections",
}  # fmt: skip


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
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        if "iteration" not in (reader.fieldnames or ()):
            raise ValueError(f'{path}: not a log of train.py, it has no column "iteration"')
        columns = {name: ([], []) for name in reader.fieldnames}
        try:
            for row in reader:
                for name, (iterations, values) in columns.items():
                    if row[name]:  # losses and evaluations come at different iterations
                        iterations.append(int(row["iteration"]))
                        values.append(float(row[name]))
        except ValueError as error:
            raise ValueError(f"{path}, line {reader.line_num}: {printable(error)}") from None
    return columns


def draw_log(columns):
    """loss.png: the losses, the learning rate, the average precisions."""
    names = list(columns)
    classes = names[names.index("mAP") + 1 :] if "mAP" in names else []
    panels = {
        "loss": ["loss", "conf_loss", "loc_loss"],
        "learning rate": ["lr"],
        "average precision": ["mAP", *classes],
    }
    n_columns = 1 + len(classes) // 22  # of the legend
    figure = Figure(figsize=(7.5 + 2 * n_columns, 10), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 3))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        set_up(axis)
        for name in lines:
            label = f" {show_name(name)}"  # a space, for Matplotlib hides labels that begin with "_"
            axis.plot(*columns.get(name, ([], [])), marker=".", label=label)
        axis.set_ylabel(title)
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8, ncols=n_columns)
    axes[-1].set(xlabel="iteration", ylim=(0, 1))
    return figure


def set_up(axis):
    """Give the lines of an axis 20 colours in turn, leave out the frame's upper and right line, draw a faint grid."""
    pairs = matplotlib.colormaps["tab20"].colors  # a strong colour, its pale one, the next strong one, ...
    axis.set_prop_cycle(color=pairs[::2] + pairs[1::2])
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#d0d7de", linewidth=0.6)
    axis.set_axisbelow(True)


def draw_precision_recall(verdicts, dataset, average_precisions):
    """precision_recall.png: the curve of each class, the one with the highest average precision first."""
    scored = {name: value for name, value in average_precisions.items() if not math.isnan(value)}
    mean = np.mean(list(scored.values())) if scored else math.nan
    n_columns = 1 + len(scored) // 30  # of the legend
    figure = Figure(figsize=(7.5 + 2.2 * n_columns, 6.5), layout="constrained")
    axis = figure.subplots()
    set_up(axis)
    for name, value in sorted(scored.items(), key=lambda item: -item[1]):
        label = dataset.label_map[name]
        recall, precision = make_curve(verdicts, dataset, label, find_objects(dataset, label))
        axis.plot(recall, precision, linewidth=1.2, label=f"{value:.3f}  {show_name(name)}")
    axis.set_title(f"{split}: mean average precision {mean:.3f} (11 points, overlap {MIN_OVERLAP:g} or more)")
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    if scored:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8, ncols=n_columns, title="average precision")
    return figure


def draw_errors(verdicts, dataset, rows):
    """errors.png: of each class the N best-scored detections (N: its objects), all detections, and its objects.

    Detections of difficult objects, which do not count, are left out of both.
    """
    best_rows = []
    for row in rows:
        kinds = verdicts["kind"][verdicts["label"] == dataset.label_map[row["class"]]]
        best_kinds = kinds[kinds != "ignored"][: row["objects"]].tolist()
        best_rows.append({kind: best_kinds.count(kind) for kind in KINDS})
    best_rows.append(add_up(best_rows))
    rows = [*rows, {"class": "all", **add_up(rows)}]
    names = [f"{show_name(row['class'])} ({row['objects']})" for row in rows]
    n_detections = [row["detections"] - row["ignored"] for row in rows]
    n_objects = [row["objects"] for row in rows]

    figure = Figure(figsize=(13, 2.2 + 0.3 * len(rows)), layout="constrained")
    best, all_scores, objects = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2))
    draw_shares(best, names, best_rows, n_objects, ("right", *ERRORS))
    draw_shares(all_scores, names, rows, n_detections, ("right", *ERRORS))
    draw_shares(objects, names, rows, n_objects, ("right", "missed"))
    best.set(xlabel="% of N", title="The N best-scored detections of a class\nN: its objects, in brackets")
    all_scores.set(xlabel="% of the detections", title="All detections")
    objects.set(xlabel="% of the objects", title="Objects: found and missed")
    best.invert_yaxis()  # the first class on top
    patches = [Patch(color=color, label=WORDS[kind]) for kind, color in COLORS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False)
    return figure


def draw_shares(axis, names, counts, totals, kinds):
    """Draw a bar a class, whose parts are the shares of some kinds. counts: a dict a class of kind to number."""
    places = range(len(names))  # not the names themselves: two may be shown in the same way
    left = np.zeros(len(names))
    for kind in kinds:
        shares = 100 * np.array([row[kind] for row in counts]) / np.maximum(totals, 1)
        bars = axis.barh(places, shares, left=left, color=COLORS[kind], height=0.75)
        numbers = [f"{share:.0f}" if share >= 6 else "" for share in shares]  # where there is room
        axis.bar_label(bars, numbers, label_type="center", fontsize=8)
        left += shares
    axis.set(xlim=(0, 100), xticks=range(0, 101, 25))
    axis.set_yticks(places, names)
    axis.spines[["top", "right"]].set_visible(False)


def find_sides(dataset):
    """Widths and heights of all objects in pixels, two arrays (M,)."""
    return (dataset.boxes_xy_pixels[:, 2:] - dataset.boxes_xy_pixels[:, :2]).numpy().T


def draw_sizes(verdicts, dataset):
    """sizes.png: recall and average precision of each class, by the size of its objects and by their aspect ratio."""
    widths, heights = find_sides(dataset)
    classes = {name: label for name, label in dataset.label_map.items() if label and len(find_objects(dataset, label))}
    figure = Figure(figsize=(13, 2.6 + 0.3 * len(classes)), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    for pair, values, groups, title in (
        (axes[:2], widths * heights, SIZE_GROUPS, "by size"),
        (axes[2:], widths / heights, ASPECT_GROUPS, "by aspect ratio"),
    ):
        scores = [score_groups(verdicts, dataset, label, values) for label in classes.values()]
        scores = np.reshape(scores, (-1, 2, 5))  # a class, recall or average precision, a group
        draw_table(pair[0], scores[:, 0], list(classes), groups, f"Recall {title}")
        draw_table(pair[1], scores[:, 1], list(classes), groups, f"Average precision {title}")
    figure.supxlabel(
        "Groups of a class's objects, Hoiem's: the lowest 10% by area (extra small) or by width : height (extra tall), "
        "then 20%, 40%, 20%, 10% (extra large, extra wide).\nPrecision is normalised: every group as if it had all of "
        "the class's objects.",
        fontsize=9,
    )
    return figure


def draw_table(axis, numbers, classes, groups, title):
    """Draw a table of numbers from 0 to 1, with colours: a row a class, and the mean below; a column a group."""
    means = np.ma.masked_invalid(numbers).mean(axis=0).filled(np.nan)  # of the classes that have such objects
    numbers = np.vstack([numbers, means])
    axis.imshow(numbers, cmap="RdYlGn", vmin=0, vmax=1, alpha=0.75, aspect="auto")
    for row, column in np.ndindex(*numbers.shape):
        value = numbers[row, column]
        text = "–" if math.isnan(value) else f"{value:.2f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=9)
    axis.axhline(len(classes) - 0.5, color="#1f2328", linewidth=1.5)
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
    try:
        figure = draw_worst(list_false_detections(verdicts, dataset), list_missed_objects(verdicts, dataset), dataset)
    except (OSError, ValueError) as error:
        path.unlink(missing_ok=True)  # that of an earlier analysis shows other detections
        print(f"left out: {path}, for which the images are needed: {printable(error)}")
        return
    save_figure(figure, path)


def list_false_detections(verdicts, dataset):
    """The best-scored false detections, as Cases."""
    false = verdicts[np.isin(verdicts["kind"], ERRORS)]
    return [make_case(verdict, dataset) for verdict in false[:N_WORST]]


def list_missed_objects(verdicts, dataset):
    """The largest objects, by their area in pixels, that no detection is right about, as Cases."""
    missed = np.flatnonzero(find_missed_objects(verdicts, dataset))
    widths, heights = find_sides(dataset)
    areas = (widths * heights)[missed]
    cases = []
    for number in missed[np.argsort(-areas, kind="stable")][:N_WORST]:
        about_it = verdicts[verdicts["object"] == number]
        if len(about_it) > 0:
            cases.append(make_case(about_it[0], dataset))
        else:
            image = np.searchsorted(dataset.starts, number, side="right") - 1
            reason = f"{object_name(number, dataset)}: no detection is about it"
            cases.append(Case(image, None, dataset.boxes_xy_pixels[number].numpy(), reason))
    return cases


def make_case(verdict, dataset):
    """A false detection as a Case, with the object that it is about."""
    names = list(dataset.label_map)  # by label
    name = show_name(names[verdict["label"]])
    reason = f"{name} {verdict['score']:.2f}: {WORDS[verdict['kind']]}"
    object_xy = None
    if verdict["kind"] != "background":
        object_xy = dataset.boxes_xy_pixels[verdict["object"]].numpy()
        reason += f" (overlap {verdict['overlap']:.2f} with {object_name(verdict['object'], dataset)})"
    return Case(verdict["image"], verdict["box_xy_pixels"], object_xy, reason)


def object_name(number, dataset):
    """The name of an object's class."""
    return show_name(list(dataset.label_map)[dataset.labels[number]])


def draw_worst(false_cases, missed_cases, dataset):
    """worst.jpg: both lists of Cases. Raises OSError or ValueError where an image is missing."""
    parts = {
        "The most confident false detections (red), and the objects that they are compared with (green)": false_cases,
        "The largest missed objects (green), and the best-scored detections that are about them (red)": missed_cases,
    }
    n_rows = N_WORST // N_COLUMNS  # of each part
    figure = Figure(figsize=(15, 0.8 + 2.9 * len(parts) * n_rows), layout="constrained")
    subfigures = figure.subfigures(len(parts), 1)
    for subfigure, (heading, cases) in zip(subfigures, parts.items(), strict=True):
        subfigure.suptitle(f"{heading}: {split}")
        axes = subfigure.subplots(n_rows, N_COLUMNS).flatten()
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
