"""The README's figures that need no picture: network, priors, heads, losses, metric, log. See make_figures.py."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from analyze import read_log
from figures_common import (
    AMBER,
    BLUE,
    FAINT,
    GREEN,
    GRID,
    INK,
    RATIO_COLORS,
    RATIO_NAMES,
    RED,
    add_arrow,
    add_box,
    add_cells,
    panels,
    plain_axes,
    show_photo,
    show_square,
)
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scene import Scene

from eval import calculate_mAP
from model import NETWORKS, SSD300, decimate, l2_normalize
from utils import cxcy_to_xy, find_areas, find_jaccard_overlap, find_paired_intersection


def draw_overlap(_model):
    """Intersection, union and overlap of four pairs of boxes."""
    first = torch.tensor([0.0, 0.0, 6.0, 6.0])
    others = torch.tensor([[7.0, 3, 11, 9], [3, 3, 9, 9], [2, 0, 8, 6], [0, 0, 6, 5]])
    figure, axes = panels(4, 3.1)
    for axis, second in zip(axes, others, strict=True):
        x_min, y_min = torch.maximum(first, second)[:2].tolist()
        x_max, y_max = torch.minimum(first, second)[2:].tolist()
        if x_max > x_min and y_max > y_min:
            shared = Rectangle((x_min, y_min), x_max - x_min, y_max - y_min, color=AMBER, alpha=0.4, linewidth=0)
            axis.add_patch(shared)
        add_box(axis, first, BLUE, width=3)
        add_box(axis, second, RED, width=3)
        intersection = float(find_paired_intersection(first, second))
        union = float(find_areas(first) + find_areas(second)) - intersection
        overlap = float(find_jaccard_overlap(first[None], second[None]))
        axis.set(xlim=(-0.5, 11.5), ylim=(9.5, -0.5), aspect="equal", xticks=[], yticks=[])
        axis.set_frame_on(False)
        axis.set_xlabel(f"{intersection:g} shared / {union:g} in all\noverlap {overlap:.2f}", fontsize=13)
    return figure


# --- The network ----------------------------------------------------------------------------------


def describe_stages(network):
    """The stages of a network's figure: list of (name, channels, grid, layers in words, whether it is a source map).

    For a VGG base the blocks with their pooling layers; for others the source maps alone.
    """
    row = NETWORKS[network]
    sources = {source.name: source for source in row.sources}
    stages = [("image", 3, row.input_size, "", False)]
    if "conv4_3" in sources:
        grid = row.input_size
        widths = [sources["conv4_3"].channels // 8 * factor for factor in (1, 2, 4, 8, 8)]
        for block, width in enumerate(widths, start=1):
            n_layers = 2 if block < 3 else 3
            stages.append((f"conv{block}_1–{n_layers}", width, grid, "3×3", block == 4))
            if block < 5:
                grid = -(-grid // 2)
                stages.append((f"pool{block}", width, grid, "2×2 /2", False))
        stages += [
            ("pool5", widths[-1], grid, "3×3", False),
            ("conv6", sources["conv7"].channels, grid, "3×3 dil. 6", False),
        ]
    for source in row.sources:
        if source.name == "conv4_3":
            continue
        layers = "1×1" if source.name == "conv7" else ""
        if source.reduced_channels:
            step = f" /{source.stride}" if source.stride > 1 else ""
            layers = f"1×1, {source.kernel}×{source.kernel}{step}"
        stages.append((source.name, source.channels, source.grid, layers, True))
    return stages


def draw_network(network, _model):
    """A network as a row of blocks; under each source map its head and its priors."""
    row = NETWORKS[network]
    by_name = {source.name: source for source in row.sources}
    stages = describe_stages(network)
    figure, (axis,) = panels(1, 5.5)
    bar = -2.85  # where the heads' outputs end
    for x, (name, channels, grid, layers, is_source) in enumerate(stages):
        height = 0.13 + 0.87 * (grid / row.input_size) ** 0.5
        color = BLUE if is_source else FAINT if name.startswith("pool") else "#9aa4af"
        width = 0.34 if name.startswith("pool") else 0.66
        axis.add_patch(Rectangle((x - width / 2, -height), width, 2 * height, color=color, alpha=0.8))
        label = f"{name}: {layers}" if layers else name
        axis.text(x - 0.12, height + 0.07, label, va="bottom", rotation=60, fontsize=10, rotation_mode="anchor")
        axis.text(x, 0, str(grid), ha="center", va="center", color="white", fontsize=10, weight="bold", rotation=90)
        axis.text(x, -1.1, channels, ha="center", va="top", fontsize=9.5, color=INK)
        if is_source:
            source = by_name["conv4_3" if name.startswith("conv4") else name]
            n = source.n_priors
            add_arrow(axis, (x, -1.35), (x, -1.92), BLUE, width=1.5)
            if row.l2_norm and source == row.sources[0]:
                plate = {"facecolor": "white", "edgecolor": BLUE, "pad": 2}
                axis.text(x, -1.55, "L2 norm", ha="center", va="center", fontsize=9, color=BLUE, bbox=plate)
            axis.add_patch(Rectangle((x - 0.44, -2.42), 0.88, 0.48, facecolor="white", edgecolor=BLUE))
            axis.text(x, -2.18, f"{n}·4\n{n}·C", ha="center", va="center", fontsize=9, color=BLUE)
            add_arrow(axis, (x, -2.44), (x, bar + 0.03), BLUE, width=1.5)
            axis.text(x, bar - 0.45, f"{grid}²·{n}\n{grid * grid * n}", ha="center", va="top",
                      fontsize=9, color=BLUE)  # fmt: skip
    total = sum(source.n_priors * source.grid**2 for source in row.sources)
    axis.add_patch(Rectangle((-0.4, bar - 0.36), len(stages) - 0.2, 0.36, color=BLUE, alpha=0.9))
    axis.text((len(stages) - 1) / 2, bar - 0.18, f"{total} priors: {total} × 4 offsets and {total} × C scores",
              ha="center", va="center", color="white", fontsize=11)  # fmt: skip
    for y, text, color in (
        (0, "cells in a row", INK), (-1.1, "channels", INK), (-2.08, "heads 3×3", BLUE),
        (bar - 0.45, "priors", BLUE),
    ):  # fmt: skip
        axis.text(-0.62, y, text, ha="right", va="center" if y == 0 else "top", fontsize=9.5, color=color)
    axis.set(xlim=(-2.6, len(stages) - 0.3), ylim=(bar - 1.1, 3.0))
    title = f"{network}, C classes. Blue: the {len(row.sources)} feature maps that heads look at"
    axis.set_title(f"{title}. (Heights are not to scale.)", fontsize=11)
    axis.set_axis_off()
    return figure


def draw_fc_to_conv(_model):
    """A small layer as a convolution that slides; below, fc6's kernel, what decimation keeps, where it looks."""
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[0.66, 1])
    draw_sliding(top.subplots(1, 3, width_ratios=[6.2, 6.6, 9.8]))
    draw_decimation(bottom.subplots(1, 3))
    return figure


