"""Annotation files as people have them, turned into records: one for each image, boxes in one form.

    description, records = read_annotations("path/to/my data", {"TRAIN": "trainval", "TEST": "test"}, notes)

What is read stands in LAYOUTS, below. It is recognised by looking. Boxes are continuous, (x_min, y_min, x_max, y_max)
in pixels, and else as written: they may be inverted, reach beyond the image, or not be finite. Only YOLO's stay
fractions of width and height, until somebody has looked at the image.
"""

import functools
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple
from xml.etree import ElementTree

from utils import IMAGE_SUFFIXES, MAX_IMAGE_PIXELS, printable, read_json

LAYOUTS = """\
  a folder in Pascal VOC's layout: Annotations/*.xml, images in JPEGImages or images, perhaps lists in ImageSets/Main
  XML files beside their images (LabelImg)
  YOLO text files in labels, images in images, or both side by side; class names in data.yaml or classes.txt
  _annotations.coco.json beside its images (Roboflow)
  folders train, valid (or val) and test, each as above, or with YOLO images/train, labels/train and so on
  a COCO .json file, named itself; --image_folder says where its images are"""

SPLIT_FOLDERS = ("train", "valid", "val", "test")
FALLBACKS = {"trainval": ("train",), "test": ("valid", "val")}  # where a split of the first name is missing
COCO_FILE = "_annotations.coco.json"  # what Roboflow calls it
MAX_ANNOTATION_BYTES = 10_000_000  # VOC's largest annotation has 14 kB


class Annotated(NamedTuple):
    """An object of an image, as it was annotated."""

    name: str
    box: tuple  # (x_min, y_min, x_max, y_max)
    difficulty: int = 0  # 1: VOC's difficult objects, and COCO's crowds, one box around many
    area: float | None = None  # COCO's, in pixels squared


@dataclass(slots=True)
class Record:
    """An image and its objects."""

    image: str  # path
    file: str  # path that a remark about it names
    source: str  # the folder or file that it was read from
    form: str  # "VOC", "COCO" or "YOLO"
    objects: list  # of Annotated
    declared_size: tuple | None = None  # (width, height) by the annotation
    image_id: int | str | None = None  # COCO's
    category_ids: dict | None = None  # COCO's: class name to id, one dict for all records of a file
    first_pixel: int = 0  # 1: the file counts pixels from 1 and includes both ends
    split: str = ""
    size: tuple | None = None  # (width, height) of the image, once somebody has looked
    real_path: str = field(init=False)  # the same for all names of an image

    def __post_init__(self):
        self.real_path = os.path.realpath(self.image)


class Part(NamedTuple):
    """Where the files of one split are."""

    form: str  # "VOC", "COCO" or "YOLO"
    words: str  # what it looks like
    annotations: str  # a folder, or a JSON file
    images: str  # a folder
    names: str = ""  # a file that lists the names; "": all


def read_annotations(source, splits, notes, image_folder="", first_pixel=""):
    """Read the annotations of one data set.

    source: path of a folder or COCO file. splits: {"TRAIN": name of its split, "TEST": name}, or one of the two.
    notes: dict of kind to list; gets {"split", "file", "what"} for everything that was left out or made up.
    image_folder, first_pixel: see the parameters of create_data_lists.py.
    Returns what the data look like, in a line, and the records: a dict of "TRAIN" and "TEST" to lists of Record, or
    {"": list} if the data are not split.
    Raises FileNotFoundError and ValueError, naming the files, if something is missing or cannot be read.
    """
    if str(first_pixel) not in ("", "0", "1"):
        raise ValueError(f'first_pixel is {first_pixel!r}; it must be "0", "1" or ""')
    parts = find_parts(source)
    chosen = {"": ""} if "" in parts else choose_splits(parts, splits, source)
    readers = {"VOC": read_voc, "COCO": read_coco, "YOLO": read_yolo}
    records = {}
    for split, name in chosen.items():
        part = parts[name]
        if image_folder:
            part = part._replace(images=os.path.abspath(os.path.expanduser(image_folder)))
        records[split] = readers[part.form](part, source, functools.partial(add_note, notes, split))
        if not records[split]:
            raise ValueError(f"{printable(part.names or part.annotations)}: has no images")
    description = part.words + "".join(f", {printable(name)}: {split}" for split, name in chosen.items() if name)
    unused = () if part.names else parts.keys() - chosen.values()  # of several lists some are always left
    description += "".join(f", {printable(name)}: not used" for name in sorted(unused))
    if part.form == "VOC":
        first = count_from([record for rows in records.values() for record in rows], first_pixel)
        description += f", pixels counted from {first}"
    return description, {split: merge_repeats(rows, notes) for split, rows in records.items()}


