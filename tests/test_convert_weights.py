"""Weights of other projects: the converted network does what the peer's does; bad files are refused, none is run.

The peers' networks run here as their own architectures: torchvision's itself, the others as a plain function of
their state dicts. In comments P priors, C classes.
"""

import pickle
import sys
import types

import convert_weights
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from convert_weights import convert
from helpers import LABEL_MAP, Payload
from make_sample import draw_sample
from torch import nn
from torchvision.models.detection import SSD300_VGG16_Weights, ssd300_vgg16, ssdlite320_mobilenet_v3_large

from datasets import prepare
from model import SSD300, load_model, model_state
from utils import cxcy_to_xy, gcxgcy_to_cxcy, save_checkpoint, voc_labels

COCO_CATEGORIES = SSD300_VGG16_Weights.COCO_V1.meta["categories"]

# Our place of each prior in the Caffe code's cells: 1, extra, 2, 1/2 and 1, extra, 2, 1/2, 3, 1/3.
FOUR, SIX = [0, 1, 2, 3], [0, 1, 2, 4, 3, 5]
CAFFE_CELLS = ((38, FOUR), (19, SIX), (10, SIX), (5, SIX), (3, FOUR), (1, FOUR))
LITE_CELLS = tuple((grid, SIX) for grid in (20, 10, 5, 3, 2, 1))

# ----------------------------------------------------------------------------------------------
# The peers
# ----------------------------------------------------------------------------------------------

VGG = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
MAPS = ("conv4_3", "conv7", "conv8_2", "conv9_2", "conv10_2", "conv11_2", "conv12_2")
PATTERNS = {  # names of base, auxiliary layers, offsets, scores and scale
    "sgrvinod": ("base.conv{1}", "aux_convs.conv{1}", "pred_convs.loc_{1}", "pred_convs.cl_{1}", "rescale_factors"),
    "amdegroot": ("vgg.{0}", "extras.{0}", "loc.{0}", "conf.{0}", "L2Norm.weight"),
    "lufficc": (
        "backbone.vgg.{0}", "backbone.extras.{0}", "box_head.predictor.reg_headers.{0}",
        "box_head.predictor.cls_headers.{0}", "backbone.l2_norm.weight",
    ),
}  # fmt: skip


def peer_layers(peer, n_classes=21, n_maps=6):
    """Layers of a peer: a list of (name, (out, in, kernel)): base, auxiliary ones, then offsets and scores in turn."""
    base, extras, loc, cl, _ = PATTERNS[peer]
    blocks = ["1_1", "1_2", "2_1", "2_2", "3_1", "3_2", "3_3", "4_1", "4_2", "4_3", "5_1", "5_2", "5_3", "6", "7"]
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28, 31, 33)
    shapes = [(n_out, n_in, 3) for n_in, n_out in zip((3, *VGG), VGG, strict=False)]
    shapes += [(1024, 512, 3), (1024, 1024, 1)]
    layers = [
        (base.format(*names), shape) for names, shape in zip(zip(places, blocks, strict=True), shapes, strict=True)
    ]
    n_in, widths = 1024, [512, 1024]
    for i in range(n_maps - 2):
        middle, n_out = (256, 512) if i == 0 else (128, 256)
        layers.append((extras.format(2 * i, f"{i + 8}_1"), (middle, n_in, 1)))
        layers.append((extras.format(2 * i + 1, f"{i + 8}_2"), (n_out, middle, 4 if i == 4 else 3)))
        n_in = n_out
        widths.append(n_out)
    n_priors = (4, 6, 6, 6, 4, 4) if n_maps == 6 else (4, 6, 6, 6, 6, 4, 4)
    for i, (width, n) in enumerate(zip(widths, n_priors, strict=True)):
        layers += [(loc.format(i, MAPS[i]), (n * 4, width, 3)), (cl.format(i, MAPS[i]), (n * n_classes, width, 3))]
    return layers


