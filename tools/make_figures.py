"""Draw the README's figures and write its tables, with the code that they explain.

    python tools/make_figures.py                    or: make figures

The figures that show detections need a trained network: `checkpoint`, which the demo makes. If it is missing, the
demo's own command makes it first (five minutes on a CPU). Boxes, priors, matches, losses and detections are computed
by the scripts of the repository; the pictures are the sample data set's. Writes `output_folder`, the tables between
the marks of the README, and the line numbers of the links to code. Needs requirements-dev.txt.
Any parameter below can be overridden on the command line with --name=value.
"""

import csv
import io
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from PIL import Image

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tools")]

import scene as scene_module  # noqa: E402 (the paths to them have to be set first)
from scene import CLASS_NAMES, LABEL_MAP, PRIOR_NAMES, Scene, load_picture, predict  # noqa: E402

from datasets import transform  # noqa: E402
from detect import draw_boxes, find_objects  # noqa: E402
from eval import calculate_mAP  # noqa: E402
from model import NETWORKS, SSD300, decimate, l2_normalize, load_model, match_priors, stack_objects  # noqa: E402
from utils import (  # noqa: E402
    cxcy_to_gcxgcy,
    cxcy_to_xy,
    find_jaccard_overlap,
    find_paired_intersection,
    override_parameters,
    xy_to_cxcy,
)

# Parameters; paths are relative to the repository
output_folder = "img"
checkpoint = "demo/checkpoint_ssd300.pth.tar"
log_file = "demo/train_log.csv"  # of the same run
readme = "README.md"  # its tables and links are brought up to date; "": not
only = ()  # names of figures, such as mining.jpg; (): all

MAX_BYTES = 150_000  # of a figure
INK, FAINT, GRID = "#1f2328", "#6e7781", "#d0d7de"
PLATE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}  # behind a text on a photo
BLUE, RED, GREEN, AMBER, PURPLE = "#0969da", "#cf222e", "#1a7f37", "#bc4c00", "#8250df"
CLASS_COLORS = dict(zip(sorted(LABEL_MAP.keys() - {"background"}), (AMBER, BLUE, GREEN, PURPLE), strict=True))

matplotlib.rcParams.update({"font.size": 12, "text.color": INK, "axes.edgecolor": GRID, "figure.facecolor": "#fcfcfa"})


def main():
    if not (REPO / checkpoint).is_file():
        print(f"{checkpoint} is missing: the demo trains it now")
        subprocess.run([sys.executable, REPO / "tools" / "demo.py"], cwd=REPO, check=True)
    model = load_model(REPO / checkpoint)
    if model.label_map != LABEL_MAP:
        raise SystemExit(f"error: {checkpoint} knows {', '.join(model.label_map)}; it must be a model of the sample")
    folder = REPO / output_folder
    folder.mkdir(parents=True, exist_ok=True)
    if not only:
        scene_module.write_scene(model)
    for name, draw in FIGURES.items():
        if not only or name in only:
            print(f"{folder / name}: {save(draw(model), folder / name)} bytes")
    if readme:
        path = REPO / readme
        text = scene_module.fill_in_tables(path.read_text(encoding="utf-8"))
        path.write_text(update_links(text), encoding="utf-8")


def save(figure, path):
    """Write a figure, drawings as PNG with a palette, photos as JPEG; returns its size in bytes."""
    if isinstance(figure, Image.Image):
        image = figure
    else:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=120, bbox_inches="tight", pad_inches=0.12)
        image = Image.open(buffer).convert("RGB")
    if path.suffix == ".jpg":
        image.save(path, quality=80, optimize=True)
    else:
        image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {MAX_BYTES}")
    return path.stat().st_size


# --- What several figures draw --------------------------------------------------------------------


def panels(n, height, ratios=None):
    """A figure of n panels in a row, 10 inches wide; returns the figure and a list of axes."""
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots(1, n, width_ratios=ratios, squeeze=False)[0]
    return figure, list(axes)


def show_photo(axis, image, title=""):
    """Show an image so that fractional boxes can be drawn over it."""
    axis.imshow(image, extent=(0, 1, 1, 0), aspect=image.height / image.width, interpolation="lanczos")
    axis.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
    axis.set_title(title, fontsize=12)


