"""Find objects in images, and draw them.

In a notebook:

    from detect import detect
    detect("photo.jpg")                                     an annotated copy, as a PIL image
    detect(image, min_score=0.4, suppress=["person"])       a PIL image goes in as well
    boxes, names, scores = find_objects("photo.jpg")        the objects themselves

From the shell:

    python detect.py --images=photo.jpg                     or a folder, or a pattern such as "holiday/*.jpg"
    python detect.py --images=holiday --recursive=True --write_boxes_to=found.csv
    python detect.py --images=clip.gif                      an animated GIF gives an animated GIF

Reads the checkpoint that train.py writes. Writes annotated copies, named as the originals, into `output_folder`,
and a list of the objects where `write_boxes_to` says. Images that cannot be read are named at the end, and the
exit status is then 1. Any parameter below can be overridden on the command line with --name=value.
"""

import csv
import functools
import glob
import io
import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps, ImageSequence
from tqdm import tqdm

from datasets import IMAGE_FORMATS, check_image_file, check_image_size, pil_to_rgb, prepare
from model import load_model
from utils import IMAGE_SUFFIXES, class_colors, exit_with_message, override_parameters, printable, write_file

# Model
checkpoint = "checkpoint_ssd300.pth.tar"  # what detect() and find_objects() use, too, unless given a model

# Data
images = "images"  # a file, a folder, or a pattern with * or ?
recursive = False  # True: the folders in a folder as well
output_folder = "detections"  # made where it is missing; files of an earlier run are written over
write_boxes_to = ""  # a .csv or .json file: image, class, score and box in pixels of each object; "": none
batch_size = 4  # images, or frames of an animated GIF, that the network sees at once; fewer where they are large
workers = 2  # threads that read and write images while the network works

# Detection: the defaults of detect() and find_objects(), too
min_score = 0.2  # lowest score of an object that is shown, in [0, 1]; evaluation takes 0.01
max_overlap = 0.45  # of two boxes of a class that overlap more than this, only the better one is kept
top_k = 200  # most objects in an image
suppress = ""  # classes that are not shown, separated by commas; "": none

# Files whose annotated copy is of the same kind; of all others it is a PNG.
KEPT_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp")
PIXELS_AT_ONCE = 50_000_000  # a batch of images is complete when it has as many: 150 MB
MIN_TEXT_SIZE = 9  # pixels: smaller text cannot be read


def main():
    if batch_size < 1 or workers < 1:
        raise ValueError(f"batch_size={batch_size} and workers={workers} must both be 1 or more")
    file = Path(write_boxes_to or "none.csv")
    if file.suffix not in (".csv", ".json") or not file.parent.is_dir():
        raise ValueError(f"write_boxes_to is {write_boxes_to!r}; it must end in .csv or .json, in a folder that exists")
    paths = list_images(images, recursive)
    targets = plan_outputs(paths, Path(output_folder))
    model = load_default_model()
    check_arguments(model.label_map)
    rows, errors = annotate_files(paths, targets, model)
    if write_boxes_to:
        write_boxes(rows, file)
    print(f"{len(paths) - len(errors)} of {len(paths)} images annotated, in {output_folder}; {len(rows)} objects")
    if others := sorted(set(list_files(images, recursive)) - set(paths)):
        names = printable(", ".join(path.name for path in others), 1000)
        print(f"{len(others)} other files, not named like images that can be read: {names}")
    if errors:
        raise SystemExit("\n".join(f"error: {error}" for error in errors))


# --- Images in, objects out -----------------------------------------------------------------------


def detect(image, min_score=None, max_overlap=None, top_k=None, suppress=None, model=None):
    """Find objects in an image and draw them on a copy of it.

    The arguments are those of `find_objects()`.
    Returns a new RGB PIL image, upright, of the original's size; the original is never drawn on.
    """
    image = open_image(image)
    model = model or load_default_model()
    (found,) = find_in_batch([image], model, min_score, max_overlap, top_k, suppress)
    return draw_boxes(image, *found, class_colors(model.label_map))


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
    return find_in_batch([image], model or load_default_model(), min_score, max_overlap, top_k, suppress)[0]


