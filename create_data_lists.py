"""Make the lists of images and objects that training and evaluation read.

    python create_data_lists.py --download=True               fetch VOC2007 and VOC2012 (2.8 GB) first
    python create_data_lists.py                               VOC2007 + VOC2012 that are already there
    python create_data_lists.py --train_data=/path/to/mine    data of your own, with classes of their own

Reads folders in Pascal VOC's layout (or COCO-style JSON files). Writes into `output_folder`:
{TRAIN,TEST}_images.json, {TRAIN,TEST}_objects.json, label_map.json; data_report.txt, which names all that was
dropped or mended; and contact_sheet.jpg, some of the images with their boxes. Any parameter below can be
overridden on the command line with --name=value.
"""

import contextlib
import json
import math
import os
import random
import sys
from multiprocessing.pool import ThreadPool

import torch
from PIL import Image
from torchvision.datasets import VOCDetection
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from annotations import _has_splits, _read_source, _refuse
from datasets import IMAGE_FORMATS, read_image
from detect import draw_boxes
from model import SSD300
from utils import (
    class_colors,
    cxcy_to_xy,
    exit_with_message,
    find_jaccard_overlap,
    make_label_map,
    override_parameters,
    rev_label_map,
    voc_labels,
)

# Pascal VOC: trainval of both years becomes TRAIN, test of 2007 becomes TEST
voc07_path = "data/VOCdevkit/VOC2007"
voc12_path = "data/VOCdevkit/VOC2012"  # "": train on VOC2007 alone
download = False  # True: fetch what is missing of the two folders above

# Data of your own, in place of VOC
train_data = ""  # a folder in VOC layout or a COCO-style JSON file; "": VOC
test_data = ""  # another such folder or file; "": the same as train_data
image_folder = ""  # where the images of a JSON file are; "": beside it, or in `images` beside it
class_names = ()  # the classes in the order of their labels; (): VOC's 20, or all in your annotations
skip_unknown = False  # True: leave out objects of classes not in class_names, instead of stopping

# Splits
train_split = "trainval"  # name of the list of images in ImageSets/Main, without .txt
test_split = "test"
test_fraction = 0.2  # share of the images that becomes TEST where the data have no split files
seed = 0  # of that division

# Output
output_folder = "data"
check_images = True  # False: do not open the images, only the annotations
report_overlap = 0.5  # the report counts the objects of TRAIN that a prior overlaps so much; 0: not
n_sheet_images = 24  # images of TRAIN on the contact sheet, chosen by the seed; 0: no sheet

# The sheet's images; sizes of objects in the report, as sides of a square in pixels of the 300 x 300 image
SHEET_COLUMNS, SHEET_CELL = 6, (320, 240)
SIZE_LIMITS = (16, 32, 64, 128)


def main():
    """Fetch VOC if asked to, then write the lists."""
    if download and not train_data:
        download_voc()
    try:
        if not train_data:
            check_voc_folders()
        create_data_lists(
            voc07_path,
            voc12_path,
            output_folder,
            check_images,
            train_data=train_data,
            test_data=test_data,
            train_split=train_split,
            test_split=test_split,
            image_folder=image_folder,
            class_names=class_names,
            skip_unknown=skip_unknown,
            test_fraction=test_fraction,
            seed=seed,
        )
        if report_overlap:
            report_overlaps()
        if n_sheet_images and check_images:
            draw_contact_sheet()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"The lists are in {os.path.abspath(output_folder)}")


def check_voc_folders():
    """Say what can be done if a VOC folder is missing."""
    for path in filter(None, (voc07_path, voc12_path)):
        if not os.path.isdir(os.path.expanduser(path)):
            raise FileNotFoundError(
                f"{path}: no such folder.\n"
                "  --download=True fetches VOC2007 and VOC2012 (2.8 GB);\n"
                "  --voc07_path=FOLDER and --voc12_path=FOLDER name them if they are elsewhere;\n"
                "  --train_data=FOLDER takes data of your own in VOC's layout."
            )


