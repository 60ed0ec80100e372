"""What the README's figures have in common: colours, panels, photos, boxes, arrows. See make_figures.py."""

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.patheffects import withStroke
from scene import LABEL_MAP

INK, FAINT, GRID = "#1f2328", "#6e7781", "#d0d7de"
BLUE, RED, GREEN, AMBER, PURPLE = "#0969da", "#cf222e", "#1a7f37", "#bc4c00", "#8250df"
CLASS_COLORS = dict(zip(sorted(LABEL_MAP.keys() - {"background"}), (AMBER, BLUE, GREEN, PURPLE), strict=True))
RATIO_COLORS = (BLUE, RED, GREEN, AMBER, PURPLE, "#57606a")  # of the six priors of a cell, in their order
RATIO_NAMES = ("ratio 1", "extra square", "ratio 2", "ratio 3", "ratio 1/2", "ratio 1/3")
PLATE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}  # behind a text on a photo

matplotlib.rcParams.update({"font.size": 12, "text.color": INK, "axes.edgecolor": GRID, "figure.facecolor": "#fcfcfa"})


def panels(n, height, ratios=None, rows=1):
    """A figure of n panels in each row, 10 inches wide; returns the figure and a list of axes."""
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots(rows, n, width_ratios=ratios, squeeze=False)
    return figure, list(axes.flat)


def show_photo(axis, image, title="", ticks=False):
    """Show an image so that fractional boxes can be drawn over it. ticks: an axis in pixels of the 300 x 300 image."""
    axis.imshow(image, extent=(0, 1, 1, 0), aspect=image.height / image.width, interpolation="lanczos")
    axis.set(xlim=(0, 1), ylim=(1, 0))
    axis.set_title(title, fontsize=12)
    if ticks:
        places = [k / 6 for k in range(7)]
        names = [str(50 * k) for k in range(7)]
        axis.set_xticks(places, names, fontsize=10, color=FAINT)
        axis.set_yticks(places, names, fontsize=10, color=FAINT)
    else:
        axis.set(xticks=[], yticks=[])


def show_square(axis, title=""):
    """An empty square that stands for the image."""
    axis.add_patch(Rectangle((0, 0), 1, 1, facecolor="white", edgecolor=GRID, linewidth=1.5))
    axis.set(xticks=[], yticks=[], xlim=(-0.05, 1.05), ylim=(1.05, -0.05), aspect="equal")
    axis.set_title(title, fontsize=12)
    axis.set_frame_on(False)


def plain_axes(axis):
    axis.spines[["top", "right"]].set_visible(False)


def add_box(axis, box_xy, color, label="", width=2.0, dashed=False, at="top", clip=True, size=10, halo=0):
    """Draw a fractional box, with a label on a plate of its colour beside one of its edges.

    halo: width of a white box below it, so that it can be seen on a photo.
    """
    if halo:
        add_box(axis, box_xy, "white", width=halo)
    x_min, y_min, x_max, y_max = (float(value) for value in box_xy)
    style = {"edgecolor": color, "linewidth": width, "linestyle": "--" if dashed else "-", "clip_on": clip}
    axis.add_patch(Rectangle((x_min, y_min), x_max - x_min, y_max - y_min, fill=False, **style))
    if label:
        places = {
            "top": (x_min, y_min, "left", "bottom"),
            "top right": (x_max, y_min, "right", "bottom"),
            "bottom": (x_min, y_max, "left", "top"),
            "bottom right": (x_max, y_max, "right", "top"),
            "right": (x_max, (y_min + y_max) / 2, "left", "center"),
            "left": (x_min, (y_min + y_max) / 2, "right", "center"),
        }
        x, y, ha, va = places[at]
        plate = {"facecolor": FAINT if color == GRID else color, "edgecolor": "none", "pad": 1.5}
        axis.text(x, y, label, color="white", fontsize=size, ha=ha, va=va, bbox=plate, clip_on=False)


def add_arrow(axis, start, end, color=INK, style="-|>", width=2.0, halo=False):
    """An arrow; halo: with a white edge, so that it can be seen on a photo."""
    arrow = {"arrowstyle": style, "mutation_scale": 16, "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    effects = [withStroke(linewidth=width + 3, foreground="white")] if halo else []
    axis.add_patch(FancyArrowPatch(start, end, **arrow, path_effects=effects))


def add_cells(axis, corner, values, size=1.0, color="white", text_color=INK, fontsize=12):
    """Draw a table of numbers as cells; corner: upper left, in the axis' units; values: rows of strings."""
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            x, y = corner[0] + j * size, corner[1] + i * size
            axis.add_patch(Rectangle((x, y), size, size, facecolor=color, edgecolor=FAINT, linewidth=1))
            axis.text(x + size / 2, y + size / 2, value, ha="center", va="center", color=text_color, fontsize=fontsize)
