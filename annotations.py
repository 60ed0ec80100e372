"""Annotation files as people have them, turned into records: one for each image, boxes in one form.

    splits = {"TRAIN": "trainval", "VAL": "val", "TEST": "test"}
    description, records = read_annotations("path/to/my data", splits, notes)

    1. Records       what is read, and what it becomes
    2. Pascal VOC    XML files
    3. COCO          JSON files
    4. YOLO          text files
    5. Layouts       where the files of a data set are, recognised by looking
    6. data.yaml     what YOLO's YAML files say of images and classes
    7. Files         found by the names that other files give them
    8. Text          in any encoding

LAYOUTS lists what can be read. Hidden files are ignored everywhere. Boxes are continuous, (x_min, y_min, x_max, y_max)
in pixels, and otherwise as written: they may be inverted, reach beyond the image, or not be finite. Only YOLO's stay
fractions of width and height until the size of the image is known.
"""

import codecs
import functools
import math
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import unquote
from xml.etree import ElementTree

from utils import IMAGE_SUFFIXES, MAX_IMAGE_PIXELS, printable, read_json

LAYOUTS = """\
  a folder in Pascal VOC's layout: Annotations/*.xml, images in JPEGImages or images
  XML files beside their images (LabelImg)
  YOLO text files in labels, images in images, or both side by side; class names in data.yaml or classes.txt
  a data.yaml file, named itself, which says where its images are
  a COCO .json file, named itself or in its folder
  _annotations.coco.json beside its images (Roboflow); COCO's own folder: annotations, train2017, val2017
  folders train, valid (or val) and test, each as above, or with YOLO images/train, labels/train and so on
  lists of the images of each split (train.txt): in ImageSets/Main, in ImageSets, or in the folder itself
  XML, COCO or YOLO files whose images are elsewhere: --image_folder says where"""

VALIDATION_NAMES = ("val", "valid", "validation")
SPLIT_NAMES = ("train", "training", "trainval", *VALIDATION_NAMES, "test", "testing")
COCO_FILE = "_annotations.coco.json"  # what Roboflow calls it
# COCO's own files beside instances_*.json, which nobody misses here.
BESIDE_INSTANCES = ("captions", "person_keypoints", "stuff", "panoptic", "image_info")
# Text files with a class name on each line, their names in any case; any other .names file, too.
CLASS_FILES = ("classes.txt", "obj.names", "_darknet.labels")
# Images to look for. Pillow cannot read the last two, but an error has to name them.
SOUGHT_IMAGES = (*IMAGE_SUFFIXES, ".heic", ".heif")
MAX_ANNOTATION_BYTES = 10_000_000  # VOC's largest annotation has 14 kB
MAX_LIST_BYTES = 1_000_000_000  # of a list of images: a million paths have about 60 MB
# Folders that systems make, and that not everybody may read.
SYSTEM_FOLDERS = ("__MACOSX", "lost+found", "System Volume Information", "$RECYCLE.BIN")
TURNED = "rectangles that are turned: the box around each taken"
# Names that stand in for a split that is missing, or has no objects.
FALLBACKS = {
    "trainval": ("train", "training"),
    "train": ("training",),
    "val": ("valid", "validation"),
    "test": ("testing", "valid", "val", "validation"),
}

# --- 1. Records -----------------------------------------------------------------------------------


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
    image_folder: str = ""  # in which the image was looked for
    guessed_from: str = ""  # the path that the annotation gives, where the image was found under another one
    first_pixel: int = 0  # 1: the file counts pixels from 1 and includes both ends
    split: str = ""
    size: tuple | None = None  # (width, height) of the image, once somebody has looked
    real_path: str = field(init=False)  # the same for all names of an image

    def __post_init__(self):
        self.real_path = os.path.realpath(self.image)


def read_annotations(source, splits, notes, image_folder="", first_pixel="", class_names=()):
    """Read the annotations of one data set.

    source: path of a folder, a COCO file or a data.yaml. splits: {"TRAIN": name of its split, "VAL": name,
    "TEST": name}, or some of the three; beside TRAIN, VAL may be missing in the data.
    notes: dict of kind to list; gets {"split", "file", "what"} for everything that was left out or guessed.
    image_folder, first_pixel, class_names: see the parameters of create_data_lists.py.
    Returns what the data look like, in a line, and the records: a dict of "TRAIN", "VAL" and "TEST" to lists of
    Record; "" stands for "TRAIN" and "TEST" where these are still to be divided.
    Raises FileNotFoundError and ValueError, naming the files, if something is missing or cannot be read.
    """
    if str(first_pixel) not in ("", "0", "1"):
        raise ValueError(f'first_pixel is {first_pixel!r}; it must be "0", "1" or ""')
    own_notes = {}  # of this source
    image_folder = image_folder and os.path.abspath(os.path.expanduser(image_folder))
    parts = find_parts(source, functools.partial(add_note, own_notes, ""), image_folder)
    form = next(iter(parts.values()))[0].form
    if image_folder:
        is_whole = "" in parts and {"TRAIN", "TEST"} <= splits.keys()  # else it may hold images of other splits
        changes = {"images": image_folder, "labelled_only": not is_whole}
        parts = {name: [part._replace(**changes) for part in group] for name, group in parts.items()}
    if form == "YOLO":
        parts = {name: [name_classes(part, source, class_names) for part in group] for name, group in parts.items()}

    chosen, records = read_splits(parts, splits, source, own_notes)
    description = describe_parts(parts, chosen)
    every_record = [record for rows in records.values() for record in rows]
    if form == "VOC":
        description += f", pixels counted from {count_from(every_record, first_pixel)}"
    elif form == "YOLO":
        used_parts = [part for name in chosen.values() for part in parts[name]]
        named_by = sorted({part.classes_from for part in used_parts})
        description += f", classes named by {printable(', '.join(named_by))}"
        make_yolo_boxes(every_record, used_parts, own_notes)
    settle_guessed_images(every_record, own_notes)
    records = {split: merge_repeats(rows, own_notes) for split, rows in records.items()}
    for kind, rows in own_notes.items():
        notes.setdefault(kind, []).extend(rows)
    return description, records


def read_splits(parts, splits, source, notes):
    """Choose a part of the data for each split, and read it.

    Returns two dicts: split to its name in `parts`, and split to its records. Both have "" for images that are to be
    divided into TRAIN and TEST: all where there are no splits, those of TRAIN where the one for TEST has no objects.
    """
    readers = {"VOC": read_voc, "COCO": read_coco, "YOLO": read_yolo}
    chosen = {}
    records = {}
    for split in [""] if "" in parts else ["TRAIN", "TEST", "VAL"]:
        note = functools.partial(add_note, notes, split)
        names = choose_names(split, parts, splits, chosen, source)
        if not names:
            continue
        can_divide = split == "TEST" and "TRAIN" in chosen and splits.get("TEST") == "test"
        is_needed = not can_divide and not is_optional(split, splits)
        for name in names:
            rows = [record for part in parts[name] for record in readers[part.form](part, source, note)]
            has_objects = any(record.objects for record in rows)  # without any, nothing could be scored
            if has_objects or (rows and is_needed and name == names[-1]):
                chosen[split] = name
                records[split] = rows
                break
            note("split_empty", where_is(parts[name][0]))
        if split not in chosen and is_needed:
            raise ValueError(f"{printable(where_is(parts[names[0]][0]))}: has no images, or none with an object")
    if "TRAIN" in chosen and "TEST" in splits and "TEST" not in chosen:
        chosen[""] = chosen.pop("TRAIN")
        records[""] = records.pop("TRAIN")
    return chosen, records


def is_optional(split, splits):
    """Whether the data may lack a split: VAL, unless they were named for nothing else, or under another name."""
    return split == "VAL" and "TRAIN" in splits and splits["VAL"].lower() in VALIDATION_NAMES


def choose_names(split, parts, splits, chosen, source):
    """The names in `parts` that can be a split, the best one first."""
    if split not in splits:
        return [""] if split == "" else []
    wanted = splits[split]
    names = [wanted, *FALLBACKS.get(wanted.lower(), ())]
    if chosen.get("TRAIN", "").lower() == "trainval":
        # VOC's val is a part of its trainval: it can neither stand in for test, nor be VAL.
        names = [wanted] if split == "TEST" or wanted.lower() not in VALIDATION_NAMES else []
    as_written = {name.lower(): name for name in parts}
    found = [as_written[name.lower()] for name in names if name.lower() in as_written]
    if split == "VAL":
        found = [name for name in found if name not in chosen.values()]
    if not found and not is_optional(split, splits):
        known = printable(", ".join(sorted(parts, key=len)))
        image_list = next(iter(parts.values()))[0].image_list
        way_out = "name the files or folders themselves as --train_data and --test_data"
        if image_list:
            way_out = f"move the lists in {printable(os.path.dirname(image_list))} away to have the images divided"
        raise FileNotFoundError(
            f"{printable(source)}: has no split {printable(repr(wanted))}. Name one of {known} as train_split, "
            f"val_split or test_split, or {way_out}"
        )
    return found


def where_is(part):
    """The path that says best where a part is."""
    return part.image_list or part.annotations or part.images


