"""Draw the README's figures, with the code that they explain.

    python tools/make_figures.py                                                 or: make figures
    python tools/make_figures.py --checkpoint=demo/checkpoint_ssd300.pth.tar     with a trained model

Boxes, priors, matches, losses and detections in the figures are computed by model.py and utils.py, and the
photos are pictures of the sample data set (tools/make_sample.py). Writes `output_folder`, and brings the line
numbers of the README's links to functions up to date.
Any parameter below can be overridden on the command line with --name=value.
"""

import contextlib
import csv
import itertools
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tools")]

from make_sample import CLASSES, draw_sample  # noqa: E402

from datasets import transform  # noqa: E402
from detect import to_pixels  # noqa: E402 (the path to them has to be set first)
from eval import calculate_mAP  # noqa: E402
from model import (  # noqa: E402
    NETWORKS,
    SSD300,
    decimate,
    l2_normalize,
    load_model,
    match_priors,
    mine_priors,
    stack_objects,
)
from utils import (  # noqa: E402
    cxcy_to_gcxgcy,
    cxcy_to_xy,
    find_intersection,
    find_jaccard_overlap,
    gcxgcy_to_cxcy,
    make_label_map,
    override_parameters,
    rev_label_map,
    xy_to_cxcy,
)

SOURCE_MAPS = NETWORKS["ssd300_vgg16"].sources

# Parameters; paths are relative to the repository
output_folder = "img"
checkpoint = ""  # a model of the sample's classes; "": stand-in predictions, made from the annotations
log_file = "img/train_log.csv"  # of train.py, for the training curve; where it is missing, that is not drawn
readme = "README.md"  # its links to code get their line numbers; "": none

MAX_BYTES = 150_000  # of a figure
WIDTH = 1200  # pixels of a figure
DETAIL = 2  # figures are drawn this many times larger and reduced, for smooth edges

PAPER, INK, FAINT, GRID = "#fcfcfa", "#1f2328", "#6e7781", "#d0d7de"
BLUE, RED, GREEN, AMBER, PURPLE = "#0969da", "#cf222e", "#1a7f37", "#bc4c00", "#8250df"
OBJECT_COLORS = (RED, BLUE, GREEN, PURPLE, AMBER)

LABEL_MAP = make_label_map(sorted(CLASSES))
CLASS_NAMES = rev_label_map(LABEL_MAP)
CLASS_COLORS = dict(zip(sorted(CLASSES), (BLUE, GREEN, RED, PURPLE), strict=True))


def main():
    folder = REPO / output_folder
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model(REPO / checkpoint) if checkpoint else SSD300(len(LABEL_MAP))
    if model.label_map not in (None, LABEL_MAP):
        raise SystemExit(f"error: {checkpoint} knows {', '.join(model.label_map)}; it must be a model of the sample")
    for name, draw in FIGURES.items():
        figure = draw(model)
        if figure is not None:
            print(f"{folder / name}: {save(figure, folder / name)} bytes")
    if readme:
        path = REPO / readme
        path.write_text(update_links(path.read_text(encoding="utf-8")), encoding="utf-8")


def save(figure, path):
    """Write a figure: photos as JPEG, drawings as PNG with a palette. Returns its size in bytes."""
    image = figure.finish()
    if path.suffix == ".jpg":
        image.save(path, quality=78, subsampling=0)
    else:
        image.quantize(96, dither=Image.Dither.NONE).save(path, optimize=True)
    n_bytes = path.stat().st_size
    if n_bytes > MAX_BYTES:
        raise ValueError(f"{path} has {n_bytes} bytes, more than {MAX_BYTES}")
    return n_bytes


# ----------------------------------------------------------------------------------------------
# A sheet to draw on
# ----------------------------------------------------------------------------------------------


class Sheet:
    """An opaque light sheet, legible on light and dark pages. Coordinates are pixels of the finished figure."""

    def __init__(self, height, width=WIDTH):
        self.image = Image.new("RGB", (width * DETAIL, height * DETAIL), PAPER)
        self.draw = ImageDraw.Draw(self.image, "RGBA")

    def finish(self):
        return self.image.reduce(DETAIL)

    def scaled(self, values):
        return [round(float(value) * DETAIL) for value in values]

    def text(self, x, y, text, color=INK, size=26, anchor="la", bold=False, halo=False):
        """Write a text, of several lines if it has line breaks; `halo`: with a light rim, on photos."""
        font = ImageFont.load_default(size * DETAIL)
        for number, line in enumerate(text.split("\n")):
            place = self.scaled((x, y + number * size * 1.3))
            if halo:
                self.draw.text(place, line, PAPER, font, anchor, stroke_width=3 * DETAIL, stroke_fill=PAPER)
            for shift in (0, 1)[: 1 + bold]:  # Pillow's font has one weight: drawn twice, it is bolder
                self.draw.text((place[0] + shift, place[1]), line, color, font, anchor)

    def line(self, points, color=INK, width=3.0, dash=0.0):
        """Draw a polyline, or with `dash` pixels of line and of gap in turn."""
        if not dash:
            flat = self.scaled(value for point in points for value in point)
            self.draw.line(flat, color, round(width * DETAIL), joint="curve")
            return
        for (x_1, y_1), (x_2, y_2) in itertools.pairwise(points):
            length = math.hypot(x_2 - x_1, y_2 - y_1)
            for start in np.arange(0, length, 2 * dash):
                ends = [min(start + offset, length) / length for offset in (0, dash)]
                segment = [(x_1 + t * (x_2 - x_1), y_1 + t * (y_2 - y_1)) for t in ends]
                self.line(segment, color, width)

    def box(self, box_xy, color=INK, width=3.0, fill=None, dash=0.0):
        """Draw a rectangle, its line centred on the box's edge."""
        x_min, y_min, x_max, y_max = (float(value) for value in box_xy)
        if fill:
            self.draw.rectangle(self.scaled((x_min, y_min, x_max, y_max)), fill)
        if dash:
            corners = [(x_min, y_min), (x_max, y_min), (x_max, y_max), (x_min, y_max), (x_min, y_min)]
            self.line(corners, color, width, dash)
        elif width:
            outer = (x_min - width / 2, y_min - width / 2, x_max + width / 2, y_max + width / 2)
            self.draw.rectangle(self.scaled(outer), outline=color, width=max(1, round(width * DETAIL)))

    def dot(self, x, y, radius=6.0, color=INK):
        self.draw.ellipse(self.scaled((x - radius, y - radius, x + radius, y + radius)), color)

    def arrow(self, start, end, color=INK, width=3.0, both=False):
        """Draw an arrow; `both`: with a head at either end."""
        self.line([start, end], color, width)
        angle = math.atan2(end[1] - start[1], end[0] - start[0])
        for tip, turn in [(end, angle), (start, angle + math.pi)][: 1 + both]:
            length, spread = 4.5 * width, 0.45
            points = [tip]
            for side in (-spread, spread):
                points.append((tip[0] - length * math.cos(turn + side), tip[1] - length * math.sin(turn + side)))
            self.draw.polygon([tuple(self.scaled(point)) for point in points], color)

    def label(self, box_xy, text, color, size=22, right=WIDTH):
        """Write a text on a plate above a box, or inside it at the top of the sheet; not beyond x = right."""
        font = ImageFont.load_default(size * DETAIL)
        width, height = font.getlength(text) / DETAIL + 8, size * 1.2
        x, y = min(float(box_xy[0]) - 1.5, right - width), float(box_xy[1])
        y = y - height if y > height + 20 else y
        self.box((x, y, x + width, y + height), width=0, fill=color)
        self.text(x + 4, y + height / 2, text, "#ffffff", size, "lm")

    @contextlib.contextmanager
    def only_within(self, place, margin=12):
        """Let what is drawn meanwhile appear within a box alone, or up to `margin` beyond."""
        before = self.image.copy()
        yield
        x_min, y_min, x_max, y_max = self.scaled(place)
        window = [x_min - margin * DETAIL, y_min - margin * DETAIL, x_max + margin * DETAIL, y_max + margin * DETAIL]
        before.paste(self.image.crop(window), window[:2])
        self.image.paste(before)

    def photo(self, image, place):
        """Lay an image into the box `place`."""
        x_min, y_min, x_max, y_max = self.scaled(place)
        self.image.paste(image.resize((x_max - x_min, y_max - y_min), Image.Resampling.BICUBIC), (x_min, y_min))


