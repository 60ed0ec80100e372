"""Draw the sample data set: circles, rectangles, triangles and stars on cluttered backgrounds.

    python tools/make_sample.py [--output_folder=...] [--n_train=...] [--n_test=...] [--seed=...]

Writes a folder in Pascal VOC's layout, which `create_data_lists.py` reads like any other:

    Annotations/<id>.xml    JPEGImages/<id>.jpg    ImageSets/Main/trainval.txt    ImageSets/Main/test.txt

Nothing is downloaded. An image depends on the seed, its split and its number alone: it stays the same
when more images are drawn, and on every machine with the same versions of Pillow and numpy.
"""

import colorsys
import math
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Parameters
output_folder = "demo/sample"  # made where it is missing; images of an earlier run are written over
n_train = 500  # images in trainval.txt
n_test = 100  # images in test.txt
seed = 0  # another seed gives other images

CLASSES = ("circle", "rectangle", "triangle", "star")

# Half of the objects have about their class's hue (a fraction of the circle of hues), the others any: the
# colour is a hint, which helps a short training, but only the outline tells the class.
CLASS_HUES = {"circle": 0.99, "rectangle": 0.58, "triangle": 0.36, "star": 0.13}

SUPERSAMPLE = 3  # shapes are drawn this many times larger and reduced, for smooth edges
MAX_SHARED = 0.15  # of the smaller of two boxes, that both may cover, unless one is meant to be hidden
DIFFICULT_VISIBLE = 0.5  # an object of which less can be seen is marked difficult, ...
DIFFICULT_SIDE = 24  # ... and so is one whose longer side has fewer pixels


def make_sample(folder, n_train, n_test, seed):
    """Write the data set into a folder; the arguments are the parameters at the top of this file."""
    if n_train < 0 or n_test < 0:
        raise ValueError(f"n_train={n_train}, n_test={n_test}: the number of images cannot be negative")
    folder = Path(folder)
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, (list_name, n_images) in enumerate([("trainval", n_train), ("test", n_test)]):
        ids = [f"{list_name}_{number:05d}" for number in range(1, n_images + 1)]
        for number, image_id in enumerate(ids, start=1):
            image, objects = draw_sample(np.random.default_rng((seed, split, number)))
            image.save(folder / "JPEGImages" / f"{image_id}.jpg", quality=88)
            write_annotation(folder / "Annotations" / f"{image_id}.xml", image_id, image.size, objects)
        lines = "".join(f"{image_id}\n" for image_id in ids)
        (folder / "ImageSets" / "Main" / f"{list_name}.txt").write_text(lines, encoding="utf-8")


def draw_sample(rng):
    """Draw one picture and say what is on it.

    rng: numpy Generator; everything random comes from it.
    Returns an RGB image, 320 to 500 pixels on a side, and a list of its objects as dictionaries: name,
    difficult, truncated (both 0 or 1), and box_xy_pixels: four whole numbers, continuous coordinates, tight
    around the pixels of which the object covers half or more and that nothing later covers.
    """
    long_side, short_side = int(rng.integers(400, 501)), int(rng.integers(320, 400))
    size = (long_side, short_side) if rng.random() < 0.6 else (short_side, long_side)
    image = draw_background(rng, size)
    owner = Image.new("L", size)  # for each pixel the number of the object on top, 0 for the background
    drawn = []  # (name, pixels of the whole shape, whether it reaches beyond the edge)
    for number, (name, center, radius) in enumerate(place_shapes(rng, size), start=1):
        outline = rotate(draw_outline(rng, name), rng.uniform(0, 2 * math.pi)) * radius + center
        solid, corner = paint_shape(rng, image, outline, pick_hue(rng, name))
        owner.paste(number, corner, solid)
        x_min, y_min, x_max, y_max = np.add(solid.getbbox(), corner * 2)
        is_inside = x_min >= 0 and y_min >= 0 and x_max <= size[0] and y_max <= size[1]
        drawn.append((name, solid.histogram()[255], not is_inside))
    return image, list_objects(owner, drawn)


