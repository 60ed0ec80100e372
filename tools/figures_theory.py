"""The README's figures that need no picture: network, heads, losses, metric, log. See make_figures.py.

Each function returns a figure of Matplotlib.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from analyze import read_log
from figures_common import (
    AMBER,
    BLUE,
    CENTERED,
    FAINT,
    GREEN,
    GRID,
    INK,
    RATIO_COLORS,
    RATIO_NAMES,
    RED,
    add_arrow,
    add_box,
    panels,
)
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from eval import average_of_11_points, judge_detections
from model import NETWORKS, SSD300_SOURCES, decimate, l2_normalize
from utils import find_areas, find_jaccard_overlap


def draw_overlap():
    """Intersection, union and overlap of four pairs of boxes."""
    first = torch.tensor([0.0, 0.0, 6.0, 6.0])
    others = torch.tensor([[7.0, 3, 11, 9], [3, 3, 9, 9], [2, 0, 8, 6], [0, 0, 6, 5]])
    figure, axes = panels(4, 3.1)
    for axis, second in zip(axes, others, strict=True):
        corner = torch.maximum(first, second)[:2]
        width, height = (torch.minimum(first, second)[2:] - corner).clamp(min=0).tolist()
        axis.add_patch(Rectangle(corner.tolist(), width, height, color=AMBER, alpha=0.4, linewidth=0))
        add_box(axis, first, BLUE, width=3)
        add_box(axis, second, RED, width=3)
        intersection = width * height
        union = float(find_areas(first) + find_areas(second)) - intersection
        overlap = float(find_jaccard_overlap(first[None], second[None]))
        axis.set(xlim=(-0.5, 11.5), ylim=(9.5, -0.5), aspect="equal", xticks=[], yticks=[], frame_on=False)
        axis.set_xlabel(f"{intersection:g} shared / {union:g} in all\noverlap {overlap:.2f}", fontsize=13)
    return figure


# --- The network ----------------------------------------------------------------------------------


def describe_stages(architecture):
    """The stages of a network's figure: list of (name, channels, grid, layers in words, its source map or None).

    For VGG the blocks with their pooling layers; for others the source maps alone.
    """
    sources = list(architecture.sources)
    grid = architecture.input_size
    stages = [("image", 3, grid, "", None)]
    if architecture.base == "vgg16":
        conv4_3 = sources.pop(0)
        for block, width in enumerate((64, 128, 256, 512, 512), start=1):
            n_layers = 2 if block < 3 else 3
            stages.append((f"conv{block}_1–{n_layers}", width, grid, "3×3", conv4_3 if block == 4 else None))
            if block < 5:
                grid = -(-grid // 2)  # rounded up
                stages.append((f"pool{block}", width, grid, "2×2 /2", None))
        stages.append(("pool5", 512, grid, "3×3", None))
        stages.append(("conv6", 1024, grid, "3×3 dil. 6", None))
    for source in sources:
        layers = "1×1" if source.name == "conv7" else ""
        if source.reduced_channels:
            step = f" /{source.stride}" if source.stride > 1 else ""
            layers = f"1×1, {source.kernel}×{source.kernel}{step}"
            if architecture.is_lite:  # depthwise
                layers = f"1×1, {source.kernel}×{source.kernel} dw{step}, 1×1"
        stages.append((source.name, source.channels, source.grid, layers, source))
    return stages


def draw_network(network):
    """A network as a row of blocks; under each source map its head and its priors."""
    architecture = NETWORKS[network]
    stages = describe_stages(architecture)
    figure, (axis,) = panels(1, 5.5)
    bar = -2.85  # where the heads' outputs end
    for x, (name, channels, grid, layers, source) in enumerate(stages):
        is_pool = name.startswith("pool")
        width = 0.34 if is_pool else 0.66
        height = 0.13 + 0.87 * (grid / architecture.input_size) ** 0.5
        color = FAINT if is_pool else "#9aa4af"
        if source:
            color = BLUE
            draw_head(axis, x, source, bar)
        axis.add_patch(Rectangle((x - width / 2, -height), width, 2 * height, color=color, alpha=0.8))
        label = f"{name}: {layers}" if layers else name
        axis.text(x - 0.12, height + 0.07, label, va="bottom", rotation=60, fontsize=10, rotation_mode="anchor")
        axis.text(x, 0, grid, color="white", fontsize=10, weight="bold", rotation=90, **CENTERED)
        axis.text(x, -1.1, channels, ha="center", va="top", fontsize=9.5)
        if architecture.l2_norm and source == architecture.sources[0]:
            plate = {"facecolor": "white", "edgecolor": BLUE, "pad": 2}
            axis.text(x, -1.55, "L2 norm", fontsize=9, color=BLUE, bbox=plate, **CENTERED)
    total = sum(source.n_priors * source.grid**2 for source in architecture.sources)
    axis.add_patch(Rectangle((-0.4, bar - 0.36), len(stages) - 0.2, 0.36, color=BLUE, alpha=0.9))
    text = f"{total} priors: {total} × 4 offsets and {total} × C scores"
    axis.text((len(stages) - 1) / 2, bar - 0.18, text, color="white", fontsize=11, **CENTERED)
    axis.text(-0.62, 0, "cells in a row", ha="right", va="center", fontsize=9.5)
    axis.text(-0.62, -1.1, "channels", ha="right", va="top", fontsize=9.5)
    heads = "heads 3×3 dw, 1×1" if architecture.is_lite else "heads 3×3"
    axis.text(-0.62, -2.08, heads, ha="right", va="top", fontsize=9.5, color=BLUE)
    axis.text(-0.62, bar - 0.45, "priors", ha="right", va="top", fontsize=9.5, color=BLUE)
    top = 4.0 if architecture.is_lite else 3.0  # its labels are longer
    axis.set(xlim=(-2.6, len(stages) - 0.3), ylim=(bar - 1.1, top))
    title = f"{network}, C classes. Blue: the {len(architecture.sources)} feature maps that heads look at"
    notes = "Heights are not to scale; dw: depthwise." if architecture.is_lite else "Heights are not to scale."
    axis.set_title(f"{title}. ({notes})", fontsize=11)
    axis.set_axis_off()
    return figure


def draw_head(axis, x, source, bar):
    """What lies under a source map: an arrow to its head, the head, an arrow to the bar of all priors."""
    n = source.n_priors
    grid = source.grid
    add_arrow(axis, (x, -1.35), (x, -1.92), BLUE, width=1.5)
    axis.add_patch(Rectangle((x - 0.44, -2.42), 0.88, 0.48, facecolor="white", edgecolor=BLUE))
    axis.text(x, -2.18, f"{n}·4\n{n}·C", fontsize=9, color=BLUE, **CENTERED)
    add_arrow(axis, (x, -2.44), (x, bar + 0.03), BLUE, width=1.5)
    axis.text(x, bar - 0.45, f"{grid}²·{n}\n{grid * grid * n}", ha="center", va="top", fontsize=9, color=BLUE)


def draw_fc_to_conv():
    """A small layer as a convolution that slides; below, fc6's kernel, what decimation keeps, where it looks."""
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[0.66, 1])
    draw_sliding(top.subplots(1, 3, width_ratios=[6.2, 6.6, 9.8]))
    draw_decimation(bottom.subplots(1, 3))
    return figure


