"""Augmentations: every fast path against a plain float64 version of the same mathematics; distributions."""

import io
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import FakeModel
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image

import datasets
from datasets import AUGMENTATIONS, FILLER, MIN_OVERLAPS, NO_OBJECTS, Distortion, read_image, transform


def make_noise(height, width, seed=0):
    """An (h, w, 3) uint8 picture with edges, gradients, greys and saturated colours."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).copy()
    picture[: height // 4, : width // 2] = rng.integers(0, 256, (height // 4, width // 2, 3))
    picture[-height // 8 :] = picture[-height // 8 :, :, :1]  # grey
    return picture


def as_image(pixels):
    """An (h, w, 3) array as the (3, h, w) tensor that `transform()` takes."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


# Plain versions: float64, pixel by pixel where that is simplest, no rounding on the way.


def plain_distort(pixels, distortion):
    """The photometric steps in Caffe's order, in float64; returns float64 in [0, 255]."""
    rgb = np.clip(pixels.astype(np.float64) + distortion.brightness, 0, 255)
    if distortion.contrast_first:
        rgb = np.clip(rgb * (distortion.contrast / 256), 0, 255)
    hue, saturation, value = np.moveaxis(rgb_to_hsv(rgb / 255), -1, 0)  # hue 1 is the whole circle
    saturation = np.clip(saturation * (distortion.saturation / 256), 0, 1)
    rgb = 255 * hsv_to_rgb(np.stack([(hue + distortion.hue / 256 / 6) % 1, saturation, value], axis=-1))
    if not distortion.contrast_first:
        rgb = np.clip(rgb * (distortion.contrast / 256), 0, 255)
    return rgb


def plain_resize_weights(size, new_size, antialias):
    """(new_size, size) weights of a triangle filter, bilinear; antialiased, it widens as the image shrinks."""
    scale = size / new_size
    centers = (np.arange(new_size) + 0.5) * scale
    if not antialias:
        centers = np.clip(centers, 0.5, size - 0.5)
    distances = np.abs(np.arange(size) + 0.5 - centers[:, None]) / (max(scale, 1) if antialias else 1)
    weights = np.maximum(1 - distances, 0)
    return weights / weights.sum(axis=1, keepdims=True)


def plain_resize(pixels, width, height, antialias=True):
    """(h, w, 3) -> (height, width, 3), float64."""
    rows = plain_resize_weights(pixels.shape[0], height, antialias)
    columns = plain_resize_weights(pixels.shape[1], width, antialias)
    return np.einsum("yh,xw,hwc->yxc", rows, columns, pixels.astype(np.float64), optimize=True)


def plain_overlap(a, b):
    """Jaccard overlap of two boxes, boundary form."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return intersection / (sum(areas) - intersection)


def plain_crop(canvas, boxes, rng):
    """All seven samplers, one try at a time, then a choice among those that succeeded."""
    width, height = canvas[2] - canvas[0], canvas[3] - canvas[1]
    found = [canvas]
    for min_overlap in (0.1, 0.3, 0.5, 0.7, 0.9, 0.0):
        for _ in range(50):
            s = rng.uniform(0.3, 1)
            r = rng.uniform(max(0.5, s * s), min(2, 1 / (s * s)))
            w, h = s * r**0.5 * width, s / r**0.5 * height
            x, y = canvas[0] + rng.uniform(0, width - w), canvas[1] + rng.uniform(0, height - h)
            crop = (x, y, x + w, y + h)
            centers = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in boxes]
            some_inside = any(x <= c[0] < x + w and y <= c[1] < y + h for c in centers)
            if some_inside and max(plain_overlap(crop, box) for box in boxes) >= min_overlap:
                found.append(crop)
                break
    return found[rng.integers(len(found))]


def gap_from(sample_1, sample_2):
    """Kolmogorov and Smirnov's statistic of two samples, in units of what 99.9% of pairs of one distribution have."""
    grid = np.concatenate([sample_1, sample_2])
    ranks = [np.searchsorted(np.sort(sample), grid, side="right") / len(sample) for sample in (sample_1, sample_2)]
    return np.abs(ranks[0] - ranks[1]).max() / (1.95 * np.sqrt(1 / len(sample_1) + 1 / len(sample_2)))


