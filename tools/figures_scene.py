"""The figures of the picture that runs through the README, and of other generated pictures. See make_figures.py."""

import numpy as np
import torch
import torch.nn.functional as F
from figures_common import (
    AMBER,
    BLUE,
    CLASS_COLORS,
    FAINT,
    GREEN,
    INK,
    PLATE,
    RED,
    add_arrow,
    add_box,
    panels,
    plain_axes,
    show_photo,
)
from matplotlib.patches import Rectangle
from PIL import Image
from scene import (
    CLASS_NAMES,
    MAX_OVERLAP,
    MIN_SCORE,
    OBJECT_NAMES,
    PRIOR_NAMES,
    TOP_K,
    Scene,
    candidates,
    load_picture,
    predict,
    step_1,
    suppression_steps,
)
from torchvision.transforms.functional import to_pil_image

from datasets import transform
from detect import draw_boxes, find_objects
from model import SSD300_SOURCES, detect_objects, match_priors
from utils import class_colors, cxcy_to_gcxgcy, cxcy_to_xy, find_jaccard_overlap, gcxgcy_to_cxcy, xy_to_cxcy

LABEL_PLACES = ("top", "bottom right", "bottom right", "right")  # of the scene's four objects


def draw_hero(model):
    """What the network finds in six pictures of about the same shape that it was not trained on."""
    pictures = []
    for number in (4, 15, 33, 44, 54, 69):  # of the sample's test split
        image, _, _ = load_picture(number)
        found = find_objects(image, min_score=0.4, model=model)
        pictures.append(draw_boxes(image, *found, CLASS_COLORS).resize((390, 312)))
    return put_in_rows([pictures[:3], pictures[3:]])


def put_in_rows(rows, gap=10):
    """One picture of rows of pictures, with white gaps; all of a row are of the same height."""
    strips = []
    for pictures in rows:
        padded = [np.pad(picture, ((0, gap), (0, gap), (0, 0)), constant_values=255) for picture in pictures]
        strips.append(np.hstack(padded))
    return Image.fromarray(np.vstack(strips)[:-gap, :-gap])


def draw_scene(_model):
    """The picture that runs through the page, without and with its boxes."""
    scene = Scene()
    figure, (left, right) = panels(2, 5)
    show_photo(left, scene.image, "what the network gets: 300 × 300 pixels", ticks=True)
    show_photo(right, scene.image, "what it should say", ticks=True)
    for box, name, text, place in zip(scene.boxes_xy, scene.names, OBJECT_NAMES, LABEL_PLACES, strict=True):
        add_box(right, box, CLASS_COLORS[name], text, 2.4, at=place, size=11)
    return figure


def draw_forms(_model):
    """One box in the three forms."""
    scene = Scene()
    box, prior = scene.boxes_xy[0], scene.priors_cxcy[0]
    figure, axes = panels(3, 4.3)
    x_min, y_min, x_max, y_max = box.tolist()
    c_x, c_y, w, h = xy_to_cxcy(box).tolist()
    for axis, title in zip(axes, ("boundary", "center-size", "offsets from a prior"), strict=True):
        show_photo(axis, scene.image, title)
        add_box(axis, box, RED, width=2.5)
        axis.set(xlim=(0, 0.78), ylim=(0.84, 0.06))
    for x, y in ((x_min, y_min), (x_max, y_max)):
        axes[0].plot(x, y, "o", color=RED, markersize=8)
        place = y - 0.03 if y == y_min else y + 0.08
        side = "left" if y == y_min else "center"
        axes[0].text(x, place, f"({x:.3f}, {y:.3f})", ha=side, color=RED, bbox=PLATE)
    axes[0].set_xlabel(f"(x_min, y_min, x_max, y_max)\n({x_min:.3f}, {y_min:.3f}, {x_max:.3f}, {y_max:.3f})")
    axes[1].plot(c_x, c_y, "o", color=RED, markersize=8)
    add_arrow(axes[1], (x_min, y_max + 0.04), (x_max, y_max + 0.04), "white", "<|-|>")
    axes[1].text(c_x, y_max + 0.12, f"w = {w:.3f}", ha="center", bbox=PLATE)
    add_arrow(axes[1], (x_max + 0.04, y_min), (x_max + 0.04, y_max), "white", "<|-|>")
    axes[1].text(x_max + 0.07, y_min + 0.05, f"h = {h:.3f}", ha="left", va="center", bbox=PLATE)
    axes[1].set_xlabel(f"(c_x, c_y, w, h)\n({c_x:.3f}, {c_y:.3f}, {w:.3f}, {h:.3f})")
    add_box(axes[2], cxcy_to_xy(prior), BLUE, "prior A", dashed=True, at="bottom right", size=11)
    offsets = cxcy_to_gcxgcy(xy_to_cxcy(box[None]), prior[None])[0].tolist()
    numbers = ", ".join(f"{value:.2f}" for value in offsets).replace("-", "−")
    axes[2].set_xlabel(f"(g_c_x, g_c_y, g_w, g_h)\n({numbers})")
    return figure


