"""detect(): images of every kind in, boxes in their pixels out, legible labels, files from the shell."""

import copy
import csv
import io
import json
import os
import random
from pathlib import Path
from unittest.mock import Mock

import matplotlib
import numpy as np
import pytest
import torch
from helpers import LABEL_MAP, FakeModel, finish, png, read_files, script, start, write, write_image
from make_sample import draw_sample
from PIL import Image, ImageColor, ImageDraw, ImageOps

import detect as module
from datasets import prepare, read_image
from detect import detect, draw_boxes, find_objects, open_image
from model import load_model, model_from_checkpoint
from utils import class_colors, load_checkpoint

COLORS = class_colors(LABEL_MAP)


@pytest.fixture
def shell(tmp_path, monkeypatch, run_main):
    """Runs detect.py's main() in a temporary folder, from "in" to "out", with a fake model; parameters are keywords."""
    monkeypatch.chdir(tmp_path)
    model = FakeModel()
    settings = {"images": "in", "output_folder": "out", "load_default_model": lambda: model}

    def run(**parameters):
        run_main(module, **{**settings, **parameters})
        return model

    return run


@pytest.fixture(scope="module")
def tiny_model(tiny_checkpoint):
    return load_model(tiny_checkpoint)


# --- Boxes, names, scores -------------------------------------------------------------------------


def test_boxes_in_pixels_are_cut_at_the_edges_and_those_of_no_area_are_left_out():
    model = FakeModel([
        [-0.2, 0.5, 1.3, 0.9], [1.1, 0.1, 1.5, 0.5], [0.3, 0.3, 0.3, 0.8],  # beyond both sides, outside, no width
        [0.6, 0.8, 0.4, 0.9], [float("nan"), 0.1, 0.5, 0.5],  # inverted, not a number
        [0.5, -1.0, 0.75, 0.25], [0.1, 0.2, 0.5, 0.6],
    ], [1, 1, 1, 1, 1, 2, 1], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])  # fmt: skip
    boxes_xy_pixels, names, scores = find_objects(Image.new("RGB", (200, 100)), model=model)
    expected = torch.tensor([[0.0, 50.0, 200.0, 90.0], [100.0, 0.0, 150.0, 25.0], [20.0, 20.0, 100.0, 60.0]])
    torch.testing.assert_close(boxes_xy_pixels, expected)
    assert names == ["cat", "dog", "cat"] and scores == pytest.approx([0.9, 0.4, 0.3])


def test_nothing_found():
    image, model = Image.effect_noise((60, 40), 50).convert("RGB"), FakeModel([], [], [])
    boxes_xy_pixels, names, scores = find_objects(image, model=model)
    assert boxes_xy_pixels.shape == (0, 4) and names == [] and scores == []
    annotated = detect(image, model=model)
    assert annotated is not image and annotated.tobytes() == image.tobytes()


def test_what_is_not_given_is_taken_from_the_top_of_the_file_when_called(monkeypatch):
    model, image = FakeModel(), Image.new("RGB", (9, 9))
    find_objects(image, 0.3, 0.6, 7, model=model)
    find_objects(image, model=model)
    for name, value in {"min_score": 0.4, "max_overlap": 0.7, "top_k": 200.0, "suppress": "cat, dog"}.items():
        monkeypatch.setattr(module, name, value)
    detect(image, model=model)
    detect(image, 0.5, top_k=3, model=model)
    assert model.arguments == [(0.3, 0.6, 7), (0.2, 0.45, 200), (0.4, 0.7, 200), (0.5, 0.7, 3)]
    assert type(model.arguments[2][2]) is int
    assert find_objects(image, model=model)[1] == [] and find_objects(image, suppress=[], model=model)[1] == ["cat"]


