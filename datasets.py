"""From image files and data lists to the batches that a network learns from.

    dataset = PascalVOCDataset("data", split="TRAIN", keep_difficult=True)
    batches = TrainingBatches(len(dataset), batch_size=32, seed=0, first_iteration=0, last_iteration=120000)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=dataset.collate_fn, num_workers=4)

    1. Image files      any image file as RGB pixels
    2. The data set     its items, its batches and their order
    3. Transform        zoom out, crop, flip and resize
    4. Colours          brightness, contrast, saturation and hue

Which images make up a batch depends on (seed, iteration) alone, and how an image is augmented on (seed, epoch,
index) alone: never on the number of workers, nor on what was read before.
Shapes in comments: N images in a batch, M objects in an image, S the network's input size, such as 300.
"""

import contextlib
import errno
import functools
import io
import itertools
import operator
import os
import stat
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch.utils.data import Dataset, get_worker_info

from utils import MAX_IMAGE_PIXELS, find_jaccard_overlap, load_label_map, printable, read_json

try:  # torchvision 0.29 announces that a later version will leave decoding to another package
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None  # Pillow decodes instead: the same pixels in twice the time

# --- 1. Image files -------------------------------------------------------------------------------

# What Pillow may open, whatever a file's name says: for an EPS file it would start Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "TGA", "AVIF")
# As many bytes take so many pixels uncompressed, 4 channels of 16 bits; no image file is larger.
MAX_IMAGE_BYTES = 8 * MAX_IMAGE_PIXELS
# The longest side that a JPEG can have. (`resize()` makes an image S pixels wide at its full height first.)
MAX_IMAGE_SIDE = 65_500
# Errors that say nothing about a file: too many are open, a disk or its network fails, memory is short.
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM)


def read_image(path):
    """Read an image file as it is stored: no EXIF orientation is applied, as in VOC's annotations (TIFF: Pillow does).

    path: file of one of IMAGE_FORMATS, of any mode (grey, palette, CMYK, 16-bit, ...).
    Returns a (3, H, W) uint8 RGB tensor.
    Raises FileNotFoundError or ValueError, naming the file, if it is missing, damaged or too large; another
    OSError if the machine is at fault.
    """
    data, image = open_image_file(path)
    # torchvision decodes usual JPEGs twice as fast as Pillow, which knows Adobe's inverted CMYK.
    if decode_jpeg and image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):  # unusual, or damaged: Pillow decides
            return decode_jpeg(encoded, mode=ImageReadMode.RGB)
    try:
        return torch.from_numpy(np.array(pil_to_rgb(image))).permute(2, 0, 1)
    except Exception as error:  # decoders raise all kinds of exceptions
        raise ValueError(f"{path}: a damaged image ({printable(error)})") from None


def stored_size_and_orientation(path):
    """What an image file's header says: ((width, height) of what `read_image()` returns, EXIF orientation).

    The orientation, 1 to 8, says how viewers turn the stored pixels before they show them; 1: not at all.
    """
    image = open_image_file(path)[1]
    return image.size, read_orientation(image)


def open_image_file(path):
    """The bytes of an image file, and a PIL image of which Pillow has read the header and no pixels yet."""
    try:
        check_image_file(path)
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image; if it moved, make new data lists") from None
    except (OSError, ValueError) as error:  # a path may have characters that no file name can have
        if getattr(error, "errno", None) in MACHINE_ERRORS:
            raise OSError(error.errno, f"{path}: {error.strerror}") from None
        raise ValueError(f"{printable(path, 1000)}: the image file cannot be read ({printable(error)})") from None
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Exception as error:
        raise ValueError(f"{path}: not an image that can be read ({printable(error)})") from None
    check_image_size(*image.size, path)
    return data, image


