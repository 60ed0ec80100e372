"""Make the lists of images and objects that training and evaluation read.

    python create_data_lists.py --download=True               fetch VOC2007 and VOC2012 (2.9 GB) first
    python create_data_lists.py                               VOC2007 + VOC2012 that are already there
    python create_data_lists.py --train_data=/path/to/mine    data of your own, with classes of their own

Reads VOC's XML, COCO's JSON and YOLO's text files, in the layouts that annotations.py lists. Writes into
`output_folder` {TRAIN,VAL,TEST}_images.json and {TRAIN,VAL,TEST}_objects.json (VAL only if there is a validation
split); label_map.json, and category_ids.json (empty but for COCO's files); data_report.txt, which counts and names what
was dropped or mended; and contact_sheet.jpg, some images with their boxes. Any parameter below can be overridden on the
command line with --name=value.
"""

import dataclasses
import gc
import json
import math
import os
import random
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import VOCDetection
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import utils
from annotations import (
    SOUGHT_IMAGES,
    SPLIT_NAMES,
    add_note,
    merge_repeats,
    raise_if_any,
    read_annotations,
    read_lines,
    take_back_guesses,
    walk_files,
)
from datasets import darkness_warning, read_image, stored_size_and_orientation
from detect import draw_boxes
from model import NETWORKS, SSD300
from utils import printable

# Pascal VOC: trainval of both years becomes TRAIN, test of 2007 becomes TEST
voc07_path = "data/VOCdevkit/VOC2007"
voc12_path = "data/VOCdevkit/VOC2012"  # "": train on VOC2007 alone
download = False  # True: fetch what is missing of the two folders above

# Data of your own, in place of VOC
train_data = ""  # a folder, a COCO .json file or a data.yaml, or several, separated by commas; "": VOC
val_data = ""  # others, for validation; "": the split of train_data that val_split names, if it has one
test_data = ""  # others, for the test; "": the same as train_data
image_folder = ""  # where the images are; "": where the layout has them
class_names = ()  # the classes in the order of their labels; (): VOC's 20, or all in your annotations
skip_unknown = False  # True: leave out objects of classes not in class_names, instead of stopping
first_pixel = ""  # "0" or "1": what XML files call the first pixel; "": seen from the data
keep_crowds = False  # True: train on COCO's crowds (one box around many) as on difficult objects
trust_boxes = False  # True: boxes are right though they look like corners, fractions or those of other images
boxes_drawn_on = ""  # "upright" or "stored": photos as their EXIF data turn them, or as stored; "": seen from sizes
skip_corrupt = False  # True: leave out images that are missing or damaged, instead of stopping

# Splits
train_split = "trainval"  # name of a list of images, without .txt, or of a folder; if missing: train
val_split = "val"  # if missing: valid; VOC's val, a part of its trainval, is no VAL beside it
test_split = "test"  # if missing or without objects: valid or val; if these are, too: a share of TRAIN
val_fraction = 0.0  # share of the images of TRAIN that becomes VAL; 0: none
test_fraction = 0.2  # share of the images that becomes TEST where the data have none; 0: TEST is TRAIN again
seed = 0  # of these divisions

# Output
output_folder = "data"
check_images = True  # False: do not open the images, only the annotations
report_overlap = 0.5  # the report counts the objects of TRAIN that a prior overlaps so much; 0: not
n_sheet_images = 24  # images of TRAIN on the contact sheet, chosen by the seed; 0: no sheet

# Sizes of objects in the report, lower limit included: roots of their areas, in pixels of a 300 x 300 image
SIZES = {"0-16": (0, 16), "16-32": (16, 32), "32-64": (32, 64), "64-128": (64, 128), "128-300": (128, math.inf)}

