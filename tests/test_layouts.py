"""annotations.py: where the files of a data set are, and images found by the names that others give them."""

import os
from pathlib import Path

import pytest
from helpers import object_xml, write, write_annotation, write_image
from test_annotations import BOX, WANTED, coco, read, write_coco, write_xml_layout, write_yolo_layout

from annotations import Files, fits_keypoints, read_annotations, yolo_box

# --- Names of images ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "file"), [
    ("cam0/a.jpg", "cam0/a.jpg"), (r"cam0\a.jpg", "cam0/a.jpg"), (r"C:\data\cam0\a.jpg", "cam0/a.jpg"),
    ("/home/me/photos/cam1/a.jpg", "cam1/a.jpg"), ("./cam1/./a.jpg", "cam1/a.jpg"), ("cam0/a", "cam0/a.jpg"),
    ("cam0/a.bmp", "cam0/a.jpg"), ("my%20photo%20%281%29.jpg", "my photo (1).jpg"), ("50%25 off.png", "50% off.png"),
    ("data/local-files/?d=cam0%2Fa.jpg", "cam0/a.jpg"), ("upload/3/B.JPG", "b.jpg"), ("b", "b.jpg"),
    ("version.1", "version.1.png"), ("x/version.1.jpg", "version.1.png"), ("caf\u00e9.png", "cafe\u0301.png"),
    ("cafe\u0301.png", "cafe\u0301.png"), ("[1] x.png", "[1] x.png"), ("20%.png", "20%.png"), ("a.jpg", None),
    ("elsewhere/a.jpg", None), ("", None), (".", None), ("cam2/c.jpg", None), ("two", None), ("two.jpg", "two.jpg"),
])  # fmt: skip
def test_files_are_found_by_names_from_other_machines(tmp_path, name, file):
    for path in ("cam0/a.jpg", "cam1/a.jpg", "my photo (1).jpg", "50% off.png", "b.jpg", "version.1.png", "two.png",
                 "cafe\u0301.png", "[1] x.png", "20%.png", "two.jpg", "cam0/._c.jpg", ".trash/c.jpg"):  # fmt: skip
        write(tmp_path / path, "")
    files = Files(str(tmp_path), (".jpg", ".png", ".bmp"))
    assert (files.find(name) or files.guess(name)) == file


def test_links_in_a_circle_end(tmp_path):
    write(tmp_path / "a" / "x.jpg", "")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert Files(str(tmp_path), (".jpg",)).paths == ["a/x.jpg"]


def test_one_image_that_two_names_claim_is_guessed_for_neither(tmp_path):
    images = [{"id": i, "file_name": f"{folder}/a.jpg"} for i, folder in ((7, "day1"), (8, "day2"))]
    path = write_coco(tmp_path, coco(images=images))
    notes = {}
    assert [os.path.isfile(record.image) for record in read(path, notes)] == [False, False]
    assert "image_guessed" not in notes
    (only,) = read(write_coco(tmp_path, coco(images=images[:1])), notes)
    assert only.image == str(tmp_path / "images" / "a.jpg") and len(notes["image_guessed"]) == 1
    # The photo itself goes before the guess.
    images[1]["file_name"] = "images/a.jpg"
    records = read(write_coco(tmp_path, coco(images=images)))
    assert [os.path.isfile(record.image) for record in records] == [False, True]


@pytest.mark.parametrize(("filename", "image"), [
    ("a.png", "a.png"), ("photos/a.png", "a.png"), ("C:\\p\\a.png", "a.png"), ("a.jpg", "a.jpg"),
    ("other.png", "a.jpg"), ("", "a.jpg"),
])  # fmt: skip
def test_of_two_images_of_one_name_filename_decides(tmp_path, filename, image):
    for name in ("a.png", "a.jpg"):
        write_image(tmp_path / "images" / name)
    write_annotation(tmp_path / "Annotations", f"<filename>{filename}</filename>", object_xml())
    (record,) = read(tmp_path)
    assert os.path.basename(record.image) == image


