"""The analysis of errors: cases worked by hand, a slow plain version on real detections; the pictures; the script."""

import csv
import json
import math
import tarfile
import xml.etree.ElementTree as ET

import analyze
import numpy as np
import pytest
import torch
from helpers import LABEL_MAP, read_log, write, write_image
from matplotlib.figure import Figure
from PIL import Image

from datasets import PascalVOCDataset
from eval import area_under_curve, average_of_11_points, score, write_detections
from utils import find_jaccard_overlap, make_label_map, voc_labels

CAT, DOG = 1, 2
A, B, C, NONE = [0, 0, 10, 10], [50, 50, 70, 70], [100, 0, 110, 10], [80, 0, 90, 10]


def make_dataset(folder, *images, label_map=LABEL_MAP, paths=None, size=(1000, 1000)):
    """A data set of images, each a list of objects (box, label, difficulty); the files need not exist."""
    entries = []
    for objects in images:
        boxes, labels, difficulties = [list(part) for part in zip(*objects, strict=True)] or [[], [], []]
        entries.append({"boxes": boxes, "labels": labels, "difficulties": difficulties, "size": list(size)})
    write(folder / "TEST_images.json", paths or [f"/nowhere/{number}.jpg" for number in range(len(images))])
    write(folder / "TEST_objects.json", entries)
    write(folder / "label_map.json", label_map)
    return PascalVOCDataset(folder, "TEST", keep_difficult=True)


def make_detections(*images):
    """Three lists as from `detect_all()`, from a list of (box, label, score) for each image."""
    boxes, labels, scores = [], [], []
    for rows in images:
        boxes.append(torch.tensor([box for box, _, _ in rows]).reshape(-1, 4).float())
        labels.append(torch.tensor([label for _, label, _ in rows], dtype=torch.int64))
        scores.append(torch.tensor([score for _, _, score in rows]).float())
    return boxes, labels, scores


def judge_one_image(folder, detections, objects):
    """The kinds of the detections of one image, by falling score, and whether its objects are found."""
    dataset = make_dataset(folder, objects)
    verdicts = analyze.diagnose(make_detections(detections), dataset)
    return verdicts["kind"].tolist(), list_found(verdicts, dataset)


def list_found(verdicts, dataset):
    """Of each object whether a detection is right about it."""
    return [number in verdicts["object"][verdicts["kind"] == "right"] for number in range(len(dataset.labels))]


# --- What each detection is -----------------------------------------------------------------------

CASES = {
    "each kind": (
        [(A, CAT, 0.9), ([0, 0, 8, 10], CAT, 0.8), ([0, 0, 4, 10], CAT, 0.7), (B, CAT, 0.6), (C, CAT, 0.5),
         (NONE, CAT, 0.4)],
        [(A, CAT, 0), (B, DOG, 0), (C, CAT, 1)],
        ["right", "duplicate", "localization", "other_class", "ignored", "background"], [True, False, False],
    ),
    "the better score is right, not the nearer box": (
        [([0, 0, 8, 10], CAT, 0.9), (A, CAT, 0.8)], [(A, CAT, 0)], ["right", "duplicate"], [True],
    ),
    "by score, in whatever order they come": (
        [(A, CAT, 0.1), ([0, 0, 8, 10], CAT, 0.9)], [(A, CAT, 0)], ["right", "duplicate"], [True],
    ),
    "equal scores: the first": ([(A, CAT, 0.5), (A, CAT, 0.5)], [(A, CAT, 0)], ["right", "duplicate"], [True]),
    # [2, 0, 12, 10] overlaps A by 80 / 120 and the other object by 70 / 130, both above 0.5.
    "the object it overlaps most, found or not": (
        [(A, CAT, 0.9), ([2, 0, 12, 10], CAT, 0.8)], [(A, CAT, 0), ([5, 0, 15, 10], CAT, 0)],
        ["right", "duplicate"], [True, False],
    ),
    "limits: 0.5, below it, 0.1, below it": (
        [([0, 0, width, 10], CAT, score) for width, score in ((5, 0.9), (4.9, 0.8), (1, 0.7), (0.9, 0.6))],
        [(A, CAT, 0)], ["right", "localization", "localization", "background"], [True],
    ),
    "localization before other_class": (
        [([0, 0, 6, 10], CAT, 0.9)], [(A, DOG, 0), ([4, 0, 14, 10], CAT, 0)], ["localization"], [False, False],
    ),
    "duplicate before other_class": (
        [(A, CAT, 0.9), (A, CAT, 0.8)], [(A, DOG, 0), (A, CAT, 0)], ["right", "duplicate"], [False, True],
    ),
    "a difficult object is ignored again and again": (
        [(A, CAT, 0.9), (A, CAT, 0.8)], [(A, CAT, 1)], ["ignored", "ignored"], [False],
    ),
    "near a difficult object, but not enough": ([([0, 0, 4, 10], CAT, 0.9)], [(A, CAT, 1)], ["localization"], [False]),
    "a difficult object of another class": ([(A, CAT, 0.9)], [(A, DOG, 1)], ["other_class"], [False]),
    "another class by less than 0.5": ([([0, 0, 4, 10], CAT, 0.9)], [(A, DOG, 0)], ["background"], [False]),
    "no objects": ([(A, CAT, 0.9)], [], ["background"], []), "no detections": ([], [(A, CAT, 0)], [], [False]),
}  # fmt: skip


