"""create_data_lists.py: what is mended, refused and reported on the way from records to lists."""

import contextlib
import json
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from helpers import DIFFICULT, object_xml, read_files, run_script, script, write, write_annotation, write_image
from PIL import Image, ImageColor

import create_data_lists as module
import utils
from annotations import Annotated, Record
from create_data_lists import create_data_lists
from datasets import read_image
from model import NETWORKS, SSD300
from utils import load_label_map, make_label_map, voc_labels


def write_splits(folder, **splits):
    for split, names in splits.items():
        write(folder / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{name}\n" for name in names))


def write_voc(folder, images, test=("t",)):
    """A folder in VOC layout: `images` maps a name to its objects; those in `test` are TEST."""
    images = {"t": [object_xml()], **images}
    for name, objects in images.items():
        write_annotation(folder / "Annotations", *objects, name=name)
        write_image(folder / "JPEGImages" / f"{name}.jpg")
    write_splits(folder, trainval=[name for name in images if name not in test], test=test)
    return folder


def make_lists(data, output=None, **options):
    """Run create_data_lists() on a folder or file; returns the report and the contents of the files by name."""
    output = output or data.parent / "lists"
    report = create_data_lists(train_data=data, output_folder=output, **options)
    return report, read_lists(output)


def read_lists(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def kinds(report):
    """How many notes there are of each kind; of classes without a TEST object only one test asks."""
    return {kind: len(notes) for kind, notes in report["notes"].items() if notes and kind != "class_not_tested"}


# --- Lists ----------------------------------------------------------------------------------------


def test_lists_of_a_small_folder(tmp_path):
    objects = [object_xml("dog", (1, 1, 100, 80)), object_xml("cat", difficult=DIFFICULT)]
    folder = write_voc(tmp_path / "mine", {"a": objects, "empty": [], "c": [object_xml(difficult="")] * 2})
    report, files = make_lists(folder)
    assert files["label_map"] == {"background": 0, "cat": 1, "dog": 2}
    assert files["TRAIN_images"] == [str(folder / "JPEGImages" / name) for name in ("a.jpg", "empty.jpg", "c.jpg")]
    assert files["TEST_images"] == [str(folder / "JPEGImages" / "t.jpg")]
    boxes = [[0, 0, 100, 80], [10, 20, 40, 60]]
    assert files["TRAIN_objects"] == [
        {"boxes": one, "labels": labels, "difficulties": difficult, "size": [100, 80]} for one, labels, difficult in
        ((boxes, [2, 1], [0, 1]), ([], [], []), ([boxes[1]] * 2, [2, 2], [0, 0]))]  # fmt: skip
    classes = {"dog": [3, 0], "cat": [0, 1]}  # easy, difficult
    counts = {"images": 3, "images_without_objects": 1, "objects": 4, "easy": 3, "difficult": 1, "classes": classes}
    assert report["splits"]["TRAIN"] == counts and kinds(report) == {"difficult_missing": 1}
    assert report["notes"]["difficult_missing"][0]["what"] == "2 objects"
    assert report["notes"]["class_not_tested"] == [{"split": "TEST", "file": "", "what": "cat"}]


def test_faulty_boxes_are_dropped_or_clipped_with_their_file(tmp_path):
    boxes = {
        "box_no_area": [(20, 30, 20, 30), (20, 30, 20, 40), (40, 30, 20, 50), (20, 50, 30, 40)],
        "box_not_finite": [("nan", 1, 50, 50), (1, 1, "inf", 50), (1, "-1e999", 50, 50)],
        # The last is 0.02 pixels high when it is clipped: a sliver; the last of the next ones 0.2.
        "box_outside": [(101, 1, 120, 50), (-50, 1, -1, 50), (1, 81, 50, 95), (1, -9e300, 50, -9e9), (1, 80.98, 9, 95)],
        "box_clipped": [(-1, 1, 50, 50), (91, 71, 101, 90), (-9e300, 5, 9e300, 50), (1, 80.8, 50, 95)],
    }  # fmt: skip
    images = {kind: [object_xml(box=box) for box in rows] for kind, rows in boxes.items()}
    images["unclipped"] = [object_xml(box=(100, 80, 100.1, 80.1))]  # nearly inside
    folder = write_voc(tmp_path / "mine", images)
    with pytest.raises(ValueError, match=r"mine: 9 of 13 boxes are inverted, or lie outside .*--trust_boxes=True"):
        make_lists(folder)
    report, files = make_lists(folder, trust_boxes=True)
    assert kinds(report) == {kind: len(rows) for kind, rows in boxes.items()}
    for kind in boxes:
        places = {(note["split"], note["file"]) for note in report["notes"][kind]}
        assert places == {("TRAIN", str(folder / "Annotations" / f"{kind}.xml"))}
    kept = [row["boxes"] for row in files["TRAIN_objects"]]
    clipped = [[0, 0, 50, 50], [90, 70, 100, 80], [0, 4, 100, 50], [0, 79.8, 50, 80]]
    assert kept == [[], [], [], clipped, [[99, 79, 100, 80]]]
    fractions = np.float32(clipped) / np.float32([100, 80, 100, 80])
    assert (fractions[:, 2:] > fractions[:, :2]).all()
    assert report["notes"]["box_no_area"][0]["what"] == "dog [20, 30, 20, 30] in 100 x 80"


def test_given_class_names_decide_the_labels_and_others_are_an_error_unless_skipped(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml("dog"), object_xml("unicorn"), object_xml("cat")]})
    names = ("zebra", "dog", "cat")
    with pytest.raises(ValueError, match=r"'unicorn': 1 objects, first in .*a\.xml"):
        make_lists(folder, class_names=names)
    assert not (tmp_path / "lists").exists()
    report, files = make_lists(folder, class_names=names, skip_unknown=True)
    assert kinds(report) == {"class_skipped": 1, "class_not_trained": 1}
    assert report["notes"]["class_not_trained"] == [{"split": "TRAIN", "file": "", "what": "zebra"}]
    assert files["TRAIN_objects"][0]["labels"] == [2, 3] and len(files["TRAIN_objects"][0]["boxes"]) == 2


def test_voc_folders_take_vocs_classes_and_splits(tmp_path):
    voc07 = write_voc(tmp_path / "VOC2007", {"a": [object_xml("cat")]})
    voc12 = write_voc(tmp_path / "VOC2012", {"b": [object_xml("tvmonitor")]})
    create_data_lists(voc07, voc12, tmp_path)
    files = read_lists(tmp_path)
    assert files["label_map"] == make_label_map(voc_labels) and files["TRAIN_objects"][1]["labels"] == [20]
    assert files["TRAIN_images"] == [str(voc07 / "JPEGImages" / "a.jpg"), str(voc12 / "JPEGImages" / "b.jpg")]
    assert files["TEST_images"] == [str(voc07 / "JPEGImages" / "t.jpg")]


