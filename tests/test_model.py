"""The networks: priors and their order, layers, pretrained bases, checkpoints; torchvision as a witness."""

import math
import urllib.error
from functools import cache
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

import model as module
import utils
from model import (
    NETWORKS,
    SSD300,
    MultiBoxLoss,
    fuse_batch_norm,
    load_model,
    load_pretrained,
    model_from_checkpoint,
    model_state,
)
from utils import cxcy_to_xy, load_checkpoint, save_checkpoint

LABEL_MAP = {"background": 0, "cat": 1, "dog": 2}
LITE = "ssdlite320_mobilenet_v3_large"
RESNET = "ssd300_resnet50"
NO_NETWORK = urllib.error.URLError("there is no network in this test")
root_2, root_3 = math.sqrt(2), math.sqrt(3)


def break_downloads(monkeypatch, tmp_path, fault=NO_NETWORK):
    """Any attempt to download fails, and nothing is cached."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", Mock(side_effect=fault))


@pytest.fixture
def tiny():
    """A small model with a label map, and an input and priors of its own."""
    torch.manual_seed(4)
    ssd = SSD300(3, "ssd300_tiny", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1.5, antialias=False)
    ssd.priors_cxcy *= 0.9
    ssd.label_map = LABEL_MAP
    return ssd


# --- Priors ---------------------------------------------------------------------------------------

GRIDS_300, GRIDS_512 = (38, 19, 10, 5, 3, 1), (64, 32, 16, 8, 4, 2, 1)
NETWORKS_300 = ("ssd300_vgg16", "ssd300_vgg16_bn", "ssd300_tiny", RESNET)
FEW_300, FEW_512, SCALES_300 = (4, 6, 6, 6, 4, 4), (4, 6, 6, 6, 6, 4, 4), (0.1, 0.2, 0.375, 0.55, 0.725, 0.9, 1)


@pytest.mark.parametrize("network, n_priors, grids, priors_a_cell, scales", [
    *((name, 8732, GRIDS_300, FEW_300, SCALES_300) for name in NETWORKS_300),
    ("ssd512_vgg16", 24564, GRIDS_512, FEW_512, (0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05)),
    (LITE, 3234, (20, 10, 5, 3, 2, 1), (6,) * 6, (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1)),
    ("ssd300_vgg16_coco", 8732, GRIDS_300, FEW_300, [side / 300 for side in (21, 45, 99, 153, 207, 261, 315)]),
    ("ssd512_vgg16_coco", 24564, GRIDS_512, FEW_512,
     [side / 512 for side in (20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8, 542.72)]),
])  # fmt: skip
def test_priors_are_torchvisions_in_another_order(network, n_priors, grids, priors_a_cell, scales):
    ratios = [[2] if n == 4 else [2, 3] for n in priors_a_cell]
    generator = DefaultBoxGenerator(ratios, scales=list(scales), clip=network == LITE)
    images = ImageList(torch.zeros(1, 3, 512, 512), [(512, 512)])
    theirs = generator(images, [torch.zeros(1, 1, grid, grid) for grid in grids])[0]
    # Our row of each prior in their order, which is Caffe's: in a cell of six they have ratio 1/2 before 3.
    order, rows = {4: [0, 1, 2, 3], 6: [0, 1, 2, 4, 3, 5]}, []
    for grid, n in zip(grids, priors_a_cell, strict=True):
        for _ in range(grid**2):
            rows += [len(rows) + k for k in order[n]]
    priors_cxcy = SSD300.create_prior_boxes(network)
    assert priors_cxcy.shape == (n_priors, 4) and priors_cxcy.dtype == torch.float32 and len(rows) == n_priors
    torch.testing.assert_close(cxcy_to_xy(priors_cxcy)[rows] * 512, theirs, rtol=0, atol=1e-4)
    assert [source.n_priors for source in NETWORKS[network].sources] == list(priors_a_cell)
    with torch.device("meta"):  # the layers predict something at each, from maps of these sizes
        ssd = SSD300(3, network).eval()
        outputs = ssd(torch.zeros(2, 3, ssd.input_size, ssd.input_size))
    assert [output.shape for output in outputs] == [(2, n_priors, 4), (2, n_priors, 3)]


@pytest.mark.parametrize("network, expected", [
    ("ssd300_vgg16", {
        # conv4_3, first cell: ratio 1, the extra square of scale sqrt(0.1 * 0.2), ratios 2 and 1/2
        0: (0.5 / 38, 0.5 / 38, 0.1, 0.1), 1: (0.5 / 38, 0.5 / 38, math.sqrt(0.02), math.sqrt(0.02)),
        2: (0.5 / 38, 0.5 / 38, 0.1 * root_2, 0.1 / root_2), 3: (0.5 / 38, 0.5 / 38, 0.1 / root_2, 0.1 * root_2),
        4: (1.5 / 38, 0.5 / 38, 0.1, 0.1),  # the next cell is to the right ...
        38 * 4: (0.5 / 38, 1.5 / 38, 0.1, 0.1),  # ... and after 38 cells comes the next row
        # conv7, first cell: ratios 1, extra, 2, 3, 1/2, 1/3
        5776: (0.5 / 19, 0.5 / 19, 0.2, 0.2), 5777: (0.5 / 19, 0.5 / 19, math.sqrt(0.075), math.sqrt(0.075)),
        5778: (0.5 / 19, 0.5 / 19, 0.2 * root_2, 0.2 / root_2), 5779: (0.5 / 19, 0.5 / 19, 0.2 * root_3, 0.2 / root_3),
        5780: (0.5 / 19, 0.5 / 19, 0.2 / root_2, 0.2 * root_2), 5781: (0.5 / 19, 0.5 / 19, 0.2 / root_3, 0.2 * root_3),
        # conv11_2: the last map, whose extra scale ends at 1; priors may reach beyond the image
        8728: (0.5, 0.5, 0.9, 0.9), 8729: (0.5, 0.5, math.sqrt(0.9), math.sqrt(0.9)),
        8730: (0.5, 0.5, 0.9 * root_2, 0.9 / root_2), 8731: (0.5, 0.5, 0.9 / root_2, 0.9 * root_2),
    }),
    (LITE, {
        0: (0.025, 0.025, 0.2, 0.2), 1: (0.025, 0.025, math.sqrt(0.07), math.sqrt(0.07)),
        3206: (0.25, 0.25, 1, 0.8 / root_2), 3233: (0.5, 0.5, 0.95 / root_3, 1),  # clipped to the image's sizes
    }),
    ("ssd512_vgg16", {24560: (0.5, 0.5, 0.9, 0.9), 24561: (0.5, 0.5, math.sqrt(0.945), math.sqrt(0.945))}),
])  # fmt: skip
def test_priors_by_hand(network, expected):
    rows = SSD300.create_prior_boxes(network)[list(expected)]
    torch.testing.assert_close(rows, torch.tensor(list(expected.values())), rtol=1e-6, atol=1e-7)


# --- The layers -----------------------------------------------------------------------------------


def test_the_narrow_network_has_the_layers_of_the_full_one():
    """(That their names and shapes are the tutorial's is tested in tests/test_convert_weights.py.)"""
    with torch.device("meta"):
        narrow, full = SSD300(21, "ssd300_tiny").state_dict(), SSD300(21).state_dict()
    assert {name for name in narrow if ".norm." not in name} == set(full)
    assert narrow["rescale_factors"].shape == (1, 64, 1, 1)
    for name in full:
        if name.endswith("bias"):
            assert len(full[name]) == len(narrow[name]) * (1 if name.startswith("pred_convs") else 8), name
    # Batch normalisation behind every convolution but the heads'
    convolutions = {
        name.removesuffix(".weight") for name in full if name.endswith("weight") and "pred_convs" not in name
    }
    assert {name.split(".norm.")[0] for name in narrow if ".norm." in name} == convolutions


def test_resnet():
    with torch.device("meta"):
        ssd = SSD300(21, RESNET)
        whole = torchvision.models.resnet50()
    kept = {name for name in whole.state_dict() if not name.startswith(("layer4.", "fc."))}
    assert set(ssd.base.state_dict()) == kept
    assert [tuple(x.shape[1:]) for x in ssd.base(torch.zeros(1, 3, 300, 300, device="meta"))] == [(1024, 38, 38)]
    # Of ResNet-50's 25,557,032 parameters layer4 has 14,964,736 and the classifier 2,049,000.
    assert sum(parameter.numel() for parameter in ssd.base.parameters()) == 25_557_032 - 14_964_736 - 2_049_000


class OwnBase(torch.nn.Module):
    """A base as a user may add it: with dropout, one map, and no weights that torchvision knows."""

    def __init__(self, architecture):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 8, stride=8, padding=2)  # 300 -> 38
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x):
        return (self.dropout(self.stem(x)),)


