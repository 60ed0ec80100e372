"""Draw the README's figures, and bring its tables, its quotations of code and its links to code up to date.

    python tools/make_figures.py                                       all of it; or: make figures
    python tools/make_figures.py --only=network.png,priors.jpg         some of the figures
    python tools/make_figures.py --only=photos.jpg --photos_checkpoint=checkpoint_ssd300.pth.tar
    python tools/make_figures.py --only=learning.jpg --snapshots=snapshots
    python tools/make_figures.py --pages_only=True                     no figures: tables, code and line numbers

A few figures, and the tables, show what a trained network says: `checkpoint`, which `python tools/demo.py
--iterations=2000` makes (five to twenty minutes on a CPU). Boxes, priors, matches, losses and detections are
computed by the scripts of the repository; the pictures are drawn by tools/scene.py and tools/make_sample.py. Writes
img/, and in the README and docs/ what is between marks: `<!-- scene:NAME -->` a table,
`<!-- code:FILE:NAME -->` a function as the file has it.
Needs requirements-dev.txt; photos.jpg also needs scikit-image, whose package holds the photos.
Any parameter below can be overridden on the command line with --name=value.
"""

import ast
import io
import re
import sys
import textwrap
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import figures_scene  # noqa: E402 (the paths to them have to be set first)
import figures_theory  # noqa: E402
import scene  # noqa: E402

from model import load_model  # noqa: E402
from utils import exit_with_message, override_parameters  # noqa: E402

# Parameters
checkpoint = "demo/checkpoint_ssd300.pth.tar"  # in the repository; the log of the same run lies beside it
photos_checkpoint = ""  # of a network for real photos: draws photos.jpg; "": that picture stays as it is
snapshots = ""  # a folder: 25.pth.tar, saved after 25 iterations, 50.pth.tar, ...: draws learning.jpg; "": likewise
only = ()  # names of figures, such as mining.jpg; (): all
pages_only = False  # True: draw nothing, bring only the pages up to date (after a change of the code)

FOLDER = REPO / "img"
MAX_BYTES = 150_000  # of a figure
MADE_BY = "made by: python tools/make_figures.py"
NAMES = (*figures_scene.FIGURES, *figures_theory.FIGURES, "training.png", "photos.jpg", "learning.jpg")


def main():
    if not pages_only:
        draw_figures()
    for path in (REPO / "README.md", *REPO.glob("docs/*.md")):
        path.write_text(update_page(path.read_text(encoding="utf-8")), encoding="utf-8")


def draw_figures():
    """Draw the figures of `only`, or all of them."""
    unknown = set(only) - set(NAMES)
    if unknown:
        raise ValueError(f"there is no figure {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    here = scene.Scene(REPO / checkpoint)
    if not only:
        scene.write_predictions(here)
    for name, draw in figures_scene.FIGURES.items():
        save(name, draw, here)
    for name, draw in figures_theory.FIGURES.items():
        save(name, draw)
    save("training.png", figures_theory.draw_training, REPO / checkpoint.replace(".pth.tar", ".csv"))
    if photos_checkpoint:
        save("photos.jpg", figures_scene.draw_photos, load_model(photos_checkpoint))
    if snapshots:
        save("learning.jpg", figures_scene.draw_learning, here, Path(snapshots))


def save(name, draw, *arguments):
    """Draw a figure, unless `only` leaves it out. Write drawings as PNG with a palette, photos as JPEG.

    The file says which command made it.
    """
    if only and name not in only:
        return
    image = draw(*arguments)
    if not isinstance(image, Image.Image):  # a figure of Matplotlib
        buffer = io.BytesIO()
        image.savefig(buffer, dpi=120, bbox_inches="tight", pad_inches=0.12)
        image = Image.open(buffer).convert("RGB")
    path = FOLDER / name
    if path.suffix == ".jpg":
        for quality in (80, 70, 60):
            image.save(path, quality=quality, optimize=True, comment=MADE_BY.encode())
            if path.stat().st_size <= MAX_BYTES:
                break
    else:
        text = PngInfo()
        text.add_text("Comment", MADE_BY)
        image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True, pnginfo=text)
    print(f"{path}: {path.stat().st_size} bytes")


# --- What is brought up to date in the pages ------------------------------------------------------

# A table between its marks, such as <!-- scene:losses --> and <!-- end -->
SCENE_TABLE = re.compile(r"(<!-- scene:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# A function between its marks, such as <!-- code:model.py:match_priors --> and <!-- end -->
CODE_QUOTE = re.compile(r"(<!-- code:([\w/.]+):([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# A link to the line where a name is defined, such as [`match_priors()`](model.py#L457)
CODE_LINK = re.compile(r"(\[`([\w.]+)(?:\(\))?`\]\((?:\.\./)?([\w/]+\.py)#L)\d+")


def update_page(text):
    """A page with its tables, its quotations of code, and the line numbers of its links as they have to be now."""
    here = scene.Scene()
    text = SCENE_TABLE.sub(lambda mark: f"{mark[1]}{scene.TABLES[mark[2]](here)}\n{mark[3]}", text)
    text = CODE_QUOTE.sub(lambda mark: f"{mark[1]}```python\n{source_of(mark[2], mark[3])}\n```\n{mark[4]}", text)
    return CODE_LINK.sub(lambda link: f"{link[1]}{find_definition(link[3], link[2]).lineno}", text)


def source_of(file, name):
    """The lines of a function, class or table in a file, as they are there, without its docstring.

    `if architecture.is_lite:` and what it does is left out, too: the README explains SSD without SSDLite.
    """
    definition = find_definition(file, name)
    lines = (REPO / file).read_text(encoding="utf-8").splitlines()
    left_out = set()  # numbers of lines
    for node in ast.walk(definition):
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_for_ssdlite = isinstance(node, ast.If) and ast.unparse(node.test) == "architecture.is_lite"
        if is_docstring or is_for_ssdlite:
            left_out.update(range(node.lineno, node.end_lineno + 1))
        if is_docstring and lines[node.end_lineno] == "":  # the line after it
            left_out.add(node.end_lineno + 1)
    decorators = getattr(definition, "decorator_list", [])
    first = min(node.lineno for node in (definition, *decorators))
    kept = [lines[number - 1] for number in range(first, definition.end_lineno + 1) if number not in left_out]
    return textwrap.dedent("\n".join(kept))


def find_definition(file, name):
    """The node of a file's syntax tree that defines a function, class, table or parameter.

    name: as it is called; of `MultiBoxLoss.forward` the `forward` of class `MultiBoxLoss` is meant.
    Raises ValueError, naming both, if there is none.
    """
    node = ast.parse((REPO / file).read_text(encoding="utf-8"))
    for part in name.split("."):
        found = [child for child in node.body if part in names_of(child)]
        if not found:
            raise ValueError(f"{file} does not define {name}")
        node = found[0]
    return node


def names_of(node):
    """What a statement defines: a function or class by `def` or `class`, or names by `=`."""
    if isinstance(node, ast.Assign):
        return [ast.unparse(target) for target in node.targets]
    return [getattr(node, "name", "")]


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    with exit_with_message():
        main()
