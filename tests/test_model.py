"""The network: its priors and their order, VGG-16's weights, what a checkpoint carries; torchvision as a witness."""

import math
import urllib.error

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator

import model as module
from model import (
    CAFFE_MEAN,
    CAFFE_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    SOURCE_MAPS,
    SSD300,
    PredictionConvolutions,
    VGGBase,
    l2_normalize,
    load_model,
    model_from_checkpoint,
    model_state,
)
from utils import load_checkpoint, save_checkpoint

PRIORS_OF_A_MAP = (5776, 2166, 600, 150, 36, 4)
LABEL_MAP = {"background": 0, "cat": 1, "dog": 2}


@pytest.fixture(scope="module")
def ssd():
    """A model of 21 classes with random weights; tests that change it make their own."""
    torch.manual_seed(0)
    return SSD300(21)


@pytest.fixture(scope="module")
def vgg16_features():
    """`features.*` of a VGG-16 with random weights, as torchvision names and shapes them."""
    with torch.device("meta"):  # names and shapes, without the 0.5 GB of the whole VGG-16
        entries = torchvision.models.vgg16(weights=None).state_dict()
    torch.manual_seed(1)
    return {name: torch.randn(e.shape) for name, e in entries.items() if name.startswith("features.")}


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Any attempt to download fails, and nothing is cached."""

    def fail(*arguments, **keywords):
        raise urllib.error.URLError("there is no network in this test")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "urlopen", fail)


# ----------------------------------------------------------------------------------------------
# Priors
# ----------------------------------------------------------------------------------------------


def test_number_of_priors():
    counts = tuple(source.grid**2 * source.n_priors for source in SOURCE_MAPS)
    assert counts == PRIORS_OF_A_MAP and sum(counts) == 8732
    priors_cxcy = SSD300.create_prior_boxes()
    assert priors_cxcy.shape == (8732, 4) and priors_cxcy.dtype == torch.float32


def test_priors_by_hand():
    priors_cxcy = SSD300.create_prior_boxes()
    root_2, root_3 = math.sqrt(2), math.sqrt(3)
    expected = {
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
        7942: (0.05, 0.05, 0.375, 0.375),
        8542: (0.1, 0.1, 0.55, 0.55),
        8692: (0.5 / 3, 0.5 / 3, 0.725, 0.725),
        # conv11_2: the last map, whose extra scale ends at 1
        8728: (0.5, 0.5, 0.9, 0.9),
        8729: (0.5, 0.5, math.sqrt(0.9), math.sqrt(0.9)),
        8730: (0.5, 0.5, 0.9 * root_2, 0.9 / root_2),
        8731: (0.5, 0.5, 0.9 / root_2, 0.9 * root_2),
    }
    rows = priors_cxcy[list(expected)]
    torch.testing.assert_close(rows, torch.tensor(list(expected.values())), rtol=1e-6, atol=1e-7)


def test_priors_reach_beyond_the_image():
    centers, sizes = SSD300.create_prior_boxes().split(2, dim=1)
    assert (centers > 0).all() and (centers < 1).all()
    assert (centers - sizes / 2).min() < -0.1 and (centers + sizes / 2).max() > 1.1
    assert sizes.max() == pytest.approx(0.9 * math.sqrt(2))


def torchvision_rows():
    """Our row of each of torchvision's priors: in a cell with six it has ratio 1/2 before ratio 3."""
    order, rows, first = {4: [0, 1, 2, 3], 6: [0, 1, 2, 4, 3, 5]}, [], 0
    for source in SOURCE_MAPS:
        for _ in range(source.grid**2):
            rows += [first + k for k in order[source.n_priors]]
            first += source.n_priors
    return torch.tensor(rows)