@pytest.mark.parametrize(("detections", "objects", "kinds", "is_found"), CASES.values(), ids=CASES)
def test_kinds_by_hand(tmp_path, detections, objects, kinds, is_found):
    assert judge_one_image(tmp_path, detections, objects) == (kinds, is_found)


def test_objects_of_other_images_do_not_count(tmp_path):
    dataset = make_dataset(tmp_path, [(A, CAT, 0)], [], [(B, CAT, 0), (A, DOG, 0)])
    detections = make_detections([(B, CAT, 0.6)], [(A, CAT, 0.9)], [(B, CAT, 0.8), (A, CAT, 0.7)])
    verdicts = analyze.diagnose(detections, dataset)
    assert verdicts["image"].tolist() == [1, 2, 2, 0]
    assert verdicts["kind"].tolist() == ["background", "right", "other_class", "background"]
    assert verdicts["object"].tolist() == [-1, 1, 2, -1]
    assert list_found(verdicts, dataset) == [False, True, False]


def test_counts_by_hand(tmp_path):
    objects = [(A, CAT, 0), (C, CAT, 1), (B, CAT, 0), (B, DOG, 1)]
    detections = [(A, CAT, 0.9), (A, CAT, 0.8), (C, CAT, 0.7), (NONE, CAT, 0.6), (A, DOG, 0.5)]
    dataset = make_dataset(tmp_path, objects)
    verdicts = analyze.diagnose(make_detections(detections), dataset)
    scores = {"cat": 0.25, "dog": math.nan, "grandfather clock": math.nan}
    rows = analyze.count_by_class(verdicts, dataset, scores)
    analyze.write_summary(rows, tmp_path / "summary.csv")
    assert (tmp_path / "summary.csv").read_text().splitlines() == [
        "class,objects,detections,right,localization,other_class,duplicate,background,ignored,missed,average_precision",
        "cat,2,4,1,0,0,1,1,1,1,0.250000",
        "dog,0,1,0,0,1,0,0,0,0,",
        "grandfather clock,0,0,0,0,0,0,0,0,0,",
    ]


def test_classes_whose_names_look_the_same_have_bars_of_their_own(tmp_path):
    names = ["x" * 50 + end for end in "ab"]  # shown with their first letters
    dataset = make_dataset(tmp_path, [(A, 1, 0), (B, 2, 0)], label_map=make_label_map(names))
    verdicts = analyze.diagnose(make_detections([(A, 1, 0.9), (C, 2, 0.8)]), dataset)
    rows = analyze.count_by_class(verdicts, dataset, dict.fromkeys(names, 0.5))
    axes = analyze.draw_errors(verdicts, dataset, rows, analyze.add_up(rows)).axes
    for axis in axes:
        assert {bar.get_y() + bar.get_height() / 2 for bar in axis.patches} == {0, 1, 2}
    first, second, total = [label.get_text() for label in axes[0].get_yticklabels()]
    assert first == second and total == "all (2)"


