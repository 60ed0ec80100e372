"""What the README's figures have in common: colours, panels, photos, boxes, arrows. See make_figures.py."""

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.patheffects import withStroke

INK, FAINT, GRID = "#1f2328", "#6e7781", "#d0d7de"
BLUE, RED, GREEN, AMBER, PURPLE = "#0969da", "#cf222e", "#1a7f37", "#bc4c00", "#8250df"
CLASS_COLORS = {"circle": AMBER, "rectangle": BLUE, "star": GREEN, "triangle": PURPLE}
RATIO_COLORS = (BLUE, RED, GREEN, AMBER, PURPLE, "#57606a")  # of the six priors of a cell, in their order
RATIO_NAMES = ("ratio 1", "extra square", "ratio 2", "ratio 3", "ratio 1/2", "ratio 1/3")
CENTERED = {"ha": "center", "va": "center"}
SMALL = 0.1  # of the picture's width: boxes smaller than this are drawn MARGIN outside
MARGIN = 0.007

STYLE = {
    "font.size": 12,
    "axes.titlesize": 12,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "figure.facecolor": "#fcfcfa",
    "legend.frameon": False,
}
matplotlib.rcParams.update(STYLE)


def panels(n, height, ratios=None, rows=1):
    """A figure of n panels in each row, 10 inches wide; returns the figure and a list of axes."""
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.subplots(rows, n, width_ratios=ratios, squeeze=False)
    return figure, list(axes.flat)


def show_photo(axis, image, title="", ticks=False):
    """Show an image so that fractional boxes can be drawn over it. ticks: an axis in pixels of the 300 x 300 image."""
    axis.imshow(image, extent=(0, 1, 1, 0), aspect=image.height / image.width, interpolation="lanczos")
    axis.set(xlim=(0, 1), ylim=(1, 0), title=title, xticks=[], yticks=[])
    axis.spines[:].set_visible(True)
    if ticks:
        places = [k / 6 for k in range(7)]
        names = [str(50 * k) for k in range(7)]
        axis.set_xticks(places, names, fontsize=10, color=FAINT)
        axis.set_yticks(places, names, fontsize=10, color=FAINT)


def add_box(axis, box_xy, color, label="", width=2.0, dashed=False, at="top", clip=True, size=10, halo=0):
    """Draw a fractional box, with a label on a plate of its colour beside one of its edges.

    halo: width of a white box below it, so that it can be seen on a photo.
    A small box gets a thin line, a little outside: a thick one would cover the object.
    """
    if halo:
        add_box(axis, box_xy, "white", width=halo)
    x_min, y_min, x_max, y_max = box_xy.tolist()
    if max(x_max - x_min, y_max - y_min) < SMALL:
        width = min(width, 1.2)
        x_min, y_min, x_max, y_max = x_min - MARGIN, y_min - MARGIN, x_max + MARGIN, y_max + MARGIN
    style = {"edgecolor": color, "linewidth": width, "linestyle": "--" if dashed else "-", "clip_on": clip}
    axis.add_patch(Rectangle((x_min, y_min), x_max - x_min, y_max - y_min, fill=False, **style))
    places = {
        "top": (x_min, y_min, "left", "bottom"),
        "top right": (x_max, y_min, "right", "bottom"),
        "bottom": (x_min, y_max, "left", "top"),
        "bottom right": (x_max, y_max, "right", "top"),
        "right": (x_max, (y_min + y_max) / 2, "left", "center"),
        "left": (x_min, (y_min + y_max) / 2, "right", "center"),
    }
    x, y, ha, va = places[at]
    if label:
        add_plate(axis, x, y, label, color, size=size, ha=ha, va=va)


def add_plate(axis, x, y, text, color, size=10, ha="center", va="center"):
    """A white text on a plate of a colour."""
    plate = {"facecolor": color, "edgecolor": "none", "pad": 1.5}
    axis.text(x, y, text, color="white", fontsize=size, ha=ha, va=va, bbox=plate)


def add_arrow(axis, start, end, color=INK, style="-|>", width=2.0, halo=False):
    """An arrow; halo: with a white edge, so that it can be seen on a photo."""
    arrow = {"arrowstyle": style, "mutation_scale": 16, "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    effects = [withStroke(linewidth=width + 3, foreground="white")] if halo else []
    axis.add_patch(FancyArrowPatch(start, end, **arrow, path_effects=effects))
