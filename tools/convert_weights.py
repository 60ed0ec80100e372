"""Turn SSD weights of other projects into a checkpoint of ours. Nothing that their files carry is run.

    python tools/convert_weights.py --source=COCO_V1            torchvision's SSD300 for COCO, downloaded once
    python tools/convert_weights.py --source=COCO_V1 --network=ssdlite320_mobilenet_v3_large
    python tools/convert_weights.py --source=ssd300_mAP_77.43_v2.pth --save_to=amdegroot.pth.tar

Reads one of four formats, which it tells apart by the names of the entries:

    sgrvinod      the checkpoint of sgrvinod's tutorial (a pickled model), or a state dict of that model
    amdegroot     a state dict of amdegroot/ssd.pytorch, such as the weights converted from Caffe
    lufficc       a checkpoint of lufficc/SSD with VGG-16: SSD300 or SSD512, for VOC or COCO
    torchvision   a state dict of torchvision's ssd300_vgg16 or ssdlite320_mobilenet_v3_large

Writes a checkpoint for detect.py, eval.py and `train.py --finetune_from=...`. It carries what the weights were
trained with: mean and deviation of the input, how images are resized, priors, and the limit on sizes when boxes are
decoded. torchvision's weights for COCO have scores for 90 numbers, ten of which are not in use ("N/A"): these scores
are left out, and the 80 classes numbered from 1 to 80. So no object is ever called "N/A".
Any parameter below can be overridden on the command line with --name=value.

Shapes in comments: P priors, C classes (background = 0 included).
"""

import io
import math
import pickle
import re
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torchvision.models.detection import SSD300_VGG16_Weights, SSDLite320_MobileNet_V3_Large_Weights

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import utils
from model import CAFFE_MEAN, CAFFE_STD, NETWORKS, SSD300, fit_tail, model_state
from utils import (
    SIZE_VARIANCE,
    check_finite,
    exit_with_message,
    make_label_map,
    override_parameters,
    printable,
    save_checkpoint,
)

source = ""  # the file to convert; or COCO_V1, the name of torchvision's weights, to download them
network = "ssd300_vgg16"  # which of torchvision's weights; or ssdlite320_mobilenet_v3_large. A file shows its own
save_to = "checkpoint_converted.pth.tar"
class_names = ()  # by label; (): VOC's or COCO's, by their number. (With other names than COCO's: VOC's priors)

DOWNLOADS = {
    "ssd300_vgg16": SSD300_VGG16_Weights.COCO_V1,
    "ssdlite320_mobilenet_v3_large": SSDLite320_MobileNet_V3_Large_Weights.COCO_V1,
}


def main():
    if not source:
        raise ValueError("name the file to convert, with --source=FILE, or --source=COCO_V1")
    if Path(save_to).resolve() == Path(source).resolve():
        raise ValueError(f"save_to is {save_to}: the file to convert would be written over")
    model, format = convert(source, class_names, network)
    save_checkpoint(model_state(model), save_to)
    print(f"{source}: {format}'s {model.network}, {model.n_classes - 1} classes; written to {save_to}")


def convert(source, class_names=(), network="ssd300_vgg16"):
    """Build our model from another project's weights.

    source: path of the file, or "COCO_V1". class_names: by label, without background; empty: those of the data set.
    network: a key of DOWNLOADS, for "COCO_V1".
    Returns an SSD300 with its label map, on the CPU, its heads and priors in our order, and the name of the format.
    Raises FileNotFoundError or ValueError, naming the file and what is wrong with it; ConnectionError, naming the
    URL, if a download fails.
    """
    if source == "COCO_V1":
        return convert_state(download_weights(network), class_names)
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source}: there is no such file; or give COCO_V1 for torchvision's weights")
    try:
        return convert_state(find_state(read_file(source)), class_names)
    except Exception as error:  # a file that is damaged, or made to do harm, can fail in many ways
        reason = printable(error)
        raise ValueError(f"{source}: could not be converted, and nothing in it was run: {reason}") from error


