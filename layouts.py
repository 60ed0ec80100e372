"""Where the files of a data set are: its layout, recognised by looking, and files found by their names.

    parts = find_parts("path/to/my data", note)         {"train": [Part], "valid": [Part]}, or {"": [Part]}
    path = Files("images", IMAGE_SUFFIXES).find("cam0/000012")

    1. Layouts       Pascal VOC's, COCO's and YOLO's
    2. data.yaml     what YOLO's YAML files say of images and classes
    3. Files         found by the names that other files give them
    4. Text          in any encoding

What is found is read by annotations.py. Hidden files are ignored everywhere.
"""

import codecs
import functools
import os
import re
import unicodedata
from collections import Counter
from typing import NamedTuple
from urllib.parse import unquote

from utils import IMAGE_SUFFIXES, printable

LAYOUTS = """\
  a folder in Pascal VOC's layout: Annotations/*.xml, images in JPEGImages or images, perhaps lists in ImageSets/Main
  XML files beside their images (LabelImg)
  YOLO text files in labels, images in images, or both side by side; class names in data.yaml or classes.txt
  a data.yaml file, named itself, which says where its images are
  a COCO .json file, named itself or in its folder; --image_folder says where its images are
  _annotations.coco.json beside its images (Roboflow); COCO's own folder: annotations, train2017, val2017
  folders train, valid (or val) and test, each as above, or with YOLO images/train, labels/train and so on"""

VALIDATION_NAMES = ("val", "valid", "validation")
SPLIT_NAMES = ("train", *VALIDATION_NAMES, "test")
COCO_FILE = "_annotations.coco.json"  # what Roboflow calls it
CLASS_FILES = ("classes.txt", "obj.names", "_darknet.labels")  # text files with a class name on each line
# Images to look for. Pillow cannot read the last two, but an error has to name them.
SOUGHT_IMAGES = (*IMAGE_SUFFIXES, ".heic", ".heif")
MAX_ANNOTATION_BYTES = 10_000_000  # VOC's largest annotation has 14 kB


class Part(NamedTuple):
    """Where files of one split are."""

    form: str  # "VOC", "COCO" or "YOLO"
    words: str  # what it looks like
    annotations: str  # a folder, or a JSON file
    images: str  # a folder
    image_list: str = ""  # a text file with the names of the images; "": all images in the folder
    data_file: str = ""  # YOLO's data.yaml
    data: dict | None = None  # what it says
    class_names: dict | None = None  # YOLO's: number of a class to its name
    classes_from: str = ""  # what named them


# --- 1. Layouts -----------------------------------------------------------------------------------


def find_parts(source, note):
    """The parts of a data set: a dict of the names of its splits to lists of Part; {"": list} if it has none."""
    suffix = os.path.splitext(source)[1].lower()
    if os.path.isfile(source) and suffix == ".json":
        return {"": [Part("COCO", "COCO file", source, "")]}
    if os.path.isfile(source) and suffix in (".yaml", ".yml"):
        parts = find_yaml_parts(source, read_yaml(source), note)
        if not parts:
            raise ValueError(f"{printable(source)}: train, val and test name no images that are there")
    elif not os.path.isdir(source):
        raise FileNotFoundError(f"{printable(source)}: not a folder or a .json or .yaml file. Can be read:\n{LAYOUTS}")
    else:
        parts = find_folder_parts(source, note)
    if not parts:
        refuse_layout(source)
    if len(parts) == 1:  # one list, or folder, is of all images
        return {"": next(iter(parts.values()))}
    return parts


def find_folder_parts(folder, note):
    """The parts that lie in a folder, whatever its layout; {} if it has none that is known."""
    has_labels = find_child(folder, "labels") != ""  # then a COCO file beside it is a copy
    return (
        find_voc(folder)
        or (has_labels and find_yolo(folder, note))
        or find_coco(folder)
        or find_xml(folder)
        or find_split_folders(folder, find_voc)
        or find_split_folders(folder, find_coco)
        or find_split_folders(folder, find_xml)
        or find_yolo(folder, note)
        or find_nested_xml(folder)
    )


def find_split_folders(folder, find):
    """The parts that find() sees in the folders train, valid and so on, by the names of these."""
    parts = {}
    for split, path in split_folders(folder).items():
        found = find(path)
        if found:
            group = next(iter(found.values()))
            parts[split] = [part._replace(image_list="") for part in group]
    return parts


def split_folders(folder):
    """Folders named after a split, such as Train or val2017: a dict of the split's name to the path."""
    found = {}
    for path in list_folder(folder):
        name = os.path.basename(path).lower().rstrip("0123456789")
        if name in SPLIT_NAMES and os.path.isdir(path):
            found[name] = path
    return found