def add_note(notes, split, kind, file="", what=""):
    """Add a remark on a file, or on a whole split, to the report."""
    notes.setdefault(kind, []).append({"split": split, "file": file, "what": what})


def merge_repeats(records, notes):
    """The records, each image once: entries for one photo become one record, with the objects of all."""
    groups = {}
    for record in records:
        groups.setdefault(record.real_path, []).append(record)
    for first, *others in groups.values():
        if others:
            first.objects = list(dict.fromkeys(row for record in (first, *others) for row in record.objects))
            first.declared_size = first.declared_size or others[0].declared_size
            add_note(notes, first.split, "image_repeated", first.file, f"{len(others) + 1} times")
    return [group[0] for group in groups.values()]


def raise_if_any(problems, headline):
    """Raise one ValueError that lists the first problems, if there are any."""
    if problems:
        lines = [printable(problem, 400) for problem in problems[:10]]
        more = [f"... and {len(problems) - len(lines)} more"] if len(problems) > len(lines) else []
        raise ValueError("\n  ".join([headline, *lines, *more]))


# --- Layouts --------------------------------------------------------------------------------------


def find_parts(source):
    """The parts of a data set: a dict of the names of its splits to Part; {"": part} if it has none."""
    if os.path.isfile(source) and source.lower().endswith(".json"):
        return {"": Part("COCO", "COCO file", source, "")}
    if not os.path.isdir(source):
        raise FileNotFoundError(f"{printable(source)}: not a folder or a .json file. Can be read:\n{LAYOUTS}")
    part, parts = find_part(source), {}
    if not part:
        found = {name: find_part(os.path.join(source, name)) or find_yolo(source, name) for name in SPLIT_FOLDERS}
        parts = {name: part for name, part in found.items() if part}
    elif part.form == "VOC":
        lists = find_files(os.path.join(source, "ImageSets", "Main"), (".txt",))
        parts = {name: part._replace(words=f"{part.words}, ImageSets/Main", names=path) for name, path in lists.items()}
    if len(parts) > 1:
        return parts
    return {"": next(iter(parts.values()), part) or refuse_layout(source)}  # one list, or folder, is of all images


def find_part(folder):
    """The annotations and images that lie in a folder itself; None if it is not like one of the layouts."""
    for name in ("Annotations", "annotations"):
        annotations = os.path.join(folder, name)
        if find_files(annotations, (".xml",)):
            images = "images" if os.path.isdir(os.path.join(folder, "images")) else "JPEGImages"
            return Part("VOC", f"XML files in {name}, images in {images}", annotations, os.path.join(folder, images))
    if os.path.isfile(os.path.join(folder, COCO_FILE)):
        return Part("COCO", "COCO files beside their images", os.path.join(folder, COCO_FILE), folder)
    if find_files(folder, (".xml",)):
        return Part("VOC", "XML files beside their images", folder, folder)
    beside = find_class_names(folder) and find_yolo(folder, names=("", ""))  # else they may be captions
    return beside or find_yolo(folder)


def find_yolo(folder, split="", names=("labels", "images")):
    """YOLO's text files and images in folders of these names, or in those of a split within; None if not there."""
    labels, images = (os.path.normpath(os.path.join(folder, name, split)) for name in names)
    words = "YOLO text files beside their images" if labels == images else "YOLO text files in labels, images in images"
    texts = [name.lower() for name in find_files(labels, (".txt",))]
    are_labels = any(name != "classes" and not name.startswith("readme") for name in texts)  # exporters add READMEs
    return Part("YOLO", words, labels, images) if are_labels and find_files(images, IMAGE_SUFFIXES) else None


