"""Weights of other projects: the converted network does what the peer's does; bad and hostile files are refused.

The peers' networks run here as their own architectures: torchvision's itself, the others as plain functions of
their state dicts. In comments P = 8732 priors, C classes.
"""

import os
import pickle
import subprocess
import sys
import types

import convert_weights
import make_sample
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO
from convert_weights import convert
from torch import nn
from torchvision.models.detection import SSD300_VGG16_Weights, ssd300_vgg16

from datasets import transform
from model import SSD300, load_model, model_state
from utils import cxcy_to_xy, gcxgcy_to_cxcy, save_checkpoint, voc_labels

# Our place of each prior in the Caffe code's cells: 1, extra, 2, 1/2 and 1, extra, 2, 1/2, 3, 1/3.
CAFFE_CELLS = ((38, [0, 1, 2, 3]), (19, [0, 1, 2, 4, 3, 5]), (10, [0, 1, 2, 4, 3, 5]))
CAFFE_CELLS += ((5, [0, 1, 2, 4, 3, 5]), (3, [0, 1, 2, 3]), (1, [0, 1, 2, 3]))


@pytest.fixture(scope="module")
def image():
    """A sample image, (1, 3, 300, 300) uint8."""
    picture, _ = make_sample.draw_sample(np.random.default_rng(4))
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.uint8)
    return transform(picture, *nothing, split="TEST")[0][None]


def draw_layers(layers, first_scale=1.0):
    """Random weights: dict of layer to (out, in, kernel) -> state dict. Activations stay of about unit size if the
    input, times first_scale, is."""
    generator, state = torch.Generator().manual_seed(0), {}
    for i, (name, (n_out, n_in, kernel)) in enumerate(layers.items()):
        scale = (2 / (n_in * kernel**2)) ** 0.5 * (first_scale if i == 0 else 1)
        state[f"{name}.weight"] = torch.randn(n_out, n_in, kernel, kernel, generator=generator) * scale
        state[f"{name}.bias"] = torch.randn(n_out, generator=generator) * 0.1
    return state


def heads(names, n_classes):
    """Layers of the heads; names: a pattern for offsets and one for scores, for the map's number or name."""
    maps = ("conv4_3", "conv7", "conv8_2", "conv9_2", "conv10_2", "conv11_2")
    layers = {}
    for i, (n_in, n_priors) in enumerate(zip((512, 1024, 512, 256, 256, 256), (4, 6, 6, 6, 4, 4), strict=True)):
        layers[names[0].format(i, maps[i])] = (n_priors * 4, n_in, 3)
        layers[names[1].format(i, maps[i])] = (n_priors * n_classes, n_in, 3)
    return layers


def stack_heads(state, names, maps, n_classes):
    """Run the heads and stack their outputs: (1, P, 4), (1, P, C)."""
    outputs = []
    layers = list(heads(names, n_classes))
    for first, width in ((0, 4), (1, n_classes)):
        results = []
        for layer, x in zip(layers[first::2], maps, strict=True):
            y = F.conv2d(x, state[f"{layer}.weight"], state[f"{layer}.bias"], padding=1)
            results.append(y.permute(0, 2, 3, 1).contiguous().view(1, -1, width))
        outputs.append(torch.cat(results, dim=1))
    return outputs


def decode(model, locs):
    return cxcy_to_xy(gcxgcy_to_cxcy(model.limit_sizes(locs), model.priors_cxcy))


def caffe_places():
    """For each of our priors the place at which a network of the Caffe family has it."""
    places, start = [], 0
    for grid, cell in CAFFE_CELLS:
        for _ in range(grid * grid):
            places += [start + place for place in cell]
            start += len(cell)
    return places


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert theirs.std() > 0.05  # numbers that could differ


@torch.no_grad()
def run_ours(model, image):
    return model.eval()(model.normalize(image))


# The tutorial: a pickled model

TUTORIAL_HEADS = ("pred_convs.loc_{1}", "pred_convs.cl_{1}")


