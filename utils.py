"""The parts that the scripts share, in the order in which the pipeline needs them.

    1. Boxes                        coordinate forms and overlap
    2. Labels and colours           class names, label maps, one colour a class
    3. Annotations and data lists   Pascal VOC's XML files -> JSON lists
    4. Augmentations                a photo and its boxes -> a 300 x 300 training image
    5. The VOC metric               detections and true objects -> average precision
    6. Checkpoints                  saved whole or not at all, loaded without running code
    7. Parameters                   `--name=value` for the block at the top of each script

Box coordinates are continuous: a box covers [x_min, x_max) x [y_min, y_max), and the whole image is
[0, 0, W, H]. They are fractions of the image's width and height unless a name says `pixels`. Names say
the form:

    xy       boundary      (x_min, y_min, x_max, y_max)
    cxcy     center-size   (c_x, c_y, w, h)
    gcxgcy   offsets       (g_c_x, g_c_y, g_w, g_h), of a box from a prior

Shapes in comments: N images in a batch, P = 8732 priors, C classes (background included), M objects.
"""

import ast
import contextlib
import errno
import functools
import glob
import io
import json
import math
import os
import pickle
import random
import re
import stat
import zipfile
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

try:  # torchvision 0.29 announces that a later version will leave decoding to another package
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None  # Pillow decodes instead: the same pixels in twice the time

# ----------------------------------------------------------------------------------------------
# 1. Boxes
# ----------------------------------------------------------------------------------------------


def xy_to_cxcy(boxes_xy):
    """Boxes from boundary to center-size form.

    boxes_xy: (..., 4) float tensor, boundary form, fractional or in pixels.
    Returns a (..., 4) tensor in center-size form, in the same unit.
    """
    mins, maxs = boxes_xy[..., :2], boxes_xy[..., 2:]
    return torch.cat([(mins + maxs) / 2, maxs - mins], dim=-1)


def cxcy_to_xy(boxes_cxcy):
    """Boxes from center-size to boundary form: the inverse of `xy_to_cxcy()`.

    boxes_cxcy: (..., 4) float tensor, center-size form, fractional or in pixels.
    Returns a (..., 4) tensor in boundary form, in the same unit.
    """
    centers, half_sizes = boxes_cxcy[..., :2], boxes_cxcy[..., 2:] / 2
    return torch.cat([centers - half_sizes, centers + half_sizes], dim=-1)


# The Caffe code's "variances": they bring the offsets of a typical match to about unit size, so that the
# two losses weigh about the same. (Offsets of the centre are divided by 0.1, of the size by 0.2.)
CENTER_VARIANCE = 0.1
SIZE_VARIANCE = 0.2


def cxcy_to_gcxgcy(boxes_cxcy, priors_cxcy):
    """Encode boxes as offsets from priors (SSD paper, equation 2; variances from the Caffe code).

    boxes_cxcy: (..., P, 4) float tensor, center-size form, fractional, of positive width and height.
    priors_cxcy: (P, 4) float tensor, center-size form, fractional: one prior for each box.
    Returns the (..., P, 4) offsets, without unit.
    """
    g_centers = (boxes_cxcy[..., :2] - priors_cxcy[..., :2]) / (priors_cxcy[..., 2:] * CENTER_VARIANCE)
    g_sizes = torch.log(boxes_cxcy[..., 2:] / priors_cxcy[..., 2:]) / SIZE_VARIANCE
    return torch.cat([g_centers, g_sizes], dim=-1)


def gcxgcy_to_cxcy(offsets_gcxgcy, priors_cxcy):
    """Decode offsets from priors into boxes: the inverse of `cxcy_to_gcxgcy()`.

    offsets_gcxgcy: (..., P, 4) float tensor, as a model predicts them.
    priors_cxcy: (P, 4) float tensor, center-size form, fractional: one prior for each row of offsets.
    Returns (..., P, 4) boxes in center-size form, fractional; they may reach beyond the image.
    """
    centers = offsets_gcxgcy[..., :2] * CENTER_VARIANCE * priors_cxcy[..., 2:] + priors_cxcy[..., :2]
    sizes = torch.exp(offsets_gcxgcy[..., 2:] * SIZE_VARIANCE) * priors_cxcy[..., 2:]
    return torch.cat([centers, sizes], dim=-1)


def find_intersection(boxes_1_xy, boxes_2_xy):
    """Area that each box of one set shares with each box of another.

    boxes_1_xy: (..., n1, 4), boxes_2_xy: (..., n2, 4) float tensors, boundary form, in the same unit.
    Returns a (..., n1, n2) tensor, in that unit squared; 0 where two boxes only touch.
    """
    # One coordinate at a time, contiguous: three times as fast as with coordinates in the last dimension.
    x_min_1, y_min_1, x_max_1, y_max_1 = boxes_1_xy.movedim(-1, 0).contiguous()[..., :, None]  # (..., n1, 1)
    x_min_2, y_min_2, x_max_2, y_max_2 = boxes_2_xy.movedim(-1, 0).contiguous()[..., None, :]  # (..., 1, n2)
    widths = torch.minimum(x_max_1, x_max_2).sub_(torch.maximum(x_min_1, x_min_2)).clamp_(min=0)
    heights = torch.minimum(y_max_1, y_max_2).sub_(torch.maximum(y_min_1, y_min_2)).clamp_(min=0)
    return widths.mul_(heights)  # (..., n1, n2)


def find_jaccard_overlap(boxes_1_xy, boxes_2_xy):
    """Overlap (Jaccard index, intersection over union) of each box of one set with each of another.

    boxes_1_xy: (..., n1, 4), boxes_2_xy: (..., n2, 4) float tensors, boundary form, in the same unit.
    Returns a (..., n1, n2) tensor in [0, 1]; 0 for two boxes of no area.
    """
    intersection = find_intersection(boxes_1_xy, boxes_2_xy)
    areas_1 = (boxes_1_xy[..., 2:] - boxes_1_xy[..., :2]).prod(dim=-1)  # (..., n1)
    areas_2 = (boxes_2_xy[..., 2:] - boxes_2_xy[..., :2]).prod(dim=-1)  # (..., n2)
    union = (areas_1[..., :, None] + areas_2[..., None, :]).sub_(intersection)
    return intersection.div_(union.clamp_(min=torch.finfo(union.dtype).tiny))  # 0 / 0 is to be 0


# ----------------------------------------------------------------------------------------------
# 2. Labels and colours
# ----------------------------------------------------------------------------------------------