def draw_state(peer, first_scale=1.0):
    """Random weights. Activations stay of about unit size if the input, times first_scale, is."""
    generator, state = torch.Generator().manual_seed(0), {}
    for i, (name, (n_out, n_in, kernel)) in enumerate(peer_layers(peer)):
        scale = (2 / (n_in * kernel**2)) ** 0.5 * (first_scale if i == 0 else 1)
        state[f"{name}.weight"] = torch.randn(n_out, n_in, kernel, kernel, generator=generator) * scale
        state[f"{name}.bias"] = torch.randn(n_out, generator=generator) * 0.1
    return {**state, PATTERNS[peer][4]: torch.rand(512, generator=generator) * 20}


def light_state(peer="amdegroot", **sizes):
    """A state dict in which every tensor repeats a number of its own: its file has a few kilobytes."""
    state = {}
    for name, (n_out, n_in, kernel) in peer_layers(peer, **sizes):
        state[f"{name}.weight"] = torch.tensor(float(len(state))).expand(n_out, n_in, kernel, kernel)
        state[f"{name}.bias"] = torch.tensor(float(len(state))).expand(n_out)
    return {**state, PATTERNS[peer][4]: torch.tensor(0.5).expand(512)}


def run_peer(peer, state, x):
    """Offsets (1, P, 4) and scores (1, P, 21) of SSD300 in the order of the peer, layer by layer."""
    layers = iter(peer_layers(peer))

    def conv(x, **options):
        name, _ = next(layers)
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    for i in range(13):
        if i in (2, 4, 7, 10):
            x = F.max_pool2d(x, 2, 2, ceil_mode=i == 7)  # the third rounds up: 75 -> 38
        x = conv(x, padding=1).relu()
        if i == 9:
            scale = state[PATTERNS[peer][4]].view(1, 512, 1, 1)
            maps = [x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10) * scale]
    x = conv(F.max_pool2d(x, 3, 1, 1), padding=6, dilation=6).relu()
    maps.append(conv(x).relu())
    for i in range(4):
        options = {"stride": 2, "padding": 1} if i < 2 else {}
        maps.append(conv(conv(maps[-1]).relu(), **options).relu())
    outputs = [[conv(x, padding=1).permute(0, 2, 3, 1).flatten(1) for _ in range(2)] for x in maps]
    return [torch.cat(parts, 1).view(1, -1, n) for parts, n in zip(zip(*outputs, strict=True), (4, 21), strict=True)]


def caffe_places(cells=CAFFE_CELLS):
    """For each of our priors the place at which a network of the Caffe family has it."""
    places, start = [], 0
    for grid, cell in cells:
        for _ in range(grid * grid):
            places += [start + place for place in cell]
            start += len(cell)
    return places


def tutorial_priors():
    """The tutorial's table, number by number."""
    scales, priors = [0.1, 0.2, 0.375, 0.55, 0.725, 0.9], []
    for k, (grid, cell) in enumerate(CAFFE_CELLS):
        for i in range(grid):
            for j in range(grid):
                for ratio in (1.0, 2.0, 3.0, 0.5, 0.333) if len(cell) == 6 else (1.0, 2.0, 0.5):
                    center = [(j + 0.5) / grid, (i + 0.5) / grid]
                    priors.append([*center, scales[k] * ratio**0.5, scales[k] / ratio**0.5])
                    if ratio == 1.0:
                        extra = (scales[k] * scales[k + 1]) ** 0.5 if k < 5 else 1.0
                        priors.append([*center, extra, extra])
    return torch.tensor(priors).clamp(0, 1)


def caffe_priors(sides):
    """amdegroot's and lufficc's table, in their own order, of SSD300 with priors of these sizes in pixels."""
    priors = []
    for k, (grid, cell) in enumerate(CAFFE_CELLS):
        per_side = 300 / (8, 16, 32, 64, 100, 300)[k]
        for i in range(grid):
            for j in range(grid):
                center, side = [(j + 0.5) / per_side, (i + 0.5) / per_side], sides[k] / 300
                extra = (side * (sides[k + 1] / 300)) ** 0.5
                priors += [[*center, side, side], [*center, extra, extra]]
                for ratio in (2, 3) if len(cell) == 6 else (2,):
                    priors.append([*center, side * ratio**0.5, side / ratio**0.5])
                    priors.append([*center, side / ratio**0.5, side * ratio**0.5])
    return torch.tensor(priors).clamp(0, 1)


