"""The data set, the batches that it is read in, and what makes a run repeatable.

    dataset = PascalVOCDataset("data", split="TRAIN", keep_difficult=True)
    batches = TrainingBatches(len(dataset), batch_size=32, seed=0, first_iteration=0, last_iteration=120000)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=dataset.collate_fn, num_workers=4)

Reads the lists that create_data_lists.py writes: {TRAIN,TEST}_images.json, {TRAIN,TEST}_objects.json and
label_map.json. Which images make up a batch depends on (seed, iteration) alone, and how an image is augmented
on (seed, epoch, index) alone: never on the number of workers, nor on what was read before.

Shapes in comments: N images in a batch, M objects in an image.
"""

import contextlib
import errno
import functools
import io
import json
import operator
import os
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from utils import MAX_IMAGE_PIXELS, load_label_map

try:  # torchvision 0.29 announces that a later version will leave decoding to another package
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None  # Pillow decodes instead: the same pixels in twice the time


class PascalVOCDataset(Dataset):
    """Images and objects of one split of any data set in Pascal VOC's layout.

    data_folder: folder with the lists of create_data_lists.py. split: "TRAIN" or "TEST".
    keep_difficult: whether objects marked as difficult are part of the items.
    seed: with the epoch and the index it decides how an image is augmented.
    skip_corrupt: False raises on an image that cannot be decoded; True puts a blank image without objects in
        its place, which keeps the batch's shape, and adds to the loss what images without objects do: nothing,
        unless a parameter says otherwise. `skipped_images()` lists them.
    augment: None augments the "TRAIN" split only; True or False decides for either split.

    An item's key is an index (then the epoch is 0), or (epoch, index). An item is the image as a
    (3, 300, 300) uint8 tensor, boxes (M, 4) float32, boundary form, fractional, labels (M,) int64 and
    difficulties (M,) uint8; M may be 0.

    Raises FileNotFoundError for a list that is missing, and ValueError for one that is malformed, or that
    holds a box that is not finite, has no area or lies beyond its image, or a label without a class.
    """

    def __init__(
        self,
        data_folder,
        split,
        keep_difficult=False,
        seed=0,
        skip_corrupt=False,
        augment=None,
        size=300,
        antialias=True,
    ):
        if split not in ("TRAIN", "TEST"):
            raise ValueError(f'split is {split!r}; it must be "TRAIN" or "TEST"')
        self.data_folder = Path(data_folder)
        self.split = split
        self.keep_difficult = keep_difficult
        self.seed = check_seed(seed)
        self.skip_corrupt = skip_corrupt
        self.augment = check_augment((AUGMENTATIONS if split == "TRAIN" else ()) if augment is None else augment)
        self.size, self.antialias = size, antialias

        self.label_map = load_label_map(self.data_folder)
        images = read_list(self.data_folder / f"{split}_images.json")
        objects_path = self.data_folder / f"{split}_objects.json"
        objects = read_list(objects_path)
        if len(images) != len(objects):
            raise ValueError(
                f"{objects_path} describes {len(objects)} images, {split}_images.json beside it lists "
                f"{len(images)}; run create_data_lists.py again"
            )
        # A few large arrays, not a Python object for each path and box: a forked worker that only reads a
        # Python object still writes its reference count, and so would copy every page of a long list.
        self.sizes, starts, boxes, labels, difficulties = pack_objects(
            images, objects, set(self.label_map.values()) - {0}, objects_path
        )
        self.image_paths = np.array(images, dtype=np.str_)
        # From COCO's files only: the images' ids, and the objects' areas in pixels of the image.
        self.image_ids = [entry["image_id"] for entry in objects] if objects and "image_id" in objects[0] else None
        areas = [area for entry in objects for area in entry.get("areas", ())]
        areas = np.array(areas, dtype=np.float64) if objects and "areas" in objects[0] else None
        if not keep_difficult:
            kept_before = np.concatenate([[0], np.cumsum(difficulties == 0)])
            starts = kept_before[starts]
            areas = areas if areas is None else areas[difficulties == 0]
            boxes, labels, difficulties = (x[difficulties == 0] for x in (boxes, labels, difficulties))
        self.starts = starts  # objects of image i: starts[i] to starts[i + 1]
        self.boxes_xy_pixels = torch.from_numpy(boxes)
        self.labels = torch.from_numpy(labels)
        self.difficulties = torch.from_numpy(difficulties)
        self.areas = areas
        self.skipped = torch.zeros(len(images), dtype=torch.uint8).share_memory_()  # written by all workers

    def __len__(self):
        return len(self.image_paths)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        epoch, index = operator.index(epoch), operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index}: {self.split} has {len(self)} images")
        index %= len(self)
        path = str(self.image_paths[index])
        objects = slice(self.starts[index], self.starts[index + 1])
        boxes, labels = self.boxes_xy_pixels[objects], self.labels[objects]
        difficulties = self.difficulties[objects]
        try:
            image = read_image(path)
        except FileNotFoundError:
            raise
        except ValueError:
            if not self.skip_corrupt:
                raise
            self.skipped[index] = 1
            return blank_item(self.size)
        self.check_size(path, image, index)
        rng = np.random.default_rng((self.seed, epoch, index))
        return transform(image, boxes, labels, difficulties, "TRAIN", rng, self.size, self.antialias, self.augment)

    def check_size(self, path, image, index):
        """Refuse an image of another size than the one that its boxes were checked against."""
        width, height = self.sizes[index].tolist()
        if (image.shape[2], image.shape[1]) != (width, height):
            raise ValueError(
                f"{path} is {image.shape[2]} x {image.shape[1]} pixels, the lists in {self.data_folder} say "
                f"{width} x {height}; run create_data_lists.py again with check_images on"
            )

    def image_names(self):
        """Names of the images as Pascal VOC's files have them: without folder and extension."""
        return [Path(path).stem for path in self.image_paths.tolist()]

    def skipped_images(self):
        """Paths of the images that were skipped so far because they could not be decoded, by any worker."""
        return [str(path) for path in self.image_paths[self.skipped.numpy() != 0]]

    @staticmethod
    def collate_fn(batch):
        """Make a batch of items whose numbers of objects differ.

        batch: list of N items.
        Returns images (N, 3, 300, 300) uint8, and three lists of N tensors: boxes (M, 4) float32, boundary
        form, fractional, labels (M,) int64 and difficulties (M,) uint8.
        """
        images, *lists = zip(*batch, strict=True)
        # transform() leaves the channels last in memory; a batch in that order is five times as fast to make.
        images = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
        # One block of memory for all boxes, one for all labels: a worker passes each block on as an open file,
        # and hundreds of them exceed the number that a system allows (1024 usually).
        packed = [torch.cat(tensors) for tensors in lists]
        if get_worker_info() is not None:
            # A worker would move them to shared memory later, in a thread whose errors are lost (no space,
            # too many open files), and the run would wait for this batch for ever. Here they reach it.
            for tensor in (images, *packed):
                if tensor.numel():
                    tensor.share_memory_()
        sizes = [[len(tensor) for tensor in tensors] for tensors in lists]
        return images, *(list(all_.split(n)) for all_, n in zip(packed, sizes, strict=True))