def refuse_layout(source):
    """Raise the error for a folder that is not recognised: what was found, and what would be."""
    _, folders, files = next(os.walk(source))
    suffixes = Counter(os.path.splitext(name)[1] or "other" for name in sorted(files))
    found = [f"{n} {suffix} files" for suffix, n in suffixes.items()]
    found += [f"the folder {name}" for name in sorted(folders)]
    shown = printable(", ".join(found), 500) or "nothing"
    raise ValueError(f"{printable(source)}: its layout is not recognised. Found: {shown}. Can be read:\n{LAYOUTS}")


def choose_splits(parts, splits, source):
    """Which part becomes which split: a dict of "TRAIN" and "TEST", as far as asked for, to names in `parts`."""
    chosen = {}
    for split, wanted in splits.items():
        # Beside VOC's trainval its val, which is a part of it, cannot stand in for test.
        others = () if chosen.get("TRAIN") == "trainval" else FALLBACKS.get(wanted, ())
        names = [name for name in (wanted, *others) if name in parts]
        if not names:
            found = printable(", ".join(sorted(parts, key=len)))
            hint = "or move ImageSets/Main away to have the images divided at random"
            missing = f"{printable(source)}: has no split {printable(repr(wanted))}"
            raise FileNotFoundError(f"{missing}. Name one of {found} as train_split or test_split, {hint}")
        chosen[split] = names[0]
    return chosen


def find_files(folder, suffixes):
    """Files with one of these suffixes: a dict of name without suffix to path; of several the first suffix counts."""
    files = sorted(map(os.path.splitext, os.listdir(folder) if os.path.isdir(folder) else ()))
    files = [(name, suffix) for name, suffix in files if suffix.lower() in suffixes]
    files.sort(key=lambda file: (file[0], -suffixes.index(file[1].lower())))  # the last one stays
    return {name: os.path.join(folder, name + suffix) for name, suffix in files}


# --- Pascal VOC's XML, COCO's JSON, YOLO's text files ---------------------------------------------


def read_voc(part, source, note):
    """The records of XML files, with the corners as written: `count_from()` makes them continuous."""
    images, files = find_files(part.images, IMAGE_SUFFIXES), find_files(part.annotations, (".xml",))
    names = [line.strip() for line in read_lines(part.names)] if part.names else sorted(files, key=files.get)
    for name in () if part.names else sorted(images.keys() - files.keys()):
        note("image_unlabelled", images[name])
    records, problems = [], []
    for name in names:
        file = files.get(name, os.path.join(part.annotations, name + ".xml"))
        try:
            annotation = parse_annotation(file, first_pixel=0)
        except (ValueError, OSError) as error:
            problems.append(error)
            continue
        rows = zip(annotation["names"], map(tuple, annotation["boxes"]), annotation["difficulties"], strict=True)
        size = (annotation["width"], annotation["height"]) if annotation["width"] else None
        image = images.get(name, os.path.join(part.images, name + ".jpg"))
        records.append(Record(image, file, source, "VOC", [Annotated(*row) for row in rows], size))
        if missing := annotation["difficult_missing"]:
            note("difficult_missing", file, f"{missing} object{'s' * (missing > 1)}")
    raise_if_any(problems, f"{printable(source)}: {len(problems)} of {len(names)} annotations cannot be used:")
    return records


def count_from(records, first_pixel):
    """Make boxes continuous that are written as the corners of VOC; returns what the files call the first pixel."""
    # VOC counts pixels from 1 and includes both ends, so 1 is taken off the minima. Tools that count from 0 write the
    # rectangle that was drawn, which is continuous already; a single minimum of 0, which VOC never has, tells them.
    minima = (side for record in records for row in record.objects for side in row.box[:2])
    first = int(first_pixel if first_pixel != "" else not any(0 <= side < 1 for side in minima))
    for record in records:
        record.first_pixel = first
        boxes = ((row.box[0] - first, row.box[1] - first, *row.box[2:]) for row in record.objects)
        record.objects = [row._replace(box=box) for row, box in zip(record.objects, boxes, strict=True)]
    return first


