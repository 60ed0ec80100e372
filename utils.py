"""The parts that the scripts share, in the order in which the pipeline needs them.

    1. Boxes                        coordinate forms and overlap
    2. Labels and colours           class names, label maps, one colour a class
    3. Files                        JSON; files written whole or not at all; checkpoints, state dicts
    4. Messages and the machine     strings from files, shown safely; errors of the machine, in words; devices
    5. Parameters                   `--name=value` for the block at the top of each script

Box coordinates are continuous: a box covers [x_min, x_max) x [y_min, y_max), and the whole image is
[0, 0, W, H]. They are fractions of the image's width and height unless a name says `pixels`. Names say
the form:

    xy       boundary      (x_min, y_min, x_max, y_max)
    cxcy     center-size   (c_x, c_y, w, h)
    gcxgcy   offsets       (g_c_x, g_c_y, g_w, g_h), of a box from a prior

Shapes in comments: N images in a batch, P = 8732 priors, C classes (background included), M objects.
"""

import ast
import colorsys
import contextlib
import difflib
import io
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

# A header that claims more pixels than this is refused before anything is allocated for it.
MAX_IMAGE_PIXELS = 80_000_000

# Files of a folder that are taken for images, whatever their suffix's case.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".avif", ".jp2",
    ".tga", ".mpo",
)  # fmt: skip

# --- 1. Boxes -------------------------------------------------------------------------------------


def xy_to_cxcy(boxes_xy):
    """Boxes from boundary to center-size form.

    boxes_xy: (..., 4) float tensor, boundary form, fractional or in pixels.
    Returns a (..., 4) tensor in center-size form, in the same unit.
    """
    mins = boxes_xy[..., :2]  # (..., 2): x_min, y_min
    maxs = boxes_xy[..., 2:]  # (..., 2): x_max, y_max
    return torch.cat([(mins + maxs) / 2, maxs - mins], dim=-1)


def cxcy_to_xy(boxes_cxcy):
    """Boxes from center-size to boundary form: the inverse of `xy_to_cxcy()`.

    boxes_cxcy: (..., 4) float tensor, center-size form, fractional or in pixels.
    Returns a (..., 4) tensor in boundary form, in the same unit.
    """
    centers = boxes_cxcy[..., :2]
    half_sizes = boxes_cxcy[..., 2:] / 2
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
    prior_centers = priors_cxcy[..., :2]
    prior_sizes = priors_cxcy[..., 2:]
    g_centers = (boxes_cxcy[..., :2] - prior_centers) / (prior_sizes * CENTER_VARIANCE)
    g_sizes = torch.log(boxes_cxcy[..., 2:] / prior_sizes) / SIZE_VARIANCE
    return torch.cat([g_centers, g_sizes], dim=-1)


def gcxgcy_to_cxcy(offsets_gcxgcy, priors_cxcy):
    """Decode offsets from priors into boxes: the inverse of `cxcy_to_gcxgcy()`.

    offsets_gcxgcy: (..., P, 4) float tensor, as a model predicts them.
    priors_cxcy: (P, 4) float tensor, center-size form, fractional: one prior for each row of offsets.
    Returns (..., P, 4) boxes in center-size form, fractional; they may reach beyond the image.
    """
    prior_centers = priors_cxcy[..., :2]
    prior_sizes = priors_cxcy[..., 2:]
    centers = offsets_gcxgcy[..., :2] * CENTER_VARIANCE * prior_sizes + prior_centers
    sizes = torch.exp(offsets_gcxgcy[..., 2:] * SIZE_VARIANCE) * prior_sizes
    return torch.cat([centers, sizes], dim=-1)


def find_jaccard_overlap(boxes_1_xy, boxes_2_xy):
    """Overlap (Jaccard index, intersection over union) of each box of one set with each of another.

    boxes_1_xy: (..., n1, 4), boxes_2_xy: (..., n2, 4) float tensors, boundary form, in the same unit.
    Returns a (..., n1, n2) tensor in [0, 1]; 0 for two boxes of no area.
    """
    boxes_1_xy = boxes_1_xy[..., :, None, :]  # (..., n1, 1, 4)
    boxes_2_xy = boxes_2_xy[..., None, :, :]  # (..., 1, n2, 4)
    return find_paired_overlap(boxes_1_xy, boxes_2_xy)


