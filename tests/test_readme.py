"""The README: its commands run, its examples compute, its figures are the script's, its numbers and names are true."""

import contextlib
import doctest
import io
import json
import math
import re
import runpy
import shlex
import subprocess
import sys
import tarfile

import make_figures
import numpy as np
import pytest
import torch
from conftest import REPO
from make_figures import load_picture, match, precision_recall
from make_sample import make_sample
from PIL import Image
from torch import nn

from model import SOURCE_MAPS, SSD300
from utils import override_parameters, script_parameters

TEXT = re.sub(r"<!--.*?-->", "", (REPO / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)
FIGURES = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", TEXT)
# These depend on a trained model, if one is given to the script.
OF_A_MODEL = {"hero.jpg", "mining.jpg", "nms.jpg"}


def read_commands():
    """The command lines of the README, as lists of words."""
    lines = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
    lines += [text for text in INLINE if text.startswith("python ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def find_script(words):
    """Index of the script of this repository that a command runs; None if it runs none."""
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    return scripts[0] if scripts else None


# ----------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------


def test_every_command_is_of_a_known_kind():
    commands = read_commands()
    assert len(commands) > 20
    for words in commands:
        if find_script(words) is not None:
            launcher = words[: find_script(words)]
            assert launcher in (["python"], [".venv/bin/python"]) or launcher[0] == "torchrun", words
        else:
            assert words[0] in ("make", "python3", ".venv/bin/python"), words


def test_plain_commands_are_those_of_the_makefile():
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    recipes = [line[1:].replace("$(PYTHON)", ".venv/bin/python") for line in makefile.splitlines() if line[:1] == "\t"]
    plain = [" ".join(words) for words in read_commands() if words[0] in ("python3", ".venv/bin/python")]
    assert len(plain) == 7
    assert set(plain) <= set(recipes)
    for target in re.findall(r"make (\w+)", " ".join(INLINE) + " ".join(block for _, block in BLOCKS)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"the Makefile has no target {target}"


@pytest.mark.parametrize("words", read_commands(), ids=" ".join)
def test_overrides_are_parameters(words):
    index = find_script(words)
    if index is None:
        return
    namespace = load_namespace(words[index])
    override_parameters(namespace, words[index + 1 :])  # SystemExit, with the valid names, if one is not


NAMESPACES = {}


def load_namespace(script):
    """The globals of a script of the repository, a fresh copy."""
    if script not in NAMESPACES:
        NAMESPACES[script] = runpy.run_path(str(REPO / script), run_name="imported")
    return dict(NAMESPACES[script])


# Files that the commands write, by the names that the README gives them.
WRITTEN = {
    "TRAIN_images.json": "data", "TRAIN_objects.json": "data", "TEST_images.json": "data", "TEST_objects.json": "data",
    "label_map.json": "data", "data_report.txt": "data", "train_log.csv": "", "checkpoint_ssd300.pth.tar": "",
    "best_checkpoint_ssd300.pth.tar": "",
}  # fmt: skip

SCRIPTS = sorted({words[find_script(words)] for words in read_commands() if find_script(words) is not None})


def test_inline_overrides_are_parameters():
    named = {match[1] for text in INLINE for match in re.finditer(r"(?:^| )--(\w+)(?==|$| )", text)}
    named -= {"name", "help"}  # `--name=value` itself
    parameters = {name for script in SCRIPTS for name in script_parameters(load_namespace(script))}
    assert len(named) > 10
    assert named <= parameters


# What the commands of a script are shortened by. The network is the small one of standin.py.
SHORTENED = {
    "train.py": ["--batch_size=2", "--workers=0", "--pretrained=", "--evaluate_every=1"],
    "eval.py": ["--workers=0", "--batch_size=2"],
    "create_data_lists.py": [],
    "detect.py": [],
}

# Runs commands, and then Python code, with the small network, all in one process.
DRIVER = """
import json, runpy, sys
sys.path[:0] = {paths!r}
import standin
standin.shrink_network()
for script, arguments in json.load(sys.stdin):
    print("$", script, *arguments, flush=True)
    if script == "":
        exec(arguments[0], dict(__name__="readme"))
        continue
    sys.argv = [script, *arguments]
    try:
        runpy.run_path({repo!r} + "/" + script, run_name="__main__")
    except SystemExit as error:
        if error.code:
            raise
"""


@pytest.fixture
def workplace(tmp_path):
    """A folder with the data that the README's commands name."""
    make_sample(tmp_path / "my_data", n_train=3, n_test=2, seed=0)
    as_voc = {"circle": "person", "rectangle": "car", "star": "dog", "triangle": "cat"}
    for year in ("VOC2007", "VOC2012"):
        make_sample(tmp_path / "VOCdevkit" / year, n_train=2, n_test=2, seed=int(year[3:]))
        for path in (tmp_path / "VOCdevkit" / year / "Annotations").iterdir():
            text = path.read_text()
            for old, new in as_voc.items():
                text = text.replace(f"<name>{old}<", f"<name>{new}<")
            path.write_text(text)
    make_sample(tmp_path / "demo" / "sample", n_train=0, n_test=1, seed=1)
    (tmp_path / "photos").mkdir()
    categories = [{"id": i, "name": name} for i, name in enumerate(as_voc, start=1)]
    for split in ("train", "test"):
        noise = np.random.default_rng(len(split)).integers(0, 256, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{split}.jpg")
        annotations = [{"image_id": 1, "category_id": i, "bbox": [10 * i, 9, 40, 50]} for i in range(1, 5)]
        images = [{"id": 1, "file_name": f"{split}.jpg"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    frames = [Image.new("RGB", (64, 48), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "photo.jpg")
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=50)
    return tmp_path


def test_commands_run(workplace):
    """All commands of the pipeline in the README's order, training shortened; then its Python code.

    Not run: what downloads (VOC), tools/demo.py (minutes), tools/convert_weights.py (needs a foreign file; see
    test_convert_weights.py), and tools/make_figures.py (below).
    """
    todo, n_iterations = [], 0
    for words in read_commands():
        index = find_script(words)
        if index is None or words[index] not in SHORTENED or "--download=True" in words:
            continue
        script, arguments = words[index], words[index + 1 :]
        extra = list(SHORTENED[script])
        if script == "train.py":
            n_iterations = n_iterations + 1 if any(a.startswith("--checkpoint=") for a in arguments) else 1
            extra.append(f"--iterations={n_iterations}")
        todo.append((script, arguments + extra))
        if script == "train.py":  # the demo's checkpoint, which a command of detect.py takes
            copy = "import shutil; shutil.copy('checkpoint_ssd300.pth.tar', 'demo')"
            todo.append(("", [copy]))
    assert {script for script, _ in todo} == {*SHORTENED, ""}
    todo += [("", [block]) for kind, block in BLOCKS if kind == "python"]
    code = DRIVER.format(paths=[str(REPO / "tests"), str(REPO / "tools"), str(REPO)], repo=str(REPO))
    process = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(todo), cwd=workplace, capture_output=True, text=True, timeout=400
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    written = [f"{folder or '.'}/{name}" for name, folder in WRITTEN.items()]
    written += [f"detections/{name}" for name in ("photo.jpg", "test_00001.jpg", "clip.gif")]
    for name in (*written, "annotated/test_00001.jpg", "found/comp4_det_test_circle.txt"):
        assert (workplace / name).is_file(), name


def test_interactive_examples():
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    examples = parser.get_doctest(TEXT, {}, "README.md", "README.md", 0)
    assert len(examples.examples) > 15
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        runner.run(examples)
    assert runner.failures == 0, report.getvalue()


# ----------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------


def test_figures_are_shown_and_described():
    shown = [path for _, path in FIGURES]
    assert len(set(shown)) == len(shown)
    assert all(len(description) > 40 for description, _ in FIGURES)
    in_folder = {f"img/{path.name}" for path in (REPO / "img").iterdir() if path.suffix != ".csv"}
    assert set(shown) == in_folder
    assert {f"img/{name}" for name in make_figures.FIGURES} - {"img/training.png"} <= in_folder
    assert in_folder <= {f"img/{name}" for name in make_figures.FIGURES}


def test_figures_are_made_by_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_figures, "output_folder", tmp_path)
    monkeypatch.setattr(make_figures, "readme", "")
    make_figures.main()
    drawn = {path.name: path for path in tmp_path.iterdir()}
    if (REPO / make_figures.log_file).is_file():
        assert set(drawn) == set(make_figures.FIGURES)
    else:
        assert set(drawn) == set(make_figures.FIGURES) - {"training.png"}
        assert "no training curve" in capsys.readouterr().out
    for name, path in drawn.items():
        assert path.stat().st_size <= 150_000
        committed = REPO / "img" / name
        assert committed.stat().st_size <= 150_000
        with Image.open(path) as new, Image.open(committed) as old:
            assert new.size == old.size
            pixels = [np.asarray(image.convert("RGB"), dtype=float) for image in (new, old)]
        assert np.median(pixels[0]) > 100  # a light ground
        if name not in OF_A_MODEL:  # of another version of Pillow, letters may differ a little
            assert np.abs(pixels[0] - pixels[1]).mean() < 3, f"{name} is out of date: make figures"


def test_training_curve(tmp_path, monkeypatch):
    rows = ["iteration,epoch,loss,lr,images_per_second,mAP"]
    rows += [f"{10 * i},{i},{20 / i},1e-3,5.0," for i in range(1, 60)] + ["600,60,,,,0.5"]
    (tmp_path / "log.csv").write_text("\n".join(rows))
    monkeypatch.setattr(make_figures, "log_file", tmp_path / "log.csv")
    figure = make_figures.draw_training(None)
    assert 0 < make_figures.save(figure, tmp_path / "training.png") < 150_000


def test_a_figure_that_is_too_large_is_refused(tmp_path):
    sheet = make_figures.Sheet(600)
    noise = np.random.default_rng(0).integers(0, 256, (600, 1200, 3), dtype=np.uint8)
    sheet.photo(Image.fromarray(noise), (0, 0, 1200, 600))
    with pytest.raises(ValueError, match=r"noise\.jpg has \d+ bytes"):
        make_figures.save(sheet, tmp_path / "noise.jpg")


# ----------------------------------------------------------------------------------------------
# Links and names
# ----------------------------------------------------------------------------------------------


def slug(heading):
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).strip().lower()).replace(" ", "-")


def test_links_resolve():
    anchors = {slug(heading) for heading in re.findall(r"^#+ (.*)$", PROSE, re.MULTILINE)}
    links = re.findall(r"\]\(([^)\s]+)\)", TEXT)
    assert len(links) > 60
    for link in links:
        path, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        if path:
            assert (REPO / path).exists(), link
            assert not anchor or re.fullmatch(r"L\d+", anchor), link
        else:
            assert anchor in anchors, link


def test_links_to_code_name_the_right_line():
    assert len(make_figures.CODE_LINK.findall(TEXT)) > 20
    wrong = [
        f"{link[1]} in {link[2]}" for link in make_figures.CODE_LINK.finditer(TEXT)
        if make_figures.update_links(link[0]) != link[0]
    ]  # fmt: skip
    assert not wrong, f"lines of {', '.join(wrong)}: `make figures` sets them anew"


def test_definitions_are_found(tmp_path, monkeypatch):
    code = "threshold = 1\n\nclass A:\n    def run(self):\n        pass\n\nclass B:\n    def run(self):\n        pass\n"
    (tmp_path / "a.py").write_text(code)
    monkeypatch.setattr(make_figures, "REPO", tmp_path)
    found = [make_figures.find_definition("a.py", name) for name in ("threshold", "A", "A.run", "B.run")]
    assert found == [1, 3, 4, 8]
    assert make_figures.update_links("x [`B.run()`](a.py#L77) y") == "x [`B.run()`](a.py#L8) y"
    with pytest.raises(ValueError, match=r"a\.py does not define B\.walk"):
        make_figures.find_definition("a.py", "B.walk")


def test_everything_named_exists():
    """What is in code type is a file of the repository, or made of words that its code has."""
    sources = [*REPO.glob("*.py"), *REPO.glob("tools/*.py"), REPO / "Makefile"]
    words = set(re.findall(r"\w+", " ".join(path.read_text(encoding="utf-8") for path in sources)))
    # A file of the Caffe code; variables of an example.
    words |= {"ssd_pascal", "W", "x", "small"}
    commands = ("python", "pip", "apt", "source", "--")
    names = [text for text in INLINE if not text.startswith(commands) and text not in WRITTEN]
    assert len(names) > 60
    for text in names:
        if text == "_pixels":  # how a name ends
            assert any(word.endswith(text) for word in words)
        elif not (REPO / text).exists():
            missing = set(re.findall(r"[A-Za-z_]\w*", text)) - words
            assert not missing, f"`{text}`: {missing}"
            assert not re.fullmatch(r"[\w/]+\.(py|ipynb)", text) or text == "ssd_pascal.py", text


def test_the_file_map_is_complete():
    section = TEXT[TEXT.index("\n## File map") : TEXT.index("\n## Reliability")]
    for path in [*REPO.glob("*.py"), *REPO.glob("tools/*.py"), *REPO.glob("notebooks/*.ipynb")]:
        name = path.relative_to(REPO).as_posix()
        assert f"[`{name}`]({name})" in section, f"the file map lacks {name}"


# ----------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------


def says(*texts):
    """Whether the README has all of some texts (line breaks count as spaces)."""
    flat = " ".join(PROSE.split())
    missing = [text for text in texts if text not in flat]
    assert not missing, missing
    return True


def test_table_of_priors():
    rows = re.findall(r"^\| (conv\w+) \| (\d+) × \2 \| ([\d.]+) \| ([\d, /]+) \| (\d) \| (\d+) \|$", TEXT, re.MULTILINE)
    assert len(rows) == len(SOURCE_MAPS)
    for (name, grid, scale, ratios, n_priors, total), source in zip(rows, SOURCE_MAPS, strict=True):
        assert (name, int(grid), float(scale)) == (source.name, source.grid, source.scale)
        values = [float(a) / float(b or 1) for a, _, b in (ratio.partition("/") for ratio in ratios.split(", "))]
        assert values == pytest.approx(source.aspect_ratios)
        assert (int(n_priors), int(total)) == (source.n_priors, source.grid**2 * source.n_priors)
    n_priors = len(SSD300.create_prior_boxes())
    assert sum(int(row[-1]) for row in rows) == n_priors
    assert says(f"| together | | | | | **{n_priors}** |", f"P = {n_priors} priors", f"scores (N, {n_priors}, C)")


def test_priors_in_words():
    priors_cxcy = SSD300.create_prior_boxes()
    conv9_2 = SOURCE_MAPS[3]
    start = sum(source.grid**2 * source.n_priors for source in SOURCE_MAPS[:3])
    sizes = (300 * priors_cxcy[start : start + conv9_2.n_priors, 2:]).round().int().tolist()
    assert says(", ".join(f"{w} x {h}" for w, h in sizes))
    assert says(f"is {conv9_2.scale} · 300 = {sizes[0][0]} pixels", f"√(0.55 · 0.725) · 300 = {sizes[1][0]}.")
    assert says(f"0.55√2 · 300 = {sizes[2][0]} by 0.55/√2 · 300 = {sizes[2][1]}")
    low, high = priors_cxcy[:, :2] - priors_cxcy[:, 2:] / 2, priors_cxcy[:, :2] + priors_cxcy[:, 2:] / 2
    n_beyond = int(((low < 0) | (high > 1)).any(dim=1).sum())
    assert says(f"beyond the image: {n_beyond} of them do")
    # A box inside a prior of the smallest area overlaps it by side^2 / area.
    area = float((300 * priors_cxcy[:, 2:]).prod(dim=1).min())
    assert area == pytest.approx(30**2, rel=1e-5)
    assert says("an area of 30 × 30 pixels", f"fewer than {math.floor((area / 2) ** 0.5)} pixels overlaps none")


@pytest.fixture(scope="module")
def traced():
    """The network for VOC, and its convolutions and poolings in the order of use, with the sizes of their maps."""
    with torch.device("meta"):
        model = SSD300(n_classes=21)
    order = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
            module.register_forward_hook(lambda m, _, output, name=name: order.append((name, m, output.shape[2])))
    model(torch.empty(1, 3, 300, 300, device="meta"))
    return model, order


def test_size_of_the_network(traced):
    model, order = traced
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert says(f"the model has {n_parameters / 1e6:.1f} million parameters")
    costs = {name: side**2 * m.weight.numel() for name, m, side in order if isinstance(m, nn.Conv2d)}
    total = sum(costs.values())
    in_base = sum(cost for name, cost in costs.items() if name.startswith("base."))
    assert says(f"costs {total / 1e9:.1f} billion multiply-adds, {in_base / total:.0%} of them in the base")
    sides = {name.rpartition(".")[2]: side for name, _, side in order}
    assert all(sides[source.name] == source.grid for source in SOURCE_MAPS)
    assert (sides["conv3_3"], sides["pool3"], sides["pool5"]) == (75, 38, 19)
    assert says("From 75 × 75 it makes 38 × 38, not 37 × 37", "conv7's map has 19 × 19 cells")
    fc6, conv6 = 4096 * 512 * 7 * 7, model.base.conv6.weight.numel()
    assert says(f"4096 × 512 × 7 × 7 = {fc6:,} weights", f"1024 × 512 × 3 × 3 = {conv6:,}, is conv6")
    heads = model.pred_convs.loc_conv9_2.out_channels, model.pred_convs.cl_conv9_2.out_channels
    assert says(f"that is {heads[0]} and {heads[1]}")


def test_receptive_fields(traced):
    _, order = traced
    field, step, of_heads = 1, 1, {}
    for name, module, _ in order:
        if name.startswith("pred_convs"):
            continue
        geometry = module.kernel_size, module.stride, module.dilation
        side, stride, dilation = (value[0] if isinstance(value, tuple) else value for value in geometry)
        field, step = field + (side - 1) * dilation * step, step * stride
        of_heads[name.rpartition(".")[2]] = field + 2 * step  # a head's kernel is 3 x 3
    largest = {}
    for source in SOURCE_MAPS:
        largest[source.name] = 300 * source.scale * max(max(r, 1 / r) for r in source.aspect_ratios) ** 0.5
        assert of_heads[source.name] > largest[source.name]
    first, second = of_heads["conv4_3"], of_heads["conv7"]
    assert says(f"depends on {first} × {first} pixels", f"the largest prior there is {largest['conv4_3']:.0f} wide")
    assert says(f"on conv7 it is {second} × {second}")


def test_numbers_of_the_figures():
    """Numbers in a figure's description, or in the text about it, which the figure itself computes."""
    model = SSD300(len(make_figures.LABEL_MAP))
    _, boxes_xy, _, _ = load_picture(14)
    objects, is_positive = match(boxes_xy, model)
    counts = sorted((int((is_positive & (objects == i)).sum()) for i in range(len(boxes_xy))), reverse=True)
    assert says("{} objects and the {}, {}, {} and {} priors".format("four", *counts))
    _, boxes_xy, _, _ = load_picture(31)
    n_positives = int(match(boxes_xy, model)[1].sum())
    assert says(f"its {n_positives} positives in blue and the {3 * n_positives} hardest negatives")


def test_example_of_the_metric():
    recalls, precisions, average_precision = precision_recall()
    assert says(f"average precision, is {average_precision:.3f}", f"**average precision**: {average_precision:.3f}")
    rows = re.findall(r"^\| \d \| [\w ]+ \| (\d) \| (\d)/(\d) \| (\d)/6 \|$", TEXT, re.MULTILINE)
    assert [int(found) / int(of) for _, found, of, _ in rows] == pytest.approx(precisions)
    assert [int(found) / 6 for _, _, _, found in rows] == pytest.approx(recalls)
    assert all(true == found == recalled for true, found, _, recalled in rows)
    assert average_precision == pytest.approx((4 * 1 + 2 * 3 / 4 + 4 / 7) / 11)


def test_parameters_in_words():
    train, evaluate, lists = (load_namespace(name) for name in ("train.py", "eval.py", "create_data_lists.py"))
    assert (train["batch_size"], train["iterations"], train["lr"], train["warmup"]) == (32, 120_000, 1e-3, 500)
    assert (train["decay_lr_at"], train["bias_lr_factor"], train["weight_decay"]) == ((80_000, 100_000), 2, 5e-4)
    assert (train["momentum"], train["threshold"], train["neg_pos_ratio"], train["alpha"]) == (0.9, 0.5, 3, 1)
    assert says("SGD, momentum 0.9, weight decay 0.0005", "0.001, ÷ 10 at 80,000 and 100,000 of 120,000 iterations")
    assert says("learning rate × 2, no weight decay", "linear, over 500 iterations", "120,000 iterations of 32 images")
    assert (evaluate["min_score"], evaluate["max_overlap"], evaluate["top_k"]) == (0.01, 0.45, 200)
    assert says("evaluates with 0.01, 0.45 and 200") and load_namespace("detect.py")["min_score"] == 0.2
    assert lists["test_fraction"] == 0.2 and says("a fifth of the images becomes the test set")
    assert train["keep_difficult"] and train["log_every"] == 10 and says("a row for every ten iterations")


def test_counts_of_voc(real_data):
    counts = {}
    with tarfile.open(real_data / "voc_annotations.tar.xz") as archive:
        contents = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
    for year, split in (("2007", "trainval"), ("2012", "trainval"), ("2007", "test")):
        folder = f"VOCdevkit/VOC{year}"
        names = contents[f"{folder}/ImageSets/Main/{split}.txt"].decode().split()
        texts = [contents[f"{folder}/Annotations/{name}.xml"] for name in names]
        n_objects = sum(text.count(b"<object>") for text in texts)
        n_difficult = sum(text.count(b"<difficult>1</difficult>") for text in texts)
        before = counts.get(split, (0, 0, 0))
        counts[split] = tuple(map(sum, zip(before, (len(texts), n_objects, n_objects - n_difficult), strict=True)))
    train, test = counts["trainval"], counts["test"]
    assert says(f"{train[0]:,} training images with {train[1]:,} objects ({train[2]:,} of them not marked as")
    assert says(f"{test[0]:,} test images with {test[1]:,} objects ({test[2]:,})")


def test_nothing_is_left_to_be_filled_in():
    assert not re.findall(r"^[A-Z]{3,}$|TODO|FIXME|<!--", (REPO / "README.md").read_text(), re.MULTILINE)