def draw_offsets(_model):
    """How the left star's prior has to move and to change its size, with arrows."""
    scene = Scene()
    box_cxcy, prior_cxcy = xy_to_cxcy(scene.boxes_xy[0]), scene.priors_cxcy[0]
    offsets = cxcy_to_gcxgcy(box_cxcy[None], prior_cxcy[None])[0].tolist()
    b_x, b_y, b_w, b_h = box_cxcy.tolist()
    p_x, p_y, p_w, p_h = prior_cxcy.tolist()
    figure, (left, right) = panels(2, 4.6, [1, 1.05])
    show_photo(left, scene.image)
    left.set(xlim=(0.08, 0.62), ylim=(0.7, 0.16))
    add_box(left, scene.boxes_xy[0], RED, "left star", at="top", size=11)
    add_box(left, cxcy_to_xy(prior_cxcy), BLUE, "prior A", dashed=True, at="bottom right", size=11)
    ends = [((p_x + side * p_w / 2, p_y), (b_x + side * b_w / 2, p_y)) for side in (-1, 1)]
    ends += [((p_x, p_y + side * p_h / 2), (p_x, b_y + side * b_h / 2)) for side in (-1, 1)]
    for start, end in [*ends, ((p_x, p_y), (b_x, b_y))]:
        add_arrow(left, start, end, INK, "-|>", 1.6, halo=True)
    right.set_axis_off()
    lines = [
        ("the centre moves", ""),
        ("", f"g_c_x = ({b_x:.3f} − {p_x:.3f}) / ({p_w:.3f} · 0.1) = {offsets[0]:.2f}"),
        ("", f"g_c_y = ({b_y:.3f} − {p_y:.3f}) / ({p_h:.3f} · 0.1) = {offsets[1]:.2f}"),
        ("the width changes", ""),
        ("", f"g_w = ln({b_w:.3f} / {p_w:.3f}) / 0.2 = {offsets[2]:.2f}"),
        ("the height changes", ""),
        ("", f"g_h = ln({b_h:.3f} / {p_h:.3f}) / 0.2 = {offsets[3]:.2f}"),
    ]
    for i, (heading, text) in enumerate(lines):
        right.text(0, 0.92 - 0.13 * i, heading, weight="bold", transform=right.transAxes)
        right.text(0.05, 0.92 - 0.13 * i, text.replace("= -", "= −"), transform=right.transAxes)
    return figure


def draw_matching(_model):
    """The eight priors of the scene, and what each is to predict."""
    scene = Scene()
    figure, axes = panels(2, 5.1)
    titles = ("eight of the 8732 priors", "after matching: what each must predict")
    places = ("top right", "left", "bottom right", "top", "bottom right", "left", "top", "top")
    for axis, title in zip(axes, titles, strict=True):
        show_photo(axis, scene.image, title)
    for name, prior, (item, _), place in zip(PRIOR_NAMES, scene.priors_cxcy, scene.owners(), places, strict=True):
        box = cxcy_to_xy(prior)
        add_box(axes[0], box, INK, name, 1.6, at=place, size=11, halo=3.5)
        place = "bottom" if name == "D" else place
        if item is None:
            text = f"{name}: background"
            add_box(axes[1], box, FAINT, text, 1.4, dashed=True, at=place, size=11, halo=2.4)
        else:
            class_name = scene.names[item]
            add_box(axes[1], box, CLASS_COLORS[class_name], f"{name}: {class_name}", 2.6, at=place, size=11)
    return figure


