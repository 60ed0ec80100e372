"""One picture, followed with numbers: the tables that run through the README.

Two stars side by side, a circle and a tiny triangle; eight of the 8732 priors; and what the network of `make demo`
predicts for them. The network was not trained on this picture: it is drawn here, and nowhere else.
`make_figures.py` calls `write_scene()` when it has a trained checkpoint, and puts the tables into the README;
tests/test_readme.py computes the tables again and compares.

Reads and writes img/scene.json: the predictions, rounded to four decimals, so that every number of the tables
can be computed from a small file.
"""

import json
import math
import sys
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tools")]

import make_sample  # noqa: E402 (the path to it has to be set first)

import utils  # noqa: E402
from datasets import prepare  # noqa: E402
from model import BACKGROUND, SSD300, detect_objects, match_priors  # noqa: E402
from utils import cxcy_to_xy, find_jaccard_overlap, gcxgcy_to_cxcy, xy_to_cxcy  # noqa: E402

SCENE_FILE = REPO / "img" / "scene.json"
LABEL_MAP = utils.make_label_map(sorted(make_sample.CLASSES))
CLASS_NAMES = list(LABEL_MAP)  # by label
MIN_SCORE = 0.2  # what detect.py shows
MAX_OVERLAP = 0.45
TOP_K = 200

# The picture, in pixels of the 300 x 300 image: class, centre, radius, lean in degrees, hue.
SEED = 0  # of background and patterns
SIDE = 300
SHAPES = (
    ("star", (92, 126), 60, -3, 0.13),
    ("star", (160, 172), 60, 8, 0.60),
    ("circle", (232, 70), 41, 0, 0.99),
    ("triangle", (46, 250), 7, 0, 0.36),
)
OBJECT_NAMES = ("left star", "right star", "circle", "triangle")
TINY = 3  # the triangle

# Eight of the 8732 priors, which show everything that matching does. A is the left star's own, B another one that it
# matches; C the right star's own; D lies between the stars; E is the circle's own, F, half as high, just misses it;
# G is the triangle's own; H is far from all.
PRIOR_NAMES = "ABCDEFGH"
PRIORS = [8200, 8198, 8272, 8207, 6317, 6204, 4734, 7582]

# Two of three negatives: with the paper's 3 for each positive all of them would count.
NEG_POS_RATIO = 0.4


def draw_scene():
    """The picture: a PIL image and its boxes_xy (4, 4), fractional."""
    rng = np.random.default_rng(SEED)
    image = make_sample.draw_background(rng, (SIDE, SIDE))
    boxes = []
    for name, center, radius, lean, hue in SHAPES:
        outline = make_sample.draw_outline(rng, name)
        upright = -90 if name == "star" else 0  # a star is drawn with its first tip to the right
        outline = make_sample.rotate(outline, math.radians(upright + lean)) * radius + np.array(center)
        mask, (left, top) = make_sample.outline_mask(outline)
        make_sample.paint_shape(rng, image, outline, mask, (left, top), hue)
        x_min, y_min, x_max, y_max = mask.point(lambda value: 255 * (value >= 128)).getbbox()
        boxes.append([left + x_min, top + y_min, left + x_max, top + y_max])
    return image, torch.tensor(boxes) / SIDE


def load_picture(number):
    """A picture of the sample's test split: PIL image, boxes_xy (n, 4) fractional, list of n class names."""
    image, objects = make_sample.draw_sample(np.random.default_rng((0, 1, number)))
    boxes = [item["box_xy_pixels"] for item in objects]
    boxes_xy = torch.tensor(boxes).reshape(-1, 4) / torch.tensor([*image.size, *image.size])
    return image, boxes_xy, [item["name"] for item in objects]