def find_in_batch(images, model, min_score=None, max_overlap=None, top_k=None, suppress=None):
    """Find objects in several images at once; a list of what `find_objects()` returns.

    images: list of upright RGB PIL images, of any sizes. The other arguments are those of `find_objects()`.
    """
    *limits, hidden = check_arguments(model.label_map, min_score, max_overlap, top_k, suppress)
    with torch.inference_mode():
        predicted_locs, predicted_scores = model(prepare(images, model))  # (N, P, 4), (N, P, C)
        predicted_scores = hide_classes(predicted_scores, hidden)
        found = model.detect_objects(predicted_locs, predicted_scores, *limits)
    class_names = {label: name for name, label in model.label_map.items()}
    results = []
    for image, boxes_xy, labels, scores in zip(images, *found, strict=True):
        boxes_xy_pixels = to_pixels(boxes_xy.cpu().float(), image.size)
        keep = (boxes_xy_pixels[:, 2:] > boxes_xy_pixels[:, :2]).all(dim=1)  # some area inside the image
        names = [class_names[label] for label in labels.cpu()[keep].tolist()]
        results.append((boxes_xy_pixels[keep], names, scores.cpu()[keep].tolist()))
    return results


def hide_classes(predicted_scores, hidden):
    """Count some classes as background, before anything is found: what is hidden takes no other object's place.

    predicted_scores: (N, P, C) float tensor, before the softmax. hidden: set of labels, without 0.
    Returns such a tensor: hidden classes have no probability, the background has theirs, the others have their own.
    """
    if not hidden:
        return predicted_scores
    hidden, result = sorted(hidden), predicted_scores.float().clone()
    result[:, :, 0] = result[:, :, [0, *hidden]].logsumexp(dim=2)
    result[:, :, hidden] = -torch.inf
    return result


def to_pixels(boxes_xy, size):
    """Fractional boxes (n, 4) in pixels of an image of `size` (width, height), cut at its edges."""
    return boxes_xy.clamp(0, 1) * torch.tensor([*size, *size])