def test_a_network_of_ones_own(monkeypatch, tmp_path):
    names = ("stem", "p4", "p5", "p6", "p7", "p8")
    sources = tuple(s._replace(name=name) for s, name in zip(NETWORKS[RESNET].sources, names, strict=True))
    sources = (sources[0]._replace(channels=8), *sources[1:])
    monkeypatch.setitem(module.BASES, "own", (OwnBase, None))
    monkeypatch.setitem(NETWORKS, "own", NETWORKS[RESNET]._replace(base="own", sources=sources))
    ssd = SSD300(3, "own").train()
    assert ssd(torch.zeros(2, 3, 300, 300))[0].shape == (2, 8732, 4)
    assert ssd.base.dropout.training and ssd.rescale_factors is None
    weights = {"stem.weight": torch.rand(8, 3, 8, 8), "stem.bias": torch.rand(8), "classifier.weight": torch.rand(5, 8)}
    torch.save(weights, tmp_path / "w.pth")
    load_pretrained(ssd, str(tmp_path / "w.pth"))
    assert torch.equal(ssd.base.stem.weight, weights["stem.weight"])
    with pytest.raises(FileNotFoundError, match="IMAGENET1K_V1"):
        load_pretrained(ssd, "IMAGENET1K_V1")


@torch.no_grad()
def test_resnet_takes_over_torchvisions_weights(tmp_path):
    torch.manual_seed(0)
    whole = torchvision.models.resnet50()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    ssd = SSD300(3, RESNET)
    load_pretrained(ssd, str(tmp_path / "w.pth"))
    images = torch.randn(2, 3, 300, 300)
    x = whole.eval().maxpool(whole.relu(whole.bn1(whole.conv1(images))))
    x = whole.layer2(whole.layer1(x))  # (2, 512, 38, 38); from here on our strides are others
    ours = ssd.eval().base.layer2(
        ssd.base.layer1(ssd.base.maxpool(ssd.base.relu(ssd.base.bn1(ssd.base.conv1(images)))))
    )
    torch.testing.assert_close(ours, x)
    assert torch.equal(ssd.base.layer3[5].conv3.weight, whole.layer3[5].conv3.weight)


