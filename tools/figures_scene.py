"""The figures of the picture that runs through the README, and of other generated pictures. See make_figures.py.

Each function is given the `Scene`, and returns a figure of Matplotlib or a PIL image.
"""

import matplotlib
import numpy as np
import scene
import torch
import torch.nn.functional as F
from figures_common import (
    AMBER,
    BLUE,
    CENTERED,
    CLASS_COLORS,
    FAINT,
    GREEN,
    GRID,
    INK,
    RATIO_COLORS,
    RATIO_NAMES,
    RED,
    add_arrow,
    add_box,
    add_plate,
    panels,
    show_photo,
)
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from scene import CLASS_NAMES, OBJECT_NAMES, PRIOR_NAMES
from torchvision.transforms.functional import to_pil_image

from datasets import AUGMENTATIONS, transform
from detect import draw_boxes, find_objects
from model import BACKGROUND, SSD300_SOURCES, MultiBoxLoss, load_model, match_priors
from utils import class_colors, cxcy_to_gcxgcy, cxcy_to_xy, find_jaccard_overlap, gcxgcy_to_cxcy, xy_to_cxcy

# Of the sample's test split:
HERO_PICTURES = (4, 15, 33, 44, 54, 69)  # of about the same shape
BATCH_PICTURES = (46, 47)  # one object, none
PIPELINE_PICTURE = 67

N_PRIORS = [source.grid**2 * source.n_priors for source in SSD300_SOURCES]  # of each source map


def draw_hero(here):
    """What the network finds in six pictures that it was not trained on."""
    pictures = []
    for number in HERO_PICTURES:
        image, _, _ = scene.load_picture(number)
        found = find_objects(image, min_score=0.4, model=here.model)
        pictures.append(draw_boxes(image, *found, CLASS_COLORS).resize((390, 312)))
    return put_in_rows([pictures[:3], pictures[3:]])


def put_in_rows(rows):
    """One picture of rows of pictures, with white gaps; all of a row are of the same height."""
    gap = 10  # pixels
    strips = []
    for pictures in rows:
        padded = [np.pad(picture, ((0, gap), (0, gap), (0, 0)), constant_values=255) for picture in pictures]
        strips.append(np.hstack(padded))
    return Image.fromarray(np.vstack(strips)[:-gap, :-gap])


def draw_scene(here):
    """The picture that runs through the page, without and with its boxes."""
    figure, (left, right) = panels(2, 5)
    show_photo(left, here.image, "what the network gets: 300 × 300 pixels", ticks=True)
    show_photo(right, here.image, "what it should say", ticks=True)
    places = ("top", "bottom right", "bottom right", "right")
    for box, name, text, place in zip(here.boxes_xy, here.names, OBJECT_NAMES, places, strict=True):
        add_box(right, box, CLASS_COLORS[name], text, 2.4, at=place, size=11)
    return figure


def draw_forms(here):
    """One box in the three forms."""
    box, prior = here.boxes_xy[0], here.priors_cxcy[0]
    box_cxcy = xy_to_cxcy(box)
    forms = (
        ("boundary", "x_min, y_min, x_max, y_max", scene.decimals(box, 3)),
        ("center-size", "c_x, c_y, w, h", scene.decimals(box_cxcy, 3)),
        ("offsets from a prior", "g_c_x, g_c_y, g_w, g_h", scene.decimals(cxcy_to_gcxgcy(box_cxcy, prior), 2)),
    )
    figure, axes = panels(3, 4.3)
    for axis, (title, names, numbers) in zip(axes, forms, strict=True):
        show_photo(axis, here.image, title)
        add_box(axis, box, RED, width=2.5)
        axis.set(xlim=(0, 0.78), ylim=(0.84, 0.06), xlabel=f"({names})\n({', '.join(numbers)})")
    plate = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}  # behind a text on the photo
    left, middle, right = axes
    x_min, y_min, x_max, y_max = box.tolist()
    left.plot([x_min, x_max], [y_min, y_max], "o", color=RED, markersize=8)
    left.text(x_min, y_min - 0.03, f"({x_min:.3f}, {y_min:.3f})", color=RED, bbox=plate)
    left.text(x_max, y_max + 0.08, f"({x_max:.3f}, {y_max:.3f})", ha="center", color=RED, bbox=plate)
    c_x, c_y, w, h = box_cxcy.tolist()
    middle.plot(c_x, c_y, "o", color=RED, markersize=8)
    add_arrow(middle, (x_min, y_max + 0.04), (x_max, y_max + 0.04), "white", "<|-|>")
    middle.text(c_x, y_max + 0.12, f"w = {w:.3f}", ha="center", bbox=plate)
    add_arrow(middle, (x_max + 0.04, y_min), (x_max + 0.04, y_max), "white", "<|-|>")
    middle.text(x_max + 0.07, y_min + 0.05, f"h = {h:.3f}", va="center", bbox=plate)
    add_box(right, cxcy_to_xy(prior), BLUE, "prior A", dashed=True, at="bottom right", size=11)
    return figure