def check_arguments(label_map, *arguments):
    """Put the parameters at the top of this file in the place of arguments that are None, and check them all.

    arguments: min_score, max_overlap, top_k and suppress, as `find_objects()` takes them, or none of them.
    Returns the first three, and the labels to leave out, a set.
    """
    pairs = itertools.zip_longest(arguments, (min_score, max_overlap, top_k, suppress))
    lowest, overlap, n_objects, names = (default if given is None else given for given, default in pairs)
    for name, value in (("min_score", lowest), ("max_overlap", overlap)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must lie between 0 and 1")
    if n_objects < 1 or not float(n_objects).is_integer():
        raise ValueError(f"top_k is {n_objects}; it is a number of objects, 1 or more")
    if not label_map:
        raise ValueError("this model has no label_map; load_model() reads it from the checkpoint")
    names = [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else names
    class_names = [name for name, label in label_map.items() if label > 0]
    for name in names:
        if name not in class_names:
            known = printable(", ".join(class_names), 1000)
            raise ValueError(f"suppress names {name!r}, which is not a class of this model; these are: {known}")
    return lowest, overlap, int(n_objects), {label_map[name] for name in names}


def load_default_model():
    """The model of `checkpoint`, as `load_model()` returns it."""
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(
            f"{checkpoint}: no such checkpoint. train.py writes one (`make demo` does so in minutes); "
            "--checkpoint=FILE, or detect.checkpoint in a notebook, names another"
        )
    return load_once(str(path.resolve()), path.stat().st_mtime_ns, path.stat().st_size)


@functools.lru_cache(maxsize=1)
def load_once(path, modified, n_bytes):
    """Load a checkpoint, and keep it until another path, time of change or size is asked for."""
    return load_model(path, "cuda" if torch.cuda.is_available() else "cpu")


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
    line_width, text_size = max(1, round(side / 220)), max(MIN_TEXT_SIZE, round(side / 34))
    labels, taken = [], []
    for i in sorted(range(len(names)), key=lambda i: -scores[i] if scores is not None else 0):
        box = [round(float(v)) for v in boxes_xy_pixels[i]]
        name = printable(names[i], 100)
        text, font = fit_text(name if scores is None else f"{name} {scores[i]:.2f}", name, image.size, text_size)
        plate = place_label(box, measure_label(text, font), image.size, taken)
        taken.append(plate)
        labels.append((box, plate, text, font, colors[names[i]]))
    for (x_min, y_min, x_max, y_max), *_, color in reversed(labels):
        # Pillow's rectangles include their last pixel.
        corners = [x_min, y_min, max(x_min, x_max - 1), max(y_min, y_max - 1)]
        draw.rectangle(corners, outline=color, width=line_width)
    for _, *label in reversed([label for label in labels if label[2]]):  # no text: no room for one letter
        draw_label(draw, *label)
    return image


def fit_text(text, name, size, text_size):
    """A text whose label is not larger than an image of `size`: the given one, or else the start of the name, small.

    Returns a text and its font; the text is empty if not one letter fits.
    """
    font = load_font(text_size)
    if all(side <= limit for side, limit in zip(measure_label(text, font), size, strict=True)):
        return text, font
    font = load_font(MIN_TEXT_SIZE)
    (empty, height), (one_letter, _) = measure_label("", font), measure_label("W", font)  # no letter is wider
    n_letters = (size[0] - empty) // (one_letter - empty) if height <= size[1] else 0
    return name[: max(0, n_letters)], font


load_font = functools.lru_cache(maxsize=32)(ImageFont.load_default)  # Pillow's own: nothing to look for


def measure_label(text, font):
    """Width and height of a label, in pixels."""
    left, _, right, _ = font.getbbox(text, anchor="ls")
    return right - left + 2 * (font.size // 5), sum(font.getmetrics())


def place_label(box, label_size, image_size, taken):
    """Where a label goes: above its box, or inside it at the top, or at the bottom, or below it.

    box: its box. label_size, image_size: (width, height). taken: boxes of the labels that are placed already.
    All in pixels, boundary form. Returns the label's box, inside the image if the label is not larger.
    """
    x_min, y_min, _, y_max = box
    width, height = label_size
    left, lowest = max(0, min(x_min, image_size[0] - width)), max(0, image_size[1] - height)
    tops = [y for y in (y_min - height, y_min, y_max - height, y_max) if 0 <= y <= lowest] or [min(y_min, lowest)]
    for top in tops:  # the first place that touches no other label
        if not any(x < left + width and left < x_2 and y < top + height and top < y_2 for x, y, x_2, y_2 in taken):
            break
    else:
        top = tops[0]
    return left, top, left + width, top + height


def draw_label(draw, plate, text, font, color):
    """Draw a text on a plate of some colour, black or white, whichever has more contrast."""
    draw.rectangle([plate[0], plate[1], plate[2] - 1, plate[3] - 1], fill=color)
    place = plate[0] + font.size // 5 - font.getbbox(text, anchor="ls")[0], plate[1] + font.getmetrics()[0]
    draw.text(place, text, fill=pick_text_color(color), font=font, anchor="ls")


def pick_text_color(color):
    """Black or white, whichever has more contrast to a colour: always 4.5 : 1 or more, in WCAG's terms."""
    red, green, blue = ((value / 255) ** 2.2 for value in ImageColor.getrgb(color))
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"


# --- Files in, files out --------------------------------------------------------------------------


def list_images(images, recursive=False):
    """The image files that `images` stands for, sorted; of a folder, those named as images. FileNotFoundError: none."""
    is_folder = Path(images).is_dir()
    files = [path for path in list_files(images, recursive) if not is_folder or path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        reason = f"no image in it ({', '.join(IMAGE_SUFFIXES)})" if is_folder else "no such file, folder, or pattern"
        raise FileNotFoundError(f"images={images!r}: there is {reason}")
    return files


def list_files(images, recursive):
    """All files that the parameter `images` stands for, sorted; of a folder no hidden ones, nor earlier outputs."""
    folder = Path(images)
    if not folder.is_dir():
        files = [folder] if folder.exists() else map(Path, glob.glob(images, recursive=True))
        return sorted(file for file in files if not file.is_dir())
    files = [file for file in folder.glob("**/*" if recursive else "*") if not file.is_dir()]
    if recursive:
        files = [file for file in files if Path(output_folder).resolve() not in file.resolve().parents]
    return sorted(file for file in files if not any(part[0] == "." for part in file.relative_to(folder).parts))


def plan_outputs(paths, folder):
    """The file that each annotated copy is written to, by path; its place in `folder` is that of the original in its.

    Raises ValueError, naming the files, if two would get the same one, or an original would be written over.
    """
    sources = {os.path.realpath(path) for path in paths}
    originals = {}  # by target
    for path in paths:
        name = path.name if path.suffix.lower() in KEPT_SUFFIXES else f"{path.name}.png"
        target = folder / (path.parent.relative_to(images) if Path(images).is_dir() else "") / name
        if os.path.realpath(target) in sources:
            raise ValueError(f"{target}: an original would be written over; choose another output_folder")
        if target in originals:
            raise ValueError(f"{originals[target]} and {path} would both be written to {target}; take one at a time")
        originals[target] = path
    return {path: target for target, path in originals.items()}


def annotate_files(paths, targets, model):
    """Find the objects of image files and write annotated copies, in several threads that take a batch each.

    So while the network looks at some images, the next ones are read and the last ones written.
    targets: the files to write, as `plan_outputs()` returns them.
    Returns rows (image, class, score, box in pixels) of all objects, and what is wrong with files that could not be
    read, a list. Raises OSError for a file that cannot be written.
    """
    stills = [path for path in paths if path.suffix.lower() != ".gif"]
    jobs = [stills[i : i + batch_size] for i in range(0, len(stills), batch_size)]
    jobs += [[path] for path in paths if path.suffix.lower() == ".gif"]
    n_threads = max(1, torch.get_num_threads() // workers)  # of each worker: no more in all than there are now
    rows, errors = [], []
    with (
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(n_threads,)) as pool,
        tqdm(total=len(jobs), unit="batch", disable=len(jobs) == 1) as progress,
    ):
        for found, wrong in pool.map(lambda job: annotate_job(job, targets, model), jobs):
            rows += found
            errors += wrong
            progress.update()
    return rows, errors


def annotate_job(paths, targets, model):
    """Do the work of `annotate_files()` for one GIF, or for several files that are not GIFs."""
    rows, errors = [], []

    def read_images():
        for path in paths:
            try:
                yield path, open_image(path)
            except (ValueError, FileNotFoundError) as error:  # one bad file does not stop the others
                errors.append(str(error))

    if paths[0].suffix.lower() != ".gif":
        for path, annotated in annotate_images(read_images(), model, rows):
            save_image(annotated, targets[path])
        return rows, errors
    try:
        annotate_gif(paths[0], targets[paths[0]], model, rows)
    except (ValueError, FileNotFoundError) as error:
        return [], [str(error)]
    return rows, []


def annotate_images(images, model, rows):
    """Find objects in images and draw them. The network sees `batch_size` at once, or fewer where they are large.

    images: iterator of (name, upright image). rows: list to which the objects are added, see `annotate_files()`.
    Yields (name, annotated copy).
    """
    colors = class_colors(model.label_map)
    while True:
        batch, n_pixels = [], 0
        while len(batch) < batch_size and n_pixels < PIXELS_AT_ONCE and (item := next(images, None)):
            batch.append(item)
            n_pixels += item[1].width * item[1].height
        if not batch:
            return
        for (name, image), found in zip(batch, find_in_batch([image for _, image in batch], model), strict=True):
            boxes = [[round(value, 2) for value in box] for box in found[0].tolist()]
            rows += [(str(name), *row) for row in zip(found[1], found[2], boxes, strict=True)]
            yield name, draw_boxes(image, *found, colors)


def annotate_gif(path, target, model, rows):
    """Write an annotated copy of a GIF, animated if it is. In `rows`, its frames are called path#1, path#2, ..."""
    with open_file(path) as animation:
        frames = (annotated for _, annotated in annotate_images(iter_frames(animation, path), model, rows))
        # Frames carry their duration; how often all are repeated is said once, or not at all: once.
        loop = {"loop": animation.info["loop"]} if "loop" in animation.info else {}
        save_image(next(frames), target, save_all=True, append_images=frames, **loop)


def iter_frames(animation, path):
    """The frames of an animation as (name, RGB image), each with its duration in milliseconds in its `info`."""
    number = 0
    try:
        for number, frame in enumerate(ImageSequence.Iterator(animation), start=1):
            upright = make_upright_rgb(frame, path)
            upright.info = {key: value for key, value in frame.info.items() if key == "duration"}
            yield f"{path}#{number}", upright
    except Exception as error:
        raise ValueError(f"{path}: damaged after frame {number} ({printable(error)})") from error


def save_image(image, target, **options):
    if target.suffix.lower() in (".jpg", ".jpeg", ".webp"):
        options["quality"] = 95
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target, **options)
    except OSError as error:
        raise OSError(f"{target}: could not be written ({error})") from error


def write_boxes(rows, path):
    """Write the rows of `annotate_files()` to a .csv or .json file: all of them, or nothing."""
    if path.suffix == ".json":
        objects = [dict(zip(("image", "class", "score", "box"), row, strict=True)) for row in rows]
        return write_file(path, json.dumps(objects, indent=1))
    table = io.StringIO(newline="")
    csv.writer(table).writerow(("image", "class", "score", "x_min", "y_min", "x_max", "y_max"))
    csv.writer(table).writerows((*row, *box) for *row, box in rows)
    write_file(path, table.getvalue())


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    with exit_with_message():
        main()