def draw_grids(_model):
    """Which feature maps find which objects: the cells of all positive priors, on the three maps that have any."""
    scene = Scene()
    matched = match_priors(scene.boxes_xy, cxcy_to_xy(scene.all_priors_cxcy), threshold=0.5)  # (8732,)
    figure, axes = panels(3, 4.1)
    first = 0  # number of a map's first prior
    for axis, source in zip(axes, SSD300_SOURCES[:3], strict=True):
        n_priors = source.grid**2 * source.n_priors
        owners = matched[first : first + n_priors]
        show_photo(axis, scene.image, f"{source.name}: {source.grid} × {source.grid} cells")
        side = 1 / source.grid
        for i in range(1, source.grid):
            axis.axvline(i * side, color="white", linewidth=0.5, alpha=0.7)
            axis.axhline(i * side, color="white", linewidth=0.5, alpha=0.7)
        counts = []
        for item, name in enumerate(scene.names):
            color = CLASS_COLORS[name]
            add_box(axis, scene.boxes_xy[item], color, width=1.6)
            priors = first + (owners == item).nonzero()[:, 0]
            for c_x, c_y in scene.all_priors_cxcy[priors, :2].unique(dim=0).tolist():
                axis.add_patch(Rectangle((c_x - side / 2, c_y - side / 2), side, side, color=color, alpha=0.7))
            if len(priors):
                counts.append(f"{OBJECT_NAMES[item]} {len(priors)}")
        axis.set_xlabel("positive priors:\n" + ", ".join(counts), fontsize=11)
        first += n_priors
    return figure


def draw_learning(models):
    """What one network finds in the scene's picture at several times of its training. models: iteration -> model."""
    scene = Scene()
    figure, axes = panels(len(models) // 2, 7.4, rows=2)
    for axis, (iteration, model) in zip(axes, models.items(), strict=True):
        objects = find_objects(scene.image, min_score=MIN_SCORE, model=model)
        show_photo(axis, draw_boxes(scene.image, *objects, CLASS_COLORS))
        axis.set_xlabel(f"after {iteration} iterations", fontsize=12)
    return figure


def draw_overlaps(_model):
    """The table of overlaps as a heat map: as it is, the four rounds of step 1, and step 2."""
    scene = Scene()
    overlaps = scene.overlaps.numpy()  # (4, 8): a row an object, a column a prior
    n_objects, n_priors = overlaps.shape
    pairs = step_1(scene.overlaps)
    owned = [prior for _, prior in pairs]
    free = [prior for prior in range(n_priors) if prior not in owned]
    takers = [prior for prior in free if overlaps[:, prior].max() >= 0.5]
    titles = ["the table"]
    for k, (item, prior) in enumerate(pairs, start=1):
        titles.append(f"step 1, round {k}: the {OBJECT_NAMES[item]} gets {PRIOR_NAMES[prior]}")
    others = ", ".join(PRIOR_NAMES[prior] for prior in free if prior not in takers)
    titles.append(f"step 2: {', '.join(PRIOR_NAMES[prior] for prior in takers)} has 0.5 or more; {others} have not")
    figure, axes = panels(2, 6.6, rows=3)
    for k, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        axis.imshow(overlaps, cmap="Greens", vmin=0, vmax=1.2, aspect="auto")
        axis.set_xticks(range(n_priors), list(PRIOR_NAMES), fontsize=12, weight="bold")
        axis.set_yticks(range(n_objects), OBJECT_NAMES if k % 2 == 0 else [""] * n_objects, fontsize=11)
        axis.tick_params(length=0, top=True, bottom=False, labeltop=True, labelbottom=False)
        axis.set_xlabel(title, fontsize=12)
        for i in range(n_objects):
            for j in range(n_priors):
                axis.text(j, i, f"{overlaps[i, j]:.2f}", ha="center", va="center", fontsize=11)
        is_step_2 = k == n_objects + 1
        for item, prior in pairs[:k]:
            if not is_step_2:  # there, the whole table counts again
                axis.plot([-0.5, n_priors - 0.5], [item, item], color=RED, linewidth=1.2)
                axis.plot([prior, prior], [-0.5, n_objects - 0.5], color=RED, linewidth=1.2)
            mark_cell(axis, prior, item, RED if pairs.index((item, prior)) == k - 1 else INK)
        if is_step_2:
            for prior in takers:
                mark_cell(axis, prior, overlaps[:, prior].argmax(), BLUE)
    return figure


def mark_cell(axis, column, row, color):
    axis.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, edgecolor=color, linewidth=2.6))


