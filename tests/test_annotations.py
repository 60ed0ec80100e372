"""annotations.py: files as people have them, in every layout, and what is refused."""

import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import DIFFICULT, annotation_xml, object_xml, write, write_annotation, write_image

from annotations import class_names_of, find_data_yaml, parse_annotation, read_annotations

# --- One XML file ---------------------------------------------------------------------------------


def test_parse_annotation_makes_boxes_continuous(tmp_path):
    objects = object_xml("dog", (1, 1, 100, 80)), object_xml("cat", difficult=DIFFICULT)
    path = write_annotation(tmp_path, *objects)
    assert parse_annotation(path) == {
        "boxes": [[0, 0, 100, 80], [10, 20, 40, 60]], "names": ["dog", "cat"], "difficulties": [0, 1],
        "difficult_missing": 0, "turned": 0, "width": 100, "height": 80, "filename": "",
    }  # fmt: skip
    assert parse_annotation(path, first_pixel=0)["boxes"] == [[1, 1, 100, 80], [11, 21, 40, 60]]


def test_numbers_may_be_fractions_between_white_space_or_endless(tmp_path):
    dog = object_xml("\n  guide dog\t", (" 45.25\n", "2.0", "\t50 ", 60.5), "<difficult>\n 1 </difficult>")
    endless = object_xml(box=("9" * 400, 1, "1" + "0" * 399, 9), difficult="<difficult/>")
    annotation = parse_annotation(write_annotation(tmp_path, dog, endless))
    assert annotation["boxes"] == [[44.25, 1, 50, 60.5], [math.inf, 0, math.inf, 9]]
    assert annotation["names"] == ["guide dog", "dog"]
    assert annotation["difficulties"] == [1, 0] and annotation["difficult_missing"] == 1


def test_parse_annotation_does_not_take_parts_for_objects(tmp_path):
    part = object_xml("head", (1, 2, 3, 4)).replace("object", "part")
    people = object_xml("person", extra=part), object_xml("person", (1, 2, 90, 4), difficult=part)
    annotation = parse_annotation(write_annotation(tmp_path, *people))
    assert annotation["names"] == ["person"] * 2 and annotation["boxes"] == [[10, 20, 40, 60], [0, 1, 90, 4]]


@pytest.mark.parametrize("size", [
    "", "<size/>", "<size><width>640</width></size>", *(f"<size><width>{width}</width><height>{height}</height></size>"
    for width, height in [(0, 0), (640, " "), (-5, 7), ("1e300", 7), ("wide", 7), ("nan", "inf")]),
])  # fmt: skip
def test_parse_annotation_without_usable_size(tmp_path, size):
    annotation = parse_annotation(write_annotation(tmp_path, size, object_xml(), size=""))
    assert (annotation["width"], annotation["height"], len(annotation["boxes"])) == (None, None, 1)


@pytest.mark.parametrize(("text", "message"), [
    ("", "unreadable XML"), ("<annotation>", "unreadable XML"), ("<annotation>&nbsp;</annotation>", "unreadable XML"),
    *((f'<?xml version="1.0" encoding="{name}"?><annotation/>', "unreadable XML") for name in ("klingon", "zlib")),
    ("<html/>", "<html>"), (annotation_xml(object_xml(name=" ")), r"object 1 \(\) has no <name>"),
    (annotation_xml("<object><name>dog</name></object>"), r"object 1 \(dog\) has no <bndbox>"),
    (annotation_xml(object_xml(), object_xml(box=("x1", 2, 3, 4))), r"object 2 \(dog\): <xmin> is 'x1'"),
    (annotation_xml(object_xml(box=(1, 2, "", 4))), "<xmax> is ''"),
    (annotation_xml(object_xml()).replace("ymax", "ymex"), "<ymax> is missing"),
    (annotation_xml(object_xml(difficult="<difficult>maybe</difficult>")), "<difficult> is 'maybe'"),
    (annotation_xml("<objects>", object_xml(), "</objects>"), "1 objects are not where VOC has them"),
    (annotation_xml(object_xml(), object_xml().replace("object>", "Object>")), "1 objects are not where VOC has them"),
    (annotation_xml(object_xml("\x85" + "x" * 9000, box=("\x9b", 2, 3, 4))), r"x\.\.\.\): <xmin> is '\\x9b'"),
])  # fmt: skip
def test_parse_annotation_names_file_and_fault(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"photo 1\.xml: .*{message}") as error:
        parse_annotation(write(tmp_path / "photo 1.xml", text))
    assert len(str(error.value)) < 1000


BILLION_LAUGHS = "<!ENTITY a0 'ha'>" + "".join(f"<!ENTITY a{i} '{f'&a{i - 1};' * 10}'>" for i in range(1, 10))


@pytest.mark.parametrize("attack", [BILLION_LAUGHS, "<!ENTITY a9 SYSTEM 'file:///etc/passwd'>"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_entities_are_refused_in_every_encoding(tmp_path, attack, encoding):
    path = tmp_path / "attack.xml"
    path.write_bytes(f"<!DOCTYPE annotation [{attack}]>{annotation_xml(object_xml('&a9;'))}".encode(encoding))
    with pytest.raises(ValueError, match=r"attack\.xml: (a document type|holds zero bytes)"):
        parse_annotation(path)


def test_missing_large_and_deep_annotations(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.xml"):
        parse_annotation(tmp_path / "nowhere.xml")
    path = write(tmp_path / "large.xml", "")
    os.truncate(path, 10**12)  # a sparse file: a terabyte to read, nothing on the disk
    with pytest.raises(ValueError, match=r"large\.xml.*larger than"):
        parse_annotation(path)
    path.write_text("<annotation>" + "<a>" * 50_000 + "</a>" * 50_000 + "</annotation>")
    assert parse_annotation(path)["boxes"] == []


# --- Layouts: each holds the same photos, with one dog at (10, 20) to (40, 60) --------------------

NAMES = {"": ("a", "b"), "train": ("a", "b"), "valid": ("c",), "test": ("d",)}
DOG = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 30, 40]}


def write_xml_layout(folder, annotations, images, splits=("",)):
    for split in splits:
        for name in NAMES[split]:
            write_annotation(folder / split / annotations, object_xml(), name=name)
            write_image(folder / split / images / f"{name}.png")


def write_yolo_layout(folder, labels, images, names_file="data.yaml", splits=("",)):
    for split in splits:
        for name in NAMES[split]:
            write_image(folder / images.format(split) / f"{name}.jpg")
            write(folder / labels.format(split) / f"{name}.txt", "1 0.25 0.5 0.3 0.5\n")
    write(folder / names_file, "nc: 2\nnames: ['cat', 'dog']\n" if "yaml" in names_file else "cat\ndog\n")
    if len(splits) > 1:  # what exporters add; it makes no layout of its own
        write(folder / "README.dataset.txt", "dogs")
        write_image(folder / "cover.jpg")


def write_coco_layout(folder, splits=("",)):
    for split in splits:
        photos = [write_image(folder / split / f"{name}.jpg") for name in NAMES[split]]
        images = [{"id": i, "file_name": photo.name, "width": 100, "height": 80} for i, photo in enumerate(photos)]
        dogs = [{**DOG, "image_id": i} for i in range(len(photos))]
        write(folder / split / "_annotations.coco.json", coco(images=images, annotations=dogs))


def coco(**changes):
    categories = [{"id": 0, "name": "pets"}, {"id": 3, "name": "dog"}, {"id": 5, "name": "N/A"}]
    images = [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 80}]
    return {"categories": categories, "images": images, "annotations": [DOG], **changes}


