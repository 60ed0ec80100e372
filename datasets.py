"""From image files and data lists to the batches that a network learns from.

    dataset = PascalVOCDataset("data", split="TRAIN", keep_difficult=True)
    batches = TrainingBatches(len(dataset), batch_size=32, seed=0, first_iteration=0, last_iteration=120000)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=dataset.collate_fn, num_workers=4)

    1. Image files      any image file as RGB pixels
    2. The data set     its items, its batches and their order; its lists
    3. Transform        zoom out, crop, resize and flip: pixels and boxes
    4. Colours          brightness, contrast, saturation and hue: pixels alone

Which images make up a batch depends on (seed, iteration) alone, and how an image is augmented on (seed, epoch,
index) alone: never on the number of workers, nor on what was read before.
Shapes in comments: N images in a batch, M objects in an image, S the network's input size, such as 300.
"""

import errno
import functools
import io
import math
import operator
import os
import stat
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageChops
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from utils import MAX_IMAGE_PIXELS, find_jaccard_overlap, load_label_map, printable, read_json

try:  # torchvision 0.29 announces that a later version will leave decoding to another package
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None  # Pillow decodes instead: the same pixels in twice the time

# --- 1. Image files -------------------------------------------------------------------------------

# What Pillow may open, whatever a file's name says: for an EPS file it would start Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000", "TGA", "AVIF")
# How a HEIC file begins, from its fifth byte on. (AVIF files, which Pillow reads, may begin like the last two.)
HEIC_STARTS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftyphevx", b"ftypheim", b"ftypheis", b"ftypmif1", b"ftypmsf1")
# As many bytes take so many pixels uncompressed, 4 channels of 16 bits; no image file is larger.
MAX_IMAGE_BYTES = 8 * MAX_IMAGE_PIXELS
# The longest side that a JPEG can have. (It also limits H: torch's interpolate() resizes the width first, so that
# S x H pixels exist for a moment.)
MAX_IMAGE_SIDE = 65_500
# An image in which no value, of 255, reaches this is reported as nearly black. Night photos reach it.
NEARLY_BLACK = 64
# Errors that say nothing about a file: too many are open, a disk or its network fails, memory is short.
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM)


def read_image(path):
    """Read an image file as it is stored: no EXIF orientation is applied, as in VOC's annotations.

    path: file of one of IMAGE_FORMATS, of any mode (grey, palette, CMYK, 16-bit, ...).
    Returns a (3, H, W) uint8 RGB tensor. (Exception: Pillow turns TIFF images by their EXIF orientation.)
    Raises FileNotFoundError or ValueError, naming the file, if it is missing, damaged or too large; another
    OSError if the machine is at fault.
    """
    data, image = open_image_file(path)
    # torchvision decodes the usual JPEGs twice as fast as Pillow. Unusual ones, such as Adobe's CMYK, are Pillow's.
    # (Pillow calls a JPEG file MPO if more pictures follow the first one, as in those that some cameras write.)
    if decode_jpeg and image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
        writable = bytearray(data)  # frombuffer() warns if it gets read-only bytes
        encoded = torch.frombuffer(writable, dtype=torch.uint8)
        try:
            return decode_jpeg(encoded, mode=ImageReadMode.RGB)
        except RuntimeError:
            pass  # unusual, or damaged: Pillow decides
    try:
        return pil_to_tensor(pil_to_rgb(image))
    except Exception as error:  # decoders raise errors of many kinds
        raise ValueError(f"{path}: a damaged image ({printable(error)})") from None


def stored_size_and_orientation(path):
    """What an image file's header says: ((width, height) of what `read_image()` returns, EXIF orientation).

    The orientation, 1 to 8, says how viewers turn the stored pixels before they show them; 1: not at all.
    """
    _, image = open_image_file(path)
    return image.size, read_orientation(image)


def darkness_warning(image):
    """What to tell the user, in one line, about a (3, H, W) uint8 image that is nearly black; "" if it is not."""
    brightest = int(image.max())
    if brightest >= NEARLY_BLACK:
        return ""
    # The usual reason is a file of 16 bits a value, of which the camera filled only 12 (see `scale_to_bytes()`).
    return (
        f"nearly black: its brightest value is {brightest} of 255. In a 16-bit file only the upper 8 bits of a value "
        "are read; if fewer than 16 are used (12, say), multiply (by 16) so that white is 65535, or save it as 8 bits"
    )


def open_image_file(path):
    """The bytes of an image file, and a PIL image of which Pillow has read the header and no pixels yet."""
    try:
        check_image_file(path)
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image; if it moved, make new data lists") from None
    except (OSError, ValueError) as error:
        # A ValueError comes from check_image_file(), or from characters that no file name can have, such as "\0".
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise OSError(error.errno, f"{path}: {error.strerror}") from None
        raise ValueError(f"{printable(path, 1000)}: the image file cannot be read ({printable(error)})") from None
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Exception as error:
        raise ValueError(f"{path}: not an image that can be read ({explain_unreadable(path, error)})") from None
    check_image_size(*image.size, path)
    return data, image