def draw_sliding(axes):
    weights = torch.tensor([[0.5, -1.0], [2.0, 0.0]])
    large = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 1.0], [0.0, 1.0, 2.0]])
    outputs = F.conv2d(large[None, None], weights[None, None])[0, 0]

    def texts(values):
        return [[f"{value:g}".replace("-", "−") for value in row] for row in values.tolist()]

    left, middle, right = axes
    for axis, x_max, title in (
        (left, 6, "a layer: 4 inputs, 1 output"), (middle, 6.4, "the same, as a 2 × 2 kernel"),
        (right, 9.6, "the kernel slides over a larger input"),
    ):  # fmt: skip
        axis.set(xlim=(-0.2, x_max), ylim=(4.6, -0.9), aspect="equal")
        axis.text((x_max - 0.2) / 2, -0.4, title, ha="center", va="bottom", fontsize=12)
        axis.set_axis_off()
    add_cells(left, (0, 0), texts(large[:2, :2].reshape(4, 1)))
    add_cells(left, (1.6, 0), texts(weights.reshape(4, 1)), color="#dbeafe")
    for i in range(4):
        left.text(1.3, i + 0.5, "·", ha="center", va="center", fontsize=14)
    left.text(2.8, 2, "→ sum =", va="center")
    add_cells(left, (4.9, 1.5), texts(outputs[:1, :1]), color="#ffedd5")
    left.text(0.5, 4.15, "input", ha="center", va="top", fontsize=11)
    left.text(2.1, 4.15, "weights", ha="center", va="top", fontsize=11)
    add_cells(middle, (0, 1), texts(large[:2, :2]))
    middle.text(2.25, 2, "∗", ha="center", va="center")
    add_cells(middle, (2.5, 1), texts(weights), color="#dbeafe")
    middle.text(4.8, 2, "=", ha="center", va="center")
    add_cells(middle, (5.2, 1.5), texts(outputs[:1, :1]), color="#ffedd5")
    add_cells(right, (0, 0.5), texts(large))
    right.add_patch(Rectangle((0, 0.5), 2, 2, fill=False, edgecolor=BLUE, linewidth=3))
    right.text(3.5, 2, "∗", ha="center", va="center")
    add_cells(right, (4, 1), texts(weights), color="#dbeafe")
    right.text(6.5, 2, "=", ha="center", va="center")
    add_cells(right, (7, 1), texts(outputs), color="#ffedd5")
    right.text(8, 3.15, "an answer for\neach place", ha="center", va="top", fontsize=11)