def test_suppressed_classes_take_no_place_of_others_and_leave_their_scores(tiny_model):
    image = draw_sample(np.random.default_rng(0))[0]
    _, names, scores = find_objects(image, 0.22, 0.45, 10_000, [], tiny_model)
    expected = [score for name, score in zip(names, scores, strict=True) if name != "circle"]
    assert 0 < len(expected) < len(names)
    _, names, scores = find_objects(image, 0.22, 0.45, len(expected), ("circle",), tiny_model)
    assert "circle" not in names and scores == pytest.approx(expected, rel=1e-4)


def test_a_model_in_training_detects_as_in_evaluation_and_stays_as_it_is(tiny_checkpoint):
    """Batch normalisation must neither learn from the image nor depend on it."""
    model = model_from_checkpoint(load_checkpoint(tiny_checkpoint), "tiny")
    image = Image.effect_noise((60, 40), 50).convert("RGB")
    _, names, scores = find_objects(image, min_score=0.1, model=model.eval())
    before = copy.deepcopy(model.state_dict())
    _, names_in_training, scores_in_training = find_objects(image, min_score=0.1, model=model.train())
    assert names_in_training == names and len(names) > 1 and scores_in_training == scores
    assert model.training and model.base.conv1_1.norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("arguments", "message"), [
    ({"min_score": 1.5}, "min_score is 1.5"), ({"min_score": float("nan")}, "min_score is nan"),
    ({"max_overlap": -0.1}, "max_overlap is -0.1"), ({"top_k": 0}, "top_k is 0"),
    ({"top_k": 2.5}, "top_k is 2.5"), ({"top_k": float("inf")}, "top_k is inf"),
    ({"suppress": ["horse"]}, "'horse'.* not a class .*cat, dog, grandfather clock"),
    ({"suppress": "cat,horse"}, "'horse'.* not a class"), ({"suppress": ["background"]}, "'background'.* not a"),
])  # fmt: skip
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        detect(Image.new("RGB", (9, 9)), model=FakeModel(), **arguments)


def test_a_model_whose_label_map_is_none():
    for label_map, message in ((None, "this model has no label_map"), ({0: "background", 1: "cat"}, "not a label map")):
        model = FakeModel()
        model.label_map = label_map
        with pytest.raises(ValueError, match=message):
            detect(Image.new("RGB", (9, 9)), model=model)


# --- Images of every kind -------------------------------------------------------------------------


def test_the_network_sees_what_evaluation_shows_it(tmp_path):
    draw_sample(np.random.default_rng(0))[0].save(tmp_path / "image.jpg")
    model = FakeModel()
    detect(tmp_path / "image.jpg", model=model)
    prepare([read_image(tmp_path / "image.jpg")], model)
    assert torch.equal(*model.batches)


def make_images():
    """A grey image, black on the left and white on the right, in many modes."""
    grey = Image.new("L", (40, 30))
    grey.paste(255, (20, 0, 40, 30))
    images = {mode: grey.convert(mode) for mode in ("L", "1", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "F")}
    for mode, dtype in (("I;16", np.uint16), ("I", np.int32)):
        images[mode] = Image.fromarray(np.asarray(grey).astype(dtype) * 257)
    # What shows through lies on white: the right half is transparent black here.
    black, opacity = Image.new("L", grey.size), ImageOps.invert(grey)
    images["RGBA, transparent"] = Image.merge("RGBA", [black, black, black, opacity])
    images["LA, transparent"] = Image.merge("LA", [black, opacity])
    palette = images["P, transparent"] = grey.convert("P")
    palette.putpalette([0, 0, 0] * 256)
    palette.info["transparency"] = 255
    return images


SUFFIXES = {"P": ("gif",), "CMYK": ("jpg",), "I;16": ("png", "tif"), "F": ("tif",), "RGB": ("webp", "bmp")}
SUFFIXES |= {"L": ("png", "pgm")} | dict.fromkeys(("1", "RGBA", "LA", "P, transparent", "RGBA, transparent"), ("png",))


