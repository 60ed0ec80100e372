"""The networks: priors and their order, layers, pretrained bases, checkpoints; torchvision as a witness."""

import math
import urllib.error
from functools import cache

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

from model import (
    CAFFE_MEAN,
    CAFFE_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    NETWORKS,
    SSD300,
    MultiBoxLoss,
    PredictionConvolutions,
    fastest_memory_format,
    has_bf16_units,
    l2_normalize,
    load_model,
    load_other_classes,
    load_pretrained,
    model_from_checkpoint,
    model_state,
)
from utils import cxcy_to_xy, load_checkpoint, save_checkpoint

LABEL_MAP = {"background": 0, "cat": 1, "dog": 2}
LITE = "ssdlite320_mobilenet_v3_large"
VGG_NETWORKS = [name for name in NETWORKS if name != LITE]
root_2, root_3 = math.sqrt(2), math.sqrt(3)
CAFFE_ORDER = {4: [0, 1, 2, 3], 6: [0, 1, 2, 4, 3, 5]}  # of a cell's priors in Caffe's code and torchvision's


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Any attempt to download fails, and nothing is cached."""

    def fail(*arguments, **keywords):
        raise urllib.error.URLError("there is no network in this test")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "urlopen", fail)


@pytest.fixture
def tiny():
    """A small model with a label map, and an input and priors of its own."""
    torch.manual_seed(4)
    priors_cxcy = SSD300.create_prior_boxes("ssd300_tiny") * 0.9
    ssd = SSD300(3, "ssd300_tiny", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), priors_cxcy, 1.5, antialias=False)
    ssd.label_map = LABEL_MAP
    return ssd


def randomize(module):
    """Give all biases, and all that batch normalisation consists of, values that a mistake would show."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith(("bias", "running_mean")):
                tensor.normal_(std=0.1)
            elif name.endswith("running_var") or (name.endswith("weight") and tensor.dim() == 1):
                tensor.uniform_(0.5, 1.5)


# ----------------------------------------------------------------------------------------------
# Priors
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network, maps", [
    ("ssd300_vgg16", (5776, 2166, 600, 150, 36, 4)),
    ("ssd512_vgg16", (16384, 6144, 1536, 384, 96, 16, 4)),
    ("ssd300_vgg16_bn", (5776, 2166, 600, 150, 36, 4)),
    ("ssd300_tiny", (5776, 2166, 600, 150, 36, 4)),
    (LITE, (2400, 600, 150, 54, 24, 6)),
    ("ssd300_vgg16_coco", (5776, 2166, 600, 150, 36, 4)),
    ("ssd512_vgg16_coco", (16384, 6144, 1536, 384, 96, 16, 4)),
])  # fmt: skip
def test_number_of_priors(network, maps):
    assert tuple(source.grid**2 * source.n_priors for source in NETWORKS[network].sources) == maps
    priors_cxcy = SSD300.create_prior_boxes(network)
    assert priors_cxcy.shape == (sum(maps), 4) and priors_cxcy.dtype == torch.float32
    assert set(NETWORKS) == {*VGG_NETWORKS, LITE} and len(NETWORKS) == 7