class TrainingBatches:
    """Batch sampler of one uninterrupted run: batch i is the same whenever, and wherever, the run resumes.

    The images are read in an endless sequence of seeded permutations, one for each epoch; iteration i takes
    the batch_size images from position i * batch_size on, so that a batch may straddle two epochs and no
    image is left out of any. No more than two permutations are computed to get there.

    n_images: in the data set. batch_size: over all ranks. seed: decides the permutations.
    first_iteration, last_iteration: which batches are yielded, as in range(): the last is left out.
    rank, world_size: this process of how many; each takes its share of every batch.
    Yields lists of (epoch, index), the keys of `PascalVOCDataset`.
    """

    def __init__(self, n_images, batch_size, seed, first_iteration, last_iteration, rank=0, world_size=1):
        if n_images < 1:
            raise ValueError("there is no image to train on; run create_data_lists.py on another folder")
        if not 0 <= rank < world_size <= batch_size:
            raise ValueError(
                f"rank {rank} of {world_size} processes cannot share a batch of {batch_size}; "
                "batch_size must be at least the number of processes"
            )
        self.n_images = n_images
        self.batch_size = batch_size
        self.seed = check_seed(seed)
        self.iterations = range(first_iteration, last_iteration)
        self.rank = rank
        self.world_size = world_size
        self.epoch_and_order = None, None  # the last permutation that was computed

    def __len__(self):
        return len(self.iterations)

    def __iter__(self):
        for iteration in self.iterations:
            yield self.batch(iteration)[self.rank :: self.world_size]

    def batch(self, iteration):
        """The (epoch, index) of all batch_size images of an iteration, over all ranks."""
        first = iteration * self.batch_size
        positions = (divmod(position, self.n_images) for position in range(first, first + self.batch_size))
        return [(epoch, int(self.order(epoch)[position])) for epoch, position in positions]

    def order(self, epoch):
        """The permutation of one epoch."""
        if self.epoch_and_order[0] != epoch:
            # The spawn key keeps this stream apart from those of the augmentation, seeded with three numbers.
            rng = np.random.default_rng(np.random.SeedSequence((self.seed, epoch), spawn_key=(0,)))
            self.epoch_and_order = epoch, rng.permutation(self.n_images)
        return self.epoch_and_order[1]