# What the data report can say of a file, in the order in which it says it.
NOTES = {
    "image_corrupt": "Images that are missing or damaged: left out, as told",
    "entry_unusable": "Entries of annotation files that cannot be used: left out",
    "class_unnamed": "Label lines of a class that has no name: left out",
    "entry_guessed": "Entries of annotation files that could be meant in several ways: look at the boxes",
    "classes_from_1": "Label files whose classes count from 1, not from 0: look at the classes",
    "yaml_path_missing": "Images of a data.yaml that are not there: left out, or the folders beside it taken",
    "split_same": "Splits for which a data.yaml names the same images as for train: left out",
    "split_empty": "Splits without annotated images: another one taken, a share of TRAIN, or none",
    "list_unused": "Lists of images that were not used (they name none at hand, or the data are divided without them), "
    "and COCO files beside instances_*.json",
    "image_not_found": "Label files without an image: left out",
    "image_guessed": "Images found under another name than the annotation's, or elsewhere: look at the boxes",
    "image_unused": "Images that are in none of the lists or annotations used: left out",
    "label_file_missing": "Images without a label file: taken to have no objects",
    "image_repeated": "Images listed more than once: kept once, with all their objects",
    "size_differs": "Annotations with another size than the image's: the image's taken; look at the boxes",
    "boxes_turned": "Boxes drawn on the image as rotated by its EXIF data: turned back to the stored pixels",
    "exif_unclear": "Images to be rotated by their EXIF data: boxes taken to be drawn without; look at them",
    "image_dark": "Images that are nearly black: look at them",
    "box_no_area": "Boxes of no area or inverted: dropped",
    "box_not_finite": "Boxes with a coordinate that is not a finite number: dropped",
    "box_outside": "Boxes that lie outside the image (or all but a sliver of them): dropped",
    "box_clipped": "Boxes that reached beyond the image: clipped",
    "crowd_skipped": "Crowds, one box around many, in TRAIN: left out (keep_crowds keeps them)",
    "crowd_kept": "Crowds, one box around many: kept as difficult objects",
    "class_skipped": "Objects of other classes: skipped, as told",
    "difficult_missing": "Annotations with objects whose <difficult> is missing or unspecified: taken as not difficult",
    "ids_left_out": "COCO's ids of images, which several images have, or some lack: left out",
    "test_is_train": "TEST has the images of TRAIN: its score says what was learned, not what is recognised",
    "image_in_both": "Images in two splits: the score will flatter",
    "class_not_trained": "Classes without an object in TRAIN: they cannot be learned",
    "class_not_tested": "Classes without an object in VAL or TEST: they get no score there",
}


def main():
    """Fetch VOC if asked to, then write the lists and look at them."""
    gc.disable()  # nothing here is circular, and looking for circles in COCO's million objects takes half the time
    if not train_data:
        prepare_voc(voc07_path, voc12_path, download)
    create_data_lists(
        voc07_path, voc12_path, output_folder, check_images, train_data=train_data, val_data=val_data,
        test_data=test_data, image_folder=image_folder, class_names=class_names, skip_unknown=skip_unknown,
        first_pixel=first_pixel, keep_crowds=keep_crowds, trust_boxes=trust_boxes, boxes_drawn_on=boxes_drawn_on,
        skip_corrupt=skip_corrupt, train_split=train_split, val_split=val_split, test_split=test_split,
        val_fraction=val_fraction, test_fraction=test_fraction, seed=seed, report_overlap=report_overlap,
    )  # fmt: skip
    if n_sheet_images and check_images:
        draw_contact_sheet(output_folder, n_sheet_images, seed)
    print(f"The lists are in {os.path.abspath(output_folder)}")


def create_data_lists(
    voc07_path="", voc12_path="", output_folder="data", check_images=True, *, train_data="", val_data="", test_data="",
    image_folder="", class_names=(), skip_unknown=False, first_pixel="", keep_crowds=False, trust_boxes=False,
    boxes_drawn_on="", skip_corrupt=False, train_split="trainval", val_split="val", test_split="test",
    val_fraction=0.0, test_fraction=0.2, seed=0, report_overlap=0.5,
):  # fmt: skip
    """Write the lists of images and objects that training and evaluation read, and print a report on the data.

    VOC2007 + VOC2012 trainval become the TRAIN lists, VOC2007 test the TEST lists; or the data named do.
    The parameters are those at the top of this file; train_data, val_data and test_data may be lists of paths, too.
    Sizes and boxes in the lists are those of the pixels as stored, before any rotation that EXIF data ask for.

    Returns the report, a dict: "label_map"; "sources": a line on each; "splits": {"TRAIN": counts, "TEST": counts},
    and "VAL" if there is one; "notes": a dict of kind (those of NOTES) to a list of {"split", "file", "what"};
    "overlaps": a text.
    Raises FileNotFoundError and ValueError, naming the files, for data that cannot be used.
    """
    if boxes_drawn_on not in ("", "upright", "stored"):
        raise ValueError(f'boxes_drawn_on is {boxes_drawn_on!r}; it must be "upright", "stored" or ""')
    if not train_data:
        train_data = [voc07_path, voc12_path]
        test_data = test_data or voc07_path
        class_names = class_names or utils.voc_labels

    # 1. Read.
    notes = {kind: [] for kind in NOTES}
    names = {"TRAIN": train_split, "VAL": val_split, "TEST": test_split}
    plan = plan_sources(train_data, val_data, test_data)
    lines = {}  # source to what is said of it
    found = {}  # source to its records by split
    for source, wanted in plan.items():
        wanted_names = {split: names[split] for split in wanted}
        words, records = read_annotations(source, wanted_names, notes, image_folder, first_pixel, class_names)
        lines[source] = f"{printable(source)}: {words}"
        found[source] = records
        print(lines[source])
    for source in as_sources(val_data):
        if "TRAIN" in plan[source] and "VAL" not in found[source]:
            hint = "--val_fraction=0.1 takes a share of TRAIN in place of val_data"
            raise ValueError(f"{printable(source)}: is named as train_data and val_data, and has no VAL; {hint}")

    # 2. Look at the images.
    every_record = [record for by_split in found.values() for records in by_split.values() for record in records]
    take_back_guesses(every_record)
    note_unused_images(every_record, notes)
    set_sizes(every_record, check_images, skip_corrupt, boxes_drawn_on, notes)

    # 3. Make the splits.
    splits = {"TRAIN": [], "VAL": [], "TEST": []}
    placed = {}  # image to the split into which chance has put it
    for source, wanted in plan.items():
        by_split = {split: [record for record in rows if record.size] for split, rows in found[source].items()}
        if "" in by_split:
            divided, words = divide(source, by_split.pop(""), wanted, test_fraction, seed, placed, notes)
            by_split |= divided
            lines[source] += words
            print(f"{printable(source)}{words}")
        for split, records in by_split.items():
            add_to_split(splits[split], records, split)
    splits = {split: merge_repeats(records, notes) for split, records in splits.items()}
    if val_fraction:
        take_validation(splits, val_fraction, seed)
    if not splits["VAL"]:
        del splits["VAL"]
    for split, records in splits.items():
        if not records:
            raise ValueError(f"all images of {split} are missing or damaged")

    # 4. Mend.
    every_record = [record for records in splits.values() for record in records]
    if not trust_boxes:
        for source in dict.fromkeys(record.source for record in every_record):
            check_conventions([record for record in every_record if record.source == source])
    for record in every_record:
        mend_objects(record, keep_crowds, notes)
    if not skip_unknown:
        check_class_names(splits, notes)
    label_map = number_classes(every_record, class_names, skip_unknown, notes)
    compare_splits(splits, label_map, notes)

    # 5. Write and report.
    report = {"label_map": label_map, "sources": list(lines.values()), "notes": notes}
    report["splits"] = {split: count_objects(records) for split, records in splits.items()}
    report["overlaps"] = overlap_table(label_map, splits["TRAIN"], report_overlap) if report_overlap else ""
    write_lists(output_folder, splits, report)
    print(data_report_text(report))
    return report