def check_image_file(path):
    """Refuse what is not a file, such as a pipe, which would be waited for, and files larger than any image."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a file")
    if status.st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"it has {status.st_size:,} bytes, more than the {MAX_IMAGE_BYTES:,} allowed")


def check_image_size(width, height, name):
    """Refuse a header that would make the decoder, or `resize()`, allocate gigabytes (a decompression bomb)."""
    if width * height > MAX_IMAGE_PIXELS or max(width, height) > MAX_IMAGE_SIDE:
        limits = f"{MAX_IMAGE_PIXELS:,} (or {MAX_IMAGE_SIDE:,} a side) allowed; save it smaller, or remove it"
        raise ValueError(f"{name}: its header claims {width} x {height} pixels, more than the {limits}")


def read_orientation(image):
    """The EXIF orientation of a PIL image, 1 to 8; 1 (stored as it is shown) where it has none. TIFF files count as
    having none: Pillow states their size, and decodes them, as they are shown."""
    orientation = None
    with contextlib.suppress(Exception):  # damaged EXIF data: the pixels are fine
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    return orientation if orientation in range(1, 9) and image.format != "TIFF" else 1


def pil_to_rgb(image):
    """A PIL image of any mode as RGB (itself, if it is RGB): 16 bits become 8, transparency is laid on white."""
    if image.mode.startswith("I"):  # 16-bit grey; "I" holds the same values in 32 bits
        pixels = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


# --- 2. The data set ------------------------------------------------------------------------------

# What `transform()` does to a training image, in this order.
AUGMENTATIONS = ("distort", "zoom_out", "crop", "flip")
# Boxes, labels and difficulties of an image without objects.
NO_OBJECTS = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.uint8)


class PascalVOCDataset(Dataset):
    """Images and objects of one split of any data set for which create_data_lists.py wrote lists.

    data_folder: with the lists. split: "TRAIN" or "TEST". keep_difficult: whether items hold difficult objects.
    seed: with the epoch and the index it decides how an image is augmented.
    skip_corrupt: False raises on an image that cannot be decoded; True puts a blank image without objects in
        its place. `skipped_images()` lists them.
    augment: names out of AUGMENTATIONS; None: all for "TRAIN", none for "TEST". size, antialias: as in `transform()`.

    An item's key is an index (then the epoch is 0), or (epoch, index). An item is the image (3, S, S) uint8,
    boxes (M, 4) float32, boundary form, fractional, labels (M,) int64 and difficulties (M,) uint8; M may be 0.
    Attributes: label_map; image_paths; sizes (n_images, 2), widths and heights; boxes_xy_pixels, labels and
    difficulties of all objects, those of image i from starts[i] to starts[i + 1]; from COCO's files, else
    None, image_ids (list) and areas (of each object, in square pixels).
    Raises FileNotFoundError for a list that is missing, ValueError for one that `read_objects()` refuses.
    """

    def __init__(
        self, data_folder, split, keep_difficult=False, seed=0, skip_corrupt=False, augment=None, size=300,
        antialias=True,
    ):  # fmt: skip
        if split not in ("TRAIN", "TEST"):
            raise ValueError(f'split is {split!r}; it must be "TRAIN" or "TEST"')
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be 0 or more")
        augment = (AUGMENTATIONS if split == "TRAIN" else ()) if augment is None else augment
        if not isinstance(augment, tuple) or not set(augment) <= set(AUGMENTATIONS):
            raise ValueError(f"augment is {augment!r}; it must be a tuple of names out of {AUGMENTATIONS}")
        self.data_folder, self.split, self.keep_difficult = Path(data_folder), split, keep_difficult
        self.seed, self.skip_corrupt, self.augment = seed, skip_corrupt, augment
        self.size, self.antialias = size, antialias

        try:
            self.label_map = load_label_map(data_folder)
            images = read_json(self.data_folder / f"{split}_images.json", list)
            if not all(isinstance(path, str) for path in images):
                raise ValueError(f"{self.data_folder / split}_images.json: not a list of paths")
            objects_path = self.data_folder / f"{split}_objects.json"
            self.sizes, self.starts, self.image_ids, packed = read_objects(objects_path, images, len(self.label_map))
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{error} (create_data_lists.py writes the lists: run it again)") from None
        # A few large arrays, not a Python object for each path and box: a forked worker that only reads a
        # Python object still writes its reference count, and so would copy every page of a long list.
        self.image_paths = np.array(images, dtype=np.str_)
        if not keep_difficult:
            is_easy = packed["difficulties"] == 0
            self.starts = np.concatenate([[0], np.cumsum(is_easy)])[self.starts]
            packed = {key: values[is_easy] for key, values in packed.items()}
        self.boxes_xy_pixels = torch.from_numpy(packed["boxes"].astype(np.float32))
        self.labels = torch.from_numpy(packed["labels"].astype(np.int64))
        self.difficulties = torch.from_numpy(packed["difficulties"].astype(np.uint8))
        self.areas = packed.get("areas")
        self.skipped = torch.zeros(len(images), dtype=torch.uint8).share_memory_()  # written by all workers

    def __len__(self):
        return len(self.image_paths)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        epoch, index = operator.index(epoch), operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index}: {self.split} has {len(self)} images")
        index %= len(self)
        try:
            image = read_image(str(self.image_paths[index]))
        except ValueError:
            if not self.skip_corrupt:
                raise
            self.skipped[index] = 1
            return torch.from_numpy(blank_image(self.size).copy()).permute(2, 0, 1), *NO_OBJECTS
        (height, width), (listed_width, listed_height) = image.shape[1:], self.sizes[index]
        if (width, height) != (listed_width, listed_height):  # against which the boxes were checked
            raise ValueError(
                f"{self.image_paths[index]} is {width} x {height} pixels, the lists in {self.data_folder} say "
                f"{listed_width} x {listed_height}; run create_data_lists.py again with check_images on"
            )
        objects = slice(self.starts[index], self.starts[index + 1])
        boxes, labels, difficulties = self.boxes_xy_pixels[objects], self.labels[objects], self.difficulties[objects]
        split = "TRAIN" if self.augment else "TEST"
        rng = np.random.default_rng((self.seed, epoch, index))
        return transform(image, boxes, labels, difficulties, split, rng, self.size, self.antialias, self.augment)

    def image_names(self):
        """Names of the images as Pascal VOC's files have them: without folder and extension."""
        return [Path(path).stem for path in self.image_paths.tolist()]

    def skipped_images(self):
        """Paths of the images that were skipped so far because they could not be decoded, by any worker."""
        return self.image_paths[self.skipped.numpy() != 0].tolist()

    @staticmethod
    def collate_fn(batch):
        """A batch of a list of N items: images (N, 3, S, S) uint8, and lists of their boxes, labels, difficulties."""
        images, *lists = zip(*batch, strict=True)
        # transform() leaves the channels last in memory; a batch in that order is five times as fast to make.
        images = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
        # One block of memory for all boxes, one for all labels: a worker passes each block on as an open file,
        # and hundreds of them exceed the number that a system allows (1024 usually).
        packed = [torch.cat(tensors) for tensors in lists]
        # A worker would move them to shared memory later, in a thread whose errors are lost (no space, too many
        # open files), and the run would wait for this batch for ever. Here they reach it.
        for tensor in (images, *packed):
            if get_worker_info() is not None and tensor.numel():
                tensor.share_memory_()
        counts = [len(boxes) for boxes in lists[0]]
        return images, *(list(tensor.split(counts)) for tensor in packed)