def check_seed(seed):
    """A seed as numpy wants it; raises ValueError for a negative one."""
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more")
    return seed


def blank_item(size):
    """What stands in for an image that cannot be decoded: ImageNet's mean colour, no objects."""
    image = torch.from_numpy(blank_image(size)).permute(2, 0, 1)  # (3, 300, 300)
    return image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.uint8)


def read_list(path):
    """The list in one of create_data_lists.py's JSON files; raises naming the file and that script."""
    try:
        with open(path, encoding="utf-8") as file:
            contents = json.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; create_data_lists.py writes it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); run create_data_lists.py again") from None
    if not isinstance(contents, list):
        raise ValueError(f"{path}: holds no list; run create_data_lists.py again")
    return contents


def pack_objects(images, objects, valid_labels, path):
    """The objects of all images in a few arrays, each checked so that it cannot hurt the loss.

    images: list of paths. objects: list of {"boxes", "labels", "difficulties", "size"}, one for each image.
    valid_labels: set of the classes' labels. path: the file that an error names.
    Returns sizes (n_images, 2) int64, starts (n_images + 1,), boxes_xy_pixels (n, 4) float32, labels (n,)
    int64, difficulties (n,) uint8. Raises ValueError, naming the image.
    """
    sizes, counts, boxes, labels, difficulties = [], [], [], [], []
    for image, entry in zip(images, objects, strict=True):
        problem = find_problem(image, entry, valid_labels)
        if problem:
            raise ValueError(f"{path}: {str(image)[:1000]}: {problem[:1000]}; run create_data_lists.py again")
        sizes.append(entry["size"])
        counts.append(len(entry["boxes"]))
        boxes += entry["boxes"]
        labels += entry["labels"]
        difficulties += entry["difficulties"]
    return (
        np.array(sizes, dtype=np.int64).reshape(-1, 2),
        np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array(difficulties, dtype=np.uint8),
    )


def find_problem(image, entry, valid_labels):
    """What is wrong with the entry of one image, in words; None if nothing is."""
    if not isinstance(image, str) or len(image) > 4096:
        return "the path is no string, or longer than any path"
    try:
        (width, height), boxes = entry["size"], entry["boxes"]
        labels, difficulties = entry["labels"], entry["difficulties"]
        if not len(boxes) == len(labels) == len(difficulties):
            return f"{len(boxes)} boxes, {len(labels)} labels and {len(difficulties)} difficulties"
        for box, label, difficulty in zip(boxes, labels, difficulties, strict=True):
            x_min, y_min, x_max, y_max = box
            if not (0 <= x_min < x_max <= width and 0 <= y_min < y_max <= height):  # NaN fails this too
                return f"the box {box} is not finite, has no area or is beyond the {width} x {height} image"
            if np.float32(x_min) == np.float32(x_max) or np.float32(y_min) == np.float32(y_max):
                return f"the box {box} has no area that float32 could tell"
            if label not in valid_labels:
                return f"the label {label!r} is not in label_map.json"
            if difficulty not in (0, 1):
                return f"the difficulty {difficulty!r} is neither 0 nor 1"
        whole = type(width) is type(height) is int and min(width, height) >= 1
        if not whole or width * height > MAX_IMAGE_PIXELS:
            return f"the size {entry['size']} is not a width and a height in pixels"
    except (KeyError, TypeError, ValueError):
        return 'its entry is no {"boxes": [[x_min, y_min, x_max, y_max], ...], "labels", "difficulties", "size"}'
    return None