@pytest.mark.parametrize("name", make_images())
def test_modes_and_files(tmp_path, name):
    image = make_images()[name]
    before, mode = image.tobytes(), image.mode
    paths = [tmp_path / f"an image é.{suffix}" for suffix in SUFFIXES.get(name, ())]
    for path in paths:
        image.save(path)
    for shown in (image, *paths):
        model = FakeModel()
        annotated = detect(shown, model=model)
        assert annotated.mode == "RGB" and annotated.size == (40, 30) and annotated is not image
        assert max(annotated.getpixel((2, 28))) < 9 and min(annotated.getpixel((38, 28))) > 245
        (seen,) = model.batches[0]
        assert seen.dtype == torch.uint8 and (seen[:, :, :130] < 16).all() and (seen[:, :, 170:] > 239).all()
    assert image.tobytes() == before and image.mode == mode


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize(("orientation", "white"), [(1, (0, 0)), (3, (1, 1)), (5, (0, 0)), (6, (1, 0)), (8, (0, 1))])
def test_exif_orientation(tmp_path, orientation, white, suffix):
    """Whatever turns the image while it is loaded (Pillow does so with TIFF), it is turned once."""
    image, exif = Image.new("RGB", (64, 32)), Image.Exif()
    image.paste("white", (0, 0, 32, 16))  # the upper left quarter as it is stored
    exif[0x0112] = orientation
    image.save(tmp_path / f"turned.{suffix}", exif=exif)
    upright = open_image(tmp_path / f"turned.{suffix}")
    assert upright.size == ((32, 64) if orientation >= 5 else (64, 32))
    centers = np.array(upright.resize((2, 2), Image.Resampling.BOX))[:, :, 0]  # of the quarters
    assert [(x, y) for x in (0, 1) for y in (0, 1) if centers[y, x] > 200] == [white]
    assert open_image(upright).tobytes() == upright.tobytes()  # it is not turned again


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data(tmp_path):
    Image.new("RGB", (12, 9), "teal").save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff nonsense")
    assert open_image(tmp_path / "a.jpg").size == (12, 9)


def test_what_cannot_be_read(tmp_path):
    stream = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(stream, "JPEG")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    files = {"truncated.jpg": stream.getvalue()[:3000], "text.jpg": b"not an image", "empty.png": b"", "a.eps": eps}
    for name, data in {**files, "bomb.png": png(100_000, 100_000)}.items():
        (tmp_path / name).write_bytes(data)
    for image, error, message in (
        *((path, ValueError, path.name) for path in tmp_path.iterdir()),
        (tmp_path / "missing.jpg", FileNotFoundError, r"missing\.jpg: there is no such image file"),
        (Image.new("RGB", (0, 5)), ValueError, "0 x 5 pixels"),
        (np.zeros((9, 9, 3), dtype=np.uint8), ValueError, "ndarray.*fromarray"),
    ):
        with pytest.raises(error, match=message):
            detect(image, model=FakeModel())


def test_the_model_is_loaded_once_and_again_if_the_checkpoint_changes(tmp_path, monkeypatch):
    loaded, image = [], Image.new("RGB", (9, 9))
    monkeypatch.setattr(module, "load_model", lambda path, device: loaded.append(Path(path).name) or FakeModel())
    for name, contents, n_loaded in (("a", b"1", 1), ("a", b"22", 2), ("b", b"22", 3)):
        (tmp_path / name).write_bytes(contents)
        monkeypatch.setattr(module, "checkpoint", tmp_path / name)
        detect(image)
        find_objects(image)
        detect(image, model=FakeModel())
        assert len(loaded) == n_loaded and loaded[-1] == name


def test_a_compiled_model(tiny_model):
    """torch.compile()'s modules have a __len__() that fails, so they are neither true nor false."""
    compiled = torch.compile(tiny_model, backend="eager")
    image = Image.effect_noise((60, 40), 50).convert("RGB")
    assert find_objects(image, min_score=0.2, model=compiled)[1] == find_objects(image, 0.2, model=tiny_model)[1]
    assert detect(image, model=compiled).size == (60, 40)