def test_folders_may_be_several_relative_and_have_other_splits(tmp_path, monkeypatch):
    for name, split in (("one", {"mine": "b"}), ("two", {"mine": "t", "held_out": "at"})):
        write_voc(tmp_path / name, {"a": [object_xml()], "b": [object_xml()]})
        write_splits(tmp_path / name, **split)
    monkeypatch.chdir(tmp_path)
    options = {"train_split": "mine", "test_split": "held_out", "output_folder": "lists"}
    create_data_lists(train_data=("one", tmp_path / "two"), test_data="two", **options)
    files, train = read_lists(tmp_path / "lists"), ("one/JPEGImages/b.jpg", "two/JPEGImages/t.jpg")
    assert files["TRAIN_images"] == [str(tmp_path / name) for name in train]
    assert files["TEST_images"] == [str(tmp_path / "two/JPEGImages" / name) for name in ("a.jpg", "t.jpg")]


@pytest.mark.parametrize(("objects", "options", "message"), [
    ([], {"test_fraction": 0}, "nothing to learn from"),
    ([object_xml()], {"test_split": "empty"}, r"empty\.txt: has no images"),
    ([object_xml("background"), object_xml()], {}, r"label 0: rename .*'background': 2 objects, first in .*a\.xml"),
    ([object_xml("background")], {}, r"label 0: rename .*'background': 2 objects, first in .*a\.xml"),
    ([object_xml(f"c\x85{i}" + "x" * 99) for i in range(99)], {"class_names": ("dog",)}, "99 unknown.*and .. more"),
    ([object_xml(box=(0.1, 0.1, 0.5, 0.9))], {"first_pixel": 0}, "look like fractions of the image"),
    ([object_xml(box=(90 - i, 70, 5, 5)) for i in range(5)], {}, "10 of 10 boxes are inverted, or lie outside"),
])  # fmt: skip
def test_data_that_are_refused_leave_nothing_behind(tmp_path, objects, options, message):
    folder = write_voc(tmp_path / "mine", {"a": objects, "t": objects})
    write_splits(folder, empty=[])
    with pytest.raises(ValueError, match=f"(?s){message}") as error:
        make_lists(folder, **options)
    assert len(str(error.value)) < 5000 and not (tmp_path / "lists").exists()


def test_missing_data_are_named_and_every_bad_annotation(tmp_path):
    with pytest.raises(ValueError, match="No data"):
        create_data_lists(output_folder=tmp_path)
    folder = write_voc(tmp_path / "mine", {name: [object_xml()] for name in "abc"})
    write(folder / "Annotations" / "a.xml", "<annotation>")
    (folder / "Annotations" / "c.xml").unlink()
    with pytest.raises(ValueError, match=r"(?s)2 of 3 annotations cannot.*a\.xml: unreadable.*c\.xml: no such"):
        make_lists(folder)


def test_every_bad_image_is_listed_unless_images_are_not_checked(tmp_path):
    folder = write_voc(tmp_path / "mine", {name: [object_xml()] for name in "abcdef"})
    photos = folder / "JPEGImages"
    (photos / "a.jpg").unlink()
    (photos / "b.jpg").write_bytes(b"no image")
    (photos / "c.jpg").write_bytes((photos / "t.jpg").read_bytes()[:2000])  # ends in the middle
    (photos / "e.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (photos / "f.jpg").write_bytes(b"P6 1000000 1000000 255\n")  # a decompression bomb
    with pytest.raises(ValueError, match=r"5 of 7 images cannot be used \(--image_folder=FOLDER says") as error:
        make_lists(folder)
    lines = str(error.value).split("\n  ")[1:]
    assert [line.split(": ")[0] for line in lines] == [str(photos / f"{name}.jpg") for name in "abcef"]
    report, _ = make_lists(folder, check_images=False)
    assert report["splits"]["TRAIN"]["images"] == 6 and "Objects of TRAIN by size" in report["overlaps"]
    assert make_lists(folder, check_images=False, report_overlap=0)[0]["overlaps"] == ""


@pytest.mark.parametrize("name", [
    "a.b.jpeg", "a.b.png", "a.b.PNG", "a.b.JPG", "a.b.bmp", "a.b.webp", "my photo 1.jpg", "Zürich 日本 🐕.jpg",
    "a'b\"c&d.jpg", "x.xml.jpg", *["\udcff.jpg"] * (sys.platform == "linux"),  # where file names are bytes
])  # fmt: skip
def test_image_is_found_by_the_annotations_stem_of_any_letters(tmp_path, name):
    stem = Path(name).stem
    folder = write_voc(tmp_path / "my data", {"a": []})
    write_annotation(folder / "Annotations", object_xml(box=(1, 1, 500, 50)), name=stem)
    path = write_image(folder / "JPEGImages" / name)
    # As an editor on Windows writes it: with a byte order mark, carriage returns and blank lines.
    lines = f"\ufeff{stem} \r\n\r\n".encode("utf-8", "surrogateescape")
    (folder / "ImageSets" / "Main" / "trainval.txt").write_bytes(lines)
    assert make_lists(folder)[1]["TRAIN_images"] == [str(path)]
    report = (tmp_path / "lists" / "data_report.txt").read_text(encoding="utf-8")
    assert utils.printable(f"Annotations/{stem}.xml") in report  # its box is clipped


def test_image_in_both_splits_is_reported_and_one_listed_twice_kept_once(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()], "b": [object_xml(box=(1, 1, 9, 9))]}, test=("t", "a"))
    (folder / "JPEGImages" / "b.jpg").unlink()
    (folder / "JPEGImages" / "b.jpg").symlink_to("a.jpg")  # the same photo under another name
    report, files = make_lists(folder)
    assert kinds(report) == {"image_in_both": 1}
    assert report["notes"]["image_in_both"][0]["file"] == str(folder / "Annotations" / "a.xml")
    assert len(files["TRAIN_images"]) == 1 and len(files["TEST_images"]) == 2
    write_splits(folder, trainval="aba", test="t")
    report, files = make_lists(folder)
    assert kinds(report) == {"image_repeated": 1} and len(files["TRAIN_images"]) == 1
    assert files["TRAIN_objects"][0]["boxes"] == [[10, 20, 40, 60], [0, 0, 9, 9]]


def test_size_that_is_missing_or_wrong_comes_from_the_image(tmp_path):
    folder = write_voc(tmp_path / "mine", {name: [] for name in "abcde"})
    for size, check_images, noted in (((0, 0), True, {}), ((0, 0), False, {}), ((640, 480), True, {"size_differs": 1})):
        write_annotation(folder / "Annotations", object_xml(box=(1, 1, 200, 50)), size=size)
        report, files = make_lists(folder, check_images=check_images)
        entry = files["TRAIN_objects"][0]
        assert kinds(report) == {"box_clipped": 1, **noted}
        assert entry["size"] == [100, 80] and entry["boxes"] == [[0, 0, 100, 50]]
    assert report["notes"]["size_differs"][0]["what"] == "annotation (640, 480) image (100, 80)"
    for name in "abcde":
        write_annotation(folder / "Annotations", object_xml(), size=(640, 480), name=name)
    with pytest.raises(ValueError, match="5 of 6 images have another size than their annotations say"):
        make_lists(folder)


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