voc_labels = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def make_label_map(class_names):
    """Number the classes from 1, in the order given; 0 is the background.

    class_names: sequence of strings, without "background".
    Returns a dict of name to label: {"background": 0, first name: 1, ...}.
    Raises ValueError if a name is empty, no string, given twice, or "background", and if there is none.
    """
    if not class_names or isinstance(class_names, str):
        raise ValueError(f"class_names must be a sequence with at least one name, not {class_names!r}")
    label_map = {"background": 0}
    for name in class_names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{name!r} is no class name: a name is a string that is not empty")
        if name in label_map:
            reason = "label 0 has this name" if name == "background" else "the name is given twice"
            raise ValueError(f"{name!r} cannot be a class: {reason}")
        label_map[name] = len(label_map)
    return label_map


def rev_label_map(label_map):
    """The names by their labels: the inverse of a label map.

    label_map: dict of name to label, no label twice.
    Returns a dict of label to name.
    """
    return {label: name for name, label in label_map.items()}


def load_label_map(data_folder):
    """Read the label map that `create_data_lists()` wrote.

    data_folder: the folder with label_map.json.
    Returns a dict of name to label: "background" is 0, the classes are 1, 2, ... without a gap.
    Raises FileNotFoundError if the file is missing; ValueError, naming it, if it holds anything else.
    """
    path = os.path.join(data_folder, "label_map.json")
    try:
        with open(path, encoding="utf-8") as file:
            label_map = json.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; create_data_lists.py writes it") from None
    except (OSError, ValueError, RecursionError) as error:  # json raises RecursionError on a thousand brackets
        raise ValueError(f"{path}: cannot be read ({error}); run create_data_lists.py again") from None
    labels = list(label_map.values()) if isinstance(label_map, dict) else []
    are_numbers = all(type(label) is int for label in labels)
    if not are_numbers or sorted(labels) != list(range(max(len(labels), 2))) or label_map.get("background") != 0:
        raise ValueError(
            f'{path}: not a label map ("background": 0 and one class or more, numbered from 1 on without gaps); '
            "run create_data_lists.py again"
        )
    return dict(sorted(label_map.items(), key=lambda item: item[1]))


def class_colors(label_map):
    """A colour for each class: far apart to the eye, bright enough for black letters, always the same.

    Each next class takes, of a grid of colours that are neither pale nor dark, the one whose nearest colour
    so far is farthest away. A label's colour thus does not depend on how many classes follow. Distances are
    measured in the OKLab colour space (B. Ottosson, 2020), where they are about as large as they look.

    label_map: dict of name to label.
    Returns a dict of name to "#rrggbb" for every class but the background. (More classes than the grid has
    colours, over two thousand, share some.)
    """
    levels = np.arange(0, 256, 15)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    oklab = _rgb_to_oklab(rgb)  # (colours, 3): lightness, green-red, blue-yellow
    legible = (oklab[:, 0] > 0.6) & (oklab[:, 0] < 0.9) & (np.hypot(oklab[:, 1], oklab[:, 2]) > 0.1)
    rgb, oklab = rgb[legible], oklab[legible]

    colors = []
    distances = -oklab[:, 0] + np.hypot(oklab[:, 1], oklab[:, 2])  # the first colour: a strong one
    for _ in range(min(len(label_map) - 1, len(rgb))):
        chosen = int(distances.argmax())
        to_chosen = np.linalg.norm(oklab - oklab[chosen], axis=1)
        distances = np.minimum(distances, to_chosen) if colors else to_chosen
        colors.append("#{:02x}{:02x}{:02x}".format(*rgb[chosen]))
    names = [name for name, label in sorted(label_map.items(), key=lambda item: item[1]) if label > 0]
    return {name: colors[i % len(colors)] for i, name in enumerate(names)}


def _rgb_to_oklab(rgb):
    """(n, 3) sRGB colours in [0, 255] as (n, 3) float OKLab; the matrices are those of OKLab's definition."""
    fractions = rgb / 255
    linear = np.where(fractions > 0.04045, ((fractions + 0.055) / 1.055) ** 2.4, fractions / 12.92)
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_oklab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.cbrt(linear @ np.transpose(to_cones)) @ np.transpose(to_oklab)


# ----------------------------------------------------------------------------------------------
# 3. Annotations and data lists
# ----------------------------------------------------------------------------------------------

MAX_ANNOTATION_BYTES = 10_000_000  # VOC's largest annotation has 14 kB
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")

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


def parse_annotation(path):
    """Read one annotation in Pascal VOC's XML format.

    VOC counts pixels from 1 and includes both ends; the boxes that come back are continuous.

    path: the XML file. Entities, which could expand without bounds or reach other files, are refused.
    Returns a dict:
        boxes: list of [xmin - 1, ymin - 1, xmax, ymax], floats, boundary form, in pixels, as written: they
            may be inverted, reach beyond the image, or not be finite;
        names, difficulties: for each box the class name and 0 or 1 (0 where <difficult> is missing);
        width, height: ints in pixels; both None where <size> is missing, zero or absurd;
        difficult_missing, float_coordinates: how many objects lack <difficult>, have fractions of pixels.
    Raises FileNotFoundError if there is no such file; ValueError, naming file and value, if it is no
    annotation, or an object lacks its name or box.
    """
    root = _parse_xml(path)
    if root.tag != "annotation":
        raise ValueError(f"{path}: no VOC annotation: its root is <{root.tag[:40]}>, not <annotation>")
    size = _parse_size(root.find("size"), path) or (None, None)
    annotation = {"boxes": [], "names": [], "difficulties": [], "width": size[0], "height": size[1]}
    annotation.update(difficult_missing=0, float_coordinates=0)
    # Only the objects right below the root: the person layout challenge nests <part>s with boxes in them.
    for i, element in enumerate(root.findall("object"), start=1):
        name = (element.findtext("name") or "").strip()
        if not name:
            raise ValueError(f"{path}: object {i} has no <name>")
        box, where = element.find("bndbox"), f"{path}: object {i} ({name})"
        if box is None:
            raise ValueError(f"{where} has no <bndbox>")
        corners = [_parse_number(box, tag, where) for tag in ("xmin", "ymin", "xmax", "ymax")]
        difficult = (element.findtext("difficult") or "").strip()
        if difficult not in ("", "0", "1"):
            raise ValueError(f"{where}: <difficult> is {difficult[:40]!r}, not 0 or 1")
        annotation["boxes"].append([corners[0] - 1, corners[1] - 1, corners[2], corners[3]])
        annotation["names"].append(name)
        annotation["difficulties"].append(int(difficult or 0))
        annotation["difficult_missing"] += not difficult
        annotation["float_coordinates"] += any(math.isfinite(c) and c != int(c) for c in corners)
    return annotation


