"""One picture, followed with numbers: the tables that run through the README.

A blue rectangle and a tiny star, seven of the 8732 priors, and what the network of `make demo` predicts for them.
`make_figures.py` calls `write_scene()` when it has a trained checkpoint, and puts the tables into the README;
tests/test_readme.py computes the tables again and compares.

Reads and writes img/scene.json: the predictions, rounded to four decimals, so that every number of the tables
can be computed from a file of a few hundred bytes.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tools")]

from make_sample import CLASSES, draw_sample  # noqa: E402 (the path to it has to be set first)

from datasets import prepare  # noqa: E402
from model import SSD300, MultiBoxLoss  # noqa: E402
from utils import (  # noqa: E402
    CENTER_VARIANCE,
    SIZE_VARIANCE,
    cxcy_to_gcxgcy,
    cxcy_to_xy,
    find_jaccard_overlap,
    gcxgcy_to_cxcy,
    make_label_map,
    rev_label_map,
    xy_to_cxcy,
)

PICTURE = 1272  # number of the picture: far beyond those that the demo trains and tests on
SCENE_FILE = REPO / "img" / "scene.json"
LABEL_MAP = make_label_map(sorted(CLASSES))
CLASS_NAMES = rev_label_map(LABEL_MAP)
PRIOR_NAMES = "ABCDEFG"
CANDIDATE_NAMES = "12345"
NEG_POS_RATIO = 1  # of the example; with the paper's 3 all negatives of seven priors would count
MAX_OVERLAP = 0.45


def load_picture(number):
    """A picture of the sample's test split: PIL image, boxes_xy (n, 4) fractional, list of n class names."""
    image, objects = draw_sample(np.random.default_rng((0, 1, number)))
    boxes = [item["box_xy_pixels"] for item in objects]
    boxes_xy = torch.tensor(boxes).reshape(-1, 4) / torch.tensor([*image.size, *image.size])
    return image, boxes_xy, [item["name"] for item in objects]


class Scene:
    """The picture, its objects, seven priors, and the network's predictions for them."""

    def __init__(self, predictions=None):
        self.image, self.boxes_xy, self.names = load_picture(PICTURE)  # rectangle, star
        self.labels = torch.tensor([LABEL_MAP[name] for name in self.names])
        self.all_priors_cxcy = SSD300.create_prior_boxes()
        self.all_overlaps = find_jaccard_overlap(cxcy_to_xy(self.all_priors_cxcy), self.boxes_xy)  # (8732, 2)
        self.priors = choose_priors(self.all_overlaps, self.all_priors_cxcy)  # (7,), indices
        self.priors_cxcy = self.all_priors_cxcy[self.priors]  # (7, 4)
        self.overlaps = self.all_overlaps[self.priors]  # (7, 2)
        self.predictions = predictions or json.loads(SCENE_FILE.read_text())

    def owners(self):
        """For each prior the object that it is to predict, and why: list of (object or None, step)."""
        own = greedy_own_priors(self.overlaps)
        result = []
        for prior in range(len(self.priors)):
            best = int(self.overlaps[prior].argmax())
            if prior in own:
                result.append((own.index(prior), 1))
            elif self.overlaps[prior, best] >= 0.5:
                result.append((best, 2))
            else:
                result.append((None, 2))
        return result


def choose_priors(overlaps, priors_cxcy):
    """Seven priors that show everything that matching does: indices (7,) of the 8732.

    A the rectangle's own, B another one that it matches, C just below one half, D about a quarter;
    E the star's own, F one that overlaps it less; G far from both.
    """
    rectangle, star = overlaps[:, 0], overlaps[:, 1]
    matching = rectangle.masked_fill(rectangle < 0.5, torch.inf)
    near_miss = rectangle.masked_fill(rectangle > 0.48, 0)
    far = (priors_cxcy[:, :2] - torch.tensor([0.75, 0.75])).square().sum(dim=1)
    far = far.masked_fill((overlaps.sum(dim=1) > 0) | ((priors_cxcy[:, 2] - 0.2).abs() > 0.01), torch.inf)
    chosen = [rectangle.argmax(), matching.argmin(), near_miss.argmax(), (rectangle - 0.25).abs().argmin()]  # A to D
    return torch.stack([*chosen, star.argmax(), (star - 0.1).abs().argmin(), far.argmin()])


def greedy_own_priors(overlaps):
    """Step 1 of matching, as the text says it: the prior (row) of each object (column)."""
    table, own = overlaps.clone(), [0] * overlaps.shape[1]
    for _ in own:
        prior, item = divmod(int(table.argmax()), table.shape[1])
        own[item] = prior
        table[prior], table[:, item] = -1, -1
    return own


@torch.no_grad()
def predict(model, image):
    """A model's predictions for one picture: offsets (P, 4) and scores (P, C)."""
    locs, scores = model(prepare([image], model))
    return locs[0], scores[0]


