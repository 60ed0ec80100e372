"""Images of every kind, and their augmentation: against a plain float64 version of the same; distributions."""

import io
import itertools

import numpy as np
import pytest
import torch
from helpers import FakeModel, png
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image

import datasets
from datasets import AUGMENTATIONS, FILLER, MIN_OVERLAPS, NO_OBJECTS, Colors, read_image, transform


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


def plain_distort(pixels, colors):
    """The photometric steps in float64; returns float64 in [0, 255]. S may exceed 1: the values then end at 0."""
    rgb = np.clip(pixels.astype(np.float64) + colors.brightness, 0, 255)
    if colors.contrast_first:
        rgb = np.clip(rgb * colors.contrast, 0, 255)
    highest = rgb.max(axis=-1, keepdims=True)
    rgb = np.clip(highest + (rgb - highest) * colors.saturation, 0, 255)
    hue, saturation, value = np.moveaxis(rgb_to_hsv(rgb / 255), -1, 0)  # hue 1 is the whole circle
    rgb = 255 * hsv_to_rgb(np.stack([(hue + colors.hue / 360) % 1, saturation, value], axis=-1))
    return rgb if colors.contrast_first else np.clip(rgb * colors.contrast, 0, 255)


def distort(pixels, **colors):
    """`datasets.distort()` for an (h, w, 3) array."""
    return datasets.distort(as_image(pixels), Colors(**colors)).permute(1, 2, 0).numpy()


def plain_resize(pixels, width, height, antialias=True):
    """(h, w, 3) -> (height, width, 3), float64."""

    def weights(size, new_size):
        """(new_size, size), of a triangle filter, bilinear; antialiased, it widens as the image shrinks."""
        scale = size / new_size
        centers = (np.arange(new_size) + 0.5) * scale
        centers = centers if antialias else np.clip(centers, 0.5, size - 0.5)
        distances = np.abs(np.arange(size) + 0.5 - centers[:, None]) / (max(scale, 1) if antialias else 1)
        unscaled = np.maximum(1 - distances, 0)
        return unscaled / unscaled.sum(axis=1, keepdims=True)

    rows, columns = weights(pixels.shape[0], height), weights(pixels.shape[1], width)
    return np.einsum("yh,xw,hwc->yxc", rows, columns, pixels.astype(np.float64), optimize=True)


def is_success(crop, boxes, min_overlap):
    """Whether a crop, boundary form, holds the centre of a box and has with one of them such a Jaccard overlap."""
    has_center, overlaps = False, []
    for box in boxes:
        has_center |= all(crop[i] <= (box[i] + box[i + 2]) / 2 < crop[i + 2] for i in (0, 1))
        width, height = (max(min(crop[i + 2], box[i + 2]) - max(crop[i], box[i]), 0) for i in (0, 1))
        areas = sum((x_max - x_min) * (y_max - y_min) for x_min, y_min, x_max, y_max in (crop, box))
        overlaps.append(width * height / (areas - width * height))
    return has_center and max(overlaps) >= min_overlap


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
            if is_success(crop, boxes, min_overlap):
                found.append(crop)
                break
    return found[rng.integers(len(found))]


def gap_from(sample_1, sample_2):
    """Kolmogorov and Smirnov's statistic of two samples; 99.9% of pairs of one distribution stay below 1."""
    grid = np.concatenate([sample_1, sample_2])
    ranks = [np.searchsorted(np.sort(sample), grid, side="right") / len(sample) for sample in (sample_1, sample_2)]
    return np.abs(ranks[0] - ranks[1]).max() / (1.95 * np.sqrt(1 / len(sample_1) + 1 / len(sample_2)))


def is_uniform(sample, low, high):
    return gap_from(np.asarray(sample), np.linspace(low, high, 100_000)) < 1


def is_half(hits):
    """Whether an event of probability 1/2 happened as often as it does in 99.99% of samples."""
    return abs(np.mean(hits) - 0.5) < 3.9 * 0.5 / np.sqrt(len(hits))


def test_brightness_and_contrast_are_exact_for_every_value():
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
    for brightness in range(-32, 33):
        expected = np.clip(values.astype(int) + brightness, 0, 255)
        assert np.array_equal(distort(values, brightness=brightness), expected)
    for contrast in range(50, 151):
        expected = np.minimum(values * (contrast / 100), 255)
        assert np.abs(distort(values, contrast=contrast / 100) - expected).max() <= 0.5


