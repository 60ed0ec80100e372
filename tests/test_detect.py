"""detect(): images of every kind in, boxes in their pixels out, legible labels, files from the shell."""

import io
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import make_sample
import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageDraw, ImageOps, ImageSequence

import detect as module
from datasets import read_image, transform
from detect import detect, draw_boxes, find_objects, open_image
from model import SSD300, model_state
from utils import class_colors, save_checkpoint

LABEL_MAP = {"background": 0, "cat": 1, "dog": 2, "grandfather clock": 3}
COLORS = class_colors(LABEL_MAP)


class FakeModel:
    """Stands in for SSD300: finds the same objects in every image, and remembers what it was given."""

    label_map = LABEL_MAP

    def __init__(self, boxes_xy=((0.1, 0.2, 0.5, 0.6),), labels=(1,), scores=(0.9,)):
        self.boxes_xy = torch.tensor(boxes_xy, dtype=torch.float32).reshape(-1, 4)
        self.labels, self.scores = torch.tensor(labels, dtype=torch.int64), torch.tensor(scores)
        self.batches, self.arguments = [], []

    def normalize(self, images):
        self.batches.append(images)
        return images.float()

    def __call__(self, images):
        assert images.shape[1:] == (3, 300, 300)
        return torch.zeros(len(images), 10, 4), torch.zeros(len(images), 10, len(LABEL_MAP))

    def detect_objects(self, predicted_locs, predicted_scores, min_score, max_overlap, top_k):
        self.arguments.append((min_score, max_overlap, top_k))
        is_candidate = (self.scores > min_score) & (predicted_scores[0, 0, self.labels] > -torch.inf)
        keep = is_candidate.nonzero().squeeze(1)[:top_k]
        n_images = len(predicted_locs)
        return tuple([values[keep]] * n_images for values in (self.boxes_xy, self.labels, self.scores))


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Runs detect.py's main() in a temporary folder with a fake model; parameters are keywords."""
    monkeypatch.chdir(tmp_path)
    model = FakeModel()

    def run(**parameters):
        for name, value in parameters.items():
            monkeypatch.setattr(module, name, value)
        module.main()
        return model

    monkeypatch.setattr(module, "load_default_model", lambda: model)
    return run