def is_uniform(sample, low, high):
    return gap_from(np.asarray(sample), np.linspace(low, high, 100_000)) < 1


def is_half(hits):
    """Whether an event of probability 1/2 happened as often as it does in 99.99% of samples."""
    return abs(np.mean(hits) - 0.5) < 3.9 * 0.5 / np.sqrt(len(hits))


# Photometric


VALUES = np.arange(256, dtype=np.uint8)


def test_brightness_and_contrast_are_exact_for_every_value():
    for factor in (*range(257), np.arange(256, dtype=np.uint16)):
        assert np.abs(datasets.multiply(VALUES, factor) - VALUES * (factor / 256)).max() <= 0.5
    for brightness in range(-32, 33):
        expected = [min(max(value + brightness, 0), 255) for value in range(256)]
        assert datasets.add_brightness(VALUES, brightness).tolist() == expected
    for contrast in range(128, 385):
        expected = np.minimum(np.arange(256) * contrast / 256, 255)
        assert np.abs(datasets.multiply_contrast(VALUES, contrast) - expected).max() <= 0.5


COLORS = [
    ((255, 0, 0), {"hue": 128}, (255, 127, 0)),  # red, half a sixth on: orange
    ((255, 0, 0), {"hue": -128}, (255, 0, 127)),
    ((0, 255, 0), {"hue": 128}, (0, 255, 127)),
    ((200, 150, 100), {"hue": 128}, (200, 200, 100)),  # past the corner: 30 + 30 degrees
    ((200, 150, 100), {"hue": -128}, (200, 100, 100)),
    ((200, 150, 100), {"saturation": 128}, (200, 175, 150)),
    ((200, 150, 100), {"saturation": 384}, (200, 125, 50)),
    ((200, 110, 20), {"saturation": 384}, (200, 100, 0)),  # S ends at 1: the factor is 200 / 180
    ((90, 90, 90), {"saturation": 384, "hue": 100}, (90, 90, 90)),
    ((0, 0, 0), {"saturation": 384, "hue": 100}, (0, 0, 0)),
    ((200, 100, 20), {"brightness": -30, "contrast": 384}, (255, 105, 0)),
    # 198 * 1.5 is cut to 255 before the saturation, 255 - (255 - 141) / 2; or (198 - 104 / 2) * 1.5 after it.
    ((198, 94, 94), {"contrast": 384, "saturation": 128}, (255, 198, 198)),
    ((198, 94, 94), {"contrast": 384, "saturation": 128, "contrast_first": False}, (255, 219, 219)),
]


def test_hand_computed_colors():
    for rgb, parameters, expected in COLORS:
        found = datasets.distort(np.array([[rgb]], dtype=np.uint8), Distortion(**parameters))
        assert found.tolist() == [[list(expected)]], f"{rgb}, {parameters}"


@pytest.mark.parametrize("saturation", [128, 180, 256, 257, 330, 384])
@pytest.mark.parametrize("hue", [-153, -64, -1, 0, 1, 100, 153])
def test_saturation_and_hue_are_those_of_hsv(saturation, hue):
    steps = np.array([*range(0, 256, 15), 1, 2, 127, 128, 254], dtype=np.uint8)
    colors = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(len(steps) ** 2, -1, 3)
    result = datasets.distort_color(colors, saturation, hue)
    exact = plain_distort(colors, Distortion(saturation=saturation, hue=hue))
    errors = np.abs(result - exact)
    # One rounding to a level, of which the saturation can make one and a half before it rounds once more.
    assert errors.max() < (0.501 if saturation == 256 else 1.76)
    assert errors.mean() < 0.6
    assert saturation == 256 == hue + 256 or not np.array_equal(result, colors)