def tutorial_layers(n_classes=21):
    layers, n_in = {}, 3
    for block, (n_convs, width) in enumerate(zip((2, 2, 3, 3, 3), (64, 128, 256, 512, 512), strict=True), start=1):
        for i in range(1, n_convs + 1):
            layers[f"base.conv{block}_{i}"] = (width, n_in, 3)
            n_in = width
    layers.update({"base.conv6": (1024, 512, 3), "base.conv7": (1024, 1024, 1)})
    n_in = 1024
    for block in (8, 9, 10, 11):
        middle, n_out = (256, 512) if block == 8 else (128, 256)
        layers[f"aux_convs.conv{block}_1"] = (middle, n_in, 1)
        layers[f"aux_convs.conv{block}_2"] = (n_out, middle, 3)
        n_in = n_out
    return {**layers, **heads(TUTORIAL_HEADS, n_classes)}


def run_tutorial(state, x):
    def conv(name, x, **options):
        return F.relu(F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options))

    for name in (name.removesuffix(".weight") for name in state if name.startswith("base") and "weight" in name):
        if name in ("base.conv2_1", "base.conv3_1", "base.conv5_1"):
            x = F.max_pool2d(x, 2, 2)
        elif name == "base.conv4_1":
            x = F.max_pool2d(x, 2, 2, ceil_mode=True)
        elif name == "base.conv6":
            x = F.max_pool2d(x, 3, 1, 1)
        x = conv(name, x, **({"padding": 6, "dilation": 6} if "6" in name else {"padding": int("7" not in name)}))
        if name == "base.conv4_3":
            maps = [x / x.pow(2).sum(dim=1, keepdim=True).sqrt() * state["rescale_factors"]]
    maps.append(x)
    for block in (8, 9, 10, 11):
        options = {"stride": 2, "padding": 1} if block < 10 else {}
        x = conv(f"aux_convs.conv{block}_2", conv(f"aux_convs.conv{block}_1", x), **options)
        maps.append(x)
    return stack_heads(state, TUTORIAL_HEADS, maps, 21)


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
    network.load_state_dict(state, assign=True)
    network.n_classes, network.priors_cxcy = 21, tutorial_priors()
    return network


def light_state(layers, scale_name="rescale_factors", scale_shape=(1, 512, 1, 1)):
    """A state dict of zeros, all in one number: its file has a few kilobytes."""
    state = {}
    for name, (n_out, n_in, kernel) in layers.items():
        state[f"{name}.weight"] = torch.zeros(()).expand(n_out, n_in, kernel, kernel)
        state[f"{name}.bias"] = torch.zeros(()).expand(n_out)
    return {**state, scale_name: torch.zeros(()).expand(scale_shape)}