def download_weights(network):
    """torchvision's state dict, from its cache or its server; ConnectionError, naming the URL, if that fails."""
    if network not in DOWNLOADS:
        raise ValueError(f"torchvision has no weights for network={network}, only for {', '.join(DOWNLOADS)}")
    weights = DOWNLOADS[network]
    try:
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; a wrong hash is a RuntimeError
        raise ConnectionError(
            f"could not download {weights.url}: {error}. Fetch it by other means, and give --source=FILE"
        ) from error


# --- The formats ----------------------------------------------------------------------------------

COCO_CATEGORIES = SSD300_VGG16_Weights.COCO_V1.meta["categories"]  # with background and "N/A"
COCO_LABELS = [label for label, name in enumerate(COCO_CATEGORIES) if name != "N/A"]  # 0 and 80 of 1 to 90
COCO_NAMES = tuple(COCO_CATEGORIES[label] for label in COCO_LABELS[1:])


class PeerFormat(NamedTuple):
    """How another project names its entries, and what its weights were trained with."""

    # What the names begin with in the base, the auxiliary convolutions, the heads for offsets, those for scores, and
    # rescale_factors. Within each of these, layers come in our order.
    prefixes: tuple
    mean: tuple | None = None  # None: the network's own, here and below
    std: tuple | None = None
    # In the Caffe code's cells of six priors 2, 1/2, 3, 1/3 follow the two squares, in ours 2, 3, 1/2, 1/3.
    order: tuple = (0, 1, 2, 4, 3, 5)
    max_size_offset: float | None = None
    antialias: bool = False


RGB_MEAN = (123 / 255, 117 / 255, 104 / 255)
FORMATS = {
    "sgrvinod": PeerFormat(  # its names are ours
        ("base.", "aux_convs.", "pred_convs.loc_", "pred_convs.cl_", "rescale_factors"),
        order=(0, 1, 2, 3, 4, 5), antialias=True,
    ),
    "amdegroot": PeerFormat(("vgg.", "extras.", "loc.", "conf.", "L2Norm."), RGB_MEAN, CAFFE_STD),
    "lufficc": PeerFormat(
        ("backbone.vgg.", "backbone.extras.", "box_head.predictor.reg_headers.", "box_head.predictor.cls_headers.",
         "backbone.l2_norm."), RGB_MEAN, CAFFE_STD,
    ),
    "torchvision": PeerFormat(
        ("backbone.features.", "backbone.extra.", "head.regression_head.", "head.classification_head.",
         "backbone.scale_weight"), CAFFE_MEAN, CAFFE_STD,
        max_size_offset=math.log(1000 / 16) / SIZE_VARIANCE,  # its bbox_xform_clip
    ),
}  # fmt: skip


def recognise_format(state):
    """The format whose layers a state dict has; ValueError if there is none."""
    for format, peer in FORMATS.items():
        if all(list_entries(state, [prefix]) for prefix in peer.prefixes[:4]):  # SSDLite has no rescale_factors
            return format
    found = printable(", ".join(list(state)[:5])) or "none at all"
    raise ValueError(f"its entries are not named as those of {', '.join(FORMATS)}; they are {found}")


def list_entries(state, prefixes):
    """The entries that begin with one of these, prefix by prefix, in the order of the numbers in them: 2 before 10."""

    def by_number(name):
        return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]

    entries = []
    for prefix in prefixes:
        entries += sorted([name for name in state if name.startswith(prefix)], key=by_number)
    return entries


# --- From their entries to ours -------------------------------------------------------------------