def test_all_steps_together_stay_within_rounding_of_float64_and_bands_change_nothing(monkeypatch):
    pixels, rng = make_noise(60, 80), np.random.default_rng(0)
    before, errors = pixels.copy(), []
    distortions = [datasets.sample_distortion(rng) for _ in range(200)]
    whole = [datasets.distort(pixels, distortion) for distortion in distortions]
    for distortion, found in zip(distortions, whole, strict=True):
        errors.append(np.abs(found - plain_distort(pixels, distortion)))
    assert np.max(errors) < 3.5  # levels of 255: up to four roundings, some then multiplied by up to 1.5 twice
    assert np.mean(errors, axis=(1, 2, 3)).max() < 0.75
    monkeypatch.setattr(datasets, "DISTORTED_AT_ONCE", 600)  # 7 rows
    assert np.array_equal([datasets.distort(pixels, distortion) for distortion in distortions], whole)
    assert np.array_equal(pixels, before)
    assert datasets.distort(pixels[:4], Distortion()).base is pixels  # nothing to do: nothing copied


def test_distortions_are_drawn_as_in_the_design():
    rng = np.random.default_rng(0)
    drawn = np.array([datasets.sample_distortion(rng) for _ in range(8000)])
    active = drawn[:, :4] != np.array(Distortion()[:4])
    for column, (neutral, spread) in enumerate([(0, 32), (256, 128), (256, 128), (0, 153)]):
        values = drawn[active[:, column], column]
        assert abs(len(values) / len(drawn) - 0.5 * (1 - 1 / (2 * spread + 1))) < 3.9 * 0.5 / np.sqrt(len(drawn))
        assert values.min() == neutral - spread and values.max() == neutral + spread
        values = np.where(values > neutral, values - 1, values)  # the neutral level is missing: close the gap
        assert is_uniform(values + rng.random(len(values)), neutral - spread, neutral + spread)
    assert is_half(drawn[:, 4])
    assert np.abs(np.bincount(active.sum(1)) / len(drawn) - np.array([1, 4, 6, 4, 1]) / 16).max() < 0.03


# Geometry


def test_zoom_out_boxes_are_drawn_as_in_the_design():
    rng = np.random.default_rng(0)
    size = np.array([500, 375])
    canvases = np.array([datasets.sample_zoom_out_box(*size, rng) for _ in range(6000)])
    zoomed = (canvases != (0, 0, *size)).any(axis=1)
    assert is_half(zoomed)
    mins, maxs = canvases[zoomed, :2], canvases[zoomed, 2:]
    ratios = (maxs - mins) / size
    assert np.abs(ratios[:, 0] - ratios[:, 1]).max() < 0.003  # one ratio for both
    assert (mins <= 0).all() and (maxs >= size).all()
    for axis in range(2):
        assert is_uniform(ratios[:, axis], 1, 4)
        assert is_uniform((0.5 - mins[:, axis]) / ((maxs - mins)[:, axis] - size[axis] + 1), 0, 1)


def test_crops_are_distributed_as_by_seven_samplers_one_try_at_a_time():
    canvas, n, rng = (-30, -40, 370, 260), 1500, np.random.default_rng(0)
    boxes = np.array([[10.0, 20, 120, 180], [150, 30, 350, 200], [5, 5, 25, 20]])
    fast = np.array([datasets.sample_crop_box(canvas, (0, 0, 360, 250), boxes, rng) for _ in range(n)])
    plain = np.array([plain_crop(canvas, boxes.tolist(), rng) for _ in range(n)])
    whole = [(crops == canvas).all(axis=1) for crops in (fast, plain)]
    assert abs(whole[0].mean() - whole[1].mean()) < 4 * np.sqrt(2 * 0.15 * 0.85 / n)
    assert 0.1 < whole[0].mean() < 0.25  # 1/7 if every sampler succeeds, more if some do not
    fast, plain = fast[~whole[0]].T, plain[~whole[1]].T
    (w, h), (plain_w, plain_h) = fast[2:] - fast[:2], plain[2:] - plain[:2]
    for found, expected in zip(
        (*fast[:2], w * h, w / h), (*plain[:2], plain_w * plain_h, plain_w / plain_h), strict=True
    ):
        assert gap_from(found, expected) < 1
    # The comparison is sharp enough to see samplers with a wrong lower bound of the scale.
    assert gap_from(np.sqrt(w * h), 1.1 * np.sqrt(plain_w * plain_h)) > 1