def plan_sources(train_data, val_data, test_data):
    """Which splits each source is read for: a dict of path to names of splits, in the order of the sources."""
    sources = {"TRAIN": as_sources(train_data), "VAL": as_sources(val_data), "TEST": as_sources(test_data)}
    if not sources["TRAIN"]:
        raise ValueError("No data: name the VOC folders, or data of your own as train_data")
    for split in ("VAL", "TEST"):
        sources[split] = sources[split] or sources["TRAIN"]
    plan = {}
    for split in ("TRAIN", "TEST", "VAL"):
        for source in sources[split]:
            plan.setdefault(source, []).append(split)
    return plan


def as_sources(data):
    """A path, several separated by commas, or a list of paths with "" for none, as a list of absolute paths."""
    if isinstance(data, str) and not os.path.exists(os.path.expanduser(data)):
        data = data.split(",")
    paths = [data] if isinstance(data, (str, os.PathLike)) else data
    paths = [os.fspath(path).strip() for path in paths]
    return [os.path.abspath(os.path.expanduser(path)) for path in paths if path]


def add_to_split(split_records, records, split):
    """Add records to those of a split."""
    for record in records:
        record.split = split
        split_records.append(record)


def divide(source, records, wanted, test_fraction, seed, placed, notes):
    """Divide the records of a source that has no splits among those that it is wanted for.

    placed: a dict of image to the split into which chance has put it; another source's objects on it go there, too.
    Returns a dict of split to records, and what was done, in words.
    """
    if not records or "TRAIN" not in wanted or "TEST" not in wanted:
        if wanted == ["TEST", "VAL"]:
            raise ValueError(f"{printable(source)}: has no splits; name it as val_data, or as test_data")
        return {wanted[0]: records}, ""
    if test_fraction == 0:
        copies = [dataclasses.replace(record, objects=list(record.objects)) for record in records]
        add_note(notes, "TEST", "test_is_train", source)
        return {"TRAIN": records, "TEST": copies}, f"; {len(records)} images for TRAIN, and the same for TEST"
    train, test = split_at_random(records, test_fraction, seed, "test_fraction")
    by_split = {"TRAIN": [], "TEST": []}
    for split, drawn in (("TRAIN", train), ("TEST", test)):
        for record in drawn:
            by_split[placed.setdefault(record.real_path, split)].append(record)
    counts = ", ".join(f"{len(rows)} images for {split}" for split, rows in by_split.items())
    return by_split, f"; divided at random: {counts} (seed {seed})"