def explain_unreadable(path, error):
    """Why Pillow raised an error when it opened an image file, in words."""
    with open(path, "rb") as file:
        start = file.read(12)
    if start[4:] in HEIC_STARTS or Path(path).suffix.lower() in (".heic", ".heif"):
        convert = "on a Mac by `sips -s format jpeg A.HEIC --out A.jpg`, elsewhere by `heif-convert A.HEIC A.jpg`"
        return f"a HEIC photo, as iPhones take them, which Pillow cannot read; convert it to JPEG, {convert}"
    return printable(error)


def check_image_file(path):
    """Refuse what is not a file, such as a pipe, which would be waited for, and files larger than any image."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a file")
    if status.st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"it has {status.st_size:,} bytes, more than the {MAX_IMAGE_BYTES:,} allowed")


def check_image_size(width, height, name):
    """Refuse a header that would make the decoder, or interpolate(), allocate gigabytes (a decompression bomb)."""
    if width * height > MAX_IMAGE_PIXELS or max(width, height) > MAX_IMAGE_SIDE:
        limits = f"{MAX_IMAGE_PIXELS:,} (or {MAX_IMAGE_SIDE:,} a side) allowed; save it smaller, or remove it"
        raise ValueError(f"{name}: its header claims {width} x {height} pixels, more than the {limits}")


def read_orientation(image):
    """The EXIF orientation of a PIL image, 1 to 8; 1 (stored as it is shown) where it has none.

    TIFF files count as having none: Pillow states their size, and decodes them, as they are shown.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF data: the pixels are fine
        return 1
    return orientation if orientation in range(1, 9) and image.format != "TIFF" else 1


def pil_to_rgb(image):
    """A PIL image of any mode as RGB (itself, if it is RGB); transparency is laid on white."""
    if image.mode.startswith(("I", "F")):  # grey, of 16-bit integers ("I" holds them in 32 bits) or of floats
        levels = scale_to_bytes(np.asarray(image))
        return Image.fromarray(levels).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def scale_to_bytes(values):
    """An array of 16-bit integers or of floats as bytes.

    16-bit integers keep their upper eight bits. A file of floats does not say which value is white, so its highest
    value decides: white is 1 if the highest is at most 1, 255 if it is at most 255, and 65535 if it is more.
    NaN, infinite and negative values become black.
    """
    if values.dtype.kind != "f":  # integers
        return (np.clip(values, 0, 65535) // 256).astype(np.uint8)  # 256 values a byte: 65280 to 65535 become 255
    values = np.nan_to_num(values, nan=0, posinf=0, neginf=0)
    brightest = values.max()
    if brightest <= 1:
        values = values * 255
    elif brightest > 255:
        values = values / 257  # 255 * 257 = 65535: exact at both ends
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


# --- 2. The data set ------------------------------------------------------------------------------

SPLITS = ("TRAIN", "VAL", "TEST")
# What `transform()` may do to a training image, in the order in which Caffe's SSD does it.
AUGMENTATIONS = ("distort", "zoom_out", "crop", "flip")
# Boxes, labels and difficulties of an image without objects.
NO_OBJECTS = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.uint8))