def _parse_xml(path):
    """The root element of an XML file that declares no entities; ValueError, naming it, for any other."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such annotation")
    with open(path, "rb") as file:
        content = file.read(MAX_ANNOTATION_BYTES + 1)
    if len(content) > MAX_ANNOTATION_BYTES:
        raise ValueError(f"{path}: no annotation: larger than {MAX_ANNOTATION_BYTES:,} bytes")
    # The bytes can be searched before any parser sees them, because no encoding that expat knows hides them,
    # except UTF-16, which has zero bytes.
    if b"\0" in content:
        raise ValueError(f"{path}: holds zero bytes (UTF-16?); save it as UTF-8")
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise ValueError(f"{path}: a document type or an entity is declared, which is refused; remove it")
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: unreadable XML: {error}") from error


def _parse_number(parent, tag, where):
    """The number in the child `tag` of an element, possibly infinite or NaN."""
    text = parent.findtext(tag)
    if text is None:
        raise ValueError(f"{where} has no <{tag}>")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{where}: <{tag}> is {text.strip()[:40]!r}, not a number") from None


def _parse_size(element, path):
    """(width, height) of the <size> element; None where it says nothing usable."""
    tags = ("width", "height")
    if element is None or not all((element.findtext(tag) or "").strip() for tag in tags):
        return None
    return _usable_size(*(_parse_number(element, tag, path) for tag in tags))


def _usable_size(width, height):
    """(width, height) as ints, or None where they cannot be those of an image that could be read."""
    sides = (width, height)
    if all(type(side) in (int, float) and 1 <= side <= MAX_IMAGE_PIXELS for side in sides):
        return int(width), int(height)
    return None


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


# Every source of data is turned into records, one dict an image, and the rest of this section knows records
# alone: {"image": its path, "file": the path to name in the report, "size": (width, height) or None,
# "boxes", "names", "difficulties": as from parse_annotation(), "first_pixel": 1 where the boxes were written
# with both ends included, as in VOC, or 0, "difficult_missing", "float_coordinates": counts}, and from
# _without_repeats() on "split" and "real_path", which is the same for all names of one image.


def _as_sources(data):
    """A path, or a list of paths with "" for none, as a list of absolute paths."""
    paths = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    return [os.path.abspath(os.path.expanduser(path)) for path in paths if path]


def _read_source(source, split, image_folder):
    """The records of one split ("": of all images) of a folder in VOC layout or a COCO-style JSON file."""
    if source.lower().endswith(".json"):
        return _read_coco(source, image_folder)
    records, problems = [], []
    for name in _list_voc(source, split):
        try:
            records.append(_read_voc_image(source, name))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    _refuse(problems, "annotation")
    return records


def _read_voc_image(folder, name):
    """The record of one image of a folder in VOC layout."""
    file = os.path.join(folder, "Annotations", name + ".xml")
    annotation = parse_annotation(file)
    width, height = annotation.pop("width"), annotation.pop("height")
    size = (width, height) if width else None
    image = _find_image(os.path.join(folder, "JPEGImages"), name)
    return {"image": image, "file": file, "size": size, "first_pixel": 1, **annotation}


def _find_image(folder, name):
    """The path of the image file of this name, whatever its extension; <name>.jpg if there is none."""
    stem = os.path.join(folder, name)
    if os.path.isdir(folder):
        for extension in IMAGE_EXTENSIONS + tuple(extension.upper() for extension in IMAGE_EXTENSIONS):
            if os.path.isfile(stem + extension):
                return stem + extension
    return stem + ".jpg"


def _has_splits(source):
    """Whether `source` is a folder in VOC layout with split files."""
    folder = os.path.join(source, "ImageSets", "Main")
    return os.path.isdir(folder) and any(name.endswith(".txt") for name in os.listdir(folder))


def _list_voc(folder, split):
    """The names (no extension) of the images of a split, or of all where the folder has no split files."""
    annotations = os.path.join(folder, "Annotations")
    if not os.path.isdir(annotations):
        raise FileNotFoundError(
            f"{annotations}: no such folder; VOC layout means Annotations, JPEGImages and ImageSets/Main"
        )
    if _has_splits(folder):
        names = _read_split_file(folder, split)
    else:
        names = sorted(os.path.splitext(name)[0] for name in os.listdir(annotations) if name.endswith(".xml"))
    if not names:
        raise ValueError(f"{folder}: {f'split {split!r}' if split else 'Annotations'} has no images")
    return names


def _read_split_file(folder, split):
    """The lines of ImageSets/Main/<split>.txt. A name may have spaces, and bytes that are no UTF-8."""
    path = os.path.join(folder, "ImageSets", "Main", split + ".txt")
    if not os.path.isfile(path):
        found = sorted((name for name in os.listdir(os.path.dirname(path)) if name.endswith(".txt")), key=len)
        raise FileNotFoundError(
            f"{path}: no such split file; name another as train_split or test_split ({', '.join(found[:8])}), or "
            f"move {os.path.dirname(path)} away to have the images divided at random"
        )
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        return [line.strip() for line in file if line.strip()]


def _read_coco(path, image_folder):
    """The records of a COCO-style JSON file: {"images": [...], "annotations": [...], "categories": [...]}.

    A box is [x_min, y_min, width, height] in continuous pixels. A crowd, one box around many, counts as a
    difficult object.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:  # json raises RecursionError on a thousand brackets
        raise ValueError(f"{path}: unreadable JSON: {error}") from error

    names = {}
    for where, category in _coco_entries(content, "categories", path):
        category_id = _coco_field(category, "id", (int, str), where)
        if category_id in names:
            raise ValueError(f"{where}: 'id' {category_id!r} is given twice")
        names[category_id] = _coco_field(category, "name", str, where).strip()
    records = {}
    for where, image in _coco_entries(content, "images", path):
        image_id = _coco_field(image, "id", (int, str), where)
        if image_id in records:
            raise ValueError(f"{where}: 'id' {image_id!r} is given twice")
        records[image_id] = _coco_image(image, where, path, image_folder)
    for where, annotation in _coco_entries(content, "annotations", path):
        record = records.get(_coco_field(annotation, "image_id", (int, str), where))
        name = names.get(_coco_field(annotation, "category_id", (int, str), where))
        if not record or not name:
            missing = "category_id" if record else "image_id"
            raise ValueError(f"{where}: {missing} {annotation[missing]!r} is not in the file, or has no name")
        record["names"].append(name)
        record["boxes"].append(_coco_box(annotation, where))
        iscrowd = annotation.get("iscrowd", 0)
        if iscrowd not in (0, 1):
            raise ValueError(f"{where}: 'iscrowd' is {repr(iscrowd)[:60]}, not 0 or 1")
        record["difficulties"].append(int(iscrowd))
    if not records:
        raise ValueError(f"{path}: has no images")
    return list(records.values())