def decode(model, locs):
    return cxcy_to_xy(gcxgcy_to_cxcy(model.limit_sizes(locs), model.priors_cxcy))


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert theirs.std() > 0.05  # numbers that could differ


@pytest.fixture(scope="module")
def picture():
    return draw_sample(np.random.default_rng(4))[0]


@torch.no_grad()
def run_ours(model, picture):
    return model.eval()(prepare([picture], model))


def shrink(picture, size=300, antialias=False):
    """A picture as the peers shrink it: (1, 3, size, size) bytes as floats."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    return F.interpolate(pixels, (size, size), mode="bilinear", antialias=antialias).round()


def convert_as_typed(monkeypatch, tmp_path, **parameters):
    """Run the script's main() with parameters as on the command line; returns the model of its checkpoint."""
    for name, value in {"save_to": str(tmp_path / "ours.pth.tar"), **parameters}.items():
        monkeypatch.setattr(convert_weights, name, value)
    convert_weights.main()
    return load_model(tmp_path / "ours.pth.tar")


# ----------------------------------------------------------------------------------------------
# The tutorial: a pickled model
# ----------------------------------------------------------------------------------------------


@pytest.fixture
def tutorial_module(monkeypatch):
    """A module `model` with the tutorial's classes, to pickle objects of them."""
    module = types.ModuleType("model")
    for name in ("SSD300", "VGGBase", "AuxiliaryConvolutions", "PredictionConvolutions"):
        setattr(module, name, type(name, (nn.Module,), {"__module__": "model"}))
    monkeypatch.setitem(sys.modules, "model", module)
    return module


def build_tutorial_model(module, state):
    """The tutorial's SSD300 with the layers of a state dict."""
    network = module.SSD300()
    network.base, network.aux_convs, network.pred_convs = (
        module.VGGBase(), module.AuxiliaryConvolutions(), module.PredictionConvolutions(),
    )  # fmt: skip
    network.base.pool1 = nn.MaxPool2d(2, 2)
    for name in state:
        part, _, layer = name.removesuffix(".weight").partition(".")
        if name.endswith(".weight"):
            n_out, n_in, kernel, _ = state[name].shape
            setattr(getattr(network, part), layer, nn.Conv2d(n_in, n_out, kernel, device="meta"))
    network.rescale_factors = nn.Parameter(torch.empty(1, 512, 1, 1, device="meta"))
    network.load_state_dict({**state, "rescale_factors": state["rescale_factors"].reshape(1, 512, 1, 1)}, assign=True)
    network.n_classes, network.priors_cxcy = 21, tutorial_priors()
    return network


