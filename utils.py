"""The parts that the scripts share, in the order in which the pipeline needs them.

    1. Boxes                        coordinate forms and overlap
    2. Labels and colours           class names, label maps, one colour a class
    3. Checkpoints                  saved whole or not at all, loaded without running code
    4. Parameters                   `--name=value` for the block at the top of each script

Box coordinates are continuous: a box covers [x_min, x_max) x [y_min, y_max), and the whole image is
[0, 0, W, H]. They are fractions of the image's width and height unless a name says `pixels`. Names say
the form:

    xy       boundary      (x_min, y_min, x_max, y_max)
    cxcy     center-size   (c_x, c_y, w, h)
    gcxgcy   offsets       (g_c_x, g_c_y, g_w, g_h), of a box from a prior

Shapes in comments: N images in a batch, P = 8732 priors, C classes (background included), M objects.
"""

import ast
import contextlib
import glob
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch

# A header that claims more pixels than this is refused before anything is allocated for it.
MAX_IMAGE_PIXELS = 80_000_000

# ----------------------------------------------------------------------------------------------
# 1. Boxes
# ----------------------------------------------------------------------------------------------


def xy_to_cxcy(boxes_xy):
    """Boxes from boundary to center-size form.

    boxes_xy: (..., 4) float tensor, boundary form, fractional or in pixels.
    Returns a (..., 4) tensor in center-size form, in the same unit.
    """
    mins, maxs = boxes_xy[..., :2], boxes_xy[..., 2:]
    return torch.cat([(mins + maxs) / 2, maxs - mins], dim=-1)


def cxcy_to_xy(boxes_cxcy):
    """Boxes from center-size to boundary form: the inverse of `xy_to_cxcy()`.

    boxes_cxcy: (..., 4) float tensor, center-size form, fractional or in pixels.
    Returns a (..., 4) tensor in boundary form, in the same unit.
    """
    centers, half_sizes = boxes_cxcy[..., :2], boxes_cxcy[..., 2:] / 2
    return torch.cat([centers - half_sizes, centers + half_sizes], dim=-1)


# The Caffe code's "variances": they bring the offsets of a typical match to about unit size, so that the
# two losses weigh about the same. (Offsets of the centre are divided by 0.1, of the size by 0.2.)
CENTER_VARIANCE = 0.1
SIZE_VARIANCE = 0.2


def cxcy_to_gcxgcy(boxes_cxcy, priors_cxcy):
    """Encode boxes as offsets from priors (SSD paper, equation 2; variances from the Caffe code).

    boxes_cxcy: (..., P, 4) float tensor, center-size form, fractional, of positive width and height.
    priors_cxcy: (P, 4) float tensor, center-size form, fractional: one prior for each box.
    Returns the (..., P, 4) offsets, without unit.
    """
    g_centers = (boxes_cxcy[..., :2] - priors_cxcy[..., :2]) / (priors_cxcy[..., 2:] * CENTER_VARIANCE)
    g_sizes = torch.log(boxes_cxcy[..., 2:] / priors_cxcy[..., 2:]) / SIZE_VARIANCE
    return torch.cat([g_centers, g_sizes], dim=-1)


def gcxgcy_to_cxcy(offsets_gcxgcy, priors_cxcy):
    """Decode offsets from priors into boxes: the inverse of `cxcy_to_gcxgcy()`.

    offsets_gcxgcy: (..., P, 4) float tensor, as a model predicts them.
    priors_cxcy: (P, 4) float tensor, center-size form, fractional: one prior for each row of offsets.
    Returns (..., P, 4) boxes in center-size form, fractional; they may reach beyond the image.
    """
    centers = offsets_gcxgcy[..., :2] * CENTER_VARIANCE * priors_cxcy[..., 2:] + priors_cxcy[..., :2]
    sizes = torch.exp(offsets_gcxgcy[..., 2:] * SIZE_VARIANCE) * priors_cxcy[..., 2:]
    return torch.cat([centers, sizes], dim=-1)


