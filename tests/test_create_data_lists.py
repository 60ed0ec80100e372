"""Labels, colours, annotations and data lists: sections 2 and 3 of utils.py, and create_data_lists.py."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image, ImageColor

import create_data_lists as script
import datasets
import utils
from annotations import parse_annotation
from create_data_lists import create_data_lists
from model import SSD300
from utils import class_colors, load_label_map, make_label_map, rev_label_map, voc_labels

# ----------------------------------------------------------------------------------------------
# Data to test on
# ----------------------------------------------------------------------------------------------


def object_xml(name="dog", box=(11, 21, 40, 60), difficult="<difficult>0</difficult>", extra=""):
    tags = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    corners = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    return f"<object><name>{name}</name>{difficult}<bndbox>{corners}</bndbox>{extra}</object>"


DIFFICULT = "<difficult>1</difficult>"


def annotation_xml(*objects, size=(100, 80)):
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def write_annotation(folder, *objects, size=(100, 80), name="a"):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.xml"
    path.write_text(annotation_xml(*objects, size=size), encoding="utf-8")
    return path


def write_image(path, size=(100, 80), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path, **options)
    return path


def write_splits(folder, **splits):
    main = folder / "ImageSets" / "Main"
    main.mkdir(parents=True, exist_ok=True)
    for split, names in splits.items():
        (main / f"{split}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def write_voc(folder, images, test=("t",)):
    """A folder in VOC layout: `images` maps a name to its objects; those in `test` are TEST."""
    images = {"t": [object_xml()], **images}
    for name, objects in images.items():
        write_annotation(folder / "Annotations", *objects, name=name)
        write_image(folder / "JPEGImages" / f"{name}.jpg")
    write_splits(folder, trainval=[name for name in images if name not in test], test=test)
    return folder


def make_lists(folder, output=None, **options):
    """Run create_data_lists() on one folder; returns the report and the contents of the files by name."""
    output = output or folder.parent / "lists"
    report = create_data_lists(train_data=folder, output_folder=output, **options)
    files = {path.name: json.loads(path.read_text()) for path in output.glob("*.json")}
    return report, files


def kinds(report):
    return {kind: len(notes) for kind, notes in report["notes"].items() if notes}


# ----------------------------------------------------------------------------------------------
# Labels and colours
# ----------------------------------------------------------------------------------------------


def test_label_map_numbers_classes_in_order():
    label_map = make_label_map(["cat", "ant"])
    assert label_map == {"background": 0, "cat": 1, "ant": 2}
    assert rev_label_map(label_map) == {0: "background", 1: "cat", 2: "ant"}
    assert len(make_label_map(voc_labels)) == 21 and make_label_map(voc_labels)["tvmonitor"] == 20


@pytest.mark.parametrize("names", [(), "dog", ["a", "a"], ["background"], ["a", " "], ["a", 3]])
def test_label_map_refuses_bad_names(names):
    with pytest.raises(ValueError):
        make_label_map(names)


def luminance(color):
    """Relative luminance of "#rrggbb" (WCAG 2.1)."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb > 0.03928, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92) @ (0.2126, 0.7152, 0.0722)


def test_colors_are_legible_apart_and_repeatable():
    label_map = make_label_map(voc_labels)
    colors = class_colors(label_map)
    assert list(colors) == list(voc_labels) and colors == class_colors(label_map)
    many = class_colors(make_label_map([f"c{i}" for i in range(1000)]))
    assert min(luminance(color) for color in many.values()) > 0.175  # contrast with black letters over 4.5
    rgb = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in colors.values()])
    distances = np.linalg.norm(rgb[:, None] - rgb[None], axis=2) + 1000 * np.eye(20)
    assert distances.min() > 50  # black and white are 442 apart


def test_color_of_a_class_does_not_depend_on_later_ones():
    few, many = make_label_map(["a", "b"]), make_label_map(["a", "b"] + [f"c{i}" for i in range(300)])
    assert class_colors(few) == {name: class_colors(many)[name] for name in ("a", "b")}
    assert len(set(class_colors(many).values())) == 302


def test_colors_for_one_class_and_for_thousands():
    assert len(class_colors(make_label_map(["a"]))) == 1
    assert len(class_colors(make_label_map([f"c{i}" for i in range(5000)]))) == 5000


def test_load_label_map(tmp_path):
    (tmp_path / "label_map.json").write_text('{"b": 2, "a": 1, "background": 0}')
    assert list(load_label_map(tmp_path).items()) == [("background", 0), ("a", 1), ("b", 2)]


def test_load_label_map_names_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"label_map\.json.*create_data_lists"):
        load_label_map(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "[" * 100_000, '{"a": 1}', '{"background": 1, "a": 0}', '{"background": 0}',
        '{"background": 0, "a": 2}', '{"background": 0, "a": "1"}', '{"background": 0, "a": 1.0}',
        '{"background": 0, "a": true}', '{"background": 0, "a": 1, "b": 1}', '{"background": 0, "a": []}',
    ],
)  # fmt: skip
def test_load_label_map_refuses_malformed_files(tmp_path, text):
    (tmp_path / "label_map.json").write_text(text)
    with pytest.raises(ValueError, match=r"label_map\.json"):
        load_label_map(tmp_path)


# ----------------------------------------------------------------------------------------------
# Parsing
# ----------------------------------------------------------------------------------------------


def test_parse_annotation_makes_boxes_continuous(tmp_path):
    objects = [
        object_xml("dog", (1, 1, 100, 80)),
        object_xml("cat", (11, 21, 40, 60), "<difficult>1</difficult>"),
    ]
    assert parse_annotation(write_annotation(tmp_path, *objects)) == {
        "boxes": [[0, 0, 100, 80], [10, 20, 40, 60]],
        "names": ["dog", "cat"],
        "difficulties": [0, 1],
        "width": 100,
        "height": 80,
        "difficult_missing": 0,
        "float_coordinates": 0,
    }