@pytest.mark.parametrize(("orientation", "stored", "suffix"), [  # stored: how the image is, given the image as shown
    (5, "TRANSPOSE", "jpg"), (6, "ROTATE_90", "jpg"), (7, "TRANSVERSE", "jpg"), (8, "ROTATE_270", "jpg"),
    (6, "ROTATE_90", "tif"), (8, "ROTATE_270", "png"),
])  # fmt: skip
def test_boxes_follow_the_pixels_when_exif_rotates_the_image(tmp_path, orientation, stored, suffix):
    folder = write_voc(tmp_path / "mine", {"a": []})
    shown = Image.new("RGB", (100, 80))
    shown.paste("white", (10, 20, 40, 60))
    image = (folder / "JPEGImages" / "a.jpg").rename(folder / "JPEGImages" / f"a.{suffix}")
    shown.transpose(Image.Transpose[stored]).save(image, quality=100, exif=exif(orientation))
    write_annotation(folder / "Annotations", object_xml(box=(11, 21, 40, 60)), size=(100, 80))
    is_tiff = suffix == "tif"  # Pillow turns it
    report, files = make_lists(folder)
    assert kinds(report) == ({} if is_tiff else {"boxes_turned": 1})
    entry, (_, height, width) = files["TRAIN_objects"][0], read_image(image).shape
    assert entry["size"] == [width, height] == ([100, 80] if is_tiff else [80, 100])
    bright = np.argwhere(read_image(image)[0].numpy() > 127)
    (y_min, x_min), (y_max, x_max) = bright.min(0), bright.max(0) + 1
    assert entry["boxes"] == [[x_min, y_min, x_max, y_max]]
    write_annotation(folder / "Annotations", object_xml(box=(1, 2, 30, 40)), size=(width, height))
    report, files = make_lists(folder)
    assert kinds(report) == {} and files["TRAIN_objects"][0]["boxes"] == [[0, 1, 30, 40]]


def test_exif_mirroring_that_no_size_can_settle_is_reported(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()]})
    write_image(folder / "JPEGImages" / "a.jpg", exif=exif(3))
    report, files = make_lists(folder)
    assert kinds(report) == {"exif_unclear": 1} and files["TRAIN_objects"][0]["boxes"] == [[10, 20, 40, 60]]


def test_full_disk_leaves_the_old_lists_whole(tmp_path, full_disk):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()]})
    make_lists(folder)
    before = read_files(tmp_path / "lists")
    write_voc(folder, {"a": [object_xml("cat")], "b": [object_xml()]})
    full_disk(after=2)
    with pytest.raises(OSError, match=r"label_map\.json.* cannot be written to .*lists: .*No space"):
        make_lists(folder)
    assert read_files(tmp_path / "lists") == before


def test_report_counts_first_and_names_some_files(tmp_path, capsys):
    objects = [object_xml(difficult=""), object_xml("cat\x9b31m", (1, 1, 1, 1))]
    folder = write_voc(tmp_path / "mine", {f"a{i:03}": objects for i in range(125)})
    make_lists(folder, trust_boxes=True)
    printed = capsys.readouterr().out
    layout = "XML files in Annotations, images in JPEGImages, ImageSets/Main, trainval: TRAIN"
    assert printed.startswith(f"{folder}: {layout}")
    assert "TRAIN: 125 images (0 without objects), 125 objects (125 easy, 0 difficult)" in printed
    assert printed.index("      125  Boxes of no area") < printed.index("Objects (of them difficult)")
    assert "a004.xml 1 object\n" in printed and "a005.xml" not in printed and "... and 120 more" in printed
    assert r"cat\x9b31m [1, 1, 1, 1] in 100 x 80" in printed and "\x9b" not in printed
    kept = (tmp_path / "lists" / "data_report.txt").read_text()
    assert "a099.xml" in kept and "a100.xml" not in kept and "all, ssd512_vgg16 (512)" in kept


# --- Splits by chance, COCO's JSON ----------------------------------------------------------------


def test_folder_without_splits_is_divided_by_the_seed(tmp_path):
    folder = write_voc(tmp_path / "mine", {f"{i:02}": [object_xml()] for i in range(19)})
    shutil.rmtree(folder / "ImageSets")
    tests = {}
    for seed in (0, 0, 1):
        report, files = make_lists(folder, test_fraction=0.25, seed=seed)
        assert report["sources"][0].endswith(f"at random: 15 images for TRAIN, 5 images for TEST (seed {seed})")
        train, test = files["TRAIN_images"], files["TEST_images"]
        assert (len(train), len(test), len({*train, *test})) == (15, 5, 20)
        assert test == tests.setdefault(seed, test)
    assert tests[0] != tests[1]
    with pytest.raises(ValueError, match=r"test_fraction 0\.01 of 20 images"):
        make_lists(folder, test_fraction=0.01)


def write_coco(folder, boxes, **changes):
    """A JSON file with so many boxes, in a photo each, of the classes "cup" and "fork" by turns."""
    images = [{"id": 7 + i, "file_name": f"{i}.png", "width": 100, "height": 80} for i in range(len(boxes))]
    annotations = [{"image_id": 7 + i, "category_id": (44, 3)[i % 2], "bbox": box} for i, box in enumerate(boxes)]
    categories = [{"id": 44, "name": "fork"}, {"id": 3, "name": "cup"}]
    for image in images:
        write_image(folder / image["file_name"])
    return write(folder / "a.json", {"images": images, "annotations": annotations, "categories": categories, **changes})


