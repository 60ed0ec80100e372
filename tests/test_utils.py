"""utils.py: boxes, label maps and colours, files and checkpoints, messages, parameters."""

import colorsys
import io
import math
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch

import train
import utils
from model import SSD300

CONTENTS = {"iteration": 3, "label_map": {"background": 0, "cat": 1}, "model": {"w": torch.arange(5.0)}}


def random_boxes_xy(n, seed=0, dtype=torch.float32):
    """n boxes inside the image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 2, 2, generator=generator, dtype=dtype).sort(dim=1).values.flatten(1)


def slow_overlap(box_1, box_2):
    """Overlap of two boxes, lists of four numbers in boundary form, in Python's float64."""
    width, height = (min(box_1[i + 2], box_2[i + 2]) - max(box_1[i], box_2[i]) for i in (0, 1))
    shared = max(width, 0) * max(height, 0)
    area_1, area_2 = ((x_max - x_min) * (y_max - y_min) for x_min, y_min, x_max, y_max in (box_1, box_2))
    return shared / (area_1 + area_2 - shared)


def test_boundary_and_center_size_form():
    boxes_xy = torch.tensor([[0.25, 0.5, 0.75, 0.625], [0, 0, 1, 1], [10, 20, 40, 100]], dtype=torch.float64)
    boxes_cxcy = torch.tensor([[0.5, 0.5625, 0.5, 0.125], [0.5, 0.5, 1, 1], [25, 60, 30, 80]], dtype=torch.float64)
    for shape in ((3, 4), (3, 1, 1, 4)):
        assert torch.equal(utils.xy_to_cxcy(boxes_xy.view(shape)), boxes_cxcy.view(shape))
        assert torch.equal(utils.cxcy_to_xy(boxes_cxcy.view(shape)), boxes_xy.view(shape))
    assert utils.cxcy_to_xy(torch.zeros(0, 4)).shape == utils.xy_to_cxcy(torch.zeros(0, 4)).shape == (0, 4)


def test_offsets_by_hand():
    """A center half a prior's width to its right; twice as wide, a fourth as high: 0.5 / 0.1, 0, ln 2 / 0.2, ..."""
    prior_cxcy, box_cxcy = torch.tensor([[[0.5, 0.5, 0.2, 0.4]], [[0.6, 0.5, 0.4, 0.1]]])
    offsets = torch.tensor([[5.0, 0.0, math.log(2) / 0.2, math.log(0.25) / 0.2]])
    torch.testing.assert_close(utils.cxcy_to_gcxgcy(box_cxcy, prior_cxcy), offsets)
    torch.testing.assert_close(utils.gcxgcy_to_cxcy(offsets, prior_cxcy), box_cxcy)


def test_encoding_and_decoding_undo_each_other():
    priors_cxcy = SSD300.create_prior_boxes()
    assert torch.equal(utils.cxcy_to_gcxgcy(priors_cxcy, priors_cxcy), torch.zeros(8732, 4))
    assert torch.equal(utils.gcxgcy_to_cxcy(torch.zeros(2, 8732, 4), priors_cxcy), priors_cxcy.expand(2, -1, -1))
    boxes_cxcy = utils.xy_to_cxcy(random_boxes_xy(3 * 8732).view(3, 8732, 4))
    offsets = utils.cxcy_to_gcxgcy(boxes_cxcy, priors_cxcy)
    torch.testing.assert_close(utils.gcxgcy_to_cxcy(offsets, priors_cxcy), boxes_cxcy, rtol=1e-5, atol=1e-6)
    offsets = 3 * torch.randn(3, 8732, 4, generator=torch.Generator().manual_seed(1))
    again = utils.cxcy_to_gcxgcy(utils.gcxgcy_to_cxcy(offsets, priors_cxcy), priors_cxcy)
    torch.testing.assert_close(again, offsets, rtol=1e-5, atol=1e-4)