@pytest.mark.parametrize("is_zip", [True, False])
@torch.no_grad()
def test_tutorial_checkpoint(tutorial_module, tmp_path, monkeypatch, picture, is_zip):
    state = draw_state("sgrvinod") if is_zip else light_state("sgrvinod")
    network = build_tutorial_model(tutorial_module, state)
    optimizer = torch.optim.SGD([{"params": network.base.parameters(), "lr": 2e-3}], lr=1e-3, momentum=0.9)
    optimizer.state[network.base.conv1_1.bias]["momentum_buffer"] = torch.ones(64)
    path = tmp_path / "tutorial.pth.tar"
    with pytest.warns() if not is_zip else monkeypatch.context():  # about its source code
        torch.save({"epoch": 7, "model": network, "optimizer": optimizer}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # it is a pickled model indeed
    del sys.modules["model"]  # and its classes are not needed

    model = convert_as_typed(monkeypatch, tmp_path, source=str(path))
    assert list(model.label_map) == ["background", *voc_labels]
    assert (model.network, model.antialias) == ("ssd300_vgg16", True)
    assert torch.equal(model.priors_cxcy, tutorial_priors())
    assert all(torch.equal(tensor.flatten(), state[name].flatten()) for name, tensor in model.state_dict().items())
    if is_zip:  # once is enough
        x = model.normalize(shrink(picture, antialias=True).byte())
        assert_close(x, (shrink(picture, antialias=True) / 255 - model.mean) / model.std)
        ours, theirs = model(x), run_peer("sgrvinod", state, x)
        for one, other in zip(ours, theirs, strict=True):
            assert_close(one, other)
        offsets, priors = theirs[0], tutorial_priors()
        decoded = [priors[:, :2] + offsets[..., :2] * priors[:, 2:] / 10, priors[:, 2:] * (offsets[..., 2:] / 5).exp()]
        assert_close(gcxgcy_to_cxcy(ours[0], model.priors_cxcy), torch.cat(decoded, dim=-1))


class OldStorage:
    """A number, in the place of all those of a tensor."""


class OldPickler(pickle.Pickler):
    """Writes a model as torch 0.4 did after training on a GPU, all numbers of a tensor in one."""

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.storages, self.classes = [], set()

    def persistent_id(self, obj):
        if isinstance(obj, OldStorage):
            self.storages.append(f"9390{len(self.storages)}")
            return "storage", torch.cuda.FloatStorage, self.storages[-1], "cuda:0", 1, None
        if isinstance(obj, type) and issubclass(obj, nn.Module) and obj not in self.classes:
            self.classes.add(obj)
            return "module", obj, "/home/me/model.py", "class SSD300(nn.Module):\n    ..."
        return None

    def reducer_override(self, obj):
        if isinstance(obj, nn.Parameter):
            return nn.Parameter, (obj.data, True)
        if isinstance(obj, torch.Tensor):
            return torch._utils._rebuild_tensor_v2, (OldStorage(), 0, tuple(obj.shape), (0,) * obj.dim(), False, {})
        return NotImplemented


def test_tutorial_checkpoint_of_torch_0_4(tutorial_module, tmp_path, monkeypatch):
    """As the published file was written, which no torch of today would write so; its modules held a backend."""
    thnn = types.ModuleType("torch.nn.backends.thnn")
    exec("def _get_thnn_function_backend(): raise AssertionError('it was called')", vars(thnn))
    monkeypatch.setitem(sys.modules, "torch.nn.backends", types.ModuleType("torch.nn.backends"))
    monkeypatch.setitem(sys.modules, "torch.nn.backends.thnn", thnn)
    network = build_tutorial_model(tutorial_module, light_state("sgrvinod"))
    del network.priors_cxcy  # of more than one number
    backend = type("Backend", (), {"__reduce__": lambda self: (thnn._get_thnn_function_backend, ())})()
    for module in network.modules():
        module._backend = backend
    path = tmp_path / "old.pth.tar"
    with open(path, "wb") as file:
        for header in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}):
            pickle.dump(header, file, protocol=2)
        pickler = OldPickler(file)
        pickler.dump({"epoch": 231, "best_loss": 2.5, "model": network, "optimizer": torch.optim.SGD([torch.zeros(3)])})
        keys = sorted(pickler.storages, reverse=True)
        pickle.dump(keys, file, protocol=2)
        for key in keys:
            file.write((1).to_bytes(8, "little") + np.float32(key).tobytes())
    model, _ = convert(str(path))
    values = [parameter.unique().tolist() for parameter in model.state_dict().values()]
    assert all(len(value) == 1 for value in values)  # one number a tensor, and each tensor its own
    assert len({value for (value,) in values}) == len(values) == 71


def test_tutorial_state_dict(tmp_path):
    """Without the pickled priors the tutorial's table is taken all the same."""
    torch.save({f"module.{name}": tensor for name, tensor in light_state("sgrvinod").items()}, tmp_path / "w.pth")
    model, format = convert(str(tmp_path / "w.pth"))
    assert format == "sgrvinod"
    torch.testing.assert_close(model.priors_cxcy, tutorial_priors(), rtol=0, atol=1e-7)