def parse_annotation(path, first_pixel=1):
    """Read one annotation in Pascal VOC's XML format.

    path: the XML file. first_pixel: what it calls the first pixel: 1 as in VOC, or 0.
    Returns a dict: boxes, a list of [xmin - first_pixel, ymin - first_pixel, xmax, ymax], floats, continuous, boundary
    form, in pixels, and else as written; names and difficulties, for each box the class name and 0 or 1;
    width and height, ints in pixels, both None if <size> is missing or absurd; difficult_missing, how many
    objects lack <difficult>, which is then 0.
    Raises FileNotFoundError if there is no such file; ValueError, naming file and value, if it is not an
    annotation, an object lacks its name or box, or entities are declared, which could expand without bounds.
    """
    shown = printable(path, 1000)
    root = parse_xml(path, shown)
    if root.tag != "annotation":
        raise ValueError(f"{shown}: not a VOC annotation: its root is <{printable(root.tag, 40)}>, not <annotation>")
    width, height = usable_size(root.findtext("size/width"), root.findtext("size/height")) or (None, None)
    annotation = {"boxes": [], "names": [], "difficulties": [], "difficult_missing": 0}
    annotation |= {"width": width, "height": height}
    # Only the objects right below the root: the person layout challenge nests <part>s with boxes in them.
    for i, element in enumerate(root.findall("object"), start=1):
        name, box = (element.findtext("name") or "").strip(), element.find("bndbox")
        where = f"{shown}: object {i} ({printable(name, 60)})"
        if not name or box is None:
            raise ValueError(f"{where} has no {'<bndbox>' if name else '<name>'}")
        corners = [parse_number(box, tag, where) for tag in ("xmin", "ymin", "xmax", "ymax")]
        difficult = (element.findtext("difficult") or "").strip()
        if difficult not in ("", "0", "1"):
            raise ValueError(f"{where}: <difficult> is {printable(repr(difficult), 40)}, not 0 or 1")
        annotation["boxes"].append([corners[0] - first_pixel, corners[1] - first_pixel, *corners[2:]])
        annotation["names"].append(name)
        annotation["difficulties"].append(int(difficult or 0))
        annotation["difficult_missing"] += not difficult
    return annotation


def parse_xml(path, shown):
    """The root element of an XML file that declares no entities; ValueError, naming it, for any other."""
    content = read_bytes(path)
    # No encoding that expat knows hides these bytes, except UTF-16, which has zero bytes.
    if any(part in content for part in (b"<!DOCTYPE", b"<!ENTITY", b"\0")):
        raise ValueError(f"{shown}: a document type, an entity or a zero byte (UTF-16?), which are refused; remove it")
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{shown}: unreadable XML: {printable(error)}") from error


def parse_number(parent, tag, where):
    """The number in the child `tag` of an element, possibly infinite or NaN."""
    text = parent.findtext(tag)
    try:
        return float(text)
    except (TypeError, ValueError):
        shown = "missing" if text is None else f"{printable(repr(text), 40)}, not a number"
        raise ValueError(f"{where}: <{tag}> is {shown}") from None


def usable_size(width, height):
    """(width, height) as ints, or None if they cannot be those of an image that could be read."""
    try:
        size = float(width), float(height)
    except (TypeError, ValueError, OverflowError):
        return None
    return (int(size[0]), int(size[1])) if all(1 <= side <= MAX_IMAGE_PIXELS for side in size) else None