@pytest.mark.parametrize("min_overlap", MIN_OVERLAPS)
def test_each_sampler_keeps_its_promise(min_overlap, monkeypatch):
    monkeypatch.setattr(datasets, "MIN_OVERLAPS", (min_overlap,))
    canvas, rng = (-100, -50, 700, 500), np.random.default_rng(1)
    boxes = np.array([[-80.0, -40, 600, 460], [450, 300, 470, 330]])
    crops = [datasets.sample_crop_box(canvas, (0, 0, 500, 375), boxes, rng) for _ in range(300)]
    # The canvas itself: the sampler of the whole image, or none of 50 tries succeeded.
    crops = [crop for crop in crops if crop != canvas]
    assert len(crops) > 30
    for x_min, y_min, x_max, y_max in crops:
        assert -100 <= x_min < x_max <= 700 and -50 <= y_min < y_max <= 500
        assert max(plain_overlap((x_min, y_min, x_max, y_max), box) for box in boxes) >= min_overlap
        centers = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in boxes]
        assert any(x_min <= x < x_max and y_min <= y < y_max for x, y in centers)
        w, h = (x_max - x_min) / 800, (y_max - y_min) / 550
        assert 0.297 < (w * h) ** 0.5 <= 1 and 0.49 < w / h < 2.04  # whole pixels: a little off


def test_an_image_without_objects_is_cropped_freely_but_never_out_of_sight():
    canvas, rng = (-600, -700, 1400, 800), np.random.default_rng(0)
    crops = np.array([datasets.sample_crop_box(canvas, (0, 0, 500, 375), np.zeros((0, 4)), rng) for _ in range(2000)])
    assert (crops[:, :2] < (500, 375)).all() and (crops[:, 2:] > 0).all()
    assert abs((crops == canvas).all(axis=1).mean() - 1 / 7) < 0.03  # the sampler of the whole image


def test_place_is_in_whole_pixels_and_fills_the_image_without_zoom():
    assert datasets.compute_place((10, 20, 110, 220), (10, 20, 110, 220), 300) == (0, 0, 300, 300)
    assert datasets.compute_place((-100, -50, 500, 250), (0, 0, 300, 250), 300) == (50, 50, 200, 300)
    assert datasets.compute_place((0, 0, 100_000, 100_000), (5, 99_999, 6, 100_000), 300) == (0, 299, 1, 300)


def test_boxes_stay_on_the_pixels_that_they_marked():
    """Three coloured rectangles on grey, found again by their colour after the whole transform."""
    width, height = 240, 180
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    boxes = [[20, 15, 100, 80], [120, 30, 225, 90], [40, 100, 200, 170]]
    for channel, (x_min, y_min, x_max, y_max) in enumerate(boxes):
        pixels[y_min:y_max, x_min:x_max] = 20
        pixels[y_min:y_max, x_min:x_max, channel] = 220
    difficulties = torch.tensor([0, 1, 0])
    objects = torch.tensor(boxes).float(), torch.tensor([0, 1, 2]), difficulties
    n_compared = n_found = 0
    for seed in range(250):
        image, found, kept, difficult = transform(as_image(pixels), *objects, "TRAIN", np.random.default_rng(seed))
        assert image.shape == (3, 300, 300) and image.dtype == torch.uint8 and found.dtype == torch.float32
        assert 1 <= len(found) == len(kept) and difficult.tolist() == difficulties[kept].tolist()
        n_found += len(found)
        rgb = image.permute(1, 2, 0).numpy().astype(int)
        chroma = rgb.max(-1) - rgb.min(-1)
        for channel, box in zip(kept.tolist(), 300 * found, strict=True):
            if (box[2:] - box[:2]).min() < 4:
                continue  # a sliver: no pixel of it is unmixed
            # A turn of 36 degrees leaves the rectangle's own channel the largest. An edge pixel mixes the
            # rectangle with grey: half of its chroma is half of the pixel. The filler's chroma is 20.
            x, y = ((box[:2] + box[2:]) / 2).int().tolist()
            ys, xs = np.nonzero((rgb.argmax(-1) == channel) & (chroma > 20) & (chroma > chroma[y, x] / 2))
            assert np.abs([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] - box.numpy()).max() <= 1, f"seed {seed}"
            n_compared += 1
    assert n_compared > 350 and 3 * 250 - n_found > 50