def describe_parts(parts, chosen):
    """What the data look like, and which part of them became which split."""
    first = next(iter(parts.values()))[0]
    pieces = [first.words]
    for split, words in {"TRAIN": "TRAIN", "": "TRAIN and TEST", "VAL": "VAL", "TEST": "TEST"}.items():
        if chosen.get(split):
            pieces.append(f"{printable(chosen[split])}: {words}")
    unused = parts.keys() - chosen.values()
    if first.image_list and "trainval" in parts:  # it holds the images of the two
        unused -= {"train", "val"}
    pieces += [f"{printable(name)}: not used" for name in sorted(unused)]
    return ", ".join(pieces)


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
            objects = [row for record in (first, *others) for row in record.objects]
            first.objects = list(dict.fromkeys(objects))  # without repeats
            first.declared_size = first.declared_size or others[0].declared_size
            add_note(notes, first.split, "image_repeated", first.file, f"{len(others) + 1} times")
    return [group[0] for group in groups.values()]


def settle_guessed_images(records, notes):
    """Note every image that was found under another name; take it back where two annotations claim it."""
    claims = {}
    for record in records:
        claims.setdefault(record.real_path, set()).add(record.guessed_from or record.image)
    for record in records:
        if not record.guessed_from:
            continue
        if len(claims[record.real_path]) > 1:
            take_back_guess(record)
        else:
            add_note(notes, record.split, "image_guessed", record.file, f"{record.guessed_from} is {record.image}")


def take_back_guesses(records):
    """Take back guessed images that another source names: cam0/1.jpg, which it names, is not this one's cam1/1.jpg."""
    named = {record.real_path for record in records if not record.guessed_from}
    for record in records:
        expected_folder = os.path.dirname(record.guessed_from)
        folder = os.path.dirname(record.image)
        is_beside = expected_folder != folder and os.path.dirname(expected_folder) == os.path.dirname(folder)
        if record.guessed_from and record.real_path in named and is_beside:
            take_back_guess(record)


def take_back_guess(record):
    """Give a record the image that was expected, in place of the one that was found."""
    record.image = record.guessed_from
    record.real_path = os.path.realpath(record.image)
    record.guessed_from = ""


def raise_if_any(problems, headline):
    """Raise one ValueError that lists the first problems, if there are any."""
    if not problems:
        return
    lines = [printable(problem, 400) for problem in problems[:10]]
    if len(problems) > len(lines):
        lines.append(f"... and {len(problems) - len(lines)} more")
    raise ValueError("\n  ".join([headline, *lines]))


# --- 2. Pascal VOC --------------------------------------------------------------------------------


def read_voc(part, source, note):
    """The records of XML files, with the corners as written: `count_from()` makes them continuous."""
    images = Files(part.images, SOUGHT_IMAGES)
    files = Files(part.annotations, (".xml",))
    paths = find_listed(part, files, note) if part.image_list else files.paths
    records = []
    problems = []
    for path in paths:
        file = os.path.join(part.annotations, path)
        try:
            annotation = parse_annotation(file, first_pixel=0)
        except (ValueError, OSError) as error:
            problems.append(error)
            continue
        records.append(make_voc_record(annotation, file, os.path.splitext(path)[0], images, source))
        missing = annotation["difficult_missing"]
        if missing:
            note("difficult_missing", file, f"{missing} object{'s' * (missing > 1)}")
        if annotation["turned"]:
            note("entry_guessed", file, f"{annotation['turned']} objects: {TURNED}")
    raise_if_any(problems, f"{printable(source)}: {len(problems)} of {len(paths)} annotations cannot be used:")
    return records


def find_listed(part, files, note):
    """The XML file of each name in a list of images."""
    paths = []
    for name in read_lines(part.image_list):
        path = files.find(name) or files.find(files.without_suffix(name))
        if not path:
            path = files.guess(name) or f"{name}.xml"
            note("entry_guessed", part.image_list, f"{name}: {path} taken")
        paths.append(path)
    return paths


def make_voc_record(annotation, file, stem, images, source):
    """The record of a parsed annotation. stem: the path of its file below the annotations, without suffix."""
    rows = zip(annotation["names"], annotation["boxes"], annotation["difficulties"], strict=True)
    objects = [Annotated(name, tuple(box), difficulty) for name, box, difficulty in rows]
    size = (annotation["width"], annotation["height"]) if annotation["width"] else None
    image, guessed_from = find_voc_image(images, stem, annotation["filename"])
    return Record(image, file, source, "VOC", objects, size, image_folder=images.folder, guessed_from=guessed_from)


def find_voc_image(images, stem, filename):
    """The image of an XML file, and the path that was expected if it is another one, else "".

    It has the name of the XML file, whatever its suffix; of several the one that <filename> says. Without one of that
    name, <filename> decides.
    """
    expected = os.path.join(images.folder, f"{stem}.jpg")
    candidates = images.same_stem(stem)
    if candidates:
        name = os.path.basename(filename.replace("\\", "/"))
        named = [path for path in candidates if os.path.basename(path) == name]
        return os.path.join(images.folder, (named or candidates)[0]), ""
    found = images.find(filename) or images.guess(stem) or images.guess(filename)
    if found:
        return os.path.join(images.folder, found), expected
    return expected, ""


def count_from(records, first_pixel):
    """Make boxes continuous that are written as the corners of VOC; returns what the files call the first pixel."""
    # VOC counts pixels from 1 and includes both ends, so 1 is taken off the minima. Tools that count from 0 write the
    # rectangle that was drawn, which is continuous already; a single minimum of 0, which VOC never has, tells them.
    minima = [side for record in records for row in record.objects for side in row.box[:2]]
    counts_from_0 = any(0 <= side < 1 for side in minima)
    first = int(first_pixel) if first_pixel != "" else int(not counts_from_0)
    for record in records:
        record.first_pixel = first
        boxes = [(row.box[0] - first, row.box[1] - first, *row.box[2:]) for row in record.objects]
        record.objects = [row._replace(box=box) for row, box in zip(record.objects, boxes, strict=True)]
    return first


def parse_annotation(path, first_pixel=1):
    """Read one annotation in Pascal VOC's XML format.

    path: the XML file. first_pixel: what it calls the first pixel: 1 as in VOC, or 0.
    Returns a dict: boxes, a list of [xmin - first_pixel, ymin - first_pixel, xmax, ymax], floats, continuous, boundary
    form, in pixels, and otherwise as written; names and difficulties, for each box the class name and 0 or 1;
    width and height, ints in pixels, both None if <size> is missing or absurd; filename, or else path, or "";
    difficult_missing, how many objects have no <difficult>, or one that is not specified: it is then 0; turned, how
    many are rectangles that CVAT has turned: their boxes are those around them.
    Raises FileNotFoundError if there is no such file; ValueError, naming file and value, if it is not an
    annotation, an object lacks its name or box, or entities are declared, which could expand without bounds.
    """
    shown = printable(path)
    root = parse_xml(path, shown)
    if root.tag != "annotation":
        raise ValueError(f"{shown}: not a VOC annotation: its root is <{printable(root.tag, 40)}>, not <annotation>")
    width, height = usable_size(root.findtext("size/width"), root.findtext("size/height")) or (None, None)
    filename = (root.findtext("filename") or root.findtext("path") or "").strip()
    annotation = {"boxes": [], "names": [], "difficulties": [], "difficult_missing": 0, "turned": 0}
    annotation |= {"width": width, "height": height, "filename": filename}
    # Only the objects right below the root: the person layout challenge nests <part>s with boxes in them.
    objects = root.findall("object")
    n_others = sum(element.tag.lower() == "object" for element in root.iter()) - len(objects)
    if n_others:
        raise ValueError(f"{shown}: {n_others} objects are not where VOC has them: <object> right below <annotation>")
    for i, element in enumerate(objects, start=1):
        name = (element.findtext("name") or "").strip()
        box = element.find("bndbox")
        where = f"{shown}: object {i} ({printable(name, 60)})"
        if not name or box is None:
            raise ValueError(f"{where} has no {'<bndbox>' if name else '<name>'}")
        corners = [parse_number(box, tag, where) for tag in ("xmin", "ymin", "xmax", "ymax")]
        degrees = parse_degrees(element.findtext("attributes/attribute[name='rotation']/value"))
        if degrees:
            corners = box_around_turned(corners, degrees)
            annotation["turned"] += 1
        difficulty = parse_flag(element.findtext("difficult") or "", f"{where}: <difficult>")
        annotation["boxes"].append([corners[0] - first_pixel, corners[1] - first_pixel, *corners[2:]])
        annotation["names"].append(name)
        annotation["difficulties"].append(difficulty or 0)
        annotation["difficult_missing"] += difficulty is None
    return annotation


