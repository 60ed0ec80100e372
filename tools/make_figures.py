"""Draw the README's figures, and bring its tables, its quotations of code and its links to code up to date.

    python tools/make_figures.py                                       all of it; or: make figures
    python tools/make_figures.py --only=network.png,priors.jpg         some of the figures
    python tools/make_figures.py --only=photos.jpg --photos_checkpoint=checkpoint_ssd300.pth.tar
    python tools/make_figures.py --only=learning.jpg --snapshots=snapshots
    python tools/make_figures.py --pages_only=True                     no figures: tables, code and line numbers

Most figures need a trained network: `checkpoint`, which the demo makes. If it is missing, `python tools/demo.py
--iterations=2000` makes it first (five to twenty minutes on a CPU). Boxes, priors, matches, losses and detections are
computed by the scripts of the repository; the pictures are drawn by tools/scene.py and tools/make_sample.py. Writes
`output_folder`, and in the README and docs/ what is between marks: `<!-- scene:NAME -->` a table,
`<!-- code:FILE:NAME -->` a function as the file has it.
Needs requirements-dev.txt; photos.jpg also needs scikit-image, whose package holds the photos.
Any parameter below can be overridden on the command line with --name=value.
"""

import ast
import io
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import matplotlib
from PIL import Image
from PIL.PngImagePlugin import PngInfo

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tools")]

import figures_scene  # noqa: E402 (the paths to them have to be set first)
import figures_theory  # noqa: E402
import scene  # noqa: E402

from model import load_model  # noqa: E402
from utils import override_parameters  # noqa: E402

# Parameters; paths are relative to the repository
output_folder = "img"
checkpoint = "demo/checkpoint_ssd300.pth.tar"  # of the demo; the log of the same run lies beside it
photos_checkpoint = ""  # of a network for real photos: draws photos.jpg; "": that picture stays as it is
snapshots = ""  # a folder: 25.pth.tar, saved after 25 iterations, 50.pth.tar, ...: draws learning.jpg; "": likewise
photos_min_score = 0.4  # lowest score of an object that photos.jpg shows
only = ()  # names of figures, such as mining.jpg; (): all
pages_only = False  # True: draw nothing, bring only the pages up to date (after a change of the code)

PAGES = ("README.md", "docs/manual.md", "docs/experiments.md", "docs/measurements.md", "docs/differences.md")
MAX_BYTES = 150_000  # of a figure
MADE_BY = "made by: python tools/make_figures.py"
FIGURES = {**figures_scene.FIGURES, **figures_theory.FIGURES}
WITH_OTHER_NETWORKS = ("photos.jpg", "learning.jpg")
NAMES = (*FIGURES, "training.png", *WITH_OTHER_NETWORKS)