def draw_sliding(axes):
    weights = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    large = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 1.0], [0.0, 1.0, 2.0]])
    small = large[:2, :2]
    outputs = F.conv2d(large[None, None], weights[None, None])[0, 0]
    titles = ("a layer: 4 inputs, 1 output", "the same, as a 2 × 2 kernel", "the kernel slides over a larger input")
    for axis, x_max, title in zip(axes, (6, 6.4, 9.6), titles, strict=True):
        axis.set(xlim=(-0.2, x_max), ylim=(4.6, -0.9), aspect="equal")
        axis.text((x_max - 0.2) / 2, -0.4, title, ha="center", va="bottom")
        axis.set_axis_off()
    left, middle, right = axes
    add_cells(left, 0, small.reshape(4, 1))
    add_cells(left, 1.6, weights.reshape(4, 1), "#dbeafe")
    for i in range(4):
        left.text(1.3, i + 0.5, "·", fontsize=14, **CENTERED)
    left.text(2.8, 2, "→ sum =", va="center")
    add_cells(left, 4.9, outputs[:1, :1], "#ffedd5")
    left.text(0.5, 4.15, "input", ha="center", va="top", fontsize=11)
    left.text(2.1, 4.15, "weights", ha="center", va="top", fontsize=11)
    add_cells(middle, 0, small)
    middle.text(2.25, 2, "∗", **CENTERED)
    add_cells(middle, 2.5, weights, "#dbeafe")
    middle.text(4.8, 2, "=", **CENTERED)
    add_cells(middle, 5.2, outputs[:1, :1], "#ffedd5")
    add_cells(right, 0, large)
    right.text(3.5, 2, "∗", **CENTERED)
    add_cells(right, 4, weights, "#dbeafe")
    right.text(6.5, 2, "=", **CENTERED)
    add_cells(right, 7, outputs, "#ffedd5")
    right.add_patch(Rectangle((0, 0.5), 2, 2, fill=False, edgecolor=BLUE, linewidth=3))
    right.text(8, 3.15, "an answer for\neach place", ha="center", va="top", fontsize=11)