def write_scene(model):
    """Write img/scene.json: what the model predicts for the seven priors, and for five candidates."""
    scene = Scene(predictions={"none": 0})
    locs, scores = predict(model, scene.image)
    candidates = choose_candidates(locs, scores, scene)

    def rounded(values):
        return [[round(value, 4) for value in row] for row in values.tolist()]

    SCENE_FILE.write_text(
        json.dumps(
            {
                "locs": rounded(locs[scene.priors]),
                "scores": rounded(scores[scene.priors]),
                "candidate_priors": candidates,
                "candidate_locs": rounded(locs[candidates]),
                "candidate_scores": rounded(scores[candidates]),
            }
        )
        + "\n"
    )


def choose_candidates(locs, scores, scene):
    """Five priors whose best class is an object, by falling score: the star's best, and four that say "rectangle".

    Of these: the best two, one from the middle, and the one that overlaps the best one least.
    """
    probabilities = F.softmax(scores, dim=1)  # (8732, C)
    boxes_xy = cxcy_to_xy(gcxgcy_to_cxcy(locs, scene.all_priors_cxcy))
    rectangle, star = (probabilities[:, label] for label in scene.labels.tolist())
    order = rectangle.argsort(descending=True)
    order = order[rectangle[order] > 0.1]
    with_best = find_jaccard_overlap(boxes_xy[order], boxes_xy[order[:1]])[:, 0]
    chosen = [
        int(order[0]),
        int(order[1]),
        int(order[len(order) // 2]),
        int(order[with_best.argmin()]),
        int(star.argmax()),
    ]
    return sorted(chosen, key=lambda prior: -float(probabilities[prior, 1:].max()))


# --- The tables, in Markdown ----------------------------------------------------------------------


def table(header, rows):
    """A Markdown table from strings."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def pixels(values):
    """Numbers as whole pixels of the 300 x 300 image."""
    return [f"{float(value) * 300:.0f}" for value in values]


def overlaps_table(scene):
    rows = []
    for name, prior, overlaps in zip(PRIOR_NAMES, scene.priors_cxcy, scene.overlaps, strict=True):
        c_x, c_y, w, h = pixels(prior)
        rows.append([f"**{name}**", f"({c_x}, {c_y})", f"{w} × {h}", *(f"{float(value):.2f}" for value in overlaps)])
    header = ["prior", "centre, pixels", "size, pixels", *(f"overlap with the {name}" for name in scene.names)]
    return table(header, rows)


def matches_table(scene):
    rows = []
    for name, overlaps, (item, step) in zip(PRIOR_NAMES, scene.overlaps, scene.owners(), strict=True):
        best = float(overlaps.max())
        if item is None:
            rows.append([f"**{name}**", f"step 2: its best overlap, {best:.2f}, is below 0.5", "background", "nothing"])
            continue
        overlap, target = float(overlaps[item]), scene.names[item]
        first = f"step 1: the {target} has no better prior ({overlap:.2f})"
        second = f"step 2: {overlap:.2f} is at least 0.5"
        rows.append([f"**{name}**", first if step == 1 else second, target, f"offsets to the {target}"])
    return table(["prior", "why", "must predict the class", "and"], rows)


def offsets_table(scene):
    box, prior = xy_to_cxcy(scene.boxes_xy[:1]), scene.priors_cxcy[:1]
    offsets = cxcy_to_gcxgcy(box, prior)[0].tolist()
    box, prior = box[0].tolist(), prior[0].tolist()
    rows = []
    for i, letter in enumerate(("c_x", "c_y", "w", "h")):
        if i < 2:
            formula = f"({box[i]:.3f} − {prior[i]:.3f}) / ({prior[i + 2]:.3f} · {CENTER_VARIANCE})"
        else:
            formula = f"ln({box[i]:.3f} / {prior[i]:.3f}) / {SIZE_VARIANCE}"
        rows.append([letter, f"{box[i]:.3f}", f"{prior[i]:.3f}", formula, f"**{offsets[i]:.2f}**".replace("-", "−")])
    return table(["", "rectangle", "prior A", "computation", "offset"], rows)


def losses(scene):
    """For the seven priors: right labels, probabilities of them, cross entropies, which count, localisation losses."""
    scores, locs = torch.tensor(scene.predictions["scores"]), torch.tensor(scene.predictions["locs"])
    owners = [item for item, _ in scene.owners()]
    labels = torch.tensor([0 if item is None else int(scene.labels[item]) for item in owners])
    is_positive = labels > 0
    entropies = F.cross_entropy(scores, labels, reduction="none")
    n_negatives = NEG_POS_RATIO * int(is_positive.sum())
    hardest = entropies.masked_fill(is_positive, -1).argsort(descending=True)[:n_negatives]
    counts = is_positive.clone()
    counts[hardest] = True
    targets = xy_to_cxcy(scene.boxes_xy[[item or 0 for item in owners]])
    offsets = cxcy_to_gcxgcy(targets, scene.priors_cxcy)
    loc_losses = F.smooth_l1_loss(locs, offsets, reduction="none").sum(dim=1) * is_positive
    return labels, entropies, counts, loc_losses


def losses_table(scene):
    labels, entropies, counts, loc_losses = losses(scene)
    rows = []
    for i, name in enumerate(PRIOR_NAMES):
        is_positive = bool(labels[i] > 0)
        role = "positive" if is_positive else "hard negative: counts" if counts[i] else "easy negative: left out"
        right = CLASS_NAMES[int(labels[i])]
        loc = f"{float(loc_losses[i]):.2f}" if is_positive else "–"
        probability, entropy = float((-entropies[i]).exp()), float(entropies[i])
        rows.append([f"**{name}**", right, f"{probability:.3f}", f"{entropy:.4f}", role, loc])
    header = ["prior", "right class", "its probability", "cross entropy", "role", "smooth L1 of the offsets"]
    n_positive = int((labels > 0).sum())
    conf, loc = float((entropies * counts).sum()), float(loc_losses.sum())
    criterion = MultiBoxLoss(scene.priors_cxcy, neg_pos_ratio=NEG_POS_RATIO)
    predictions = (torch.tensor(scene.predictions[key])[None] for key in ("locs", "scores"))
    total = float(criterion(*predictions, [scene.boxes_xy], [scene.labels]))
    if abs(total - (conf + loc) / n_positive) > 1e-3:
        raise ValueError(f"MultiBoxLoss gives {total}, the table {(conf + loc) / n_positive}")
    text = (
        f"The confidence losses that count add up to {conf:.2f}, the localisation losses to {loc:.2f}. There are "
        f"{n_positive} positives, so the loss is ({conf:.2f} + {loc:.2f}) / {n_positive} = **{total:.2f}**. "
        "`MultiBoxLoss` returns the same number for these priors."
    )
    return f"{table(header, rows)}\n\n{text}"


def candidates(scene):
    """Boxes (5, 4), labels, scores of the five candidates, best first."""
    scores = F.softmax(torch.tensor(scene.predictions["candidate_scores"]), dim=1)
    priors = scene.all_priors_cxcy[scene.predictions["candidate_priors"]]
    boxes_xy = cxcy_to_xy(gcxgcy_to_cxcy(torch.tensor(scene.predictions["candidate_locs"]), priors))
    best, labels = scores[:, 1:].max(dim=1)
    return boxes_xy, labels + 1, best


def candidates_table(scene):
    rows = []
    for name, box, label, score in zip(CANDIDATE_NAMES, *candidates(scene), strict=True):
        rows.append([f"**{name}**", CLASS_NAMES[int(label)], f"{float(score):.2f}", ", ".join(pixels(box))])
    return table(["candidate", "class", "score", "box in pixels: x_min, y_min, x_max, y_max"], rows)


def suppression_steps(scene):
    """Suppression, one candidate after the other: list of (candidate, its suppressor or None, overlap with it)."""
    boxes_xy, labels, _ = candidates(scene)
    overlaps = find_jaccard_overlap(boxes_xy, boxes_xy)
    kept, steps = [], []
    for i in range(len(labels)):
        rivals = [j for j in kept if labels[j] == labels[i]]
        nearest = max(rivals, key=lambda j: float(overlaps[i, j]), default=None)
        if nearest is not None and overlaps[i, nearest] > MAX_OVERLAP:
            steps.append((i, nearest, float(overlaps[i, nearest]), False))
        else:
            kept.append(i)
            steps.append((i, nearest, float(overlaps[i, nearest]) if nearest is not None else 0.0, True))
    return steps


def suppression_table(scene):
    rows = []
    labels = candidates(scene)[1]
    for i, rival, overlap, stays in suppression_steps(scene):
        name = CLASS_NAMES[int(labels[i])]
        if rival is None:
            reason = f"no better {name} has been kept"
        else:
            reason = f"overlap with {CANDIDATE_NAMES[rival]}: {overlap:.2f}"
            reason += f", not above {MAX_OVERLAP}" if stays else f", above {MAX_OVERLAP}"
        rows.append([f"**{CANDIDATE_NAMES[i]}**", name, reason, "kept" if stays else "dropped"])
    check_suppression(scene)
    return table(["candidate", "class", "compared with what has been kept", "result"], rows)


def check_suppression(scene):
    """Raise ValueError if torchvision's suppression keeps other candidates than the table says."""
    boxes_xy, labels, scores = candidates(scene)
    kept = sorted(batched_nms(boxes_xy, scores, labels, MAX_OVERLAP).tolist())
    ours = [i for i, _, _, stays in suppression_steps(scene) if stays]
    if kept != ours:
        raise ValueError(f"torchvision keeps the candidates {kept}, the table {ours}")


TABLES = {
    "overlaps": overlaps_table,
    "matches": matches_table,
    "offsets": offsets_table,
    "losses": losses_table,
    "candidates": candidates_table,
    "suppression": suppression_table,
}


def fill_in_tables(text):
    """Put each table between its marks, `<!-- scene:NAME -->` and `<!-- end -->`, in a Markdown text."""
    scene = Scene()
    for name, make in TABLES.items():
        before, mark, rest = text.partition(f"<!-- scene:{name} -->\n")
        if mark:
            _, end, after = rest.partition("<!-- end -->")
            text = f"{before}{mark}{make(scene)}\n{end}{after}"
    return text