class Scene:
    """The picture, its objects, eight priors, and the network's predictions for them."""

    def __init__(self):
        self.image, self.boxes_xy = draw_scene()
        self.names = [name for name, *_ in SHAPES]
        self.labels = torch.tensor([LABEL_MAP[name] for name in self.names])
        self.all_priors_cxcy = SSD300.create_prior_boxes()
        self.all_overlaps = find_jaccard_overlap(self.boxes_xy, cxcy_to_xy(self.all_priors_cxcy))  # (4, 8732)
        self.priors_cxcy = self.all_priors_cxcy[PRIORS]  # (8, 4)
        self.overlaps = self.all_overlaps[:, PRIORS]  # (4, 8): a row an object, a column a prior

    @cached_property
    def predictions(self):
        return json.loads(SCENE_FILE.read_text())

    def owners(self):
        """For each prior the object that it is to predict, and in which step of matching: (object or None, step)."""
        matched = match_priors(self.boxes_xy, cxcy_to_xy(self.priors_cxcy), 0.5).tolist()
        owned = [prior for _, prior in step_1(self.overlaps)]
        return [
            (None if item == BACKGROUND else item, 1 if prior in owned else 2) for prior, item in enumerate(matched)
        ]


def step_1(overlaps):
    """Step 1 of matching, as the text says it: pairs (object, prior), in the order in which they are fixed."""
    table = overlaps.clone()
    pairs = []
    for _ in range(len(table)):
        item, prior = divmod(int(table.argmax()), table.shape[1])
        pairs.append((item, prior))
        table[item, :] = -1
        table[:, prior] = -1
    return pairs


@torch.no_grad()
def predict(model, image):
    """A model's predictions for one picture: offsets (P, 4) and scores (P, C)."""
    locs, scores = model(prepare([image], model))
    return locs[0], scores[0]


def write_scene(model):
    """Write img/scene.json: what the model predicts for the eight priors, and for seven candidates."""
    scene = Scene()
    locs, scores = predict(model, scene.image)
    priors, labels = choose_candidates(locs, scores, scene)
    content = {
        "locs": rounded(locs[PRIORS]),
        "scores": rounded(scores[PRIORS]),
        "candidate_priors": priors,
        "candidate_labels": labels,
        "candidate_locs": rounded(locs[priors]),
        "candidate_scores": rounded(scores[priors]),
        "n_candidates": int((F.softmax(scores, dim=1)[:, 1:] > MIN_SCORE).sum()),
        "best_tiny_score": round(float(F.softmax(scores, dim=1)[:, scene.labels[TINY]].max()), 4),
    }
    SCENE_FILE.write_text(json.dumps(content) + "\n")


def rounded(values):
    return [[round(value, 4) for value in row] for row in values.tolist()]