def _coco_entries(content, key, path):
    """Each dict in the list `key` of a COCO-style file, with the words that say where it stands."""
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: no COCO-style file: it has no list of {key!r}")
    return [(f"{path}: {key}[{i}]", entry) for i, entry in enumerate(entries)]


def _coco_field(entry, key, types, where):
    """The value of a field; ValueError, naming file and field, if it is missing or of another type."""
    value = entry.get(key)
    if not isinstance(value, types) or isinstance(value, bool):
        raise ValueError(f"{where}: {key!r} is {'missing' if key not in entry else repr(value)[:60]}")
    return value


def _coco_box(annotation, where):
    """The "bbox" of an entry in boundary form."""
    values = _coco_field(annotation, "bbox", list, where)
    if len(values) != 4 or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{where}: 'bbox' is {repr(values)[:60]}, not four numbers")
    # An integer may be too large for a float.
    x_min, y_min, width, height = (float(value) if abs(value) < 1e300 else math.inf for value in values)
    return [x_min, y_min, x_min + width, y_min + height]


def _coco_image(image, where, path, image_folder):
    """The record, without objects yet, of one entry of "images"."""
    name = _coco_field(image, "file_name", str, where)
    if not name or "\0" in name:
        raise ValueError(f"{where}: 'file_name' is {name[:60]!r}")
    folder, stem = os.path.dirname(path), os.path.splitext(os.path.basename(path))[0]
    # COCO's own folders: annotations/instances_train2017.json and, beside `annotations`, train2017.
    own = os.path.join(folder, os.pardir, stem.rpartition("_")[2])
    folders = [image_folder] if image_folder else [folder, os.path.join(folder, "images"), own]
    candidates = [os.path.abspath(os.path.join(folder, name)) for folder in folders]
    file = next((candidate for candidate in candidates if os.path.isfile(candidate)), candidates[0])
    for key in image.keys() & {"width", "height"}:
        _coco_field(image, key, (int, float), where)
    size = _usable_size(image.get("width"), image.get("height"))
    record = {"image": file, "file": file, "size": size, "first_pixel": 0, "boxes": [], "names": []}
    return {**record, "difficulties": [], "difficult_missing": 0, "float_coordinates": 0}


def _divide(records, test_fraction, seed):
    """Divide records at random into (those for TRAIN, those for TEST), both in their old order."""
    n_test = round(len(records) * test_fraction)
    if not 0 < n_test < len(records):
        raise ValueError(f"test_fraction {test_fraction} of {len(records)} images leaves TRAIN or TEST empty")
    test = set(random.Random(seed).sample(range(len(records)), n_test))
    train = [record for i, record in enumerate(records) if i not in test]
    return train, [record for i, record in enumerate(records) if i in test]


def _refuse(problems, what):
    """Raise one ValueError that lists all problems (the first 50 in full), if there are any."""
    if problems:
        lines = problems[:50] + [f"... and {len(problems) - 50} more"] * (len(problems) > 50)
        headline = f"{len(problems)} {what}{'s' * (len(problems) > 1)} cannot be used:"
        raise ValueError("\n  ".join([headline, *lines]))


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
# 4. Augmentations
# ----------------------------------------------------------------------------------------------


IMAGE_SIZE = 300  # width and height of the network's input, in pixels

# Mean and standard deviation of ImageNet's RGB pixels, for values in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The ImageNet mean in bytes: what surrounds a photo that is zoomed out.
FILLER = (124, 116, 104)

# A header that claims more pixels than this is refused before anything is allocated for it.
MAX_IMAGE_PIXELS = 80_000_000

# As many bytes take so many pixels uncompressed, 4 channels of 16 bits; no image file is larger.
MAX_IMAGE_BYTES = 8 * MAX_IMAGE_PIXELS

# Errors that say nothing about a file: too many are open, a disk or its network fails, memory is short.
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM)

# What Pillow may open, whatever a file's name says: for an EPS file it would start Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")

# Minimum overlap of the crop with an object, for each sampler. None: the whole image. 0: any crop.
CROP_SAMPLERS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)
CROP_TRIES = 50

# Pixels that are distorted at a time: a usual photo at once, a huge one in bounded memory.
DISTORTED_AT_ONCE = 2**18


def read_jpeg_header(data):
    """Size and number of colour components that a JPEG's frame header states.

    data: bytes of a file.
    Returns (width, height, components), or None if this is no JPEG with a frame header.
    """
    if data[:2] != b"\xff\xd8":
        return None
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height = int.from_bytes(data[position + 5 : position + 7], "big")
            width = int.from_bytes(data[position + 7 : position + 9], "big")
            return width, height, data[position + 9]
        elif marker == 0xDA:  # the scan begins: no frame header before it
            return None
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def pil_to_rgb(image):
    """An image of any Pillow mode as RGB: 16 bits become 8, transparency is laid on white.

    image: PIL image (grey, palette, RGBA, CMYK, 16-bit, ...); it is not changed.
    Returns a PIL image of mode "RGB".
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey; "I" holds the same values in 32 bits
        pixels = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def read_image(path):
    """Read an image file as it is stored: EXIF orientation is not applied, as in VOC's annotations.

    path: file of one of IMAGE_FORMATS, of any mode (grey, palette, CMYK, 16-bit, ...).
    Returns a (3, H, W) uint8 RGB tensor.
    Raises FileNotFoundError or ValueError, naming the file, if it is missing, unreadable, corrupt,
    truncated, or claims more than MAX_IMAGE_PIXELS; another OSError if the machine is at fault.
    """
    try:
        check_image_file(path)
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image; if it moved, make new data lists") from None
    except (OSError, ValueError) as error:  # a path may have characters that no file name can have
        if getattr(error, "errno", None) in MACHINE_ERRORS:
            raise OSError(error.errno, f"{path}: {error.strerror}") from None
        raise ValueError(f"{path!r}: the image file cannot be read ({error})") from None
    return decode_image(data, path)


def check_image_file(path):
    """Refuse what is no file, such as a pipe, which would be waited for, and files larger than any image."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no file")
    if status.st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"it has {status.st_size:,} bytes, more than the {MAX_IMAGE_BYTES:,} allowed")