class TrainingBatches:
    """Batch sampler of one uninterrupted run: batch i is the same whenever, and wherever, the run resumes.

    The images are read in an endless sequence of seeded permutations, one for each epoch, batch_size at a time:
    a batch may straddle two epochs, and no image is left out of any.

    batch_size: over all ranks. first_iteration, last_iteration: which batches are yielded, as in range().
    rank, world_size: this process of how many; each takes its share of every batch.
    Yields lists of (epoch, index), the keys of `PascalVOCDataset`.
    """

    def __init__(self, n_images, batch_size, seed, first_iteration, last_iteration, rank=0, world_size=1):
        if n_images < 1:
            raise ValueError("there is no image to train on; run create_data_lists.py on another folder")
        if not 0 <= rank < world_size <= batch_size:
            raise ValueError(f"rank {rank} of {world_size} processes has no share in a batch_size of {batch_size}")
        self.n_images, self.batch_size, self.seed = n_images, batch_size, seed
        self.iterations = range(first_iteration, last_iteration)
        self.rank, self.world_size = rank, world_size
        self.epoch, self.order = None, None  # the last permutation that was computed

    def __len__(self):
        return len(self.iterations)

    def __iter__(self):
        return (self.batch(iteration)[self.rank :: self.world_size] for iteration in self.iterations)

    def batch(self, iteration):
        """The (epoch, index) of all batch_size images of an iteration, over all ranks."""
        first, keys = iteration * self.batch_size, []
        for position in range(first, first + self.batch_size):
            epoch, place = divmod(position, self.n_images)
            if epoch != self.epoch:
                # The spawn key keeps this stream apart from those of the augmentation, seeded with three numbers.
                rng = np.random.default_rng(np.random.SeedSequence((self.seed, epoch), spawn_key=(0,)))
                self.epoch, self.order = epoch, rng.permutation(self.n_images)
            keys.append((epoch, int(self.order[place])))
        return keys