def test_parse_annotation_keeps_fractions_and_tolerates_white_space(tmp_path):
    dog = object_xml("\n  guide dog\t", (" 45.25\n", "2.0", "\t50 ", 60.5), "<difficult>\n 1 </difficult>")
    annotation = parse_annotation(write_annotation(tmp_path, dog, object_xml(difficult="<difficult/>")))
    assert annotation["boxes"] == [[44.25, 1, 50, 60.5], [10, 20, 40, 60]]
    assert annotation["names"] == ["guide dog", "dog"]
    assert annotation["difficulties"] == [1, 0]
    assert (annotation["float_coordinates"], annotation["difficult_missing"]) == (1, 1)


def test_parse_annotation_does_not_take_parts_for_objects(tmp_path):
    corners = "<xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax>"
    part = f"<part><name>head</name><bndbox>{corners}</bndbox></part>"
    person = f"<object><name>person</name>{part}<bndbox>{corners.replace('3', '90')}</bndbox></object>"
    annotation = parse_annotation(write_annotation(tmp_path, object_xml("person", extra=part), person))
    assert annotation["names"] == ["person", "person"]
    assert annotation["boxes"] == [[10, 20, 40, 60], [0, 1, 90, 4]]


@pytest.mark.parametrize(
    "size", ["", "<size/>", "<size><width>0</width><height>0</height></size>",
             "<size><width>640</width></size>", "<size><width>640</width><height> </height></size>",
             "<size><width>-5</width><height>7</height></size>",
             "<size><width>1e300</width><height>7</height></size>",
             "<size><width>nan</width><height>inf</height></size>"],
)  # fmt: skip
def test_parse_annotation_without_usable_size(tmp_path, size):
    path = tmp_path / "a.xml"
    path.write_text(f"<annotation>{size}{object_xml()}</annotation>")
    annotation = parse_annotation(path)
    assert annotation["width"] is None and annotation["height"] is None and len(annotation["boxes"]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unreadable XML"),
        ("<annotation>", "unreadable XML"),
        ("<annotation>&nbsp;</annotation>", "unreadable XML"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "unreadable XML"),
        ('<?xml version="1.0" encoding="gbk"?><annotation/>', "unreadable XML"),
        ("<html/>", "<html>"),
        (annotation_xml(object_xml(name=" ")), "object 1 has no <name>"),
        (annotation_xml("<object><name>dog</name></object>"), r"object 1 \(dog\) has no <bndbox>"),
        (annotation_xml(object_xml(), object_xml(box=("x1", 2, 3, 4))), r"object 2 \(dog\): <xmin> is 'x1'"),
        (annotation_xml(object_xml(box=(1, 2, "", 4))), "<xmax> is ''"),
        (annotation_xml(object_xml()).replace("ymax", "ymex"), "has no <ymax>"),
        (annotation_xml(object_xml(difficult="<difficult>maybe</difficult>")), "<difficult> is 'maybe'"),
        (annotation_xml(size=("wide", 5)), "<width> is 'wide'"),
    ],
)
def test_parse_annotation_names_file_and_fault(tmp_path, text, message):
    path = tmp_path / "photo 1.xml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"photo 1\.xml: .*{message}"):
        parse_annotation(path)


def test_parse_annotation_names_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.xml"):
        parse_annotation(tmp_path / "nowhere.xml")


BILLION_LAUGHS = (
    "<!DOCTYPE annotation [<!ENTITY a0 'ha'>"
    + "".join(f"<!ENTITY a{i} '{f'&a{i - 1};' * 10}'>" for i in range(1, 10))
    + "]><annotation><object><name>&a9;</name></object></annotation>"
)
READ_A_FILE = (
    "<!DOCTYPE annotation [<!ENTITY file SYSTEM 'file:///etc/passwd'>]>"
    "<annotation><object><name>&file;</name></object></annotation>"
)


@pytest.mark.parametrize("attack", [BILLION_LAUGHS, READ_A_FILE])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_entities_are_refused_in_every_encoding(tmp_path, attack, encoding):
    path = tmp_path / "attack.xml"
    path.write_bytes(attack.encode(encoding))
    with pytest.raises(ValueError, match=r"attack\.xml: (a document type|holds zero bytes)"):
        parse_annotation(path)


def test_large_annotation_is_refused_unread(tmp_path):
    path = tmp_path / "large.xml"
    with open(path, "wb") as file:
        file.truncate(10**12)  # a sparse file: a terabyte to read, nothing on the disk
    with pytest.raises(ValueError, match=r"large\.xml.*larger than"):
        parse_annotation(path)


def test_deeply_nested_annotation_is_harmless(tmp_path):
    path = tmp_path / "deep.xml"
    path.write_text("<annotation>" + "<a>" * 500_000 + "</a>" * 500_000 + "</annotation>")
    assert parse_annotation(path)["boxes"] == []


def mutate(data, rng):
    """A few random edits: bytes changed, removed, repeated, or replaced by what is likely to hurt."""
    data = bytearray(data)
    nasty = [b"&lt;", b"<!--", b"]]>", b"<object>", b"1e999", b"nan", b"\xff\xfe", b"\0", b"null", b'"', b"["]
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.randint(0, 12))
        choices = [b"", bytes(rng.randbytes(3)), bytes(data[start:end]) * 3, rng.choice(nasty)]
        data[start:end] = rng.choice(choices)
    return bytes(data)