def fit(boxes_xy, place):
    """Fractional boxes (..., 4) or points (..., 2) where the box `place` of a sheet shows the whole image."""
    x_min, y_min, x_max, y_max = place
    values = torch.as_tensor(boxes_xy, dtype=torch.float32)
    scale, shift = torch.tensor([x_max - x_min, y_max - y_min]), torch.tensor([x_min, y_min])
    repeats = values.shape[-1] // 2
    return values * scale.repeat(repeats) + shift.repeat(repeats)


def clear(color, alpha):
    """A colour, "#rrggbb", that lets the ground shine through; alpha in [0, 1]."""
    return f"{color}{round(255 * alpha):02x}"


def as_text(values, digits=2):
    """Numbers in brackets: "(0.10, 0.25)"; whole ones without digits if `digits` is 0."""
    return "(" + ", ".join(f"{float(value):.{digits}f}" for value in values) + ")"


# ----------------------------------------------------------------------------------------------
# Pictures, matches and predictions to draw
# ----------------------------------------------------------------------------------------------


def load_picture(number):
    """A picture of the sample's test split, and its objects.

    Returns the PIL image, boxes_xy (n, 4) fractional, labels (n,) int64, class names.
    """
    image, objects = draw_sample(np.random.default_rng((0, 1, number)))
    boxes_xy = torch.tensor([item["box_xy_pixels"] for item in objects]) / torch.tensor([*image.size, *image.size])
    names = [item["name"] for item in objects]
    return image, boxes_xy, torch.tensor([LABEL_MAP[name] for name in names]), names


def match(boxes_xy, model):
    """`match_priors()` for one image: the object of each prior (P,), 0 where there is none, and is_positive (P,)."""
    objects = stack_objects([boxes_xy], [torch.ones(len(boxes_xy), dtype=torch.int64)], boxes_xy.device)
    matched = match_priors(objects, cxcy_to_xy(model.priors_cxcy), 0.5)[0]  # (P,)
    is_positive = matched < len(boxes_xy)
    return matched.where(is_positive, 0), is_positive


@torch.no_grad()
def predict(image, boxes_xy, labels, model):
    """Predictions for a picture: the model's if it is trained, else stand-ins made from the annotations.

    A stand-in gives each prior the offsets of the object that it overlaps most, and a score for that object's
    class that rises with the overlap, both blurred by (seeded) noise.
    Returns predicted_locs (1, P, 4) and predicted_scores (1, P, C).
    """
    if model.label_map:
        nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.uint8)
        return model(model.normalize(transform(image, *nothing, split="TEST")[0][None]))
    rng = np.random.default_rng(0)
    n_priors = len(model.priors_cxcy)
    overlap, objects = find_jaccard_overlap(boxes_xy, cxcy_to_xy(model.priors_cxcy)).max(dim=0)  # (P,) both
    offsets = cxcy_to_gcxgcy(xy_to_cxcy(boxes_xy[objects]), model.priors_cxcy)
    noise = torch.from_numpy(rng.normal(size=(n_priors, 4 + len(LABEL_MAP)))).float()
    scores = 1.2 * noise[:, 4:]
    scores[:, 0] += 8
    scores[torch.arange(n_priors), labels[objects]] += 15 * overlap
    return (offsets + 0.4 * noise[:, :4])[None], scores[None]


def find_best_priors(boxes_xy, model):
    """For each object its own prior, by `match_priors()`: of those that match it, the one that overlaps most."""
    objects, is_positive = match(boxes_xy, model)
    overlap = find_jaccard_overlap(boxes_xy, cxcy_to_xy(model.priors_cxcy))  # (n, P)
    owned = is_positive & (objects == torch.arange(len(boxes_xy))[:, None])  # (n, P)
    return overlap.masked_fill(~owned, -1).argmax(dim=1), overlap