def test_priors_are_those_of_torchvision_in_another_order():
    scales = [source.scale for source in SOURCE_MAPS] + [1.0]
    generator = DefaultBoxGenerator([[2], [2, 3], [2, 3], [2, 3], [2], [2]], scales=scales, clip=False)
    images = torchvision.models.detection.image_list.ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)])
    boxes_xy_pixels = generator(images, [torch.zeros(1, 1, source.grid, source.grid) for source in SOURCE_MAPS])[0]
    ours = SSD300.create_prior_boxes()[torchvision_rows()]
    ours_xy = torch.cat([ours[:, :2] - ours[:, 2:] / 2, ours[:, :2] + ours[:, 2:] / 2], dim=1)
    torch.testing.assert_close(ours_xy * 300, boxes_xy_pixels, rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------------
# The network
# ----------------------------------------------------------------------------------------------


def test_state_dict_has_the_keys_and_shapes_of_the_tutorial(ssd):
    shapes = {"rescale_factors": (1, 512, 1, 1)}

    def add(name, out_channels, in_channels, kernel_size):
        shapes[f"{name}.weight"] = (out_channels, in_channels, kernel_size, kernel_size)
        shapes[f"{name}.bias"] = (out_channels,)

    for name, out_channels, in_channels in (
        ("1_1", 64, 3), ("1_2", 64, 64), ("2_1", 128, 64), ("2_2", 128, 128), ("3_1", 256, 128), ("3_2", 256, 256),
        ("3_3", 256, 256), ("4_1", 512, 256), ("4_2", 512, 512), ("4_3", 512, 512), ("5_1", 512, 512),
        ("5_2", 512, 512), ("5_3", 512, 512), ("6", 1024, 512),
    ):  # fmt: skip
        add(f"base.conv{name}", out_channels, in_channels, 3)
    add("base.conv7", 1024, 1024, 1)
    for number, in_channels, middle, out_channels in (
        (8, 1024, 256, 512), (9, 512, 128, 256), (10, 256, 128, 256), (11, 256, 128, 256)
    ):  # fmt: skip
        add(f"aux_convs.conv{number}_1", middle, in_channels, 1)
        add(f"aux_convs.conv{number}_2", out_channels, middle, 3)
    for name, channels, n_priors in (
        ("conv4_3", 512, 4), ("conv7", 1024, 6), ("conv8_2", 512, 6), ("conv9_2", 256, 6), ("conv10_2", 256, 4),
        ("conv11_2", 256, 4),
    ):  # fmt: skip
        add(f"pred_convs.loc_{name}", n_priors * 4, channels, 3)
        add(f"pred_convs.cl_{name}", n_priors * 21, channels, 3)
    assert {name: tuple(tensor.shape) for name, tensor in ssd.state_dict().items()} == shapes
    assert (ssd.rescale_factors == 20).all()


@pytest.mark.parametrize("i_map, row, column, prior", [
    (0, 0, 0, 0), (0, 37, 5, 3), (1, 2, 11, 4), (2, 9, 9, 5), (3, 1, 4, 2), (4, 2, 0, 1), (5, 0, 0, 3),
])  # fmt: skip
def test_head_order_is_prior_order(i_map, row, column, prior):
    """Each head fires for one cell, one prior and one number of it: it must come out at that prior's row."""
    n_classes, coordinate, label = 5, 2, 3
    heads, source = PredictionConvolutions(n_classes), SOURCE_MAPS[i_map]
    source_maps = [torch.zeros(2, s.channels, s.grid, s.grid) for s in SOURCE_MAPS]
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
    next_scale = (*(s.scale for s in SOURCE_MAPS), 1.0)[i_map + 1]
    scale, ratio = (math.sqrt(source.scale * next_scale), 1) if prior == 1 else (source.scale, ratios[prior])
    wanted = torch.tensor(
        [(column + 0.5) / source.grid, (row + 0.5) / source.grid, scale * ratio**0.5, scale / ratio**0.5]
    )
    distances = (SSD300.create_prior_boxes() - wanted).abs().amax(dim=1)
    assert distances.min() < 1e-6 and (distances < 1e-3).sum() == 1
    expected = distances.argmin().item()
    assert locs.nonzero().tolist() == [[1, expected, coordinate]] and locs.max() == 10
    assert scores.nonzero().tolist() == [[1, expected, label]] and scores.max() == 20


def test_raw_outputs_equal_torchvisions(ssd):
    """The same weights in torchvision's SSD300 give the same offsets and scores."""
    torch.manual_seed(2)
    with torch.device("meta"):  # the classifier of its VGG-16, 0.5 GB, is never needed
        other = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=21)
    other = other.to_empty(device="cpu").eval()
    ours = [*ssd.base.convolutions(), *ssd.aux_convs.children()]
    theirs = [m for m in other.backbone.modules() if isinstance(m, torch.nn.Conv2d)]
    rescale_factors = 5 + 30 * torch.rand(512)
    with torch.no_grad():
        for our, their in zip(ours, theirs, strict=True):
            our.bias.normal_(std=0.1)
            their.load_state_dict(our.state_dict())
        ssd.rescale_factors.copy_(rescale_factors.view(1, 512, 1, 1))
        other.backbone.scale_weight.copy_(rescale_factors)
        for kind, size, their_heads in (
            ("loc", 4, other.head.regression_head.module_list),
            ("cl", 21, other.head.classification_head.module_list),
        ):
            for source, their in zip(SOURCE_MAPS, their_heads, strict=True):
                our = ssd.pred_convs.get_submodule(f"{kind}_{source.name}")
                our.bias.normal_(std=0.1)
                order = [0, 1, 2, 3] if source.n_priors == 4 else [0, 1, 2, 4, 3, 5]
                their.weight.copy_(our.weight.unflatten(0, (-1, size))[order].flatten(0, 1))
                their.bias.copy_(our.bias.unflatten(0, (-1, size))[order].flatten())
        image = torch.randn(1, 3, 300, 300)
        locs, scores = ssd.eval()(image)
        outputs = other.head(list(other.backbone(image).values()))
        ssd.rescale_factors.fill_(20.0)
    assert locs.shape == (1, 8732, 4) and scores.shape == (1, 8732, 21)
    for our, their in ((locs, outputs["bbox_regression"]), (scores, outputs["cls_logits"])):
        scale = their.std().item()
        assert scale > 0.1  # numbers to compare, and not only biases
        torch.testing.assert_close(our[:, torchvision_rows()], their, rtol=0, atol=1e-4 * scale)