def draw_batch(_model):
    """Three pictures with different numbers of objects: images are stacked, boxes are listed."""
    scene = Scene()
    others = [load_picture(number) for number in BATCH_PICTURES]
    items = [(scene.image, scene.boxes_xy, scene.names), *others]
    figure, axes = panels(3, 5.0)
    for i, (axis, (image, boxes_xy, names)) in enumerate(zip(axes, items, strict=True)):
        show_photo(axis, image.resize((300, 300)), f"images[{i}]: (3, 300, 300)")
        for box, name in zip(boxes_xy, names, strict=True):
            add_box(axis, box, CLASS_COLORS[name], width=2.4)
        rows = [", ".join(f"{float(value):.2f}" for value in box) for box in boxes_xy]
        lines = [f"boxes[{i}]: {tuple(boxes_xy.shape)}", *rows] if rows else [f"boxes[{i}]: (0, 4)", "no objects"]
        lines += [""] * (5 - len(lines))
        axis.set_xlabel("\n".join(lines), fontsize=10.5, family="monospace")
    figure.suptitle("images: one tensor of shape (3, 3, 300, 300)          boxes: a list of three tensors", fontsize=12)
    return figure


BATCH_PICTURES = (46, 47)  # of the sample's test split: one object, none


@torch.no_grad()
def draw_pipeline(model):
    """One picture all the way: photo, input, feature maps, priors with scores, threshold, suppression."""
    photo, _, _ = load_picture(PIPELINE_PICTURE)
    square = photo.resize((300, 300))
    maps = []
    hook = model.pred_convs.register_forward_pre_hook(lambda _module, inputs: maps.extend(inputs[0]))
    locs, scores = predict(model, photo)
    hook.remove()
    probabilities = F.softmax(scores, dim=1)  # (P, C)
    best, labels = probabilities[:, 1:].max(dim=1)
    colors = [CLASS_COLORS[CLASS_NAMES[int(label) + 1]] for label in labels]
    is_candidate = best > MIN_SCORE
    inputs = locs[None], scores[None], model.priors_cxcy
    (found_boxes,), (found_labels,), (found_scores,) = detect_objects(*inputs, MIN_SCORE, MAX_OVERLAP, TOP_K)

    figure, axes = panels(3, 6.6, rows=2)
    captions = (
        ("1. a picture", f"{photo.width} × {photo.height} pixels"),
        ("2. the input", "300 × 300 pixels, normalised"),
        ("3. six feature maps", "38 × 38, 19 × 19, ... 1 × 1 cells"),
        ("4. priors with scores", "8732 priors: a few of them, and the best ones"),
        (f"5. scores above {MIN_SCORE}, decoded", f"{int(is_candidate.sum())} boxes"),
        ("6. after suppression", f"{len(found_boxes)} objects"),
    )
    for axis, image, (title, text) in zip(axes, (photo, square, square, square, square, photo), captions, strict=True):
        show_photo(axis, image, title)
        axis.set_xlabel(text, fontsize=11)
    show_maps(axes[2], maps)
    rng = np.random.default_rng(0)
    for prior in rng.choice(len(best), 40, replace=False):
        add_box(axes[3], cxcy_to_xy(model.priors_cxcy[prior]), "white", width=0.6)
    for prior in best.argsort(descending=True)[:25].tolist():
        add_box(axes[3], cxcy_to_xy(model.priors_cxcy[prior]), colors[prior], width=1.4)
    boxes_xy = cxcy_to_xy(gcxgcy_to_cxcy(locs, model.priors_cxcy))
    for prior in is_candidate.nonzero()[:, 0].tolist():
        add_box(axes[4], boxes_xy[prior], colors[prior], width=1.4)
    for box, label, score in zip(found_boxes, found_labels.tolist(), found_scores.tolist(), strict=True):
        name = CLASS_NAMES[label]
        add_box(axes[5], box, CLASS_COLORS[name], f"{name} {score:.2f}", 2.4)
    return figure