class PascalVOCDataset(Dataset):
    """Images and objects of one split of any data set. (Its name is that of sgrvinod's tutorial, which has only VOC.)

    data_folder: holds the lists that create_data_lists.py wrote. split: "TRAIN", "VAL" or "TEST".
    keep_difficult: whether items hold difficult objects.
    seed: with the epoch and the index it decides how an image is augmented.
    skip_corrupt: False raises on an image that is missing or damaged; True puts a blank image without objects in
        its place. `skipped_images()` lists them.
    augment: names out of AUGMENTATIONS; None: all for "TRAIN", none otherwise. size, antialias: as in `transform()`.

    An item's key is an index (then the epoch is 0), or (epoch, index). An item is the image (3, S, S) uint8,
    boxes (M, 4) float32, boundary form, fractional, labels (M,) int64 and difficulties (M,) uint8; M may be 0.
    Attributes: label_map; image_paths; sizes (n_images, 2), widths and heights; boxes_xy_pixels, labels and
    difficulties of all objects, those of image i from starts[i] to starts[i + 1]; image_ids (a list, of the images)
    and areas (of the objects, in square pixels), which COCO's files state: for other data sets both are None.
    Raises FileNotFoundError for a list that is missing, ValueError for one that `read_objects()` refuses.
    """

    def __init__(
        self, data_folder, split, keep_difficult=False, seed=0, skip_corrupt=False, augment=None, size=300,
        antialias=True,
    ):  # fmt: skip
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; it must be one of {SPLITS}")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be 0 or more")
        if augment is None:
            augment = AUGMENTATIONS if split == "TRAIN" else ()
        if not isinstance(augment, tuple) or not set(augment) <= set(AUGMENTATIONS):
            raise ValueError(f"augment is {augment!r}; it must be a tuple of names out of {AUGMENTATIONS}")
        self.data_folder = Path(data_folder)
        self.split = split
        self.keep_difficult = keep_difficult
        self.seed = seed
        self.skip_corrupt = skip_corrupt
        self.augment = augment
        self.size = size
        self.antialias = antialias
        try:
            self.read_lists()
        except (FileNotFoundError, ValueError) as error:
            advice = "create_data_lists.py writes the lists: run it again"
            if split == "VAL":
                advice += ", with --val_data or --val_fraction if the data set has no validation split of its own"
            raise type(error)(f"{error} ({advice})") from None
        # 1 for each image that was skipped. In shared memory: the workers write to it, and this process reads it.
        self.skipped = torch.zeros(len(self.image_paths), dtype=torch.uint8).share_memory_()

    def read_lists(self):
        """Read label_map.json and the split's two lists, into a few large arrays."""
        # Why arrays, and not lists: workers share the memory of this process until they write to it. Even reading a
        # Python object writes to it, since it counts its users, so each worker would soon have a copy of all lists.
        self.label_map = load_label_map(self.data_folder)
        images_path = self.data_folder / f"{self.split}_images.json"
        images = read_json(images_path, list)
        if not all(isinstance(path, str) for path in images):
            raise ValueError(f"{images_path}: not a list of paths")
        self.image_paths = np.array(images, dtype=np.str_)

        entries = read_objects(self.data_folder / f"{self.split}_objects.json", images, len(self.label_map))
        if not self.keep_difficult:
            entries = [without_difficult(entry) for entry in entries]
        counts = [len(entry["boxes"]) for entry in entries]
        boxes = np.array(join(entries, "boxes"), dtype=np.float32).reshape(-1, 4)
        areas = np.array(join(entries, "areas"), dtype=np.float64)
        has_areas = len(areas) == len(boxes)  # only COCO's files state areas; missing ones are [], so none come here
        image_ids = [entry.get("image_id") for entry in entries]
        self.sizes = np.array([entry["size"] for entry in entries], dtype=np.int64).reshape(-1, 2)
        self.starts = np.cumsum([0, *counts])  # for counts [2, 0, 3]: [0, 2, 2, 5]
        self.boxes_xy_pixels = torch.from_numpy(boxes)
        self.labels = torch.tensor(join(entries, "labels"), dtype=torch.int64)
        self.difficulties = torch.tensor(join(entries, "difficulties"), dtype=torch.uint8)
        self.areas = areas if has_areas else None
        self.image_ids = None if None in image_ids else image_ids  # a list: ids may be text, and no worker reads it

    def __len__(self):
        return len(self.image_paths)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        epoch = operator.index(epoch)  # turns an integer of torch or NumPy into Python's int, and refuses floats
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index}: {self.split} has {len(self)} images")
        index = index % len(self)  # -1 is the last image

        path = str(self.image_paths[index])
        try:
            image = read_image(path)
        except (ValueError, FileNotFoundError) as error:
            if not self.skip_corrupt:
                raise type(error)(f"{error}; --skip_corrupt=True goes on without such images") from None
            self.skipped[index] = 1
            return blank_image(self.size).clone(), *NO_OBJECTS
        _, height, width = image.shape
        listed_width, listed_height = self.sizes[index]  # against which the boxes were checked
        if (width, height) != (listed_width, listed_height):
            raise ValueError(
                f"{path} is {width} x {height} pixels, the lists in {self.data_folder} say {listed_width} x "
                f"{listed_height}; run create_data_lists.py again with check_images on"
            )

        objects = slice(self.starts[index], self.starts[index + 1])
        boxes, labels, difficulties = self.boxes_xy_pixels[objects], self.labels[objects], self.difficulties[objects]
        # transform() augments only for "TRAIN". Here self.augment decides, whatever the split that the image is from.
        split = "TRAIN" if self.augment else "TEST"
        rng = np.random.default_rng((self.seed, epoch, index))
        return transform(image, boxes, labels, difficulties, split, rng, self.size, self.antialias, self.augment)

    def image_names(self):
        """Names of the images as Pascal VOC's files have them: without folder and extension."""
        return [Path(path).stem for path in self.image_paths.tolist()]

    def skipped_images(self):
        """Paths of the images that any worker has skipped so far, since they were missing or damaged."""
        return self.image_paths[self.skipped.numpy() != 0].tolist()

    @staticmethod
    def collate_fn(batch):
        """A batch of a list of N items: images (N, 3, S, S) uint8, and lists of their boxes, labels, difficulties."""
        # transform() returns images whose channels lie last in memory, since resize() is faster so. Stacked as
        # (S, S, 3) they are copied in the order in which they lie, which takes a fifth of the time.
        stacked = torch.stack([item[0].permute(1, 2, 0) for item in batch])  # (N, S, S, 3)
        images = stacked.permute(0, 3, 1, 2)  # (N, 3, S, S), a view
        if get_worker_info() is not None:
            images.share_memory_()  # here and not in the queue's feeder thread: see join_and_split()
        boxes = join_and_split([item[1] for item in batch])
        labels = join_and_split([item[2] for item in batch])
        difficulties = join_and_split([item[3] for item in batch])
        return images, boxes, labels, difficulties