def test_arguments_out_of_range(ssd):
    with pytest.raises(ValueError, match="n_classes is 1"):
        SSD300(1)
    with pytest.raises(ValueError, match=r"\(2, 3, 300, 299\)"):
        ssd(torch.zeros(2, 3, 300, 299))


def test_normalize(ssd):
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, -1, 300, 300)
    normalized = ssd.normalize(images)
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
    lengths[0, 1, 1] = 1
    torch.testing.assert_close(lengths, torch.ones(2, 3, 3))
    torch.testing.assert_close(normalized[1], F.normalize(features, dim=1)[1])
    normalized.square().sum().backward()
    assert features.grad.isfinite().all()


def test_l2_normalize_is_float32_under_autocast():
    features = torch.full((1, 512, 2, 2), 300.0)  # its squares are beyond float16
    expected = torch.full((1, 512, 2, 2), 512**-0.5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            normalized = l2_normalize(features.to(dtype))
        assert normalized.dtype == torch.float32
        torch.testing.assert_close(normalized, expected, rtol=1e-5, atol=0)


# ----------------------------------------------------------------------------------------------
# VGG-16's weights
# ----------------------------------------------------------------------------------------------


def nan_fc_layers():
    """fc6 and fc7 as in torchvision's IMAGENET1K_FEATURES; expanded, so that they take no memory."""
    nan = torch.tensor(torch.nan)
    return {
        "classifier.0.weight": nan.expand(4096, 25088),
        "classifier.0.bias": nan.expand(4096),
        "classifier.3.weight": nan.expand(4096, 4096),
        "classifier.3.bias": nan.expand(4096),
    }


def assert_xavier(conv):
    bound = math.sqrt(6 / (conv.weight[0].numel() + conv.weight[:, 0].numel()))
    assert (conv.bias == 0).all()
    assert 0.999 * bound < conv.weight.abs().max() <= bound
    assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)  # of a uniform distribution