def test_missing_checkpoint(monkeypatch):
    monkeypatch.setattr(module, "checkpoint", "nowhere.pth.tar")
    message = (
        r"nowhere\.pth\.tar.*train\.py.*make demo.* import detect as d; d\.checkpoint = FILE, or .*model=load_model"
    )
    with pytest.raises(FileNotFoundError, match=message):
        detect(Image.new("RGB", (9, 9)))


@pytest.mark.parametrize("function", [detect, find_objects])
def test_a_checkpoint_that_is_set_on_a_function(tmp_path, monkeypatch, function):
    """After `from detect import detect`, `detect.checkpoint = ...` would be ignored, and another model be used."""
    monkeypatch.setattr(module, "checkpoint", str(tmp_path / "other.pth.tar"))
    write(tmp_path / "other.pth.tar", "")
    monkeypatch.setattr(function, "checkpoint", "mine.pth.tar", raising=False)
    with pytest.raises(
        ValueError, match=r"checkpoint was set on a function.* type import detect as d; d\.checkpoint = "
    ):
        detect(Image.new("RGB", (9, 9)))
    detect(Image.new("RGB", (9, 9)), model=FakeModel())


def test_a_device_of_ones_own(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(module, "checkpoint", str(tiny_checkpoint))
    monkeypatch.setattr(module, "device", "cpu")
    assert module.load_default_model().mean.device.type == "cpu"
    monkeypatch.setattr(module, "device", "cuda:99")
    with pytest.raises(ValueError, match="cuda:99"):
        detect(Image.new("RGB", (9, 9)))


# --- Drawing --------------------------------------------------------------------------------------


def test_a_copy_is_drawn_on():
    image = Image.new("RGB", (220, 220), "white")
    pixels = np.asarray(draw_boxes(image, [[55, 55, 165, 165]], ["cat"], [0.9], {"cat": "#ffff00"}))
    detect(image, model=FakeModel())
    assert (np.asarray(image) == 255).all()
    # A line of one pixel along the inside of [55, 165) x [55, 165); the label, in black, stands above.
    yellow, white = (pixels == (255, 255, 0)).all(axis=2), (pixels == 255).all(axis=2)
    assert yellow[[55, 164], 55:165].all() and yellow[55:165, [55, 164]].all()
    assert white[56:164, 56:164].all() and white[165:].all() and white[:, :55].all() and white[:, 165:].all()
    assert yellow[:55].any() and (pixels[:55] < 64).all(axis=2).any()


@pytest.fixture
def drawn_labels(monkeypatch):
    """The labels that are drawn: (plate, text, font, color)."""
    recorded = []
    monkeypatch.setattr(module, "draw_label", lambda draw, *label: recorded.append(label))
    return recorded


def test_labels_stay_inside_the_image(drawn_labels):
    rng, sides, whole, n_cut = random.Random(0), [1, 5, 12, 20, 32, 64, 300, 900], "grandfather clock 0.50", 0
    for _ in range(300):
        size = rng.choice(sides), rng.choice(sides)
        (x_min, x_max), (y_min, y_max) = (sorted(rng.uniform(0, side) for _ in range(2)) for side in size)
        drawn_labels.clear()
        draw_boxes(Image.new("RGB", size), [[x_min, y_min, x_max, y_max]], ["grandfather clock"], [0.5], COLORS)
        assert len(drawn_labels) == 1 or min(size) < 12  # there is no room for one letter
        for plate, text, _, _ in drawn_labels:
            assert 0 <= plate[0] < plate[2] <= size[0] and 0 <= plate[1] < plate[3] <= size[1]
            assert text and whole.startswith(text) and (text == whole or size[0] < 300)
            n_cut += text != whole
    assert n_cut > 20


@pytest.mark.parametrize(("text", "size"), [("Ågjpqy|_ 0.99", 13), ("W", 9), ("fjord", 60)])
def test_text_stays_on_its_plate(text, size):
    font = module.load_font(size)
    width, height = module.measure_label(text, font)
    image = Image.new("RGB", (width + 100, height + 100))
    module.draw_label(ImageDraw.Draw(image), (50, 50, 50 + width, 50 + height), text, font, "#ffff00")
    assert image.getbbox() == (50, 50, 50 + width, 50 + height)
    black = (np.asarray(image)[50:-50, 50:-50] < 64).all(axis=2)
    assert black.any() and not black[:, [0, -1]].any()


@pytest.mark.parametrize(("box", "taken", "expected"), [
    ([20, 50, 80, 90], [], (20, 40, 60, 50)),  # above
    ([20, 5, 80, 90], [], (20, 5, 60, 15)),  # no room above: inside
    ([190, 50, 200, 90], [], (160, 40, 200, 50)),  # moved to the left
    ([25, 52, 80, 90], [(20, 40, 60, 50)], (25, 52, 65, 62)),  # above is taken
    ([20, 30, 80, 75], [(0, 0, 200, 70)], (20, 75, 60, 85)),  # only below is free
    ([20, 30, 80, 60], [(0, 0, 200, 70)], (20, 20, 60, 30)),  # nothing is: above
])  # fmt: skip
def test_where_labels_go(box, taken, expected):
    assert module.place_label(box, (40, 10), (200, 100), taken) == expected


def test_size_of_text_and_lines_follows_the_image(drawn_labels):
    for size, line_width in (((640, 480), 3), ((2560, 1920), 10)):
        image = draw_boxes(Image.new("RGB", size), [[50, 100, 250, 200]], ["cat"], [0.5], COLORS)
        assert np.asarray(image)[100:150, 150].any(axis=1).sum() == line_width
    assert drawn_labels[1][2].size == pytest.approx(4 * drawn_labels[0][2].size, abs=2)


def test_text_is_legible_on_any_colour():
    def luminance(value):
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in np.array(value) / 255]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for value in np.random.default_rng(0).integers(0, 256, (500, 3)).tolist():
        text = ImageColor.getrgb(module.pick_text_color("#{:02x}{:02x}{:02x}".format(*value)))
        lower, higher = sorted([luminance(value), luminance(text)])
        assert (higher + 0.05) / (lower + 0.05) >= 4.5