def test_coco_lists_carry_ids_and_areas_and_leave_crowds_out_of_train(tmp_path):
    annotations = [{"image_id": 7, "category_id": 44, "bbox": [0, 0, 100, 80], "area": 55.5},
                   {"image_id": 7, "category_id": 3, "bbox": [10.5, 20, 30, 40], "iscrowd": 1},
                   {"image_id": 7, "category_id": 3, "bbox": [10, 20, 0, 40]},
                   {"image_id": 7, "category_id": 3, "bbox": [50, 20, 1, 1]},
                   {"image_id": 8, "category_id": 3, "bbox": [85, 70, 16, 10], "iscrowd": 0}]  # fmt: skip
    images = [{"id": 7, "file_name": "0.png", "width": 100, "height": 80}, {"id": 8, "file_name": "1.png"}]
    train = write_coco(tmp_path, [[]] * 2, images=images, annotations=annotations)
    test = shutil.copy(train, tmp_path / "test.json")
    report, files = make_lists(train, test_data=test)
    assert files["label_map"] == {"background": 0, "cup": 1, "fork": 2}
    ids = {"cup": 3, "fork": 44}
    assert files["category_ids"] == {"TRAIN": ids, "TEST": ids}
    assert files["TRAIN_images"] == [str(tmp_path / name) for name in ("0.png", "1.png")]
    boxes = [[0, 0, 100, 80], [10.5, 20, 40.5, 60], [50, 20, 51, 21]]
    shared = {"size": [100, 80], "image_id": 7}
    first = {"boxes": boxes, "labels": [2, 1, 1], "difficulties": [0, 1, 0], "areas": [55.5, 1200, 1], **shared}
    second = {"boxes": [[85, 70, 100, 80]], "labels": [1], "difficulties": [0], "areas": [160], **shared, "image_id": 8}
    assert files["TEST_objects"] == [first, second]
    without = {"boxes": boxes[::2], "labels": [2, 1], "difficulties": [0, 0], "areas": [55.5, 1], **shared}
    assert files["TRAIN_objects"] == [without, second]
    found = {"box_no_area": 2, "box_clipped": 2, "image_in_both": 2, "crowd_skipped": 1, "crowd_kept": 1}
    assert kinds(report) == found
    assert make_lists(train, test_data=test, keep_crowds=True)[1]["TRAIN_objects"] == [first, second]
    # Lists of other data have no ids, also in a folder that had some.
    _, files = make_lists(write_voc(tmp_path / "voc", {"a": [object_xml()]}))
    assert files["category_ids"] == {} and "image_id" not in files["TRAIN_objects"][0]


def test_ids_of_two_coco_files_that_clash_are_left_out_of_test(tmp_path):
    one, two, three = (write_coco(tmp_path / name, [[10, 10, 20, 20]] * 2) for name in ("one", "two", "three"))
    report, files = make_lists([one, two], tmp_path / "lists", test_data=three)
    assert kinds(report) == {} and [row["image_id"] for row in files["TEST_objects"]] == [7, 8]
    report, files = make_lists(three, tmp_path / "lists", test_data=[one, two])
    assert kinds(report)["ids_left_out"] == 1 and len(files["TEST_objects"]) == 4
    assert [row.get("image_id") for row in files["TEST_objects"]] == [None] * 4


def test_each_split_has_the_category_ids_of_its_own_files(tmp_path):
    train, val, test = (write_coco(tmp_path / name, [[10, 10, 20, 20]] * 2) for name in ("train", "val", "test"))
    content = json.loads(val.read_text())
    for category in content["categories"]:
        category["id"] = {3: 44, 44: 3}[category["id"]]  # exchanged
    for annotation in content["annotations"]:
        annotation["category_id"] = {3: 44, 44: 3}[annotation["category_id"]]
    # Of two categories with one name, the id of the one that has objects.
    content["categories"].append({"id": 99, "name": "cup"})
    write(val, json.dumps(content))
    _, files = make_lists(train, tmp_path / "lists", val_data=val, test_data=test)
    ids = {"cup": 3, "fork": 44}
    assert files["category_ids"] == {"TRAIN": ids, "VAL": {"cup": 44, "fork": 3}, "TEST": ids}
    # A class that a split's files do not have gets the id that it has in others, if that is not in use.
    content = json.loads(test.read_text())
    content["categories"] = [{"id": 3, "name": "cup"}]
    content["annotations"] = [row for row in content["annotations"] if row["category_id"] == 3]
    write(test, json.dumps(content))
    _, files = make_lists(train, tmp_path / "lists", test_data=test)
    assert files["category_ids"] == {"TRAIN": ids, "TEST": ids}
    _, files = make_lists(train, tmp_path / "lists", test_data=write_voc(tmp_path / "voc", {"a": [object_xml("cup")]}))
    assert files["category_ids"] == {"TRAIN": ids, "TEST": ids}


def test_two_files_on_the_same_photos_are_divided_alike(tmp_path):
    one = write_coco(tmp_path, [[10, 10, 20, 20]] * 10)
    content = json.loads(one.read_text().replace("[10, 10,", "[50, 10,"))
    two = write(tmp_path / "b.json", {**content, "images": content["images"][::-1]})
    alone = make_lists(one, seed=1)[1]
    more = write_coco(tmp_path / "more", [[10, 10, 20, 20]] * 5)
    report, files = make_lists([one, more, two], tmp_path / "lists", seed=1)
    assert "image_in_both" not in kinds(report) and kinds(report)["image_repeated"] == 10
    of_more = make_lists(more, seed=1)[1]
    for split in ("TRAIN", "TEST"):
        assert files[f"{split}_images"] == alone[f"{split}_images"] + of_more[f"{split}_images"]
        n_boxes = [len(row["boxes"]) for row in files[f"{split}_objects"]]
        assert n_boxes == [2] * len(alone[f"{split}_images"]) + [1] * len(of_more[f"{split}_images"])


def test_an_image_that_another_source_names_is_guessed_for_none(tmp_path):
    folder = tmp_path / "images"
    images = [{"id": 7, "file_name": "cam0/0.png"}, {"id": 8, "file_name": "cam0/1.png"}]
    train = write_coco(folder, [[1, 1, 9, 9]] * 2, images=images)
    (folder / "cam0").mkdir()
    for i in range(2):
        (folder / f"{i}.png").rename(folder / "cam0" / f"{i}.png")
    test = write(folder / "test.json", train.read_text().replace("cam0/", "cam1/"))
    assert kinds(make_lists(test, test_fraction=0)[0])["image_guessed"] == 2
    with pytest.raises(ValueError, match=r"(?s)2 of 4 images .*cam1/0\.png: no such image"):
        make_lists(train, test_data=test)
    # Label Studio's names are no contradiction: the objects of both files are put together.
    labels = write(folder / "b.json", train.read_text().replace("cam0/", "upload/1/0a1b2c3d-"))
    _, files = make_lists([train, labels], test_fraction=0, output=tmp_path / "both")
    assert [len(row["boxes"]) for row in files["TRAIN_objects"]] == [1, 1]  # equal ones are one object


@pytest.mark.parametrize(("boxes", "words"), [
    ([[10 * i, 5 * i, 10 * i + 15, 5 * i + 20] for i in range(1, 8)], "look like corners"),
    ([[0.1 * i, 0.1, 0.2, 0.3] for i in range(1, 8)] + [[0, 0, 1, 1]], "look like fractions"),
    # The last one could be corners.
    ([[100 * i, 10, 150, 90] for i in range(1, 8)] + [[10, 10, 50, 60]], "boxes of images of another size"),
])  # fmt: skip
def test_wrong_conventions_are_called_out(tmp_path, boxes, words):
    path = write_coco(tmp_path, boxes)
    with pytest.raises(ValueError, match=rf"a\.json: .*{words}.*--trust_boxes=True"):
        make_lists(path)
    if "another size" not in words:
        make_lists(path, trust_boxes=True, seed=3)
    make_lists(write_coco(tmp_path, [[5 * i, 5 * i, 40, 30] for i in range(8)]))


