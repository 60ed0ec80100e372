"""One picture, followed with numbers: the tables that run through the README.

Two stars side by side, a circle and a tiny triangle; eight of the 8732 priors; and what the network of `make demo`
predicts for them. The network was not trained on this picture: it is drawn here, and nowhere else.
`make_figures.py` calls `write_predictions()` and puts the tables into the README; tests/test_readme.py computes the
tables again and compares.

Reads and writes img/scene.json: the predictions, rounded to four decimals, so that every number of the tables
can be computed from a small file.
"""

import json
import math
from functools import cached_property
from pathlib import Path

import make_sample
import numpy as np
import torch
import torch.nn.functional as F

import utils
from datasets import prepare
from model import BACKGROUND, SSD300, MultiBoxLoss, load_model, match_priors, take_pairs
from utils import cxcy_to_gcxgcy, cxcy_to_xy, find_jaccard_overlap, gcxgcy_to_cxcy, xy_to_cxcy

SCENE_FILE = Path(__file__).resolve().parents[1] / "img" / "scene.json"
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
        solid, corner = make_sample.paint_shape(rng, image, outline, hue)
        boxes.append(np.add(solid.getbbox(), corner * 2).tolist())
    return image, torch.tensor(boxes) / SIDE


def load_picture(number):
    """A picture of the sample's test split: PIL image, boxes_xy (n, 4) fractional, list of n class names."""
    image, objects = make_sample.draw_sample(np.random.default_rng((0, 1, number)))
    boxes = [item["box_xy_pixels"] for item in objects]
    boxes_xy = torch.tensor(boxes).reshape(-1, 4) / torch.tensor([*image.size, *image.size])
    return image, boxes_xy, [item["name"] for item in objects]


class Scene:
    """The picture, its objects, eight priors, what these are to predict, and what the network predicts for them.

    checkpoint: of the network; needed for `model` alone. `predictions` are read from img/scene.json.
    """

    def __init__(self, checkpoint=None):
        self.checkpoint = checkpoint
        self.image, self.boxes_xy = draw_scene()
        self.names = [name for name, *_ in SHAPES]
        self.labels = torch.tensor([LABEL_MAP[name] for name in self.names])
        self.all_priors_cxcy = SSD300.create_prior_boxes()
        self.all_overlaps = find_jaccard_overlap(self.boxes_xy, cxcy_to_xy(self.all_priors_cxcy))  # (4, 8732)
        self.priors_cxcy = self.all_priors_cxcy[PRIORS]  # (8, 4)
        self.overlaps = self.all_overlaps[:, PRIORS]  # (4, 8): a row an object, a column a prior
        # What matching says: pairs (object, prior) of step 1, in its order; and each prior's object, or BACKGROUND.
        self.step_1 = take_pairs(self.overlaps)
        self.matched = match_priors(self.boxes_xy, cxcy_to_xy(self.priors_cxcy), 0.5).tolist()

    @cached_property
    def model(self):
        return load_model(self.checkpoint)

    @cached_property
    def predictions(self):
        return json.loads(SCENE_FILE.read_text())


@torch.no_grad()
def predict(model, image):
    """What a model says about one picture, by the defaults of detect.py.

    Returns offsets (P, 4), scores (P, C), and the objects: a list of boxes_xy (n, 4), labels (n,), scores (n,).
    """
    locs, scores = model(prepare([image], model))
    found = model.detect_objects(locs, scores, MIN_SCORE, MAX_OVERLAP, TOP_K)
    return locs[0], scores[0], [values[0] for values in found]


