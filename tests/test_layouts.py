"""annotations.py: where the files of a data set are, and images found by the names that others give them."""

import os
from pathlib import Path

import pytest
from helpers import object_xml, write, write_annotation, write_image
from test_annotations import BOX, DOG, WANTED, coco, read, write_coco, write_xml_layout, write_yolo_layout

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


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write_yolo_layout(tmp_path, "labels", "images")
    (tmp_path / "images" / "inner").mkdir()
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "inner":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="inner"):
        read(tmp_path)
    for name in ("nowhere", "x" * 999):
        assert Files(str(tmp_path / name), (".jpg",)).paths == []


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


def test_coco_files_beside_instances_that_are_not_used_are_noted(tmp_path):
    for split in ("train", "val"):
        write_instances(tmp_path, f"annotations/instances_{split}.json", split)
    for name in ("test", "captions_val", "person_keypoints_val", "stuff_val", "panoptic_val", "image_info_test"):
        write(tmp_path / "annotations" / f"{name}.json", coco())
    read_annotations(str(tmp_path), WANTED, notes := {})
    assert [Path(row["file"]).name for row in notes["list_unused"]] == ["test.json"]


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
    ("train: /gone/train\nval: /gone/val", {"TRAIN": "12", "TEST": "3"}),
    ("path: /gone\ntrain: images/a\nval:", {"": "1"}),
])  # fmt: skip
def test_data_yaml_says_where_the_images_are(tmp_path, yaml, splits):
    root = write_yolo(tmp_path / "set", "images/a/1", "images/b/2", "images/c/3")
    write(root / "train.txt", "./images/a/1.jpg\nC:\\\\old\\\\set\\\\images\\\\b\\\\2.jpg")
    write(root / "val.txt", f"{root}/images/c/3.jpg\n")
    file = write(root / "mine.yaml", "names: [cat]\n" + yaml.format(root=root))
    for source in (root, file):
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


def test_all_of_a_split_folder_is_read(tmp_path):
    for split, image in (("train", "a"), ("valid", "b")):
        write_yolo(tmp_path / "yolo" / split, f"images/train/{image}1", f"images/val/{image}2")
        write_image(tmp_path / "coco" / split / f"{image}.jpg")
        for number, kind in ((3, "cats"), (4, "dogs")):
            categories = [{"id": number, "name": kind}]
            images = [{"id": 7, "file_name": f"{image}.jpg"}]
            file = tmp_path / "coco" / split / f"{kind}.json"
            write(file, coco(categories=categories, images=images, annotations=[{**DOG, "category_id": number}]))
    write(tmp_path / "yolo" / "classes.txt", "cat")
    assert splits_of(tmp_path / "yolo") == {"TRAIN": ["a1", "a2"], "TEST": ["b1", "b2"]}
    words, records = read_annotations(str(tmp_path / "coco"), WANTED, {})
    assert "(cats.json, dogs.json)" in words
    names = {split: [row.name for record in rows for row in record.objects] for split, rows in records.items()}
    assert names == {"TRAIN": ["cats", "dogs"], "TEST": ["cats", "dogs"]}


@pytest.mark.parametrize("paths", [
    ("images/train/{}", "images/val/{}"), ("labels/train/{}", "labels/val/{}"),  # these without images beside them
    ("train/labels/{}", "valid/labels/{}"),
])  # fmt: skip
def test_yolo_files_whose_images_are_all_in_another_folder(tmp_path, paths):
    data = tmp_path / "data"
    for name, path in zip("abc", (paths[0], *paths), strict=True):
        write(data / f"{path.format(name)}.txt".replace("images", "labels"), f"0 {BOX}")
        write_image(tmp_path / "photos" / f"{name}.jpg")
        if "images" in path:
            write_image(data / f"{path.format(name)}.jpg")
    write_image(tmp_path / "photos" / "unlabelled.jpg")
    write(data / "data.yaml", "names: [cat]")
    photos = str(tmp_path / "photos")
    records = read_annotations(str(data), WANTED, notes := {}, image_folder=photos)[1]
    assert {split: [Path(row.image).stem for row in rows] for split, rows in records.items()} == DIVIDED
    assert notes == {} and all(len(row.objects) == 1 for rows in records.values() for row in rows)