def find_intersection(boxes_1_xy, boxes_2_xy):
    """Area that each box of one set shares with each box of another.

    boxes_1_xy: (..., n1, 4), boxes_2_xy: (..., n2, 4) float tensors, boundary form, in the same unit.
    Returns a (..., n1, n2) tensor, in that unit squared; 0 where two boxes only touch.
    """
    # One coordinate at a time, contiguous: three times as fast as with coordinates in the last dimension.
    x_min_1, y_min_1, x_max_1, y_max_1 = boxes_1_xy.movedim(-1, 0).contiguous()[..., :, None]  # (..., n1, 1)
    x_min_2, y_min_2, x_max_2, y_max_2 = boxes_2_xy.movedim(-1, 0).contiguous()[..., None, :]  # (..., 1, n2)
    widths = torch.minimum(x_max_1, x_max_2).sub_(torch.maximum(x_min_1, x_min_2)).clamp_(min=0)
    heights = torch.minimum(y_max_1, y_max_2).sub_(torch.maximum(y_min_1, y_min_2)).clamp_(min=0)
    return widths.mul_(heights)  # (..., n1, n2)


def find_jaccard_overlap(boxes_1_xy, boxes_2_xy):
    """Overlap (Jaccard index, intersection over union) of each box of one set with each of another.

    boxes_1_xy: (..., n1, 4), boxes_2_xy: (..., n2, 4) float tensors, boundary form, in the same unit.
    Returns a (..., n1, n2) tensor in [0, 1]; 0 for two boxes of no area.
    """
    intersection = find_intersection(boxes_1_xy, boxes_2_xy)
    areas_1 = (boxes_1_xy[..., 2:] - boxes_1_xy[..., :2]).prod(dim=-1)  # (..., n1)
    areas_2 = (boxes_2_xy[..., 2:] - boxes_2_xy[..., :2]).prod(dim=-1)  # (..., n2)
    union = (areas_1[..., :, None] + areas_2[..., None, :]).sub_(intersection)
    return intersection.div_(union.clamp_(min=torch.finfo(union.dtype).tiny))  # 0 / 0 is to be 0


# ----------------------------------------------------------------------------------------------
# 2. Labels and colours
# ----------------------------------------------------------------------------------------------

voc_labels = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def make_label_map(class_names):
    """Number the classes from 1, in the order given; 0 is the background.

    class_names: sequence of strings, without "background".
    Returns a dict of name to label: {"background": 0, first name: 1, ...}.
    Raises ValueError if a name is empty, no string, given twice, or "background", and if there is none.
    """
    if not class_names or isinstance(class_names, str):
        raise ValueError(f"class_names must be a sequence with at least one name, not {class_names!r}")
    label_map = {"background": 0}
    for name in class_names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{name!r} is no class name: a name is a string that is not empty")
        if name in label_map:
            reason = "label 0 has this name" if name == "background" else "the name is given twice"
            raise ValueError(f"{name!r} cannot be a class: {reason}")
        label_map[name] = len(label_map)
    return label_map


def rev_label_map(label_map):
    """The names by their labels: the inverse of a label map.

    label_map: dict of name to label, no label twice.
    Returns a dict of label to name.
    """
    return {label: name for name, label in label_map.items()}


def load_label_map(data_folder):
    """Read the label map that `create_data_lists()` wrote.

    data_folder: the folder with label_map.json.
    Returns a dict of name to label: "background" is 0, the classes are 1, 2, ... without a gap.
    Raises FileNotFoundError if the file is missing; ValueError, naming it, if it holds anything else.
    """
    path = os.path.join(data_folder, "label_map.json")
    try:
        with open(path, encoding="utf-8") as file:
            label_map = json.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; create_data_lists.py writes it") from None
    except (OSError, ValueError, RecursionError) as error:  # json raises RecursionError on a thousand brackets
        raise ValueError(f"{path}: cannot be read ({error}); run create_data_lists.py again") from None
    labels = list(label_map.values()) if isinstance(label_map, dict) else []
    are_numbers = all(type(label) is int for label in labels)
    if not are_numbers or sorted(labels) != list(range(max(len(labels), 2))) or label_map.get("background") != 0:
        raise ValueError(
            f'{path}: not a label map ("background": 0 and one class or more, numbered from 1 on without gaps); '
            "run create_data_lists.py again"
        )
    return dict(sorted(label_map.items(), key=lambda item: item[1]))