def test_overlap_by_hand():
    box = torch.tensor([[0.0, 0, 4, 2]])
    others = torch.tensor([
        [0, 0, 4, 2], [2, 0, 6, 2],  # the same: 8 / 8; shifted by half its width: 4 / (8 + 8 - 4)
        [1, 0.5, 3, 1.5], [4, 0, 8, 2],  # inside: 2 / 8; shares an edge
        [9, 9, 10, 10], [1, 1, 1, 1],  # far away in both directions: two negative sides are no area; a point
    ])  # fmt: skip
    assert utils.find_paired_intersection(box, others).tolist() == [8, 4, 2, 0, 0, 0]
    torch.testing.assert_close(utils.find_jaccard_overlap(box, others), torch.tensor([[1, 1 / 3, 1 / 4, 0, 0, 0]]))
    assert utils.find_jaccard_overlap(others[-1:], others[-1:]).tolist() == [[0]]  # not 0 / 0
    assert utils.find_jaccard_overlap(others, torch.zeros(0, 4)).shape == (6, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlap_against_a_slow_reference(dtype):
    boxes_1, boxes_2 = random_boxes_xy(40, 1, dtype), random_boxes_xy(50, 2, dtype)
    copies = boxes_1.clone(), boxes_2.clone()
    overlap = utils.find_jaccard_overlap(boxes_1, boxes_2)
    expected = [[slow_overlap(b1, b2) for b2 in boxes_2.tolist()] for b1 in boxes_1.tolist()]
    torch.testing.assert_close(overlap, torch.tensor(expected, dtype=dtype), rtol=1e-5, atol=1e-6)
    assert (overlap > 0.5).any() and (overlap == 0).any()
    # Batches; one set for all of a batch, as the priors are; pairs.
    batched = utils.find_jaccard_overlap(boxes_1.view(2, 20, 4), boxes_2.view(2, 25, 4))
    assert torch.equal(batched, torch.stack([overlap[:20, :25], overlap[20:, 25:]]))
    assert torch.equal(utils.find_jaccard_overlap(boxes_1.view(2, 20, 4), boxes_2), overlap.view(2, 20, 50))
    assert torch.equal(utils.find_paired_overlap(boxes_1, boxes_2[:40]), overlap.diagonal())
    assert torch.equal(boxes_1, copies[0]) and torch.equal(boxes_2, copies[1])  # the arguments are left alone


@pytest.mark.parametrize("names", [(), "dog", ["a", "a"], ["background"], ["a", " "], ["a", 3]])
def test_bad_class_names_are_refused(names):
    with pytest.raises(ValueError, match=r"class|name"):
        utils.make_label_map(names)


def test_colors_are_bright_apart_and_do_not_depend_on_later_classes():
    names, label_map = utils.voc_labels, utils.make_label_map(utils.voc_labels)
    colors = utils.class_colors(label_map)
    assert tuple(colors) == names and label_map["tvmonitor"] == 20
    hues = sorted(colorsys.rgb_to_hsv(*bytes.fromhex(color[1:]))[0] for color in colors.values())
    gaps = [b - a for a, b in zip(hues, [*hues[1:], hues[0] + 1], strict=True)]
    assert min(gaps) > 0.6 / 20 and max(gaps) < 2 / 20  # about evenly spaced
    assert utils.class_colors(utils.make_label_map(names[:2])) == {name: colors[name] for name in names[:2]}
    assert len(utils.class_colors(utils.make_label_map([f"c{i}" for i in range(5000)]))) == 5000


@pytest.mark.parametrize("text", [
    "", "[1]", "{}", '{"cat": 1}', '{"background": 0}', '{"background": 0, "cat": 2}',
    '{"background": 0, "cat": true}', '{"background": 1, "cat": 0}', "[" * 10_000,
])  # fmt: skip
def test_a_bad_label_map_names_its_file(tmp_path, text):
    (tmp_path / "label_map.json").write_text(text)
    with pytest.raises(ValueError, match=r"label_map\.json"):
        utils.load_label_map(tmp_path)


def test_a_label_map_comes_in_the_order_of_its_labels(tmp_path):
    (tmp_path / "label_map.json").write_text('{"dog": 2, "background": 0, "cat": 1}')
    assert list(utils.load_label_map(tmp_path).items()) == [("background", 0), ("cat", 1), ("dog", 2)]


def test_json_is_read_from_regular_files_only(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')  # with a byte order mark
    assert utils.read_json(tmp_path / "a.json", dict) == {"a": 1}
    os.mkfifo(tmp_path / "pipe.json")  # reading it would wait for ever
    for name, error in (("gone.json", FileNotFoundError), ("pipe.json", ValueError), ("a.json", ValueError)):
        with pytest.raises(error, match=name):
            utils.read_json(tmp_path / name, list)


@pytest.mark.parametrize("contents", [b"caf\xc3\xa9", "café", lambda file: file.write(b"caf\xc3\xa9")])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, contents):
    def write_half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "file"
    utils.write_file(path, contents)
    with pytest.raises(KeyboardInterrupt):
        utils.write_file(path, write_half)
    assert path.read_text(encoding="utf-8") == "café" and list(tmp_path.iterdir()) == [path]


def test_half_a_file_of_a_killed_writer_is_written_over(tmp_path):
    def write_and_stop(file):
        copies.append(Path(file.name))
        copies[0].with_suffix(".kept").write_bytes(b"half")

    copies, path = [], tmp_path / "file"
    utils.write_file(path, write_and_stop)
    copies[0].with_suffix(".kept").rename(copies[0])  # as a kill would have left it
    utils.write_file(path, b"whole")
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"whole"


@pytest.mark.parametrize("n_refusals", [0, 1, 3, 4])
def test_a_file_that_is_locked_for_a_moment_is_replaced(tmp_path, monkeypatch, n_refusals):
    """As on Windows, where a virus scanner may have it open."""
    replace, refusals = os.replace, [PermissionError(13, "used by another process")] * n_refusals
    monkeypatch.setattr(os, "replace", lambda *paths: replace(*paths) if not refusals else raise_it(refusals.pop()))
    monkeypatch.setattr(utils.time, "sleep", lambda seconds: None)

    def raise_it(error):
        raise error

    path = tmp_path / "c.pth.tar"
    path.write_bytes(b"old")
    if n_refusals < 4:
        utils.save_checkpoint(CONTENTS, path)
        assert utils.load_checkpoint(path)["iteration"] == 3
    else:
        with pytest.raises(
            OSError, match=r"c\.pth\.tar: could not write .*the one before it is unchanged.*another process"
        ):
            utils.save_checkpoint(CONTENTS, path)
        assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("text", "shown"), [
    ("traffic light", "traffic light"), ("a\n b\tc", "a b c"), ("\x1b[2Jcat", r"\x1b[2Jcat"), ("Käfer 狗", "Käfer 狗"),
    ("\udcff", r"\udcff"), ("x\u202ey", r"x\u202ey"), ("x" * 2000, "x" * 997 + "..."), (KeyError(), "KeyError"),
])  # fmt: skip
def test_strings_from_files_are_shown_safely(text, shown):
    assert utils.printable(text) == shown