def test_labels_without_scores_and_of_odd_names(drawn_labels):
    names = ["two\nlines", " ", "red\x1b[31m", "W" * 3000]  # the last one must not take long
    draw_boxes(Image.new("RGB", (300, 300)), [[0, 50, 9, 90]] * 4, names, None, dict.fromkeys(names, "#ff0000"))
    longest, *others = sorted(label[1] for label in drawn_labels)
    assert others == ["red\\x1b[31m", "two lines"] and 10 < len(longest) < 40
    assert len({plate[1] for plate, *_ in drawn_labels}) == 3  # none lies on another


def test_letters_that_pillows_own_font_lacks(shell, monkeypatch, capsys):
    """They are all drawn as the same box, but with a font that has them."""
    make_files("in/a.jpg")
    for i, name in enumerate(("ж", "ф")):
        monkeypatch.setattr(FakeModel, "label_map", {"background": 0, name: 1})
        shell(images="in/a.jpg", output_folder=f"own{i}", font_file="")
        assert f"--font_file=FILE takes another: {name}" in capsys.readouterr().out
        font_file = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
        shell(images="in/a.jpg", output_folder=f"with{i}", font_file=str(font_file))
        assert "font" not in capsys.readouterr().out
    assert Path("own0/a.jpg").read_bytes() == Path("own1/a.jpg").read_bytes()
    assert Path("with0/a.jpg").read_bytes() != Path("with1/a.jpg").read_bytes()
    with pytest.raises(ValueError, match=r"font_file is 'in/a\.jpg', which cannot be read as a font"):
        shell(font_file="in/a.jpg")


# --- Files in, files out --------------------------------------------------------------------------


