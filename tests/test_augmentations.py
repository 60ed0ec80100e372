"""Augmentations: every fast path against a plain float64 version of the same mathematics; distributions."""

import io
import itertools

import numpy as np
import pytest
import torch
from helpers import FakeModel, png
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


def plain_distort(pixels, distortion):
    """The photometric steps in Caffe's order, in float64; returns float64 in [0, 255]."""
    brightness, contrast, more_saturation, turn, contrast_first = distortion
    before, after = (contrast / 256, 1) if contrast_first else (1, contrast / 256)
    rgb = np.clip(np.clip(pixels.astype(np.float64) + brightness, 0, 255) * before, 0, 255)
    hue, saturation, value = np.moveaxis(rgb_to_hsv(rgb / 255), -1, 0)  # hue 1 is the whole circle
    hue, saturation = (hue + turn / 256 / 6) % 1, np.clip(saturation * (more_saturation / 256), 0, 1)
    return np.clip(255 * hsv_to_rgb(np.stack([hue, saturation, value], axis=-1)) * after, 0, 255)


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
        assert np.array_equal(datasets.distort(values, Distortion(brightness=brightness)), expected)
    for contrast in range(128, 385):
        expected = np.minimum(values * (contrast / 256), 255)
        assert np.abs(datasets.distort(values, Distortion(contrast=contrast)) - expected).max() <= 0.5


@pytest.mark.parametrize("rgb, parameters, expected", [
    ((255, 0, 0), {"hue": 128}, (255, 127, 0)),  # red, half a sixth on: orange
    ((255, 0, 0), {"hue": -128}, (255, 0, 127)), ((0, 255, 0), {"hue": 128}, (0, 255, 127)),  # next, 30 +- 30 degrees:
    ((200, 150, 100), {"hue": 128}, (200, 200, 100)), ((200, 150, 100), {"hue": -128}, (200, 100, 100)),
    ((200, 150, 100), {"saturation": 128}, (200, 175, 150)), ((200, 150, 100), {"saturation": 384}, (200, 125, 50)),
    ((200, 110, 20), {"saturation": 384}, (200, 100, 0)),  # S ends at 1: the factor is 200 / 180
    *(((grey,) * 3, {"saturation": 384, "hue": 100}, (grey,) * 3) for grey in (90, 0)),
    ((200, 100, 20), {"brightness": -30, "contrast": 384}, (255, 105, 0)),
    # 198 * 1.5 is cut to 255 before the saturation, 255 - (255 - 141) / 2; or (198 - 104 / 2) * 1.5 after it.
    ((198, 94, 94), {"contrast": 384, "saturation": 128}, (255, 198, 198)),
    ((198, 94, 94), {"contrast": 384, "saturation": 128, "contrast_first": False}, (255, 219, 219)),
])  # fmt: skip
def test_hand_computed_colors(rgb, parameters, expected):
    assert datasets.distort(np.array([[rgb]], dtype=np.uint8), Distortion(**parameters)).tolist() == [[list(expected)]]


@pytest.mark.parametrize("saturation", [128, 180, 256, 257, 330, 384])
@pytest.mark.parametrize("hue", [-153, -64, -1, 0, 1, 100, 153])
def test_saturation_and_hue_are_those_of_hsv(saturation, hue):
    levels = *range(0, 256, 15), 1, 2, 127, 128, 254
    colors = np.array([[*itertools.product(levels, repeat=3)]], dtype=np.uint8)
    result = datasets.distort_color(colors, saturation, hue)
    errors = np.abs(result - plain_distort(colors, Distortion(saturation=saturation, hue=hue)))
    # One rounding to a level, of which the saturation can make one and a half before it rounds once more.
    assert errors.max() < (0.501 if saturation == 256 else 1.76) and errors.mean() < 0.6
    assert saturation == 256 == hue + 256 or not np.array_equal(result, colors)


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