def draw_decimation(axes):
    kept = decimate(torch.arange(49).view(7, 7), steps=(3, 3)).flatten().tolist()
    titles = ("fc6 as a kernel: 7 × 7", "conv6's kernel: 3 × 3", "on the 19 × 19 grid: dilation 6")
    for axis, n, title in zip(axes, (7, 3, 19), titles, strict=True):
        is_read = np.ones((n, n), dtype=bool)
        if n == 7:
            is_read = np.isin(np.arange(49).reshape(7, 7), kept)
        if n == 19:
            is_read = np.zeros((19, 19), dtype=bool)
            is_read[np.ix_([3, 9, 15], [3, 9, 15])] = True
        for (i, j), is_blue in np.ndenumerate(is_read):
            color = BLUE if is_blue else "white"
            axis.add_patch(Rectangle((j, i), 1, 1, facecolor=color, edgecolor=GRID, linewidth=1))
            if is_blue:
                number = int(is_read.flat[: i * n + j].sum()) + 1
                size = 12 if n < 19 else 7
                axis.text(j + 0.5, i + 0.52, number, ha="center", va="center", color="white", fontsize=size)
        margin = 2 if n == 3 else 0
        axis.set(xlim=(-margin, n + margin), ylim=(n + margin, -margin), aspect="equal", xticks=[], yticks=[])
        axis.set_frame_on(False)
        axis.set_title(title, fontsize=12)
    axes[0].set_xlabel("every third row and column is kept")
    axes[1].set_xlabel("9 of 49 weights remain")
    axes[2].set_xlabel("nine cells, six apart")


def draw_l2_norm(_model):
    """Channels of a bright and of a faint cell: as they are, divided by their length, and scaled."""
    features = torch.tensor([[90.0, 30, 60, 20], [3.0, 6, 1, 2]]).T.reshape(1, 4, 1, 2)
    normalized = l2_normalize(features)
    lengths = features.square().sum(dim=1).sqrt().flatten().tolist()
    figure, axes = panels(3, 3.3)
    titles = ("four channels, made-up values", "divided by the cell's length", "times 20, learned from there")
    for axis, values, title in zip(axes, (features, normalized, normalized * 20), titles, strict=True):
        bars = values[0, :, 0].T.numpy()  # (2, 4)
        axis.bar(np.arange(4) - 0.2, bars[0], 0.4, color=BLUE, label=f"a bright cell, length {lengths[0]:.0f}")
        axis.bar(np.arange(4) + 0.2, bars[1], 0.4, color=AMBER, label=f"a faint cell, length {lengths[1]:.0f}")
        axis.set_title(title, fontsize=12)
        axis.set(xlabel="channel", xticks=range(4), xticklabels="1234")
        plain_axes(axis)
    axes[0].set_ylabel("activation")
    axes[0].legend(frameon=False, fontsize=10.5)
    axes[0].set_ylim(0, 115)
    return figure


# --- Priors and heads -----------------------------------------------------------------------------