def join_and_split(tensors):
    """The same list of tensors, as views of one storage.

    Tensors that view one storage travel from a worker as one block of shared memory. Every such block is an open file,
    and one for each image would be more than a system allows. By default the queue's feeder thread moves a block to
    shared memory. There an error (no space, say) is lost, and the run waits for ever. So the block is moved here,
    before it enters the queue, and the run gets the error.
    """
    joined = torch.cat(tensors)
    if get_worker_info() is not None and joined.numel() > 0:  # in a worker, and there is memory to move
        joined.share_memory_()
    return list(joined.split([len(tensor) for tensor in tensors]))


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
        self.n_images = n_images
        self.batch_size = batch_size
        self.seed = seed
        self.iterations = range(first_iteration, last_iteration)
        self.rank = rank
        self.world_size = world_size
        self.epoch = None  # of self.order
        self.order = None  # the permutation that was computed last

    def __len__(self):
        return len(self.iterations)

    def __iter__(self):
        for iteration in self.iterations:
            yield self.batch(iteration)[self.rank :: self.world_size]

    def batch(self, iteration):
        """The (epoch, index) of all batch_size images of an iteration, over all ranks."""
        first = iteration * self.batch_size
        keys = []
        for position in range(first, first + self.batch_size):
            epoch, place = divmod(position, self.n_images)
            if epoch != self.epoch:
                # NumPy fills up short seeds with zeros: (seed, epoch) alone would give the same random numbers as
                # (seed, epoch, 0), with which `PascalVOCDataset` augments image 0. The spawn key is mixed in after the
                # filled-up seed, so that no seed of three numbers gives the same random numbers.
                seeds = np.random.SeedSequence((self.seed, epoch), spawn_key=(0,))
                self.order = np.random.default_rng(seeds).permutation(self.n_images)
                self.epoch = epoch
            keys.append((epoch, int(self.order[place])))
        return keys


def read_objects(path, images, n_classes):
    """Read the list of objects of a split, and check it, so that no object can hurt the loss.

    path: file with a list of {"boxes", "labels", "difficulties", "size"} and perhaps "areas" and "image_id", one
    for each image, as create_data_lists.py writes it. images: list of paths. n_classes: background included.
    Returns this list; "areas" is [] where there are none.
    Raises FileNotFoundError, or ValueError, naming the image, for what is missing or breaks a rule of `check_entry()`.
    """
    entries = read_json(path, list)
    if len(entries) != len(images):
        raise ValueError(f"{path}: describes {len(entries)} of {len(images)} images")
    for image, entry in zip(images, entries, strict=True):
        try:
            entry["areas"] = entry.get("areas") or []
            check_entry(entry, n_classes)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            problem = f"wrong boxes, labels, difficulties, areas or size: {printable(error, 500)}"
            raise ValueError(f"{path}: {printable(image, 1000)}: {problem}") from None
    return entries


def check_entry(entry, n_classes):
    """Check what a list says of one image. (NaN breaks each rule: no comparison with it holds.)"""
    width, height = entry["size"]
    is_whole = width % 1 == 0 and height % 1 == 0
    is_small_enough = max(width, height) <= MAX_IMAGE_SIDE and width * height <= MAX_IMAGE_PIXELS
    if not (is_whole and is_small_enough and min(width, height) >= 1):
        raise ValueError(f"{entry['size']} in its size is not a width and a height in pixels")
    for box in entry["boxes"]:
        x_min, y_min, x_max, y_max = array("f", box)  # rounding to float32 can make x_min equal to x_max
        if not (0 <= x_min < x_max <= width and 0 <= y_min < y_max <= height):
            raise ValueError(f"{box} in its boxes holds NaN, has no area (in float32), or reaches beyond the image")
    for label in entry["labels"]:
        if label not in range(1, n_classes):
            raise ValueError(f"{label} in its labels is not a label of label_map.json")
    for difficulty in entry["difficulties"]:
        if difficulty not in (0, 1):
            raise ValueError(f"{difficulty} in its difficulties is neither 0 nor 1")
    for area in entry["areas"]:
        if not math.isfinite(area):
            raise ValueError(f"{area} in its areas is not a finite number")
    lengths = {len(entry["boxes"]), len(entry["labels"]), len(entry["difficulties"])}
    if entry["areas"]:
        lengths.add(len(entry["areas"]))
    if len(lengths) > 1:
        raise ValueError("they are of unequal length")