def find_voc(folder):
    """XML files in a folder Annotations, with lists of images for each split if there are any."""
    annotations = find_child(folder, "Annotations")
    if not has_files(annotations, (".xml",)):
        return {}
    images = find_image_folder(folder)
    words = f"XML files in {os.path.basename(annotations)}, images in {os.path.basename(images)}"
    part = Part("VOC", words, annotations, images)
    parts = {}
    for path in list_folder(os.path.join(folder, "ImageSets", "Main")):
        name, suffix = os.path.splitext(os.path.basename(path))
        if suffix.lower() == ".txt" and not is_class_list(path, annotations):
            parts[name] = [part._replace(words=f"{words}, ImageSets/Main", image_list=path)]
    return parts or {"": [part]}


def is_class_list(path, annotations):
    """Whether a list says of each image if it shows a class (cat_train.txt: `000012 -1`), and so is no split."""
    lines = read_lines(path)[:20]
    for line in lines:
        name, _, flag = line.rpartition(" ")
        if not name or flag not in ("-1", "0", "1") or os.path.isfile(os.path.join(annotations, f"{line}.xml")):
            return False
    return bool(lines)


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


def find_coco(folder):
    """COCO files in a folder or its folder annotations, by the splits in their names: instances_train2017.json."""
    own = os.path.join(folder, COCO_FILE)
    if os.path.isfile(own):
        return {"": [Part("COCO", "COCO files beside their images", own, folder)]}
    paths = list_folder(folder) + list_folder(find_child(folder, "annotations"))
    paths = [path for path in paths if looks_like_coco(path)]
    instances = [path for path in paths if os.path.basename(path).startswith("instances")]
    paths = instances or paths  # COCO also has captions and keypoints of the same images
    names = [split_in_name(path) for path in paths]
    parts = {}
    for path, name in zip(paths, names, strict=True):
        if not name or names.count(name) > 1:
            name = os.path.splitext(os.path.basename(path))[0]
        parts[name] = [Part("COCO", "COCO files" if len(paths) > 1 else "COCO file", path, "")]
    return parts


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


def refuse_layout(source):
    """Raise the error for a folder that is not recognised: what was found, and what would be."""
    _, folders, files = next(os.walk(source))
    suffixes = Counter(os.path.splitext(name)[1] or "other" for name in sorted(files))
    found = [f"{n} {suffix} files" for suffix, n in suffixes.items()]
    found += [f"the folder {name}" for name in sorted(folders)]
    shown = printable(", ".join(found), 500) or "nothing"
    raise ValueError(f"{printable(source)}: its layout is not recognised. Found: {shown}. Can be read:\n{LAYOUTS}")


def find_yolo(folder, note):
    """YOLO's text files and images: where data.yaml says, or in one of the usual folders."""
    data_file, data = find_data_yaml(folder)
    parts = find_yaml_parts(data_file, data, note) if data else {}
    parts = (
        parts
        or find_labels_folders(folder)
        or find_darknet_folders(folder)
        or find_split_folders(folder, find_labels_folders)
        or find_split_folders(folder, find_labels_beside)
        or find_labels_beside(folder)
    )
    return {name: [part._replace(data_file=data_file, data=data) for part in group] for name, group in parts.items()}


def find_labels_folders(folder):
    """Text files in a folder `labels`, images in a folder `images`, or in folders of the splits within these two."""
    images = find_child(folder, "images")
    labels = find_child(folder, "labels") or images
    parts = {}
    label_folders = split_folders(labels)
    for split, image_folder in split_folders(images).items():
        parts |= make_yolo_parts(split, label_folders.get(split, ""), image_folder)
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
    """Text files beside their images; if nothing names classes, they may be captions, and are none."""
    places = [folder, os.path.dirname(folder)] if split_in_name(folder) else [folder]
    if not any(find_class_file(place) or find_data_yaml(place)[1] for place in places):
        return {}
    return make_yolo_parts("", folder, folder)


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


# --- 2. data.yaml ---------------------------------------------------------------------------------


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
        if is_data or class_names_of(content):
            return path, content
        if "nc" in content or {"train", "val"} <= content.keys():
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
    part = Part("YOLO", words, "", place, data_file=path, data=data)
    if os.path.isfile(place):
        return part._replace(images=os.path.dirname(os.path.abspath(path)), image_list=place)
    inner_images = find_child(place, "images")
    inner_labels = find_child(place, "labels")
    if inner_images and inner_labels:
        return part._replace(annotations=inner_labels, images=inner_images)
    return part._replace(annotations=labels_folder_of(place))


