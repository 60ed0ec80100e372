"""The data set, the batches that it is read in, and what makes a run repeatable.

    dataset = PascalVOCDataset("data", split="TRAIN", keep_difficult=True)
    batches = TrainingBatches(len(dataset), batch_size=32, seed=0, first_iteration=0, last_iteration=120000)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=dataset.collate_fn, num_workers=4)

Reads the lists that create_data_lists.py writes: {TRAIN,TEST}_images.json, {TRAIN,TEST}_objects.json and
label_map.json. Which images make up a batch depends on (seed, iteration) alone, and how an image is augmented
on (seed, epoch, index) alone: never on the number of workers, nor on what was read before.

Shapes in comments: N images in a batch, M objects in an image.
"""

import json
import operator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from utils import MAX_IMAGE_PIXELS, blank_image, load_label_map, read_image, transform


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

    def __init__(self, data_folder, split, keep_difficult=False, seed=0, skip_corrupt=False, augment=None):
        if split not in ("TRAIN", "TEST"):
            raise ValueError(f'split is {split!r}; it must be "TRAIN" or "TEST"')
        self.data_folder = Path(data_folder)
        self.split = split
        self.keep_difficult = keep_difficult
        self.seed = check_seed(seed)
        self.skip_corrupt = skip_corrupt
        self.augment = split == "TRAIN" if augment is None else augment

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
        if not keep_difficult:
            kept_before = np.concatenate([[0], np.cumsum(difficulties == 0)])
            starts = kept_before[starts]
            boxes, labels, difficulties = (x[difficulties == 0] for x in (boxes, labels, difficulties))
        self.starts = starts  # objects of image i: starts[i] to starts[i + 1]
        self.boxes_xy_pixels = torch.from_numpy(boxes)
        self.labels = torch.from_numpy(labels)
        self.difficulties = torch.from_numpy(difficulties)
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
            return blank_item()
        self.check_size(path, image, index)
        rng = np.random.default_rng((self.seed, epoch, index)) if self.augment else None
        return transform(image, boxes, labels, difficulties, "TRAIN" if self.augment else "TEST", rng)

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


def blank_item():
    """What stands in for an image that cannot be decoded: ImageNet's mean colour, no objects."""
    image = torch.from_numpy(blank_image()).permute(2, 0, 1)  # (3, 300, 300)
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