def without_difficult(entry):
    """What a list says of one image, without its difficult objects."""
    easy = [i for i, difficulty in enumerate(entry["difficulties"]) if difficulty == 0]
    keys = [key for key in ("boxes", "labels", "difficulties", "areas") if entry[key]]  # areas may be []
    chosen = {key: [entry[key][i] for i in easy] for key in keys}
    return {**entry, **chosen}


def join(entries, key):
    """A list of the boxes, labels, ... of all images, one image's after another's."""
    return [value for entry in entries for value in entry[key]]


# --- 3. Transform ---------------------------------------------------------------------------------
#
# Zoom out, crop and resize are one step. Four boxes say which pixels of the photo are left and where they come to lie;
# only these are read, and resized, once.
#
#     canvas                                          image
#     +-----------------------------------+           +-------+-----------+
#     |          photo                    |           |       |           |
#     |          +------------------+     |           |       |           |
#     |    crop  |                  |     |           |       |   place   |  S
#     |    +-----+----------+       |     |  becomes  |       |           |
#     |    |     |  source  |       |     |           |       |           |
#     |    +-----+----------+       |     |           +-------+-----------+
#     |          +------------------+     |                   S
#     +-----------------------------------+
#
#   canvas   the photo after zooming out, and what surrounds it
#   crop     the part of the canvas that becomes the whole image of S x S pixels
#   source   the part of the crop that shows the photo, at least one pixel wide and high
#   place    where the source comes to lie on the image; the rest of it is filled with FILLER
#
# Each is (x_min, y_min, x_max, y_max), in whole pixels: place in those of the image, the others in those of the photo,
# whose upper left corner is (0, 0).

# The ImageNet mean in bytes: what surrounds a photo that is zoomed out.
FILLER = (124, 116, 104)
# Six of the seven samplers of crops: the minimum overlap of crop and object. The seventh takes the whole canvas.
MIN_OVERLAPS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.0)
CROP_TRIES = 50


def transform(image, boxes, labels, difficulties, split, rng=None, size=300, antialias=True, augment=AUGMENTATIONS):
    """A photo and its objects as the network sees them: augmented for training, only resized otherwise.

    image: (3, H, W) uint8 RGB tensor, or PIL image; it is not changed.
    boxes: (n, 4) float tensor, boundary form, pixels, inside the image; n may be 0.
    labels: (n,) int64 tensor. difficulties: (n,) tensor. size: S. antialias: as in `resize()`.
    split: "TRAIN", "VAL" or "TEST"; another is a ValueError. rng: numpy Generator for "TRAIN"; None makes a new one.
    augment: names out of AUGMENTATIONS, the steps that are taken for "TRAIN".
    Returns the image as a (3, S, S) uint8 tensor, boxes as an (m, 4) float32 tensor, boundary form,
    fractional, in [0, 1], of positive area, and their labels and difficulties; m <= n.

    To add a step of your own, write one function that takes and returns the image and its boxes (as many), like
    `flip()`, and call it at the end, where the comment "Your own step" stands. It draws what is random from rng.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {SPLITS}")
    if not isinstance(image, torch.Tensor):
        image = pil_to_tensor(pil_to_rgb(image))
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    photo = (0, 0, image.shape[2], image.shape[1])
    steps = augment if split == "TRAIN" else ()

    # Draw what is random. Colours, canvas and flip are drawn even if their step is left out. The crop is drawn only if
    # it is taken, but last. So if one step is left out, the others still get the same random numbers.
    if split == "TRAIN":
        rng = np.random.default_rng() if rng is None else rng
        colors = draw_colors(rng)
        canvas = draw_canvas(photo, rng)
        is_flipped = rng.random() < 0.5

    # Zoom out and crop: find which part of the photo is shown, and where.
    crop = canvas if "zoom_out" in steps else photo
    if "crop" in steps:
        crop = draw_crop(crop, photo, boxes, rng)
    source = (max(crop[0], 0), max(crop[1], 0), min(crop[2], photo[2]), min(crop[3], photo[3]))
    place = find_place(source, crop, size)
    boxes, kept = move_boxes(boxes, crop, source, place, size)  # from here on in fractions of the new image

    # Resize, colours, flip. (Caffe changes the colours first. After resizing there are far fewer pixels to change.)
    image = image[:, source[1] : source[3], source[0] : source[2]]
    image = resize(image, place[2] - place[0], place[3] - place[1], antialias)
    if "distort" in steps:
        image = distort(image, colors)
    image = put_on_filler(image, place, size)  # after the colours, so that the filler keeps its own
    if "flip" in steps and is_flipped:
        image, boxes = flip(image, boxes)
    # Your own step:  if split == "TRAIN": image, boxes = my_step(image, boxes, rng)

    boxes = boxes.astype(np.float32)
    # move_boxes() has left out boxes whose centre is not in the crop. Boxes that lose their area when they are rounded
    # to float32, being narrower than a millionth of the image, are left out too.
    has_area = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    boxes = torch.from_numpy(boxes[has_area])  # (m, 4)
    kept = torch.from_numpy(kept[has_area])  # (m,): which of the n objects these boxes belong to
    return image, boxes, labels[kept], difficulties[kept]


def prepare(images, model):
    """PIL images, or (3, H, W) uint8 tensors, as a model's input: (N, 3, S, S) float32, normalised, on its device."""
    resized = [transform(image, *NO_OBJECTS, "TEST", None, model.input_size, model.antialias)[0] for image in images]
    return model.normalize(torch.stack(resized))