@torch.no_grad()
def test_ssd512_equals_a_plain_second_construction():
    torch.manual_seed(2)
    ssd, images = SSD300(3, "ssd512_vgg16").eval(), torch.randn(1, 3, 512, 512)
    state = {name: t.normal_(std=0.1) if name.endswith("bias") else t for name, t in ssd.state_dict().items()}

    def conv(name, x, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    x = images
    for name in ("1_1", "1_2", "2_1", "2_2", "3_1", "3_2", "3_3", "4_1", "4_2", "4_3", "5_1", "5_2", "5_3"):
        x = F.max_pool2d(x, 2) if name in ("2_1", "3_1", "4_1", "5_1") else x
        x = conv(f"base.conv{name}", x, padding=1).relu()
        if name == "4_3":
            maps = [F.normalize(x, dim=1) * state["rescale_factors"]]
    x = conv("base.conv6", F.max_pool2d(x, 3, 1, 1), padding=6, dilation=6).relu()
    maps.append(conv("base.conv7", x).relu())
    for number in (8, 9, 10, 11, 12):
        x = conv(f"aux_convs.conv{number}_1", maps[-1]).relu()
        maps.append(conv(f"aux_convs.conv{number}_2", x, stride=1 if number == 12 else 2, padding=1).relu())
    assert [x.shape[2] for x in maps] == [64, 32, 16, 8, 4, 2, 1]
    names = ("conv4_3", "conv7", "conv8_2", "conv9_2", "conv10_2", "conv11_2", "conv12_2")
    for output, kind, size in zip(ssd(images), ("loc", "cl"), (4, 3), strict=True):
        heads = [conv(f"pred_convs.{kind}_{name}", x, padding=1) for name, x in zip(names, maps, strict=True)]
        plain = torch.cat([x.permute(0, 2, 3, 1).reshape(1, -1, size) for x in heads], dim=1)
        assert output.shape == (1, 24564, size) and output.std() > 0.1
        torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build, message", [
    (lambda: SSD300(1), "n_classes is 1"),
    (lambda: SSD300(2, "ssd301"), r"'ssd301'.*ssd300_vgg16, ssd512_vgg16"),
    (lambda: SSD300(2, "ssd300_tiny")(torch.zeros(2, 3, 300, 299)), r"3, 300, 300\) for ssd300_tiny.*300, 299\)"),
])  # fmt: skip
def test_arguments_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("network", ["ssd300_tiny", LITE])
def test_batch_of_one_image_trains(network):
    """The last map is 1 x 1: with one image there is one value a channel, of which no deviation can be taken."""
    torch.manual_seed(0)
    ssd = SSD300(3, network).train()
    images = torch.randn(1, 3, ssd.input_size, ssd.input_size)
    loss = MultiBoxLoss(ssd.priors_cxcy)(*ssd(images), [torch.tensor([[0.1, 0.1, 0.9, 0.9]])], [torch.tensor([1])])
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in ssd.parameters() if p.grad is not None)
    assert all(buffer.isfinite().all() for buffer in ssd.buffers())
    ssd(torch.cat([images, images]))
    x = torch.randn(1, 4, 3, 3)  # several values a channel: as ever
    ours, theirs = module.BatchNorm(4), torch.nn.BatchNorm2d(4)
    assert torch.equal(ours(x), theirs(x)) and torch.equal(ours.running_mean, theirs.running_mean)