def read_objects(path, images, n_classes):
    """The objects of all images in a few arrays, checked so that none can hurt the loss.

    path: file with a list of {"boxes", "labels", "difficulties", "size"} and perhaps "areas" and "image_id", one
    for each image. images: list of paths. n_classes: background included.
    Returns sizes, starts and image_ids as the data set has them, and a dict of key to float64 array: "boxes"
    (n, 4), boundary form, in pixels, "labels", "difficulties" and, if all objects have one, "areas" (n,).
    Raises FileNotFoundError, or ValueError, naming the image, for what is missing or breaks the rules below.
    """
    packed = {key: array("d") for key in ("size", "boxes", "labels", "difficulties", "areas")}  # numbers, end to end
    counts, image_ids = [], []

    def pack(entry):  # an image's, as soon as they are read: COCO's fill half a GB as Python objects
        size, boxes, areas = entry["size"], entry["boxes"], entry.get("areas", ())
        lengths = {len(entry["labels"]), len(entry["difficulties"]), len(areas or boxes)}
        if lengths != {len(boxes)} or [len(size), *map(len, boxes)] != [2, *[4] * len(boxes)]:
            raise TypeError("numbers are missing")
        for key, values in {**entry, "boxes": itertools.chain(*boxes), "areas": areas}.items():
            if key in packed:
                packed[key].extend(values)
        counts.append(len(boxes))
        image_ids.append(entry.get("image_id"))

    def refuse(index, problem):
        image = printable(images[index], 1000) if index < len(images) else "an image that is not listed"
        raise ValueError(f"{path}: {image}: {printable(problem, 500)}")

    try:
        read_json(path, list, object_hook=pack)
    except (KeyError, TypeError, OverflowError) as error:  # of the first image that is not counted yet
        refuse(len(counts), f"boxes, labels, difficulties, areas or size: not numbers, or of unequal length ({error})")
    if len(counts) != len(images):
        raise ValueError(f"{path}: describes {len(counts)} of {len(images)} images")
    packed = {key: np.asarray(values) for key, values in packed.items()}
    sizes, packed["boxes"] = packed.pop("size").reshape(-1, 2), packed["boxes"].reshape(-1, 4)
    if len(packed["areas"]) < len(packed["boxes"]):
        del packed["areas"]
    starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    image_of = np.repeat(np.arange(len(images)), counts)  # (n,)

    # The rules for the values, checked for all images at once. NaN breaks each, for no comparison with it holds.
    is_whole = ((sizes >= 1) & (sizes <= MAX_IMAGE_SIDE) & (sizes % 1 == 0)).all(axis=1)
    mins, maxs = np.split(packed["boxes"].astype(np.float32), 2, axis=1)  # in float32 small boxes lose their area
    is_inside = ((mins >= 0) & (mins < maxs) & (maxs <= sizes[image_of])).all(axis=1)
    rules = {
        "size": (is_whole & (sizes.prod(axis=1) <= MAX_IMAGE_PIXELS), "not a width and a height in pixels"),
        "boxes": (is_inside, "not finite, without area (in float32), or beyond the image"),
        "labels": (np.isin(packed["labels"], np.arange(1, n_classes)), "not a label of label_map.json"),
        "difficulties": (np.isin(packed["difficulties"], (0, 1)), "neither 0 nor 1"),
        "areas": (np.isfinite(packed.get("areas", ())), "not a finite number"),
    }
    for key, (is_valid, problem) in rules.items():
        if not is_valid.all():
            row = is_valid.argmin()
            index, value = (row, sizes[row]) if key == "size" else (image_of[row], packed[key][row])
            refuse(index, f"{value.tolist()} in its {key} is {problem}")
    return sizes.astype(np.int64), starts, None if None in image_ids else image_ids, packed