def main():
    unknown = set(only) - set(NAMES)
    if unknown:
        raise SystemExit(f"error: there is no figure {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    folder = REPO / output_folder
    folder.mkdir(parents=True, exist_ok=True)
    if photos_checkpoint and not pages_only and (not only or "photos.jpg" in only):
        strip = figures_scene.draw_photos(load_model(photos_checkpoint), load_photos(), photos_min_score)
        save(strip, folder / "photos.jpg")
    if snapshots and not pages_only and (not only or "learning.jpg" in only):
        paths = sorted(Path(snapshots).glob("*.pth.tar"), key=lambda path: int(path.name.split(".")[0]))
        models = {path.name.split(".")[0]: load_model(path) for path in paths}
        save(figures_scene.draw_learning(models), folder / "learning.jpg")
    if not pages_only and not (only and set(only) <= set(WITH_OTHER_NETWORKS)):
        draw_figures(folder)
    for page in PAGES:
        path = REPO / page
        path.write_text(update_page(path.read_text(encoding="utf-8")), encoding="utf-8")


def draw_figures(folder):
    """Draw all figures of the demo's network, or those of `only`."""
    if not (REPO / checkpoint).is_file():
        print(f"{checkpoint} is missing: the demo trains it now")
        subprocess.run([sys.executable, REPO / "tools" / "demo.py", "--iterations=2000"], cwd=REPO, check=True)
    model = load_model(REPO / checkpoint)
    if model.label_map != scene.LABEL_MAP:
        raise SystemExit(f"error: {checkpoint} knows {', '.join(model.label_map)}; it must be a model of the sample")
    if not only:
        scene.write_scene(model)
    for name, draw in FIGURES.items():
        if not only or name in only:
            save(draw(model), folder / name)
    if not only or "training.png" in only:
        log_file = re.sub(r"(\.pth)?\.(tar|pth|pt)$", ".csv", str(REPO / checkpoint))
        save(figures_theory.draw_training(log_file), folder / "training.png")


def save(figure, path):
    """Write a figure, drawings as PNG with a palette, photos as JPEG. The file says which command made it."""
    if isinstance(figure, Image.Image):
        image = figure
    else:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=120, bbox_inches="tight", pad_inches=0.12)
        image = Image.open(buffer).convert("RGB")
    if path.suffix == ".jpg":
        for quality in (80, 70, 60):
            image.save(path, quality=quality, optimize=True, comment=MADE_BY.encode())
            if path.stat().st_size <= MAX_BYTES:
                break
    else:
        text = PngInfo()
        text.add_text("Comment", MADE_BY)
        image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True, pnginfo=text)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than {MAX_BYTES}")
    print(f"{path}: {size} bytes")


def load_photos():
    """Three photos that may be shown: Chelsea the cat (CC0), an astronaut and an admiral (both public domain)."""
    try:
        import skimage.data
    except ImportError:
        raise SystemExit("error: photos.jpg needs scikit-image: pip install scikit-image") from None
    admiral = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    photos = [Image.fromarray(skimage.data.cat()), Image.fromarray(skimage.data.astronaut()), Image.open(admiral)]
    return [photo.convert("RGB") for photo in photos]


# --- What is brought up to date in the pages ------------------------------------------------------


def update_page(text):
    """A page with its tables, its quotations of code, and the line numbers of its links as they have to be now."""
    return update_links(quote_code(scene.fill_in_tables(text)))


CODE_QUOTE = re.compile(r"<!-- code:([\w/.]+):([\w.]+) -->\n.*?<!-- end -->", re.DOTALL)


def quote_code(text):
    """Put functions between their marks, such as `<!-- code:model.py:match_priors -->` and `<!-- end -->`."""
    return CODE_QUOTE.sub(
        lambda mark: f"<!-- code:{mark[1]}:{mark[2]} -->\n```python\n{source_of(mark[1], mark[2])}\n```\n<!-- end -->",
        text,
    )


def source_of(file, name):
    """The lines of a function, class or table in a file, as they are there, without its docstring.

    `if architecture.is_lite:` and what it does is left out, too: the README explains SSD without SSDLite.
    """
    node = find_definition(file, name)
    lines = (REPO / file).read_text(encoding="utf-8").splitlines()
    first = node.lineno
    left_out = set()  # numbers of lines
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        if ast.get_docstring(node) is not None:
            docstring = node.body[0]
            end = docstring.end_lineno
            if lines[end] == "":  # the line after it
                end += 1
            left_out |= set(range(docstring.lineno, end + 1))
    for child in ast.walk(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "architecture.is_lite" and not child.orelse:
            left_out |= set(range(child.lineno, child.end_lineno + 1))
    kept = [lines[number - 1] for number in range(first, node.end_lineno + 1) if number not in left_out]
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
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [getattr(node, "name", "")]


CODE_LINK = re.compile(r"\[`([\w.]+)(?:\(\))?`\]\(((?:\.\./)?)([\w/]+\.py)#L\d+\)")


def update_links(text):
    """Set the line number of each link such as [`match_priors()`](model.py#L457) to where the name is defined."""
    return CODE_LINK.sub(lambda link: re.sub(r"#L\d+", f"#L{find_definition(link[3], link[1]).lineno}", link[0]), text)


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    main()