def class_colors(label_map):
    """A colour for each class: far apart to the eye, bright enough for black letters, always the same.

    Each next class takes, of a grid of colours that are neither pale nor dark, the one whose nearest colour
    so far is farthest away. A label's colour thus does not depend on how many classes follow. Distances are
    measured in the OKLab colour space (B. Ottosson, 2020), where they are about as large as they look.

    label_map: dict of name to label.
    Returns a dict of name to "#rrggbb" for every class but the background. (More classes than the grid has
    colours, over two thousand, share some.)
    """
    levels = np.arange(0, 256, 15)
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    oklab = _rgb_to_oklab(rgb)  # (colours, 3): lightness, green-red, blue-yellow
    legible = (oklab[:, 0] > 0.6) & (oklab[:, 0] < 0.9) & (np.hypot(oklab[:, 1], oklab[:, 2]) > 0.1)
    rgb, oklab = rgb[legible], oklab[legible]

    colors = []
    distances = -oklab[:, 0] + np.hypot(oklab[:, 1], oklab[:, 2])  # the first colour: a strong one
    for _ in range(min(len(label_map) - 1, len(rgb))):
        chosen = int(distances.argmax())
        to_chosen = np.linalg.norm(oklab - oklab[chosen], axis=1)
        distances = np.minimum(distances, to_chosen) if colors else to_chosen
        colors.append("#{:02x}{:02x}{:02x}".format(*rgb[chosen]))
    names = [name for name, label in sorted(label_map.items(), key=lambda item: item[1]) if label > 0]
    return {name: colors[i % len(colors)] for i, name in enumerate(names)}


def _rgb_to_oklab(rgb):
    """(n, 3) sRGB colours in [0, 255] as (n, 3) float OKLab; the matrices are those of OKLab's definition."""
    fractions = rgb / 255
    linear = np.where(fractions > 0.04045, ((fractions + 0.055) / 1.055) ** 2.4, fractions / 12.92)
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_oklab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.cbrt(linear @ np.transpose(to_cones)) @ np.transpose(to_oklab)


# ----------------------------------------------------------------------------------------------
# 3. Checkpoints
# ----------------------------------------------------------------------------------------------

CHECKPOINT_FORMAT = "ssd300/1"  # written into every checkpoint: how load_checkpoint() knows its own


def save_checkpoint(checkpoint, path):
    """Write a checkpoint so that `path` holds either the old file or the new one, whole, at every moment.

    The bytes go to a temporary file in the same folder, are forced to the disk, and take the name `path`
    by one rename, which a file system does completely or not at all.

    checkpoint: dict of tensors, state dicts, numbers, strings and containers of these; nothing else could
    be read back with `weights_only=True`.
    Raises OSError, naming the file, if the folder is missing or the disk full; the old file is untouched.
    """
    try:
        write_file(path, lambda file: torch.save({"format": CHECKPOINT_FORMAT, **checkpoint}, file))
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        raise OSError(f"{path}: could not write the checkpoint, the one before it is unchanged: {error}") from error


def write_file(path, contents):
    """Write a file so that `path` holds either the old one or the new one, whole, at every moment.

    contents: bytes, or a function that writes them to the open file which it is given.
    Raises OSError, or what the function raises; the old file is untouched then.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            contents(file) if callable(contents) else file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.[0-9]*.tmp"):  # of runs killed while they wrote
        leftover.unlink(missing_ok=True)


def _sync_folder(folder):
    """Force a rename in `folder` to the disk, where the system can (neither Windows nor every network drive)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_checkpoint(path, device="cpu"):
    """Read a checkpoint of ours, without running any code that the file may carry.

    path: a file that `save_checkpoint()` wrote.
    device: where its tensors go, wherever they were when saved.
    Returns the dict that was saved.
    Raises FileNotFoundError if there is no such file; ValueError, naming it, if it is truncated, was not
    written by this repo, or holds pickled objects.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint (train.py makes one)")
    try:
        _check_archive(path)
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        _check_tensors(checkpoint)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: truncated, or no checkpoint of this repo at all") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused, for it holds more than tensors and numbers, which could run code. If it is another "
            "SSD's, tools/convert_weights.py may read its weights"
        ) from error
    except Exception as error:  # torch.load raises errors of many kinds for a file that is not what it should be
        raise ValueError(f"{path}: damaged, or no checkpoint of this repo ({shorten(error, 200)})") from error
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if found != CHECKPOINT_FORMAT:
        found = found[:40] if isinstance(found, str) else "none"
        raise ValueError(
            f"{path}: not a checkpoint of this repo (expected {CHECKPOINT_FORMAT}, found {found}). If it is another "
            "SSD's, tools/convert_weights.py may read its weights"
        )
    return checkpoint


@contextlib.contextmanager
def errors_in_words():
    """End a script whose input, or machine, is at fault with `error: ` and what is wrong, in place of a traceback.

    Of an error from a data loader's process this is what was said there. All other errors pass.
    """
    try:
        yield
    except (FloatingPointError, OSError, ValueError) as error:
        text = str(error).rpartition(f"\n{type(error).__name__}: ")[2].strip()
        raise SystemExit(f"error: {text}") from error
    except (RuntimeError, MemoryError) as error:
        advice = find_advice(error)
        if advice is None:
            raise
        raise SystemExit(f"error: {advice}\n{error}") from error


def find_advice(error):
    """What to change after an error that the machine caused, in words; None for any other error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in text:  # the latter is cuBLAS's and cuDNN's
        return "out of memory on the GPU; a smaller --batch_size needs less (in training, with a lower --lr)"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "out of memory on the CPU; fewer --workers, or a smaller --batch_size, need less"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return "torch.compile failed; it needs a C compiler and Triton. --compile_model=False goes on without it"
    if "shared memory" in text or "Too many open files" in text or "Bus error" in text:
        return (
            "the processes that prepare images ran out of shared memory, or of open files. Enlarge /dev/shm "
            "(docker run --shm-size=8g) or `ulimit -n`; or take fewer --workers (0 needs none of both)"
        )
    if "No space left" in text:
        return "the disk is full; free some space, or write to another (train.py: --save_to, --log_file)"
    if "DataLoader worker (pid" in text or "DataLoader timed out" in text:
        return (
            "a process that prepares images died, or hung. If the system killed it, memory was short: take fewer "
            "--workers, or a smaller --batch_size; if it comes again, --workers=0 shows where"
        )
    return None