# --- 3. Transform ---------------------------------------------------------------------------------

# Boxes of whole pixels are tuples (x_min, y_min, x_max, y_max):
#   canvas   the photo after zooming out, and what surrounds it; like crop and source in pixels of the photo
#   crop     the part of the canvas that becomes the whole S x S image
#   source   the part of the crop that shows the photo, of at least one pixel
#   place    where the source comes to lie on the S x S image

# The ImageNet mean in bytes: what surrounds a photo that is zoomed out.
FILLER = (124, 116, 104)
# Six of the seven samplers of crops: the minimum overlap of crop and object. The seventh takes the whole image.
MIN_OVERLAPS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.0)
CROP_TRIES = 50


def transform(image, boxes, labels, difficulties, split, rng=None, size=300, antialias=True, augment=AUGMENTATIONS):
    """A photo and its objects as the network sees them: augmented for training, only resized for testing.

    image: (3, H, W) uint8 RGB tensor, or PIL image; it is not changed.
    boxes: (n, 4) float tensor, boundary form, pixels, inside the image; n may be 0.
    labels: (n,) int64 tensor. difficulties: (n,) tensor. size: S. antialias: as in `resize()`.
    split: "TRAIN" or "TEST"; another is a ValueError. rng: numpy Generator for "TRAIN"; None draws a new one.
    augment: names out of AUGMENTATIONS, the steps that are taken for "TRAIN".
    Returns the image as a (3, S, S) uint8 tensor, boxes as an (m, 4) float32 tensor, boundary form,
    fractional, in [0, 1], of positive area, and their labels and difficulties; m <= n.
    """
    if split not in ("TRAIN", "TEST"):
        raise ValueError(f'split is {split!r}; it must be "TRAIN" or "TEST"')
    keep_freed_memory()
    pixels = image.permute(1, 2, 0).numpy() if isinstance(image, torch.Tensor) else np.array(pil_to_rgb(image))
    height, width, _ = pixels.shape
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)

    # Draw all that can be done to the image, whether or not it is: leaving a step out changes no other draw.
    distortion, crop, flip = Distortion(), (0, 0, width, height), False
    if split == "TRAIN":
        rng = np.random.default_rng() if rng is None else rng
        drawn = sample_distortion(rng), sample_zoom_out_box(width, height, rng), rng.random() < 0.5
        distortion = drawn[0] if "distort" in augment else distortion
        canvas = drawn[1] if "zoom_out" in augment else crop
        flip = drawn[2] and "flip" in augment
        crop = sample_crop_box(canvas, crop, boxes, rng) if "crop" in augment else canvas

    # Zoom, crop, flip and resize are one step. Only the source's pixels are read, distorted and resized, once;
    # the canvas is never built.
    source = max(crop[0], 0), max(crop[1], 0), min(crop[2], width), min(crop[3], height)
    place = compute_place(crop, source, size)
    pixels = distort(pixels[source[1] : source[3], source[0] : source[2]], distortion)
    pixels = resize(pixels, place[2] - place[0], place[3] - place[1], antialias)
    if place != (0, 0, size, size):
        pixels, surviving = blank_image(size).copy(), pixels
        pixels[place[1] : place[3], place[0] : place[2]] = surviving
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # (1, 3, S, S): with four dimensions it flips faster
    image = (image.flip(3) if flip else image)[0]

    boxes, kept = move_boxes(boxes, crop, source, place, flip, size)
    return image, boxes, labels[kept], difficulties[kept]


def prepare(images, model):
    """PIL images, or (3, H, W) uint8 RGB tensors, as a model's input: an (N, 3, S, S) float32 tensor on its device,
    resized as its weights want it, and normalised.
    """
    pixels = [transform(image, *NO_OBJECTS, "TEST", None, model.input_size, model.antialias)[0] for image in images]
    return model.normalize(torch.stack(pixels))