def make_files(*names):
    for name in names:
        write_image(Path(name), (60, 40))


def make_animation(path, n_frames, **options):
    frames = [Image.new("RGB", (80, 60), (40 * i, 0, 255 - 40 * i)) for i in range(n_frames)]
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize(("parameters", "copies"), [
    ({}, ["[odd].png", "a b é.jpg", "c.PNG", "d.pgm.png"]),
    ({"images": "in/*.??g", "output_folder": "new/out"}, ["[odd].png", "a b é.jpg"]),
    ({"images": "in/[odd].png"}, ["[odd].png"]),
    ({"recursive": True, "output_folder": "in/out"}, ["[odd].png", "a b é.jpg", "c.PNG", "d.pgm.png", "er/c.png"]),
])  # fmt: skip
def test_files_folders_and_patterns(shell, tmp_path, capsys, parameters, copies):
    """Copies in folders like the originals'; those of an earlier run are not taken for photos."""
    for name in ("[odd].png", "a b é.jpg", "c.PNG", "d.pgm", "er/c.png", ".hidden.jpg", ".thumbnails/e.jpg"):
        make_files(f"in/{name}")
    for name in ("notes.txt", "photo.HEIC", "film\x1b.mp4"):
        Path("in", name).write_text("not an image")
    Path("in/below.jpg").mkdir()
    before, folder, n = read_files(tmp_path / "in"), parameters.get("output_folder", "out"), len(copies)
    for _ in range(2):
        shell(**parameters)
        printed = capsys.readouterr().out
        assert sorted(read_files(tmp_path / folder)) == copies
        assert f"{n} of {n} images annotated, in {folder}; {n} objects" in printed
        others = "3 other files, not named like images that can be read: film\\x1b.mp4, notes.txt, photo.HEIC"
        assert (others in printed) == ("images" not in parameters)
    assert before.items() <= read_files(tmp_path / "in").items()
    with Image.open(Path(folder, copies[0])) as annotated:
        assert annotated.size == (60, 40) and annotated.getpixel((6, 20)) == ImageColor.getrgb(COLORS["cat"])


@pytest.mark.parametrize(("parameters", "n_runs"), [
    ({"recursive": True, "output_folder": "."}, 2), ({"recursive": True, "output_folder": "in/out"}, 2),
    ({"images": "**/*.jpg"}, 1), ({"images": "in/**/*.jpg", "output_folder": "in/out"}, 1),  # again: see the next test
    ({"images": "**/*.jpg", "output_folder": "."}, 1),
])  # fmt: skip
def test_outputs_are_neither_originals_nor_other_files(shell, capsys, parameters, n_runs):
    make_files("in/a.jpg", "in/er/b.jpg")
    for _ in range(n_runs):
        shell(**parameters)
        printed = capsys.readouterr().out
        assert "2 of 2 images annotated" in printed and "other files" not in printed


def test_a_pattern_that_matches_what_is_in_the_output_folder_is_refused(shell):
    """It may be an output, or an original: a/x.jpg, where b/x.jpg would be written."""
    make_files("a/x.jpg", "b/x.jpg")
    original = Path("a/x.jpg").read_bytes()
    with pytest.raises(ValueError, match=r"a.x\.jpg: an original would be written over"):
        shell(images="*/x.jpg", output_folder="a")
    assert Path("a/x.jpg").read_bytes() == original