SPLITS = ("train", "valid", "test")
WANTED = {"TRAIN": "trainval", "TEST": "test"}


@pytest.mark.parametrize(("write_layout", "arguments", "splits", "words"), [
    (write_xml_layout, ("Annotations", "JPEGImages"), [""], "XML files in Annotations, images in JPEGImages"),
    (write_xml_layout, ("annotations", "images"), [""], "XML files in annotations, images in images"),
    (write_xml_layout, ("", ""), [""], "XML files beside their images"),
    (write_xml_layout, ("", ""), SPLITS, "XML files beside their images, train: TRAIN, test: TEST"),
    (write_yolo_layout, ("labels", "images"), [""], "YOLO text files in labels"),
    (write_yolo_layout, ("labels", "images", "classes.txt"), [""], "YOLO text files in labels"),
    (write_yolo_layout, ("", "", "classes.txt"), [""], "YOLO text files beside their images"),
    (write_yolo_layout, ("{}/labels", "{}/images"), SPLITS, "YOLO text files in labels.*train: TRAIN, test: TEST"),
    (write_yolo_layout, ("{}/labels", "{}/images"), SPLITS[:2], "train: TRAIN, valid: TEST"),
    (write_yolo_layout, ("labels/{}", "images/{}", "mine.yaml"), SPLITS, "train: TRAIN, test: TEST"),
    (write_coco_layout, (), SPLITS, "COCO files beside their images, train: TRAIN"),
    (write_coco_layout, (), [""], "COCO files beside their images"),
])  # fmt: skip
def test_layouts_are_recognised(tmp_path, write_layout, arguments, splits, words):
    write_layout(tmp_path, *arguments, splits=splits)
    description, records = read_annotations(str(tmp_path), WANTED, notes := {})
    assert re.match(f".*{words}", description) and notes == {}
    found = {split: [Path(record.image).stem for record in rows] for split, rows in records.items()}
    is_split, test = len(splits) > 1, ["d"] if "test" in splits else ["c"]
    assert found == ({"TRAIN": ["a", "b"], "TEST": test} if is_split else {"": ["a", "b"]})
    for record in (record for rows in records.values() for record in rows):
        (row,) = record.objects
        assert row.name == "dog" and os.path.isfile(record.image)
        scale = (100, 80, 100, 80) if record.form == "YOLO" else (1, 1, 1, 1)
        assert [value * side for value, side in zip(row.box, scale, strict=True)] == pytest.approx([10, 20, 40, 60])


def read(source, notes=None, **options):
    """The records of a source that has no splits."""
    return read_annotations(str(source), WANTED, {} if notes is None else notes, **options)[1][""]


def test_layouts_that_are_not_recognised_say_what_was_found(tmp_path):
    for name in ("photos/a.jpg", "b.png", "c.png"):
        write_image(tmp_path / name)
    (tmp_path / "notes\x1b[31m").mkdir()
    with pytest.raises(ValueError, match=r"not recognised\. Found: 2 \.png files, .*notes.*photos") as error:
        read(tmp_path)
    for words in ("Annotations", "data.yaml", "classes.txt", "_annotations.coco.json", "--image_folder", "train"):
        assert words in str(error.value)
    assert "\x1b" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"nowhere: not a folder or a \.json or \.yaml file"):
        read(tmp_path / "nowhere")
    write_yolo_layout(tmp_path / "yolo", "labels", "images")
    (tmp_path / "yolo" / "data.yaml").unlink()
    with pytest.raises(ValueError, match="class names are missing"):
        read(tmp_path / "yolo")


def test_images_elsewhere_and_files_without_a_partner(tmp_path):
    write_xml_layout(tmp_path / "mine", "", "")
    write_image(tmp_path / "mine" / "unlabelled.jpg")
    assert len(read(tmp_path / "mine", notes := {})) == 2
    os.rename(tmp_path / "mine" / "a.png", tmp_path / "a.png")
    assert read(tmp_path / "mine", image_folder=tmp_path)[0].image == str(tmp_path / "a.png")
    write_yolo_layout(tmp_path / "yolo", "labels", "images")
    write_image(tmp_path / "yolo" / "images" / "background.jpg")
    write(tmp_path / "yolo" / "labels" / "lost.txt", "")
    assert [len(record.objects) for record in read(tmp_path / "yolo", notes)] == [1, 1, 0]
    assert "background" in notes["label_file_missing"][0]["file"] and "lost" in notes["image_not_found"][0]["file"]


def test_splits_are_chosen_by_name(tmp_path):
    write_xml_layout(tmp_path, "Annotations", "JPEGImages")

    def chosen(wanted=WANTED, **files):
        for path in tmp_path.glob("ImageSets/Main/*"):
            path.unlink()
        for name, images in files.items():
            write(tmp_path / "ImageSets" / "Main" / f"{name}.txt", "\n".join(images))
        records = read_annotations(str(tmp_path), wanted, {})[1]
        return {split: "".join(os.path.basename(r.file)[0] for r in rows) for split, rows in records.items()}

    assert chosen(trainval="ab", val="b", test="b") == {"TRAIN": "ab", "TEST": "b"}
    assert chosen(train="a", val="b") == {"TRAIN": "a", "TEST": "b"}
    assert chosen({"TRAIN": "mine"}, mine="b", test="a") == {"TRAIN": "b"}
    assert chosen(default="a") == {"": "a"}  # CVAT's list of all images
    with pytest.raises(FileNotFoundError, match=r"has no split 'test'\. Name one of val, train, trainval"):
        chosen(trainval="ab", train="a", val="b")  # val is a part of trainval
    with pytest.raises(FileNotFoundError, match="has no split 'val'"):
        chosen({"TRAIN": "trainval", "TEST": "val"}, trainval="ab", test="b")