def draw_offsets(here):
    """How the left star's prior has to move and to change its size, with arrows."""
    b_x, b_y, b_w, b_h = xy_to_cxcy(here.boxes_xy[0]).tolist()
    p_x, p_y, p_w, p_h = here.priors_cxcy[0].tolist()
    figure, (left, right) = panels(2, 4.6, [1, 1.05])
    show_photo(left, here.image)
    left.set(xlim=(0.08, 0.62), ylim=(0.7, 0.16))
    add_box(left, here.boxes_xy[0], RED, "left star", size=11)
    add_box(left, cxcy_to_xy(here.priors_cxcy[0]), BLUE, "prior A", dashed=True, at="bottom right", size=11)
    for side in (-1, 1):
        add_arrow(left, (p_x + side * p_w / 2, p_y), (b_x + side * b_w / 2, p_y), width=1.6, halo=True)
        add_arrow(left, (p_x, p_y + side * p_h / 2), (p_x, b_y + side * b_h / 2), width=1.6, halo=True)
    add_arrow(left, (p_x, p_y), (b_x, b_y), width=1.6, halo=True)
    rows = scene.compute_offsets(here)
    c_x, c_y, w, h = [f"g_{name} = {computation} = {offset}" for name, _, _, computation, offset in rows]
    lines = ("the centre moves", c_x, c_y, "the width changes", w, "the height changes", h)
    for i, line in enumerate(lines):
        if "=" in line:
            right.text(0.05, 0.92 - 0.13 * i, line)
        else:
            right.text(0, 0.92 - 0.13 * i, line, weight="bold")
    right.set_axis_off()
    return figure


def draw_matching(here):
    """The eight priors of the scene, and what each is to predict."""
    figure, (left, right) = panels(2, 5.1)
    show_photo(left, here.image, "eight of the 8732 priors")
    show_photo(right, here.image, "after matching: what each must predict")
    places = ("top right", "left", "bottom right", "top", "bottom right", "left", "top", "top")
    for name, prior, item, place in zip(PRIOR_NAMES, here.priors_cxcy, here.matched, places, strict=True):
        box = cxcy_to_xy(prior)
        add_box(left, box, INK, name, 1.6, at=place, size=11, halo=3.5)
        if name == "D":
            place = "bottom"
        if item == BACKGROUND:
            add_box(right, box, FAINT, f"{name}: background", 1.4, dashed=True, at=place, size=11, halo=2.4)
        else:
            class_name = here.names[item]
            add_box(right, box, CLASS_COLORS[class_name], f"{name}: {class_name}", 2.6, at=place, size=11)
    return figure