def split_at_random(records, fraction, seed, parameter):
    """Take a share of the records out at random: (those left, those taken), both in their old order."""
    n_taken = round(len(records) * fraction)
    if not 0 < n_taken < len(records):
        hint = " --test_fraction=0 makes TEST the same as TRAIN" if parameter == "test_fraction" else ""
        raise ValueError(f"{parameter} {fraction} of {len(records)} images leaves a split empty.{hint}")
    taken = set(random.Random(seed).sample(range(len(records)), n_taken))
    left = [record for i, record in enumerate(records) if i not in taken]
    return left, [record for i, record in enumerate(records) if i in taken]


def take_validation(splits, val_fraction, seed):
    """Move a share of TRAIN to VAL, at random."""
    if splits["VAL"]:
        raise ValueError(
            f"val_fraction is {val_fraction}, and the data have a validation split of {len(splits['VAL'])} images: "
            "leave val_fraction at 0 to use it"
        )
    splits["TRAIN"], validation = split_at_random(splits["TRAIN"], val_fraction, seed, "val_fraction")
    add_to_split(splits["VAL"], validation, "VAL")


def note_unused_images(records, notes):
    """Note the images that lie in the folders of the others, or below, and belong to no record."""
    used = {record.image for record in records} | {record.real_path for record in records}
    folders = set()
    for record in records:
        above, name = os.path.split(record.image_folder)
        is_split = name.lower() in SPLIT_NAMES and os.path.basename(above).lower() == "images"
        folders.add(above if is_split else record.image_folder)
    for folder in sorted(folders):
        for name in walk_files(folder, SOUGHT_IMAGES):
            path = os.path.join(folder, name)
            if path not in used and os.path.realpath(path) not in used:
                used.add(path)
                add_note(notes, "", "image_unused", path)


def set_sizes(records, check_images, skip_corrupt, boxes_drawn_on, notes):
    """Set each record's size to that of its image: of every one if check_images, else if it is not declared, or if
    only the image tells how boxes drawn on the upright photo are to be turned.

    An image that cannot be used is an error; with skip_corrupt its record keeps no size, and is noted.
    """
    for record in records:
        record.size = record.declared_size
    needs_all = check_images or boxes_drawn_on == "upright"
    chosen = [record for record in records if needs_all or not record.size]
    with ThreadPool(min(8, utils.count_cores())) as pool:  # decoding releases the GIL, so threads are enough
        work = pool.imap(lambda record: look_at_image(record.image, check_images), chosen, chunksize=8)
        looks = list(tqdm(work, "Checking images", len(chosen), disable=None if chosen else True))
    problems = [look.problem for look in looks if look.problem]
    if problems and (not skip_corrupt or len(problems) == len(records)):
        hint = "--skip_corrupt=True leaves them out"
        if any("no such image" in problem for problem in problems):
            hint = f"--image_folder=FOLDER says where they are, {hint}"
        raise_if_any(problems, f"{len(problems)} of {len(records)} images cannot be used ({hint}):")
    for record, look in zip(chosen, looks, strict=True):
        if look.problem:
            record.size = None
            add_note(notes, record.split, "image_corrupt", record.file, look.problem)
            continue
        set_size(record, look.size, look.orientation, boxes_drawn_on, notes)
        if look.warning:
            add_note(notes, record.split, "image_dark", record.image, look.warning)


class Look(NamedTuple):
    """What was seen of an image file."""

    size: tuple | None = None  # (width, height) as stored
    orientation: int = 1  # EXIF's
    warning: str = ""  # that it is nearly black
    problem: str = ""  # why it cannot be used


def look_at_image(path, decode):
    """Look at an image file, at its pixels only if `decode`."""
    if not os.path.isfile(path):
        return Look(problem=f"{printable(path, 400)}: no such image")
    try:
        warning = darkness_warning(read_image(path)) if decode else ""
        size, orientation = stored_size_and_orientation(path)
    except (ValueError, OSError) as error:
        return Look(problem=str(error))
    return Look(size, orientation, warning)


def set_size(record, stored, orientation, boxes_drawn_on, notes):
    """Give a record the size of its image as stored, and its boxes in these pixels, which training reads."""
    declared = record.declared_size
    upright = (stored[1], stored[0]) if orientation >= 5 else stored
    record.size = stored
    if record.form != "YOLO" and declared and declared not in (stored, upright):
        add_note(notes, record.split, "size_differs", record.file, f"annotation {declared} image {stored}")
    # A photo's EXIF data may ask that it be rotated or mirrored before it is shown. Some labelling tools do so, others
    # do not; the size in the annotation tells which pixels the boxes were drawn on, if width and height change places.
    is_told_by_size = stored != upright and declared in (stored, upright)
    turn = boxes_drawn_on == "upright" or (boxes_drawn_on == "" and is_told_by_size and declared == upright)
    turn = turn and orientation > 1
    drawn_on = upright if turn else stored
    boxes = [row.box for row in record.objects]
    if record.form == "YOLO":
        boxes = [tuple(value * side for value, side in zip(box, drawn_on * 2, strict=True)) for box in boxes]
    exif = f"EXIF orientation {orientation}"
    if turn:
        boxes = [turn_back(box, upright, orientation) for box in boxes]
        record.declared_size = stored
        add_note(notes, record.split, "boxes_turned", record.file, f"{exif}, {len(boxes)} boxes")
    elif orientation > 1 and not boxes_drawn_on and not is_told_by_size:
        add_note(notes, record.split, "exif_unclear", record.file, exif)
    record.objects = [row._replace(box=box) for row, box in zip(record.objects, boxes, strict=True)]


