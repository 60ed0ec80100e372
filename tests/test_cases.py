"""Small inputs as real users have them, one for each kind: ../shared/cases, beside the folder that SSD_TEST_DATA names.

Every picture is 160 x 120 and shows a cat at (20, 20, 80, 90) and a dog at (90, 30, 150, 100).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import create_data_lists as module
from create_data_lists import create_data_lists

CAT = (20, 20, 80, 90)
DOG = (90, 30, 150, 100)


@dataclass
class Case:
    """What is right for a case."""

    images: tuple  # how many of TRAIN and TEST; of TRAIN, VAL and TEST
    notes: dict = field(default_factory=dict)  # kind to how many there are
    options: dict = field(default_factory=dict)  # of create_data_lists()
    names: tuple = ("cat", "dog")
    line: str = ""  # a part of the line on the source


GUESSED = {"entry_guessed": 1}
SAME = {"split_same": 1}  # data.yaml names the same folder for train and val
CASES = {
    "coco_cvat": Case((8, 2)),
    "coco_image_id_string": Case((8, 2), GUESSED),
    "coco_iscrowd_null": Case((8, 2), GUESSED),
    "coco_labelstudio_project_dir": Case((8, 2), {"image_guessed": 10}),
    "coco_polygon_only": Case((8, 2), GUESSED),
    "coco_roboflow_empty_test": Case((10, 3), {"split_empty": 1}, line="train: TRAIN, valid: TEST"),
    "coco_subset_downloaded": Case((16, 4), {"image_corrupt": 180}, {"skip_corrupt": True}),
    "coco_url_encoded": Case((8, 2), {"image_guessed": 10}),
    "coco_windows_backslash": Case((8, 2), {"image_guessed": 10}),
    "image_12_bit_in_16": Case((8, 2), {"image_dark": 10}),
    "voc_cvat_subfolders": Case((8, 2)),
    "voc_difficult_unspecified": Case((8, 2), {"difficult_missing": 10}),
    "voc_jfif": Case((8, 2)),
    "voc_macos_appledouble": Case((8, 2)),
    "voc_one_broken_image": Case((7, 2), {"image_corrupt": 1}, {"skip_corrupt": True}),
    "voc_one_image": Case((1, 1), {"test_is_train": 1}, {"test_fraction": 0}),
    "voc_one_xml_without_image": Case((7, 2), {"image_corrupt": 1}, {"skip_corrupt": True}),
    "voc_same_stem_two_suffixes": Case((8, 2), {"image_unused": 10}),
    "voc_utf16_list": Case((8, 2), line="train: TRAIN, val: TEST"),
    "xml_name_differs_from_filename": Case((8, 2), {"image_guessed": 10}),
    "yolo_capital_splits": Case((5, 5), line="train: TRAIN, val: TEST"),
    "yolo_classes_blank_line": Case((8, 2), line="yolo_classes_blank_line/classes.txt"),
    "yolo_comma_separated": Case((8, 2), SAME),
    "yolo_conf": Case((8, 2), SAME | GUESSED),
    "yolo_cvat_1_1": Case((8, 2), line="yolo_cvat_1_1/obj.names"),
    "yolo_foreign_yaml_in_parent/mydata": Case((8, 2), line="mydata/labels/classes.txt"),
    "yolo_hyp_yaml_first": Case((8, 2), SAME, line="yolo_hyp_yaml_first/my_dataset.yaml"),
    "yolo_macos_appledouble": Case((8, 2), SAME),
    "yolo_nc_only": Case((8, 2), SAME, names=("0", "1"), line="their numbers"),
    "yolo_nested_subfolders": Case((10, 4), line="train: TRAIN, val: TEST"),
    "yolo_partly_nested": Case((19, 5), SAME),
    "yolo_pose_4_keypoints": Case((8, 2), SAME | GUESSED),
    "yolo_pose_4_keypoints_2d": Case((8, 2), SAME | GUESSED),
    "yolo_track_conf_id": Case((8, 2), SAME | GUESSED),
    "yolo_train_list": Case((8, 4), line="train: TRAIN, val: TEST"),
}
ERRORS = {
    "coco_background_category": r"--skip_unknown=True.*'background': 10 objects",
    "coco_rle_only": r"no object.*Crowds.*keep_crowds",
    "coco_subset_downloaded": r"180 of 200 images.*--skip_corrupt=True",
    "voc_gbk_xml": r"encoding is not utf-8",
    "voc_heic": r"HEIC.*convert",
    "voc_one_broken_image": r"1 of 10 images.*--skip_corrupt=True",
    "voc_one_image": r"--test_fraction=0",
    "voc_one_xml_without_image": r"1 of 10 images.*--skip_corrupt=True.*im03",
}


@pytest.fixture(scope="module")
def cases(request):
    folder = request.getfixturevalue("real_data").parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"{folder}: no such folder")
    return folder


def read_splits(folder):
    """{split: [{name of a class: box}, one dict for each image]} of the lists in a folder."""
    names = {label: name for name, label in json.loads((folder / "label_map.json").read_text()).items()}
    splits = {}
    for split in ("TRAIN", "VAL", "TEST"):
        if (folder / f"{split}_objects.json").exists():
            entries = json.loads((folder / f"{split}_objects.json").read_text())
            splits[split] = [
                {names[label]: box for label, box in zip(entry["labels"], entry["boxes"], strict=True)}
                for entry in entries
            ]
    return splits


@pytest.mark.parametrize("name", CASES)
def test_case_is_read_rightly(cases, tmp_path, name):
    case = CASES[name]
    report = create_data_lists(train_data=cases / name, output_folder=tmp_path, report_overlap=0, **case.options)
    splits = read_splits(tmp_path)
    assert tuple(len(images) for images in splits.values()) == case.images
    cat, dog = case.names
    first = 1 if "counted from 1" in report["sources"][0] else 0
    for image in (image for images in splits.values() for image in images):
        assert image.keys() == {cat, dog}
        assert np.allclose(image[cat], [CAT[0] - first, CAT[1] - first, *CAT[2:]], atol=0.01)
        assert np.allclose(image[dog], [DOG[0] - first, DOG[1] - first, *DOG[2:]], atol=0.01)
    assert {kind: len(rows) for kind, rows in report["notes"].items() if rows} == case.notes
    assert case.line in report["sources"][0]


@pytest.mark.parametrize("name", ERRORS)
def test_case_ends_in_an_error_that_says_what_to_do(cases, tmp_path, name):
    with pytest.raises(ValueError, match=f"(?s){ERRORS[name]}"):
        create_data_lists(train_data=cases / name, output_folder=tmp_path / "lists", report_overlap=0)
    assert not (tmp_path / "lists").exists()


def test_masks_are_read_and_a_class_can_be_left_out(cases, tmp_path):
    pytest.importorskip("pycocotools")
    create_data_lists(train_data=cases / "coco_rle_only", output_folder=tmp_path, keep_crowds=True)
    boxes = [box for image in read_splits(tmp_path)["TRAIN"] for box in image.values()]
    assert len(boxes) == 16 and all(box == [0, 10, 1, 30] for box in boxes)  # 20 pixels of the first column
    create_data_lists(train_data=cases / "coco_background_category", output_folder=tmp_path, skip_unknown=True)
    assert [set(image) for image in read_splits(tmp_path)["TRAIN"]] == [{"dog"}] * 8


def test_the_number_of_every_case_is_known(cases):
    folders = {path.name for path in cases.iterdir() if path.is_dir()}
    known = {Path(name).parts[0] for name in (*CASES, *ERRORS)}
    assert folders == known, "a case without a right value"
    assert set().union(*(case.notes for case in CASES.values())) <= module.NOTES.keys()
