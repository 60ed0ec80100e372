"""The README and docs/: commands parse, examples compute, links lead somewhere, tables and quotes are the code's."""

import doctest
import json
import re
import runpy
import shlex
import tarfile

import figures_theory
import make_figures
import numpy as np
import pytest
import scene
import torch
from helpers import REPO
from PIL import Image
from torch import nn
from torchvision.ops import batched_nms

from model import BACKGROUND, NETWORKS, SSD300, MultiBoxLoss, detect_objects
from utils import find_jaccard_overlap, override_parameters, script_parameters


def without_comments(text):
    """What a reader sees. (Comments mark what is computed, and where the photos go.)"""
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


FILES = (REPO / "README.md", *REPO.glob("docs/*.md"))
PAGES = {path.relative_to(REPO).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
README = PAGES["README.md"]
TEXT = "\n".join(PAGES.values())
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)
FIGURES = re.findall(r"!\[([^\]]*)\]\((?:\.\./)?([^)]+)\)", without_comments(TEXT))
LINES = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
LINES += [text for text in INLINE if text.startswith("python ")]
COMMANDS = [words for line in LINES if (words := shlex.split(line, comments=True))]
# Those that run a script of this repository: what launches it, its name, the arguments.
RUNS = [(words[:i], name, words[i + 1 :]) for words in COMMANDS for i, name in enumerate(words) if ".py" in name]


def load_namespace(script):
    """The globals of a script of the repository, a fresh copy."""
    return runpy.run_path(str(REPO / script), run_name="imported")


def test_every_command_is_of_a_known_kind():
    assert len(RUNS) > 20
    for launcher, *_ in RUNS:
        assert launcher in (["python"], [".venv/bin/python"]) or launcher[0] == "torchrun", launcher
    others = {words[0] for words in COMMANDS if not any(".py" in word for word in words)}
    assert others <= {"make", "python3", ".venv/bin/python", "pip", "source"}


def test_targets_of_make_exist():
    targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"make ([\w-]+)", " ".join([*INLINE, *(block for _, block in BLOCKS)]))) <= {*targets}


@pytest.mark.parametrize(("script", "arguments"), [run[1:] for run in RUNS], ids=str)
def test_overrides_are_parameters(script, arguments):
    override_parameters(load_namespace(script), arguments)  # SystemExit if one is not


def test_inline_overrides_are_parameters():
    named = {match[1] for text in INLINE for match in re.finditer(r"(?:^| )--(\w+)(?==|$| )", text)}
    named -= {"name", "help"}  # `--name=value` itself
    parameters = {name for script in {run[1] for run in RUNS} for name in script_parameters(load_namespace(script))}
    assert len(named) > 10 and named <= parameters, named - parameters