def convert_state(state, class_names=()):
    """Build our model from a state dict: see `convert()`. If it does not fit, this raises errors of many kinds."""
    format = recognise_format(state)
    peer = FORMATS[format]
    cl_biases = [name for name in list_entries(state, [peer.prefixes[3]]) if name.endswith(".bias")]
    if "backbone.features.0.0.0.weight" in state:
        network = "ssdlite320_mobilenet_v3_large"
        peer = peer._replace(mean=None, std=None)
    else:
        network = "ssd512_vgg16" if len(cl_biases) == 7 else "ssd300_vgg16"
    n_scores = state[cl_biases[-1]].numel()  # of the last map: one for each prior and class
    n_classes = n_scores // NETWORKS[network].sources[-1].n_priors
    class_names, labels = choose_classes(n_classes, class_names)
    # torchvision and the tutorial have one set of scales for all data; amdegroot and lufficc have another one for COCO.
    is_for_coco = format != "sgrvinod" and tuple(class_names) == COCO_NAMES
    has_small_priors = format == "torchvision" or is_for_coco
    if has_small_priors and not NETWORKS[network].is_lite:
        network += "_coco"
    model = SSD300(len(labels), network, peer.mean, peer.std, peer.max_size_offset, peer.antialias)
    model.label_map = make_label_map(class_names)
    # The tutorial's pickled model has its priors with it.
    priors_cxcy = state["priors_cxcy"] if "priors_cxcy" in state else create_peer_priors(format, network)
    model.priors_cxcy.copy_(priors_cxcy)
    translated = translate_state(state, peer, model, labels, n_classes)
    fit_tail(model, translated)  # of an SSDLite: it is wider if its training began with ImageNet's weights
    model.load_state_dict(translated)
    check_finite({**model.state_dict(), "priors_cxcy": model.priors_cxcy})
    return model, format


def choose_classes(n_classes, class_names):
    """The class names of a network that has scores for n_classes, and the labels whose scores are kept.

    class_names: as given; empty: those of VOC or COCO.
    """
    labels = range(n_classes)
    if not class_names:
        class_names = utils.voc_labels if n_classes == len(utils.voc_labels) + 1 else COCO_NAMES
        labels = COCO_LABELS if n_classes == len(COCO_CATEGORIES) else labels  # those that are in use
    if len(labels) != len(class_names) + 1:
        raise ValueError(f"it has {n_classes - 1} classes; name all, by label, with --class_names=first,second,...")
    return class_names, list(labels)


def create_peer_priors(format, network):
    """The priors that a format's weights were trained with: (P, 4) float32, center-size form, in our order.

    sgrvinod: ours, but for 0.333 in place of 1/3, 1 as the last extra prior, and all four numbers clipped.
    The Caffe family: centres that lie so many pixels apart, some of them outside the image, and other scales for
    VOC; amdegroot and lufficc clip all four numbers, torchvision the sizes. SSDLite: ours.
    """
    row = NETWORKS[network]
    if row.is_lite:
        return SSD300.create_prior_boxes(network)
    scales = list(row.scales)
    steps = [1 / source.grid for source in row.sources]
    third = 1 / 3
    if format == "sgrvinod":
        third = 0.333
        scales[-1] = 1 / scales[-2]
    elif row.input_size == 300:
        steps = [pixels / 300 for pixels in (8, 16, 32, 64, 100, 300)]
    if format != "sgrvinod" and network == "ssd300_vgg16":
        scales = [pixels / 300 for pixels in (30, 60, 111, 162, 213, 264, 315)]
    priors = []
    for source, scale, next_scale, step in zip(row.sources, scales[:-1], scales[1:], steps, strict=True):
        ratios = [third if ratio == 1 / 3 else ratio for ratio in source.aspect_ratios]
        sizes = [(scale * ratio**0.5, scale / ratio**0.5) for ratio in ratios]
        between = (scale * next_scale) ** 0.5
        sizes.insert(1, (between, between))
        centers = [(i + 0.5) * step for i in range(source.grid)]
        priors += [(c_x, c_y, w, h) for c_y in centers for c_x in centers for w, h in sizes]
    priors_cxcy = torch.tensor(priors)
    first_clipped = 2 if format == "torchvision" else 0
    priors_cxcy[:, first_clipped:].clamp_(0, 1)
    return priors_cxcy