def find_paired_overlap(boxes_1_xy, boxes_2_xy):
    """Overlap of each box with the one box at its place in another tensor: see `find_jaccard_overlap()`.

    boxes_1_xy, boxes_2_xy: (..., 4) float tensors that broadcast, boundary form, in the same unit.
    Returns a (...) tensor in [0, 1].
    """
    intersection = find_paired_intersection(boxes_1_xy, boxes_2_xy)
    union = find_areas(boxes_1_xy) + find_areas(boxes_2_xy) - intersection
    return intersection / union


def find_paired_intersection(boxes_1_xy, boxes_2_xy):
    """Area that each box shares with the one box at its place in another tensor; 0 where they only touch."""
    # Each coordinate in a tensor of its own: three times as fast as with all four in the last dimension.
    x_min_1, y_min_1, x_max_1, y_max_1 = boxes_1_xy.movedim(-1, 0).contiguous()
    x_min_2, y_min_2, x_max_2, y_max_2 = boxes_2_xy.movedim(-1, 0).contiguous()
    widths = torch.minimum(x_max_1, x_max_2) - torch.maximum(x_min_1, x_min_2)  # negative: one is left of the other
    heights = torch.minimum(y_max_1, y_max_2) - torch.maximum(y_min_1, y_min_2)
    return widths.clamp(min=0) * heights.clamp(min=0)


def find_areas(boxes_xy):
    """Area of each box, in boundary form; of a box without area the smallest number above 0, so that one can divide."""
    sizes = boxes_xy[..., 2:] - boxes_xy[..., :2]
    areas = sizes[..., 0] * sizes[..., 1]
    return areas.clamp(min=torch.finfo(areas.dtype).tiny)


# --- 2. Labels and colours ------------------------------------------------------------------------

voc_labels = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def make_label_map(class_names):
    """Number the classes from 1, in the order given; 0 is the background.

    class_names: sequence of strings, without "background".
    Returns a dict of name to label: {"background": 0, first name: 1, ...}.
    Raises ValueError if a name is empty, not a string, given twice, or "background", and if there is none.
    """
    if not class_names or isinstance(class_names, str):
        raise ValueError(f"class_names must be a sequence with at least one name, not {class_names!r}")
    label_map = {"background": 0}
    for name in class_names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{printable(repr(name))} is not a class name: a name is a string that is not empty")
        if name in label_map:
            reason = "label 0 has this name" if name == "background" else "the name is given twice"
            raise ValueError(f"{printable(repr(name))} cannot be a class: {reason}")
        label_map[name] = len(label_map)
    return label_map


def rev_label_map(label_map):
    """The inverse of a label map: a dict of label to name."""
    return {label: name for name, label in label_map.items()}


def load_label_map(data_folder):
    """Read the label map that `create_data_lists()` wrote.

    data_folder: the folder with label_map.json.
    Returns a dict of name to label: "background" is 0, the classes are 1, 2, ... without a gap.
    Raises FileNotFoundError if the file is missing; ValueError, naming it, if it holds anything else.
    """
    path = os.path.join(data_folder, "label_map.json")
    if not os.path.exists(path):
        place = "" if os.path.isabs(path) else f" in {os.getcwd()}"
        raise FileNotFoundError(f"{path}: no such file{place}; create_data_lists.py writes it")
    label_map = read_json(path, dict)
    try:
        check_label_map(label_map)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; run create_data_lists.py again") from None
    return dict(sorted(label_map.items(), key=lambda item: item[1]))


def check_label_map(label_map):
    """ValueError for what is no label map as `make_label_map()` makes them, in whatever order."""
    labels = list(label_map.values()) if isinstance(label_map, dict) else []
    are_numbers = all(type(label) is int for label in labels)
    if not are_numbers or sorted(labels) != list(range(max(len(labels), 2))) or label_map.get("background") != 0:
        raise ValueError('not a label map ("background": 0 and one class or more, numbered from 1 on without gaps)')