def test_an_xml_file_of_another_name_has_the_image_that_filename_says(tmp_path):
    for name in ("one", "two"):
        write_image(tmp_path / "images" / f"{name}.png")
    write_annotation(tmp_path / "Annotations", "<filename>C:\\p\\two.png</filename>", object_xml("cat"), name="000")
    write_annotation(tmp_path / "Annotations", "<filename>two.png</filename>", object_xml("dog"), name="one")
    one, two = sorted(read(tmp_path, notes := {}), key=lambda record: record.image)
    assert [row.name for row in one.objects] == ["dog"] and [row.name for row in two.objects] == ["cat"]
    assert len(notes["image_guessed"]) == 1 and "000.xml" in notes["image_guessed"][0]["file"]
    # Two XML files that name one image: it belongs to neither.
    write_annotation(tmp_path / "Annotations", "<filename>two.png</filename>", object_xml("cow"), name="001")
    assert sum(os.path.isfile(record.image) for record in read(tmp_path)) == 1


def test_a_list_names_annotations_that_are_elsewhere(tmp_path):
    for cam in ("cam0", "cam1"):
        write_annotation(tmp_path / "Annotations" / cam, object_xml(cam), name=f"{cam}_1")
        write_image(tmp_path / "images" / cam / f"{cam}_1.jpg")
    path = write(tmp_path / "ImageSets" / "Main" / "all.txt", "cam0/cam0_1.jpg\nJPEGImages/cam1_1.jpg\n")
    records = read(tmp_path, notes := {})
    assert [record.objects[0].name for record in records] == ["cam0", "cam1"]
    assert [(row["file"], row["what"]) for row in notes["entry_guessed"]] == [
        (str(path), "JPEGImages/cam1_1.jpg: cam1/cam1_1.xml taken")
    ]


@pytest.mark.parametrize("inner", ["ImageSets/Main/test.txt", "test/x.txt", "set/Valid/x.txt"])
def test_a_folder_of_divided_data_sets_is_not_read_as_one(tmp_path, inner):
    write_xml_layout(tmp_path / "set", "", "")
    assert len(read(tmp_path)) == 2
    write(tmp_path / "set" / inner, "")
    with pytest.raises(ValueError, match="layout is not recognised"):
        read(tmp_path)


# --- Layouts of COCO and YOLO ---------------------------------------------------------------------


def write_instances(folder, file, images):
    write_image(folder / images / "a.jpg")
    return write(folder / file, coco())


def splits_of(source, wanted=("TRAIN", "VAL", "TEST"), **names):
    """The splits of a source: {split: stems of its images}."""
    names = {"TRAIN": "trainval", "VAL": "val", "TEST": "test", **names}
    records = read_annotations(str(source), {split: names[split] for split in wanted}, {})[1]
    return {split: sorted(Path(record.image).stem for record in rows) for split, rows in records.items()}


def test_cocos_own_folder(tmp_path):
    for split in ("train2017", "val2017"):
        write_instances(tmp_path, f"annotations/instances_{split}.json", split)
        for kind in ("captions", "person_keypoints"):
            write(tmp_path / "annotations" / f"{kind}_{split}.json", coco(annotations=[]))
    write(tmp_path / "annotations" / "image_info_test2017.json", {"images": []})
    description, records = read_annotations(str(tmp_path), WANTED, {})
    assert "train: TRAIN, val: TEST" in description
    folders = {split: Path(rows[0].image).parent.name for split, rows in records.items()}
    assert folders == {"TRAIN": "train2017", "TEST": "val2017"}


@pytest.mark.parametrize(("file", "images"), [
    ("annotations/instances_default.json", "images/default"), ("annotations/instances_Train.json", "images/Train"),
    ("labels.json", "data"), ("all.json", "."), ("Annotations/x.json", "images"), ("result.json", "images/deep/er"),
])  # fmt: skip
def test_folders_with_one_coco_file(tmp_path, file, images):
    write_instances(tmp_path, file, images)
    write(tmp_path / "notes.json", {"categories": []})
    for source in (tmp_path, tmp_path / file):
        assert read(source)[0].image == os.path.normpath(tmp_path / images / "a.jpg")


def write_yolo(folder, *paths):
    """Images, with a label file each by YOLO's rule."""
    for path in paths:
        write_image(folder / f"{path}.jpg")
        write(folder / f"{path}.txt".replace("images", "labels"), f"0 {BOX}")
    return folder