def translate_state(state, peer, model, labels, n_classes):
    """Turn a state dict of another format, of n_classes, into one of ours, of those with these labels.

    Raises ValueError if there are entries too many or too few. (Their shapes are compared by load_state_dict().)
    """
    our_names = list_entries(model.state_dict(), FORMATS["sgrvinod"].prefixes)
    their_names = list_entries(state, peer.prefixes)
    others = sorted(set(state) - {*their_names, "priors_cxcy"})
    if others:
        raise ValueError(f"entries that are not part of {model.network}: {printable(', '.join(others[:5]))}")
    if len(their_names) != len(our_names):
        raise ValueError(f"it has {len(their_names)} entries; {model.network} needs {len(our_names)}")
    translated = {ours: state[theirs] for ours, theirs in zip(our_names, their_names, strict=True)}
    if "rescale_factors" in translated:
        translated["rescale_factors"] = translated["rescale_factors"].reshape(1, -1, 1, 1)
    last_layer = ".1" if model.architecture.is_lite else ""  # of a head
    for source in model.architecture.sources:
        order = [place for place in peer.order if place < source.n_priors]
        for parameter in ("weight", "bias"):
            loc = f"pred_convs.loc_{source.name}{last_layer}.{parameter}"
            cl = f"pred_convs.cl_{source.name}{last_layer}.{parameter}"
            by_prior = translated[loc].unflatten(0, (source.n_priors, 4))
            translated[loc] = by_prior[order].flatten(0, 1)
            by_prior = translated[cl].unflatten(0, (source.n_priors, n_classes))
            translated[cl] = by_prior[order][:, labels].flatten(0, 1)
    return translated


# --- Reading the file, without running anything ---------------------------------------------------


def read_file(path):
    """The contents of a file that torch.save() wrote, with a StandIn for every object that is not a tensor.

    sgrvinod's checkpoint is a pickled model. To unpickle it would be to run whatever it asks for; torch.load() with
    weights_only=True refuses it, and so would this program. So torch reads it with an unpickler that does nothing.
    (What weights_only=True refuses for other reasons, such as TorchScript, is not tried again.)
    """
    contents = Path(path).read_bytes()  # once: the second reading below sees what the first one refused
    try:
        return torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # it holds more than tensors
        with warnings.catch_warnings():  # about the source code of the classes, which is not there
            warnings.simplefilter("ignore")
            # weights_only=False lets torch take another unpickler than its own: ours, which runs nothing.
            return torch.load(io.BytesIO(contents), map_location="cpu", weights_only=False, pickle_module=InertPickle)


def find_state(contents):
    """The state dict in what a file holds: a dict of name to value. ValueError if there is none."""
    if isinstance(contents, dict) and str(contents.get("format")).startswith("ssd300/"):
        raise ValueError(
            "it is a checkpoint of this repo, which needs no conversion. If train.py refuses it, it is damaged: take "
            "an older one, such as the best_ one"
        )
    for key in ("model", "state_dict"):
        if isinstance(contents, dict) and key in contents:
            contents = contents[key]
    if isinstance(contents, StandIn):  # a pickled model
        priors = {"priors_cxcy": contents.priors_cxcy} if hasattr(contents, "priors_cxcy") else {}
        contents = {**dict(contents.named_parameters()), **priors}
    if not isinstance(contents, dict):
        raise ValueError(f"it holds no state dict, but an object of type {type(contents).__name__}")
    return {name.removeprefix("module."): value for name, value in contents.items()}  # of nn.DataParallel


class StandIn(nn.Module):
    """Takes the place of any object in a pickle; it keeps the object's attributes and does nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass


class InertUnpickler(pickle.Unpickler):
    """Reads a pickle without importing or calling anything that it names.

    All that a pickle can do beyond numbers, strings and containers, it does by names, which come here. They are met
    with the three functions below, which make tensors, or with classes that do nothing.
    """

    def find_class(self, module, name):
        full_name = f"{module}.{name}"
        if full_name == "collections.OrderedDict":
            return OrderedDict
        if full_name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return self.rebuild_tensor
        if full_name in ("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter"):
            return self.rebuild_parameter
        return type(name, (StandIn,), {})

    def rebuild_tensor(self, storage, offset, size, stride, *_):
        return torch._utils._rebuild_tensor(storage, offset, size, stride)

    def rebuild_parameter(self, tensor, *_):
        return tensor


class InertPickle:
    """What torch.load() needs of a pickle module."""

    Unpickler = InertUnpickler

    @staticmethod
    def load(file, **options):
        return InertUnpickler(file, **options).load()


if __name__ == "__main__":
    override_parameters(globals(), sys.argv[1:])
    with exit_with_message():
        main()
