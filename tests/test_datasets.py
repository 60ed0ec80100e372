"""The data set and its batches: items, order, resume, workers, and lists or images that are at fault."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import datasets
from datasets import FILLER, PascalVOCDataset, TrainingBatches

LABEL_MAP = {"background": 0, "cat": 1, "dog": 2}
N_IMAGES = 7


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
    """A data folder with lists for both splits, of the same seven images."""
    rng = np.random.default_rng(0)
    paths = []
    for index in range(N_IMAGES):
        path = tmp_path / f"image {index}.jpg"
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
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
    """All batches, as a list."""
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=PascalVOCDataset.collate_fn, num_workers=n_workers)
    return list(loader)


# Items


def test_test_items_hold_all_objects_in_fractions(folder):
    dataset = PascalVOCDataset(folder, "TEST", keep_difficult=True)
    assert len(dataset) == N_IMAGES and dataset.label_map == LABEL_MAP
    image, boxes, labels, difficulties = dataset[2]
    assert image.shape == (3, 300, 300) and image.dtype == torch.uint8
    assert boxes.dtype == torch.float32 and labels.dtype == torch.int64 and difficulties.dtype == torch.uint8
    expected = [[2 * i / 60, 1 / 40, (20.5 + 10 * i) / 60, 32 / 40] for i in range(3)]
    torch.testing.assert_close(boxes, torch.tensor(expected))
    assert labels.tolist() == [1, 2, 1] and difficulties.tolist() == [0, 1, 0]
    image, boxes, labels, difficulties = dataset[3]
    assert boxes.shape == (0, 4) and labels.shape == difficulties.shape == (0,)
    assert dataset[4][2].tolist() == [1, 2]  # the image after the empty one still has its own objects


def test_difficult_objects_are_left_out_unless_asked_for(folder):
    dataset = PascalVOCDataset(folder, "TEST")
    assert [dataset[index][2].tolist() for index in range(N_IMAGES)] == [
        [1],
        [2],
        [1, 1],
        [],
        [1],
        [2, 2],
        [1],
    ]
    assert all((item[3] == 0).all() for item in dataset)
    torch.testing.assert_close(dataset[2][1][:, 0], torch.tensor([0, 4 / 60]))


def test_augmentation_depends_on_seed_epoch_and_index_alone(folder):
    dataset = PascalVOCDataset(folder, "TRAIN", keep_difficult=True, seed=5)
    first = dataset[1, 4]
    for key in ((0, 0), (9, 4), (0, 6)):
        assert not same(dataset[key], first)
    assert same(dataset[1, 4], first)
    assert same(dataset[np.int64(1), np.int64(4)], first)
    assert same(dataset[4], dataset[0, 4])
    assert same(dataset[-3], dataset[4])
    assert same(PascalVOCDataset(folder, "TRAIN", keep_difficult=True, seed=5)[1, 4], first)
    assert not same(PascalVOCDataset(folder, "TRAIN", keep_difficult=True, seed=6)[1, 4], first)
    torch.manual_seed(0)
    np.random.seed(0)
    assert same(dataset[1, 4], first)


def test_augment_can_be_chosen_for_either_split(folder):
    plain = PascalVOCDataset(folder, "TEST")
    assert same(PascalVOCDataset(folder, "TRAIN", augment=())[1, 2], plain[2])
    augmented = PascalVOCDataset(folder, "TEST", augment=datasets.AUGMENTATIONS)
    assert same(augmented[1, 2], PascalVOCDataset(folder, "TRAIN")[1, 2])
    assert same(plain[5, 2], plain[2])


def test_indices_end_where_the_data_set_ends(folder):
    dataset = PascalVOCDataset(folder, "TEST")
    for index in (N_IMAGES, -N_IMAGES - 1):
        with pytest.raises(IndexError):
            dataset[index]
    assert len(list(dataset)) == N_IMAGES


def test_collate_makes_a_batch(folder):
    dataset = PascalVOCDataset(folder, "TEST", keep_difficult=True)
    items = [dataset[index] for index in (3, 2)]
    images, boxes, labels, difficulties = PascalVOCDataset.collate_fn(items)
    assert images.shape == (2, 3, 300, 300) and images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert all(same(images[i], items[i][0]) for i in range(2))
    assert [len(x) for x in boxes] == [0, 3]
    assert same([boxes, labels, difficulties], [[item[part] for item in items] for part in (1, 2, 3)])


# Order


def test_every_epoch_is_a_permutation_and_batches_straddle_epochs():
    batches = list(TrainingBatches(n_images=7, batch_size=3, seed=0, first_iteration=0, last_iteration=14))
    assert [len(batch) for batch in batches] == [3] * 14
    keys = [key for batch in batches for key in batch]
    assert [epoch for epoch, _ in keys] == [position // 7 for position in range(42)]
    orders = [[index for _, index in keys[7 * epoch : 7 * epoch + 7]] for epoch in range(6)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert all(type(number) is int for key in keys for number in key)


def test_a_resumed_run_takes_the_batches_of_the_unbroken_one():
    unbroken = list(TrainingBatches(23, 8, 1, 0, 40))
    for start in (0, 1, 2, 17, 39):
        assert list(TrainingBatches(23, 8, 1, start, 40)) == unbroken[start:]
    assert list(TrainingBatches(23, 8, 1, 40, 40)) == []
    batches = TrainingBatches(23, 8, 1, 5, 40)
    assert len(batches) == 35
    assert [batches.batch(iteration) for iteration in (39, 5, 0)] == [unbroken[i] for i in (39, 5, 0)]
    assert list(batches) == unbroken[5:]  # asking for a batch changes nothing
    assert list(TrainingBatches(23, 8, 2, 0, 40)) != unbroken


def test_late_batches_cost_no_more_than_early_ones(monkeypatch):
    make_rng, computed = np.random.default_rng, []
    monkeypatch.setattr(np.random, "default_rng", lambda seed: computed.append(seed) or make_rng(seed))
    assert len(list(TrainingBatches(100, 32, 0, 10**9, 10**9 + 4))) == 4
    assert len(computed) <= 3  # one permutation for each epoch that the four batches touch


def test_a_batch_may_be_larger_than_the_data_set():
    (batch,) = TrainingBatches(3, 8, 0, 0, 1)
    assert [epoch for epoch, _ in batch] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(index for _, index in batch[3:6]) == [0, 1, 2]


@pytest.mark.parametrize(("batch_size", "world_size"), [(8, 2), (8, 3), (5, 5), (8, 1)])
def test_ranks_share_each_batch(batch_size, world_size):
    whole = list(TrainingBatches(23, batch_size, 0, 3, 12))
    shares = [list(TrainingBatches(23, batch_size, 0, 3, 12, rank, world_size)) for rank in range(world_size)]
    for iteration, batch in enumerate(whole):
        parts = [share[iteration] for share in shares]
        assert sorted(key for part in parts for key in part) == sorted(batch)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1 and min(map(len, parts)) >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 0, 0, 1), "no image"),
        ((10, 2, 0, 0, 1, 0, 3), "batch_size"),
        ((10, 0, 0, 0, 1), "batch_size"),
        ((10, 8, 0, 0, 1, 2, 2), "rank 2"),
        ((10, 8, -1, 0, 1), "seed is -1"),
    ],
)
def test_impossible_batches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingBatches(*arguments)


def test_batches_are_the_same_for_any_number_of_workers_and_after_a_resume(folder):
    dataset = PascalVOCDataset(folder, "TRAIN", keep_difficult=True, seed=3)
    expected = load(dataset, TrainingBatches(len(dataset), 4, 3, 0, 6), 0)
    assert len(expected) == 6
    assert same(load(dataset, TrainingBatches(len(dataset), 4, 3, 0, 6), 1), expected)
    assert same(load(dataset, TrainingBatches(len(dataset), 4, 3, 2, 6), 2), expected[2:])


# Faults


def test_another_split_or_seed_is_an_error(folder):
    with pytest.raises(ValueError, match="'val'"):
        PascalVOCDataset(folder, "val")
    with pytest.raises(ValueError, match="seed is -2"):
        PascalVOCDataset(folder, "TRAIN", seed=-2)


@pytest.mark.parametrize("name", ["TRAIN_images.json", "TRAIN_objects.json", "label_map.json"])
def test_missing_and_malformed_lists_are_named(folder, name):
    for contents in (None, "", "[1, 2", "3", '{"a": 1}', "[" * 100_000, b"\xff\xfe\x00"):
        (folder / name).unlink()
        if contents is None:
            with pytest.raises(FileNotFoundError, match=rf"{name}.*create_data_lists\.py"):
                PascalVOCDataset(folder, "TRAIN")
        (folder / name).write_bytes(contents.encode() if isinstance(contents, str) else contents or b"")
        with pytest.raises(ValueError, match=rf"{name}.*create_data_lists\.py"):
            PascalVOCDataset(folder, "TRAIN")
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=name):
        PascalVOCDataset(folder, "TRAIN")


@pytest.mark.parametrize(
    "label_map",
    [{}, {"background": 0}, {"background": 0, "cat": 2}, {"background": 0, "cat": "1"}, {"cat": 1, "dog": 2}],
)
def test_label_maps_without_background_or_with_gaps_are_refused(folder, label_map):
    (folder / "label_map.json").write_text(json.dumps(label_map))
    with pytest.raises(ValueError, match=r"label_map\.json"):
        PascalVOCDataset(folder, "TEST")


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        *(
            ("boxes", [box])
            for box in (
                [NAN, 1, 20, 30],
                [1, NAN, 20, 30],
                [1, 1, NAN, 30],
                [1, 1, 20, NAN],
                [1, 1, INFINITY, 30],
                [-INFINITY, 1, 20, 30],
                [20, 1, 20, 30],
                [1, 30, 20, 30],
                [20, 1, 10, 30],
                [-0.5, 1, 20, 30],
                [1, -1, 20, 30],
                [1, 1, 60.5, 30],
                [1, 1, 20, 41],
                [1, 1, 20],
                [1, 1, 20, 30, 40],
                "box",
                None,
                7,
            )
        ),
        ("boxes", []),
        ("boxes", None),
        ("labels", [0]),
        ("labels", [3]),
        ("labels", [1.5]),
        ("labels", ["cat"]),
        ("labels", [1, 1]),
        ("difficulties", [2]),
        ("difficulties", [None]),
        ("difficulties", []),
        ("size", [0, 40]),
        ("size", [60]),
        ("size", None),
    ],
)
def test_faulty_objects_are_refused_and_their_image_named(folder, part, value):
    entries = make_entries()
    entries[4] = {
        "boxes": [[1, 1, 20, 30]],
        "labels": [1],
        "difficulties": [0],
        "size": [60, 40],
        part: value,
    }
    (folder / "TRAIN_objects.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"TRAIN_objects\.json.*image 4\.jpg.*create_data_lists\.py"):
        PascalVOCDataset(folder, "TRAIN")


def test_lists_of_other_shapes_are_refused(folder):
    for entries in (make_entries()[:-1], [*make_entries()[:-1], None], [*make_entries()[:-1], {}]):
        (folder / "TRAIN_objects.json").write_text(json.dumps(entries))
        with pytest.raises(ValueError, match="TRAIN_objects"):
            PascalVOCDataset(folder, "TRAIN")
    (folder / "TRAIN_objects.json").write_text(json.dumps(make_entries()))
    (folder / "TRAIN_images.json").write_text(json.dumps(list(range(N_IMAGES))))
    with pytest.raises(ValueError, match="TRAIN_objects"):
        PascalVOCDataset(folder, "TRAIN")


def test_boxes_at_the_image_edges_are_accepted(folder):
    entries = make_entries()
    entries[0]["boxes"] = [[0, 0, 60, 40]]
    entries[1]["boxes"][0] = [59, 39, 60, 40]
    (folder / "TEST_objects.json").write_text(json.dumps(entries))
    dataset = PascalVOCDataset(folder, "TEST")
    assert dataset[0][1].tolist() == [[0, 0, 1, 1]]
    torch.testing.assert_close(dataset[1][1], torch.tensor([[59 / 60, 39 / 40, 1, 1]]))


def test_an_empty_split_is_a_data_set_without_images(folder):
    (folder / "TEST_images.json").write_text("[]")
    (folder / "TEST_objects.json").write_text("[]")
    assert len(PascalVOCDataset(folder, "TEST")) == 0


def test_an_image_of_another_size_than_in_the_list_is_named(folder):
    Image.new("RGB", (40, 60)).save(folder / "image 5.jpg")
    dataset = PascalVOCDataset(folder, "TRAIN", skip_corrupt=True)
    with pytest.raises(ValueError, match=r"image 5\.jpg is 40 x 60 pixels.*60 x 40"):
        dataset[5]


def test_a_corrupt_image_ends_the_run_with_its_name_from_any_worker(folder):
    path = folder / "image 2.jpg"
    path.write_bytes(path.read_bytes()[:500])
    dataset = PascalVOCDataset(folder, "TRAIN")
    for n_workers in (0, 2):
        with pytest.raises(ValueError, match=r"image 2\.jpg"):
            load(dataset, TrainingBatches(len(dataset), 2, 0, 0, 8), n_workers)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"image 2\.jpg"):
        load(dataset, TrainingBatches(len(dataset), 2, 0, 0, 8), 1)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_corrupt_images_are_skipped_and_listed_on_request(folder, n_workers):
    sound = PascalVOCDataset(folder, "TRAIN", skip_corrupt=True)
    expected = load(sound, TrainingBatches(N_IMAGES, 7, 0, 0, 2), n_workers)
    assert sound.skipped_images() == []
    for index in (2, 5):
        (folder / f"image {index}.jpg").write_bytes(b"no image")
    dataset = PascalVOCDataset(folder, "TRAIN", skip_corrupt=True)
    batches = TrainingBatches(N_IMAGES, 7, 0, 0, 2)
    found = load(dataset, batches, n_workers)
    assert dataset.skipped_images() == [str(folder / "image 2.jpg"), str(folder / "image 5.jpg")]
    for iteration, (batch, sound_batch) in enumerate(zip(found, expected, strict=True)):
        assert batch[0].shape == (7, 3, 300, 300)
        for position, (_, index) in enumerate(batches.batch(iteration)):
            item, sound_item = ([part[position] for part in b] for b in (batch, sound_batch))
            if index in (2, 5):
                assert (item[0] == torch.tensor(FILLER)[:, None, None]).all()
                assert item[1].shape == (0, 4) and item[2].shape == item[3].shape == (0,)
                assert [x.dtype for x in item] == [x.dtype for x in sound_item]
            else:
                assert same(item, sound_item)


def test_a_missing_image_is_an_error_even_where_corrupt_ones_are_skipped(folder):
    (folder / "image 0.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"image 0\.jpg"):
        PascalVOCDataset(folder, "TRAIN", skip_corrupt=True)[0]


def test_a_data_set_can_be_sent_to_another_process(folder):
    dataset = PascalVOCDataset(folder, "TRAIN", keep_difficult=True, seed=1)
    assert same(pickle.loads(pickle.dumps(dataset))[1, 2], dataset[1, 2])


def test_lists_as_long_as_vocs(folder):
    entries = make_entries() * 2365
    paths = [f"/data/VOCdevkit/VOC2012/JPEGImages/2008_{index:06}.jpg" for index in range(len(entries))]
    (folder / "TRAIN_objects.json").write_text(json.dumps(entries))
    (folder / "TRAIN_images.json").write_text(json.dumps(paths))
    dataset = PascalVOCDataset(folder, "TRAIN", keep_difficult=True)
    assert len(dataset) == len(entries) == 16_555
    assert len(dataset.labels) == sum(len(entry["labels"]) for entry in entries)
    assert str(dataset.image_paths[16_554]) == paths[-1]
