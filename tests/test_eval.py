"""The metrics: cases worked by hand, a slow plain version, real detections, pycocotools; files; the script."""

import contextlib
import errno
import io
import json
import math
import os
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmark_plain import plain_calculate_mAP

import eval as evaluation
from annotations import parse_annotation
from create_data_lists import create_data_lists
from datasets import PascalVOCDataset
from eval import (
    COCO_NUMBERS,
    calculate_coco,
    calculate_mAP,
    make_test_loader,
    read_detections,
    read_voc_detections,
    write_detections,
)
from model import load_model
from utils import make_label_map, voc_labels

LABEL_MAP = make_label_map(["cat", "dog"])

# Two objects far apart, and boxes that overlap the first one by 1, 0.8, 0.5 and 0.2.
FIRST, SECOND = [0, 0, 10, 10], [50, 50, 70, 70]
FAR_AWAY = [80, 0, 90, 10]


def narrowed(overlap):
    return [0, 0, 10 * overlap, 10]


def image(detections, objects):
    """One image's six tensors, from lists of (box, label, score) and of (box, label, difficult)."""
    det_boxes, det_labels, det_scores = zip(*detections, strict=True) if detections else ((), (), ())
    true_boxes, true_labels, difficulties = zip(*objects, strict=True) if objects else ((), (), ())
    return (
        torch.tensor(det_boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(det_labels, dtype=torch.int64),
        torch.tensor(det_scores, dtype=torch.float32),
        torch.tensor(true_boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(true_labels, dtype=torch.int64),
        torch.tensor(difficulties, dtype=torch.uint8),
    )


def average_precision(*images, label_map=LABEL_MAP, **parameters):
    """The average precision of cats over images from `image()`."""
    lists = [list(part) for part in zip(*images, strict=True)]
    return calculate_mAP(*lists, label_map=label_map, **parameters)[0]["cat"]


# By hand


@pytest.fixture
def four_detections_of_three_objects():
    """By falling score: true, false, true, false; recall 1/3, 1/3, 2/3, 2/3, precision 1, 1/2, 2/3, 1/2."""
    return (
        image([(FIRST, 1, 0.9), (FAR_AWAY, 1, 0.8)], [(FIRST, 1, 0)]),
        image([(SECOND, 1, 0.7), (FAR_AWAY, 1, 0.6)], [(SECOND, 1, 0), (FIRST, 1, 0)]),
    )


def test_11_points(four_detections_of_three_objects):
    # Points 0 to 0.3 are reached with a precision of 1, those to 0.6 with 2/3, the last four never.
    expected = (4 * 1 + 3 * 2 / 3) / 11
    assert average_precision(*four_detections_of_three_objects) == pytest.approx(expected, abs=1e-12)


def test_area(four_detections_of_three_objects):
    expected = 1 / 3 * 1 + 1 / 3 * 2 / 3
    value = average_precision(*four_detections_of_three_objects, metric="area")
    assert value == pytest.approx(expected, abs=1e-12)


def test_precision_counts_as_the_highest_at_any_greater_recall():
    # False, true, true: precision 0, 1/2, 2/3 at recall 0, 1/2, 1: 2/3 everywhere.
    one = image([(FAR_AWAY, 1, 0.9), (FIRST, 1, 0.8), (SECOND, 1, 0.7)], [(FIRST, 1, 0), (SECOND, 1, 0)])
    assert average_precision(one) == pytest.approx(2 / 3)
    assert average_precision(one, metric="area") == pytest.approx(2 / 3)


def test_recall_of_three_tenths_misses_the_point_that_floats_put_above_it():
    objects = [([i * 20, 0, i * 20 + 10, 10], 1, 0) for i in range(10)]
    one = image([(box, 1, 0.9) for box, _, _ in objects[:3]], objects)
    assert average_precision(one) == pytest.approx(3 / 11)  # 0, 0.1 and 0.2, as the development kit's ports count


def test_second_detection_of_an_object_is_false():
    one = image([(FIRST, 1, 0.9), (narrowed(0.8), 1, 0.8), (SECOND, 1, 0.7)], [(FIRST, 1, 0), (SECOND, 1, 0)])
    # True, false, true: precision 1 up to a recall of 1/2 (6 points), then 2/3 (5 points).
    assert average_precision(one) == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_object_goes_to_the_best_scored_detection_not_to_the_nearest():
    one = image([(narrowed(0.8), 1, 0.9), (FIRST, 1, 0.8)], [(FIRST, 1, 0)])
    assert average_precision(one) == 1.0
    assert average_precision(one, min_overlap=0.9) == pytest.approx(0.5)


def test_detection_counts_for_the_object_that_it_overlaps_most_even_if_that_is_taken():
    # [2, 0, 12, 10] overlaps [0, 0, 10, 10] by 80 / 120 and [5, 0, 15, 10] by 70 / 130, both above 0.5.
    objects = [(FIRST, 1, 0), ([5, 0, 15, 10], 1, 0)]
    one = image([(FIRST, 1, 0.9), ([2, 0, 12, 10], 1, 0.8)], objects)
    assert average_precision(one) == pytest.approx(6 / 11)  # half the objects; the other is not given to the second


def test_overlap_equal_to_the_threshold_is_enough():
    one = image([(narrowed(0.5), 1, 0.9)], [(FIRST, 1, 0)])
    assert average_precision(one) == 1.0
    assert average_precision(one, min_overlap=0.5001) == 0.0


def test_equal_overlaps_go_to_the_first_object():
    one = image([(FIRST, 1, 0.9), (FIRST, 1, 0.8)], [(FIRST, 1, 0), (FIRST, 1, 0)])
    assert average_precision(one) == pytest.approx(6 / 11)  # both detections are of the first


def test_difficult_objects_neither_help_nor_hurt():
    difficult_and_easy = [(FIRST, 1, 1), (SECOND, 1, 0)]
    assert average_precision(image([(SECOND, 1, 0.5)], difficult_and_easy)) == 1.0
    # Two detections of a difficult object are no mistakes, however they score.
    one = image([(FIRST, 1, 0.9), (narrowed(0.8), 1, 0.8), (SECOND, 1, 0.5)], difficult_and_easy)
    assert average_precision(one) == 1.0
    # One that overlaps a difficult object too little is false.
    one = image([(narrowed(0.4), 1, 0.9), (SECOND, 1, 0.5)], difficult_and_easy)
    assert average_precision(one) == pytest.approx(0.5)


def test_detection_of_a_difficult_object_does_not_count_for_an_easy_one_beside_it():
    one = image([([1, 0, 11, 10], 1, 0.9)], [(FIRST, 1, 1), ([4, 0, 14, 10], 1, 0)])
    assert average_precision(one) == 0.0


def test_equal_scores_count_in_their_order():
    true_first = image([(FIRST, 1, 0.5), (FAR_AWAY, 1, 0.5)], [(FIRST, 1, 0)])
    false_first = image([(FAR_AWAY, 1, 0.5), (FIRST, 1, 0.5)], [(FIRST, 1, 0)])
    assert average_precision(true_first) == 1.0
    assert average_precision(false_first) == 0.5
    # Across images, too.
    only_true, only_false = image([(FIRST, 1, 0.5)], [(FIRST, 1, 0)]), image([(FAR_AWAY, 1, 0.5)], [])
    assert average_precision(only_true, only_false) == 1.0
    assert average_precision(only_false, only_true) == 0.5


@pytest.mark.parametrize(
    "scores", [[3.0, -1.0, -2.0], [0.0, -0.0, -1e-30], [-1.0, -2.0, -3.0], [math.inf, 0.0, -math.inf]]
)
def test_scores_may_be_negative_or_zero(scores):
    boxes = [FIRST, FAR_AWAY, SECOND]  # true, false, true
    one = image(list(zip(boxes, [1, 1, 1], scores, strict=True)), [(FIRST, 1, 0), (SECOND, 1, 0)])
    assert average_precision(one) == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_other_classes_and_other_images_do_not_count():
    objects = [(FIRST, 1, 0)]
    assert average_precision(image([(FIRST, 2, 0.9)], objects)) == 0.0
    assert average_precision(image([(FIRST, 1, 0.9)], []), image([], objects)) == 0.0
    one = [image([(FIRST, 1, 0.9), (FIRST, 2, 0.95)], objects), image([(SECOND, 2, 0.99)], [(SECOND, 2, 0)])]
    assert average_precision(*one) == 1.0


# Nothing there


def test_no_detections_at_all():
    lists = [[part] * 2 for part in image([], [(FIRST, 1, 0), (SECOND, 2, 0)])]
    assert calculate_mAP(*lists, label_map=LABEL_MAP) == ({"cat": 0.0, "dog": 0.0}, 0.0)


def test_no_objects_at_all():
    lists = [[part] for part in image([(FIRST, 1, 0.9)], [])]
    average_precisions, mean = calculate_mAP(*lists, label_map=LABEL_MAP)
    assert list(average_precisions) == ["cat", "dog"]
    assert all(math.isnan(value) for value in [*average_precisions.values(), mean])


def test_no_images():
    average_precisions, mean = calculate_mAP([], [], [], [], [], [], label_map=LABEL_MAP)
    assert math.isnan(average_precisions["cat"]) and math.isnan(mean)


def test_class_without_easy_objects_is_named_and_left_out_of_the_mean():
    lists = [[part] for part in image([(FIRST, 1, 0.9), (SECOND, 2, 0.8)], [(FIRST, 1, 0), (SECOND, 2, 1)])]
    average_precisions, mean = calculate_mAP(*lists, label_map=LABEL_MAP)
    assert average_precisions["cat"] == 1.0 and math.isnan(average_precisions["dog"])
    assert mean == 1.0


def test_detections_on_images_without_objects_are_false():
    empty = image([(FIRST, 1, 0.95)], [])
    assert average_precision(empty, image([(FIRST, 1, 0.9)], [(FIRST, 1, 0)])) == 0.5


def test_boxes_without_area_or_numbers_find_nothing():
    for box in ([5, 5, 5, 5], [10, 10, 0, 0], [math.nan] * 4, [-math.inf, 0, math.inf, 10]):
        one = image([(box, 1, 0.9), (FIRST, 1, 0.8)], [(FIRST, 1, 0)])
        assert average_precision(one) == 0.5


# Parameters


def test_labels_and_names_come_from_the_label_map():
    label_map = {"background": 0, "rare": 7, "cat": 3}
    one = image([(FIRST, 3, 0.9)], [(FIRST, 3, 0), (SECOND, 7, 0)])
    average_precisions, mean = calculate_mAP(*([part] for part in one), label_map=label_map)
    assert average_precisions == {"rare": 0.0, "cat": 1.0}
    assert mean == 0.5


def test_without_a_label_map_the_classes_are_those_of_voc():
    average_precisions, _ = calculate_mAP(*([part] for part in image([(FIRST, 20, 0.9)], [(FIRST, 20, 0)])))
    assert tuple(average_precisions) == voc_labels
    assert average_precisions["tvmonitor"] == 1.0 and math.isnan(average_precisions["aeroplane"])


def test_fractions_and_pixels_give_the_same():
    case = random_case(torch.Generator().manual_seed(4))
    in_pixels = [[boxes * 256 for boxes in case[0]], *case[1:3], [boxes * 256 for boxes in case[3]], *case[4:]]
    assert calculate_mAP(*case, label_map=LABEL_MAP)[1] > 0
    assert calculate_mAP(*case, label_map=LABEL_MAP) == calculate_mAP(*in_pixels, label_map=LABEL_MAP)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tensors_on_a_gpu():
    case = random_case(torch.Generator().manual_seed(0))
    on_gpu = [[tensor.cuda() for tensor in part] for part in case]
    assert calculate_mAP(*case, label_map=LABEL_MAP) == calculate_mAP(*on_gpu, label_map=LABEL_MAP)


# Errors


def test_lists_of_different_lengths():
    case = [[part] * 2 for part in image([(FIRST, 1, 0.9)], [(FIRST, 1, 0)])]
    with pytest.raises(ValueError, match="2 images with detections, but 1 with objects"):
        calculate_mAP(*case[:3], *(part[:1] for part in case[3:]), label_map=LABEL_MAP)
    for part in range(6):
        shorter = [*case[:part], [tensor[:0] for tensor in case[part]], *case[part + 1 :]]
        with pytest.raises(ValueError, match="differ in number in at least one image"):
            calculate_mAP(*shorter, label_map=LABEL_MAP)
    for part in (1, 2, 4, 5):
        shorter = [*case[:part], case[part][:1], *case[part + 1 :]]
        with pytest.raises(ValueError, match="differ in number"):
            calculate_mAP(*shorter, label_map=LABEL_MAP)


@pytest.mark.parametrize("label", [0, 3, -1])
def test_label_that_is_not_in_the_label_map(label):
    for one in (image([(FIRST, label, 0.9)], []), image([], [(FIRST, label, 0)])):
        with pytest.raises(ValueError, match=f"the label {label} is not in the label map"):
            calculate_mAP(*([part] for part in one), label_map=LABEL_MAP)


def test_unknown_metric():
    with pytest.raises(ValueError, match='"11 points" or "area"'):
        calculate_mAP([], [], [], [], [], [], metric="12 points")


def test_score_that_is_not_a_number():
    one = image([(FIRST, 1, math.nan)], [(FIRST, 1, 0)])
    with pytest.raises(ValueError, match="not a number"):
        calculate_mAP(*([part] for part in one), label_map=LABEL_MAP)


# Against slow versions


def random_case(generator):
    """Six lists for a few images: boxes that overlap often, scores and overlaps that are often equal."""

    def random(*sizes):
        return torch.rand(*sizes, generator=generator)

    def some_boxes(n):
        corners = (random(n, 2) * 4).round() / 8
        return torch.cat([corners, corners + ((random(n, 2) * 3).round() + 1) / 8], dim=1)

    lists = [[] for _ in range(6)]
    for _ in range(int(random(1) * 6)):
        n_detections, n_objects = int(random(1) * 12), int(random(1) * 5)
        parts = (
            some_boxes(n_detections),
            (random(n_detections) * 2).long() + 1,
            (random(n_detections) * 8).round() / 8,
            some_boxes(n_objects),
            (random(n_objects) * 2).long() + 1,
            (random(n_objects) < 0.3).to(torch.uint8),
        )
        for part, whole in zip(parts, lists, strict=True):
            whole.append(part)
    return lists


def test_random_cases_equal_the_plain_version():
    generator = torch.Generator().manual_seed(0)
    n_compared = 0
    for seed in range(400):
        case = random_case(generator)
        if not case[0]:
            continue
        min_overlap = (0.5, 0.25, 0.75)[seed % 3]
        expected = plain_calculate_mAP(*case, n_classes=3, threshold=min_overlap).tolist()
        average_precisions, _ = calculate_mAP(*case, label_map=LABEL_MAP, min_overlap=min_overlap)
        for value, plain in zip(average_precisions.values(), expected, strict=True):
            assert value == pytest.approx(plain, abs=1e-12, nan_ok=True)
            n_compared += plain > 0
    assert n_compared > 100


def plain_area(is_true, n_objects):
    """Area under the monotonic precision-recall curve: for each true detection a step of recall 1 / n_objects."""
    precisions = [sum(is_true[: i + 1]) / (i + 1) for i in range(len(is_true))]
    return sum(max(precisions[i:]) for i in range(len(is_true)) if is_true[i]) / n_objects


def test_area_of_random_cases():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n_objects = int(rng.integers(1, 12))
        is_true = rng.random(int(rng.integers(1, 20))) < 0.5
        is_true &= np.cumsum(is_true) <= n_objects
        objects = [([i * 20, 0, i * 20 + 10, 10], 1, 0) for i in range(n_objects)]
        found = iter(objects)
        boxes = [next(found)[0] if true else [0, 500, 10, 510] for true in is_true]
        one = image([(box, 1, 1 - i / 100) for i, box in enumerate(boxes)], objects)
        assert average_precision(one, metric="area") == pytest.approx(plain_area(is_true.tolist(), n_objects))


@pytest.fixture(scope="session")
def voc07_test(real_data, tmp_path_factory):
    """VOC2007's test images: their names, their objects as three lists, and a folder of real detections."""
    folder = tmp_path_factory.mktemp("voc07")
    for archive in ("voc_annotations.tar.xz", "voc07_test_detections.tar.xz"):
        with tarfile.open(real_data / archive, "r|xz") as files:
            for entry in files:
                if "VOC2012" not in entry.name:
                    files.extract(entry, folder, filter="data")
    voc07 = folder / "VOCdevkit" / "VOC2007"
    names = (voc07 / "ImageSets" / "Main" / "test.txt").read_text().split()
    annotations = [parse_annotation(voc07 / "Annotations" / f"{name}.xml") for name in names]
    label_map = make_label_map(voc_labels)
    objects = (
        [torch.tensor(annotation["boxes"]) for annotation in annotations],
        [torch.tensor([label_map[name] for name in annotation["names"]]) for annotation in annotations],
        [torch.tensor(annotation["difficulties"]) for annotation in annotations],
    )
    return names, objects, folder / "det"


def test_real_detections_score_as_by_the_development_kit(voc07_test, real_data):
    names, objects, folder = voc07_test
    detections = read_voc_detections(folder, names, make_label_map(voc_labels))
    assert sum(len(labels) for labels in detections[1]) == 101_139
    expected = json.loads((real_data / "voc07_test_detections.ap.json").read_text())
    average_precisions, mean = calculate_mAP(*detections, *objects)
    for name in voc_labels:
        assert average_precisions[name] == pytest.approx(expected[name], abs=5e-9), name
    assert mean == pytest.approx(0.721381, abs=1e-6)


# COCO's numbers


def make_dataset(folder, paths, objects=None, label_map=LABEL_MAP):
    """A data set with the lists that create_data_lists.py writes; its images need not exist.

    objects: for each image a list of (box, label, difficulty); None: nowhere any.
    """
    entries = []
    for triples in objects or [[]] * len(paths):
        parts = [list(part) for part in zip(*triples, strict=True)] or [[], [], []]
        entries.append(dict(zip(("boxes", "labels", "difficulties"), parts, strict=True), size=[1000, 1000]))
    folder.mkdir(exist_ok=True)
    for name, content in (("TEST_images", paths), ("TEST_objects", entries), ("label_map", label_map)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return PascalVOCDataset(folder, "TEST", keep_difficult=True)


def make_coco_files(rng, folder, string_ids):
    """A COCO file with objects of all sizes, crowds, and ids in any order; a file of results, scores often equal."""
    ids = [f"photo {i}" if string_ids else int(i) for i in rng.permutation(1000)[:40]]
    images = [{"id": i, "width": 640, "height": 480, "file_name": f"{i}.jpg"} for i in ids]
    annotations, found = [], []
    for image_id in np.repeat(np.array(ids, object), rng.integers(0, 6, len(ids))):
        x, y, side = (float(rng.integers(0, 200)), float(rng.integers(0, 200)), float(rng.choice([8, 20, 32, 96, 200])))
        box, category, is_crowd = (
            [x, y, side, side * rng.choice([0.5, 1, 1.25])],
            int(rng.choice([90, 3])),
            rng.random() < 0.2,
        )
        area = box[2] * box[3] * rng.choice([0.5, 1])  # of the outline, which is smaller than the box
        one = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "bbox": box}
        annotations.append(one | {"area": area, "iscrowd": int(is_crowd)})
        for _ in range(rng.integers(0, 4)):
            moved = (box + rng.integers(-8, 9, 4) * side / 64).tolist()
            category_id, score = int(rng.choice([90, category])), int(rng.integers(1, 10)) / 10
            found.append({"image_id": image_id, "category_id": category_id, "bbox": moved, "score": score})
    categories = [{"id": 90, "name": "cat"}, {"id": 3, "name": "dog"}]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps(found))


def reference_numbers(folder):
    """The twelve numbers that pycocotools itself gives for truth.json and found.json."""
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO(str(folder / "truth.json"))
        run = cocoeval.COCOeval(truth, truth.loadRes(str(folder / "found.json")), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    assert run.stats[0] > 0.05 and len(set(run.stats.round(9))) > 9
    return pytest.approx(np.where(run.stats < 0, np.nan, run.stats).tolist(), abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("string_ids", [False, True])
def test_coco_numbers_are_those_of_pycocotools(tmp_path, string_ids):
    make_coco_files(np.random.default_rng(string_ids), tmp_path, string_ids)
    train, truth = tmp_path / "train.json", tmp_path / "truth.json"
    train.write_text(truth.read_text().replace(".jpg", ".png"))  # other images
    create_data_lists(output_folder=tmp_path, train_data=str(train), test_data=str(truth), check_images=False)
    dataset = PascalVOCDataset(tmp_path, "TEST", keep_difficult=True)
    average_precisions, twelve = calculate_coco(*read_detections(tmp_path / "found.json", dataset), dataset)
    assert list(twelve.values()) == reference_numbers(tmp_path)
    assert list(twelve) == list(COCO_NUMBERS) and sum(average_precisions.values()) / 2 == pytest.approx(twelve["AP"])


def test_coco_numbers_of_real_detections(voc07_test, tmp_path):
    names, objects, folder = voc07_test
    names, objects = names[:300], [part[:300] for part in objects]
    triples = [list(zip(*(part.tolist() for part in one), strict=True)) for one in zip(*objects, strict=True)]
    dataset = make_dataset(tmp_path / "lists", names, triples, make_label_map(voc_labels))
    (tmp_path / "det").mkdir()
    for path in folder.iterdir():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.split()[0] in set(names)]
        (tmp_path / "det" / path.name).write_text("".join(lines))
    detections = read_detections(tmp_path / "det", dataset)
    write_detections(tmp_path / "found.json", dataset, detections)
    annotations = [
        {"image_id": i, "category_id": label, "bbox": [x, y, x_max - x, y_max - y], "iscrowd": difficult}
        for i, one in enumerate(triples, start=1)
        for (x, y, x_max, y_max), label, difficult in one
    ]
    for i, annotation in enumerate(annotations, start=1):
        annotation |= {"id": i, "area": annotation["bbox"][2] * annotation["bbox"][3]}
    categories = [{"id": label} for label in range(1, 21)]
    truth = {"images": [{"id": i + 1} for i in range(300)], "annotations": annotations, "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    expected = reference_numbers(tmp_path)
    for again in (detections, read_detections(tmp_path / "found.json", dataset)):
        assert list(calculate_coco(*again, dataset)[1].values()) == expected


def test_coco_numbers_by_hand(tmp_path):
    pytest.importorskip("pycocotools")
    dataset = make_dataset(tmp_path, ["a.jpg"], [[([0, 0, 10, 10], 1, 0)]])
    one = detections_of([([0, 0, 10, 7.2], 1, 0.9)])  # an overlap of 0.72: enough for five of the ten
    average_precisions, twelve = calculate_coco(*one, dataset)
    assert average_precisions["cat"] == pytest.approx(0.5) and math.isnan(average_precisions["dog"])
    assert (twelve["AP"], twelve["AP50"], twelve["AP75"]) == pytest.approx((0.5, 1, 0))
    assert twelve["AP small"] == pytest.approx(0.5) and math.isnan(twelve["AP large"])
    assert calculate_coco(*detections_of([]), dataset)[1]["AP"] == 0


# Files of detections


def detections_of(*images):
    """Three lists as from `detect_all()`, from lists of (box, label, score)."""
    return [list(part) for part in zip(*(image(one, [])[:3] for one in images), strict=True)]


@pytest.fixture
def two_images(tmp_path):
    return make_dataset(tmp_path / "lists", ["photos/a b.jpg", "000001.jpg"])


def test_written_pixels_count_from_1_and_include_both_ends(tmp_path, two_images):
    write_detections(tmp_path / "found", two_images, detections_of([([0, 0, 500, 375], 2, 0.25)], []))
    assert (tmp_path / "found/comp4_det_test_dog.txt").read_text() == "a b 0.25 1 1 500 375\n"
    assert (tmp_path / "found/comp4_det_test_cat.txt").read_text() == ""
    assert len(list((tmp_path / "found").iterdir())) == 2  # none for background


def test_coco_files_have_ids_and_sides(tmp_path, two_images):
    found = detections_of([([10, 20, 500, 375], 2, 0.25)], [([0.5, 0, 1, 1], 1, 0.125)])
    expected = [
        {"image_id": 1, "category_id": 2, "bbox": [10, 20, 490, 355], "score": 0.25},
        {"image_id": 2, "category_id": 1, "bbox": [0.5, 0, 0.5, 1], "score": 0.125},
    ]
    write_detections(tmp_path / "found.json", two_images, found)
    assert json.loads((tmp_path / "found.json").read_text()) == expected
    two_images.image_ids = [139, "b"]  # those of a COCO file
    (tmp_path / "lists/category_ids.json").write_text('{"dog": 18, "cat": 17}')
    write_detections(tmp_path / "found.json", two_images, found)
    for entry, image_id, category_id in zip(expected, (139, "b"), (18, 17), strict=True):
        entry |= {"image_id": image_id, "category_id": category_id}
    assert json.loads((tmp_path / "found.json").read_text()) == expected
    two_images.image_ids = [7, 7]
    with pytest.raises(ValueError, match="two images, or two classes, have one id"):
        write_detections(tmp_path / "found.json", two_images)


@pytest.mark.parametrize("target", ["new/folder", "new/found.json"])
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
    found = detections_of([(FIRST, label, 0.5) for label in (1, 2, 3)])
    write_detections(tmp_path / "found", dataset, found)
    names = ["comp4_det_test_%D800.txt", "comp4_det_test_..%2F100%25.txt", "comp4_det_test_truck%2Fbus.txt"]
    assert sorted(path.name for path in tmp_path.rglob("*.txt")) == names
    assert torch.equal(read_detections(tmp_path / "found", dataset)[1][0], found[1][0])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["x/a.jpg", "b.jpg", "y/a.jpg"], "two images are named 'a'"),
        (["a.jpg", "b\nc.jpg"], "an image is named 'b c'"),
        (["a.jpg", " b.jpg"], "an image is named"),
        (["a.jpg", "\ud800.jpg"], r"an image is named '\\ud800'"),
    ],
)
def test_image_names_that_vocs_files_cannot_hold(tmp_path, paths, message):
    dataset = make_dataset(tmp_path, paths)
    with pytest.raises(ValueError, match=message):
        write_detections(tmp_path / "found", dataset)  # the trial, before anything is detected
    with pytest.raises(ValueError, match=message):
        read_detections(tmp_path / "found", dataset)
    found = detections_of(*[[([0, 0, i + 1, 5], 1, 0.5)] for i in range(len(paths))])
    write_detections(tmp_path / "found.json", dataset, found)  # ids tell them apart
    assert torch.equal(torch.cat(read_detections(tmp_path / "found.json", dataset)[0]), torch.cat(found[0]).double())