# ----------------------------------------------------------------------------------------------
# The figures
# ----------------------------------------------------------------------------------------------


def draw_hero(model):
    """A picture, the priors that match its objects, and what comes out."""
    sheet = Sheet(390)
    image, boxes_xy, labels, names = load_picture(103)
    height = 368 * image.height / image.width
    places = [(20 + 396 * i, 20, 388 + 396 * i, 20 + height) for i in range(3)]
    for place in places:
        sheet.photo(image, place)
    objects, is_positive = match(boxes_xy, model)
    with sheet.only_within(places[1]):
        for row in is_positive.nonzero().squeeze(1).tolist():
            color = CLASS_COLORS[names[int(objects[row])]]
            sheet.box(fit(cxcy_to_xy(model.priors_cxcy[row]), places[1]), color, 1.5)
    titles = ["an image in", f"{int(is_positive.sum())} of {len(is_positive)} priors match", "boxes and classes out"]
    texts = names
    if model.label_map:
        (boxes_xy,), (found,), (scores,) = model.detect_objects(
            *predict(image, boxes_xy, labels, model), min_score=0.4, max_overlap=0.45, top_k=200
        )
        names = [CLASS_NAMES[label] for label in found.tolist()]
        texts = [f"{name} {score:.2f}" for name, score in zip(names, scores.tolist(), strict=True)]
    for box, name, text in zip(fit(boxes_xy.clamp(0, 1), places[2]), names, texts, strict=True):
        sheet.box(box, CLASS_COLORS[name], 3.5)
        sheet.label(box, text, CLASS_COLORS[name], right=places[2][2])
    for place, title in zip(places, titles, strict=True):
        sheet.text((place[0] + place[2]) / 2, 20 + height + 16, title, anchor="ma", size=28)
    return sheet


def draw_forms(_model):
    """One box in three forms."""
    sheet = Sheet(516)
    image, boxes_xy, _, names = load_picture(156)
    box_xy = boxes_xy[names.index("triangle")]
    height = 372 * image.height / image.width
    places = [(20 + 396 * i, 64, 388 + 396 * i, 64 + height) for i in range(3)]
    pixels = to_pixels(box_xy, image.size)
    titles = ["boundary, pixels", "center-size, pixels", "boundary, fractional"]
    numbers = [as_text(pixels, 0), as_text(xy_to_cxcy(pixels), 1), as_text(box_xy, 3)]
    fields = ["(x_min, y_min, x_max, y_max)", "(c_x, c_y, w, h)", "(x_min, y_min, x_max, y_max)"]
    for place, title, field, number in zip(places, titles, fields, numbers, strict=True):
        sheet.photo(image, place)
        box = fit(box_xy, place).tolist()
        sheet.box(box, RED, 4)
        middle = (place[0] + place[2]) / 2
        sheet.text(middle, 20, title, anchor="ma", size=28, bold=True)
        sheet.text(middle, place[3] + 14, field, anchor="ma", size=23, color=FAINT)
        sheet.text(middle, place[3] + 48, number, anchor="ma", size=25)
        c_x, c_y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        if title.startswith("center"):
            sheet.dot(c_x, c_y, 8, RED)
            sheet.arrow((box[0], box[3] + 18), (box[2], box[3] + 18), INK, 3, both=True)
            sheet.text(c_x, box[3] + 26, "w", anchor="ma", halo=True)
            sheet.arrow((box[0] - 18, box[1]), (box[0] - 18, box[3]), INK, 3, both=True)
            sheet.text(box[0] - 28, c_y, "h", anchor="rm", halo=True)
        else:
            for x, y in ((box[0], box[1]), (box[2], box[3])):
                sheet.dot(x, y, 8, RED)
        corner = "(1, 1)" if title.endswith("fractional") else as_text(image.size, 0)
        sheet.text(place[0] + 8, place[1] + 6, "(0, 0)", size=22, halo=True)
        sheet.text(place[2] - 8, place[3] - 6, corner, size=22, anchor="rd", halo=True)
    return sheet


def draw_overlap(_model):
    """Intersection, union and overlap of some pairs of boxes."""
    sheet = Sheet(372)
    first = torch.tensor([0.0, 0.0, 6.0, 6.0])
    others = torch.tensor([[7.0, 3, 11, 9], [3, 3, 9, 9], [2, 0, 8, 6], [0, 0, 6, 5]])
    for i, second in enumerate(others):
        x, y = 40 + 292 * i, 20
        boxes = [[x + 20 * b[0], y + 20 * b[1], x + 20 * b[2], y + 20 * b[3]] for b in (first, second)]
        mins, maxs = torch.maximum(first, second)[:2], torch.minimum(first, second)[2:]
        if (maxs > mins).all():
            shared = [x + 20 * mins[0], y + 20 * mins[1], x + 20 * maxs[0], y + 20 * maxs[1]]
            sheet.box(shared, width=0, fill=clear(AMBER, 0.45))
        sheet.box(boxes[0], BLUE, 4)
        sheet.box(boxes[1], RED, 4)
        intersection = float(find_intersection(first[None], second[None]))
        areas = [float((b[2] - b[0]) * (b[3] - b[1])) for b in (first, second)]
        overlap = float(find_jaccard_overlap(first[None], second[None]))
        sheet.text(x, 224, f"shared {intersection:g}\nunion {sum(areas) - intersection:g}", size=26)
        sheet.text(x, 304, f"overlap {overlap:.2f}", size=30, bold=True)
    return sheet


def trace_shapes():
    """Sides of the maps that the network makes of an image: name to (channels, grid), nothing computed."""
    shapes = {}
    with torch.device("meta"):
        model = SSD300(len(LABEL_MAP))
    for name, module in [*model.base.named_children(), *model.aux_convs.named_children()]:
        module.register_forward_hook(
            lambda _module, _input, output, name=name: shapes.__setitem__(name, tuple(output.shape[1:3]))
        )
    model(torch.empty(1, 3, 300, 300, device="meta"))
    return shapes