@pytest.mark.parametrize("network, expected", [
    ("ssd300_vgg16", {
        # conv4_3, first cell: ratio 1, the extra square of scale sqrt(0.1 * 0.2), ratios 2 and 1/2
        0: (0.5 / 38, 0.5 / 38, 0.1, 0.1),
        1: (0.5 / 38, 0.5 / 38, math.sqrt(0.02), math.sqrt(0.02)),
        2: (0.5 / 38, 0.5 / 38, 0.1 * root_2, 0.1 / root_2),
        3: (0.5 / 38, 0.5 / 38, 0.1 / root_2, 0.1 * root_2),
        4: (1.5 / 38, 0.5 / 38, 0.1, 0.1),  # the next cell is to the right ...
        38 * 4: (0.5 / 38, 1.5 / 38, 0.1, 0.1),  # ... and after 38 cells comes the next row
        5775: (37.5 / 38, 37.5 / 38, 0.1 / root_2, 0.1 * root_2),
        # conv7, first cell: ratios 1, extra, 2, 3, 1/2, 1/3
        5776: (0.5 / 19, 0.5 / 19, 0.2, 0.2),
        5777: (0.5 / 19, 0.5 / 19, math.sqrt(0.2 * 0.375), math.sqrt(0.2 * 0.375)),
        5778: (0.5 / 19, 0.5 / 19, 0.2 * root_2, 0.2 / root_2),
        5779: (0.5 / 19, 0.5 / 19, 0.2 * root_3, 0.2 / root_3),
        5780: (0.5 / 19, 0.5 / 19, 0.2 / root_2, 0.2 * root_2),
        5781: (0.5 / 19, 0.5 / 19, 0.2 / root_3, 0.2 * root_3),
        # first of the other maps
        7942: (0.05, 0.05, 0.375, 0.375), 8542: (0.1, 0.1, 0.55, 0.55), 8692: (0.5 / 3, 0.5 / 3, 0.725, 0.725),
        # conv11_2: the last map, whose extra scale ends at 1; priors may reach beyond the image
        8728: (0.5, 0.5, 0.9, 0.9), 8729: (0.5, 0.5, math.sqrt(0.9), math.sqrt(0.9)),
        8730: (0.5, 0.5, 0.9 * root_2, 0.9 / root_2), 8731: (0.5, 0.5, 0.9 / root_2, 0.9 * root_2),
    }),
    ("ssd512_vgg16", {
        0: (0.5 / 64, 0.5 / 64, 0.07, 0.07), 1: (0.5 / 64, 0.5 / 64, math.sqrt(0.0105), math.sqrt(0.0105)),
        16384: (0.5 / 32, 0.5 / 32, 0.15, 0.15), 16387: (0.5 / 32, 0.5 / 32, 0.15 * root_3, 0.15 / root_3),
        22528: (0.5 / 16, 0.5 / 16, 0.3, 0.3), 24064: (0.5 / 8, 0.5 / 8, 0.45, 0.45),
        24448: (0.125, 0.125, 0.6, 0.6), 24453: (0.125, 0.125, 0.6 / root_3, 0.6 * root_3),
        24544: (0.25, 0.25, 0.75, 0.75), 24547: (0.25, 0.25, 0.75 / root_2, 0.75 * root_2),
        24560: (0.5, 0.5, 0.9, 0.9), 24561: (0.5, 0.5, math.sqrt(0.945), math.sqrt(0.945)),
    }),
    (LITE, {
        0: (0.025, 0.025, 0.2, 0.2), 1: (0.025, 0.025, math.sqrt(0.07), math.sqrt(0.07)),
        2400: (0.05, 0.05, 0.35, 0.35), 3000: (0.1, 0.1, 0.5, 0.5), 3150: (0.5 / 3, 0.5 / 3, 0.65, 0.65),
        3204: (0.25, 0.25, 0.8, 0.8), 3206: (0.25, 0.25, 1, 0.8 / root_2),  # clipped to the image's width
        3228: (0.5, 0.5, 0.95, 0.95), 3229: (0.5, 0.5, math.sqrt(0.95), math.sqrt(0.95)),
        3233: (0.5, 0.5, 0.95 / root_3, 1),
    }),
    ("ssd300_vgg16_coco", {
        0: (0.5 / 38, 0.5 / 38, 0.07, 0.07), 1: (0.5 / 38, 0.5 / 38, math.sqrt(21 * 45) / 300, math.sqrt(945) / 300),
        5776: (0.5 / 19, 0.5 / 19, 45 / 300, 45 / 300), 7942: (0.05, 0.05, 99 / 300, 99 / 300),
        8542: (0.1, 0.1, 153 / 300, 153 / 300), 8692: (0.5 / 3, 0.5 / 3, 207 / 300, 207 / 300),
        8728: (0.5, 0.5, 261 / 300, 0.87), 8729: (0.5, 0.5, math.sqrt(261 * 315) / 300, math.sqrt(0.87 * 1.05)),
    }),
    ("ssd512_vgg16_coco", {
        0: (0.5 / 64, 0.5 / 64, 0.04, 0.04), 16384: (0.5 / 32, 0.5 / 32, 51.2 / 512, 51.2 / 512),
        22528: (0.5 / 16, 0.5 / 16, 133.12 / 512, 0.26), 24064: (0.5 / 8, 0.5 / 8, 215.04 / 512, 0.42),
        24448: (0.125, 0.125, 296.96 / 512, 0.58), 24544: (0.25, 0.25, 378.88 / 512, 0.74),
        24560: (0.5, 0.5, 460.8 / 512, 0.9), 24561: (0.5, 0.5, math.sqrt(460.8 * 542.72) / 512, math.sqrt(0.9 * 1.06)),
    }),
])  # fmt: skip
def test_priors_by_hand(network, expected):
    rows = SSD300.create_prior_boxes(network)[list(expected)]
    torch.testing.assert_close(rows, torch.tensor(list(expected.values())), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("network", NETWORKS)
def test_priors_are_those_of_torchvision_in_another_order(network):
    row = NETWORKS[network]
    ratios = [[2] if source.n_priors == 4 else [2, 3] for source in row.sources]
    scales = [*(source.scale for source in row.sources), row.last_scale]
    generator = DefaultBoxGenerator(ratios, scales=scales, clip=network == LITE)
    images = ImageList(torch.zeros(1, 3, 512, 512), [(512, 512)])
    theirs = generator(images, [torch.zeros(1, 1, source.grid, source.grid) for source in row.sources])[0]
    ours = cxcy_to_xy(SSD300.create_prior_boxes(network))[caffe_rows(network)] * 512
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def caffe_rows(network):
    """Our row of each prior in the order of Caffe and torchvision: in a cell of six they have ratio 1/2 before 3."""
    rows, first = [], 0
    for source in NETWORKS[network].sources:
        for _ in range(source.grid**2):
            rows += [first + k for k in CAFFE_ORDER[source.n_priors]]
            first += source.n_priors
    return torch.tensor(rows)


@pytest.mark.parametrize("i_map, row, column, prior", [
    (0, 0, 0, 0), (0, 37, 5, 3), (1, 2, 11, 4), (2, 9, 9, 5), (3, 1, 4, 2), (4, 2, 0, 1), (5, 0, 0, 3),
])  # fmt: skip
def test_head_order_is_prior_order(i_map, row, column, prior):
    """Each head fires for one cell, one prior and one number of it: it must come out at that prior's row."""
    n_classes, coordinate, label, sources = 5, 2, 3, NETWORKS["ssd300_tiny"].sources
    heads, source = PredictionConvolutions(n_classes, NETWORKS["ssd300_tiny"]), sources[i_map]
    source_maps = [torch.zeros(2, s.channels, s.grid, s.grid) for s in sources]
    source_maps[i_map][1, 7, row, column] = 1.0
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.zero_()
        heads.get_submodule(f"loc_{source.name}").weight[prior * 4 + coordinate, 7, 1, 1] = 10.0
        heads.get_submodule(f"cl_{source.name}").weight[prior * n_classes + label, 7, 1, 1] = 20.0
        locs, scores = heads(source_maps)
    assert locs.shape == (2, 8732, 4) and scores.shape == (2, 8732, n_classes)

    # Where the prior is, by its place and size alone.
    ratios = (source.aspect_ratios[0], None, *source.aspect_ratios[1:])
    next_scale = (*(s.scale for s in sources), 1.0)[i_map + 1]
    scale, ratio = (math.sqrt(source.scale * next_scale), 1) if prior == 1 else (source.scale, ratios[prior])
    wanted = torch.tensor(
        [(column + 0.5) / source.grid, (row + 0.5) / source.grid, scale * ratio**0.5, scale / ratio**0.5]
    )
    distances = (SSD300.create_prior_boxes() - wanted).abs().amax(dim=1)
    assert distances.min() < 1e-6 and (distances < 1e-3).sum() == 1
    expected = distances.argmin().item()
    assert locs.nonzero().tolist() == [[1, expected, coordinate]] and locs.max() == 10
    assert scores.nonzero().tolist() == [[1, expected, label]] and scores.max() == 20


# ----------------------------------------------------------------------------------------------
# The layers
# ----------------------------------------------------------------------------------------------

CONV_OF_VGG = (
    ("1_1", 64, 3), ("1_2", 64, 64), ("2_1", 128, 64), ("2_2", 128, 128), ("3_1", 256, 128), ("3_2", 256, 256),
    ("3_3", 256, 256), ("4_1", 512, 256), ("4_2", 512, 512), ("4_3", 512, 512), ("5_1", 512, 512), ("5_2", 512, 512),
    ("5_3", 512, 512), ("6", 1024, 512), ("7", 1024, 1024),
)  # fmt: skip


@pytest.mark.parametrize("network, divisor", [("ssd300_vgg16", 1), ("ssd300_vgg16_coco", 1), ("ssd300_tiny", 8)])
def test_state_dict_has_the_keys_and_shapes_of_the_tutorial(network, divisor):
    with torch.device("meta"):
        ssd = SSD300(21, network, priors_cxcy=torch.zeros(8732, 4))
    shapes = {"rescale_factors": (1, 512 // divisor, 1, 1)}

    def add(name, out_channels, in_channels, kernel_size):
        shapes[f"{name}.weight"] = (out_channels, in_channels, kernel_size, kernel_size)
        shapes[f"{name}.bias"] = (out_channels,)

    for name, out_channels, in_channels in CONV_OF_VGG:
        add(f"base.conv{name}", out_channels // divisor, max(3, in_channels // divisor), 1 if name == "7" else 3)
    for number, in_channels, middle, out_channels in (
        (8, 1024, 256, 512), (9, 512, 128, 256), (10, 256, 128, 256), (11, 256, 128, 256)
    ):  # fmt: skip
        add(f"aux_convs.conv{number}_1", middle // divisor, in_channels // divisor, 1)
        add(f"aux_convs.conv{number}_2", out_channels // divisor, middle // divisor, 3)
    for name, channels, n_priors in (
        ("conv4_3", 512, 4), ("conv7", 1024, 6), ("conv8_2", 512, 6), ("conv9_2", 256, 6), ("conv10_2", 256, 4),
        ("conv11_2", 256, 4),
    ):  # fmt: skip
        add(f"pred_convs.loc_{name}", n_priors * 4, channels // divisor, 3)
        add(f"pred_convs.cl_{name}", n_priors * 21, channels // divisor, 3)
    own = {name: tuple(tensor.shape) for name, tensor in ssd.state_dict().items() if ".norm." not in name}
    assert own == shapes
    assert len(own) == len(ssd.state_dict()) or network == "ssd300_tiny"


@cache
def tv_ssdlite():
    """torchvision's SSDLite of 7 classes, random weights, in evaluation mode."""
    torch.manual_seed(1)
    ssd = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=7)
    randomize(ssd)
    return ssd.eval()


def test_ssdlite_equals_torchvisions():
    theirs, ours = tv_ssdlite(), SSD300(7, LITE)
    state = theirs.state_dict()
    translated = {}
    for their_part, our_part in (("backbone.features", "base"), ("backbone.extra", "aux_convs")):  # in one order
        tensors = [tensor for name, tensor in state.items() if name.startswith(f"{their_part}.")]
        names = ours.get_submodule(our_part).state_dict()
        translated.update({f"{our_part}.{name}": tensor for name, tensor in zip(names, tensors, strict=True)})
    for i, source in enumerate(NETWORKS[LITE].sources):
        for kind, size, head in (("loc", 4, "regression"), ("cl", 7, "classification")):
            prefix = f"head.{head}_head.module_list.{i}."
            for name, tensor in state.items():
                if name.startswith(f"{prefix}1."):  # the last convolution, whose channels are in the order of priors
                    tensor = tensor.unflatten(0, (6, size))[CAFFE_ORDER[6]].flatten(0, 1)
                if name.startswith(prefix):
                    translated[f"pred_convs.{kind}_{source.name}.{name.removeprefix(prefix)}"] = tensor
    ours.load_state_dict(translated)
    images = torch.randint(0, 256, (2, 3, 320, 320), dtype=torch.uint8)
    with torch.no_grad():
        normalized = ours.normalize(images)
        locs, scores = ours.eval()(normalized)
        outputs = theirs.head(list(theirs.backbone(normalized).values()))
    assert normalized.min() == -1 and normalized.max() == 1  # mean and deviation are 0.5
    rows = caffe_rows(LITE)
    for our, their in ((locs, outputs["bbox_regression"]), (scores, outputs["cls_logits"])):
        assert their.std() > 0.05  # numbers to compare
        torch.testing.assert_close(our[:, rows], their, rtol=0, atol=1e-4)


class PlainSSD512(nn.Module):
    """SSD512 written down once more, layer by layer: for the raw outputs of ours with the same weights."""

    def __init__(self, state, n_classes):
        super().__init__()
        self.state, self.n_classes = state, n_classes

    def conv(self, name, x, relu=True, **options):
        x = F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)
        return F.relu(x) if relu else x

    def forward(self, x):
        for name in ("1_1", "1_2", "2_1", "2_2", "3_1", "3_2", "3_3", "4_1", "4_2", "4_3", "5_1", "5_2", "5_3"):
            if name in ("2_1", "3_1", "4_1", "5_1"):
                x = F.max_pool2d(x, 2, 2)
            x = self.conv(f"base.conv{name}", x, padding=1)
            if name == "4_3":
                maps = [F.normalize(x, dim=1) * self.state["rescale_factors"]]
        x = self.conv("base.conv6", F.max_pool2d(x, 3, 1, 1), padding=6, dilation=6)
        maps.append(self.conv("base.conv7", x))
        for number in (8, 9, 10, 11, 12):
            x = self.conv(f"aux_convs.conv{number}_1", maps[-1])
            size = {"stride": 1, "padding": 1} if number == 12 else {"stride": 2, "padding": 1}
            maps.append(self.conv(f"aux_convs.conv{number}_2", x, **size))
        assert [x.shape[2] for x in maps] == [64, 32, 16, 8, 4, 2, 1]
        assert self.state["aux_convs.conv12_2.weight"].shape == (256, 128, 4, 4)
        names = ("conv4_3", "conv7", "conv8_2", "conv9_2", "conv10_2", "conv11_2", "conv12_2")
        outputs = []
        for kind, size in (("loc", 4), ("cl", self.n_classes)):
            heads = [self.conv(f"pred_convs.{kind}_{n}", x, False, padding=1) for n, x in zip(names, maps, strict=True)]
            outputs.append(torch.cat([x.permute(0, 2, 3, 1).reshape(len(x), -1, size) for x in heads], dim=1))
        return outputs


def test_ssd512_equals_a_plain_second_construction():
    torch.manual_seed(2)
    ssd = SSD300(3, "ssd512_vgg16").eval()
    randomize(ssd)
    images = torch.randn(1, 3, 512, 512)
    with torch.no_grad():
        locs, scores = ssd(images)
        plain_locs, plain_scores = PlainSSD512(ssd.state_dict(), 3)(images)
    assert locs.shape == (1, 24564, 4) and scores.shape == (1, 24564, 3)
    assert scores.std() > 0.1
    torch.testing.assert_close(locs, plain_locs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores, plain_scores, rtol=1e-4, atol=1e-4)


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="n_classes is 1"):
        SSD300(1)
    with pytest.raises(ValueError, match=r"'ssd301'.*ssd300_vgg16, ssd512_vgg16"):
        SSD300(2, "ssd301")
    with pytest.raises(ValueError, match=r"\(N, 3, 300, 300\) for ssd300_tiny, not \(2, 3, 300, 299\)"):
        SSD300(2, "ssd300_tiny")(torch.zeros(2, 3, 300, 299))


@pytest.mark.parametrize("network", ["ssd300_tiny", LITE])
def test_batch_of_one_image_trains(network):
    """The last map is 1 x 1: with one image there is one value a channel, of which no deviation can be taken."""
    torch.manual_seed(0)
    ssd = SSD300(3, network).train()
    images = torch.randn(1, 3, ssd.input_size, ssd.input_size)
    locs, scores = ssd(images)
    criterion = MultiBoxLoss(ssd.priors_cxcy)
    loss = criterion(locs, scores, [torch.tensor([[0.1, 0.1, 0.9, 0.9]])], [torch.tensor([1])])
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in ssd.parameters() if p.grad is not None)
    assert all(buffer.isfinite().all() for buffer in ssd.buffers())
    ssd(torch.cat([images, images]))  # and more than one as ever


@pytest.mark.parametrize("network, left", [("ssd300_tiny", ("conv6", "conv7")), (LITE, ())])
def test_frozen_base_keeps_weights_and_statistics(network, left):
    torch.manual_seed(0)
    ssd = SSD300(3, network)
    ssd.freeze_base()
    before = {name: tensor.clone() for name, tensor in ssd.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in ssd.parameters() if p.requires_grad], lr=1e-3)
    ssd.eval().train()
    sum(output.square().mean() for output in ssd(torch.randn(2, 3, ssd.input_size, ssd.input_size))).backward()
    optimizer.step()
    changed = {name for name, tensor in ssd.state_dict().items() if not torch.equal(tensor, before[name])}
    in_base = {name.split(".")[1] for name in changed if name.startswith("base.")}
    assert in_base == set(left)
    assert any(name.startswith("pred_convs.") for name in changed)


def test_building_a_model_never_downloads(no_network):
    for network in ("ssd300_tiny", LITE):
        SSD300(3, network)


def test_normalize():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, -1, 300, 300)
    normalized = SSD300(2, "ssd300_tiny").normalize(images)
    expected = [(v - m) / s for v, m, s in zip((0, 1, 0.2), IMAGENET_MEAN, IMAGENET_STD, strict=True)]
    torch.testing.assert_close(normalized[1, :, 150, 7], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert normalized.dtype == torch.float32


def test_l2_normalize():
    features = 100 * torch.randn(2, 512, 3, 3)
    features[0, :, 1, 1] = 0
    features.requires_grad_()
    normalized = l2_normalize(features)
    lengths = normalized.norm(dim=1)
    assert lengths[0, 1, 1] == 0
    torch.testing.assert_close(normalized[1], F.normalize(features, dim=1)[1])
    normalized.square().sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_l2_normalize_is_float32_under_autocast(dtype):
    features = torch.full((1, 512, 2, 2), 300.0)  # its squares are beyond float16
    with torch.autocast("cpu", torch.bfloat16):
        normalized = l2_normalize(features.to(dtype))
    assert normalized.dtype == torch.float32
    torch.testing.assert_close(normalized, torch.full((1, 512, 2, 2), 512**-0.5), rtol=1e-5, atol=0)


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
    cpu = torch.device("cpu")
    for has_units in (True, False):
        monkeypatch.setattr("model.has_bf16_units", lambda device, answer=has_units: answer)
        for network, row in NETWORKS.items():
            is_last = fastest_memory_format(cpu, network) == torch.channels_last
            assert is_last == (has_units or row.base != "vgg16")
    assert has_bf16_units(cpu) in (True, False)


# ----------------------------------------------------------------------------------------------
# Pretrained bases
# ----------------------------------------------------------------------------------------------

CLASSIFIERS = {"vgg16": torchvision.models.vgg16, "vgg16_bn": torchvision.models.vgg16_bn}


@cache
def vgg16_features(base):
    """`features.*` of a VGG-16 with random weights, as torchvision names and shapes them."""
    with torch.device("meta"):  # names and shapes, without the 0.5 GB of the whole VGG-16
        entries = CLASSIFIERS[base](weights=None).state_dict()
    torch.manual_seed(1)
    features = {name: torch.rand(entry.shape) for name, entry in entries.items() if name.startswith("features.")}
    return {name: tensor for name, tensor in features.items() if not name.endswith("num_batches_tracked")}


def constant_fc_layers(value):
    """fc6 and fc7 of one value (NaN as in torchvision's IMAGENET1K_FEATURES); expanded, so that they take no memory."""
    shapes = {"0.weight": (4096, 25088), "0.bias": (4096,), "3.weight": (4096, 4096), "3.bias": (4096,)}
    return {f"classifier.{name}": torch.tensor(value).expand(shape) for name, shape in shapes.items()}


def load(ssd, state, monkeypatch, weights="a file"):
    monkeypatch.setattr("model.read_pretrained", lambda *_: state)
    load_pretrained(ssd, weights)


def assert_xavier(conv):
    bound = math.sqrt(6 / (conv.weight[0].numel() + conv.weight[:, 0].numel()))
    assert (conv.bias == 0).all()
    assert 0.999 * bound < conv.weight.abs().max() <= bound
    assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)  # of a uniform distribution


@pytest.mark.parametrize("network, fc_layers", [
    ("ssd300_vgg16", {}), ("ssd300_vgg16", constant_fc_layers(torch.nan)), ("ssd300_vgg16_bn", {}),
])  # fmt: skip
def test_features_are_taken_over_and_conv6_and_conv7_start_from_xavier(network, fc_layers, monkeypatch):
    features = vgg16_features(NETWORKS[network].base)
    ssd = SSD300(3, network)
    load(ssd, {**features, **fc_layers}, monkeypatch)
    own = [
        tensor
        for name, tensor in ssd.base.state_dict().items()
        if not name.startswith(("conv6", "conv7")) and not name.endswith("num_batches_tracked")
    ]
    assert len(own) == {"vgg16": 26, "vgg16_bn": 13 * 6}[NETWORKS[network].base]
    assert all(torch.equal(one, two) for one, two in zip(own, features.values(), strict=True))
    assert_xavier(ssd.base.conv6)
    assert_xavier(ssd.base.conv7)
    # Mean and deviation follow the weights: those of torchvision's file of Caffe's weights are Caffe's.
    mean, std = (CAFFE_MEAN, CAFFE_STD) if fc_layers else (IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(ssd.mean.flatten(), torch.tensor(mean))
    torch.testing.assert_close(ssd.std.flatten(), torch.tensor(std))


@pytest.mark.parametrize("network", ["ssd300_vgg16", "ssd300_vgg16_bn"])
def test_fc6_and_fc7_are_decimated(network, monkeypatch):
    """On input at the places that decimation keeps, conv6 and conv7 compute what fc6 and fc7 compute."""
    torch.manual_seed(3)
    fc6 = (torch.randn(4096, 1).half() + torch.randn(1, 25088).half()) * 0.01  # random enough, and quickly made
    fc7 = (torch.randn(4096, 4096) * 0.01).half()
    biases = torch.randn(2, 4096).half()
    fc_layers = {
        "classifier.0.weight": fc6, "classifier.0.bias": biases[0], "classifier.3.weight": fc7,
        "classifier.3.bias": biases[1],
    }  # fmt: skip
    ssd = SSD300(3, network)
    load(ssd, {**vgg16_features(NETWORKS[network].base), **fc_layers}, monkeypatch)
    conv6, conv7 = ssd.base.conv6, ssd.base.conv7
    kept_outputs = torch.tensor([0, 4, 2048, 4092])  # numbers 0, 1, 512 and 1023 of conv6 and conv7

    # fc6 sees a 7 x 7 field, of which conv6 keeps rows and columns 0, 3 and 6, now 6 cells apart.
    values = torch.randn(512, 3, 3)
    field, field_map = torch.zeros(1, 512, 7, 7), torch.zeros(1, 512, 19, 19)
    field[0, :, ::3, ::3] = values
    field_map[0, :, 2:15:6, 4:17:6] = values  # around row 8, column 10
    full = F.conv2d(field, fc6[kept_outputs].view(-1, 512, 7, 7).float(), biases[0, kept_outputs].float()).flatten()
    ours = F.conv2d(field_map, conv6.weight, conv6.bias, padding=conv6.padding, dilation=conv6.dilation)
    torch.testing.assert_close(ours[0, kept_outputs // 4, 8, 10], full, rtol=1e-4, atol=1e-4)

    # fc7 takes fc6's 4096 outputs, of which every fourth is left.
    inputs = torch.zeros(4096)
    inputs[::4] = torch.randn(1024)
    full = fc7[kept_outputs].float() @ inputs + biases[1, kept_outputs].float()
    ours = F.conv2d(inputs[None, ::4, None, None], conv7.weight, conv7.bias)
    torch.testing.assert_close(ours[0, kept_outputs // 4, 0, 0], full, rtol=1e-4, atol=1e-4)


def test_mobilenet_takes_over_the_full_tail(monkeypatch, tmp_path):
    torch.manual_seed(0)
    whole = torchvision.models.mobilenet_v3_large(weights=None)
    randomize(whole)
    ssd = SSD300(3, LITE)
    assert ssd.base.features[-1].out_channels == 480
    load(ssd, whole.state_dict(), monkeypatch)
    assert ssd.base.features[-1].out_channels == 960
    images = torch.randn(1, 3, 320, 320)
    with torch.no_grad():
        for block in ssd.base.features.modules():  # torchvision's classifier has another epsilon
            if isinstance(block, nn.BatchNorm2d):
                assert (block.eps, block.momentum) == (0.001, 0.03)
        torch.testing.assert_close(ssd.eval().base(images)[1], whole.eval().features(images), rtol=1e-4, atol=1e-4)
    ssd.label_map = LABEL_MAP  # such a model is saved, loaded and fine-tuned like any other
    save_checkpoint(model_state(ssd), tmp_path / "c.pth.tar")
    for loaded in (load_model(tmp_path / "c.pth.tar"), SSD300(5, LITE)):
        if loaded.n_classes == 5:
            load_other_classes(loaded, load_checkpoint(tmp_path / "c.pth.tar"), {str(i): i for i in range(5)})
        assert torch.equal(loaded.base.features[-1][0].weight, ssd.base.features[-1][0].weight)
        assert loaded(images)[1].shape == (1, 3234, loaded.n_classes)


def test_pretrained_from_a_local_file(tmp_path):
    path = tmp_path / "vgg16.pth"
    features = vgg16_features("vgg16")
    torch.save({name: tensor.half() for name, tensor in features.items()}, path)
    ssd = SSD300(3)
    load_pretrained(ssd, str(path))
    assert torch.equal(ssd.base.conv3_2.weight, features["features.12.weight"].half().float())


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("features.28.bias"), r"conv5_3\.bias"),
    (lambda state: state.update({"features.5.weight": torch.zeros(128, 64, 1, 1)}), r"conv2_1\.weight.*64, 1, 1"),
    (lambda state: state["features.0.bias"].fill_(torch.nan), r"conv1_1\.bias.*not finite"),
    (lambda state: state.update(vgg16_features("vgg16_bn")), "not weights of vgg16:"),
    (lambda state: state.clear(), r"conv1_1\.weight"),
])  # fmt: skip
def test_wrong_vgg16_weights_name_file_and_entry(change, message, tmp_path):
    state = {name: tensor.clone() for name, tensor in vgg16_features("vgg16").items()}
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"(?s)w\.pth: .*{message}"):
        load_pretrained(SSD300(3), str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    "content", [b"no weights", [1, 2], torch.zeros(3), {"model": {"conv1_1.weight": torch.zeros(3)}}]
)
def test_pretrained_files_that_are_none(content, tmp_path):
    path = tmp_path / "foreign.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=r"foreign\.pth: not a state dict"):
        load_pretrained(SSD300(3, LITE), str(path))


@pytest.mark.parametrize("network, weights, error, message", [
    (LITE, "nothing.pth", FileNotFoundError, r"nothing\.pth.*IMAGENET1K_V1.*--pretrained="),
    (LITE, "IMAGENET1K_FEATURES", FileNotFoundError, "IMAGENET1K_V1, IMAGENET1K_V2"),
    (LITE, "IMAGENET1K_V1", ConnectionError, r"https://.*there is no network.*--pretrained=FILE.*--pretrained= "),
    ("ssd300_tiny", "IMAGENET1K_V1", ValueError, "ssd300_tiny has no pretrained weights.*--pretrained="),
])  # fmt: skip
def test_weights_that_cannot_be_had_say_the_way_out(network, weights, error, message, no_network):
    with pytest.raises(error, match=message):
        load_pretrained(SSD300(3, network), weights)


def test_download_that_breaks_off_says_the_way_out(monkeypatch, tmp_path):
    def break_off(*arguments, **keywords):  # what torch.hub raises when the file's hash is not that in its name
        raise RuntimeError('invalid hash value (expected "397923af", got "00000000")')

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", break_off)
    with pytest.raises(ConnectionError, match=r"invalid hash value.*--pretrained=FILE"):
        load_pretrained(SSD300(3, LITE), "IMAGENET1K_V2")


def test_real_imagenet_weights(real_data):
    path = real_data.parent / "weights" / "vgg16_features_imagenet_fp16.pth"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    ssd = SSD300(3)
    load_pretrained(ssd, str(path))
    weights = torch.load(path, weights_only=True)
    assert torch.equal(ssd.base.conv1_1.weight, weights["features.0.weight"].float())
    assert torch.equal(ssd.base.conv5_3.bias, weights["features.28.bias"].float())
    assert_xavier(ssd.base.conv6)


# ----------------------------------------------------------------------------------------------
# Checkpoints of a model
# ----------------------------------------------------------------------------------------------


def assert_same_model(model, other):
    state = other.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for name in ("mean", "std", "priors_cxcy"):
        assert torch.equal(getattr(model, name), getattr(other, name)), name
    for name in ("network", "input_size", "antialias", "max_size_offset"):
        assert getattr(model, name) == getattr(other, name), name


def test_a_checkpoint_carries_all_that_detection_needs(tiny, tmp_path):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(model_state(tiny), path)
    loaded = load_model(path)
    assert loaded.label_map == LABEL_MAP and list(loaded.label_map) == list(LABEL_MAP)
    assert not loaded.training
    assert_same_model(loaded, tiny)


def test_checkpoints_from_before_the_family_are_ssd300_vgg16():
    torch.manual_seed(0)
    ssd = SSD300(3)
    ssd.label_map = LABEL_MAP
    saved = model_state(ssd)
    del saved["network"], saved["antialias"]
    for name in ("max_size_offset", None):
        loaded = model_from_checkpoint(saved, "old")
        assert_same_model(loaded, ssd)
        assert loaded.antialias is True
        saved.pop(name, None)


def without(saved, name):
    return {**saved, "model": {key: tensor for key, tensor in saved["model"].items() if key != name}}


def replaced(saved, name, tensor):
    return {**saved, "model": {**saved["model"], name: tensor}}


@pytest.mark.parametrize("change, message", [
    (lambda saved: {name: entry for name, entry in saved.items() if name != "mean"}, "mean"),
    (lambda saved: {**saved, "network": "ssd999"}, "'ssd999'.*ssd300_vgg16"),
    (lambda saved: {**saved, "network": "ssd512_vgg16"}, "conv12_2"),
    (lambda saved: {**saved, "label_map": {"background": 0, "cat": 1}}, "label map has 2 classes.*are for 3"),
    (lambda saved: {**saved, "label_map": {str(i): i for i in range(20000)}}, "label map has 20000 classes.*are for 3"),
    (lambda saved: {**saved, "label_map": 3}, ""),
    (lambda saved: without(saved, "base.conv6.bias"), r"base\.conv6\.bias"),
    (lambda saved: replaced(saved, "base.conv6.bias", torch.zeros(3)), r"base\.conv6\.bias"),
    (lambda saved: replaced(saved, "base.conv8.bias", torch.zeros(3)), r"base\.conv8\.bias"),
    # Issue 10.14: these were accepted, and found nothing.
    (lambda saved: replaced(saved, "base.conv6.bias", torch.full((128,), torch.nan)), r"base\.conv6\.bias.*not finite"),
    (lambda saved: replaced(saved, "base.conv1_1.norm.running_var", torch.ones(8) / 0), "running_var.*finite"),
    (lambda saved: {**saved, "priors_cxcy": saved["priors_cxcy"] * torch.nan}, "priors_cxcy.*not finite"),
    (lambda saved: {**saved, "priors_cxcy": saved["priors_cxcy"][:100]}, "100"),
    (lambda saved: {**saved, "std": [0.2, 0.0, 0.2]}, r"std is \[0\.2, 0\.0, 0\.2\].*more than 0"),
    (lambda saved: {**saved, "std": [0.2, -0.1, 0.2]}, "std"),
    (lambda saved: {**saved, "mean": [0.2, float("nan"), 0.2]}, "mean.*not finite"),
])  # fmt: skip
def test_checkpoints_that_do_not_fit_name_file_and_fault(tiny, change, message, tmp_path):
    path = tmp_path / "some_file.pth.tar"
    save_checkpoint(change(model_state(tiny)), path)
    with pytest.raises(ValueError, match=rf"(?s)some_file.*{message}"):
        load_model(path)
    if "label map" not in message and message not in ("", "conv12_2"):  # fine-tuning refuses them, too
        with pytest.raises((LookupError, RuntimeError, ValueError), match=f"(?s){message}"):
            load_other_classes(SSD300(3, "ssd300_tiny"), load_checkpoint(path), LABEL_MAP)


@pytest.mark.parametrize("names", [("a", "b", "c"), ("cat", "dog"), ("dog", "cat")])
def test_fine_tuning_keeps_all_but_the_class_heads_of_other_classes(tiny, names):
    saved, label_map = model_state(tiny), {"background": 0, **{name: i for i, name in enumerate(names, 1)}}
    ssd = SSD300(len(label_map), "ssd300_tiny")
    before = {name: tensor.clone() for name, tensor in ssd.state_dict().items()}
    said = load_other_classes(ssd, saved, label_map)
    is_same = names == ("cat", "dog")
    assert "3 classes" in said and ("start anew" in said) != is_same
    for name, tensor in ssd.state_dict().items():
        expected = before if name.startswith("pred_convs.cl_") and not is_same else saved["model"]
        assert torch.equal(tensor, expected[name]), name
    assert torch.equal(ssd.mean, tiny.mean) and torch.equal(ssd.priors_cxcy, tiny.priors_cxcy)
    assert ssd.antialias is False and ssd.max_size_offset == 1.5