def halves(size=(40, 30)):
    """A grey image, black on the left and white on the right."""
    image = Image.new("L", size)
    image.paste(255, (size[0] // 2, 0, size[0], size[1]))
    return image


# Boxes, names, scores


def test_boxes_in_pixels_of_the_image():
    boxes_xy_pixels, names, scores = find_objects(Image.new("RGB", (200, 100)), model=FakeModel())
    torch.testing.assert_close(boxes_xy_pixels, torch.tensor([[20.0, 20.0, 100.0, 60.0]]))
    assert names == ["cat"] and scores == [pytest.approx(0.9)]


def test_boxes_are_cut_at_the_edges_and_those_of_no_area_are_left_out():
    boxes_xy = [
        [-0.2, 0.5, 1.3, 0.9],  # beyond both sides
        [1.1, 0.1, 1.5, 0.5],  # outside
        [0.3, 0.3, 0.3, 0.8],  # no width
        [0.6, 0.8, 0.4, 0.9],  # inverted
        [float("nan"), 0.1, 0.5, 0.5],
        [0.5, -1.0, 0.75, 0.25],
    ]
    model = FakeModel(boxes_xy, [1, 1, 1, 1, 1, 2], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    boxes_xy_pixels, names, scores = find_objects(Image.new("RGB", (200, 100)), model=model)
    expected = torch.tensor([[0.0, 50.0, 200.0, 90.0], [100.0, 0.0, 150.0, 25.0]])
    torch.testing.assert_close(boxes_xy_pixels, expected)
    assert names == ["cat", "dog"] and scores == pytest.approx([0.9, 0.4])


def test_nothing_found():
    image = Image.effect_noise((60, 40), 50).convert("RGB")
    model = FakeModel([], [], [])
    boxes_xy_pixels, names, scores = find_objects(image, model=model)
    assert boxes_xy_pixels.shape == (0, 4) and names == [] and scores == []
    annotated = detect(image, model=model)
    assert annotated is not image and annotated.tobytes() == image.tobytes()


def test_thresholds_reach_the_model():
    model = FakeModel()
    find_objects(Image.new("RGB", (9, 9)), 0.3, 0.45, 7, model=model)
    find_objects(Image.new("RGB", (9, 9)), model=model)
    assert model.arguments == [(0.3, 0.45, 7), (0.2, 0.5, 200)]


def test_suppressed_classes_take_no_place_of_others():
    model = FakeModel([[0.1, 0.1, 0.5, 0.5]] * 5, [1, 1, 2, 1, 3], [0.9, 0.8, 0.7, 0.6, 0.5])
    image = Image.new("RGB", (50, 50))
    for suppress, expected in (
        (None, ["cat", "cat"]),
        ([], ["cat", "cat"]),
        (["cat"], ["dog", "grandfather clock"]),
        ("cat", ["dog", "grandfather clock"]),
        (("cat", "grandfather clock"), ["dog"]),
    ):
        assert find_objects(image, top_k=2, suppress=suppress, model=model)[1] == expected


def test_hidden_classes_leave_the_scores_of_others_as_they_are():
    predicted_scores = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0)) * 5
    before = predicted_scores.clone()
    probabilities = predicted_scores.softmax(dim=2)
    hidden = module.hide_classes(predicted_scores, {1, 3}).softmax(dim=2)
    assert torch.equal(predicted_scores, before)
    assert (hidden[:, :, [1, 3]] == 0).all()
    torch.testing.assert_close(hidden[:, :, 2], probabilities[:, :, 2], rtol=1e-5, atol=0)
    torch.testing.assert_close(hidden[:, :, 0], probabilities[:, :, [0, 1, 3]].sum(dim=2))
    assert module.hide_classes(predicted_scores, set()) is predicted_scores


@pytest.mark.parametrize("suppress", [["horse"], "horse", ["cat", "horse"], ["background"]])
def test_suppressing_an_unknown_class(suppress):
    wrong = "background" if "background" in suppress else "horse"
    with pytest.raises(ValueError, match=f"'{wrong}'.* no class .*cat, dog, grandfather clock"):
        detect(Image.new("RGB", (9, 9)), suppress=suppress, model=FakeModel())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_score": 1.5}, "min_score is 1.5"),
        ({"min_score": float("nan")}, "min_score is nan"),
        ({"max_overlap": -0.1}, "max_overlap is -0.1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 2.5}, "top_k is 2.5"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        detect(Image.new("RGB", (9, 9)), model=FakeModel(), **arguments)


# Images of every kind


def test_the_network_sees_what_evaluation_shows_it(tmp_path):
    image, _ = make_sample.draw_sample(np.random.default_rng(0))
    image.save(tmp_path / "image.jpg")
    model = FakeModel()
    detect(tmp_path / "image.jpg", model=model)
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    expected = transform(read_image(tmp_path / "image.jpg"), *nothing, "TEST")[0]
    assert torch.equal(model.batches[0], expected[None])


def make_images():
    """Images of many modes that all show `halves()`."""
    grey = halves()
    modes = ("L", "1", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "F")
    images = {mode: grey.convert(mode) for mode in modes}
    images["I;16"] = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    images["I"] = Image.fromarray(np.asarray(grey).astype(np.int32) * 257)
    # What shows through lies on white: the right half is transparent black here.
    black, opacity = Image.new("L", grey.size), ImageOps.invert(grey)
    images["RGBA, transparent"] = Image.merge("RGBA", [black, black, black, opacity])
    images["LA, transparent"] = Image.merge("LA", [black, opacity])
    palette = grey.convert("P")
    palette.putpalette([0, 0, 0] * 256)
    palette.info["transparency"] = 255
    images["P, transparent"] = palette
    return images


@pytest.mark.parametrize("name", make_images())
def test_modes(name):
    image = make_images()[name]
    before, mode = image.tobytes(), image.mode
    model = FakeModel()
    annotated = detect(image, model=model)
    assert annotated.mode == "RGB" and annotated.size == image.size and annotated is not image
    assert image.tobytes() == before and image.mode == mode
    (seen,) = model.batches[0]
    assert seen.dtype == torch.uint8
    assert (seen[:, :, :130] < 16).all() and (seen[:, :, 170:] > 239).all()
    assert annotated.getpixel((2, 28)) <= (8, 8, 8) and min(annotated.getpixel((38, 28))) > 245


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *[(name, "png") for name in ("L", "1", "RGBA", "LA", "I;16", "P, transparent", "RGBA, transparent")],
        *[("P", "gif"), ("CMYK", "jpg"), ("I;16", "tif"), ("F", "tif")],
        *[("RGB", "webp"), ("RGB", "bmp"), ("L", "pgm")],
    ],
)
def test_files(tmp_path, name, suffix):
    path = tmp_path / f"an image é.{suffix}"
    make_images()[name].save(path)
    for argument in (path, str(path)):
        model = FakeModel()
        annotated = detect(argument, model=model)
        assert annotated.mode == "RGB" and annotated.size == (40, 30)
        (seen,) = model.batches[0]
        assert (seen[:, :, :130] < 16).all() and (seen[:, :, 170:] > 239).all()


