"""utils.py: boxes, label maps and colours, files and checkpoints, messages, parameters."""

import colorsys
import math
import os
import resource
import subprocess
import sys

import pytest
import torch

import train
from model import SSD300
from utils import (
    class_colors,
    cxcy_to_gcxgcy,
    cxcy_to_xy,
    find_intersection,
    find_jaccard_overlap,
    find_paired_overlap,
    gcxgcy_to_cxcy,
    load_checkpoint,
    load_label_map,
    make_label_map,
    override_parameters,
    printable,
    read_json,
    remove_leftovers,
    save_checkpoint,
    script_parameters,
    voc_labels,
    write_file,
    xy_to_cxcy,
)

CONTENTS = {"iteration": 3, "label_map": {"background": 0, "cat": 1}, "model": {"w": torch.arange(5.0)}}


def random_boxes_xy(n, seed=0, dtype=torch.float32):
    """n boxes inside the image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 2, 2, generator=generator, dtype=dtype).sort(dim=1).values.flatten(1)


def slow_overlap(box_1, box_2):
    """Overlap of two boxes, lists of four numbers in boundary form, in Python's float64."""
    width = min(box_1[2], box_2[2]) - max(box_1[0], box_2[0])
    height = min(box_1[3], box_2[3]) - max(box_1[1], box_2[1])
    shared = max(width, 0) * max(height, 0)
    area_1 = (box_1[2] - box_1[0]) * (box_1[3] - box_1[1])
    area_2 = (box_2[2] - box_2[0]) * (box_2[3] - box_2[1])
    return shared / (area_1 + area_2 - shared)


def test_boundary_and_center_size_form():
    boxes_xy = torch.tensor([[0.25, 0.5, 0.75, 0.625], [0, 0, 1, 1], [10, 20, 40, 100]], dtype=torch.float64)
    boxes_cxcy = torch.tensor([[0.5, 0.5625, 0.5, 0.125], [0.5, 0.5, 1, 1], [25, 60, 30, 80]], dtype=torch.float64)
    for shape in ((3, 4), (3, 1, 1, 4)):
        assert torch.equal(xy_to_cxcy(boxes_xy.view(shape)), boxes_cxcy.view(shape))
        assert torch.equal(cxcy_to_xy(boxes_cxcy.view(shape)), boxes_xy.view(shape))
    assert cxcy_to_xy(torch.zeros(0, 4)).shape == xy_to_cxcy(torch.zeros(0, 4)).shape == (0, 4)


def test_offsets_by_hand():
    # The centre is half a prior's width to the right of the prior's, and as high; it is twice as wide, a
    # fourth as high: (0.5 / 0.1, 0, ln 2 / 0.2, ln 0.25 / 0.2).
    prior_cxcy = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    box_cxcy = torch.tensor([[0.6, 0.5, 0.4, 0.1]])
    offsets = torch.tensor([[5.0, 0.0, math.log(2) / 0.2, math.log(0.25) / 0.2]])
    torch.testing.assert_close(cxcy_to_gcxgcy(box_cxcy, prior_cxcy), offsets)
    torch.testing.assert_close(gcxgcy_to_cxcy(offsets, prior_cxcy), box_cxcy)


def test_encoding_and_decoding_undo_each_other():
    priors_cxcy = SSD300.create_prior_boxes()
    assert torch.equal(cxcy_to_gcxgcy(priors_cxcy, priors_cxcy), torch.zeros(8732, 4))
    assert torch.equal(gcxgcy_to_cxcy(torch.zeros(2, 8732, 4), priors_cxcy), priors_cxcy.expand(2, -1, -1))
    boxes_cxcy = xy_to_cxcy(random_boxes_xy(3 * 8732).view(3, 8732, 4))
    offsets = cxcy_to_gcxgcy(boxes_cxcy, priors_cxcy)
    torch.testing.assert_close(gcxgcy_to_cxcy(offsets, priors_cxcy), boxes_cxcy, rtol=1e-5, atol=1e-6)
    offsets = 3 * torch.randn(3, 8732, 4, generator=torch.Generator().manual_seed(1))
    again = cxcy_to_gcxgcy(gcxgcy_to_cxcy(offsets, priors_cxcy), priors_cxcy)
    torch.testing.assert_close(again, offsets, rtol=1e-5, atol=1e-4)


