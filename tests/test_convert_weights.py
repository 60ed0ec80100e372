"""Weights of other projects: the converted network does what the peer's does; bad files are refused, none is run.

torchvision's networks run here. The others' are the same as its SSD300: of them the place of each number is looked at.
"""

import itertools
import pickle
import sys
import types
from functools import partial
from unittest.mock import Mock, patch

import convert_weights
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from convert_weights import COCO_CATEGORIES, COCO_NAMES, convert
from helpers import LABEL_MAP, Payload
from make_sample import draw_sample
from torch import nn
from torchvision.models import mobilenet_v3_large
from torchvision.models.detection import ssd300_vgg16, ssdlite320_mobilenet_v3_large

from datasets import prepare
from model import SSD300, load_model
from utils import cxcy_to_xy, gcxgcy_to_cxcy, voc_labels

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code", "ignore:Detected pickle protocol")

# Our place of each prior in the Caffe code's cells: 1, extra, 2, 1/2 and 1, extra, 2, 1/2, 3, 1/3.
FOUR, SIX = [0, 1, 2, 3], [0, 1, 2, 4, 3, 5]
CAFFE_CELLS = ((38, FOUR), (19, SIX), (10, SIX), (5, SIX), (3, FOUR), (1, FOUR))
OWN = tuple(LABEL_MAP)[1:]
EIGHTY = tuple(f"class {i}" for i in range(80))  # as many as COCO has
PICTURE = draw_sample(np.random.default_rng(4))[0]
PIXELS = torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)
LITE = "ssdlite320_mobilenet_v3_large"
LITE_NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
LITE_CELLS = tuple((grid, SIX) for grid in (20, 10, 5, 3, 2, 1))

VGG = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
BLOCKS = ("1_1", "1_2", "2_1", "2_2", "3_1", "3_2", "3_3", "4_1", "4_2", "4_3", "5_1", "5_2", "5_3", "6", "7")
PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28, 31, 33)
MAPS = ("conv4_3", "conv7", "conv8_2", "conv9_2", "conv10_2", "conv11_2", "conv12_2")
PATTERNS = {  # names of base, auxiliary layers, offsets, scores and scale
    "sgrvinod": ("base.conv{1}", "aux_convs.conv{1}", "pred_convs.loc_{1}", "pred_convs.cl_{1}", "rescale_factors"),
    "amdegroot": ("vgg.{0}", "extras.{0}", "loc.{0}", "conf.{0}", "L2Norm.weight"),
    "lufficc": ("backbone.vgg.{0}", "backbone.extras.{0}", "box_head.predictor.reg_headers.{0}",
                "box_head.predictor.cls_headers.{0}", "backbone.l2_norm.weight"),
}  # fmt: skip