def test_sixteen_bits_are_scaled_not_cut():
    levels = np.repeat(np.array([[0, 255, 256, 0x4000, 0x8000, 0xFFFF]], dtype=np.uint16), 6, axis=0)
    upright = open_image(Image.fromarray(levels))
    assert [upright.getpixel((x, 0))[0] for x in range(6)] == [0, 0, 1, 64, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    image = Image.effect_noise((24, 16), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    upright = open_image(tmp_path / "turned.png")
    assert upright.tobytes() == ImageOps.exif_transpose(image_with(image, exif)).tobytes()
    assert upright.size == ((16, 24) if orientation >= 5 else (24, 16))
    if orientation == 6:  # turn clockwise by a quarter: the lower left corner comes to the upper left
        assert upright.getpixel((0, 0)) == image.getpixel((0, 15))
    # Once upright, an image is not turned again.
    assert open_image(upright).tobytes() == upright.tobytes()
    assert detect(tmp_path / "turned.png", model=FakeModel()).size == upright.size


def image_with(image, exif):
    image = image.copy()
    image.getexif().update(exif)
    return image


def test_damaged_exif_data(tmp_path):
    Image.new("RGB", (12, 9), "teal").save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense")
    assert open_image(tmp_path / "a.jpg").size == (12, 9)


def png(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(10_000, 9_000), (13_000, 13_000), (100_000, 100_000)])
def test_decompression_bombs(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size))
    with pytest.raises(ValueError, match=r"bomb\.png.*pixels"):
        detect(path, model=FakeModel())


def test_images_that_cannot_be_read(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((200, 200), 90).save(whole)
    cases = {
        "truncated.jpg": whole.read_bytes()[:3000],
        "text.jpg": b"not an image",
        "empty.png": b"",
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    }
    for name, data in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError, match=name):
            detect(path, model=FakeModel())
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg: no such image file"):
        detect(tmp_path / "missing.jpg", model=FakeModel())
    with pytest.raises(ValueError, match=str(tmp_path)):
        detect(tmp_path, model=FakeModel())
    with pytest.raises(ValueError, match=r"0 x 5 pixels"):
        detect(Image.new("RGB", (0, 5)), model=FakeModel())
    with pytest.raises(ValueError, match=r"ndarray.*fromarray"):
        detect(np.zeros((9, 9, 3), dtype=np.uint8), model=FakeModel())


# The model