def sample_zoom_out_box(width, height, rng):
    """With probability 1/2 a canvas 1 to 4 times as wide and high as the photo, which lies anywhere on it; else
    the photo itself, (0, 0, width, height). (Caffe: ExpandImage.)
    """
    if rng.random() < 0.5:
        return 0, 0, width, height
    ratio = rng.uniform(1, 4)
    canvas_width, canvas_height = round(ratio * width), round(ratio * height)
    left = int(rng.integers(canvas_width - width, endpoint=True))
    top = int(rng.integers(canvas_height - height, endpoint=True))
    return -left, -top, canvas_width - left, canvas_height - top


def sample_crop_box(canvas, image_box, boxes, rng):
    """Crop by one of the seven samplers that succeed, chosen at random (SSD paper, section 2.2).

    image_box: the part of the canvas that shows the photo. boxes: (n, 4) array, boundary form, pixels.
    Returns the crop; it holds the centre of an object if there is one, and some of the photo if there is none.
    """
    # The tries of six samplers at once, those of one after those of another.
    crops = sample_boxes_inside(canvas, len(MIN_OVERLAPS) * CROP_TRIES, rng)  # (4, 6 * tries)
    if len(boxes):
        centers = ((boxes[:, :2] + boxes[:, 2:]) / 2).T[:, :, None]  # (2, n, 1)
        has_center = ((crops[:2, None] <= centers) & (centers < crops[2:, None])).all(axis=0)  # (n, 6 * tries)
        overlaps = find_jaccard_overlap(torch.from_numpy(boxes), torch.from_numpy(crops).T).numpy()  # (n, 6 * tries)
        success = has_center.any(axis=0) & (overlaps.max(axis=0) >= np.repeat(MIN_OVERLAPS, CROP_TRIES))
    else:  # show some of the photo
        image_box = np.reshape(image_box, (4, 1))
        success = ((crops[:2] < image_box[2:]) & (crops[2:] > image_box[:2])).all(axis=0)
    # Take the first success of a sampler that has one, or, as the seventh sampler does, the whole canvas.
    success = success.reshape(-1, CROP_TRIES)
    samplers = success.any(axis=1).nonzero()[0]
    chosen = rng.integers(len(samplers) + 1)
    if chosen == len(samplers):
        return canvas
    first = samplers[chosen] * CROP_TRIES + success[samplers[chosen]].argmax()
    return tuple(crops[:, first].astype(int).tolist())


def sample_boxes_inside(canvas, n, rng):
    """Boxes of scale s in [0.3, 1] and aspect ratio r in [max(1/2, s^2), min(2, 1/s^2)], anywhere inside.

    Returns a (4, n) float array, the rows x_min, y_min, x_max and y_max, in whole pixels: the width is
    s sqrt(r), the height s / sqrt(r) of the canvas'. (Caffe: SampleBBox, sampler.cpp.)
    """
    draws = rng.random((4, n))
    scales = 0.3 + 0.7 * draws[0]
    lowest = np.maximum(scales * scales, 0.5)  # the highest ratio is 1 / lowest
    roots = np.sqrt(lowest + (1 / lowest - lowest) * draws[1])
    canvas = np.array(canvas).reshape(4, 1)
    canvas_size = canvas[2:] - canvas[:2]  # (2, 1)
    sizes = canvas_size * np.array([scales * roots, scales / roots])
    sizes = np.maximum(np.rint(sizes), 1)
    mins = canvas[:2] + np.floor((canvas_size - sizes + 1) * draws[2:])
    return np.concatenate([mins, mins + sizes])


def compute_place(crop, source, size):
    """Where the source comes to lie on the S x S image: at least one pixel wide and high."""
    place = [0, 0, 0, 0]
    for axis in range(2):
        scale = size / (crop[axis + 2] - crop[axis])
        low = min(round((source[axis] - crop[axis]) * scale), size - 1)
        high = max(round((source[axis + 2] - crop[axis]) * scale), low + 1)
        place[axis], place[axis + 2] = low, high
    return tuple(place)