def replay(pixels, boxes, seed):
    """What `transform()` makes of the same draws, step by step in float64, every step on all pixels."""
    rng = np.random.default_rng(seed)
    height, width = pixels.shape[:2]
    distortion = datasets.sample_distortion(rng)
    canvas = datasets.sample_zoom_out_box(width, height, rng)
    flip = rng.random() < 0.5
    crop = datasets.sample_crop_box(canvas, (0, 0, width, height), boxes.numpy().astype(float), rng)
    source = max(crop[0], 0), max(crop[1], 0), min(crop[2], width), min(crop[3], height)
    place = datasets.compute_place(crop, source, 300)
    shown = plain_distort(pixels, distortion)[source[1] : source[3], source[0] : source[2]]
    image = np.full((300, 300, 3), FILLER, dtype=np.float64)
    image[place[1] : place[3], place[0] : place[2]] = plain_resize(shown, place[2] - place[0], place[3] - place[1])
    kept, mapped = [], []
    for index, box in enumerate(boxes.tolist()):
        if all(crop[axis] <= (box[axis] + box[axis + 2]) / 2 < crop[axis + 2] for axis in (0, 1)):
            for side, axis in enumerate((0, 1, 0, 1)):
                scale = (place[axis + 2] - place[axis]) / (source[axis + 2] - source[axis])
                inside = min(max(box[side], source[axis]), source[axis + 2])
                box[side] = (place[axis] + (inside - source[axis]) * scale) / 300
            kept.append(index)
            mapped.append([1 - box[2], box[1], 1 - box[0], box[3]] if flip else box)
    return image[:, ::-1] if flip else image, mapped, kept


def assert_transforms_as_plain(pixels, seeds):
    height, width = pixels.shape[:2]
    boxes = torch.tensor([[10.0, 5, 60, 70], [40, 30, width, height], [0, 0, 30, 20]])
    for seed in seeds:
        rng = np.random.default_rng(seed)
        image, found, kept, _ = transform(as_image(pixels), boxes, torch.arange(3), torch.zeros(3), "TRAIN", rng)
        plain_image, plain_boxes, plain_kept = replay(pixels, boxes, seed)
        errors = np.abs(image.permute(1, 2, 0).numpy() - plain_image)
        assert errors.max() <= 4 and errors.mean() < 1, f"seed {seed}: {errors.max()}, {errors.mean()}"
        assert kept.tolist() == plain_kept
        np.testing.assert_allclose(found.numpy(), plain_boxes, atol=1e-6)


@pytest.mark.parametrize("size", [(375, 500), (90, 120), (640, 480)])
def test_the_fast_transform_is_the_plain_one_to_within_rounding(size):
    assert_transforms_as_plain(make_noise(*size), range(12))


def test_real_photos(real_data):
    paths = sorted((real_data / "voc_photos").glob("VOC*/JPEGImages/*.jpg"))
    assert len(paths) == 20
    for seed, path in enumerate(paths[:6]):
        pixels = read_image(path).permute(1, 2, 0).numpy()
        with Image.open(path) as photo:
            assert np.abs(pixels.astype(int) - np.asarray(photo)).max() <= 1
        assert_transforms_as_plain(pixels, [seed])


def test_the_filler_is_not_distorted():
    pixels = np.full((60, 80, 3), 250, dtype=np.uint8)
    distorted, filled = 0, 0
    for seed in range(100):
        image = transform(as_image(pixels), *NO_OBJECTS, "TRAIN", np.random.default_rng(seed))[0]
        rgb = image.permute(1, 2, 0).numpy()
        is_grey = rgb[:, :, 0] == rgb[:, :, 2]
        greys = rgb[is_grey]
        assert greys.min() == greys.max()  # the photo stays of one grey, whatever is done to it
        assert (rgb[~is_grey] == FILLER).all()
        distorted += greys.max() != 250
        filled += not is_grey.all()
    assert distorted > 40 and filled > 20


