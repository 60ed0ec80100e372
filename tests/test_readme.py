"""The README: its commands run, its examples compute, its tables are the script's, its links and names are true."""

import contextlib
import doctest
import io
import json
import re
import runpy
import shlex
import subprocess
import sys

import make_figures
import pytest
import scene
from helpers import REPO
from make_sample import make_sample
from PIL import Image

from utils import override_parameters, script_parameters

TEXT = re.sub(r"<!--.*?-->", "", (REPO / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^```.*?^```", "", TEXT, flags=re.DOTALL | re.MULTILINE)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)
FIGURES = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", TEXT)


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
    variables = dict(re.findall(r"^(\w+) = *([^#\n]*)", makefile, re.MULTILINE))
    recipes = [line[1:] for line in makefile.splitlines() if line.startswith("\t")]
    recipes = {re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]].strip(), line).strip() for line in recipes}
    plain = {" ".join(words) for words in read_commands() if words[0] in ("python3", ".venv/bin/python")}
    assert len(plain) >= 5 and plain <= recipes, plain - recipes
    for target in re.findall(r"make ([\w-]+)", " ".join(INLINE) + " ".join(block for _, block in BLOCKS)):
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


# What the commands of a script are shortened by; these take the place of the command's own.
SHORTENED = {
    "train.py": {"network": "ssd300_tiny", "batch_size": 2, "workers": 0, "pretrained": "", "evaluate_every": 1,
                 "minutes": 0.0, "overwrite": True},
    "eval.py": {"workers": 0, "batch_size": 2},
    "create_data_lists.py": {},
    "detect.py": {},
}  # fmt: skip

# Runs commands, and then Python code, all in one process.
DRIVER = """
import json, runpy, sys
sys.path[:0] = {paths!r}
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
        Image.effect_noise((120, 90), 60 + len(split)).convert("RGB").save(tmp_path / "photos" / f"{split}.jpg")
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
        shortened = dict(SHORTENED[script])
        if script == "train.py":
            n_iterations = n_iterations + 1 if any(a.startswith("--checkpoint=") for a in arguments) else 1
            shortened["iterations"] = n_iterations
        arguments = [a for a in arguments if a[2:].partition("=")[0] not in shortened]
        extra = [f"--{name}={value}" for name, value in shortened.items()]
        todo.append((script, arguments + extra))
        if script == "train.py":  # the demo's checkpoint, which a command of detect.py takes
            copy = "import shutil; shutil.copy('checkpoint_ssd300.pth.tar', 'demo')"
            todo.append(("", [copy]))
    assert {script for script, _ in todo} == {*SHORTENED, ""}
    todo += [("", [block]) for kind, block in BLOCKS if kind == "python"]
    code = DRIVER.format(paths=[str(REPO / "tools"), str(REPO)], repo=str(REPO))
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
    in_folder = {f"img/{path.name}" for path in (REPO / "img").iterdir() if path.suffix in (".jpg", ".png")}
    assert set(shown) == in_folder <= {f"img/{name}" for name in make_figures.FIGURES}
    assert all(path.stat().st_size <= make_figures.MAX_BYTES for path in (REPO / "img").iterdir())


def test_tables_are_those_of_the_script():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert scene.fill_in_tables(text) == text, "a table is out of date: make figures"


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
    found = [make_figures.line_of("a.py", name) for name in ("threshold", "A", "A.run", "B.run")]
    assert found == [1, 3, 4, 8]
    assert make_figures.update_links("x [`B.run()`](a.py#L77) y") == "x [`B.run()`](a.py#L8) y"
    with pytest.raises(ValueError, match=r"a\.py does not define B\.walk"):
        make_figures.line_of("a.py", "B.walk")


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
    section = TEXT[TEXT.index("\n## File map") :].partition("\n## ")[2].partition("\n## ")[0]
    for path in [*REPO.glob("*.py"), *REPO.glob("tools/*.py"), *REPO.glob("notebooks/*.ipynb")]:
        name = path.relative_to(REPO).as_posix()
        assert f"[`{name}`]({name})" in section, f"the file map lacks {name}"


def test_nothing_is_left_to_be_filled_in():
    assert not re.findall(r"^[A-Z]{3,}$|TODO|FIXME", (REPO / "README.md").read_text(), re.MULTILINE)