def test_a_checkpoint_comes_back_if_it_is_whole(tmp_path):
    path = tmp_path / "c.pth.tar"
    utils.save_checkpoint(CONTENTS, path)
    loaded = utils.load_checkpoint(path)
    assert torch.equal(loaded["model"].pop("w"), torch.arange(5.0))
    assert loaded == {**CONTENTS, "format": "ssd300/1", "model": {}} and list(tmp_path.iterdir()) == [path]
    contents = path.read_bytes()
    for share in (0.0, 0.3, 0.5, 0.99):
        path.write_bytes(contents[: int(share * len(contents))])
        with pytest.raises(ValueError, match=r"c\.pth\.tar: truncated") as caught:
            utils.load_checkpoint(path)
        assert ("convert_weights" in str(caught.value)) == (share == 0)  # what is ours is not for the converter
    damaged = [
        contents.replace(b"label_map", b"label_map" + b"\xff" * 5, 1),
        contents.replace(b"iteration", b"iter\x85tion", 1),
    ]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"c\.pth\.tar: damaged.*copy it again") as caught:
            utils.load_checkpoint(path)
        assert "convert_weights" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"nothing\.tar"):
        utils.load_checkpoint(tmp_path / "nothing.tar")
    with pytest.raises(OSError, match="no_such_folder"):
        utils.save_checkpoint(CONTENTS, tmp_path / "no_such_folder" / "c.pth.tar")