def parse_xml(path, shown):
    """The root element of an XML file that declares no entities; ValueError, naming it, for any other."""
    content = read_bytes(path)
    declared = re.match(rb"""<\?xml[^>]*encoding\s*=\s*["']([\w.-]+)["']""", content.lstrip())
    encoding = find_encoding(content) or (declared[1].decode() if declared else "utf-8")
    if not find_encoding(content) and encoding.lower().startswith("utf-16"):  # .NET declares it, and writes UTF-8
        encoding = "utf-8"
    try:
        text = content.decode(encoding).lstrip("\ufeff").strip()
    except UnicodeDecodeError:
        hint = "save it as UTF-8, or let its first line say its encoding"
        raise ValueError(
            f'{shown}: unreadable XML: its encoding is not {encoding}; {hint}: <?xml version="1.0" encoding="gbk"?>'
        ) from None
    except LookupError as error:
        raise ValueError(f"{shown}: unreadable XML: {printable(error)}") from None
    if any(part in text for part in ("<!DOCTYPE", "<!ENTITY", "\0")):
        raise ValueError(f"{shown}: a document type, an entity or a zero byte, which are refused; remove it")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{shown}: unreadable XML: {printable(error)}") from error


def parse_number(parent, tag, where):
    """The number in the child `tag` of an element, possibly infinite or NaN."""
    text = parent.findtext(tag)
    try:
        return float(text)
    except (TypeError, ValueError):
        shown = "missing" if text is None else f"{printable(repr(text), 40)}, not a number"
        raise ValueError(f"{where}: <{tag}> is {shown}") from None


def parse_flag(text, where):
    """0 or 1, as a text says it; None if it says that it is not specified; ValueError, naming it, for another text."""
    word = text.strip().lower()
    if word in ("0", "false", "no"):
        return 0
    if word in ("1", "true", "yes"):
        return 1
    if word in ("", "unspecified", "unknown", "none", "null"):
        return None
    raise ValueError(f"{where} is {printable(repr(text), 40)}, not 0 or 1")


def parse_degrees(value):
    """The degrees by which CVAT says that a rectangle is turned; 0 for anything that is no number."""
    try:
        degrees = float(str(value))
    except ValueError:
        return 0.0
    return degrees % 360 if math.isfinite(degrees) else 0.0


def box_around_turned(box, degrees):
    """The box around a rectangle, boundary form, that is turned about its centre."""
    x_min, y_min, x_max, y_max = box
    cos = abs(math.cos(math.radians(degrees)))
    sin = abs(math.sin(math.radians(degrees)))
    width = (x_max - x_min) * cos + (y_max - y_min) * sin
    height = (x_max - x_min) * sin + (y_max - y_min) * cos
    return boundary([(x_min + x_max) / 2, (y_min + y_max) / 2, width, height])


def usable_size(width, height):
    """(width, height) as ints, or None if they cannot be those of an image that could be read."""
    try:
        size = float(width), float(height)
    except (TypeError, ValueError, OverflowError):
        return None
    return (int(size[0]), int(size[1])) if all(1 <= side <= MAX_IMAGE_PIXELS for side in size) else None


# --- 3. COCO --------------------------------------------------------------------------------------


def read_coco(part, source, note):
    """The records of a COCO file: {"images": [...], "annotations": [...], "categories": [...]}."""
    path = part.annotations
    content = read_json(path, dict)
    for key in ("categories", "images", "annotations"):
        if not isinstance(content.get(key), list):
            raise ValueError(f"{printable(path)}: not a COCO file: it has no list of {key!r}")
    folders, root = ([part.images], part.images) if part.images else coco_image_folders(path)
    files = Files(root, SOUGHT_IMAGES)
    guesses = Counter()  # what was guessed, to how often

    names = by_id(content, "categories", read_category, path, note)  # id as text: (id, name)
    # Of several categories with one name, the id of the one that has most objects.
    counts = Counter(str(entry.get("category_id")) for entry in content["annotations"] if isinstance(entry, dict))
    by_count = sorted(names.values(), key=lambda named: counts[str(named[0])])
    category_ids = {name: category_id for category_id, name in by_count}
    make_record = functools.partial(make_coco_record, folders, files, source, category_ids)
    records = by_id(content, "images", make_record, path, note)
    convert(content, "annotations", lambda entry: add_coco_object(entry, records, names, guesses), path, note)
    for guess, count in guesses.items():
        note("entry_guessed", path, f"{count} objects: {guess}")
    return list(records.values())


def convert(content, key, make, path, note):
    """What make() returns of each entry of a list. The refused ones are noted; ValueError if all are."""
    made = []
    problems = []
    for i, entry in enumerate(content[key]):
        try:
            if not isinstance(entry, dict):
                raise ValueError(f"{printable(repr(entry), 60)} is not an object")
            made.append(make(entry))
        except ValueError as error:
            problems.append(f"{key}[{i}]: {error}")
    if not made:
        raise_if_any(problems, f"{printable(path)}: none of the {len(problems)} entries of {key!r} can be used:")
    for problem in problems:
        note("entry_unusable", path, problem)
    return made


def by_id(content, key, make, path, note):
    """What make() returns of each entry, by its id as text, without ids that stand for two things."""
    values = {}
    repeated = set()
    for entry_id, value in convert(content, key, lambda entry: (read_id(entry, "id"), make(entry)), path, note):
        if values.setdefault(str(entry_id), value) != value:
            repeated.add(entry_id)
    for entry_id in repeated:
        values.pop(str(entry_id), None)
        note("entry_unusable", path, f"{key}: 'id' {printable(repr(entry_id), 60)} is given twice")
    return values


def take_field(entry, key, types):
    """The value of a field; ValueError, naming it, if it is missing or of another type."""
    value = entry.get(key)
    if not isinstance(value, types) or isinstance(value, bool):
        raise ValueError(f"{key!r} is {'missing' if key not in entry else printable(repr(value), 60)}")
    return value


def read_id(entry, key):
    """An id, a number or a text."""
    value = take_field(entry, key, (int, str, float))
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_category(entry):
    """(id, name) of an entry of "categories"."""
    return read_id(entry, "id"), str(take_field(entry, "name", (str, int))).strip()


def make_coco_record(folders, files, source, category_ids, entry):
    """The record, without objects, of an entry of "images"; ValueError for a name that no file can have."""
    name = take_field(entry, "file_name", str)
    size = usable_size(entry.get("width"), entry.get("height"))
    image, guessed_from = find_image(name, folders, files)
    record = Record(image, image, source, "COCO", [], size, image_folder=os.path.dirname(image))
    record.image_id = read_id(entry, "id")
    record.category_ids = category_ids
    record.guessed_from = guessed_from
    return record


def coco_image_folders(path):
    """Where the images of a COCO file may be, and the folder that holds all of these."""
    folder, file = os.path.split(path)
    is_own = os.path.basename(folder).lower() == "annotations"  # COCO's own folder, and CVAT's
    root = os.path.dirname(folder) if is_own else folder
    split = os.path.splitext(file)[0].rpartition("_")[2]  # instances_train2017.json: train2017
    inner = ("images", split, os.path.join("images", split))
    return [folder, os.path.join(folder, "images"), root, *[os.path.join(root, name) for name in inner]], root


def add_coco_object(entry, records, names, guesses):
    """Give the object of an entry of "annotations" to the record of its image."""
    record = look_up(entry, "image_id", records)
    category_id, name = look_up(entry, "category_id", names)
    if type(entry["image_id"]) is not type(record.image_id) or type(entry["category_id"]) is not type(category_id):
        guesses["ids as numbers here and as text there: taken as the same"] += 1
    if name in ("", "N/A"):  # what torchvision's list of COCO's classes has in place of ids that are not used
        raise ValueError(f"its category is called {name!r}")
    is_crowd = entry.get("iscrowd", 0)
    if is_crowd not in (0, 1):
        is_crowd = parse_flag(str(is_crowd), "'iscrowd'") or 0
        guesses["'iscrowd' is text, or null: null taken as 0"] += 1
    x_min, y_min, width, height = read_coco_box(entry, guesses)
    box = (x_min, y_min, x_min + width, y_min + height)
    attributes = entry.get("attributes")
    degrees = parse_degrees(attributes.get("rotation")) if isinstance(attributes, dict) else 0
    if degrees:
        box = box_around_turned(box, degrees)
        guesses[TURNED] += 1
    area = entry.get("area")
    area = float(area) if type(area) in (int, float) and 0 <= area < 1e300 else width * height
    record.objects.append(Annotated(name, box, int(is_crowd), area))


def look_up(entry, key, table):
    """What an entry's id stands for; ValueError if the file does not have it."""
    value = read_id(entry, key)
    if str(value) not in table:
        raise ValueError(f"{key} {printable(repr(value), 60)} ({type(value).__name__}) is not in the file")
    return table[str(value)]


def read_coco_box(entry, guesses):
    """[x_min, y_min, width, height] of an object: its "bbox", or, if it has none, the box around its outline."""
    box = entry.get("bbox")
    if isinstance(box, str) or (isinstance(box, list) and any(isinstance(value, str) for value in box)):
        box = parse_numbers(box)
        guesses["'bbox' is text: its numbers taken"] += 1
    outline = entry.get("segmentation")
    if outline and (not box or (isinstance(box, list) and not any(box))):
        box = box_of_mask(outline) if isinstance(outline, dict) else box_of_polygons(outline)
        guesses["no 'bbox': the box around the outline taken"] += 1
    if not box:
        box = take_field(entry, "bbox", list)
    if not isinstance(box, list) or len(box) != 4 or not are_numbers(box):
        raise ValueError(f"'bbox' is {printable(repr(box), 60)}, not four numbers")
    # An integer may be too large for a float.
    return [float(value) if abs(value) < 1e300 else math.inf for value in box]