# --- Real detections ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def voc07_test(real_data, tmp_path_factory):
    """A folder with the lists of VOC2007's test images, which are not there, and det, detections of them."""
    folder = tmp_path_factory.mktemp("voc07")
    with tarfile.open(real_data / "voc07_test_detections.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    with tarfile.open(real_data / "voc_annotations.tar.xz", "r|xz") as archive:
        of_2007 = (entry for entry in archive if entry.isfile() and "VOC2007" in entry.name)
        contents = {entry.name.rpartition("/")[2]: archive.extractfile(entry).read() for entry in of_2007}
    label_map = make_label_map(voc_labels)
    images, paths = [], []
    for name in contents["test.txt"].decode().split():
        objects = []
        for element in ET.fromstring(contents[f"{name}.xml"]).iter("object"):
            corners = [float(element.find(f"bndbox/{tag}").text) for tag in ("xmin", "ymin", "xmax", "ymax")]
            box = [corners[0] - 1, corners[1] - 1, corners[2], corners[3]]
            objects.append((box, label_map[element.find("name").text], int(element.find("difficult").text)))
        images.append(objects)
        paths.append(f"/nowhere/{name}.jpg")
    make_dataset(folder, *images, label_map=label_map, paths=paths)
    return folder


def count_right(boxes_xy, labels, scores, dataset, label):
    """How many detections of a class are true positives: the development kit's loop, one detection at a time."""
    rows = []
    for image in range(len(dataset)):
        of_class = (labels[image] == label).nonzero().flatten().tolist()
        rows += [(-float(scores[image][i]), image, i) for i in of_class]
    is_taken = set()
    n_right = 0
    for _, image, i in sorted(rows, key=lambda row: row[0]):
        best, best_overlap = None, -1.0
        for number in range(dataset.starts[image], dataset.starts[image + 1]):
            if dataset.labels[number] != label:
                continue
            box, other = boxes_xy[image][i].tolist(), dataset.boxes_xy_pixels[number].tolist()
            width = min(box[2], other[2]) - max(box[0], other[0])
            height = min(box[3], other[3]) - max(box[1], other[1])
            if width <= 0 or height <= 0:
                continue
            areas = [(x_max - x_min) * (y_max - y_min) for x_min, y_min, x_max, y_max in (box, other)]
            overlap = width * height / (sum(areas) - width * height)
            if overlap > best_overlap:
                best, best_overlap = number, overlap
        if best_overlap >= 0.5 and dataset.difficulties[best] == 0 and best not in is_taken:
            is_taken.add(best)
            n_right += 1
    return n_right


def test_counts_of_real_detections_add_up(voc07_test, real_data, tmp_path, run_main, capsys):
    run_main(analyze, data_folder=voc07_test, read_detections_from=voc07_test / "det", output_folder=tmp_path)
    output = capsys.readouterr().out
    assert "left out" in output and "worst.jpg" in output and not (tmp_path / "worst.jpg").exists()
    for name in ("errors.png", "precision_recall.png", "sizes.png"):
        assert min(Image.open(tmp_path / name).size) > 500

    expected = json.loads((real_data / "voc07_test_detections.ap.json").read_text())
    rows = read_log(tmp_path / "summary.csv")
    assert [row["class"] for row in rows] == list(voc_labels)
    for row in rows:
        counts = {column: int(value) for column, value in row.items() if column not in ("class", "average_precision")}
        wrong = sum(counts[kind] for kind in ("localization", "other_class", "duplicate", "background"))
        assert counts["right"] + wrong + counts["ignored"] == counts["detections"]
        assert counts["right"] + counts["missed"] == counts["objects"]
        assert float(row["average_precision"]) == pytest.approx(expected[row["class"]], abs=1e-6)
    assert sum(int(row["detections"]) for row in rows) == 101_139
    assert sum(int(row["objects"]) for row in rows) == 12_032

    dataset = PascalVOCDataset(voc07_test, "TEST", keep_difficult=True)
    detections = analyze.read_detections(voc07_test / "det", dataset)
    for row in rows[:6]:  # the plain loop takes a while
        assert int(row["right"]) == count_right(*detections, dataset, dataset.label_map[row["class"]])


def test_the_right_ones_are_those_of_the_metric(voc07_test):
    dataset = PascalVOCDataset(voc07_test, "TEST", keep_difficult=True)
    detections = analyze.read_detections(voc07_test / "det", dataset)
    verdicts = analyze.diagnose(detections, dataset)
    expected, _ = score(detections, dataset)
    areas, _ = score(detections, dataset, "area")  # they change with every right detection
    assert len(expected) == 20
    for name, value in expected.items():
        label = dataset.label_map[name]
        recall, precision = analyze.make_curve(verdicts, dataset, label, analyze.find_objects(dataset, label))
        assert average_of_11_points(precision, recall) == pytest.approx(value, abs=1e-9)
        area = area_under_curve(torch.from_numpy(precision), torch.from_numpy(recall))
        assert area == pytest.approx(areas[name], abs=1e-9)


# --- Sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "counts"), [(1, [0, 0, 1, 0, 0]), (6, [1, 1, 2, 1, 1]), (10, [1, 2, 4, 2, 1]), (100, [10, 20, 40, 20, 10])]
)
def test_groups_are_those_of_hoiem(n, counts):
    values = np.random.default_rng(0).permutation(n)
    groups = analyze.group_objects(values)
    assert np.bincount(groups, minlength=5).tolist() == counts
    assert (np.diff(groups[np.argsort(values)]) >= 0).all()


