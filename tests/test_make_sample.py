"""The generated sample data set: layout, exact boxes, flags, and the same pictures every time."""

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import make_sample
import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(make_sample.__file__)


def read_files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def draw_with(monkeypatch, shapes):
    """Draw a picture with these shapes: (name, (x, y), radius)."""
    placed = [(name, np.array(center, dtype=float), radius) for name, center, radius in shapes]
    monkeypatch.setattr(make_sample, "place_shapes", lambda rng, size: placed)
    return make_sample.draw_sample(np.random.default_rng(5))


def test_layout_and_annotations(tmp_path):
    make_sample.make_sample(tmp_path / "with spaces é", 3, 2, seed=1)
    folder = tmp_path / "with spaces é"
    lists = folder / "ImageSets" / "Main"
    ids = {name: (lists / f"{name}.txt").read_text().split() for name in ("trainval", "test")}
    assert ids["trainval"] == ["trainval_00001", "trainval_00002", "trainval_00003"]
    assert ids["test"] == ["test_00001", "test_00002"]
    for split, name in enumerate(["trainval", "test"]):
        for number, image_id in enumerate(ids[name], start=1):
            _, objects = make_sample.draw_sample(np.random.default_rng((1, split, number)))
            root = ET.parse(folder / "Annotations" / f"{image_id}.xml").getroot()
            with Image.open(folder / "JPEGImages" / root.findtext("filename")) as image:
                assert image.format == "JPEG" and image.mode == "RGB"
                size = tuple(int(root.findtext(f"size/{field}")) for field in ("width", "height"))
                assert image.size == size and min(size) >= 320 and max(size) <= 500
            written = [
                {
                    "name": item.findtext("name"),
                    "box_xy_pixels": tuple(
                        int(item.findtext(f"bndbox/{field}")) - (field in ("xmin", "ymin"))
                        for field in ("xmin", "ymin", "xmax", "ymax")
                    ),
                    "difficult": int(item.findtext("difficult")),
                    "truncated": int(item.findtext("truncated")),
                }
                for item in root.iter("object")
            ]
            assert written == objects


def test_same_files_every_time_whatever_the_number_of_images(tmp_path):
    make_sample.make_sample(tmp_path / "a", 3, 2, seed=0)
    make_sample.make_sample(tmp_path / "b", 3, 2, seed=0)
    make_sample.make_sample(tmp_path / "more", 4, 3, seed=0)
    make_sample.make_sample(tmp_path / "other", 3, 2, seed=1)
    first, more = read_files(tmp_path / "a"), read_files(tmp_path / "more")
    assert read_files(tmp_path / "b") == first
    pictures = {name for name in first if name.endswith((".jpg", ".xml"))}
    assert len(pictures) == 10 and all(more[name] == first[name] for name in pictures)
    other = read_files(tmp_path / "other")
    assert not any(other[name] == first[name] for name in pictures if name.endswith(".jpg"))
    assert len({first[name] for name in pictures if name.endswith(".jpg")}) == 5  # none twice


def test_box_of_a_whole_shape(monkeypatch):
    image, objects = draw_with(monkeypatch, [("circle", (200, 150), 50)])
    assert objects == [{"name": "circle", "box_xy_pixels": (150, 100, 250, 200), "difficult": 0, "truncated": 0}]
    background, no_objects = draw_with(monkeypatch, [])
    assert no_objects == []
    # The same background lies below: the picture changed everywhere along the circle's edge, inside it.
    changed = np.any(np.asarray(image) != np.asarray(background), axis=2)
    assert changed[100:200, 200].all() and changed[150, 150:250].all()
    assert not changed[:95].any() and not changed[:, :145].any()  # (below and to the right falls the shadow)


def test_box_of_an_outline_on_whole_pixels():
    outline = np.array([[10, 20], [50, 20], [50, 60], [10, 60]], dtype=float)
    mask, corner = make_sample.outline_mask(outline)
    left, top, right, bottom = mask.point(lambda value: 255 * (value >= 128)).getbbox()
    assert (left + corner[0], top + corner[1], right + corner[0], bottom + corner[1]) == (10, 20, 50, 60)


def test_box_of_a_shape_cut_by_the_edge(monkeypatch):
    _, objects = draw_with(monkeypatch, [("circle", (20, 150), 50), ("circle", (250, 50), 50)])
    assert [item["box_xy_pixels"] for item in objects] == [(0, 100, 70, 200), (200, 0, 300, 100)]
    assert [item["truncated"] for item in objects] == [1, 0]


@pytest.mark.parametrize(
    ("distance", "x_max", "difficult"),
    # Two circles of radius 50: of the lower one, 61 % can be seen at a distance of 50, 31 % at 25; it ends
    # where they cross, half way between the centres.
    [(50, 225, 0), (25, 212, 1)],
)
def test_box_of_a_shape_below_another(monkeypatch, distance, x_max, difficult):
    _, objects = draw_with(monkeypatch, [("circle", (200, 150), 50), ("circle", (200 + distance, 150), 50)])
    assert [item["difficult"] for item in objects] == [difficult, 0]
    box = objects[0]["box_xy_pixels"]
    assert box[:2] == (150, 100) and box[3] == 200
    assert abs(box[2] - x_max) <= 1
    assert objects[1]["box_xy_pixels"] == (150 + distance, 100, 250 + distance, 200)


def test_hidden_shapes_are_not_annotated_and_tiny_ones_are_difficult(monkeypatch):
    shapes = [("star", (200, 150), 30), ("circle", (200, 150), 60), ("star", (60, 60), 8)]
    _, objects = draw_with(monkeypatch, shapes)
    assert [(item["name"], item["difficult"]) for item in objects] == [("circle", 0), ("star", 1)]


def test_what_a_data_set_contains():
    found = []
    for number in range(150):
        image, objects = make_sample.draw_sample(np.random.default_rng((0, 0, number)))
        for item in objects:
            x_min, y_min, x_max, y_max = item["box_xy_pixels"]
            assert 0 <= x_min < x_max <= image.width and 0 <= y_min < y_max <= image.height
        found.append((image.size, objects))
    every = [item for _, objects in found for item in objects]
    counts = {name: sum(item["name"] == name for item in every) for name in make_sample.CLASSES}
    assert sum(counts.values()) == len(every) > 225
    assert min(counts.values()) > 0.15 * len(every)
    assert 0 < sum(item["difficult"] for item in every) < 0.1 * len(every)
    assert 0 < sum(item["truncated"] for item in every) < 0.2 * len(every)
    assert sum(not objects for _, objects in found) < 15 and max(len(objects) for _, objects in found) >= 4
    assert {width > height for (width, height), _ in found} == {True, False}


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="n_test=-1"):
        make_sample.make_sample(tmp_path, 1, -1, 0)
    with pytest.raises(ValueError, match="'hexagon' is not one of circle"):
        make_sample.draw_outline(np.random.default_rng(0), "hexagon")


def test_script(tmp_path):
    parameters = [f"--output_folder={tmp_path / 'out'}", "--n_train=2", "--n_test=1"]
    command = [sys.executable, str(SCRIPT), *parameters]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "2 training and 1 test images" in run.stdout
    make_sample.make_sample(tmp_path / "direct", 2, 1, seed=0)
    assert read_files(tmp_path / "out") == read_files(tmp_path / "direct")