def test_a_trial_leaves_nothing_and_names_what_cannot_be_written(tmp_path, two_images):
    write_detections(tmp_path / "found", two_images)
    write_detections(tmp_path / "found.json", two_images)
    assert list((tmp_path / "found").iterdir()) == [] and not (tmp_path / "found.json").exists()
    for path in ("/dev/null/found.json", "/dev/null"):
        with pytest.raises(OSError, match=f"{path}: the detections cannot be written"):
            write_detections(path, two_images)
    dataset = make_dataset(tmp_path, ["a.jpg"], None, make_label_map(["x" * 300]))
    with pytest.raises(OSError, match=r"found: the detections cannot be written.*too long"):
        write_detections(tmp_path / "found", dataset)


@pytest.mark.parametrize("target", ["found", "found.json"])
def test_full_disk_is_named_and_changes_nothing(tmp_path, two_images, monkeypatch, target):
    write_detections(tmp_path / target, two_images, detections_of([(FIRST, 1, 0.5)], []))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    calls = []

    def no_space(_):
        calls.append(1)
        if len(calls) == (3 if target == "found" else 1):  # the second file; a folder is synchronised, too
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=f"{target}: the detections cannot be written: .*No space left"):
        write_detections(tmp_path / target, two_images, detections_of([(SECOND, 2, 0.5)], []))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_empty_and_missing_files(tmp_path, two_images):
    for name in ("comp4_det_test_cat.txt", "comp4_det_test_dog.txt", "found.json"):
        (tmp_path / name).write_text("[]" * (name == "found.json"))
    for path in (tmp_path, tmp_path / "found.json"):
        boxes, labels, scores = read_detections(path, two_images)
        assert [part.shape for part in boxes] == [(0, 4), (0, 4)]
        assert [len(part) for part in labels + scores] == [0, 0, 0, 0]
    (tmp_path / "comp4_det_test_dog.txt").unlink()
    for path, missing in ((tmp_path, r"comp4_det_test_dog\.txt"), (tmp_path / "none.json", r"none\.json")):
        with pytest.raises(FileNotFoundError, match=missing):
            read_detections(path, two_images)