def choose_candidates(locs, scores, scene):
    """Candidates (a prior and a class each) for the example of suppression, by falling score.

    Of each object that is found the best one, and of the three larger ones also the one that overlaps it least of those
    that it suppresses; if the triangle is missed, of the left star one more.
    """
    probabilities = F.softmax(scores, dim=1)  # (8732, C)
    boxes_xy = cxcy_to_xy(gcxgcy_to_cxcy(locs, scene.all_priors_cxcy))
    found = find_answer(locs, scores, scene)
    chosen = []
    for item in found:
        label = int(scene.labels[item])
        is_on_object = find_jaccard_overlap(boxes_xy, scene.boxes_xy[item][None])[:, 0] >= 0.5
        mine = ((probabilities[:, label] > MIN_SCORE) & is_on_object).nonzero()[:, 0]
        best = mine[probabilities[mine, label].argmax()]
        with_best = find_jaccard_overlap(boxes_xy[mine], boxes_xy[best][None])[:, 0]
        doubles = [int(mine[i]) for i in with_best.argsort() if with_best[i] > MAX_OVERLAP and mine[i] != best]
        chosen.append((int(best), label))
        if item != TINY and not doubles:
            raise ValueError(f"the model has no doubles of the {OBJECT_NAMES[item]}: choose another SEED")
        if item != TINY:
            chosen.append((doubles[0], label))
        if item == 0 and TINY not in found:
            chosen.append((doubles[len(doubles) // 2], label))
    chosen.sort(key=lambda pair: -float(probabilities[pair]))
    return [prior for prior, _ in chosen], [label for _, label in chosen]


def find_answer(locs, scores, scene):
    """The numbers of the objects that the model finds. ValueError if its answer is a wrong one: the example is to end
    right, with each of the three larger objects found once, and nothing that is not there."""
    inputs = locs[None], scores[None], scene.all_priors_cxcy
    (boxes_xy,), (labels,), _ = detect_objects(*inputs, MIN_SCORE, MAX_OVERLAP, TOP_K)
    best_overlaps, items = find_jaccard_overlap(boxes_xy, scene.boxes_xy).max(dim=1)
    is_right = (best_overlaps >= 0.5) & (labels == scene.labels[items])
    items = sorted(items.tolist())
    if not is_right.all() or items not in ([0, 1, 2], [0, 1, 2, TINY]):
        names = [CLASS_NAMES[label] for label in labels.tolist()]
        raise ValueError(f"the model finds {names} in the scene's picture: choose another SEED in tools/scene.py")
    return items


# --- The tables, in Markdown ----------------------------------------------------------------------


def table(header, rows):
    """A Markdown table from strings."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def pixels(values):
    """Numbers as whole pixels of the 300 x 300 image."""
    return [f"{float(value) * SIDE:.0f}" for value in values]


def digits(value):
    """A loss with two digits that say something: 3.4, 0.35, 0.000012."""
    if value < 1e-6:
        return "0.000001 or less"
    n = max(2, 1 - math.floor(math.log10(value)))
    return f"{value:.{n}f}"


def objects_table(scene):
    rows = []
    for i, name in enumerate(OBJECT_NAMES):
        box = scene.boxes_xy[i]
        width, height = pixels(box[2:] - box[:2])
        rows.append([name, scene.names[i], ", ".join(pixels(box)), f"{width} × {height}"])
    return table(["object", "class", "box in pixels: x_min, y_min, x_max, y_max", "size"], rows)


def overlaps_table(scene):
    centers, sizes = [], []
    for prior in scene.priors_cxcy:
        c_x, c_y, w, h = pixels(prior)
        centers.append(f"{c_x}, {c_y}")
        sizes.append(f"{w} × {h}")
    rows = [["centre", *centers], ["size", *sizes]]
    for name, overlaps in zip(OBJECT_NAMES, scene.overlaps, strict=True):
        rows.append([f"**{name}**", *(f"{float(value):.2f}" for value in overlaps)])
    return table(["", *(f"**{name}**" for name in PRIOR_NAMES)], rows)


def matches_table(scene):
    rounds = {prior: number for number, (_, prior) in enumerate(step_1(scene.overlaps), start=1)}
    rows = []
    for i, (name, (item, step)) in enumerate(zip(PRIOR_NAMES, scene.owners(), strict=True)):
        best = float(scene.overlaps[:, i].max())
        if item is None:
            rows.append([f"**{name}**", f"step 2: its best overlap, {best:.2f}, is below 0.5", "background", "nothing"])
            continue
        overlap = f"{float(scene.overlaps[item, i]):.2f}"
        if step == 1:
            why = f"step 1: highest number of round {rounds[i]} ({overlap})"
        else:
            why = f"step 2: {overlap} is at least 0.5"
        rows.append([f"**{name}**", why, scene.names[item], f"offsets to the {OBJECT_NAMES[item]}"])
    return table(["prior", "why", "must predict the class", "and"], rows)


def offsets_table(scene):
    box_cxcy, prior_cxcy = xy_to_cxcy(scene.boxes_xy[:1]), scene.priors_cxcy[:1]
    offsets = utils.cxcy_to_gcxgcy(box_cxcy, prior_cxcy)[0].tolist()
    box, prior = box_cxcy[0].tolist(), prior_cxcy[0].tolist()
    rows = []
    for i, letter in enumerate(("c_x", "c_y", "w", "h")):
        if i < 2:
            formula = f"({box[i]:.3f} − {prior[i]:.3f}) / ({prior[i + 2]:.3f} · {utils.CENTER_VARIANCE})"
        else:
            formula = f"ln({box[i]:.3f} / {prior[i]:.3f}) / {utils.SIZE_VARIANCE}"
        rows.append([letter, f"{box[i]:.3f}", f"{prior[i]:.3f}", formula, f"**{offsets[i]:.2f}**".replace("-", "−")])
    return table(["", "left star", "prior A", "computation", "offset"], rows)


def losses(scene):
    """For the eight priors: right labels, cross entropies, which count, localisation losses."""
    scores, locs = torch.tensor(scene.predictions["scores"]), torch.tensor(scene.predictions["locs"])
    owners = [item for item, _ in scene.owners()]
    labels = torch.tensor([0 if item is None else int(scene.labels[item]) for item in owners])
    is_positive = labels > 0
    entropies = F.cross_entropy(scores, labels, reduction="none")
    n_negatives = math.ceil(NEG_POS_RATIO * int(is_positive.sum()))
    hardest = entropies.masked_fill(is_positive, -1).argsort(descending=True)[:n_negatives]
    counts = is_positive.clone()
    counts[hardest] = True
    targets = xy_to_cxcy(scene.boxes_xy[[item or 0 for item in owners]])
    offsets = utils.cxcy_to_gcxgcy(targets, scene.priors_cxcy)
    loc_losses = F.smooth_l1_loss(locs, offsets, reduction="none").sum(dim=1) * is_positive
    return labels, entropies, counts, loc_losses


def losses_table(scene):
    labels, entropies, counts, loc_losses = losses(scene)
    rows = []
    for i, name in enumerate(PRIOR_NAMES):
        is_positive = bool(labels[i] > 0)
        role = "positive" if is_positive else "hard negative: counts" if counts[i] else "easy negative: left out"
        right = CLASS_NAMES[int(labels[i])]
        loc = digits(float(loc_losses[i])) if is_positive else "–"
        probability, entropy = float((-entropies[i]).exp()), float(entropies[i])
        rows.append([f"**{name}**", right, f"{probability:.3f}", digits(entropy), role, loc])
    header = ["prior", "right class", "its probability", "cross entropy", "role", "smooth L1 of the offsets"]
    n_positive = int((labels > 0).sum())
    conf, loc = float((entropies * counts).sum()), float(loc_losses.sum())
    total = (conf + loc) / n_positive
    text = (
        f"The cross entropies that count add up to {conf:.2f}, the localisation losses to {loc:.2f}. There are "
        f"{n_positive} positives, so the loss is ({conf:.2f} + {loc:.2f}) / {n_positive} = **{total:.2f}**. "
        "`MultiBoxLoss` returns the same number for these priors."
    )
    return f"{table(header, rows)}\n\n{text}"


def candidates(scene):
    """Boxes (7, 4), labels, scores of the seven candidates, best first."""
    labels = torch.tensor(scene.predictions["candidate_labels"])
    probabilities = F.softmax(torch.tensor(scene.predictions["candidate_scores"]), dim=1)
    priors_cxcy = scene.all_priors_cxcy[scene.predictions["candidate_priors"]]
    boxes_xy = cxcy_to_xy(gcxgcy_to_cxcy(torch.tensor(scene.predictions["candidate_locs"]), priors_cxcy))
    return boxes_xy, labels, probabilities.gather(1, labels[:, None])[:, 0]


def candidates_table(scene):
    rows = []
    priors = scene.predictions["candidate_priors"]
    for i, (box, label, score) in enumerate(zip(*candidates(scene), strict=True)):
        name = CLASS_NAMES[int(label)]
        prior = describe_prior(scene, priors[i])
        rows.append([f"**{i + 1}**", name, f"{float(score):.5f}", ", ".join(pixels(box)), prior])
    n = scene.predictions["n_candidates"]
    text = f"With a `min_score` of {MIN_SCORE}, our picture has {n} candidates. Here are seven of them:"
    header = ["candidate", "class", "score", "box in pixels: x_min, y_min, x_max, y_max", "its prior"]
    return f"{text}\n\n{table(header, rows)}"


def decoding_table(scene):
    """How the offsets that prior A predicts become the box of its candidate: `offsets_table()` the other way round."""
    number = scene.predictions["candidate_priors"].index(PRIORS[0])
    offsets = torch.tensor(scene.predictions["candidate_locs"][number])
    prior = scene.priors_cxcy[0].tolist()
    box = gcxgcy_to_cxcy(offsets, scene.priors_cxcy[0]).tolist()
    rows = []
    for i, letter in enumerate(("c_x", "c_y", "w", "h")):
        offset = f"{float(offsets[i]):.2f}".replace("-", "−")
        if i < 2:
            formula = f"{offset} · {prior[i + 2]:.3f} · {utils.CENTER_VARIANCE} + {prior[i]:.3f}"
        else:
            formula = f"exp({offset} · {utils.SIZE_VARIANCE}) · {prior[i]:.3f}"
        rows.append([letter, offset, f"{prior[i]:.3f}", formula, f"**{box[i]:.3f}**"])
    text = (
        f"How does A come to the box of candidate {number + 1}? The network predicts four offsets, which are decoded:"
    )
    return f"{text}\n\n{table(['', 'offset', 'prior A', 'computation', 'box'], rows)}"


def describe_prior(scene, prior):
    """The letter of one of the eight priors; size and centre, in pixels, of any other of the 8732."""
    if prior in PRIORS:
        return f"**{PRIOR_NAMES[PRIORS.index(prior)]}**"
    c_x, c_y, w, h = pixels(scene.all_priors_cxcy[prior])
    return f"{w} × {h} at {c_x}, {c_y}"


def suppression_steps(scene):
    """Suppression, one candidate after the other: list of (candidate, nearest kept rival or None, overlap, stays)."""
    boxes_xy, labels, _ = candidates(scene)
    overlaps = find_jaccard_overlap(boxes_xy, boxes_xy)
    kept, steps = [], []
    for i in range(len(labels)):
        rivals = [j for j in kept if labels[j] == labels[i]]
        nearest = max(rivals, key=lambda j: float(overlaps[i, j]), default=None)
        overlap = 0.0 if nearest is None else float(overlaps[i, nearest])
        stays = overlap <= MAX_OVERLAP
        if stays:
            kept.append(i)
        steps.append((i, nearest, overlap, stays))
    return steps


def suppression_table(scene):
    rows = []
    labels = candidates(scene)[1]
    for i, rival, overlap, stays in suppression_steps(scene):
        name = CLASS_NAMES[int(labels[i])]
        if rival is None:
            reason = f"no {name} has been kept so far"
        else:
            reason = f"overlap with {rival + 1}: {overlap:.2f}"
            reason += f", not above {MAX_OVERLAP}" if stays else f", above {MAX_OVERLAP}"
        rows.append([f"**{i + 1}**", name, reason, "kept" if stays else "dropped"])
    return table(["candidate", "class", "compared with what has been kept", "result"], rows)


def answer(scene):
    """The last word of the example of suppression: what became of the triangle."""
    labels = candidates(scene)[1].tolist()
    scores = candidates(scene)[2].tolist()
    label = int(scene.labels[TINY])
    if label in labels:
        found_by = labels.index(label)
        overlaps = scene.all_overlaps[TINY]
        n_tied = int((overlaps > overlaps.max() - 1e-5).sum())
        prior = describe_prior(scene, scene.predictions["candidate_priors"][found_by])
        fate = (
            f"It is found, with a score of {scores[found_by]:.2f}, but not by G. The prior that finds it is "
            f"another one of the {n_tied} that tie, {prior}. For this picture the loss would ask it to say background. "
            "But in training, other small objects belonged to priors of its shape, and all cells share a "
            "head's weights. That was just enough: with a higher `min_score` the triangle would be missed."
        )
    else:
        score = scene.predictions["best_tiny_score"]
        fate = (
            f"It is missed: the highest score that any prior gives to its class is {score:.2f}. Suppression can only "
            "remove what is too much; it cannot find what the network did not see."
        )
    moral = "Suppression does not judge whether a detection is right: that is what the score is for."
    return f"And the triangle? {fate} {moral}"


TABLES = {
    "objects": objects_table,
    "overlaps": overlaps_table,
    "matches": matches_table,
    "offsets": offsets_table,
    "losses": losses_table,
    "candidates": candidates_table,
    "decoding": decoding_table,
    "suppression": suppression_table,
    "answer": answer,
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