def test_mutated_annotations_parse_or_are_refused_clearly(tmp_path):
    rng = random.Random(0)
    original = annotation_xml(object_xml(), object_xml("cat", (1.5, 2, 30, 40), "")).encode()
    path = tmp_path / "fuzz.xml"
    refused = 0
    for _ in range(1500):
        path.write_bytes(mutate(original, rng))
        try:
            annotation = parse_annotation(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(str(path))
        else:
            assert len(annotation["boxes"]) == len(annotation["names"]) == len(annotation["difficulties"])
    assert 500 < refused < 1500


# ----------------------------------------------------------------------------------------------
# Lists
# ----------------------------------------------------------------------------------------------


def test_lists_of_a_small_folder(tmp_path):
    folder = write_voc(
        tmp_path / "mine",
        {
            "a": [object_xml("dog", (1, 1, 100, 80)), object_xml("cat", difficult=DIFFICULT)],
            "empty": [],
        },
    )
    report, files = make_lists(folder)
    assert files["label_map.json"] == {"background": 0, "cat": 1, "dog": 2}
    photos = folder / "JPEGImages"
    assert files["TRAIN_images.json"] == [str(photos / "a.jpg"), str(photos / "empty.jpg")]
    assert files["TEST_images.json"] == [str(photos / "t.jpg")]
    assert files["TRAIN_objects.json"] == [
        {
            "boxes": [[0, 0, 100, 80], [10, 20, 40, 60]],
            "labels": [2, 1],
            "difficulties": [0, 1],
            "size": [100, 80],
        },
        {"boxes": [], "labels": [], "difficulties": [], "size": [100, 80]},
    ]
    assert report["splits"]["TRAIN"] == {
        "images": 2,
        "images_without_objects": 1,
        "objects": 2,
        "easy": 1,
        "difficult": 1,
        "classes": {"dog": {"easy": 1, "difficult": 0}, "cat": {"easy": 0, "difficult": 1}},
    }
    assert kinds(report) == {}


def test_faulty_boxes_are_dropped_or_clipped_with_their_file(tmp_path):
    boxes = {
        "box_no_area": [(20, 30, 20, 30), (20, 30, 20, 40), (40, 30, 20, 50), (20, 50, 30, 40)],
        "box_not_finite": [("nan", 1, 50, 50), (1, 1, "inf", 50), (1, "-1e999", 50, 50)],
        "box_outside": [(101, 1, 120, 50), (-50, 1, 0, 50), (1, 81, 50, 95), (1, -9e300, 50, -9e299)],
        "box_clipped": [(0, 1, 50, 50), (91, 71, 101, 90), (-9e300, 5, 9e300, 50)],
    }
    images = {kind: [object_xml(box=box) for box in rows] for kind, rows in boxes.items()}
    folder = write_voc(tmp_path / "mine", images)
    report, files = make_lists(folder)
    assert kinds(report) == {kind: len(rows) for kind, rows in boxes.items()}
    for kind in boxes:
        for note in report["notes"][kind]:
            assert note["file"] == str(folder / "Annotations" / f"{kind}.xml") and note["split"] == "TRAIN"
    kept = [row["boxes"] for row in files["TRAIN_objects.json"]]
    assert kept == [[], [], [], [[0, 0, 50, 50], [90, 70, 100, 80], [0, 4, 100, 50]]]
    assert report["notes"]["box_no_area"][0]["what"] == "dog [20, 30, 20, 30] in 100 x 80"


def test_smallest_boxes_that_are_kept_stay_boxes_in_float32(tmp_path):
    # Clipped to 100 x 80, the first is 0.2 pixels high, the second 0.02: a sliver, dropped.
    boxes = [(1, 80.8, 50, 95), (1, 80.98, 50, 95), (100, 80, 100.1, 80.1)]
    folder = write_voc(tmp_path / "mine", {"a": [object_xml(box=box) for box in boxes]})
    report, files = make_lists(folder)
    assert kinds(report) == {"box_outside": 1, "box_clipped": 2, "float_coordinates": 1}
    kept = np.float32(files["TRAIN_objects.json"][0]["boxes"]) / np.float32([100, 80, 100, 80])
    assert len(kept) == 2 and (kept[:, 2:] > kept[:, :2]).all()


def test_unknown_class_is_an_error_unless_skipped(tmp_path):
    objects = [object_xml("dog"), object_xml("unicorn"), object_xml("dog")]
    folder = write_voc(tmp_path / "mine", {"a": objects})
    with pytest.raises(ValueError, match=r"'unicorn': 1 objects, first in .*a\.xml"):
        make_lists(folder, class_names=("dog",))
    assert not (tmp_path / "lists").exists()
    report, files = make_lists(folder, class_names=("dog",), skip_unknown=True)
    assert kinds(report) == {"class_skipped": 1}
    assert files["TRAIN_objects.json"][0]["labels"] == [1, 1]
    assert len(files["TRAIN_objects.json"][0]["boxes"]) == 2


def test_given_class_names_decide_the_labels(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml("dog"), object_xml("cat")]})
    report, files = make_lists(folder, class_names=("zebra", "dog", "cat"))
    assert files["TRAIN_objects.json"][0]["labels"] == [2, 3]
    assert report["notes"]["class_not_trained"] == [{"split": "TRAIN", "file": "", "what": "zebra"}]


def test_a_class_called_background_is_refused_with_its_file(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml("background")]})
    with pytest.raises(ValueError, match=r"'background': 1 objects, first in .*a\.xml"):
        make_lists(folder)


def test_voc_folders_take_vocs_classes_and_splits(tmp_path):
    voc07 = write_voc(tmp_path / "VOC2007", {"a": [object_xml("cat")]})
    voc12 = write_voc(tmp_path / "VOC2012", {"b": [object_xml("tvmonitor")]})
    create_data_lists(voc07, voc12, tmp_path)
    assert load_label_map(tmp_path) == make_label_map(voc_labels)
    images = json.loads((tmp_path / "TRAIN_images.json").read_text())
    assert images == [str(voc07 / "JPEGImages" / "a.jpg"), str(voc12 / "JPEGImages" / "b.jpg")]
    assert json.loads((tmp_path / "TRAIN_objects.json").read_text())[1]["labels"] == [20]
    assert json.loads((tmp_path / "TEST_images.json").read_text()) == [str(voc07 / "JPEGImages" / "t.jpg")]


