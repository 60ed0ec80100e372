"""Annotation files, Pascal VOC's XML and COCO's JSON, as records: one for each image."""

import json
import math
import os
from xml.etree import ElementTree

from utils import MAX_IMAGE_PIXELS

MAX_ANNOTATION_BYTES = 10_000_000  # VOC's largest annotation has 14 kB
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")


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


# Every source of data is turned into records, one dict an image, and the rest of this section knows records
# alone: {"image": its path, "file": the path to name in the report, "size": (width, height) or None,
# "boxes", "names", "difficulties": as from parse_annotation(), "first_pixel": 1 where the boxes were written
# with both ends included, as in VOC, or 0, "difficult_missing", "float_coordinates": counts}, and from
# _without_repeats() on "split" and "real_path", which is the same for all names of one image.


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


def _refuse(problems, what):
    """Raise one ValueError that lists all problems (the first 50 in full), if there are any."""
    if problems:
        lines = problems[:50] + [f"... and {len(problems) - 50} more"] * (len(problems) > 50)
        headline = f"{len(problems)} {what}{'s' * (len(problems) > 1)} cannot be used:"
        raise ValueError("\n  ".join([headline, *lines]))