def turn_back(box, upright, orientation):
    """A box on a photo as its EXIF orientation shows it, of size `upright`, in its pixels as stored."""
    x_min, y_min, x_max, y_max = box
    width, height = upright
    if orientation in (2, 3, 6, 7):  # shown mirrored left to right
        x_min, x_max = width - x_max, width - x_min
    if orientation in (3, 4, 7, 8):  # and top to bottom
        y_min, y_max = height - y_max, height - y_min
    return (y_min, x_min, y_max, x_max) if orientation >= 5 else (x_min, y_min, x_max, y_max)


def check_conventions(records):
    """Raise ValueError if the boxes of one source look as if they were meant in another way than they are read."""
    form = records[0].form
    numbers = (number for record in records for row in record.objects for number in row.box + record.size)
    table = np.fromiter(numbers, np.float64).reshape(-1, 6)  # (M, 6): box, width and height of the image
    table = table[(np.abs(table) < 1e100).all(axis=1)]
    n = len(table)
    mins = table[:, :2]
    maxs = table[:, 2:4]
    sizes = table[:, 4:]
    sides = maxs - mins
    beyond = (maxs > 1.01 * sizes + 1).any(axis=1).sum()
    fits_as_corners = ((sides > mins) & (sides <= 1.01 * sizes + 1)).all(axis=1).sum()
    kept = (np.clip(maxs, 0, sizes) - np.clip(mins, 0, sizes)).prod(axis=1)
    lost = n - ((kept >= 0.9 * sides.prod(axis=1)) & (sides > 0).all(axis=1)).sum()
    resized = sum(record.declared_size not in (None, record.size) for record in records)
    if n and form != "YOLO" and maxs.max() <= 1.001:
        found, suspicion = "all boxes lie within one pixel", "fractions of the image, not like pixels"
    elif form == "COCO" and beyond >= max(3, 0.1 * n) and fits_as_corners > 0.98 * n:
        found = f"read as [x_min, y_min, width, height], {beyond} of {n} boxes reach beyond their images"
        suspicion = "corners, [x_min, y_min, x_max, y_max]"
    elif lost >= max(5, 0.25 * n):
        found = f"{lost} of {n} boxes are inverted, or lie outside the image by a tenth or more"
        suspicion = "pixels, not fractions" if form == "YOLO" else "boxes of images of another size, or of another form"
    elif resized >= max(5, 0.25 * len(records)):
        found = f"{resized} of {len(records)} images have another size than their annotations say"
        suspicion = "images that were resized after they were annotated"
    else:
        return
    hint = "If the boxes are right all the same, --trust_boxes=True takes them as they are"
    raise ValueError(f"{printable(records[0].source)}: {found}: they look like {suspicion}. {hint}")


def mend_objects(record, keep_crowds, notes):
    """Clip a record's boxes to the image, and leave out those that nothing can be learned from."""
    kept = []
    first = record.first_pixel
    for row in record.objects:
        if record.form == "COCO" and row.difficulty:  # a crowd
            kind = "crowd_kept" if keep_crowds or record.split != "TRAIN" else "crowd_skipped"
            add_note(notes, record.split, kind, record.file, printable(row.name, 60))
            if kind == "crowd_skipped":
                continue
        kind, box = clip_box(row.box, record.size, first)
        if kind:
            as_written = "[{:g}, {:g}, {:g}, {:g}]".format(row.box[0] + first, row.box[1] + first, *row.box[2:])
            what = f"{printable(row.name, 60)} {as_written} in {record.size[0]} x {record.size[1]}"
            add_note(notes, record.split, kind, record.file, what)
        if box:
            kept.append(row._replace(box=box))
    record.objects = kept


def clip_box(box, size, first_pixel):
    """(None or what is to be noted, the box inside the image or None) of a box in continuous pixels."""
    if not all(math.isfinite(value) for value in box):
        return "box_not_finite", None
    # Where both ends are included, one pixel is written as xmin = xmax: what a click without a drag leaves behind.
    if min(box[2] - box[0], box[3] - box[1]) <= first_pixel:
        return "box_no_area", None
    clipped = tuple(min(max(value, 0.0), float(limit)) for value, limit in zip(box, size * 2, strict=True))
    # A tenth of a pixel shows nothing. (And float32 tells its ends apart, as fractions of MAX_IMAGE_SIDE.)
    if min(clipped[2] - clipped[0], clipped[3] - clipped[1]) < 0.1:
        return "box_outside", None
    is_clipped = any(abs(new - old) > 0.1 for new, old in zip(clipped, box, strict=True))
    return ("box_clipped" if is_clipped else None), clipped