def draw_canvas(photo, rng):
    """Zoom out, with probability 1/2: a canvas 1 to 4 times as wide and high as the photo, which lies anywhere on it.

    Else the canvas is the photo. (Caffe: ExpandImage.)
    """
    if rng.random() < 0.5:
        return photo
    width, height = photo[2:]
    ratio = rng.uniform(1, 4)
    canvas_width = round(ratio * width)
    canvas_height = round(ratio * height)
    # The place of the photo on the canvas. Seen from the photo, the canvas begins as far to the left of it, and above.
    left = int(rng.integers(canvas_width - width, endpoint=True))
    top = int(rng.integers(canvas_height - height, endpoint=True))
    return -left, -top, canvas_width - left, canvas_height - top


def draw_crop(canvas, photo, boxes, rng):
    """Crop by one of seven samplers (SSD paper, section 2.2).

    Each of six samplers tries 50 crops. A try succeeds if the crop overlaps some object by the sampler's minimum and
    holds the centre of some object, the same or another. (Without objects, it succeeds if the crop shows any of the
    photo.) The seventh sampler takes the whole canvas. Of the samplers with a success one is drawn, all equally likely.

    boxes: (n, 4) array, boundary form, pixels. Returns the crop.
    """
    n_samplers = len(MIN_OVERLAPS)  # six; the seventh always succeeds
    crops = draw_boxes_inside(canvas, n_samplers * CROP_TRIES, rng)  # (300, 4): 50 tries of each sampler
    if len(boxes) > 0:
        overlaps = find_jaccard_overlap(torch.from_numpy(boxes), torch.from_numpy(crops))  # (n, 300)
        min_overlaps = np.repeat(MIN_OVERLAPS, CROP_TRIES)  # (300,): 50 times 0.1, 50 times 0.3, ...
        is_success = (overlaps.amax(dim=0).numpy() >= min_overlaps) & has_center_inside(crops, boxes)
    else:
        _, _, photo_width, photo_height = photo
        x_mins, y_mins, x_maxs, y_maxs = crops.T  # (300,) each
        shows_columns = (x_mins < photo_width) & (x_maxs > 0)  # of the photo, which begins at (0, 0)
        shows_rows = (y_mins < photo_height) & (y_maxs > 0)
        is_success = shows_columns & shows_rows
    is_success = is_success.reshape(n_samplers, CROP_TRIES)

    successful = is_success.any(axis=1).nonzero()[0]  # the samplers that have a success, such as [0, 1, 2, 5]
    candidates = [*successful, n_samplers]  # and the seventh: [0, 1, 2, 5, 6]
    sampler = candidates[rng.integers(len(candidates))]
    if sampler == n_samplers:
        return canvas
    first = is_success[sampler].argmax()  # the sampler's first try that succeeds
    return tuple(crops[sampler * CROP_TRIES + first].astype(int).tolist())


