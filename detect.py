"""Find objects in images, and draw them.

In a notebook:

    from detect import detect
    detect("photo.jpg")                                     an annotated copy, as a PIL image
    detect(image, min_score=0.4, suppress=["person"])       a PIL image goes in as well
    boxes, names, scores = find_objects("photo.jpg")        the objects themselves

From the shell:

    python detect.py --images=photo.jpg                     or a folder, or a pattern such as "holiday/*.jpg"
    python detect.py --images=clip.gif                      an animated GIF gives one, at the same speed

Reads the checkpoint that train.py writes. Writes annotated copies, named as the originals, into
`output_folder`. Images that cannot be read are named at the end, and the exit status is then 1.
Any parameter below can be overridden on the command line with --name=value.
"""

import functools
import glob
import itertools
import os
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageSequence
from tqdm import tqdm

from datasets import check_image_file, check_image_size, pil_to_rgb, transform
from model import load_model
from utils import class_colors, exit_with_message, override_parameters, rev_label_map

# Model
checkpoint = "checkpoint_ssd300.pth.tar"  # what detect() and find_objects() use, too, unless given a model

# Data
images = "images"  # a file, a folder (without the folders in it), or a pattern with * or ?
output_folder = "detections"  # made where it is missing; files of an earlier run are written over
batch_size = 8  # frames of an animated GIF that the network sees at once

# Detection
min_score = 0.2  # lowest score of an object that is shown, in [0, 1]; evaluation takes 0.01
max_overlap = 0.5  # of two boxes of a class that overlap more than this, only the better one is kept
top_k = 200  # most objects in an image
suppress = ""  # classes that are not shown, separated by commas; "": none

# Kinds of files that are opened. Not all that Pillow can: EPS, for one, would be run as a program.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "TGA")
# Files whose annotated copy is of the same kind; of all others it is a PNG ...
KEPT_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp")
# ... and files of a folder that are taken for images.
SUFFIXES = (*KEPT_SUFFIXES, ".ppm", ".pgm", ".pbm", ".avif", ".jp2", ".tga")

# How a camera was held (EXIF tag 0x0112) and what turns its image upright.
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

MIN_TEXT_SIZE = 9  # pixels: smaller text cannot be read


def main():
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it is a number of frames, 1 or more")
    paths = list_images(images)
    targets = plan_outputs(paths, Path(output_folder))
    hidden = [name.strip() for name in suppress.split(",") if name.strip()]
    model = load_default_model()
    check_arguments(min_score, max_overlap, top_k, hidden, model.label_map)
    find = functools.partial(
        find_in_batch, min_score=min_score, max_overlap=max_overlap, top_k=top_k, suppress=hidden, model=model
    )
    Path(output_folder).mkdir(parents=True, exist_ok=True)
    errors = []
    for path, target in zip(tqdm(paths, unit="image", disable=len(paths) == 1), targets, strict=True):
        try:
            annotate_file(path, target, find, class_colors(model.label_map))
        except (ValueError, FileNotFoundError) as error:  # one bad file does not stop the others
            errors.append(str(error))
    print(f"{len(paths) - len(errors)} of {len(paths)} images annotated, in {output_folder}")
    if errors:
        raise SystemExit("\n".join(f"error: {error}" for error in errors))


# ----------------------------------------------------------------------------------------------
# Images in, objects out
# ----------------------------------------------------------------------------------------------


def detect(image, min_score=0.2, max_overlap=0.5, top_k=200, suppress=None, model=None):
    """Find objects in an image and draw them on a copy of it.

    The arguments are those of `find_objects()`.
    Returns a new RGB PIL image, upright, of the original's size; the original is never drawn on.
    """
    image = open_image(image)
    model = model or load_default_model()
    (found,) = find_in_batch([image], min_score, max_overlap, top_k, suppress, model)
    return draw_boxes(image, *found, class_colors(model.label_map))


def find_objects(image, min_score=0.2, max_overlap=0.5, top_k=200, suppress=None, model=None):
    """Find objects in an image.

    image: path, or PIL image of any mode. If its EXIF data say that the camera was turned, it is turned
        upright; of a file with several frames, the first is taken, of a PIL image the current one.
    min_score: objects of a higher score only, in [0, 1].
    max_overlap: of two boxes of a class that overlap more than this, in [0, 1], the better one is kept.
    top_k: most objects.
    suppress: names of classes to leave out, a list, or one name.
    model: what `load_model()` returns. By default the checkpoint named at the top of this file, which is
        loaded on the first call and kept; and loaded again if the file or the name has changed.
    Returns boxes_xy_pixels (n, 4) float32, boundary form, inside the upright image, of positive area; a
    list of n class names; a list of n scores, falling.
    Raises FileNotFoundError or ValueError, naming the file or the value, if the image or the checkpoint is
    missing or unreadable, or an argument out of range.
    """
    model = model or load_default_model()
    return find_in_batch([open_image(image)], min_score, max_overlap, top_k, suppress, model)[0]


