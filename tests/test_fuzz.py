"""Thousands of damaged inputs: each ends in a result or in one of our own errors, in bounded time and memory.

    SSD_FUZZ=20000 pytest tests/test_fuzz.py -s        a longer run: so many inputs of each kind

An error of our own is a ValueError or FileNotFoundError (a SystemExit for parameters) that names the file.
"""

import contextlib
import copy
import io
import json
import math
import os
import random
import resource
import signal
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LABEL_MAP, FakeModel, annotation_xml, object_xml, write, write_image
from make_sample import draw_sample

import train
from annotations import parse_annotation
from create_data_lists import create_data_lists
from datasets import PascalVOCDataset, read_image
from detect import detect
from eval import calculate_mAP, read_voc_detections
from model import model_state
from utils import load_checkpoint, override_parameters, printable, read_state_dict, save_checkpoint, script_parameters

SECONDS = 60  # for one input; none takes one, but the machine may be busy
KILOBYTES = 2_000_000

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # coordinates such as 1e308 overflow
    pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="measures memory in /proc"),
]


class Hang(BaseException):
    """Not an Exception, so that no `except Exception` takes it for a damaged file."""


def memory_kb(field):
    return int(Path("/proc/self/status").read_text().partition(f"{field}:")[2].split()[0])


@contextlib.contextmanager
def limits():
    """What takes far too long, or far more memory than is allowed, fails before it can hurt the machine."""

    def interrupt(_number, _frame):
        raise Hang

    handler, limit = signal.signal(signal.SIGALRM, interrupt), resource.getrlimit(resource.RLIMIT_AS)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (1000 * (memory_kb("VmSize") + 3 * KILOBYTES), limit[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.signal(signal.SIGALRM, handler)


def fuzz(count, make, act, names, errors=(ValueError, FileNotFoundError), share=0.02):
    """Call act(make()) so many times: each ends in a result or in an error of ours, each kind at least now and then.

    names: returns what an error has to name, one of several strings. share: the least share of results and of errors.
    """
    count, outcomes = int(os.environ.get("SSD_FUZZ", count)), Counter(result=0, error=0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
    before = memory_kb("VmRSS")
    for _ in range(count):
        made = make()
        try:
            with limits():
                act(made)
            outcomes["result"] += 1
        except errors as error:
            ours = type(error) in errors  # and not of a kind of these, such as a UnicodeDecodeError
            if not ours or not any(name in str(error) for name in names()) or len(str(error)) > 5000:
                raise AssertionError(f"an error that is not ours, after {str(made)[:2000]}") from error
            outcomes["error"] += 1
    grown = memory_kb("VmHWM") - before
    print(f"{dict(outcomes)}, at most {grown / 1000:.0f} MB more memory")
    assert grown < KILOBYTES and min(outcomes.values()) >= share * count


def fuzz_file(count, path, originals, read, damage=None, names=(), share=0.02):
    """fuzz() of read(path) with damaged copies of what the file holds rightly; damage: a function like these below."""
    rng, damage = random.Random(path.name), damage or damage_bytes

    def act(data):
        path.write_bytes(data)
        read(path)

    fuzz(count, lambda: damage(rng.choice(originals), rng), act, lambda: [str(path), *names], share=share)


# --- Damage ---------------------------------------------------------------------------------------

NASTY_BYTES = [b"", b"\0", b"\xff\xfe", b"nan", b"-1", b"1e999", b"9" * 400, b'"', b"[", b"{", b"<a>", b"&lt;", b"\r"]


def damage_bytes(data, rng):
    """Cut bytes short, or change, repeat, remove or insert some, more often near the start."""
    data = bytearray(data)
    if rng.random() < 0.1:
        return bytes(data[: rng.randrange(len(data))])
    reach = len(data) if rng.random() < 0.6 else min(128, len(data))
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        start = rng.randrange(reach)
        end = min(len(data), start + rng.choice([0, 1, 1, 4, 16]))
        choices = [rng.randbytes(end - start), b"", bytes(data[start:end]) * 2, rng.choice(NASTY_BYTES)]
        data[start:end] = rng.choice(choices)
        reach = max(1, min(reach, len(data)))
    return bytes(data)


NASTY_VALUES = [
    None, True, -1, 0, 7, 2**63, 10**30, 1e308, math.inf, math.nan, 0.5, "", "\0", "\ud800", "x" * 5000, "/dev/zero",
    "/", [], {}, [[]], [1, 2, 3], {"a": 1}, json.loads("[" * 200 + "1" + "]" * 200),
]  # fmt: skip
NASTY_TENSORS = [
    torch.zeros(0), torch.zeros(3, dtype=torch.int64), torch.zeros(1).expand(10**9), torch.tensor(1.0),
    torch.zeros(8732, 4, dtype=torch.complex64), torch.full((8732, 4), torch.nan), torch.eye(2).to_sparse(),
    torch.zeros(1, dtype=torch.float64).expand(8732, 4), torch.zeros(8732, 4, device="meta"),
    torch.zeros(5056, dtype=torch.uint8),
]  # fmt: skip


def damage_tree(tree, rng, nasty):
    """A copy of nested dicts and lists in which a few values are replaced, removed, repeated or swapped."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = list(find_places(tree))
        if not places:
            break
        holder, key = rng.choice(places)
        action = rng.random()
        if action < 0.6:
            holder[key] = copy.deepcopy(rng.choice(nasty))
        elif action < 0.75:
            del holder[key]
        elif action < 0.85 and isinstance(holder, list):
            holder.append(holder[key])
        else:
            other, other_key = rng.choice(places)
            holder[key] = copy.deepcopy(other[other_key])
    return tree


def find_places(tree, depth=0):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        if depth < 20:
            yield from find_places(value, depth + 1)


# --- Text: annotations, lists, detections, parameters ---------------------------------------------


def test_annotations(tmp_path):
    objects = object_xml("cat", (1, 2.5, 90, 80)), object_xml("dog", (10, 20, 60, 70), difficult="")

    def read(path):
        annotation = parse_annotation(path)
        assert len(annotation["boxes"]) == len(annotation["names"]) == len(annotation["difficulties"])

    fuzz_file(800, tmp_path / "fuzzed.xml", [annotation_xml(*objects).encode()], read)


def test_coco_files(tmp_path):
    photos = [write_image(tmp_path / f"{i}.png") for i in range(4)]
    images = [{"id": i, "file_name": photo.name} for i, photo in enumerate(photos)]
    annotations = [{"image_id": i, "category_id": 3, "bbox": [10, 10, 20, 20]} for i in range(2)]
    outlines = [[10, 10, 30, 10, 20.5, 30]], {"size": [80, 100], "counts": [800, 20, 7180]}
    annotations += [{"image_id": 2, "category_id": 3, "segmentation": outline} for outline in outlines]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "cup"}]}

    def read(path):
        create_data_lists(train_data=path, output_folder=tmp_path / "lists", test_fraction=0.5, report_overlap=0)

    names = str(tmp_path), "nothing to learn", "leaves a split empty"
    fuzz_file(100, tmp_path / "all.json", [json.dumps(content).encode()], read, names=names, share=0.05)


@pytest.mark.parametrize("name", ["data.yaml", "labels/0.txt", "classes.txt", "train.txt", "test.txt"])
def test_yolo_files(tmp_path, name):
    pytest.importorskip("yaml")
    lines = "0 0.5 0.5 0.2 0.3\n1 0.2 0.3 0.1 0.1 0.9\n0 0.1 0.1 0.3 0.1 0.3 0.2 0.2 0.3\n"
    for i in range(4):
        write_image(tmp_path / f"images/{i}.png")
        write(tmp_path / f"labels/{i}.txt", lines)
    write(tmp_path / "classes.txt", "cat\n\ndog\ncow\n")
    write(tmp_path / "train.txt", "images/0.png\nimages/1.png\n")
    names = "" if name == "classes.txt" else "names: {0: cat, 1: dog}\nkpt_shape: [0, 0]\n"
    write(tmp_path / "data.yaml", f"path: .\ntrain: [train.txt, images]\nval: images\n{names}")
    if name == "test.txt":  # a list that no data.yaml names
        write(tmp_path / name, "images/2.png\n3\n")
        write(tmp_path / "data.yaml", names)

    def read(path):
        create_data_lists(
            train_data=tmp_path,
            output_folder=tmp_path / "lists",
            test_fraction=0.5,
            report_overlap=0,
            skip_corrupt=True,
        )

    original = (tmp_path / name).read_bytes()
    names = str(tmp_path), "nothing to learn", "leaves a split empty", "unknown classes", "cannot be a class"
    fuzz_file(60, tmp_path / name, [original], read, names=names, share=0)


def test_lists(tmp_path):
    rng, named = random.Random(2), []
    paths = [str(write_image(tmp_path / f"{i}.jpg", (40, 30))) for i in range(3)]
    entry = {"boxes": [[1.0, 2, 20, 29], [0, 0, 40, 30.0]], "labels": [1, 2], "difficulties": [0, 1], "size": [40, 30]}
    files = {"TRAIN_images.json": paths, "TRAIN_objects.json": [entry] * 3, "label_map.json": LABEL_MAP}
    for name, content in files.items():
        write(tmp_path / name, content)

    def make():
        name = rng.choice(list(files))
        text = json.dumps(damage_tree(files[name], rng, NASTY_VALUES))
        return name, damage_bytes(text.encode(), rng) if rng.random() < 0.3 else text.encode()

    def act(made):
        name, data = made
        (tmp_path / name).write_bytes(data)
        named[:] = [str(tmp_path)]
        try:
            dataset = PascalVOCDataset(tmp_path, "TRAIN", keep_difficult=True)
            # An error names a long or odd path by its first letters at least.
            named.extend(form for path in dataset.image_paths.tolist() for form in (path, printable(path, 1000)[:900]))
            for key in range(min(len(dataset), 5)):
                image, boxes, labels, _ = dataset[0, key]
                assert image.shape == (3, 300, 300) and len(boxes) == len(labels)
                assert boxes.isfinite().all() and (boxes[:, 2:] > boxes[:, :2]).all()
        finally:
            write(tmp_path / name, files[name])

    fuzz(500, make, act, lambda: named, share=0.005)


def test_detections_files(tmp_path):
    original = b"000001 0.9 1 2 30 40\na photo 0.8 10.5 10 20 20\nx 0.1 1 1 5 5\n000001 0.2 3 3 9 9\n"
    write(tmp_path / "comp4_det_test_dog.txt", "x 0.5 1 1 9 9\n")
    write(tmp_path / "comp4_det_test_grandfather clock.txt", "")
    truth = [torch.tensor([[0.0, 1, 30, 40]])] * 3, [torch.tensor([1])] * 3, [torch.tensor([0])] * 3

    def read(path):
        detections = read_voc_detections(tmp_path, ["000001", "a photo", "x"], LABEL_MAP)
        _, mean_ap = calculate_mAP(*detections, *truth, label_map=LABEL_MAP)
        assert 0 <= mean_ap <= 1

    fuzz_file(600, tmp_path / "comp4_det_test_cat.txt", [original], read, share=0.05)


def test_parameters():
    rng, before = random.Random(4), script_parameters(vars(train))
    originals = [f"--{name}={value}".encode() for name, value in before.items()]
    originals += [b"--decay_lr_at=" + b"(" * 2000, b"--decay_lr_at=None", b"--decay_lr_at=...", b"--lr=" + b"9" * 5000]
    originals += [b"--decay_lr_at=" + text for text in (b"{1:2}", b"b'a'", b"[1,[2]]", b"-" * 20000 + b"1", b"2j")]

    def make():
        text = rng.choice(originals)
        return (damage_bytes(text, rng) if rng.random() < 0.9 else text).decode("utf-8", "surrogateescape")

    def act(argument):
        namespace = dict(before)
        override_parameters(namespace, [argument])
        assert all(type(namespace[name]) is type(value) for name, value in before.items())

    fuzz(2000, make, act, lambda: ["error:"], errors=(SystemExit,))


# --- Checkpoints and weights ----------------------------------------------------------------------


def resume():
    """Start or resume, and take one step."""
    model, optimizer, start = train.start_or_resume(LABEL_MAP, torch.device("cpu"))
    if start.averaged_weights:
        train.start_average(model, start.averaged_weights)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model, optimizer, start


def damage_archive(data, rng):
    """Damage bytes; or one entry of a zip archive, packed again with right checksums; or drop or compress entries."""
    if rng.random() < 0.3:
        return damage_bytes(data, rng)
    target, action = io.BytesIO(), rng.random()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as archive:
        names = source.namelist()
        pickled = next(name for name in names if name.endswith("data.pkl"))
        chosen = pickled if rng.random() < 0.7 else rng.choice(names)
        for name in names:
            content = source.read(name)
            if name == chosen and action < 0.1:
                continue
            if name == chosen and action < 0.95:
                content = damage_bytes(content, rng) if content else b"x"
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if action > 0.95 else zipfile.ZIP_STORED)
    return target.getvalue()


def encode(save, *options, **named):
    stream = io.BytesIO()
    save(stream, *options, **named)
    return stream.getvalue()


def test_checkpoints(tmp_path, monkeypatch):
    path, nasty = tmp_path / "c.pth.tar", [*NASTY_VALUES, *NASTY_TENSORS]
    settings = {"network": "ssd300_tiny", "pretrained": "", "save_to": str(path), "print_once": lambda _: None}
    for name, value in settings.items():
        monkeypatch.setattr(train, name, value)
    model, optimizer, _ = resume()
    state = {"optimizer": optimizer.state_dict(), "iteration": 3, "best_map": 0.5}
    state |= {"rng": {"cpu": torch.get_rng_state(), "cuda": []}, "parameters": script_parameters(vars(train))}
    state["training_model"] = model.state_dict()
    save_checkpoint(model_state(model) | state, path)
    monkeypatch.setattr(train, "checkpoint", str(path))
    contents = load_checkpoint(path)

    def damage(original, rng):
        if rng.random() < 0.6:
            return damage_archive(original, rng)
        return encode(lambda stream: torch.save(damage_tree(contents, rng, nasty), stream))

    def read(path):
        *_, start = resume()
        assert type(start.iteration) is int and type(start.best_map) is float

    fuzz_file(150, path, [path.read_bytes()], read, damage, share=0.05)


def test_pretrained_weights(tmp_path):
    contents = {f"features.{i}.weight": torch.zeros(2, 3) for i in range(3)}

    def read(path):
        assert all(isinstance(value, torch.Tensor) for value in read_state_dict(str(path), {}).values())

    original = encode(lambda stream: torch.save(contents, stream))
    fuzz_file(200, tmp_path / "vgg.pth", [original], read, damage_archive, share=0.05)


# --- Images ---------------------------------------------------------------------------------------


def test_images(tmp_path):
    photo = draw_sample(np.random.default_rng(0))[0].resize((80, 60))
    originals = [encode(photo.save, kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")]
    originals += [encode(photo.save, "JPEG", progressive=True), encode(photo.convert("CMYK").save, "JPEG")]
    originals += [encode(photo.convert("P").save, "PNG", transparency=3), encode(photo.convert("RGBA").save, "PNG")]
    originals += [encode(photo.convert("I").convert("I;16").save, "PNG")]

    def read(path):
        image = read_image(path)
        assert image.dtype == torch.uint8 and image.shape[0] == 3

    def find(path):
        assert detect(path, model=FakeModel()).mode == "RGB"

    for reader in (read, find):
        fuzz_file(250, tmp_path / f"{reader.__name__}.img", originals, reader, share=0.1)


@pytest.mark.parametrize("reader", [
    read_image, load_checkpoint, parse_annotation, lambda path: read_state_dict(path, {}),
    lambda path: detect(path, model=FakeModel()),
])  # fmt: skip
def test_random_bytes_are_nothing(tmp_path, reader):
    """No reader takes noise for something."""

    def read(path):
        reader(str(path))
        raise AssertionError("something was read")

    fuzz_file(40, tmp_path / "noise", [b""], read, lambda _, rng: rng.randbytes(rng.randint(1, 300)), share=0)