def test_an_original_under_a_second_name_is_not_written_over(shell):
    """A hard link, as backups and duplicate finders make them; so does a disk on which IN and in are one folder."""
    make_files("in/a.jpg")
    original = Path("in/a.jpg").read_bytes()
    Path("out").mkdir()
    os.link("in/a.jpg", "out/a.jpg")
    with pytest.raises(ValueError, match=r"out.a\.jpg: an original would be written over"):
        shell()
    assert Path("in/a.jpg").read_bytes() == original


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_bad_files_of_a_folder_are_named_at_the_end(shell, tmp_path, batch_size):
    make_files("in/a.jpg", "in/c.jpg", "in/z.jpg")
    Path("in/bad.jpg").write_bytes(b"\xff\xd8 nothing")
    Path("in/dangling.png").symlink_to("nowhere.png")
    Path("in/loop.png").symlink_to("loop.png")
    os.mkfifo("in/pipe.jpg")
    with pytest.raises(SystemExit, match=r"(?s)bad\.jpg.*dangling\.png: there is no such.*loop.*pipe") as error:
        shell(batch_size=batch_size, write_boxes_to="found.csv")
    assert isinstance(error.value.code, str)  # printed to stderr; the exit status is 1
    assert sorted(read_files(tmp_path / "out")) == ["a.jpg", "c.jpg", "z.jpg"]
    assert len(Path("found.csv").read_text().splitlines()) == 4


def test_several_at_once_as_one_at_a_time(tiny_model, shell):
    """The same objects up to rounding, in the same order, with any batch size, and with batches of large images."""
    for i in range(5):
        draw_sample(np.random.default_rng(i))[0].resize((60, 60)).save(f"{i}.png")
    settings, found = {"images": "*.png", "min_score": 0.2, "top_k": 30, "write_boxes_to": "found.json"}, []
    for batch_size, pixels in ((1, 10**9), (3, 10**9), (4, 7000)):
        shell(**settings, load_default_model=lambda: tiny_model, batch_size=batch_size, PIXELS_AT_ONCE=pixels)
        found.append(json.loads(Path("found.json").read_text()))
    assert len(found[0]) > 20
    for others in found[1:]:
        assert [row["image"] for row in others] == [row["image"] for row in found[0]]
        numbers = [[[*row["box"], 100 * row["score"]] for row in rows] for rows in (others, found[0])]
        assert np.isclose(*numbers, atol=0.1).all(axis=1).mean() >= 0.9  # of equal scores either may come first