def labels_folder_of(folder):
    """Where the label files of images in a folder are: `labels` in place of the last `images` of the path, if there
    is such a folder, else the folder itself."""
    inner = []  # the folders below `images`
    outer = folder
    while os.path.basename(outer):
        outer, name = os.path.split(outer)
        if name.lower() == "images":
            labels = os.path.join(find_child(outer, "labels") or outer, *reversed(inner))
            return labels if find_child(outer, "labels") and os.path.isdir(labels) else folder
        inner.append(name)
    return folder


def name_classes(part, source, class_names):
    """The part, with the names of its classes by number, and what named them.

    The data set's own files come first: its data.yaml, then classes.txt and the like. The folder above counts only
    if the source is one of its splits. Without names, class_names are taken, or the numbers.
    """
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    above = os.path.dirname(folder)
    if class_names_of(part.data or {}):
        return part._replace(class_names=class_names_of(part.data), classes_from=part.data_file)
    places = [folder, part.annotations, os.path.dirname(part.annotations)]
    places += [above] if split_in_name(folder) else []
    for place in places:
        file = find_class_file(place)
        names = read_class_file(file) if file else {}
        if names:
            return part._replace(class_names=names, classes_from=file)
    data_file, data = find_data_yaml(above) if split_in_name(folder) else ("", None)
    if data and class_names_of(data) and speaks_of(data_file, data, folder):
        return part._replace(class_names=class_names_of(data), classes_from=data_file)
    if class_names:
        return part._replace(class_names=dict(enumerate(class_names)), classes_from="--class_names")
    n_classes = str((part.data or {}).get("nc"))
    if n_classes.isdecimal() and len(n_classes) < 6:
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
    paths = [os.path.join(folder, name) for name in CLASS_FILES]
    return next(filter(os.path.isfile, paths), "")


def read_class_file(path):
    """The class names of a text file by the number of their line, from 0; blank lines count."""
    text = read_text(path)
    check_utf8(text, path)
    return {number: line for number, line in enumerate(split_lines(text)) if line}


# --- 3. Files -------------------------------------------------------------------------------------


def list_folder(folder):
    """The paths of what lies in a folder, sorted, without what is hidden (macOS's ._ files are); [] if it is none."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in names if not is_hidden(name)]


def is_hidden(name):
    """Whether files and folders of this name are not meant for readers."""
    return name.startswith(".") or name == "__MACOSX"


def find_child(folder, name):
    """The path of a folder in a folder, its name in any case; "" if it has none."""
    paths = [path for path in list_folder(folder) if os.path.basename(path).lower() == name.lower()]
    paths.sort(key=lambda path: os.path.basename(path) != name)  # the one that is written so comes first
    return next(filter(os.path.isdir, paths), "")


def walk_files(folder, suffixes):
    """The files with one of these suffixes below a folder, as paths in it, one by one; without hidden ones."""
    visited = set()  # links may lead round in circles
    for path, folders, files in os.walk(folder, followlinks=True):
        real_path = os.path.realpath(path)
        if real_path in visited:
            folders.clear()
            continue
        visited.add(real_path)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(files):
            if name.lower().endswith(suffixes) and not is_hidden(name):
                yield os.path.relpath(os.path.join(path, name), folder)


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
        for spelling in dict.fromkeys([name, slashes, unquote(name), decoded, behind_url]):
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


# --- 4. Text --------------------------------------------------------------------------------------


def read_bytes(path):
    """The bytes of a file with annotations."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{printable(path, 1000)}: no such annotation")
    with open(path, "rb") as file:
        content = file.read(MAX_ANNOTATION_BYTES + 1)
    if len(content) > MAX_ANNOTATION_BYTES:
        raise ValueError(f"{printable(path, 1000)}: not an annotation: larger than {MAX_ANNOTATION_BYTES:,} bytes")
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


def read_text(path):
    """A text file, in UTF-16 if its first bytes show it, else in UTF-8. Bytes that are no text are kept: names may
    have them."""
    content = read_bytes(path)
    encoding = find_encoding(content) or "utf-8"
    try:
        return content.decode(encoding, "surrogateescape").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(path, 1000)}: its encoding is not {encoding} ({printable(error)})") from None


def check_utf8(text, path):
    """Refuse a text of `read_text()` with bytes that were no text: names of classes would be wrong."""
    for number, line in enumerate(split_lines(text), start=1):
        if any("\ud800" <= letter <= "\udfff" for letter in line):
            raise ValueError(f"{printable(path, 1000)}: line {number}: its encoding is not UTF-8; save it as UTF-8")


def split_lines(text):
    """The lines of a text, without white space around them; lines may end as on Windows, or as on old Macs."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line.strip() for line in lines]


def read_lines(path):
    """The lines of a text file that are not blank: names, which cannot have zero bytes."""
    text = read_text(path)
    if "\0" in text:
        raise ValueError(f"{printable(path, 1000)}: not a list of names: it has zero bytes")
    return [line for line in split_lines(text) if line]