def test_half_of_the_images_are_flipped():
    image, flipped = as_image(make_noise(8, 8)), []
    plain = transform(image, *NO_OBJECTS, "TEST")[0]
    for seed in range(1000):
        found = transform(image, *NO_OBJECTS, "TRAIN", np.random.default_rng(seed), augment=("flip",))[0]
        flipped.append(torch.equal(found.flip(2), plain))
        assert flipped[-1] or torch.equal(found, plain)
    assert is_half(flipped)


SIZES = [1, 2, 3, 5, 8, 17, 40, 300]


@pytest.mark.parametrize("antialias", [True, False])
def test_resize_is_exact_to_within_rounding_for_every_shape_and_layout(antialias):
    """Also of one pixel's width, where torch's kernel for bytes errs by hundreds of levels, or crashes."""
    rng = np.random.default_rng(0)
    for height, width, new_height, new_width in itertools.product(SIZES, repeat=4):
        if rng.random() > 0.2 and min(width, new_width) > 1:
            continue
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        planar = np.ascontiguousarray(pixels.transpose(2, 0, 1)).transpose(1, 2, 0)
        expected = plain_resize(pixels, new_width, new_height, antialias)
        for layout in (pixels, planar):
            errors = np.abs(datasets.resize(layout, new_width, new_height, antialias) - expected)
            assert errors.max() < 1.01, f"{width} x {height} to {new_width} x {new_height}"


