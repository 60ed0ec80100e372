"""The VOC metric: cases worked by hand, a slow plain version, 101,139 real detections; files of detections."""

import json
import math
import tarfile

import numpy as np
import pytest
import torch
from benchmark_plain import plain_calculate_mAP

from annotations import parse_annotation
from eval import COCO_THRESHOLDS, calculate_mAP, read_voc_detections, write_voc_detections
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
    assert average_precision(one, threshold=0.9) == pytest.approx(0.5)


def test_detection_counts_for_the_object_that_it_overlaps_most_even_if_that_is_taken():
    # [2, 0, 12, 10] overlaps [0, 0, 10, 10] by 80 / 120 and [5, 0, 15, 10] by 70 / 130, both above 0.5.
    objects = [(FIRST, 1, 0), ([5, 0, 15, 10], 1, 0)]
    one = image([(FIRST, 1, 0.9), ([2, 0, 12, 10], 1, 0.8)], objects)
    assert average_precision(one) == pytest.approx(6 / 11)  # half the objects; the other is not given to the second


def test_overlap_equal_to_the_threshold_is_enough():
    one = image([(narrowed(0.5), 1, 0.9)], [(FIRST, 1, 0)])
    assert average_precision(one) == 1.0
    assert average_precision(one, threshold=0.5001) == 0.0


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


def test_mean_over_the_overlaps_of_coco():
    assert COCO_THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    one = image([([0, 0, 10, 7.2], 1, 0.9)], [(FIRST, 1, 0)])  # an overlap of 0.72: enough for five of the ten
    assert average_precision(one, threshold=COCO_THRESHOLDS) == pytest.approx(0.5)


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
        threshold = (0.5, 0.25, 0.75)[seed % 3]
        expected = plain_calculate_mAP(*case, n_classes=3, threshold=threshold).tolist()
        average_precisions, _ = calculate_mAP(*case, label_map=LABEL_MAP, threshold=threshold)
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
        assert average_precisions[name] == pytest.approx(expected[name], abs=1e-5), name
    assert mean == pytest.approx(0.721381, abs=1e-5)


# Files of detections


def test_written_pixels_count_from_1_and_include_both_ends(tmp_path):
    one = image([([0, 0, 500, 375], 2, 0.25)], [])
    write_voc_detections(tmp_path, ["000001"], [one[0]], [one[1]], [one[2]], LABEL_MAP)
    assert (tmp_path / "comp4_det_test_dog.txt").read_text() == "000001 0.25 1 1 500 375\n"
    assert (tmp_path / "comp4_det_test_cat.txt").read_text() == ""
    assert len(list(tmp_path.iterdir())) == 2  # none for background


def test_detections_come_back_as_they_were_written(tmp_path):
    generator = torch.Generator().manual_seed(0)
    counts = [3, 0, 50, 1]
    names = ["000001", "no objects", "a name with spaces", "2008_000003"]
    boxes = [torch.rand(n, 4, generator=generator) * 500 for n in counts]
    labels = [torch.randint(1, 3, (n,), generator=generator) for n in counts]
    scores = [torch.rand(n, generator=generator) for n in counts]
    folder = tmp_path / "new" / "folder"
    write_voc_detections(folder, names, boxes, labels, scores, LABEL_MAP)
    read_boxes, read_labels, read_scores = read_voc_detections(folder, names, LABEL_MAP)
    for i in range(len(names)):
        order = labels[i].argsort(stable=True)  # files are read class by class
        assert torch.equal(read_labels[i], labels[i][order])
        torch.testing.assert_close(read_boxes[i].float(), boxes[i][order], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(read_scores[i].float(), scores[i][order], rtol=1e-6, atol=0)


def test_scores_keep_their_order_through_a_file(tmp_path):
    scores = torch.tensor([0.1]).nextafter(torch.tensor([1.0]))
    scores = torch.cat([scores, torch.tensor([0.1])])  # two neighbouring float32 numbers
    boxes, labels = torch.tensor([FIRST, SECOND], dtype=torch.float32), torch.tensor([1, 1])
    write_voc_detections(tmp_path, ["a"], [boxes], [labels], [scores], LABEL_MAP)
    assert torch.equal(read_voc_detections(tmp_path, ["a"], LABEL_MAP)[2][0].float(), scores)


def write_files(folder, cat="", dog=""):
    (folder / "comp4_det_test_cat.txt").write_text(cat)
    (folder / "comp4_det_test_dog.txt").write_text(dog)


def test_class_names_that_no_file_can_have(tmp_path):
    label_map = {"background": 0, "truck/bus": 1, "../100%": 2}
    boxes, labels, scores = torch.tensor([FIRST, SECOND], dtype=torch.float32), torch.tensor([1, 2]), torch.rand(2)
    write_voc_detections(tmp_path / "found", ["a"], [boxes], [labels], [scores], label_map)
    assert sorted(path.name for path in tmp_path.rglob("*.txt")) == [
        "comp4_det_test_..%2F100%25.txt",
        "comp4_det_test_truck%2Fbus.txt",
    ]
    assert torch.equal(read_voc_detections(tmp_path / "found", ["a"], label_map)[1][0], labels)


def test_two_images_of_one_name_are_refused(tmp_path):
    write_files(tmp_path)
    with pytest.raises(ValueError, match="two images are named 'b'"):
        read_voc_detections(tmp_path, ["a", "b", "b"], LABEL_MAP)
    with pytest.raises(ValueError, match="two images are named 'a'"):
        write_voc_detections(
            tmp_path, ["a", "a"], [torch.zeros(0, 4)] * 2, [torch.zeros(0)] * 2, [torch.zeros(0)] * 2, {}
        )


def test_empty_files_hold_no_detections(tmp_path):
    write_files(tmp_path)
    boxes, labels, scores = read_voc_detections(tmp_path, ["a", "b"], LABEL_MAP)
    assert [part.shape for part in boxes] == [(0, 4), (0, 4)]
    assert [len(part) for part in labels + scores] == [0, 0, 0, 0]


def test_missing_file_of_a_class_is_named(tmp_path):
    (tmp_path / "comp4_det_test_cat.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"comp4_det_test_dog\.txt"):
        read_voc_detections(tmp_path, ["a"], LABEL_MAP)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a 0.5 1 1 10", "'a 0.5 1 1 10' is no `image score"),
        ("a 0.5 1 1 10 ten", "'a 0.5 1 1 10 ten' is no `image score"),
        ("", "is no `image score"),
        ("zzz 0.5 1 1 10 10", "'zzz' is not in the TEST lists"),
        ("a nan 1 1 10 10", "not finite"),
        ("a 0.5 1 1 inf 10", "not finite"),
    ],
)
def test_faulty_line_is_named(tmp_path, line, message):
    write_files(tmp_path, dog=f"a 0.5 1 1 10 10\n{line}\na 0.4 1 1 10 10\n")
    with pytest.raises(ValueError, match=r"comp4_det_test_dog\.txt, line 2: .*" + message):
        read_voc_detections(tmp_path, ["a"], LABEL_MAP)


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
