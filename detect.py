"""Find objects in images, and draw them.

In a notebook:

    from detect import detect, find_objects
    detect("photo.jpg")                                     an annotated copy, as a PIL image
    detect(image, min_score=0.4, suppress=["person"])       a PIL image goes in as well
    boxes, names, scores = find_objects("photo.jpg")        the objects themselves

From the shell:

    python detect.py --images=photo.jpg                     or a folder, or a pattern such as "holiday/*.jpg"
    python detect.py --images=holiday --recursive=True --write_boxes_to=found.csv

Reads the checkpoint that train.py writes. Writes annotated copies, named as the originals, into `output_folder`,
and a list of the objects where `write_boxes_to` says. Images that cannot be read are named at the end, and the
exit status is then 1. Videos and animated GIFs are the work of tools/video.py; here a GIF's first frame is taken.
Any parameter below can be overridden on the command line with --name=value.
"""

import contextlib
import csv
import functools
import glob
import io
import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from datasets import IMAGE_FORMATS, check_image_file, check_image_size, pil_to_rgb, prepare
from model import hide_classes, load_model
from utils import (
    IMAGE_SUFFIXES,
    check_label_map,
    choose_device,
    class_colors,
    exit_on_sigterm,
    exit_with_message,
    override_parameters,
    printable,
    rev_label_map,
    write_files,
)

# Model
checkpoint = "checkpoint_ssd300.pth.tar"  # what detect() and find_objects() use, too, unless given a model
device = ""  # "cpu", "cuda", "cuda:1", "mps", ...; "": an accelerator where there is one

# Data
images = "images"  # a file, a folder, or a pattern with * or ?
recursive = False  # True: the folders in a folder as well
output_folder = "detections"  # made where it is missing; files of an earlier run are written over
write_boxes_to = ""  # a .csv or .json file: image, class, score and box in pixels of each object; "": none
batch_size = 4  # images that the network sees at once; fewer where they are large
font_file = ""  # a font for the labels, such as DejaVuSans.ttf; "": Pillow's own, which has the letters of English only

# Detection: the defaults of detect() and find_objects(), too
min_score = 0.2  # lowest score of an object that is shown, in [0, 1]; evaluation takes 0.01
max_overlap = 0.45  # of two boxes of a class that overlap more than this, only the better one is kept
top_k = 200  # most objects in an image
suppress = ""  # classes that are not shown, separated by commas; "": none

# Files whose annotated copy is of the same kind; of all others it is a PNG.
KEPT_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
PIXELS_AT_ONCE = 50_000_000  # a batch of images is complete when it has as many: 150 MB
MIN_TEXT_SIZE = 9  # pixels: smaller text cannot be read


def main():
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    if write_boxes_to:
        check_boxes_file(write_boxes_to)
    load_font(MIN_TEXT_SIZE)  # an error now, not after the first detection
    paths = list_images(images, recursive)
    others = sorted(set(list_files(images, recursive)) - set(paths))
    targets = plan_outputs(paths, Path(output_folder))
    model = load_default_model()
    check_arguments(choose_arguments({}), model.label_map)
    rows = []  # all objects, as rows for write_boxes()
    errors = []  # what is wrong with files that could not be read
    try:
        annotate_files(paths, targets, model, rows, errors)
    except BaseException:  # Ctrl-C, too
        if write_boxes_to and rows:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                write_boxes(write_boxes_to, rows)
                print(f"stopped early; {write_boxes_to} holds the {len(rows)} objects that were found before")
        raise
    if write_boxes_to:
        write_boxes(write_boxes_to, rows)
    print(f"{len(paths) - len(errors)} of {len(paths)} images annotated, in {output_folder}; {len(rows)} objects")
    print_notes(paths, others, rows, model)
    if errors:
        raise SystemExit("\n".join(f"error: {error}" for error in errors))


# --- Images in, objects out -----------------------------------------------------------------------