def check_class_names(splits, notes):
    """ValueError if most label lines of a split have a class without a name: the names are those of other data."""
    for split, records in splits.items():
        files = {record.file for record in records}
        unnamed = [f"{row['file']}: {row['what']}" for row in notes["class_unnamed"] if row["file"] in files]
        n_lines = len(unnamed) + sum(len(record.objects) for record in records if record.form == "YOLO")
        if len(unnamed) > n_lines / 2:
            hint = "Name all classes, in data.yaml, classes.txt or class_names; or leave these out: --skip_unknown=True"
            raise_if_any(unnamed, f"{len(unnamed)} of {n_lines} label lines of {split} have no class name. {hint}:")


def number_classes(records, class_names, skip_unknown, notes):
    """The label map; objects of a class that is not in it are refused, or left out if skip_unknown."""
    found = sorted({row.name for record in records for row in record.objects})
    if not found and not class_names:
        raise_nothing_to_learn("The annotations hold no object of any class", notes)
    # No object can have the name of label 0: "background" is left to be refused as unknown.
    names = class_names or [name for name in found if name != "background"]
    label_map = utils.make_label_map(names) if names else {"background": 0}
    unknown = {}
    for record in records:
        for row in record.objects:
            if not label_map.get(row.name):
                unknown.setdefault(row.name, []).append(record.file)
                add_note(notes, record.split, "class_skipped", record.file, printable(row.name, 60))
        record.objects = [row for row in record.objects if label_map.get(row.name)]
    if unknown and not skip_unknown:
        lines = [f"{printable(repr(x), 60)}: {len(files)} objects, first in {files[0]}" for x, files in unknown.items()]
        hint = "add them to class_names, or leave their objects out with --skip_unknown=True"
        if "background" in unknown:
            hint += " (no class can be called background, label 0: rename it in the annotations, or leave it out)"
        raise_if_any(lines, f"{len(unknown)} unknown classes (class_names has {len(label_map) - 1}); {hint}:")
    return label_map


def raise_nothing_to_learn(headline, notes):
    """Raise ValueError for data without objects: with what was left out, and the first reasons for it."""
    lines = []
    for kind, rows in notes.items():
        if rows and kind != "image_unused":
            lines.append(f"{len(rows):,} x {NOTES[kind]}: {rows[0]['file']} {rows[0]['what']}")
    lines = [printable(line, 400) for line in lines]
    raise ValueError("\n  ".join([f"{headline}: there is nothing to learn from", *lines]))


def compare_splits(splits, label_map, notes):
    """Note what makes the splits unfit for one another; ValueError if TRAIN has nothing to learn from."""
    for split in [split for split in splits if split != "TRAIN"]:
        ids = [record.image_id for record in splits[split]]
        if set(ids) != {None} and (None in ids or len(set(ids)) < len(ids)):
            add_note(notes, split, "ids_left_out")
            for record in splits[split]:
                record.image_id = None
    same_on_purpose = {row["file"] for row in notes["test_is_train"]}  # sources whose TEST is their TRAIN
    used = {}  # image to the split in which it came first
    for split, records in splits.items():
        for record in records:
            first = used.setdefault(record.real_path, split)
            if first != split and record.source not in same_on_purpose:
                add_note(notes, split, "image_in_both", record.file, f"{record.image} is in {first}, too")
    found = {split: {row.name for record in splits[split] for row in record.objects} for split in splits}
    if not found["TRAIN"]:
        raise_nothing_to_learn("The training images hold no object", notes)
    for name, label in label_map.items():
        if label and name not in found["TRAIN"]:
            add_note(notes, "TRAIN", "class_not_trained", what=name)
            continue
        for split in splits:
            if label and name not in found[split]:
                add_note(notes, split, "class_not_tested", what=name)


# --- Report and lists -----------------------------------------------------------------------------


def count_objects(records):
    """What the report says of one split: counts of images and objects, and (easy, difficult) of each class."""
    classes = {}
    for record in records:
        for row in record.objects:
            classes.setdefault(row.name, [0, 0])[row.difficulty] += 1
    easy = sum(counts[0] for counts in classes.values())
    difficult = sum(counts[1] for counts in classes.values())
    counts = {"images": len(records), "images_without_objects": sum(not record.objects for record in records)}
    return {**counts, "objects": easy + difficult, "easy": easy, "difficult": difficult, "classes": classes}