@pytest.mark.parametrize(("n_sound", "is_refused"), [(15, True), (16, False)])
def test_conventions_are_doubted_for_a_quarter_of_the_boxes_or_images(tmp_path, n_sound, is_refused):
    sound = [[5, 5, 40, 30]] * n_sound
    far_off = write_coco(tmp_path / "boxes", [[100, 10, 150, 90]] * 5 + sound)
    content = json.loads(write_coco(tmp_path / "sizes", sound[:5] + sound).read_text())
    for image in content["images"][:5]:
        image["width"] = 50
    resized = write(tmp_path / "sizes" / "a.json", content)
    for path, words in ((far_off, "5 of 20 boxes are inverted"), (resized, "5 of 20 images have another size")):
        with pytest.raises(ValueError, match=words) if is_refused else contextlib.nullcontext():
            make_lists(path, path.parent / "lists")


def test_corners_are_suspected_for_a_tenth_of_the_boxes(tmp_path):
    sound, beyond = [[5, 5, 40, 30]], [[50, 10, 60, 70]]  # all could be corners
    make_lists(write_coco(tmp_path / "few", beyond * 3 + sound * 28))
    with pytest.raises(ValueError, match="3 of 30 boxes reach beyond their images: they look like corners"):
        make_lists(write_coco(tmp_path / "many", beyond * 3 + sound * 27))


def test_pixels_in_yolo_files_are_called_out(tmp_path):
    labels = [tmp_path / "mine" / "labels" / f"{i}.txt" for i in range(6)]
    for path in labels:
        write_image(tmp_path / "mine" / "images" / f"{path.stem}.jpg")
        write(path, "0 0.999999 0.5 0.000002 1\n0 0.5 0.5 1.000001 0.5")
    write(tmp_path / "mine" / "classes.txt", "dog\n")
    report, files = make_lists(tmp_path / "mine")
    assert files["TRAIN_objects"][0]["boxes"] == [[0, 20, 100, 60]] and kinds(report) == {"box_outside": 6}
    for path in labels:
        write(path, "0 50 40 30 20")
    with pytest.raises(ValueError, match=r"6 of 6 boxes .* look like pixels, not fractions"):
        make_lists(tmp_path / "mine")


def write_yolo_splits(folder, **labels_of):
    """A folder in YOLO's layout with two class names; for each split the classes of its objects, one in an image."""
    write(folder / "data.yaml", "names: [cat, dog]\n")
    for split, labels in labels_of.items():
        for i, label in enumerate(labels):
            write_image(folder / split / "images" / f"{i}.jpg")
            write(folder / split / "labels" / f"{i}.txt", f"{label} 0.5 0.5 0.2 0.4")


def test_a_split_whose_classes_have_no_names_is_refused(tmp_path):
    """Its names may be those of another data set. A few such lines are left out, with a note."""
    write_yolo_splits(tmp_path / "few", train=(0, 1, 1, 7), test=(0, 1))
    assert kinds(make_lists(tmp_path / "few")[0]) == {"class_unnamed": 1}
    write_yolo_splits(tmp_path / "most", train=(0, 1, 1, 0), test=(0, 5, 7))
    message = r"2 of 3 label lines of TEST have no class name.*--skip_unknown=True:\n.*1\.txt: line 1: '5 .*class 5"
    with pytest.raises(ValueError, match=message):
        make_lists(tmp_path / "most")
    assert kinds(make_lists(tmp_path / "most", skip_unknown=True)[0])["class_unnamed"] == 2
    write_yolo_splits(tmp_path / "unused", train=(0, 1), valid=(0, 1), test=(5, 6, 7))
    report, _ = make_lists(tmp_path / "unused")  # valid is TEST
    assert "test: not used" in report["sources"][0] and kinds(report)["class_unnamed"] == 3


# --- Three splits ---------------------------------------------------------------------------------


def stems(files, split):
    """The names of a split's images, without folder and suffix."""
    return [Path(path).stem for path in files[f"{split}_images"]]


def write_three_splits(folder):
    for split, names in {"train": "ab", "valid": "cd", "test": "e"}.items():
        for name in names:
            write_annotation(folder / split, object_xml(difficult=DIFFICULT), name=name)
            write_image(folder / split / f"{name}.jpg")
    return folder


def test_a_validation_split_gets_lists_of_its_own_and_goes_with_it(tmp_path):
    folder = write_three_splits(tmp_path / "mine")
    report, files = make_lists(folder)
    assert [stems(files, split) for split in ("TRAIN", "VAL", "TEST")] == [["a", "b"], ["c", "d"], ["e"]]
    assert files["VAL_objects"] == [
        {"boxes": [[10, 20, 40, 60]], "labels": [1], "difficulties": [1], "size": [100, 80]}
    ] * 2  # fmt: skip
    assert list(report["splits"]) == ["TRAIN", "VAL", "TEST"] and report["splits"]["VAL"]["difficult"] == 2
    assert "train: TRAIN, valid: VAL, test: TEST" in report["sources"][0]
    text = (tmp_path / "lists" / "data_report.txt").read_text()
    assert "VAL: 2 images (0 without objects), 2 objects (0 easy, 2 difficult)" in text
    shutil.rmtree(folder / "test")
    report, files = make_lists(folder)  # into the same folder
    assert stems(files, "TEST") == ["c", "d"] and "VAL_images" not in files and "VAL_objects" not in files
    assert list(report["splits"]) == ["TRAIN", "TEST"] and "valid: TEST" in report["sources"][0]


def test_validation_data_of_their_own(tmp_path):
    folder = write_three_splits(tmp_path / "mine")
    write_annotation(tmp_path / "other", object_xml("cat"), name="x")
    write_image(tmp_path / "other" / "x.jpg")
    report, files = make_lists(folder, val_data=tmp_path / "other")
    assert [stems(files, split) for split in ("TRAIN", "VAL", "TEST")] == [["a", "b"], ["x"], ["e"]]
    assert report["notes"]["class_not_trained"][0]["what"] == "cat"
    _, files = make_lists(folder, test_data=tmp_path / "other")  # valid is left, and becomes VAL
    assert [stems(files, split) for split in ("TRAIN", "VAL", "TEST")] == [["a", "b"], ["c", "d"], ["x"]]
    with pytest.raises(ValueError, match="other: has no splits; name it as val_data, or as test_data"):
        make_lists(folder, val_data=tmp_path / "other", test_data=tmp_path / "other")
    with pytest.raises(ValueError, match=r"valid: is named as train_data and val_data, .*--val_fraction=0\.1"):
        make_lists(folder / "valid", val_data=folder / "valid", test_data=folder / "test")