def draw_boxes_inside(canvas, n, rng):
    """Boxes of random scale, aspect ratio and place inside a canvas. (Caffe: SampleBBox, sampler.cpp.)

    Of scale s and aspect ratio r, a box has s sqrt(r) times the width of the canvas, and s / sqrt(r) times its height.
    s is in [0.3, 1], and r in [1/2, 2]. r is also in [s^2, 1/s^2], so that neither side exceeds the canvas.
    Returns an (n, 4) array, boundary form, in whole pixels.
    """
    draws = rng.random((4, n))
    scales = 0.3 + 0.7 * draws[0]
    lowest_ratios = np.maximum(scales * scales, 0.5)  # (n,): 0.5 for s = 0.6, 0.64 for s = 0.8, 1 for s = 1
    highest_ratios = 1 / lowest_ratios
    ratios = lowest_ratios + (highest_ratios - lowest_ratios) * draws[1]
    roots = np.sqrt(ratios)
    canvas_width = canvas[2] - canvas[0]
    canvas_height = canvas[3] - canvas[1]
    widths = np.maximum(np.rint(canvas_width * (scales * roots)), 1)
    heights = np.maximum(np.rint(canvas_height * (scales / roots)), 1)
    # Each box begins 0 to (canvas - box) pixels from the side of the canvas, every whole number equally likely.
    x_mins = canvas[0] + np.floor((canvas_width - widths + 1) * draws[2])
    y_mins = canvas[1] + np.floor((canvas_height - heights + 1) * draws[3])
    return np.stack([x_mins, y_mins, x_mins + widths, y_mins + heights], axis=1)


def has_center_inside(crops, boxes):
    """Which crops hold the centre of a box: an (n_crops,) bool array."""
    x_centers = (boxes[:, 0] + boxes[:, 2]) / 2  # (n,)
    y_centers = (boxes[:, 1] + boxes[:, 3]) / 2
    x_mins, y_mins, x_maxs, y_maxs = crops.T[:, :, None]  # (n_crops, 1) each
    is_in_columns = (x_mins <= x_centers) & (x_centers < x_maxs)  # (n_crops, n)
    is_in_rows = (y_mins <= y_centers) & (y_centers < y_maxs)
    return (is_in_columns & is_in_rows).any(axis=1)


def find_place(source, crop, size):
    """Where the source comes to lie on the S x S image that the crop becomes: at least one pixel wide and high."""
    source_min, source_max = np.reshape(source, (2, 2))
    crop_min, crop_max = np.reshape(crop, (2, 2))
    scale = size / (crop_max - crop_min)
    place_min = np.minimum(np.rint((source_min - crop_min) * scale), size - 1)
    place_max = np.maximum(np.rint((source_max - crop_min) * scale), place_min + 1)
    return tuple(int(side) for side in (*place_min, *place_max))


def move_boxes(boxes, crop, source, place, size):
    """Boxes of a photo on the image that shows a part of it.

    boxes: (n, 4) array, boundary form, pixels.
    Returns (m, 4) float64 boxes, boundary form, fractional, clipped to the source, and the (m,) int64 indices
    of those kept: the ones whose centre is in the crop.
    """
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    is_kept = ((centers >= crop[:2]) & (centers < crop[2:])).all(axis=1)
    corners = boxes[is_kept].reshape(-1, 2, 2)  # (m, min and max, x and y)
    source_min, source_max = np.reshape(source, (2, 2))
    place_min, place_max = np.reshape(place, (2, 2))
    corners = np.clip(corners, source_min, source_max)
    # The source fills the place, which find_place() has rounded to whole pixels. So the boxes are scaled by
    # place / source, which differs a little from the size / crop that find_place() started from.
    scale = (place_max - place_min) / (source_max - source_min)
    corners = (place_min + (corners - source_min) * scale) / size
    return corners.reshape(-1, 4), is_kept.nonzero()[0]


def resize(image, width, height, antialias=True):
    """Bilinear resize of a (3, h, w) uint8 tensor to (3, height, width).

    antialias: True: where the image shrinks, a new pixel is made of all the pixels that it covers, as Pillow does it.
        False: it is made of the four pixels nearest to its centre alone, as in torchvision, amdegroot and lufficc.
    (For 640 x 480 pixels this takes 0.3 ms, Pillow's own resize() 1.8.)
    """
    # torch resizes faster if the channels lie last in memory. The second permute() changes the shape, not the memory.
    pixels = image.permute(1, 2, 0).contiguous()  # (h, w, 3)
    images = pixels[None].permute(0, 3, 1, 2)  # (1, 3, h, w)
    if width == 1 or image.shape[2] == 1:  # torch 2.14 returns wrong bytes, or crashes, for such images
        resized = F.interpolate(images.float(), (height, width), mode="bilinear", antialias=antialias)
        return resized[0].round().clamp(0, 255).byte()
    return F.interpolate(images, (height, width), mode="bilinear", antialias=antialias)[0]


def put_on_filler(image, place, size):
    """Put an image in its place on an S x S image of the colour FILLER; returns the image itself if it fills it."""
    if place == (0, 0, size, size):
        return image
    x_min, y_min, x_max, y_max = place
    filled = blank_image(size).clone()
    filled[:, y_min:y_max, x_min:x_max] = image
    return filled


@functools.cache
def blank_image(size):
    """A (3, S, S) uint8 tensor of the colour FILLER, made once; to be cloned, never changed."""
    return pil_to_tensor(Image.new("RGB", (size, size), FILLER))