@pytest.fixture(scope="module")
def tutorial_state():
    scale = torch.rand(1, 512, 1, 1, generator=torch.Generator().manual_seed(1)) * 20
    return {**draw_layers(tutorial_layers()), "rescale_factors": scale}


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("is_zip", [True, False])
def test_tutorial_checkpoint(tutorial_module, tutorial_state, tmp_path, monkeypatch, image, is_zip):
    state = tutorial_state
    network = build_tutorial_model(tutorial_module, state)
    optimizer = torch.optim.SGD([{"params": network.base.parameters(), "lr": 2e-3}], lr=1e-3, momentum=0.9)
    optimizer.state[network.base.conv1_1.bias]["momentum_buffer"] = torch.ones(64)
    path = tmp_path / "tutorial.pth.tar"
    torch.save({"epoch": 7, "model": network, "optimizer": optimizer}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # it is a pickled model indeed
    del sys.modules["model"]  # and its classes are not needed

    monkeypatch.setattr(convert_weights, "source", str(path))
    monkeypatch.setattr(convert_weights, "save_to", str(tmp_path / "ours.pth.tar"))
    convert_weights.main()
    model = load_model(tmp_path / "ours.pth.tar")
    assert list(model.label_map) == ["background", *voc_labels]
    assert torch.equal(model.priors_cxcy, tutorial_priors())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    if not is_zip:  # the same weights: one run is enough
        return
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (image / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    results = run_ours(model, image), run_tutorial(state, x)
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)
    offsets, priors = results[1][0], tutorial_priors()
    decoded = [priors[:, :2] + offsets[..., :2] * priors[:, 2:] / 10, priors[:, 2:] * (offsets[..., 2:] / 5).exp()]
    assert_close(gcxgcy_to_cxcy(results[0][0], model.priors_cxcy), torch.cat(decoded, dim=-1))


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
    network = build_tutorial_model(tutorial_module, light_state(tutorial_layers()))
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
    state = {f"module.{name}": tensor for name, tensor in light_state(tutorial_layers()).items()}
    torch.save(state, tmp_path / "w.pth")
    model, format = convert(str(tmp_path / "w.pth"))
    assert format == "sgrvinod"
    torch.testing.assert_close(model.priors_cxcy, tutorial_priors(), rtol=0, atol=1e-7)
    beyond = (SSD300.create_prior_boxes() > 1).sum()
    assert beyond == 20 and model.priors_cxcy.max() == 1


# amdegroot: a state dict

AMDEGROOT_HEADS = ("loc.{0}", "conf.{0}")
VGG_CONFIG = (64, 64, "M", 128, 128, "M", 256, 256, 256, "C", 512, 512, 512, "M", 512, 512, 512)
EXTRAS = ((256, 1024, 1), (512, 256, 3), (128, 512, 1), (256, 128, 3), *[(128, 256, 1), (256, 128, 3)] * 2)


def amdegroot_layers(n_classes=21):
    layers, place, n_in = {}, 0, 3
    for width in VGG_CONFIG:
        if isinstance(width, int):
            layers[f"vgg.{place}"] = (width, n_in, 3)
            place, n_in = place + 2, width  # the next is its ReLU
        else:
            place += 1
    layers.update({"vgg.31": (1024, 512, 3), "vgg.33": (1024, 1024, 1)})  # 30 is pool5
    layers.update({f"extras.{i}": shape for i, shape in enumerate(EXTRAS)})
    return {**layers, **heads(AMDEGROOT_HEADS, n_classes)}


def run_amdegroot(state, x):
    def conv(name, x, **options):
        return F.relu(F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options))

    place = 0
    for width in (*VGG_CONFIG, "L2"):
        if width in ("M", "C", "L2"):
            if place == 23:
                norm = x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10
                maps = [x / norm * state["L2Norm.weight"].view(1, 512, 1, 1)]
            x = x if width == "L2" else F.max_pool2d(x, 2, 2, ceil_mode=width == "C")
            place += 1
        else:
            x = conv(f"vgg.{place}", x, padding=1)
            place += 2
    x = conv("vgg.33", conv("vgg.31", F.max_pool2d(x, 3, 1, 1), padding=6, dilation=6))
    maps.append(x)
    for i in range(8):
        x = conv(f"extras.{i}", x, **({"stride": 2, "padding": 1} if i in (1, 3) else {}))
        if i % 2:
            maps.append(x)
    return stack_heads(state, AMDEGROOT_HEADS, maps, 21)


def amdegroot_priors():
    """amdegroot's table, in its own order."""
    sides, priors = [30, 60, 111, 162, 213, 264, 315], []
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


def test_amdegroot_weights(tmp_path, image):
    scale = torch.rand(512, generator=torch.Generator().manual_seed(1)) * 20
    state = {**draw_layers(amdegroot_layers(), first_scale=1 / 70), "L2Norm.weight": scale}
    torch.save(state, tmp_path / "ssd.pth", _use_new_zipfile_serialization=False)  # as it was in 2017
    model, format = convert(str(tmp_path / "ssd.pth"))
    assert format == "amdegroot" and list(model.label_map) == ["background", *voc_labels]

    x = image.float() - torch.tensor([123.0, 117.0, 104.0]).view(3, 1, 1)
    theirs, ours, places = run_amdegroot(state, x), run_ours(model, image), caffe_places()
    for mine, peers in zip(ours, theirs, strict=True):
        assert_close(mine, peers[:, places])
    priors_cxcy = amdegroot_priors()
    their_boxes = cxcy_to_xy(gcxgcy_to_cxcy(theirs[0][0], priors_cxcy))
    assert_close(decode(model, ours[0][0]), their_boxes[places])
    # The order is ours, not only the same on both sides: wide where ours are wide.
    wide = SSD300.create_prior_boxes()
    assert torch.equal(model.priors_cxcy[:, 2] > model.priors_cxcy[:, 3], wide[:, 2] > wide[:, 3])