def test_overlap_by_hand():
    box = torch.tensor([[0.0, 0.0, 4.0, 2.0]])
    others = torch.tensor(
        [
            [0.0, 0.0, 4.0, 2.0],  # the same: 8 / 8
            [2.0, 0.0, 6.0, 2.0],  # shifted by half its width: 4 / (8 + 8 - 4)
            [1.0, 0.5, 3.0, 1.5],  # inside: 2 / 8
            [4.0, 0.0, 8.0, 2.0],  # shares an edge
            [9.0, 9.0, 10.0, 10.0],  # far away in both directions: two negative sides are no area
            [1.0, 1.0, 1.0, 1.0],  # a point
        ]
    )
    assert find_intersection(box, others).tolist() == [[8, 4, 2, 0, 0, 0]]
    torch.testing.assert_close(find_jaccard_overlap(box, others), torch.tensor([[1, 1 / 3, 1 / 4, 0, 0, 0]]))
    assert find_jaccard_overlap(others[-1:], others[-1:]).tolist() == [[0]]  # not 0 / 0
    assert find_jaccard_overlap(others, torch.zeros(0, 4)).shape == (6, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlap_against_a_slow_reference(dtype):
    boxes_1, boxes_2 = random_boxes_xy(40, 1, dtype), random_boxes_xy(50, 2, dtype)
    copies = boxes_1.clone(), boxes_2.clone()
    overlap = find_jaccard_overlap(boxes_1, boxes_2)
    expected = [[slow_overlap(b1, b2) for b2 in boxes_2.tolist()] for b1 in boxes_1.tolist()]
    torch.testing.assert_close(overlap, torch.tensor(expected, dtype=dtype), rtol=1e-5, atol=1e-6)
    assert (overlap > 0.5).any() and (overlap == 0).any()
    # Batches; one set for all of a batch, as the priors are; pairs.
    batched = find_jaccard_overlap(boxes_1.view(2, 20, 4), boxes_2.view(2, 25, 4))
    assert torch.equal(batched, torch.stack([overlap[:20, :25], overlap[20:, 25:]]))
    assert torch.equal(find_jaccard_overlap(boxes_1.view(2, 20, 4), boxes_2), overlap.view(2, 20, 50))
    assert torch.equal(find_paired_overlap(boxes_1, boxes_2[:40]), overlap.diagonal())
    assert torch.equal(boxes_1, copies[0]) and torch.equal(boxes_2, copies[1])  # the arguments are left alone


@pytest.mark.parametrize("names", [(), "dog", ["a", "a"], ["background"], ["a", " "], ["a", 3]])
def test_bad_class_names_are_refused(names):
    with pytest.raises(ValueError, match=r"class|name"):
        make_label_map(names)


def test_colors_are_bright_apart_and_do_not_depend_on_later_classes():
    label_map = make_label_map(voc_labels)
    colors = class_colors(label_map)
    assert list(colors) == list(voc_labels) and make_label_map(voc_labels)["tvmonitor"] == 20
    hues = sorted(colorsys.rgb_to_hsv(*bytes.fromhex(color[1:]))[0] for color in colors.values())
    gaps = [b - a for a, b in zip(hues, [*hues[1:], hues[0] + 1], strict=True)]
    assert min(gaps) > 0.6 / 20 and max(gaps) < 2 / 20  # about evenly spaced
    assert class_colors(make_label_map(voc_labels[:2])) == {name: colors[name] for name in voc_labels[:2]}
    assert len(class_colors(make_label_map([f"c{i}" for i in range(5000)]))) == 5000


@pytest.mark.parametrize(
    "text", ["", "[1]", "{}", '{"cat": 1}', '{"background": 0}', '{"background": 0, "cat": 2}',
             '{"background": 0, "cat": true}', '{"background": 1, "cat": 0}', "[" * 10_000],
)  # fmt: skip
def test_a_bad_label_map_names_its_file(tmp_path, text):
    (tmp_path / "label_map.json").write_text(text)
    with pytest.raises(ValueError, match=r"label_map\.json"):
        load_label_map(tmp_path)


def test_json_is_read_from_regular_files_only(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')  # with a byte order mark
    assert read_json(tmp_path / "a.json", dict) == {"a": 1}
    os.mkfifo(tmp_path / "pipe.json")  # reading it would wait for ever
    for name, error in (("gone.json", FileNotFoundError), ("pipe.json", ValueError), ("a.json", ValueError)):
        with pytest.raises(error, match=name):
            read_json(tmp_path / name, list)


@pytest.mark.parametrize("contents", [b"caf\xc3\xa9", "café", lambda file: file.write(b"caf\xc3\xa9")])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, contents):
    def write_half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "file"
    write_file(path, contents)
    with pytest.raises(KeyboardInterrupt):
        write_file(path, write_half)
    assert path.read_text(encoding="utf-8") == "café" and list(tmp_path.iterdir()) == [path]


def test_temporary_files_of_dead_processes_go_those_of_living_ones_stay(tmp_path):
    """Two runs may write the same file; one that is killed leaves half of it."""
    names = []
    write_file(tmp_path / "c.tar", lambda file: names.append(os.path.basename(file.name)))
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, alive = (names[0].replace(f".{os.getpid()}.", f".{pid}.") for pid in (process.pid, os.getppid()))
    for clean, *rest in ((remove_leftovers,), (write_file, b"new")):
        for name in (dead, alive, "other.tar.1.tmp"):
            (tmp_path / name).write_bytes(b"half")
        clean(tmp_path / "c.tar", *rest)
        assert {path.name for path in tmp_path.iterdir()} == {"c.tar", alive, "other.tar.1.tmp"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [("traffic light", "traffic light"), ("a\n b\tc", "a b c"), ("\x1b[2Jcat", r"\x1b[2Jcat"), ("Käfer 狗", "Käfer 狗"),
     ("\udcff", r"\udcff"), ("x\u202ey", r"x\u202ey"), ("x" * 300, "x" * 197 + "..."), (KeyError(), "KeyError")],
)  # fmt: skip
def test_strings_from_files_are_shown_safely(text, shown):
    assert printable(text) == shown


def test_a_checkpoint_comes_back_if_it_is_whole(tmp_path):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(CONTENTS, path)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["model"].pop("w"), torch.arange(5.0))
    assert loaded == {**CONTENTS, "format": "ssd300/1", "model": {}} and list(tmp_path.iterdir()) == [path]
    contents = path.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.99):
        path.write_bytes(contents[: int(share * len(contents))])
        with pytest.raises(ValueError, match=r"c\.pth\.tar: truncated"):
            load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.tar"):
        load_checkpoint(tmp_path / "nothing.tar")
    with pytest.raises(OSError, match="no_such_folder"):
        save_checkpoint(CONTENTS, tmp_path / "no_such_folder" / "c.pth.tar")