def class_colors(label_map):
    """A bright colour for each class; neighbours in the label map are far apart.

    The hues go round the colour circle in steps of the golden ratio. However many classes there are, they are
    about evenly spaced, and a class has the same colour whatever classes follow it.

    label_map: dict of name to label.
    Returns a dict of name to "#rrggbb" for every class but the background, in the order of the labels.
    """
    colors = {}
    for name, label in sorted(label_map.items(), key=lambda item: item[1]):
        if label > 0:
            hue = label * 0.618034 % 1
            red, green, blue = colorsys.hsv_to_rgb(hue, 1, 1)
            colors[name] = f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
    return colors


# --- 3. Files -------------------------------------------------------------------------------------


def read_json(path, kind):
    """Read a JSON file.

    path: the file; it may start with a byte order mark. kind: list or dict, what it has to hold.
    Raises FileNotFoundError or ValueError, naming the file, if it is missing, not a regular file (a pipe would
    be waited for), not JSON, or holds another kind.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: not a file")
    try:
        with open(path, encoding="utf-8-sig") as file:
            contents = json.load(file)
    except (OSError, ValueError, RecursionError) as error:  # json raises RecursionError on a thousand brackets
        raise ValueError(f"{path}: cannot be read as JSON ({printable(error)})") from None
    if not isinstance(contents, kind):
        raise ValueError(f"{path}: holds a JSON {type(contents).__name__}, not a {kind.__name__}")
    return contents


def write_file(path, contents):
    """Write a file so that `path` holds either the old one or the new one, whole, at every moment.

    The bytes go to a temporary file in the same folder, are forced to the disk, and take the name `path`
    by one rename, which a file system does completely or not at all.

    contents: bytes, a string, or a function that writes bytes to the open file which it is given.
    Raises OSError, or what the function raises; the old file is untouched then.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")  # what a killed writer leaves behind is written over by the next
    if isinstance(contents, str):
        contents = contents.encode("utf-8", "surrogateescape")  # names of files may hold other bytes than text
    try:
        with open(temporary, "wb") as file:
            if callable(contents):
                contents(file)
            else:
                file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_file(source, target):
    """Give the file `source` the name `target`. On Windows this fails as long as another program, such as a virus
    scanner or a backup, has `target` open: so it is tried for a few seconds. Raises PermissionError after that."""
    for seconds in (0.1, 0.4, 1.5):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(seconds)
    os.replace(source, target)


def write_files(folder, texts, trial=False):
    """Write a dict of file name to text into a folder: the old files stay until all new ones are whole.

    trial: only try whether it can be done. Raises OSError, naming folder and files.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        for name in texts:
            if Path(folder, name).is_dir():  # it would be found too late: when others are replaced already
                raise IsADirectoryError(f"{name} is a folder")
        with tempfile.TemporaryDirectory(dir=folder, prefix=".new") as unfinished:
            for name, text in texts.items():
                write_file(Path(unfinished, name), text)
            if trial:
                return
            for name in texts:
                replace_file(Path(unfinished, name), Path(folder, name))
    except OSError as error:
        raise OSError(f"{printable(', '.join(texts))} cannot be written to {folder}: {error}") from error


CHECKPOINT_FORMAT = "ssd300/1"  # written into every checkpoint: how load_checkpoint() knows its own


def save_checkpoint(checkpoint, path):
    """Write a checkpoint, whole or not at all: see `write_file()`. A link stays one: the file behind it is replaced.

    checkpoint: dict of tensors, state dicts, numbers, strings and containers of these; nothing else could
    be read back with `weights_only=True`.
    Raises OSError, naming the file, if the folder is missing or the disk full; the old file is untouched.
    """
    try:
        target = os.path.realpath(path)  # a link may lead to a larger disk
        write_file(target, lambda file: torch.save({"format": CHECKPOINT_FORMAT, **checkpoint}, file))
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        raise OSError(f"{path}: could not write the checkpoint, the one before it is unchanged: {error}") from error


def load_checkpoint(path, device="cpu"):
    """Read a checkpoint of ours, without running any code that the file may carry.

    Returns the dict that `save_checkpoint()` was given, its tensors on `device`, wherever they were then.
    Raises FileNotFoundError if there is no such file; ValueError, naming it, if it is truncated, was not
    written by this repo, or holds pickled objects.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint (train.py makes one)")
    with open(path, "rb") as file:
        is_ours = CHECKPOINT_FORMAT.encode() in file.read(2**16)  # the first entry of the first record
    if is_ours:
        hint = "train.py wrote it, and it was damaged since: copy it again, or take an older one, such as the best_ one"
    else:
        hint = "If it is another SSD's, tools/convert_weights.py may read its weights"
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: truncated, or not a checkpoint of this repo. {hint}")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        problem = "damaged" if is_ours else "refused: what is not a tensor or a number could run code"
        raise ValueError(f"{path}: {problem}. {hint}") from error
    except Exception as error:  # torch.load raises errors of many kinds for a file that is not what it should be
        raise ValueError(f"{path}: damaged, or not a checkpoint of this repo ({printable(error)}). {hint}") from error
    found = checkpoint.get("format", "none") if isinstance(checkpoint, dict) else type(checkpoint).__name__
    if found != CHECKPOINT_FORMAT:
        found = printable(found, 40)
        raise ValueError(f"{path}: not a checkpoint of this repo (expected {CHECKPOINT_FORMAT}, found {found}). {hint}")
    return checkpoint