def decode_image(data, name):
    """Decode the bytes of an image file: torchvision for usual JPEGs (twice as fast), Pillow for all others.

    data: bytes. name: what an error calls it.
    Returns a (3, H, W) uint8 RGB tensor. Raises ValueError as `read_image()` does.
    """
    header = read_jpeg_header(data)
    if header:
        check_image_size(header[0], header[1], name)
    if decode_jpeg and header and header[2] in (1, 3):  # CMYK: Pillow knows Adobe's inverted kind
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):  # unusual, or damaged: Pillow decides
            return decode_jpeg(encoded, mode=ImageReadMode.RGB)
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Exception as error:
        raise ValueError(describe_damage(name, error)) from None
    check_image_size(*image.size, name)
    try:
        return torch.from_numpy(np.array(pil_to_rgb(image))).permute(2, 0, 1)
    except Exception as error:
        raise ValueError(describe_damage(name, error)) from None


def describe_damage(name, error):
    """One line about an image that a decoder refused. Decoders raise all kinds of exceptions."""
    return f"{name}: not an image that can be read, or a damaged one ({' '.join(str(error).split())[:200]})"


def check_image_size(width, height, name):
    """Refuse a header that would make the decoder allocate gigabytes (a decompression bomb)."""
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{name}: its header claims {width} x {height} pixels, more than the {MAX_IMAGE_PIXELS:,} "
            "allowed; save it smaller, or remove it"
        )