# ----------------------------------------------------------------------------------------------
# Images and augmentations
# ----------------------------------------------------------------------------------------------

# What transform() does to a training image, in this order; a run may take some of them only.
AUGMENTATIONS = ("distort", "zoom_out", "crop", "flip")

# The ImageNet mean in bytes: what surrounds a photo that is zoomed out.
FILLER = (124, 116, 104)

# As many bytes take so many pixels uncompressed, 4 channels of 16 bits; no image file is larger.
MAX_IMAGE_BYTES = 8 * MAX_IMAGE_PIXELS

# Errors that say nothing about a file: too many are open, a disk or its network fails, memory is short.
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM)

# What Pillow may open, whatever a file's name says: for an EPS file it would start Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")

# Minimum overlap of the crop with an object, for each sampler. None: the whole image. 0: any crop.
CROP_SAMPLERS = (None, 0.1, 0.3, 0.5, 0.7, 0.9, 0.0)
CROP_TRIES = 50

# Pixels that are distorted at a time: a usual photo at once, a huge one in bounded memory.
DISTORTED_AT_ONCE = 2**18


def read_jpeg_header(data):
    """Size and number of colour components that a JPEG's frame header states.

    data: bytes of a file.
    Returns (width, height, components), or None if this is no JPEG with a frame header.
    """
    if data[:2] != b"\xff\xd8":
        return None
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height = int.from_bytes(data[position + 5 : position + 7], "big")
            width = int.from_bytes(data[position + 7 : position + 9], "big")
            return width, height, data[position + 9]
        elif marker == 0xDA:  # the scan begins: no frame header before it
            return None
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def pil_to_rgb(image):
    """An image of any Pillow mode as RGB: 16 bits become 8, transparency is laid on white.

    image: PIL image (grey, palette, RGBA, CMYK, 16-bit, ...); it is not changed.
    Returns a PIL image of mode "RGB".
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit grey; "I" holds the same values in 32 bits
        pixels = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def read_image(path):
    """Read an image file as it is stored: EXIF orientation is not applied, as in VOC's annotations.

    path: file of one of IMAGE_FORMATS, of any mode (grey, palette, CMYK, 16-bit, ...).
    Returns a (3, H, W) uint8 RGB tensor.
    Raises FileNotFoundError or ValueError, naming the file, if it is missing, unreadable, corrupt,
    truncated, or claims more than MAX_IMAGE_PIXELS; another OSError if the machine is at fault.
    """
    try:
        check_image_file(path)
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image; if it moved, make new data lists") from None
    except (OSError, ValueError) as error:  # a path may have characters that no file name can have
        if getattr(error, "errno", None) in MACHINE_ERRORS:
            raise OSError(error.errno, f"{path}: {error.strerror}") from None
        raise ValueError(f"{path!r}: the image file cannot be read ({error})") from None
    return decode_image(data, path)


def check_image_file(path):
    """Refuse what is no file, such as a pipe, which would be waited for, and files larger than any image."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no file")
    if status.st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"it has {status.st_size:,} bytes, more than the {MAX_IMAGE_BYTES:,} allowed")


def decode_image(data, name):
    """Decode the bytes of an image file: torchvision for usual JPEGs (twice as fast), Pillow for all others.

    data: bytes. name: what an error calls it.
    Returns a (3, H, W) uint8 RGB tensor. Raises ValueError as `read_image()` does.
    """
    header = read_jpeg_header(data)
    if header:
        check_image_size(header[0], header[1], name)
    if decode_jpeg and header and header[2] in (1, 3):  # CMYK: Pillow knows Adobe's inverted kind
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):  # unusual, or damaged: Pillow decides
            return decode_jpeg(encoded, mode=ImageReadMode.RGB)
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Exception as error:
        raise ValueError(describe_damage(name, error)) from None
    check_image_size(*image.size, name)
    try:
        return torch.from_numpy(np.array(pil_to_rgb(image))).permute(2, 0, 1)
    except Exception as error:
        raise ValueError(describe_damage(name, error)) from None


def describe_damage(name, error):
    """One line about an image that a decoder refused. Decoders raise all kinds of exceptions."""
    return f"{name}: not an image that can be read, or a damaged one ({' '.join(str(error).split())[:200]})"