@pytest.mark.parametrize("contents", [{"state_dict": {}}, [1, 2], torch.zeros(3), {"format": "other/1"}, b"<html>"])
def test_another_programs_file_is_named(tmp_path, contents):
    path = tmp_path / "foreign.pth"
    path.write_bytes(contents) if isinstance(contents, bytes) else torch.save(contents, path)
    with pytest.raises(ValueError, match=r"foreign\.pth: .*not a checkpoint of this repo.*tools/convert_weights\.py"):
        utils.load_checkpoint(path)


def test_a_link_to_a_checkpoint_stays_one(tmp_path):
    """Such as one to a larger disk."""
    (tmp_path / "large").mkdir()
    target, link = tmp_path / "large" / "c.pth.tar", tmp_path / "c.pth.tar"
    link.symlink_to(target)
    for value in (1, 2):
        utils.save_checkpoint({**CONTENTS, "iteration": value}, link)
        assert link.is_symlink() and utils.load_checkpoint(target)["iteration"] == value
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["c.pth.tar", "large", "c.pth.tar"]


def test_sigterm_ends_a_script_by_systemexit():
    before = signal.getsignal(signal.SIGTERM)
    try:
        utils.exit_on_sigterm()
        with pytest.raises(SystemExit) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, before)


def test_paths_are_quoted_where_a_shell_would_part_them():
    assert [utils.quote(path) for path in ("a/b.pth.tar", "my data/b")] == ["a/b.pth.tar", "'my data/b'"]