def add_cells(axis, left, values, color="white"):
    """Draw a table of numbers as cells of side 1, from its left edge on, its middle at the height of 2."""
    top = 2 - len(values) / 2
    for (i, j), value in np.ndenumerate(values.numpy()):
        axis.add_patch(Rectangle((left + j, top + i), 1, 1, facecolor=color, edgecolor=FAINT, linewidth=1))
        axis.text(left + j + 0.5, top + i + 0.5, f"{value:g}".replace("-", "−"), **CENTERED)


def draw_decimation(axes):
    is_kept = np.zeros((7, 7), dtype=bool)
    decimate(is_kept, steps=(3, 3))[:] = True
    is_read = np.zeros((19, 19), dtype=bool)
    is_read[3:16:6, 3:16:6] = True
    cases = (
        (is_kept, 0, "fc6 as a kernel: 7 × 7", "every third row and column is kept"),
        (np.ones((3, 3), dtype=bool), 2, "conv6's kernel: 3 × 3", "9 of 49 weights remain"),
        (is_read, 0, "on the 19 × 19 grid: dilation 6", "nine cells, six apart"),
    )
    for axis, (cells, margin, title, text) in zip(axes, cases, strict=True):
        n = len(cells)
        for (i, j), is_blue in np.ndenumerate(cells):
            color = BLUE if is_blue else "white"
            axis.add_patch(Rectangle((j, i), 1, 1, facecolor=color, edgecolor=GRID, linewidth=1))
        for number, (i, j) in enumerate(np.argwhere(cells), start=1):
            axis.text(j + 0.5, i + 0.52, number, color="white", fontsize=12 if n < 19 else 7, **CENTERED)
        axis.set(xlim=(-margin, n + margin), ylim=(n + margin, -margin), aspect="equal", xticks=[], yticks=[])
        axis.set(title=title, xlabel=text, frame_on=False)


def draw_l2_norm():
    """Channels of a bright and of a faint cell: as they are, divided by their length, and scaled."""
    features = torch.tensor([[90.0, 30, 60, 20], [3.0, 6, 1, 2]]).T.reshape(1, 4, 1, 2)
    normalized = l2_normalize(features)
    bright_length, faint_length = features.norm(dim=1).flatten().tolist()
    figure, axes = panels(3, 3.3)
    titles = ("four channels, made-up values", "divided by the cell's length", "times 20, learned from there")
    for axis, values, title in zip(axes, (features, normalized, normalized * 20), titles, strict=True):
        bright, faint = values[0, :, 0].T.numpy()
        axis.bar(np.arange(4) - 0.2, bright, 0.4, color=BLUE, label=f"a bright cell, length {bright_length:.0f}")
        axis.bar(np.arange(4) + 0.2, faint, 0.4, color=AMBER, label=f"a faint cell, length {faint_length:.0f}")
        axis.set(title=title, xlabel="channel", xticks=range(4), xticklabels="1234")
    axes[0].set(ylabel="activation", ylim=(0, 115))
    axes[1].set(ylabel="activation ÷ length")
    axes[2].set(ylabel="activation ÷ length · 20")
    axes[0].legend(fontsize=10.5)
    return figure