def test_narrow_images_do_not_crash():
    """In a process of its own: a distorted planar image of (3, 4000, 1) ended with a segmentation fault."""
    code = """
import numpy as np, torch
from datasets import NO_OBJECTS, transform
for shape in ((3, 4000, 1), (3, 1, 4000), (3, 4000, 2)):
    for seed in range(15):
        transform(torch.full(shape, 9, dtype=torch.uint8), *NO_OBJECTS, "TRAIN", np.random.default_rng(seed))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=datasets.__file__.rpartition("/")[0])


def test_steps_that_are_left_out_change_no_other_draw():
    pixels = as_image(make_noise(90, 120))
    objects = torch.tensor([[10.0, 5, 60, 70]]), torch.tensor([1]), torch.tensor([0])
    only_resized, differences = transform(pixels, *objects, "TEST"), 0
    for seed in range(30):
        whole, no_colors, no_flip, colors, no_crop, nothing = (
            transform(pixels, *objects, "TRAIN", np.random.default_rng(seed), augment=names)
            for names in (AUGMENTATIONS, AUGMENTATIONS[1:], AUGMENTATIONS[:3], ("distort",), ("distort", "flip"), ())
        )
        assert all(torch.equal(a, b) for a, b in zip(nothing, only_resized, strict=True))
        assert torch.equal(no_colors[1], whole[1])  # the same zoom, crop and flip
        assert torch.equal(no_flip[0], whole[0]) or torch.equal(no_flip[0].flip(2), whole[0])
        assert torch.equal(colors[1], only_resized[1])
        differences += not torch.equal(no_crop[0], whole[0])
    assert differences > 15
    assert torch.equal(transform(pixels, *objects, "TEST", augment=AUGMENTATIONS)[0], only_resized[0])


@pytest.mark.parametrize("antialias", [True, False])
def test_prepare_resizes_as_the_model_says(antialias):
    model = FakeModel()
    model.input_size, model.antialias = 320, antialias
    photo = make_noise(400, 700)
    floats = as_image(photo)[None].float()  # as torchvision's SSDs resize, or as Pillow does
    expected = F.interpolate(floats, (320, 320), mode="bilinear", align_corners=False, antialias=antialias)[0]
    for image in (as_image(photo), Image.fromarray(photo), Image.fromarray(photo).convert("RGBA")):
        prepared = datasets.prepare([image, image], model)
        assert prepared.shape == (2, 3, 320, 320) and prepared.dtype == torch.float32
        assert (prepared[1] - expected).abs().max() <= 1


def test_test_images_are_only_resized():
    pixels = make_noise(120, 200)
    boxes = torch.tensor([[0.0, 0, 200, 120], [50, 30, 100, 60]])
    image, found, labels, difficulties = transform(
        as_image(pixels), boxes, torch.tensor([3, 4]), torch.tensor([0, 1]), "TEST"
    )
    assert np.abs(image.permute(1, 2, 0).numpy() - plain_resize(pixels, 300, 300)).max() < 1.01
    assert found.tolist() == [[0, 0, 1, 1], [0.25, 0.25, 0.5, 0.5]]
    assert labels.tolist() == [3, 4] and difficulties.tolist() == [0, 1]
    with pytest.raises(ValueError, match="'train'"):
        transform(as_image(pixels), *NO_OBJECTS, "train")
    photo = Image.fromarray(make_noise(700, 900))
    image = transform(photo, *NO_OBJECTS, "TEST")[0]
    expected = photo.resize((300, 300), Image.Resampling.BILINEAR)
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected).astype(int)).max() <= 1


def test_inputs_are_not_changed_and_seeds_decide():
    image, boxes = as_image(make_noise(100, 130)), torch.tensor([[5.0, 5, 100, 90]])
    before = image.clone(), boxes.clone()
    objects = boxes, torch.tensor([1]), torch.tensor([0])
    results = [transform(image, *objects, "TRAIN", np.random.default_rng((0, 1, s))) for s in (5, 5, 6, 7)]
    assert torch.equal(image, before[0]) and torch.equal(boxes, before[1])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[2][0]) and not torch.equal(results[2][0], results[3][0])
    photo = Image.fromarray(image.permute(1, 2, 0).numpy())
    same = transform(photo, *objects, "TRAIN", np.random.default_rng((0, 1, 5)))
    planar = transform(image.contiguous(), *objects, "TRAIN", np.random.default_rng((0, 1, 5)))
    assert torch.equal(same[0], results[0][0]) and torch.equal(planar[0], results[0][0])
    assert transform(image, *objects, "TRAIN")[0].shape == (3, 300, 300)  # without a generator: a new one
    image = as_image(make_noise(300, 300))
    before, result = image.clone(), transform(image, *NO_OBJECTS, "TEST")[0]
    assert torch.equal(result, before)
    result.zero_()
    assert torch.equal(image, before)  # what comes back is a copy, also where nothing was to do


@pytest.mark.parametrize("n_objects", [0, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (2, 3), (3000, 7), (50, 70)])
def test_images_and_boxes_of_one_pixel_and_images_without_objects(size, n_objects):
    height, width = size
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, 1, 1], [width - 1, height - 1, width, height]])[:n_objects]
    for seed in range(60):
        rng = np.random.default_rng(seed)
        found, boxes_found, labels, _ = transform(image, boxes, torch.arange(n_objects), boxes[:, 0], "TRAIN", rng)
        assert found.shape == (3, 300, 300) and labels.dtype == torch.int64
        assert min(n_objects, 1) <= len(boxes_found) == len(labels) and boxes_found.dtype == torch.float32
        assert ((boxes_found >= 0) & (boxes_found <= 1)).all() and boxes_found.shape[1] == 4
        assert (boxes_found[:, 2:] > boxes_found[:, :2]).all()


def test_boxes_too_small_for_float32_are_dropped_and_positive_ones_kept():
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    boxes = torch.tensor([[50, 50, 50 + 1e-9, 60], [50, 50, 50.001, 50.001]], dtype=torch.float64)
    _, found, labels, _ = transform(image, boxes, torch.tensor([1, 2]), torch.zeros(2), "TEST")
    assert labels.tolist() == [2] and (found[:, 2:] > found[:, :2]).all()


# Reading and normalising


def encode(image, kind="JPEG", **options):
    """The bytes of a PIL image's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PHOTO = Image.fromarray(make_noise(60, 80))