def test_the_model_is_loaded_once_and_again_if_the_checkpoint_changes(tmp_path, monkeypatch):
    loaded = []

    def load_model(path, device):
        loaded.append(path)
        return FakeModel()

    monkeypatch.setattr(module, "load_model", load_model)
    monkeypatch.chdir(tmp_path)
    Path("a.pth.tar").write_bytes(b"1")
    Path("b.pth.tar").write_bytes(b"1")
    image = Image.new("RGB", (9, 9))
    module.load_once.cache_clear()
    monkeypatch.setattr(module, "checkpoint", "a.pth.tar")
    detect(image)
    find_objects(image)
    assert loaded == [str(tmp_path / "a.pth.tar")]
    Path("a.pth.tar").write_bytes(b"22")
    detect(image)
    detect(image)
    assert len(loaded) == 2
    monkeypatch.setattr(module, "checkpoint", tmp_path / "b.pth.tar")
    detect(image)
    assert loaded[2:] == [str(tmp_path / "b.pth.tar")]
    detect(image, model=FakeModel())
    assert len(loaded) == 3
    module.load_once.cache_clear()


def test_missing_checkpoint(monkeypatch):
    monkeypatch.setattr(module, "checkpoint", "nowhere.pth.tar")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth\.tar.*train\.py.*make demo"):
        detect(Image.new("RGB", (9, 9)))


# Drawing


def test_a_copy_is_drawn_on():
    image = Image.new("RGB", (220, 220), "white")
    before = image.tobytes()
    pixels = np.asarray(draw_boxes(image, [[55, 55, 165, 165]], ["cat"], [0.9], {"cat": "#ffff00"}))
    assert image.tobytes() == before
    detect(image, model=FakeModel())
    assert image.tobytes() == before
    # A line of one pixel along the inside of [55, 165) x [55, 165); the label, in black, stands above.
    yellow, white = (pixels == (255, 255, 0)).all(axis=2), (pixels == 255).all(axis=2)
    assert yellow[[55, 164], 55:165].all() and yellow[55:165, [55, 164]].all()
    assert white[56:164, 56:164].all() and white[165:].all() and white[:, :55].all() and white[:, 165:].all()
    assert yellow[:55].any() and (pixels[:55] < 64).all(axis=2).any()


def record_labels(monkeypatch):
    recorded = []
    monkeypatch.setattr(module, "draw_label", lambda draw, *label: recorded.append(label))
    return recorded


def test_labels_stay_inside_the_image(monkeypatch):
    rng = random.Random(0)
    recorded = record_labels(monkeypatch)
    n_cut = 0
    for _ in range(300):
        size = (rng.choice([1, 5, 12, 20, 32, 64, 300, 900]), rng.choice([1, 5, 12, 20, 32, 64, 300, 900]))
        corners = [sorted(rng.uniform(0, side) for _ in range(2)) for side in size]
        box = [corners[0][0], corners[1][0], corners[0][1], corners[1][1]]
        recorded.clear()
        draw_boxes(Image.new("RGB", size), [box], ["grandfather clock"], [0.5], COLORS)
        if not recorded:  # there is no room for one letter
            assert min(size) < 12
            continue
        ((plate, text, _, _),) = recorded
        assert 0 <= plate[0] < plate[2] <= size[0] and 0 <= plate[1] < plate[3] <= size[1]
        assert "grandfather clock 0.50".startswith(text) and text
        n_cut += text != "grandfather clock 0.50"
        assert (text == "grandfather clock 0.50") or size[0] < 300
    assert n_cut > 20


def test_text_stays_on_its_plate():
    for text, size in (("Ågjpqy|_ 0.99", 13), ("W", 9), ("fjord", 60)):
        font = module.load_font(size)
        width, height = module.measure_label(text, font)
        image = Image.new("RGB", (width + 100, height + 100))
        module.draw_label(ImageDraw.Draw(image), (50, 50, 50 + width, 50 + height), text, font, "#ffff00")
        assert image.getbbox() == (50, 50, 50 + width, 50 + height)
        black = (np.asarray(image)[50:-50, 50:-50] < 64).all(axis=2)
        assert black.any() and not black[:, [0, -1]].any()


