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
from collections import Counter
from pathlib import Path

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
from eval import (
    average_of_11_points,
    detect_all,
    find_best_objects,
    join_images,
    judge_detections,
    make_test_loader,
    read_detections,
    score,
)
from model import load_model
from train import LOG_COLUMNS
from utils import find_areas, printable, xy_to_cxcy

# Input
data_folder = "data"  # where create_data_lists.py wrote its lists
split = "TEST"  # or "VAL", "TRAIN"
checkpoint = ""  # a network to analyze; "": none
read_detections_from = ""  # detections in its place: a folder of comp4_det_test_<class>.txt, or a .json file; "": none
log_file = ""  # a log of train.py; "": none

output_folder = "analysis"

# The network of `checkpoint` detects as in eval.py, with its default limits
batch_size = 32
workers = min(4, utils.count_cores())
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
    # Refuse now what would be an error after the detection of all images.
    if matplotlib is None:
        raise ValueError("the pictures are drawn by matplotlib, which is missing: pip install matplotlib")
    if not checkpoint and not read_detections_from and not log_file:
        raise ValueError("nothing to analyze: give --checkpoint, --read_detections_from or --log_file")
    folder = Path(output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    if log_file:
        save_figure(draw_log(read_log(log_file)), folder / "loss.png")
    if not checkpoint and not read_detections_from:
        return

    dataset = PascalVOCDataset(data_folder, split, keep_difficult=True)
    if read_detections_from:
        detections = read_detections(read_detections_from, dataset)
    else:
        model = load_model(checkpoint, utils.choose_device(device))
        print("looking for objects with a score above 0.01, up to 200 in an image, as eval.py does")
        detections = detect_all(make_test_loader(data_folder, batch_size, workers, model, split=split), model)
    average_precisions, _ = score(detections, dataset)
    verdicts = diagnose(detections, dataset)
    rows = count_by_class(verdicts, dataset, average_precisions)
    total = add_up(rows)

    write_summary(rows, folder / "summary.csv")
    save_figure(draw_precision_recall(verdicts, dataset, average_precisions), folder / "precision_recall.png")
    save_figure(draw_errors(verdicts, dataset, rows, total), folder / "errors.png")
    save_figure(draw_sizes(verdicts, dataset), folder / "sizes.png")
    write_worst(verdicts, dataset, folder / "worst.jpg")
    print(f"{total['objects']} objects: {total['right']} found, {total['missed']} missed")
    print(f"{total['detections']} detections: {', '.join(f'{total[kind]} {kind}' for kind in KINDS)}")


# --- What each detection is -----------------------------------------------------------------------

# A row of the table of verdicts: one detection. (For worst.jpg, list_missed_objects() makes some of the kind "missed".)
VERDICT = np.dtype([
    ("image", int),  # the number of its image
    ("box_xy_pixels", float, 4),
    ("label", int),
    ("score", float),
    ("kind", "U12"),  # out of KINDS
    ("object", int),  # the number of the object that the kind speaks of, 0 to M - 1; -1 for background
    ("overlap", float),  # with that object; 0 for background
])  # fmt: skip


def diagnose(detections, dataset):
    """Decide what each detection is, by the rules at the top of this file.

    detections: three lists with a tensor an image, as from `eval.detect_all()`. dataset: a PascalVOCDataset with
    difficult objects.
    Returns a table (D,) of VERDICT, by falling score; equal scores stay in their order.
    """
    images, boxes_xy, labels, scores = join_images(*detections, dataset.label_map)
    order = scores.argsort(descending=True, stable=True)
    images, boxes_xy, labels, scores = [part[order] for part in (images, boxes_xy, labels, scores)]
    true_boxes_xy = dataset.boxes_xy_pixels.double()
    true_images = torch.arange(len(dataset)).repeat_interleave(torch.from_numpy(np.diff(dataset.starts)))

    # The object that each detection overlaps most, of those in its image; and of these, of those that have its class.
    objects, overlaps = find_best_objects(images, boxes_xy, true_images, true_boxes_xy)
    n_labels = len(dataset.label_map)
    parts = images * n_labels + labels  # a number for each class of each image
    true_parts = true_images * n_labels + dataset.labels
    own_objects, own_overlaps = find_best_objects(parts, boxes_xy, true_parts, true_boxes_xy)

    # "true", "false" or "ignored". All classes at once: no two have an object in common.
    outcomes = judge_detections(own_objects, own_overlaps, dataset.difficulties != 0, MIN_OVERLAP)
    outcomes = np.array(outcomes, dtype=str)
    overlaps = overlaps.numpy()
    own_overlaps = own_overlaps.numpy()
    kinds = np.select(
        [
            outcomes == "true",
            outcomes == "ignored",
            own_overlaps >= MIN_OVERLAP,
            own_overlaps >= MIN_LOCALIZATION_OVERLAP,
            overlaps >= MIN_OVERLAP,  # with an object of another class: those of its own were asked above
        ],
        ["right", "ignored", "duplicate", "localization", "other_class"],
        default="background",
    )
    is_about_other = kinds == "other_class"
    objects = np.where(is_about_other, objects, own_objects)
    overlaps = np.where(is_about_other, overlaps, own_overlaps)
    is_background = kinds == "background"
    objects[is_background] = -1
    overlaps[is_background] = 0
    return np.rec.fromarrays([images, boxes_xy, labels, scores, kinds, objects, overlaps], dtype=VERDICT)


def find_objects(dataset, label):
    """The numbers of a class's objects that are to be found, those that are not difficult."""
    return np.flatnonzero((dataset.labels == label) & (dataset.difficulties == 0))


def count_by_class(verdicts, dataset, average_precisions):
    """The rows of summary.csv, a dict for each class of column to value."""
    rows = []
    for name, value in average_precisions.items():
        label = dataset.label_map[name]
        kinds = verdicts["kind"][verdicts["label"] == label].tolist()
        row = {"class": name, "objects": len(find_objects(dataset, label)), "detections": len(kinds)}
        for kind in KINDS:
            row[kind] = kinds.count(kind)
        row["missed"] = row["objects"] - row["right"]
        row["average_precision"] = "" if math.isnan(value) else f"{value:.6f}"  # "": it has no object to find
        rows.append(row)
    return rows


def add_up(rows):
    """The sums of the columns that are counts, over all rows."""
    return {column: sum(row[column] for row in rows) for column in ("objects", "detections", *KINDS, "missed")}


def write_summary(rows, path):
    """Write the counts as a table, summary.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    utils.write_file(path, text.getvalue())
    print(f"written: {path}")


# --- Recall and precision -------------------------------------------------------------------------


def make_curve(verdicts, dataset, label, objects):
    """Recall and precision of a class over its detections, from the best-scored one on.

    objects: the numbers of those to find: all of `find_objects()`, or some of these. What is right about another object
    is left out; every false detection counts.
    The precision of a group is Hoiem's normalised one: as if the class's objects were all found as often as those of
    the group. It can be compared between groups of different sizes; of all objects together it is the usual one.
    Returns two arrays with an entry a detection that counts.
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
    return recall, precision


def group_objects(values):
    """The group of each object by its rank in size or aspect ratio, 0 to 4: see GROUP_LIMITS. values: (n,)."""
    ranks = np.argsort(np.argsort(values, kind="stable"))  # values 30, 10, 20 have the ranks 2, 0, 1
    return np.searchsorted(GROUP_LIMITS, (ranks + 0.5) / len(values))


def score_groups(verdicts, dataset, label, values):
    """Recall and average precision of the five groups of a class's objects. values: (M,), sizes or aspect ratios.

    Returns an array (2, 5): recalls and average precisions, NaN for a group without objects.
    """
    objects = find_objects(dataset, label)
    groups = group_objects(values[objects])
    scores = np.full((2, 5), np.nan)
    for group in np.unique(groups):
        members = objects[groups == group]
        recall, precision = make_curve(verdicts, dataset, label, members)
        scores[0, group] = recall.max(initial=0)
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
    utils.write_file(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=110))
    print(f"written: {path}")