def test_recall_and_precision_of_groups_by_hand(tmp_path):
    """Ten cats, the largest is found first, then a false detection comes, then the smallest is found."""
    cats = [([100 * i, 0, 100 * i + 10 + i, 10], CAT, 0) for i in range(10)]
    difficult = ([0, 500, 900, 900], CAT, 1)  # does not count, however large
    dataset = make_dataset(tmp_path, [*cats, difficult])
    detections = make_detections([(cats[9][0], CAT, 0.9), ([0, 200, 9, 300], CAT, 0.8), (cats[0][0], CAT, 0.7)])
    verdicts = analyze.diagnose(detections, dataset)
    areas = np.array([10.0 * (10 + i) for i in range(10)] + [360_000.0])
    recalls, precisions = analyze.score_groups(verdicts, dataset, CAT, areas).tolist()
    assert recalls == [1, 0, 0, 0, 1]
    # Found as often as the smallest, all ten would be right beside the one false detection.
    assert precisions == pytest.approx([10 / 11, 0, 0, 0, 1])


def test_a_class_of_one_object_has_one_group(tmp_path):
    dataset = make_dataset(tmp_path, [(A, CAT, 0)])
    verdicts = analyze.diagnose(make_detections([(A, CAT, 0.9)]), dataset)
    scores = analyze.score_groups(verdicts, dataset, CAT, np.array([100.0]))
    np.testing.assert_array_equal(scores, [[np.nan, np.nan, 1, np.nan, np.nan]] * 2)


# --- The worst cases ------------------------------------------------------------------------------


def draw_case(verdict, dataset):
    """A case on axes of its own; returns the axes and the crop, (H, W, 3)."""
    axis = Figure(figsize=(4, 3)).subplots()
    analyze.draw_case(axis, verdict, dataset)
    return axis, np.asarray(axis.images[0].get_array()).astype(int)


def list_shown(figure):
    """The words above the crops of worst.jpg."""
    return [axis.get_title().replace("\n", " ") for axis in figure.axes if axis.images]