def detect(image, min_score=None, max_overlap=None, top_k=None, suppress=None, model=None):
    """Find objects in an image and draw them on a copy of it.

    The arguments are those of `find_objects()`.
    Returns a new RGB PIL image, upright, of the original's size; the original is never drawn on.
    """
    image = open_image(image)
    if model is None:  # (A compiled model has no truth value.)
        model = load_default_model()
    boxes_xy_pixels, names, scores = find_objects(image, min_score, max_overlap, top_k, suppress, model)
    return draw_boxes(image, boxes_xy_pixels, names, scores, class_colors(model.label_map))


def find_objects(image, min_score=None, max_overlap=None, top_k=None, suppress=None, model=None):
    """Find objects in an image.

    image: path, or PIL image of any mode; it is turned upright if its EXIF data say how. Of a file with several
        frames the first is taken, of a PIL image the current one.
    min_score: objects of a higher score only, in [0, 1].
    max_overlap: of two boxes of a class that overlap more than this, in [0, 1], the better one is kept.
    top_k: most objects.
    suppress: classes to leave out: a list of names, or one string with commas between them.
    model: what `load_model()` returns; None: the checkpoint named at the top of this file, loaded on the first call
        and kept until the file or the name changes.
    Other arguments that are None: the value at the top of this file, as it is when the function is called.
    Returns boxes_xy_pixels (n, 4) float32, boundary form, inside the upright image, of positive area; a list of n
    class names; a list of n scores, falling.
    Raises FileNotFoundError or ValueError, naming the file or the value, if the image or the checkpoint is missing
    or unreadable, or an argument out of range.
    """
    image = open_image(image)
    if model is None:  # (A compiled model has no truth value.)
        model = load_default_model()
    return find_in_batch([image], model, min_score, max_overlap, top_k, suppress)[0]


def find_in_batch(images, model, min_score=None, max_overlap=None, top_k=None, suppress=None):
    """Find objects in several images at once; a list of what `find_objects()` returns.

    images: list of upright RGB PIL images, of any sizes. The other arguments are those of `find_objects()`.
    """
    given = {"min_score": min_score, "max_overlap": max_overlap, "top_k": top_k, "suppress": suppress}
    arguments = choose_arguments(given)
    hidden = check_arguments(arguments, model.label_map)
    was_training = model.training
    model.eval()  # in training mode, batch normalisation would learn from these images
    with torch.inference_mode():
        try:
            predicted_locs, predicted_scores = model(prepare(images, model))  # (N, P, 4), (N, P, C)
        finally:
            model.train(was_training)
        predicted_scores = hide_classes(predicted_scores, hidden)
        all_boxes_xy, all_labels, all_scores = model.detect_objects(
            predicted_locs, predicted_scores, arguments["min_score"], arguments["max_overlap"], int(arguments["top_k"])
        )
    class_names = rev_label_map(model.label_map)
    results = []
    for image, boxes_xy, labels, scores in zip(images, all_boxes_xy, all_labels, all_scores, strict=True):
        boxes_xy_pixels = to_pixels(boxes_xy.cpu().float(), image.size)
        has_area = (boxes_xy_pixels[:, 2:] > boxes_xy_pixels[:, :2]).all(dim=1)  # inside the image
        names = [class_names[label] for label in labels.cpu()[has_area].tolist()]
        results.append((boxes_xy_pixels[has_area], names, scores.cpu()[has_area].tolist()))
    return results


def to_pixels(boxes_xy, size):
    """Fractional boxes (n, 4) in pixels of an image of `size` (width, height), cut at its edges."""
    return boxes_xy.clamp(0, 1) * torch.tensor([*size, *size])


def choose_arguments(given):
    """The parameters of detection at the top of this file, as they are now, and what is given in their place.

    given: dict of name to value; None takes the parameter.
    """
    arguments = {"min_score": min_score, "max_overlap": max_overlap, "top_k": top_k, "suppress": suppress}
    for name, value in given.items():
        if value is not None:
            arguments[name] = value
    return arguments