def test_boxes_as_files(shell):
    make_files('in/a,"b.jpg', "in/z.png")
    shell(write_boxes_to="found.csv")
    with open("found.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ['in/a,"b.jpg', "in/z.png"]
    assert list(rows[0]) == ["image", "class", "score", "x_min", "y_min", "x_max", "y_max"]
    assert list(rows[1].values())[1:] == ["cat", str(FakeModel().scores[0].item()), "6.0", "8.0", "30.0", "24.0"]
    shell(write_boxes_to="found.json")
    found = json.loads(Path("found.json").read_text())
    assert [row["image"] for row in found] == [row["image"] for row in rows]
    assert (found[1]["class"], found[1]["box"]) == ("cat", [6.0, 8.0, 30.0, 24.0])


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_what_was_found_before_an_error_is_written(shell, monkeypatch, error):
    make_files("in/a.jpg", "in/b.jpg")
    save_image = Mock(side_effect=[None, error])
    monkeypatch.setattr(module, "save_image", save_image)
    with pytest.raises(type(error)):
        shell(images="in", write_boxes_to="found.json", batch_size=1)
    assert [row["image"] for row in json.loads(Path("found.json").read_text())] == ["in/a.jpg"]
    save_image.side_effect = error
    with pytest.raises(type(error)):  # nothing was found: an earlier list stays
        shell(images="in", write_boxes_to="found.json")
    assert Path("found.json").read_text().count("in/a.jpg") == 1


@pytest.mark.parametrize(("parameters", "message"), [
    ({"images": "none"}, r"images='none': there is no image in it.*\(--recursive=True of detect\.py does that\)"),
    ({"images": "nowhere"}, "images='nowhere': there is no such file"), ({"batch_size": 0}, "batch_size is 0"),
    ({"images": "*.gif"}, "no such file, folder, or pattern"), ({"suppress": "cat,horse"}, "'horse'"),
    ({"output_folder": "b/../a"}, r"x\.jpg: an original would be written over"),
    ({"output_folder": "a", "recursive": True}, r"x\.jpg: an original would be written over"),
    ({"output_folder": "a", "images": "a/*.jpg"}, r"x\.jpg: an original would be written over"),
    ({"output_folder": "taken"}, r"taken/x\.jpg: could not be written"),
    ({"images": "*/x.jpg"}, r"a/x\.jpg and b/x\.jpg would both"),
    ({"write_boxes_to": "found.txt"}, r"found\.txt.*\.csv or \.json"),
    ({"write_boxes_to": "no/such/found.csv"}, "in a folder that exists"),
    ({"write_boxes_to": "folder.csv"}, "must be a file that ends in"),
])  # fmt: skip
def test_parameters_that_are_wrong(shell, tmp_path, parameters, message):
    make_files("a/x.jpg", "b/x.jpg")
    Path("none").mkdir()
    Path("folder.csv").mkdir()
    Path("taken/x.jpg").mkdir(parents=True)
    before = read_files(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):  # what exit_with_message() turns into a line
        shell(**{"images": "a", **parameters})
    assert read_files(tmp_path) == before


def test_of_a_gif_the_first_frame(shell, capsys):
    make_animation("clip.gif", 3, duration=40)
    shell(images="clip.gif")
    with Image.open("out/clip.gif.png") as result:
        assert result.size == (80, 60) and result.getpixel((24, 30)) == (0, 0, 255)
    assert "of a GIF only the first frame is annotated; tools/video.py" in capsys.readouterr().out


def test_nothing_found_says_what_to_try(shell, capsys):
    make_files("in/a.jpg")
    shell(min_score=0.95)
    printed = capsys.readouterr().out
    assert "nothing was found. Try a lower score, such as --min_score=0.2375" in printed
    assert "what the model knows: cat, dog, grandfather clock" in printed
    shell(min_score=0.2)
    assert "nothing was found" not in capsys.readouterr().out


@pytest.mark.parametrize(("images", "copies"), [
    ("photos [2020]/*.png", ["a.png", "b[1].png"]), ("photos [2020]/b[1].*", ["b[1].png"]), ("x[ab]/*.png", ["d.png"]),
    ("*[2020]/*[1].png", ["b[1].png"]), ("photos [2020]", ["a.png", "b[1].png"]),
])  # fmt: skip
def test_brackets_in_patterns(shell, tmp_path, images, copies):
    """They are part of a name; sets of letters, as a shell has them, where nothing is named so."""
    make_files("photos [2020]/a.png", "photos [2020]/b[1].png", "photos 2/c.png", "xa/d.png", "xc/e.png")
    shell(images=images)
    assert sorted(read_files(tmp_path / "out")) == copies


def test_a_list_of_objects_that_cannot_be_written_is_found_first(shell, tmp_path, full_disk):
    make_files("in/a.jpg")
    full_disk(after=0)
    with pytest.raises(OSError, match=r"found\.csv cannot be written to \.: .*No space left"):
        shell(write_boxes_to="found.csv")
    assert list(read_files(tmp_path)) == ["in/a.jpg"]


def test_script(tmp_path, tiny_checkpoint, tiny_model):
    image, _ = draw_sample(np.random.default_rng(0))
    write(tmp_path / "in/two.jpg", "damaged")
    image.save(tmp_path / "in/one.png")
    options = {"min_score": 0.1, "top_k": 9, "suppress": "circle", "images": "in", "output_folder": "out"}
    code, output = finish(start(script("detect.py", checkpoint=tiny_checkpoint, **options), tmp_path))
    assert code == 1 and "error: in/two.jpg: not an image" in output and "Traceback" not in output
    assert "1 of 2 images annotated, in out; 9 objects" in output
    expected = detect(image, 0.1, None, 9, ["circle"], tiny_model)  # as in a notebook
    with Image.open(tmp_path / "out/one.png") as annotated:
        assert annotated.tobytes() == expected.tobytes() != image.tobytes()