def check_finite(state):
    """ValueError, naming the entry, if a dict of name to tensor holds numbers that are not finite."""
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")


def read_state_dict(weights, known):
    """Read a state dict, a dict of name to tensor: torchvision's by its name, or a local file.

    weights: a key of `known`, a dict of name to torchvision's weights, which are downloaded once and cached; or a path.
    Raises ConnectionError, FileNotFoundError or ValueError, naming the URL or the file.
    """
    if weights in known:
        try:
            return known[weights].get_state_dict(progress=True, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:  # urllib's errors, and a file whose hash is wrong
            advice = "Give train.py --pretrained=FILE for the same file, or --pretrained= for random weights"
            raise ConnectionError(f"could not download {known[weights].url}: {error}. {advice}") from error
    if not Path(weights).is_file():
        known = ", ".join(known)
        raise FileNotFoundError(f"{weights!r} is neither a file nor one of {known}; --pretrained= starts at random")
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        if not all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in state.items()):
            raise ValueError("some entries are something else")
    except Exception as error:  # torch.load raises errors of many kinds for a file that is not what it should be
        raise ValueError(f"{weights}: not a state dict of tensors: {printable(error)}") from error
    return state


# --- 4. Messages and the machine ------------------------------------------------------------------


def printable(text, length=1000):
    """A string from a file, or the text of an error, as it can be shown: on one line, and not long.

    A terminal would obey control characters in a class name; they come out escaped, as do bytes that are not
    text. White space is joined. What is longer than `length` ends in "...". An error without a text is named.
    """
    if isinstance(text, Exception) and not str(text):
        text = type(text).__name__
    text = " ".join(str(text)[: 10 * length].split())  # cut first: the text may be a whole file
    letters = [letter if letter.isprintable() else repr(letter)[1:-1] for letter in text]
    text = "".join(letters)
    return text if len(text) <= length else text[: length - 3] + "..."


@contextlib.contextmanager
def exit_with_message(hint=""):
    """End a script whose input, or machine, is at fault with `error: ` and what is wrong, in place of a traceback.

    hint: what to do next, as a last line. Of an error from a data loader's process this shows what was said
    there. Errors of other kinds pass. Ctrl-C ends the script without a traceback, too.
    """
    # Twice: when a worker dies, torch's signal handler raises an error wherever the program is, perhaps just as the
    # inner one begins to handle another. (The outer one lets the inner one's SystemExit pass.)
    with exit_on_error(hint), exit_on_error(hint):
        yield


@contextlib.contextmanager
def exit_on_error(hint):
    """What `exit_with_message()` does, for one error."""
    try:
        yield
    except KeyboardInterrupt:
        sys.excepthook = print_no_traceback_of_ctrl_c
        raise
    except (FloatingPointError, OSError, EOFError, ValueError, RuntimeError, MemoryError) as error:
        stop_watching_workers()  # a worker's death would raise another error here
        advice = advice_for(error)
        if advice:
            text = f"{advice}\n{str(error) or type(error).__name__}"
        elif isinstance(error, (FloatingPointError, OSError, ValueError)):
            text = str(error).rpartition(f"\n{type(error).__name__}: ")[2].strip()
        else:
            raise
        raise SystemExit(f"error: {text}\n{hint}".strip()) from error