# torchvision


@pytest.fixture(scope="module")
def torchvision_model():
    torch.manual_seed(0)
    network = ssd300_vgg16(weights=None, weights_backbone=None).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
        network.backbone.features[0].weight.mul_(1 / 70)  # its input is as large as bytes are
        # Sizes of some priors beyond the limit: for the first map's first prior, of offset 30.
        network.head.regression_head.module_list[0].bias[2:4] = 30.0
    return network


@torch.no_grad()
def test_torchvision_weights(torchvision_model, tmp_path, image):
    torch.save(torchvision_model.state_dict(), tmp_path / "coco.pth")
    model, format = convert(str(tmp_path / "coco.pth"))
    assert format == "torchvision"
    save_checkpoint(model_state(model), tmp_path / "ours.pth.tar")
    model = load_model(tmp_path / "ours.pth.tar")

    inputs, _ = torchvision_model.transform([image[0] / 255])
    maps = list(torchvision_model.backbone(inputs.tensors).values())
    theirs = torchvision_model.head(maps)
    (anchors,) = torchvision_model.anchor_generator(inputs, maps)
    their_boxes = torchvision_model.box_coder.decode_single(theirs["bbox_regression"][0], anchors) / 300
    locs, scores = run_ours(model, image)
    places = caffe_places()
    assert_close(locs, theirs["bbox_regression"][:, places])
    assert_close(scores, theirs["cls_logits"][:, places])
    assert locs.max() > 25 > model.max_size_offset
    assert_close(decode(model, locs[0]), their_boxes[places])


def test_the_limit_on_sizes_holds_where_objects_are_found():
    """torchvision's limit, and none such in other models: a prior of 0.1 with an offset of 30 on its width."""
    limit = convert_weights.FORMATS["torchvision"].max_size_offset
    for model, width in ((SSD300(2, max_size_offset=limit), 0.1 * 62.5), (SSD300(2), 0.1 * np.exp(6))):
        locs, scores = torch.zeros(1, 8732, 4), torch.zeros(1, 8732, 2)
        locs[0, 0, 2], scores[0, 0, 1] = 30.0, 9.0
        (boxes,), _, _ = model.detect_objects(locs, scores, 0.9, 0.5, top_k=1)
        assert (boxes[0, 2] - boxes[0, 0]).item() == pytest.approx(width, rel=1e-5)


def test_torchvision_names():
    names = convert_weights.COCO_NAMES
    categories = SSD300_VGG16_Weights.COCO_V1.meta["categories"]
    assert len(set(names)) == 90
    assert all(ours == theirs or (theirs == "N/A" and ours == f"N/A {label}")
               for label, (ours, theirs) in enumerate(zip(names, categories[1:], strict=True), start=1))  # fmt: skip
    assert names[0] == "person" and names[89] == "toothbrush"