@pytest.mark.parametrize("network, mean, std", [
    ("ssd300_tiny", module.IMAGENET_MEAN, module.IMAGENET_STD), (LITE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
])  # fmt: skip
def test_normalize_without_a_download(network, mean, std, monkeypatch, tmp_path):
    break_downloads(monkeypatch, tmp_path)
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, -1, 300, 300)
    normalized = SSD300(2, network).normalize(images)
    expected = [(v - m) / s for v, m, s in zip((0, 1, 0.2), mean, std, strict=True)]
    torch.testing.assert_close(normalized[1, :, 150, 7], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert normalized.dtype == torch.float32 and images[0, 1, 0, 0] == 255


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_l2_normalize(dtype):
    features = 100 * torch.randn(2, 512, 3, 3)
    features[0, :, 1, 1] = 0
    features[1, :, 2, 2] = 300.0  # their squares are beyond float16
    features = features.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        normalized = module.l2_normalize(features)
    assert normalized.dtype == torch.float32 and normalized[0, :, 1, 1].abs().max() == 0
    torch.testing.assert_close(normalized[1], F.normalize(features.float(), dim=1)[1], rtol=1e-5, atol=1e-7)
    normalized.square().sum().backward()
    assert features.grad.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("network", ["ssd300_tiny", LITE, RESNET])
def test_fused_batch_norm_computes_the_same(network):
    torch.manual_seed(0)
    ssd = SSD300(3, network).eval()
    for module_ in ssd.modules():
        if isinstance(module_, torch.nn.BatchNorm2d):
            for tensor in (module_.weight, module_.bias, module_.running_mean, module_.running_var):
                tensor.uniform_(0.5, 1.5)
    images = torch.randn(1, 3, ssd.input_size, ssd.input_size)
    expected = ssd(images)
    n_convolutions = sum(isinstance(layer, torch.nn.Conv2d) for layer in ssd.modules())
    fuse_batch_norm(ssd)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in ssd.modules())
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in ssd.modules()) == n_convolutions
    for ours, theirs in zip(ssd(images), expected, strict=True):
        assert theirs.std() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_only_offsets_of_sizes_are_cut_and_only_above_their_limit(tiny):
    locs = torch.tensor([[[9.0, -9.0, 2.0, -9.0], [1.0, 1.0, 1.0, 1.6]]])
    assert tiny.limit_sizes(locs).tolist() == [[[9, -9, 1.5, -9], [1, 1, 1, 1.5]]]
    tiny.max_size_offset = None
    assert torch.equal(tiny.limit_sizes(locs), locs)