def draw_overlaps(here):
    """The table of overlaps as a heat map: as it is, the four rounds of step 1, and step 2."""
    overlaps = here.overlaps.numpy()  # (4, 8): a row an object, a column a prior
    n_objects, n_priors = overlaps.shape
    figure, axes = panels(2, 6.6, rows=3)
    for k, axis in enumerate(axes):
        axis.imshow(overlaps, cmap="Greens", vmin=0, vmax=1.2, aspect="auto")
        axis.set_xticks(range(n_priors), list(PRIOR_NAMES), fontsize=12, weight="bold")
        axis.set_yticks(range(n_objects), OBJECT_NAMES if k % 2 == 0 else [""] * n_objects, fontsize=11)
        axis.spines[:].set_visible(True)
        axis.tick_params(length=0, top=True, bottom=False, labeltop=True, labelbottom=False)
        for (i, j), overlap in np.ndenumerate(overlaps):
            axis.text(j, i, f"{overlap:.2f}", fontsize=11, **CENTERED)
    axes[0].set_xlabel("the table")
    for k, (item, prior) in enumerate(here.step_1, start=1):
        axes[k].set_xlabel(f"step 1, round {k}: the {OBJECT_NAMES[item]} gets {PRIOR_NAMES[prior]}")
        mark_cell(axes[k], prior, item, RED)
        for axis in axes[k + 1 :]:
            mark_cell(axis, prior, item, INK)
        for axis in axes[k:-1]:  # in the last one, the whole table counts again
            axis.plot([-0.5, n_priors - 0.5], [item, item], color=RED, linewidth=1.2)
            axis.plot([prior, prior], [-0.5, n_objects - 0.5], color=RED, linewidth=1.2)
    takers = []
    others = []
    for prior, item in enumerate(here.matched):
        if item == BACKGROUND:
            others.append(PRIOR_NAMES[prior])
        elif (item, prior) not in here.step_1:
            mark_cell(axes[-1], prior, item, BLUE)
            takers.append(PRIOR_NAMES[prior])
    others = f"{', '.join(others[:-1])} and {others[-1]}"
    axes[-1].set_xlabel(f"step 2: {', '.join(takers)} has 0.5 or more; {others} do not")
    return figure


def mark_cell(axis, column, row, color):
    axis.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, edgecolor=color, linewidth=2.6))


def draw_grids(here):
    """Which feature maps find which objects: the cells of all positive priors, on the three maps that have any."""
    matched = match_priors(here.boxes_xy, cxcy_to_xy(here.all_priors_cxcy), threshold=0.5)  # (8732,)
    figure, axes = panels(3, 4.1)
    maps = zip(SSD300_SOURCES, matched.split(N_PRIORS), here.all_priors_cxcy.split(N_PRIORS), strict=True)
    for axis, (source, items, priors_cxcy) in zip(axes, maps, strict=False):  # the first three
        show_photo(axis, here.image, f"{source.name}: {source.grid} × {source.grid} cells")
        add_grid(axis, source.grid, color="white", linewidth=0.5, alpha=0.7)
        side = 1 / source.grid
        counts = []
        for item, name in enumerate(here.names):
            add_box(axis, here.boxes_xy[item], CLASS_COLORS[name], width=1.6)
            positives = priors_cxcy[items == item]
            for c_x, c_y in positives[:, :2].unique(dim=0).tolist():
                cell = (c_x - side / 2, c_y - side / 2)
                axis.add_patch(Rectangle(cell, side, side, color=CLASS_COLORS[name], alpha=0.7))
            if len(positives):
                counts.append(f"{OBJECT_NAMES[item]} {len(positives)}")
        axis.set_xlabel("positive priors:\n" + ", ".join(counts), fontsize=11)
    return figure


def add_grid(axis, n, **style):
    """The inner lines of n x n cells."""
    for k in range(1, n):
        axis.plot([k / n, k / n], [0, 1], **style)
        axis.plot([0, 1], [k / n, k / n], **style)