def test_download_that_fails_names_the_address(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(ConnectionError, match=r"ssd300_vgg16_coco-\w+\.pth.*--source=FILE"):
        convert("COCO_V1")


# Other classes, and files that are wrong


def save_light(path, **changes):
    """Write a small file in amdegroot's format; an entry of `changes` replaces one, None removes it."""
    state = light_state(amdegroot_layers(), "L2Norm.weight", (512,))
    state.update({name.replace("__", "."): tensor for name, tensor in changes.items()})
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    return str(path)


def test_other_classes(tmp_path):
    state = light_state(amdegroot_layers(n_classes=3), "L2Norm.weight", (512,))
    torch.save({"state_dict": state}, tmp_path / "own.pth")
    model, _ = convert(str(tmp_path / "own.pth"), "amdegroot", ["cat", "dog"])
    assert model.label_map == {"background": 0, "cat": 1, "dog": 2}
    with pytest.raises(ValueError, match=r"own\.pth: it has 2 classes.*names are 20.*--class_names"):
        convert(str(tmp_path / "own.pth"))
    with pytest.raises(ValueError, match=r"own\.pth: it has 2 classes, but the given names are 1"):
        convert(str(tmp_path / "own.pth"), class_names=["cat"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vgg__5__bias": None}, r"lacks the entry 'vgg\.5\.bias'"),
        ({"vgg__5__bias": torch.zeros(127)}, r"'vgg\.5\.bias' has shape \(127,\), SSD300 needs \(128,\)"),
        ({"conf__3__bias": torch.full((126,), torch.nan)}, r"'conf\.3\.bias' holds numbers that are not finite"),
        ({"conf__0__bias": torch.zeros(85)}, r"'conf\.0\.bias' has 85 numbers; SSD300 needs 4 for each class"),
        ({"extras__8__weight": torch.zeros(1)}, r"no part of SSD300: extras\.8\.weight"),
        ({"vgg__0__weight": None}, r"lacks the entry 'base\.conv1_1\.weight' \(sgrvinod\) or 'vgg\.0\.weight'"),
        ({"L2Norm__weight": "twenty"}, r"lacks the entry 'L2Norm\.weight', or this is no tensor"),
    ],
)
def test_entries_that_are_wrong(tmp_path, changes, message):
    with pytest.raises(ValueError, match=r"bad\.pth: .*" + message):
        convert(save_light(tmp_path / "bad.pth", **changes))


def test_wrong_format_asked_for(tmp_path):
    path = save_light(tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: it lacks the entry 'backbone\.features\.0\.weight'"):
        convert(path, "torchvision")
    with pytest.raises(ValueError, match="format is 'caffe'; it must be auto, sgrvinod"):
        convert(path, "caffe")


def test_wrong_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        convert(str(tmp_path / "nothing.pth"))
    (tmp_path / "page.pth").write_text("<html>404</html>")
    torch.save([1, 2], tmp_path / "list.pth")
    whole = (tmp_path / "list.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    save_checkpoint({"model": {}}, tmp_path / "ours.pth")
    for name, message in (
        ("page", "no weights"), ("list", "no state dict"), ("cut", "no weights"), ("ours", "a checkpoint of this repo"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name}\.pth: .*{message}"):
            convert(str(tmp_path / f"{name}.pth"))


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_damaged_pickled_models(tutorial_module, tmp_path):
    """Cut anywhere, or with a byte changed, a file ends in an error that names it, or in a model."""
    network = build_tutorial_model(tutorial_module, light_state(tutorial_layers()))
    rng = np.random.default_rng(0)
    n_errors = 0
    for is_zip in (True, False):
        path = tmp_path / "damaged.pth"
        torch.save({"model": network}, path, _use_new_zipfile_serialization=is_zip)
        whole = path.read_bytes()
        for i in range(60):
            data = bytearray(whole)
            if i % 3:
                data[rng.integers(min(len(data), 40_000))] = rng.integers(256)
            else:
                del data[rng.integers(len(data)) :]
            path.write_bytes(data)
            try:
                convert_weights.read_weights(str(path))
            except ValueError as error:
                assert "damaged.pth" in str(error)
                n_errors += 1
    assert n_errors > 40


# Hostile files


class Payload:
    """Unpickling it runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("where", ["beside", "inside", "state dict"])
def test_payloads_do_not_run(tutorial_module, tmp_path, where, is_zip):
    payload = Payload(tmp_path / "ran")
    state = light_state(tutorial_layers())
    network = build_tutorial_model(tutorial_module, state)
    if where == "inside":
        network.base.trap = payload
    contents = {"epoch": 1, "model": network}
    if where == "beside":
        contents["optimizer"] = payload
    if where == "state dict":
        contents = {**state, "trap": payload}
    path = tmp_path / "evil.pth"
    torch.save(contents, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match=r"evil\.pth: .*nothing was run \(it names \w+\.system"):
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


@pytest.mark.parametrize("tool", ["convert_weights.py", "export.py"])
def test_tools_end_in_one_line_on_a_missing_file(tmp_path, tool):
    parameter = "source" if tool == "convert_weights.py" else "checkpoint"
    command = [sys.executable, REPO / "tools" / tool, f"--{parameter}=missing.pth"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1 and process.stderr.startswith("error: ") and "missing.pth" in process.stderr
    assert "Traceback" not in process.stderr
