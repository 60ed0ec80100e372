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
from torchvision.transforms.functional import pil_to_tensor

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
# The longest side that a JPEG can have, and the limit for all files. (Without one, an image of 1 x 80,000,000 pixels
# could pass. Resizing begins with the width, and would make 300 x 80,000,000 of them.)
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
    contents, image = open_image_file(path)  # the file's bytes; a PIL image, not decoded yet
    # torchvision decodes the usual JPEGs twice as fast as Pillow. Unusual ones, such as Adobe's CMYK, are Pillow's.
    # (Pillow calls a JPEG file MPO if more pictures follow the first one, as in those that some cameras write.)
    is_usual_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")
    if decode_jpeg and is_usual_jpeg:
        writable = bytearray(contents)  # frombuffer() warns if it gets read-only bytes
        try:
            return decode_jpeg(torch.frombuffer(writable, dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:
            pass  # unusual after all, or damaged: Pillow finds out
    try:
        return pil_to_tensor(pil_to_rgb(image))
    except Exception as error:  # decoders raise errors of many kinds
        raise ValueError(f"{path}: a damaged image ({printable(error)})") from None


def stored_size_and_orientation(path):
    """What an image file's header says: ((width, height) of what `read_image()` returns, EXIF orientation).

    create_data_lists.py compares it with what the annotations say.
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
    """The bytes of an image file, and a PIL image of which Pillow has read the header and no pixels yet.

    Raises FileNotFoundError, ValueError if the file is at fault, or another OSError if the machine is.
    """
    try:
        check_image_file(path)
        contents = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image; if it moved, make new data lists") from None
    except (OSError, ValueError) as error:
        # If the machine is at fault, it stays an OSError, which ends a run. All else becomes a ValueError: what
        # check_image_file() refuses, no permission, "\0" in a name. Such an image may be left out (skip_corrupt).
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise OSError(error.errno, f"{path}: {error.strerror}") from None
        raise ValueError(f"{printable(path)}: the image file cannot be read ({printable(error)})") from None
    try:
        image = Image.open(io.BytesIO(contents), formats=IMAGE_FORMATS)
    except Exception as error:
        raise ValueError(f"{path}: not an image that can be read ({explain_unreadable(path, error)})") from None
    check_image_size(*image.size, path)
    return contents, image


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
    if orientation not in range(1, 9) or image.format == "TIFF":
        return 1
    return orientation


def pil_to_rgb(image):
    """A PIL image of any mode as RGB (itself, if it is RGB); transparency is laid on white."""
    if image.mode.startswith(("I", "F")):  # grey, of 16-bit integers ("I" holds them in 32 bits) or of floats
        levels = scale_to_bytes(np.asarray(image))
        return Image.fromarray(levels).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode == "RGB":
        return image
    return image.convert("RGB")


def scale_to_bytes(values):
    """An array of 16-bit integers or of floats as bytes.

    16-bit integers keep their upper eight bits. A file of floats does not say which value is white, so its highest
    value decides: white is 1 if the highest is at most 1, 255 if it is at most 255, and 65535 if it is more.
    NaN, infinite and negative values become black.
    """
    if np.issubdtype(values.dtype, np.integer):
        # The upper one of two bytes: 0 to 255 become 0, 65280 to 65535 become 255.
        return (np.clip(values, 0, 65535) // 256).astype(np.uint8)
    values = np.nan_to_num(values, nan=0, posinf=0, neginf=0)
    brightest = values.max()
    if brightest <= 1:
        values = values * 255
    elif brightest > 255:
        values = values / 257  # 65535 / 257 = 255. (Floats are rounded below, integers above were cut off.)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


# --- 2. The data set ------------------------------------------------------------------------------

SPLITS = ("TRAIN", "VAL", "TEST")
# What `transform()` may do to a training image: colours, zoom out, crop, flip.
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
    Raises FileNotFoundError for a list that is missing, ValueError for one that `read_objects()` refuses.

    Attributes:
        label_map, image_paths
        sizes                                   (n_images, 2): widths and heights
        boxes_xy_pixels, labels, difficulties   of the objects of all images, one image's after another's
        starts                                  image i has the objects from starts[i] to starts[i + 1]
        image_ids, areas                        of images, and of objects in square pixels, as COCO's files state them;
                                                None for other data sets
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
        """Read label_map.json and the split's two lists: the paths of the images, and their objects."""
        self.label_map = load_label_map(self.data_folder)
        images_path = self.data_folder / f"{self.split}_images.json"
        paths = read_json(images_path, list)
        if not all(isinstance(path, str) for path in paths):
            raise ValueError(f"{images_path}: not a list of paths")
        entries = read_objects(self.data_folder / f"{self.split}_objects.json", paths, len(self.label_map))
        if not self.keep_difficult:
            entries = [without_difficult(entry) for entry in entries]

        # Large arrays, since lists of small objects would be copied into every worker. (A worker shares the memory of
        # this process until it writes to it. And Python writes even when it reads an object: to its reference count.)
        self.image_paths = np.array(paths, dtype=np.str_)
        self.sizes = np.array([entry["size"] for entry in entries], dtype=np.int64).reshape(-1, 2)

        # The objects of all images, one image's after another's.
        boxes = np.array(join(entries, "boxes"), dtype=np.float32).reshape(-1, 4)
        self.boxes_xy_pixels = torch.from_numpy(boxes)
        self.labels = torch.tensor(join(entries, "labels"), dtype=torch.int64)
        self.difficulties = torch.tensor(join(entries, "difficulties"), dtype=torch.uint8)
        counts = [len(entry["boxes"]) for entry in entries]
        self.starts = np.cumsum([0, *counts])  # for counts [2, 0, 3]: [0, 2, 2, 5]

        # For COCO's metric: its files also state an area for each object and an id for each image. Others state none;
        # then read_objects() has set "areas" to [].
        areas = join(entries, "areas")
        has_areas = len(areas) == len(boxes)  # of every object
        self.areas = np.array(areas, dtype=np.float64) if has_areas else None
        ids = [entry.get("image_id") for entry in entries]
        self.image_ids = ids if None not in ids else None  # a list: ids may be text, and no worker reads them

    def __len__(self):
        return len(self.image_paths)

    def __getitem__(self, key):
        if not isinstance(key, tuple):
            key = (0, key)
        epoch, index = key
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
        boxes_xy_pixels = self.boxes_xy_pixels[objects]  # (M, 4)
        labels = self.labels[objects]  # (M,)
        difficulties = self.difficulties[objects]  # (M,)
        rng = np.random.default_rng((self.seed, epoch, index))
        # "TRAIN", whatever the split: self.augment decides alone what is done. If it is (), nothing is.
        return transform(
            image, boxes_xy_pixels, labels, difficulties, "TRAIN", rng, self.size, self.antialias, self.augment
        )

    def image_names(self):
        """Names of the images as Pascal VOC's files have them: without folder and extension."""
        return [Path(path).stem for path in self.image_paths.tolist()]

    def skipped_images(self):
        """Paths of the images that any worker has skipped so far, since they were missing or damaged."""
        return self.image_paths[self.skipped.numpy() != 0].tolist()

    @staticmethod
    def collate_fn(batch):
        """A batch of a list of N items: images (N, 3, S, S) uint8, and lists of their boxes, labels, difficulties."""
        images = stack_images([item[0] for item in batch])
        boxes = join_and_split([item[1] for item in batch])
        labels = join_and_split([item[2] for item in batch])
        difficulties = join_and_split([item[3] for item in batch])
        return images, boxes, labels, difficulties


def stack_images(images):
    """Stack a list of N images (3, S, S) to an (N, 3, S, S) tensor.

    torch.stack(images) would give the same tensor, but would reorder all bytes: in memory, transform()'s images have
    R, G and B of a pixel side by side. Seen as (S, S, 3), bytes are copied in the order in which they are, in a fifth
    of the time.
    """
    stacked = torch.stack([image.permute(1, 2, 0) for image in images])  # (N, S, S, 3)
    stacked = stacked.permute(0, 3, 1, 2)  # (N, 3, S, S), the same memory
    return move_to_shared_memory(stacked)


def join_and_split(tensors):
    """The same list of tensors, but as slices of one long tensor.

    A worker of the DataLoader hands tensors over to the main process in shared memory. Each tensor takes an open file
    there, and one for each image would soon be more than the system allows. All slices of a tensor take one.
    """
    lengths = [len(tensor) for tensor in tensors]  # such as [2, 0, 3]
    joined = torch.cat(tensors)  # 5 rows
    joined = move_to_shared_memory(joined)
    return list(joined.split(lengths))  # rows 0 and 1; no row; rows 2, 3 and 4


def move_to_shared_memory(tensor):
    """In a worker of the DataLoader, move a tensor to shared memory, where the main process reads it; return it.

    Otherwise PyTorch does this later, in a background thread. If it fails there (no space, say), nobody learns of it,
    and the main process waits for ever. If it fails here, the main process gets the error.
    """
    is_worker = get_worker_info() is not None
    if is_worker and tensor.numel() > 0:
        tensor.share_memory_()
    return tensor


class TrainingBatches:
    """Batch sampler of one uninterrupted run: batch i is the same whenever, and wherever, the run resumes.

    Every epoch reads all images, each time in another order. Batches are cut from one epoch after another, so that no
    image is left out: of 7 images in batches of 3, batch 2 is the last image of epoch 0 and the first two of epoch 1.

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

    def __len__(self):
        return len(self.iterations)

    def __iter__(self):
        for iteration in self.iterations:
            batch = self.batch(iteration)
            yield batch[self.rank :: self.world_size]  # of 4 ranks, rank 1 takes images 1, 5, 9, ... of the batch

    def batch(self, iteration):
        """The (epoch, index) of all batch_size images of an iteration, over all ranks."""
        first = iteration * self.batch_size
        keys = []
        for position in range(first, first + self.batch_size):
            epoch, place = divmod(position, self.n_images)  # of 7 images, position 9 is place 2 of epoch 1
            order = shuffle(self.n_images, self.seed, epoch)
            keys.append((epoch, int(order[place])))
        return keys


@functools.lru_cache(maxsize=1)  # an epoch's order is asked for again and again
def shuffle(n_images, seed, epoch):
    """The order in which an epoch reads the images: a permutation of 0 to n_images - 1."""
    # These random numbers must not be those of an image's augmentation, whose seed is (seed, epoch, index). To NumPy,
    # (seed, epoch) is the same as (seed, epoch, 0), the seed of image 0. A spawn key makes it another one.
    seeds = np.random.SeedSequence((seed, epoch), spawn_key=(0,))
    return np.random.default_rng(seeds).permutation(n_images)


def read_objects(path, images, n_classes):
    """Read the list of objects of a split, and check it, so that no object can hurt the loss.

    path: file as create_data_lists.py writes it. It holds a list with an entry for each image: a dict of "boxes",
    "labels", "difficulties", "size" and, from COCO's files, "areas" and "image_id".
    images: list of paths. n_classes: background included.
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
            raise ValueError(f"{path}: {printable(image)}: {problem}") from None
    return entries


def check_entry(entry, n_classes):
    """Check the entry of one image. (NaN breaks each rule: no comparison with it holds.)"""
    width, height = entry["size"]
    is_whole = width % 1 == 0 and height % 1 == 0
    is_small_enough = max(width, height) <= MAX_IMAGE_SIDE and width * height <= MAX_IMAGE_PIXELS
    if not (is_whole and is_small_enough and min(width, height) >= 1):
        raise ValueError(f"{entry['size']} in its size is not a width and a height in pixels")
    for box in entry["boxes"]:
        x_min, y_min, x_max, y_max = array("f", box)  # rounded to float32, as the data set keeps them
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
    n_objects = len(entry["boxes"])
    if len(entry["labels"]) != n_objects or len(entry["difficulties"]) != n_objects:
        raise ValueError("they are of unequal length")
    if entry["areas"] and len(entry["areas"]) != n_objects:
        raise ValueError("its areas are not as many as its boxes")


def without_difficult(entry):
    """The entry of one image, without its difficult objects."""
    easy = dict(entry)
    for key in ("boxes", "labels", "difficulties", "areas"):
        pairs = zip(entry[key], entry["difficulties"], strict=False)  # no pairs if areas is []
        easy[key] = [value for value, difficulty in pairs if difficulty == 0]
    return easy


def join(entries, key):
    """A list of the boxes, labels, ... of all images, one image's after another's."""
    joined = []
    for entry in entries:
        joined += entry[key]
    return joined


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
# Each is a tuple (x_min, y_min, x_max, y_max), in whole pixels: place in those of the image, the others in those of the
# photo, whose upper left corner is (0, 0). Example, for S = 300 and a photo of 400 x 200 pixels:
#
#   canvas   (-200, -100, 600, 300)   twice as wide and high as the photo
#   crop     (-100, 50, 500, 250)     600 x 200 pixels: its width is to be halved, its height to grow by half
#   source   (0, 50, 400, 200)        the photo without its uppermost 50 rows, which lie above the crop
#   place    (50, 0, 250, 225)        x: (0 + 100) / 2 and (400 + 100) / 2; y: (50 - 50) * 1.5 and (200 - 50) * 1.5

# The ImageNet mean in bytes: what surrounds a photo that is zoomed out.
FILLER = (124, 116, 104)
# Six of the seven samplers of crops: the minimum overlap of crop and object. The seventh takes the whole canvas. (0.0:
# any crop that holds the centre of an object.)
MIN_OVERLAPS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.0)
CROP_TRIES = 50


def transform(image, boxes, labels, difficulties, split, rng=None, size=300, antialias=True, augment=AUGMENTATIONS):
    """Resize a photo and its objects to S x S, as the network sees them; for training, augment them, too.

    image: (3, H, W) uint8 RGB tensor, or PIL image; it is not changed.
    boxes: (n, 4) float tensor, boundary form, pixels, inside the image; n may be 0.
    labels: (n,) int64 tensor. difficulties: (n,) tensor.
    split: "TRAIN" takes the steps in `augment`, "VAL" and "TEST" take none; another is a ValueError.
    rng: NumPy Generator of the random numbers for "TRAIN"; None makes a new one.
    size: S. antialias: as in `resize()`. augment: names out of AUGMENTATIONS.

    Returns the image as a (3, S, S) uint8 tensor, and the m <= n objects that stay: boxes, an (m, 4) float32 tensor,
    boundary form, fractional, in [0, 1], of positive area, and their labels and difficulties.

    To add a step of your own, write a function like `flip()`, which takes an image and its boxes and returns both
    changed. Call it where "Your own step" stands below, and add its name to AUGMENTATIONS and to `augment` in train.py.
    What is random it draws from rng. (tests/test_augmentations.py has all steps in slow, plain code: add yours there.)
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {SPLITS}")
    if not isinstance(image, torch.Tensor):
        image = pil_to_tensor(pil_to_rgb(image))
    boxes_xy_pixels = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    _, height, width = image.shape
    photo = (0, 0, width, height)
    steps = augment if split == "TRAIN" else ()

    # Draw random numbers for all steps, even for those that are left out. So leaving one out changes nothing for the
    # others. (draw_crop() below may be skipped, since it draws after all of these.)
    if split == "TRAIN":
        rng = np.random.default_rng() if rng is None else rng
        colors = draw_colors(rng)
        canvas = draw_canvas(photo, rng)
        is_flipped = rng.random() < 0.5

    # Zoom out and crop: find which part of the photo is shown, and where. (Without these two steps, canvas, crop and
    # source are the whole photo, and its place is the whole image.)
    if "zoom_out" not in steps:  # nor for VAL and TEST
        canvas = photo
    crop = canvas
    if "crop" in steps:
        crop = draw_crop(canvas, photo, boxes_xy_pixels, rng)
    source = intersect(crop, photo)  # in pixels of the photo
    place = find_place(source, crop, size)  # in pixels of the new image

    # Objects stay if their centre is in the crop.
    stays = find_centers_inside(boxes_xy_pixels, np.array([crop]))[:, 0]  # (n,) bool
    kept = stays.nonzero()[0]  # (m,): the numbers of the objects that stay, such as [0, 2]
    boxes_xy = move_boxes(boxes_xy_pixels[kept], source, place, size)  # (m, 4), fractions of the new image

    # Resize, colours, flip. (Caffe changes the colours first. After resizing there are far fewer pixels to change.)
    x_min, y_min, x_max, y_max = source
    image = image[:, y_min:y_max, x_min:x_max]
    image = resize(image, place[2] - place[0], place[3] - place[1], antialias)
    if "distort" in steps:
        image = distort(image, colors)
    image = put_on_filler(image, place, size)  # after the colours, so that the filler keeps its own
    if "flip" in steps and is_flipped:
        image, boxes_xy = flip(image, boxes_xy)
    # Your own step, which may draw what it needs:
    # if "mine" in steps: image, boxes_xy = my_step(image, boxes_xy, rng)

    # A box less than a millionth of the image wide may have no area in float32. Such objects are left out.
    boxes_xy = boxes_xy.astype(np.float32)
    has_area = (boxes_xy[:, 0] < boxes_xy[:, 2]) & (boxes_xy[:, 1] < boxes_xy[:, 3])  # (m,) bool
    boxes_xy = torch.from_numpy(boxes_xy[has_area])
    kept = torch.from_numpy(kept[has_area])
    return image, boxes_xy, labels[kept], difficulties[kept]


def prepare(images, model):
    """PIL images, or (3, H, W) uint8 tensors, as a model's input: (N, 3, S, S) float32, normalised, on its device."""
    resized = []
    for image in images:
        pixels, *_ = transform(image, *NO_OBJECTS, "TEST", size=model.input_size, antialias=model.antialias)
        resized.append(pixels)
    return model.normalize(torch.stack(resized))


def draw_canvas(photo, rng):
    """Zoom out, with probability 1/2: a canvas 1 to 4 times as wide and high as the photo, which lies anywhere on it.

    The network sees the canvas, and so smaller objects than those of the photos. Else the canvas is the photo. (Caffe:
    ExpandImage.)
    """
    if rng.random() < 0.5:
        return photo
    _, _, width, height = photo
    ratio = rng.uniform(1, 4)
    canvas_width = round(ratio * width)
    canvas_height = round(ratio * height)
    # How many pixels of the canvas are to the left of the photo, and how many are above it.
    left = int(rng.integers(canvas_width - width, endpoint=True))
    top = int(rng.integers(canvas_height - height, endpoint=True))
    # The photo's corner is (0, 0), so the canvas begins at (-left, -top).
    return -left, -top, canvas_width - left, canvas_height - top


def draw_crop(canvas, photo, boxes, rng):
    """Crop by one of seven samplers (SSD paper, section 2.2).

    A sampler is a minimum overlap of crop and object: with a low one a crop may show little of an object, with a high
    one it shows hardly anything else. Each of six samplers tries 50 crops. A try succeeds if the crop overlaps some
    object by the sampler's minimum and holds the centre of some object, the same or another. (Without objects, it
    succeeds if the crop shows any of the photo.) The seventh sampler takes the whole canvas. One of the samplers
    that succeeded is chosen at random.

    boxes: (n, 4) array, boundary form, pixels. Returns the crop.
    """
    n_tries = len(MIN_OVERLAPS) * CROP_TRIES  # 300, all at once, which is faster than one after another
    crops = draw_boxes_inside(canvas, n_tries, rng)  # (300, 4): 50 for the first sampler, 50 for the second, ...
    if len(boxes) > 0:
        # (300,) bool: whether a crop shows the centre of some object
        shows_enough = find_centers_inside(boxes, crops).any(axis=0)
        overlaps = find_jaccard_overlap(torch.from_numpy(boxes), torch.from_numpy(crops))  # (n, 300)
        best_overlaps = overlaps.amax(dim=0).numpy()  # (300,): with the object that a crop overlaps most
    else:
        _, _, photo_width, photo_height = photo
        x_mins, y_mins, x_maxs, y_maxs = crops.T  # (300,) each
        # (300,) bool: whether a crop shows any of the photo
        shows_enough = (x_mins < photo_width) & (x_maxs > 0) & (y_mins < photo_height) & (y_maxs > 0)
        best_overlaps = np.ones(n_tries)  # without objects, every minimum counts as reached

    found = []
    for sampler, min_overlap in enumerate(MIN_OVERLAPS):
        tries = slice(sampler * CROP_TRIES, (sampler + 1) * CROP_TRIES)  # those of this sampler
        is_success = shows_enough[tries] & (best_overlaps[tries] >= min_overlap)  # (50,)
        if is_success.any():
            first = is_success.argmax()  # the first True
            found.append(crops[tries][first])
    found.append(canvas)  # the seventh sampler
    crop = found[rng.integers(len(found))]
    return tuple(int(side) for side in crop)


def draw_boxes_inside(canvas, n, rng):
    """Boxes of random scale, aspect ratio and place inside a canvas. (Caffe: SampleBBox, sampler.cpp.)

    A box of scale s and aspect ratio r has s sqrt(r) times the width of the canvas and s / sqrt(r) times its height.
    For s = 0.6 and r = 1.44 this is 0.72 times the width and 0.5 times the height: an area of 0.36 = s^2.
    Returns an (n, 4) array, boundary form, in whole pixels.
    """
    scale_draws, ratio_draws, x_draws, y_draws = rng.random((4, n))  # (n,) each, in [0, 1)
    scales = 0.3 + 0.7 * scale_draws  # in [0.3, 1)

    # The box must fit into the canvas:  s sqrt(r) <= 1,   so  r <= 1/s^2
    #                                    s / sqrt(r) <= 1, so  r >= s^2
    # Caffe also wants r in [1/2, 2]. So the lowest r is max(s^2, 1/2), and the highest min(1/s^2, 2) = 1 / lowest.
    lowest_ratios = np.maximum(scales * scales, 0.5)  # 0.5 for s = 0.6, 0.64 for s = 0.8
    highest_ratios = 1 / lowest_ratios  # 2 for s = 0.6, 1.56 for s = 0.8
    ratios = lowest_ratios + (highest_ratios - lowest_ratios) * ratio_draws

    x_min, y_min, x_max, y_max = canvas
    canvas_width = x_max - x_min
    canvas_height = y_max - y_min
    roots = np.sqrt(ratios)
    widths = np.maximum(np.rint(canvas_width * (scales * roots)), 1)
    heights = np.maximum(np.rint(canvas_height * (scales / roots)), 1)

    # On a canvas 10 pixels wide, a box of 8 begins at 0, 1 or 2: one of 10 - 8 + 1 places, all equally likely.
    x_mins = x_min + np.floor((canvas_width - widths + 1) * x_draws)
    y_mins = y_min + np.floor((canvas_height - heights + 1) * y_draws)
    return np.stack([x_mins, y_mins, x_mins + widths, y_mins + heights], axis=1)


def find_centers_inside(boxes, crops):
    """Which boxes have their centre in which crops: an (n, n_crops) bool array."""
    x_centers = (boxes[:, 0:1] + boxes[:, 2:3]) / 2  # (n, 1)
    y_centers = (boxes[:, 1:2] + boxes[:, 3:4]) / 2
    x_mins, y_mins, x_maxs, y_maxs = crops.T  # (n_crops,) each
    is_in_columns = (x_mins <= x_centers) & (x_centers < x_maxs)  # (n, n_crops)
    is_in_rows = (y_mins <= y_centers) & (y_centers < y_maxs)
    return is_in_columns & is_in_rows


def intersect(box, other):
    """The part that two boxes share. (They have to: `draw_crop()` takes only crops that show some of the photo.)"""
    return max(box[0], other[0]), max(box[1], other[1]), min(box[2], other[2]), min(box[3], other[3])


def find_place(source, crop, size):
    """Where the source comes to lie on the S x S image that the crop becomes: at least one pixel wide and high."""
    x_min, x_max = find_place_on_axis(source[0], source[2], crop[0], crop[2], size)
    y_min, y_max = find_place_on_axis(source[1], source[3], crop[1], crop[3], size)
    return x_min, y_min, x_max, y_max


def find_place_on_axis(source_min, source_max, crop_min, crop_max, size):
    """Where the place begins and ends along x, or along y.

    Example: a crop from -100 to 500 becomes 300 pixels, so it is scaled by 0.5. A source from 0 to 400 begins 100
    pixels after the beginning of the crop, and ends 500 pixels after it. So its place is from 50 to 250.
    """
    scale = size / (crop_max - crop_min)
    place_min = round((source_min - crop_min) * scale)
    place_max = round((source_max - crop_min) * scale)
    # A narrow source may be rounded to nothing. It gets one pixel, which must not lie beyond the image.
    place_min = min(place_min, size - 1)
    place_max = max(place_max, place_min + 1)
    return place_min, place_max


def move_boxes(boxes, source, place, size):
    """Boxes on the photo as boxes on the S x S image.

    boxes: (n, 4) array, boundary form, pixels of the photo.
    Returns an (n, 4) array, boundary form, fractional; what reaches beyond the source is cut off.
    """
    x_min, y_min, x_max, y_max = source
    place_x_min, place_y_min, place_x_max, place_y_max = place
    x_scale = (place_x_max - place_x_min) / (x_max - x_min)
    y_scale = (place_y_max - place_y_min) / (y_max - y_min)
    boxes = np.clip(boxes, (x_min, y_min, x_min, y_min), (x_max, y_max, x_max, y_max))
    boxes = boxes - (x_min, y_min, x_min, y_min)  # as seen from the corner of the source
    boxes = boxes * (x_scale, y_scale, x_scale, y_scale)  # in pixels of the image, from the corner of the place
    boxes = boxes + (place_x_min, place_y_min, place_x_min, place_y_min)  # from the corner of the image
    return boxes / size


def resize(image, width, height, antialias=True):
    """Bilinear resize of a (3, h, w) uint8 tensor to (3, height, width).

    antialias: True: where the image shrinks, a new pixel is made of all the pixels that it covers, as Pillow does it.
        False: it is made of the four pixels nearest to its centre alone, as in torchvision, amdegroot and lufficc.
    (For 640 x 480 pixels this takes 0.3 ms, Pillow's own resize() 1.8.)
    """
    # interpolate() wants the shape (1, 3, h, w). It is faster if R, G and B of a pixel lie side by side in memory.
    pixels = image.permute(1, 2, 0).contiguous()  # (h, w, 3): now they do
    images = pixels[None].permute(0, 3, 1, 2)  # (1, 3, h, w), the same memory
    is_one_pixel_wide = width == 1 or image.shape[2] == 1
    if is_one_pixel_wide:  # torch 2.14 returns wrong bytes, or crashes; floats are right
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
    brightness = 0
    if rng.random() < 0.5:
        brightness = int(rng.integers(-32, 32, endpoint=True))
    contrast = 1.0
    if rng.random() < 0.5:
        contrast = int(rng.integers(50, 150, endpoint=True)) / 100
    saturation = 1.0
    if rng.random() < 0.5:
        saturation = int(rng.integers(50, 150, endpoint=True)) / 100
    hue = 0
    if rng.random() < 0.5:
        hue = int(rng.integers(-36, 36, endpoint=True))
    contrast_first = rng.random() < 0.5
    return Colors(brightness, contrast, saturation, hue, contrast_first)


def distort(image, colors):
    """Change brightness, contrast, saturation and hue of a (3, h, w) uint8 tensor; returns a new one.

    After each step Pillow rounds the values, and keeps them in 0 to 255.
    """
    image = Image.fromarray(image.permute(1, 2, 0).numpy())
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
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def multiply_contrast(image, contrast):
    """Multiply the values of a PIL image, so that light and dark are further apart, or nearer."""
    if contrast == 1:
        return image
    return image.point(lambda value: value * contrast)


def multiply_saturation(image, saturation):
    """Multiply S of a PIL image in HSV by a factor.

    S says how far a pixel is from grey. Of the pixel (200, 150, 100) the highest value, V, is 200, and the grey is
    (200, 200, 200). Each value's distance from the grey is multiplied: by 1.5, the pixel becomes (200, 125, 50). V and
    H stay, as H depends on the ratios of these distances alone. (But a value that would be below 0 stops at 0.)
    """
    red, green, blue = image.split()
    highest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    grey = Image.merge("RGB", [highest, highest, highest])
    return Image.blend(grey, image, saturation)  # grey + (image - grey) * saturation, kept in 0 to 255


def turn_hue(image, degrees):
    """Turn H of a PIL image in HSV.

    H stands for a pure colour, one whose lowest value is 0 and whose highest is 255. Each value of a pixel is
    lowest + (highest - lowest) * pure / 255. So turn the pure colour, and keep the pixel's highest and lowest value.
    (Then S and V stay, too.)
    Example: the pixel (200, 100, 50) has the pure colour (255, 84, 0), an orange. Turned by 36 degrees, this is the
    yellow (255, 240, 0). Of its 240 the pixel gets 50 + (200 - 50) * 240 / 255 = 191: it becomes (200, 191, 50). (The
    84 should be 85, but Pillow rounds H.)
    """
    hues, _, highest = image.convert("HSV").split()  # V is the highest of R, G and B
    red, green, blue = image.split()
    lowest = ImageChops.darker(ImageChops.darker(red, green), blue)

    # 1. Turn: look up each pixel's H in a table of the turned pure colours. Pillow calls such a table a palette.
    hues.putpalette(make_turned_palette(degrees))  # from now on, a value h of `hues` means colour number h of the table
    turned_pure = hues.convert("RGB")  # the look-up itself

    # 2. Keep highest and lowest. composite(highest, lowest, pure) computes lowest + (highest - lowest) * pure / 255 for
    # each pixel. (Pillow's way back from HSV to RGB would do it all, but takes three times as long.)
    channels = [Image.composite(highest, lowest, pure) for pure in turned_pure.split()]
    return Image.merge("RGB", channels)


@functools.cache
def make_turned_palette(degrees):
    """The table of `turn_hue()`: for each H its pure colour after a turn. Bytes: R, G, B of H = 0, of H = 1, ...

    Pillow's H goes once round the colour circle in 255 steps, so 36 degrees are 26 steps. Example: H = 14 is an orange,
    (255, 84, 0). H = 14 + 26 = 40 is a yellow, (255, 240, 0). So the table holds this yellow at place 14.
    """
    n_steps = round(degrees / 360 * 255)
    turned = bytes((hue + n_steps) % 255 for hue in range(256))  # 255 is the same hue as 0
    turned = Image.frombytes("L", (256, 1), turned)  # one row, a pixel for each hue
    full = Image.new("L", (256, 1), 255)  # S and V of pure colours
    pure = Image.merge("HSV", [turned, full, full]).convert("RGB")
    return pure.tobytes()
