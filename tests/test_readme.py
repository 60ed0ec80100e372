"""The README and docs/: commands parse, examples compute, links lead somewhere, tables are what the code computes."""

import contextlib
import doctest
import io
import re
import runpy
import shlex
import tarfile

import make_figures
import pytest
import scene
import torch
from helpers import REPO
from PIL import Image
from torch import nn

from model import NETWORKS, SSD300
from utils import override_parameters, script_parameters

README = (REPO / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(REPO).as_posix(): path.read_text(encoding="utf-8") for path in REPO.glob("docs/*.md")}
PAGES["README.md"] = README
TEXT = "\n".join(PAGES.values())
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)
FIGURES = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", TEXT)


def read_commands():
    """The command lines of the pages, as lists of words."""
    lines = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
    lines += [text for text in INLINE if text.startswith("python ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def find_script(words):
    """Index of the script of this repository that a command runs; None if it runs none."""
    return next((i for i, word in enumerate(words) if word.endswith(".py")), None)


def load_namespace(script):
    """The globals of a script of the repository, a fresh copy."""
    return runpy.run_path(str(REPO / script), run_name="imported")


def test_every_command_is_of_a_known_kind():
    commands = read_commands()
    assert len(commands) > 20
    for words in commands:
        if find_script(words) is not None:
            launcher = words[: find_script(words)]
            assert launcher in (["python"], [".venv/bin/python"]) or launcher[0] == "torchrun", words
        else:
            assert words[0] in ("make", "python3", ".venv/bin/python", "pip"), words


def test_targets_of_make_exist():
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([\w-]+)", " ".join(INLINE) + " ".join(block for _, block in BLOCKS)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"the Makefile has no target {target}"


@pytest.mark.parametrize("words", [w for w in read_commands() if find_script(w) is not None], ids=" ".join)
def test_overrides_are_parameters(words):
    index = find_script(words)
    override_parameters(load_namespace(words[index]), words[index + 1 :])  # SystemExit if one is not


def test_inline_overrides_are_parameters():
    named = {match[1] for text in INLINE for match in re.finditer(r"(?:^| )--(\w+)(?==|$| )", text)}
    named -= {"name", "help"}  # `--name=value` itself
    scripts = {words[find_script(words)] for words in read_commands() if find_script(words) is not None}
    parameters = {name for script in scripts for name in script_parameters(load_namespace(script))}
    assert len(named) > 10 and named <= parameters, named - parameters


def test_examples_compute_what_they_show():
    examples = "\n".join(block for kind, block in BLOCKS if kind == "pycon")
    assert examples.count(">>>") > 15
    test = doctest.DocTestParser().get_doctest(examples, {}, "README", None, 0)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        doctest.DocTestRunner().run(test)
    assert output.getvalue() == ""


def test_python_blocks_compile():
    for kind, block in BLOCKS:
        if kind == "python":
            compile(block, "README", "exec")


def anchor(title):
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        path, _, part = target.partition("#")
        file = ((REPO / page).parent / path).resolve() if path else REPO / page
        assert file.exists(), f"{page}: {target}"
        if part and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert part in map(anchor, titles), f"{page}: {target}"


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_to_code_have_the_right_line(page):
    assert make_figures.update_links(PAGES[page]) == PAGES[page], "run `make figures`"


def test_tables_of_the_scene_are_computed():
    assert README.count("<!-- scene:") == len(scene.TABLES)
    assert scene.fill_in_tables(README) == README, "run `make figures`"


def test_the_scene_tells_what_the_text_says():
    """The star is too small for any prior, owns one all the same, and the seven priors show every case."""
    here = scene.Scene()
    assert here.names == ["rectangle", "star"]
    assert float(here.all_overlaps[:, 1].max()) < 0.5 <= float(here.all_overlaps[:, 0].max())
    assert set(here.owners()) == {(0, 1), (0, 2), (1, 1), (None, 2)}
    width, height = ((here.boxes_xy[1, 2:] - here.boxes_xy[1, :2]) * 300).round().int().tolist()
    assert f"{width} × {height} pixels" in README
    assert f"more than {float(here.all_overlaps[:, 1].max()):.2f}" in README


def test_numbers_of_the_precision_recall_example():
    recalls, precisions, average_precision = make_figures.precision_recall()
    rows = re.findall(r"^\| \d \|.*\| (\d)/(\d) \| (\d)/(\d) \|$", README, re.MULTILINE)
    assert [int(a) / int(b) for a, b, _, _ in rows] == pytest.approx(precisions)
    assert [int(c) / int(d) for _, _, c, d in rows] == pytest.approx(recalls)
    assert f"{average_precision:.3f}" in README


def test_figures_are_the_script_s_and_can_be_read_aloud():
    shown = {path for _, path in FIGURES}
    assert shown == {f"img/{name}" for name in make_figures.FIGURES}
    for words, path in FIGURES:
        assert len(words.split()) > 5, f"{path}: no words for those who cannot see it"
        with Image.open(REPO / path) as image:
            assert image.width >= 400
        assert (REPO / path).stat().st_size <= make_figures.MAX_BYTES


def test_file_map_names_every_script():
    for path in REPO.glob("*.py"):
        assert f"[`{path.name}`]({path.name})" in README


# ----------------------------------------------------------------------------------------------
# Numbers in the text that the code can compute
# ----------------------------------------------------------------------------------------------

WORDS = " ".join(README.split())
SOURCES = NETWORKS["ssd300_vgg16"].sources


def test_priors_in_the_text():
    rows = re.findall(r"^\| (conv\w+) \| (\d+) × \2 \| ([\d.]+) \| [\d, /]+ \| (\d) \| (\d+) \|$", README, re.MULTILINE)
    computed = [(s.name, str(s.grid), f"{s.scale:g}", str(s.n_priors), str(s.grid**2 * s.n_priors)) for s in SOURCES]
    assert rows == computed
    priors_cxcy = SSD300.create_prior_boxes()
    low, high = priors_cxcy[:, :2] - priors_cxcy[:, 2:] / 2, priors_cxcy[:, :2] + priors_cxcy[:, 2:] / 2
    assert f"{int(((low < 0) | (high > 1)).any(dim=1).sum())} of the {len(priors_cxcy)} do" in WORDS
    area = float((300 * priors_cxcy[:, 2:]).prod(dim=1).min())
    assert f"fewer than {int((area / 2) ** 0.5)} pixels" in WORDS
    for name, row in NETWORKS.items():
        n_priors = sum(source.n_priors * source.grid**2 for source in row.sources)
        assert f"| {row.input_size} | {n_priors:,} |".replace("8,732", "8732").replace("3,234", "3234") in README or (
            f"`{name}`" in README and name.endswith("_coco")
        )


def test_size_and_view_of_the_network():
    with torch.device("meta"):
        model = SSD300(n_classes=21)
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
            module.register_forward_hook(lambda m, _, output, name=name: layers.append((name, m, output.shape[2])))
    model(torch.empty(1, 3, 300, 300, device="meta"))
    costs = {name: side**2 * layer.weight.numel() for name, layer, side in layers if isinstance(layer, nn.Conv2d)}
    in_base = sum(cost for name, cost in costs.items() if name.startswith("base.")) / sum(costs.values())
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"{n_parameters / 1e6:.1f} million parameters" in WORDS
    assert f"{sum(costs.values()) / 1e9:.1f} billion multiply-adds, and {in_base:.0%} of them" in WORDS
    field, step, fields = 1, 1, {}
    for name, layer, _ in layers:
        if not name.startswith("pred_convs"):
            geometry = (layer.kernel_size, layer.stride, layer.dilation)
            side, stride, dilation = (value[0] if isinstance(value, tuple) else value for value in geometry)
            field, step = field + (side - 1) * dilation * step, step * stride
            fields[name.rpartition(".")[2]] = field + 2 * step  # a head's kernel is 3 x 3
    assert f"on {fields['conv4_3']} × {fields['conv4_3']} pixels" in WORDS
    assert f"on {fields['conv7']} × {fields['conv7']} pixels" in WORDS


def test_recipe_in_the_text_is_the_default():
    train, evaluate = load_namespace("train.py"), load_namespace("eval.py")
    assert (train["batch_size"], train["iterations"], train["lr"], train["warmup"]) == (32, 120_000, 1e-3, 500)
    assert (train["decay_lr_at"], train["bias_lr_factor"], train["weight_decay"]) == ((80_000, 100_000), 2, 5e-4)
    assert (train["momentum"], train["threshold"], train["neg_pos_ratio"], train["alpha"]) == (0.9, 0.5, 3, 1)
    assert "SGD, momentum 0.9, weight decay 0.0005" in WORDS and "after 80,000 and 100,000 of 120,000" in WORDS
    assert (evaluate["min_score"], evaluate["max_overlap"], evaluate["top_k"]) == (0.01, 0.45, 200)
    assert "min_score = 0.01, max_overlap = 0.45 and top_k = 200" in WORDS


def test_counts_of_voc(real_data):
    counts = {"trainval": [0, 0, 0], "test": [0, 0, 0]}
    with tarfile.open(real_data / "voc_annotations.tar.xz") as archive:
        contents = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
    for year, split in (("2007", "trainval"), ("2012", "trainval"), ("2007", "test")):
        folder = f"VOCdevkit/VOC{year}"
        names = contents[f"{folder}/ImageSets/Main/{split}.txt"].decode().split()
        texts = [contents[f"{folder}/Annotations/{name}.xml"] for name in names]
        n_objects = sum(text.count(b"<object>") for text in texts)
        n_easy = n_objects - sum(text.count(b"<difficult>1</difficult>") for text in texts)
        counts[split] = [a + b for a, b in zip(counts[split], (len(texts), n_objects, n_easy), strict=True)]
    train, test = counts["trainval"], counts["test"]
    assert f"{train[0]:,} training images with {train[1]:,} objects ({train[2]:,} of them not difficult)" in WORDS
    assert f"{test[0]} test images with {test[1]:,} objects ({test[2]:,})" in WORDS


def test_nothing_is_left_to_be_filled_in():
    assert not re.findall(r"\b[A-Z]+_(?:ALT|TABLE|CPU|GPU)\b|TODO|FIXME|^[A-Z]{5,}$", TEXT, re.MULTILINE)