def resize(pixels, width, height, antialias=True):
    """Bilinear resize of an (h, w, 3) uint8 array; returns a (height, width, 3) array.

    antialias: True: where the image shrinks, a pixel is made of all those that it covers, as Pillow does it.
        False: of the four nearest to its centre, as the SSDs of torchvision, amdegroot and lufficc do it.
    """
    # Channels last is the fast way; planar, torch 2.14 errs where the output is one pixel wide, even in float.
    images = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)  # (1, 3, h, w)
    if min(width, pixels.shape[1]) == 1:  # bytes of one column are taken for planar, or crash: float keeps them
        images = images.float()
    images = F.interpolate(images, (height, width), mode="bilinear", antialias=antialias)
    images = images.round().clamp(0, 255).byte() if images.is_floating_point() else images
    return images[0].permute(1, 2, 0).numpy()


def move_boxes(boxes, crop, source, place, flip, size):
    """Boxes of a photo on the image that shows a part of it.

    boxes: (n, 4) array, boundary form, pixels. flip: whether the image is mirrored afterwards.
    Returns (m, 4) float32 boxes, boundary form, fractional, clipped to the source, and the (m,) int64 indices
    of those kept: the ones whose centre is in the crop.
    """
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    kept = ((centers >= crop[:2]) & (centers < crop[2:])).all(axis=1).nonzero()[0]
    boxes = boxes[kept].reshape(-1, 2, 2)  # (m, min and max, x and y)
    source, place = np.array([source, place], dtype=np.float64).reshape(2, 2, 2)
    boxes = np.minimum(np.maximum(boxes, source[0]), source[1])
    boxes = (place[0] + (boxes - source[0]) * ((place[1] - place[0]) / (source[1] - source[0]))) / size
    if flip:
        boxes[:, :, 0] = 1 - boxes[:, ::-1, 0]
    boxes = boxes.reshape(-1, 4).astype(np.float32)
    # The rounding can leave a box of less than a millionth of the image without area.
    has_area = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    return torch.from_numpy(boxes[has_area]), torch.from_numpy(kept[has_area])


@functools.cache
def blank_image(size):
    """An (S, S, 3) uint8 array of the filler's colour; to be copied, never changed."""
    return np.full((size, size, 3), FILLER, dtype=np.uint8)


@functools.cache
def keep_freed_memory():
    """Let glibc's malloc keep what this process frees: to map and clear it anew takes a third of the time."""
    np.empty(2**24, dtype=np.uint8)  # to free 16 MB, never touched, raises M_MMAP_THRESHOLD (`man mallopt`)


# --- 4. Colours -----------------------------------------------------------------------------------

# Pixels that are distorted at a time: a usual photo at once, a huge one in bounded memory.
DISTORTED_AT_ONCE = 2**18


class Distortion(NamedTuple):
    """Photometric parameters, on a grid on which 16-bit integers are exact. The defaults change nothing."""

    brightness: int = 0  # added to the RGB values, of 255
    contrast: int = 256  # factor of the RGB values, in 256ths
    saturation: int = 256  # factor of S in HSV, in 256ths
    hue: int = 0  # added to H in HSV, in 256ths of a sixth of the circle
    contrast_first: bool = True  # before saturation and hue, or after them


def sample_distortion(rng):
    """Draw with probability 1/2 each: brightness up to 32 levels, contrast and saturation in [0.5, 1.5], hue up to
    36 degrees either way. (Caffe's im_transforms.cpp says 18, on OpenCV's hue circle of 180 steps.)
    """
    return Distortion(
        brightness=int(rng.integers(-32, 32, endpoint=True)) if rng.random() < 0.5 else 0,
        contrast=int(rng.integers(128, 384, endpoint=True)) if rng.random() < 0.5 else 256,
        saturation=int(rng.integers(128, 384, endpoint=True)) if rng.random() < 0.5 else 256,
        hue=int(rng.integers(-153, 153, endpoint=True)) if rng.random() < 0.5 else 0,
        contrast_first=rng.random() < 0.5,
    )


