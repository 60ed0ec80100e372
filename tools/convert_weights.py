"""Turn SSD300 weights of other projects into a checkpoint of ours. Nothing that their files carry is run.

    python tools/convert_weights.py --source=ssd300_mAP_77.43_v2.pth
    python tools/convert_weights.py --source=checkpoint_tutorial.pth.tar --save_to=tutorial.pth.tar
    python tools/convert_weights.py --source=COCO_V1            torchvision's, downloaded once

Reads one of three formats, which it tells apart by the names of the entries:

    sgrvinod      the checkpoint of sgrvinod's tutorial (a pickled model), or a state dict of that model
    amdegroot     a state dict of amdegroot/ssd.pytorch, such as the weights converted from Caffe
    torchvision   a state dict of torchvision's ssd300_vgg16

Writes a checkpoint for eval.py, detect.py and `train.py --finetune_from=...`. It carries what the weights were
trained with: mean and deviation of the input, priors, and the limit on sizes when boxes are decoded.
Any parameter below can be overridden on the command line with --name=value.

Shapes in comments: P = 8732 priors, C classes (background = 0 included).
"""

import io
import itertools
import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torchvision.models.detection import SSD300_VGG16_Weights

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from model import (  # noqa: E402 (the path to it has to be set first)  # noqa: E402
    CAFFE_MEAN,
    CAFFE_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    NETWORKS,
    SSD300,
    VGG_BLOCKS,
    model_state,
)
from utils import SIZE_VARIANCE, exit_with_message, make_label_map, override_parameters, save_checkpoint, voc_labels  # noqa: E402

source = ""  # the file to convert; or the name of torchvision's weights, COCO_V1, to download them
save_to = "checkpoint_converted.pth.tar"
format = "auto"  # or "sgrvinod", "amdegroot", "torchvision": then any other is an error
class_names = ""  # by label, separated by commas; "": VOC's, or COCO's for torchvision's weights


def main():
    if not source:
        raise SystemExit("error: name the file to convert, with --source=FILE")
    names = [name.strip() for name in class_names.split(",")] if class_names else None
    model, used_format = convert(source, format, names)
    save_checkpoint(model_state(model), save_to)
    print(f"{source}: {used_format}'s format, {model.n_classes - 1} classes; written to {save_to}")


def convert(source, format="auto", class_names=None):
    """Build our model from another project's weights.

    source: path of the file, or a name of torchvision's weights. format: a key of FORMATS, or "auto".
    class_names: sequence of names by label, without background; None: those of the format's data set.
    Returns an SSD300 with its label map, on the CPU, its heads and priors in the order of ours, and the
    name of the format.
    Raises FileNotFoundError or ValueError, naming file and entry, if the file is not what it should be;
    ConnectionError, naming the URL, if a download fails.
    """
    if format not in ("auto", *FORMATS):
        raise ValueError(f"format is {format!r}; it must be auto, {', '.join(FORMATS)}")
    state = read_weights(source)
    format = find_format(state, format, source)
    peer = FORMATS[format]
    n_classes = count_classes(state, peer, source)
    priors_cxcy = find_priors(state, peer, source)
    model = SSD300(n_classes, "ssd300_vgg16", peer.mean, peer.std, priors_cxcy, peer.max_size_offset)
    model.label_map = find_label_map(class_names, n_classes, peer, source)
    model.load_state_dict(translate_state(state, peer, model, source))
    return model, format


# ----------------------------------------------------------------------------------------------
# The formats: names of layers, priors, input
# ----------------------------------------------------------------------------------------------