def test_features_are_taken_over_and_conv6_and_conv7_start_from_xavier(vgg16_features):
    base = VGGBase()
    base.load_vgg16(vgg16_features)
    entries = iter(vgg16_features.values())
    for conv in base.convolutions()[:-2]:
        assert torch.equal(conv.weight, next(entries)) and torch.equal(conv.bias, next(entries))
    assert next(entries, None) is None
    assert_xavier(base.conv6)
    assert_xavier(base.conv7)


def test_fc_layers_that_are_not_finite_count_as_absent(vgg16_features):
    base = VGGBase()
    base.load_vgg16({**vgg16_features, **nan_fc_layers()})
    assert_xavier(base.conv6)
    assert_xavier(base.conv7)
    zeros = {name: torch.zeros(()).expand(entry.shape) for name, entry in nan_fc_layers().items()}
    base.load_vgg16({**vgg16_features, **zeros, "classifier.3.bias": nan_fc_layers()["classifier.3.bias"]})
    assert_xavier(base.conv6)


def test_fc6_and_fc7_are_decimated(vgg16_features):
    """On input at the places that decimation keeps, conv6 and conv7 compute what fc6 and fc7 compute."""
    torch.manual_seed(3)
    fc6 = (torch.randn(4096, 1).half() + torch.randn(1, 25088).half()) * 0.01  # random enough, and quickly made
    fc7 = torch.randn(4096, 4096) * 0.01
    fc6_bias, fc7_bias = torch.randn(4096), torch.randn(4096)
    fc_layers = {
        "classifier.0.weight": fc6,
        "classifier.0.bias": fc6_bias.half(),
        "classifier.3.weight": fc7.half(),
        "classifier.3.bias": fc7_bias.half(),
    }
    base = VGGBase()
    base.load_vgg16({**vgg16_features, **fc_layers})
    kept_outputs = torch.tensor([0, 4, 2048, 4092])  # numbers 0, 1, 512 and 1023 of conv6 and conv7

    # fc6 sees a 7 x 7 field, of which conv6 keeps rows and columns 0, 3 and 6, now 6 cells apart.
    values = torch.randn(512, 3, 3)
    field, field_map = torch.zeros(1, 512, 7, 7), torch.zeros(1, 512, 19, 19)
    field[0, :, ::3, ::3] = values
    field_map[0, :, 2:15:6, 4:17:6] = values  # around row 8, column 10
    full = F.conv2d(field, fc6[kept_outputs].view(-1, 512, 7, 7).float()).flatten()
    full += fc6_bias[kept_outputs].half().float()
    ours = base.conv6(field_map)[0, kept_outputs // 4, 8, 10]
    torch.testing.assert_close(ours, full, rtol=1e-4, atol=1e-4)

    # fc7 takes fc6's 4096 outputs, of which every fourth is left.
    values = torch.randn(1024)
    inputs = torch.zeros(4096)
    inputs[::4] = values
    full = fc7[kept_outputs].half().float() @ inputs + fc7_bias[kept_outputs].half().float()
    ours = base.conv7(values.view(1, 1024, 1, 1))[0, kept_outputs // 4, 0, 0]
    torch.testing.assert_close(ours, full, rtol=1e-4, atol=1e-4)


def test_wrong_vgg16_weights_name_the_entry(vgg16_features):
    incomplete = {name: e for name, e in vgg16_features.items() if name != "features.28.bias"}
    with pytest.raises(ValueError, match=r"features\.28\.bias"):
        VGGBase().load_vgg16(incomplete)
    with pytest.raises(ValueError, match=r"features\.5\.weight.*\(128, 64, 1, 1\).*\(128, 64, 3, 3\)"):
        VGGBase().load_vgg16({**vgg16_features, "features.5.weight": torch.zeros(128, 64, 1, 1)})


def test_pretrained_from_a_local_file(vgg16_features, tmp_path):
    path = tmp_path / "vgg16.pth"
    torch.save({name: e.half() for name, e in vgg16_features.items()}, path)
    ssd = SSD300(3)
    ssd.load_pretrained(str(path))
    assert torch.equal(ssd.base.conv3_2.weight, vgg16_features["features.12.weight"].half().float())
    torch.testing.assert_close(ssd.mean.flatten(), torch.tensor(IMAGENET_MEAN))


def test_pretrained_files_that_are_none(tmp_path):
    ssd = SSD300(3)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth.*IMAGENET1K_V1"):
        ssd.load_pretrained(str(tmp_path / "nothing.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth"):
        ssd.load_pretrained(str(tmp_path / "text.pth"))
    for content in ([1, 2], torch.zeros(3), {"model": {"conv1_1.weight": torch.zeros(3)}}):
        torch.save(content, tmp_path / "foreign.pth")
        with pytest.raises(ValueError, match=r"foreign\.pth: no state dict"):
            ssd.load_pretrained(str(tmp_path / "foreign.pth"))
    torch.save({"conv1_1.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match=r"foreign\.pth.*features\.0\.weight"):
        ssd.load_pretrained(str(tmp_path / "foreign.pth"))


def test_mean_and_std_follow_the_weights(vgg16_features, monkeypatch):
    asked = []

    def read(weights):
        asked.append(weights)
        return vgg16_features if weights == "IMAGENET1K_V1" else {**vgg16_features, **nan_fc_layers()}

    monkeypatch.setattr(module, "read_vgg16_weights", read)
    ssd = SSD300(3)
    ssd.load_pretrained("IMAGENET1K_FEATURES")
    torch.testing.assert_close(ssd.mean.flatten(), torch.tensor(CAFFE_MEAN))
    torch.testing.assert_close(ssd.std.flatten(), torch.tensor(CAFFE_STD))
    ssd.load_pretrained("IMAGENET1K_V1")
    torch.testing.assert_close(ssd.mean.flatten(), torch.tensor(IMAGENET_MEAN))
    torch.testing.assert_close(ssd.std.flatten(), torch.tensor(IMAGENET_STD))
    ssd.load_pretrained("a copy of it.pth")  # Caffe's weights are known by their fc layers
    torch.testing.assert_close(ssd.std.flatten(), torch.tensor(CAFFE_STD))
    assert asked == ["IMAGENET1K_FEATURES", "IMAGENET1K_V1", "a copy of it.pth"]


def test_building_a_model_never_downloads(no_network):
    SSD300(3)


def test_failed_download_says_the_way_out(no_network):
    with pytest.raises(ConnectionError, match=r"https://.*there is no network.*--pretrained=FILE.*--pretrained="):
        SSD300(3).load_pretrained("IMAGENET1K_V1")


def test_download_that_breaks_off_says_the_way_out(monkeypatch, tmp_path):
    def break_off(*arguments, **keywords):  # what torch.hub raises when the file's hash is not that in its name
        raise RuntimeError('invalid hash value (expected "397923af", got "00000000")')

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", break_off)
    with pytest.raises(ConnectionError, match=r"invalid hash value.*--pretrained=FILE"):
        SSD300(3).load_pretrained("IMAGENET1K_FEATURES")


def test_real_imagenet_weights(real_data):
    path = real_data.parent / "weights" / "vgg16_features_imagenet_fp16.pth"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    ssd = SSD300(3)
    ssd.load_pretrained(str(path))
    weights = torch.load(path, weights_only=True)
    assert torch.equal(ssd.base.conv1_1.weight, weights["features.0.weight"].float())
    assert torch.equal(ssd.base.conv5_3.bias, weights["features.28.bias"].float())
    assert_xavier(ssd.base.conv6)


# ----------------------------------------------------------------------------------------------
# Checkpoints of a model
# ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_ssd():
    """A model with classes, input and priors of its own."""
    torch.manual_seed(4)
    ssd = SSD300(3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), SSD300.create_prior_boxes() * 0.9)
    ssd.label_map = LABEL_MAP
    return ssd


def assert_same_buffers(model, other):
    for name in ("mean", "std", "priors_cxcy"):
        assert torch.equal(getattr(model, name), getattr(other, name)), name


def test_a_checkpoint_carries_all_that_detection_needs(other_ssd, tmp_path):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(model_state(other_ssd), path)
    loaded = load_model(path)
    assert loaded.label_map == LABEL_MAP and list(loaded.label_map) == list(LABEL_MAP)
    assert not loaded.training
    assert_same_buffers(loaded, other_ssd)
    state = other_ssd.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_checkpoints_that_do_not_fit_name_the_file(other_ssd):
    saved = model_state(other_ssd)
    state = saved["model"]
    foreign = [
        {name: entry for name, entry in saved.items() if name != "mean"},
        {**saved, "label_map": {"background": 0, "cat": 1}},
        {**saved, "label_map": 3},
        {**saved, "model": {name: tensor for name, tensor in state.items() if name != "base.conv6.bias"}},
        {**saved, "model": {**state, "base.conv6.bias": torch.zeros(3)}},
    ]
    for checkpoint in foreign:
        with pytest.raises(ValueError, match="some_file"):
            model_from_checkpoint(checkpoint, "some_file")


def test_fine_tuning_for_other_classes_keeps_all_but_the_class_heads(other_ssd, tmp_path):
    save_checkpoint(model_state(other_ssd), tmp_path / "c.pth.tar")
    saved = load_checkpoint(tmp_path / "c.pth.tar")
    ssd = SSD300(5)
    before = {name: tensor.clone() for name, tensor in ssd.state_dict().items()}
    said = ssd.load_other_classes(saved, {"background": 0, "a": 1, "b": 2, "c": 3, "d": 4})
    assert "3 classes" in said and "start anew" in said
    for name, tensor in ssd.state_dict().items():
        expected = before if name.startswith("pred_convs.cl_") else saved["model"]
        assert torch.equal(tensor, expected[name]), name
    assert_same_buffers(ssd, other_ssd)


@pytest.mark.parametrize("names", [("cat", "dog"), ("dog", "cat")])
def test_fine_tuning_takes_the_class_heads_where_classes_are_the_same(other_ssd, names):
    ssd = SSD300(3)
    ssd.load_other_classes(model_state(other_ssd), {"background": 0, names[0]: 1, names[1]: 2})
    is_same = torch.equal(ssd.pred_convs.cl_conv7.weight, other_ssd.pred_convs.cl_conv7.weight)
    assert is_same == (names == ("cat", "dog"))
    assert torch.equal(ssd.pred_convs.loc_conv7.weight, other_ssd.pred_convs.loc_conv7.weight)


def test_fine_tuning_refuses_what_does_not_fit(other_ssd):
    saved = model_state(other_ssd)
    state = saved["model"]
    for misfit in (
        {name: tensor for name, tensor in state.items() if name != "base.conv6.bias"},
        {**state, "base.conv8.bias": torch.zeros(3)},
        {**state, "base.conv6.bias": torch.zeros(3)},
    ):
        with pytest.raises(ValueError, match=r"base\.conv[68]\.bias"):
            SSD300(3).load_other_classes({**saved, "model": misfit}, LABEL_MAP)