def check_arguments(arguments, label_map):
    """ValueError if an argument of detection is out of range; returns the labels to leave out, a list."""
    for name in ("min_score", "max_overlap"):
        if not 0 <= arguments[name] <= 1:
            raise ValueError(f"{name} is {arguments[name]}; it must lie between 0 and 1")
    top_k = arguments["top_k"]
    if top_k < 1 or not float(top_k).is_integer():
        raise ValueError(f"top_k is {top_k}; it is a number of objects, 1 or more")
    if not label_map:
        raise ValueError("this model has no label_map; load_model() reads it from the checkpoint")
    check_label_map(label_map)
    names = arguments["suppress"]
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",") if name.strip()]
    for name in names:
        if label_map.get(name, 0) == 0:
            known = printable(", ".join(list_classes(label_map)))
            raise ValueError(f"suppress names {name!r}, which is not a class of this model; these are: {known}")
    return sorted({label_map[name] for name in names})


def list_classes(label_map):
    return [name for name, label in label_map.items() if label > 0]


def load_default_model():
    """The model of `checkpoint`, as `load_model()` returns it."""
    in_a_notebook = "import detect as d; d.checkpoint = FILE, or detect(image, model=load_model(FILE))"
    misplaced = [*vars(detect), *vars(find_objects)]
    if misplaced:
        raise ValueError(
            f"{misplaced[0]} was set on a function, where nothing reads it. In a notebook type {in_a_notebook}"
        )
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(
            f"{checkpoint}: no such checkpoint. train.py writes one (`make demo` does so in minutes); "
            f"--checkpoint=FILE names another. In a notebook type {in_a_notebook}"
        )
    return load_once(str(path.resolve()), device, path.stat().st_mtime_ns, path.stat().st_size)


@functools.lru_cache(maxsize=1)
def load_once(path, device, modified, n_bytes):
    """Load a checkpoint, and keep it until another path, device, time of change or size is asked for."""
    return load_model(path, choose_device(device))


def open_image(image):
    """A path, or PIL image of any mode, as a new, upright RGB image; FileNotFoundError or ValueError name a bad one."""
    if isinstance(image, Image.Image):
        return make_upright_rgb(image, getattr(image, "filename", "") or "the image")
    with open_file(image) as opened:
        return make_upright_rgb(opened, image)


def open_file(path):
    """Open an image file; its header only is read. Raises FileNotFoundError or ValueError, naming it."""
    if not isinstance(path, (str, Path)):
        raise ValueError(f"an image is a path or a PIL image, not {type(path).__name__}; see PIL.Image.fromarray()")
    try:
        check_image_file(path)
        return Image.open(path, formats=IMAGE_FORMATS)
    except FileNotFoundError:
        raise FileNotFoundError(f"{printable(path)}: there is no such image file") from None
    except Exception as error:  # Pillow's readers raise errors of many kinds
        raise ValueError(f"{printable(path)}: not an image that can be read ({printable(error)})") from error


def make_upright_rgb(image, name):
    """A copy of a PIL image in RGB, turned as its EXIF data say. `name` is what an error calls it."""
    if min(image.size) < 1:
        raise ValueError(f"{name}: an image of {image.width} x {image.height} pixels has nothing to look at")
    check_image_size(*image.size, name)
    try:
        image.load()
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # damaged EXIF data: the pixels are fine
            image = image.copy()
        upright = pil_to_rgb(image)
    except Exception as error:
        raise ValueError(f"{printable(name)}: damaged, it cannot be decoded ({printable(error)})") from error
    upright.info = {}  # the EXIF data no longer hold
    return upright


# --- Drawing --------------------------------------------------------------------------------------


