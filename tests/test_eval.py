"""The metrics: cases worked by hand, a slow plain version, real detections, pycocotools; files; the script."""

import functools
import json
import math
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import read_files, write
from oracles import plain_calculate_mAP

import eval as evaluation
from annotations import parse_annotation
from create_data_lists import create_data_lists
from datasets import PascalVOCDataset
from eval import calculate_coco, calculate_mAP, make_test_loader, read_detections, write_detections
from model import load_model
from utils import load_checkpoint, make_label_map, save_checkpoint, script_parameters, voc_labels

LABEL_MAP = make_label_map(["cat", "dog"])
CAT, DOG, DIFFICULT = 1, 2, 1

# Two objects far apart, a box that overlaps none, and boxes that overlap the first object by 0.8, 0.5 and 0.4.
A, B, NONE = [0, 0, 10, 10], [50, 50, 70, 70], [80, 0, 90, 10]
A_80, A_50, A_40 = ([0, 0, width, 10] for width in (8, 5, 4))
TEN = [[i * 20, 0, i * 20 + 10, 10] for i in range(10)]


def image(detections, objects):
    """One image's six tensors, from lists of (box, label, score) and of (box, label, difficult)."""
    parts = [part for rows in (detections, objects) for part in (zip(*rows, strict=True) if rows else [()] * 3)]
    types = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.uint8)
    tensors = [torch.tensor(part, dtype=kind) for part, kind in zip(parts, types, strict=True)]
    return [part.reshape(-1, 4) if i % 3 == 0 else part for i, part in enumerate(tensors)]


def cats(boxes, *objects, scores=None, difficult=()):
    """An image with cats found at `boxes`, scores falling unless given, and cats at `objects`, or `difficult` ones."""
    scores = scores or [0.9 - 0.1 * i for i in range(len(boxes))]
    detections = [(box, CAT, score) for box, score in zip(boxes, scores, strict=True)]
    return image(detections, [(box, CAT, 0) for box in objects] + [(box, CAT, DIFFICULT) for box in difficult])


def detections_of(*images):
    """Three lists as from `detect_all()`, from lists of (box, label, score)."""
    return [list(part) for part in zip(*(image(one, [])[:3] for one in images), strict=True)]


def calculate(*images, label_map=LABEL_MAP, **parameters):
    return calculate_mAP(*map(list, zip(*images, strict=True)), label_map=label_map, **parameters)


# --- By hand --------------------------------------------------------------------------------------

# True (1) and false (0) detections by falling score, what precision they have at what recall.
FOUR = [cats([A, NONE], A), cats([B, NONE], B, A, scores=[0.7, 0.6])]  # 1 0 1 0: 1 at 1/3, 2/3 at 2/3
AREA = {"metric": "area"}
ONE_FALSE = (6 + 5 * 2 / 3) / 11  # 1 0 1 of two objects: precision 1 up to a recall of 1/2 (6 points), then 2/3
CASES = {
    "11 points": (FOUR, {}, (4 * 1 + 3 * 2 / 3) / 11), "area": (FOUR, AREA, 1 / 3 * 1 + 1 / 3 * 2 / 3),
    "highest precision at any greater recall": ([cats([NONE, A, B], A, B)], {}, 2 / 3),
    "and of the area": ([cats([NONE, A, B], A, B)], AREA, 2 / 3),
    "3/10 misses the point that floats put above it": ([cats(TEN[:3], *TEN)], {}, 3 / 11),
    "second detection of an object": ([cats([A, A_80, B], A, B)], {}, ONE_FALSE),
    "best score, not the nearest": ([cats([A_80, A], A)], {}, 1),
    "unless it is not near enough": ([cats([A_80, A], A)], {"min_overlap": 0.9}, 0.5),
    # [2, 0, 12, 10] overlaps A by 80 / 120 and the other object by 70 / 130, both above 0.5.
    "most overlapped object, taken or not": ([cats([A, [2, 0, 12, 10]], A, [5, 0, 15, 10])], {}, 6 / 11),
    "overlap of just min_overlap": ([cats([A_50], A)], {}, 1), "the same box": ([cats([A], A)], {"min_overlap": 1}, 1),
    "overlap below it": ([cats([A_50], A)], {"min_overlap": 0.5001}, 0),
    "first of equal objects": ([cats([A, A], A, A)], {}, 6 / 11), "nothing found": ([cats([], A), cats([], B)], {}, 0),
    "nothing found, area": ([cats([], A), cats([], B)], AREA, 0),
    "difficult object not found": ([cats([B], B, difficult=[A])], {}, 1),
    "difficult object found twice": ([cats([A, A_80, B], B, difficult=[A])], {}, 1),
    "near a difficult object, not enough": ([cats([A_40, B], B, difficult=[A])], {}, 0.5),
    "easy object beside a difficult one": ([cats([[1, 0, 11, 10]], [4, 0, 14, 10], difficult=[A])], {}, 0),
    "equal scores, true first": ([cats([A, NONE], A, scores=[0.5, 0.5])], {}, 1),
    "equal scores, false first": ([cats([NONE, A], A, scores=[0.5, 0.5])], {}, 0.5),
    "equal scores in two images": ([cats([A], A), cats([A])], {}, 1),
    "equal scores in two images, false first": ([cats([A]), cats([A], A)], {}, 0.5),
    **{f"scores {scores}": ([cats([A, NONE, B], A, B, scores=scores)], {}, ONE_FALSE)
       for scores in ([3.0, -1.0, -2.0], [0.0, -0.0, -1e-30], [math.inf, 0.0, -math.inf])},
    "another class": ([image([(A, DOG, 1)], [(A, CAT, 0)])], {}, 0), "another image": ([cats([A]), cats([], A)], {}, 0),
    "dogs beside": ([image([(A, CAT, 0.9), (A, DOG, 0.95)], [(A, CAT, 0)]), image([(B, DOG, 1)], [])], {}, 1),
    "image without objects": ([cats([A], scores=[0.95]), cats([A], A)], {}, 0.5),
    **{f"box {box}": ([cats([box, A], A)], {}, 0.5)
       for box in ([5, 5, 5, 5], [10, 10, 0, 0], [math.nan] * 4, [-math.inf, 0, math.inf, 10])},
}  # fmt: skip