@pytest.mark.parametrize(("wanted", "stems"), [({"TRAIN": "trainval", "VAL": "val"}, "ab"), (WANTED, "abc")])
def test_photos_without_labels_are_of_a_source_that_is_divided_and_of_no_other(tmp_path, wanted, stems):
    for name in "abc":
        write_image(tmp_path / "photos" / f"{name}.jpg")
    for name in "ab":
        write(tmp_path / "data" / "labels" / f"{name}.txt", f"0 {BOX}")
    write(tmp_path / "data" / "classes.txt", "cat")
    ((_, rows),) = read_annotations(str(tmp_path / "data"), wanted, {}, image_folder=tmp_path / "photos")[1].items()
    assert [Path(row.image).stem for row in rows] == [*stems]


def test_yolo_files_go_before_a_coco_file_of_the_same_images(tmp_path):
    write(write_yolo(tmp_path, "images/train/1", "images/val/2") / "classes.txt", "cat\n")
    write(tmp_path / "annotations" / "instances_val2017.json", coco())
    assert splits_of(tmp_path) == {"TRAIN": ["1"], "TEST": ["2"]}


def test_hidden_files_are_ignored_everywhere(tmp_path):
    write_xml_layout(tmp_path / "xml", "Annotations", "JPEGImages")
    write_yolo_layout(tmp_path / "yolo", "labels", "images")
    in_xml = ("Annotations/._a.xml", "__MACOSX/Annotations/._a.xml", "ImageSets/Main/._train.txt")
    in_yolo = ("labels/._a.txt", ".git/labels/a.txt", "._data.yaml", "images/._a.jpg", "images/lost+found/a.jpg")
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


# --- Lists of images ------------------------------------------------------------------------------


def write_voc_photos(folder, names="abc"):
    for name in names:
        write_annotation(folder / "Annotations", object_xml(), name=name)
        write_image(folder / "JPEGImages" / f"{name}.jpg")
    return folder


def write_yolo_photos(folder, names="abc"):
    write(write_yolo(folder, *(f"images/{name}" for name in names)) / "classes.txt", "cat\n")
    return folder


def write_darknet_photos(folder, names="abc"):
    write(write_yolo(folder, *(f"obj/{name}" for name in names)) / "obj.names", "cat\n")
    return folder


def write_text_lists(folder, form, **lists):
    for name, images in lists.items():
        write(folder / f"{name}.txt", "".join(f"{form.format(image)}\n" for image in images))


DIVIDED = {"TRAIN": ["a", "b"], "TEST": ["c"]}


@pytest.mark.parametrize(("write_photos", "place", "form", "guesses"), [
    (write_voc_photos, "ImageSets", "{}", 0), (write_voc_photos, "ImageSets", "{}.jpg", 0),
    (write_voc_photos, ".", "{}", 0), (write_voc_photos, ".", "JPEGImages/{}.jpg", 3),
    (write_voc_photos, ".", "JPEGImages/{0}.jpg Annotations/{0}.xml", 3),
    (write_voc_photos, "imagesets", "/home/me/JPEGImages/{}.jpg", 3),
    (write_yolo_photos, "ImageSets", "{}", 0), (write_yolo_photos, "ImageSets/Main", "{}.jpg", 0),
    (write_yolo_photos, ".", "{}", 0), (write_yolo_photos, ".", "images/{}.jpg", 0),
    (write_yolo_photos, ".", "./images/{}.jpg", 0), (write_yolo_photos, ".", "data/images/{}.jpg", 0),
    (write_yolo_photos, ".", "C:\\me\\images\\{}.jpg", 3), (write_yolo_photos, ".", "/home/me/images/{}.png", 3),
    (write_darknet_photos, ".", "data/obj/{}.jpg", 0), (write_darknet_photos, ".", "obj/{}.jpg", 0),
])  # fmt: skip
def test_lists_outside_of_main_are_used(tmp_path, write_photos, place, form, guesses):
    write_text_lists(write_photos(tmp_path) / place, form, train="ab", val="c")
    _, records = read_annotations(str(tmp_path), WANTED, notes := {})
    assert {split: [Path(record.image).stem for record in rows] for split, rows in records.items()} == DIVIDED
    assert all(len(record.objects) == 1 for rows in records.values() for record in rows)
    assert sum(len(rows) for rows in notes.values()) == guesses
    assert notes.keys() <= {"entry_guessed", "image_guessed"}