@pytest.mark.parametrize("rgb, parameters, expected", [
    # 36 degrees are 25.5, rounded 26, of Pillow's 255 steps: 156 / 255 of the 60 degrees from red to yellow.
    ((255, 0, 0), {"hue": 36}, (255, 156, 0)), ((255, 0, 0), {"hue": -36}, (255, 0, 156)),
    ((0, 255, 0), {"hue": 36}, (0, 255, 156)), ((0, 0, 255), {"hue": 36}, (156, 0, 255)),
    ((200, 200, 100), {"hue": 24}, (160, 200, 100)),  # yellow, 24 of the 60 degrees on to green
    ((200, 100, 50), {"hue": 36}, (200, 191, 50)),  # the example of turn_hue()
    ((200, 150, 100), {"saturation": 0.5}, (200, 175, 150)), ((200, 150, 100), {"saturation": 1.5}, (200, 125, 50)),
    ((200, 110, 20), {"saturation": 1.5}, (200, 65, 0)),  # 200 - 180 * 1.5 is below 0
    *(((grey,) * 3, {"saturation": 1.5, "hue": 20}, (grey,) * 3) for grey in (90, 0)),
    ((200, 100, 20), {"brightness": -30, "contrast": 1.5}, (255, 105, 0)),
    # 198 * 1.5 is cut to 255 before the saturation, 255 - (255 - 141) / 2; or (198 - 104 / 2) * 1.5 after it.
    ((198, 94, 94), {"contrast": 1.5, "saturation": 0.5}, (255, 198, 198)),
    ((198, 94, 94), {"contrast": 1.5, "saturation": 0.5, "contrast_first": False}, (255, 219, 219)),
])  # fmt: skip
def test_hand_computed_colors(rgb, parameters, expected):
    found = distort(np.array([[rgb]], dtype=np.uint8), **parameters)
    assert np.abs(found[0, 0] - np.array(expected, dtype=int)).max() <= 1


EVERY_COLOR = np.array([[*itertools.product((*range(0, 256, 15), 1, 2, 127, 128, 254), repeat=3)]], dtype=np.uint8)


@pytest.mark.parametrize("saturation", [0.5, 0.7, 1.0, 1.01, 1.3, 1.5])
def test_saturation_is_that_of_hsv(saturation):
    highest = EVERY_COLOR.max(axis=-1, keepdims=True).astype(int)
    found = distort(EVERY_COLOR, saturation=saturation)
    assert np.abs(found - plain_distort(EVERY_COLOR, Colors(saturation=saturation))).max() <= 1
    hue, before, value = np.moveaxis(rgb_to_hsv(EVERY_COLOR / 255), -1, 0)
    is_possible = before * saturation <= 1
    expected = 255 * hsv_to_rgb(np.stack([hue, np.minimum(before * saturation, 1), value], axis=-1))
    assert is_possible.mean() > 0.3 and np.abs(found - expected)[is_possible].max() <= 1
    assert (found.max(axis=-1, keepdims=True) == highest).all()  # V stays


@pytest.mark.parametrize("hue", [-36, -20, -1, 1, 25, 36])
def test_hue_is_that_of_hsv_to_two_of_its_steps(hue):
    """One of the steps is rounded off as Pillow finds the hue, half of one as the turn is rounded."""
    found = distort(EVERY_COLOR, hue=hue).astype(int)
    chroma = np.ptp(EVERY_COLOR.astype(int), axis=-1, keepdims=True)
    errors = np.abs(found - plain_distort(EVERY_COLOR, Colors(hue=hue)))
    assert (errors <= 1 + 1.6 * chroma * 6 / 255).all()
    for of_all_channels in (np.max, np.min):
        assert (of_all_channels(found, axis=-1) == of_all_channels(EVERY_COLOR, axis=-1)).all()
    # Pillow's own way back from HSV gives the same, but for its rounding of S.
    hues, saturations, values = Image.fromarray(EVERY_COLOR).convert("HSV").split()
    hues = hues.point(lambda step: (step + round(hue / 360 * 255)) % 255)
    of_pillow = np.asarray(Image.merge("HSV", (hues, saturations, values)).convert("RGB")).astype(int)
    assert np.abs(found - of_pillow).max() <= 2