# The layers of each format in one order: base, auxiliary convolutions, then the offsets and the scores of each
# source map in turn, and at last the scale of conv4_3.
SOURCE_MAPS = NETWORKS["ssd300_vgg16"].sources
HEADS = range(len(SOURCE_MAPS))
OUR_LAYERS = (
    *(f"base.conv{block}_{i + 1}" for block, widths in enumerate(VGG_BLOCKS, 1) for i in range(len(widths))),
    *("base.conv6", "base.conv7"),
    *(f"aux_convs.conv{block}_{i}" for block in (8, 9, 10, 11) for i in (1, 2)),
    *(f"pred_convs.{kind}_{source_map.name}" for source_map in SOURCE_MAPS for kind in ("loc", "cl")),
    "rescale_factors",
)
AMDEGROOT_LAYERS = (
    *(f"vgg.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28, 31, 33)),
    *(f"extras.{i}" for i in range(8)),
    *(f"{kind}.{i}" for i in HEADS for kind in ("loc", "conf")),
    "L2Norm.weight",
)
TORCHVISION_LAYERS = (
    *(f"backbone.features.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21)),  # to conv4_3
    *(f"backbone.extra.0.{i}" for i in ("1", "3", "5", "7.1", "7.3")),  # conv5_1 to conv7
    *(f"backbone.extra.{pair}.{i}" for pair in (1, 2, 3, 4) for i in (0, 2)),
    *(f"head.{kind}_head.module_list.{i}" for i in HEADS for kind in ("regression", "classification")),
    "backbone.scale_weight",
)

# COCO's numbers have gaps, which torchvision fills with "N/A". A label map has no name twice.
COCO_NAMES = tuple(
    f"N/A {label}" if name == "N/A" else name
    for label, name in enumerate(SSD300_VGG16_Weights.COCO_V1.meta["categories"])
    if label > 0
)

# In the Caffe code the centres of a map lie this far apart, in pixels. Some then lie outside the image.
CAFFE_STEPS = (8, 16, 32, 64, 100, 300)
# There, in a cell of six priors, 2, 1/2, 3, 1/3 follow the two squares; in ours 2, 3, 1/2, 1/3.
CAFFE_ORDER = (0, 1, 2, 4, 3, 5)


def create_sgrvinod_priors():
    """As ours, but for 0.333 in place of 1/3, 1 as the last extra scale, and all four numbers clipped."""
    scales = [source_map.scale for source_map in SOURCE_MAPS]
    steps = [1 / source_map.grid for source_map in SOURCE_MAPS]
    return create_prior_table(scales, [*geometric_means(scales), 1.0], steps, third=0.333).clamp(0, 1)


def create_amdegroot_priors():
    """The Caffe code's priors for VOC, all four numbers clipped."""
    scales = [pixels / 300 for pixels in (30, 60, 111, 162, 213, 264, 315)]
    steps = [pixels / 300 for pixels in CAFFE_STEPS]
    return create_prior_table(scales[:-1], geometric_means(scales), steps).clamp(0, 1)


def create_torchvision_priors():
    """The Caffe code's priors for COCO, their sizes clipped, their centres not."""
    scales = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
    steps = [pixels / 300 for pixels in CAFFE_STEPS]
    priors_cxcy = create_prior_table(scales[:-1], geometric_means(scales), steps)
    return torch.cat([priors_cxcy[:, :2], priors_cxcy[:, 2:].clamp(0, 1)], dim=1)


def geometric_means(scales):
    """The geometric mean of each scale and the next: sides of the extra square priors."""
    return [(scale * next_scale) ** 0.5 for scale, next_scale in itertools.pairwise(scales)]


def create_prior_table(scales, extra_scales, steps, third=1 / 3):
    """Priors of other scales and centres than ours, in the order of `SSD300.create_prior_boxes()`.

    scales, extra_scales: for each source map the sides of its square prior and of its extra one; steps: how
    far its centres lie apart. All are fractions of the image's side. third: what stands for the ratio 1/3.
    Returns (P, 4) float32, center-size form, fractional, not clipped.
    """
    priors = []
    for source_map, scale, extra, step in zip(SOURCE_MAPS, scales, extra_scales, steps, strict=True):
        ratios = [third if ratio == 1 / 3 else ratio for ratio in source_map.aspect_ratios]
        sizes = [(scale * ratio**0.5, scale / ratio**0.5) for ratio in ratios]
        sizes.insert(1, (extra, extra))
        centers = [(i + 0.5) * step for i in range(source_map.grid)]
        priors += [(c_x, c_y, w, h) for c_y in centers for c_x in centers for w, h in sizes]
    return torch.tensor(priors)


class PeerFormat(NamedTuple):
    """Weights of another project: what tells them from ours."""

    layers: tuple  # names of the layers, in the order of OUR_LAYERS
    class_names: tuple  # by label, of the data set of the published weights
    create_priors: Callable
    mean: tuple
    std: tuple
    order: tuple = (0, 1, 2, 3, 4, 5)  # where the priors of a cell stand in the file, in the order of ours
    max_size_offset: float | None = None  # see SSD300


FORMATS = {
    "sgrvinod": PeerFormat(OUR_LAYERS, voc_labels, create_sgrvinod_priors, IMAGENET_MEAN, IMAGENET_STD),
    "amdegroot": PeerFormat(
        AMDEGROOT_LAYERS,
        voc_labels,
        create_amdegroot_priors,
        mean=(123 / 255, 117 / 255, 104 / 255),
        std=CAFFE_STD,
        order=CAFFE_ORDER,
    ),
    "torchvision": PeerFormat(
        TORCHVISION_LAYERS,
        COCO_NAMES,
        create_torchvision_priors,
        mean=CAFFE_MEAN,
        std=CAFFE_STD,
        order=CAFFE_ORDER,
        max_size_offset=math.log(1000 / 16) / SIZE_VARIANCE,  # BoxCoder's bbox_xform_clip
    ),
}


# ----------------------------------------------------------------------------------------------
# From their entries to ours
# ----------------------------------------------------------------------------------------------


def entry_names(peer):
    """What each entry of our state dict is called in another format: dict of our name to theirs."""
    names = {}
    for ours, theirs in zip(OUR_LAYERS, peer.layers, strict=True):
        if ours == "rescale_factors":
            names[ours] = theirs
        else:
            names.update({f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")})
    return names


def find_format(state, format, name):
    """The format whose first entry the state dict has; ValueError, naming the file, if there is none."""
    candidates = list(FORMATS) if format == "auto" else [format]
    first_entries = {key: entry_names(FORMATS[key])["base.conv1_1.weight"] for key in candidates}
    for key, entry in first_entries.items():
        if entry in state:
            return key
    expected = " or ".join(f"{entry!r} ({key})" for key, entry in first_entries.items())
    raise ValueError(f"{name}: it lacks the entry {expected}; it has {', '.join(list(state)[:5]) or 'none at all'}")


def count_classes(state, peer, name):
    """C, from the number of scores at a cell of the first source map."""
    entry = entry_names(peer)["pred_convs.cl_conv4_3.bias"]
    n_scores, n_priors = get_entry(state, entry, name).numel(), SOURCE_MAPS[0].n_priors
    if n_scores % n_priors or n_scores < 2 * n_priors:
        raise ValueError(f"{name}: {entry!r} has {n_scores} numbers; SSD300 needs {n_priors} for each class")
    return n_scores // n_priors


def find_label_map(class_names, n_classes, peer, name):
    """The label map of the names given, or else of the format's own; ValueError if they are too few or many."""
    names = peer.class_names if class_names is None else class_names
    if len(names) != n_classes - 1:
        whose = "its format's" if class_names is None else "the given"
        raise ValueError(
            f"{name}: it has {n_classes - 1} classes, but {whose} names are {len(names)}; "
            "give all of them, in the order of their labels, with --class_names=first,second,..."
        )
    return make_label_map(names)


def find_priors(state, peer, name):
    """The priors that the file holds, as the tutorial's does, or else its format's: (P, 4) float32."""
    if "priors_cxcy" not in state:
        return peer.create_priors()
    priors_cxcy = get_entry(state, "priors_cxcy", name)
    if priors_cxcy.shape != (8732, 4) or bool((priors_cxcy[:, 2:] <= 0).any()):
        raise ValueError(f"{name}: 'priors_cxcy' is no table of 8732 priors, (c_x, c_y, w, h), of positive size")
    return priors_cxcy


def translate_state(state, peer, model, name):
    """Turn a state dict of another format into one of ours.

    state: dict of name to tensor. model: an SSD300, for the shapes. name: the file, for errors.
    Raises ValueError if an entry is missing, is not finite or has another shape, or if there are others.
    """
    names = entry_names(peer)
    unknown = [entry for entry in state if entry not in names.values() and entry != "priors_cxcy"]
    if unknown:
        raise ValueError(f"{name}: entries that are no part of SSD300: {', '.join(map(str, unknown[:5]))}")
    translated = {}
    for ours, parameter in model.state_dict().items():
        tensor = get_entry(state, names[ours], name)
        if ours == "rescale_factors" and tensor.dim() == 1:
            tensor = tensor[None, :, None, None]
        if tensor.shape != parameter.shape:
            shapes = f"{tuple(tensor.shape)}, SSD300 needs {tuple(parameter.shape)}"
            raise ValueError(f"{name}: the entry {names[ours]!r} has shape {shapes}")
        translated[ours] = tensor
    for source_map in SOURCE_MAPS:
        order = [place for place in peer.order if place < source_map.n_priors]
        for kind in (f"{layer}_{source_map.name}.{part}" for layer in ("loc", "cl") for part in ("weight", "bias")):
            priors = translated[f"pred_convs.{kind}"].unflatten(0, (source_map.n_priors, -1))
            translated[f"pred_convs.{kind}"] = priors[order].flatten(0, 1)
    return translated


def get_entry(state, entry, name):
    """A tensor of a state dict as float32; ValueError, naming file and entry, if there is none, or not finite."""
    if not isinstance(state.get(entry), torch.Tensor):
        raise ValueError(f"{name}: it lacks the entry {entry!r}, or this is no tensor")
    if not bool(state[entry].isfinite().all()):
        raise ValueError(f"{name}: the entry {entry!r} holds numbers that are not finite")
    return state[entry].float()


# ----------------------------------------------------------------------------------------------
# Reading the file, without running anything
# ----------------------------------------------------------------------------------------------


def read_weights(source):
    """Read a state dict, or the tensors of a pickled model.

    source: path, or a name of torchvision's SSD300 weights.
    Returns a dict of name to tensor on the CPU.
    Raises as `convert()` does.
    """
    if source in SSD300_VGG16_Weights.__members__:
        return download_weights(SSD300_VGG16_Weights[source])
    if not Path(source).is_file():
        known = ", ".join(SSD300_VGG16_Weights.__members__)
        raise FileNotFoundError(f"{source}: no such file, nor is it a name of torchvision's weights ({known})")
    try:
        try:
            contents = torch.load(source, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # it holds more than tensors: a whole model, perhaps
            contents = read_pickled_model(source)
    except Exception as error:  # a file that is damaged, or made to do harm, can fail in many ways
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{source}: no weights of SSD300 could be read, and nothing was run ({reason})") from error
    return find_state(contents, source)


def download_weights(weights):
    """torchvision's state dict, from its cache or its server; ConnectionError, naming the URL, if that fails."""
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; a wrong hash is a RuntimeError
        raise ConnectionError(
            f"could not download {weights.url}: {error}. Fetch it by other means, and give --source=FILE"
        ) from error


def find_state(contents, name):
    """The state dict in what a file holds: itself, or its entry "model" or "state_dict"."""
    if isinstance(contents, dict) and str(contents.get("format")).startswith("ssd300/"):
        raise ValueError(f"{name}: it is a checkpoint of this repo already, and needs no conversion")
    for key in ("model", "state_dict"):
        if isinstance(contents, dict) and isinstance(contents.get(key), dict):
            contents = contents[key]
    if not isinstance(contents, dict):
        raise ValueError(f"{name}: it holds no state dict, but an object of type {type(contents).__name__}")
    if contents and all(str(entry).startswith("module.") for entry in contents):  # saved from nn.DataParallel
        contents = {entry.removeprefix("module."): tensor for entry, tensor in contents.items()}
    return contents


def read_pickled_model(path):
    """Read the tensors of a model that was saved as a Python object, and nothing else.

    sgrvinod's checkpoint is such a file. To unpickle it would be to run whatever it asks for, and
    `torch.load(weights_only=True)` refuses classes in files of torch < 1.6 even when they are declared safe.
    So `InertUnpickler` reads its structure, with stand-ins for all objects, and the numbers follow from there.

    path: what torch.save() wrote, in its zip format or the one before.
    Returns a dict of name to tensor, as the state dict of the model, and its priors as "priors_cxcy".
    Raises pickle.UnpicklingError, or other errors where the file is damaged.
    """
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):
            return read_zip_format(file)
        file.seek(0)
        return read_legacy_format(file)


def read_zip_format(file):
    """A model from the zip archive that torch >= 1.6 writes: data.pkl, and a file for each storage."""
    with zipfile.ZipFile(file) as archive:
        (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = pickled.removesuffix("data.pkl")
        records = find_records(InertUnpickler(io.BytesIO(archive.read(pickled))).load())
        storages = {record.key: archive.read(f"{folder}data/{record.key}") for record in records.values()}
    return make_tensors(records, storages)


def read_legacy_format(file):
    """A model from the format of torch < 1.6: pickles, of which the last lists the storages, then their bytes."""
    for _ in range(3):  # a magic number, the version of the format, facts about the machine
        InertUnpickler(file).load()
    unpickler = InertUnpickler(file)
    records = find_records(unpickler.load())
    wanted = {record.key for record in records.values()}
    storages = {}
    for key in InertUnpickler(file).load():
        n_bytes = int.from_bytes(file.read(8), "little") * unpickler.dtypes[key].itemsize
        if key in wanted:
            storages[key] = file.read(n_bytes)
        else:
            file.seek(n_bytes, io.SEEK_CUR)
    return make_tensors(records, storages)


class TensorRecord(NamedTuple):
    """Where a tensor's numbers are: in which storage, and how they are laid out there."""

    key: str
    dtype: torch.dtype
    offset: int
    size: tuple
    stride: tuple


def make_tensors(records, storages):
    """The tensors, by name, from the bytes of their storages; an error if these do not hold all of a tensor."""
    tensors = {}
    for name, record in records.items():
        storage = torch.frombuffer(bytearray(storages[record.key]), dtype=record.dtype)
        tensors[name] = storage.as_strided(record.size, record.stride, record.offset).clone()
    return tensors


def find_records(contents):
    """The parameters of the model in a pickled checkpoint: dict of name to TensorRecord."""
    model = contents.get("model") if isinstance(contents, dict) else contents
    if not isinstance(model, StandIn):
        raise pickle.UnpicklingError("it holds no model")
    records = dict(walk_parameters(model))
    if isinstance(vars(model).get("priors_cxcy"), TensorRecord):
        records["priors_cxcy"] = model.priors_cxcy
    return records


def walk_parameters(module, prefix=""):
    """All parameters of a pickled nn.Module and of the modules in it, as (name, TensorRecord)."""
    for name, parameter in module._parameters.items():
        if isinstance(parameter, TensorRecord):
            yield prefix + name, parameter
    for name, child in module._modules.items():
        yield from walk_parameters(child, f"{prefix}{name}.")


class StandIn:
    """Takes the place of any object in a pickle; it keeps the object's attributes and does nothing."""

    def __init__(self, *args):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass


# What a pickled checkpoint of the tutorial is made of; each becomes a StandIn. Its own classes may have come
# from a module of any name.
TUTORIAL_CLASSES = ("SSD300", "VGGBase", "AuxiliaryConvolutions", "PredictionConvolutions")
LIBRARY_MODULES = ("torch.nn.", "torch.optim.")
LIBRARY_NAMES = ("collections.defaultdict", "builtins.dict", "builtins.set", "torch.device", "torch.Size")


class InertUnpickler(pickle.Unpickler):
    """Reads the structure of a pickle without importing or calling anything that it names.

    All that a pickle can do beyond numbers, strings and containers, it does by names, which come here. They
    are met with records of tensors, stand-ins, or an error; so there is nothing else that it could call.
    """

    def __init__(self, file):
        super().__init__(file, encoding="utf-8")
        self.dtypes = {}  # of the storages, by key

    def find_class(self, module, name):
        full_name = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if full_name == "collections.OrderedDict":
            return OrderedDict
        if module in ("torch", "torch.cuda") and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if full_name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return self.record_tensor
        if full_name in ("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter"):
            return self.record_parameter
        if name in TUTORIAL_CLASSES or full_name in LIBRARY_NAMES or full_name.startswith(LIBRARY_MODULES):
            return type(name, (StandIn,), {})
        raise pickle.UnpicklingError(f"it names {full_name}, which is no part of the tutorial's checkpoint")

    def persistent_load(self, pid):
        if pid[0] == "module":  # torch < 1.6: a class, with its source code
            return pid[1]
        dtype, key, view = pid[1], pid[2], pid[5:]
        if view not in ((), (None,)):
            raise pickle.UnpicklingError("it holds a view of a storage, which no tutorial's checkpoint does")
        self.dtypes[key] = dtype
        return key, dtype

    def record_tensor(self, storage, offset, size, stride, *_):
        return TensorRecord(*storage, offset, size, stride)

    def record_parameter(self, tensor, *_):
        return tensor


STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    with exit_with_message():
        main()