def list_objects(owner, drawn):
    """Boxes and flags from the picture of which object is on top at each pixel; see `draw_sample()`."""
    objects = []
    for number, (name, n_pixels, beyond) in enumerate(drawn, start=1):
        visible = owner.point([255 * (value == number) for value in range(256)])
        n_visible = visible.histogram()[255]
        if n_visible < 0.1 * n_pixels:  # hidden but for a sliver: nobody would annotate it
            continue
        x_min, y_min, x_max, y_max = box = visible.getbbox()
        hidden = n_visible < DIFFICULT_VISIBLE * n_pixels
        tiny = max(x_max - x_min, y_max - y_min) < DIFFICULT_SIDE
        objects.append({"name": name, "box_xy_pixels": box, "difficult": int(hidden or tiny), "truncated": int(beyond)})
    return objects


# --- Where the shapes go --------------------------------------------------------------------------


def place_shapes(rng, size):
    """Choose the shapes of a picture, in the order in which they are painted.

    Returns a list of (class name, centre in pixels as an array (x, y), radius in pixels).
    """
    n_objects = int(rng.choice(5, p=[0.03, 0.32, 0.3, 0.2, 0.15]))
    shapes = []
    for _ in range(n_objects):
        for _ in range(30):  # tries; a shape that finds no free place is left out
            radius = rng.uniform(0.075, 0.25) * min(size)
            # Most shapes are whole; a few lose up to a third of their radius at an edge.
            margin = radius * (1 if rng.random() < 0.85 else 0.67)
            center = np.array([rng.uniform(margin, side - margin) for side in size])
            if all(shared(center, radius, *other[1:]) <= MAX_SHARED for other in shapes):
                shapes.append((str(rng.choice(CLASSES)), center, radius))
                break
    if shapes and rng.random() < 0.04:  # one shape that hides most of the last one
        _, center, radius = shapes[-1]
        angle = rng.uniform(0, 2 * math.pi)
        shift = rng.uniform(0.5, 0.7) * radius * np.array([math.cos(angle), math.sin(angle)])
        shapes.append((str(rng.choice(CLASSES)), center + shift, radius * rng.uniform(1.0, 1.2)))
    if rng.random() < 0.04:  # one that is too small to tell
        center = np.array([rng.uniform(0.1, 0.9) * side for side in size])
        shapes.append((str(rng.choice(CLASSES)), center, rng.uniform(6, 9)))
    return shapes


def shared(center_1, radius_1, center_2, radius_2):
    """The part of the smaller of two squares around circles that the larger one covers."""
    mins = np.maximum(center_1 - radius_1, center_2 - radius_2)
    maxs = np.minimum(center_1 + radius_1, center_2 + radius_2)
    return np.prod(np.maximum(maxs - mins, 0)) / (2 * min(radius_1, radius_2)) ** 2


def pick_hue(rng, name):
    return CLASS_HUES[name] + rng.uniform(-0.04, 0.04) if rng.random() < 0.5 else rng.random()


# --- Shapes ---------------------------------------------------------------------------------------


def draw_outline(rng, name):
    """The corners of a shape, a float array (n, 2), on or inside the circle of radius 1 around (0, 0)."""
    if name == "circle":
        return points_at(np.arange(90) * 4)
    if name == "rectangle":
        corner = math.degrees(math.atan(rng.uniform(0.4, 1)))  # 0.4: two and a half times as long as wide
        return points_at([corner, 180 - corner, 180 + corner, 360 - corner])
    if name == "triangle":
        half_base = rng.uniform(45, 75)  # 60 degrees: all sides equal
        return points_at([-90, 90 - half_base, 90 + half_base])
    n_tips = int(rng.integers(5, 7))  # of a star
    radii = np.where(np.arange(2 * n_tips) % 2, rng.uniform(0.4, 0.5), 1)
    return points_at(np.arange(2 * n_tips) * 180 / n_tips) * radii[:, None]