# ----------------------------------------------------------------------------------------------
# amdegroot and lufficc
# ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_amdegroot_and_lufficc(tmp_path, picture):
    state = draw_state("amdegroot", first_scale=1 / 70)
    torch.save(state, tmp_path / "ssd.pth", _use_new_zipfile_serialization=False)  # as it was in 2017
    model, format = convert(str(tmp_path / "ssd.pth"))
    assert format == "amdegroot" and list(model.label_map) == ["background", *voc_labels]

    x = shrink(picture) - torch.tensor([123.0, 117.0, 104.0]).view(3, 1, 1)
    theirs, ours, places = run_peer("amdegroot", state, x), model.eval()(x), caffe_places()
    assert (
        not model.antialias and (prepare([picture], model) - x).abs().max() <= 1.001
    )  # what it sees, but for rounding
    ours = model.eval()(x)
    for mine, peers in zip(ours, theirs, strict=True):
        assert_close(mine, peers[:, places])
    priors_cxcy = caffe_priors([30, 60, 111, 162, 213, 264, 315])
    their_boxes = cxcy_to_xy(gcxgcy_to_cxcy(theirs[0][0], priors_cxcy))
    assert_close(decode(model, ours[0][0]), their_boxes[places])
    # The order is ours, not only the same on both sides: wide where ours are wide.
    wide = SSD300.create_prior_boxes()
    assert torch.equal(model.priors_cxcy[:, 2] > model.priors_cxcy[:, 3], wide[:, 2] > wide[:, 3])

    renamed = dict(zip(PATTERNS["amdegroot"], PATTERNS["lufficc"], strict=True))
    prefixes = {one.partition("{")[0]: other.partition("{")[0] for one, other in renamed.items()}
    lufficc = {
        prefixes[prefix] + name.removeprefix(prefix): tensor
        for name, tensor in state.items() for prefix in prefixes if name.startswith(prefix)
    }  # fmt: skip
    torch.save({"model": lufficc, "optimizer": {"state": {}}, "iteration": 120000}, tmp_path / "lufficc.pth")
    other, format = convert(str(tmp_path / "lufficc.pth"))
    assert format == "lufficc" and not other.antialias and other.label_map == model.label_map
    assert torch.equal(other.priors_cxcy, model.priors_cxcy) and torch.equal(other.mean, model.mean)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_lufficc_for_coco_and_ssd512(tmp_path):
    torch.save({"model": light_state("lufficc", n_classes=81)}, tmp_path / "coco.pth")
    model, _ = convert(str(tmp_path / "coco.pth"))
    assert model.network == "ssd300_vgg16_coco" and list(model.label_map)[1:] == list(convert_weights.COCO_NAMES)
    theirs = caffe_priors([21, 45, 99, 153, 207, 261, 315])[caffe_places()]
    torch.testing.assert_close(model.priors_cxcy, theirs, rtol=0, atol=1e-6)

    torch.save({"model": light_state("lufficc", n_maps=7)}, tmp_path / "large.pth")
    model, _ = convert(str(tmp_path / "large.pth"))
    assert model.network == "ssd512_vgg16" and model.aux_convs.conv12_2.bias.unique().numel() == 1
    torch.testing.assert_close(model.priors_cxcy, SSD300.create_prior_boxes("ssd512_vgg16").clamp(0, 1))


# ----------------------------------------------------------------------------------------------
# torchvision, its weights by name
# ----------------------------------------------------------------------------------------------


def draw_torchvision(build):
    """torchvision's network with random weights, of which the N/A classes score as low as training makes them."""
    torch.manual_seed(0)
    network = build(weights=None, weights_backbone=None).eval()
    unused = [label for label, name in enumerate(COCO_CATEGORIES) if name == "N/A"]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            if "head" in name and name.endswith("weight") and parameter.dim() == 4:
                parameter.mul_(4)
            if "classification" in name and name.endswith("bias") and parameter.numel() % 91 == 0:
                parameter.view(-1, 91)[:, unused] = -30.0
    return network


def offer_download(monkeypatch, network):
    """The weights of a network in the place of torchvision's server."""
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: network.state_dict())