def test_the_old_checkpoint_survives_a_full_disk(tmp_path):
    """A limit on the size of files stands for the disk: the write breaks off in the middle."""
    path, limits = tmp_path / "c.pth.tar", resource.getrlimit(resource.RLIMIT_FSIZE)
    utils.save_checkpoint(CONTENTS, path)
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not write the checkpoint, the one before it is unchanged"):
            utils.save_checkpoint({"w": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


NAMESPACE = {  # what `globals()` of a script may hold
    "__doc__": "A script.", "lr": 1e-3, "iterations": 100, "bf16": True, "folder": "data", "decay_at": (80, 90),
    "names": (), "steps": ("crop", "flip"), "MEAN": (1, 2), "_private": 1, "main": slow_overlap, "os": os,
}  # fmt: skip


@pytest.mark.parametrize(("argument", "value"), [
    ("--lr=2e-4", 2e-4), ("--lr=1", 1.0), ("--iterations=1_000", 1000), ("--bf16=False", False), ("--steps=()", ()),
    ("--folder=a=b c", "a=b c"), ("--folder=", ""), ("--decay_at=(60, 80)", (60, 80)), ("--decay_at=60", (60,)),
    ("--decay_at=()", ()), ('--names=("cat", "dog")', ("cat", "dog")), ("--names=a, red light", ("a", "red light")),
    ("--names=cat", ("cat",)), ("--names=", ()), ("--names=0,1,2", ("0", "1", "2")), ("--names=007", ("007",)),
    ("--names=(1.0, b)", ("1.0", "b")), ("--steps=1e3,2", ("1e3", "2")),
])  # fmt: skip
def test_override(argument, value):
    name, namespace = argument[2:].partition("=")[0], dict(NAMESPACE)
    assert utils.override_parameters(namespace, [argument]) == {name}
    assert namespace == {**NAMESPACE, name: value} and type(namespace[name]) is type(value)


@pytest.mark.parametrize("argument", [
    "--lrate=1", "--iteration=1", "--MEAN=(1,)", "--_private=2", "--main=1", "lr=1", "--lr", "-lr=1", "--lr=fast",
    "--iterations=1.5", "--bf16=yes", "--decay_at=(1, x)", "--decay_at=(1.5,)",
])  # fmt: skip
def test_after_a_bad_argument_the_error_stands_last(argument):
    namespace = dict(NAMESPACE)
    with pytest.raises(SystemExit) as error:
        utils.override_parameters(namespace, [argument])
    _, *listing, last = str(error.value).splitlines()  # the lowercase plain values
    names = " ".join(line.strip(" -").partition("=")[0] for line in listing)
    assert names == "lr iterations bf16 folder decay_at names steps" and "  --decay_at=(80, 90)" in listing
    assert last.startswith("error: ") and argument.split("=")[-1] in last and namespace == NAMESPACE
    assert ("Did you mean --iterations?" in last) == (argument == "--iteration=1")


def test_help_shows_the_block_of_parameters(capsys):
    with pytest.raises(SystemExit) as end:
        utils.override_parameters(vars(train), ["--help"])
    about, _, block = capsys.readouterr().out.partition("\nParameters, set with --name=value:\n\n")
    assert end.value.code == 0 and about == train.__doc__
    assert block.startswith("# Data\ndata_folder = ") and block in Path(train.__file__).read_text(encoding="utf-8")
    assert all(f"\n{name} = " in block for name in utils.script_parameters(vars(train)))


def test_saved_parameters_come_back_but_for_those_given():
    namespace = {**NAMESPACE, "lr": 2e-3, "folder": "here"}
    saved = {"lr": 5e-3, "iterations": 7, "folder": "here", "bf16": 1, "gone\x1b": 3, "main": "x", "steps": ("crop",)}
    notes = utils.restore_parameters(namespace, saved, given={"lr", "folder"})
    assert namespace == {**NAMESPACE, "lr": 2e-3, "folder": "here", "iterations": 7, "steps": ("crop",)}
    assert "lr was 0.005" in notes[0] and "0.002" in notes[0] and "bf16 was 1 " in notes[1]
    assert r"gone\x1b" in notes[2] and "main was 'x'" in notes[3] and "--iterations=7 --steps=('crop',)" in notes[4]
    assert len(notes) == 5


def test_letters_that_the_console_lacks_are_escaped(monkeypatch):
    """As on Windows, with a class named 猫."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    utils.override_parameters(dict(NAMESPACE), [])
    print("é 猫")
    sys.stdout.flush()
    assert written.getvalue().split() == ["é".encode("cp1252"), rb"\u732b"]
    monkeypatch.setattr(sys, "stdout", None)  # pythonw.exe has none
    utils.override_parameters(dict(NAMESPACE), [])


def test_the_device_is_the_accelerator_or_the_one_asked_for(monkeypatch):
    mps, cpu = torch.device("mps"), torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: mps)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert utils.choose_device() == utils.choose_device("mps") == mps
    assert utils.choose_device("mps:0").index == 0 and utils.choose_device("cpu") == cpu
    for name in ("cuda", "mps:1", "tpu9", "gpu\x1b"):
        with pytest.raises(ValueError, match=r"^the device is") as caught:
            utils.choose_device(name)
        assert "\x1b" not in str(caught.value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert utils.choose_device() == cpu
    with pytest.raises(ValueError, match="the CPU only"):
        utils.choose_device("mps")


def test_nothing_is_assumed_of_a_device_that_was_not_measured():
    mps, network = torch.device("mps"), torch.nn.BatchNorm2d(1)
    assert not utils.has_bf16_units(mps) and utils.fastest_memory_format(mps, network) == torch.contiguous_format
    assert utils.fastest_memory_format(torch.device("cpu"), network) == torch.channels_last
    assert utils.fastest_memory_format(torch.device("cuda"), torch.nn.Conv2d(1, 1, 1)) == torch.channels_last


def test_whole_numbers_are_restored_whichever_type_they_have():
    namespace = {"ratio": 3.0, "count": 5}
    assert utils.restore_parameters(namespace, {"ratio": 2, "count": 4.0}, given={}) != []
    assert namespace == {"ratio": 2.0, "count": 4} and type(namespace["ratio"]) is float
    assert "count was 4.5" in utils.restore_parameters(namespace, {"count": 4.5}, given={})[0]
    assert namespace["count"] == 4