def test_the_palette_of_a_turn_holds_the_pure_colour_of_each_hue_after_it():
    pure = np.frombuffer(datasets.make_turned_palette(0), dtype=np.uint8).reshape(256, 3)
    assert pure[0].tolist() == pure[255].tolist() == [255, 0, 0] and pure[14].tolist() == [255, 84, 0]
    turned = np.frombuffer(datasets.make_turned_palette(36), dtype=np.uint8).reshape(256, 3)
    assert turned[14].tolist() == pure[40].tolist() == [255, 240, 0]
    assert np.array_equal(turned[:255], np.roll(pure[:255], -26, axis=0))


def test_colors_change_neither_boxes_nor_their_input_and_by_default_nothing():
    pixels = as_image(make_noise(50, 70))
    before = pixels.clone()
    assert torch.equal(datasets.distort(pixels, Colors()), pixels)
    boxes = torch.tensor([[2.0, 5, 20, 18]])
    objects = boxes, torch.tensor([1]), torch.tensor([0])
    plain = transform(pixels, *objects, "TEST")
    n_changed = 0
    for seed in range(60):
        image, *found = transform(pixels, *objects, "TRAIN", np.random.default_rng(seed), augment=("distort",))
        assert image.dtype == torch.uint8 and image.shape == (3, 300, 300)
        assert all(torch.equal(one, other) for one, other in zip(found, plain[1:], strict=True))
        n_changed += not torch.equal(image, plain[0])
    assert n_changed > 50  # all but 1/16
    assert torch.equal(pixels, before)


def test_colors_are_drawn_as_in_the_design():
    rng = np.random.default_rng(0)
    drawn = [datasets.draw_colors(rng) for _ in range(8000)]
    n_active = np.zeros(len(drawn), dtype=int)
    for name, low, high, step in [
        ("brightness", -32, 32, 1), ("contrast", 0.5, 1.5, 0.01), ("saturation", 0.5, 1.5, 0.01), ("hue", -36, 36, 1),
    ]:  # fmt: skip
        values, neutral = np.array([getattr(colors, name) for colors in drawn]), getattr(Colors(), name)
        n_levels = round((high - low) / step) + 1  # one of which changes nothing
        is_active = values != neutral
        n_active += is_active
        assert abs(is_active.mean() - 0.5 * (1 - 1 / n_levels)) < 3.9 * 0.5 / np.sqrt(len(drawn))
        values = values[is_active]
        assert values.min() == low and values.max() == high
        values = np.where(values > neutral, values - step, values)  # the neutral level is missing: close the gap
        assert is_uniform(values + step * rng.random(len(values)), low, high)
    assert is_half([colors.contrast_first for colors in drawn])
    assert np.abs(np.bincount(n_active) / len(drawn) - np.array([1, 4, 6, 4, 1]) / 16).max() < 0.03


def test_zoom_out_boxes_are_drawn_as_in_the_design():
    rng, size = np.random.default_rng(0), np.array([500, 375])
    canvases = np.array([datasets.draw_canvas((0, 0, *size), rng) for _ in range(6000)])
    is_zoomed = (canvases != (0, 0, *size)).any(axis=1)
    assert is_half(is_zoomed)
    mins, maxs = canvases[is_zoomed, :2], canvases[is_zoomed, 2:]
    ratios, places = (maxs - mins) / size, (0.5 - mins) / (maxs - mins - size + 1)
    assert (mins <= 0).all() and (maxs >= size).all() and np.abs(ratios[:, 0] - ratios[:, 1]).max() < 0.003
    assert all(is_uniform(ratios[:, axis], 1, 4) and is_uniform(places[:, axis], 0, 1) for axis in (0, 1))