def shorten(error, length=1000):
    """The text of an error, or its kind where it has none, cut to a length: torch can write pages."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def _check_archive(path):
    """Raise ValueError for what torch.save never writes: another kind of file, or compressed entries, which
    could unpack into far more memory than the file's size."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its entries are compressed")
    if sum(entry.file_size for entry in entries) > os.path.getsize(path):
        raise ValueError("its entries overlap")


def _check_tensors(contents):
    """Raise ValueError for tensors that are larger than what the file holds of them: one number may stand for
    billions, and take their memory as soon as it is copied or compared."""
    waiting, seen = [contents], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:  # a pickle may hold one thing a million times
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        elif isinstance(value, torch.Tensor):
            dense = value.layout == torch.strided and not value.is_meta
            if not dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor in it is sparse, or repeats its numbers")


# ----------------------------------------------------------------------------------------------
# 4. Parameters
# ----------------------------------------------------------------------------------------------


def script_parameters(namespace):
    """The parameters of a script: its lowercase module-level names that are bound to plain values.

    namespace: the script's `globals()`.
    Returns a dict of name to value. (Constants are uppercase; functions and modules are no plain values.)
    """
    plain = (bool, int, float, str, tuple)
    return {
        name: value
        for name, value in namespace.items()
        if name.islower() and not name.startswith("_") and isinstance(value, plain)
    }


def override_parameters(namespace, arguments):
    """Let `--name=value` on the command line override a parameter at the top of a script.

    namespace: the script's `globals()`; parameters named in `arguments` are replaced in it.
    arguments: list of strings, `sys.argv[1:]`. `--help` prints the parameters and their values.
    Raises SystemExit with a message that lists the valid names if an argument is no `--name=value`, names
    no parameter, or has a value of another type than the one in the file.
    """
    parameters = script_parameters(namespace)
    listing = "\n".join(f"  --{name}={value!r}" for name, value in parameters.items())
    for argument in arguments:
        if argument in ("-h", "--help"):
            print(f"{namespace.get('__doc__') or ''}\nParameters and their values:\n{listing}")
            raise SystemExit(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals or name not in parameters:
            raise SystemExit(f"error: {argument[:200]!r} is no --name=value of a parameter. Valid are:\n{listing}")
        try:
            namespace[name] = _parse_like(parameters[name], text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
            kind = type(parameters[name]).__name__
            raise SystemExit(
                f"error: --{name} takes a value of type {kind}, such as {parameters[name]!r}, not {text[:200]!r}. "
                f"Valid are:\n{listing}"
            ) from error


def _parse_like(example, text):
    """Read `text` as a value of the type of `example`; ValueError or SyntaxError if it is of another."""
    if isinstance(example, bool):
        if text not in ("True", "False"):
            raise ValueError(text)
        return text == "True"
    if isinstance(example, tuple):
        try:
            values = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            if example and not isinstance(example[0], str):
                raise
            values = tuple(part.strip() for part in text.split(",") if part.strip())  # names need no quotation marks
        values = tuple(values) if isinstance(values, (tuple, list)) else (values,)
        return tuple(_parse_like(example[0] if example else value, str(value)) for value in values)
    return type(example)(text)