@pytest.mark.parametrize(("yaml", "splits"), [
    ("train: images/a\nval: images/b", {"TRAIN": "1", "TEST": "2"}),
    ("path: {root}\ntrain: images/a\nval: images/b\ntest: images/c", {"TRAIN": "1", "TEST": "3", "VAL": "2"}),
    ("path: set\ntrain: [images/a, images/c]\nval: images/b", {"TRAIN": "13", "TEST": "2"}),
    ("train: ../images/a\nval: ../images/b", {"TRAIN": "1", "TEST": "2"}),
    ("train: train.txt\nval: val.txt", {"TRAIN": "12", "TEST": "3"}),
    ("train: [images/a, val.txt]\nval: images/b", {"TRAIN": "13", "TEST": "2"}),
    ("train: .\\\\images\\\\a\nvalid: images/b\ntest: gone", {"TRAIN": "1", "TEST": "2"}),
    ("train: images\nval: images", {"": "123"}),
    ("train: images\nval: images\ntest: images/c", {"TRAIN": "123", "TEST": "3"}),
    ("train: /gone/train\nval: /gone/val", {"": "123"}), ("path: /gone\ntrain: images/a\nval:", {"": "1"}),
])  # fmt: skip
def test_data_yaml_says_where_the_images_are(tmp_path, yaml, splits):
    root = write_yolo(tmp_path / "set", "images/a/1", "images/b/2", "images/c/3")
    write(root / "train.txt", "./images/a/1.jpg\nC:\\\\old\\\\set\\\\images\\\\b\\\\2.jpg")
    write(root / "val.txt", f"{root}/images/c/3.jpg\n")
    file = write(root / "mine.yaml", "names: [cat]\n" + yaml.format(root=root))
    for source in (root, file) if "gone/" not in yaml else (root,):
        assert {split: "".join(stems) for split, stems in splits_of(source).items()} == splits
        records = read_annotations(str(source), WANTED, {})[1]
        assert all(len(record.objects) == 1 for rows in records.values() for record in rows)


def test_a_yaml_file_that_names_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"x\.yaml: train, val and test name no images"):
        read(write(tmp_path / "x.yaml", "names: [cat]\ntrain: gone"))


@pytest.mark.parametrize(("paths", "splits"), [
    (("TRAIN/images/1", "Valid/images/2"), {"TRAIN": "1", "TEST": "2"}),
    (("Train/images/1", "VAL/images/2", "Test/images/3"), {"TRAIN": "1", "TEST": "3", "VAL": "2"}),
    (("images/train2017/1", "images/val2017/2"), {"TRAIN": "1", "TEST": "2"}),
    (("train/images/day/1", "validation/images/2"), {"TRAIN": "1", "TEST": "2"}),
    (("obj_Train_data/1", "obj_Validation_data/2"), {"TRAIN": "1", "TEST": "2"}),
    (("images/1", "images/day/2", "images/night/deep/3"), {"": "123"}), (("1", "day/2"), {"": "12"}),
    (("train/1", "test/2"), {"TRAIN": "1", "TEST": "2"}),
])  # fmt: skip
def test_folders_of_yolo_files(tmp_path, paths, splits):
    write(write_yolo(tmp_path, *paths) / "obj.names", "cat\n")
    assert {split: "".join(stems) for split, stems in splits_of(tmp_path).items()} == splits


def test_yolo_files_go_before_a_coco_file_of_the_same_images(tmp_path):
    write(write_yolo(tmp_path, "images/train/1", "images/val/2") / "classes.txt", "cat\n")
    write(tmp_path / "annotations" / "instances_val2017.json", coco())
    assert splits_of(tmp_path) == {"TRAIN": ["1"], "TEST": ["2"]}


def test_hidden_files_are_ignored_everywhere(tmp_path):
    write_xml_layout(tmp_path / "xml", "Annotations", "JPEGImages")
    write_yolo_layout(tmp_path / "yolo", "labels", "images")
    in_xml = ("Annotations/._a.xml", "__MACOSX/Annotations/._a.xml", "ImageSets/Main/._train.txt")
    in_yolo = ("labels/._a.txt", ".git/labels/a.txt", "._data.yaml", "images/._a.jpg")
    for path in [tmp_path / "xml" / name for name in in_xml] + [tmp_path / "yolo" / name for name in in_yolo]:
        write(path, "\0\5\26\7")
    for name in ("xml", "yolo"):
        assert len(read(tmp_path / name, notes := {})) == 2 and notes == {}


# --- Three splits ---------------------------------------------------------------------------------