@pytest.mark.parametrize("box", [(0, 5, 9, 9), (5, 0, 9, 9)])
def test_a_minimum_of_0_anywhere_says_that_a_folder_counts_from_0(tmp_path, box):
    write_xml_layout(tmp_path, "Annotations", "images")
    assert read(tmp_path)[0].objects[0].box == (10, 20, 40, 60)
    write_annotation(tmp_path / "Annotations", object_xml(box=box), name="b")
    description, records = read_annotations(str(tmp_path), WANTED, {})
    assert "pixels counted from 0" in description
    assert [record.objects[0].box for record in records[""]] == [(11, 21, 40, 60), box]  # the other file, too
    assert read(tmp_path, first_pixel="1")[0].objects[0].box == (10, 20, 40, 60)
    with pytest.raises(ValueError, match="first_pixel is '2'"):
        read(tmp_path, first_pixel="2")


# --- COCO -----------------------------------------------------------------------------------------


def write_coco(folder, content, images="images", name="all.json"):
    write_image(folder / images / "a.jpg")
    return write(folder / name, content)


def test_coco_records(tmp_path):
    crowd = {**DOG, "bbox": [0.5, 0, 9, 8], "iscrowd": 1, "area": 55.5}
    (record,) = read(write_coco(tmp_path, coco(annotations=[DOG, crowd])))
    assert (record.image_id, record.declared_size) == (7, (100, 80))
    assert record.objects == [("dog", (10, 20, 40, 60), 0, 1200), ("dog", (0.5, 0, 9.5, 8), 1, 55.5)]
    assert record.category_ids == {"pets": 0, "dog": 3, "N/A": 5}


@pytest.mark.parametrize("images", [".", "images", "val2017", "elsewhere"])
def test_coco_images_are_found(tmp_path, images):
    folder = "." if images in (".", "images") else "annotations"
    path = write_coco(tmp_path, coco(), images, f"{folder}/instances_val2017.json")
    options = {"image_folder": str(tmp_path / images)} if images == "elsewhere" else {}
    assert os.path.isfile(read(path, **options)[0].image)


def test_entries_for_one_photo_are_merged(tmp_path):
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}, {"id": 3, "file_name": "./a.jpg"}]
    boxes = [(1, [1, 1, 9, 9]), (3, [5, 5, 9, 9]), (2, [7, 7, 9, 9]), (3, [1, 1, 9, 9])]
    annotations = [{**DOG, "image_id": i, "bbox": box} for i, box in boxes]
    first, second = read(write_coco(tmp_path, coco(images=images, annotations=annotations)), notes := {})
    assert [row.box for row in first.objects] == [(1, 1, 10, 10), (5, 5, 14, 14)] and first.image_id == 1
    assert len(second.objects) == 1 and len(notes["image_repeated"]) == 1


FAULTS = [
    ({"image_id": 8}, "image_id 8 (int) is not in the file"), ({"image_id": "x"}, "image_id 'x' (str) is not in"),
    ({"image_id": 7.5}, "image_id 7.5 (float) is not in the file"), ({"image_id": None}, "'image_id' is None"),
    ({"image_id": [7]}, "'image_id' is [7]"), ({"category_id": 44}, "category_id 44 (int) is not in the file"),
    ({"category_id": 5}, "its category is called 'N/A'"), ({"bbox": []}, "'bbox' is [], not four numbers"),
    ({"bbox": [1, 2, 3, "4 m"]}, "'bbox' is [1, 2, 3, '4 m'], not four numbers"),
    ({"bbox": "1, 2, 3"}, "'bbox' is [1.0, 2.0, 3.0], not four numbers"), ({"bbox": "dog"}, "'bbox' is 'dog', not"),
    ({"bbox": None}, "'bbox' is None"), ({"iscrowd": "no\x1b[2J"}, r"'iscrowd' is 'no\x1b[2J', not 0 or 1"),
    ({"iscrowd": 2}, "'iscrowd' is '2', not 0 or 1"), ({"iscrowd": [1]}, "'iscrowd' is '[1]', not 0 or 1"),
]  # fmt: skip


def test_all_bad_entries_of_coco_files_are_left_out_and_noted(tmp_path):
    annotations = [DOG, *({**DOG, **change} for change, _ in FAULTS), 3, {"image_id": 7, "category_id": 3}]
    images = [*coco()["images"], {"id": 8}, {"id": 9, "file_name": "a\0"}, {"id": 9, "file_name": "\ud800"}]
    images += [{"id": 5, "file_name": "b"}, {"id": 5, "file_name": "c"}]
    (record,) = read(write_coco(tmp_path, coco(images=images, annotations=annotations)), notes := {})
    assert len(record.objects) == 1
    found = [row["what"] for row in notes["entry_unusable"]]
    assert all(any(words in line for line in found) for _, words in FAULTS)
    assert sum(line.startswith("annotations[") for line in found) == len(annotations) - 1
    of_images = [line for line in found if line.startswith("images")]
    faults = ("[1]: 'file_name' is missing", "[2]: embedded null", "[3]: 'utf-8' codec", ": 'id' 5 is given twice")
    assert all(line.startswith(f"images{fault}") for line, fault in zip(of_images, faults, strict=True))


@pytest.mark.parametrize(("content", "message"), [
    ("{", "cannot be read as JSON"), ("[" * 100_000, "cannot be read as JSON"), ([], "a JSON list, not a dict"),
    (coco(categories=3), "no list of 'categories'"), (coco(images={}), "no list of 'images'"),
    (coco(annotations=None), "no list of 'annotations'"), (coco(images=[], annotations=[]), "has no images"),
    (coco(images=[]), r"none of the 1 entries of 'annotations'.*\[0\]: image_id 7 .*is not in the file"),
    (coco(images=[{"id": 7}]), r"none of the 1 entries of 'images'.*images\[0\]: 'file_name' is missing"),
    (coco(categories=[]), r"annotations\[0\]: category_id 3 .*is not in the file"),
    (coco(annotations=[{**DOG, "image_id": "7" * 9000}] * 900), "none of the 900 .*and 890 more"),
])  # fmt: skip
def test_coco_files_that_cannot_be_used(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"(?s)all\.json: .*{message}") as error:
        read(write_coco(tmp_path, content))
    assert len(str(error.value)) < 5000


def test_coco_numbers_that_are_too_large_are_infinite(tmp_path):
    boxes = [math.nan, 1, 2, 3], [1, math.inf, 2, 3], [1, 1, 10**399, 3], [1e308, 1, 1e308, 3]
    annotations = [{**DOG, "bbox": box, "area": 10**399} for box in boxes]
    (record,) = read(write_coco(tmp_path, coco(annotations=annotations)))
    assert len(record.objects) == 4 and not any(math.isfinite(sum(row.box)) for row in record.objects)