@pytest.mark.parametrize(("names", "splits"), [
    (("Train", "Valid"), DIVIDED), (("train_list", "test_list"), DIVIDED), (("2007_train", "2007_test"), DIVIDED),
    (("train2017", "val2017"), DIVIDED), (("training", "testing"), DIVIDED), (("trainval", "test"), DIVIDED),
])  # fmt: skip
def test_names_of_lists(tmp_path, names, splits):
    write_text_lists(write_yolo_photos(tmp_path), "{}", **dict(zip(names, ("ab", "c"), strict=True)))
    assert splits_of(tmp_path) == splits


def test_lists_beside_xml_files_and_images_in_one_folder(tmp_path):
    for name in "abc":
        write_annotation(tmp_path, object_xml(), name=name)
        write_image(tmp_path / f"{name}.jpg")
    write_text_lists(tmp_path, "{}.jpg", train="ab", test="c")
    assert splits_of(tmp_path) == DIVIDED


@pytest.mark.parametrize(("place", "lists"), [
    (".", {"train": ["x", "y"], "test": ["z"]}), ("ImageSets", {"train": ["x"]}), (".", {"test": ["a"]}),
    (".", {"val": ["a"], "test": ["b"]}), (".", {"train": []}), ("ImageSets/Segmentation", {"train": ["a"]}),
    ("ImageSets/Main", {"cat_train": ["a 1", "b -1"], "cat_val": ["c\t1"]}), (".", {"train": ["a 1", "b -1", "c 1"]}),
    (".", {"2007_train": ["images/a.jpg 20,20,80,90,0 90,30,150,100,1"]}), (".", {"train": ["\0"]}),
])  # fmt: skip
@pytest.mark.parametrize("write_photos", [write_voc_photos, write_yolo_photos])
def test_lists_that_are_not_used_are_noted(tmp_path, write_photos, place, lists):
    write_text_lists(write_photos(tmp_path) / place, "{}", **lists)
    assert len(read(tmp_path, notes := {})) == 3
    assert [row["file"] for row in notes.pop("list_unused")] == [
        os.path.normpath(tmp_path / place / f"{name}.txt") for name in sorted(lists)
    ]
    assert notes == {}


def test_a_list_beside_good_ones_that_names_no_image_is_noted(tmp_path):
    write_text_lists(write_yolo_photos(tmp_path), "{}", train="ab", val="c", test="x")
    assert splits_of(tmp_path) == DIVIDED
    read_annotations(str(tmp_path), WANTED, notes := {})
    assert [Path(row["file"]).name for row in notes["list_unused"]] == ["test.txt"]


def test_a_list_of_a_split_that_was_not_asked_for_is_named(tmp_path):
    folder = write_lists(tmp_path, "trainval", "train", "val", "test", "holdout")
    description = read_annotations(str(folder), WANTED, {})[0]
    assert "trainval: TRAIN, test: TEST, holdout: not used, pixels" in description
    assert "trainval: not used" in read_annotations(str(folder), {"TEST": "test"}, {})[0]


def test_long_lists_are_read(tmp_path):
    write_text_lists(write_yolo_photos(tmp_path), "{}", train="ab", val="c")
    with open(tmp_path / "train.txt", "a") as file:
        file.write(" " * 10_000_000)
    assert splits_of(tmp_path) == DIVIDED


def test_lists_name_images_that_are_missing(tmp_path):
    write_text_lists(write_yolo_photos(tmp_path / "yolo"), "images/{}.jpg", train="abx", val="c")
    records = read_annotations(str(tmp_path / "yolo"), WANTED, {})[1]
    assert [os.path.isfile(record.image) for record in records["TRAIN"]] == [True, True, False]
    write_text_lists(write_voc_photos(tmp_path / "voc"), "{}", train="abx", val="c")
    with pytest.raises(ValueError, match=r"(?s)1 of 3 annotations cannot be used.*x\.xml: no such annotation"):
        splits_of(tmp_path / "voc")


def test_lists_beside_data_that_are_divided_already_are_noted(tmp_path):
    write(write_yolo(tmp_path, "images/train/a", "images/train/b", "images/val/c") / "classes.txt", "cat\n")
    write_text_lists(tmp_path, "{}", train="a", val="bc")
    assert splits_of(tmp_path) == DIVIDED
    read_annotations(str(tmp_path), WANTED, notes := {})
    assert len(notes["list_unused"]) == 2
    write(tmp_path / "data.yaml", "names: [cat]\ntrain: train.txt\nval: images/val")
    write_text_lists(tmp_path, "images/train/{}.jpg", train="a")
    assert splits_of(tmp_path) == {"TRAIN": ["a"], "TEST": ["c"]}
    read_annotations(str(tmp_path), WANTED, notes := {})
    assert [Path(row["file"]).name for row in notes["list_unused"]] == ["val.txt"]