# What the data report can say of a file, in the order in which it says it.
NOTES = {
    "box_no_area": "Boxes of no area or inverted: dropped",
    "box_not_finite": "Boxes with a coordinate that is no finite number: dropped",
    "box_outside": "Boxes that lie outside the image (or all but a sliver of them): dropped",
    "box_clipped": "Boxes that reached beyond the image: clipped",
    "class_skipped": "Objects of other classes: skipped, as told",
    "difficult_missing": "Objects without <difficult>: taken as 0, not difficult",
    "float_coordinates": "Objects with float coordinates: kept as they are",
    "size_missing": "Annotations without a usable size of the image: taken from the image",
    "size_differs": "Annotations with another size than the image's: the image's taken; look at the boxes",
    "boxes_turned": "Boxes drawn on the image as rotated by its EXIF data: turned back to the stored pixels",
    "exif_unclear": "Images to be rotated by their EXIF data: boxes taken to be drawn without; look at them",
    "image_repeated": "Images listed twice in a split: kept once",
    "image_in_both": "Images in both TRAIN and TEST: the score will flatter",
    "class_not_trained": "Classes without an object in TRAIN: they cannot be learned",
    "split_made": "Data without split files: divided at random, by the seed",
}


def create_data_lists(
    voc07_path="",
    voc12_path="",
    output_folder="data",
    check_images=True,
    *,
    train_data="",
    test_data="",
    train_split="trainval",
    test_split="test",
    image_folder="",
    class_names=(),
    skip_unknown=False,
    test_fraction=0.2,
    seed=0,
):
    """Write the lists of images and objects that training and evaluation read, and print a data report.

    VOC2007 + VOC2012 trainval become the TRAIN lists, VOC2007 test the TEST lists; or any other data:

    voc07_path, voc12_path: the folders VOC2007 and VOC2012, or "" for none.
    output_folder: gets {TRAIN,TEST}_images.json, {TRAIN,TEST}_objects.json, label_map.json, data_report.txt.
    check_images: decode every image, and compare its size with the annotation's. Sizes and boxes in the
        lists are those of the pixels as stored, before any rotation that a photo's EXIF data ask for.
    train_data, test_data: data in place of VOC: a folder in VOC layout, a COCO-style JSON file, or a list
        of these; test_data "" is the same as train_data (with VOC: as voc07_path).
    train_split, test_split: names of the split files in a folder's ImageSets/Main, without .txt.
    image_folder: where the images of a JSON file are, if not beside it or in `images` beside it.
    class_names: the classes, in the order of their labels; () takes VOC's 20 for VOC and, for other data,
        all names found, sorted.
    skip_unknown: leave out objects of classes not in class_names, rather than refuse the data.
    test_fraction, seed: data that serve for both, and have no split files, are divided at random.
    Returns the report, a dict: "label_map"; "splits": {"TRAIN": counts, "TEST": counts}; "notes": a dict of
        kind (those of NOTES) to a list of {"split", "file", "what"}.
    Raises FileNotFoundError and ValueError, naming the files, if something is missing, cannot be read, or
    has an unknown class.
    """
    if not train_data:
        train_data, test_data = [voc07_path, voc12_path], test_data or voc07_path
        class_names = class_names or voc_labels
    train_sources = _as_sources(train_data)
    test_sources = _as_sources(test_data) or train_sources
    if not train_sources:
        raise ValueError("No data: name the VOC folders, or data of your own as train_data")

    splits = {"TRAIN": [], "TEST": []}
    notes = {kind: [] for kind in NOTES}
    for source in dict.fromkeys(train_sources + test_sources):
        if source in train_sources and source in test_sources and not _has_splits(source):
            train, test = _divide(_read_source(source, "", image_folder), test_fraction, seed)
            what = f"{len(train)} images for TRAIN, {len(test)} for TEST (seed {seed})"
            notes["split_made"].append({"split": "", "file": source, "what": what})
        else:
            train = _read_source(source, train_split, image_folder) if source in train_sources else []
            test = _read_source(source, test_split, image_folder) if source in test_sources else []
        splits["TRAIN"] += train
        splits["TEST"] += test

    for split, records in splits.items():
        splits[split] = _without_repeats(records, split, notes)
    every_record = splits["TRAIN"] + splits["TEST"]
    _set_sizes(every_record, check_images, notes)
    for record in every_record:
        _mend_boxes(record, notes)
    label_map = make_label_map(class_names or _find_class_names(every_record))
    _keep_known_classes(every_record, label_map, skip_unknown, notes)
    _compare_splits(splits, label_map, notes)

    counts = {split: _count_objects(records) for split, records in splits.items()}
    report = {"label_map": label_map, "splits": counts, "notes": notes}
    _write_lists(output_folder, splits, report)
    print_data_report(report)
    return report


def _as_sources(data):
    """A path, or a list of paths with "" for none, as a list of absolute paths."""
    paths = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    return [os.path.abspath(os.path.expanduser(path)) for path in paths if path]