def distort(pixels, distortion):
    """Brightness, contrast, saturation and hue of an (h, w, 3) uint8 array, RGB; returns the array itself if nothing
    is to change. The values are rounded and kept in [0, 255] after each step.
    """
    n_rows = max(1, DISTORTED_AT_ONCE // pixels.shape[1])
    if len(pixels) > n_rows:
        bands = [pixels[first : first + n_rows] for first in range(0, len(pixels), n_rows)]
        return np.concatenate([distort(band, distortion) for band in bands])
    contrasts = (distortion.contrast, 256) if distortion.contrast_first else (256, distortion.contrast)
    pixels = multiply_contrast(add_brightness(pixels, distortion.brightness), contrasts[0])
    return multiply_contrast(distort_color(pixels, distortion.saturation, distortion.hue), contrasts[1])


def multiply(values, factor):
    """round(values * factor / 256), for uint8 values and a factor (int, or array) in [0, 256]."""
    products = values.astype(np.uint16)
    products *= np.uint16(factor) if isinstance(factor, int) else factor
    products += np.uint16(127)
    products >>= np.uint16(8)
    return products.astype(np.uint8)


def add_brightness(pixels, brightness):
    """Add a number of levels, of either sign, to uint8 values, kept in [0, 255]."""
    if brightness == 0:
        return pixels
    pixels = np.clip(pixels, np.uint8(max(-brightness, 0)), np.uint8(min(255 - brightness, 255)))
    pixels += np.uint8(brightness % 256)  # bytes wrap round: adding 251 subtracts 5
    return pixels


def multiply_contrast(pixels, contrast):
    """Multiply uint8 values by contrast / 256, in [0, 2], kept in [0, 255]."""
    if contrast <= 256:
        return multiply(pixels, contrast) if contrast < 256 else pixels
    added = multiply(pixels, contrast - 256)
    np.minimum(added, ~pixels, out=added)  # ~pixels = 255 - pixels: up to the end of the range
    return np.add(added, pixels, out=added)


def distort_color(pixels, saturation, hue):
    """Multiply S and turn H of HSV without leaving RGB.

    Each channel lies between the lowest of the three and V, the highest; the chroma is C = V - lowest. As the
    hue turns by a sixth of the circle, one channel moves from one end to the other at a steady pace: up while
    the next channel (in the direction of the turn) is lowest, down while that one is highest. So for a turn
    by the fraction d of a sixth, with the next channel n of channel x:

        x + min(max(d C - (n - lowest), 0), V - x) - min(max(d C - (V - n), 0), x - lowest)

    Saturation multiplies each channel's distance below V by its factor, but by no more than V / C, where the
    lowest channel reaches 0 (S ends at 1). The two commute; in this order each is rounded only once.
    """
    if saturation == 256 and hue == 0:
        return pixels
    height, width = pixels.shape[:2]
    # A plane for each channel, then the first again: R G B R, or for a negative turn B G R B.
    order = (2, 1, 0) if hue < 0 else (0, 1, 2)
    planes = np.empty((4, height, width), dtype=np.uint8)
    np.stack([pixels[:, :, channel] for channel in order], out=planes[:3])
    planes[3] = planes[0]
    planes = planes.reshape(4, -1)  # (4, n), n = height * width
    highest = np.maximum(np.maximum(planes[0], planes[1]), planes[2])  # (n,), V
    lowest = np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    chroma = highest - lowest

    below = highest - planes  # distances below V
    if hue != 0:
        above = np.subtract(planes, lowest, out=planes)
        turn = multiply(chroma, abs(hue))
        rise = np.maximum(above[1:], turn) - above[1:]  # max(turn - above, 0): uint8 cannot go below 0
        fall = np.maximum(below[1:], turn) - below[1:]
        np.minimum(rise, below[:3], out=rise)
        np.minimum(fall, above[:3], out=fall)
        below[:3] -= rise
        below[:3] += fall
    below = below[:3]
    if saturation < 256:
        below -= multiply(below, 256 - saturation)
    elif saturation > 256:
        # V / C - 1 = lowest / C. (np.clip with scalars of the array's type is much faster than np.maximum.)
        gain = lowest.astype(np.float32)
        gain /= np.clip(chroma, np.uint8(1), np.uint8(255)).astype(np.float32)
        np.clip(gain, np.float32(0), np.float32(saturation / 256 - 1), out=gain)
        gain *= np.float32(256)
        below += multiply(below, gain.astype(np.uint16))

    planes = np.subtract(highest, below, out=below).reshape(3, height, width)
    return np.stack([planes[channel] for channel in order], axis=-1)  # either order undoes itself