def normalize(images, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """Turn a batch of bytes into the network's input, on the device where it lies.

    images: (N, 3, 300, 300) uint8 tensor, RGB.
    mean, std: three numbers each, for RGB in [0, 1]: those that the model's weights were trained with.
    Returns a (N, 3, 300, 300) float32 tensor: (images / 255 - mean) / std.
    """
    mean = torch.as_tensor(mean, dtype=torch.float32, device=images.device).view(3, 1, 1)
    std = torch.as_tensor(std, dtype=torch.float32, device=images.device).view(3, 1, 1)
    return images.to(torch.float32).sub_(255 * mean).div_(255 * std)


class Distortion(NamedTuple):
    """Photometric parameters of one training image, on a grid finer than 8-bit pixels can show.

    On it every step is exact in 16-bit integers. The defaults change nothing.
    """

    brightness: int = 0  # added to the RGB values, of 255
    contrast: int = 256  # factor of the RGB values, in 256ths
    saturation: int = 256  # factor of S in HSV, in 256ths
    hue: int = 0  # added to H in HSV, in 256ths of a sixth of the circle
    contrast_first: bool = True  # before saturation and hue, or after them


def sample_distortion(rng):
    """Draw photometric parameters, each active with probability 1/2.

    rng: numpy Generator.
    Returns a Distortion: brightness up to 32 levels, contrast and saturation in [0.5, 1.5], hue up to 36
    degrees either way. (Caffe's im_transforms.cpp says 18, on OpenCV's hue circle of 180 steps.)
    """
    return Distortion(
        brightness=int(rng.integers(-32, 32, endpoint=True)) if rng.random() < 0.5 else 0,
        contrast=int(rng.integers(128, 384, endpoint=True)) if rng.random() < 0.5 else 256,
        saturation=int(rng.integers(128, 384, endpoint=True)) if rng.random() < 0.5 else 256,
        hue=int(rng.integers(-153, 153, endpoint=True)) if rng.random() < 0.5 else 0,
        contrast_first=rng.random() < 0.5,
    )


def distort(pixels, distortion):
    """Brightness, contrast, saturation and hue; the values are rounded and kept in [0, 255] after each.

    pixels: (h, w, 3) uint8 array, RGB; it is not changed. distortion: a Distortion.
    Returns an (h, w, 3) uint8 array: pixels itself if there is nothing to change.
    """
    rows = max(1, DISTORTED_AT_ONCE // pixels.shape[1])
    bands = [distort_band(pixels[first : first + rows], distortion) for first in range(0, len(pixels), rows)]
    return bands[0] if len(bands) == 1 else np.concatenate(bands)


def distort_band(pixels, distortion):
    """`distort()` for a band of rows, with temporary arrays of a few times its size."""
    pixels = add_brightness(pixels, distortion.brightness)
    if distortion.contrast_first:
        pixels = scale_contrast(pixels, distortion.contrast)
    pixels = distort_color(pixels, distortion.saturation, distortion.hue)
    if not distortion.contrast_first:
        pixels = scale_contrast(pixels, distortion.contrast)
    return pixels


def scale(values, factor):
    """round(values * factor / 256), for uint8 values and a factor (int, or array) in [0, 256]."""
    products = values.astype(np.uint16)
    products *= np.uint16(factor) if isinstance(factor, int) else factor
    products += np.uint16(127)
    products >>= np.uint16(8)
    return products.astype(np.uint8)


def add_brightness(pixels, brightness):
    """Add a number of levels, of either sign, to uint8 values, kept in [0, 255]."""
    if brightness > 0:
        pixels = np.clip(pixels, np.uint8(0), np.uint8(255 - brightness))
        pixels += np.uint8(brightness)
    elif brightness < 0:
        pixels = np.clip(pixels, np.uint8(-brightness), np.uint8(255))
        pixels -= np.uint8(-brightness)
    return pixels


def scale_contrast(pixels, contrast):
    """Multiply uint8 values by contrast / 256, in [0, 2], kept in [0, 255]."""
    if contrast > 256:
        added = scale(pixels, contrast - 256)
        np.minimum(added, ~pixels, out=added)  # ~pixels = 255 - pixels: up to the end of the range
        added += pixels
        return added
    return scale(pixels, contrast) if contrast < 256 else pixels


def distort_color(pixels, saturation, hue):
    """Multiply S and turn H of HSV without leaving RGB.

    In HSV's terms, each channel lies between the lowest of the three and V, the highest, and every pixel's
    chroma is C = V - lowest. As the hue turns by a sixth of the circle, one channel moves from one end to the
    other at a steady pace: up while the next channel (in the direction of the turn) is lowest, down while
    that one is highest. So for a turn by the fraction d of a sixth, with the next channel n of channel x:

        x + min(max(d C - (n - lowest), 0), V - x) - min(max(d C - (V - n), 0), x - lowest)

    Saturation multiplies each channel's distance below V by its factor, but by no more than V / C, where the
    lowest channel reaches 0 (S ends at 1). The two commute; in this order each is rounded only once.

    pixels: (h, w, 3) uint8 array, RGB. saturation: factor of S, in 256ths, in [0, 512]. hue: added to H, in
    256ths of a sixth of the circle, in [-256, 256].
    Returns an (h, w, 3) uint8 array.
    """
    if saturation == 256 and hue == 0:
        return pixels
    height, width = pixels.shape[:2]
    # One plane for each channel; and the last one's next, R, as a fourth. For a negative turn, where the next
    # is the one before, B G R B.
    order = (2, 1, 0) if hue < 0 else (0, 1, 2)
    planes = np.empty((4, height, width), dtype=np.uint8)
    for plane, channel in zip(planes, order, strict=False):
        plane[:] = pixels[:, :, channel]
    planes[3] = planes[0]
    planes = planes.reshape(4, -1)  # (4, n), n = height * width
    highest = np.maximum(np.maximum(planes[0], planes[1]), planes[2])  # (n,), V
    lowest = np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    chroma = highest - lowest

    below = highest - planes  # distances below V
    if hue != 0:
        above = np.subtract(planes, lowest, out=planes)
        turn = scale(chroma, abs(hue))
        rise = np.maximum(above[1:], turn) - above[1:]  # max(turn - above, 0): uint8 cannot go below 0
        fall = np.maximum(below[1:], turn) - below[1:]
        np.minimum(rise, below[:3], out=rise)
        np.minimum(fall, above[:3], out=fall)
        below[:3] -= rise
        below[:3] += fall
    below = below[:3]
    if saturation < 256:
        below -= scale(below, 256 - saturation)
    elif saturation > 256:
        # V / C - 1 = lowest / C. (np.clip with scalars of the array's type is much faster than np.maximum.)
        gain = lowest.astype(np.float32)
        gain /= np.clip(chroma, np.uint8(1), np.uint8(255)).astype(np.float32)
        np.clip(gain, np.float32(0), np.float32(saturation / 256 - 1), out=gain)
        gain *= np.float32(256)
        below += scale(below, gain.astype(np.uint16))

    planes = np.subtract(highest, below, out=below).reshape(3, height, width)
    result = np.empty((height, width, 3), dtype=np.uint8)
    for plane, channel in zip(planes, order, strict=True):
        result[:, :, channel] = plane
    return result


def sample_zoom_out_box(width, height, rng):
    """With probability 1/2 a canvas 1 to 4 times as wide and high as the image, which lies anywhere on it.

    width, height: of the image, in pixels. rng: numpy Generator.
    Returns the canvas as (x_min, y_min, x_max, y_max), integer pixels of the image: (0, 0, width, height)
    without zoom, else around it. (Caffe: ExpandImage.)
    """
    if rng.random() < 0.5:
        return 0, 0, width, height
    ratio = rng.uniform(1, 4)
    canvas_width, canvas_height = round(ratio * width), round(ratio * height)
    left = int(rng.integers(canvas_width - width, endpoint=True))
    top = int(rng.integers(canvas_height - height, endpoint=True))
    return -left, -top, canvas_width - left, canvas_height - top


def sample_crop_box(canvas, image_box, boxes, rng):
    """Crop by one of the seven samplers that succeed, chosen at random (SSD paper, section 2.2).

    Taking the first success of the samplers in a random order is the same choice, and tries fewer boxes.

    canvas: (x_min, y_min, x_max, y_max) of the zoomed-out image, integer pixels of the image.
    image_box: the part of the canvas that shows the image, in the same form.
    boxes: (n, 4) array, boundary form, pixels. rng: numpy Generator.
    Returns the crop as (x_min, y_min, x_max, y_max), integer pixels, inside the canvas; it holds the centre
    of an object if there is one, and some of the image if there is none.
    """
    for sampler in rng.permutation(len(CROP_SAMPLERS)):
        min_overlap = CROP_SAMPLERS[sampler]
        if min_overlap is None:
            break
        mins, maxs = sample_boxes_inside(canvas, CROP_TRIES, rng)  # (2, tries), x and y
        if len(boxes):
            success = find_centers_inside(mins, maxs, boxes).any(axis=1)
            if min_overlap > 0:
                success &= (find_overlaps(mins, maxs, boxes) >= min_overlap).any(axis=1)
        else:
            image_box = np.array(image_box)
            success = ((mins < image_box[2:, None]) & (maxs > image_box[:2, None])).all(axis=0)
        first = success.argmax()
        if success[first]:
            return tuple(int(side) for side in (*mins[:, first], *maxs[:, first]))
    return canvas


def sample_boxes_inside(canvas, n, rng):
    """Boxes of scale s in [0.3, 1] and aspect ratio r in [max(1/2, s^2), min(2, 1/s^2)], anywhere inside.

    canvas: (x_min, y_min, x_max, y_max), integer pixels. n: how many. rng: numpy Generator.
    Returns two (2, n) float arrays, x and y of the lower and of the upper corners, in whole pixels: the width
    is s sqrt(r), the height s / sqrt(r) of the canvas'. (Caffe: SampleBBox, sampler.cpp.)
    """
    draws = rng.random((4, n))
    scales = 0.3 + 0.7 * draws[0]
    lowest = np.maximum(scales * scales, 0.5)  # the highest ratio is 1 / lowest
    roots = np.sqrt(lowest + (1 / lowest - lowest) * draws[1])
    canvas = np.array(canvas).reshape(4, 1)
    canvas_size = canvas[2:] - canvas[:2]  # (2, 1)
    sizes = canvas_size * np.array([scales * roots, scales / roots])
    sizes = np.maximum(np.rint(sizes), 1)
    mins = canvas[:2] + np.floor((canvas_size - sizes + 1) * draws[2:])
    return mins, mins + sizes


def find_centers_inside(mins, maxs, boxes):
    """Which boxes have their centre in which crops.

    mins, maxs: (2, m) arrays, x and y of the crops' corners, pixels. boxes: (n, 4) array, boundary form,
    pixels. Returns an (m, n) bool array.
    """
    centers = ((boxes[:, :2] + boxes[:, 2:]) / 2).T[:, None]  # (2, 1, n)
    inside = (mins[:, :, None] <= centers) & (centers < maxs[:, :, None])  # (2, m, n)
    return inside[0] & inside[1]


def find_overlaps(mins, maxs, boxes):
    """`find_jaccard_overlap()` in numpy, for crops and boxes as in `find_centers_inside()`: an (m, n) array."""
    corners = boxes.T[:, None]  # (4, 1, n)
    sides = np.minimum(maxs[:, :, None], corners[2:]) - np.maximum(mins[:, :, None], corners[:2])  # (2, m, n)
    sides = np.maximum(sides, 0)
    intersections = sides[0] * sides[1]
    crop_sides, box_sides = maxs - mins, corners[2:] - corners[:2]
    areas = (crop_sides[0] * crop_sides[1])[:, None] + box_sides[0] * box_sides[1]  # (m, n)
    return intersections / (areas - intersections)


def find_place(crop, source):
    """Where the surviving pixels come to lie on the 300 x 300 image, in whole pixels.

    crop: (x_min, y_min, x_max, y_max), which becomes the whole 300 x 300 image. source: its part that shows
    the photo, of at least one pixel. Both in integer pixels of the photo.
    Returns (x_min, y_min, x_max, y_max), integers in [0, 300], at least one pixel wide and high.
    """
    place = [0, 0, 0, 0]
    for axis in range(2):
        scale = IMAGE_SIZE / (crop[axis + 2] - crop[axis])
        low = min(round((source[axis] - crop[axis]) * scale), IMAGE_SIZE - 1)
        high = max(round((source[axis + 2] - crop[axis]) * scale), low + 1)
        place[axis], place[axis + 2] = low, high
    return tuple(place)


def resize(pixels, width, height):
    """Bilinear and antialiased resize of an (h, w, 3) uint8 array; returns a (height, width, 3) array."""
    images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # (1, 3, h, w), channels last: the fast way
    images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    return images[0].permute(1, 2, 0).numpy()


def transform(image, boxes, labels, difficulties, split, rng=None):
    """A photo and its objects as the network sees them: augmented for training, only resized for testing.

    Zoom, crop, flip and resize are one map: the crop is found first, then only its pixels are read, distorted
    and resized, once. A canvas is never built.

    image: (3, H, W) uint8 RGB tensor, or PIL image; it is not changed.
    boxes: (n, 4) float tensor, boundary form, pixels, inside the image; n may be 0.
    labels: (n,) int64 tensor. difficulties: (n,) tensor.
    split: "TRAIN" or "TEST". rng: numpy Generator for "TRAIN"; None draws a new one.
    Returns the image as a (3, 300, 300) uint8 tensor, boxes as an (m, 4) float32 tensor, boundary form,
    fractional, in [0, 1], of positive area, and their labels and difficulties; m <= n.
    Raises ValueError for another split.
    """
    if split not in ("TRAIN", "TEST"):
        raise ValueError(f'split is {split!r}; it must be "TRAIN" or "TEST"')
    if isinstance(image, Image.Image):
        image = torch.from_numpy(np.array(pil_to_rgb(image))).permute(2, 0, 1)
    pixels = image.permute(1, 2, 0).numpy()  # (H, W, 3)
    keep_freed_memory()
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    height, width = pixels.shape[:2]
    crop = 0, 0, width, height
    distortion, flip = Distortion(), False
    if split == "TRAIN":
        rng = np.random.default_rng() if rng is None else rng
        distortion = sample_distortion(rng)
        canvas = sample_zoom_out_box(width, height, rng)
        crop = sample_crop_box(canvas, crop, boxes, rng)
        flip = rng.random() < 0.5

    source = max(crop[0], 0), max(crop[1], 0), min(crop[2], width), min(crop[3], height)
    place = find_place(crop, source)
    pixels = distort(pixels[source[1] : source[3], source[0] : source[2]], distortion)
    pixels = resize(pixels, place[2] - place[0], place[3] - place[1])
    if place != (0, 0, IMAGE_SIZE, IMAGE_SIZE):
        surviving = pixels
        pixels = blank_image()
        pixels[place[1] : place[3], place[0] : place[2]] = surviving
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # (1, 3, 300, 300)
    image = (image.flip(3) if flip else image)[0]
    boxes, keep = map_boxes(boxes, crop, source, place, flip)
    return image, boxes, labels[keep], difficulties[keep]


@functools.cache
def keep_freed_memory():
    """Let glibc's malloc keep what this process frees, so that the next image finds its memory in place.

    By default it returns every larger block to the system at once, and each image would then wait for
    hundreds of pages to be mapped and cleared: a third of the time. Freeing one block of 16 MB, never
    touched, raises the size from which on it does so (M_MMAP_THRESHOLD in mallopt's manual page); other
    allocators take no notice.
    """
    np.empty(2**24, dtype=np.uint8)


def blank_image():
    """A (300, 300, 3) uint8 array of ImageNet's mean colour."""
    pixels = np.empty((IMAGE_SIZE, IMAGE_SIZE * 3), dtype=np.uint8)
    pixels[:] = np.tile(np.array(FILLER, dtype=np.uint8), IMAGE_SIZE)  # row by row: 50 times as fast
    return pixels.reshape(IMAGE_SIZE, IMAGE_SIZE, 3)


def map_boxes(boxes, crop, source, place, flip):
    """Boxes of a photo on the image that shows a part of it.

    boxes: (n, 4) array, boundary form, pixels. crop, source, place: as in `find_place()`.
    flip: whether the image is mirrored afterwards.
    Returns (m, 4) float32 boxes, boundary form, fractional, clipped to the surviving part, and the (m,)
    int64 indices of those kept: the ones whose centre is in the crop.
    """
    crop, source, place = np.array([crop, source, place], dtype=np.float64).reshape(3, 2, 2)  # min and max of each
    keep = find_centers_inside(crop[0, :, None], crop[1, :, None], boxes)[0].nonzero()[0]
    boxes = boxes[keep].reshape(-1, 2, 2)  # (m, min and max, x and y)
    boxes = np.minimum(np.maximum(boxes, source[0]), source[1])
    scale_xy = (place[1] - place[0]) / (source[1] - source[0])
    boxes = (place[0] + (boxes - source[0]) * scale_xy) / IMAGE_SIZE
    if flip:
        boxes[:, :, 0] = 1 - boxes[:, ::-1, 0]
    boxes = boxes.reshape(-1, 4)
    boxes = boxes.astype(np.float32)
    # The rounding can leave a box of less than a millionth of the image without area.
    lasting = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    if not lasting.all():
        boxes, keep = boxes[lasting], keep[lasting]
    return torch.from_numpy(boxes), torch.from_numpy(keep)


# ----------------------------------------------------------------------------------------------
# 5. The VOC metric
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


# ----------------------------------------------------------------------------------------------
# 6. Checkpoints
# ----------------------------------------------------------------------------------------------

CHECKPOINT_FORMAT = "ssd300/1"  # written into every checkpoint: how load_checkpoint() knows its own


def save_checkpoint(checkpoint, path):
    """Write a checkpoint so that `path` holds either the old file or the new one, whole, at every moment.

    The bytes go to a temporary file in the same folder, are forced to the disk, and take the name `path`
    by one rename, which a file system does completely or not at all.

    checkpoint: dict of tensors, state dicts, numbers, strings and containers of these; nothing else could
    be read back with `weights_only=True`.
    Raises OSError, naming the file, if the folder is missing or the disk full; the old file is untouched.
    """
    try:
        write_file(path, lambda file: torch.save({"format": CHECKPOINT_FORMAT, **checkpoint}, file))
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        raise OSError(f"{path}: could not write the checkpoint, the one before it is unchanged: {error}") from error


def write_file(path, contents):
    """Write a file so that `path` holds either the old one or the new one, whole, at every moment.

    contents: bytes, or a function that writes them to the open file which it is given.
    Raises OSError, or what the function raises; the old file is untouched then.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            contents(file) if callable(contents) else file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.[0-9]*.tmp"):  # of runs killed while they wrote
        leftover.unlink(missing_ok=True)


def _sync_folder(folder):
    """Force a rename in `folder` to the disk, where the system can (neither Windows nor every network drive)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_checkpoint(path, device="cpu"):
    """Read a checkpoint of ours, without running any code that the file may carry.

    path: a file that `save_checkpoint()` wrote.
    device: where its tensors go, wherever they were when saved.
    Returns the dict that was saved.
    Raises FileNotFoundError if there is no such file; ValueError, naming it, if it is truncated, was not
    written by this repo, or holds pickled objects.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint (train.py makes one)")
    try:
        _check_archive(path)
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        _check_tensors(checkpoint)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: truncated, or no checkpoint of this repo at all") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused, for it holds more than tensors and numbers, which could run code. If it is another "
            "SSD's, tools/convert_weights.py may read its weights"
        ) from error
    except Exception as error:  # torch.load raises errors of many kinds for a file that is not what it should be
        raise ValueError(f"{path}: damaged, or no checkpoint of this repo ({shorten(error, 200)})") from error
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if found != CHECKPOINT_FORMAT:
        found = found[:40] if isinstance(found, str) else "none"
        raise ValueError(
            f"{path}: not a checkpoint of this repo (expected {CHECKPOINT_FORMAT}, found {found}). If it is another "
            "SSD's, tools/convert_weights.py may read its weights"
        )
    return checkpoint


@contextlib.contextmanager
def errors_in_words():
    """End a script whose input, or machine, is at fault with `error: ` and what is wrong, in place of a traceback.

    Of an error from a data loader's process this is what was said there. All other errors pass.
    """
    try:
        yield
    except (FloatingPointError, OSError, ValueError) as error:
        text = str(error).rpartition(f"\n{type(error).__name__}: ")[2].strip()
        raise SystemExit(f"error: {text}") from error
    except (RuntimeError, MemoryError) as error:
        advice = find_advice(error)
        if advice is None:
            raise
        raise SystemExit(f"error: {advice}\n{error}") from error


def find_advice(error):
    """What to change after an error that the machine caused, in words; None for any other error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in text:  # the latter is cuBLAS's and cuDNN's
        return "out of memory on the GPU; a smaller --batch_size needs less (in training, with a lower --lr)"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "out of memory on the CPU; fewer --workers, or a smaller --batch_size, need less"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return "torch.compile failed; it needs a C compiler and Triton. --compile_model=False goes on without it"
    if "shared memory" in text or "Too many open files" in text or "Bus error" in text:
        return (
            "the processes that prepare images ran out of shared memory, or of open files. Enlarge /dev/shm "
            "(docker run --shm-size=8g) or `ulimit -n`; or take fewer --workers (0 needs none of both)"
        )
    if "No space left" in text:
        return "the disk is full; free some space, or write to another (train.py: --save_to, --log_file)"
    if "DataLoader worker (pid" in text or "DataLoader timed out" in text:
        return (
            "a process that prepares images died, or hung. If the system killed it, memory was short: take fewer "
            "--workers, or a smaller --batch_size; if it comes again, --workers=0 shows where"
        )
    return None


def shorten(error, length=1000):
    """The text of an error, or its kind where it has none, cut to a length: torch can write pages."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def _check_archive(path):
    """Raise ValueError for what torch.save never writes: another kind of file, or compressed entries, which
    could unpack into far more memory than the file's size."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its entries are compressed")
    if sum(entry.file_size for entry in entries) > os.path.getsize(path):
        raise ValueError("its entries overlap")


def _check_tensors(contents):
    """Raise ValueError for tensors that are larger than what the file holds of them: one number may stand for
    billions, and take their memory as soon as it is copied or compared."""
    waiting, seen = [contents], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:  # a pickle may hold one thing a million times
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        elif isinstance(value, torch.Tensor):
            dense = value.layout == torch.strided and not value.is_meta
            if not dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor in it is sparse, or repeats its numbers")


# ----------------------------------------------------------------------------------------------
# 7. Parameters
# ----------------------------------------------------------------------------------------------


def script_parameters(namespace):
    """The parameters of a script: its lowercase module-level names that are bound to plain values.

    namespace: the script's `globals()`.
    Returns a dict of name to value. (Constants are uppercase; functions and modules are no plain values.)
    """
    plain = (bool, int, float, str, tuple)
    return {
        name: value
        for name, value in namespace.items()
        if name.islower() and not name.startswith("_") and isinstance(value, plain)
    }


def override_parameters(namespace, arguments):
    """Let `--name=value` on the command line override a parameter at the top of a script.

    namespace: the script's `globals()`; parameters named in `arguments` are replaced in it.
    arguments: list of strings, `sys.argv[1:]`. `--help` prints the parameters and their values.
    Raises SystemExit with a message that lists the valid names if an argument is no `--name=value`, names
    no parameter, or has a value of another type than the one in the file.
    """
    parameters = script_parameters(namespace)
    listing = "\n".join(f"  --{name}={value!r}" for name, value in parameters.items())
    for argument in arguments:
        if argument in ("-h", "--help"):
            print(f"{namespace.get('__doc__') or ''}\nParameters and their values:\n{listing}")
            raise SystemExit(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals or name not in parameters:
            raise SystemExit(f"error: {argument[:200]!r} is no --name=value of a parameter. Valid are:\n{listing}")
        try:
            namespace[name] = _parse_like(parameters[name], text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
            kind = type(parameters[name]).__name__
            raise SystemExit(
                f"error: --{name} takes a value of type {kind}, such as {parameters[name]!r}, not {text[:200]!r}. "
                f"Valid are:\n{listing}"
            ) from error


def _parse_like(example, text):
    """Read `text` as a value of the type of `example`; ValueError or SyntaxError if it is of another."""
    if isinstance(example, bool):
        if text not in ("True", "False"):
            raise ValueError(text)
        return text == "True"
    if isinstance(example, tuple):
        try:
            values = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            if example and not isinstance(example[0], str):
                raise
            values = tuple(part.strip() for part in text.split(",") if part.strip())  # names need no quotation marks
        values = tuple(values) if isinstance(values, (tuple, list)) else (values,)
        return tuple(_parse_like(example[0] if example else value, str(value)) for value in values)
    return type(example)(text)