@pytest.mark.parametrize(("images", "parameters", "expected"), CASES.values(), ids=CASES)
def test_average_precision_by_hand(images, parameters, expected):
    assert calculate(*images, **parameters)[0]["cat"] == pytest.approx(expected, abs=1e-12)


def test_classes_without_an_easy_object_are_named_and_left_out_of_the_mean():
    average_precisions, mean = calculate(image([(A, CAT, 0.9), (B, DOG, 0.8)], [(A, CAT, 0), (B, DOG, DIFFICULT)]))
    assert average_precisions["cat"] == 1.0 == mean and math.isnan(average_precisions["dog"])
    for nothing in (calculate(cats([A])), calculate_mAP([], [], [], [], [], [], LABEL_MAP)):
        assert list(nothing[0]) == ["cat", "dog"] and all(math.isnan(x) for x in [*nothing[0].values(), nothing[1]])


def test_labels_and_names_come_from_the_label_map():
    one = image([(A, 3, 0.9)], [(A, 3, 0), (B, 7, 0)])
    assert calculate(one, label_map={"background": 0, "rare": 7, "cat": 3}) == ({"rare": 0.0, "cat": 1.0}, 0.5)
    of_voc, _ = calculate(image([(A, 20, 0.9)], [(A, 20, 0)]), label_map=None)
    assert tuple(of_voc) == voc_labels and of_voc["tvmonitor"] == 1.0 and math.isnan(of_voc["aeroplane"])


def test_lists_of_different_lengths():
    case = [[part] * 2 for part in cats([A], A)]
    with pytest.raises(ValueError, match="2 images with detections, but 1 with objects"):
        calculate_mAP(*case[:3], *(part[:1] for part in case[3:]), LABEL_MAP)
    for i in range(6):
        for part in ([tensor[:0] for tensor in case[i]], *([case[i][:1]] if i % 3 else [])):
            with pytest.raises(ValueError, match="differ in number in at least one image"):
                calculate_mAP(*case[:i], part, *case[i + 1 :], LABEL_MAP)


@pytest.mark.parametrize(("one", "parameters", "message"), [
    *((image([(A, i, 0.9)], []), {}, f"the label {i} is not in the label map") for i in (0, 3, -1)),
    *((image([], [(A, i, 0)]), {}, f"the label {i} is not in the label map") for i in (0, 3, -1)),
    (cats([A], A), {"metric": "12 points"}, '"11 points" or "area"'),
    (cats([A], A, scores=[math.nan]), {}, "not a number"),
    (cats([A], A), {"label_map": {"background": 0, "cat": 7}}, r"label 1 is not in the label map, which has \[7\]"),
    *((cats([A], A), {"min_overlap": value}, f"min_overlap is {value}") for value in (0, 50, math.nan)),
])  # fmt: skip
def test_what_cannot_be_scored(one, parameters, message):
    with pytest.raises(ValueError, match=message):
        calculate(one, **parameters)


# --- Against slow versions ------------------------------------------------------------------------


def random_case(generator):
    """Six lists for a few images: boxes that overlap often, scores and overlaps that are often equal."""

    random = functools.partial(torch.rand, generator=generator)

    def some(n):
        corners = (random(n, 2) * 4).round() / 8
        boxes = torch.cat([corners, corners + ((random(n, 2) * 3).round() + 1) / 8], dim=1)
        return boxes, (random(n) * 2).long() + 1, (random(n) * 8).round() / 8

    images = [[*some(int(random(1) * 12)), *some(int(random(1) * 5))] for _ in range(1 + int(random(1) * 5))]
    return [*map(list, zip(*images, strict=True))][:5] + [[(one[5] < 0.3).to(torch.uint8) for one in images]]


def test_random_cases_equal_the_plain_version():
    generator, n_compared = torch.Generator().manual_seed(0), 0
    for i in range(120):
        case, min_overlap = random_case(generator), (0.5, 0.25, 0.75)[i % 3]
        expected = plain_calculate_mAP(*case, n_classes=3, threshold=min_overlap).tolist()
        average_precisions, mean = calculate_mAP(*case, LABEL_MAP, min_overlap)
        assert list(average_precisions.values()) == pytest.approx(expected, abs=1e-12, nan_ok=True)
        n_compared += mean > 0
        in_pixels = [[part * 256 for part in parts] if k % 3 == 0 else parts for k, parts in enumerate(case)]
        assert str(calculate_mAP(*in_pixels, LABEL_MAP, min_overlap)) == str((average_precisions, mean))
    assert n_compared > 30