# --- Heads ----------------------------------------------------------------------------------------


def draw_heads():
    """The grid of conv9_2, the channels of one cell, their rows, and the stack of all priors."""
    figure, (axis,) = panels(1, 5.6)
    for i in range(5):
        for j in range(5):
            color = INK if (i, j) == (2, 2) else "white"
            axis.add_patch(Rectangle((j, i + 3), 1, 1, facecolor=color, edgecolor=FAINT))
    axis.text(2.5, 2.7, "conv9_2\n5 × 5 cells", ha="center", va="bottom", fontsize=11)
    draw_channels(axis, 0.6, 4, 0.95, "offsets: 6 priors · 4 = 24 channels")
    for j, name in enumerate(("g_c_x", "g_c_y", "g_w", "g_h")):
        axis.text(6.4 + (j + 0.44) * 0.95, 5.6, name, ha="center", va="top", fontsize=9, color=FAINT)
    for i, name in enumerate(RATIO_NAMES):
        axis.text(10.4, 2.72 + 0.5 * i, name, va="center", fontsize=10, color=RATIO_COLORS[i])
    draw_channels(axis, 6.9, 21, 7.2 / 21, "scores: 6 priors · 21 = 126 channels")
    axis.text(6.4, 11.9, "background, aeroplane, ...", va="top", fontsize=9.5, color=FAINT)
    axis.text(13.6, 11.9, "tvmonitor", ha="right", va="top", fontsize=9.5, color=FAINT)
    draw_stack(axis)
    axis.set(xlim=(-0.2, 20.4), ylim=(12.6, -0.6))
    axis.set_axis_off()
    return figure