# --- YOLO -----------------------------------------------------------------------------------------


BOX = "0.5 0.5 0.2 0.4"
AROUND = (0.4, 0.3, 0.6, 0.7)  # the same box, boundary form
POSE_3D = f"{BOX} 0.42 0.35 2 0.58 0.65 2 0 0 0"
POSE_2D = f"{BOX} 0.42 0.35 0.58 0.65 0 0"


def read_lines(folder, *lines, yaml="names: [cat, dog]"):
    """The boxes of one label file with these lines, the notes, and the unusable lines among them."""
    write_image(folder / "images" / "a.jpg")
    write(folder / "labels" / "a.txt", "\n".join(lines))
    write(folder / "data.yaml", yaml)
    (record,) = read(folder, notes := {})
    return [row.box for row in record.objects], notes, [row["what"] for row in notes.get("entry_unusable", [])]


def test_yolo_lines(tmp_path):
    lines = [
        "0 0.5 0.5 1 1",
        "1 0.1 0.2 0.3 0.2 0.3 0.4 0.1 0.4",
        "7 0.5 0.5 1 1",
        "0 0.5 0.5 1",
        "dog 1 2 3 4",
        "0.5 1 1 1 1",
        "0 0.5 0.5 1 1",
    ]
    boxes, notes, unusable = read_lines(tmp_path, *lines, "", "1 0.1 0.2 0.3 0.2 0.3 0.4")
    around, outlined = (0, 0, 1, 1), (0.1, 0.2, 0.3, 0.4)
    assert boxes == [around, outlined, around, outlined]  # among outlines, 6 numbers are one
    assert len(unusable) == 2 and "line 5: 'dog 1 2 3 4' is not" in unusable[0] and "'0.5 0.5 1': 3 num" in unusable[1]
    unnamed, _ = notes["class_unnamed"]  # the other class is 0.5
    assert unnamed["what"] == "line 3: '7 0.5 0.5 1 1': class 7 is not one of the 2 class names"
    assert notes.keys() == {"entry_unusable", "class_unnamed"}


@pytest.mark.parametrize(("line", "yaml", "words"), [
    (f"0 {BOX}", "", ""), (f"0,{BOX.replace(' ', ',')}", "", ""), (f"0\t{BOX}", "", ""),
    (f"0, {BOX.replace(' ', ', ')}", "", ""), (f"0.0 {BOX}", "", ""),
    (f"0 {BOX} 0.93", "", "confidence"), (f"0 {BOX} 0.5 12", "", "confidence and track"),
    (f"0 {BOX} 0.5 0", "", "confidence and track"), (f"0 {POSE_3D}", "", "keypoints"),
    (f"0 {POSE_3D}", "kpt_shape: [3, 3]", "keypoints"), (f"0 {POSE_2D}", "kpt_shape: [3, 2]", "keypoints"),
    (f"0 {POSE_3D} 0.8", "kpt_shape: [3, 3]", "keypoints"), (f"0 {POSE_3D} 0.8 4", "kpt_shape: [3, 3]", "keypoints"),
    (f"0 {BOX} 0.9 0.9 2", "kpt_shape: [1, 3]", "keypoints"), (f"0 {BOX} 0.9 0.9", "kpt_shape: [1, 2]", "keypoints"),
])  # fmt: skip
def test_the_box_of_a_label_line_with_more_behind_it(tmp_path, line, yaml, words):
    boxes, notes, _ = read_lines(tmp_path, line, line, yaml=f"names: [cat]\n{yaml}")
    assert boxes == [pytest.approx(AROUND)] * 2
    guessed = [row["what"] for row in notes.get("entry_guessed", [])]
    assert len(guessed) == (words != "")
    assert all(what.startswith("2 label lines, the first here: box") for what in guessed)
    assert words in str(guessed)


def test_the_first_file_with_a_guessed_line_is_named(tmp_path):
    write_labels(tmp_path, 0)
    for name, text in (("b", f"0 {BOX} 0 {BOX}"), ("c", f"0 {BOX} 0 {BOX}"), ("d", f"0 {BOX} 0.9")):  # b, c: one line
        write_image(tmp_path / "images" / f"{name}.jpg")
        write(tmp_path / "labels" / f"{name}.txt", text)
    write(tmp_path / "classes.txt", "cat")
    read(tmp_path, notes := {})
    found = {Path(row["file"]).name: row["what"] for row in notes["entry_guessed"]}
    assert found.keys() == {"b.txt", "d.txt"} and found["b.txt"].startswith("2 label lines, the first here: outline")


@pytest.mark.parametrize("outline", [
    "0.7 0.3 0.9 0.3 0.9 0.5 0.7 0.5", "0.8 0.3 0.9 0.4 0.8 0.5 0.7 0.4", "0.7 0.3 0.9 0.3 0.9 0.5 0.7 0.5 0.7 0.4",
])  # fmt: skip
def test_outlines_of_one_length_are_no_keypoints(tmp_path, outline):
    boxes, notes, _ = read_lines(tmp_path, f"0 {outline}", f"1 {outline}")
    assert boxes == [pytest.approx((0.7, 0.3, 0.9, 0.5))] * 2 and notes == {}


def test_lines_that_may_be_outlines_or_keypoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"10 numbers may be outlines, or boxes with keypoints.*kpt_shape"):
        read_lines(tmp_path, f"0 {POSE_2D}", f"1 {POSE_2D}")
    with pytest.raises(ValueError, match=r"data\.yaml: kpt_shape is many"):
        read_lines(tmp_path, f"0 {POSE_2D}", yaml="names: [cat]\nkpt_shape: many")


def test_label_files_without_a_usable_line_say_why(tmp_path):
    lines = [f"0 {BOX} 3.5", f"0 {BOX} 0.5 0.5", "0 0,5 0,5 0,2 0,4", "0", f"5 {BOX}"]
    with pytest.raises(ValueError, match="none of the 5 label lines can be used:") as error:
        read_lines(tmp_path, *lines)
    for words in (
        "line 3: '0 0,5 0,5 0,2 0,4' is not",
        "class 5 is not one",
        "': 5 numbers;",
        "': 6 numbers;",
        "': 0 num",
    ):
        assert words in str(error.value)


def test_classes_that_count_from_1_are_noted(tmp_path):
    _, notes, _ = read_lines(tmp_path, f"1 {BOX}", f"2 {BOX}")
    assert notes["classes_from_1"][0]["what"] == "labels 1 to 2, names 0 to 1" and len(notes["class_unnamed"]) == 1
    assert "classes_from_1" not in read_lines(tmp_path, f"0 {BOX}", f"2 {BOX}")[1]