def run_torchvision(network, x):
    """Offsets (1, P, 4), scores (1, P, 91), boxes (P, 4), fractional, and anchors (P, 4) for an input."""
    maps = list(network.backbone(x).values())
    theirs = network.head(maps)
    images = types.SimpleNamespace(tensors=x, image_sizes=[tuple(x.shape[2:])])
    (anchors,) = network.anchor_generator(images, maps)
    boxes_xy = network.box_coder.decode_single(theirs["bbox_regression"][0], anchors) / x.shape[2]
    return theirs["bbox_regression"], theirs["cls_logits"], boxes_xy, anchors


@pytest.mark.parametrize(
    ("build", "parameters", "size", "cells"),
    [
        (ssd300_vgg16, {}, 300, CAFFE_CELLS),
        (ssdlite320_mobilenet_v3_large, {"network": "ssdlite320_mobilenet_v3_large"}, 320, LITE_CELLS),
    ],
)
@torch.no_grad()
def test_torchvision_weights_by_name(monkeypatch, tmp_path, picture, build, parameters, size, cells):
    network = draw_torchvision(build)
    if build is ssd300_vgg16:
        network.backbone.features[0].weight.mul_(1 / 70)  # its input is as large as bytes are
        # Sizes of some priors beyond the limit: for the first map's first prior, of offset 30.
        network.head.regression_head.module_list[0].bias[2:4] = 30.0
    offer_download(monkeypatch, network)
    model = convert_as_typed(monkeypatch, tmp_path, source="COCO_V1", **parameters)
    kept = [label for label, name in enumerate(COCO_CATEGORIES) if name != "N/A"]
    assert list(model.label_map) == ["background", *(COCO_CATEGORIES[label] for label in kept[1:])]
    assert len(model.label_map) == 81 and model.input_size == size and not model.antialias

    inputs, _ = network.transform([torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255])
    x = inputs.tensors
    assert ((prepare([picture], model) - x) * model.std).abs().max() < 1.001 / 255  # we round to bytes first
    locs, scores, their_boxes, anchors = run_torchvision(network, x)
    our_locs, our_scores = model(x)
    places = caffe_places(cells)
    assert_close(our_locs, locs[:, places])
    assert_close(our_scores, scores[:, places][:, :, kept])
    assert_close(decode(model, our_locs[0]), their_boxes[places])

    # What is found, where nothing is cut: they cut boxes at the edge before suppression, and take 300 of a class.
    # (With noise, the same for both: random weights see nearly the same in all cells, and near ties go either way.)
    generator = torch.Generator().manual_seed(1)
    locs = locs + torch.randn(locs.shape, generator=generator).clamp(-2, 2)
    scores = scores + 3 * torch.randn(scores.shape, generator=generator)
    their_boxes = network.box_coder.decode_single(locs[0], anchors) / size
    scores[0, ((their_boxes < 0) | (their_boxes > 1)).any(dim=1), 0] = 100.0
    scores[0, :, [label for label in range(91) if label not in kept]] = -30.0
    our_locs, our_scores = locs[:, places], scores[:, places][:, :, kept]
    limit = scores.softmax(dim=2)[0, :, 1:].flatten().topk(1000).values[-2:].mean().item()
    network.score_thresh, network.topk_candidates, network.detections_per_img = limit, 10_000, 10_000
    head = {"bbox_regression": locs, "cls_logits": scores}
    (found,) = network.postprocess_detections(head, [anchors], [(size, size)])
    (boxes,), (labels,), (confidence,) = model.detect_objects(our_locs, our_scores, limit, network.nms_thresh, 10_000)
    assert len(boxes) > 20 and len(labels.unique()) > 3
    ours = torch.cat([boxes, torch.tensor(kept)[labels, None], confidence[:, None]], dim=1)
    theirs = torch.cat([found["boxes"] / size, found["labels"][:, None], found["scores"][:, None]], dim=1)
    distance = (ours[:, None] - theirs).abs().amax(dim=2)
    n_same = [int((distance.amin(dim=dim) < 1e-3).sum()) for dim in (0, 1)]
    assert min(n_same) >= 0.99 * max(distance.shape)  # an overlap of just the limit can go either way