def test_label_files_are_no_lists_whatever_they_are_called(tmp_path):
    write(write_yolo(tmp_path, "train_1", "train_2", "test") / "classes.txt", "cat\n")
    assert len(read(tmp_path, notes := {})) == 3 and notes == {}


def test_a_wrong_name_of_a_split_says_where_the_lists_are(tmp_path):
    write_text_lists(write_yolo_photos(tmp_path), "{}", train="ab", val="c")
    with pytest.raises(
        FileNotFoundError, match=rf"has no split 'mine'.*Name one of val, train.*lists in {tmp_path} away"
    ):
        splits_of(tmp_path, TRAIN="mine")


# --- Splits that are empty ------------------------------------------------------------------------


def write_empty_split(folder, layout):
    """The photos a and b to train on, an empty split for validation, and none for the test."""
    if layout == "yaml":
        write(write_yolo(folder, "images/train/a", "images/train/b") / "data.yaml",
              "names: [cat]\ntrain: images/train\nval: images/val")  # fmt: skip
        (folder / "images" / "val").mkdir()
    elif layout == "coco":
        images = [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate("ab")]
        for image in images:
            write_image(folder / "train" / image["file_name"])
        boxes = [{"image_id": i, "category_id": 3, "bbox": [1, 2, 30, 40]} for i in range(2)]
        write(folder / "train" / "_annotations.coco.json", coco(images=images, annotations=boxes))
        write(folder / "valid" / "_annotations.coco.json", coco(images=[], annotations=[]))
    elif layout == "lists":
        write_text_lists(write_voc_photos(folder, "ab") / "ImageSets" / "Main", "{}", train="ab", val="")
    elif layout == "folders":
        write(write_yolo(folder, "images/train/a", "images/train/b") / "classes.txt", "cat\n")
        write_image(folder / "images" / "val" / "c.jpg")  # without labels
    elif layout == "xml":
        write_voc_photos(folder / "train", "ab")
        (folder / "valid").mkdir()
    return folder


@pytest.mark.parametrize("layout", ["yaml", "coco", "lists", "folders", "xml"])
def test_train_is_divided_where_there_is_no_other_image(tmp_path, layout):
    write_empty_split(tmp_path, layout)
    names = {"TRAIN": "trainval", "VAL": "val", "TEST": "test"}
    _, records = read_annotations(str(tmp_path), names, notes := {})
    assert {split: [Path(record.image).stem for record in rows] for split, rows in records.items()} == {"": ["a", "b"]}
    assert notes.keys() == {"split_empty"} and all("val" in row["file"] for row in notes["split_empty"])


@pytest.mark.parametrize("layout", ["yaml", "coco", "lists"])
def test_an_empty_split_that_was_asked_for_by_name_is_refused(tmp_path, layout):
    write_empty_split(tmp_path, layout)
    with pytest.raises(ValueError, match=r"val.*: has no images"):
        read_annotations(str(tmp_path), {"TRAIN": "train", "TEST": "valid" if layout == "coco" else "val"}, {})


def write_without_objects(folder, layout, *splits):
    """Two photos of each split; those of the test have no objects."""
    for split in splits:
        stems = [f"{split}{i}" for i in range(2)]
        for stem in stems:
            write_image(folder / "images" / split / f"{stem}.jpg")
            if layout == "yolo" and split != "test":
                write(folder / "labels" / split / f"{stem}.txt", f"0 {BOX}")
        if layout == "coco":
            images = [{"id": i, "file_name": f"{stem}.jpg"} for i, stem in enumerate(stems)]
            boxes = [] if split == "test" else [{**DOG, "image_id": 0}]
            write(folder / f"{split}.json", coco(images=images, annotations=boxes))
    if layout == "yolo":
        write(folder / "data.yaml", "names: [cat]\n" + "".join(f"{split}: images/{split}\n" for split in splits))
    return folder