def check_image_size(width, height, name):
    """Refuse a header that would make the decoder allocate gigabytes (a decompression bomb)."""
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{name}: its header claims {width} x {height} pixels, more than the {MAX_IMAGE_PIXELS:,} "
            "allowed; save it smaller, or remove it"
        )


class Distortion(NamedTuple):
    """Photometric parameters of one training image, on a grid finer than 8-bit pixels can show.

    On it every step is exact in 16-bit integers. The defaults change nothing.
    """

    brightness: int = 0  # added to the RGB values, of 255
    contrast: int = 256  # factor of the RGB values, in 256ths
    saturation: int = 256  # factor of S in HSV, in 256ths
    hue: int = 0  # added to H in HSV, in 256ths of a sixth of the circle
    contrast_first: bool = True  # before saturation and hue, or after them


def sample_distortion(rng):
    """Draw photometric parameters, each active with probability 1/2.

    rng: numpy Generator.
    Returns a Distortion: brightness up to 32 levels, contrast and saturation in [0.5, 1.5], hue up to 36
    degrees either way. (Caffe's im_transforms.cpp says 18, on OpenCV's hue circle of 180 steps.)
    """
    return Distortion(
        brightness=int(rng.integers(-32, 32, endpoint=True)) if rng.random() < 0.5 else 0,
        contrast=int(rng.integers(128, 384, endpoint=True)) if rng.random() < 0.5 else 256,
        saturation=int(rng.integers(128, 384, endpoint=True)) if rng.random() < 0.5 else 256,
        hue=int(rng.integers(-153, 153, endpoint=True)) if rng.random() < 0.5 else 0,
        contrast_first=rng.random() < 0.5,
    )