def test_reasons_of_false_detections(tmp_path):
    """The best-scored ones: the twenty-first is not shown."""
    path = str(write_image(tmp_path / "a.png", (60, 40)))
    detections = [
        (A, CAT, 0.9), (A, CAT, 0.8), ([0, 0, 4, 10], CAT, 0.7), (B, CAT, 0.6), (NONE, CAT, 0.5),
        *[(NONE, DOG, 0.4)] * 16, (NONE, DOG, 0.3),
    ]  # fmt: skip
    dataset = make_dataset(tmp_path, [(A, CAT, 0), (B, DOG, 1)], paths=[path])
    verdicts = analyze.diagnose(make_detections(detections), dataset)
    assert list_shown(analyze.draw_worst(verdicts, dataset)) == [
        "cat 0.80: duplicate (overlap 1.00 with cat)",
        "cat 0.70: localised badly (overlap 0.40 with cat)",
        "cat 0.60: another class (overlap 1.00 with dog)",
        "cat 0.50: background",
        *["dog 0.40: background"] * 16,
    ]


def test_reasons_of_missed_objects(tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "N_WORST", 4)
    large, taken, wrong, bad = [0, 0, 100, 100], [200, 0, 290, 90], [400, 0, 480, 80], [600, 0, 670, 70]
    beside_taken, part_of_bad, difficult = [195, 0, 290, 90], [600, 0, 630, 70], [0, 500, 400, 900]
    objects = [(box, CAT, 0) for box in (bad, large, beside_taken, wrong, taken)] + [(difficult, CAT, 1)]
    detections = [
        (beside_taken, CAT, 0.8), (wrong, DOG, 0.7), (part_of_bad, CAT, 0.6), (part_of_bad, CAT, 0.5), (A, DOG, 0.4),
    ]  # fmt: skip
    dataset = make_dataset(tmp_path, [(A, DOG, 0)], objects)  # in another image the same dog
    verdicts = analyze.diagnose(make_detections([], detections), dataset)
    cases = analyze.list_missed_objects(verdicts, dataset)
    assert [analyze.describe_case(case, dataset) for case in cases] == [  # by falling size
        "cat: no detection is about it",
        "cat: no detection is about it",  # that beside it overlaps another cat more
        "dog 0.70: another class (overlap 1.00 with cat)",
        "cat 0.60: localised badly (overlap 0.43 with cat)",
    ]
    assert [case["image"] for case in cases] == [1] * 4
    assert [dataset.boxes_xy_pixels[case["object"]].tolist() for case in cases] == [large, taken, wrong, bad]
    assert cases[3]["box_xy_pixels"].tolist() == part_of_bad


def test_a_crop_shows_its_boxes_where_they_are(tmp_path):
    picture = Image.new("RGB", (900, 900), "black")
    picture.paste("red", (300, 300, 400, 360))
    picture.save(tmp_path / "a.png")
    true_box, box = [360, 315, 460, 390], [300, 300, 420, 360]  # overlap 0.225
    dataset = make_dataset(tmp_path, [(true_box, CAT, 0)], paths=[str(tmp_path / "a.png")], size=(900, 900))
    verdict = analyze.diagnose(make_detections([(box, CAT, 0.5)]), dataset)[0]
    axis, pixels = draw_case(verdict, dataset)
    drawn = {patch.get_edgecolor()[0] > 0.5: patch.get_bbox().extents.tolist() for patch in axis.patches}
    assert drawn == {True: box, False: true_box}  # red is the detection, green the object
    # The boxes together have their middle in the middle of the crop, and half of its width.
    left, right, lower, upper = axis.images[0].get_extent()
    assert (left, right, upper, lower) == (220, 540, 225, 465)
    rows, columns = np.nonzero(pixels[..., 0] > 128)  # the red pixels: 320 x 240 pixels have become 480 x 360
    assert [columns.min(), columns.max() + 1] == pytest.approx([80 * 1.5, 180 * 1.5], abs=1)
    assert [rows.min(), rows.max() + 1] == pytest.approx([75 * 1.5, 135 * 1.5], abs=1)