def draw_learning(here, folder):
    """What one network finds in the scene's picture at several times of its training: see `snapshots`."""
    numbers = sorted(int(path.name.split(".")[0]) for path in folder.glob("*.pth.tar"))
    figure, axes = panels(len(numbers) // 2, 7.4, rows=2)
    for axis, number in zip(axes, numbers, strict=True):
        model = load_model(folder / f"{number}.pth.tar")
        found = find_objects(here.image, min_score=scene.MIN_SCORE, model=model)
        show_photo(axis, draw_boxes(here.image, *found, CLASS_COLORS))
        axis.set_xlabel(f"after {number} iterations")
    return figure


def draw_batch(here):
    """Three pictures with different numbers of objects: images are stacked, boxes are listed."""
    items = [(here.image, here.boxes_xy, here.names), *map(scene.load_picture, BATCH_PICTURES)]
    figure, axes = panels(3, 5.0)
    for i, (axis, (image, boxes_xy, names)) in enumerate(zip(axes, items, strict=True)):
        show_photo(axis, image.resize((300, 300)), f"images[{i}]: (3, 300, 300)")
        lines = [f"boxes[{i}]: {tuple(boxes_xy.shape)}"]
        for box, name in zip(boxes_xy, names, strict=True):
            add_box(axis, box, CLASS_COLORS[name], width=2.4)
            lines.append(", ".join(scene.decimals(box, 2)))
        if not names:
            lines.append("no objects")
        lines += [""] * (5 - len(lines))
        axis.set_xlabel("\n".join(lines), fontsize=10.5, family="monospace")
    figure.suptitle("images: one tensor of shape (3, 3, 300, 300)          boxes: a list of three tensors", fontsize=12)
    return figure


def draw_pipeline(here):
    """One picture all the way: photo, input, feature maps, priors with scores, threshold, suppression."""
    model = here.model
    photo, _, _ = scene.load_picture(PIPELINE_PICTURE)
    square = photo.resize((300, 300))
    maps = []
    hook = model.pred_convs.register_forward_pre_hook(lambda _module, inputs: maps.extend(inputs[0]))
    locs, scores, (found_boxes, found_labels, found_scores) = scene.predict(model, photo)
    hook.remove()
    best_scores, labels = F.softmax(scores, dim=1)[:, 1:].max(dim=1)  # of each prior; labels start at 0 here
    colors = [CLASS_COLORS[CLASS_NAMES[label + 1]] for label in labels.tolist()]
    candidates = (best_scores > scene.MIN_SCORE).nonzero()[:, 0].tolist()

    steps = (
        (photo, "1. a picture", f"{photo.width} × {photo.height} pixels"),
        (square, "2. the input", "300 × 300 pixels, normalised"),
        (None, "3. six feature maps", "38 × 38, 19 × 19, ... 1 × 1 cells"),
        (square, "4. priors with scores", "8732 priors: a few of them, and the best ones"),
        (square, f"5. scores above {scene.MIN_SCORE}, decoded", f"{len(candidates)} boxes"),
        (photo, "6. after suppression", f"{len(found_boxes)} objects"),
    )
    figure, axes = panels(3, 6.6, rows=2)
    for axis, (image, title, text) in zip(axes, steps, strict=True):
        if image:
            show_photo(axis, image)
        else:
            show_maps(axis, maps)
        axis.set_title(title)
        axis.set_xlabel(text, fontsize=11)
    priors_xy = cxcy_to_xy(model.priors_cxcy)
    for prior in np.random.default_rng(0).choice(len(priors_xy), 40, replace=False):
        add_box(axes[3], priors_xy[prior], "white", width=0.6)
    best = best_scores.argsort(descending=True)[:25]
    overlap = find_jaccard_overlap(priors_xy[best], priors_xy[best])  # (25, 25)
    labelled = []  # rows of the priors whose scores are written: the best one at each place
    for row, prior in enumerate(best.tolist()):
        text = ""
        if (overlap[row, labelled] < 0.1).all():
            text = f"{best_scores[prior]:.2f}"
            labelled.append(row)
        add_box(axes[3], priors_xy[prior], colors[prior], text, width=1.4)
    boxes_xy = cxcy_to_xy(gcxgcy_to_cxcy(locs, model.priors_cxcy))
    for prior in candidates:
        add_box(axes[4], boxes_xy[prior], colors[prior], width=1.4)
    for box, label, score in zip(found_boxes, found_labels.tolist(), found_scores.tolist(), strict=True):
        name = CLASS_NAMES[label]
        add_box(axes[5], box, CLASS_COLORS[name], f"{name} {score:.2f}", 2.4)
    return figure


def show_maps(axis, maps):
    """Six feature maps in two rows: the root mean square of the channels of every cell."""
    for k, features in enumerate(maps):
        row, column = divmod(k, 3)
        picture = features[0].square().mean(dim=0).sqrt().numpy()  # (G, G)
        place = (column + 0.04, column + 0.96, row + 0.96, row + 0.04)
        axis.imshow(picture, extent=place, cmap="viridis", interpolation="nearest")
    axis.set(xlim=(0, 3), ylim=(2.5, -0.5), xticks=[], yticks=[], frame_on=False)


def draw_mining(here):
    """The scene's four own priors and its hardest negatives; the losses of the negatives, sorted."""
    priors_xy = cxcy_to_xy(here.all_priors_cxcy)
    _, scores, _ = scene.predict(here.model, here.image)
    (labels,), positives, _ = MultiBoxLoss(here.all_priors_cxcy).make_targets([here.boxes_xy], [here.labels])
    losses = F.cross_entropy(scores, labels, reduction="none")  # (P,)
    n_positive = len(positives)
    n_negative = len(labels) - n_positive
    n_hard = 3 * n_positive
    n_shown = 2 * n_hard
    order = losses.masked_fill(labels > 0, -1).argsort(descending=True)
    figure, (left, right) = panels(2, 4.7, [1, 1.05])
    show_photo(left, here.image, "each object's best prior (blue),\nthe five hardest negatives (red) and their losses")
    for prior in here.all_overlaps.argmax(dim=1):
        add_box(left, priors_xy[prior], BLUE)
    for k, prior in enumerate(order[:5]):
        box = priors_xy[prior]
        add_box(left, box, RED, width=1.6)
        x = float(box[[0, 2]][k % 2].clamp(0.06, 0.94))  # at a corner, another one each time, inside the picture
        y = float(box[[1, 3]][k // 2 % 2].clamp(0.04, 0.96))
        add_plate(left, x, y, f"{float(losses[prior]):.1f}", RED)
    bars = losses[order[:n_shown]].numpy()
    others = f"left out: {n_negative - n_hard} others,\neach about {bars[n_hard]:.1g} or less"
    right.bar(range(n_hard), bars[:n_hard], 1.0, color=RED, label=f"the hardest {n_hard} count")
    right.bar(range(n_hard, n_shown), bars[n_hard:], 1.0, color=FAINT, label=others)
    right.axvline(n_hard - 0.5, ymax=0.5, color=RED, linestyle="--")
    right.text(n_hard + 3, bars[n_hard] * 4, f"mining stops\nafter {n_hard}", color=RED, fontsize=10)
    right.set(yscale="log", ylim=(bars[-1] / 2, bars[0] * 2), ylabel="cross entropy (logarithmic)")
    right.set_xlabel(f"negatives, hardest first: the first {n_shown} of {n_negative}")
    right.set_title(f"{n_positive} positives, so 3 · {n_positive} = {n_hard} negatives")
    right.legend(loc="upper right")
    return figure


def draw_nms(here):
    """Suppression of the scene's candidates, one after the other, and the answer."""
    boxes_xy, names, scores = scene.candidates(here)
    kept = []
    figure, axes = panels(4, 6.2, rows=2)
    for axis, (i, rival, overlap, stays) in zip(axes[:-1], scene.suppression_steps(here), strict=True):
        show_photo(axis, here.image, f"{i + 1}: {names[i]} {scores[i]:.5f}")
        for j in kept:
            add_box(axis, boxes_xy[j], "white", width=1.5)
        color = GREEN if stays else RED
        add_box(axis, boxes_xy[i], color, width=2.8, halo=4.5)
        reason = f"no {names[i]} so far" if rival is None else f"overlap with {rival + 1}: {overlap:.2f}"
        axis.set_xlabel(f"{reason}\n→ {'kept' if stays else 'dropped'}", fontsize=11, color=color)
        if stays:
            kept.append(i)
    show_photo(axes[-1], here.image, "the answer")
    places = ("top", "bottom right", "bottom right", "bottom")  # of the four objects
    items = find_jaccard_overlap(boxes_xy, here.boxes_xy).argmax(dim=1)
    for j in kept:
        text = f"{names[j]} {scores[j]:.2f}"
        add_box(axes[-1], boxes_xy[j], CLASS_COLORS[names[j]], text, 2.4, at=places[items[j]])
    axes[-1].set_xlabel(f"{len(kept)} objects", fontsize=11)
    return figure


def draw_augmentation(here):
    """The scene as `transform()` changes it, one step at a time and all together."""
    n_objects = len(here.boxes_xy)
    cases = (  # the seeds were chosen by eye: the results should differ, and show what the text says
        ("as it is", (), 0),
        ("1. zoomed out", ("zoom_out",), 1),
        ("2. cropped", ("crop",), 60),
        ("4. colours", ("distort",), 6),
        ("4. colours, drawn again", ("distort",), 11),
        ("5. flipped", ("flip",), 3),
        ("all steps", AUGMENTATIONS, 38),
        ("all steps, drawn again", AUGMENTATIONS, 131),
    )
    objects = (here.boxes_xy * 300, here.labels, torch.zeros(n_objects, dtype=torch.uint8))
    figure, axes = panels(4, 6.5, rows=2)
    for axis, (title, steps, seed) in zip(axes, cases, strict=True):
        rng = np.random.default_rng(seed)
        pixels, boxes_xy, labels, _ = transform(here.image, *objects, "TRAIN", rng, augment=steps)
        show_photo(axis, to_pil_image(pixels), title)
        for box, label in zip(boxes_xy, labels.tolist(), strict=True):
            add_box(axis, box, CLASS_COLORS[CLASS_NAMES[label]], width=2.2, halo=4)
        text, color = f"{n_objects} objects", FAINT
        if len(boxes_xy) < n_objects:
            text, color = f"{len(boxes_xy)} of {n_objects} objects stay", AMBER
        n_cut = int(((boxes_xy <= 0) | (boxes_xy >= 1)).any(dim=1).sum())
        if n_cut:
            text += f"\n{n_cut} of them cut at the edge"
        axis.set_xlabel(text, fontsize=10.5, color=color)
    return figure


def draw_priors(here):
    """One cell of conv9_2 with its six priors on the scene; the middle cells of all six source maps."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    large, small = figure.subfigures(1, 2, width_ratios=[1.25, 1])
    large, small = large.subplots(), small.subplots(3, 2)
    show_photo(large, here.image, "conv9_2: 5 × 5 cells, the middle one's six priors", ticks=True)
    add_grid(large, 5, color="white", linewidth=0.8)
    large.add_patch(Rectangle((0.4, 0.4), 0.2, 0.2, color="white", alpha=0.45))
    for axis, source, priors_cxcy in zip(small.flat, SSD300_SOURCES, here.all_priors_cxcy.split(N_PRIORS), strict=True):
        middle = source.grid // 2
        by_cell = cxcy_to_xy(priors_cxcy).view(source.grid, source.grid, -1, 4)  # row, column, prior
        boxes = by_cell[middle, middle]  # (n_priors, 4)
        if source.name == "conv9_2":
            for box, color, name in zip(boxes, RATIO_COLORS, RATIO_NAMES, strict=True):
                width, height = (300 * (box[2:] - box[:2])).tolist()
                add_box(large, box, color, width=2.6, halo=4.5)
                large.plot([], [], color=color, linewidth=3, label=f"{name}: {width:.0f} × {height:.0f}")
        side = round(300 * float(boxes[0, 2] - boxes[0, 0]), 1)
        title = f"{source.name}: {source.grid} × {source.grid}\nratio 1 is {side:g} pixels wide"
        axis.set_title(title, fontsize=10)
        axis.add_patch(Rectangle((0, 0), 1, 1, facecolor="white", edgecolor=GRID, linewidth=1.5))
        add_grid(axis, source.grid, color=GRID, linewidth=0.6 if source.grid < 12 else 0.3)
        colors = RATIO_COLORS if len(boxes) == 6 else (*RATIO_COLORS[:3], RATIO_COLORS[4])
        for box, color in zip(boxes, colors, strict=True):
            add_box(axis, box, color, width=1.5, clip=False)
        axis.set(xticks=[], yticks=[], xlim=(-0.16, 1.16), ylim=(1.16, -0.16), aspect="equal", frame_on=False)
    large.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, fontsize=11)
    return figure


def draw_photos(model):
    """A strip of photos of one height with what a network finds in them.

    They may be shown: Chelsea the cat is CC0, the astronaut and the admiral are in the public domain.
    """
    import skimage.data  # here, because nothing else needs this package

    admiral = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    images = (Image.fromarray(skimage.data.cat()), Image.fromarray(skimage.data.astronaut()), Image.open(admiral))
    height = 370  # pixels
    photos = []
    for image in images:
        photo = image.convert("RGB").resize((round(height * image.width / image.height), height))
        found = find_objects(photo, min_score=0.4, model=model)
        photos.append(draw_boxes(photo, *found, class_colors(model.label_map)))
    return put_in_rows([photos])


FIGURES = {
    "hero.jpg": draw_hero,
    "scene.jpg": draw_scene,
    "pipeline.jpg": draw_pipeline,
    "forms.jpg": draw_forms,
    "batch.jpg": draw_batch,
    "offsets.jpg": draw_offsets,
    "matching.jpg": draw_matching,
    "overlaps.png": draw_overlaps,
    "grids.jpg": draw_grids,
    "priors.jpg": draw_priors,
    "mining.jpg": draw_mining,
    "augmentation.jpg": draw_augmentation,
    "nms.jpg": draw_nms,
}
