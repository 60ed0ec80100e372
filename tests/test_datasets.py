"""The data set and its batches: items, order, resume, workers, and lists or images that are at fault."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import datasets
from datasets import AUGMENTATIONS, FILLER, NO_OBJECTS, PascalVOCDataset, TrainingBatches, read_image

LABEL_MAP = {"background": 0, "cat": 1, "dog": 2}
N_IMAGES = 7
BLANK = torch.tensor(FILLER, dtype=torch.uint8)[:, None, None]


def make_entries():
    """What create_data_lists.py would write about seven images of 60 x 40 pixels; image 3 has no objects."""
    entries = []
    for index in range(N_IMAGES):
        n_objects = 0 if index == 3 else 1 + index % 3
        boxes = [[2 * i, 1, 20 + 10 * i + 0.5, 30 + index] for i in range(n_objects)]
        labels = [1 + (index + i) % 2 for i in range(n_objects)]
        entries.append({"boxes": boxes, "labels": labels, "difficulties": [0, 1, 0][:n_objects], "size": [60, 40]})
    return entries


@pytest.fixture
def folder(tmp_path):
    """A data folder with lists for TRAIN and TEST, of the same seven images."""
    paths = [str(tmp_path / f"image {index}.jpg") for index in range(N_IMAGES)]
    for path in paths:
        Image.effect_noise((60, 40), 50).save(path)
    for split in ("TRAIN", "TEST"):
        (tmp_path / f"{split}_images.json").write_text(json.dumps(paths))
        (tmp_path / f"{split}_objects.json").write_text(json.dumps(make_entries()))
    (tmp_path / "label_map.json").write_text(json.dumps(LABEL_MAP))
    return tmp_path


def same(item_1, item_2):
    """Whether two items, or two batches, are equal to the bit."""
    if isinstance(item_1, torch.Tensor):
        return item_1.dtype == item_2.dtype and torch.equal(item_1, item_2)
    return len(item_1) == len(item_2) and all(same(a, b) for a, b in zip(item_1, item_2, strict=True))


def load(dataset, batches, n_workers):
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=PascalVOCDataset.collate_fn, num_workers=n_workers)
    return list(loader)


def test_items_and_batches_hold_objects_in_fractions_and_difficult_ones_if_asked_for(folder):
    dataset = PascalVOCDataset(folder, "TEST", keep_difficult=True)
    assert len(dataset) == N_IMAGES and dataset.label_map == LABEL_MAP and dataset.image_names()[6] == "image 6"
    # Workers share arrays, but copy the page of each Python object that they look at.
    held = dataset.image_paths, dataset.sizes, dataset.starts, dataset.boxes_xy_pixels, dataset.labels
    assert all(isinstance(array, (np.ndarray, torch.Tensor)) and array.dtype != object for array in held)
    image, boxes, labels, difficulties = dataset[2]
    assert image.shape == (3, 300, 300) and image.dtype == torch.uint8
    assert boxes.dtype == torch.float32 and labels.dtype == torch.int64 and difficulties.dtype == torch.uint8
    expected = [[2 * i / 60, 1 / 40, (20.5 + 10 * i) / 60, 32 / 40] for i in range(3)]
    torch.testing.assert_close(boxes, torch.tensor(expected))
    assert labels.tolist() == [1, 2, 1] and difficulties.tolist() == [0, 1, 0]
    assert [part.shape for part in dataset[3]] == [(3, 300, 300), (0, 4), (0,), (0,)]
    assert dataset[4][2].tolist() == [1, 2]  # the image after the empty one still has its own objects
    images, *lists = dataset.collate_fn([dataset[3], dataset[2]])
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert same(list(zip(images, *lists, strict=True)), [dataset[3], dataset[2]])
    dataset = PascalVOCDataset(folder, "TEST")  # without the difficult objects
    assert [dataset[index][2].tolist() for index in range(N_IMAGES)] == [[1], [2], [1, 1], [], [1], [2, 2], [1]]
    assert all((item[3] == 0).all() for item in dataset)
    torch.testing.assert_close(dataset[2][1][:, 0], torch.tensor([0, 4 / 60]))


def test_augmentation_depends_on_seed_epoch_and_index_alone(folder):
    dataset = PascalVOCDataset(folder, "TRAIN", keep_difficult=True, seed=5)
    first = dataset[1, 4]
    assert not any(same(dataset[key], first) for key in ((0, 0), (9, 4), (0, 6)))
    assert same(dataset[4], dataset[0, 4]) and same(dataset[-3], dataset[4]) and same(dataset[-N_IMAGES], dataset[0])
    torch.manual_seed(0)
    np.random.seed(0)
    assert same(dataset[1, 4], first) and same(dataset[np.int64(1), np.int64(4)], first)
    assert same(pickle.loads(pickle.dumps(dataset))[1, 4], first)  # as another process gets it
    assert same(PascalVOCDataset(folder, "TRAIN", keep_difficult=True, seed=5)[1, 4], first)
    assert not same(PascalVOCDataset(folder, "TRAIN", keep_difficult=True, seed=6)[1, 4], first)
    # Augmentation can be chosen for either split.
    plain = PascalVOCDataset(folder, "TEST")
    assert same(PascalVOCDataset(folder, "TRAIN", augment=())[1, 2], plain[2]) and same(plain[5, 2], plain[2])
    augmented = PascalVOCDataset(folder, "TEST", augment=AUGMENTATIONS)
    assert same(augmented[1, 2], PascalVOCDataset(folder, "TRAIN")[1, 2])


def test_items_of_another_size(folder):
    (folder / "image 6.jpg").write_bytes(b"no image")
    dataset = PascalVOCDataset(folder, "TEST", size=32, antialias=False, skip_corrupt=True)
    images, boxes, *_ = dataset.collate_fn([dataset[index] for index in (0, 1, 6)])
    assert images.shape == (3, 3, 32, 32) and len(boxes[2]) == 0 and (images[2] == BLANK).all()
    dataset[6][0].zero_()  # an item is not shared
    assert (dataset[6][0] == BLANK).all()
    image = read_image(folder / "image 1.jpg")
    assert torch.equal(images[1], datasets.transform(image, *NO_OBJECTS, "TEST", size=32, antialias=False)[0])


def test_every_epoch_is_a_permutation_and_batches_straddle_epochs():
    batches = list(TrainingBatches(n_images=7, batch_size=3, seed=0, first_iteration=0, last_iteration=14))
    keys = np.array(batches).reshape(6, 7, 2)  # no batch is shorter
    assert (keys[:, :, 0] == np.arange(6)[:, None]).all() and (np.sort(keys[:, :, 1]) == np.arange(7)).all()
    assert len(np.unique(keys[:, :, 1], axis=0)) > 1
    assert all(type(number) is int for batch in batches for key in batch for number in key)


def test_seeds_shuffle_as_they_always_have():
    batches = list(TrainingBatches(n_images=7, batch_size=5, seed=3, first_iteration=1, last_iteration=3))
    assert batches == [[(0, 3), (0, 2), (1, 0), (1, 5), (1, 4)], [(1, 2), (1, 1), (1, 3), (1, 6), (2, 1)]]
    # Another order than the seed (3, 0), or (3, 0, 0), with which image 0 is augmented, would give.
    augmenting = np.random.default_rng((3, 0, 0)).permutation(100)
    assert not np.array_equal(datasets.shuffle(100, 3, 0), augmenting)
    assert np.array_equal(np.random.default_rng((3, 0)).permutation(100), augmenting)


def test_a_resumed_run_takes_the_batches_of_the_unbroken_one():
    unbroken = list(TrainingBatches(23, 8, 1, 0, 40))
    for start in (0, 1, 2, 17, 39, 40):
        assert list(TrainingBatches(23, 8, 1, start, 40)) == unbroken[start:]
    assert list(TrainingBatches(23, 8, 2, 0, 40)) != unbroken
    batches = TrainingBatches(23, 8, 1, 5, 40)
    assert [batches.batch(iteration) for iteration in (39, 5, 0)] == [unbroken[i] for i in (39, 5, 0)]
    assert len(batches) == 35 and list(batches) == unbroken[5:]  # asking for a batch changes nothing


def test_late_batches_cost_no_more_than_early_ones_and_may_be_larger_than_the_data_set(monkeypatch):
    (batch,) = TrainingBatches(3, 8, 0, 0, 1)
    assert [epoch for epoch, _ in batch] == [0, 0, 0, 1, 1, 1, 2, 2]
    make_rng, computed = np.random.default_rng, []
    monkeypatch.setattr(np.random, "default_rng", lambda seed: computed.append(seed) or make_rng(seed))
    assert len(list(TrainingBatches(100, 32, 0, 10**9, 10**9 + 4))) == 4
    assert len(computed) <= 3  # one permutation for each epoch that the four batches touch


@pytest.mark.parametrize(("batch_size", "world_size"), [(8, 2), (8, 3), (5, 5), (8, 1)])
def test_ranks_share_each_batch(batch_size, world_size):
    shares = [TrainingBatches(23, batch_size, 0, 3, 12, rank, world_size) for rank in range(world_size)]
    for batch, *parts in zip(TrainingBatches(23, batch_size, 0, 3, 12), *shares, strict=True):
        assert sorted(key for part in parts for key in part) == sorted(batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1 and min(map(len, parts)) >= 1


def test_batches_are_the_same_for_any_number_of_workers_and_after_a_resume(folder):
    dataset = PascalVOCDataset(folder, "TRAIN", keep_difficult=True, seed=3)
    expected = load(dataset, TrainingBatches(len(dataset), 4, 3, 0, 6), 0)
    assert len(expected) == 6
    assert same(load(dataset, TrainingBatches(len(dataset), 4, 3, 0, 6), 1), expected)
    assert same(load(dataset, TrainingBatches(len(dataset), 4, 3, 2, 6), 2), expected[2:])


@pytest.mark.parametrize("kind, arguments, message", [
    (TrainingBatches, (0, 8, 0, 0, 1), "no image"), (TrainingBatches, (10, 8, 0, 0, 1, 2, 2), "rank 2"),
    *((TrainingBatches, arguments, "batch_size") for arguments in ((10, 2, 0, 0, 1, 0, 3), (10, 0, 0, 0, 1))),
    (PascalVOCDataset, ("", "val"), "'val'"), (PascalVOCDataset, ("", "TRAIN", True, -2), "seed is -2"),
    *((PascalVOCDataset, ("", "TRAIN", True, 0, False, names), "augment is") for names in (("blur",), "flip", True)),
])  # fmt: skip
def test_impossible_arguments_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(*arguments)


@pytest.mark.parametrize("name, contents", [
    *((f"{name}.json", contents) for name in ("TRAIN_images", "TRAIN_objects", "label_map")
      for contents in (None, b"", b"[1, 2", b"3", b'{"a": 1}', b"[" * 100_000, b"\xff\xfe\x00")),
    ("label_map.json", b'{"cat": 1, "dog": 2}'),
    *(("TRAIN_objects.json", json.dumps(entries).encode())
      for entries in (make_entries()[1:], [*make_entries()[1:], None], [*make_entries()[1:], {}], make_entries() * 2)),
    ("TRAIN_images.json", json.dumps(list(range(N_IMAGES))).encode()),
])  # fmt: skip
def test_missing_and_malformed_lists_are_named(folder, name, contents):
    (folder / name).unlink()
    if contents is not None:
        (folder / name).write_bytes(contents)
    with pytest.raises(FileNotFoundError if contents is None else ValueError, match=rf"{name}.*create_data_lists\.py"):
        PascalVOCDataset(folder, "TRAIN")


NAN, INFINITY = float("nan"), float("inf")
NOT_BOXES = [
    [NAN, 1, 20, 30], [1, NAN, 20, 30], [1, 1, NAN, 30], [1, 1, 20, NAN], [1, 1, INFINITY, 30], [-INFINITY, 1, 20, 30],
    [20, 1, 20, 30], [1, 30, 20, 30], [20, 1, 10, 30], [-0.5, 1, 20, 30], [1, -1, 20, 30], [1, 1, 60.5, 30],
    [1, 1, 20, 41], [20, 1, 20.0000001, 30], [1, 1, 20], [1, 1, 20, 30, 40], [1, 1, 10**400, 30], "box", None, 7,
]  # fmt: skip
FAULTS = {
    "boxes": [*([box] for box in NOT_BOXES), [], None, 7],
    "labels": [[0], [3], [1.5], ["cat"], [NAN], [1, 1], None], "difficulties": [[2], [None], [], "easy"],
    "size": [[0, 40], [60], None, [60.5, 40], [1, 70_000], [9000, 9000], [NAN, 40]],
    "areas": [[NAN], [1, 2], ["large"]],
}  # fmt: skip


@pytest.mark.parametrize("part, value", [(part, value) for part, values in FAULTS.items() for value in values])
def test_faulty_objects_are_refused_and_their_image_named(folder, part, value):
    entries = [{**entry, "areas": [9] * len(entry["labels"])} for entry in make_entries()]
    sound = {"boxes": [[1, 1, 20, 30]], "labels": [1], "difficulties": [0], "size": [60, 40], "areas": [9]}
    entries[4] = {**sound, part: value}
    (folder / "TRAIN_objects.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"TRAIN_objects\.json.*image 4\.jpg.*create_data_lists\.py") as caught:
        PascalVOCDataset(folder, "TRAIN")
    assert part in str(caught.value) and len(str(caught.value)) < 800


def test_ids_and_areas_of_coco_files_follow_their_objects(folder):
    entries = make_entries()
    for index, entry in enumerate(entries):
        entry["image_id"], entry["areas"] = f"id {index}", [10 * index + i for i in range(len(entry["labels"]))]
    (folder / "TEST_objects.json").write_text(json.dumps(entries))
    del entries[5]["image_id"], entries[5]["areas"]  # lists of two sources
    (folder / "TRAIN_objects.json").write_text(json.dumps(entries))
    for keep_difficult, expected in ((True, [20, 21, 22]), (False, [20, 22])):  # object 1 is difficult
        dataset = PascalVOCDataset(folder, "TEST", keep_difficult)
        assert dataset.image_ids == [f"id {index}" for index in range(N_IMAGES)]
        assert dataset.areas[dataset.starts[2] : dataset.starts[3]].tolist() == expected
        mixed = PascalVOCDataset(folder, "TRAIN", keep_difficult)
        assert mixed.image_ids is None and mixed.areas is None


def test_boxes_at_the_image_edges_are_accepted_and_so_is_an_empty_split(folder):
    entries = make_entries()
    entries[0]["boxes"] = [[0, 0, 60, 40]]
    entries[1]["boxes"][0] = [59, 39, 60, 40]
    (folder / "TEST_objects.json").write_text(json.dumps(entries))
    boxes = torch.cat([PascalVOCDataset(folder, "TEST")[index][1] for index in (0, 1)])
    torch.testing.assert_close(boxes, torch.tensor([[0, 0, 1, 1], [59 / 60, 39 / 40, 1, 1]]))
    for name in ("TEST_images.json", "TEST_objects.json"):
        (folder / name).write_text("[]")
    assert len(PascalVOCDataset(folder, "TEST")) == 0


def test_the_split_for_validation_is_read_like_the_others_and_its_missing_lists_are_named(folder):
    with pytest.raises(FileNotFoundError, match=r"VAL_images\.json.*create_data_lists\.py.*--val_fraction"):
        PascalVOCDataset(folder, "VAL")
    for name in ("images", "objects"):
        (folder / f"VAL_{name}.json").write_bytes((folder / f"TEST_{name}.json").read_bytes())
    validation, test = PascalVOCDataset(folder, "VAL"), PascalVOCDataset(folder, "TEST")
    assert len(validation) == N_IMAGES and all(same(validation[i], test[i]) for i in range(N_IMAGES))
    (folder / "VAL_objects.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"VAL_objects\.json.*--val_data"):
        PascalVOCDataset(folder, "VAL")


def test_images_of_another_size_are_errors_even_where_corrupt_ones_are_skipped(folder):
    Image.new("RGB", (40, 60)).save(folder / "image 5.jpg")
    dataset = PascalVOCDataset(folder, "TRAIN", skip_corrupt=True)
    errors = [(5, ValueError, r"image 5\.jpg is 40 x 60 pixels.*60 x 40")]
    errors += [(index, IndexError, "TRAIN has 7 images") for index in (N_IMAGES, -N_IMAGES - 1)]
    for index, error, message in errors:
        with pytest.raises(error, match=message):
            dataset[index]


@pytest.mark.parametrize("n_workers", [0, 2])
def test_damaged_and_missing_images_are_skipped_and_listed_on_request(folder, n_workers):
    dataset, sound = (PascalVOCDataset(folder, "TRAIN", skip_corrupt=True) for _ in range(2))
    batches = TrainingBatches(N_IMAGES, 7, 0, 0, 2)
    expected = load(sound, batches, n_workers)
    (folder / "image 2.jpg").write_bytes(b"no image")
    (folder / "image 5.jpg").unlink()
    strict = PascalVOCDataset(folder, "TRAIN")
    for index, error in ((2, ValueError), (5, FileNotFoundError)):
        with pytest.raises(error, match=rf"image {index}\.jpg.*--skip_corrupt=True"):
            strict[index]
    found = load(dataset, batches, n_workers)
    assert sound.skipped_images() == []
    assert dataset.skipped_images() == [str(folder / "image 2.jpg"), str(folder / "image 5.jpg")]
    for keys, batch, sound_batch in zip(batches, found, expected, strict=True):
        for i, (_, index) in enumerate(keys):
            item, sound_item = ([part[i] for part in parts] for parts in (batch, sound_batch))
            assert same(item, (BLANK.expand(3, 300, 300), *NO_OBJECTS) if index in (2, 5) else sound_item)


@pytest.mark.parametrize("turn", {1: None, 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}.items())
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_photos_with_an_orientation_are_read_as_stored_but_tiff_files_as_shown(tmp_path, suffix, turn):
    """(That boxes stay on their pixels is tested in tests/test_create_data_lists.py.)"""
    image, exif, (orientation, name) = Image.new("RGB", (64, 40)), Image.Exif(), turn
    image.paste("white", (16, 8, 24, 24))
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    image.save(path, exif=exif, quality=100)
    if suffix == "tif":
        image, orientation = image.transpose(Image.Transpose[name]) if name else image, 1
    assert datasets.stored_size_and_orientation(path) == (image.size, orientation)
    assert np.abs(read_image(path).permute(1, 2, 0).numpy() - np.asarray(image).astype(int)).max() < 9


@pytest.mark.parametrize("orientation", [0, 9])
def test_an_orientation_that_there_is_not_counts_as_none(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (64, 40)).save(tmp_path / "photo.jpg", exif=exif)
    assert datasets.stored_size_and_orientation(tmp_path / "photo.jpg") == ((64, 40), 1)