def show_square(axis, title=""):
    """An empty square that stands for the image."""
    axis.add_patch(Rectangle((0, 0), 1, 1, facecolor="white", edgecolor=GRID, linewidth=1.5))
    axis.set(xticks=[], yticks=[], xlim=(-0.05, 1.05), ylim=(1.05, -0.05), aspect="equal")
    axis.set_title(title, fontsize=12)
    axis.set_frame_on(False)


def hide(axis):
    axis.set_axis_off()


def add_box(axis, box_xy, color, label="", width=2.0, dashed=False, fill=0.0, at="top", clip=True):
    """Draw a fractional box, with a label on a plate of its colour at one of its edges."""
    x_min, y_min, x_max, y_max = (float(value) for value in box_xy)
    style = {"edgecolor": color, "linewidth": width, "linestyle": "--" if dashed else "-", "clip_on": clip}
    axis.add_patch(Rectangle((x_min, y_min), x_max - x_min, y_max - y_min, fill=False, **style))
    if fill:
        axis.add_patch(Rectangle((x_min, y_min), x_max - x_min, y_max - y_min, color=color, alpha=fill, linewidth=0))
    if label:
        places = {
            "top": (x_min, y_min, "left", "bottom"),
            "bottom": (x_min, y_max, "left", "top"),
            "inside": (x_min, y_min, "left", "top"),
            "right": (x_max, (y_min + y_max) / 2, "left", "center"),
            "left": (x_min, (y_min + y_max) / 2, "right", "center"),
        }
        x, y, ha, va = places[at]
        plate = {"facecolor": FAINT if color == GRID else color, "edgecolor": "none", "pad": 1.5}
        axis.text(x, y, label, color="white", fontsize=10, ha=ha, va=va, bbox=plate, clip_on=False)