def test_where_labels_go():
    size, label = (200, 100), (40, 10)
    assert module.place_label([20, 50, 80, 90], label, size, []) == (20, 40, 60, 50)  # above
    assert module.place_label([20, 5, 80, 90], label, size, []) == (20, 5, 60, 15)  # no room above: inside
    assert module.place_label([190, 50, 200, 90], label, size, []) == (160, 40, 200, 50)  # moved to the left
    taken = [(20, 40, 60, 50)]
    assert module.place_label([25, 52, 80, 90], label, size, taken) == (25, 52, 65, 62)  # above is taken
    taken = [(0, 0, 200, 70)]
    assert module.place_label([20, 30, 80, 75], label, size, taken) == (20, 75, 60, 85)  # only below is free
    assert module.place_label([20, 30, 80, 60], label, size, taken) == (20, 20, 60, 30)  # nothing is: above


def test_size_of_text_and_lines_follows_the_image(monkeypatch):
    recorded = record_labels(monkeypatch)
    for size, line_width in (((640, 480), 3), ((2560, 1920), 10)):
        image = draw_boxes(Image.new("RGB", size), [[50, 100, 250, 200]], ["cat"], [0.5], COLORS)
        column = np.asarray(image)[:, 150].any(axis=1)
        assert column[100:150].sum() == line_width
    assert recorded[1][2].size == pytest.approx(4 * recorded[0][2].size, abs=2)


def test_text_is_legible_on_any_colour():
    def luminance(value):
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in np.array(value) / 255]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for value in np.random.default_rng(0).integers(0, 256, (500, 3)).tolist():
        text = ImageColor.getrgb(module.pick_text_color("#{:02x}{:02x}{:02x}".format(*value)))
        lower, higher = sorted([luminance(value), luminance(text)])
        assert (higher + 0.05) / (lower + 0.05) >= 4.5


def test_labels_without_scores_and_of_odd_names(monkeypatch):
    recorded = record_labels(monkeypatch)
    names = ["two\nlines", " "]
    draw_boxes(Image.new("RGB", (300, 300)), [[0, 0, 9, 9]] * 2, names, None, dict.fromkeys(names, "#ff0000"))
    assert [label[1] for label in recorded] == ["two lines"]


# Files in, files out


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_folder(shell, tmp_path, capsys):
    for name in ("a b é.jpg", "c.PNG", "grey.tif", "d.pgm"):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("L", (60, 40), 90).save(tmp_path / "in" / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "in" / "below.jpg").mkdir()
    before = read_files(tmp_path / "in")
    shell(images="in", output_folder="new/out")
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == [
        "a b é.jpg", "c.PNG", "d.pgm.png", "grey.tif"]  # fmt: skip
    assert read_files(tmp_path / "in") == before
    assert "4 of 4 images annotated, in new/out" in capsys.readouterr().out
    with Image.open(tmp_path / "new" / "out" / "c.PNG") as annotated:
        assert annotated.size == (60, 40) and annotated.getpixel((6, 20)) == ImageColor.getrgb(COLORS["cat"])


def test_bad_files_of_a_folder_are_named_at_the_end(shell, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "z.jpg"):
        Image.new("RGB", (60, 40)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"\xff\xd8 nothing")
    (tmp_path / "in" / "dangling.png").symlink_to("nowhere.png")
    (tmp_path / "in" / "loop.png").symlink_to("loop.png")
    with pytest.raises(SystemExit, match=r"(?s)bad\.jpg.*dangling\.png: no such.*loop\.png") as error:
        shell(images="in", output_folder="out")
    assert isinstance(error.value.code, str)  # printed to stderr; the exit status is 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jpg", "z.jpg"]