def test_crops_are_distributed_as_by_seven_samplers_one_try_at_a_time():
    canvas, n, rng = (-30, -40, 370, 260), 1500, np.random.default_rng(0)
    boxes = np.array([[10.0, 20, 120, 180], [150, 30, 350, 200], [5, 5, 25, 20]])
    fast = np.array([datasets.draw_crop(canvas, (0, 0, 360, 250), boxes, rng) for _ in range(n)])
    plain = np.array([plain_crop(canvas, boxes.tolist(), rng) for _ in range(n)])
    whole = [(crops == canvas).all(axis=1) for crops in (fast, plain)]
    assert abs(whole[0].mean() - whole[1].mean()) < 4 * np.sqrt(2 * 0.15 * 0.85 / n)
    assert 0.1 < whole[0].mean() < 0.25  # 1/7 if every sampler succeeds, more if some do not
    fast, plain = fast[~whole[0]].T, plain[~whole[1]].T
    (w, h), (plain_w, plain_h) = fast[2:] - fast[:2], plain[2:] - plain[:2]
    assert gap_from(fast[0], plain[0]) < 1 and gap_from(fast[1], plain[1]) < 1
    assert gap_from(w * h, plain_w * plain_h) < 1 and gap_from(w / h, plain_w / plain_h) < 1
    # The comparison is sharp enough to see samplers with a wrong lower bound of the scale.
    assert gap_from(np.sqrt(w * h), 1.1 * np.sqrt(plain_w * plain_h)) > 1


@pytest.mark.parametrize("min_overlap", MIN_OVERLAPS)
def test_each_sampler_keeps_its_promise(min_overlap, monkeypatch):
    monkeypatch.setattr(datasets, "MIN_OVERLAPS", (min_overlap,))
    canvas, rng = (-100, -50, 700, 500), np.random.default_rng(1)
    boxes = np.array([[-80.0, -40, 600, 460], [450, 300, 470, 330]])
    crops = [datasets.draw_crop(canvas, (0, 0, 500, 375), boxes, rng) for _ in range(300)]
    crops = [crop for crop in crops if crop != canvas]  # else the whole image was drawn, or no try succeeded
    assert len(crops) > 30
    for crop in crops:
        assert -100 <= crop[0] < crop[2] <= 700 and -50 <= crop[1] < crop[3] <= 500
        assert is_success(crop, boxes, min_overlap)
        w, h = (crop[2] - crop[0]) / 800, (crop[3] - crop[1]) / 550
        assert 0.297 < (w * h) ** 0.5 <= 1 and 0.49 < w / h < 2.04  # whole pixels: a little off


def test_an_overlap_of_just_the_minimum_is_enough(monkeypatch):
    canvas, crop, rng = (0, 0, 40, 40), (0, 0, 10, 20), np.random.default_rng(0)
    monkeypatch.setattr(datasets, "draw_boxes_inside", lambda *_: np.array([crop] * 50, dtype=float))
    for min_overlap, found in ((0.5, {canvas, crop}), (0.51, {canvas})):
        monkeypatch.setattr(datasets, "MIN_OVERLAPS", (min_overlap,))
        assert {datasets.draw_crop(canvas, canvas, np.array([[0.0, 0, 10, 10]]), rng) for _ in range(50)} == found


def test_a_centre_is_in_a_crop_that_begins_with_it_but_not_in_one_that_ends_there():
    boxes, crops = np.array([[0.0, 10, 10, 20]]), [[5, 15, 9, 19], [0, 0, 5, 20], [0, 0, 9, 15], [4, 14, 6, 16]]
    assert datasets.find_centers_inside(boxes, np.array(crops)).tolist() == [[True, False, False, True]]


def test_seeds_draw_what_they_always_have():
    """Else a run that is resumed with a newer version would go on with other images than it had begun with."""
    rng = np.random.default_rng(3)
    photo, boxes = (0, 0, 500, 375), np.array([[10.0, 20, 120, 180], [150, 30, 350, 200]])
    colors = [tuple(datasets.draw_colors(rng)) for _ in range(3)]
    canvases = [datasets.draw_canvas(photo, rng) for _ in range(4)]
    cases = zip(canvases, (2, 2, 1, 0), strict=True)
    crops = [datasets.draw_crop(canvas, photo, boxes[:n], rng) for canvas, n in cases]
    assert colors == [(-21, 1.0, 1.0, -19, True), (-15, 1.0, 0.66, 28, True), (0, 1.0, 1.0, 1, False)]
    assert canvases == [(-413, 0, 526, 704), (-62, -105, 886, 606), (-215, -310, 1163, 723), (-11, -24, 535, 385)]
    assert crops == [(-413, 0, 526, 704), (38, -50, 734, 344), (-215, -310, 1163, 723), (60, 28, 346, 223)]