def draw_boxes(image, boxes_xy_pixels, names, scores, colors):
    """Draw boxes, each with a label that says its class and score.

    Lines and text grow with the image. A label stays inside the image, and where possible off other labels; it is
    shortened if the image is narrow.

    image: PIL image; it is not drawn on.
    boxes_xy_pixels: (n, 4) tensor, or list of n boxes, boundary form, inside the image.
    names: list of n class names. scores: list of n numbers, or None for labels without.
    colors: dictionary of class name to "#rrggbb".
    Returns a new RGB PIL image. What has a higher score lies on top.
    """
    image = image.convert("RGB")  # a copy, also of an RGB image
    draw = ImageDraw.Draw(image)
    side = (image.width * image.height) ** 0.5
    line_width = max(1, round(side / 220))
    text_size = max(MIN_TEXT_SIZE, round(side / 34))

    order = list(range(len(names)))
    if scores is not None:
        order.sort(key=lambda i: scores[i], reverse=True)

    # Labels find their places from the best on, and are drawn last, the best on top.
    labels = []  # (place, text, font, color)
    taken = []
    for i in order:
        box = [round(float(value)) for value in boxes_xy_pixels[i]]
        name = printable(names[i], 100)
        text = name if scores is None else f"{name} {scores[i]:.2f}"
        text, font = fit_text(text, name, image.size, text_size)
        place = place_label(box, measure_label(text, font), image.size, taken)
        taken.append(place)
        labels.append((place, text, font, colors[names[i]]))

    for i in reversed(order):
        x_min, y_min, x_max, y_max = [round(float(value)) for value in boxes_xy_pixels[i]]
        # Pillow's rectangles include their last pixel.
        corners = [x_min, y_min, max(x_min, x_max - 1), max(y_min, y_max - 1)]
        draw.rectangle(corners, outline=colors[names[i]], width=line_width)
    for place, text, font, color in reversed(labels):
        if text:  # else there is no room for one letter
            draw_label(draw, place, text, font, color)
    return image