# --- Names of classes -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "names: ['cat', 'big dog']", "names: {0: cat, 1: 'big dog'}", "names: [cat, big dog]  # two\nnc: 2",
    "path: .\nnames: [\n'cat',\n  'big dog'\n]\nnc: 2", "names:\n- cat\n- big dog\nnc: 2",
    "names:\n  0: cat\n  1: big dog  # a\n\ntrain: x",
])  # fmt: skip
def test_names_of_yaml_files(tmp_path, text):
    write(tmp_path / "data.yaml", text)
    assert class_names_of(find_data_yaml(str(tmp_path))[1]) == {0: "cat", 1: "big dog"}


@pytest.mark.parametrize(("text", "names"), [
    ("names: [no, 1, 2.50, null]", {0: "no", 1: "1", 2: "2.50", 3: "null"}), ("names: best", {}), ("nc: 2", {}),
    ("names: {cat: 0}", {}), ("names: [[a]]", {}), ("names: {7: x}", {7: "x"}), ("- names", {}), ("", {}),
])  # fmt: skip
def test_odd_names_of_yaml_files(tmp_path, text, names):
    write(tmp_path / "data.yaml", text)
    assert class_names_of(find_data_yaml(str(tmp_path))[1]) == names


def named(folder, **options):
    """The classes of the first image, and what the line on the source says of their names."""
    description, records = read_annotations(str(folder), WANTED, {}, **options)
    first = next(iter(records.values()))[0]
    return [row.name for row in first.objects], description.rpartition("classes named by ")[2]


def write_labels(folder, *classes):
    write_image(folder / "images" / "a.jpg")
    write(folder / "labels" / "a.txt", "\n".join(f"{label} {BOX}" for label in classes))
    return folder


def test_class_names_come_from_the_own_files_first(tmp_path):
    mine = write_labels(tmp_path / "mine", 0, 1)
    write(tmp_path / "data.yaml", "names: [wolf, fox]\ntrain: elsewhere")
    with pytest.raises(ValueError, match=r"mine: the class names are missing.*--class_names"):
        named(mine)
    assert named(mine, class_names=("a", "b")) == (["a", "b"], "--class_names")
    write(mine / "a_training.yaml", "names: yolo\nlr: 0.1")
    write(mine / "labels" / "classes.txt", "cat\ndog\n")
    assert named(mine) == (["cat", "dog"], str(mine / "labels" / "classes.txt"))
    write(mine / "a_network.yaml", "nc: 80\nbackbone: []")
    write(mine / "mine.yaml", "names: [cow, hen]")
    assert named(mine) == (["cow", "hen"], str(mine / "mine.yaml"))
    write(mine / "data.yaml", "names: [ox, ass]")
    assert named(mine) == (["ox", "ass"], str(mine / "data.yaml"))
    write(mine / "data.yaml", "nc: 2")
    assert named(mine) == (["cat", "dog"], str(mine / "labels" / "classes.txt"))


def test_a_yaml_file_above_counts_if_it_names_the_folder(tmp_path):
    train = write_labels(tmp_path / "train", 0, 1)
    write(tmp_path / "data.yaml", "names: [wolf, fox]\ntrain: ../other/images")
    with pytest.raises(ValueError, match="class names are missing"):
        named(train)
    write(tmp_path / "data.yaml", "names: [cat, dog]\ntrain: ../train/images")
    assert named(train) == (["cat", "dog"], str(tmp_path / "data.yaml"))


def test_class_names_that_are_given_go_before_a_text_file_above(tmp_path):
    test_set = write_labels(tmp_path / "test_set", 0, 1)
    file = write(tmp_path / "classes.txt", "dog\ncat\n")
    assert named(test_set, class_names=("cat", "cow")) == (["cat", "cow"], "--class_names")
    assert named(test_set) == named(test_set, class_names=("cat",)) == (["dog", "cat"], str(file))  # it has all of them
    with pytest.raises(ValueError, match=r"classes\.txt has the classes in another order than --class_names"):
        named(test_set, class_names=("cat", "dog"))


def test_no_classes_at_all_are_refused(tmp_path):
    write(write_labels(tmp_path, 0) / "data.yaml", "nc: 0\ntrain: images")
    with pytest.raises(ValueError, match="class names are missing"):
        named(tmp_path)


@pytest.mark.parametrize(("content", "names"), [
    ("cat\n\n\ndog\n\n", ["cat", "dog"]), ("cat\r\n\r\n \r\ndog", ["cat", "dog"]), ("cat\r\r\rdog\r", ["cat", "dog"]),
    ("\ufeffcat\n\n\n犬", ["cat", "犬"]),
])  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be"])
def test_classes_are_numbered_by_their_lines_in_every_encoding(tmp_path, content, names, encoding):
    write_labels(tmp_path, 0, 3)
    (tmp_path / "classes.txt").write_bytes(content.encode(encoding))
    assert named(tmp_path)[0] == names
    (tmp_path / "classes.txt").write_bytes("cat\nchien d'été".encode("latin-1"))
    with pytest.raises(ValueError, match=r"classes\.txt: line 2: its encoding is not UTF-8"):
        named(tmp_path)


def test_a_number_of_classes_without_names(tmp_path):
    write(write_labels(tmp_path, 0, 2) / "data.yaml", "nc: 3\ntrain: images")
    names, words = named(tmp_path)
    assert names == ["0", "2"] and words.startswith("their numbers") and "data.yaml" in words
    assert named(tmp_path, class_names=("x", "y", "z")) == (["x", "z"], "--class_names")


def test_pyyaml_is_asked_for_by_name_where_a_yaml_file_has_to_be_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    write(write_labels(tmp_path, 0) / "some.yaml", "names: [cat]")
    with pytest.raises(ValueError, match=r"some\.yaml: .*pip install pyyaml"):
        named(tmp_path)
    write(tmp_path / "classes.txt", "cat")
    assert named(tmp_path)[0] == ["cat"]
    write(tmp_path / "data.yaml", "names: [cat]")
    with pytest.raises(ValueError, match=r"data\.yaml: .*pip install pyyaml"):
        named(tmp_path)


def test_yaml_in_other_encodings(tmp_path):
    path = write_labels(tmp_path, 0) / "data.yaml"
    path.write_bytes("names: [犬]".encode("utf-16"))
    assert named(tmp_path)[0] == ["犬"]
    path.write_bytes("nc: 1\nnames: [狗]".encode("gbk"))
    with pytest.raises(ValueError, match=r"data\.yaml: line 2: its encoding is not UTF-8"):
        named(tmp_path)


@pytest.mark.parametrize("text", ["names: [cat", "names: cat: dog", "a:\n\t- b", "x: " + "[" * 5000])
def test_yaml_that_cannot_be_read(tmp_path, text):
    write(write_labels(tmp_path, 0) / "data.yaml", text)
    with pytest.raises(ValueError, match=r"data\.yaml: cannot be read as YAML"):
        named(tmp_path)