def light_state(peer="amdegroot", n_classes=21, n_maps=6):
    """A peer's state dict in which each output of a layer has two numbers of its own; its file has a few kilobytes."""
    base, extras, loc, cl, scale = PATTERNS[peer]
    names = [base.format(*names) for names in zip(PLACES, BLOCKS, strict=True)]
    names += [extras.format(i, f"{8 + i // 2}_{1 + i % 2}") for i in range(2 * n_maps - 4)]
    names += [head.format(i, MAPS[i]) for i in range(n_maps) for head in (loc, cl)]
    shapes = [(n_out, n_in, 3) for n_in, n_out in itertools.pairwise((3, *VGG))] + [(1024, 512, 3), (1024, 1024, 1)]
    widths = (512, 1024, 512, 256, 256, 256, 256)[:n_maps]
    for i, (n_in, n_out) in enumerate(itertools.pairwise(widths[1:])):
        shapes += [(n_out // 2, n_in, 1), (n_out, n_out // 2, 4 if i == 4 else 3)]
    for width, n in zip(widths, (4, *[6] * (n_maps - 3), 4, 4), strict=True):
        shapes += [(n * 4, width, 3), (n * n_classes, width, 3)]
    state = {scale: torch.arange(512.0)}
    for i, (name, (n_out, n_in, kernel)) in enumerate(zip(names, shapes, strict=True)):
        numbers = torch.arange(n_out) + 10_000.0 * i
        state[f"{name}.weight"] = numbers.view(-1, 1, 1, 1).expand(n_out, n_in, kernel, kernel)
        state[f"{name}.bias"] = numbers + 0.5
    return state


def assert_same_places(model, peer, n_classes=21, n_maps=6):
    """Each number of a light state is where it belongs: by layer, scale, and prior of our order."""
    for name, theirs in light_state("sgrvinod", n_classes, n_maps).items():  # whose names are ours
        if name.startswith("pred_convs") and peer != "sgrvinod":
            theirs = theirs.unflatten(0, (-1, 4 if ".loc_" in name else n_classes))
            theirs = theirs[FOUR if len(theirs) == 4 else SIX].flatten(0, 1)
        assert torch.equal(model.state_dict()[name].flatten(), theirs.flatten()), name


def caffe_places(cells=CAFFE_CELLS):
    """For each of our priors the place at which a network of the Caffe family has it."""
    places = []
    for grid, cell in cells:
        start = len(places)
        places += [start + i * len(cell) + place for i in range(grid * grid) for place in cell]
    return places


def list_priors(scales, ratios, steps=tuple(1 / grid for grid, _ in CAFFE_CELLS)):
    """A table of SSD300's priors: at each place a square, a larger one, and these ratios (of four priors: to 2)."""
    priors = []
    for k, (grid, cell) in enumerate(CAFFE_CELLS):
        sizes = [[scales[k]] * 2, [(scales[k] * scales[k + 1]) ** 0.5] * 2]
        sizes += [[scales[k] * r**0.5, scales[k] / r**0.5] for r in ratios if len(cell) == 6 or 0.4 < r < 2.5]
        centers = [(i + 0.5) * steps[k] for i in range(grid)]
        priors += [[x, y, *size] for y in centers for x in centers for size in sizes]
    return torch.tensor(priors).clamp(0, 1)


# The tutorial's table; the last extra square has side 1.
TUTORIAL_PRIORS = list_priors([0.1, 0.2, 0.375, 0.55, 0.725, 0.9, 1 / 0.9], (2.0, 3.0, 0.5, 0.333))


def caffe_priors(*sides):
    """amdegroot's and lufficc's table, of sizes in pixels, in our order."""
    steps = [step / 300 for step in (8, 16, 32, 64, 100, 300)]
    return list_priors([side / 300 for side in sides], (2, 1 / 2, 3, 1 / 3), steps)[caffe_places()]


def wide_ssdlite(**options):
    """torchvision's SSDLite as it is when its training begins with ImageNet's weights: no channels are halved."""
    base = "torchvision.models.detection.ssdlite.mobilenet_v3_large"
    with patch(base, lambda **_: mobilenet_v3_large(norm_layer=LITE_NORM)):
        return ssdlite320_mobilenet_v3_large(**options)


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert theirs.std() > 0.05  # numbers that could differ


def shrink(antialias):
    """PICTURE as the peers shrink it: (1, 3, 300, 300) bytes as floats."""
    return F.interpolate(PIXELS[None].float(), (300, 300), mode="bilinear", antialias=antialias).round()


# --- What their networks do, ours do --------------------------------------------------------------


@pytest.fixture
def tutorial_model(monkeypatch):
    """The tutorial's SSD300 with the numbers of `light_state()`; its classes are in a module `model`."""
    module, state = types.ModuleType("model"), light_state("sgrvinod")
    for name in ("SSD300", "VGGBase", "AuxiliaryConvolutions", "PredictionConvolutions"):
        setattr(module, name, type(name, (nn.Module,), {"__module__": "model"}))
    monkeypatch.setitem(sys.modules, "model", module)
    network = module.SSD300()
    network.base, network.aux_convs = module.VGGBase(), module.AuxiliaryConvolutions()
    network.pred_convs = module.PredictionConvolutions()
    network.base.pool1 = nn.MaxPool2d(2, 2)
    for name in filter(lambda name: name.endswith(".weight"), state):
        part, layer, _ = name.split(".")
        n_out, n_in, kernel, _ = state[name].shape
        setattr(getattr(network, part), layer, nn.Conv2d(n_in, n_out, kernel, device="meta"))
    network.rescale_factors = nn.Parameter(torch.empty(1, 512, 1, 1, device="meta"))
    network.load_state_dict({**state, "rescale_factors": state["rescale_factors"].view(1, 512, 1, 1)}, assign=True)
    network.n_classes, network.priors_cxcy = 21, TUTORIAL_PRIORS
    return network


def test_tutorial_checkpoint(tutorial_model, tmp_path, run_main):
    optimizer = torch.optim.SGD([{"params": tutorial_model.base.parameters(), "lr": 2e-3}], lr=1e-3, momentum=0.9)
    optimizer.state[tutorial_model.base.conv1_1.bias]["momentum_buffer"] = torch.ones(64)
    path = tmp_path / "tutorial.pth.tar"
    torch.save({"epoch": 7, "model": tutorial_model, "optimizer": optimizer}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # it is a pickled model indeed
    del sys.modules["model"]  # and its classes are not needed
    run_main(convert_weights, source=str(path), save_to=str(tmp_path / "ours.pth.tar"))
    model = load_model(tmp_path / "ours.pth.tar")
    assert (model.network, model.antialias) == ("ssd300_vgg16", True)
    assert list(model.label_map) == ["background", *voc_labels] and torch.equal(model.priors_cxcy, TUTORIAL_PRIORS)
    assert_same_places(model, "sgrvinod")
    x = shrink(antialias=True)
    assert_close(model.normalize(x.byte()), (x / 255 - model.mean) / model.std)


def test_tutorial_checkpoint_of_torch_0_4(tutorial_model, tmp_path, monkeypatch):
    """As the published file was written: on a GPU, parameters are made by a call of their class, no priors."""
    del tutorial_model.priors_cxcy
    checkpoint = {"epoch": 231, "model": tutorial_model, "optimizer": torch.optim.SGD([torch.zeros(3)])}
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        patch.setattr(nn.Parameter, "__reduce_ex__", lambda parameter, _: (nn.Parameter, (parameter.data, True)))
        torch.save(checkpoint, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    model, _ = convert(str(tmp_path / "old.pth.tar"))
    assert_same_places(model, "sgrvinod")
    torch.testing.assert_close(model.priors_cxcy, TUTORIAL_PRIORS, rtol=0, atol=1e-7)  # without pickled ones


@pytest.mark.parametrize(("peer", "options", "network", "names", "priors_cxcy"), [
    ("sgrvinod", {}, "ssd300_vgg16", voc_labels, TUTORIAL_PRIORS),
    ("sgrvinod", {"n_classes": 81}, "ssd300_vgg16", COCO_NAMES, TUTORIAL_PRIORS),
    ("amdegroot", {"n_classes": 81}, "ssd300_vgg16", EIGHTY, caffe_priors(30, 60, 111, 162, 213, 264, 315)),
    ("amdegroot", {"n_classes": 4}, "ssd300_vgg16", OWN, caffe_priors(30, 60, 111, 162, 213, 264, 315)),
    ("lufficc", {"n_classes": 81}, "ssd300_vgg16_coco", COCO_NAMES, caffe_priors(21, 45, 99, 153, 207, 261, 315)),
    ("lufficc", {"n_maps": 7}, "ssd512_vgg16", voc_labels, SSD300.create_prior_boxes("ssd512_vgg16").clamp(0, 1)),
])  # fmt: skip
def test_state_dicts(tmp_path, peer, options, network, names, priors_cxcy):
    state = {f"module.{name}": tensor for name, tensor in light_state(peer, **options).items()}  # of nn.DataParallel
    contents = {"model" if peer == "lufficc" else "state_dict": state, "iteration": 120_000}
    torch.save(contents, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    model, format = convert(str(tmp_path / "w.pth"), class_names=names if names in (OWN, EIGHTY) else ())
    assert (format, model.network) == (peer, network) and list(model.label_map) == ["background", *names]
    torch.testing.assert_close(model.priors_cxcy, priors_cxcy, rtol=0, atol=1e-6)
    assert_same_places(model, peer, **options)
    if peer != "sgrvinod" and model.input_size == 300:  # what the network sees, but for rounding
        x = shrink(antialias=False) - torch.tensor([123.0, 117.0, 104.0]).view(3, 1, 1)
        assert (prepare([PICTURE], model) - x).abs().max() <= 1.001 and not model.antialias


@pytest.mark.parametrize(("build", "name", "size", "cells"), [
    (ssd300_vgg16, "ssd300_vgg16", 300, CAFFE_CELLS), (ssdlite320_mobilenet_v3_large, LITE, 320, LITE_CELLS),
    (wide_ssdlite, LITE, 320, LITE_CELLS),
])  # fmt: skip
@torch.no_grad()
def test_torchvision_weights_by_name(monkeypatch, tmp_path, run_main, build, name, size, cells):
    torch.manual_seed(0)
    network = build(weights=None, weights_backbone=None).eval()
    for key, parameter in network.named_parameters():
        if key.endswith("bias"):
            parameter.normal_(std=0.1)
        if "head" in key and key.endswith("weight") and parameter.dim() == 4:
            parameter.mul_(4)
    if build is ssd300_vgg16:
        network.backbone.features[0].weight.mul_(1 / 70)  # its input is as large as bytes are
        # Sizes of some priors beyond the limit: for the first map's first prior, of offset 30.
        network.head.regression_head.module_list[0].bias[2:4] = 30.0
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: network.state_dict())
    run_main(convert_weights, source="COCO_V1", network=name, save_to=str(tmp_path / "ours.pth.tar"))
    model = load_model(tmp_path / "ours.pth.tar")
    # Labels that are not in use, "N/A", are left out with their scores: no object is ever called so.
    kept = [label for label, name in enumerate(COCO_CATEGORIES) if name != "N/A"]
    assert list(model.label_map) == ["background", *(COCO_CATEGORIES[label] for label in kept[1:])]
    assert len(model.label_map) == 81 and model.input_size == size and not model.antialias
    inputs, _ = network.transform([PIXELS / 255])
    assert ((prepare([PICTURE], model) - inputs.tensors) * model.std).abs().max() < 1.001 / 255  # we round to bytes
    maps = list(network.backbone(inputs.tensors).values())
    theirs, (anchors,) = network.head(maps), network.anchor_generator(inputs, maps)
    their_boxes = network.box_coder.decode_single(theirs["bbox_regression"][0], anchors) / size
    locs, scores = model(inputs.tensors)
    places = caffe_places(cells)
    assert_close(locs, theirs["bbox_regression"][:, places])
    assert_close(scores, theirs["cls_logits"][:, places][:, :, kept])
    assert_close(cxcy_to_xy(gcxgcy_to_cxcy(model.limit_sizes(locs[0]), model.priors_cxcy)), their_boxes[places])
    assert_same_detections(network, model, theirs, anchors, places, kept, size)


def assert_same_detections(network, model, theirs, anchors, places, kept, size):
    """Our detection finds what torchvision's finds where it cuts nothing: boxes at the edge, all but 300 of a class."""
    # The same noise on both sides: random weights see nearly the same in all cells, and near ties go either way.
    generator = torch.Generator().manual_seed(1)
    locs, scores = theirs["bbox_regression"], theirs["cls_logits"]
    locs = locs + torch.randn(locs.shape, generator=generator).clamp(-2, 2)
    scores = scores + 3 * torch.randn(scores.shape, generator=generator)
    boxes_xy = network.box_coder.decode_single(locs[0], anchors) / size
    scores[0, ((boxes_xy < 0) | (boxes_xy > 1)).any(dim=1), 0] = 100.0
    scores[0, :, [label for label in range(91) if label not in kept]] = -30.0
    limit = scores.softmax(dim=2)[0, :, 1:].flatten().topk(1000).values[-2:].mean().item()
    network.score_thresh, network.topk_candidates, network.detections_per_img = limit, 10_000, 10_000
    head = {"bbox_regression": locs, "cls_logits": scores}
    (found,) = network.postprocess_detections(head, [anchors], [(size, size)])
    ours = locs[:, places], scores[:, places][:, :, kept]
    (boxes,), (labels,), (confidence,) = model.detect_objects(*ours, limit, network.nms_thresh, 10_000)
    assert len(boxes) > 20 and len(labels.unique()) > 3
    ours = torch.cat([boxes, torch.tensor(kept)[labels, None], confidence[:, None]], dim=1)
    theirs = torch.cat([found["boxes"] / size, found["labels"][:, None], found["scores"][:, None]], dim=1)
    distance = (ours[:, None] - theirs).abs().amax(dim=2)
    n_same = [int((distance.amin(dim=dim) < 1e-3).sum()) for dim in (0, 1)]
    assert min(n_same) >= 0.99 * max(distance.shape)  # an overlap of just the limit can go either way


# --- Files that are wrong, or made to do harm -----------------------------------------------------


def change(entry, value):
    """A state dict of amdegroot's with a value for one entry."""
    return {**light_state(), entry: value}


@pytest.mark.parametrize(("contents", "options", "message"), [
    (change("vgg.99.bias", torch.zeros(1)), {}, "it has 72 entries; ssd300_vgg16 needs 71"),
    (change("vgg.5.bias", torch.zeros(127)), {}, r"base\.conv2_1\.bias: .*\[127\]"),
    (change("conf.3.bias", torch.full((126,), torch.nan)), {}, r"pred_convs\.cl_conv9_2\.bias holds .* not finite"),
    (change("conf.5.bias", torch.zeros(85)), {}, r"unflatten: .* \(85\)"),
    (change("conf.0.bias", torch.zeros(80)), {}, r"unflatten: .* \(80\)"),
    (change("conf.5.bias", torch.tensor(1.0)), {}, "it has -1 classes"),
    ("vgg.0.weight extras.0.weight loc.0.weight conf.0.weight", {}, "could not be converted"),  # names alone
    (change("other.weight", torch.zeros(1)), {}, r"not part of ssd300_vgg16: other\.weight"),
    (change("L2Norm.weight", "twenty"), {}, "'str'"),
    (light_state(n_classes=4), {}, "it has 3 classes.*--class_names"), ([1, 2], {}, "it holds no state dict"),
    (light_state(n_classes=4), {"class_names": ["cat"]}, "it has 3 classes.*--class_names"),
    ("something\x1b[31m", {}, r"not named as those of sgrvinod, .*; they are something\\x1b\[31m"),
    ("", {}, "none at all"),
    ({"format": "ssd300/1", "model": {}}, {}, "a checkpoint of this repo"), (b"<html>404</html>", {}, "nothing in it"),
    (b"PK\x03\x04" + bytes(400), {}, "nothing in it"),  # a download that broke off
])  # fmt: skip
def test_files_that_cannot_fit(tmp_path, contents, options, message):
    path = tmp_path / "bad.pth"
    contents = dict.fromkeys(contents.split(), torch.zeros(1)) if isinstance(contents, str) else contents
    path.write_bytes(contents) if isinstance(contents, bytes) else torch.save(contents, path)
    with pytest.raises(ValueError, match=rf"bad\.pth: .*{message}"):
        convert(str(path), **options)


@pytest.mark.parametrize(("source", "options", "error", "message"), [
    ("nothing.pth", {}, FileNotFoundError, r"nothing\.pth.*COCO_V1"),
    ("COCO_V1", {"network": "ssd300_tiny"}, ValueError, "no weights for network=ssd300_tiny"),
    ("COCO_V1", {}, ConnectionError, r"ssd300_vgg16_coco-\w+\.pth.*--source=FILE"),
    ("COCO_V1", {"network": LITE}, ConnectionError, r"ssdlite320_mobilenet_v3_large_coco-\w+\.pth"),
])  # fmt: skip
def test_arguments_that_are_wrong_and_downloads_that_fail(monkeypatch, source, options, error, message):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", Mock(side_effect=OSError("no route")))
    with pytest.raises(error, match=message):
        convert(source, **options)


def test_the_source_is_not_written_over(tmp_path, monkeypatch, run_main):
    monkeypatch.chdir(tmp_path)
    torch.save(light_state(), "w.pth")
    before = (tmp_path / "w.pth").read_bytes()
    with pytest.raises(ValueError, match=r"w\.pth: the file to convert would be written over"):
        run_main(convert_weights, source="w.pth", save_to=str(tmp_path / "w.pth"))
    assert (tmp_path / "w.pth").read_bytes() == before


@pytest.mark.parametrize("is_zip", [True, False])
def test_payloads_do_not_run(tutorial_model, tmp_path, is_zip):
    """In the model, beside it, or in a state dict: they are left out, or the file is refused."""
    payload, path = Payload(tmp_path / "ran"), tmp_path / "evil.pth"
    tutorial_model.base.trap = payload
    torch.save({"model": tutorial_model, "optimizer": payload}, path, _use_new_zipfile_serialization=is_zip)
    assert_same_places(convert(str(path))[0], "sgrvinod")
    torch.save({**light_state(), "trap": payload}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"evil\.pth: .*: entries that are not part of ssd300_vgg16: trap"):
        convert(str(path))
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # the payload is a real one
    assert (tmp_path / "ran").exists()


def damage_model(model, damage):
    """Change a pickled model so that no weights can be found in it, or only with endless work."""
    base = model.base
    if damage == "a module that holds itself":
        base._modules["base"] = base
    elif damage == "modules that hold each other twice, 60 deep":
        for _ in range(60):
            outer = type(model)()
            outer._modules = {"a": base, "b": base}
            base = outer
        model._modules["deep"] = base
    elif damage == "no parameters":
        del base.__dict__["_parameters"]
    elif damage == "parameters that are a list":
        base.__dict__["_parameters"] = [1, 2]
    elif damage == "a child that is a number":
        base._modules["conv9_9"] = 5
    elif damage == "names that are numbers":
        base._parameters[5] = torch.zeros(3)


@pytest.mark.parametrize("damage", [
    "a module that holds itself", "modules that hold each other twice, 60 deep", "no parameters",
    "parameters that are a list", "a child that is a number", "names that are numbers",
])  # fmt: skip
@pytest.mark.parametrize("is_zip", [True, False])
def test_hostile_models(tutorial_model, tmp_path, damage, is_zip):
    """They are converted, if all weights are there, or refused in words."""
    damage_model(tutorial_model, damage)
    path = tmp_path / "evil.pth"
    torch.save({"model": tutorial_model}, path, _use_new_zipfile_serialization=is_zip)
    tutorial_model._modules.clear()  # or else pytest, when this fails, would print it without end
    if "hold" in damage:
        assert_same_places(convert(str(path))[0], "sgrvinod")
    else:
        with pytest.raises(ValueError, match=r"evil\.pth: could not be converted, and nothing in it was run: "):
            convert(str(path))


@pytest.mark.filterwarnings("ignore:Validating sparse", "ignore:TypedStorage")
@pytest.mark.parametrize("tensor", [
    torch.zeros(3).to_sparse(), torch.zeros(3, device="meta"), torch.zeros(1).expand(10**12), "text",
])  # fmt: skip
def test_hostile_tensors(tmp_path, tensor):
    for entry in ("conf.5.bias", "vgg.0.weight", "priors_cxcy"):
        torch.save(change(entry, tensor), tmp_path / "evil.pth")
        with pytest.raises(ValueError, match=r"evil\.pth: could not be converted"):
            convert(str(tmp_path / "evil.pth"))


def test_a_damaged_checkpoint_of_ours_is_not_sent_back_and_forth(tiny_checkpoint, tmp_path):
    """train.py and this program do not name each other, whatever is wrong with it."""
    saved = torch.load(tiny_checkpoint, weights_only=True)
    contents = tiny_checkpoint.read_bytes()
    middle = len(contents) // 2
    torch.save({**saved, "optimizer": Payload(tmp_path / "ran")}, tmp_path / "payload.pth")
    (tmp_path / "cut.pth").write_bytes(contents[:middle])
    (tmp_path / "zeros.pth").write_bytes(contents[:500] + bytes(500) + contents[1000:])
    torch.save({**saved, "model": 5}, tmp_path / "model.pth")
    for path in sorted(tmp_path.glob("*.pth")):
        with pytest.raises(ValueError, match=path.name) as by_converter:
            convert(str(path))
        with pytest.raises(ValueError, match=path.name) as by_us:
            load_model(path)
        assert "convert_weights" not in str(by_us.value), path
        assert "train.py" not in str(by_converter.value) or "older one" in str(by_converter.value), path
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [
    "builtins eval", "builtins getattr", "__builtin__ exec", "subprocess Popen", "torch load", "torch.hub load",
    "model load_model", "collections namedtuple", "torch.nn.modules.module torch.os.system",
])  # fmt: skip
def test_names_lead_to_nothing(tmp_path, name):
    """A pickle that calls a name of a module with a command, then sets attributes of what came back."""
    module, name = name.split()
    call = f"c{module}\n{name}\nV__import__('os').system('touch {tmp_path / 'ran'}')\n".encode()
    pickled = b"\x80\x04" + call + pickle.TUPLE1 + pickle.REDUCE
    pickled += pickle.EMPTY_DICT + b"Va\nI1\n" + pickle.SETITEM + pickle.BUILD + pickle.STOP
    header = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    (tmp_path / "crafted.pth").write_bytes(header + pickled)
    with pytest.raises(ValueError, match=r"crafted\.pth"):
        convert(str(tmp_path / "crafted.pth"))
    assert not (tmp_path / "ran").exists()