def find_in_batch(images, min_score, max_overlap, top_k, suppress, model):
    """Find objects in several images at once; a list of what `find_objects()` returns.

    images: list of upright RGB PIL images, of any sizes. The other arguments are those of `find_objects()`.
    """
    hidden = check_arguments(min_score, max_overlap, top_k, suppress, model.label_map)
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.uint8)
    # The preparation of evaluation, so that the scores are those that eval.py counts.
    pixels = torch.stack([transform(image, *nothing, split="TEST")[0] for image in images])
    with torch.inference_mode():
        predicted_locs, predicted_scores = model(model.normalize(pixels))  # (N, P, 4), (N, P, C)
        predicted_scores = hide_classes(predicted_scores, hidden)
        found = model.detect_objects(predicted_locs, predicted_scores, min_score, max_overlap, top_k)
    class_names = rev_label_map(model.label_map)
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
    Returns a tensor of that shape, in which hidden classes have no probability, the background has theirs
    besides its own, and the others have what they had.
    """
    if not hidden:
        return predicted_scores
    hidden = sorted(hidden)
    result = predicted_scores.float().clone()
    result[:, :, 0] = result[:, :, [0, *hidden]].logsumexp(dim=2)
    result[:, :, hidden] = -torch.inf
    return result


def to_pixels(boxes_xy, size):
    """Fractional boxes (n, 4) in pixels of an image of `size` (width, height), cut at its edges."""
    return boxes_xy.clamp(0, 1) * torch.tensor([*size, *size])


def check_arguments(min_score, max_overlap, top_k, suppress, label_map):
    """Refuse arguments of `find_objects()` that are out of range. Returns the labels to leave out, a set."""
    for name, value in (("min_score", min_score), ("max_overlap", max_overlap)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must lie between 0 and 1")
    if top_k < 1 or top_k != int(top_k):
        raise ValueError(f"top_k is {top_k}; it is a number of objects, 1 or more")
    if not label_map:
        raise ValueError("this model has no label_map; load_model() reads it from the checkpoint")
    suppress = [suppress] if isinstance(suppress, str) else suppress or []
    class_names = [name for name, label in label_map.items() if label > 0]
    for name in suppress:
        if name not in class_names:
            known = ", ".join(class_names)
            raise ValueError(f"suppress names {name!r}, which is no class of this model; these are: {known}")
    return {label_map[name] for name in suppress}


def load_default_model():
    """The model of `checkpoint`, as `load_model()` returns it."""
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(
            f"{checkpoint}: no such checkpoint. train.py writes one (`make demo` does so in minutes); "
            "--checkpoint=FILE, or detect.checkpoint in a notebook, names another"
        )
    state = path.stat()
    return load_once(str(path.resolve()), state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=1)
def load_once(path, modified, n_bytes):
    """Load a checkpoint, and keep it until another path, time of change or size is asked for."""
    return load_model(path, "cuda" if torch.cuda.is_available() else "cpu")


# ----------------------------------------------------------------------------------------------
# Opening images
# ----------------------------------------------------------------------------------------------


def open_image(image):
    """An image as an upright RGB copy.

    image: path, or PIL image of any mode.
    Returns a new PIL image. Raises FileNotFoundError or ValueError, naming the file.
    """
    if isinstance(image, Image.Image):
        return make_upright_rgb(image, getattr(image, "filename", "") or "the image")
    with open_file(image) as opened:
        return make_upright_rgb(opened, image)


def open_file(path):
    """Open an image file; its header only is read. Raises FileNotFoundError or ValueError, naming it."""
    if not isinstance(path, (str, Path)):
        kind = type(path).__name__
        raise ValueError(f"an image is a path or a PIL image, not {kind}; PIL.Image.fromarray() takes arrays")
    Image.init()
    try:
        check_image_file(path)
        with warnings.catch_warnings():  # about sizes that make_upright_rgb() refuses
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image file") from None
    except Exception as error:  # Pillow's readers raise errors of many kinds
        raise ValueError(f"{path}: not an image that can be read ({error})") from error


def make_upright_rgb(image, name):
    """A copy of a PIL image in RGB, turned as its EXIF data say. `name` is what an error calls it."""
    if min(image.size) < 1:
        raise ValueError(f"{name}: an image of {image.width} x {image.height} pixels has nothing to look at")
    check_image_size(*image.size, name)
    try:
        image.load()
        upright = pil_to_rgb(image)
    except Exception as error:
        raise ValueError(f"{name}: damaged, it cannot be decoded ({error})") from error
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
    except Exception:  # damaged EXIF data: the pixels are fine
        orientation = None
    upright = upright.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else upright.copy()
    upright.info = {}  # the EXIF data no longer hold
    return upright


# ----------------------------------------------------------------------------------------------
# Drawing
# ----------------------------------------------------------------------------------------------


def draw_boxes(image, boxes_xy_pixels, names, scores, colors):
    """Draw boxes, each with a label that says its class and score.

    Lines and text grow with the image. A label stands above its box, or inside it where there is no room,
    never beyond the image, and where possible not on another label; it is shortened if the image is narrow.

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
        texts = [names[i]] if scores is None else [f"{names[i]} {scores[i]:.2f}", names[i]]
        text, font = fit_text([" ".join(text.split()) for text in texts], image.size, text_size)
        plate = place_label(box, measure_label(text, font), image.size, taken)
        taken.append(plate)
        labels.append((box, plate, text, font, colors[names[i]]))
    for box, _, _, _, color in reversed(labels):
        x_min, y_min, x_max, y_max = box
        # Pillow's rectangles include their last pixel.
        last_x, last_y = max(x_min, x_max - 1), max(y_min, y_max - 1)
        draw.rectangle([x_min, y_min, last_x, last_y], outline=color, width=line_width)
    for _, plate, text, font, color in reversed(labels):
        if text:
            draw_label(draw, plate, text, font, color)
    return image