def test_other_split_names_and_another_test_folder(tmp_path):
    write_voc(tmp_path / "one", {"a": [object_xml()], "b": [object_xml()]})
    write_splits(tmp_path / "one", mine=["b"])
    write_voc(tmp_path / "two", {"c": [object_xml()]})
    write_splits(tmp_path / "two", held_out=["c", "t"])
    options = {"test_data": tmp_path / "two", "train_split": "mine", "test_split": "held_out"}
    _, files = make_lists(tmp_path / "one", **options)
    assert [os.path.basename(path) for path in files["TRAIN_images.json"]] == ["b.jpg"]
    assert [os.path.basename(path) for path in files["TEST_images.json"]] == ["c.jpg", "t.jpg"]


def test_several_train_folders(tmp_path):
    folders = [write_voc(tmp_path / name, {name: [object_xml()]}) for name in ("one", "two")]
    report = create_data_lists(train_data=folders, test_data=folders[1], output_folder=tmp_path / "lists")
    assert [report["splits"][split]["images"] for split in ("TRAIN", "TEST")] == [2, 1]


def test_missing_split_file_names_those_that_exist(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()]})
    with pytest.raises(FileNotFoundError, match=r"val\.txt: no such split file.*test\.txt, trainval\.txt"):
        make_lists(folder, test_split="val")


def test_split_without_images_is_an_error(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()]})
    write_splits(folder, empty=[])
    with pytest.raises(ValueError, match=r"mine: split 'empty' has no images"):
        make_lists(folder, test_split="empty")


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.Annotations: no such folder"):
        make_lists(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="No data"):
        create_data_lists(output_folder=tmp_path)


def test_every_bad_annotation_is_listed(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()], "b": [object_xml()], "c": [object_xml()]})
    (folder / "Annotations" / "a.xml").write_text("<annotation>")
    (folder / "Annotations" / "c.xml").unlink()
    with pytest.raises(ValueError, match=r"(?s)2 annotations cannot.*a\.xml: unreadable.*c\.xml: no such"):
        make_lists(folder)


def test_every_bad_image_is_listed_unless_images_are_not_checked(tmp_path):
    folder = write_voc(tmp_path / "mine", {name: [object_xml()] for name in "abcde"})
    photos = folder / "JPEGImages"
    (photos / "a.jpg").unlink()
    (photos / "b.jpg").write_bytes(b"no image")
    (photos / "c.jpg").write_bytes((photos / "t.jpg").read_bytes()[:2000])  # ends in the middle
    (photos / "e.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ValueError, match="4 images cannot be used") as error:
        make_lists(folder)
    lines = str(error.value).split("\n  ")[1:]
    assert [line.split(": ")[0] for line in lines] == [str(photos / f"{name}.jpg") for name in "abce"]
    report, _ = make_lists(folder, check_images=False)
    assert report["splits"]["TRAIN"]["images"] == 5


def test_decompression_bomb_is_refused_with_its_name(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()]})
    bomb = b"P6 1000000 1000000 255\n"
    (folder / "JPEGImages" / "a.jpg").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"a\.jpg: .*1000000"):
        make_lists(folder)


@pytest.mark.parametrize("extension", [".jpeg", ".png", ".PNG", ".JPG", ".bmp", ".webp"])
def test_image_is_found_by_the_annotations_stem(tmp_path, extension):
    folder = write_voc(tmp_path / "mine", {"a.b": [object_xml()]})
    (folder / "JPEGImages" / "a.b.jpg").unlink()
    path = write_image(folder / "JPEGImages" / f"a.b{extension}")
    _, files = make_lists(folder)
    assert files["TRAIN_images.json"] == [str(path)]


def test_photo_with_a_second_picture_inside_is_read(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()]})
    options = {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (8, 8))]}
    write_image(folder / "JPEGImages" / "a.jpg", **options)  # phones write such files
    report, files = make_lists(folder)
    assert kinds(report) == {} and files["TRAIN_objects.json"][0]["size"] == [100, 80]


@pytest.mark.parametrize("name", ["my photo 1", "Zürich 日本 🐕", "a'b\"c&d", "x.xml"])
def test_names_with_spaces_and_unicode(tmp_path, name):
    folder = write_voc(tmp_path / "my data", {name: [object_xml()]})
    _, files = make_lists(folder)
    assert files["TRAIN_images.json"] == [str(folder / "JPEGImages" / f"{name}.jpg")]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_name_that_is_no_text(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml(box=(1, 1, 500, 50))]})
    for old in ("Annotations/a.xml", "JPEGImages/a.jpg"):
        os.rename(folder / old, os.fsencode(folder / old.replace("/a", "/\udcff")))
    (folder / "ImageSets" / "Main" / "trainval.txt").write_bytes(b"\xff\n")
    _, files = make_lists(folder)
    assert os.path.isfile(files["TRAIN_images.json"][0])
    assert r"\udcff.xml" in (tmp_path / "lists" / "data_report.txt").read_text()


def test_split_file_from_windows(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()]})
    (folder / "ImageSets" / "Main" / "trainval.txt").write_bytes(b"\xef\xbb\xbfa \r\n\r\n")
    _, files = make_lists(folder)
    assert [os.path.basename(path) for path in files["TRAIN_images.json"]] == ["a.jpg"]