@pytest.mark.parametrize("layout", ["yolo", "coco"])
def test_images_without_objects_are_no_test(tmp_path, layout):
    three = write_without_objects(tmp_path / "three", layout, "train", "val", "test")
    assert splits_of(three) == {"TRAIN": ["train0", "train1"], "TEST": ["val0", "val1"]}
    two = write_without_objects(tmp_path / "two", layout, "train", "test")
    assert splits_of(two) == {"": ["train0", "train1"]}
    read_annotations(str(two), WANTED, notes := {})
    assert ["test" in row["file"] for row in notes["split_empty"]] == [True]
    # Named for nothing else, they are taken all the same.
    assert splits_of(two, wanted=["TEST"]) == {"TEST": ["test0", "test1"]}


# --- More layouts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("paths", [
    ("images/train/{}", "images/val/{}"), ("train/images/{}", "valid/images/{}"), ("TRAIN/images/{}", "test/images/{}"),
])  # fmt: skip
@pytest.mark.parametrize("root", ["/home/me/set", "D:\\set", "/content/set-1"])
def test_a_yaml_file_that_is_named_with_the_paths_of_another_machine(tmp_path, paths, root):
    write_yolo(tmp_path, *(paths[0].format(name) for name in "ab"), paths[1].format("c"))
    folders = [f"{root}/{path.removesuffix('/{}')}" for path in paths]
    file = write(tmp_path / "some.yaml", f"path: '{root}'\ntrain: '{folders[0]}'\nval: '{folders[1]}'\nnames: [cat]")
    write(tmp_path / "data.yaml", "names: [wolf]")  # not the one that is named
    assert splits_of(file) == DIVIDED
    description, records = read_annotations(str(file), WANTED, notes := {})
    assert "some.yaml" in description and records["TEST"][0].objects[0].name == "cat"
    assert [row["what"] for row in notes["yaml_path_missing"]] == [f"train: {folders[0]}", f"val: {folders[1]}"]


def test_a_yaml_file_of_which_only_the_validation_is_there(tmp_path):
    write_yolo(tmp_path, "images/train/a", "images/train/b", "images/val/c")
    write(tmp_path / "data.yaml", "train: /home/me/train\nval: images/val\nnames: [cat]")
    assert splits_of(tmp_path) == splits_of(tmp_path / "data.yaml") == DIVIDED


@pytest.mark.parametrize("images", ["images", "annotations"])
@pytest.mark.parametrize("splits", [("train", "val"), ("Training", "Testing"), ("train2017", "test2017")])
def test_xml_files_in_folders_of_the_splits(tmp_path, images, splits):
    """`annotations/train`, and the images in a folder of the same name, or all in one."""
    for name, split in zip("abc", (splits[0], *splits), strict=True):
        write_annotation(tmp_path / "annotations" / split, object_xml(), name=name)
        write_image(tmp_path / "images" / (split if images == "images" else "") / f"{name}.jpg")
    assert splits_of(tmp_path) == DIVIDED
    read_annotations(str(tmp_path), WANTED, notes := {})
    assert notes == {}
    write_annotation(tmp_path / "annotations" / "more", object_xml(), name="d")  # no split: they are no splits
    write_image(tmp_path / "images" / "more" / "d.jpg")
    assert splits_of(tmp_path) == {"": ["a", "b", "c", "d"]}


def test_lists_go_before_folders_of_the_splits(tmp_path):
    for name, split in zip("abc", ("train", "val", "val"), strict=True):
        write_annotation(tmp_path / "Annotations" / split, object_xml(), name=name)
        write_image(tmp_path / "JPEGImages" / split / f"{name}.jpg")
    lists = {"train": ["train/a", "val/b"], "val": ["val/c"]}
    write_text_lists(tmp_path / "ImageSets" / "Main", "{}", **lists)
    assert splits_of(tmp_path) == DIVIDED


@pytest.mark.parametrize(
    "paths", [("training/{}", "testing/{}"), ("Training/Annotations/{}", "Testing/Annotations/{}")]
)
def test_folders_training_and_testing(tmp_path, paths):
    for name, path in zip("abc", (paths[0], *paths), strict=True):
        file = tmp_path / path.format(name)
        write_annotation(file.parent, object_xml(), name=name)
        write_image(file.parent.parent / file.parent.name.replace("Annotations", "JPEGImages") / f"{name}.jpg")
    assert splits_of(tmp_path) == DIVIDED