def test_patterns_and_single_files(shell, tmp_path):
    for name in ("one.jpg", "two.jpg", "three.png", "[odd].jpg"):
        Image.new("RGB", (60, 40)).save(tmp_path / name)
    shell(images="t*.*", output_folder="pattern")
    assert sorted(path.name for path in (tmp_path / "pattern").iterdir()) == ["three.png", "two.jpg"]
    shell(images="[odd].jpg", output_folder="single")
    assert [path.name for path in (tmp_path / "single").iterdir()] == ["[odd].jpg"]
    (tmp_path / "none").mkdir()
    for images in ("none", "nowhere", "*.gif"):
        with pytest.raises(FileNotFoundError, match=r"images='"):
            shell(images=images)


def test_originals_are_never_written_over(shell, tmp_path):
    for name in ("a/x.jpg", "b/x.jpg"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (60, 40)).save(tmp_path / name)
    before = (tmp_path / "a" / "x.jpg").read_bytes()
    with pytest.raises(ValueError, match=r"x\.jpg: an original"):
        shell(images="a", output_folder="b/../a")
    with pytest.raises(ValueError, match=r"a/x\.jpg and b/x\.jpg would both"):
        shell(images="*/x.jpg", output_folder="out")
    assert (tmp_path / "a" / "x.jpg").read_bytes() == before