@torch.no_grad()
def test_unused_classes_never_show(monkeypatch, picture):
    network = draw_torchvision(ssdlite320_mobilenet_v3_large)
    for head in network.head.classification_head.module_list:
        head[1].bias.view(-1, 91)[:, COCO_CATEGORIES.index("N/A")] = 30.0  # above all others
    offer_download(monkeypatch, network)
    model, _ = convert("COCO_V1", network="ssdlite320_mobilenet_v3_large")
    _, (labels,), _ = model.detect_objects(*run_ours(model, picture), 0.001, 0.5, 200)
    names = list(model.label_map)
    assert len(labels) and "N/A" not in {names[label] for label in labels.tolist()} and "N/A" not in names


def test_download_that_fails_names_the_address(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ConnectionError, match=r"ssd300_vgg16_coco-\w+\.pth.*--source=FILE"):
        convert("COCO_V1")
    with pytest.raises(ConnectionError, match=r"ssdlite320_mobilenet_v3_large_coco-\w+\.pth"):
        convert("COCO_V1", network="ssdlite320_mobilenet_v3_large")


# ----------------------------------------------------------------------------------------------
# Other classes, and files that are wrong
# ----------------------------------------------------------------------------------------------


def test_other_classes(tmp_path):
    torch.save({"state_dict": light_state(n_classes=4)}, tmp_path / "own.pth")
    model, _ = convert(str(tmp_path / "own.pth"), "amdegroot", tuple(LABEL_MAP)[1:])
    assert model.label_map == LABEL_MAP
    with pytest.raises(ValueError, match=r"own\.pth: it has 3 classes.*--class_names"):
        convert(str(tmp_path / "own.pth"))
    with pytest.raises(ValueError, match=r"own\.pth: it has 3 classes, but the given names are 1"):
        convert(str(tmp_path / "own.pth"), class_names=["cat"])


def with_changes(state, changes):
    return {name: tensor for name, tensor in {**state, **changes}.items() if tensor is not None}


BAD_STATES = [
    ({"vgg.5.bias": None}, {}, r"it has 45 entries vgg\.\* and extras\.\*; ssd300_vgg16 needs 46"),
    ({"vgg.5.bias": torch.zeros(127)}, {}, r"'vgg\.5\.bias' has shape \(127,\), ssd300_vgg16 needs \(128,\)"),
    ({"conf.3.bias": torch.full((126,), torch.nan)}, {}, r"'conf\.3\.bias' holds numbers that are not finite"),
    ({"conf.5.bias": torch.zeros(85)}, {}, r"'conf\.5\.bias' has 85 numbers; it needs 4 for each class"),
    ({"conf.0.bias": torch.zeros(80)}, {}, r"'conf\.0\.bias' has shape \(80,\), ssd300_vgg16 needs \(84,\)"),
    ({"other.weight": torch.zeros(1)}, {}, r"not part of ssd300_vgg16: other\.weight"),
    ({"L2Norm.weight": "twenty"}, {}, r"'L2Norm\.weight' is not a tensor"),
    ({"priors_cxcy": torch.zeros(8732, 4)}, {}, r"'priors_cxcy' is not a table of priors"),
    ({}, {"format": "torchvision"}, "not named as those of torchvision"),
    ({}, {"format": "caffe"}, "format is 'caffe'; it must be one of auto, sgrvinod, amdegroot, lufficc"),
    ({}, {"network": "ssd512_vgg16"}, "it looks like ssd300_vgg16, not like ssd512_vgg16"),
    ({}, {"network": "yolo"}, "network is 'yolo'; it must be one of ssd300_vgg16"),
]