def print_no_traceback_of_ctrl_c(kind, error, traceback):
    """An excepthook. Python still dies of the signal, so that a loop of a shell ends, too."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)


def exit_on_sigterm():
    """Let SIGTERM end this script by SystemExit, so that what is in `finally` is still done."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def quote(path):
    """A path as one word of a command that can be pasted."""
    return shlex.quote(str(path)) if os.name == "posix" else subprocess.list2cmdline([str(path)])


def stop_watching_workers():
    """Take out the handler by which torch raises an error, wherever the program is, when a loader's worker dies."""
    if hasattr(signal, "SIGCHLD"):  # Windows has none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def advice_for(error):
    """What to change after an error that the machine caused, in words; None for any other error."""
    text = str(error)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:  # the latter is PyTorch's
        return "out of memory on the CPU; fewer --workers, or a smaller --batch_size, need less"
    if "out of memory" in text or "ALLOC_FAILED" in text:  # the latter is cuBLAS's and cuDNN's
        return "out of memory on the GPU; a smaller --batch_size needs less (in training, with a lower --lr)"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return "torch.compile failed; it needs a C compiler and Triton. --compile_model=False goes on without it"
    if "shared memory" in text or "Bus error" in text:
        return (
            "the processes that prepare images ran out of shared memory. Enlarge /dev/shm (docker run --shm-size=8g), "
            "or take fewer --workers (0 needs none)"
        )
    if "No space left" in text or "unexpected pos" in text:  # the latter is torch's, from writing a checkpoint
        return "the disk is full; free some space, or write to another disk"
    # The last two: a process died while it handed over a batch.
    is_cut_off = isinstance(error, (EOFError, ConnectionResetError, ConnectionRefusedError))
    if text.startswith(("DataLoader worker", "DataLoader timed out")) or is_cut_off:
        return (
            "a process that prepares images died, or hung. If the system killed it, memory was short: take fewer "
            "--workers, or a smaller --batch_size; if it comes again, --workers=0 shows where"
        )
    return None


def choose_device(name=""):
    """The device that computes, a torch.device: the accelerator (CUDA, MPS, XPU) where there is one, else the CPU.

    name: "cpu", "cuda:1", "mps", ... to choose another one. Raises ValueError if it is not there.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if not name:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'the device is "{printable(name)}"; it must be like "cpu", "cuda", "cuda:1", "mps"') from None
    n_devices = torch.accelerator.device_count() if accelerator else 0
    is_there = accelerator and device.type == accelerator.type and (device.index or 0) < n_devices
    if device.type != "cpu" and not is_there:
        found = f"{n_devices} of the type {accelerator.type}" if accelerator else "the CPU only"
        raise ValueError(f'the device is "{name}", which PyTorch does not find here; it finds {found}')
    return device


def has_bf16_units(device):
    """Whether bfloat16 is fast on a torch.device, and not only possible."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "xpu":
        return torch.xpu.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch >= 2.12
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False  # MPS: depends on chip and system; float32 works on all


def count_cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fastest_memory_format(device, model):
    """The memory format in which a device (torch.device) trains a model (nn.Module) fastest.

    Channels last: 1.5 times as fast for ssd300_tiny, 1.9 times for SSDLite (AVX512, float32). Contiguous: 1.6 times as
    fast for the way back through VGG-16, which has no batch normalisation, on CPUs without bfloat16 units (AVX2).
    CUDA and MPS were not measured. On CUDA it is channels last, as NVIDIA advises; on MPS it stays PyTorch's default.
    """
    if device.type == "cuda":
        return torch.channels_last
    if device.type == "mps":
        return torch.contiguous_format
    has_batch_norm = any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())
    return torch.channels_last if has_batch_norm or has_bf16_units(device) else torch.contiguous_format


# --- 5. Parameters --------------------------------------------------------------------------------


def script_parameters(namespace):
    """The parameters of a script: its lowercase module-level names that are bound to plain values.

    namespace: the script's `globals()`.
    Returns a dict of name to value. (Constants are uppercase; functions and modules are no plain values.)
    """
    parameters = {}
    for name, value in namespace.items():
        is_plain = isinstance(value, (bool, int, float, str, tuple))
        if name.islower() and not name.startswith("_") and is_plain:
            parameters[name] = value
    return parameters