def draw_network(_model):
    """The three parts of the network, its maps and how many priors each predicts for."""
    sheet = Sheet(580)
    shapes = trace_shapes()
    stations = [
        ("image", 3, 300), ("conv1_2", *shapes["conv1_2"]), ("conv2_2", *shapes["conv2_2"]),
        ("conv3_3", *shapes["conv3_3"]), *((m.name, *shapes[m.name]) for m in SOURCE_MAPS),
    ]  # fmt: skip
    sources = {m.name: m for m in SOURCE_MAPS}
    parts = [("base: VGG-16, changed", 1, 6, BLUE), ("auxiliary convolutions", 6, 10, GREEN)]  # stations
    middles = [60, 192, 316, 424, 524, 640, 786, 900, 1018, 1136]
    for title, first, last, color in parts:
        x_min, x_max = middles[first] - 56, middles[last - 1] + 58
        sheet.box((x_min, 62, x_max, 290), color, 3, fill=clear(color, 0.06))
        sheet.text((x_min + x_max) / 2, 22, title, color, 26, "ma", bold=True)
    for i, (name, channels, grid) in enumerate(stations):
        half = 4 + 38 * (grid / 300) ** 0.5
        color = INK if i == 0 else BLUE if i < 6 else GREEN
        sheet.box((middles[i] - half, 150 - half, middles[i] + half, 150 + half), color, 3, fill=clear(color, 0.25))
        sheet.text(middles[i], 80, name, INK, 22, "ma")
        sheet.text(middles[i], 206, f"{grid}x{grid}", INK, 24, "ma", bold=True)
        sheet.text(middles[i], 240, str(channels), FAINT, 22, "ma")
        if i:
            before = 4 + 38 * (stations[i - 1][2] / 300) ** 0.5
            sheet.arrow((middles[i - 1] + before + 5, 150), (middles[i] - half - 5, 150), FAINT, 2.5)
        if name in sources:
            source = sources[name]
            sheet.arrow((middles[i], 294), (middles[i], 342), PURPLE, 3)
            sheet.text(middles[i], 352, f"{source.n_priors} priors", PURPLE, 22, "ma")
            sheet.text(middles[i], 380, "a cell", PURPLE, 22, "ma")
            sheet.text(middles[i], 424, str(source.grid**2 * source.n_priors), INK, 28, "ma", bold=True)
    sheet.box((466, 344, 1194, 468), PURPLE, 3, fill=clear(PURPLE, 0.06))
    sheet.text(446, 362, "prediction convolutions", PURPLE, 26, "ra", bold=True)
    sheet.text(446, 424, "priors in all", INK, 26, "ra")
    total = sum(m.grid**2 * m.n_priors for m in SOURCE_MAPS)
    sheet.text(1194, 494, f"together {total} priors: for each 4 offsets and a score for every class", INK, 28, "ra")
    sheet.text(1194, 534, "numbers under a map: its grid, and its channels", FAINT, 22, "ra")
    return sheet