def priors_of_cell(source_name, row, column):
    """The priors of one cell of a source map of SSD300: (n, 4) boundary form, fractional."""
    priors_xy = cxcy_to_xy(SSD300.create_prior_boxes())
    first = 0
    for source in NETWORKS["ssd300_vgg16"].sources:
        if source.name == source_name:
            start = first + (row * source.grid + column) * source.n_priors
            return priors_xy[start : start + source.n_priors]
        first += source.grid**2 * source.n_priors
    raise ValueError(f"SSD300 has no source map {source_name}")


def draw_priors(_model):
    """One cell of conv9_2 with its six priors on the scene; the middle cells of all six source maps."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    large, small = figure.subfigures(1, 2, width_ratios=[1.25, 1])
    axis = large.subplots()
    picture = Scene().image
    show_photo(axis, picture, "conv9_2: 5 × 5 cells, the middle one's six priors", ticks=True)
    for k in range(1, 5):
        axis.axhline(k / 5, color="white", linewidth=0.8)
        axis.axvline(k / 5, color="white", linewidth=0.8)
    axis.add_patch(Rectangle((0.4, 0.4), 0.2, 0.2, color="white", alpha=0.45))
    for box, color, name in zip(priors_of_cell("conv9_2", 2, 2), RATIO_COLORS, RATIO_NAMES, strict=True):
        width, height = (300 * (box[2:] - box[:2])).tolist()
        add_box(axis, box, color, width=2.6, halo=4.5)
        axis.plot([], [], color=color, linewidth=3, label=f"{name}: {width:.0f} × {height:.0f}")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, frameon=False, fontsize=11)
    for axis, source in zip(small.subplots(3, 2).flat, NETWORKS["ssd300_vgg16"].sources, strict=True):
        boxes = priors_of_cell(source.name, source.grid // 2, source.grid // 2)
        side = 300 * float(boxes[0, 2] - boxes[0, 0])
        show_square(axis, f"{source.name}: {source.grid} × {source.grid}\nratio 1 is {side:.0f} pixels wide")
        axis.title.set_fontsize(10)
        for k in range(1, source.grid) if source.grid < 12 else ():
            axis.plot([0, 1], [k / source.grid] * 2, color=GRID, linewidth=0.6)
            axis.plot([k / source.grid] * 2, [0, 1], color=GRID, linewidth=0.6)
        colors = RATIO_COLORS if len(boxes) == 6 else (*RATIO_COLORS[:3], RATIO_COLORS[4])
        for box, color in zip(boxes, colors, strict=True):
            add_box(axis, box, color, width=1.5, clip=False)
        axis.set(xlim=(-0.16, 1.16), ylim=(1.16, -0.16))
    return figure


def draw_heads(_model):
    """The grid of conv9_2, the channels of one cell, their rows, and the stack of all priors."""
    sources = NETWORKS["ssd300_vgg16"].sources
    n_priors, grid = 6, 5
    figure, (axis,) = panels(1, 5.6)
    for i in range(grid):
        for j in range(grid):
            color = INK if (i, j) == (2, 2) else "white"
            axis.add_patch(Rectangle((j, i + 3), 1, 1, facecolor=color, edgecolor=FAINT))
    axis.text(2.5, 2.7, "conv9_2\n5 × 5 cells", ha="center", va="bottom", fontsize=11)
    for top, depth, title in (
        (0.6, 4, "offsets: 6 priors · 4 = 24 channels"),
        (6.9, 21, "scores: 6 priors · 21 = 126 channels"),
    ):
        add_arrow(axis, (3.1, 5.5), (6.2, top + 0.45), INK, width=1.5)
        axis.text(6.4, top - 0.2, title, va="bottom", fontsize=11)
        n_channels = n_priors * depth
        span = 7.2  # width of the bar of channels
        for k in range(n_channels):
            place = (6.4 + span * k / n_channels, top)
            axis.add_patch(Rectangle(place, 0.86 * span / n_channels, 0.9, color=RATIO_COLORS[k // depth]))
        add_arrow(axis, (8.0, top + 1.05), (8.0, top + 1.75), FAINT, width=1.5)
        axis.text(8.3, top + 1.4, "one row for each prior", va="center", fontsize=10, color=FAINT)
        step = span / 21 if depth == 21 else 0.95
        for i, color in enumerate(RATIO_COLORS):
            for j in range(depth):
                place = (6.4 + j * step, top + 1.9 + 0.5 * i)
                axis.add_patch(Rectangle(place, 0.88 * step, 0.42, color=color, alpha=0.9))
            if depth == 4:
                axis.text(10.4, top + 2.12 + 0.5 * i, RATIO_NAMES[i], va="center", fontsize=10, color=color)
        if depth == 4:
            for j, name in enumerate(("g_c_x", "g_c_y", "g_w", "g_h")):
                axis.text(6.4 + (j + 0.44) * step, top + 5.0, name, ha="center", va="top", fontsize=9, color=FAINT)
        else:
            axis.text(6.4, top + 5.0, "background, aeroplane, ...", va="top", fontsize=9.5, color=FAINT)
            axis.text(6.4 + span, top + 5.0, "tvmonitor", ha="right", va="top", fontsize=9.5, color=FAINT)
    y = 0.6
    total = sum(source.grid**2 * source.n_priors for source in sources)
    for source in sources:
        n = source.grid**2 * source.n_priors
        height = 0.5 + 8 * (n / total) ** 0.9  # not to scale: the last maps would not be seen
        color = INK if source.name == "conv9_2" else "#9aa4af"
        axis.add_patch(Rectangle((15.6, y), 1.6, height, facecolor=color, edgecolor="white"))
        axis.text(17.4, y + height / 2, f"{source.name}: {n}", va="center", fontsize=10)
        if source.name == "conv9_2":
            for start in ((12.6, 3.8), (13.8, 10.1)):
                add_arrow(axis, start, (15.5, y + height / 2), INK, width=1.5)
        y += height
    axis.text(16.4, 0.4, f"all {total} priors", ha="center", va="bottom", fontsize=11)
    axis.text(17.4, y + 0.15, f"({total}, 4) and ({total}, 21)\n(heights are not to scale)", ha="center", va="top",
              fontsize=10, color=FAINT)  # fmt: skip
    axis.set(xlim=(-0.2, 20.4), ylim=(12.6, -0.6))
    axis.set_axis_off()
    return figure


# --- Loss, metric, log ----------------------------------------------------------------------------


def draw_smooth_l1(_model):
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
    left.legend(frameon=False, loc="upper center")
    for axis in (left, right):
        plain_axes(axis)
        axis.grid(color=GRID, linewidth=0.6)
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
    figure, (axis,) = panels(1, 3.8)
    axis.plot(recalls, precisions, "o-", color=BLUE, label="after each detection")
    axis.plot(np.arange(11) / 10, points, "x", color=RED, markersize=10, markeredgewidth=2.5,
              label="best precision at this recall or a higher one")  # fmt: skip
    axis.set(xlabel="recall", ylabel="precision", xlim=(-0.03, 1.03), ylim=(-0.05, 1.08), xticks=np.arange(11) / 10)
    axis.set_title(f"the mean of the 11 crosses is the average precision: {average_precision:.3f}", fontsize=12)
    plain_axes(axis)
    axis.legend(frameon=False, loc="lower left")
    return figure


def draw_training(log_file):
    """Both parts of the loss, and the mAP, of the demo's run, from its log."""
    columns = read_log(log_file)
    figure, (left, right) = panels(2, 3.5)
    left.plot(*columns["conf_loss"], color=AMBER, label="confidence")
    left.plot(*columns["loc_loss"], color=GREEN, label="localisation")
    left.set(xlabel="iteration", ylabel="loss", ylim=(0, None))
    left.legend(frameon=False, loc="upper right")
    right.plot(*columns["mAP"], "o-", color=BLUE)
    right.set(xlabel="iteration", ylabel="mAP on 100 test pictures", ylim=(0, 1))
    for axis in (left, right):
        plain_axes(axis)
        axis.grid(color=GRID, linewidth=0.6)
    return figure


FIGURES = {
    "overlap.png": draw_overlap,
    "network.png": partial(draw_network, "ssd300_vgg16"),
    "network_ssd512.png": partial(draw_network, "ssd512_vgg16"),
    "network_ssdlite.png": partial(draw_network, "ssdlite320_mobilenet_v3_large"),
    "fc_to_conv.png": draw_fc_to_conv,
    "l2_norm.png": draw_l2_norm,
    "priors.jpg": draw_priors,
    "heads.png": draw_heads,
    "smooth_l1.png": draw_smooth_l1,
    "precision_recall.png": draw_precision_recall,
}