@pytest.mark.parametrize("network, up_to, n_trained", [
    ("ssd300_tiny", "conv5_3", 2), ("ssd300_tiny", "conv4_3", 5), ("ssd300_tiny", "pool4", 5), (RESNET, "layer2", 1),
])  # fmt: skip
def test_freezing(network, up_to, n_trained):
    """n_trained: layers of the base that still learn."""
    ssd = SSD300(3, network).train()
    ssd.freeze_base(up_to)
    layers = [layer for layer in ssd.base.children() if any(True for _ in layer.parameters())]
    assert not layers[0].training and layers[-1].training  # at once
    for mode in (True, False, True):
        ssd.train(mode)
        assert [layer.training for layer in layers] == [False] * (len(layers) - n_trained) + [mode] * n_trained
    for layer in layers[:-n_trained]:
        assert not any(parameter.requires_grad for parameter in layer.parameters())
    for layer in layers[-n_trained:]:
        assert all(parameter.requires_grad for parameter in layer.parameters())
    with pytest.raises(ValueError, match="no layer 'conv9'; its layers are conv1"):
        ssd.freeze_base("conv9")
    next(layers[-1].parameters()).requires_grad_(False)  # a layer that learns with some of its parameters
    ssd.train()
    assert layers[-1].training


@pytest.mark.parametrize("network", ["ssd300_tiny", LITE])
def test_channels_last_and_bfloat16_compute_the_same(network):
    torch.manual_seed(0)
    ssd = SSD300(3, network).eval()
    images = torch.randn(2, 3, ssd.input_size, ssd.input_size)
    with torch.no_grad():
        expected = ssd(images)[1]
        ssd = ssd.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ssd(images)[1], expected, rtol=1e-3, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert (ssd(images)[1].float() - expected).abs().mean() < 0.03 * expected.std() + 0.01


def test_memory_format_follows_device_and_network(monkeypatch):
    for has_units in (True, False):
        monkeypatch.setattr(utils, "has_bf16_units", lambda device, answer=has_units: answer)
        for network in ("ssd300_vgg16", "ssd300_tiny", LITE):
            memory_format = utils.fastest_memory_format(torch.device("cpu"), SSD300(2, network))
            assert (memory_format == torch.channels_last) == (has_units or network != "ssd300_vgg16")


# --- Pretrained bases -----------------------------------------------------------------------------


@cache
def vgg16_features(base):
    """`features.*` of a VGG-16 with random weights of half precision, as torchvision names and shapes them."""
    with torch.device("meta"):  # names and shapes, without the 0.5 GB of the whole VGG-16
        entries = getattr(torchvision.models, base)(weights=None).state_dict()
    torch.manual_seed(1)
    names = [name for name in entries if name.startswith("features.") and "num_batches" not in name]
    return {name: torch.rand(entries[name].shape).half() for name in names}


# Nothing but NaN, as in torchvision's IMAGENET1K_FEATURES.
NAN_FC_LAYERS = {f"classifier.{i}.{kind}": torch.full((9,), torch.nan) for i in (0, 3) for kind in ("weight", "bias")}


def assert_xavier(conv):
    bound = math.sqrt(6 / (conv.weight[0].numel() + conv.weight[:, 0].numel()))
    assert (conv.bias == 0).all()
    assert 0.999 * bound < conv.weight.abs().max() <= bound
    assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)  # of a uniform distribution