def add_arrow(axis, start, end, color=INK, style="-|>", width=2.0):
    arrow = {"arrowstyle": style, "mutation_scale": 16, "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axis.add_patch(FancyArrowPatch(start, end, **arrow))


def match(boxes_xy, labels, priors_cxcy):
    """`match_priors()` for one picture: (P,) the number of each prior's object, -1 for background."""
    matched = match_priors(stack_objects([boxes_xy], [labels], boxes_xy.device), cxcy_to_xy(priors_cxcy), 0.5)[0]
    return matched.masked_fill(matched == len(labels), -1)


# --- The figures ----------------------------------------------------------------------------------


def draw_hero(model):
    """What the network finds in the first six test pictures that are wide and have two objects or more."""
    cells = []
    for number in range(1, 101):
        image, boxes_xy, _ = load_picture(number)
        if len(cells) < 6 and len(boxes_xy) >= 2 and image.width > 1.2 * image.height:
            annotated = draw_boxes(image, *find_objects(image, min_score=0.4, model=model), CLASS_COLORS)
            cells.append(annotated.resize((390, round(390 * annotated.height / annotated.width))))
    rows = [cells[:3], cells[3:]]
    heights = [max(cell.height for cell in row) for row in rows]
    sheet = Image.new("RGB", (3 * 400 - 10, sum(heights) + 10), "white")
    for row, top in zip(rows, (0, heights[0] + 10), strict=True):
        for place, cell in enumerate(row):
            sheet.paste(cell, (400 * place, top))
    return sheet


def draw_scene(_model):
    """The picture that runs through the page."""
    scene = Scene(predictions={"none": 0})
    figure, (axis,) = panels(1, 3)
    show_photo(axis, scene.image)
    for box, name in zip(scene.boxes_xy, scene.names, strict=True):
        add_box(axis, box, CLASS_COLORS[name], name, at="right" if name == "rectangle" else "top")
    return figure


def draw_forms(_model):
    """One box in the three forms."""
    scene = Scene(predictions={"none": 0})
    box, prior = scene.boxes_xy[0], scene.priors_cxcy[0]
    figure, axes = panels(3, 4.4)
    x_min, y_min, x_max, y_max = box.tolist()
    c_x, c_y, w, h = xy_to_cxcy(box).tolist()
    for axis, title in zip(axes, ("boundary", "center-size", "offsets from a prior"), strict=True):
        show_photo(axis, scene.image, title)
        add_box(axis, box, RED, width=2.5)
        axis.set(xlim=(0, 0.75), ylim=(0.85, 0))
        axis.tick_params(length=0)
    for x, y in ((x_min, y_min), (x_max, y_max)):
        axes[0].plot(x, y, "o", color=RED, markersize=8)
        place = y - 0.04 if y == y_min else y + 0.08
        axes[0].text(x, place, f"({x:.3f}, {y:.3f})", ha="center", color=RED, bbox=PLATE)
    axes[0].set_xlabel(f"(x_min, y_min, x_max, y_max)\n({x_min:.3f}, {y_min:.3f}, {x_max:.3f}, {y_max:.3f})")
    axes[1].plot(c_x, c_y, "o", color=RED, markersize=8)
    add_arrow(axes[1], (x_min, y_max + 0.05), (x_max, y_max + 0.05), "white", "<|-|>")
    axes[1].text(c_x, y_max + 0.13, f"w = {w:.3f}", ha="center", bbox=PLATE)
    add_arrow(axes[1], (x_min - 0.04, y_min), (x_min - 0.04, y_max), "white", "<|-|>")
    axes[1].text(x_min - 0.07, c_y, f"h = {h:.3f}", ha="right", va="center", bbox=PLATE)
    axes[1].set_xlabel(f"(c_x, c_y, w, h)\n({c_x:.3f}, {c_y:.3f}, {w:.3f}, {h:.3f})")
    add_box(axes[2], cxcy_to_xy(prior), BLUE, "prior A", dashed=True, at="bottom")
    offsets = cxcy_to_gcxgcy(xy_to_cxcy(box[None]), prior[None])[0].tolist()
    axes[2].set_xlabel(
        "(g_c_x, g_c_y, g_w, g_h)\n(" + ", ".join(f"{value:.2f}" for value in offsets).replace("-", "−") + ")"
    )
    return figure


def draw_overlap(_model):
    """Intersection, union and overlap of four pairs of boxes."""
    first = torch.tensor([0.0, 0.0, 6.0, 6.0])
    others = torch.tensor([[7.0, 3, 11, 9], [3, 3, 9, 9], [2, 0, 8, 6], [0, 0, 6, 5]])
    figure, axes = panels(4, 3.1)
    for axis, second in zip(axes, others, strict=True):
        mins, maxs = torch.maximum(first, second)[:2], torch.minimum(first, second)[2:]
        if (maxs > mins).all():
            axis.add_patch(Rectangle(mins.tolist(), *(maxs - mins).tolist(), color=AMBER, alpha=0.4, linewidth=0))
        add_box(axis, first, BLUE, width=3)
        add_box(axis, second, RED, width=3)
        intersection = float(find_paired_intersection(first, second))
        union = sum(float((box[2] - box[0]) * (box[3] - box[1])) for box in (first, second)) - intersection
        overlap = float(find_jaccard_overlap(first[None], second[None]))
        axis.set(xlim=(-0.5, 11.5), ylim=(9.5, -0.5), aspect="equal", xticks=[], yticks=[])
        axis.set_frame_on(False)
        axis.set_xlabel(f"{intersection:g} shared / {union:g} in all\noverlap {overlap:.2f}", fontsize=13)
    return figure


def describe_stages(network):
    """The stages of a network's figure: list of (name, channels, grid, whether it is a source map).

    For a VGG base the blocks with their pooling layers; for others the source maps alone.
    """
    row = NETWORKS[network]
    sources = {source.name: source for source in row.sources}
    stages = [("image", 3, row.input_size, False)]
    if "conv4_3" in sources:
        grid = row.input_size
        widths = [sources["conv4_3"].channels // 8 * factor for factor in (1, 2, 4, 8, 8)]
        for block, width in enumerate(widths, start=1):
            stages.append((f"conv{block}_x" if block != 4 else "conv4_3", width, grid, block == 4))
            if block < 5:
                grid = -(-grid // 2)
                stages.append((f"pool{block}", width, grid, False))
        stages += [("pool5", widths[-1], grid, False), ("conv6", sources["conv7"].channels, grid, False)]
    stages += [(s.name, s.channels, s.grid, True) for s in row.sources if s.name != "conv4_3"]
    return stages


def draw_network(network):
    """A network as a row of blocks, as high as its grids; under each source map its priors."""

    def draw(_model):
        row = NETWORKS[network]
        sources = {source.name: source for source in row.sources}
        stages = describe_stages(network)
        figure, (axis,) = panels(1, 4.2)
        for x, (name, channels, grid, is_source) in enumerate(stages):
            height = 0.12 + 0.88 * (grid / row.input_size) ** 0.6
            color = BLUE if is_source else FAINT if name.startswith("pool") else "#9aa4af"
            width = 0.3 if name.startswith("pool") else 0.62
            axis.add_patch(Rectangle((x - width / 2, -height), width, 2 * height, color=color, alpha=0.75))
            axis.text(x, height + 0.06, name, ha="center", va="bottom", rotation=60, fontsize=10)
            axis.text(x, 0, str(grid), ha="center", va="center", color="white", fontsize=9, weight="bold", rotation=90)
            axis.text(x, -1.12, channels, ha="center", va="top", fontsize=9, color=FAINT)
            if is_source:
                n = sources[name].n_priors
                axis.text(x, -1.42, f"{grid}²·{n}\n= {grid * grid * n}", ha="center", va="top", fontsize=8, color=BLUE)
        total = sum(source.n_priors * source.grid**2 for source in row.sources)
        axis.text(-0.6, -1.12, "channels", ha="right", va="top", fontsize=9, color=FAINT)
        axis.text(-0.6, -1.42, "priors", ha="right", va="top", fontsize=9, color=BLUE)
        axis.set(xlim=(-1.9, len(stages) - 0.4), ylim=(-1.95, 1.75))
        axis.set_title(f"{network}: {total} priors from {len(row.sources)} feature maps (blue)", fontsize=12)
        hide(axis)
        return figure

    return draw


def draw_fc_to_conv(_model):
    """fc6's kernel, what decimation keeps of it, and where the dilated kernel looks."""
    figure, axes = panels(3, 3.8)
    kept = decimate(torch.arange(49).view(7, 7), steps=(3, 3)).flatten().tolist()
    titles = ("fc6 as a kernel: 7 × 7", "conv6's kernel: 3 × 3", "on the 19 × 19 grid, dilation 6")
    for axis, n, title in zip(axes, (7, 3, 19), titles, strict=True):
        grid = np.zeros((n, n))
        if n == 7:
            grid.flat[kept] = 1
        elif n == 3:
            grid[:] = 1
        else:
            grid[np.ix_([3, 9, 15], [3, 9, 15])] = 1
        axis.imshow(grid, cmap=matplotlib.colors.ListedColormap(["white", BLUE]), vmin=0, vmax=1)
        axis.set_xticks(np.arange(-0.5, n), [])
        axis.set_yticks(np.arange(-0.5, n), [])
        axis.grid(color=GRID)
        axis.tick_params(length=0)
        axis.set_title(title, fontsize=12)
    axes[1].set(xlim=(-2.5, 4.5), ylim=(4.5, -2.5))
    axes[0].set_xlabel("every third row and column is kept")
    axes[2].set_xlabel("nine cells, six apart")
    return figure


def draw_l2_norm(_model):
    """Channels of a bright and of a faint cell: as they are, divided by their length, and scaled."""
    features = torch.tensor([[90.0, 30, 60, 20], [3.0, 6, 1, 2]]).T.reshape(1, 4, 1, 2)
    normalized = l2_normalize(features)
    figure, axes = panels(3, 2.9)
    titles = ("conv4_3 as it is", "divided by its length", "times 20, learned from there")
    for axis, values, title in zip(axes, (features, normalized, normalized * 20), titles, strict=True):
        bars = values[0, :, 0].T.numpy()  # (2, 4)
        axis.bar(np.arange(4) - 0.2, bars[0], 0.4, color=BLUE, label="a bright cell")
        axis.bar(np.arange(4) + 0.2, bars[1], 0.4, color=AMBER, label="a faint cell")
        axis.set_title(title, fontsize=12)
        axis.set_xticks(range(4), [f"channel {i}" for i in range(1, 5)], fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    return figure


def draw_priors(model):
    """The priors of the middle cell of each source map of SSD300."""
    sources = NETWORKS["ssd300_vgg16"].sources
    priors_xy, first = cxcy_to_xy(SSD300.create_prior_boxes()), 0
    figure, axes = panels(6, 2.3)
    for axis, source in zip(axes, sources, strict=True):
        show_square(axis, f"{source.name}\n{source.grid} × {source.grid}")
        cell = (source.grid // 2) * source.grid + source.grid // 2
        start = first + cell * source.n_priors
        for i, box in enumerate(priors_xy[start : start + source.n_priors]):
            add_box(axis, box, RED if i == 1 else BLUE, width=1.8, clip=False)
        for k in range(1, source.grid) if source.grid < 12 else ():
            axis.plot([0, 1], [k / source.grid] * 2, color=GRID, linewidth=0.6)
            axis.plot([k / source.grid] * 2, [0, 1], color=GRID, linewidth=0.6)
        axis.set(xlim=(-0.25, 1.25), ylim=(1.25, -0.25))
        first += source.grid**2 * source.n_priors
    return figure


def draw_offsets(_model):
    """How the rectangle's prior has to move and to grow, with arrows."""
    scene = Scene(predictions={"none": 0})
    box, prior = xy_to_cxcy(scene.boxes_xy[0]), scene.priors_cxcy[0]
    offsets = cxcy_to_gcxgcy(box[None], prior[None])[0].tolist()
    figure, (left, right) = panels(2, 4, [1.2, 1])
    show_photo(left, scene.image)
    left.set(xlim=(0.15, 0.65), ylim=(0.65, 0.12))
    add_box(left, scene.boxes_xy[0], RED, "rectangle", at="top")
    add_box(left, cxcy_to_xy(prior), BLUE, "prior A", dashed=True, at="bottom")
    (b_x, b_y, b_w, b_h), (p_x, p_y, p_w, p_h) = box.tolist(), prior.tolist()
    left.plot(p_x, p_y, "o", color=BLUE, markersize=7)
    left.plot(b_x, b_y, "o", color=RED, markersize=7)
    hide(right)
    lines = [
        ("the centre moves", f"left by {p_x - b_x:.3f}, up by {p_y - b_y:.3f}"),
        ("", f"g_c_x = {b_x - p_x:.3f} / ({p_w:.3f} · 0.1) = {offsets[0]:.2f}"),
        ("", f"g_c_y = {b_y - p_y:.3f} / ({p_h:.3f} · 0.1) = {offsets[1]:.2f}"),
        ("the width shrinks", f"{p_w:.3f} → {b_w:.3f}"),
        ("", f"g_w = ln({b_w:.3f} / {p_w:.3f}) / 0.2 = {offsets[2]:.2f}"),
        ("the height grows", f"{p_h:.3f} → {b_h:.3f}"),
        ("", f"g_h = ln({b_h:.3f} / {p_h:.3f}) / 0.2 = {offsets[3]:.2f}"),
    ]
    for i, (bold, text) in enumerate(lines):
        right.text(0.0, 0.95 - 0.13 * i, bold, weight="bold", transform=right.transAxes)
        right.text(0.42 if bold else 0.05, 0.95 - 0.13 * i, text, transform=right.transAxes)
    ends = [((p_x + side * p_w / 2, p_y), (b_x + side * b_w / 2, p_y)) for side in (-1, 1)]
    ends += [((p_x, p_y + side * p_h / 2), (p_x, b_y + side * b_h / 2)) for side in (-1, 1)]
    for start, end in ends:
        add_arrow(left, start, end, "#ffd33d", "->", 2.5)
    return figure


def draw_prediction(_model):
    """The channels of one cell of conv9_2, and the rows that they become."""
    source = next(s for s in NETWORKS["ssd300_vgg16"].sources if s.name == "conv9_2")
    names = ["1", "extra", "2", "3", "1/2", "1/3"]
    colors = [BLUE, RED, GREEN, AMBER, PURPLE, "#57606a"]
    figure, axes = panels(2, 4.6, [4, 21])
    for axis, depth, title in ((axes[0], 4, "offsets (loc)"), (axes[1], 21, "scores (cl), 21 classes")):
        axis.set(xlim=(-0.2, depth + 0.2), ylim=(9.2, -0.6), xticks=[], yticks=[])
        axis.set_frame_on(False)
        axis.set_title(f"{title}\n{source.n_priors} · {depth} = {source.n_priors * depth} channels", fontsize=12)
        for k in range(source.n_priors * depth):  # the channels of a cell, in a row
            axis.add_patch(
                Rectangle(
                    (depth * k / (source.n_priors * depth), 0), 0.85 / source.n_priors, 0.8, color=colors[k // depth]
                )
            )
        add_arrow(axis, (depth / 2, 1.1), (depth / 2, 1.9), FAINT)
        for i, color in enumerate(colors):
            for j in range(depth):
                axis.add_patch(Rectangle((j, 2.2 + i), 0.92, 0.85, color=color, alpha=0.85))
        if depth == 4:
            for j, letter in enumerate(("g_c_x", "g_c_y", "g_w", "g_h")):
                axis.text(j + 0.46, 8.3, letter, ha="center", va="top", fontsize=8)
            for i, (name, color) in enumerate(zip(names, colors, strict=True)):
                axis.text(
                    -0.3, 2.6 + i, f"ratio {name}" if name != "extra" else name, ha="right", va="center", color=color
                )
        else:
            axis.text(0.46, 8.3, "background", ha="center", va="top", fontsize=8, rotation=30)
            axis.text(1.46, 8.3, "aeroplane", ha="center", va="top", fontsize=8, rotation=30)
            axis.text(20.46, 8.3, "tvmonitor", ha="center", va="top", fontsize=8, rotation=30)
    figure.suptitle("One cell of conv9_2: its channels become one row for each of its six priors", fontsize=12)
    return figure


def draw_matching(_model):
    """The seven priors of the scene, and what each is to predict."""
    scene = Scene(predictions={"none": 0})
    figure, axes = panels(2, 4.3)
    titles = ("seven of the 8732 priors", "after matching: positive priors in colour")
    for axis, title in zip(axes, titles, strict=True):
        show_photo(axis, scene.image, title)
        axis.set(xlim=(0, 0.9), ylim=(0.9, 0))
    places = dict(zip(PRIOR_NAMES, ("right", "left", "inside", "bottom", "top", "bottom", "top"), strict=True))
    for name, prior, (item, _) in zip(PRIOR_NAMES, scene.priors_cxcy, scene.owners(), strict=True):
        box = cxcy_to_xy(prior)
        add_box(axes[0], box, "white", width=1.5)
        add_box(axes[0], box, INK, name, 0.0, at=places[name])
        color = GRID if item is None else CLASS_COLORS[scene.names[item]]
        text = f"{name}: background" if item is None else f"{name}: {scene.names[item]}"
        if item is not None or name in "CG":
            add_box(axes[1], box, color, text, 1.2 if item is None else 2.4, dashed=item is None, at=places[name])
    return figure


def draw_smooth_l1(_model):
    """Smooth L1 beside half the square."""
    x = torch.linspace(-4, 4, 161)
    figure, (axis, text) = panels(2, 3.2, [3, 2])
    axis.plot(
        x, F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none"), color=BLUE, linewidth=2.5, label="smooth L1"
    )
    axis.plot(x, x.square() / 2, color=FAINT, label="½ x²")
    axis.plot(x, x.abs(), color=AMBER, linestyle=":", label="L1: |x|")
    axis.set(ylim=(0, 4), xlabel="error of one offset", ylabel="loss")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper center")
    hide(text)
    lines = (
        "Below 1 it is a square:\nthe gradient fades out.\n\n"
        "Beyond 1 it is a line of slope 1:\nan error of 100 pulls no harder\nthan an error of 1."
    )
    text.text(0, 0.5, lines, va="center")
    return figure


def draw_mining(model):
    """The positives of the scene's picture and its hardest negatives, few of them drawn; the losses, sorted."""
    scene = Scene(predictions={"none": 0})
    _, scores = predict(model, scene.image)
    matched = match(scene.boxes_xy, scene.labels, model.priors_cxcy)  # (P,)
    is_positive = matched >= 0
    labels = torch.where(is_positive, scene.labels[matched], 0)
    losses = F.cross_entropy(scores, labels, reduction="none")  # (P,)
    n_hard = 3 * int(is_positive.sum())
    order = losses.masked_fill(is_positive, -1).argsort(descending=True)
    figure, (left, right) = panels(2, 4.2, [1.2, 1])
    show_photo(left, scene.image, "the positives (blue) and the five hardest negatives (red)")
    left.set(xlim=(0, 0.75), ylim=(0.75, 0))
    for prior in is_positive.nonzero()[:, 0].tolist():
        add_box(left, cxcy_to_xy(model.priors_cxcy[prior]), BLUE, width=0.9)
    for prior in order[:5].tolist():
        add_box(left, cxcy_to_xy(model.priors_cxcy[prior]), RED, f"{float(losses[prior]):.1f}", 1.8, at="inside")
    n_shown = 3 * n_hard
    bars = losses[order[:n_shown]].numpy()
    right.bar(range(n_hard), bars[:n_hard], 1.0, color=RED, label=f"the {n_hard} that count")
    right.bar(range(n_hard, n_shown), bars[n_hard:], 1.0, color=FAINT, label="left out")
    right.set(xlabel="negatives, hardest first", ylabel="cross entropy")
    right.set_title(
        f"{int(is_positive.sum())} positives, so {n_hard} of {len(labels) - int(is_positive.sum())} negatives",
        fontsize=12,
    )
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    return figure


def draw_nms(_model):
    """Suppression of the scene's five candidates, step by step: thin green boxes have been kept before."""
    scene = Scene()
    boxes_xy, labels, scores = scene_module.candidates(scene)
    steps = scene_module.suppression_steps(scene)
    kept = []
    figure, axes = panels(len(steps), 2.9)
    for axis, (i, rival, overlap, stays) in zip(axes, steps, strict=True):
        show_photo(axis, scene.image)
        axis.set(xlim=(0.08, 0.6), ylim=(0.62, 0.14))
        for j in kept:
            add_box(axis, boxes_xy[j], GREEN, width=1.2)
        add_box(axis, boxes_xy[i], GREEN if stays else RED, width=2.6)
        if stays:
            kept.append(i)
        name = f"{scene_module.CANDIDATE_NAMES[i]}: {CLASS_NAMES[int(labels[i])]} {float(scores[i]):.2f}"
        reason = "no rival" if rival is None else f"overlap with {scene_module.CANDIDATE_NAMES[rival]}: {overlap:.2f}"
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(f"{reason}\n→ {'kept' if stays else 'dropped'}", fontsize=10, color=GREEN if stays else RED)
    return figure


def draw_augmentation(_model):
    """One picture as `transform()` changes it, one step at a time and all together."""
    image, boxes_xy, names = load_picture(156)
    boxes = boxes_xy * torch.tensor([*image.size, *image.size])
    labels = torch.tensor([LABEL_MAP[name] for name in names])
    difficulties = torch.zeros(len(labels), dtype=torch.uint8)
    cases = [
        ("as it is", (), 0), ("colours", ("distort",), 3), ("colours, again", ("distort",), 8),
        ("zoomed out", ("zoom_out",), 0), ("cropped", ("crop",), 9), ("flipped", ("flip",), 2),
        ("all together", None, 27), ("all together", None, 37),
    ]  # fmt: skip
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    for axis, (title, steps, seed) in zip(figure.subplots(2, 4).flat, cases, strict=True):
        split = "TEST" if steps == () else "TRAIN"
        options = {} if not steps else {"augment": steps}
        pixels, found, kept, _ = transform(
            image, boxes, labels, difficulties, split, np.random.default_rng(seed), **options
        )
        show_photo(axis, Image.fromarray(pixels.permute(1, 2, 0).numpy()), title)
        for box, label in zip(found, kept.tolist(), strict=True):
            add_box(axis, box, "white", width=4)
            add_box(axis, box, CLASS_COLORS[CLASS_NAMES[label]], width=2.2)
    return figure


# The detections of the precision-recall figure, best first: the object that each finds (0 to 5 are easy, 6 is
# difficult), or None for a box where there is nothing. The README works through them by hand.
RANKED_DETECTIONS = (0, 1, None, 6, 2, None, None, 3)
N_EASY = 6


def precision_recall():
    """The example's precision and recall after each detection that counts, and its average precision.

    Returns recalls and precisions as lists, and the value of `calculate_mAP()`.
    """
    boxes_xy_pixels = torch.tensor([[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(N_EASY + 1)])
    nowhere = torch.tensor([0.0, 50.0, 10.0, 60.0])
    found = torch.stack([nowhere if i is None else boxes_xy_pixels[i] for i in RANKED_DETECTIONS])
    labels = torch.ones(N_EASY + 1, dtype=torch.int64)
    difficulties = torch.tensor([0] * N_EASY + [1], dtype=torch.uint8)
    scores = torch.linspace(0.95, 0.3, len(found))
    _, average_precision = calculate_mAP(
        [found], [torch.ones(len(found), dtype=torch.int64)], [scores], [boxes_xy_pixels], [labels], [difficulties],
        label_map={"background": 0, "star": 1},
    )  # fmt: skip
    counted = [i for i in RANKED_DETECTIONS if i is None or i < N_EASY]
    n_true = np.cumsum([i is not None for i in counted])
    return (n_true / N_EASY).tolist(), (n_true / np.arange(1, len(counted) + 1)).tolist(), float(average_precision)


def draw_precision_recall(_model):
    """The precision-recall curve of the example, and the 11 points at which VOC2007 reads it."""
    recalls, precisions, average_precision = precision_recall()
    pairs = list(zip(recalls, precisions, strict=True))
    points = [max([p for r, p in pairs if r >= k / 10 - 1e-9], default=0.0) for k in range(11)]
    if abs(sum(points) / 11 - average_precision) > 1e-6:
        raise ValueError(f"the points' mean {sum(points) / 11} is not calculate_mAP()'s {average_precision}")
    figure, (axis,) = panels(1, 3.6)
    axis.plot(recalls, precisions, "o-", color=BLUE, label="after each detection")
    axis.plot(np.arange(11) / 10, points, "x", color=RED, markersize=10, markeredgewidth=2.5,
              label="best precision at this recall or a higher one")  # fmt: skip
    axis.set(xlabel="recall", ylabel="precision", xlim=(-0.03, 1.03), ylim=(-0.05, 1.08), xticks=np.arange(11) / 10)
    axis.set_title(f"the mean of the 11 crosses is the average precision: {average_precision:.3f}", fontsize=12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower left")
    return figure


def draw_training(_model):
    """Loss and mAP of the demo's run, from its log."""
    with open(REPO / log_file, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, (left, right) = panels(2, 3.3)
    losses = [(int(row["iteration"]), float(row["loss"])) for row in rows if row["loss"]]
    scores = [(int(row["iteration"]), float(row["mAP"])) for row in rows if row["mAP"]]
    left.plot(*zip(*losses, strict=True), color=BLUE)
    left.set(xlabel="iteration", ylabel="loss", ylim=(0, None))
    right.plot(*zip(*scores, strict=True), "o-", color=GREEN)
    right.set(xlabel="iteration", ylabel="mAP on 100 test pictures", ylim=(0, 1))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=GRID, linewidth=0.6)
    return figure


FIGURES = {
    "hero.jpg": draw_hero,
    "scene.jpg": draw_scene,
    "forms.jpg": draw_forms,
    "overlap.png": draw_overlap,
    "network.png": draw_network("ssd300_vgg16"),
    "network_ssd512.png": draw_network("ssd512_vgg16"),
    "network_ssdlite.png": draw_network("ssdlite320_mobilenet_v3_large"),
    "fc_to_conv.png": draw_fc_to_conv,
    "l2_norm.png": draw_l2_norm,
    "priors.png": draw_priors,
    "offsets.jpg": draw_offsets,
    "prediction.png": draw_prediction,
    "matching.jpg": draw_matching,
    "smooth_l1.png": draw_smooth_l1,
    "mining.jpg": draw_mining,
    "nms.jpg": draw_nms,
    "augmentation.jpg": draw_augmentation,
    "precision_recall.png": draw_precision_recall,
    "training.png": draw_training,
}


# --- The README's links to code -------------------------------------------------------------------

CODE_LINK = re.compile(r"\[`([\w.]+)(?:\(\))?`\]\(([\w/]+\.py)#L\d+\)")


def update_links(text):
    """Set the line number of each link such as [`match_priors()`](model.py#L457) to where the name is defined."""
    return CODE_LINK.sub(lambda link: re.sub(r"#L\d+", f"#L{line_of(link[2], link[1])}", link[0]), text)


def line_of(file, name):
    """The line of a file, counted from 1, that defines a function, class or parameter.

    name: as it is called; of `SSD300.forward` the `forward` below `class SSD300` is meant.
    Raises ValueError, naming both, if there is none.
    """
    lines = (REPO / file).read_text(encoding="utf-8").splitlines()
    start = 0
    for part in name.split("."):
        pattern = re.compile(rf"\s*(def|class) {part}\b|{part} = ")
        start = next((i + 1 for i in range(start, len(lines)) if pattern.match(lines[i])), None)
        if start is None:
            raise ValueError(f"{file} does not define {name}")
    return start


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    main()