# --- More of VOC ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "difficulty", "missing"), [
    ("Unspecified", 0, 1), ("unknown", 0, 1), ("None", 0, 1), ("", 0, 1), ("false", 0, 0), ("TRUE", 1, 0), ("1", 1, 0),
])  # fmt: skip
def test_difficult_in_words(tmp_path, text, difficulty, missing):
    path = write_annotation(tmp_path, object_xml(difficult=f"<difficult>{text}</difficult>"))
    annotation = parse_annotation(path)
    assert (annotation["difficulties"], annotation["difficult_missing"]) == ([difficulty], missing)


@pytest.mark.parametrize(("degrees", "box"), [
    ("90.0", (5, 35, 45, 45)), ("-90", (5, 35, 45, 45)), ("180", (20, 20, 30, 60)), ("360", None), ("0.0", None),
    ("left", None), ("", None), ("nan", None), ("inf", None),
    (45.0, (25 - 25 / 2**0.5, 40 - 25 / 2**0.5, 25 + 25 / 2**0.5, 40 + 25 / 2**0.5)),
])  # fmt: skip
def test_the_box_around_a_rectangle_that_cvat_has_turned(tmp_path, degrees, box):
    rotation = f"<attributes><attribute><name>rotation</name><value>{degrees}</value></attribute></attributes>"
    write_annotation(tmp_path / "voc", object_xml(box=(20, 20, 30, 60), extra=rotation), object_xml())
    write_image(tmp_path / "voc" / "a.jpg")
    turned = {**DOG, "bbox": [20, 20, 10, 40], "attributes": {"occluded": False, "rotation": degrees}}
    for source in (tmp_path / "voc", write_coco(tmp_path, coco(annotations=[turned, DOG]))):
        (record,) = read(source, notes := {}, first_pixel="0")
        assert record.objects[0].box == pytest.approx(box or (20, 20, 30, 60))
        assert record.objects[1].box == ((11, 21, 40, 60) if record.form == "VOC" else (10, 20, 40, 60))
        whats = [row["what"] for row in notes.get("entry_guessed", [])]
        assert whats == (["1 objects: rectangles that are turned: the box around each taken"] if box else [])


@pytest.mark.parametrize("encoding", ["gbk", "shift_jis", "utf-16", "utf-16-le", "utf-8-sig", "big5"])
def test_xml_in_other_encodings(tmp_path, encoding):
    text = f'<?xml version="1.0" encoding="{encoding}"?>\n{annotation_xml(object_xml("犬"))}'
    (tmp_path / "a.xml").write_bytes(text.encode(encoding))
    assert parse_annotation(tmp_path / "a.xml")["names"] == ["犬"]
    (tmp_path / "a.xml").write_bytes(annotation_xml(object_xml("犬")).encode("shift_jis"))
    with pytest.raises(ValueError, match=r'a\.xml: .*encoding is not utf-8.*encoding="gbk"'):
        parse_annotation(tmp_path / "a.xml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_lists_in_other_encodings(tmp_path, encoding, line_end):
    write_xml_layout(tmp_path, "Annotations", "JPEGImages")
    lists = write(tmp_path / "ImageSets" / "Main" / "train.txt", "").parent
    (lists / "train.txt").write_bytes(line_end.join(["", "b.png", " ", ""]).encode(encoding))
    (lists / "test.txt").write_bytes(line_end.join(["a"]).encode(encoding))
    records = read_annotations(str(tmp_path), WANTED, {})[1]
    assert [os.path.basename(rows[0].image) for rows in records.values()] == ["b.png", "a.png"]


@pytest.mark.parametrize("lines", ["a -1\nb  1\n", "a  0\nb -1", "a 1"])
def test_lists_of_one_class_are_no_splits(tmp_path, lines):
    write_xml_layout(tmp_path, "Annotations", "JPEGImages")
    for name in ("dog_train", "dog_default", "cat_trainval"):
        write(tmp_path / "ImageSets" / "Main" / f"{name}.txt", lines)
    assert len(read(tmp_path)) == 2
    write(tmp_path / "ImageSets" / "Main" / "default.txt", "a\n")
    assert len(read(tmp_path)) == 1


@pytest.mark.parametrize("images", ["JPEGImages", "images", "jpegimages", "photos/deep", "."])
def test_the_folder_with_images_is_found_beside_empty_ones(tmp_path, images):
    for name in ("images", "JPEGImages"):
        (tmp_path / name).mkdir()
    write(tmp_path / "images" / "._a.png", "")
    photo = write_image(tmp_path / images / "a.png")
    write_annotation(tmp_path / "ANNOTATIONS", object_xml())
    assert [record.image for record in read(tmp_path)] == [str(photo)]


def test_xml_files_and_images_in_subfolders(tmp_path):
    for cam, name in (("cam0", "a"), ("cam1", "a"), ("cam1", "b")):
        write_annotation(tmp_path / "Annotations" / cam, object_xml(cam), name=name)
        write_image(tmp_path / "images" / cam / f"{name}.jpg")
    pairs = [(Path(record.image).parent.name, record.objects[0].name) for record in read(tmp_path)]
    assert pairs == [("cam0", "cam0"), ("cam1", "cam1"), ("cam1", "cam1")]
    os.rename(tmp_path / "Annotations", tmp_path / "images" / "deeper")
    assert len(read(tmp_path)) == 3


# --- More of COCO ---------------------------------------------------------------------------------


def test_coco_outlines_without_boxes(tmp_path):
    def box(segmentation, **changes):
        entry = {key: value for key, value in DOG.items() if key != "bbox"}
        path = write_coco(tmp_path, coco(annotations=[{**entry, "segmentation": segmentation, **changes}]))
        return read(path, notes)[0].objects[0].box

    notes = {}
    assert box([[10, 20, 40, 30.5, 20, 60]]) == (10, 20, 40, 60)
    assert box([10, 20, 40, 20, 40, 60]) == (10, 20, 40, 60)
    assert box([[10, 20, 12, 20, 12, 30], [40, 50, 30, 60, 35, 55]], bbox=[]) == (10, 20, 40, 60)
    assert box([[1, 1, 9, 9, 1, 9]], bbox=[10, 20, 30, 40]) == (10, 20, 40, 60)  # the box it has
    assert len(notes["entry_guessed"]) == 3
    for wrong in (None, [], [[]], [[1, 2, 3]], [["a", 1]], "x", {}, {"size": [0, 0], "counts": []}, {"counts": 3}):
        with pytest.raises(ValueError, match="none of the 1 entries of 'annotations'"):
            box(wrong)


def test_coco_masks_are_read_by_pycocotools(tmp_path, monkeypatch):
    masks = pytest.importorskip("pycocotools.mask")
    pixels = np.zeros((80, 100), np.uint8)
    pixels[20:60, 10:40] = 1
    packed = masks.encode(np.asfortranarray(pixels))
    packed["counts"] = packed["counts"].decode()
    runs = np.diff(np.flatnonzero(np.diff(pixels.T.ravel(), prepend=0, append=0)), prepend=0, append=0)[:-1].tolist()
    entries = [
        {"image_id": 7, "category_id": 3, "segmentation": mask}
        for mask in (packed, {"size": [80, 100], "counts": runs})
    ]
    path = write_coco(tmp_path, coco(annotations=entries))
    assert [row.box for row in read(path)[0].objects] == [(10, 20, 40, 60)] * 2
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ValueError, match="pip install pycocotools"):
        read(path)