def flip(image, boxes):
    """Mirror a (3, S, S) image and its boxes, an (m, 4) array, boundary form, fractional, left to right."""
    x_min, y_min, x_max, y_max = boxes.T
    return image.flip(2), np.stack([1 - x_max, y_min, 1 - x_min, y_max], axis=1)


# --- 4. Colours -----------------------------------------------------------------------------------

HUE_STEPS = 255  # in which Pillow's H goes once round the colour circle


class Colors(NamedTuple):
    """How the colours of an image are changed. The defaults change nothing."""

    brightness: int = 0  # added to the values of R, G and B, 0 to 255
    contrast: float = 1.0  # factor of the values of R, G and B
    saturation: float = 1.0  # factor of S in HSV
    hue: int = 0  # degrees, added to H in HSV
    contrast_first: bool = True  # before saturation and hue, or after them


def draw_colors(rng):
    """Draw with probability 1/2 each: brightness up to 32 levels, contrast and saturation in [0.5, 1.5], hue up to
    36 degrees either way. (Caffe's im_transforms.cpp says 18, on OpenCV's hue circle of 180 steps.)
    """
    return Colors(
        brightness=int(rng.integers(-32, 32, endpoint=True)) if rng.random() < 0.5 else 0,
        contrast=int(rng.integers(50, 150, endpoint=True)) / 100 if rng.random() < 0.5 else 1.0,
        saturation=int(rng.integers(50, 150, endpoint=True)) / 100 if rng.random() < 0.5 else 1.0,
        hue=int(rng.integers(-36, 36, endpoint=True)) if rng.random() < 0.5 else 0,
        contrast_first=rng.random() < 0.5,
    )


def distort(image, colors):
    """Change brightness, contrast, saturation and hue of a (3, h, w) uint8 tensor; returns a new one.

    After each step Pillow rounds the values, and keeps them in 0 to 255.
    """
    image = to_pil_image(image)
    if colors.brightness != 0:
        image = image.point(lambda value: value + colors.brightness)
    if colors.contrast_first:
        image = multiply_contrast(image, colors.contrast)
    if colors.saturation != 1:
        image = multiply_saturation(image, colors.saturation)
    if colors.hue != 0:
        image = turn_hue(image, colors.hue)
    if not colors.contrast_first:
        image = multiply_contrast(image, colors.contrast)
    return pil_to_tensor(image)


def multiply_contrast(image, contrast):
    return image.point(lambda value: value * contrast) if contrast != 1 else image


def multiply_saturation(image, saturation):
    """Multiply S of a PIL image in HSV by a factor.

    V is the highest of a pixel's three values, and S is (V - lowest) / V. To multiply S, each value's distance from V
    is multiplied: (200, 150, 100) by 1.5 becomes (200, 125, 50). H stays, because it depends on nothing but the ratios
    of these distances. (It changes a little where S would exceed 1: the lowest value stops at 0.)
    """
    red, green, blue = image.split()
    highest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    grey = Image.merge("RGB", [highest, highest, highest])
    # blend() returns grey + (image - grey) * saturation, also for more than 1, kept in 0 to 255.
    return Image.blend(grey, image, saturation)


def turn_hue(image, degrees):
    """Turn H of a PIL image in HSV.

    S and V stay, and so do the lowest and the highest of a pixel's three values. H says which channel has which, and
    where the third one is between them. For (200, 100, 50) Pillow's H is 14; turned by 36 degrees it is 40, whose pure
    colour is (255, 240, 0). So R is now the highest value, 200, B the lowest, 50, and G 240/255 of the way from the
    lowest to the highest, 191. (Pillow's own way back from HSV takes three times as long, 1.6 ms for
    300 x 300 pixels.)
    """
    hues = image.convert("HSV").getchannel("H")
    red, green, blue = image.split()
    lowest = ImageChops.darker(ImageChops.darker(red, green), blue)
    highest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    # composite() takes `highest` where a channel's mask is 255, `lowest` where it is 0, and mixes them in between.
    # In the example the masks of R, G and B are 255, 240 and 0.
    masks = [hues.point(table) for table in make_hue_tables(degrees)]
    return Image.merge("RGB", [Image.composite(highest, lowest, mask) for mask in masks])


@functools.cache
def make_hue_tables(degrees):
    """Three tables, for R, G and B. table[h]: that channel's value in the pure colour of hue h + degrees."""
    turn = round(degrees / 360 * HUE_STEPS)
    hues = (np.arange(256) + turn) % HUE_STEPS  # an entry for each byte; 255, once round, is the same hue as 0
    hsv = np.stack([hues, np.full(256, 255), np.full(256, 255)], axis=1).astype(np.uint8)  # (256, 3)
    rgb = Image.frombytes("HSV", (256, 1), hsv.tobytes()).convert("RGB")
    return [list(rgb.getchannel(channel).tobytes()) for channel in "RGB"]