def write_lists(output_folder, splits, report):
    """Write all files of `create_data_lists()`, so that the old ones stay whole until all new ones are."""
    label_map = report["label_map"]
    texts = {"label_map.json": json.dumps(label_map)}
    texts["data_report.txt"] = "\n".join([*report["sources"], "", data_report_text(report, 100)])
    category_ids = {}  # by split: the files of two splits may have different ones
    ids_of_all = {}
    for split, records in splits.items():
        entries = []
        ids_by_name = {}
        for record in records:
            rows = record.objects
            entry = {"boxes": [row.box for row in rows], "labels": [label_map[row.name] for row in rows]}
            entry |= {"difficulties": [row.difficulty for row in rows], "size": record.size}
            entry.update(image_id=record.image_id, areas=[row.area for row in rows] if record.form == "COCO" else None)
            entries.append({key: value for key, value in entry.items() if value is not None})
            ids_by_name |= record.category_ids or {}
        texts[f"{split}_images.json"] = json.dumps([record.image for record in records])
        texts[f"{split}_objects.json"] = json.dumps(entries)
        category_ids[split] = {name: ids_by_name[name] for name in label_map if name in ids_by_name}
        ids_of_all |= category_ids[split]
    # A class that a split's files do not have gets its id in other files.
    category_ids = {split: {**ids_of_all, **ids_by_name} for split, ids_by_name in category_ids.items()}
    texts["category_ids.json"] = json.dumps(category_ids if ids_of_all else {})
    utils.write_files(output_folder, texts)
    if "VAL" not in splits:
        for name in ("VAL_images.json", "VAL_objects.json"):  # of an earlier run
            Path(output_folder, name).unlink(missing_ok=True)


def data_report_text(report, max_lines=5):
    """The report of `create_data_lists()` in words, max_lines on each kind of note, and 20 times as many on classes."""
    notes = {kind: rows for kind, rows in report["notes"].items() if rows}
    form = "{}: {images:,} images ({images_without_objects:,} without objects), "
    form += "{objects:,} objects ({easy:,} easy, {difficult:,} difficult)"
    lines = [form.format(split, **counts) for split, counts in report["splits"].items()]
    lines += [f"{len(rows):>9,}  {NOTES[kind]}" for kind, rows in notes.items()]
    lines += ["", "Objects (of them difficult)   " + "".join(split.rjust(18) for split in report["splits"])]
    names = list(report["label_map"])[1:]
    for name in names[: 20 * max_lines]:
        counts = [split["classes"].get(name, (0, 0)) for split in report["splits"].values()]
        cells = [f"{easy + difficult:,} ({difficult:,})".rjust(18) for easy, difficult in counts]
        lines.append(f"  {printable(name, 28):<28}" + "".join(cells))
    if len(names) > 20 * max_lines:
        lines.append(f"  ... and {len(names) - 20 * max_lines:,} classes more")
    for kind, rows in notes.items():
        lines += ["", f"{NOTES[kind]} ({len(rows):,})"]
        lines += ["  " + printable(" ".join(filter(None, row.values())), 500) for row in rows[:max_lines]]
        if len(rows) > max_lines:
            lines.append(f"  ... and {len(rows) - max_lines:,} more (data_report.txt names the first 100)")
    return "\n".join([*lines, "", report["overlaps"]])


def overlap_table(label_map, records, min_overlap):
    """A table, as text: the number of objects by class and size, and the share whose best prior overlaps enough."""
    numbers = (n for record in records for row in record.objects for n in (label_map[row.name], *row.box, *record.size))
    table = torch.from_numpy(np.fromiter(numbers, np.float64).reshape(-1, 7))  # label, box, width, height
    # Fractions: that is where the priors are, whatever the shape of the image.
    labels = table[:, 0]  # (M,)
    boxes_xy = (table[:, 1:5] / table[:, [5, 6, 5, 6]]).float()  # (M, 4)
    sides = 300 * (boxes_xy[:, 2:] - boxes_xy[:, :2]).prod(dim=1).sqrt()  # (M,), pixels of the resized image
    columns = [(sides >= low) & (sides < high) for low, high in SIZES.values()] + [labels > 0]
    lines = [
        "Objects of TRAIN by size (root of the area, in pixels of a 300 x 300 image), and of each number the share",
        f"whose best prior overlaps {min_overlap:g} or more; to the others no prior fits well.",
        " " * 38 + "".join(title.rjust(13) for title in [*SIZES, "all"]),
    ]
    # The classes for SSD300; for every other network that has priors of its own, the sum of all classes.
    rows = [(name, labels == label) for name, label in label_map.items() if label][:100]
    seen = []
    for network, row in NETWORKS.items():
        priors = SSD300.create_prior_boxes(network)
        if any(torch.equal(priors, other) for other in seen):
            continue
        is_found = best_overlaps(boxes_xy, priors, row.sources) >= min_overlap
        for title, chosen in [*rows, (f"all, {network} ({row.input_size})", labels > 0)]:
            cells = [is_found[chosen & column] for column in columns]
            texts = [f"{len(cell):,} {cell.float().mean():.0%}" if len(cell) else "-" for cell in cells]
            lines.append(f"  {printable(title, 36):<36}" + "".join(text.rjust(13) for text in texts))
        seen.append(priors)
        rows = []
    return "\n".join(lines) + "\n"