def test_symlink_loops_are_missing_files(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()], "b": [object_xml()]})
    image = folder / "JPEGImages" / "a.jpg"
    image.unlink()
    image.symlink_to("a.jpg")
    (folder / "JPEGImages" / "loop").symlink_to(".")
    with pytest.raises(ValueError, match=r"1 image cannot be used:\s+.*a\.jpg: no such image"):
        make_lists(folder)
    annotation = folder / "Annotations" / "b.xml"
    annotation.unlink()
    annotation.symlink_to("b.xml")
    with pytest.raises(ValueError, match=r"b\.xml: no such annotation"):
        make_lists(folder)


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()]})
    monkeypatch.chdir(tmp_path)
    create_data_lists(train_data="mine", output_folder="lists")
    images = json.loads((tmp_path / "lists" / "TRAIN_images.json").read_text())
    assert images == [str(folder / "JPEGImages" / "a.jpg")]


def test_image_in_both_splits_is_reported_also_under_another_name(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()], "b": [object_xml()]}, test=("t", "a"))
    (folder / "JPEGImages" / "b.jpg").unlink()
    (folder / "JPEGImages" / "b.jpg").symlink_to("a.jpg")
    report, files = make_lists(folder)
    assert kinds(report) == {"image_in_both": 1}
    assert report["notes"]["image_in_both"][0]["file"] == str(folder / "Annotations" / "a.xml")
    assert len(files["TRAIN_images.json"]) == 1 and len(files["TEST_images.json"]) == 2


def test_image_listed_twice_is_kept_once(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()], "b": [object_xml()]})
    write_splits(folder, trainval=["a", "b", "a"])
    report, files = make_lists(folder)
    assert kinds(report) == {"image_repeated": 1} and len(files["TRAIN_images.json"]) == 2


def test_mended_fields_are_counted_by_file(tmp_path):
    folder = write_voc(
        tmp_path / "mine",
        {"a": [object_xml(difficult=""), object_xml(difficult=""), object_xml(box=(1.5, 2, 30, 40))]},
    )
    report, _ = make_lists(folder)
    assert kinds(report) == {"difficult_missing": 1, "float_coordinates": 1}
    assert report["notes"]["difficult_missing"][0]["what"] == "2 objects"
    assert report["notes"]["float_coordinates"][0]["what"] == "1 object"


@pytest.mark.parametrize("check_images", [True, False])
def test_missing_size_comes_from_the_image(tmp_path, check_images):
    folder = write_voc(tmp_path / "mine", {"a": []})
    write_annotation(folder / "Annotations", object_xml(box=(1, 1, 200, 50)), size=(0, 0))
    report, files = make_lists(folder, check_images=check_images)
    assert kinds(report) == {"size_missing": 1, "box_clipped": 1}
    assert files["TRAIN_objects.json"][0]["size"] == [100, 80]
    assert files["TRAIN_objects.json"][0]["boxes"] == [[0, 0, 100, 50]]


def test_wrong_size_is_reported_and_the_images_taken(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": []})
    write_annotation(folder / "Annotations", object_xml(box=(1, 1, 200, 50)), size=(640, 480))
    report, files = make_lists(folder)
    assert kinds(report) == {"size_differs": 1, "box_clipped": 1}
    assert report["notes"]["size_differs"][0]["what"] == "annotation 640 x 480, image 100 x 80"
    assert files["TRAIN_objects.json"][0]["size"] == [100, 80]


# How an EXIF orientation's image is stored, given the image as shown.
STORE = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORE)
def test_boxes_follow_the_pixels_when_exif_rotates_the_image(tmp_path, orientation):
    folder = write_voc(tmp_path / "mine", {"a": []})
    shown = Image.new("RGB", (100, 80))
    shown.paste("white", (10, 20, 40, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = folder / "JPEGImages" / "a.jpg"
    shown.transpose(STORE[orientation]).save(image, quality=100, exif=exif)

    write_annotation(folder / "Annotations", object_xml(box=(11, 21, 40, 60)), size=(100, 80))
    report, files = make_lists(folder)
    assert kinds(report) == {"boxes_turned": 1}
    entry = files["TRAIN_objects.json"][0]
    pixels = datasets.read_image(image)
    assert entry["size"] == [80, 100] == [pixels.shape[2], pixels.shape[1]]
    bright = np.argwhere(pixels[0].numpy() > 127)
    (y_min, x_min), (y_max, x_max) = bright.min(0), bright.max(0) + 1
    assert entry["boxes"] == [[x_min, y_min, x_max, y_max]]

    write_annotation(folder / "Annotations", object_xml(box=(1, 2, 30, 40)), size=(80, 100))
    report, files = make_lists(folder)
    assert kinds(report) == {} and files["TRAIN_objects.json"][0]["boxes"] == [[0, 1, 30, 40]]


def test_exif_mirroring_that_no_size_can_settle_is_reported(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()]})
    exif = Image.Exif()
    exif[0x0112] = 3
    write_image(folder / "JPEGImages" / "a.jpg", exif=exif)
    report, files = make_lists(folder)
    assert kinds(report) == {"exif_unclear": 1}
    assert files["TRAIN_objects.json"][0]["boxes"] == [[10, 20, 40, 60]]


def test_nothing_to_learn_from_is_an_error(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": []})
    with pytest.raises(ValueError, match="nothing to learn"):
        make_lists(folder)
    write_annotation(folder / "Annotations", name="t")
    with pytest.raises(ValueError, match="nothing to learn"):
        make_lists(folder)


def test_full_disk_leaves_the_old_lists_whole(tmp_path, monkeypatch):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()]})
    make_lists(folder)
    before = {path.name: path.read_bytes() for path in (tmp_path / "lists").iterdir()}
    write_voc(folder, {"a": [object_xml("cat")], "b": [object_xml()]})
    calls = []

    def fail_at_third(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail_at_third)
    with pytest.raises(OSError, match=r"lists: could not write the data lists: .*No space"):
        make_lists(folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "lists").iterdir()} == before