def write_predictions(scene):
    """Write img/scene.json: what the network predicts for the eight priors, and for seven candidates."""
    locs, scores, (found_boxes, found_labels, _) = predict(scene.model, scene.image)
    check_answer(found_boxes, found_labels, scene)
    probabilities = F.softmax(scores, dim=1)  # (8732, C)
    candidates = choose_candidates(probabilities, locs, scene)
    priors = [prior for prior, _ in candidates]
    if PRIORS[0] not in priors:  # decoding_table() decodes its offsets
        raise ValueError("prior A is not one of the candidates: train longer, or with another seed")
    content = {
        "locs": rounded(locs[PRIORS]),
        "scores": rounded(scores[PRIORS]),
        "candidate_priors": priors,
        "candidate_labels": [label for _, label in candidates],
        "candidate_locs": rounded(locs[priors]),
        "candidate_scores": rounded(scores[priors]),
        "n_candidates": int((probabilities[:, 1:] > MIN_SCORE).sum()),
    }
    SCENE_FILE.write_text(json.dumps(content) + "\n")


def rounded(values):
    return [[round(value, 4) for value in row] for row in values.tolist()]


def check_answer(boxes_xy, labels, scene):
    """Raise ValueError unless the network finds the four objects and nothing else: the README says that it does."""
    best_overlaps, items = find_jaccard_overlap(boxes_xy, scene.boxes_xy).max(dim=1)
    is_right = (best_overlaps >= 0.5) & (labels == scene.labels[items])
    if sorted(items.tolist()) != [0, 1, 2, TINY] or not is_right.all():
        names = [CLASS_NAMES[label] for label in labels.tolist()]
        raise ValueError(f"the model finds {names} in the scene's picture: train longer, or with another seed")


def choose_candidates(probabilities, locs, scene):
    """Candidates for the example of suppression, by falling score: pairs (prior, label).

    Of each object the best one, and of the three larger ones also the one that overlaps the best one least of those
    that it suppresses.
    """
    boxes_xy = cxcy_to_xy(gcxgcy_to_cxcy(locs, scene.all_priors_cxcy))
    overlaps = find_jaccard_overlap(scene.boxes_xy, boxes_xy)  # (4, 8732)
    chosen = []
    for item, label in enumerate(scene.labels.tolist()):
        is_candidate = (probabilities[:, label] > MIN_SCORE) & (overlaps[item] >= 0.5)
        mine = is_candidate.nonzero()[:, 0]
        best = mine[probabilities[mine, label].argmax()]
        chosen.append((int(best), label))
        if item != TINY:
            with_best = find_jaccard_overlap(boxes_xy[best][None], boxes_xy[mine])[0]
            doubles = [int(mine[i]) for i in with_best.argsort() if with_best[i] > MAX_OVERLAP and mine[i] != best]
            if not doubles:
                raise ValueError(f"the {OBJECT_NAMES[item]} is found by one prior only: train with another seed")
            chosen.append((doubles[0], label))
    return sorted(chosen, key=lambda pair: -float(probabilities[pair]))


# --- The tables, in Markdown ----------------------------------------------------------------------