def test_a_share_of_the_training_images_becomes_the_validation_split(tmp_path):
    folder = write_voc(tmp_path / "mine", {f"{i:02}": [object_xml()] for i in range(19)})
    report, files = make_lists(folder, val_fraction=0.2)
    train, val = stems(files, "TRAIN"), stems(files, "VAL")
    assert (len(train), len(val), stems(files, "TEST")) == (15, 4, ["t"]) and not set(train) & set(val)
    assert train == sorted(train) and val == sorted(val) and report["splits"]["VAL"]["images"] == 4
    assert stems(make_lists(folder, val_fraction=0.2)[1], "VAL") == val
    assert stems(make_lists(folder, val_fraction=0.2, seed=1)[1], "VAL") != val
    for fraction in (0.001, 1.0, 0.99):
        with pytest.raises(ValueError, match=r"val_fraction .* of 19 images leaves a split empty"):
            make_lists(folder, val_fraction=fraction)
    with pytest.raises(ValueError, match="the data have a validation split of 2 images: leave val_fraction at 0"):
        make_lists(write_three_splits(tmp_path / "three"), val_fraction=0.5)
    shutil.rmtree(folder / "ImageSets")  # TEST at random, too: it stays the same
    test = stems(make_lists(folder, test_fraction=0.25)[1], "TEST")
    _, files = make_lists(folder, test_fraction=0.25, val_fraction=0.2)
    assert stems(files, "TEST") == test and [len(stems(files, split)) for split in ("TRAIN", "VAL")] == [12, 3]


def test_images_in_two_splits_and_classes_missing_in_one_are_reported(tmp_path):
    folder = write_three_splits(tmp_path / "mine")
    write_annotation(folder / "train", object_xml("cat"), object_xml(), name="b")
    shutil.copy(folder / "valid" / "c.xml", folder / "test" / "e.xml")
    (folder / "test" / "e.jpg").unlink()
    (folder / "test" / "e.jpg").symlink_to(folder / "valid" / "c.jpg")
    report, _ = make_lists(folder)
    (note,) = report["notes"]["image_in_both"]
    assert note["split"] == "TEST" and note["what"].endswith("is in VAL, too")
    assert [(row["split"], row["what"]) for row in report["notes"]["class_not_tested"]] == [
        ("VAL", "cat"),
        ("TEST", "cat"),
    ]


def test_one_image_can_be_trained_and_tested_on(tmp_path):
    write_image(tmp_path / "one" / "a.jpg")
    write_annotation(tmp_path / "one", object_xml(), name="a")
    with pytest.raises(
        ValueError, match=r"test_fraction 0\.2 of 1 images .*--test_fraction=0 makes TEST the same as TRAIN"
    ):
        make_lists(tmp_path / "one")
    report, files = make_lists(tmp_path / "one", test_fraction=0)
    assert files["TRAIN_images"] == files["TEST_images"] and files["TRAIN_objects"] == files["TEST_objects"]
    assert kinds(report) == {"test_is_train": 1} and "the same for TEST" in report["sources"][0]


# --- Damaged, dark, turned, unused images; paths --------------------------------------------------


def test_train_is_divided_where_validation_and_test_are_empty(tmp_path, capsys):
    folder = tmp_path / "mine"
    write_coco(folder / "train", [[10, 10, 30, 40]] * 10).rename(folder / "train" / "_annotations.coco.json")
    empty = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "cup"}]}
    write(folder / "valid" / "_annotations.coco.json", empty)
    report, files = make_lists(folder)
    assert (len(files["TRAIN_images"]), len(files["TEST_images"])) == (8, 2) and "VAL_images" not in files
    assert kinds(report) == {"split_empty": 2}  # it is neither TEST nor VAL
    line = "train: TRAIN and TEST, valid: not used; divided at random: 8 images for TRAIN, 2 images for TEST (seed 0)"
    assert report["sources"][0].endswith(line) and line[-60:] in capsys.readouterr().out
    text = (tmp_path / "lists" / "data_report.txt").read_text()
    assert line in text and "valid/_annotations.coco.json" in text
    _, files = make_lists(folder, test_fraction=0)
    assert files["TEST_images"] == files["TRAIN_images"] and len(files["TEST_images"]) == 10
    _, files = make_lists(folder, val_fraction=0.25)
    assert [len(files[f"{split}_images"]) for split in ("TRAIN", "VAL", "TEST")] == [6, 2, 2]
    _, files = make_lists(folder, test_fraction=0.3, val_data=folder / "train")
    assert [len(files[f"{split}_images"]) for split in ("TRAIN", "VAL", "TEST")] == [7, 10, 3]
    with pytest.raises(ValueError, match=r"valid/_annotations\.coco\.json: has no images"):
        make_lists(folder / "train", test_data=folder / "valid")


def test_lists_that_are_not_used_are_in_the_report(tmp_path):
    folder = write_voc(tmp_path / "mine", {f"{i}": [object_xml()] for i in range(9)})
    shutil.rmtree(folder / "ImageSets")
    write(folder / "train.txt", "elsewhere/x.jpg\n")
    report, _ = make_lists(folder)
    assert kinds(report) == {"list_unused": 1}
    text = (tmp_path / "lists" / "data_report.txt").read_text()
    assert "Lists of images that were not used" in text and str(folder / "train.txt") in text
    write(folder / "train.txt", "".join(f"{i}\n" for i in range(9)))
    write(folder / "test.txt", "t\n")
    report, files = make_lists(folder)
    assert kinds(report) == {} and stems(files, "TEST") == ["t"] and len(files["TRAIN_images"]) == 9


def test_images_that_are_missing_or_damaged_are_left_out_if_told(tmp_path):
    folder = write_voc(tmp_path / "mine", {name: [object_xml()] for name in "abcd"})
    photos = folder / "JPEGImages"
    (photos / "a.jpg").unlink()
    (photos / "b.jpg").write_bytes((photos / "c.jpg").read_bytes()[:2000])
    (photos / "c.jpg").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 99)  # a HEIC file, whatever its name
    with pytest.raises(ValueError, match=r"(?s)3 of 5 images .*--skip_corrupt=True.*a\.jpg: no such.*c\.jpg.*HEIC"):
        make_lists(folder)
    report, files = make_lists(folder, skip_corrupt=True)
    assert stems(files, "TRAIN") == ["d"] and len(files["TRAIN_objects"]) == 1
    assert kinds(report) == {"image_corrupt": 3}
    assert ["no such image" in row["what"] for row in report["notes"]["image_corrupt"]] == [True, False, False]
    (photos / "t.jpg").unlink()
    with pytest.raises(ValueError, match="all images of TEST are missing or damaged"):
        make_lists(folder, skip_corrupt=True)
    (photos / "d.jpg").unlink()
    with pytest.raises(ValueError, match="5 of 5 images cannot be used"):
        make_lists(folder, skip_corrupt=True)


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_images_with_few_of_16_bits_are_reported(tmp_path, bits):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()]})
    (folder / "JPEGImages" / "a.jpg").unlink()
    pixels = np.linspace(0, 2**bits - 1, 8000).astype(np.uint16).reshape(80, 100)
    Image.fromarray(pixels).save(folder / "JPEGImages" / "a.png")
    report, _ = make_lists(folder)
    assert kinds(report) == ({} if bits == 16 else {"image_dark": 1})
    assert bits == 16 or "16-bit" in report["notes"]["image_dark"][0]["what"]