def parse_numbers(values):
    """The numbers in a text such as "[1, 2.5]" or in a list of texts; the same again if it holds anything else."""
    texts = re.sub(r"[\[\](),]", " ", values).split() if isinstance(values, str) else values
    try:
        return [float(text) for text in texts]
    except (TypeError, ValueError, OverflowError):
        return values


def are_numbers(values):
    """Whether all values of a JSON list are numbers."""
    return all(type(value) in (int, float) for value in values)


def box_of_polygons(polygons):
    """The box around COCO's polygons: a list of [x, y, x, y, ...], or one such list."""
    if isinstance(polygons, list) and are_numbers(polygons):
        polygons = [polygons]
    if not isinstance(polygons, list) or not all(isinstance(polygon, list) for polygon in polygons):
        raise ValueError("'bbox' is missing, and 'segmentation' is not a list of polygons")
    if not all(are_numbers(polygon) and len(polygon) % 2 == 0 for polygon in polygons):
        raise ValueError("'bbox' is missing, and a polygon of 'segmentation' is not [x, y, x, y, ...]")
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    if not xs:
        raise ValueError("'bbox' is missing, and 'segmentation' has no points")
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def box_of_mask(mask):
    """The box around a mask in COCO's run-length code, {"size": [height, width], "counts": ...}, by pycocotools."""
    try:
        from pycocotools import mask as masks
    except ImportError:
        raise ValueError("'bbox' is missing; to read the mask, `pip install pycocotools`") from None
    try:
        height, width = mask["size"]
        if not 1 <= height * width <= MAX_IMAGE_PIXELS:
            raise ValueError("an image of this size cannot be")
        if isinstance(mask["counts"], list):
            mask = masks.frPyObjects(mask, height, width)
        return [float(value) for value in masks.toBbox(mask)]
    except Exception as error:  # pycocotools raises errors of many kinds for a mask that is not what it should be
        raise ValueError(f"'bbox' is missing, and the mask cannot be read ({printable(error, 100)})") from None


# --- 4. YOLO --------------------------------------------------------------------------------------


def read_yolo(part, source, note):
    """The records of YOLO's text files: the boxes are the numbers as written, until `make_yolo_boxes()`."""
    records = []
    labels = set()  # all that were seen
    for image, file, guessed_from in pair_yolo(part, note):
        objects = []
        if os.path.isfile(file):
            objects = read_label_file(file, part.class_names, labels, note)
        elif part.labelled_only and not part.image_list:
            continue
        else:
            note("label_file_missing", image)
        record = Record(image, file, source, "YOLO", objects, image_folder=part.images, guessed_from=guessed_from)
        records.append(record)
    n_classes = max(part.class_names) + 1
    if labels and min(labels) == 1 and max(labels) == n_classes:
        note("classes_from_1", where_is(part), f"labels 1 to {n_classes}, names 0 to {n_classes - 1}")
    return records


def pair_yolo(part, note):
    """(image, label file, "") for each image of a list or folder; in place of "", the path that the list or the label
    file gives for the image, if the image or the label file was guessed."""
    find_files = functools.cache(Files)
    find_labels = functools.cache(labels_folder_of)
    guess_once = functools.cache(guess_labels)
    images = find_files(part.images, SOUGHT_IMAGES)
    if part.image_list:
        found = [find_listed_image(line, part, images) for line in read_lines(part.image_list)]
    else:
        found = [(os.path.join(part.images, paths[0]), "") for paths in images.by_stem.values()]
    pairs = []
    for image, guessed_from in found:
        image_folder, label_folder = part.images, part.annotations
        if not label_folder or not image.startswith(os.path.join(image_folder, "")):  # a list's, from elsewhere
            image_folder = os.path.dirname(image)
            label_folder = find_labels(image_folder)
        labels = find_files(label_folder, (".txt",))
        label, named_image = find_label(image, labels, find_files(image_folder, SOUGHT_IMAGES), guess_once)
        pairs.append((image, label, guessed_from or named_image))
    used = {label for _, label, _ in pairs}
    for path in [] if part.image_list else find_files(part.annotations, (".txt",)).paths:
        file = os.path.join(part.annotations, path)
        if file not in used and is_label_name(os.path.basename(path).lower()):
            note("image_not_found", file)
    return pairs


def find_listed_image(line, part, images):
    """The path of the image that a line of a list names: (path, "") or (guessed path, expected path)."""
    same = images.find(line)
    if same:
        return os.path.join(part.images, same), ""
    folder = os.path.dirname(part.image_list)
    # Darknet has its data in a folder of this name, and CVAT writes it, whatever the folder is called.
    return find_image(line.removeprefix("data/"), [folder, os.path.join(folder, "data")], images)


def find_label(image, labels, images, guess):
    """The label file of an image, at the same path below the folders of both: (path, ""), also if it is not there; or
    the one that guess(labels, images) has for it, and the path of the image by its name."""
    path = os.path.relpath(image, images.folder)
    stem = os.path.splitext(path)[0]
    same = labels.same_stem(stem)
    if not same and path in guess(labels, images):
        label = guess(labels, images)[path]
        return os.path.join(labels.folder, label), os.path.join(images.folder, os.path.splitext(label)[0])
    return os.path.join(labels.folder, same[0] if same else f"{stem}.txt"), ""


def guess_labels(labels, images):
    """The label files by the image that their names can mean, where it is one, and no other of them means it."""
    claims = {}
    for path in labels.paths:
        claims.setdefault(images.guess(os.path.splitext(path)[0]), []).append(path)
    return {image: paths[0] for image, paths in claims.items() if image and len(paths) == 1 and agree(image, paths[0])}


def agree(path, other):
    """Whether the folders of two relative paths may be the same: those of one are the last ones of the other, or none.
    cam1/0001 is not cam0/0001, but may be 0001, or run2/cam1/0001."""
    folders = os.path.dirname(path).lower().split(os.sep)
    others = os.path.dirname(other).lower().split(os.sep)
    n = min(len(folders), len(others))
    return [""] in (folders, others) or folders[-n:] == others[-n:]


def read_label_file(path, class_names, labels, note):
    """The objects of a label file; lines that cannot be used are noted. labels: a set, gets those in the file."""
    objects = []
    for i, line in enumerate(split_lines(read_text(path)), start=1):
        if not line:
            continue
        try:
            objects.append(parse_yolo_line(line, class_names, labels))
        except LookupError as error:
            note("class_unnamed", path, f"line {i}: {error}")
        except ValueError as error:
            note("entry_unusable", path, f"line {i}: {error}")
    return objects


def parse_yolo_line(line, class_names, labels):
    """The object of a line, a class and numbers, which stand in the place of its box.

    Raises ValueError for what is no such line, LookupError for a class without a name.
    """
    shown = printable(line, 60)
    fields = line.split(",") if "," in line else line.split()
    try:
        numbers = [float(text) for text in fields]
    except ValueError:
        raise ValueError(f"{shown!r} is not a line of numbers") from None
    label = numbers[0]
    labels.add(label)
    if label not in class_names:
        raise LookupError(f"{shown!r}: class {label:g} is not one of the {len(class_names)} class names")
    return Annotated(class_names[label], tuple(numbers[1:]))


def make_yolo_boxes(records, parts, notes):
    """Turn the numbers of YOLO's label lines into boxes.

    Behind the class, a line has a box in center-size form (4 numbers), perhaps with keypoints, or an outline: x, y, x,
    y, and so on. A confidence may follow, or the number of a track, or both. What a line alone does not show is
    decided by all lines: whether they have keypoints or outlines, and whether outlines end in a point or in a track.
    """
    rows = [row.box for record in records for row in record.objects]
    n_keypoints = declared_keypoint_numbers(parts)
    says_outlines = n_keypoints == 0
    if n_keypoints is None:
        n_keypoints = count_keypoint_numbers(rows, parts)
    has_outlines = says_outlines or (not n_keypoints and any(len(row) > 6 for row in rows))
    others = [row for row in rows if not has_keypoints(row, n_keypoints)]
    has_tracks = False if says_outlines else have_tracks(others, has_outlines)
    if has_tracks is None:
        refuse_unclear_ends(records, n_keypoints)
    guesses = {}  # what was guessed, to the file of each line
    for record in records:
        objects = []
        for row in record.objects:
            try:
                box, guess = yolo_box(row.box, n_keypoints, has_outlines, has_tracks)
                objects.append(row._replace(box=box))
                guesses.setdefault(guess, []).append(record.file)
            except ValueError as error:
                add_note(notes, record.split, "entry_unusable", record.file, str(error))
        record.objects = objects
    for guess, files in guesses.items():
        if guess:
            add_note(notes, "", "entry_guessed", files[0], f"{len(files)} label lines, the first here: {guess}")
    unusable = [*notes.get("entry_unusable", []), *notes.get("class_unnamed", [])]
    if unusable and not any(record.objects for record in records):
        problems = [f"{row['file']}: {row['what']}" for row in unusable]
        raise_if_any(problems, f"{printable(records[0].source)}: none of the {len(unusable)} label lines can be used:")