def points_at(degrees):
    return np.array([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def rotate(points, angle):
    x, y, cos, sin = points[:, 0], points[:, 1], math.cos(angle), math.sin(angle)
    return np.stack([x * cos - y * sin, x * sin + y * cos], axis=1)


def outline_mask(outline, corner=None, size=None):
    """Draw a filled outline with smooth edges.

    outline: (n, 2) float array, corners in pixels of the picture.
    corner, size: the window to draw, in pixels of the picture; by default it just holds the outline.
    Returns an "L" image that says how much of each pixel is covered, 0 to 255, and the window's upper left corner.
    """
    if corner is None:
        corner = tuple(int(v) - 1 for v in np.floor(outline.min(axis=0)))
        size = tuple(int(v) + 2 - c for v, c in zip(np.ceil(outline.max(axis=0)), corner, strict=True))
    canvas = Image.new("L", (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE))
    # Whole numbers: a difference in the last bit of a cosine between two machines changes no pixel.
    corners = np.rint((outline - corner) * SUPERSAMPLE)
    ImageDraw.Draw(canvas).polygon(corners.flatten().tolist(), fill=255)
    return canvas.reduce(SUPERSAMPLE), corner


def paint_shape(rng, image, outline, hue):
    """Paint one shape, with its shadow, onto the picture.

    Returns an "L" image, 255 where the shape covers half of a pixel or more, else 0; and its upper left corner.
    """
    mask, corner = outline_mask(outline)
    saturation, value = rng.uniform(0.55, 0.9), rng.uniform(0.75, 1)
    light = color(hue, saturation, value)
    dark = color(hue + rng.uniform(-0.06, 0.06), saturation, value * 0.65)
    reach = max(2, min(mask.size) // 12)  # pixels: how far the shadow falls
    paint_shadow(image, mask, corner, reach, strength=rng.uniform(0.3, 0.6))
    fill = Image.new("RGB", mask.size, light)
    fill.paste(dark, (0, 0), draw_pattern(rng, mask.size))
    image.paste(fill, corner, mask)
    if rng.random() < 0.4:  # a light rim: the shape once more, with a hole
        center = outline.mean(axis=0)
        hole, _ = outline_mask((outline - center) * rng.uniform(0.84, 0.92) + center, corner, mask.size)
        rim = Image.composite(Image.new("L", mask.size), mask, hole)
        image.paste(color(hue, 0.08, 1), corner, rim)
    return mask.point(lambda value: 255 * (value >= 128)), corner


def paint_shadow(image, mask, corner, reach, strength):
    """Darken the picture below and to the right of a shape, softly."""
    shadow = Image.new("L", (mask.size[0] + 4 * reach, mask.size[1] + 4 * reach))
    shadow.paste(round(255 * strength), (2 * reach, 2 * reach), mask)
    # A blur has no detail that a quarter of the pixels could not hold.
    small = shadow.reduce(4).filter(ImageFilter.GaussianBlur(reach / 8))
    shift = round(0.6 * reach) - 2 * reach
    place = (corner[0] + shift, corner[1] + shift)
    image.paste((10, 10, 20), place, small.resize(shadow.size, Image.BILINEAR))


def draw_pattern(rng, size):
    """What fills a shape, an "L" image: 0 where it has its light colour, 255 where it has its dark one."""
    kind = rng.choice(["shade", "stripes", "dots"], p=[0.6, 0.2, 0.2])
    if kind == "shade":
        shade = Image.linear_gradient("L").rotate(90 * int(rng.integers(4)))
        return shade.resize(size, Image.BILINEAR)
    step = max(4, round(max(size) * rng.uniform(0.08, 0.16)))  # pixels from one stripe or dot to the next
    pattern = Image.new("L", (size[0] * 2, size[1] * 2))
    draw = ImageDraw.Draw(pattern)
    if kind == "stripes":
        slope = int(rng.integers(-1, 2)) * pattern.size[1]
        for x in range(-pattern.size[1], pattern.size[0] + pattern.size[1], 2 * step):
            draw.line([(x, 0), (x + slope, pattern.size[1])], fill=200, width=step)
    else:
        for row, y in enumerate(range(0, pattern.size[1] + step, 2 * step)):
            for x in range(step * (row % 2), pattern.size[0] + step, 2 * step):
                draw.ellipse([x - step // 2, y - step // 2, x + step // 2, y + step // 2], fill=200)
    return pattern.reduce(2)


def color(hue, saturation, value):
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 1, saturation, value))


# --- Backgrounds ----------------------------------------------------------------------------------


def draw_background(rng, size):
    """A background: blurred blobs on a gradient, lines, curves, and grain. Returns an RGB image."""
    hue, value = rng.random(), rng.uniform(0.3, 0.95)
    image = draw_blobs(rng, size, hue, value)
    if rng.random() < 0.4:
        draw_grid(rng, image)
    if rng.random() < 0.7:
        draw_curves(rng, image, hue)
    noise = Image.frombytes("L", size, rng.bytes(size[0] * size[1]))
    return Image.blend(image, Image.merge("RGB", (noise, noise, noise)), rng.uniform(0, 0.08))


def muted(rng, hue, value):
    """A colour near the background's own, paler than those of the shapes."""
    value = min(1, max(0.15, value + rng.uniform(-0.2, 0.2)))
    return color(hue + rng.uniform(-0.12, 0.12), rng.uniform(0.1, 0.45), value)


def draw_blobs(rng, size, hue, value):
    """Soft blobs on a smooth gradient, drawn at an eighth of the size: there is nothing sharp in them."""
    small_size = (size[0] // 8, size[1] // 8)
    cells = Image.new("RGB", (3, 3))
    cells.putdata([muted(rng, hue, value) for _ in range(9)])
    small = cells.resize(small_size, Image.BICUBIC)
    draw = ImageDraw.Draw(small)
    for _ in range(int(rng.integers(0, 16))):
        x, y = int(rng.integers(small_size[0])), int(rng.integers(small_size[1]))
        across, down = int(rng.integers(2, 9)), int(rng.integers(2, 9))
        draw.ellipse([x - across, y - down, x + across, y + down], fill=muted(rng, hue, value))
    small = small.filter(ImageFilter.GaussianBlur(rng.uniform(1, 2.5)))
    return small.resize(size, Image.BICUBIC)


def draw_grid(rng, image):
    """Thin parallel lines over the whole picture, in one direction or in two."""
    mask = Image.new("L", image.size)
    draw = ImageDraw.Draw(mask)
    step, strength = int(rng.integers(12, 40)), int(rng.integers(25, 70))
    directions = ("upright", "level", "both")[rng.integers(3)]
    if directions != "level":
        for x in range(step // 2, image.size[0], step):
            draw.line([(x, 0), (x, image.size[1])], fill=strength)
    if directions != "upright":
        for y in range(step // 2, image.size[1], step):
            draw.line([(0, y), (image.size[0], y)], fill=strength)
    image.paste((255, 255, 255) if rng.random() < 0.5 else (20, 20, 30), (0, 0), mask)


def draw_curves(rng, image, hue):
    """Curved strokes across the picture (quadratic Bezier curves with random control points)."""
    for _ in range(int(rng.integers(1, 7))):
        start, middle, end = (rng.uniform(-0.2, 1.2, 2) * image.size for _ in range(3))
        steps = np.linspace(0, 1, 25)[:, None]
        curve = (1 - steps) ** 2 * start + 2 * steps * (1 - steps) * middle + steps**2 * end
        mask = Image.new("L", (image.size[0] * 2, image.size[1] * 2))
        points = np.rint(curve * 2).flatten().tolist()
        strength, width = int(rng.integers(60, 200)), int(rng.integers(2, 12))
        ImageDraw.Draw(mask).line(points, fill=strength, width=width, joint="curve")
        paint = color(hue + rng.uniform(-0.3, 0.3), rng.uniform(0.1, 0.5), rng.uniform(0.2, 1))
        image.paste(paint, (0, 0), mask.reduce(2))


# --- Annotations ----------------------------------------------------------------------------------


def write_annotation(path, image_id, size, objects):
    """Write a VOC annotation: pixel indices that start at 1 and include both ends."""
    root = ET.Element("annotation")
    add_fields(root, folder="sample", filename=f"{image_id}.jpg")
    add_fields(ET.SubElement(root, "size"), width=size[0], height=size[1], depth=3)
    add_fields(root, segmented=0)
    for item in objects:
        element = ET.SubElement(root, "object")
        add_fields(element, name=item["name"], pose="Unspecified", truncated=item["truncated"],
                   difficult=item["difficult"])  # fmt: skip
        x_min, y_min, x_max, y_max = item["box_xy_pixels"]
        add_fields(ET.SubElement(element, "bndbox"), xmin=x_min + 1, ymin=y_min + 1, xmax=x_max, ymax=y_max)
    ET.indent(root)
    ET.ElementTree(root).write(path, encoding="utf-8")


def add_fields(parent, **fields):
    for name, value in fields.items():
        ET.SubElement(parent, name).text = str(value)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools/ lies below the repo's root
    from utils import exit_with_message, override_parameters

    override_parameters(globals(), sys.argv[1:])
    with exit_with_message():
        make_sample(output_folder, n_train, n_test, seed)
    print(f"{output_folder}: {n_train} training and {n_test} test images of {', '.join(CLASSES)}.")