@pytest.mark.parametrize(("image_id", "other", "found"), [
    (4, "4", True), ("4", 4, True), (4, 4.0, True), (4.0, "4", True), ("04", 4, False), ("a", "A", False),
])  # fmt: skip
def test_ids_as_numbers_and_as_text(tmp_path, image_id, other, found):
    images = [{"id": image_id, "file_name": "a.jpg"}, {"id": 99, "file_name": "b.jpg"}]
    entries = [{**DOG, "image_id": other, "category_id": "3"}, {**DOG, "image_id": 99, "iscrowd": None}]
    record = read(write_coco(tmp_path, coco(images=images, annotations=entries)), notes := {})[0]
    assert len(record.objects) == found and record.image_id == image_id
    whats = [row["what"] for row in notes["entry_guessed"]]
    assert any("null" in what for what in whats) and any("ids" in what for what in whats) == found


@pytest.mark.parametrize("box", [
    "[10, 20, 30, 40]", "10 20 30 40", "[10. 20. 30. 40.]", "(10.0, 20.0, 30.0, 40.0)", ["10", "20", "30", "40"],
    [10, " 20", 30, "4e1"],
])  # fmt: skip
def test_coco_boxes_as_text(tmp_path, box):
    (record,) = read(write_coco(tmp_path, coco(annotations=[{**DOG, "bbox": box}])), notes := {})
    assert record.objects == [("dog", (10, 20, 40, 60), 0, 1200)]
    assert [row["what"] for row in notes["entry_guessed"]] == ["1 objects: 'bbox' is text: its numbers taken"]
    (record,) = read(write_coco(tmp_path, coco(annotations=[{**DOG, "bbox": ["1", "9" * 400, "nan", "2"]}])))
    assert not math.isfinite(sum(record.objects[0].box))


@pytest.mark.parametrize(("value", "difficulty", "is_guess"), [
    ("0", 0, True), ("1", 1, True), ("true", 1, True), (" False", 0, True), (None, 0, True), ("", 0, True),
    (True, 1, False), (False, 0, False), (1.0, 1, False), (0, 0, False),
])  # fmt: skip
def test_coco_crowds_in_words(tmp_path, value, difficulty, is_guess):
    (record,) = read(write_coco(tmp_path, coco(annotations=[{**DOG, "iscrowd": value}])), notes := {})
    assert record.objects[0].difficulty == difficulty and ("entry_guessed" in notes) == is_guess


def test_coco_classes_that_are_called_by_numbers(tmp_path):
    categories = [{"id": 3, "name": 7}, {"id": 4, "name": True}]
    (record,) = read(write_coco(tmp_path, coco(categories=categories)), notes := {})
    assert record.objects[0].name == "7" and "categories[1]: 'name' is True" in notes["entry_unusable"][0]["what"]


# --- More of YOLO ---------------------------------------------------------------------------------


OUTLINE = "0.4 0.3 0.6 0.3 0.6 0.7 0.4 0.7"  # AROUND is the box around it


@pytest.mark.parametrize(("lines", "words"), [
    ([f"0 {OUTLINE}", "1 0.4 0.3 0.6 0.7 0.5 0.7"], ""),
    ([f"0 {OUTLINE} 0.9", f"1 {OUTLINE} 1"], "confidence or track"),
    ([f"0 {OUTLINE} 0.9 5", f"1 {OUTLINE} 0.2 17"], "confidence and track"),
    ([f"0 {OUTLINE} 0.9 {track}" for track in (0, 1, 2, -1)], "confidence and track"),
    ([f"0 {OUTLINE} 0.9 0", f"0 {OUTLINE} 0.9 3", f"0 {OUTLINE} 0.8"], "confidence and track"),
    ([f"0 {OUTLINE} 3", f"0 {OUTLINE} 4"], "confidence or track"),
])  # fmt: skip
def test_the_ends_of_outlines(tmp_path, lines, words):
    boxes, notes, unusable = read_lines(tmp_path, *lines)
    assert boxes == [pytest.approx(AROUND)] * len(lines) and unusable == []
    assert words in str(notes.get("entry_guessed", "")) and ("entry_guessed" in notes) == (words != "")


def test_a_last_point_at_the_border_is_a_point_where_other_lines_show_it(tmp_path):
    at_border = "1 0.4 0.3 0.6 0.3 0.5 1"
    boxes, notes, _ = read_lines(tmp_path, *[f"0 {OUTLINE}"] * 4, at_border)
    assert boxes[4] == (0.4, 0.3, 0.6, 1) and notes == {}
    # A track, where another line has one that can be no coordinate.
    boxes, notes, _ = read_lines(tmp_path, *[f"0 {OUTLINE} 0.9 8"] * 4, f"1 {OUTLINE} 0.2 1")
    assert boxes[4] == pytest.approx(AROUND)


@pytest.mark.parametrize("lines", [
    [f"0 {OUTLINE} 0.9 1"], [f"0 {OUTLINE} 0.9 {track}" for track in (0, 1, 0)],
    [f"0 {OUTLINE}", f"0 {OUTLINE} 0.9 1"], [f"0 {OUTLINE}", f"0 {OUTLINE} 0.9 7", f"0 {OUTLINE} 0.9 1"],
    ["0 0.4 0.3 0.6 0.3 0.5 1", "0 0.4 0.3 0.6 0.3 0.5 0.9"],
])  # fmt: skip
def test_ends_that_may_be_points_or_tracks_are_refused(tmp_path, lines):
    with pytest.raises(ValueError, match=r"a\.txt: the line with '0\.4 .* ends in 0\.\d [01]: .*kpt_shape: \[0, 0\]"):
        read_lines(tmp_path, *lines)
    boxes, _, _ = read_lines(tmp_path, *lines, yaml="names: [cat, dog]\nkpt_shape: [0, 0]")
    points = [float(number) for number in lines[-1].split()[1:]]
    assert boxes[-1] == (min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2]))