def _divide(records, test_fraction, seed):
    """Divide records at random into (those for TRAIN, those for TEST), both in their old order."""
    n_test = round(len(records) * test_fraction)
    if not 0 < n_test < len(records):
        raise ValueError(f"test_fraction {test_fraction} of {len(records)} images leaves TRAIN or TEST empty")
    test = set(random.Random(seed).sample(range(len(records)), n_test))
    train = [record for i, record in enumerate(records) if i not in test]
    return train, [record for i, record in enumerate(records) if i in test]


def _note(notes, kind, record, what):
    """Add a line to the report about the file of a record."""
    notes[kind].append({"split": record["split"], "file": record["file"], "what": what})


def _without_repeats(records, split, notes):
    """The records of a split, each image once."""
    kept = {}
    for record in records:
        record["split"] = split
        record["real_path"] = os.path.realpath(record["image"])
        if kept.setdefault(record["real_path"], record) is not record:
            _note(notes, "image_repeated", record, record["image"])
    return list(kept.values())


def _set_sizes(records, check_images, notes):
    """Make each record's size that of its image: of every one if check_images, else where it is missing."""
    chosen = [record for record in records if check_images or not record["size"]]
    if not chosen:
        return
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:  # images are decoded outside Python's global lock
        work = pool.imap(lambda record: _look_at_image(record["image"], check_images), chosen, chunksize=8)
        found = list(tqdm(work, "Checking images", len(chosen), disable=None))
    _refuse([problem for _, _, problem in found if problem], "image")
    for record, (size, orientation, _) in zip(chosen, found, strict=True):
        _set_size(record, size, orientation, notes)


def _look_at_image(path, decode):
    """What an image file says of itself: (size, EXIF orientation, None), or (None, None, what is wrong).

    The size is (width, height) of the pixels as stored, which is how `read_image()` delivers them.
    """
    if not os.path.isfile(path):
        return None, None, f"{path}: no such image"
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            size, orientation = image.size, image.getexif().get(0x0112, 1)
    except Exception as error:  # Pillow's parsers raise whatever they come upon
        return None, None, f"{path}: not a readable image: {error}"
    if decode:
        try:
            read_image(path)
        except (ValueError, OSError) as error:
            return None, None, str(error)
    return size, orientation if orientation in range(1, 9) else 1, None


def _set_size(record, stored, orientation, notes):
    """Give a record the size of its image as stored, and its boxes in these pixels.

    A photo's EXIF data may ask that it be rotated or mirrored before it is shown. Some labelling tools do so,
    others do not; the size in the annotation tells on which pixels the boxes were drawn, if width and height
    change places. Training reads the pixels as stored, so boxes drawn on the rotated image are turned back.
    """
    declared, shown = record["size"], (stored[1], stored[0]) if orientation >= 5 else stored
    if declared is None:
        _note(notes, "size_missing", record, f"{stored[0]} x {stored[1]}")
    elif declared not in (stored, shown):
        what = f"annotation {declared[0]} x {declared[1]}, image {stored[0]} x {stored[1]}"
        _note(notes, "size_differs", record, what)
    if orientation > 1 and declared == shown != stored:
        record["boxes"] = _turn_back(record["boxes"], shown, orientation)
        _note(notes, "boxes_turned", record, f"EXIF orientation {orientation}, {len(record['boxes'])} boxes")
    elif orientation > 1 and (stored == shown or declared != stored):
        _note(notes, "exif_unclear", record, f"EXIF orientation {orientation}")
    record["size"] = stored


def _turn_back(boxes_xy_pixels, shown, orientation):
    """Move boxes from an image as shown, of size `shown`, to its pixels as stored; EXIF orientation 5 to 8.

    All four swap x and y; besides, 6 and 7 mirror the shown image left to right, 7 and 8 top to bottom.
    """
    width, height = shown
    turned = []
    for x_min, y_min, x_max, y_max in boxes_xy_pixels:
        if orientation in (6, 7):
            x_min, x_max = width - x_max, width - x_min
        if orientation in (7, 8):
            y_min, y_max = height - y_max, height - y_min
        turned.append([y_min, x_min, y_max, x_max])
    return turned