def test_area_of_random_cases():
    """Area under the monotonic precision-recall curve: for each true detection a step of recall 1 / 10."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        is_true = rng.random(int(rng.integers(1, 20))) < 0.5
        is_true &= np.cumsum(is_true) <= 10
        objects = iter(TEN)
        one = cats([next(objects) if true else [0, 500, 10, 510] for true in is_true], *TEN)
        precisions = [sum(is_true[: i + 1]) / (i + 1) for i in range(len(is_true))]
        area = sum(max(precisions[i:]) for i in range(len(is_true)) if is_true[i]) / 10
        assert calculate(one, metric="area")[0]["cat"] == pytest.approx(area)


@pytest.fixture(scope="session")
def voc07_test(real_data, tmp_path_factory):
    """VOC2007's test images: their names, their objects as three lists, and a folder of real detections."""
    folder, label_map = tmp_path_factory.mktemp("voc07"), make_label_map(voc_labels)
    with tarfile.open(real_data / "voc07_test_detections.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    with tarfile.open(real_data / "voc_annotations.tar.xz", "r|xz") as archive:
        of_2007 = (entry for entry in archive if entry.isfile() and "VOC2007" in entry.name)
        contents = {Path(entry.name).name: archive.extractfile(entry).read() for entry in of_2007}
    names, objects = contents["test.txt"].decode().split(), ([], [], [])
    for name in names:
        (folder / f"{name}.xml").write_bytes(contents[f"{name}.xml"])
        annotation = parse_annotation(folder / f"{name}.xml")
        labels = [label_map[name] for name in annotation["names"]]
        for part, values in zip(objects, (annotation["boxes"], labels, annotation["difficulties"]), strict=True):
            part.append(torch.tensor(values))
    return names, objects, folder / "det"


def test_real_detections_score_as_by_the_development_kit(voc07_test, real_data):
    names, objects, folder = voc07_test
    detections = evaluation.read_voc_detections(folder, names, make_label_map(voc_labels))
    assert sum(len(labels) for labels in detections[1]) == 101_139
    expected = json.loads((real_data / "voc07_test_detections.ap.json").read_text())
    average_precisions, mean = calculate_mAP(*detections, *objects)
    assert average_precisions == pytest.approx({name: expected[name] for name in voc_labels}, abs=5e-9)
    assert mean == pytest.approx(0.721381, abs=1e-6)


# --- COCO's numbers -------------------------------------------------------------------------------


def make_dataset(folder, paths, objects=None, label_map=LABEL_MAP):
    """A data set of images that need not exist; objects: for each of them a list of (box, label, difficulty)."""
    entries = []
    for triples in objects or [[]] * len(paths):
        parts = [list(part) for part in zip(*triples, strict=True)] or [[], [], []]
        entries.append(dict(zip(("boxes", "labels", "difficulties"), parts, strict=True), size=[1000, 1000]))
    for name, content in (("TEST_images", paths), ("TEST_objects", entries), ("label_map", label_map)):
        write(folder / f"{name}.json", content)
    return PascalVOCDataset(folder, "TEST", keep_difficult=True)


def write_truth(folder, images, annotations, categories):
    """A COCO file of (id, category, box, area, is_crowd) tuples, images by their ids; returns its path."""
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
    rows = [dict(zip(keys, row, strict=True), id=i) for i, row in enumerate(annotations, start=1)]
    images = [{"id": i, "width": 640, "height": 480, "file_name": f"{i}.jpg"} for i in images]
    return write(folder / "truth.json", {"images": images, "annotations": rows, "categories": categories})


def reference_numbers(folder):
    """The twelve numbers that pycocotools itself gives for truth.json and found.json."""
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    truth = coco.COCO(str(folder / "truth.json"))
    run = cocoeval.COCOeval(truth, truth.loadRes(str(folder / "found.json")), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    assert run.stats[0] > 0.05 and len(set(run.stats.round(9))) > 9
    return pytest.approx(np.where(run.stats < 0, np.nan, run.stats).tolist(), abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("string_ids", [False, True])
def test_coco_numbers_are_those_of_pycocotools(tmp_path, string_ids):
    """With objects of all sizes, crowds, ids in any order, and scores that are often equal."""
    rng = np.random.default_rng(string_ids)
    ids = [f"photo {i}" if string_ids else int(i) for i in rng.permutation(1000)[:40]]
    annotations, found = [], []
    for image_id in np.repeat(np.array(ids, object), rng.integers(0, 6, len(ids))):
        x, y, side = (float(rng.integers(0, 200)), float(rng.integers(0, 200)), float(rng.choice([8, 20, 32, 96, 200])))
        box, category = [x, y, side, side * rng.choice([0.5, 1, 1.25])], int(rng.choice([90, 3]))
        area = box[2] * box[3] * rng.choice([0.5, 1])  # of the outline, which is smaller than the box
        annotations.append((image_id, category, box, area, int(rng.random() < 0.2)))
        for _ in range(rng.integers(0, 4)):
            moved = (box + rng.integers(-8, 9, 4) * side / 64).tolist()
            category_id, score = int(rng.choice([90, category])), int(rng.integers(1, 10)) / 10
            found.append({"image_id": image_id, "category_id": category_id, "bbox": moved, "score": score})
    truth = write_truth(tmp_path, ids, annotations, [{"id": 90, "name": "cat"}, {"id": 3, "name": "dog"}])
    write(tmp_path / "found.json", found)
    train = write(tmp_path / "train.json", truth.read_text().replace(".jpg", ".png"))  # other images
    create_data_lists(output_folder=tmp_path, train_data=str(train), test_data=str(truth), check_images=False)
    dataset = PascalVOCDataset(tmp_path, "TEST", keep_difficult=True)
    average_precisions, twelve = calculate_coco(*read_detections(tmp_path / "found.json", dataset), dataset)
    assert list(twelve.values()) == reference_numbers(tmp_path)
    assert list(twelve) == list(evaluation.COCO_NUMBERS)
    assert sum(average_precisions.values()) / 2 == pytest.approx(twelve["AP"])


def test_coco_numbers_without_objects_are_not_known(tmp_path):
    pytest.importorskip("pycocotools")
    dataset = make_dataset(tmp_path, ["a.jpg"], [[(A, 1, 0), (B, 2, 0)]], make_label_map(["dog", "cat", "bird"]))
    average_precisions, twelve = calculate_coco(*detections_of([(A, 1, 0.9)]), dataset)
    assert average_precisions == pytest.approx({"dog": 1, "cat": 0, "bird": math.nan}, nan_ok=True)
    assert [twelve["AP"], twelve["AR small"]] == pytest.approx([0.5, 0.5])
    assert math.isnan(twelve["AP large"]) and math.isnan(twelve["AR medium"])


def test_coco_numbers_of_real_detections(voc07_test, tmp_path):
    names, objects, folder = voc07_test
    names, objects = names[:300], [part[:300] for part in objects]
    triples = [list(zip(*(part.tolist() for part in one), strict=True)) for one in zip(*objects, strict=True)]
    dataset = make_dataset(tmp_path / "lists", names, triples, make_label_map(voc_labels))
    for path in folder.iterdir():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line[:6] <= names[-1]]
        write(tmp_path / "det" / path.name, "".join(lines))
    detections = read_detections(tmp_path / "det", dataset)
    write_detections(tmp_path / "found.json", dataset, detections)
    annotations = [(i, label, [x, y, x_max - x, y_max - y], (x_max - x) * (y_max - y), difficult)
                   for i, one in enumerate(triples, 1) for (x, y, x_max, y_max), label, difficult in one]  # fmt: skip
    write_truth(tmp_path, range(1, 301), annotations, [{"id": label} for label in range(1, 21)])
    expected = reference_numbers(tmp_path)
    for again in (detections, read_detections(tmp_path / "found.json", dataset)):
        assert list(calculate_coco(*again, dataset)[1].values()) == expected


# --- Files of detections --------------------------------------------------------------------------


@pytest.fixture
def two_images(tmp_path):
    return make_dataset(tmp_path / "lists", ["photos/a b.jpg", "000001.jpg"])


def test_written_pixels_count_from_1_and_include_both_ends(tmp_path, two_images):
    write_detections(tmp_path / "found", two_images, detections_of([([0, 0, 500, 375], DOG, 0.25)], []))
    files = read_files(tmp_path / "found")  # none for background
    assert files == {"comp4_det_test_dog.txt": b"a b 0.25 1 1 500 375\n", "comp4_det_test_cat.txt": b""}


def test_coco_files_have_ids_and_sides(tmp_path, two_images):
    found = detections_of([([10, 20, 500, 375], DOG, 0.25)], [([0.5, 0, 1, 1], CAT, 0.125)])
    for dog_image, dog, cat_image, cat in ((1, 2, 2, 1), (139, 18, "b", 17)):
        write_detections(tmp_path / "found.json", two_images, found)
        assert json.loads((tmp_path / "found.json").read_text()) == [
            {"image_id": dog_image, "category_id": dog, "bbox": [10, 20, 490, 355], "score": 0.25},
            {"image_id": cat_image, "category_id": cat, "bbox": [0.5, 0, 0.5, 1], "score": 0.125},
        ]
        two_images.image_ids = [139, "b"]  # those of a COCO file
        ids = {"TEST": {"dog": 18, "cat": 17}, "VAL": {"dog": 1, "cat": 2}}
        write(tmp_path / "lists/category_ids.json", ids)
    write(tmp_path / "lists/category_ids.json", ids["TEST"])  # in lists of earlier versions: for all splits
    write_detections(tmp_path / "again.json", two_images, found)
    assert (tmp_path / "again.json").read_text() == (tmp_path / "found.json").read_text()
    for wrong in ({"dog": 18, "cat": 18}, {"dog": 18}):
        write(tmp_path / "lists/category_ids.json", {"TEST": wrong})
        with pytest.raises(ValueError, match="two classes have one of COCO's ids, or a class has none"):
            write_detections(tmp_path / "found.json", two_images)


@pytest.mark.parametrize("target", ["new/folder", "new/found.json", "new/FOUND.JSON"])
def test_detections_come_back_as_they_were_written(tmp_path, target):
    generator, counts = torch.Generator().manual_seed(0), [3, 0, 50, 1]
    dataset = make_dataset(tmp_path, ["000001.jpg", "no objects.png", "a name with spaces.jpg", "2008_000003.jpg"])
    boxes = [torch.rand(n, 4, generator=generator).cumsum(1) * 200 for n in counts]
    labels = [torch.randint(1, 3, (n,), generator=generator) for n in counts]
    scores = [torch.rand(n, generator=generator) for n in counts]
    scores[0][:2] = torch.tensor([0.1, torch.tensor(0.1).nextafter(torch.tensor(1.0))])  # neighbours
    write_detections(tmp_path / target, dataset, (boxes, labels, scores))
    read_boxes, read_labels, read_scores = read_detections(tmp_path / target, dataset)
    for i, count in enumerate(counts):
        order = labels[i].argsort(stable=True) if target == "new/folder" else torch.arange(count)
        assert torch.equal(read_labels[i], labels[i][order])  # a folder is read class by class
        torch.testing.assert_close(read_boxes[i].float(), boxes[i][order], rtol=1e-6, atol=1e-5)
        assert torch.equal(read_scores[i].float(), scores[i][order])


def test_class_names_that_no_file_can_have(tmp_path):
    dataset = make_dataset(tmp_path, ["a.jpg"], None, make_label_map(["truck/bus", "../100%", "\ud800"]))
    found = detections_of([(A, label, 0.5) for label in (1, 2, 3)])
    write_detections(tmp_path / "found", dataset, found)
    names = ["comp4_det_test_%D800.txt", "comp4_det_test_..%2F100%25.txt", "comp4_det_test_truck%2Fbus.txt"]
    assert sorted(path.name for path in tmp_path.rglob("*.txt")) == names
    assert torch.equal(read_detections(tmp_path / "found", dataset)[1][0], found[1][0])


@pytest.mark.parametrize(("paths", "message"), [
    (["x/a.jpg", "b.jpg", "y/a.jpg"], "two images are named 'a'"), (["a.jpg", "b\nc.jpg"], "an image is named 'b c'"),
    (["a.jpg", " b.jpg"], "an image is named"), (["a.jpg", "\ud800.jpg"], r"an image is named '\\ud800'"),
])  # fmt: skip
def test_image_names_that_vocs_files_cannot_hold(tmp_path, paths, message):
    dataset = make_dataset(tmp_path, paths)
    for function in (write_detections, read_detections):  # a trial to write, before anything is detected
        with pytest.raises(ValueError, match=message):
            function(tmp_path / "found", dataset)
    found = detections_of(*[[([0, 0, i + 1, 5], 1, 0.5)] for i in range(len(paths))])
    write_detections(tmp_path / "found.json", dataset, found)  # ids tell them apart
    assert torch.equal(torch.cat(read_detections(tmp_path / "found.json", dataset)[0]), torch.cat(found[0]).double())


def test_a_trial_leaves_nothing_and_names_what_cannot_be_written(tmp_path, two_images):
    write_detections(tmp_path / "found", two_images)
    write_detections(tmp_path / "found.json", two_images)
    evaluation.write_results(tmp_path / "results.json", two_images, script_parameters(vars(evaluation)))
    assert list((tmp_path / "found").iterdir()) == [] and not list(tmp_path.glob("*.json"))
    (tmp_path / "folder.json").mkdir()
    write(tmp_path / "other/comp4_det_test_dog.txt/file", "")
    for name in ("folder.json", "other"):
        with pytest.raises(OSError, match=r"cannot be written to .*: (folder\.json|.*_dog\.txt) is a folder"):
            write_detections(tmp_path / name, two_images)
    for path in ("/dev/null/found.json", "/dev/null"):
        with pytest.raises(OSError, match=r"(found\.json|cat\.txt, .*dog\.txt) cannot be written to /dev/null"):
            write_detections(path, two_images)
    dataset = make_dataset(tmp_path, ["a.jpg"], None, make_label_map(["x" * 300]))
    with pytest.raises(OSError, match=r"cannot be written to .*found: .*too long"):
        write_detections(tmp_path / "found", dataset)


@pytest.mark.parametrize("target", ["found", "found.json"])
def test_full_disk_is_named_and_changes_nothing(tmp_path, two_images, full_disk, target):
    write_detections(tmp_path / target, two_images, detections_of([(A, 1, 0.5)], []))
    before = read_files(tmp_path)
    full_disk(after=int(target == "found"))  # the second file, or the only one
    with pytest.raises(OSError, match=r"(found\.json|dog\.txt) cannot be written to .*: .*No space left"):
        write_detections(tmp_path / target, two_images, detections_of([(B, 2, 0.5)], []))
    assert read_files(tmp_path) == before


def test_empty_and_missing_files(tmp_path, two_images):
    for name, content in (("comp4_det_test_cat.txt", ""), ("comp4_det_test_dog.txt", "\n \n"), ("found.json", "[]")):
        write(tmp_path / name, content)
    for path in (tmp_path, tmp_path / "found.json"):
        boxes, labels, scores = read_detections(path, two_images)
        assert [part.shape for part in boxes] == [(0, 4), (0, 4)]
        assert [len(part) for part in labels + scores] == [0, 0, 0, 0]
    (tmp_path / "comp4_det_test_dog.txt").unlink()
    for path, missing in ((tmp_path, r"comp4_det_test_dog\.txt"), (tmp_path / "none.json", r"none\.json")):
        with pytest.raises(FileNotFoundError, match=missing):
            read_detections(path, two_images)


@pytest.mark.parametrize("line", [
    "a b 0.5 1 1 10", "a b 0.5 1 1 10 ten", "zzz 0.5 1 1 10 10", "a b nan 1 1 10 10", "a b 0.5 1 1 inf 10"
])  # fmt: skip
def test_faulty_line_is_named(tmp_path, line):
    write(tmp_path / "comp4_det_test_cat.txt", "")
    write(tmp_path / "comp4_det_test_dog.txt", f"a b 0.5 1 1 10 10\n{line}\na b 0.4 1 1 10 10\n")
    with pytest.raises(ValueError, match=rf"comp4_det_test_dog\.txt, line 2: '{line}' is not `image score"):
        evaluation.read_voc_detections(tmp_path, ["a b", "c"], LABEL_MAP)


@pytest.mark.parametrize("change", [
    {"image_id": 3}, {"image_id": "1"}, {"image_id": [1]}, {"category_id": 0}, {"category_id": None},
    {"score": None}, {"score": math.nan}, {"bbox": [1, 2, 3]}, {"bbox": [1, 2, 3, math.inf]},
    {"bbox": [1, 2, 10**400, 4]}, {"bbox": "123"}, None,
], ids=lambda change: str(change)[:30])  # fmt: skip
def test_faulty_entry_is_named(tmp_path, two_images, change):
    right = {"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}
    write(tmp_path / "found.json", [right, change and right | change])
    with pytest.raises(ValueError, match=r"found\.json, entry 2: '.*' is not \{\"image_id\": .* finite") as info:
        read_detections(tmp_path / "found.json", two_images)
    assert str(change)[1:9] in str(info.value) and len(str(info.value)) < 900


# --- The script -----------------------------------------------------------------------------------


def test_loader_takes_its_batch_size_and_images_as_the_model_wants_them(lists):
    loader = make_test_loader(lists, 3, 0, SimpleNamespace(input_size=512, antialias=False, mean=torch.zeros(1)))
    assert loader.batch_size == 3 and loader.dataset.antialias is False and not loader.pin_memory
    assert loader.dataset.keep_difficult
    assert next(iter(loader))[0].shape == (3, 3, 512, 512)


@pytest.mark.parametrize("metric", ["11 points", "area", "coco"])
def test_script_scores_writes_and_reads(metric, lists, tiny_checkpoint, tmp_path, run_main, capsys):
    if metric == "coco":
        pytest.importorskip("pycocotools")
    settings = {"data_folder": str(lists), "metric": metric, "workers": 0, "min_score": 0.2, "batch_size": 3}

    def run(written="", **parameters):
        run_main(evaluation, **settings, write_detections_to=written and str(tmp_path / written), **parameters)
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("detections written")]

    found = run("found.json", checkpoint=str(tiny_checkpoint))
    assert found[0].startswith("circle") and found[4].split()[0] == ("AP" if metric == "coco" else "mean")
    assert found[-1].startswith(metric) and "4 images detected in" in found[-1] and "a second" in found[-1]
    assert run("found", read_detections_from=str(tmp_path / "found.json"))[:-1] == found[:-1]
    assert run(read_detections_from=str(tmp_path / "found"))[:-1] == found[:-1]
    run("few.json", checkpoint=str(tiny_checkpoint), read_detections_from="", max_candidates=1)  # of each class
    n_found, n_few = (len(json.loads((tmp_path / name).read_text())) for name in ("found.json", "few.json"))
    assert n_found > 16 >= n_few > 0


def test_evaluate_gives_the_same_in_any_batches(lists, tiny_checkpoint):
    model = load_model(tiny_checkpoint).train()  # as train.py has it
    one, three = (evaluation.evaluate(make_test_loader(lists, n, 0, model), model) for n in (1, 3))
    assert list(one[0]) == list(three[0]) == list(model.label_map)[1:] and not model.training
    assert one[1] == pytest.approx(three[1], abs=0.01)


def test_boxes_are_in_pixels_of_their_image(lists, tiny_checkpoint, monkeypatch):
    model = load_model(tiny_checkpoint)
    loader = make_test_loader(lists, 3, 0, model)
    found = [torch.tensor([[0.25, 0.5, 0.75, 1.0]]), torch.tensor([1]), torch.tensor([0.9])]
    monkeypatch.setattr(model, "detect_objects", lambda locs, *_: [[part] * len(locs) for part in found])
    boxes, _, _ = evaluation.detect_all(loader, model)
    for (width, height), box in zip(loader.dataset.sizes.tolist(), boxes, strict=True):
        assert width != height and box.tolist() == [[width / 4, height / 2, width * 3 / 4, height]]


def test_evaluate_obeys_its_arguments_alone(lists, tiny_checkpoint, monkeypatch):
    """Not the parameters at the top of the file, which train.py could not set."""
    pytest.importorskip("pycocotools")
    model = load_model(tiny_checkpoint)
    loader = make_test_loader(lists, 4, 0, model)
    expected = evaluation.evaluate(loader, model, min_overlap=0.1)
    assert expected[1] > 0.01
    for name, value in {"metric": "area", "min_overlap": 0.9, "min_score": 0.5, "top_k": 1}.items():
        monkeypatch.setattr(evaluation, name, value)
    assert str(evaluation.evaluate(loader, model, min_overlap=0.1)) == str(expected)
    n_found = [sum(map(len, evaluation.detect_all(loader, model, 0.01, 0.45, top_k)[1])) for top_k in (200, 3)]
    assert n_found[0] > n_found[1] == 12
    found = evaluation.detect_all(loader, model)
    for parameters in ({"metric": "area", "min_overlap": 0.1}, {"min_overlap": 0.2}, {"metric": "coco"}):
        average_precisions, summary = evaluation.score(found, loader.dataset, **parameters)
        result = evaluation.evaluate(loader, model, **parameters)
        assert str(result) == str((average_precisions, next(iter(summary.values()))))
        assert str(result) != str(expected)
    detect_all = Mock(side_effect=LookupError)
    monkeypatch.setattr(evaluation, "detect_all", detect_all)
    with pytest.raises(LookupError):
        evaluation.evaluate(loader, model, "area", 0.6, 0.1, 0.2, top_k=7, max_candidates=5, bf16=True)
    assert detect_all.call_args.args == (loader, model, 0.1, 0.2, 7, 5, True)


def test_classes_are_matched_by_name(lists, tiny_checkpoint, capsys):
    """In another order, and with some that only the model or only the data set has."""
    model = load_model(tiny_checkpoint)
    loader = make_test_loader(lists, 4, 0, model)
    boxes, labels, scores = evaluation.detect_all(loader, model, 0.01, 0.45, 10_000)
    names = list(model.label_map)
    assert names[1:] == ["circle", "rectangle", "star", "triangle"] == list(loader.dataset.label_map)[1:]

    model.label_map = make_label_map(["star", "circle", "triangle", "rectangle"])
    other_boxes, other_labels, other_scores = evaluation.detect_all(loader, model, 0.01, 0.45, 10_000)
    new_labels = torch.tensor([0, 3, 1, 4, 2])  # of what the model calls 1, 2, 3, 4
    for i in range(4):
        assert torch.equal(other_labels[i], new_labels[labels[i]]) and len(labels[i].unique()) > 1
        assert torch.equal(other_boxes[i], boxes[i]) and torch.equal(other_scores[i], scores[i])

    model.label_map = make_label_map(["cat", "dog", "triangle", "star"])  # of which the data set has the last two
    _, few_labels, few_scores = evaluation.detect_all(loader, model, 0.01, 0.45, 10_000)
    new_labels = torch.tensor([0, 0, 0, 4, 3])
    for i in range(4):
        is_known = labels[i] > 2
        torch.testing.assert_close(few_scores[i], scores[i][is_known])
        assert few_labels[i].bincount().tolist() == new_labels[labels[i][is_known]].bincount().tolist()
    one = evaluation.detect_all(loader, model, 0.01, 0.45, 1)
    assert [len(part) for part in one[1]] == [1, 1, 1, 1]  # what is not in the data set takes no place of others

    in_another_order = {"dog": 2, "background": 0, "cat": 1}  # as a file may have it
    assert evaluation.match_classes(in_another_order, make_label_map(["dog", "cat"])).tolist() == [0, 2, 1]

    model.label_map = make_label_map(["cat", "dog"])
    with pytest.raises(ValueError, match=r"knows none of .*: it knows cat, dog; the data set has circle, rect"):
        evaluation.evaluate(loader, model)
    for label_map, message in ((None, "this model has no label_map"), ({0: "background", 1: "cat"}, "not a label map")):
        model.label_map = label_map
        with pytest.raises(ValueError, match=message):
            evaluation.evaluate(loader, model)


def test_classes_that_one_side_lacks_are_named(lists, tiny_checkpoint, tmp_path, run_main, capsys):
    saved = load_checkpoint(tiny_checkpoint)
    saved["label_map"] = make_label_map(["star", "bird", "circle", "cat"])
    save_checkpoint({key: value for key, value in saved.items() if key != "format"}, tmp_path / "other.pth.tar")
    run_main(evaluation, data_folder=str(lists), checkpoint=str(tmp_path / "other.pth.tar"), workers=0)
    printed = capsys.readouterr().out
    assert (
        "classes of the data set that the model does not know; their objects count as missed: rectangle, triangle"
        in printed
    )
    assert "classes of the model that the data set does not have; they are not detected: bird, cat" in printed
    assert printed.count("0.0000") >= 2


def test_other_splits_are_not_augmented(lists, tiny_checkpoint, tmp_path, run_main, capsys):
    model = load_model(tiny_checkpoint)
    train = make_test_loader(lists, 4, 0, model, split="TRAIN")
    assert len(train.dataset) == 8
    assert torch.equal(next(iter(train))[0], next(iter(train))[0])
    settings = {"data_folder": str(lists), "checkpoint": str(tiny_checkpoint), "workers": 0}
    run_main(evaluation, split="TRAIN", **settings)
    assert "8 images detected" in capsys.readouterr().out
    with pytest.raises(ValueError, match="split is 'test'"):
        run_main(evaluation, split="test", **settings)


def test_validation_split(lists, tiny_checkpoint, tmp_path, run_main, capsys):
    shutil.copytree(lists, tmp_path / "lists")
    for kind in ("images", "objects"):
        shutil.copy(lists / f"TRAIN_{kind}.json", tmp_path / f"lists/VAL_{kind}.json")
    run_main(evaluation, data_folder=str(tmp_path / "lists"), checkpoint=str(tiny_checkpoint), workers=0, split="VAL")
    assert "8 images detected" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"VAL_images\.json"):
        run_main(evaluation, data_folder=str(lists), checkpoint=str(tiny_checkpoint), split="VAL")


@pytest.mark.parametrize("metric", ["11 points", "coco"])
def test_results_as_a_file(lists, tiny_checkpoint, tmp_path, run_main, metric):
    if metric == "coco":
        pytest.importorskip("pycocotools")
    path = tmp_path / "new/results.json"
    settings = {"data_folder": str(lists), "workers": 0, "metric": metric, "write_results_to": str(path)}
    run_main(evaluation, checkpoint=str(tiny_checkpoint), **settings, write_detections_to=str(tmp_path / "found.json"))
    results = json.loads(path.read_text())
    model = load_model(tiny_checkpoint)
    expected, mean = evaluation.evaluate(make_test_loader(lists, 4, 0, model), model, metric)
    assert results["average_precisions"] == pytest.approx(evaluation.none_for_nan(expected), abs=0.01)
    assert results["AP" if metric == "coco" else "mean"] == pytest.approx(mean, abs=0.01)
    assert set(evaluation.COCO_NUMBERS) <= set(results) or metric != "coco"
    assert (results["split"], results["metric"], results["images"]) == ("TEST", metric, 4)
    assert (results["checkpoint"], results["detections"]) == (str(tiny_checkpoint), None)
    assert results["parameters"]["min_score"] == 0.01 and results["parameters"]["workers"] == 0
    run_main(evaluation, **settings, read_detections_from=str(tmp_path / "found.json"))
    again = json.loads(path.read_text())
    assert (again["checkpoint"], again["detections"]) == (None, str(tmp_path / "found.json"))
    assert results["parameters"]["min_score"] == 0.01 and "min_score" not in again["parameters"]
    with pytest.raises(ValueError, match="--min_score is for a network"):
        evaluation.main(given={"min_score"})
    assert again["average_precisions"] == pytest.approx(results["average_precisions"])


def test_what_is_not_known_is_null_in_the_file_of_results(tmp_path, run_main):
    make_dataset(tmp_path / "lists", ["a.jpg"], [[(A, CAT, 0), (B, CAT, DIFFICULT)]])
    found = {"image_id": 1, "category_id": CAT, "score": 0.5}
    write(tmp_path / "found.json", [found | {"bbox": [50, 50, 20, 20]}, found | {"bbox": A_80}])
    names = {"read_detections_from": "found.json", "write_results_to": "results.json", "data_folder": "lists"}
    run_main(evaluation, **{name: str(tmp_path / path) for name, path in names.items()})
    results = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["average_precisions"] == {"cat": 1.0, "dog": None} and results["mean"] == 1.0
    run_main(evaluation, min_overlap=0.9)
    assert json.loads((tmp_path / "results.json").read_text())["mean"] == 0.0


@pytest.mark.parametrize("n", [100, 101])
def test_more_of_a_class_than_coco_looks_at(tmp_path, run_main, capsys, n):
    """All boxes are right, and yet the AP is low: that needs an explanation."""
    pytest.importorskip("pycocotools")
    boxes = [[i % 20 * 40, i // 20 * 40, i % 20 * 40 + 20, i // 20 * 40 + 20] for i in range(n)]
    rows = [(box, DOG, 0) for box in boxes] + [(A, CAT, 0)]
    dataset = make_dataset(tmp_path / "lists", ["a.jpg"], [rows])
    write_detections(tmp_path / "found.json", dataset, detections_of(rows))
    found, lists = str(tmp_path / "found.json"), str(tmp_path / "lists")
    run_main(evaluation, read_detections_from=found, data_folder=lists, metric="coco")
    printed = capsys.readouterr().out
    note = (
        "there are up to 101 detections of a class in an image, and up to 101 objects; COCO's metric takes the best 100"
    )
    assert (note in printed) == ("note" in printed) == (n > 100)


def test_images_that_cannot_be_read(lists, tiny_checkpoint, tmp_path, run_main, capsys):
    shutil.copytree(lists, tmp_path / "lists")
    images = json.loads((lists / "TEST_images.json").read_text())
    write(tmp_path / "damaged.jpg", "no image")
    write(tmp_path / "lists/TEST_images.json", [*images[:2], str(tmp_path / "damaged.jpg"), images[3]])
    settings = {"data_folder": str(tmp_path / "lists"), "checkpoint": str(tiny_checkpoint), "workers": 1}
    with pytest.raises(ValueError, match=r"damaged\.jpg: not an image .*; --skip_corrupt=True goes on"):
        run_main(evaluation, **settings)
    run_main(evaluation, **settings, skip_corrupt=True)
    note = f"images that could not be read (1); their objects count as missed: {tmp_path / 'damaged.jpg'}"
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("name", ["write_detections_to", "read_detections_from"])
def test_results_do_not_replace_detections(lists, tiny_checkpoint, tmp_path, monkeypatch, run_main, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "found.json", "[]")
    settings = {"data_folder": str(lists), "checkpoint": str(tiny_checkpoint), "workers": 0}
    with pytest.raises(ValueError, match=r"write_results_to is found\.json, which is the file of detections"):
        run_main(evaluation, **settings, write_results_to="found.json", **{name: str(tmp_path / "found.json")})
    assert read_files(tmp_path) == {"found.json": b"[]"}


@pytest.mark.parametrize(("name", "value", "message"), [
    ("metric", "12 points", '"11 points", "area" or "coco"'), ("metric", "coco", "pip install pycocotools"),
    ("min_overlap", 0.0, "min_overlap is 0.0"), ("min_overlap", math.nan, "min_overlap is nan"),
    ("write_detections_to", "/dev/null/found", "cannot be written to /dev/null/found"),
    ("write_results_to", "/dev/null/a.json", "cannot be written to /dev/null"),
    ("write_results_to", "/tmp", r"ends in \.json"),
    ("device", "cuda:99", 'device is "cuda:99"'),
])  # fmt: skip
def test_errors_before_anything_is_detected(lists, tiny_checkpoint, run_main, monkeypatch, name, value, message):
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda _: None)  # as without pycocotools
    settings = {"detect_all": None, "data_folder": str(lists), "checkpoint": str(tiny_checkpoint), "workers": 0}
    with pytest.raises((OSError, ValueError), match=message):
        run_main(evaluation, **settings, **{name: value})