@pytest.mark.parametrize(("orientation", "stored"), [  # stored: how the image is, given the image as shown
    (1, None), (2, "FLIP_LEFT_RIGHT"), (3, "ROTATE_180"), (4, "FLIP_TOP_BOTTOM"), (5, "TRANSPOSE"), (6, "ROTATE_90"),
    (7, "TRANSVERSE"), (8, "ROTATE_270"),
])  # fmt: skip
@pytest.mark.parametrize("form", ["xml", "txt"])
def test_a_parameter_says_on_which_pixels_boxes_were_drawn(tmp_path, orientation, stored, form):
    shown = Image.new("RGB", (100, 80))
    shown.paste("white", (10, 20, 40, 60))
    image = shown.transpose(Image.Transpose[stored]) if stored else shown
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in "ab":
        image.save(folder / f"{name}.jpg", quality=100, exif=exif(orientation))
        if form == "xml":
            write_annotation(folder, object_xml(box=(11, 21, 40, 60)), size=None, name=name)
        else:
            write(folder / f"{name}.txt", "0 0.25 0.5 0.3 0.5")
            write(folder / "classes.txt", "dog")
    options = {"test_fraction": 0.5, "trust_boxes": True}
    report, files = make_lists(folder, boxes_drawn_on="upright", **options)
    bright = np.argwhere(read_image(folder / "a.jpg")[0].numpy() > 127)
    (y_min, x_min), (y_max, x_max) = bright.min(0), bright.max(0) + 1
    assert files["TRAIN_objects"][0]["boxes"] == [pytest.approx([x_min, y_min, x_max, y_max])]
    assert kinds(report) == ({"boxes_turned": 2} if orientation > 1 else {})
    as_written = [10, 20, 40, 60]
    if form == "txt":
        width, height = image.size
        as_written = [0.1 * width, 0.25 * height, 0.4 * width, 0.75 * height]
    report, files = make_lists(folder, boxes_drawn_on="stored", **options)
    assert files["TRAIN_objects"][0]["boxes"] == [pytest.approx(as_written)] and kinds(report) == {}
    report, files = make_lists(folder, **options)
    assert files["TRAIN_objects"][0]["boxes"] == [pytest.approx(as_written)]
    assert kinds(report) == ({"exif_unclear": 2} if orientation > 1 else {})
    with pytest.raises(ValueError, match="boxes_drawn_on is 'me'"):
        make_lists(folder, boxes_drawn_on="me")
    if form == "xml":  # with the size in the annotation, and images that are not checked
        for name in "ab":
            write_annotation(folder, object_xml(box=(11, 21, 40, 60)), size=image.size, name=name)
        _, files = make_lists(folder, boxes_drawn_on="upright", check_images=False, **options)
        assert files["TRAIN_objects"][0]["boxes"] == [pytest.approx([x_min, y_min, x_max, y_max])]


def test_images_that_nothing_names_are_reported(tmp_path):
    folder = write_voc(tmp_path / "mine", {"a": [object_xml()], "b": [object_xml()]})
    for name in ("c.jpg", "a.png", "deep/d.jpg", "._a.jpg", "notes.txt"):
        write_image(folder / "JPEGImages" / f"{name}.jpg").rename(folder / "JPEGImages" / name)
    write_splits(folder, trainval=["a"])
    report, _ = make_lists(folder)
    names = sorted(Path(row["file"]).name for row in report["notes"]["image_unused"])
    assert names == ["a.png", "b.jpg", "c.jpg", "d.jpg"]
    images = [{"id": 7, "file_name": "0.png"}, {"id": 8, "file_name": "1.png"}]
    path = write_coco(tmp_path / "coco", [[1, 1, 9, 9]] * 3, images=images)
    report, _ = make_lists(path, test_fraction=0.5)
    assert [Path(row["file"]).name for row in report["notes"]["image_unused"]] == ["2.png"]


def test_several_sources_in_one_text_and_odd_letters_in_paths(tmp_path, monkeypatch):
    for name in ("one [1]", "two, 2", "three*"):
        write_voc(tmp_path / name, {"a": [object_xml()]})
    monkeypatch.chdir(tmp_path)
    for data, count in (("one [1]", 1), ("two, 2", 1), ("one [1],three*", 2), (" one [1] , three* ,", 2)):
        _, files = make_lists(data, tmp_path / "lists")
        assert len(files["TRAIN_images"]) == count, data
    _, files = make_lists("one [1],three*", tmp_path / "lists", test_data="two, 2")
    assert files["TEST_images"] == [str(tmp_path / "two, 2" / "JPEGImages" / "t.jpg")]


def test_data_without_objects_say_what_was_left_out(tmp_path):
    crowds = [{"image_id": 7 + i, "category_id": 3, "bbox": [1, 1, 30, 40], "iscrowd": 1} for i in range(4)]
    path = write_coco(tmp_path, [[]] * 4, annotations=crowds)
    with pytest.raises(ValueError, match=r"(?s)no object.*nothing to learn from.*3 x Crowds.*keep_crowds"):
        make_lists(path)
    crowds[0] |= {"category_id": 9}
    write(path, json.loads(path.read_text()) | {"annotations": crowds[:1] + [{**crowds[1], "iscrowd": 0}]})
    assert kinds(make_lists(path)[0])["entry_unusable"] == 1


# --- Real data ------------------------------------------------------------------------------------


def test_voc_counts(real_data, tmp_path):
    with tempfile.TemporaryDirectory() as folder, tarfile.open(real_data / "voc_annotations.tar.xz") as archive:
        archive.extractall(folder)  # pytest would keep the 27,088 files
        voc07, voc12 = (Path(folder) / "VOCdevkit" / year for year in ("VOC2007", "VOC2012"))
        report = create_data_lists(voc07, voc12, tmp_path / "lists", check_images=False)
    train, test = report["splits"]["TRAIN"], report["splits"]["TEST"]
    assert [train[key] for key in ("images", "objects", "easy")] == [16_551, 47_223, 40_058]
    assert [test[key] for key in ("images", "objects", "easy")] == [4_952, 14_976, 12_032]
    assert report["label_map"] == make_label_map(voc_labels) and kinds(report) == {}
    objects = read_lists(tmp_path / "lists")["TRAIN_objects"]
    assert len(objects) == 16_551 and sum(len(row["labels"]) for row in objects) == 47_223