def test_crops_without_objects_are_never_out_of_sight_of_the_photo():
    canvas, nothing, rng = (-600, -700, 1400, 800), np.zeros((0, 4)), np.random.default_rng(1)
    crops = np.array([datasets.draw_crop(canvas, (0, 0, 500, 375), nothing, rng) for _ in range(500)])
    assert (crops[:, :2] < (500, 375)).all() and (crops[:, 2:] > 0).all()
    assert abs((crops == canvas).all(axis=1).mean() - 1 / 7) < 0.06  # the sampler of the whole image


def replay(pixels, boxes, seed, distorted):
    """What `transform()` makes of the same draws, step by step in float64, every step on all pixels."""
    rng = np.random.default_rng(seed)
    height, width = pixels.shape[:2]
    colors = datasets.draw_colors(rng)
    canvas = datasets.draw_canvas((0, 0, width, height), rng)
    flip = rng.random() < 0.5
    crop = datasets.draw_crop(canvas, (0, 0, width, height), boxes.numpy().astype(float), rng)
    source = max(crop[0], 0), max(crop[1], 0), min(crop[2], width), min(crop[3], height)
    place = datasets.find_place(source, crop, 300)
    shown = pixels[source[1] : source[3], source[0] : source[2]]
    shown = plain_resize(shown, place[2] - place[0], place[3] - place[1])
    if distorted:
        shown = plain_distort(shown, colors)
    image = np.full((300, 300, 3), FILLER, dtype=np.float64)
    image[place[1] : place[3], place[0] : place[2]] = shown
    kept, mapped = [], []
    for index, (x_min, y_min, x_max, y_max) in enumerate(boxes.tolist()):
        if crop[0] <= (x_min + x_max) / 2 < crop[2] and crop[1] <= (y_min + y_max) / 2 < crop[3]:
            left, right = np.interp([x_min, x_max], source[::2], place[::2]) / 300
            top, bottom = np.interp([y_min, y_max], source[1::2], place[1::2]) / 300
            kept.append(index)
            mapped.append([1 - right, top, 1 - left, bottom] if flip else [left, top, right, bottom])
    return image[:, ::-1] if flip else image, mapped, kept


def assert_transforms_as_plain(pixels, seed):
    height, width = pixels.shape[:2]
    boxes = torch.tensor([[10.0, 5, 60, 70], [40, 30, width, height], [0, 0, 30, 20]])
    # Colours: a hue is rounded off by up to 2 degrees, which a contrast of 1.5 multiplies.
    for augment, most, mean in ((AUGMENTATIONS[1:], 1.01, 0.6), (AUGMENTATIONS, 20, 2.5)):
        rng, numbers = np.random.default_rng(seed), torch.arange(3)
        image, found, labels, difficulties = transform(
            as_image(pixels), boxes, numbers, 5 - numbers, "TRAIN", rng, augment=augment
        )
        plain_image, plain_boxes, kept = replay(pixels, boxes, seed, "distort" in augment)
        errors = np.abs(image.permute(1, 2, 0).numpy() - plain_image)
        assert errors.max() <= most and errors.mean() < mean, f"seed {seed}: {errors.max()}, {errors.mean()}"
        assert labels.tolist() == kept and (labels + difficulties == 5).all()
        np.testing.assert_allclose(found.numpy(), plain_boxes, atol=1e-6)
    return kept


def test_the_transform_is_the_plain_one_to_within_rounding():
    assert datasets.find_place((10, 20, 110, 220), (10, 20, 110, 220), 300) == (0, 0, 300, 300)
    assert datasets.find_place((0, 0, 300, 250), (-100, -50, 500, 250), 300) == (50, 50, 200, 300)
    assert datasets.find_place((5, 99_999, 6, 100_000), (0, 0, 100_000, 100_000), 300) == (0, 299, 1, 300)
    sizes = (375, 500), (90, 120), (640, 480)
    kept = [assert_transforms_as_plain(make_noise(*size), seed) for size in sizes for seed in range(12)]
    assert {len(numbers) for numbers in kept} == {1, 2, 3}