def _mend_boxes(record, notes):
    """Clip a record's boxes to the image and drop those that nothing can be learned from."""
    kept = []
    for name, box, difficulty in zip(record["names"], record["boxes"], record["difficulties"], strict=True):
        kind, mended = _mend_box(box, record["size"], record["first_pixel"])
        if kind:
            first = record["first_pixel"]
            written = ", ".join(f"{value:g}" for value in (box[0] + first, box[1] + first, box[2], box[3]))
            what = f"{name} [{written}] in {record['size'][0]} x {record['size'][1]}"
            _note(notes, kind, record, what)
        if mended:
            kept.append((name, mended, difficulty))
    for kind in ("difficult_missing", "float_coordinates"):
        count = record[kind]
        if count:
            _note(notes, kind, record, f"{count} object{'s' * (count > 1)}")
    record["names"], record["boxes"], record["difficulties"] = ([row[i] for row in kept] for i in range(3))


def _mend_box(box, size, first_pixel):
    """(None or what is to be noted, the box inside the image or None) of a box in continuous pixels."""
    if not all(math.isfinite(value) for value in box):
        return "box_not_finite", None
    # Where both ends are included, one pixel is written as xmin = xmax. No annotator means that: it is what a
    # click without a drag leaves behind.
    if min(box[2] - box[0], box[3] - box[1]) <= first_pixel:
        return "box_no_area", None
    limits = (*size, *size)
    clipped = [min(max(value, 0.0), float(limit)) for value, limit in zip(box, limits, strict=True)]
    # A tenth of a pixel shows nothing, and float32 must still tell the two ends apart as fractions.
    sides = (clipped[2] - clipped[0], clipped[3] - clipped[1])
    if any(side < max(0.1, 1e-6 * limit) for side, limit in zip(sides, size, strict=True)):
        return "box_outside", None
    return ("box_clipped" if clipped != box else None), clipped


def _find_class_names(records):
    """All class names in the records, sorted; a class named "background" is left to be refused as unknown."""
    names = {name for record in records for name in record["names"]} - {"background"}
    if not names:
        raise ValueError("The annotations hold no object of any class: there is nothing to learn from")
    return sorted(names)


def _keep_known_classes(records, label_map, skip_unknown, notes):
    """Refuse objects of a class that is not in the label map, or leave them out if skip_unknown."""
    unknown = {}
    for record in records:
        for i in reversed(range(len(record["names"]))):
            name = record["names"][i]
            if name in label_map and name != "background":
                continue
            unknown.setdefault(name, []).append(record["file"])
            if skip_unknown:
                _note(notes, "class_skipped", record, name)
                del record["names"][i], record["boxes"][i], record["difficulties"][i]
    if unknown and not skip_unknown:
        found = [f"{name!r}: {len(files)} objects, first in {files[0]}" for name, files in unknown.items()]
        headline = (
            f"{len(unknown)} unknown classes (class_names has {len(label_map) - 1}); "
            "add them to class_names, or leave their objects out with skip_unknown:"
        )
        raise ValueError("\n  ".join([headline, *found[:50]]))


def _compare_splits(splits, label_map, notes):
    """Note what makes TRAIN and TEST unfit for one another; ValueError if TRAIN has nothing to learn from."""
    training_images = {record["real_path"] for record in splits["TRAIN"]}
    for record in splits["TEST"]:
        if record["real_path"] in training_images:
            _note(notes, "image_in_both", record, record["image"])
    learned = {name for record in splits["TRAIN"] for name in record["names"]}
    if not learned:
        raise ValueError("The training images hold no object: there is nothing to learn from")
    for name in label_map:
        if name not in learned and name != "background":
            notes["class_not_trained"].append({"split": "TRAIN", "file": "", "what": name})


def _count_objects(records):
    """What the report says of one split: counts of images and objects, the latter also for each class."""
    counts = {"images": len(records), "objects": 0, "easy": 0, "difficult": 0, "classes": {}}
    counts["images_without_objects"] = sum(not record["names"] for record in records)
    for record in records:
        for name, difficulty in zip(record["names"], record["difficulties"], strict=True):
            of_class = counts["classes"].setdefault(name, {"easy": 0, "difficult": 0})
            for table in (counts, of_class):
                table["difficult" if difficulty else "easy"] += 1
            counts["objects"] += 1
    return counts