def test_worst_cases_at_the_edge_of_an_image(tmp_path):
    """Boxes beyond the image, of no area, inverted, or as large as the image: a crop is drawn for each."""
    path = write_image(tmp_path / "a.png", (60, 40))
    dataset = make_dataset(tmp_path, [], paths=[str(path)], size=(60, 40))
    for box in (
        [-30, -30, 5, 5],
        [10, 10, 10, 10],
        [20, 20, 9, 9],
        [0, 0, 60, 40],
        [59, 39, 200, 300],
        [200, 200, 210, 210],
    ):
        verdict = analyze.diagnose(make_detections([(box, CAT, 0.5)]), dataset)[0]
        axis, pixels = draw_case(verdict, dataset)
        assert pixels.shape == (analyze.TILE_SIZE[1], analyze.TILE_SIZE[0], 3)
        assert axis.get_title() == "cat 0.50: background"


def test_every_case_is_on_the_picture(tmp_path):
    """Twenty false detections and the three missed objects, two of them with the best detection about them."""
    path = write_image(tmp_path / "a.png", (60, 40))
    dataset = make_dataset(tmp_path, [(box, CAT, 0) for box in (A, B, C)], paths=[str(path)])
    detections = make_detections([(A, DOG, 0.9), ([50, 50, 70, 58], CAT, 0.8), *[(NONE, CAT, 0.1)] * 18])
    figure = analyze.draw_worst(analyze.diagnose(detections, dataset), dataset)
    about_a = "dog 0.90: another class (overlap 1.00 with cat)"
    about_b = "cat 0.80: localised badly (overlap 0.40 with cat)"
    assert list_shown(figure) == [
        about_a, about_b, *["cat 0.10: background"] * 18, about_b, about_a, "cat: no detection is about it"
    ]  # fmt: skip
    boxes_drawn = [len(axis.patches) for axis in figure.axes if axis.images]
    assert boxes_drawn == [2, 2, *[1] * 18, 2, 2, 1]


# --- The log --------------------------------------------------------------------------------------

LOG = """iteration,epoch,loss,conf_loss,loc_loss,lr,images_per_second,mAP,_cat,a $dog$
10,0.1,6.0,4.0,2.0,1e-3,20.0,,,
20,0.2,5.0,3.5,1.5,1e-3,20.0,,,
20,0.2,,,,,,0.25,0.5,0
30,0.3,4.0,3.0,1.0,1e-4,20.0,,,
"""