def table(header, rows):
    """A Markdown table from strings."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def pixels(values, separator=", "):
    """Fractions as whole pixels of the 300 x 300 image, in one text."""
    return separator.join(f"{value * SIDE:.0f}" for value in values.tolist())


def decimals(values, n):
    """Numbers with n decimals, and with a proper minus sign."""
    return [f"{value:.{n}f}".replace("-", "−") for value in values.tolist()]


def digits(value):
    """A loss with two digits that say something: 3.4, 0.35, 0.000012."""
    if value < 1e-6:
        return "0.000001 or less"
    n = max(2, 1 - math.floor(math.log10(value)))
    return f"{value:.{n}f}"


def objects_table(scene):
    rows = []
    for name, class_name, box in zip(OBJECT_NAMES, scene.names, scene.boxes_xy, strict=True):
        rows.append([name, class_name, pixels(box), pixels(box[2:] - box[:2], " × ")])
    return table(["object", "class", "box in pixels: x_min, y_min, x_max, y_max", "size"], rows)


def overlaps_table(scene):
    rows = [
        ["centre", *(pixels(prior[:2]) for prior in scene.priors_cxcy)],
        ["size", *(pixels(prior[2:], " × ") for prior in scene.priors_cxcy)],
    ]
    for name, overlaps in zip(OBJECT_NAMES, scene.overlaps, strict=True):
        rows.append([f"**{name}**", *decimals(overlaps, 2)])
    return table(["", *(f"**{name}**" for name in PRIOR_NAMES)], rows)


def matches_table(scene):
    rounds = {prior: number for number, (_, prior) in enumerate(scene.step_1, start=1)}
    rows = []
    for i, (name, item) in enumerate(zip(PRIOR_NAMES, scene.matched, strict=True)):
        if item == BACKGROUND:
            best = float(scene.overlaps[:, i].max())
            rows.append([f"**{name}**", f"step 2: its best overlap, {best:.2f}, is below 0.5", "background", "nothing"])
            continue
        overlap = f"{float(scene.overlaps[item, i]):.2f}"
        why = f"step 2: {overlap} is at least 0.5"
        if i in rounds:
            why = f"step 1: highest number of round {rounds[i]} ({overlap})"
        rows.append([f"**{name}**", why, scene.names[item], f"offsets to the {OBJECT_NAMES[item]}"])
    return table(["prior", "why", "must predict the class", "and"], rows)


def compute_offsets(scene):
    """The offsets from prior A to the left star, in words: rows (name, box, prior, computation, offset)."""
    box = xy_to_cxcy(scene.boxes_xy[0])
    prior = scene.priors_cxcy[0]
    b_x, b_y, b_w, b_h = decimals(box, 3)
    p_x, p_y, p_w, p_h = decimals(prior, 3)
    g_x, g_y, g_w, g_h = decimals(cxcy_to_gcxgcy(box, prior), 2)
    return [
        ["c_x", b_x, p_x, f"({b_x} − {p_x}) / ({p_w} · {utils.CENTER_VARIANCE})", g_x],
        ["c_y", b_y, p_y, f"({b_y} − {p_y}) / ({p_h} · {utils.CENTER_VARIANCE})", g_y],
        ["w", b_w, p_w, f"ln({b_w} / {p_w}) / {utils.SIZE_VARIANCE}", g_w],
        ["h", b_h, p_h, f"ln({b_h} / {p_h}) / {utils.SIZE_VARIANCE}", g_h],
    ]


def offsets_table(scene):
    rows = [[*row, f"**{offset}**"] for *row, offset in compute_offsets(scene)]
    return table(["", "left star", "prior A", "computation", "offset"], rows)


def losses(scene):
    """For the eight priors: right labels, cross entropies, which count, localisation losses."""
    locs = torch.tensor(scene.predictions["locs"])
    scores = torch.tensor(scene.predictions["scores"])
    criterion = MultiBoxLoss(scene.priors_cxcy)
    (labels,), positives, offsets = criterion.make_targets([scene.boxes_xy], [scene.labels])
    entropies = F.cross_entropy(scores, labels, reduction="none")
    n_negatives = math.ceil(NEG_POS_RATIO * len(positives))
    hardest = entropies.masked_fill(labels > 0, -1).topk(n_negatives).indices
    counts = labels > 0
    counts[hardest] = True
    loc_losses = torch.zeros(len(labels))
    loc_losses[positives] = F.smooth_l1_loss(locs[positives], offsets, reduction="none").sum(dim=1)
    return labels, entropies, counts, loc_losses


def losses_table(scene):
    labels, entropies, counts, loc_losses = losses(scene)
    rows = []
    for i, (label, entropy) in enumerate(zip(labels.tolist(), entropies.tolist(), strict=True)):
        role = "hard negative: counts" if counts[i] else "easy negative: left out"
        loc = "–"
        if label > 0:
            role = "positive"
            loc = digits(float(loc_losses[i]))
        probability = f"{math.exp(-entropy):.3f}"
        rows.append([f"**{PRIOR_NAMES[i]}**", CLASS_NAMES[label], probability, digits(entropy), role, loc])
    return table(["prior", "right class", "its probability", "cross entropy", "role", "smooth L1 of the offsets"], rows)


def candidates(scene):
    """The seven candidates, best first: boxes (7, 4), class names, scores."""
    labels = scene.predictions["candidate_labels"]
    probabilities = F.softmax(torch.tensor(scene.predictions["candidate_scores"]), dim=1)
    priors_cxcy = scene.all_priors_cxcy[scene.predictions["candidate_priors"]]
    boxes_xy = cxcy_to_xy(gcxgcy_to_cxcy(torch.tensor(scene.predictions["candidate_locs"]), priors_cxcy))
    return boxes_xy, [CLASS_NAMES[label] for label in labels], probabilities[range(len(labels)), labels].tolist()


def candidates_table(scene):
    rows = []
    priors = scene.predictions["candidate_priors"]
    for i, (box, name, score) in enumerate(zip(*candidates(scene), strict=True)):
        rows.append([f"**{i + 1}**", name, f"{score:.5f}", pixels(box), describe_prior(scene, priors[i])])
    return table(["candidate", "class", "score", "box in pixels: x_min, y_min, x_max, y_max", "its prior"], rows)


def decoding_table(scene):
    """How the offsets that prior A predicts become the box of its candidate: `offsets_table()` the other way round."""
    number = scene.predictions["candidate_priors"].index(PRIORS[0])
    offsets = torch.tensor(scene.predictions["candidate_locs"][number])
    prior = scene.priors_cxcy[0]
    g_x, g_y, g_w, g_h = decimals(offsets, 2)
    p_x, p_y, p_w, p_h = decimals(prior, 3)
    b_x, b_y, b_w, b_h = decimals(gcxgcy_to_cxcy(offsets, prior), 3)
    rows = [
        ["c_x", g_x, p_x, f"{g_x} · {p_w} · {utils.CENTER_VARIANCE} + {p_x}", f"**{b_x}**"],
        ["c_y", g_y, p_y, f"{g_y} · {p_h} · {utils.CENTER_VARIANCE} + {p_y}", f"**{b_y}**"],
        ["w", g_w, p_w, f"exp({g_w} · {utils.SIZE_VARIANCE}) · {p_w}", f"**{b_w}**"],
        ["h", g_h, p_h, f"exp({g_h} · {utils.SIZE_VARIANCE}) · {p_h}", f"**{b_h}**"],
    ]
    return table(["", "offset", "prior A", "computation", "box"], rows)


def describe_prior(scene, prior):
    """The letter of one of the eight priors; size and centre, in pixels, of any other of the 8732."""
    if prior in PRIORS:
        return f"**{PRIOR_NAMES[PRIORS.index(prior)]}**"
    prior_cxcy = scene.all_priors_cxcy[prior]
    return f"{pixels(prior_cxcy[2:], ' × ')} at {pixels(prior_cxcy[:2])}"


def suppression_steps(scene):
    """Suppression, one candidate after the other: list of (candidate, nearest kept rival or None, overlap, stays)."""
    boxes_xy, names, _ = candidates(scene)
    overlaps = find_jaccard_overlap(boxes_xy, boxes_xy).tolist()
    kept = []
    steps = []
    for i, name in enumerate(names):
        rivals = [(overlaps[i][j], j) for j in kept if names[j] == name]
        overlap, nearest = max(rivals, default=(0.0, None))
        stays = overlap <= MAX_OVERLAP
        if stays:
            kept.append(i)
        steps.append((i, nearest, overlap, stays))
    return steps


def suppression_table(scene):
    _, names, _ = candidates(scene)
    rows = []
    for i, rival, overlap, stays in suppression_steps(scene):
        if rival is None:
            reason = f"no {names[i]} has been kept so far"
        else:
            verdict = "not above" if stays else "above"
            reason = f"overlap with {rival + 1}: {overlap:.2f}, {verdict} {MAX_OVERLAP}"
        rows.append([f"**{i + 1}**", names[i], reason, "kept" if stays else "dropped"])
    return table(["candidate", "class", "compared with what has been kept", "result"], rows)


TABLES = {  # by the names in the README's marks
    "objects": objects_table,
    "overlaps": overlaps_table,
    "matches": matches_table,
    "offsets": offsets_table,
    "losses": losses_table,
    "candidates": candidates_table,
    "decoding": decoding_table,
    "suppression": suppression_table,
}