def write_lists(folder, *names):
    for name in names:
        write_annotation(folder / "Annotations", object_xml(), name=name)
        write_image(folder / "JPEGImages" / f"{name}.jpg")
        write(folder / "ImageSets" / "Main" / f"{name}.txt", name)
    return folder


@pytest.mark.parametrize(("lists", "names", "splits"), [
    (("train", "val", "test"), {}, {"TRAIN": "train", "VAL": "val", "TEST": "test"}),
    (("train", "valid", "test"), {}, {"TRAIN": "train", "VAL": "valid", "TEST": "test"}),
    (("trainval", "train", "val", "test"), {}, {"TRAIN": "trainval", "TEST": "test"}),  # VOC's own protocol
    (("trainval", "train", "val", "test"), {"TRAIN": "train"}, {"TRAIN": "train", "VAL": "val", "TEST": "test"}),
    (("trainval", "mine", "test"), {"VAL": "mine"}, {"TRAIN": "trainval", "VAL": "mine", "TEST": "test"}),
    (("train", "val"), {}, {"TRAIN": "train", "TEST": "val"}),
    (("train", "val", "valid"), {}, {"TRAIN": "train", "VAL": "val", "TEST": "valid"}),
    (("Train", "Val", "Test"), {}, {"TRAIN": "Train", "VAL": "Val", "TEST": "Test"}),
])  # fmt: skip
def test_three_splits_of_lists(tmp_path, lists, names, splits):
    found = splits_of(write_lists(tmp_path, *lists), **names)
    assert found == {split: [name] for split, name in splits.items()}


def test_a_validation_split_that_was_asked_for_by_name_must_be_there(tmp_path):
    write_lists(tmp_path, "train", "test")
    assert splits_of(tmp_path) == {"TRAIN": ["train"], "TEST": ["test"]}
    with pytest.raises(FileNotFoundError, match=r"has no split 'mine'.*val_split"):
        splits_of(tmp_path, VAL="mine")
    with pytest.raises(FileNotFoundError, match="has no split 'val'"):
        splits_of(tmp_path, wanted=["VAL"])


def test_an_empty_test_split_falls_back_with_a_note(tmp_path):
    write_lists(tmp_path, "train", "val", "test")
    write(tmp_path / "ImageSets" / "Main" / "test.txt", "\n")
    wanted = {"TRAIN": "trainval", "VAL": "val", "TEST": "test"}
    description, records = read_annotations(str(tmp_path), wanted, notes := {})
    assert records.keys() == {"TRAIN", "TEST"} and "val: TEST" in description
    assert [(row["split"], Path(row["file"]).name) for row in notes["split_empty"]] == [("TEST", "test.txt")]


# --- What a review found --------------------------------------------------------------------------


@pytest.mark.parametrize("numbers, box", [
    ("0.5 0.5 0.4 0.2 3", (0.3, 0.4, 0.7, 0.6)),  # box and track
    ("0.5 0.5 0.4 0.2 1", (0.3, 0.4, 0.7, 0.6)),
])  # fmt: skip
def test_five_numbers_are_a_box_and_a_track_or_a_confidence(numbers, box):
    found, note = yolo_box([float(number) for number in numbers.split()], 0, has_outlines=False)
    assert found == pytest.approx(box) and "the box taken" in note


@pytest.mark.parametrize("extra", [[0.8], [0.8, 7.0]])
def test_outlines_with_a_confidence_and_a_track(extra):
    outline = [0.1, 0.2, 0.5, 0.2, 0.5, 0.6, 0.1, 0.6]
    found, _ = yolo_box([*outline, *extra], 0, has_outlines=True)
    assert found == pytest.approx((0.1, 0.2, 0.5, 0.6))


def test_keypoints_with_confidences_are_not_taken_for_outlines():
    row = [0.5, 0.5, 0.4, 0.4, 0.4, 0.4, 0.91, 0.6, 0.6, 0.37]
    assert fits_keypoints(row, 3) and not fits_keypoints([*row[:-1], 1.4], 3)


@pytest.mark.parametrize("name", ["1a2b3c4d-a.jpg", "https://x.org/b/a.jpg?X-Amz-Date=20260101"])
def test_names_of_label_studio_and_of_clouds(tmp_path, name):
    write_image(tmp_path / "a.jpg")
    assert Path(Files(tmp_path, (".jpg",)).guess(name)).name == "a.jpg"