def test_parameters_of_the_shell(shell, tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    model = shell(images="a.png", min_score=0.7, max_overlap=0.4, top_k=3, suppress="dog, grandfather clock")
    assert model.arguments == [(0.7, 0.4, 3)]
    with pytest.raises(ValueError, match="'horse'"):
        shell(suppress="cat,horse")
    with pytest.raises(ValueError, match="batch_size is 0"):
        shell(batch_size=0)


def test_output_that_cannot_be_written(shell, tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    with pytest.raises(OSError, match=r"out/a\.png: could not be written"):
        shell(images="a.png", output_folder="out")


# Animations


def make_animation(path, durations, **options):
    frames = [Image.new("RGB", (80, 60), (40 * i, 0, 255 - 40 * i)) for i in range(len(durations))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, **options)


@pytest.mark.parametrize("loop", [{}, {"loop": 0}, {"loop": 3}])
def test_animated_gif(shell, tmp_path, loop):
    durations = [40, 100, 250, 60, 90]
    make_animation(tmp_path / "clip.gif", durations, **loop)
    model = shell(images="clip.gif", output_folder="out", batch_size=2)
    assert [len(batch) for batch in model.batches] == [2, 2, 1]
    with Image.open(tmp_path / "out" / "clip.gif") as result:
        assert result.n_frames == 5 and result.size == (80, 60)
        assert result.info.get("loop") == loop.get("loop")
        frames = [(frame.info["duration"], frame.convert("RGB")) for frame in ImageSequence.Iterator(result)]
    assert [duration for duration, _ in frames] == durations
    for i, (_, frame) in enumerate(frames):
        inside, line = np.array(frame.getpixel((24, 30))), np.array(frame.getpixel((8, 24)))
        assert np.abs(inside - (40 * i, 0, 255 - 40 * i)).max() < 6
        assert np.abs(line - ImageColor.getrgb(COLORS["cat"])).max() < 12


def test_gif_without_durations_and_of_one_frame(shell, tmp_path):
    frames = [Image.new("RGB", (80, 60), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "fast.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "still.gif")
    shell(images="*.gif", output_folder="out")
    with Image.open(tmp_path / "out" / "fast.gif") as result, Image.open(tmp_path / "fast.gif") as original:
        assert result.n_frames == 2 and result.info.get("duration") == original.info.get("duration")
    with Image.open(tmp_path / "out" / "still.gif") as result:
        assert result.n_frames == 1


def test_animation_under_a_wrong_name(shell, tmp_path):
    make_animation(tmp_path / "clip.jpg", [40, 100], format="GIF")
    shell(images="clip.jpg", output_folder="out")
    with Image.open(tmp_path / "out" / "clip.jpg.gif") as result:
        assert result.format == "GIF" and result.n_frames == 2


def test_damaged_animation(shell, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 60, 80), dtype=np.uint8)
    frames = [Image.fromarray(frame) for frame in noise]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=50)
    data = (tmp_path / "clip.gif").read_bytes()
    (tmp_path / "clip.gif").write_bytes(data[: len(data) - 2500])
    with pytest.raises(SystemExit, match=r"clip\.gif"):
        shell(images="clip.gif", output_folder="out")
    assert list((tmp_path / "out").iterdir()) == []


# The script as a user runs it, with a real network


def run_script(*arguments, folder):
    command = [sys.executable, str(Path(module.__file__)), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_script(tmp_path):
    torch.manual_seed(0)
    model = SSD300(len(LABEL_MAP))
    model.label_map = LABEL_MAP
    save_checkpoint(model_state(model), tmp_path / "a.pth.tar")
    (tmp_path / "in").mkdir()
    image, _ = make_sample.draw_sample(np.random.default_rng(0))
    image.save(tmp_path / "in" / "one.png")
    (tmp_path / "in" / "two.jpg").write_bytes(b"damaged")
    # Weights are random: each class has about a quarter of the score, so there are thousands of objects.
    files = ["--checkpoint=a.pth.tar", "--images=in", "--output_folder=out"]
    run = run_script(*files, "--min_score=0.1", "--top_k=9", "--suppress=dog", folder=tmp_path)
    assert run.returncode == 1 and "two.jpg: not an image" in run.stderr and "Traceback" not in run.stderr
    assert "1 of 2 images annotated, in out" in run.stdout
    # The same in a notebook.
    expected = detect(image, 0.1, 0.5, 9, ["dog"], module.load_model(tmp_path / "a.pth.tar"))
    with Image.open(tmp_path / "out" / "one.png") as annotated:
        assert annotated.tobytes() == expected.tobytes() != image.tobytes()


def test_script_with_bad_parameters(tmp_path):
    run = run_script("--images=nowhere", folder=tmp_path)
    assert run.returncode == 1 and run.stderr.startswith("error: images='nowhere'")


# Damaged files of every kind


def encode(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def mutate(data, rng):
    """Cut a file short, or change some of its bytes, more often near the start, where the structure is."""
    data = bytearray(data)
    if rng.random() < 0.2:
        return data[: rng.randrange(len(data))]
    reach = len(data) if rng.random() < 0.5 else min(64, len(data))
    for _ in range(rng.choice([1, 2, 4, 16])):
        data[rng.randrange(reach)] = rng.choice([0, 127, 128, 255, rng.randrange(256)])
    return data


# SSD_FUZZ_IMAGES=20000 pytest tests/test_detect.py -k mutated: a longer run.
@pytest.mark.filterwarnings("ignore")
def test_mutated_files_end_in_a_result_or_an_error_that_names_them(tmp_path):
    image = make_sample.draw_sample(np.random.default_rng(3))[0].resize((64, 48))
    exif = Image.Exif()
    exif[0x0112] = 6
    animation = {"save_all": True, "append_images": [image.rotate(20), image.rotate(40)], "duration": 50}
    originals = [encode(image, kind) for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "TGA")]
    originals += [encode(image, "GIF", **animation), encode(image, "TIFF", compression="tiff_lzw")]
    originals += [encode(image, "JPEG", exif=exif), encode(image, "GIF")]
    rng, model = random.Random(0), FakeModel()
    path, target = tmp_path / "mutated", tmp_path / "out.gif"
    outcomes = {"result": 0, "error": 0}
    for i in range(int(os.environ.get("SSD_FUZZ_IMAGES", 300))):
        path.write_bytes(mutate(originals[i % len(originals)], rng))
        for action in (lambda: detect(path, model=model), lambda: annotate(path, target, model)):
            try:
                action()
                outcomes["result"] += 1
            except ValueError as error:
                assert "mutated" in str(error)
                outcomes["error"] += 1
        model.batches.clear()
    assert min(outcomes.values()) > 0.2 * sum(outcomes.values())


def annotate(path, target, model):
    def find(images):
        return module.find_in_batch(images, 0.2, 0.5, 200, None, model)

    module.annotate_file(path, target, find, COLORS)