def distort(pixels, distortion):
    """Brightness, contrast, saturation and hue; the values are rounded and kept in [0, 255] after each.

    pixels: (h, w, 3) uint8 array, RGB; it is not changed. distortion: a Distortion.
    Returns an (h, w, 3) uint8 array: pixels itself if there is nothing to change.
    """
    rows = max(1, DISTORTED_AT_ONCE // pixels.shape[1])
    bands = [distort_band(pixels[first : first + rows], distortion) for first in range(0, len(pixels), rows)]
    return bands[0] if len(bands) == 1 else np.concatenate(bands)


def distort_band(pixels, distortion):
    """`distort()` for a band of rows, with temporary arrays of a few times its size."""
    pixels = add_brightness(pixels, distortion.brightness)
    if distortion.contrast_first:
        pixels = scale_contrast(pixels, distortion.contrast)
    pixels = distort_color(pixels, distortion.saturation, distortion.hue)
    if not distortion.contrast_first:
        pixels = scale_contrast(pixels, distortion.contrast)
    return pixels


def scale(values, factor):
    """round(values * factor / 256), for uint8 values and a factor (int, or array) in [0, 256]."""
    products = values.astype(np.uint16)
    products *= np.uint16(factor) if isinstance(factor, int) else factor
    products += np.uint16(127)
    products >>= np.uint16(8)
    return products.astype(np.uint8)


def add_brightness(pixels, brightness):
    """Add a number of levels, of either sign, to uint8 values, kept in [0, 255]."""
    if brightness > 0:
        pixels = np.clip(pixels, np.uint8(0), np.uint8(255 - brightness))
        pixels += np.uint8(brightness)
    elif brightness < 0:
        pixels = np.clip(pixels, np.uint8(-brightness), np.uint8(255))
        pixels -= np.uint8(-brightness)
    return pixels


def scale_contrast(pixels, contrast):
    """Multiply uint8 values by contrast / 256, in [0, 2], kept in [0, 255]."""
    if contrast > 256:
        added = scale(pixels, contrast - 256)
        np.minimum(added, ~pixels, out=added)  # ~pixels = 255 - pixels: up to the end of the range
        added += pixels
        return added
    return scale(pixels, contrast) if contrast < 256 else pixels


def distort_color(pixels, saturation, hue):
    """Multiply S and turn H of HSV without leaving RGB.

    In HSV's terms, each channel lies between the lowest of the three and V, the highest, and every pixel's
    chroma is C = V - lowest. As the hue turns by a sixth of the circle, one channel moves from one end to the
    other at a steady pace: up while the next channel (in the direction of the turn) is lowest, down while
    that one is highest. So for a turn by the fraction d of a sixth, with the next channel n of channel x:

        x + min(max(d C - (n - lowest), 0), V - x) - min(max(d C - (V - n), 0), x - lowest)

    Saturation multiplies each channel's distance below V by its factor, but by no more than V / C, where the
    lowest channel reaches 0 (S ends at 1). The two commute; in this order each is rounded only once.

    pixels: (h, w, 3) uint8 array, RGB. saturation: factor of S, in 256ths, in [0, 512]. hue: added to H, in
    256ths of a sixth of the circle, in [-256, 256].
    Returns an (h, w, 3) uint8 array.
    """
    if saturation == 256 and hue == 0:
        return pixels
    height, width = pixels.shape[:2]
    # One plane for each channel; and the last one's next, R, as a fourth. For a negative turn, where the next
    # is the one before, B G R B.
    order = (2, 1, 0) if hue < 0 else (0, 1, 2)
    planes = np.empty((4, height, width), dtype=np.uint8)
    for plane, channel in zip(planes, order, strict=False):
        plane[:] = pixels[:, :, channel]
    planes[3] = planes[0]
    planes = planes.reshape(4, -1)  # (4, n), n = height * width
    highest = np.maximum(np.maximum(planes[0], planes[1]), planes[2])  # (n,), V
    lowest = np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    chroma = highest - lowest

    below = highest - planes  # distances below V
    if hue != 0:
        above = np.subtract(planes, lowest, out=planes)
        turn = scale(chroma, abs(hue))
        rise = np.maximum(above[1:], turn) - above[1:]  # max(turn - above, 0): uint8 cannot go below 0
        fall = np.maximum(below[1:], turn) - below[1:]
        np.minimum(rise, below[:3], out=rise)
        np.minimum(fall, above[:3], out=fall)
        below[:3] -= rise
        below[:3] += fall
    below = below[:3]
    if saturation < 256:
        below -= scale(below, 256 - saturation)
    elif saturation > 256:
        # V / C - 1 = lowest / C. (np.clip with scalars of the array's type is much faster than np.maximum.)
        gain = lowest.astype(np.float32)
        gain /= np.clip(chroma, np.uint8(1), np.uint8(255)).astype(np.float32)
        np.clip(gain, np.float32(0), np.float32(saturation / 256 - 1), out=gain)
        gain *= np.float32(256)
        below += scale(below, gain.astype(np.uint16))

    planes = np.subtract(highest, below, out=below).reshape(3, height, width)
    result = np.empty((height, width, 3), dtype=np.uint8)
    for plane, channel in zip(planes, order, strict=True):
        result[:, :, channel] = plane
    return result


def sample_zoom_out_box(width, height, rng):
    """With probability 1/2 a canvas 1 to 4 times as wide and high as the image, which lies anywhere on it.

    width, height: of the image, in pixels. rng: numpy Generator.
    Returns the canvas as (x_min, y_min, x_max, y_max), integer pixels of the image: (0, 0, width, height)
    without zoom, else around it. (Caffe: ExpandImage.)
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

    Taking the first success of the samplers in a random order is the same choice, and tries fewer boxes.

    canvas: (x_min, y_min, x_max, y_max) of the zoomed-out image, integer pixels of the image.
    image_box: the part of the canvas that shows the image, in the same form.
    boxes: (n, 4) array, boundary form, pixels. rng: numpy Generator.
    Returns the crop as (x_min, y_min, x_max, y_max), integer pixels, inside the canvas; it holds the centre
    of an object if there is one, and some of the image if there is none.
    """
    for sampler in rng.permutation(len(CROP_SAMPLERS)):
        min_overlap = CROP_SAMPLERS[sampler]
        if min_overlap is None:
            break
        mins, maxs = sample_boxes_inside(canvas, CROP_TRIES, rng)  # (2, tries), x and y
        if len(boxes):
            success = find_centers_inside(mins, maxs, boxes).any(axis=1)
            if min_overlap > 0:
                success &= (find_overlaps(mins, maxs, boxes) >= min_overlap).any(axis=1)
        else:
            image_box = np.array(image_box)
            success = ((mins < image_box[2:, None]) & (maxs > image_box[:2, None])).all(axis=0)
        first = success.argmax()
        if success[first]:
            return tuple(int(side) for side in (*mins[:, first], *maxs[:, first]))
    return canvas


def sample_boxes_inside(canvas, n, rng):
    """Boxes of scale s in [0.3, 1] and aspect ratio r in [max(1/2, s^2), min(2, 1/s^2)], anywhere inside.

    canvas: (x_min, y_min, x_max, y_max), integer pixels. n: how many. rng: numpy Generator.
    Returns two (2, n) float arrays, x and y of the lower and of the upper corners, in whole pixels: the width
    is s sqrt(r), the height s / sqrt(r) of the canvas'. (Caffe: SampleBBox, sampler.cpp.)
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
    return mins, mins + sizes


def find_centers_inside(mins, maxs, boxes):
    """Which boxes have their centre in which crops.

    mins, maxs: (2, m) arrays, x and y of the crops' corners, pixels. boxes: (n, 4) array, boundary form,
    pixels. Returns an (m, n) bool array.
    """
    centers = ((boxes[:, :2] + boxes[:, 2:]) / 2).T[:, None]  # (2, 1, n)
    inside = (mins[:, :, None] <= centers) & (centers < maxs[:, :, None])  # (2, m, n)
    return inside[0] & inside[1]


def find_overlaps(mins, maxs, boxes):
    """`find_jaccard_overlap()` in numpy, for crops and boxes as in `find_centers_inside()`: an (m, n) array."""
    corners = boxes.T[:, None]  # (4, 1, n)
    sides = np.minimum(maxs[:, :, None], corners[2:]) - np.maximum(mins[:, :, None], corners[:2])  # (2, m, n)
    sides = np.maximum(sides, 0)
    intersections = sides[0] * sides[1]
    crop_sides, box_sides = maxs - mins, corners[2:] - corners[:2]
    areas = (crop_sides[0] * crop_sides[1])[:, None] + box_sides[0] * box_sides[1]  # (m, n)
    return intersections / (areas - intersections)


def find_place(crop, source, size=300):
    """Where the surviving pixels come to lie on the 300 x 300 image, in whole pixels.

    crop: (x_min, y_min, x_max, y_max), which becomes the whole 300 x 300 image. source: its part that shows
    the photo, of at least one pixel. Both in integer pixels of the photo.
    Returns (x_min, y_min, x_max, y_max), integers in [0, 300], at least one pixel wide and high.
    """
    place = [0, 0, 0, 0]
    for axis in range(2):
        scale = size / (crop[axis + 2] - crop[axis])
        low = min(round((source[axis] - crop[axis]) * scale), size - 1)
        high = max(round((source[axis + 2] - crop[axis]) * scale), low + 1)
        place[axis], place[axis + 2] = low, high
    return tuple(place)


def resize(pixels, width, height, antialias=True):
    """Bilinear and antialiased resize of an (h, w, 3) uint8 array; returns a (height, width, 3) array."""
    images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # (1, 3, h, w), channels last: the fast way
    images = F.interpolate(images, (height, width), mode="bilinear", antialias=antialias)
    return images[0].permute(1, 2, 0).numpy()


def prepare(images, model):
    """Images as the input of a model: resized as its weights want it, normalised, on its device.

    images: list of N PIL images, or (3, H, W) uint8 tensors, of any sizes.
    Returns an (N, 3, S, S) float32 tensor.
    """
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.uint8)
    size, antialias = getattr(model, "input_size", 300), getattr(model, "antialias", True)
    pixels = [transform(image, *nothing, "TEST", None, size, antialias)[0] for image in images]
    return model.normalize(torch.stack(pixels))


def check_augment(augment):
    """The names of augmentations as a tuple; raises ValueError for another."""
    unknown = [name for name in augment if name not in AUGMENTATIONS]
    if unknown or isinstance(augment, str):
        raise ValueError(f"augment is {augment!r}; it must be a tuple of names out of {AUGMENTATIONS}")
    return tuple(augment)


def transform(image, boxes, labels, difficulties, split, rng=None, size=300, antialias=True, augment=AUGMENTATIONS):
    """A photo and its objects as the network sees them: augmented for training, only resized for testing.

    Zoom, crop, flip and resize are one map: the crop is found first, then only its pixels are read, distorted
    and resized, once. A canvas is never built.

    image: (3, H, W) uint8 RGB tensor, or PIL image; it is not changed.
    boxes: (n, 4) float tensor, boundary form, pixels, inside the image; n may be 0.
    labels: (n,) int64 tensor. difficulties: (n,) tensor.
    split: "TRAIN" or "TEST". rng: numpy Generator for "TRAIN"; None draws a new one.
    Returns the image as a (3, 300, 300) uint8 tensor, boxes as an (m, 4) float32 tensor, boundary form,
    fractional, in [0, 1], of positive area, and their labels and difficulties; m <= n.
    Raises ValueError for another split.
    """
    if split not in ("TRAIN", "TEST"):
        raise ValueError(f'split is {split!r}; it must be "TRAIN" or "TEST"')
    if isinstance(image, Image.Image):
        image = torch.from_numpy(np.array(pil_to_rgb(image))).permute(2, 0, 1)
    pixels = image.permute(1, 2, 0).numpy()  # (H, W, 3)
    keep_freed_memory()
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    height, width = pixels.shape[:2]
    crop = 0, 0, width, height
    distortion, flip = Distortion(), False
    if split == "TRAIN":
        rng = np.random.default_rng() if rng is None else rng
        if "distort" in augment:
            distortion = sample_distortion(rng)
        canvas = sample_zoom_out_box(width, height, rng) if "zoom_out" in augment else crop
        crop = sample_crop_box(canvas, crop, boxes, rng) if "crop" in augment else canvas
        flip = "flip" in augment and rng.random() < 0.5

    source = max(crop[0], 0), max(crop[1], 0), min(crop[2], width), min(crop[3], height)
    place = find_place(crop, source, size)
    pixels = distort(pixels[source[1] : source[3], source[0] : source[2]], distortion)
    pixels = resize(pixels, place[2] - place[0], place[3] - place[1], antialias)
    if place != (0, 0, size, size):
        surviving = pixels
        pixels = blank_image(size)
        pixels[place[1] : place[3], place[0] : place[2]] = surviving
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # (1, 3, 300, 300)
    image = (image.flip(3) if flip else image)[0]
    boxes, keep = map_boxes(boxes, crop, source, place, flip, size)
    return image, boxes, labels[keep], difficulties[keep]


@functools.cache
def keep_freed_memory():
    """Let glibc's malloc keep what this process frees, so that the next image finds its memory in place.

    By default it returns every larger block to the system at once, and each image would then wait for
    hundreds of pages to be mapped and cleared: a third of the time. Freeing one block of 16 MB, never
    touched, raises the size from which on it does so (M_MMAP_THRESHOLD in mallopt's manual page); other
    allocators take no notice.
    """
    np.empty(2**24, dtype=np.uint8)


def blank_image(size):
    """A (300, 300, 3) uint8 array of ImageNet's mean colour."""
    pixels = np.empty((size, size * 3), dtype=np.uint8)
    pixels[:] = np.tile(np.array(FILLER, dtype=np.uint8), size)  # row by row: 50 times as fast
    return pixels.reshape(size, size, 3)


def map_boxes(boxes, crop, source, place, flip, size=300):
    """Boxes of a photo on the image that shows a part of it.

    boxes: (n, 4) array, boundary form, pixels. crop, source, place: as in `find_place()`.
    flip: whether the image is mirrored afterwards.
    Returns (m, 4) float32 boxes, boundary form, fractional, clipped to the surviving part, and the (m,)
    int64 indices of those kept: the ones whose centre is in the crop.
    """
    crop, source, place = np.array([crop, source, place], dtype=np.float64).reshape(3, 2, 2)  # min and max of each
    keep = find_centers_inside(crop[0, :, None], crop[1, :, None], boxes)[0].nonzero()[0]
    boxes = boxes[keep].reshape(-1, 2, 2)  # (m, min and max, x and y)
    boxes = np.minimum(np.maximum(boxes, source[0]), source[1])
    scale_xy = (place[1] - place[0]) / (source[1] - source[0])
    boxes = (place[0] + (boxes - source[0]) * scale_xy) / size
    if flip:
        boxes[:, :, 0] = 1 - boxes[:, ::-1, 0]
    boxes = boxes.reshape(-1, 4)
    boxes = boxes.astype(np.float32)
    # The rounding can leave a box of less than a millionth of the image without area.
    lasting = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    if not lasting.all():
        boxes, keep = boxes[lasting], keep[lasting]
    return torch.from_numpy(boxes), torch.from_numpy(keep)