def show_name(name):
    """A class name as a figure can show it: short, and a dollar sign starts no formula."""
    return printable(name, 24).replace("$", r"\$")


def read_log(path):
    """Read a log of train.py: a dict of column to two lists, the iterations of its entries, and their numbers."""
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        missing = [name for name in LOG_COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f'{path}: not a log of train.py, it has no column "{missing[0]}"')
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
    classes = [name for name in columns if name not in LOG_COLUMNS]
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
            axis.plot(*columns[name], marker=".", label=label)
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


def draw_errors(verdicts, dataset, rows, total):
    """errors.png: of each class the N best-scored detections (N: its objects), all detections, and its objects.

    Detections of difficult objects, which do not count, are left out of both.
    """
    best_rows = []
    for row in rows:
        kinds = verdicts["kind"][verdicts["label"] == dataset.label_map[row["class"]]]
        best_rows.append(Counter(kinds[kinds != "ignored"][: row["objects"]].tolist()))
    best_rows.append(sum(best_rows, Counter()))
    rows = [*rows, {"class": "all", **total}]
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


def draw_sizes(verdicts, dataset):
    """sizes.png: recall and average precision of each class, by the size of its objects and by their aspect ratio."""
    _, _, widths, heights = xy_to_cxcy(dataset.boxes_xy_pixels).numpy().T
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