def read_coco(part, source, note):
    """The records of a COCO file: {"images": [...], "annotations": [...], "categories": [...]}."""
    path = part.annotations
    content, shown = read_json(path, dict, object_hook=without_outline), printable(path, 1000)

    def usable(key, make):
        """What make() returns of each entry of a list. The refused ones are noted; ValueError if all are."""
        entries, made, problems = content.get(key), [], []
        if not isinstance(entries, list):
            raise ValueError(f"{shown}: not a COCO file: it has no list of {key!r}")
        for i, entry in enumerate(entries):
            try:
                if not isinstance(entry, dict):
                    raise ValueError(f"{printable(repr(entry), 60)} is not an object")
                made.append(make(entry))
            except ValueError as error:
                problems.append(f"{key}[{i}]: {error}")
        if not made:
            raise_if_any(problems, f"{shown}: none of the {len(problems)} entries of {key!r} can be used:")
        for problem in problems:
            note("entry_unusable", path, problem)
        return made

    def by_id(key, make):
        """What make() returns of each entry, by its id, without ids that stand for two things: which one is meant?"""
        pairs = usable(key, lambda entry: (take_field(entry, "id", (int, str)), make(entry)))
        values = dict(pairs)
        for entry_id in {entry_id for entry_id, value in pairs if value != values[entry_id]}:
            del values[entry_id]
            note("entry_unusable", path, f"{key}: 'id' {printable(repr(entry_id), 60)} is given twice")
        return values

    folder, stem = os.path.split(path.removesuffix(".json"))
    # COCO's own folders: annotations/instances_train2017.json and, beside `annotations`, train2017.
    own = os.path.join(os.path.dirname(folder), stem.rpartition("_")[2])
    folders = [part.images] if part.images else [folder, os.path.join(folder, "images"), own]
    names = by_id("categories", lambda entry: take_field(entry, "name", str).strip())
    category_ids = {name: category_id for category_id, name in names.items()}
    records = by_id("images", lambda entry: make_coco_record(entry, folders, source, category_ids))
    usable("annotations", lambda entry: add_coco_object(entry, records, names))
    return list(records.values())


def without_outline(entry):
    """An entry of a JSON file without the object's outline: outlines take most of the memory."""
    entry.pop("segmentation", None)
    return entry


def take_field(entry, key, types):
    """The value of a field; ValueError, naming it, if it is missing or of another type."""
    value = entry.get(key)
    if not isinstance(value, types) or isinstance(value, bool):
        raise ValueError(f"{key!r} is {'missing' if key not in entry else printable(repr(value), 60)}")
    return value


def make_coco_record(entry, folders, source, category_ids):
    """The record, without objects, of an entry of "images"; ValueError for a name that no file can have."""
    name, size = take_field(entry, "file_name", str), usable_size(entry.get("width"), entry.get("height"))
    candidates = [os.path.normpath(os.path.join(folder, name)) for folder in folders]
    image = next(filter(os.path.isfile, candidates), candidates[0])
    return Record(image, image, source, "COCO", [], size, entry["id"], category_ids)


def add_coco_object(entry, records, names):
    """Give the object of an entry of "annotations" to the record of its image."""
    record, name = look_up(entry, "image_id", records), look_up(entry, "category_id", names)
    if name in ("", "N/A"):  # what torchvision's list of COCO's classes has in place of ids that are not used
        raise ValueError(f"its category is called {name!r}")
    box = take_field(entry, "bbox", list)
    if len(box) != 4 or not all(type(value) in (int, float) for value in box):
        raise ValueError(f"'bbox' is {printable(repr(box), 60)}, not four numbers")
    is_crowd = entry.get("iscrowd", 0)
    if is_crowd not in (0, 1):
        raise ValueError(f"'iscrowd' is {printable(repr(is_crowd), 60)}, not 0 or 1")
    # An integer may be too large for a float.
    x_min, y_min, width, height = (float(value) if abs(value) < 1e300 else math.inf for value in box)
    area = entry.get("area")
    area = float(area) if type(area) in (int, float) and 0 <= area < 1e300 else width * height
    record.objects.append(Annotated(name, (x_min, y_min, x_min + width, y_min + height), int(is_crowd), area))


def look_up(entry, key, table):
    """What an entry's id stands for; ValueError if the file does not have it."""
    value = take_field(entry, key, (int, str))
    if value not in table:
        known = f", where ids are of type {type(next(iter(table))).__name__}" if table else ""
        raise ValueError(f"{key} {printable(repr(value), 60)} ({type(value).__name__}) is not in the file{known}")
    return table[value]