@pytest.mark.parametrize("contents", [{"state_dict": {}}, [1, 2], torch.zeros(3), {"format": "other/1"}, b"<html>"])
def test_another_programs_file_is_named(tmp_path, contents):
    path = tmp_path / "foreign.pth"
    path.write_bytes(contents) if isinstance(contents, bytes) else torch.save(contents, path)
    with pytest.raises(ValueError, match=r"foreign\.pth: .*not a checkpoint of this repo.*tools/convert_weights\.py"):
        load_checkpoint(path)


def test_the_old_checkpoint_survives_a_full_disk(tmp_path):
    """A limit on the size of files stands for the disk: the write breaks off in the middle."""
    path = tmp_path / "c.pth.tar"
    save_checkpoint(CONTENTS, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not write the checkpoint, the one before it is unchanged"):
            save_checkpoint({"w": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def make_namespace():
    """What `globals()` of a script may hold."""
    return {
        "__doc__": "A script.", "lr": 1e-3, "iterations": 100, "bf16": True, "folder": "data", "decay_at": (80, 90),
        "names": (), "steps": ("crop", "flip"), "MEAN": (1, 2), "_private": 1, "main": make_namespace, "os": os,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--lr=2e-4", 2e-4), ("--lr=1", 1.0), ("--iterations=1_000", 1000), ("--bf16=False", False),
        ("--folder=a=b c", "a=b c"), ("--folder=", ""), ("--decay_at=(60, 80)", (60, 80)), ("--decay_at=60", (60,)),
        ("--decay_at=()", ()), ('--names=("cat", "dog")', ("cat", "dog")), ("--names=a, red light", ("a", "red light")),
        ("--names=cat", ("cat",)), ("--names=", ()), ("--names=0,1,2", ("0", "1", "2")), ("--names=007", ("007",)),
        ("--names=(1.0, b)", ("1.0", "b")), ("--steps=()", ()), ("--steps=1e3,2", ("1e3", "2")),
    ],
)  # fmt: skip
def test_override(argument, value):
    name, namespace = argument[2:].partition("=")[0], make_namespace()
    override_parameters(namespace, [argument])
    assert namespace == {**make_namespace(), name: value} and type(namespace[name]) is type(value)


@pytest.mark.parametrize(
    "argument",
    ["--lrate=1", "--iteration=1", "--MEAN=(1,)", "--_private=2", "--main=1", "lr=1", "--lr", "-lr=1", "--lr=fast",
     "--iterations=1.5", "--bf16=yes", "--decay_at=(1, x)", "--decay_at=(1.5,)"],
)  # fmt: skip
def test_after_a_bad_argument_the_error_stands_last(argument):
    namespace = make_namespace()
    with pytest.raises(SystemExit) as error:
        override_parameters(namespace, [argument])
    _, *listing, last = str(error.value).splitlines()  # the lowercase plain values
    names = " ".join(line.strip(" -").partition("=")[0] for line in listing)
    assert names == "lr iterations bf16 folder decay_at names steps" and "  --decay_at=(80, 90)" in listing
    assert last.startswith("error: ") and argument.split("=")[-1] in last and namespace == make_namespace()
    assert ("Did you mean --iterations?" in last) == (argument == "--iteration=1")


def test_help_shows_each_parameter_with_its_comment(capsys):
    with pytest.raises(SystemExit) as end:
        override_parameters({**vars(train), "lr": 0.25}, ["--help"])
    output = capsys.readouterr().out
    assert end.value.code == 0 and output.startswith("Train a network of the SSD family.")
    assert "\nOptimisation: the paper's recipe for Pascal VOC 2007 + 2012\n  --batch_size=32 " in output
    assert any(line.split() == ["--lr=0.25", "of", "the", "weights"] for line in output.splitlines())
    assert output.index("Hardest background priors of an") < output.index("--n_negatives_without_objects=0")
    assert all(f"--{name}=" in output for name in script_parameters(vars(train)))