@pytest.mark.parametrize("network, fc_layers, real", [
    *(("ssd300_vgg16", {}, real) for real in (False, True)), ("ssd300_vgg16", NAN_FC_LAYERS, False),
    ("ssd300_vgg16_bn", {}, False),
])  # fmt: skip
def test_features_are_taken_over_and_conv6_and_conv7_start_from_xavier(network, fc_layers, real, tmp_path, request):
    path, features = tmp_path / "w.pth", vgg16_features(NETWORKS[network].base)
    torch.save({**features, **fc_layers}, path)
    if real:
        path = request.getfixturevalue("real_data").parent / "weights/vgg16_features_imagenet_fp16.pth"
        features = torch.load(path, weights_only=True)
    ssd = SSD300(3, network)
    load_pretrained(ssd, str(path))
    state = {name: tensor for name, tensor in ssd.base.state_dict().items() if not name.startswith(("conv6", "conv7"))}
    own = [tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")]
    assert len(own) == {"ssd300_vgg16": 26, "ssd300_vgg16_bn": 13 * 6}[network]
    assert all(torch.equal(one, two.float()) for one, two in zip(own, features.values(), strict=True))
    assert_xavier(ssd.base.conv6)
    assert_xavier(ssd.base.conv7)
    # Mean and deviation follow the weights: those of torchvision's file of Caffe's weights are Caffe's.
    mean, std = (module.CAFFE_MEAN, module.CAFFE_STD) if fc_layers else (module.IMAGENET_MEAN, module.IMAGENET_STD)
    torch.testing.assert_close(ssd.mean.flatten(), torch.tensor(mean))
    torch.testing.assert_close(ssd.std.flatten(), torch.tensor(std))


@pytest.mark.parametrize("network", ["ssd300_vgg16", "ssd300_vgg16_bn"])
def test_fc6_and_fc7_are_decimated(network, monkeypatch):
    """On input at the places that decimation keeps, conv6 and conv7 compute what fc6 and fc7 compute."""
    torch.manual_seed(3)
    fc6 = (torch.randn(4096, 1).half() + torch.randn(1, 25088).half()) * 0.01  # random enough, and quickly made
    fc7 = (torch.randn(4096, 4096) * 0.01).half()
    biases = torch.randn(2, 4096).half()
    fc_layers = dict(zip(NAN_FC_LAYERS, (fc6, biases[0], fc7, biases[1]), strict=True))
    ssd, state = SSD300(3, network), {**vgg16_features(NETWORKS[network].base), **fc_layers}
    monkeypatch.setattr(torch, "load", lambda *_, **options: state)  # of any file: this one has 0.3 GB
    load_pretrained(ssd, __file__)
    conv6, conv7 = ssd.base.conv6, ssd.base.conv7
    kept_outputs = torch.tensor([0, 4, 2048, 4092])  # numbers 0, 1, 512 and 1023 of conv6 and conv7

    # fc6 sees a 7 x 7 field, of which conv6 keeps rows and columns 0, 3 and 6, now 6 cells apart.
    field, field_map = torch.zeros(512, 7, 7), torch.zeros(1, 512, 19, 19)
    field[:, ::3, ::3] = field_map[0, :, 2:15:6, 4:17:6] = torch.randn(512, 3, 3)  # around row 8, column 10
    full = fc6[kept_outputs].float() @ field.flatten() + biases[0, kept_outputs].float()
    ours = F.conv2d(field_map, conv6.weight, conv6.bias, padding=conv6.padding, dilation=conv6.dilation)
    torch.testing.assert_close(ours[0, kept_outputs // 4, 8, 10], full, rtol=1e-4, atol=1e-4)

    # fc7 takes fc6's 4096 outputs, of which every fourth is left.
    inputs = torch.zeros(4096)
    inputs[::4] = torch.randn(1024)
    full = fc7[kept_outputs].float() @ inputs + biases[1, kept_outputs].float()
    ours = F.conv2d(inputs[None, ::4, None, None], conv7.weight, conv7.bias)
    torch.testing.assert_close(ours[0, kept_outputs // 4, 0, 0], full, rtol=1e-4, atol=1e-4)


def test_mobilenet_takes_over_the_full_tail(tmp_path):
    torch.manual_seed(0)
    whole, ssd = torchvision.models.mobilenet_v3_large(weights=None), SSD300(3, LITE)
    for tensor in whole.state_dict().values():
        if tensor.ndim == 1:  # biases, and all that batch normalisation consists of
            tensor.uniform_(0.5, 1.5)
    images = torch.randn(1, 3, 320, 320)
    assert ssd.base.features[-1].out_channels == 480
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    load_pretrained(ssd, str(tmp_path / "w.pth"))
    assert ssd.base.features[-1].out_channels == 960
    norms = [layer for layer in ssd.base.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(0.001, 0.03)}  # torchvision's classifier has others
    with torch.no_grad():
        torch.testing.assert_close(ssd.eval().base(images)[1], whole.eval().features(images), rtol=1e-4, atol=1e-4)
    ssd.label_map = LABEL_MAP  # such a model is saved, loaded and fine-tuned like any other
    save_checkpoint(model_state(ssd), tmp_path / "c.pth.tar")
    tuned = model_from_checkpoint(load_checkpoint(tmp_path / "c.pth.tar"), "c", utils.make_label_map([*"abcd"]))
    for loaded in (model_from_checkpoint(load_checkpoint(tmp_path / "c.pth.tar"), "c"), tuned):
        assert torch.equal(loaded.base.features[-1][0].weight, ssd.base.features[-1][0].weight)
        assert loaded(images)[1].shape == (1, 3234, loaded.n_classes)


@pytest.mark.parametrize("network, change, message", [
    ("ssd300_vgg16", {"features.28.bias": None}, r"conv5_3\.bias"),
    ("ssd300_vgg16", {"features.5.weight": torch.zeros(128, 64, 1, 1)}, r"conv2_1\.weight.*64, 1, 1"),
    ("ssd300_vgg16", {"features.0.bias": torch.full((64,), torch.nan)}, r"conv1_1\.bias.*not finite"),
    ("ssd300_vgg16", vgg16_features("vgg16_bn"), "not weights of vgg16:"),
    ("ssd300_vgg16", dict.fromkeys(vgg16_features("vgg16")), r"conv1_1\.weight"),
    (LITE, {"model": {"a.weight": torch.zeros(3)}}, "not a state dict"),
    *((LITE, content, "not a state dict") for content in (b"no weights", [1, 2], torch.zeros(3))),
])  # fmt: skip
def test_wrong_weights_name_file_and_entry(network, change, message, tmp_path):
    """change: the whole file, or entries that are added to VGG-16's, or taken out (None)."""
    path = tmp_path / "w.pth"
    if isinstance(change, dict):
        state = {**vgg16_features("vgg16"), **change}
        change = {name: tensor for name, tensor in state.items() if tensor is not None}
    path.write_bytes(change) if isinstance(change, bytes) else torch.save(change, path)
    with pytest.raises(ValueError, match=rf"(?s)w\.pth: .*{message}"):
        load_pretrained(SSD300(3, network), str(path))


@pytest.mark.parametrize("network, weights, fault, error, message", [
    (LITE, "nothing.pth", NO_NETWORK, FileNotFoundError, r"nothing\.pth.*IMAGENET1K_V1.*--pretrained="),
    (LITE, "IMAGENET1K_FEATURES", NO_NETWORK, FileNotFoundError, "IMAGENET1K_V1, IMAGENET1K_V2"),
    (LITE, "IMAGENET1K_V1", NO_NETWORK, ConnectionError, "https://.*is no network.*--pretrained=FILE.*--pretrained= "),
    (LITE, "IMAGENET1K_V2", RuntimeError("invalid hash value"), ConnectionError, "invalid hash.*--pretrained=FILE"),
    ("ssd300_tiny", "IMAGENET1K_V1", NO_NETWORK, ValueError, "ssd300_tiny has no pretrained.*--pretrained="),
])  # fmt: skip
def test_weights_that_cannot_be_had_say_the_way_out(network, weights, fault, error, message, monkeypatch, tmp_path):
    break_downloads(monkeypatch, tmp_path, fault)
    with pytest.raises(error, match=message):
        load_pretrained(SSD300(3, network), weights)


# --- Checkpoints of a model -----------------------------------------------------------------------


@pytest.mark.parametrize("removed", [(), ("network", "antialias", "max_size_offset")])
def test_a_checkpoint_carries_all_that_detection_needs(tiny, removed, tmp_path):
    """Without these entries, from before the family, it is an ssd300_vgg16."""
    model = SSD300(3) if removed else tiny
    model.label_map = LABEL_MAP
    save_checkpoint({name: entry for name, entry in model_state(model).items() if name not in removed}, tmp_path / "c")
    loaded = model_from_checkpoint(load_checkpoint(tmp_path / "c"), "c")
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    images = torch.randn(1, 3, 300, 300)
    for again in (loaded, load_model(tmp_path / "c")):  # the second one is to detect with
        assert list(again.label_map.items()) == list(LABEL_MAP.items())
        for name in ("mean", "std", "priors_cxcy"):
            assert torch.equal(getattr(model, name), getattr(again, name)), name
        for name in ("network", "input_size", "antialias", "max_size_offset"):
            assert getattr(model, name) == getattr(again, name), name
    assert not again.training and not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in again.modules())
    with torch.no_grad():
        for ours, theirs in zip(again(images), model.eval()(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name, value, message", [
    ("network", "ssd999", "'ssd999'.*ssd300_vgg16"), ("network", "ssd512_vgg16", "conv12_2"),
    ("label_map", {"background": 0, "cat": 1}, r"pred_convs\.cl_conv4_3"), ("label_map", 3, ""),
    *(("label_map", value, "not a label map") for value in (
        {0: "background", 1: "cat", 2: "dog"}, {"background": 1, "cat": 2, "dog": 3}, {"background": 0, "a": 1, "b": 5}
    )),
    ("label_map", None, "does not fit"), ("label_map", {}, "map has 0 classes"),
    ("label_map", dict.fromkeys(map(str, range(7)), 1), "map has 7 classes"),
    *(("base.conv6.bias", value, r"base\.conv6\.bias") for value in (None, torch.zeros(3))),
    ("base.conv8.bias", torch.zeros(3), r"base\.conv8\.bias"),
    ("base.conv6.bias", torch.full((128,), torch.nan), r"base\.conv6\.bias.*not finite"),
    ("base.conv1_1.norm.running_var", torch.ones(8) / 0, "running_var.*finite"),
    ("priors_cxcy", torch.full((8732, 4), torch.nan), "priors_cxcy.*not finite"),
    ("priors_cxcy", torch.ones(100, 4), "100"),
    ("mean", None, "mean"), ("mean", [0.2, float("nan"), 0.2], "mean.*not finite"),
    ("std", [0.2, 0.0, 0.2], r"std is \[0\.2, 0\.0, 0\.2\].*more than 0"), ("std", [0.2, -0.1, 0.2], "std"),
])  # fmt: skip
def test_checkpoints_that_do_not_fit_name_file_and_fault(tiny, name, value, message, tmp_path):
    """name: the entry that is replaced, or taken out (None)."""
    path, saved = tmp_path / "some_file.pth.tar", model_state(tiny)
    entries = saved["model"] if name.startswith("base.") else saved
    entries[name] = value
    if value is None:
        del entries[name]
    save_checkpoint(saved, path)
    with pytest.raises(ValueError, match=rf"(?s)some_file.*{message}"):
        load_model(path)


@pytest.mark.parametrize("network", ["ssd300_tiny", LITE])
@pytest.mark.parametrize("names", [("a", "b", "c"), ("cat", "dog"), ("dog", "cat"), ("bird", "cat", "cow")])
def test_fine_tuning_keeps_the_rows_of_classes_of_the_same_name(network, names):
    torch.manual_seed(4)
    before = SSD300(3, network, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1.5, antialias=False)
    before.label_map = LABEL_MAP
    for parameter in before.pred_convs.parameters():
        torch.nn.init.normal_(parameter)  # biases, too, which start at 0
    label_map = {"background": 0, **{name: i for i, name in enumerate(names, 1)}}
    after = model_from_checkpoint(model_state(before), "c", label_map)
    assert after.label_map == label_map and after.n_classes == len(label_map)
    assert after.antialias is False and after.max_size_offset == 1.5 and torch.equal(after.mean, before.mean)
    old_state = before.state_dict()
    n_rows = 0
    for name, tensor in after.state_dict().items():
        if not name.startswith("pred_convs.cl_") or ".0." in name:  # of an SSDLite's head the part before the classes
            assert torch.equal(tensor, old_state[name]), name
            continue
        rows, old_rows = tensor.unflatten(0, (-1, len(label_map))), old_state[name].unflatten(0, (-1, 3))
        for class_name, label in label_map.items():
            is_kept = class_name in LABEL_MAP
            n_rows += is_kept
            if is_kept:
                assert torch.equal(rows[:, label], old_rows[:, LABEL_MAP[class_name]]), (name, class_name)
            elif name.endswith("weight"):
                assert not any(torch.equal(rows[:, label], old_rows[:, old]) for old in range(3))
    assert n_rows == 12 * sum(name in LABEL_MAP for name in label_map)  # weight and bias of six heads
    images = torch.randn(1, 3, after.input_size, after.input_size)
    assert after(images)[1].shape == (1, len(after.priors_cxcy), len(label_map))


@pytest.mark.parametrize("network", ["ssd300_tiny", LITE])
def test_new_classes_on_the_device_and_of_the_type_of_the_others(network):
    model = SSD300(3, network)
    with pytest.raises(ValueError, match="has no label_map"):
        model.change_classes({"background": 0, "cow": 1})
    model.label_map = LABEL_MAP
    for wrong in ({}, ["background", "cow"], {0: "background", 1: "cow"}, {"background": 0, "cow": 2}):
        with pytest.raises(ValueError, match="not a label map"):
            model.change_classes(wrong)
    model.double().change_classes({"background": 0, "cow": 1})
    _, scores = model(torch.zeros(1, 3, model.input_size, model.input_size, dtype=torch.float64))
    assert scores.shape[2] == 2 and scores.dtype == torch.float64
    model.to("meta").change_classes(LABEL_MAP)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_without_autocast(tiny, dtype):
    tiny.eval()
    images = torch.randint(256, (1, 3, 300, 300), dtype=torch.uint8)
    with torch.no_grad():
        expected = tiny(tiny.normalize(images))
        found = tiny.to(dtype)(tiny.normalize(images))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.float(), theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())