def show_maps(axis, maps):
    """Six feature maps in two rows: the root mean square of the channels of every cell."""
    axis.clear()
    for k, features in enumerate(maps):
        row, column = divmod(k, 3)
        picture = features[0].float().square().mean(dim=0).sqrt().numpy()  # (G, G)
        place = (column + 0.04, column + 0.96, row + 0.96, row + 0.04)
        axis.imshow(picture, extent=place, cmap="viridis", interpolation="nearest")
    axis.set(xlim=(0, 3), ylim=(2.5, -0.5), xticks=[], yticks=[], title="3. six feature maps")
    axis.title.set_fontsize(12)
    axis.set_xlabel("38 × 38, 19 × 19, ... 1 × 1 cells", fontsize=11)
    axis.set_frame_on(False)


PIPELINE_PICTURE = 67  # of the sample's test split


def draw_mining(model):
    """The scene's four own priors and its hardest negatives; the losses of the negatives, sorted."""
    scene = Scene()
    _, scores = predict(model, scene.image)
    matched = match_priors(scene.boxes_xy, cxcy_to_xy(model.priors_cxcy), 0.5)  # (P,), -1: background
    is_positive = matched >= 0
    labels = torch.where(is_positive, scene.labels[matched], 0)
    losses = F.cross_entropy(scores, labels, reduction="none")  # (P,)
    n_positive = int(is_positive.sum())
    n_negative = len(labels) - n_positive
    n_hard = 3 * n_positive
    order = losses.masked_fill(is_positive, -1).argsort(descending=True)
    figure, (left, right) = panels(2, 4.7, [1, 1.05])
    show_photo(left, scene.image, "each object's best prior (blue),\nthe five hardest negatives (red) and their losses")
    for item in range(len(scene.names)):
        add_box(left, cxcy_to_xy(model.priors_cxcy[scene.all_overlaps[item].argmax()]), BLUE, width=2)
    for k, prior in enumerate(order[:5].tolist()):
        box = cxcy_to_xy(model.priors_cxcy[prior])
        add_box(left, box, RED, width=1.6)
        x = float(box[[0, 2]][k % 2].clamp(0.06, 0.94))  # at a corner, another one each time, inside the picture
        y = float(box[[1, 3]][k // 2 % 2].clamp(0.04, 0.96))
        plate = {"facecolor": RED, "edgecolor": "none", "pad": 1.5}
        left.text(x, y, f"{float(losses[prior]):.1f}", color="white", fontsize=10, ha="center", va="center", bbox=plate)
    n_shown = min(2 * n_hard, n_negative)
    bars = losses[order[:n_shown]].numpy()
    others = f"left out: {n_negative - n_hard} others,\neach about {bars[n_hard]:.1g} or less"
    right.bar(range(n_hard), bars[:n_hard], 1.0, color=RED, label=f"the hardest {n_hard} count")
    right.bar(range(n_hard, n_shown), bars[n_hard:], 1.0, color=FAINT, label=others)
    right.set_yscale("log")
    right.set_ylim(bars[-1] / 2, bars[0] * 2)
    right.axvline(n_hard - 0.5, ymax=0.5, color=RED, linestyle="--")
    right.text(n_hard + 3, bars[n_hard] * 4, f"mining stops\nafter {n_hard}", color=RED, fontsize=10)
    right.set_xlabel(f"negatives, hardest first: the first {n_shown} of {n_negative}")
    right.set_ylabel("cross entropy (logarithmic)")
    right.set_title(f"{n_positive} positives, so 3 · {n_positive} = {n_hard} negatives", fontsize=12)
    plain_axes(right)
    right.legend(frameon=False, loc="upper right")
    return figure


def draw_nms(_model):
    """Suppression of the scene's candidates, one after the other, and the answer."""
    scene = Scene()
    boxes_xy, labels, scores = candidates(scene)
    kept = []
    figure, axes = panels(4, 6.2, rows=2)
    for axis, (i, rival, overlap, stays) in zip(axes, suppression_steps(scene), strict=False):
        show_photo(axis, scene.image)
        for j in kept:
            add_box(axis, boxes_xy[j], "white", width=1.5)
        add_box(axis, boxes_xy[i], GREEN if stays else RED, width=2.8, halo=4.5)
        if stays:
            kept.append(i)
        name = CLASS_NAMES[int(labels[i])]
        axis.set_title(f"{i + 1}: {name} {float(scores[i]):.5f}", fontsize=12)
        reason = f"no {name} so far" if rival is None else f"overlap with {rival + 1}: {overlap:.2f}"
        result = "→ kept" if stays else "→ dropped"
        axis.set_xlabel(f"{reason}\n{result}", fontsize=11, color=GREEN if stays else RED)
    show_photo(axes[-1], scene.image, "the answer")
    for j in kept:
        name = CLASS_NAMES[int(labels[j])]
        item = int(find_jaccard_overlap(boxes_xy[j : j + 1], scene.boxes_xy).argmax())
        place = ("top", "bottom right", "bottom right", "bottom")[item]
        add_box(axes[-1], boxes_xy[j], CLASS_COLORS[name], f"{name} {float(scores[j]):.2f}", 2.4, at=place)
    axes[-1].set_xlabel(f"{len(kept)} objects", fontsize=11)
    return figure


def draw_augmentation(_model):
    """The scene as `transform()` changes it, one step at a time and all together."""
    scene = Scene()
    n_objects = len(scene.boxes_xy)
    difficulties = torch.zeros(n_objects, dtype=torch.uint8)
    every_step = ("distort", "zoom_out", "crop", "flip")
    cases = [  # the seeds were chosen by eye: the results should differ, and show what the text says
        ("as it is", (), 0), ("1. zoomed out", ("zoom_out",), 1), ("2. cropped", ("crop",), 60),
        ("4. colours", ("distort",), 6), ("4. colours, drawn again", ("distort",), 11), ("5. flipped", ("flip",), 3),
        ("all steps", every_step, 38), ("all steps, drawn again", every_step, 131),
    ]  # fmt: skip
    figure, axes = panels(4, 6.5, rows=2)
    for axis, (title, steps, seed) in zip(axes, cases, strict=True):
        rng = np.random.default_rng(seed)
        pixels, boxes_xy, labels, _ = transform(
            scene.image, scene.boxes_xy * 300, scene.labels, difficulties, "TRAIN", rng, augment=steps
        )
        show_photo(axis, to_pil_image(pixels), title)
        for box, label in zip(boxes_xy, labels.tolist(), strict=True):
            add_box(axis, box, CLASS_COLORS[CLASS_NAMES[label]], width=2.2, halo=4)
        all_stay = len(boxes_xy) == n_objects
        text = f"{n_objects} objects" if all_stay else f"{len(boxes_xy)} of {n_objects} objects stay"
        n_cut = int(((boxes_xy <= 0) | (boxes_xy >= 1)).any(dim=1).sum())
        if n_cut:
            text += f"\n{n_cut} of them cut at the edge"
        axis.set_xlabel(text, fontsize=10.5, color=FAINT if all_stay else AMBER)
    return figure


def draw_photos(model, images, min_score):
    """A strip of photos of one height with what a network finds in them. images: list of PIL images."""
    height = 370
    photos = []
    for image in images:
        photo = image.resize((round(height * image.width / image.height), height))
        found = find_objects(photo, min_score=min_score, model=model)
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
    "mining.jpg": draw_mining,
    "augmentation.jpg": draw_augmentation,
    "nms.jpg": draw_nms,
}