def test_zoom_out_boxes_are_drawn_as_in_the_design():
    rng, size = np.random.default_rng(0), np.array([500, 375])
    canvases = np.array([datasets.sample_zoom_out_box(*size, rng) for _ in range(6000)])
    is_zoomed = (canvases != (0, 0, *size)).any(axis=1)
    assert is_half(is_zoomed)
    mins, maxs = canvases[is_zoomed, :2], canvases[is_zoomed, 2:]
    ratios, places = (maxs - mins) / size, (0.5 - mins) / (maxs - mins - size + 1)
    assert (mins <= 0).all() and (maxs >= size).all() and np.abs(ratios[:, 0] - ratios[:, 1]).max() < 0.003
    assert all(is_uniform(ratios[:, axis], 1, 4) and is_uniform(places[:, axis], 0, 1) for axis in (0, 1))


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
    assert gap_from(fast[0], plain[0]) < 1 and gap_from(fast[1], plain[1]) < 1
    assert gap_from(w * h, plain_w * plain_h) < 1 and gap_from(w / h, plain_w / plain_h) < 1
    # The comparison is sharp enough to see samplers with a wrong lower bound of the scale.
    assert gap_from(np.sqrt(w * h), 1.1 * np.sqrt(plain_w * plain_h)) > 1


@pytest.mark.parametrize("min_overlap", MIN_OVERLAPS)
def test_each_sampler_keeps_its_promise(min_overlap, monkeypatch):
    monkeypatch.setattr(datasets, "MIN_OVERLAPS", (min_overlap,))
    canvas, rng = (-100, -50, 700, 500), np.random.default_rng(1)
    boxes = np.array([[-80.0, -40, 600, 460], [450, 300, 470, 330]])
    crops = [datasets.sample_crop_box(canvas, (0, 0, 500, 375), boxes, rng) for _ in range(300)]
    crops = [crop for crop in crops if crop != canvas]  # else the whole image was drawn, or no try succeeded
    assert len(crops) > 30
    for crop in crops:
        assert -100 <= crop[0] < crop[2] <= 700 and -50 <= crop[1] < crop[3] <= 500
        assert is_success(crop, boxes, min_overlap)
        w, h = (crop[2] - crop[0]) / 800, (crop[3] - crop[1]) / 550
        assert 0.297 < (w * h) ** 0.5 <= 1 and 0.49 < w / h < 2.04  # whole pixels: a little off


def test_crops_without_objects_are_never_out_of_sight_of_the_photo():
    canvas, nothing, rng = (-600, -700, 1400, 800), np.zeros((0, 4)), np.random.default_rng(1)
    crops = np.array([datasets.sample_crop_box(canvas, (0, 0, 500, 375), nothing, rng) for _ in range(500)])
    assert (crops[:, :2] < (500, 375)).all() and (crops[:, 2:] > 0).all()
    assert abs((crops == canvas).all(axis=1).mean() - 1 / 7) < 0.06  # the sampler of the whole image


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
    rng, numbers = np.random.default_rng(seed), torch.arange(3)
    image, found, labels, difficulties = transform(as_image(pixels), boxes, numbers, 5 - numbers, "TRAIN", rng)
    plain_image, plain_boxes, kept = replay(pixels, boxes, seed)
    errors = np.abs(image.permute(1, 2, 0).numpy() - plain_image)
    assert errors.max() <= 4 and errors.mean() < 1, f"seed {seed}: {errors.max()}, {errors.mean()}"
    assert labels.tolist() == kept and (labels + difficulties == 5).all()
    np.testing.assert_allclose(found.numpy(), plain_boxes, atol=1e-6)
    return kept


def test_the_fast_transform_is_the_plain_one_to_within_rounding(monkeypatch):
    monkeypatch.setattr(datasets, "DISTORTED_AT_ONCE", 10_000)  # some rows at a time
    assert datasets.compute_place((10, 20, 110, 220), (10, 20, 110, 220), 300) == (0, 0, 300, 300)
    assert datasets.compute_place((-100, -50, 500, 250), (0, 0, 300, 250), 300) == (50, 50, 200, 300)
    assert datasets.compute_place((0, 0, 100_000, 100_000), (5, 99_999, 6, 100_000), 300) == (0, 299, 1, 300)
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
        for layout in (pixels, planar):
            errors = np.abs(datasets.resize(layout, new_width, new_height, antialias) - expected)
            assert errors.max() < 1.01, f"{width} x {height} to {new_width} x {new_height}"


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


def test_files_that_cannot_be_read_are_named_and_bombs_refused_before_they_are_decoded(tmp_path):
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
    Image.new("1", (1, 65_500)).save(tmp_path / "longest.png")
    assert transform(read_image(tmp_path / "longest.png"), *NO_OBJECTS, "TEST")[0].shape == (3, 300, 300)