def fit_text(text, name, size, text_size):
    """A text whose label is not larger than an image of `size`: the given one, or else the start of the name, small.

    Returns a text and its font; the text is empty if not one letter fits.
    """
    font = load_font(text_size)
    width, height = measure_label(text, font)
    if width <= size[0] and height <= size[1]:
        return text, font
    font = load_font(MIN_TEXT_SIZE)
    empty_width, height = measure_label("", font)
    if height > size[1]:
        return "", font
    letter_width = measure_label("W", font)[0] - empty_width  # no letter is wider
    n_letters = max(0, (size[0] - empty_width) // letter_width)
    return name[:n_letters], font


def load_font(size):
    """The font of `font_file`, or else Pillow's own, for which there is no file to look for."""
    return load_font_once(font_file, size)


@functools.lru_cache(maxsize=32)
def load_font_once(path, size):
    """Load a font, and keep it. ValueError if the file is not one."""
    if not path:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(path, size)
    except OSError as error:
        raise ValueError(f"font_file is {path!r}, which cannot be read as a font ({printable(error)})") from error


def measure_label(text, font):
    """Width and height of a label, in pixels."""
    left, _, right, _ = font.getbbox(text, anchor="ls")
    ascent, descent = font.getmetrics()
    return right - left + 2 * (font.size // 5), ascent + descent


def place_label(box, label_size, image_size, taken):
    """Where a label goes: above its box, or inside it at the top, or at the bottom, or below it.

    box: its box. label_size, image_size: (width, height). taken: boxes of the labels that are placed already.
    All in pixels, boundary form. Returns the label's box, inside the image if the label is not larger.
    """
    x_min, y_min, _, y_max = box
    width, height = label_size
    left = max(0, min(x_min, image_size[0] - width))
    lowest = max(0, image_size[1] - height)
    tops = [y for y in (y_min - height, y_min, y_max - height, y_max) if 0 <= y <= lowest]
    places = [(left, top, left + width, top + height) for top in tops or [min(y_min, lowest)]]
    for place in places:
        if not any(touch(place, other) for other in taken):
            return place
    return places[0]


def touch(box, other):
    """Whether two boxes, (x_min, y_min, x_max, y_max), share some area."""
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def draw_label(draw, place, text, font, color):
    """Draw a text on a plate of some colour, black or white, whichever has more contrast."""
    x_min, y_min, x_max, y_max = place
    draw.rectangle([x_min, y_min, x_max - 1, y_max - 1], fill=color)
    left = x_min + font.size // 5 - font.getbbox(text, anchor="ls")[0]
    baseline = y_min + font.getmetrics()[0]
    draw.text((left, baseline), text, fill=pick_text_color(color), font=font, anchor="ls")


def pick_text_color(color):
    """Black or white, whichever has more contrast to a colour: always 4.5 : 1 or more, in WCAG's terms."""
    red, green, blue = ((value / 255) ** 2.2 for value in ImageColor.getrgb(color))
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"


# --- Files in, files out --------------------------------------------------------------------------


def list_images(images, recursive=False):
    """The image files that `images` stands for, sorted; of a folder, those named as images. FileNotFoundError: none."""
    files = list_files(images, recursive)
    if Path(images).is_dir():
        files = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        reason = f"no image in it ({', '.join(IMAGE_SUFFIXES)})"
        if not recursive:
            reason += "; folders below it were not looked into (--recursive=True of detect.py does that)"
    else:
        reason = "no such file, folder, or pattern"
    if not files:
        raise FileNotFoundError(f"images={images!r}: there is {reason}")
    return files


def list_files(images, recursive):
    """All files that the parameter `images` stands for, sorted; of a folder no hidden ones.

    With `recursive`, the output folder may lie within: its files are outputs of an earlier run and left out, unless
    there are no others.
    """
    folder = Path(images)
    if folder.is_dir():
        files = []
        for path in folder.glob("**/*" if recursive else "*"):
            is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if not is_hidden:
                files.append(path)
    elif folder.exists():
        files = [folder]
    else:
        # Brackets are part of a name ("photos [2020]/*.jpg"), or else a set of letters as in a shell.
        names = glob.glob(images.replace("[", "[[]"), recursive=True) or glob.glob(images, recursive=True)
        files = [Path(name) for name in names]
    files = sorted(path for path in files if not path.is_dir())
    if not (folder.is_dir() and recursive):
        return files
    outputs = Path(output_folder).resolve()
    originals = [path for path in files if not path.parent.resolve().is_relative_to(outputs)]
    return originals or files


def plan_outputs(paths, folder):
    """The file that each annotated copy is written to, by path; its place in `folder` is that of the original in its.

    Raises ValueError, naming the files, if two would get the same one, or an original would be written over.
    """
    sources = {identify_file(path) for path in paths}
    targets = {}
    originals = {}  # by target
    for path in paths:
        name = path.name if path.suffix.lower() in KEPT_SUFFIXES else f"{path.name}.png"
        subfolder = path.parent.relative_to(images) if Path(images).is_dir() else ""
        target = folder / subfolder / name
        if target.exists() and identify_file(target) in sources:
            raise ValueError(f"{target}: an original would be written over; choose another output_folder")
        if target in originals:
            raise ValueError(f"{originals[target]} and {path} would both be written to {target}; take one at a time")
        originals[target] = path
        targets[path] = target
    return targets


def identify_file(path):
    """Disk and number of a file: the same for all names that it has by links, or because a disk takes A.jpg for a.jpg.

    None for a file that is not there, such as that of a dangling link.
    """
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def annotate_files(paths, targets, model, rows, errors):
    """Find the objects of image files, and write annotated copies.

    targets: the files to write, as `plan_outputs()` returns them.
    Adds all objects to `rows`, and what is wrong with files that could not be read to `errors`.
    Raises OSError for a file that cannot be written.
    """
    colors = class_colors(model.label_map)
    for batch in read_batches(tqdm(paths, unit="image", disable=len(paths) == 1), errors):
        found = find_in_batch([image for _, image in batch], model)
        for (path, image), (boxes_xy_pixels, names, scores) in zip(batch, found, strict=True):
            save_image(draw_boxes(image, boxes_xy_pixels, names, scores, colors), targets[path])
            rows += list_objects({"image": str(path)}, boxes_xy_pixels, names, scores)


def read_batches(paths, errors):
    """Yield lists of (path, upright image), of `batch_size` images, or fewer where they are large.

    What is wrong with files that cannot be read is added to `errors`: one bad file does not stop the others.
    """
    batch = []
    n_pixels = 0
    for path in paths:
        try:
            image = open_image(path)
        except (ValueError, FileNotFoundError) as error:
            errors.append(str(error))
            continue
        batch.append((path, image))
        n_pixels += image.width * image.height
        if len(batch) == batch_size or n_pixels >= PIXELS_AT_ONCE:
            yield batch
            batch = []
            n_pixels = 0
    if batch:
        yield batch


def save_image(image, target, **options):
    """Write a PIL image, and its folder where that is missing. options: Pillow's. Raises OSError, naming the file."""
    if target.suffix.lower() in (".jpg", ".jpeg", ".webp"):
        options["quality"] = 95
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target, **options)
    except OSError as error:
        raise OSError(f"{target}: could not be written ({error})") from error


def print_notes(paths, others, rows, model):
    """Say which files were left out, which names cannot be read, and what to try if nothing was found.

    others: the files that were left out.
    """
    if others:
        names = printable(", ".join(path.name for path in others))
        print(f"{len(others)} other files, not named like images that can be read: {names}")
    if any(path.suffix.lower() == ".gif" for path in paths):
        print("of a GIF only the first frame is annotated; tools/video.py --video=FILE takes all of them")
    unreadable = sorted({row["class"] for row in rows if not row["class"].isascii()})
    if unreadable and not font_file:
        names = printable(", ".join(unreadable))
        print(f"Pillow's font lacks letters of these names, and draws squares; --font_file=FILE takes another: {names}")
    if not rows:
        names = printable(", ".join(list_classes(model.label_map)))
        print(
            f"nothing was found. Try a lower score, such as --min_score={min_score / 4:g}; if that finds nothing, too, "
            f"train for longer, or check that the images show what the model knows: {names}"
        )


# --- The file of objects --------------------------------------------------------------------------


def list_objects(place, boxes_xy_pixels, names, scores):
    """The objects of an image as rows for `write_boxes()`. place: a dict that says where they are, {"image": path}."""
    rows = []
    for box, name, score in zip(boxes_xy_pixels.tolist(), names, scores, strict=True):
        rows.append({**place, "class": name, "score": score, "box": [round(value, 2) for value in box]})
    return rows


def check_boxes_file(path):
    """ValueError or OSError if a file of objects cannot be written; to be found before the detection of all images."""
    path = Path(path)
    if path.suffix not in (".csv", ".json") or not path.parent.is_dir() or path.is_dir():
        raise ValueError(
            f"write_boxes_to is {str(path)!r}; it must be a file that ends in .csv or .json, in a folder that exists"
        )
    write_files(path.parent, {path.name: ""}, trial=True)


def write_boxes(path, rows, place=("image",)):
    """Write rows of `list_objects()`, whose first keys are `place`, to a .csv or .json file: all or nothing."""
    path = Path(path)
    if path.suffix == ".json":
        write_files(path.parent, {path.name: json.dumps(rows, indent=1)})
        return
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow((*place, "class", "score", "x_min", "y_min", "x_max", "y_max"))
    for row in rows:
        *values, box = row.values()
        writer.writerow((*values, *box))
    write_files(path.parent, {path.name: table.getvalue()})


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    exit_on_sigterm()  # what was found so far is kept
    with exit_with_message():
        main()