@pytest.mark.parametrize("images", ["JPEGImages", ".", "photos"])
def test_a_folder_labels_whose_images_are_not_in_images(tmp_path, images):
    for name in "abc":
        write_image(tmp_path / images / f"{name}.jpg")
        write(tmp_path / "labels" / f"{name}.txt", f"0 {BOX}")
    write(tmp_path / "classes.txt", "cat\n")
    records = read(tmp_path, notes := {})
    assert [len(record.objects) for record in records] == [1, 1, 1]
    assert len(notes.get("image_guessed", [])) == (3 if images == "photos" else 0)
    write_text_lists(tmp_path, f"{images}/{{}}.jpg", train="ab", val="c")
    assert splits_of(tmp_path) == DIVIDED
    assert all(len(row.objects) == 1 for row in read_annotations(str(tmp_path), WANTED, {})[1]["TRAIN"])


@pytest.mark.parametrize("yaml", ["train: JPEGImages", "train: list.txt"])
def test_a_data_yaml_on_images_in_jpegimages(tmp_path, yaml):
    for name in "ab":
        write_image(tmp_path / "JPEGImages" / "day" / f"{name}.jpg")
        write(tmp_path / "labels" / "day" / f"{name}.txt", f"0 {BOX}")
    write(tmp_path / "list.txt", "JPEGImages/day/a.jpg\nJPEGImages/day/b.jpg")
    write(tmp_path / "data.yaml", f"names: [cat]\n{yaml}")
    records = read(tmp_path, notes := {})
    assert [len(record.objects) for record in records] == [1, 1] and notes == {}


def test_a_path_in_place_of_a_file_name(tmp_path):
    write_image(tmp_path / "images" / "one.png")
    write_annotation(tmp_path / "Annotations", "<path>C:\\p\\one.png</path>", object_xml(), name="000")
    assert os.path.basename(read(tmp_path)[0].image) == "one.png"


# --- What lies beside a data set must not change how it is read ------------------------------------


def test_labels_that_a_program_left_do_not_hide_splits_or_other_layouts(tmp_path):
    for split, name in (("train", "a"), ("valid", "b")):
        write(tmp_path / "yolo" / split / "images" / f"{name}.jpg", "")
        write(tmp_path / "yolo" / split / "labels" / f"{name}.txt", f"0 {BOX}\n")
    write(tmp_path / "yolo" / "data.yaml", "names: [cat, dog]")
    write(tmp_path / "xml" / "a.jpg", "")
    write_annotation(tmp_path / "xml", "", object_xml())
    for folder in ("yolo", "xml"):
        for name in ("a", "b"):
            write(tmp_path / folder / "labels" / f"{name}.txt", "1 0.2 0.2 0.1 0.1\n")
    _, records = read_annotations(str(tmp_path / "yolo"), WANTED, {})
    assert {split: [Path(record.image).name for record in part] for split, part in records.items()} == {
        "TRAIN": ["a.jpg"], "TEST": ["b.jpg"],
    }  # fmt: skip
    assert all(row.name == "cat" for part in records.values() for record in part for row in record.objects)
    (record,) = read(tmp_path / "xml")
    assert record.file.endswith(".xml")


def test_a_label_file_of_another_camera_is_not_guessed(tmp_path):
    write(tmp_path / "classes.txt", "cat\n")
    write(tmp_path / "images" / "cam0" / "0001.jpg", "")
    write(tmp_path / "images" / "cam1" / "0002.jpg", "")
    write(tmp_path / "labels" / "cam1" / "0001.txt", f"0 {BOX}\n")
    write(tmp_path / "labels" / "0002.txt", f"0 {BOX}\n")
    notes = {}
    records = {Path(record.image).name: record for record in read(tmp_path, notes)}
    assert [len(records[name].objects) for name in ("0001.jpg", "0002.jpg")] == [0, 1]
    assert len(notes["image_not_found"]) == 1


def test_a_yaml_without_train_is_read_for_the_test(tmp_path):
    write(tmp_path / "data" / "images" / "val" / "a.jpg", "")
    write(tmp_path / "data" / "labels" / "val" / "a.txt", f"0 {BOX}\n")
    path = write(tmp_path / "cfg" / "d.yaml", "path: ../data\ntrain: images/train\nval: images/val\nnames: [cat]")
    _, records = read_annotations(str(path), {"TEST": "val"}, {})
    (part,) = records.values()
    assert [Path(record.image).name for record in part] == ["a.jpg"]