def declared_keypoint_numbers(parts):
    """How many numbers of a label line are keypoints, by data.yaml's kpt_shape: 0 for outlines; None: it has none."""
    for part in parts:
        shape = (part.data or {}).get("kpt_shape")
        if shape:
            if not isinstance(shape, list) or not all(str(n).isdecimal() and len(n) < 4 for n in shape):
                raise ValueError(f"{part.data_file}: kpt_shape is {printable(shape, 60)}, not such as [17, 3]")
            return math.prod(int(n) for n in shape)
    return None


def count_keypoint_numbers(rows, parts):
    """How many numbers of a label line are keypoints, behind the box; 0: long lines are outlines.

    rows: the numbers of each line. Four fifths of the long lines must have equally many, and fit a box with keypoints
    in it. ValueError if they fit outlines as well.
    """
    long_rows = [row for row in rows if len(row) > 6]
    if not long_rows:
        return 0
    n_numbers, n_rows = Counter(len(row) for row in long_rows).most_common(1)[0]
    n_enough = 0.8 * len(long_rows)
    if n_rows < n_enough:
        return 0
    rows = [row for row in long_rows if len(row) == n_numbers]
    for size, n_more in ((3, 0), (3, 1), (3, 2), (2, 0), (2, 1), (2, 2)):  # numbers of a keypoint; behind all of them
        end = n_numbers - n_more
        fitting = [row for row in rows if fits_keypoints(row[:end], size)]
        if len(fitting) < n_enough:
            continue
        has_visibilities = size == 3 and all(number.is_integer() for row in fitting for number in row[6:end:3])
        may_be_outlines = all(0 <= number <= 1 for row in rows for number in row[:-1])  # the last may be a track
        if may_be_outlines and not has_visibilities:
            raise ValueError(
                f"{printable(where_is(parts[0]))}: label lines of {n_numbers} numbers may be outlines, or boxes "
                "with keypoints: data.yaml has to say which (kpt_shape: [17, 3] for 17 keypoints of 3 numbers, [0, 0] "
                "for outlines)"
            )
        return end - 4
    return 0


def fits_keypoints(row, size):
    """Whether numbers can be a box, and keypoints of `size` numbers in it: x, y and perhaps the visibility (0, 1 or 2)
    or a confidence (0 to 1)."""
    c_x, c_y, width, height = row[:4]
    points = row[4:]
    if not points or len(points) % size:
        return False
    if size == 3 and not all(0 <= number <= 1 or number == 2 for number in points[2::3]):
        return False
    is_inside = abs(c_x - 0.5) + width / 2 <= 0.51 and abs(c_y - 0.5) + height / 2 <= 0.51
    # A keypoint that cannot be seen is (0, 0). Some lie a little outside.
    seen = [(x, y) for x, y in zip(points[::size], points[1::size], strict=True) if (x, y) != (0, 0)]
    return is_inside and all(abs(x - c_x) <= 0.6 * width and abs(y - c_y) <= 0.6 * height for x, y in seen)


def has_keypoints(row, n_keypoints):
    """Whether a line's numbers are a box and its keypoints, perhaps with a confidence, a track or both."""
    return n_keypoints > 0 and len(row) - 4 - n_keypoints in (0, 1, 2)


def have_tracks(rows, has_outlines):
    """Whether lines that may end in a confidence and the track 0 or 1 do so; None: the data set does not show it.

    rows: the numbers of each line. Tracks are whole numbers, and 0 and 1 may be coordinates at the border of the image
    as well. So they are tracks if four fifths of the lines may have one, and there is one that is no coordinate, or
    there are no outlines; they are coordinates if four fifths cannot have a track, and no line has one for certain.
    """
    rows = [row for row in rows if len(row) >= 6 and len(row) % 2 == 0]
    n_possible = sum(may_end_in_track(row) for row in rows)
    is_certain = any(may_end_in_track(row) and row[-1] not in (0, 1) for row in rows)
    if n_possible >= 0.8 * len(rows) and (is_certain or not has_outlines):
        return True
    return False if n_possible <= 0.2 * len(rows) and not is_certain else None


def may_end_in_track(numbers):
    """Whether a line's last two numbers may be a confidence and the number of a track."""
    n = len(numbers)
    return n >= 6 and n % 2 == 0 and 0 <= numbers[-2] <= 1 and numbers[-1].is_integer()


def refuse_unclear_ends(records, n_keypoints):
    """Raise ValueError for a line whose box depends on whether its last two numbers are a point."""
    for record in records:
        for numbers in (row.box for row in record.objects):
            is_unclear = may_end_in_track(numbers) and numbers[-1] in (0, 1) and not has_keypoints(numbers, n_keypoints)
            if is_unclear and box_around(numbers) != box_around(numbers[:-2]):
                raise ValueError(
                    f"{printable(record.file)}: the line with {show_numbers(numbers)} ends in {numbers[-2]:g} "
                    f"{numbers[-1]:g}: the last point of an outline, or a confidence and a track; the other lines do "
                    "not show which. If points, data.yaml has to say kpt_shape: [0, 0]; if not, take the two numbers "
                    "off all lines"
                )


def yolo_box(numbers, n_keypoints, has_outlines, has_tracks=False):
    """The box, boundary form, in fractions, of a label line's numbers, and in words what was guessed, else "".

    n_keypoints: how many of the numbers of long lines are keypoints; has_outlines: whether they are outlines instead;
    has_tracks: what `have_tracks()` says.
    """
    n = len(numbers)
    if has_keypoints(numbers, n_keypoints):
        return boundary(numbers), f"box and keypoints ({n} numbers), the box taken"
    ends_in_track = may_end_in_track(numbers) and (has_tracks or numbers[-1] not in (0, 1))
    is_outline = has_outlines and n >= (8 if ends_in_track else 6)  # three points, or more
    n_more = n - 4  # behind the box or outline
    if is_outline:
        n_more = 2 if ends_in_track else n % 2
    ends_in_number = n_more == 1 and numbers[-1] >= 0 and (numbers[-1] <= 1 or numbers[-1].is_integer())
    if not (n_more == 0 or ends_in_number or (n_more == 2 and ends_in_track)):
        raise ValueError(
            f"{show_numbers(numbers)}: {n} numbers; a class and 4 numbers are expected (perhaps a confidence and a "
            "track, or keypoints), or an outline of 3 points or more"
        )
    more = ("", "confidence or track", "confidence and track")[n_more]
    if not is_outline:
        return boundary(numbers), f"box and {more} ({n} numbers), the box taken" if more else ""
    points = numbers[: n - n_more]
    if not all(-0.5 <= number <= 1.5 for number in points):
        raise ValueError(f"{show_numbers(numbers)}: an outline far outside the image, or in pixels")
    return box_around(points), f"outline and {more}, the outline taken" if more else ""


def show_numbers(numbers):
    """The first of a line's numbers, as an error shows them."""
    return repr(printable(" ".join(map("{:g}".format, numbers)), 60))