def test_real_photos(real_data):
    paths = sorted((real_data / "voc_photos").glob("VOC*/JPEGImages/*.jpg"))
    assert len(paths) == 20
    for seed, path in enumerate(paths[:6]):
        assert_transforms_as_plain(read_image(path).permute(1, 2, 0).numpy(), seed)


@pytest.mark.parametrize("antialias", [True, False])
def test_resize_is_exact_to_within_rounding_for_every_shape_and_layout(antialias):
    """Also of one pixel's width, where torch's kernel for bytes errs by hundreds of levels, or crashes."""
    rng = np.random.default_rng(0)
    for height, width, new_height, new_width in itertools.product((1, 2, 3, 5, 8, 17, 40, 300), repeat=4):
        if rng.random() > 0.2 and min(width, new_width) > 1:
            continue
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        planar = np.ascontiguousarray(pixels.transpose(2, 0, 1)).transpose(1, 2, 0)
        expected = plain_resize(pixels, new_width, new_height, antialias)
        most = 0.51 if min(width, new_width) == 1 else 1.01  # made with floats; with bytes, which are rounded twice
        for layout in (pixels, planar):
            resized = datasets.resize(as_image(layout), new_width, new_height, antialias)
            errors = np.abs(resized.permute(1, 2, 0).numpy() - expected)
            assert errors.max() < most, f"{width} x {height} to {new_width} x {new_height}"


def test_steps_that_are_left_out_change_no_other_draw_and_half_of_the_images_are_flipped():
    pixels = as_image(make_noise(20, 30))
    objects = torch.tensor([[2.0, 5, 20, 18]]), torch.tensor([1]), torch.tensor([0])
    only_resized, is_flipped = transform(pixels, *objects, "TEST", augment=AUGMENTATIONS), []
    for seed in range(200):
        whole, no_colors, no_flip, colors, flip, nothing = (
            transform(pixels, *objects, "TRAIN", np.random.default_rng(seed), augment=names) for names in
            (AUGMENTATIONS, AUGMENTATIONS[1:], AUGMENTATIONS[:3], ("distort",), ("flip",), ()))  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(nothing, only_resized, strict=True))
        assert torch.equal(no_colors[1], whole[1])  # the same zoom, crop and flip
        assert torch.equal(colors[1], only_resized[1])
        is_flipped.append(not torch.equal(flip[0], only_resized[0]))
        for image, unflipped in ((flip, only_resized), (whole, no_flip)):
            assert torch.equal(image[0].flip(2) if is_flipped[-1] else image[0], unflipped[0])
    assert is_half(is_flipped)


def test_prepare_takes_images_of_any_kind():
    photo = make_noise(400, 700)
    images = as_image(photo), Image.fromarray(photo), Image.fromarray(photo).convert("RGBA")
    prepared = datasets.prepare(images, FakeModel())
    assert prepared.shape == (3, 3, 300, 300) and prepared.dtype == torch.float32
    assert np.abs(prepared.permute(0, 2, 3, 1).numpy() - plain_resize(photo, 300, 300)).max() < 1.01


def test_inputs_are_not_changed_and_seeds_decide():
    image, objects = as_image(make_noise(100, 130)), (torch.tensor([[5.0, 5, 100, 90]]), torch.zeros(1), torch.zeros(1))
    before, photo = (image.clone(), objects[0].clone()), Image.fromarray(image.permute(1, 2, 0).numpy())
    for seed in range(5):
        first, again, of_photo, of_planar, other = (
            transform(source, *objects, "TRAIN", np.random.default_rng((0, 1, n)))[:2] for source, n in
            ((image, seed), (image, seed), (photo, seed), (image.contiguous(), seed), (image, 9)))  # fmt: skip
        for same in (again, of_photo, of_planar):
            assert torch.equal(same[0], first[0]) and torch.equal(same[1], first[1])
        assert not torch.equal(other[0], first[0])
    assert torch.equal(image, before[0]) and torch.equal(objects[0], before[1])
    copy = transform(first[0], *NO_OBJECTS, "TEST")[0]  # also where nothing is to be done
    assert torch.equal(copy, first[0]) and copy.zero_().sum() == 0 < first[0].sum()
    assert torch.equal(transform(image, *NO_OBJECTS, "VAL")[0], transform(image, *NO_OBJECTS, "TEST")[0])
    with pytest.raises(ValueError, match="'train'"):
        transform(image, *NO_OBJECTS, "train")