def write_worst(verdicts, dataset, path):
    """Write worst.jpg, or say why it is left out."""
    try:
        figure = draw_worst(verdicts, dataset)
    except (OSError, ValueError) as error:
        path.unlink(missing_ok=True)  # that of an earlier analysis shows other detections
        print(f"left out: {path}, for which the images are needed: {printable(error)}")
        return
    save_figure(figure, path)


def draw_worst(verdicts, dataset):
    """worst.jpg, a crop for each case. Raises OSError or ValueError where an image is missing."""
    false = verdicts[np.isin(verdicts["kind"], ERRORS)]
    missed = list_missed_objects(verdicts, dataset)
    parts = {
        "The most confident false detections (red), and the objects that they are compared with (green)": false,
        "The largest missed objects (green), and the best-scored detections that are about them (red)": missed,
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


def list_missed_objects(verdicts, dataset):
    """The N_WORST largest objects that no detection is right about, by their area in pixels.

    Returns of each the verdict of the best-scored detection about it. If there is none, it gets a verdict of its own,
    of the kind "missed".
    """
    is_missed = (dataset.difficulties == 0).numpy()  # (M,)
    is_missed[verdicts["object"][verdicts["kind"] == "right"]] = False
    missed = np.flatnonzero(is_missed)
    areas = find_areas(dataset.boxes_xy_pixels[missed]).numpy()
    cases = []
    for number in missed[np.argsort(-areas, kind="stable")][:N_WORST]:
        about_it = verdicts[verdicts["object"] == number]
        if len(about_it) == 0:
            image = np.searchsorted(dataset.starts, number, side="right") - 1
            nothing = (image, np.zeros(4), 0, 0.0, "missed", number, 0.0)
            about_it = np.array([nothing], dtype=VERDICT)
        cases.append(about_it[0])
    return cases


def describe_case(verdict, dataset):
    """The reason why a detection is false, or an object missed, in words."""
    names = [show_name(name) for name in dataset.label_map]  # by label
    detection = f"{names[verdict['label']]} {verdict['score']:.2f}: {WORDS[verdict['kind']]}"
    if verdict["kind"] == "background":
        return detection
    object_name = names[dataset.labels[verdict["object"]]]
    if verdict["kind"] == "missed":
        return f"{object_name}: no detection is about it"
    return f"{detection} (overlap {verdict['overlap']:.2f} with {object_name})"


def draw_case(axis, verdict, dataset):
    """Show the part of an image around a verdict's boxes, with these and the reason; white lies beyond the image."""
    image = to_pil_image(read_image(str(dataset.image_paths[verdict["image"]])))
    boxes = []
    if verdict["kind"] != "background":
        boxes.append((dataset.boxes_xy_pixels[verdict["object"]].numpy(), OBJECT_COLOR))
    if verdict["kind"] != "missed":
        boxes.append((verdict["box_xy_pixels"], DETECTION_COLOR))
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
    axis.set_title(textwrap.fill(describe_case(verdict, dataset), 45), fontsize=9)


if __name__ == "__main__":
    utils.override_parameters(globals(), sys.argv[1:])
    with utils.exit_with_message():
        main()