def test_ends_that_make_no_difference_are_not_refused(tmp_path):
    assert read_lines(tmp_path, "0 0 0 1 0 1 1 0 1")[:2] == ([(0, 0, 1, 1)], {})


@pytest.mark.parametrize(("line", "words"), [
    ("0 20 30 60 30 60 70", "an outline far outside the image, or in pixels"),
    (f"0 {BOX} 0.9 0.9 2 0.1 0.1 1", "an outline far outside"), (f"0 {OUTLINE} 7.5", "9 numbers"),
    (f"0 {OUTLINE} -1", "9 numbers"),
])  # fmt: skip
def test_lines_among_outlines_that_cannot_be_used(tmp_path, line, words):
    boxes, _, unusable = read_lines(tmp_path, *[f"0 {OUTLINE}"] * 4, line)
    assert len(boxes) == 4 and len(unusable) == 1 and words in unusable[0]


POSE_CONFIDENT = f"{BOX} 0.42 0.35 0.9 0.58 0.65 0.8 0.5 0.5 0.7"


@pytest.mark.parametrize("more", ["", " 0.8", " 0.8 12", " 12"])
@pytest.mark.parametrize("pose", [POSE_3D, f"{BOX} 0.42 0.35 1 0.58 0.65 1 0 0 0"])
def test_whole_visibilities_show_keypoints_with_a_confidence_and_a_track(tmp_path, pose, more):
    boxes, notes, _ = read_lines(tmp_path, *[f"0 {pose}{more}"] * 4, f"0 {BOX}", f"0 {pose}")
    assert len(boxes) == 6 and boxes[:4] == [boxes[5]] * 4 and "keypoints" in notes["entry_guessed"][0]["what"]


@pytest.mark.parametrize("more", [" 0.8", " 0.8 12"])
@pytest.mark.parametrize("pose", [POSE_CONFIDENT, POSE_2D.replace("0 0", "0.5 0.5")])
def test_keypoints_without_visibilities_that_may_be_outlines_are_refused(tmp_path, pose, more):
    with pytest.raises(ValueError, match="may be outlines, or boxes with keypoints"):
        read_lines(tmp_path, f"0 {pose}{more}", f"1 {pose}{more}")
    n_keypoints, size = (3, 3) if pose == POSE_CONFIDENT else (3, 2)
    yaml = f"names: [cat, dog]\nkpt_shape: [{n_keypoints}, {size}]"
    assert read_lines(tmp_path, f"0 {pose}{more}", yaml=yaml)[0] == [pytest.approx(AROUND)]


@pytest.mark.parametrize("name", ["Classes.txt", "CLASSES.TXT", "OBJ.NAMES", "coco.names", "_Darknet.Labels"])
def test_files_with_class_names_in_any_case(tmp_path, name):
    write(write_labels(tmp_path, 0, 1) / name, "cat\ndog\n")
    assert named(tmp_path) == (["cat", "dog"], str(tmp_path / name))


def test_of_two_files_with_class_names_the_usual_one_counts(tmp_path):
    write(write_labels(tmp_path, 0) / "a.names", "wolf\n")
    write(tmp_path / "b.names", "fox\n")
    with pytest.raises(ValueError, match="class names are missing"):
        named(tmp_path)
    write(tmp_path / "Obj.Names", "cat\n")
    assert named(tmp_path)[0] == ["cat"]


def write_pairs(folder, images, labels):
    for image in images:
        write_image(folder / "images" / f"{image}.jpg")
    for label in labels:
        write(folder / "labels" / f"{label}.txt", f"0 {BOX}")
    write(folder / "classes.txt", "cat\n")
    return folder


@pytest.mark.parametrize(("image", "label"), [
    ("im00", "IM00"), ("IM00", "im00"), ("Cam/im00", "cam/Im00"), ("cam0/im00", "im00"), ("im00", "1a2b3c4d-im00"),
])  # fmt: skip
def test_a_label_file_of_another_name_is_paired_where_it_can_mean_one_image_only(tmp_path, image, label):
    write_pairs(tmp_path, [image, "b", "empty"], [label, "b", "lost"])
    records = read(tmp_path, notes := {})
    counts = {Path(record.image).stem.lower(): len(record.objects) for record in records}
    assert counts == {"im00": 1, "b": 1, "empty": 0}
    assert {kind: len(rows) for kind, rows in notes.items()} == {
        "image_guessed": 1, "label_file_missing": 1, "image_not_found": 1
    }  # fmt: skip
    assert str(tmp_path / "images" / label) in notes["image_guessed"][0]["what"]
    # By a list, too.
    write(tmp_path / "train.txt", f"images/{image}.jpg\nimages/b.jpg")
    records = read(tmp_path, notes := {})
    assert [len(record.objects) for record in records] == [1, 1] and len(notes["image_guessed"]) == 1


@pytest.mark.parametrize(("images", "labels"), [
    (["a", "A"], ["a"]), (["a"], ["A", "a"]),  # one of the label files has its own image, or one of the images its own
    (["d/a", "e/a"], ["A"]), (["a"], ["A", "x/A"]),  # two can be meant
])  # fmt: skip
def test_label_files_that_can_mean_two_images_are_not_paired(tmp_path, images, labels):
    records = read(write_pairs(tmp_path, [*images, "b"], [*labels, "b"]), notes := {})
    own = [label in images for label in labels]
    assert sum(len(record.objects) for record in records) == 1 + sum(own) and "image_guessed" not in notes


@pytest.mark.parametrize(("size", "points", "others"), [
    (2, "0.42 0.35 0.58 0.65", "0.42 0.35 0 0"), (3, "0.42 0.35 0.9 0.58 0.65 0.8", "0.42 0.35 0.9 0.5 0.6 1"),
])  # fmt: skip
def test_keypoints_that_end_like_a_track_are_keypoints(tmp_path, size, points, others):
    yaml = f"names: [cat, dog]\nkpt_shape: [2, {size}]"
    lines = [f"0 {BOX} {points}"] * 2 + [f"0 {BOX} {others}"] * 2
    boxes, _, _ = read_lines(tmp_path, *lines, yaml=yaml)
    assert len(boxes) == 4 and len(set(boxes)) == 1


def test_a_box_with_confidence_and_track_among_outlines_is_no_outline(tmp_path):
    outline = "0.3 0.3 0.7 0.3 0.7 0.7 0.3 0.7"
    boxes, _, _ = read_lines(tmp_path, *[f"0 {outline}"] * 3, "1 0.5 0.5 0.4 0.4 0.9 7")
    assert boxes[3] == pytest.approx((0.3, 0.3, 0.7, 0.7))