@pytest.mark.parametrize(
    "options", [{}, {"quality": 95, "subsampling": 0}, {"progressive": True}, {"restart_marker_rows": 1}]
)
def test_jpegs_are_decoded_as_by_pillow(tmp_path, monkeypatch, options):
    path = tmp_path / "photo with ä space.jpg"
    path.write_bytes(encode(PHOTO, **options))
    image = read_image(path)
    assert image.shape == (3, 60, 80) and image.dtype == torch.uint8
    with Image.open(path) as expected:
        difference = image.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected.convert("RGB"))
    assert np.abs(difference).max() <= 1  # two builds of libjpeg-turbo; here they agree exactly
    assert torch.equal(image, read_image(str(path)))
    monkeypatch.setattr(datasets, "decode_jpeg", None)  # as without torchvision's decoder
    assert (read_image(path).int() - image.int()).abs().max() <= 1


def test_images_of_every_mode_are_read_as_rgb(tmp_path):
    grey, palette = PHOTO.convert("L"), PHOTO.quantize(64)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 77)  # 16 bits, of which the upper eight count
    see_through = PHOTO.convert("RGBA")
    see_through.putalpha(Image.new("L", PHOTO.size, 0))
    white = Image.new("RGB", PHOTO.size, "white")
    full = {"quality": 100, "subsampling": 0}
    cases = [
        (PHOTO, "PNG", {}, PHOTO, 0),
        (grey, "PNG", {}, grey, 0),
        (deep, "PNG", {}, grey, 0),
        (deep, "TIFF", {}, grey, 0),
        (palette, "PNG", {}, palette, 0),
        (PHOTO.convert("1"), "PNG", {}, PHOTO.convert("1"), 0),
        (PHOTO.convert("RGBA"), "PNG", {}, PHOTO, 0),
        (see_through, "PNG", {}, white, 0),  # laid on white
        (see_through.convert("LA"), "PNG", {}, white, 0),
        (grey, "JPEG", {"quality": 100}, grey, 8),
        (PHOTO.convert("CMYK"), "JPEG", full, PHOTO, 12),
    ]
    for image, kind, options, expected, tolerance in cases:
        (tmp_path / "image").write_bytes(encode(image, kind, **options))
        found = read_image(tmp_path / "image").int()
        difference = (found - as_image(np.array(expected.convert("RGB"))).int()).abs()
        assert difference.max() <= tolerance, f"{image.mode}, {kind}: {difference.max()}"


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg"):
        read_image(tmp_path / "missing.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")  # which would be waited for
    jpeg, png = encode(Image.fromarray(make_noise(200, 300))), encode(PHOTO, "PNG")
    faults = {
        "empty.jpg": b"",
        "text.jpg": b"this is not an image",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "header.jpg": jpeg[:200],
        "start.jpg": b"\xff\xd8",
        "truncated.png": png[: len(png) // 2],
        "damaged.png": png[:60] + bytes(40) + png[100:],
        "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    }
    for name, data in faults.items():
        (tmp_path / name).write_bytes(data)
    for name in (*faults, "folder.jpg", "pipe.jpg"):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"pipe\.jpg.*not a file"):
        datasets.stored_size_and_orientation(tmp_path / "pipe.jpg")


def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path):
    jpeg = bytearray(encode(PHOTO))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"  # 65535 x 65535
    bombs = {"bomb.jpg": jpeg}
    for size in ((9000, 9000), (20_000, 20_000), (79_999_999, 1), (1, 65_501)):
        bombs[f"bomb{size[0]}.png"] = encode(Image.new("1", size), "PNG")
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
        for read in (read_image, datasets.stored_size_and_orientation):
            with pytest.raises(ValueError, match=name.replace(".", r"\.") + ".*pixels"):
                read(tmp_path / name)
    (tmp_path / "longest.png").write_bytes(encode(Image.new("1", (1, 65_500)), "PNG"))
    assert transform(read_image(tmp_path / "longest.png"), *NO_OBJECTS, "TEST")[0].shape == (3, 300, 300)