def draw_fc_to_conv(_model):
    """What becomes of fc6: kept entries of its kernel, and where they look after pool5 kept the resolution."""
    sheet = Sheet(520)
    kernel = torch.arange(49).view(7, 7)
    kept = set(decimate(kernel, steps=(3, 3)).flatten().tolist())
    cell = 40
    x_0, y_0 = 30, 84
    sheet.text(x_0, 22, "fc6 as a 7x7 kernel", bold=True, size=28)
    for i in range(49):
        box = (x_0 + cell * (i % 7), y_0 + cell * (i // 7))
        color = BLUE if i in kept else GRID
        fill = clear(color, 0.75) if i in kept else None
        sheet.box((*box, box[0] + cell, box[1] + cell), FAINT, 1.5, fill=fill)
    sheet.text(x_0, 386, "every third row and column\nis kept: 9 of 49 entries", size=26)
    sheet.arrow((336, 224), (398, 224), FAINT, 4)

    x_1, cell_1 = 420, 60
    sheet.text(x_1, 22, "conv6's 3x3 kernel", bold=True, size=28)
    for i in range(9):
        box = (x_1 + cell_1 * (i % 3), y_0 + 50 + cell_1 * (i // 3))
        sheet.box((*box, box[0] + cell_1, box[1] + cell_1), FAINT, 1.5, fill=clear(BLUE, 0.75))
    sheet.text(x_1, 386, "and every 4th of the\n4096 outputs: 1024", size=26)
    sheet.arrow((642, 224), (706, 224), FAINT, 4)

    n = SOURCE_MAPS[1].grid
    x_2, cell_2 = 760, 290 / n
    sheet.text(x_2 - 20, 22, f"where it looks on the {n}x{n} map", bold=True, size=28)
    middle = n // 2
    for i in range(n * n):
        row, column = divmod(i, n)
        box = (x_2 + cell_2 * column, y_0 + cell_2 * row)
        looks = abs(row - middle) in (0, 6) and abs(column - middle) in (0, 6)
        in_fc6 = abs(row - middle) <= 6 and abs(column - middle) <= 6 and not (row - middle) % 2 + (column - middle) % 2
        fill = clear(BLUE, 0.75) if looks else clear(AMBER, 0.3) if in_fc6 else None
        sheet.box((*box, box[0] + cell_2, box[1] + cell_2), GRID, 1, fill=fill)
    sheet.text(x_2 - 20, 386, "blue: dilation 6. With amber, what the\n49 entries saw when pool5 still halved\n"
               "the map (2 cells here were 1 step)", size=24)  # fmt: skip
    return sheet


def cell_priors(priors_cxcy, source, row, column):
    """The priors at one cell of a source map: (n_priors, 4), center-size form."""
    first = 0
    for other in SOURCE_MAPS:
        if other is source:
            break
        first += other.grid**2 * other.n_priors
    first += (row * source.grid + column) * source.n_priors
    return priors_cxcy[first : first + source.n_priors]


def draw_priors(model):
    """All priors of one cell, for each of the six source maps."""
    sheet = Sheet(330)
    for i, source in enumerate(SOURCE_MAPS):
        place = (36 + 196 * i, 88, 184 + 196 * i, 236)
        sheet.box(place, FAINT, 2, fill="#ffffff")
        lines = fit([[k / source.grid] * 2 for k in range(1, source.grid)] or [[0, 0]], place).tolist()
        for x, y in lines if source.grid > 1 else []:
            sheet.line([(x, place[1]), (x, place[3])], GRID, 0.8)
            sheet.line([(place[0], y), (place[2], y)], GRID, 0.8)
        middle = source.grid // 2
        for k, prior_cxcy in enumerate(cell_priors(model.priors_cxcy, source, middle, middle)):
            color = RED if k == 1 else BLUE
            sheet.box(fit(cxcy_to_xy(prior_cxcy), place), color, 2.5 if source.grid < 30 else 1.8)
        sheet.text(place[0] + 74, 18, source.name, bold=True, anchor="ma", size=28)
        sheet.text(place[0] + 74, 266, f"{source.grid}x{source.grid} cells", anchor="ma", size=24)
        sheet.text(place[0] + 74, 296, f"scale {source.scale:g}", anchor="ma", size=24, color=FAINT)
    return sheet


def draw_priors_on_photo(model):
    """The six priors at the centre of the conv9_2 map, over a picture, with their sizes in pixels."""
    sheet = Sheet(470)
    image, *_ = load_picture(103)
    place = (20, 20, 450, 450)
    sheet.photo(image, place)
    source = SOURCE_MAPS[3]
    for k in range(source.grid + 1):
        (x, y) = fit([k / source.grid] * 2, place).tolist()
        sheet.line([(x, place[1]), (x, place[3])], clear("#ffffff", 0.85), 2)
        sheet.line([(place[0], y), (place[2], y)], clear("#ffffff", 0.85), 2)
    sheet.text(500, 24, f"{source.name}: {source.grid}x{source.grid} cells, scale {source.scale:g}", bold=True, size=28)
    sheet.text(500, 66, "ratio        width and height of 300", FAINT, 24)
    labels = ["1", "extra", "2", "3", "1/2", "1/3"]
    colors = [BLUE, RED, GREEN, PURPLE, AMBER, INK]
    priors = cell_priors(model.priors_cxcy, source, source.grid // 2, source.grid // 2)
    for k, (prior_cxcy, label, color) in enumerate(zip(priors, labels, colors, strict=True)):
        sheet.box(fit(cxcy_to_xy(prior_cxcy), place), color, 3.5)
        y = 106 + 46 * k
        sheet.box((500, y + 4, 530, y + 28), color, 4)
        width, height = (300 * prior_cxcy[2:]).tolist()
        sheet.text(546, y, label, size=26)
        sheet.text(646, y, f"{width:.0f} x {height:.0f}", size=26)
    (x, y) = fit([0.5, 0.5], place).tolist()
    sheet.dot(x, y, 7, INK)
    sheet.text(500, 392, "Every cell of the grid has the same six,\naround a centre of its own.", FAINT, 26)
    return sheet


def draw_offsets(model):
    """An object, a prior that matches it, and the offsets from one to the other."""
    sheet = Sheet(446)
    image, boxes_xy, _, names = load_picture(103)
    box_xy = boxes_xy[names.index("star")]
    objects, is_positive = match(boxes_xy, model)
    candidates = (is_positive & (objects == names.index("star"))).nonzero().squeeze(1)
    priors_xy = cxcy_to_xy(model.priors_cxcy[candidates])
    overlap = find_jaccard_overlap(box_xy[None], priors_xy)[0]
    overlap[((priors_xy < 0) | (priors_xy > 1)).any(dim=1)] = 1  # a prior that can be drawn on the photo
    prior_cxcy = model.priors_cxcy[candidates[overlap.argmin()]]  # the poorest match: most to see
    window = image.crop((0, 0, 278, 278))  # the corner in which the star lies
    place = (20, 20, 20 + 278 * 1.46, 20 + 278 * 1.46)
    sheet.photo(window, place)
    full = (20, 20, 20 + image.width * 1.46, 20 + image.height * 1.46)
    prior, box = fit(cxcy_to_xy(prior_cxcy), full), fit(box_xy, full)
    sheet.box(prior, BLUE, 4, dash=10)
    sheet.box(box, RED, 4)
    centers = [((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (prior.tolist(), box.tolist())]
    sheet.dot(*centers[0], 8, BLUE)
    sheet.dot(*centers[1], 8, RED)
    box_cxcy = xy_to_cxcy(box_xy)
    offsets = cxcy_to_gcxgcy(box_cxcy[None], prior_cxcy[None])[0]
    rows = [
        ("prior", prior_cxcy, BLUE, 3), ("object", box_cxcy, RED, 3), ("offsets", offsets, INK, 2),
        ("decoded", gcxgcy_to_cxcy(offsets[None], prior_cxcy[None])[0], PURPLE, 3),
    ]  # fmt: skip
    sheet.text(470, 24, "as (c_x, c_y, w, h), fractional", FAINT, 24)
    for i, (name, values, color, digits) in enumerate(rows):
        y = 70 + 48 * i
        sheet.text(470, y, name, color, 28, bold=True)
        sheet.text(610, y, as_text(values, digits), size=28)
    sheet.text(470, 282, "g_c = (c - c_prior) / (size_prior x 0.1)\ng_size = ln(size / size_prior) / 0.2", size=28)
    sheet.text(470, 372, f"overlap of the two: {float(overlap.min()):.2f}", FAINT, 26)
    return sheet


def draw_prediction(_model):
    """From the channels at one cell to rows of predictions, and from maps to the stack of all priors."""
    sheet = Sheet(500)
    source = SOURCE_MAPS[3]
    n, n_classes = source.grid, len(LABEL_MAP)
    sheet.text(20, 20, f"{source.name}, one of {n}x{n} cells", bold=True, size=26)
    for i in range(n * n):
        x, y = 40 + 46 * (i % n), 80 + 46 * (i // n)
        sheet.box((x, y, x + 46, y + 46), FAINT, 2, fill=clear(GREEN, 0.7 if i == n * n // 2 else 0.1))
    text = f"A cell has {source.n_priors} priors.\nThere are {n_classes} classes,\nbackground included."
    sheet.text(20, 330, text, size=24)
    tables = [("offsets", 4, 84, BLUE), ("scores", n_classes, 288, PURPLE)]
    for name, width, y, color in tables:
        sheet.arrow((290, 195), (352, y + 50), FAINT, 3)
        n_channels = source.n_priors * width
        sheet.text(364, y - 44, f"{name}: {n_channels} channels = {source.n_priors} x {width}", color, 26, bold=True)
        for k in range(n_channels):
            row, column = divmod(k, width)
            x = 366 + 11.5 * k
            shade = clear(color, 0.2 + 0.13 * row)
            sheet.box((x, y, x + 11.5, y + 24), FAINT, 1, fill=shade)
            box = (470 + 34 * column, y + 36 + 20 * row)
            sheet.box((*box, box[0] + 34, box[1] + 20), FAINT, 1, fill=shade)
        sheet.text(366, y + 72, "reshape", FAINT, 24)
        sheet.arrow((650, y + 96), (806, 246), FAINT, 3)
    counts = [m.grid**2 * m.n_priors for m in SOURCE_MAPS]
    sheet.text(820, 20, f"all {sum(counts)} rows", bold=True, size=26)
    sheet.text(820, 54, "(not to scale)", FAINT, 22)
    y, colors = 96, (BLUE, GREEN, AMBER, PURPLE, RED, INK)
    for source, count, color in zip(SOURCE_MAPS, counts, colors, strict=True):
        height = 18 + 210 * count / sum(counts)
        sheet.box((824, y, 904, y + height), color, 0, fill=clear(color, 0.65))
        sheet.text(918, y + height / 2, f"{source.name}: {count}", size=25, anchor="lm")
        y += height + 14
    return sheet


def draw_l2_norm(_model):
    """Two cells of conv4_3, one bright and one faint, before and after the normalisation."""
    sheet = Sheet(330)
    cells = torch.tensor([[90.0, 240.0, 30.0, 150.0], [6.0, 2.0, 9.0, 3.0]])  # (2 cells, 4 channels)
    normalized = l2_normalize(cells.view(2, 4, 1, 1)).view(2, 4)
    columns = [
        ("activations", cells, 300),
        ("divided by their length", normalized, 1.05),
        ("times 20", 20 * normalized, 21),
    ]
    for i, (title, values, top) in enumerate(columns):
        x = 32 + 394 * i
        sheet.text(x, 20, title, bold=True, size=28)
        for row, color in enumerate((BLUE, AMBER)):
            for k, value in enumerate(values[row].tolist()):
                left = x + 42 * k + 190 * row
                bar_top = 240 - 150 * value / top
                sheet.box((left, bar_top, left + 34, 240), color, 0, fill=clear(color, 0.75))
                number = f"{value:.0f}" if top > 2 else f"{value:.2f}".removeprefix("0")
                sheet.text(left + 17, bar_top - 4, number, INK, 19, "mb")
            length = float(values[row].norm())
            sheet.text(x + 80 + 190 * row, 252, f"length {length:.0f}" if length > 1.5 else "length 1", color, 24, "ma")
        sheet.line([(x - 4, 240), (x + 362, 240)], INK, 2)
    text = "two cells with four channels each (the real map has 512), a bright one and a faint one"
    sheet.text(40, 290, text, FAINT, 24)
    return sheet


def draw_matching(model):
    """Which priors match which object; and two objects that share their best prior."""
    image, boxes_xy, _, _ = load_picture(14)
    place = (20, 66, 20 + 560, 66 + 560 * image.height / image.width)
    sheet = Sheet(round(place[3]) + 20)
    sheet.photo(image, place)
    sheet.text(20, 20, "priors that match, one colour for each object", bold=True, size=25)
    objects, is_positive = match(boxes_xy, model)
    with sheet.only_within(place):
        for row in is_positive.nonzero().squeeze(1).tolist():
            color = OBJECT_COLORS[int(objects[row])]
            sheet.box(fit(cxcy_to_xy(model.priors_cxcy[row]), place), color, 2)
    counts = [int((is_positive & (objects == i)).sum()) for i in range(len(boxes_xy))]
    for i, (box, count) in enumerate(zip(fit(boxes_xy, place).tolist(), counts, strict=True)):
        sheet.text((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, str(count), OBJECT_COLORS[i], 30, "mm", True, True)

    sheet.text(630, 20, "two objects that share their best prior", bold=True, size=25)
    pair_xy = torch.tensor([[0.19, 0.30, 0.68, 0.67], [0.21, 0.13, 0.64, 0.76]])
    own, overlap = find_best_priors(pair_xy, model)
    best = overlap.argmax(dim=1)
    if best[0] != best[1] or own[0] == own[1]:
        raise ValueError("the two objects of the figure no longer share their best prior")
    right = (660, 84, 960, 384)
    sheet.box(right, GRID, 2, fill="#ffffff")
    for i, color in enumerate((RED, BLUE)):
        sheet.box(fit(pair_xy[i], right), color, 4, fill=clear(color, 0.1))
        sheet.box(fit(cxcy_to_xy(model.priors_cxcy[own[i]]), right), color, 4, dash=9)
    first, second = (0, 1) if own[0] == best[0] else (1, 0)
    names, colors = ("red", "blue"), (RED, BLUE)
    sheet.text(985, 92, "overlap with\nthe best prior", FAINT, 24)
    for i in (0, 1):
        sheet.text(985, 160 + 38 * i, f"{names[i]} {float(overlap[i, best[i]]):.2f}", colors[i], 28, bold=True)
    left_over = f"{float(overlap[second, own[second]]):.2f}"
    sheet.text(985, 252, f"so {names[first]} owns it;\n{names[second]} owns another\n({left_over})", size=24)
    sheet.text(630, 404, "solid: objects, dashed: the prior that each owns", FAINT, 24)
    return sheet


def draw_smooth_l1(_model):
    """Smooth L1 beside half the square."""
    sheet = Sheet(380, width=1200)
    place = (70, 30, 700, 330)
    x = torch.linspace(-4, 4, 161)
    smooth = F.smooth_l1_loss(x, torch.zeros_like(x), reduction="none")
    sheet.box(place, GRID, 2, fill="#ffffff")
    for k in range(-4, 5):
        (at, _) = fit([(k + 4) / 8, 0], place).tolist()
        sheet.text(at, 338, str(k), FAINT, 22, "ma")
    for k in range(0, 5):
        sheet.text(60, 330 - 75 * k, str(k), FAINT, 22, "rm")
    for values, color in ((x.square() / 2, FAINT), (smooth, BLUE)):
        points = torch.stack([(x + 4) / 8, 1 - values / 4], dim=1)[values <= 4]
        sheet.line([tuple(point) for point in fit(points, place).tolist()], color, 4)
    sheet.line([(740, 70), (790, 70)], BLUE, 5)
    sheet.text(806, 54, "smooth L1", size=28, bold=True)
    sheet.line([(740, 116), (790, 116)], FAINT, 5)
    sheet.text(806, 100, "half the square", size=28)
    text = (
        "The same within 1 of the truth.\nBeyond, the slope stays at 1: an\noffset that is far off pulls no\n"
        "harder than one that is a bit off."
    )
    sheet.text(740, 170, text, FAINT, 26)
    return sheet


def draw_mining(model):
    """The positives of a picture, and the hardest negatives that the loss takes beside them."""
    sheet = Sheet(500)
    image, boxes_xy, labels, _ = load_picture(31)
    _, predicted_scores = predict(image, boxes_xy, labels, model)
    objects, is_positive = match(boxes_xy, model)
    prior_labels = labels[objects].masked_fill(~is_positive, 0)
    losses = F.cross_entropy(predicted_scores[0], prior_labels, reduction="none")  # (P,)
    n_hard = 3 * int(is_positive.sum())
    mined, does_count = mine_priors(predicted_scores, is_positive[None], torch.tensor([[n_hard]]))
    is_hard = torch.zeros_like(is_positive)
    is_hard[mined[does_count]] = True
    is_hard &= ~is_positive
    width = 440 * image.width / image.height
    place = (20, 20, 20 + width, 460)
    sheet.photo(image, place)
    with sheet.only_within(place, margin=18):
        for mask, color, line in ((is_hard, RED, 1.5), (is_positive, BLUE, 3)):
            for row in mask.nonzero().squeeze(1).tolist():
                sheet.box(fit(cxcy_to_xy(model.priors_cxcy[row]), place), color, line)
    x = place[2] + 50
    n_left = len(is_positive) - int(is_positive.sum()) - int(is_hard.sum())
    rows = [("positives", is_positive, BLUE), ("hardest negatives", is_hard, RED)]
    for i, (name, mask, color) in enumerate(rows):
        y = 40 + 110 * i
        sheet.box((x, y + 6, x + 34, y + 34), color, 5)
        sheet.text(x + 54, y, f"{int(mask.sum())} {name}", color, 32, bold=True)
        sheet.text(x + 54, y + 44, f"mean loss {float(losses[mask].mean()):.2f}", FAINT, 26)
    sheet.text(x + 54, 260, f"{n_left} other negatives", size=32, bold=True)
    rest = ~(is_positive | is_hard)
    sheet.text(x + 54, 304, f"mean loss {float(losses[rest].mean()):.4f}, left out", FAINT, 26)

    bars = losses[~is_positive].sort(descending=True).values[: 3 * n_hard]
    plot = (870, 60, 1170, 380)
    sheet.text(plot[0], 18, f"the {len(bars)} hardest negatives", size=26)
    step = (plot[2] - plot[0]) / len(bars)
    for i, value in enumerate((bars / bars[0]).tolist()):
        left, top = plot[0] + step * i, plot[3] - (plot[3] - plot[1]) * value
        sheet.box((left, top, left + 0.7 * step, plot[3]), width=0, fill=RED if i < n_hard else FAINT)
    sheet.line([(plot[0] - 4, plot[3]), (plot[2], plot[3])], INK, 2)
    sheet.text(plot[0], 390, "their losses, highest first\n(red: taken)", FAINT, 24)
    return sheet


def draw_nms(model):
    """Candidates above the threshold, and what non-maximum suppression leaves of them."""
    sheet = Sheet(430)
    image, boxes_xy, labels, _ = load_picture(103)
    predictions = predict(image, boxes_xy, labels, model)
    n_candidates = predictions[1].numel()
    settings = [
        ("score > 0.2", {"min_score": 0.2, "max_overlap": 1.0, "top_k": n_candidates}),
        ("after suppression", {"min_score": 0.2, "max_overlap": 0.45, "top_k": n_candidates}),
        ("the best 3 (top_k)", {"min_score": 0.2, "max_overlap": 0.45, "top_k": 3}),
    ]
    height = 368 * image.height / image.width
    for i, (title, setting) in enumerate(settings):
        place = (20 + 396 * i, 64, 388 + 396 * i, 64 + height)
        (boxes,), (found,), (scores,) = model.detect_objects(*predictions, **setting)
        sheet.photo(image, place)
        names = [CLASS_NAMES[label] for label in found.tolist()]
        with sheet.only_within(place):
            for box, name, score in reversed(list(zip(fit(boxes, place), names, scores.tolist(), strict=True))):
                sheet.box(box, CLASS_COLORS[name], 3.5 if i else 1.5)
                if i:
                    sheet.label(box, f"{name} {score:.2f}", CLASS_COLORS[name], 20, place[2])
        sheet.text((place[0] + place[2]) / 2, 20, title, bold=True, size=28, anchor="ma")
        sheet.text((place[0] + place[2]) / 2, place[3] + 14, f"{len(boxes)} boxes", size=26, anchor="ma")
    return sheet


def draw_augmentation(_model):
    """One picture, and what `transform()` makes of it."""
    sheet = Sheet(560)
    image, boxes_xy, labels, _ = load_picture(156)
    boxes_xy_pixels = to_pixels(boxes_xy, image.size)
    difficulties = torch.zeros(len(labels), dtype=torch.uint8)
    for i, seed in enumerate((None, 3, 7, 13, 27, 29, 37, 40)):
        split, rng = ("TEST", None) if seed is None else ("TRAIN", np.random.default_rng((0, 0, seed)))
        pixels, boxes, kept, _ = transform(image, boxes_xy_pixels, labels, difficulties, split, rng)
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        x, y = 20 + 296 * (i % 4), 20 + 270 * (i // 4)
        place = (x, y, x + 272, y + 252)
        sheet.photo(picture, place)
        for box, label in zip(boxes, kept.tolist(), strict=True):
            sheet.box(fit(box, place), PAPER, 6)
            sheet.box(fit(box, place), CLASS_COLORS[CLASS_NAMES[label]], 3.5)
        if seed is None:
            sheet.text(x + 8, y + 214, "as it is", size=26, bold=True, halo=True)
    return sheet


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
    """The precision-recall curve of a few detections, and the 11 points at which VOC2007 reads it."""
    sheet = Sheet(440)
    recalls, precisions, average_precision = precision_recall()
    place = (90, 30, 690, 370)
    sheet.box(place, GRID, 2, fill="#ffffff")
    for k in range(0, 11, 2):
        x, y = fit([k / 10, 1 - k / 10], place).tolist()
        sheet.text(x, 378, f"{k / 10:g}", FAINT, 22, "ma")
        sheet.text(80, y, f"{k / 10:g}", FAINT, 22, "rm")
    sheet.text(390, 406, "recall", size=24, anchor="ma")
    sheet.text(104, 44, "precision", size=24)
    curve = [tuple(fit([r, 1 - p], place).tolist()) for r, p in zip(recalls, precisions, strict=True)]
    sheet.line(curve, BLUE, 4)
    for x, y in curve:
        sheet.dot(x, y, 9, BLUE)
    pairs = list(zip(recalls, precisions, strict=True))
    points = [max([p for r, p in pairs if r >= k / 10 - 1e-9], default=0.0) for k in range(11)]
    if abs(sum(points) / 11 - average_precision) > 1e-6:
        raise ValueError(f"the points' mean {sum(points) / 11} is not calculate_mAP()'s {average_precision}")
    for k, precision in enumerate(points):
        x, y = fit([k / 10, 1 - precision], place).tolist()
        sheet.line([(x - 9, y - 9), (x + 9, y + 9)], RED, 4)
        sheet.line([(x - 9, y + 9), (x + 9, y - 9)], RED, 4)
    sheet.dot(748, 72, 9, BLUE)
    sheet.text(776, 56, "after each detection", size=28)
    sheet.line([(739, 109), (757, 127)], RED, 4)
    sheet.line([(739, 127), (757, 109)], RED, 4)
    sheet.text(776, 100, "best precision at this\nrecall or a higher one", size=28)
    sheet.text(740, 210, "their mean, the average\nprecision of VOC2007:", FAINT, 28)
    sheet.text(740, 290, f"{average_precision:.3f}", RED, 44, bold=True)
    return sheet


def draw_training(_model):
    """Loss and learning rate of a real run, from its log; None where there is no log."""
    path = REPO / log_file
    if not path.is_file():
        print(f"no training curve: there is no {path}; --log_file=FILE names the log of a run")
        return None
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    iterations = np.array([int(row["iteration"]) for row in rows])
    losses, rates = (np.array([float(row[name]) for row in rows]) for name in ("loss", "lr"))
    n = max(1, len(rows) // 40)  # rows in the sliding mean
    smooth = np.array([losses[max(0, i - n + 1) : i + 1].mean() for i in range(len(losses))])
    sheet = Sheet(470)
    loss_ticks = ticks_up_to(max(np.quantile(losses, 0.99), smooth.max()))
    panels = [
        ("loss", (100, 60, 780, 400), loss_ticks, [(losses, "#a5c8ee", 2), (smooth, BLUE, 4)]),
        ("learning rate", (920, 60, 1180, 400), [0, rates.max() / 2, rates.max()], [(rates, AMBER, 4)]),
    ]
    for title, place, ticks, curves in panels:
        sheet.box(place, GRID, 2, fill="#ffffff")
        sheet.text(place[0], 18, title, bold=True, size=28)
        for tick in ticks:
            y = place[3] - (place[3] - place[1]) * tick / ticks[-1]
            sheet.text(place[0] - 10, y, f"{tick:g}", FAINT, 22, "rm")
        for k in range(0, 5, 2):
            x = place[0] + (place[2] - place[0]) * k / 4
            sheet.text(x, 408, f"{iterations[-1] * k / 4:.0f}", FAINT, 22, "ma")
        for values, color, width in curves:
            heights = 1 - np.minimum(values / ticks[-1], 1)
            points = np.stack([iterations / iterations[-1], heights], axis=1)
            sheet.line([tuple(point) for point in fit(points, place).tolist()], color, width)
    sheet.text(445, 436, "iteration", size=24, anchor="ma")
    return sheet


def ticks_up_to(highest):
    """Four or five round numbers from 0 to `highest` or a bit more."""
    power = 10.0 ** math.floor(math.log10(highest / 4))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if 4 * factor * power >= highest)
    return [step * k for k in range(math.ceil(highest / step) + 1)]


FIGURES = {
    "hero.jpg": draw_hero,
    "forms.jpg": draw_forms,
    "overlap.png": draw_overlap,
    "network.png": draw_network,
    "fc_to_conv.png": draw_fc_to_conv,
    "priors.png": draw_priors,
    "priors_conv9_2.jpg": draw_priors_on_photo,
    "offsets.jpg": draw_offsets,
    "prediction.png": draw_prediction,
    "l2_norm.png": draw_l2_norm,
    "matching.jpg": draw_matching,
    "smooth_l1.png": draw_smooth_l1,
    "mining.jpg": draw_mining,
    "nms.jpg": draw_nms,
    "augmentation.jpg": draw_augmentation,
    "precision_recall.png": draw_precision_recall,
    "training.png": draw_training,
}


# ----------------------------------------------------------------------------------------------
# The README's links to code
# ----------------------------------------------------------------------------------------------

CODE_LINK = re.compile(r"\[`([\w.]+)(?:\(\))?`\]\(([\w/]+\.py)#L\d+\)")


def update_links(text):
    """Set the line number of each link such as [`match_priors()`](model.py#L457) to where the name is defined."""
    return CODE_LINK.sub(lambda link: re.sub(r"#L\d+", f"#L{find_definition(link[2], link[1])}", link[0]), text)


def find_definition(file, name):
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