@pytest.mark.parametrize(("name", "n_classes", "n_images", "found", "files"), [
    ("bccd", 3, (292, 72), {"box_no_area": 2}, ["BloodImage_00338.xml", "BloodImage_00343.xml"]),
    ("indoor", 30, (63, 22), {"box_clipped": 5, "difficult_missing": 85},
     ["000005.xml", "000005.xml", "000017.xml", "000017.xml", "000018.xml"]),
])  # fmt: skip
def test_real_data_of_ones_own(real_data, tmp_path, name, n_classes, n_images, found, files):
    report, lists = make_lists(real_data / name, tmp_path / "lists")
    assert len(lists["label_map"]) == 1 + n_classes and kinds(report) == found
    assert (len(lists["TRAIN_images"]), len(lists["TEST_images"])) == n_images
    assert sorted(Path(note["file"]).name for note in report["notes"][next(iter(found))]) == files
    assert "pixels counted from 1" in report["sources"][0]


def test_voc_photos_are_in_both_splits(real_data, tmp_path):
    photos = real_data / "voc_photos"
    report = create_data_lists(photos / "VOC2007", photos / "VOC2012", tmp_path)
    assert [report["splits"][split]["images"] for split in ("TRAIN", "TEST")] == [20, 16]
    assert kinds(report) == {"image_in_both": 16, "class_not_trained": 6}


# --- The script -----------------------------------------------------------------------------------


def test_script_on_data_of_ones_own_from_any_working_directory(tmp_path):
    write_voc(tmp_path / "my data", {"a": [object_xml("dog")], "b": [object_xml("cat")]})
    names = {"train_data": "my data", "output_folder": "out put", "class_names": ("dog", "cat")}
    printed = run_script(script("create_data_lists.py", **names), tmp_path)
    assert "TRAIN: 2 images" in printed and "contact_sheet.jpg: 2 images" in printed
    assert load_label_map(tmp_path / "out put") == {"background": 0, "dog": 1, "cat": 2}


def test_script_says_what_to_do_without_voc(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    advice = r"(?s)VOC2007: no such folder.*--download=True.*--voc07_path.*--train_data"
    with pytest.raises(FileNotFoundError, match=advice):
        module.main()
    assert not list(tmp_path.iterdir())


def test_script_downloads_what_is_missing_only(tmp_path, monkeypatch):
    voc07 = write_voc(tmp_path / "VOCdevkit" / "VOC2007", {"a": [object_xml()]})
    (voc07 / "JPEGImages" / "t.jpg").unlink()  # as after an unpacking that was cut off
    fetch = Mock(side_effect=[None, None, RuntimeError("no network")])
    monkeypatch.setattr(module, "VOCDetection", fetch)
    voc12 = str(voc07.with_name("VOC2012"))
    module.prepare_voc(str(voc07), voc12, download=True)
    wanted = ("2007", "test"), ("2012", "trainval")
    assert fetch.mock_calls == [call(f"{tmp_path}/", year=y, image_set=split, download=True) for y, split in wanted]
    with pytest.raises(OSError, match="could not download VOC2007 test: no network"):
        module.prepare_voc(str(voc07), voc12, download=True)
    with pytest.raises(ValueError, match=r"must end in VOCdevkit.VOC2007"):
        module.prepare_voc(str(tmp_path / "voc"), voc12, download=True)


# --- A look at the data: the table of overlaps, the contact sheet ---------------------------------


def test_the_table_of_overlaps_counts_by_class_and_size():
    def record(size, *rows):
        return Record("a.jpg", "a.xml", "", "VOC", [Annotated(name, box) for name, box in rows], size=size)

    # In a 100 x 200 image: the prior of conv11_2, 0.9 of both sides; as wide, but flatter than any prior; a tiny one.
    wide = record((100, 200), ("cat", (5, 10, 95, 190)), ("cat", (5, 95, 95, 105)), ("dog", (0, 0, 4, 8)))
    table = module.overlap_table({"background": 0, "cat": 1, "dog": 2}, (wide, record((50, 50))), 0.5)
    rows = {re.split(r"\s{2,}", line.strip())[0]: line[38:].split() for line in table.splitlines()[2:]}
    assert rows["0-16"] == ["0-16", "16-32", "32-64", "64-128", "128-300", "all"]
    assert rows["cat"] == ["-", "-", "1", "0%", "-", "1", "100%", "2", "50%"]
    assert rows["dog"] == ["1", "0%", "-", "-", "-", "-", "1", "0%"]
    assert rows["all, ssd300_vgg16 (300)"] == ["1", "0%", "-", "1", "0%", "-", "1", "100%", "3", "33%"]
    assert "all, ssd512_vgg16 (512)" in rows and "all, ssd300_tiny (300)" not in rows


@pytest.mark.parametrize("network", ["ssd300_vgg16", "ssd512_vgg16", "ssdlite320_mobilenet_v3_large"])
def test_best_overlaps_are_those_of_the_full_table(network):
    corners, sides = torch.rand(2, 300, 2, generator=torch.Generator().manual_seed(0))
    boxes = torch.cat([corners, corners + 0.01 + sides**3], dim=1).clamp(max=1.01)
    priors = SSD300.create_prior_boxes(network)
    expected = utils.find_jaccard_overlap(boxes, utils.cxcy_to_xy(priors)).max(dim=1).values
    assert torch.allclose(module.best_overlaps(boxes, priors, NETWORKS[network].sources), expected, atol=1e-6)


def test_the_contact_sheet_shows_images_with_their_boxes(tmp_path, capsys):
    folder = write_voc(tmp_path / "data", {f"a{i}": [object_xml(box=(31, 41, 60, 70))] for i in range(3)})
    for path in (folder / "JPEGImages").iterdir():
        Image.new("RGB", (100, 80)).save(path)
    make_lists(folder)
    module.draw_contact_sheet(tmp_path / "lists", n_images=24, seed=0)
    assert "contact_sheet.jpg: 3 images of TRAIN" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "lists" / "contact_sheet.jpg").convert("RGB")).astype(int)
    assert sheet.shape == (240, 960, 3)
    # A 100 x 80 image becomes 290 x 232, 4 pixels from the edge: x = 30 lies at 4 + 87, y = 40 at 4 + 116.
    color = np.array(ImageColor.getrgb(utils.class_colors({"background": 0, "dog": 1})["dog"]))
    for first in (0, 320, 640):
        for x, y in ((91, 180), (177, 180), (140, 206)):  # left, right and lower edge of the box
            near = sheet[y - 2 : y + 3, first + x - 2 : first + x + 3]
            assert np.abs(near - color).sum(axis=2).min() < 120, (first, x, y)