def read_yolo(part, source, note):
    """The records of YOLO's text files: on each line a class, then centre and size, or an outline, in fractions."""
    folders = [source, os.path.dirname(source), part.annotations, os.path.dirname(part.annotations)]
    names = next(filter(None, map(find_class_names, folders)), None)
    if not names:
        raise ValueError(f"{printable(source)}: the class names are missing: a data.yaml or classes.txt says them")
    images, files, records = find_files(part.images, IMAGE_SUFFIXES), find_files(part.annotations, (".txt",)), []
    files.pop("classes", None)
    for name, image in images.items():
        file, objects = files.get(name, os.path.join(part.annotations, name + ".txt")), []
        if name not in files:
            note("label_file_missing", image)
        for i, line in enumerate(read_lines(file) if name in files else (), start=1):
            try:
                objects.append(parse_yolo_line(line.split(), names))
            except ValueError as error:
                note("entry_unusable", file, f"line {i}: {error}")
        records.append(Record(image, file, source, "YOLO", objects))
    for name in sorted(files.keys() - images.keys()):
        note("image_not_found", files[name])
    return records


def read_bytes(path):
    """The bytes of a file with annotations."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{printable(path, 1000)}: no such annotation")
    with open(path, "rb") as file:
        content = file.read(MAX_ANNOTATION_BYTES + 1)
    if len(content) > MAX_ANNOTATION_BYTES:
        raise ValueError(f"{printable(path, 1000)}: not an annotation: larger than {MAX_ANNOTATION_BYTES:,} bytes")
    return content


def read_lines(path):
    """The lines of a text file that are not blank. Names in them may have bytes that are not UTF-8."""
    lines = read_bytes(path).decode("utf-8-sig", "surrogateescape").split("\n")
    return [line.rstrip() for line in lines if line.strip()]


def parse_yolo_line(fields, names):
    """The object of a line: class, c_x, c_y, w, h, or class, x, y, x, y, x, y, ... in fractions of the image."""
    shown = printable(" ".join(fields), 60)
    try:
        label, *values = map(float, fields)
    except ValueError:
        raise ValueError(f"{shown!r} is not a line of numbers") from None
    if label not in names:
        raise ValueError(f"{shown!r}: class {fields[0]} is not one of the {len(names)} class names")
    if len(values) == 4:
        c_x, c_y, width, height = values
        box = (c_x - width / 2, c_y - height / 2, c_x + width / 2, c_y + height / 2)
    elif len(values) >= 6 and len(values) % 2 == 0:
        box = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    else:
        raise ValueError(f"{shown!r}: a class and 4 numbers are expected, or an outline of 3 points or more")
    return Annotated(names[label], box)


def find_class_names(folder):
    """The class names that a folder's data.yaml (or another .yaml file) or classes.txt says, by index; or {}."""
    files, classes = find_files(folder, (".yaml", ".yml")), os.path.join(folder, "classes.txt")
    for name in sorted(files, key=lambda name: name != "data"):
        if names := parse_yaml_names(read_lines(files[name])):
            return names
    return dict(enumerate(map(str.strip, read_lines(classes) if os.path.isfile(classes) else ())))


def parse_yaml_names(lines):
    """The list or dict `names` in a YAML file's lines, by index; {} if there is none. No other YAML is understood."""
    text = "\n".join(filter(str.strip, (re.sub(r"(^|\s)#.*", "", line) for line in lines)))  # without comments
    # From bracket to bracket, or up to a line that is neither indented nor an item.
    entry = re.search(r"^names:(\s*[\[{](?s:.*?)[\]}]\s*$|.*(?:\n[ \t-].*)*)", text, re.MULTILINE)
    items = entry[1].strip() if entry else ""
    # A comma in quotation marks is part of a name.
    separate = r"""(?:"[^"]*"|'[^']*'|[^,"'])+""" if items.startswith(("[", "{")) else ".+"
    names = {}
    for item in re.findall(separate, items.strip("[]{}")):
        index, name = re.fullmatch(r"(?:(\d+)\s*:|- )?(.*)", item.strip(), re.DOTALL).groups()
        if name := name.strip():
            names[int(index) if index else len(names)] = name.strip("'\"")
    return names