def test_report_is_printed_and_kept_in_full(tmp_path, capsys):
    objects = [object_xml(difficult="")]
    folder = write_voc(tmp_path / "mine", {f"a{i}": objects for i in range(25)})
    make_lists(folder)
    printed = capsys.readouterr().out
    assert "TRAIN: 25 images (0 without objects), 25 objects (25 easy, 0 difficult)" in printed
    assert "Objects without <difficult>: taken as 0, not difficult (25)" in printed
    assert "a9.xml 1 object" in printed and "a24.xml" not in printed and "... and 15 more" in printed
    assert "a24.xml" in (tmp_path / "lists" / "data_report.txt").read_text()


# ----------------------------------------------------------------------------------------------
# Splits by chance, COCO-style JSON
# ----------------------------------------------------------------------------------------------


def test_folder_without_splits_is_divided_by_the_seed(tmp_path):
    folder = write_voc(tmp_path / "mine", {f"{i:02}": [object_xml()] for i in range(19)})
    for path in (folder / "ImageSets" / "Main").iterdir():
        path.unlink()
    tests = {}
    for seed in (0, 0, 1):
        report, files = make_lists(folder, test_fraction=0.25, seed=seed)
        assert kinds(report) == {"split_made": 1}
        assert len(files["TRAIN_images.json"]) == 15 and len(files["TEST_images.json"]) == 5
        assert not set(files["TRAIN_images.json"]) & set(files["TEST_images.json"])
        assert files["TEST_images.json"] == tests.setdefault(seed, files["TEST_images.json"])
    assert tests[0] != tests[1]
    with pytest.raises(ValueError, match=r"test_fraction 0\.01 of 20 images"):
        make_lists(folder, test_fraction=0.01)


def coco(**changes):
    content = {
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 100, "height": 80},
            {"id": 9, "file_name": "sub/b.jpg"},
        ],
        "categories": [{"id": 44, "name": "fork"}, {"id": 3, "name": "cup"}],
        "annotations": [
            {"image_id": 7, "category_id": 44, "bbox": [0, 0, 100, 80]},
            {"image_id": 7, "category_id": 3, "bbox": [10.5, 20, 30, 40], "iscrowd": 1},
            {"image_id": 7, "category_id": 3, "bbox": [10, 20, 0, 40]},
            {"image_id": 7, "category_id": 3, "bbox": [50, 20, 1, 1]},
            {"image_id": 9, "category_id": 3, "bbox": [90, 70, 20, 20], "iscrowd": 0},
        ],
    }
    return {**content, **changes}


def write_coco(folder, content, images="images", name="all.json"):
    write_image(folder / images / "a.jpg")
    write_image(folder / images / "sub" / "b.jpg")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content) if not isinstance(content, str) else content)
    return path


def test_coco_json(tmp_path):
    train = write_coco(tmp_path, coco())
    test = write_coco(tmp_path, coco(), name="test.json")
    report, files = make_lists(train, tmp_path / "lists", test_data=test)
    assert files["label_map.json"] == {"background": 0, "cup": 1, "fork": 2}
    assert files["TRAIN_images.json"] == [str(tmp_path / "images" / name) for name in ("a.jpg", "sub/b.jpg")]
    assert files["TRAIN_objects.json"] == [
        {
            "boxes": [[0, 0, 100, 80], [10.5, 20, 40.5, 60], [50, 20, 51, 21]],
            "labels": [2, 1, 1],
            "difficulties": [0, 1, 0],
            "size": [100, 80],
        },
        {"boxes": [[90, 70, 100, 80]], "labels": [1], "difficulties": [0], "size": [100, 80]},
    ]
    expected = {"box_no_area": 2, "box_clipped": 2, "size_missing": 2, "image_in_both": 2}
    assert kinds(report) == expected


def test_coco_json_alone_is_divided(tmp_path):
    report, files = make_lists(write_coco(tmp_path, coco()), tmp_path / "lists", test_fraction=0.5, seed=1)
    assert len(files["TRAIN_images.json"]) == len(files["TEST_images.json"]) == 1
    assert report["notes"]["split_made"][0]["what"] == "1 images for TRAIN, 1 for TEST (seed 1)"


@pytest.mark.parametrize("images", [".", "images", "val2017", "elsewhere"])
def test_coco_images_are_found(tmp_path, images):
    path = write_coco(tmp_path, coco(), images, "annotations/instances_val2017.json")
    if images in (".", "images"):
        path = path.rename(tmp_path / "instances_val2017.json")
    options = {"image_folder": str(tmp_path / images)} if images == "elsewhere" else {}
    options.update(test_fraction=0.5, seed=1)
    _, files = make_lists(path, tmp_path / "lists", **options)
    assert all(os.path.isfile(image) for image in files["TRAIN_images.json"])


BOX = {"image_id": 7, "category_id": 44}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "unreadable JSON"),
        ("[" * 100_000, "unreadable JSON"),
        ([], "no list of 'categories'"),
        (coco(images={}), "no list of 'images'"),
        (coco(annotations=[3]), "no list of 'annotations'"),
        (coco(images=[]), r"annotations\[0\]: image_id 7 is not in the file"),
        (coco(images=[], annotations=[]), "has no images"),
        (coco(images=[{"id": 7}]), r"images\[0\]: 'file_name' is missing"),
        (coco(images=[{"id": 7, "file_name": "a\0"}]), r"images\[0\]: 'file_name' is"),
        (coco(images=coco()["images"] * 2), r"images\[2\]: 'id' 7 is given twice"),
        (coco(categories=[{"id": [], "name": "cup"}]), r"categories\[0\]: 'id' is \[\]"),
        (coco(categories=[]), r"annotations\[0\]: category_id 44 is not in the file"),
        (coco(annotations=[{**BOX, "image_id": 8}]), r"annotations\[0\]: image_id 8 is not in the file"),
        (coco(annotations=[BOX]), r"annotations\[0\]: 'bbox' is missing"),
        (coco(annotations=[{**BOX, "bbox": [1, 2, 3]}]), r"'bbox' is \[1, 2, 3\], not four numbers"),
        (coco(annotations=[{**BOX, "bbox": [1, 2, 3, "4"]}]), "not four numbers"),
        (coco(categories=coco()["categories"] * 2), r"categories\[2\]: 'id' 44 is given twice"),
        (coco(images=[{"id": 7, "file_name": "a.jpg", "width": "wide"}]), r"images\[0\]: 'width' is 'wide'"),
        (coco(annotations=[{**BOX, "bbox": [1, 2, 3, 4], "iscrowd": "no"}]), r"annotations\[0\]: 'iscrowd' is 'no'"),
    ],
)
def test_coco_names_file_and_field(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"all\.json: .*{message}"):
        make_lists(write_coco(tmp_path, content), tmp_path / "lists")