def _write_lists(output_folder, splits, report):
    """Write all files of `create_data_lists()`."""
    label_map = report["label_map"]
    texts = {"label_map.json": json.dumps(label_map), "data_report.txt": data_report_text(report, None)}
    for split, records in splits.items():
        objects = [
            {
                "boxes": record["boxes"],
                "labels": [label_map[name] for name in record["names"]],
                "difficulties": record["difficulties"],
                "size": record["size"],
            }
            for record in records
        ]
        texts[f"{split}_images.json"] = json.dumps([record["image"] for record in records])
        texts[f"{split}_objects.json"] = json.dumps(objects)
    _write_together(output_folder, texts)


def _write_together(folder, texts):
    """Write text files so that the old ones stay whole until all new ones are: the disk may be full."""
    temporary = {name: os.path.join(folder, f"{name}.{os.getpid()}.tmp") for name in texts}
    try:
        os.makedirs(folder, exist_ok=True)
        for name, text in texts.items():
            with open(temporary[name], "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for name in texts:
            os.replace(temporary[name], os.path.join(folder, name))
    except OSError as error:
        raise OSError(f"{folder}: could not write the data lists: {error}") from error
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                os.remove(path)


def data_report_text(report, max_lines=10):
    """The report of `create_data_lists()` in words.

    max_lines: how many files to name for each kind of note; None names all.
    """
    lines = []
    for split, counts in report["splits"].items():
        lines.append(
            f"{split}: {counts['images']:,} images ({counts['images_without_objects']:,} without objects), "
            f"{counts['objects']:,} objects ({counts['easy']:,} easy, {counts['difficult']:,} difficult)"
        )
    lines += ["", "Objects (of them difficult)   " + "".join(split.rjust(18) for split in report["splits"])]
    for name in report["label_map"]:
        if name != "background":
            line = f"  {name:<28}"
            for counts in report["splits"].values():
                n = counts["classes"].get(name, {"easy": 0, "difficult": 0})
                line += f"{n['easy'] + n['difficult']:,} ({n['difficult']:,})".rjust(18)
            lines.append(line)
    for kind, notes in report["notes"].items():
        if notes:
            lines += ["", f"{NOTES[kind]} ({len(notes)})"]
            lines += ["  " + " ".join(filter(None, note.values())) for note in notes[:max_lines]]
            if max_lines is not None and len(notes) > max_lines:
                lines.append(f"  ... and {len(notes) - max_lines} more, all in data_report.txt")
    # A file name may hold bytes that are no text.
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode() + "\n"


def print_data_report(report, max_lines=10):
    """Print the report of `create_data_lists()`; data_report.txt, beside the lists, has it in full."""
    print(data_report_text(report, max_lines))


# ----------------------------------------------------------------------------------------------
# A look at the data before they are trained on
# ----------------------------------------------------------------------------------------------


def read_lists(split):
    """The lists just written: label_map, list of image paths, list of {"boxes", "labels", "size", ...}."""
    names = ("label_map.json", f"{split}_images.json", f"{split}_objects.json")
    contents = []
    for name in names:
        with open(os.path.join(output_folder, name), encoding="utf-8") as file:
            contents.append(json.load(file))
    return contents


def report_overlaps():
    """Print what SSD300 can find of the objects in TRAIN, by class and size; data_report.txt gets it, too."""
    label_map, _, objects = read_lists("TRAIN")
    text = overlap_table(label_map, objects, SSD300.create_prior_boxes())
    print(text)
    with open(os.path.join(output_folder, "data_report.txt"), "a", encoding="utf-8") as file:
        file.write(f"\n{text}")


def overlap_table(label_map, objects, priors_cxcy):
    """A table of classes and sizes: the number of objects, and the share whose best prior overlaps enough.

    label_map: dict of class name to label. objects: list of {"boxes", "labels", "size"}, one for each image.
    priors_cxcy: (P, 4), center-size form, fractional. Returns a text.
    """
    labels = torch.tensor([label for image in objects for label in image["labels"]])  # (n,)
    boxes = torch.tensor([box for image in objects for box in image["boxes"]])  # (n, 4), pixels
    sizes = torch.tensor([image["size"] * 2 for image in objects for _ in image["labels"]])  # (n, 4)
    boxes_xy = boxes / sizes  # fractional: where the priors are, whatever the shape of the image
    sides = 300 * (boxes_xy[:, 2:] - boxes_xy[:, :2]).prod(dim=1).sqrt()  # (n,), pixels of the resized image
    is_found = find_best_overlaps(boxes_xy, cxcy_to_xy(priors_cxcy)) >= report_overlap
    column = torch.bucketize(sides, torch.tensor(SIZE_LIMITS, dtype=torch.float32), right=True)
    titles = [f"{low}-{high}" for low, high in zip((0, *SIZE_LIMITS), (*SIZE_LIMITS, 300), strict=True)] + ["all"]
    lines = [
        "Objects of TRAIN by size (root of the area, in pixels of the 300 x 300 image), and of each number the",
        f"share whose best prior overlaps {report_overlap:g} or more; to the others no prior fits well.",
        f"  {'':<20}" + "".join(title.rjust(15) for title in titles),
    ]
    for name, label in [*label_map.items(), ("all", None)]:
        if label != 0:
            of_class = torch.full_like(labels, True, dtype=torch.bool) if label is None else labels == label
            columns = [of_class & (column == i) for i in range(len(SIZE_LIMITS) + 1)] + [of_class]
            lines.append(f"  {name[:20]:<20}" + "".join(share_text(is_found[cell]).rjust(15) for cell in columns))
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode() + "\n"


def share_text(is_found):
    """Of a tensor of booleans, how many there are, and how many in a hundred are true."""
    return f"{len(is_found):,} {is_found.float().mean():.0%}" if len(is_found) else "-"


def find_best_overlaps(boxes_xy, priors_xy):
    """The overlap of each box with its best prior. Both in boundary form, (n, 4) and (P, 4); returns (n,)."""
    chunks = [find_jaccard_overlap(chunk, priors_xy).amax(dim=1) for chunk in boxes_xy.split(200)]
    return torch.cat(chunks)


def draw_contact_sheet():
    """Write contact_sheet.jpg: what the lists say, drawn on the images. Swapped coordinates and classes show."""
    label_map, paths, objects = read_lists("TRAIN")
    chosen = sorted(random.Random(seed).sample(range(len(paths)), min(n_sheet_images, len(paths))))
    colors, class_names = class_colors(label_map), rev_label_map(label_map)
    width, height = SHEET_CELL
    n_columns = min(SHEET_COLUMNS, len(chosen))
    sheet = Image.new("RGB", (n_columns * width, -(-len(chosen) // n_columns) * height), "white")
    for place, i in enumerate(chosen):
        image = to_pil_image(read_image(paths[i]))
        names = [class_names[label] for label in objects[i]["labels"]]
        scale = min((width - 8) / image.width, (height - 8) / image.height)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        boxes = [[value * scale for value in box] for box in objects[i]["boxes"]]
        corner = place % n_columns * width + 4, place // n_columns * height + 4
        sheet.paste(draw_boxes(image, boxes, names, None, colors), corner)
    path = os.path.abspath(os.path.join(output_folder, "contact_sheet.jpg"))
    sheet.save(path, quality=90, subsampling=0)  # thin coloured lines
    print(f"Look at {path}: {len(chosen)} images of TRAIN with their boxes")


# ----------------------------------------------------------------------------------------------
# Pascal VOC
# ----------------------------------------------------------------------------------------------


def download_voc():
    """Fetch the parts of VOC2007 and VOC2012 that are not there in full, through torchvision."""
    parts = [(voc07_path, "2007", "trainval"), (voc07_path, "2007", "test"), (voc12_path, "2012", "trainval")]
    for path, year, split in parts:
        path = os.path.abspath(os.path.expanduser(path)) if path else ""
        if not path or is_complete(path, split):
            continue
        root = path.removesuffix(os.path.join("VOCdevkit", f"VOC{year}"))
        if root == path:
            raise SystemExit(f"error: {path}: to download, the folder's name must end in VOCdevkit/VOC{year}")
        print(f"Downloading VOC{year} {split} to {path}")
        try:
            os.makedirs(root, exist_ok=True)
            VOCDetection(root, year=year, image_set=split, download=True)
        except (OSError, RuntimeError) as error:
            raise SystemExit(
                f"error: could not download VOC{year} {split}: {error}\n"
                f"  Fetch it by hand from http://host.robots.ox.ac.uk/pascal/VOC/ and unpack it in {root}"
            ) from error


def is_complete(path, split):
    """Whether a VOC folder holds a split with all its images and annotations."""
    split_file = os.path.join(path, "ImageSets", "Main", f"{split}.txt")
    if not os.path.isfile(split_file):
        return False
    with open(split_file, encoding="utf-8") as file:
        names = file.read().split()
    return all(
        os.path.isfile(os.path.join(path, folder, name + extension))
        for name in names
        for folder, extension in (("JPEGImages", ".jpg"), ("Annotations", ".xml"))
    )


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    with exit_with_message():
        main()