def best_overlaps(boxes_xy, priors_cxcy, sources):
    """The overlap of each box, (M, 4), boundary form, fractional, with its best prior: (M,). sources: the network's."""
    # The priors of one size on a map are copies of each other, one in each cell. The one that overlaps a box most is
    # that of the cell in which the box has its centre; the others need not be looked at.
    best = torch.zeros(len(boxes_xy))
    centers = (boxes_xy[:, :2] + boxes_xy[:, 2:]) / 2  # (M, 2)
    of_maps = utils.cxcy_to_xy(priors_cxcy).split([source.grid**2 * source.n_priors for source in sources])
    for source, of_map in zip(sources, of_maps, strict=True):
        column, row = (centers * source.grid).long().clamp_(0, source.grid - 1).unbind(dim=1)  # (M,) each
        for copies in of_map.view(source.grid, source.grid, source.n_priors, 4).unbind(dim=2):
            best = torch.maximum(best, utils.find_paired_overlap(boxes_xy, copies[row, column]))
    return best


def draw_contact_sheet(output_folder, n_images, seed):
    """Write contact_sheet.jpg: what the lists say, drawn on the images. Swapped coordinates and classes show."""
    label_map = utils.load_label_map(output_folder)
    paths = utils.read_json(os.path.join(output_folder, "TRAIN_images.json"), list)
    objects = utils.read_json(os.path.join(output_folder, "TRAIN_objects.json"), list)
    chosen = sorted(random.Random(seed).sample(range(len(paths)), min(n_images, len(paths))))
    colors = utils.class_colors(label_map)
    names = utils.rev_label_map(label_map)
    width, height = 320, 240  # of a cell, in pixels
    n_columns = min(6, len(chosen))
    n_rows = math.ceil(len(chosen) / n_columns)
    sheet = Image.new("RGB", (n_columns * width, n_rows * height), "white")
    for place, i in enumerate(chosen):
        image = to_pil_image(read_image(paths[i]))
        scale = min((width - 8) / image.width, (height - 8) / image.height)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        boxes = [[value * scale for value in box] for box in objects[i]["boxes"]]
        drawn = draw_boxes(image, boxes, [names[label] for label in objects[i]["labels"]], None, colors)
        sheet.paste(drawn, (place % n_columns * width + 4, place // n_columns * height + 4))
    path = os.path.abspath(os.path.join(output_folder, "contact_sheet.jpg"))
    sheet.save(path, quality=90, subsampling=0)  # thin coloured lines
    print(f"Look at {path}: {len(chosen)} images of TRAIN with their boxes")


# --- Pascal VOC -----------------------------------------------------------------------------------


def prepare_voc(voc07_path, voc12_path, download):
    """Fetch what is missing of VOC2007 and VOC2012, through torchvision, if asked to; else say what can be done."""
    parts = [(voc07_path, "2007", "trainval"), (voc07_path, "2007", "test"), (voc12_path, "2012", "trainval")]
    for path, year, split in parts:
        folder = os.path.abspath(os.path.expanduser(path))
        if path and not download and not os.path.isdir(folder):
            raise FileNotFoundError(
                f"{path}: no such folder.\n"
                "  --download=True fetches VOC2007 and VOC2012 (2.9 GB);\n"
                "  --voc07_path=FOLDER and --voc12_path=FOLDER name them if they are elsewhere;\n"
                "  --train_data=FOLDER takes data of your own, in any of the usual layouts."
            )
        if not path or not download or is_complete(folder, split):
            continue
        root = folder.removesuffix(os.path.join("VOCdevkit", f"VOC{year}"))
        if root == folder:
            raise ValueError(f"{path}: to download, the folder's name must end in VOCdevkit/VOC{year}")
        print(f"Downloading VOC{year} {split} to {folder}")
        try:
            os.makedirs(root, exist_ok=True)
            VOCDetection(root, year=year, image_set=split, download=True)
        except (OSError, RuntimeError) as error:
            hint = f"Fetch it by hand from http://host.robots.ox.ac.uk/pascal/VOC/ and unpack it in {root}"
            raise OSError(f"could not download VOC{year} {split}: {error}\n  {hint}") from error


def is_complete(folder, split):
    """Whether a VOC folder holds a split with all its images, which are unpacked last."""
    file = os.path.join(folder, "ImageSets", "Main", f"{split}.txt")
    if not os.path.isfile(file):
        return False
    return all(os.path.isfile(os.path.join(folder, "JPEGImages", f"{name}.jpg")) for name in read_lines(file))


if __name__ == "__main__":
    utils.override_parameters(globals(), sys.argv[1:])
    with utils.exit_with_message():
        main()