def test_coco_numbers_that_are_not_finite_are_dropped(tmp_path):
    bad = ["[NaN, 1, 2, 3]", "[1, 1e999, 2, 3]", f"[1, 1, {'9' * 400}, 3]", "[1e308, 1, 1e308, 3]"]
    rows = [f'{{"image_id": 7, "category_id": 44, "bbox": {box}}}' for box in [*bad, "[1, 1, 9, 9]"]]
    content = json.dumps(coco(annotations=["HERE"])).replace('"HERE"', ", ".join(rows))
    train = write_coco(tmp_path, content)
    test = write_coco(tmp_path, coco(), name="test.json")
    report, files = make_lists(train, tmp_path / "lists", test_data=test)
    assert kinds(report)["box_not_finite"] == 4
    assert files["TRAIN_objects.json"][0]["boxes"] == [[1, 1, 10, 10]]


def test_mutated_coco_files_are_read_or_refused_clearly(tmp_path, capsys):
    rng = random.Random(0)
    path = write_coco(tmp_path, coco())
    original = path.read_bytes()
    refused = 0
    for _ in range(400):
        path.write_bytes(mutate(original, rng))
        try:
            create_data_lists(train_data=path, output_folder=tmp_path / "lists", test_fraction=0.5)
        except ValueError as error:
            refused += 1
            assert str(tmp_path) in str(error) or "nothing to learn" in str(error)
    assert 100 < refused < 400


# ----------------------------------------------------------------------------------------------
# Real data
# ----------------------------------------------------------------------------------------------


def test_voc_counts(real_data, tmp_path):
    with tempfile.TemporaryDirectory() as folder:  # pytest would keep the 27,088 files
        with tarfile.open(real_data / "voc_annotations.tar.xz") as archive:
            archive.extractall(folder)
        voc07, voc12 = (os.path.join(folder, "VOCdevkit", year) for year in ("VOC2007", "VOC2012"))
        report = create_data_lists(voc07, voc12, tmp_path / "lists", check_images=False)
    train, test = report["splits"]["TRAIN"], report["splits"]["TEST"]
    assert [train[key] for key in ("images", "objects", "easy")] == [16_551, 47_223, 40_058]
    assert [test[key] for key in ("images", "objects", "easy")] == [4_952, 14_976, 12_032]
    assert report["label_map"] == make_label_map(voc_labels) and kinds(report) == {}
    objects = json.loads((tmp_path / "lists" / "TRAIN_objects.json").read_text())
    assert len(objects) == 16_551 and sum(len(row["labels"]) for row in objects) == 47_223


def test_bccd(real_data, tmp_path):
    report, files = make_lists(real_data / "bccd", tmp_path / "lists")
    assert len(files["TRAIN_images.json"]) == 292 and len(files["TEST_images.json"]) == 72
    assert files["label_map.json"] == {"background": 0, "Platelets": 1, "RBC": 2, "WBC": 3}
    assert kinds(report) == {"box_no_area": 2}
    dropped = [os.path.basename(note["file"]) for note in report["notes"]["box_no_area"]]
    assert sorted(dropped) == ["BloodImage_00338.xml", "BloodImage_00343.xml"]


def test_indoor(real_data, tmp_path):
    report, files = make_lists(real_data / "indoor", tmp_path / "lists")
    assert len(files["label_map.json"]) == 31
    assert len(files["TRAIN_images.json"]) == 63 and len(files["TEST_images.json"]) == 22
    assert sum(report["splits"][split]["objects"] for split in ("TRAIN", "TEST")) == 686
    assert kinds(report) == {"box_clipped": 5, "difficult_missing": 85}
    clipped = [os.path.basename(note["file"]) for note in report["notes"]["box_clipped"]]
    assert sorted(clipped) == ["000005.xml"] * 2 + ["000017.xml"] * 2 + ["000018.xml"]


def test_voc_photos_are_in_both_splits(real_data, tmp_path):
    photos = real_data / "voc_photos"
    report = create_data_lists(photos / "VOC2007", photos / "VOC2012", tmp_path)
    assert [report["splits"][split]["images"] for split in ("TRAIN", "TEST")] == [20, 16]
    assert kinds(report) == {"image_in_both": 16, "class_not_trained": 6}


# ----------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------


def test_script_on_data_of_ones_own_from_any_working_directory(tmp_path):
    write_voc(tmp_path / "my data", {"a": [object_xml("dog")], "b": [object_xml("cat")]})
    command = [sys.executable, str(REPO / "create_data_lists.py"), "--train_data=my data"]
    command += ["--output_folder=out put", "--class_names=('dog', 'cat')"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "TRAIN: 2 images" in result.stdout
    assert load_label_map(tmp_path / "out put") == {"background": 0, "dog": 1, "cat": 2}


def test_script_says_what_to_do_without_voc(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        script.main()
    for words in ("VOC2007: no such folder", "--download=True", "--voc07_path", "--train_data"):
        assert words in str(stop.value)
    assert not list(tmp_path.iterdir())


def test_script_turns_bad_data_into_a_message(tmp_path, monkeypatch):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()]})
    (folder / "Annotations" / "a.xml").write_text("<annotation>")
    monkeypatch.setattr(script, "train_data", str(folder))
    monkeypatch.setattr(script, "output_folder", str(tmp_path / "lists"))
    with pytest.raises(SystemExit, match=r"error: (.|\n)*a\.xml: unreadable XML"):
        script.main()