@pytest.mark.parametrize("n_objects", [0, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (4000, 2), (2, 3), (3000, 7), (50, 70)])
def test_images_and_boxes_of_one_pixel_and_images_without_objects(size, n_objects):
    height, width = size
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, 1, 1], [width - 1, height - 1, width, height]])[:n_objects]
    for rng in map(np.random.default_rng, range(60)):
        found, boxes_found, labels, _ = transform(image, boxes, torch.arange(n_objects), boxes[:, 0], "TRAIN", rng)
        assert found.shape == (3, 300, 300) and found.dtype == torch.uint8 and labels.dtype == torch.int64
        assert min(n_objects, 1) <= len(boxes_found) == len(labels) and boxes_found.dtype == torch.float32
        assert ((boxes_found >= 0) & (boxes_found <= 1)).all() and boxes_found.shape[1] == 4
        assert (boxes_found[:, 2:] > boxes_found[:, :2]).all()
    # A box too small for float32 is dropped, a larger one is kept.
    boxes = torch.tensor([[0.5, 0.5, 0.5 + 1e-9, 0.6], [0.5, 0.5, 0.501, 0.501]], dtype=torch.float64)
    _, found, labels, _ = transform(image, boxes, torch.tensor([1, 2]), torch.zeros(2), "TEST")
    assert labels.tolist() == [2] and (found[:, 2:] > found[:, :2]).all()


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PHOTO = Image.fromarray(make_noise(60, 80))


def test_images_of_every_mode_are_read_as_rgb_with_and_without_torchvisions_decoder(tmp_path, monkeypatch):
    grey, see_through = PHOTO.convert("L"), PHOTO.convert("RGBA")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 77)  # 16 bits, of which the upper eight count
    see_through.putalpha(0)
    options = {}, {"quality": 95, "subsampling": 0}, {"progressive": True}, {"restart_marker_rows": 1}
    cases = [
        *((image, "PNG", {}, image, 0) for image in (PHOTO, grey, PHOTO.quantize(64), PHOTO.convert("1"))),
        *((image, "PNG", {}, Image.new("L", PHOTO.size, 255), 0) for image in (see_through, see_through.convert("LA"))),
        (deep, "PNG", {}, grey, 0), (deep, "TIFF", {}, grey, 0), (PHOTO.convert("RGBA"), "PNG", {}, PHOTO, 0),
        (grey, "JPEG", {"quality": 100}, grey, 8),
        (PHOTO.convert("CMYK"), "JPEG", {"quality": 100, "subsampling": 0}, PHOTO, 12),
        *((PHOTO, "JPEG", option, None, 1) for option in options),  # None: what Pillow reads
    ]  # fmt: skip
    path = tmp_path / "photo with ä space"
    for decoder in (datasets.decode_jpeg, None):
        monkeypatch.setattr(datasets, "decode_jpeg", decoder)
        for image, kind, option, expected, tolerance in cases:
            path.write_bytes(encode(image, kind, **option))
            found, expected = read_image(path), (expected or Image.open(path)).convert("RGB")
            assert found.shape == (3, 60, 80) and found.dtype == torch.uint8
            difference = (found.int() - as_image(np.array(expected)).int()).abs()
            assert difference.max() <= tolerance, f"{image.mode}, {kind}: {difference.max()}"


