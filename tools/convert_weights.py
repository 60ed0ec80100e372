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

from model import (  # noqa: E402 (the path to it has to be set first)
    CAFFE_MEAN,
    CAFFE_STD,
    MAX_SIZE_OFFSET,
    SOURCE_MAPS,
    SSD300,
    VGG_BLOCKS,
    model_state,
)
from utils import (  # noqa: E402
    IMAGENET_MEAN,
    IMAGENET_STD,
    SIZE_VARIANCE,
    make_label_map,
    override_parameters,
    save_checkpoint,
    voc_labels,
)

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
    priors_cxcy = take_priors(state, peer, source)
    model = SSD300(n_classes, peer.mean, peer.std, priors_cxcy, peer.max_size_offset)
    model.label_map = find_label_map(class_names, n_classes, peer, source)
    model.load_state_dict(translate_state(state, peer, model, source))
    return model, format


# ----------------------------------------------------------------------------------------------
# The formats: names of layers, priors, input
# ----------------------------------------------------------------------------------------------

# The layers of each format in one order: base, auxiliary convolutions, then the offsets and the scores of each
# source map in turn, and at last the scale of conv4_3.
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
    max_size_offset: float = MAX_SIZE_OFFSET


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


def find_format(state, format, name):
    """The format of a state dict, by its first layer; ValueError, naming the file, if it has another than asked."""
    found = [key for key, peer in FORMATS.items() if f"{peer.layers[0]}.weight" in state]
    wanted = list(FORMATS) if format == "auto" else [format]
    for key in found:
        if key in wanted:
            return key
    expected = " or ".join(f"{FORMATS[key].layers[0]}.weight ({key})" for key in wanted)
    raise ValueError(f"{name}: no entry {expected}, but {', '.join(list(state)[:3])}, ...: not an SSD300 of that format")


def count_classes(state, peer, name):
    """C, from the number of scores that a cell of the first source map gets."""
    bias = take_entry(state, f"{peer.layers[OUR_LAYERS.index('pred_convs.cl_conv4_3')]}.bias", name)
    n_classes, rest = divmod(bias.numel(), SOURCE_MAPS[0].n_priors)
    if rest or n_classes < 2:
        raise ValueError(
            f"{name}: the scores of conv4_3 have {bias.numel()} channels, not a multiple of "
            f"{SOURCE_MAPS[0].n_priors} priors for two classes or more"
        )
    return n_classes


def find_label_map(class_names, n_classes, peer, name):
    """The label map, of the names given or else of the format's; ValueError, naming the file, if too few or many."""
    names = peer.class_names if class_names is None else class_names
    if len(names) != n_classes - 1:
        whose = "the format's own" if class_names is None else "given"
        raise ValueError(
            f"{name}: it knows {n_classes - 1} classes, but {len(names)} names are {whose}; name all of them in the "
            "order of their labels with --class_names=first,second,..."
        )
    return make_label_map(names)


def take_priors(state, peer, name):
    """The priors that the file holds, as those of sgrvinod do, or else those of its format: (P, 4) float32."""
    if "priors_cxcy" not in state:
        return peer.create_priors()
    priors_cxcy = take_entry(state, "priors_cxcy", name)
    if priors_cxcy.shape != (8732, 4) or bool((priors_cxcy[:, 2:] <= 0).any()):
        shape = tuple(priors_cxcy.shape)
        raise ValueError(f"{name}: 'priors_cxcy' must be (8732, 4), sizes above 0, but it is {shape}")
    return priors_cxcy


def translate_state(state, peer, model, name):
    """Turn a state dict of another format into one of ours; it is used up on the way.

    state: dict of name to tensor. model: an SSD300, for the shapes. name: the file, for errors.
    Raises ValueError if an entry is missing, has another shape or is not finite, or if entries are left over.
    """
    translated = {}
    for key, ours in model.state_dict().items():
        layer, _, kind = key.rpartition(".") if key != "rescale_factors" else (key, "", "")
        theirs = peer.layers[OUR_LAYERS.index(layer)]
        entry = f"{theirs}.{kind}" if kind and theirs else theirs
        tensor = take_entry(state, entry, name)
        if layer == "rescale_factors" and tensor.shape == (512,):
            tensor = tensor.view(1, 512, 1, 1)
        if tensor.shape != ours.shape:
            raise ValueError(f"{name}: {entry!r} has shape {tuple(tensor.shape)}, SSD300 needs {tuple(ours.shape)}")
        translated[key] = reorder_head(layer, tensor, peer.order)
    if state:
        raise ValueError(f"{name}: SSD300 has no layers for the entries {', '.join(list(state)[:5])}")
    return translated
