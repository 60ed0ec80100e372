"""The generated sample data set: layout, exact boxes, flags, and the same pictures every time."""

import xml.etree.ElementTree as ET

import make_sample
import numpy as np
import pytest
from helpers import finish, read_files, run_script, script, start
from PIL import Image


def draw(monkeypatch, *shapes):
    """A picture with these shapes: (name, (x, y), radius)."""
    placed = [(name, np.array(center, dtype=float), radius) for name, center, radius in shapes]
    monkeypatch.setattr(make_sample, "place_shapes", lambda rng, size: placed)
    return make_sample.draw_sample(np.random.default_rng(5))


def test_layout_and_annotations(sample):
    ids = [(sample / f"ImageSets/Main/{name}.txt").read_text().split() for name in ("trainval", "test")]
    assert ids[0] == [f"trainval_{i:05}" for i in range(1, 9)] and ids[1] == [f"test_{i:05}" for i in range(1, 5)]
    for split, number in ((0, 1), (0, 8), (1, 4)):
        _, objects = make_sample.draw_sample(np.random.default_rng((0, split, number)))
        root = ET.parse(sample / "Annotations" / f"{ids[split][number - 1]}.xml").getroot()
        with Image.open(sample / "JPEGImages" / root.findtext("filename")) as image:
            assert image.format == "JPEG" and image.mode == "RGB"
            assert image.size == tuple(int(root.findtext(f"size/{field}")) for field in ("width", "height"))
            assert min(image.size) >= 320 and max(image.size) <= 500
        for item, expected in zip(root.iter("object"), objects, strict=True):
            x_min, y_min, *corner = (int(number.text) for number in item.find("bndbox"))
            assert (x_min - 1, y_min - 1, *corner) == expected["box_xy_pixels"]  # VOC counts pixels from 1
            assert [number.tag for number in item.find("bndbox")] == ["xmin", "ymin", "xmax", "ymax"]
            assert all(item.findtext(name) == str(expected[name]) for name in ("name", "difficult", "truncated"))


def test_same_files_every_time_whatever_the_number_of_images(tmp_path):
    output = run_script(script("tools/make_sample.py", output_folder="with spaces é", n_train=3, n_test=2), tmp_path)
    assert "3 training and 2 test images" in output
    for name, *arguments in (("direct", 3, 2, 0), ("more", 4, 3, 0), ("other", 3, 2, 1)):
        make_sample.make_sample(tmp_path / name, *arguments)
    first, direct, more, other = (read_files(tmp_path / name) for name in ("with spaces é", "direct", "more", "other"))
    assert direct == first
    pictures = {name for name in first if name.endswith(".jpg")}
    assert len({first[name] for name in pictures}) == 5  # none twice
    assert all(more[name] == first[name] for name in first if name.endswith((".jpg", ".xml")))
    assert not any(other[name] == first[name] for name in pictures)


def test_box_of_a_whole_shape(monkeypatch):
    image, objects = draw(monkeypatch, ("circle", (200, 150), 50))
    background, no_objects = draw(monkeypatch)
    assert objects == [{"name": "circle", "box_xy_pixels": (150, 100, 250, 200), "difficult": 0, "truncated": 0}]
    assert no_objects == []
    # The same background lies below: the picture changed everywhere along the circle's edge, inside it.
    changed = np.any(np.asarray(image) != np.asarray(background), axis=2)
    assert changed[100:200, 200].all() and changed[150, 150:250].all()
    assert not changed[:95].any() and not changed[:, :145].any()  # (below and to the right falls the shadow)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        # Cut by the left edge, and just touching the upper one.
        ([("circle", (20, 150), 50), ("circle", (250, 50), 50)],
         [("circle", (0, 100, 70, 200), 0, 1), ("circle", (200, 0, 300, 100), 0, 0)]),
        # Of the lower circle 61 % can be seen, then 31 %; it ends where they cross, half way between the centres.
        ([("circle", (200, 150), 50), ("circle", (250, 150), 50)],
         [("circle", (150, 100, 225, 200), 0, 0), ("circle", (200, 100, 300, 200), 0, 0)]),
        ([("circle", (200, 150), 50), ("circle", (225, 150), 50)],
         [("circle", (150, 100, 212, 200), 1, 0), ("circle", (175, 100, 275, 200), 0, 0)]),
        # A hidden star is not annotated, a tiny one is difficult.
        ([("star", (200, 150), 30), ("circle", (200, 150), 60), ("star", (60, 60), 8)],
         [("circle", (140, 90, 260, 210), 0, 0), ("star", (53, 53, 68, 67), 1, 0)]),
    ],
)  # fmt: skip
def test_boxes_and_flags(monkeypatch, shapes, expected):
    _, objects = draw(monkeypatch, *shapes)
    assert [tuple(item.values()) for item in objects] == expected


def test_what_a_data_set_contains():
    found = [make_sample.draw_sample(np.random.default_rng((0, 0, number))) for number in range(100)]
    for image, objects in found:
        for x_min, y_min, x_max, y_max in (item["box_xy_pixels"] for item in objects):
            assert 0 <= x_min < x_max <= image.width and 0 <= y_min < y_max <= image.height
    every = [item for _, objects in found for item in objects]
    counts = [sum(item["name"] == name for item in every) for name in make_sample.CLASSES]
    assert sum(counts) == len(every) > 150 and min(counts) > 0.15 * len(every)
    assert 0 < sum(item["difficult"] for item in every) < 0.1 * len(every)
    assert 0 < sum(item["truncated"] for item in every) < 0.2 * len(every)
    assert sum(not objects for _, objects in found) < 10 and max(len(objects) for _, objects in found) >= 4
    assert {image.width > image.height for image, _ in found} == {True, False}


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="n_test=-1"):
        make_sample.make_sample(tmp_path, 1, -1, 0)
    code, output = finish(start(script("tools/make_sample.py", n_train=-1), tmp_path))
    assert code == 1 and output.startswith("error: n_train=-1"), output