@pytest.mark.parametrize(
    "line", ["a b 0.5 1 1 10", "a b 0.5 1 1 10 ten", "", "zzz 0.5 1 1 10 10", "a b nan 1 1 10 10", "a b 0.5 1 1 inf 10"]
)
def test_faulty_line_is_named(tmp_path, line):
    (tmp_path / "comp4_det_test_cat.txt").write_text("")
    (tmp_path / "comp4_det_test_dog.txt").write_text(f"a b 0.5 1 1 10 10\n{line}\na b 0.4 1 1 10 10\n")
    with pytest.raises(ValueError, match=rf"comp4_det_test_dog\.txt, line 2: '{line}' is not `image score"):
        read_voc_detections(tmp_path, ["a b", "c"], LABEL_MAP)


@pytest.mark.parametrize(
    "change",
    [
        {"image_id": 3}, {"image_id": "1"}, {"image_id": [1]}, {"category_id": 0}, {"category_id": None},
        {"score": None}, {"score": math.nan}, {"bbox": [1, 2, 3]}, {"bbox": [1, 2, 3, math.inf]},
        {"bbox": [1, 2, 10**400, 4]}, {"bbox": "123"}, None,
    ],
    ids=lambda change: str(change)[:30],
)  # fmt: skip
def test_faulty_entry_is_named(tmp_path, two_images, change):
    right = {"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "score": 0.5}
    (tmp_path / "found.json").write_text(json.dumps([right, change and right | change]))
    with pytest.raises(ValueError, match=r"found\.json, entry 2: '.*' is not \{\"image_id\": .* finite") as info:
        read_detections(tmp_path / "found.json", two_images)
    assert str(change)[1:9] in str(info.value) and len(str(info.value)) < 700


# The script


def test_loader_takes_its_batch_size_and_images_as_the_model_wants_them(lists):
    model = SimpleNamespace(input_size=512, antialias=False, mean=torch.zeros(1))
    loader = make_test_loader(lists, 3, 0, model)
    assert loader.batch_size == 3 and loader.dataset.antialias is False and not loader.pin_memory
    assert next(iter(loader))[0].shape == (3, 3, 512, 512)


@pytest.mark.parametrize("metric", ["11 points", "area", "coco"])
def test_script_scores_writes_and_reads(metric, lists, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    if metric == "coco":
        pytest.importorskip("pycocotools")

    def run(**parameters):
        parameters = {"data_folder": str(lists), "metric": metric, "workers": 0, "min_score": 0.2, **parameters}
        with monkeypatch.context() as patch:
            for name, value in parameters.items():
                patch.setattr(evaluation, name, value)
            evaluation.main()
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("detections written")]

    found = run(checkpoint=str(tiny_checkpoint), batch_size=3, write_detections_to=str(tmp_path / "found.json"))
    assert found[0].startswith("circle") and found[4].split()[0] == ("AP" if metric == "coco" else "mean")
    assert found[-1].startswith(metric) and "4 images detected in" in found[-1] and "a second" in found[-1]
    again = run(read_detections_from=str(tmp_path / "found.json"), write_detections_to=str(tmp_path / "found"))
    assert again[:-1] == found[:-1] == run(read_detections_from=str(tmp_path / "found"))[:-1]


def test_evaluate_gives_the_same_in_any_batches(lists, tiny_checkpoint):
    model = load_model(tiny_checkpoint)
    one, three = (evaluation.evaluate(make_test_loader(lists, n, 0, model), model) for n in (1, 3))
    assert list(one[0]) == list(three[0]) == list(model.label_map)[1:] and not model.training
    assert one[1] == pytest.approx(three[1], abs=0.01)
    model.label_map = LABEL_MAP
    with pytest.raises(ValueError, match=r"knows 3 labels \(background, cat, dog\), the data set has 5 labels"):
        evaluation.evaluate(make_test_loader(lists, 1, 0, model), model)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("metric", "12 points", '"11 points", "area" or "coco"'),
        ("min_overlap", 0.0, "min_overlap is 0.0"),
        ("min_overlap", math.nan, "min_overlap is nan"),
        ("write_detections_to", "/dev/null/found", "/dev/null/found: the detections cannot be written"),
    ],
)
def test_errors_before_anything_is_detected(lists, tiny_checkpoint, monkeypatch, name, value, message):
    settings = {"detect_all": None, "data_folder": str(lists), "checkpoint": str(tiny_checkpoint), "workers": 0}
    for parameter, setting in {**settings, name: value}.items():
        monkeypatch.setattr(evaluation, parameter, setting)
    with pytest.raises((OSError, ValueError), match=message):
        evaluation.main()


def test_missing_pycocotools_is_named(monkeypatch):
    monkeypatch.setattr(evaluation, "metric", "coco")
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install pycocotools"):
        evaluation.check_parameters()