@pytest.mark.parametrize(("changes", "options", "message"), BAD_STATES)
def test_entries_that_are_wrong(tmp_path, changes, options, message):
    torch.save(with_changes(light_state(), changes), tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=message) as error:
        convert(str(tmp_path / "bad.pth"), **options)
    assert "bad.pth" in str(error.value) or "must be one of" in message


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("base_net.0.weight", "source_layer_add_ons.0.running_mean", "classification_headers.0.weight"),
         "qfgaohao's VGG-16, which has batch normalisation on conv4_3"),
        (("base_net.0.0.weight", "classification_headers.0.weight"), "qfgaohao's MobileNet"),
        (("backbone.features.0.0.weight", "box_head.predictor.cls_headers.0.0.weight"), "lufficc's MobileNet"),
        (("backbone.features.0.weight", "bbox_head.cls_convs.0.0.weight"), "mmdetection's"),
        (("backbone.body.conv1.weight", "rpn.head.conv.weight"), "two-stage detector"),
        (("something\x1b[31m",), r"they are something\\x1b\[31m"),
        ((), "none at all"),
    ],
)  # fmt: skip
def test_files_that_cannot_fit_are_refused_by_name(tmp_path, entries, message):
    torch.save(dict.fromkeys(entries, torch.zeros(1)), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=rf"other\.pth: .*{message}"):
        convert(str(tmp_path / "other.pth"))


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth.*COCO_V1"):
        convert(str(tmp_path / "nothing.pth"))
    with pytest.raises(ValueError, match="no weights for network=ssd300_tiny"):
        convert("COCO_V1", network="ssd300_tiny")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    torch.save([1, 2], tmp_path / "list.pth")
    whole = (tmp_path / "list.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    torch.jit.script(nn.Conv2d(1, 1, 1)).save(tmp_path / "script.pth")
    save_checkpoint(model_state(SSD300(4, "ssd300_tiny")) | {"label_map": LABEL_MAP}, tmp_path / "ours.pth")
    for name, message in (
        ("page", "no weights"), ("list", "no state dict"), ("cut", "no weights"), ("script", "no weights"),
        ("ours", "a checkpoint of this repo"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name}\.pth: .*{message}"):
            convert(str(tmp_path / f"{name}.pth"))


# ----------------------------------------------------------------------------------------------
# Nothing in a file runs
# ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("is_zip", [True, False])
def test_payloads_do_not_run(tutorial_module, tmp_path, is_zip):
    """In the model, beside it, or in a state dict: they are left out, or the file is refused."""
    payload, path = Payload(tmp_path / "ran"), tmp_path / "evil.pth"
    network = build_tutorial_model(tutorial_module, light_state("sgrvinod"))
    network.base.trap = payload
    torch.save({"model": network, "optimizer": payload}, path, _use_new_zipfile_serialization=is_zip)
    model, _ = convert(str(path))
    assert torch.equal(model.priors_cxcy, tutorial_priors())
    assert not (tmp_path / "ran").exists()
    torch.save({**light_state(), "trap": payload}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"evil\.pth: entries that are not part of ssd300_vgg16: trap"):
        convert(str(path))
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # the payload is a real one
    assert (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"), ("builtins", "getattr"), ("__builtin__", "exec"), ("subprocess", "Popen"),
        ("torch", "load"), ("torch.hub", "load"), ("model", "load_model"), ("collections", "namedtuple"),
        ("torch.nn.modules.module", "torch.os.system"), ("torch.optim.optimizer", "eval"),
    ],
)  # fmt: skip
def test_names_lead_to_nothing(tmp_path, module, name):
    """A pickle that calls (module, name) with a command, then a model that sets attributes of what came back."""
    ran = tmp_path / "ran"
    call = f"__import__('os').system('touch {ran}')"
    pickled = b"\x80\x04" + pickle.SHORT_BINUNICODE + bytes([len(module)]) + module.encode()
    pickled += pickle.SHORT_BINUNICODE + bytes([len(name)]) + name.encode() + pickle.STACK_GLOBAL
    pickled += pickle.SHORT_BINUNICODE + bytes([len(call)]) + call.encode() + pickle.TUPLE1 + pickle.REDUCE
    pickled += pickle.EMPTY_DICT + pickle.SHORT_BINUNICODE + b"\x01a" + pickle.BININT1 + b"\x01" + pickle.SETITEM
    pickled += pickle.BUILD + pickle.STOP
    path = tmp_path / "crafted.pth"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + pickled)
    with pytest.raises(ValueError, match=r"crafted\.pth"):
        convert(str(path))
    assert not ran.exists()