def box_around(points):
    """The box around an outline: x, y, x, y, ..."""
    xs = points[::2]
    ys = points[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def boundary(numbers):
    """Boundary form of a box whose center-size form is the first four numbers."""
    c_x, c_y, width, height = numbers[:4]
    return c_x - width / 2, c_y - height / 2, c_x + width / 2, c_y + height / 2


# --- 5. Layouts -----------------------------------------------------------------------------------


class Part(NamedTuple):
    """Where files of one split are."""

    form: str  # "VOC", "COCO" or "YOLO"
    words: str  # what it looks like
    annotations: str  # a folder, or a JSON file
    images: str  # a folder
    image_list: str = ""  # a text file with the names of the images; "": all images in the folder
    data_file: str = ""  # YOLO's data.yaml
    data: dict | None = None  # what it says
    by_yaml: bool = False  # whether it says where the images are
    class_names: dict | None = None  # YOLO's: number of a class to its name
    classes_from: str = ""  # what named them
    labelled_only: bool = False  # YOLO's: whether images without a label file belong to other splits


def find_parts(source, note, image_folder=""):
    """The parts of a data set: a dict of the names of its splits to lists of Part; {"": list} if it has none."""
    suffix = os.path.splitext(source)[1].lower()
    if os.path.isfile(source) and suffix == ".json":
        return {"": [Part("COCO", "COCO file", source, "")]}
    if os.path.isfile(source) and suffix in (".yaml", ".yml"):
        folder = os.path.dirname(os.path.abspath(source))
        parts = find_yolo(folder, note, source, read_yaml(source))
        if not parts:
            hint = "correct its paths, or let it lie in the folder that has images and labels"
            raise ValueError(f"{printable(source)}: train, val and test name no images that are there; {hint}")
    elif os.path.isdir(source):
        folder = source
        parts = find_folder_parts(folder, note) or find_labels_alone(folder, image_folder)
        if not parts:
            refuse_layout(folder)
    else:
        raise FileNotFoundError(f"{printable(source)}: not a folder or a .json or .yaml file. Can be read:\n{LAYOUTS}")
    parts = divide_by_lists(parts, folder, note)
    if len(parts) == 1:  # one list, or folder, is of all images
        return {"": next(iter(parts.values()))}
    return parts


def find_folder_parts(folder, note):
    """The parts that lie in a folder, whatever its layout; {} if it has none that is known."""
    has_labels = find_child(folder, "labels") != ""  # then a COCO file beside it is a copy
    return (
        find_voc(folder)
        or (has_labels and find_yolo(folder, note))
        or find_coco(folder, note)
        or find_xml(folder)
        or find_split_folders(folder, find_voc, note)
        or find_split_folders(folder, functools.partial(find_coco, note=note), note)
        or find_split_folders(folder, find_xml, note)
        or find_yolo(folder, note)
        or find_nested_xml(folder)
    )


def find_split_folders(folder, find, note):
    """The parts that find() sees in the folders train, valid and so on, by the names of these."""
    parts = {}
    for split, path in split_folders(folder).items():
        found = find(path)
        if found:
            group = [part for parts_of_one in found.values() for part in parts_of_one]
            if len(group) > 1:
                names = printable(", ".join(os.path.basename(part.annotations) for part in group))
                group = [part._replace(words=f"{part.words} ({names})") for part in group]
            parts[split] = group
    note_empty_splits(folder, parts, note)
    return parts


def note_empty_splits(folder, parts, note):
    """Note the folders train, valid and so on that are none of the parts, if others are."""
    for split, path in split_folders(folder).items():
        if parts and split not in parts:
            note("split_empty", path)


def split_folders(folder):
    """Folders named after a split, such as Train or val2017: a dict of the split's name to the path."""
    found = {}
    for path in list_folder(folder):
        name = os.path.basename(path).lower().rstrip("0123456789")
        if name in SPLIT_NAMES and os.path.isdir(path):
            if name in found:
                both = f"{printable(found[name])} and {printable(path)}"
                raise ValueError(f"two folders for {name}: {both}; name them as --train_data, separated by commas")
            found[name] = path
    return found


def find_voc(folder):
    """XML files in a folder Annotations; in folders of the splits within it, if all are, and there is no ImageSets."""
    annotations = find_child(folder, "Annotations")
    if not has_files(annotations, (".xml",)):
        return {}
    images = find_image_folder(folder)
    words = f"XML files in {os.path.basename(annotations)}, images in {os.path.basename(images)}"
    part = Part("VOC", words, annotations, images)
    inner = sorted({path.split(os.sep)[0] for path in walk_files(annotations, (".xml",))})
    splits = {name.lower().rstrip("0123456789"): name for name in inner}
    if len(splits) < len(inner) or not splits.keys() <= set(SPLIT_NAMES) or find_child(folder, "ImageSets"):
        return {"": [part]}
    parts = {}
    for split, name in splits.items():
        image_folder = find_child(images, name) or images
        parts[split] = [part._replace(annotations=os.path.join(annotations, name), images=image_folder)]
    return parts


def find_image_folder(folder):
    """The folder with the images of XML files in Annotations; where there are none, VOC's name for it."""
    for name in ("images", "JPEGImages"):
        path = find_child(folder, name)
        if has_files(path, SOUGHT_IMAGES):
            return path
    if has_files(folder, SOUGHT_IMAGES):
        return folder
    return os.path.join(folder, "JPEGImages")


def find_xml(folder):
    """XML files beside their images."""
    if any(path.lower().endswith(".xml") for path in list_folder(folder)):
        return {"": [Part("VOC", "XML files beside their images", folder, folder)]}
    return {}


def find_nested_xml(folder):
    """XML files and images anywhere below a folder, unless they are divided there: of which data set, is not clear."""
    inner = [name.lower() for _, folders, _ in os.walk(folder) for name in folders]
    if has_files(folder, (".xml",)) and not set(inner) & {"imagesets", *SPLIT_NAMES}:
        return {"": [Part("VOC", "XML files in subfolders", folder, folder)]}
    return {}


def find_coco(folder, note):
    """COCO files in a folder or its folder annotations, by the splits in their names: instances_train2017.json."""
    own = os.path.join(folder, COCO_FILE)
    if os.path.isfile(own):
        return {"": [Part("COCO", "COCO files beside their images", own, folder)]}
    paths = list_folder(folder) + list_folder(find_child(folder, "annotations"))
    paths = [path for path in paths if looks_like_coco(path)]
    instances = [path for path in paths if os.path.basename(path).startswith("instances")]
    if instances:
        for path in paths:
            if path not in instances and not os.path.basename(path).startswith(BESIDE_INSTANCES):
                note("list_unused", path)
        paths = instances
    words = "COCO files" if len(paths) > 1 else "COCO file"
    return {name: [Part("COCO", words, path, "")] for name, path in by_split(paths).items()}


def looks_like_coco(path):
    """Whether a file may be a COCO file, by its first bytes."""
    if not path.lower().endswith(".json") or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        start = file.read(100_000)
    return start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{") and (b'"images"' in start or b'"annotations"' in start)


def split_in_name(path):
    """The split that the name of a file or folder speaks of: "train" of instances_train2017.json; "" if of none."""
    for word in re.split("[^a-z]+", os.path.basename(path).lower()):
        if word in SPLIT_NAMES:
            return word
    return ""


def by_split(paths):
    """Files by the split that their names speak of, or by their names, if they speak of none, or of the same."""
    splits = [split_in_name(path) for path in paths]
    files = {}
    for path, split in zip(paths, splits, strict=True):
        is_clear = split and splits.count(split) == 1
        files[split if is_clear else os.path.splitext(os.path.basename(path))[0]] = path
    return files


def refuse_layout(source):
    """Raise the error for a folder that is not recognised: what was found, and what would be."""
    _, folders, files = next(os.walk(source))
    suffixes = Counter(os.path.splitext(name)[1] or "other" for name in sorted(files))
    found = [f"{n} {suffix} files" for suffix, n in suffixes.items()]
    found += [f"the folder {name}" for name in sorted(folders)]
    shown = printable(", ".join(found), 500) or "nothing"
    raise ValueError(f"{printable(source)}: its layout is not recognised. Found: {shown}. Can be read:\n{LAYOUTS}")


def find_yolo(folder, note, data_file="", data=None):
    """YOLO's text files and images: where a data.yaml, given or the folder's own, says, or in the usual folders."""
    if not data_file:
        data_file, data = find_data_yaml(folder)
    by_yaml = find_yaml_parts(data_file, data, note) if data else {}
    is_whole = "train" in by_yaml or not (data or {}).get("train")  # else its paths may be those of another machine
    find_inner = functools.partial(find_labels_folders, note=note)
    parts = (
        (is_whole and by_yaml)
        or find_labels_folders(folder, note)
        or find_darknet_folders(folder)
        or find_split_folders(folder, find_inner, note)
        or find_split_folders(folder, find_labels_beside, note)
        or find_labels_beside(folder)
        or by_yaml
    )
    return {name: [part._replace(data_file=data_file, data=data) for part in group] for name, group in parts.items()}


def find_labels_folders(folder, note):
    """Text files in a folder `labels`, images in a folder `images`, or in folders of the splits within these two."""
    images = find_child(folder, "images")
    if not has_files(images, SOUGHT_IMAGES):
        images = find_child(folder, "JPEGImages") or images
    labels = find_child(folder, "labels") or images
    parts = {}
    label_folders = split_folders(labels)
    for split, image_folder in split_folders(images).items():
        parts |= make_yolo_parts(split, label_folders.get(split, ""), image_folder)
    note_empty_splits(images, parts, note)
    return parts or make_yolo_parts("", labels, images)


def find_darknet_folders(folder):
    """Text files beside their images in obj_train_data and so on, as CVAT exports them."""
    parts = {}
    for path in list_folder(folder):
        name = os.path.basename(path).lower()
        if name.startswith("obj_") and name.endswith("_data"):
            parts |= make_yolo_parts(split_in_name(path), path, path)
    return parts


def find_labels_beside(folder):
    """Text files beside their images, or in a folder `labels` there; if nothing names classes, they may be captions, or
    left by another program, and are none."""
    places = [folder, os.path.dirname(folder)] if split_in_name(folder) else [folder]
    if not any(find_class_file(place) or find_data_yaml(place)[1] for place in places):
        return {}
    return make_yolo_parts("", find_child(folder, "labels") or folder, folder)


def find_labels_alone(folder, image_folder):
    """Text files in a folder `labels` or in folders of the splits, whose images are in another one, if it is given."""
    labels = find_child(folder, "labels") or folder
    data_file, data = find_data_yaml(folder)
    if labels == folder and not (data_file or find_class_file(folder)):
        return {}  # any text files
    parts = {}
    for split, path in (split_folders(labels) or {"": labels}).items():
        parts |= make_yolo_parts(split, find_child(path, "labels") or path, image_folder)
    changes = {"words": "YOLO text files, images elsewhere", "data_file": data_file, "data": data}
    return {name: [part._replace(**changes) for part in group] for name, group in parts.items()}


def make_yolo_parts(split, labels, images):
    """{split: [Part]} if there are label files and images in these folders, else {}."""
    texts = [os.path.basename(path).lower() for path in walk_files(labels, (".txt",))]
    if not any(is_label_name(name) for name in texts) or not has_files(images, SOUGHT_IMAGES):
        return {}
    words = "YOLO text files beside their images" if labels == images else "YOLO text files in labels, images in images"
    return {split: [Part("YOLO", words, labels, images)]}


def is_label_name(name):
    """Whether a text file may hold labels, by its name in small letters; exporters add READMEs."""
    return name not in CLASS_FILES and not name.startswith("readme")


def divide_by_lists(parts, folder, note):
    """The parts; or, if all images are in one, a part for each list of images that the folder has."""
    groups = list(parts.values())
    part = groups[0][0]
    if len(groups) == 1 and len(groups[0]) == 1 and part.form != "COCO" and not part.by_yaml:
        files = Files(part.annotations, (".xml",)) if part.form == "VOC" else Files(part.images, SOUGHT_IMAGES)
        words, lists = find_lists(folder, files, note)
        if lists:
            part = part._replace(words=f"{part.words}, {words}")
            return {name: [part._replace(image_list=path)] for name, path in lists.items()}
    used = {part.image_list for group in groups for part in group}  # by a data.yaml
    image_sets = find_child(folder, "ImageSets")
    unused = [os.path.join(image_sets, path) for path in walk_files(image_sets, (".txt",))] + lists_beside(folder)
    for path in unused:
        if path not in used:
            note("list_unused", path)
    return parts


def find_lists(folder, files, note):
    """Where a folder has lists of images, in words, and the lists by the names of their splits; {} if it has none.

    They are in ImageSets/Main, in ImageSets, or beside the images (train.txt). Those of the last two places may be
    another program's: they must name images at hand, and one be to train on.
    """
    image_sets = find_child(folder, "ImageSets")
    main = list_texts(find_child(image_sets, "Main"))
    main = [path for path in main if not is_class_list(read_lines(path), files)]
    if main:
        return "ImageSets/Main", {os.path.splitext(os.path.basename(path))[0]: path for path in main}
    for words, paths in (("ImageSets", list_texts(image_sets)), ("lists beside them", lists_beside(folder))):
        lists = [path for path in paths if names_images(path, files)]
        if any(split_in_name(path).startswith("train") for path in lists):
            for path in paths:
                if path not in lists:
                    note("list_unused", path)
            return words, by_split(lists)
    return "", {}


def lists_beside(folder):
    """The text files in a folder whose names speak of a split, unless they are the label files of images."""
    stems = {os.path.splitext(path)[0] for path in list_folder(folder) if path.lower().endswith(SOUGHT_IMAGES)}
    return [path for path in list_texts(folder) if split_in_name(path) and os.path.splitext(path)[0] not in stems]


def list_texts(folder):
    """The paths of the text files that lie in a folder."""
    return [path for path in list_folder(folder) if path.lower().endswith(".txt")]


def names_images(path, files):
    """Whether a text file is a list of images, and one of the first 100 is at hand."""
    try:
        lines = read_lines(path)
    except ValueError:
        return False
    return not is_class_list(lines, files) and any(files.guess(line) for line in lines[:100])


def is_class_list(lines, files):
    """Whether a list says of each image if it shows a class (cat_train.txt: `000012 -1`), and so is no split."""
    for line in lines[:20]:
        words = line.split()
        if len(words) < 2 or words[-1] not in ("-1", "0", "1") or files.same_stem(line):
            return False
    return bool(lines)


# --- 6. data.yaml ---------------------------------------------------------------------------------


def find_data_yaml(folder):
    """(path, content) of the YAML file that describes the data set in a folder; ("", None) if there is none."""
    paths = [path for path in list_folder(folder) if path.lower().endswith((".yaml", ".yml"))]
    paths.sort(key=lambda path: os.path.splitext(os.path.basename(path))[0] != "data")  # data.yaml first
    others = []
    for path in paths:
        is_data = os.path.splitext(os.path.basename(path))[0] == "data"
        try:
            content = read_yaml(path)
        except ValueError:
            # Another program's file does not matter, unless there is nothing else that names classes.
            if is_data or not find_class_file(folder):
                raise
            continue
        if is_data or (class_names_of(content) and content.keys() & {"train", "val", "path"}):
            return path, content
        if class_names_of(content):
            others.insert(0, (path, content))
        elif "nc" in content or {"train", "val"} <= content.keys():
            others.append((path, content))
    return others[0] if others else ("", None)


def read_yaml(path):
    """What a YAML file says: a dict, {} for anything else. All values are text, so that a class may be called no."""
    try:
        import yaml
    except ImportError:
        raise ValueError(f"{printable(path)}: to read YAML files, `pip install pyyaml`") from None
    text = read_text(path)
    check_utf8(text, path)
    try:
        content = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{printable(path)}: cannot be read as YAML ({printable(error)})") from None
    return content if isinstance(content, dict) else {}


def find_yaml_parts(path, data, note):
    """The parts that a data.yaml names as train, val and test; {} if it names none that is there."""
    parts = {}
    for name in SPLIT_NAMES:
        entries = data.get(name) or []
        entries = [entries] if isinstance(entries, str) else entries
        places = []
        for entry in entries if isinstance(entries, list) else []:
            place = find_yaml_place(str(entry), path, data)
            if place:
                places.append(place)
            else:
                note("yaml_path_missing", path, f"{name}: {printable(entry)}")
        if places:
            parts[name] = [make_yaml_part(place, path, data) for place in places]
    for name in SPLIT_NAMES[1:]:
        if parts.get("train") and parts.get(name) == parts["train"]:
            note("split_same", path, name)
            del parts[name]
    return parts


def find_yaml_place(entry, path, data):
    """The folder or list of images that an entry of a data.yaml names; "" if it is not there."""
    folder = os.path.dirname(os.path.abspath(path))
    root = data.get("path") or ""
    root = os.path.join(folder, os.path.expanduser(root)) if isinstance(root, str) else folder
    entry = entry.replace("\\", "/")
    inside = entry.removeprefix("../")  # Roboflow writes ../train/images and means train/images
    for place in (os.path.join(root, inside), os.path.join(folder, inside), os.path.join(root, entry)):
        if os.path.exists(place):
            return os.path.normpath(place)
    return ""


def make_yaml_part(place, path, data):
    """The part for a folder of images, or a text file with their paths, that a data.yaml names."""
    words = f"YOLO text files, images as {os.path.basename(path)} says"
    part = Part("YOLO", words, "", place, data_file=path, data=data, by_yaml=True)
    if os.path.isfile(place):
        return part._replace(images=os.path.dirname(os.path.abspath(path)), image_list=place)
    inner_images = find_child(place, "images")
    inner_labels = find_child(place, "labels")
    if inner_images and inner_labels:
        return part._replace(annotations=inner_labels, images=inner_images)
    return part._replace(annotations=labels_folder_of(place))


def labels_folder_of(folder):
    """Where the label files of images in a folder are: `labels` in place of the last `images` (or VOC's `JPEGImages`)
    of the path, if there is such a folder, else the folder itself."""
    inner = []  # the folders below `images`
    outer = folder
    while os.path.basename(outer):
        outer, name = os.path.split(outer)
        if name.lower() in ("images", "jpegimages"):
            labels = os.path.join(find_child(outer, "labels") or outer, *reversed(inner))
            return labels if find_child(outer, "labels") and os.path.isdir(labels) else folder
        inner.append(name)
    return folder


def name_classes(part, source, class_names):
    """The part, with the names of its classes by number, and what named them.

    The data set's own files come first: its data.yaml, then classes.txt and the like. The folder above counts only
    if the source is one of its splits: its data.yaml, if it names the source; its classes.txt, if it has all
    class_names. Then class_names are taken, and without any names the numbers.
    """
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    above = os.path.dirname(folder)
    if class_names_of(part.data or {}):
        return part._replace(class_names=class_names_of(part.data), classes_from=part.data_file)
    for place in (folder, part.annotations, os.path.dirname(part.annotations)):
        file = find_class_file(place)
        names = read_class_file(file) if file else {}
        if names:
            return part._replace(class_names=names, classes_from=file)
    data_file, data = find_data_yaml(above) if split_in_name(folder) else ("", None)
    if data and class_names_of(data) and speaks_of(data_file, data, folder):
        return part._replace(class_names=class_names_of(data), classes_from=data_file, data=data, data_file=data_file)
    file = find_class_file(above) if split_in_name(folder) else ""
    names = read_class_file(file) if file else {}
    ordered = list(names.values())
    if sorted(class_names) == sorted(ordered) and list(class_names) != ordered:
        hint = f"leave out --class_names, or put a classes.txt into {printable(folder)}"
        raise ValueError(f"{printable(file)} has the classes in another order than --class_names: {hint}")
    if names and set(class_names) <= set(ordered):
        return part._replace(class_names=names, classes_from=file)
    if class_names:
        return part._replace(class_names=dict(enumerate(class_names)), classes_from="--class_names")
    n_classes = str((part.data or {}).get("nc"))
    if n_classes.isdecimal() and len(n_classes) < 6 and int(n_classes) > 0:
        names = {i: str(i) for i in range(int(n_classes))}
        words = f"their numbers ({part.data_file} has nc and no names; --class_names gives them)"
        return part._replace(class_names=names, classes_from=words)
    hint = "a data.yaml or classes.txt says them, or --class_names"
    raise ValueError(f"{printable(source)}: the class names are missing: {hint}")


def speaks_of(data_file, data, folder):
    """Whether a data.yaml names images in a folder."""
    parts = [part for group in find_yaml_parts(data_file, data, lambda *_: None).values() for part in group]
    return any(os.path.join(part.images, "").startswith(os.path.join(folder, "")) for part in parts)


def class_names_of(data):
    """The class names in what a data.yaml says, by number; {} if it has no list, or numbered names."""
    names = data.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        return {}
    if not all(str(number).isdecimal() and len(str(number)) < 6 for number in names):
        return {}
    return {int(number): name.strip() for number, name in names.items() if name.strip()}


def find_class_file(folder):
    """The text file with class names in a folder; "" if there is none."""
    files = {os.path.basename(path).lower(): path for path in list_folder(folder) if os.path.isfile(path)}
    others = [name for name in files if name.endswith(".names")]
    names = [*CLASS_FILES, *(others if len(others) == 1 else [])]
    return next((files[name] for name in names if name in files), "")


def read_class_file(path):
    """The class names of a text file by the number of their line, from 0; blank lines count."""
    text = read_text(path)
    check_utf8(text, path)
    return {number: line for number, line in enumerate(split_lines(text)) if line}


# --- 7. Files -------------------------------------------------------------------------------------


def list_folder(folder):
    """The paths of what lies in a folder, sorted, without what is hidden (macOS's ._ files are); [] if it is none."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in names if not is_hidden(name)]


def is_hidden(name):
    """Whether files and folders of this name are not meant for readers."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def find_child(folder, name):
    """The path of a folder in a folder, its name in any case; "" if it has none."""
    paths = [path for path in list_folder(folder) if os.path.basename(path).lower() == name.lower()]
    paths.sort(key=lambda path: os.path.basename(path) != name)  # the one that is written so comes first
    return next(filter(os.path.isdir, paths), "")


def walk_files(folder, suffixes):
    """The files with one of these suffixes below a folder, as paths in it, one by one; without hidden ones."""
    visited = set()  # links may lead round in circles
    for path, folders, files in os.walk(folder, onerror=raise_unless_missing, followlinks=True):
        real_path = os.path.realpath(path)
        if real_path in visited:
            folders.clear()
            continue
        visited.add(real_path)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(files):
            if name.lower().endswith(suffixes) and not is_hidden(name):
                yield os.path.relpath(os.path.join(path, name), folder)


def raise_unless_missing(error):
    """Raise an error of os.walk(), which would leave the folder out without a word, unless there is no such folder."""
    if os.path.isdir(error.filename):
        raise error


def has_files(folder, suffixes):
    """Whether there is a file with one of these suffixes below a folder."""
    return next(walk_files(folder, suffixes), None) is not None


class Files:
    """The files with some suffixes below a folder, found by the names that other files give them.

    Paths are those in the folder. Names are compared in Unicode's composed form, which Macs do not use for files.
    """

    def __init__(self, folder, suffixes):
        self.folder = folder
        self.suffixes = suffixes

    @functools.cached_property
    def paths(self):
        """All of them, sorted."""
        return sorted(walk_files(self.folder, self.suffixes))

    @functools.cached_property
    def by_path(self):
        """The path by the path as others may write it."""
        return {tidy(path): path for path in self.paths}

    @functools.cached_property
    def by_stem(self):
        """Lists of the paths that differ in nothing but their suffix, in the order of the suffixes."""
        groups = {}
        for path in self.paths:
            groups.setdefault(tidy(os.path.splitext(path)[0]), []).append(path)
        for group in groups.values():
            group.sort(key=lambda path: self.suffixes.index(os.path.splitext(path)[1].lower()))
        return groups

    @functools.cached_property
    def by_name(self):
        """Lists of the paths whose last part is the same, with its suffix or without, in any case."""
        groups = {}
        for path in self.paths:
            name = tidy(os.path.basename(path)).casefold()
            groups.setdefault(name, []).append(path)
            groups.setdefault(os.path.splitext(name)[0], []).append(path)
        return groups

    def same_stem(self, stem):
        """The files of this path without suffix, in the order of their suffixes."""
        return self.by_stem.get(tidy(stem), [])

    def find(self, name):
        """The file of this path, with its suffix or without; None if there is none, or several."""
        if tidy(name) in self.by_path:
            return self.by_path[tidy(name)]
        paths = self.same_stem(name)
        return paths[0] if len(paths) == 1 else None

    def guess(self, name):
        """The file that a name from another machine means; None if there is none, or more than one.

        Tried are `\\` as `/`, percent signs decoded, other suffixes, and in other folders the last part of the path:
        of several such files the one whose folders agree best.
        """
        slashes = name.replace("\\", "/")
        decoded = unquote(slashes)
        behind_url = decoded.rpartition("?d=")[2]  # Label Studio: /data/local-files/?d=cam0%2Fa.jpg
        without_query = decoded.partition("?")[0]  # of a cloud's address: a.jpg?X-Amz-Date=...
        without_prefix = re.sub(r"(^|/)[0-9a-f]{8}-(?=[^/]*$)", r"\1", decoded)  # Label Studio: 1a2b3c4d-a.jpg
        with_blanks = decoded.replace("+", " ").strip()  # as forms on the Web send names
        spellings = [name, slashes, unquote(name), decoded, behind_url, without_query, without_prefix, with_blanks]
        for spelling in dict.fromkeys(spellings):
            found = self.find(spelling) or self.find(self.without_suffix(spelling)) or self.find_closest(spelling)
            if found:
                return found
        return None

    def without_suffix(self, name):
        """A name without its suffix, if that is an image's or one of those sought: names may have dots."""
        stem, suffix = os.path.splitext(name)
        return stem if suffix.lower() in (*SOUGHT_IMAGES, *self.suffixes) else name

    def find_closest(self, name):
        """The one file whose last part is that of a name, and whose folders agree with it for the most parts."""
        wanted = tidy(name).casefold().split("/")
        last = wanted[-1]
        candidates = self.by_name.get(last) or self.by_name.get(self.without_suffix(last), [])
        agreements = [count_common_folders(wanted, tidy(path).casefold().split("/")) for path in candidates]
        if not agreements or agreements.count(max(agreements)) > 1:
            return None
        return candidates[agreements.index(max(agreements))]


def find_image(name, folders, files):
    """The path of an image in one of these folders, or guessed among the Files: (path, "") or (path, expected path)."""
    expected = [os.path.normpath(os.path.join(folder, name)) for folder in folders]
    for path in expected:
        if os.path.isfile(path):
            return path, ""
    guess = files.guess(name)
    if guess:
        return os.path.join(files.folder, guess), expected[0]
    return expected[0], ""


def count_common_folders(parts, others):
    """How many folders two paths have in common, from the last one up. (Both are lists of names.)"""
    count = 0
    for part, other in zip(parts[-2::-1], others[-2::-1], strict=False):
        if part != other:
            break
        count += 1
    return count


def tidy(path):
    """A path as it is compared: composed letters, `/` between its parts, no `./` or `/` in front."""
    path = os.path.normpath(unicodedata.normalize("NFC", path)).replace(os.sep, "/")
    return path.lstrip("/")


# --- 8. Text --------------------------------------------------------------------------------------


def read_bytes(path, max_bytes=MAX_ANNOTATION_BYTES):
    """The bytes of a file with annotations, or of a list."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{printable(path)}: no such annotation")
    with open(path, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{printable(path)}: not an annotation: larger than {max_bytes:,} bytes")
    return content


def find_encoding(content):
    """The encoding that the first bytes of a text show; "" if they show none."""
    marks = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
    for mark, encoding in marks.items():
        if content.startswith(mark):
            return encoding
    if content[:1] and content[1:2] == b"\0":
        return "utf-16-le"
    return "utf-16-be" if content[:1] == b"\0" else ""


def read_text(path, max_bytes=MAX_ANNOTATION_BYTES):
    """A text file, in UTF-16 if its first bytes show it, else in UTF-8. Bytes that are no text are kept: names may
    have them."""
    content = read_bytes(path, max_bytes)
    encoding = find_encoding(content) or "utf-8"
    try:
        return content.decode(encoding, "surrogateescape").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(path)}: its encoding is not {encoding} ({printable(error)})") from None


def check_utf8(text, path):
    """Refuse a text of `read_text()` with bytes that were no text: names of classes would be wrong."""
    for number, line in enumerate(split_lines(text), start=1):
        if any("\ud800" <= letter <= "\udfff" for letter in line):
            raise ValueError(f"{printable(path)}: line {number}: its encoding is not UTF-8; save it as UTF-8")


def split_lines(text):
    """The lines of a text, without white space around them; lines may end as on Windows, or as on old Macs."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line.strip() for line in lines]


def read_lines(path):
    """The lines of a text file that are not blank: names, which cannot have zero bytes."""
    text = read_text(path, MAX_LIST_BYTES)
    if "\0" in text:
        raise ValueError(f"{printable(path)}: not a list of names: it has zero bytes")
    return [line for line in split_lines(text) if line]