def test_the_log_is_drawn(tmp_path):
    columns = analyze.read_log(write(tmp_path / "log.csv", LOG))
    assert columns["conf_loss"] == ([10, 20, 30], [4.0, 3.5, 3.0]) and columns["a $dog$"] == ([20], [0.0])
    figure = analyze.draw_log(columns)
    losses, rates, scores = figure.axes
    drawn = [list(line.get_ydata()) for line in losses.lines]
    assert drawn == [[6, 5, 4], [4, 3.5, 3], [2, 1.5, 1]]
    assert list(rates.lines[0].get_ydata()) == [1e-3, 1e-3, 1e-4]
    legend = [text.get_text().strip() for text in scores.get_legend().get_texts()]
    shown = dict(zip(legend, [list(line.get_ydata()) for line in scores.lines], strict=True))
    assert shown == {"_cat": [0.5], r"a \$dog\$": [0], "mAP": [0.25]}
    analyze.save_figure(figure, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size[0] > 500


@pytest.mark.parametrize("n_lines", [1, 2])
def test_a_log_with_little_in_it_is_drawn(tmp_path, n_lines):
    log = "".join(LOG.splitlines(keepends=True)[:n_lines])
    figure = analyze.draw_log(analyze.read_log(write(tmp_path / "log.csv", log)))
    analyze.save_figure(figure, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("a,b\n1,2\n", '"iteration"'),
        ("", '"iteration"'),
        ("iteration,epoch,loss\n1,0.1,3.0\n", '"conf_loss"'),
        (LOG + "40,0.4,x\n", "line 6.*'x'"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, log, words):
    with pytest.raises(ValueError, match=words) as caught:
        analyze.read_log(write(tmp_path / "log.csv", log))
    assert "log.csv" in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nothing"):
        analyze.read_log(tmp_path / "nothing.csv")


# --- The script -----------------------------------------------------------------------------------

OUTPUT = ["errors.png", "precision_recall.png", "sizes.png", "summary.csv", "worst.jpg"]


def test_the_detections_of_a_network(tmp_path, lists, tiny_checkpoint, run_main):
    log = write(tmp_path / "log.csv", LOG)
    settings = {"data_folder": str(lists), "checkpoint": str(tiny_checkpoint), "workers": 0, "batch_size": 2}
    out = tmp_path / "new folder" / "analysis"
    run_main(analyze, log_file=str(log), output_folder=str(out), **settings)
    assert sorted(path.name for path in out.iterdir()) == sorted([*OUTPUT, "loss.png"])
    with open(out / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["circle", "rectangle", "star", "triangle"]
    assert sum(int(row["detections"]) for row in rows) == 4 * 200


def test_detections_in_files(tmp_path, lists, run_main, capsys):
    """Perfect ones: everything is right, nothing is missed; worst.jpg has no case to show."""
    dataset = PascalVOCDataset(lists, "TEST", keep_difficult=True)
    counts = np.diff(dataset.starts).tolist()
    detections = [
        list(part.split(counts)) for part in (dataset.boxes_xy_pixels, dataset.labels, torch.ones(len(dataset.labels)))
    ]
    write_detections(tmp_path / "found.json", dataset, detections)
    found, out = str(tmp_path / "found.json"), tmp_path / "analysis"
    run_main(analyze, data_folder=str(lists), read_detections_from=found, output_folder=str(out))
    assert sorted(path.name for path in out.iterdir()) == OUTPUT
    for row in read_log(out / "summary.csv"):
        assert row["right"] == row["objects"] and row["missed"] == row["background"] == "0"
        assert row["average_precision"] == ("" if row["objects"] == "0" else "1.000000")
    assert "8 objects: 8 found, 0 missed" in capsys.readouterr().out


def test_no_detections_at_all(tmp_path, lists, run_main):
    (tmp_path / "found.json").write_text("[]")
    found, out = str(tmp_path / "found.json"), tmp_path / "analysis"
    run_main(analyze, data_folder=str(lists), read_detections_from=found, output_folder=str(out))
    assert sorted(path.name for path in out.iterdir()) == OUTPUT
    rows = read_log(out / "summary.csv")
    assert all(row["missed"] == row["objects"] for row in rows) and sum(int(row["missed"]) for row in rows) == 8


def test_worst_cases_of_an_earlier_analysis_do_not_stay(tmp_path, run_main, capsys):
    make_dataset(tmp_path, [(A, CAT, 0)])
    (tmp_path / "found.json").write_text("[]")
    (tmp_path / "worst.jpg").write_bytes(b"of an earlier one")
    found = str(tmp_path / "found.json")
    run_main(analyze, data_folder=str(tmp_path), read_detections_from=found, output_folder=str(tmp_path))
    assert not (tmp_path / "worst.jpg").exists()
    assert "left out" in capsys.readouterr().out


def test_nothing_to_analyze(tmp_path, run_main):
    with pytest.raises(ValueError, match="nothing to analyze"):
        run_main(analyze, output_folder=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_it_says_how_to_get_matplotlib(run_main, monkeypatch):
    monkeypatch.setattr(analyze, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        run_main(analyze, log_file="log.csv")


def test_overlap_is_the_one_of_the_metric():
    """The limit of 0.5 is met to the last bit: 5 of 10 columns, at any place."""
    for shift in (0.0, 13.0, 401.0):
        one = torch.tensor([[shift, 0, shift + 5, 10]]).double()
        other = torch.tensor([[shift, 0, shift + 10, 10]]).double()
        assert find_jaccard_overlap(one, other).item() == 0.5