def draw_channels(axis, top, depth, step, title):
    """The channels of a cell as a bar; below, a row of `depth` numbers for each of the six priors, `step` apart."""
    add_arrow(axis, (3.1, 5.5), (6.2, top + 0.45), width=1.5)
    axis.text(6.4, top - 0.2, title, va="bottom", fontsize=11)
    channel = 7.2 / (6 * depth)  # width of a channel
    for k in range(6 * depth):
        axis.add_patch(Rectangle((6.4 + channel * k, top), 0.86 * channel, 0.9, color=RATIO_COLORS[k // depth]))
    add_arrow(axis, (8.0, top + 1.05), (8.0, top + 1.75), FAINT, width=1.5)
    axis.text(8.3, top + 1.4, "one row for each prior", va="center", fontsize=10, color=FAINT)
    for i, color in enumerate(RATIO_COLORS):
        for j in range(depth):
            place = (6.4 + j * step, top + 1.9 + 0.5 * i)
            axis.add_patch(Rectangle(place, 0.88 * step, 0.42, color=color, alpha=0.9))


def draw_stack(axis):
    """The priors of all source maps, one map below the other, with arrows from conv9_2's rows."""
    y = 0.6
    total = sum(source.grid**2 * source.n_priors for source in SSD300_SOURCES)
    axis.text(16.4, 0.4, f"all {total} priors", ha="center", va="bottom", fontsize=11)
    for source in SSD300_SOURCES:
        n = source.grid**2 * source.n_priors
        height = 0.5 + 8 * (n / total) ** 0.9  # not to scale: the last maps would not be seen
        middle = y + height / 2
        color = INK if source.name == "conv9_2" else "#9aa4af"
        axis.add_patch(Rectangle((15.6, y), 1.6, height, facecolor=color, edgecolor="white"))
        axis.text(17.4, middle, f"{source.name}: {n}", va="center", fontsize=10)
        if source.name == "conv9_2":
            add_arrow(axis, (12.6, 3.8), (15.5, middle), width=1.5)
            add_arrow(axis, (13.8, 10.1), (15.5, middle), width=1.5)
        y += height
    text = f"({total}, 4) and ({total}, 21)\n(heights are not to scale)"
    axis.text(17.4, y + 0.15, text, ha="center", va="top", fontsize=10, color=FAINT)


# --- Loss, metric, log ----------------------------------------------------------------------------


def draw_smooth_l1():
    """Smooth L1 beside half the square and L1, and their slopes: how hard an error pulls."""
    x = torch.linspace(-3, 3, 241, requires_grad=True)
    losses = {
        "½ x²": (x.square() / 2, FAINT, "-"),
        "|x|": (x.abs(), AMBER, ":"),
        "smooth L1": (F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none"), BLUE, "-"),
    }
    figure, (left, right) = panels(2, 3.4)
    for name, (values, color, style) in losses.items():
        (slopes,) = torch.autograd.grad(values.sum(), x)
        width = 2.8 if name == "smooth L1" else 1.8
        left.plot(x.detach(), values.detach(), color=color, linestyle=style, linewidth=width, label=name)
        right.plot(x.detach(), slopes, color=color, linestyle=style, linewidth=width, label=name)
    left.set(xlabel="x, the error of one offset", ylabel="loss", ylim=(0, 3))
    right.set(xlabel="x, the error of one offset", ylabel="slope of the loss")
    left.legend(loc="upper center")
    for axis in (left, right):
        axis.grid()
    return figure


def precision_recall():
    """The README's example: precision and recall after each detection that counts, and the average precision.

    Returns recalls and precisions as arrays, and the average precision.
    """
    # The object that each detection finds, the best detection first; -1: there is nothing. Objects 0 to 5 are easy.
    found = torch.tensor([0, 1, -1, 6, 2, -1, -1, 3])
    is_difficult = torch.arange(7) == 6
    outcomes = judge_detections(found, (found >= 0).float(), is_difficult, min_overlap=0.5)
    counted = np.array([outcome for outcome in outcomes if outcome != "ignored"])
    n_true = np.cumsum(counted == "true")
    recalls = n_true / 6
    precisions = n_true / np.arange(1, len(counted) + 1)
    return recalls, precisions, average_of_11_points(torch.tensor(precisions), torch.tensor(recalls))


def draw_precision_recall():
    """The precision-recall curve of the example, and the 11 points at which VOC2007 reads it."""
    recalls, precisions, average_precision = precision_recall()
    points = np.arange(11) / 10
    highest = [precisions[recalls >= point].max(initial=0) for point in points]
    figure, (axis,) = panels(1, 3.8)
    axis.plot(recalls, precisions, "o-", color=BLUE, label="after each detection")
    label = "best precision at this recall or a higher one"
    axis.plot(points, highest, "x", color=RED, markersize=10, markeredgewidth=2.5, label=label)
    axis.set(xlabel="recall", ylabel="precision", xlim=(-0.03, 1.03), ylim=(-0.05, 1.08), xticks=points)
    axis.set_title(f"the mean of the 11 crosses is the average precision: {average_precision:.3f}")
    axis.legend(loc="lower left")
    return figure


def draw_training(log_file):
    """Both parts of the loss, and the mAP, of the demo's run, from its log."""
    columns = read_log(log_file)
    figure, (left, right) = panels(2, 3.5)
    left.plot(*columns["conf_loss"], color=AMBER, label="confidence")
    left.plot(*columns["loc_loss"], color=GREEN, label="localisation")
    left.set(xlabel="iteration", ylabel="loss", ylim=(0, None))
    left.legend(loc="upper right")
    right.plot(*columns["mAP"], "o-", color=BLUE)
    right.set(xlabel="iteration", ylabel="mAP on 100 test pictures", ylim=(0, 1))
    for axis in (left, right):
        axis.grid()
    return figure


FIGURES = {
    "overlap.png": draw_overlap,
    "network.png": partial(draw_network, "ssd300_vgg16"),
    "network_ssd512.png": partial(draw_network, "ssd512_vgg16"),
    "network_ssdlite.png": partial(draw_network, "ssdlite320_mobilenet_v3_large"),
    "fc_to_conv.png": draw_fc_to_conv,
    "l2_norm.png": draw_l2_norm,
    "heads.png": draw_heads,
    "smooth_l1.png": draw_smooth_l1,
    "precision_recall.png": draw_precision_recall,
}