@pytest.mark.parametrize(("page", "n_examples"), [("README.md", 25), ("docs/manual.md", 3)])
def test_examples_compute_what_they_show(page, n_examples):
    blocks = re.findall(r"^```pycon\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, page, None, 0)
    results = doctest.DocTestRunner().run(test)  # prints what differs
    assert results.failed == 0 and results.attempted >= n_examples


def test_python_blocks_compile():
    for block in (block for kind, block in BLOCKS if kind == "python"):
        compile(block, "README", "exec")


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", without_comments(PAGES[page])):
        path, _, part = target.partition("#")
        file = ((REPO / page).parent / path).resolve() if path else REPO / page
        assert file.exists(), f"{page}: {target}"
        if part and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8").lower(), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.strip()).replace(" ", "-") for title in titles]  # GitHub's
            assert part in anchors, f"{page}: {target}"


@pytest.mark.parametrize("page", sorted(PAGES))
def test_tables_quotes_and_lines_of_links_are_the_code_s(page):
    assert make_figures.update_page(PAGES[page]) == PAGES[page], "run `make figures FIGURES=--pages_only=True`"


def test_every_table_of_the_scene_is_shown():
    assert sorted(re.findall(r"<!-- scene:(\w+) -->", README)) == sorted(scene.TABLES)


QUOTES = re.findall(r"<!-- code:([\w/.]+):([\w.]+) -->\n```python\n(.*?)\n```\n<!-- end -->", TEXT, flags=re.DOTALL)


def test_code_is_quoted_between_marks():
    assert len(QUOTES) == TEXT.count("<!-- code:") > 10
    assert TEXT.count("<!-- end -->") == len(QUOTES) + TEXT.count("<!-- scene:")


@pytest.mark.parametrize(("file", "name", "quoted"), QUOTES, ids=[name for _, name, _ in QUOTES])
def test_quoted_code_is_the_code(file, name, quoted):
    """Line by line in the file, in this order, without the docstring."""
    assert make_figures.source_of(file, name) == quoted, "run `make figures FIGURES=--pages_only=True`"
    lines = (REPO / file).read_text(encoding="utf-8").splitlines()
    defined = make_figures.find_definition(file, name).lineno
    own = [line.strip() for line in lines[defined - 3 : defined + 80]]
    place = 0
    for line in quoted.splitlines():
        place = own.index(line.strip(), place) + 1  # ValueError: not there, or in another order


def test_source_of_a_function_without_its_docstring():
    quoted = make_figures.source_of("utils.py", "cxcy_to_gcxgcy").splitlines()
    assert quoted[0].startswith("def cxcy_to_gcxgcy(") and quoted[-1].startswith("    return ")
    assert not any("Encode boxes" in line for line in quoted)
    assert "is_lite" not in make_figures.source_of("model.py", "SSD300.create_prior_boxes")
    with pytest.raises(ValueError, match="does not define nothing"):
        make_figures.source_of("model.py", "nothing")


def test_the_scene_tells_what_the_text_says():
    """The triangle is too small for any prior, owns one all the same, and the eight priors show every case."""
    here = scene.Scene()
    assert here.image.size == (300, 300)
    left, right, circle, triangle = here.boxes_xy
    assert here.names == ["star", "star", "circle", "triangle"]
    assert 0.1 < float(find_jaccard_overlap(left[None], right[None])) < 0.45
    assert float(find_jaccard_overlap(torch.stack([left, right]), torch.stack([circle, triangle])).max()) == 0
    best_overlaps = here.all_overlaps.max(dim=1).values  # (4,)
    assert float(best_overlaps[scene.TINY]) < 0.5 <= float(best_overlaps[: scene.TINY].min())
    assert dict(zip(scene.PRIOR_NAMES, here.matched, strict=True)) == {
        "A": 0, "B": 0, "C": 1, "D": BACKGROUND, "E": 2, "F": BACKGROUND, "G": 3, "H": BACKGROUND,
    }  # fmt: skip
    assert {scene.PRIOR_NAMES[prior]: item for item, prior in here.step_1} == {"A": 0, "C": 1, "E": 2, "G": 3}
    width, height = ((triangle[2:] - triangle[:2]) * 300).round().int().tolist()
    assert f"{width} × {height} pixels" in WORDS
    assert f"more than {float(here.all_overlaps[scene.TINY].max()):.2f}" in WORDS
    tied = here.all_overlaps[scene.TINY] > here.all_overlaps[scene.TINY].max() - 1e-5
    assert int(tied.sum()) == 14 and "Fourteen priors tie" in WORDS and "one of the 14 that tie" in WORDS
    _, entropies, counts, loc_losses = scene.losses(here)
    of = dict(zip(scene.PRIOR_NAMES, range(8), strict=True))
    assert bool(counts[of["D"]]) and bool(counts[of["F"]]) and not bool(counts[of["H"]])
    n_apart = int((here.all_overlaps.amax(dim=0) == 0).sum())
    assert f"no object at all, like {n_apart} of the 8732 priors" in WORDS
    assert float(entropies[of["F"]]) > 0.1 > 1000 * float(entropies[of["H"]])  # F is really hard
    ace = float(loc_losses[[of["A"], of["C"], of["E"]]].sum() / loc_losses.sum())
    assert 0.4 < ace < 0.6 and "about half of the localisation loss" in WORDS
    conf, loc = float((entropies * counts).sum()), float(loc_losses.sum())
    total = conf + loc
    assert f"add up to {conf:.2f}, the localisation losses to {loc:.2f}" in WORDS
    assert f"({conf:.2f} + {loc:.2f}) / 5 = **{total / 5:.2f}**" in WORDS
    assert float(entropies[of["G"]] + loc_losses[of["G"]]) > total / 2 and "More than half of the total" in WORDS


def test_matching_and_loss_of_the_scene_are_the_code_s():
    here = scene.Scene()
    owned = {prior: item for item, prior in here.step_1}
    for prior, item in enumerate(here.matched):
        best_overlap, best = here.overlaps[:, prior].max(dim=0)
        in_step_2 = int(best) if best_overlap >= 0.5 else BACKGROUND
        assert item == owned.get(prior, in_step_2)
    labels, entropies, counts, loc_losses = scene.losses(here)
    criterion = MultiBoxLoss(here.priors_cxcy, neg_pos_ratio=scene.NEG_POS_RATIO)
    locs, scores = (torch.tensor(here.predictions[name])[None] for name in ("locs", "scores"))
    loss = criterion(locs, scores, [here.boxes_xy], [here.labels])
    assert float(loss) == pytest.approx(float((entropies * counts).sum() + loc_losses.sum()) / int((labels > 0).sum()))
    assert f"**{float(loss):.2f}**. `MultiBoxLoss` returns the same number" in WORDS


def test_the_suppression_example_ends_right():
    """Each object once, and no two rows of the table alike."""
    here = scene.Scene()
    boxes_xy, names, scores = scene.candidates(here)
    labels, scores = torch.tensor([scene.LABEL_MAP[name] for name in names]), torch.tensor(scores)
    kept = [i for i, _, _, stays in scene.suppression_steps(here) if stays]
    best_overlaps, items = find_jaccard_overlap(boxes_xy[kept], here.boxes_xy).max(dim=1)
    assert sorted(items.tolist()) == [0, 1, 2, 3] and float(best_overlaps.min()) > 0.5
    assert torch.equal(here.labels[items], labels[kept])
    assert float(scores.min()) > scene.MIN_SCORE
    assert sorted(batched_nms(boxes_xy, scores, labels, scene.MAX_OVERLAP).tolist()) == kept
    # The triangle is found by a prior that ties with G, and is not G.
    number = names.index("triangle")
    found_by = here.predictions["candidate_priors"][number]
    overlaps = here.all_overlaps[scene.TINY]
    assert float(overlaps[found_by]) == pytest.approx(float(overlaps.max()), abs=1e-5)
    assert found_by != scene.PRIORS[scene.PRIOR_NAMES.index("G")]
    assert f"found, with a score of {float(scores[number]):.2f}, but not by G" in WORDS
    assert f"that tie, {scene.describe_prior(here, found_by)}." in WORDS
    assert f"a `min_score` of {scene.MIN_SCORE}, our picture has {here.predictions['n_candidates']} candi" in WORDS
    found_by_a = here.predictions["candidate_priors"].index(scene.PRIORS[0])
    assert f"How does A come to the box of candidate {found_by_a + 1}?" in WORDS
    rows = [row for row in scene.candidates_table(here).splitlines() if row.startswith("| **")]
    assert len({row.split("|")[4] for row in rows}) == len(rows) == 7


def test_predictions_of_the_scene_are_written(monkeypatch, tmp_path):
    """Of a network that says what img/scene.json has for the priors there, and background for all others."""
    here = scene.Scene()
    here.model = None
    saved = here.predictions
    locs, scores = torch.zeros(8732, 4), torch.tensor([9.0, 0, 0, 0, 0]).repeat(8732, 1)
    for kind, priors in (("", scene.PRIORS), ("candidate_", saved["candidate_priors"])):
        locs[priors] = torch.tensor(saved[f"{kind}locs"])
        scores[priors] = torch.tensor(saved[f"{kind}scores"])
    limits = (scene.MIN_SCORE, scene.MAX_OVERLAP, scene.TOP_K)
    found = [values[0] for values in detect_objects(locs[None], scores[None], here.all_priors_cxcy, *limits)]
    monkeypatch.setattr(scene, "SCENE_FILE", tmp_path / "scene.json")
    monkeypatch.setattr(scene, "predict", lambda *_: (locs, scores, found))
    scene.write_predictions(here)
    written = json.loads(scene.SCENE_FILE.read_text())
    assert written == {**saved, "n_candidates": written["n_candidates"]}
    assert 7 < written["n_candidates"] < saved["n_candidates"]
    monkeypatch.setattr(scene, "PRIORS", [1, *scene.PRIORS[1:]])
    with pytest.raises(ValueError, match="prior A is not one of the candidates"):
        scene.write_predictions(here)
    without_triangle = [values[:3] for values in found]
    monkeypatch.setattr(scene, "predict", lambda *_: (locs, scores, without_triangle))
    with pytest.raises(ValueError, match=r"\['star', 'circle', 'star'\].*train longer"):
        scene.write_predictions(here)


def test_numbers_of_the_precision_recall_example():
    recalls, precisions, average_precision = figures_theory.precision_recall()
    rows = re.findall(r"^\| \d \|.*\| (\d)/(\d) \| (\d)/(\d) \|$", README, re.MULTILINE)
    assert [int(a) / int(b) for a, b, _, _ in rows] == pytest.approx(precisions)
    assert [int(c) / int(d) for _, _, c, d in rows] == pytest.approx(recalls)
    assert f"{average_precision:.3f}" in README
    points = [max([p for p, r in zip(precisions, recalls, strict=True) if r >= k / 10], default=0) for k in range(11)]
    assert sum(points) / 11 == pytest.approx(average_precision)


def test_figures_are_the_script_s_and_can_be_read_aloud():
    shown = {path for _, path in FIGURES} | {"img/photos.jpg"}  # which is not drawn without a network for photos
    assert shown == {f"img/{name}" for name in make_figures.NAMES}
    for words, path in FIGURES:
        assert len(words.split()) > 5, f"{path}: no words for those who cannot see it"
        with Image.open(REPO / path) as image:
            assert image.width >= 400
        assert (REPO / path).stat().st_size <= make_figures.MAX_BYTES


def test_file_map_names_every_script():
    for path in REPO.glob("*.py"):
        assert f"[`{path.name}`]({path.name})" in README


# --- Numbers in the text that the code can compute ------------------------------------------------

WORDS = " ".join(TEXT.split())
SSD = NETWORKS["ssd300_vgg16"]


def test_priors_in_the_text():
    rows = re.findall(r"^\| (conv\w+) \| (\d+) × \2 \| ([\d.]+) \| [\d, /]+ \| (\d) \| (\d+) \|$", README, re.MULTILINE)
    for row, source, scale in zip(rows, SSD.sources, SSD.scales[:-1], strict=True):
        computed = (source.name, source.grid, f"{scale:g}", source.n_priors, source.grid**2 * source.n_priors)
        assert row == tuple(map(str, computed))
    priors_cxcy = SSD300.create_prior_boxes()
    low, high = priors_cxcy[:, :2] - priors_cxcy[:, 2:] / 2, priors_cxcy[:, :2] + priors_cxcy[:, 2:] / 2
    assert f"{int(((low < 0) | (high > 1)).any(dim=1).sum())} of the {len(priors_cxcy)} do" in WORDS
    area = float((300 * priors_cxcy[:, 2:]).prod(dim=1).min())
    assert f"less than {int((area / 2) ** 0.5)} pixels" in WORDS
    fewer = 37**2 * SSD.sources[0].n_priors
    assert f"37 · 37 · 4 = {fewer} priors" in WORDS
    assert f"{len(priors_cxcy) - 38**2 * SSD.sources[0].n_priors + fewer} in all" in WORDS
    for name, row in NETWORKS.items():
        n_priors = sum(source.n_priors * source.grid**2 for source in row.sources)
        shown = f"{n_priors:,}" if n_priors > 9999 else n_priors
        assert f"`{name}`" in TEXT and (f"| {row.input_size} | {shown} |" in TEXT or name.endswith("_coco"))


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
            side, stride, dilation = (np.max(value) for value in (layer.kernel_size, layer.stride, layer.dilation))
            field, step = field + (side - 1) * dilation * step, step * stride
            fields[name.rpartition(".")[2]] = field + 2 * step  # a head's kernel is 3 x 3
    assert f"on {fields['conv4_3']} × {fields['conv4_3']} pixels" in WORDS
    assert f"on {fields['conv7']} × {fields['conv7']} pixels" in WORDS


def test_parameters_of_the_networks_in_the_text():
    for name in ("ssd300_vgg16", "ssd512_vgg16", "ssd300_vgg16_bn", "ssd300_resnet50", "ssd300_tiny"):
        with torch.device("meta"):
            n = sum(parameter.numel() for parameter in SSD300(21, name).parameters())
        assert f"| `{name}` | {n / 1e6:.1f} M | {12 * n / 1e6:.0f} MB |" in TEXT, name  # three numbers of four bytes


def test_recipe_in_the_text_is_the_default():
    train, evaluate = load_namespace("train.py"), load_namespace("eval.py")
    assert (train["batch_size"], train["iterations"], train["lr"], train["warmup"]) == (32, 120_000, 1e-3, 500)
    assert (train["decay_lr_at"], train["bias_lr_factor"], train["weight_decay"]) == ((80_000, 100_000), 2, 5e-4)
    assert (train["momentum"], train["threshold"], train["neg_pos_ratio"], train["alpha"]) == (0.9, 0.5, 3, 1)
    assert "SGD, momentum 0.9, weight decay 0.0005" in WORDS and "after 80,000 and 100,000 of 120,000" in WORDS
    assert (evaluate["min_score"], evaluate["max_overlap"], evaluate["top_k"]) == (0.01, 0.45, 200)
    assert "min_score = 0.01, max_overlap = 0.45 and top_k = 200" in WORDS


def test_counts_of_voc(real_data):
    with tarfile.open(real_data / "voc_annotations.tar.xz") as archive:
        contents = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}

    def count(split, *years):
        """Images, objects, and objects that are not difficult."""
        texts = []
        for folder in (f"VOCdevkit/VOC{year}" for year in years):
            names = contents[f"{folder}/ImageSets/Main/{split}.txt"].decode().split()
            texts += [contents[f"{folder}/Annotations/{name}.xml"] for name in names]
        n_objects = sum(text.count(b"<object>") for text in texts)
        return len(texts), n_objects, n_objects - sum(text.count(b"<difficult>1</difficult>") for text in texts)

    train, test = count("trainval", 2007, 2012), count("test", 2007)
    assert f"{train[0]:,} training images with {train[1]:,} objects ({train[2]:,} of them not difficult)" in WORDS
    assert f"{test[0]} test images with {test[1]:,} objects ({test[2]:,})" in WORDS


def test_nothing_is_left_to_be_filled_in():
    assert not re.findall(r"\b[A-Z]+_(?:ALT|TABLE|CPU|GPU)\b|TODO|FIXME|^[A-Z]{5,}$", TEXT, re.MULTILINE)