def test_script_downloads_what_is_missing_only(tmp_path, monkeypatch):
    voc07 = write_voc(tmp_path / "VOCdevkit" / "VOC2007", {"a": [object_xml()]})
    (voc07 / "JPEGImages" / "t.jpg").unlink()  # as after an unpacking that was cut off
    monkeypatch.setattr(script, "voc07_path", str(voc07))
    monkeypatch.setattr(script, "voc12_path", str(tmp_path / "VOCdevkit" / "VOC2012"))
    fetched = []

    def fetch(root, year, image_set, download):
        fetched.append((os.path.realpath(root), year, image_set, download))

    monkeypatch.setattr(script, "VOCDetection", fetch)
    script.download_voc()
    root = os.path.realpath(tmp_path)
    assert fetched == [(root, "2007", "test", True), (root, "2012", "trainval", True)]

    def fail(*arguments, **options):
        raise RuntimeError("no network")

    monkeypatch.setattr(script, "VOCDetection", fail)
    with pytest.raises(SystemExit, match="could not download VOC2007 test: no network"):
        script.download_voc()
    monkeypatch.setattr(script, "voc07_path", str(tmp_path / "voc"))
    with pytest.raises(SystemExit, match=r"must end in VOCdevkit.VOC2007"):
        script.download_voc()


# ----------------------------------------------------------------------------------------------
# A look at the data: the table of overlaps, the contact sheet
# ----------------------------------------------------------------------------------------------


def test_the_table_of_overlaps_counts_by_class_and_size(monkeypatch):
    monkeypatch.setattr(script, "report_overlap", 0.5)
    prior = torch.tensor([[0.5, 0.5, 0.2, 0.2]])  # 40 to 60 pixels of a 100 x 200 image across, 80 to 120 down
    objects = [
        {"boxes": [[40, 80, 60, 120], [40, 80, 60, 99], [0, 0, 4, 8]], "labels": [1, 1, 2], "size": [100, 200]},
        {"boxes": [], "labels": [], "size": [50, 50]},
        {"boxes": [[0, 0, 50, 50]], "labels": [2], "size": [50, 50]},
    ]
    table = script.overlap_table({"background": 0, "cat": 1, "dog": 2}, objects, prior)
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[2:]}
    assert rows["0-16"] == ["16-32", "32-64", "64-128", "128-300", "all"]
    # Sides: 60 (the prior itself), 60 * sqrt(19 / 40) = 41 (overlap 19 / 40), 12 and 300 (overlap 0.04).
    assert rows["cat"] == ["-", "-", "2", "50%", "-", "-", "2", "50%"]
    assert rows["dog"] == ["1", "0%", "-", "-", "-", "1", "0%", "2", "0%"]
    assert rows["all"] == ["1", "0%", "-", "2", "50%", "-", "1", "0%", "4", "25%"]


def test_best_overlaps_are_those_of_the_full_table():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(450, 2, generator=generator)
    boxes = torch.cat([corners, corners + 0.01 + torch.rand(450, 2, generator=generator)], dim=1)
    priors = utils.cxcy_to_xy(SSD300.create_prior_boxes())
    expected = utils.find_jaccard_overlap(boxes, priors).max(dim=1).values
    assert torch.equal(script.find_best_overlaps(boxes, priors), expected)


def run_script(tmp_path, **parameters):
    """script.py as a user runs it; returns what it printed."""
    arguments = [f"--{name}={value}" for name, value in parameters.items()]
    command = [sys.executable, script.__file__, f"--output_folder={tmp_path / 'lists'}", *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout


def test_the_contact_sheet_shows_images_with_their_boxes(tmp_path):
    folder = write_voc(tmp_path / "data", {f"a{i}": [object_xml(box=(31, 41, 60, 70))] for i in range(3)} | {"t": []})
    for path in (folder / "JPEGImages").iterdir():
        Image.new("RGB", (100, 80)).save(path)
    output = run_script(tmp_path, train_data=folder)
    assert "contact_sheet.jpg: 3 images of TRAIN" in output
    assert "Objects of TRAIN by size" in output
    assert "Objects of TRAIN by size" in (tmp_path / "lists" / "data_report.txt").read_text()
    sheet = np.asarray(Image.open(tmp_path / "lists" / "contact_sheet.jpg").convert("RGB")).astype(int)
    assert sheet.shape == (240, 960, 3)
    # A 100 x 80 image becomes 290 x 232, 4 pixels from the edge: x = 30 lies at 4 + 87, y = 40 at 4 + 116.
    color = np.array(ImageColor.getrgb(class_colors({"background": 0, "dog": 1})["dog"]))
    for first in (0, 320, 640):
        for x, y in ((91, 180), (177, 180), (140, 206)):  # left, right and lower edge of the box
            near = sheet[y - 2 : y + 3, first + x - 2 : first + x + 3]
            assert np.abs(near - color).sum(axis=2).min() < 120, (first, x, y)


def test_the_report_needs_no_images(tmp_path):
    folder = write_voc(tmp_path / "data", {"a": [object_xml()], "t": []})
    shutil.rmtree(folder / "JPEGImages")
    output = run_script(tmp_path, train_data=folder, check_images=False)
    assert "Objects of TRAIN by size" in output
    assert "contact_sheet" not in output
    output = run_script(tmp_path, train_data=folder, check_images=False, report_overlap=0)
    assert "Objects of TRAIN by size" not in output