def fit_text(texts, size, text_size):
    """The first of some texts, ever shorter ones, whose label is not larger than an image.

    texts: list of one or more. size: (width, height) of the image. text_size: in pixels, if there is room.
    Returns a text and its font; the text is empty if not one letter fits.
    """
    letters = [texts[-1][:n] for n in range(len(texts[-1]) - 1, 0, -1)]
    for text in [*texts, *letters]:
        # Halfway down to the smallest readable size before anything is left out.
        for font_size in (text_size, (text_size + MIN_TEXT_SIZE) // 2, MIN_TEXT_SIZE):
            font = load_font(font_size)
            width, height = measure_label(text, font)
            if width <= size[0] and height <= size[1]:
                return text, font
    return "", load_font(MIN_TEXT_SIZE)


@functools.lru_cache(maxsize=32)
def load_font(size):
    return ImageFont.load_default(size)  # Pillow's own: nothing to ship, nothing to look for


def measure_label(text, font):
    """Width and height of a label, in pixels."""
    left, _, right, _ = font.getbbox(text, anchor="ls")
    ascent, descent = font.getmetrics()
    return right - left + 2 * find_padding(font), ascent + descent


def find_padding(font):
    return max(1, round(font.size / 5))


def place_label(box, label_size, image_size, taken):
    """Where a label goes: above its box, or inside it at the top, or at the bottom, or below it.

    box: its box. label_size, image_size: (width, height). taken: boxes of the labels that are placed already.
    All in pixels, boundary form. Returns the label's box, inside the image if the label is not larger.
    """
    x_min, y_min, _, y_max = box
    width, height = label_size
    x = max(0, min(x_min, image_size[0] - width))
    lowest = max(0, image_size[1] - height)
    tops = [y for y in (y_min - height, y_min, y_max - height, y_max) if 0 <= y <= lowest]
    places = [(x, y, x + width, y + height) for y in tops or [min(y_min, lowest)]]
    return next((place for place in places if not any(touch(place, other) for other in taken)), places[0])


def touch(box_1, box_2):
    return box_1[0] < box_2[2] and box_2[0] < box_1[2] and box_1[1] < box_2[3] and box_2[1] < box_1[3]


def draw_label(draw, plate, text, font, color):
    """Draw a text on a plate of some colour, black or white, whichever has more contrast."""
    draw.rectangle([plate[0], plate[1], plate[2] - 1, plate[3] - 1], fill=color)
    left, _, _, _ = font.getbbox(text, anchor="ls")
    ascent, _ = font.getmetrics()
    place = (plate[0] + find_padding(font) - left, plate[1] + ascent)
    draw.text(place, text, fill=pick_text_color(color), font=font, anchor="ls")


def pick_text_color(color):
    """Black or white, whichever has more contrast to a colour: always 4.5 : 1 or more, in WCAG's terms."""
    red, green, blue = ((value / 255) ** 2.2 for value in ImageColor.getrgb(color))
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "white"


# ----------------------------------------------------------------------------------------------
# Files in, files out
# ----------------------------------------------------------------------------------------------


def list_images(images):
    """The image files that the parameter `images` stands for, sorted.

    Raises FileNotFoundError if there are none.
    """
    path = Path(images)
    if path.is_dir():
        paths = [item for item in path.iterdir() if item.suffix.lower() in SUFFIXES and not item.is_dir()]
        if not paths:
            raise FileNotFoundError(f"images={images!r}: no images in this folder ({', '.join(SUFFIXES)})")
    elif path.exists():
        paths = [path]
    else:
        paths = [Path(item) for item in glob.glob(images, recursive=True) if not Path(item).is_dir()]
        if not paths:
            raise FileNotFoundError(f"images={images!r}: no such file, folder, or pattern that fits a file")
    return sorted(paths)


def plan_outputs(paths, folder):
    """The file that each annotated copy is written to.

    Raises ValueError, naming the files, if two would get the same one, or an original would be written over.
    """
    sources = {os.path.realpath(path) for path in paths}
    targets = {}
    for path in paths:
        suffix = path.suffix.lower()
        if is_gif(path) and suffix != ".gif":  # whatever its name says: it may be an animation
            target = folder / f"{path.name}.gif"
        else:
            target = folder / (path.name if suffix in KEPT_SUFFIXES else f"{path.name}.png")
        if os.path.realpath(target) in sources:
            raise ValueError(f"{target}: an original would be written over; choose another output_folder")
        if target in targets:
            both = f"{targets[target]} and {path}"
            raise ValueError(f"{both} would both be written to {target}; take one at a time")
        targets[target] = path
    return list(targets)


def is_gif(path):
    """Whether a file begins as a GIF does. One that cannot be read does not."""
    try:
        with open(path, "rb") as file:
            return file.read(6) in (b"GIF87a", b"GIF89a")
    except OSError:
        return False


def annotate_file(path, target, find, colors):
    """Write an annotated copy of an image file; of an animated GIF, an animated GIF.

    find: `find_in_batch()` with all arguments but the images. colors: as `draw_boxes()` takes them.
    Raises FileNotFoundError or ValueError, naming it, for a file that cannot be read; OSError for one that
    cannot be written.
    """
    with open_file(path) as image:
        n_frames = count_frames(image, path)
        if n_frames > 1:
            frames = annotate_frames(image, path, find, colors)
            frames = iter(tqdm(frames, path.name, n_frames, unit="frame"))
            # Frames carry their duration; how often all are repeated is said once, or not at all: once.
            loop = {"loop": image.info["loop"]} if "loop" in image.info else {}
            save_image(next(frames), target, save_all=True, append_images=frames, **loop)
            return
        upright = make_upright_rgb(image, path)
    (found,) = find([upright])
    save_image(draw_boxes(upright, *found, colors), target)


def count_frames(image, path):
    """How many frames an animated GIF has; 1 for all else. Raises ValueError, naming the file."""
    if image.format != "GIF":
        return 1
    try:
        return image.n_frames
    except Exception as error:
        raise ValueError(f"{path}: damaged, its frames cannot be counted ({error})") from error


def annotate_frames(animation, path, find, colors):
    """Annotate the frames of an animation one after the other; the network sees `batch_size` of them at once."""
    frames = iter_frames(animation, path)
    while batch := list(itertools.islice(frames, batch_size)):
        for frame, found in zip(batch, find(batch), strict=True):
            annotated = draw_boxes(frame, *found, colors)
            annotated.info = frame.info
            yield annotated


def iter_frames(animation, path):
    """The frames of an animation as RGB images, each with its duration in milliseconds in its `info`."""
    frames = ImageSequence.Iterator(animation)
    for number in itertools.count(1):
        try:
            frame = next(frames)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(f"{path}: damaged, frame {number} cannot be decoded ({error})") from error
        duration = {"duration": frame.info["duration"]} if "duration" in frame.info else {}
        frame = make_upright_rgb(frame, f"{path}, frame {number}")
        frame.info = duration
        yield frame


def save_image(image, target, **options):
    if target.suffix.lower() in (".jpg", ".jpeg", ".webp"):
        options["quality"] = 95
    try:
        image.save(target, **options)
    except OSError as error:
        raise OSError(f"{target}: could not be written ({error})") from error


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    with exit_with_message():
        main()