def test_files_that_cannot_be_read_are_named_and_bombs_refused_before_they_are_decoded(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg"):
        read_image(tmp_path / "missing.jpg")
    jpeg, image = encode(Image.fromarray(make_noise(200, 300))), encode(PHOTO, "PNG")
    frame = jpeg.index(b"\xff\xc0") + 5
    faults = {
        "empty.jpg": b"", "text.jpg": b"this is not an image", "start.jpg": b"\xff\xd8", "header.jpg": jpeg[:200],
        "truncated.jpg": jpeg[: len(jpeg) // 2], "truncated.png": image[: len(image) // 2],
        "damaged.png": image[:60] + bytes(40) + image[100:],
        "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "bomb.jpg": jpeg[:frame] + b"\xff\xff\xff\xff" + jpeg[frame + 4 :],  # 65535 x 65535
        **{f"bomb{w}.png": png(w, h) for w, h in ((9000, 9000), (20_000, 20_000), (79_999_999, 1), (1, 65_501))},
    }  # fmt: skip
    for name, data in faults.items():
        (tmp_path / name).write_bytes(data)
        for read in (read_image, datasets.stored_size_and_orientation) if "bomb" in name else (read_image,):
            with pytest.raises(ValueError, match=f"{name}.*{'pixels' if 'bomb' in name else ''}"):
                read(tmp_path / name)
    monkeypatch.setattr(datasets, "MAX_IMAGE_BYTES", len(jpeg) - 1)
    (tmp_path / "large.jpg").write_bytes(jpeg)
    with pytest.raises(ValueError, match=rf"large\.jpg.*it has {len(jpeg):,} bytes, more than"):
        read_image(tmp_path / "large.jpg")
    Image.new("1", (1, 65_500)).save(tmp_path / "longest.png")
    assert transform(read_image(tmp_path / "longest.png"), *NO_OBJECTS, "TEST")[0].shape == (3, 300, 300)


def test_float_images_are_scaled_by_what_holds_all_their_values(tmp_path):
    levels = np.array([[0, 51, 102], [153, 204, 255]])
    nothing, infinite = float("nan"), float("inf")
    cases = [
        (levels / 255, levels), (levels, levels), (levels * 257, levels), (np.zeros((2, 3)), np.zeros((2, 3))),
        (np.array([[0.2, nothing], [-3, 1]]), [[51, 0], [0, 255]]), (np.array([[infinite, 51, 255]]), [[0, 51, 255]]),
    ]  # fmt: skip
    for values, expected in cases:
        image = Image.fromarray(values.astype(np.float32))
        image.save(tmp_path / "float.tif")
        found = read_image(tmp_path / "float.tif")
        assert found.tolist() == [np.asarray(expected).tolist()] * 3
        prepared = datasets.prepare([image], FakeModel())  # as detect.py reads it
        assert torch.equal(prepared[0], transform(found, *NO_OBJECTS, "TEST")[0].float())


def test_integers_beyond_16_bits_are_black_or_white():
    values = np.array([[-1, 255, 256, 65_535, 65_536]], dtype=np.int32)
    assert datasets.scale_to_bytes(values).tolist() == [[0, 0, 1, 255, 255]]


def test_images_that_are_nearly_black_are_reported(tmp_path):
    twelve_bits = np.full((4, 5), 3685, dtype=np.uint16)
    for brightest, values in ((14, twelve_bits), (0, np.full((4, 5), 255, dtype=np.uint16)), (230, twelve_bits * 16)):
        Image.fromarray(values).save(tmp_path / "deep.png")
        image = read_image(tmp_path / "deep.png")
        assert image.max() == brightest
        warning = datasets.darkness_warning(image)
        if brightest == 230:
            assert warning == ""
        else:
            assert f"{brightest} of 255" in warning and "by 16" in warning
    image[:] = 0
    for value, is_dark in ((63, True), (64, False), (255, False)):
        image[1, 2, 3] = value  # one bright pixel, of one channel, is enough
        assert (datasets.darkness_warning(image) != "") == is_dark


def test_jfif_files_are_read_and_heic_files_named_as_such(tmp_path):
    (tmp_path / "photo.jfif").write_bytes(encode(PHOTO))
    assert read_image(tmp_path / "photo.jfif").shape == (3, 60, 80)
    (tmp_path / "photo.HEIC").write_bytes(encode(PHOTO))  # a JPEG by another name
    assert read_image(tmp_path / "photo.HEIC").shape == (3, 60, 80)
    heic = bytes([0, 0, 0, 24]) + b"ftypheic" + bytes(4) + b"mif1heic" + bytes(40)
    for name, data in (("IMG_1.HEIC", heic), ("renamed.jpg", heic), ("IMG_2.heif", b"cut"), ("a.heic", b"")):
        (tmp_path / name).write_bytes(data)
        for read in (read_image, datasets.stored_size_and_orientation):
            with pytest.raises(ValueError, match=rf"{name}.*HEIC.*JPEG"):
                read(tmp_path / name)
    (tmp_path / "text.jpg").write_bytes(b"this is not an image")
    with pytest.raises(ValueError) as caught:
        read_image(tmp_path / "text.jpg")
    assert "HEIC" not in str(caught.value)