def override_parameters(namespace, arguments):
    """Let `--name=value` on the command line override a parameter at the top of a script.

    namespace: the script's `globals()`; parameters named in `arguments` are replaced in it.
    arguments: list of strings, `sys.argv[1:]`. `--help` prints the parameter block.
    Returns the set of the names that were given.
    Raises SystemExit if an argument is not a `--name=value`, does not name a parameter, or has a value of
    another type than the one in the file: with the list of valid names, and what is wrong below it.
    """
    escape_what_the_console_lacks()
    parameters = script_parameters(namespace)
    valid = "\n".join(["Valid are:", *(f"  --{name}={value!r}" for name, value in parameters.items())])
    if "-h" in arguments or "--help" in arguments:
        print(f"{namespace.get('__doc__') or ''}\nParameters, set with --name=value:\n\n{parameter_block(namespace)}")
        raise SystemExit(0)
    given = set()
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals or name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f" Did you mean --{near[0]}?" if near else ""
            wrong = printable(repr(argument))
            raise SystemExit(f"{valid}\nerror: {wrong} is not a --name=value of a parameter.{hint}")
        try:
            namespace[name] = _parse_like(parameters[name], text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
            kind = type(parameters[name]).__name__
            example = f"a value of type {kind}, such as {parameters[name]!r}"
            raise SystemExit(f"{valid}\nerror: --{name} takes {example}, not {printable(repr(text))}") from error
        given.add(name)
    return given


def restore_parameters(namespace, saved, given):
    """Set parameters to saved values, but for those that were given on the command line.

    namespace: the script's `globals()`. saved: dict of name to value. given: what `override_parameters()` returned.
    Returns notes, a list of strings: what is now different from what was saved, and from what stands in the file.
    """
    parameters = script_parameters(namespace)
    notes = []
    restored = []
    for name, value in saved.items():
        was = f"{printable(name)} was {printable(repr(value))} when the checkpoint was saved"
        kind = type(parameters.get(name))
        if (type(value) is int and kind is float) or (type(value) is float and kind is int and value.is_integer()):
            value = kind(value)  # 3 and 3.0 are the same parameter
        if type(value) is not type(parameters.get(name)):
            notes.append(f"{was}; there is no such parameter now")
        elif name in given and value != parameters[name]:
            notes.append(f"{was}; now it is {parameters[name]!r}, as given")
        elif value != parameters[name]:
            namespace[name] = value
            restored.append(f"--{name}={printable(value)}")
    if restored:
        notes.append(f"as in the checkpoint, not as in the file: {' '.join(restored)}")
    return notes


def escape_what_the_console_lacks():
    """Print letters that stdout's encoding lacks as escapes: Windows' cp1252 has no 猫, and printing it would fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's is not
        sys.stdout.reconfigure(errors="backslashreplace")


def parameter_block(namespace):
    """The lines of a script's source in which its parameters stand, with the headings and comments between them."""
    parameters = script_parameters(namespace)
    source = Path(namespace["__file__"]).read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    nodes = [node for node in nodes if getattr(node.targets[0], "id", None) in parameters]
    first_line = nodes[0].lineno - 2  # the heading above the first parameter
    last_line = nodes[-1].end_lineno
    return "\n".join(source.splitlines()[first_line:last_line])


def _parse_like(example, text):
    """Read `text` as a value of the type of `example`; ValueError or SyntaxError if it is of another."""
    if isinstance(example, bool):
        if text not in ("True", "False"):
            raise ValueError(text)
        return text == "True"
    if not isinstance(example, tuple):
        return type(example)(text)
    if example and not isinstance(example[0], str):
        values = ast.literal_eval(text)
        values = values if isinstance(values, (tuple, list)) else (values,)
        return tuple(_parse_like(example[0], str(value)) for value in values)
    # Names, which need no quotation marks: 0,1,2 are three names.
    try:
        names = ast.literal_eval(text)
        names = (names,) if isinstance(names, str) else tuple(names)
        if all(isinstance(name, str) for name in names):
            return names
    except (SyntaxError, ValueError, TypeError):
        pass
    is_bracketed = (text.startswith("(") and text.endswith(")")) or (text.startswith("[") and text.endswith("]"))
    if is_bracketed:
        text = text[1:-1]
    names = [part.strip() for part in text.split(",")]
    return tuple(name for name in names if name)
