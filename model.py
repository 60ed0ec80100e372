"""The networks (SSD300 and its family), their priors, detection, and the loss that they learn by.

Shapes in comments: N images, S the side of the input (300 for SSD300), G the side of a source map's grid, P priors
(8732 for SSD300), C classes (background = 0 included), M objects in the image of the batch that has most, T in all.
Source: Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016 ("the paper"), and the authors' Caffe code.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation

import utils
from utils import cxcy_to_gcxgcy, cxcy_to_xy, find_jaccard_overlap, gcxgcy_to_cxcy, printable, xy_to_cxcy

# Mean and deviation of the input, RGB in [0, 1]: ImageNet's, those of weights that were trained with Caffe, SSDLite's.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAFFE_MEAN, CAFFE_STD = (0.48235, 0.45882, 0.40784), (1 / 255, 1 / 255, 1 / 255)
LITE_MEAN = LITE_STD = (0.5, 0.5, 0.5)

# --- The table of networks: layers and priors are made from it ------------------------------------


class SourceMap(NamedTuple):
    """A feature map from which objects are predicted: its priors and, behind the base, the layers that make it."""

    name: str
    channels: int
    grid: int  # G: cells in a row, and rows
    aspect_ratios: tuple  # width : height
    middle: int = 0  # behind the base two convolutions make it: 1 x 1 to so many channels, then the following one
    kernel: int = 3
    stride: int = 2
    padding: int = 1

    @property
    def n_priors(self):
        return len(self.aspect_ratios) + 1  # at each cell: one an aspect ratio, and the extra square one


class Network(NamedTuple):
    """A row of the table: all that tells one network of the family from the others."""

    input_size: int  # S, in pixels
    base: str  # a key of BASES
    sources: tuple  # of SourceMap; the first two are maps of the base
    scales: tuple  # of the maps: sides of their square priors, as fractions of the image's; and one that follows them
    divisor: int = 1  # the layers have so many times fewer channels than the paper's
    is_lite: bool = False  # SSDLite: separable convolutions, priors no larger than the image, no L2 norm


# Aspect ratios of four and of six priors a cell: one of each ratio, and the extra square one.
FOUR, SIX = (1, 2, 1 / 2), (1, 2, 3, 1 / 2, 1 / 3)
SSD300_SOURCES = (
    SourceMap("conv4_3", 512, 38, FOUR),
    SourceMap("conv7", 1024, 19, SIX),
    SourceMap("conv8_2", 512, 10, SIX, middle=256),
    SourceMap("conv9_2", 256, 5, SIX, middle=128),
    SourceMap("conv10_2", 256, 3, FOUR, middle=128, stride=1, padding=0),
    SourceMap("conv11_2", 256, 1, FOUR, middle=128, stride=1, padding=0),
)
SSD512_SOURCES = (  # the Caffe code's ssd_pascal_512.py
    SourceMap("conv4_3", 512, 64, FOUR),
    SourceMap("conv7", 1024, 32, SIX),
    SourceMap("conv8_2", 512, 16, SIX, middle=256),
    SourceMap("conv9_2", 256, 8, SIX, middle=128),
    SourceMap("conv10_2", 256, 4, SIX, middle=128),
    SourceMap("conv11_2", 256, 2, FOUR, middle=128),
    SourceMap("conv12_2", 256, 1, FOUR, middle=128, kernel=4, stride=1),
)
SSDLITE_SOURCES = (  # torchvision's ssdlite320_mobilenet_v3_large
    SourceMap("c4", 672, 20, SIX),
    SourceMap("c5", 480, 10, SIX),  # 960 channels with ImageNet's weights: see fit_to()
    SourceMap("extra1_2", 512, 5, SIX, middle=256),
    SourceMap("extra2_2", 256, 3, SIX, middle=128),
    SourceMap("extra3_2", 256, 2, SIX, middle=128),
    SourceMap("extra4_2", 128, 1, SIX, middle=64),
)
EIGHTH = tuple(s._replace(channels=s.channels // 8, middle=s.middle // 8) for s in SSD300_SOURCES)
SCALES_300 = (0.1, 0.2, 0.375, 0.55, 0.725, 0.9, 1.0)
LITE_SCALES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0)
NETWORKS = {
    "ssd300_vgg16": Network(300, "vgg16", SSD300_SOURCES, SCALES_300),
    "ssd512_vgg16": Network(512, "vgg16", SSD512_SOURCES, (0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05)),
    "ssd300_vgg16_bn": Network(300, "vgg16_bn", SSD300_SOURCES, SCALES_300),
    "ssd300_tiny": Network(300, "vgg16_bn", EIGHTH, SCALES_300, divisor=8),
    "ssdlite320_mobilenet_v3_large": Network(320, "mobilenet_v3_large", SSDLITE_SOURCES, LITE_SCALES, is_lite=True),
    # The Caffe code's ssd_coco.py: smaller priors
    "ssd300_vgg16_coco": Network(300, "vgg16", SSD300_SOURCES, (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)),
    "ssd512_vgg16_coco": Network(512, "vgg16", SSD512_SOURCES, (0.04, 0.1, 0.26, 0.42, 0.58, 0.74, 0.9, 1.06)),
}

# --- The bases ------------------------------------------------------------------------------------


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation; one value a channel (one image, a 1 x 1 map) is normalised by the running statistics."""

    def forward(self, x):
        if self.training and x.numel() == x.shape[1]:  # which has no deviation
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class Convolution(nn.Conv2d):
    """A convolution, batch normalisation if asked for (in the state dict `norm.*`), and ReLU."""

    def __init__(self, *sizes, batch_norm=False, **options):
        super().__init__(*sizes, **options)
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        nn.init.zeros_(self.bias)
        self.norm = BatchNorm(self.out_channels) if batch_norm else None

    def forward(self, x):
        weight, bias, norm = self.weight, self.bias, self.norm
        if norm and not self.training:  # fixed statistics go into the weights, which saves a pass through the map
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)  # (out_channels,)
            weight, bias = weight * scale.view(-1, 1, 1, 1), (bias - norm.running_mean) * scale + norm.bias
        x = self._conv_forward(x, weight, bias)
        return F.relu(norm(x) if norm and self.training else x, inplace=True)


LiteNorm = partial(BatchNorm, eps=0.001, momentum=0.03)
LITE_INIT_STD = 0.03
LiteConvolution = partial(Conv2dNormActivation, norm_layer=LiteNorm, activation_layer=nn.ReLU6)  # without bias


def init_convolutions(module, std=None):
    """Normal weights of a deviation, or Xavier's, as the Caffe code starts all that it adds to VGG; biases 0."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=std) if std else nn.init.xavier_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


# Output channels of VGG-16's convolutions, block by block; a pooling layer follows each block.
VGG_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGGBase(nn.Module):
    """VGG-16, its two large fully connected layers turned into the convolutions conv6 and conv7.

    Takes images, (N, 3, 300, 300) float, normalised. Returns conv4_3 (N, 512, 38, 38) and conv7 (N, 1024, 19, 19).
    Source: Simonyan and Zisserman 2015; the changes: the paper, section 2.2, and the Caffe code.
    """

    def __init__(self, network=NETWORKS["ssd300_vgg16"]):
        super().__init__()
        batch_norm, channels, fc_channels = network.base == "vgg16_bn", 3, 1024 // network.divisor
        for block, widths in enumerate(VGG_BLOCKS, start=1):
            for i, width in enumerate(widths, start=1):
                width //= network.divisor
                self.add_module(f"conv{block}_{i}", Convolution(channels, width, 3, padding=1, batch_norm=batch_norm))
                channels = width
            # 300 -> 150 -> 75 -> 38 (not 37: rounded up, as Caffe does) -> 19; the fifth keeps the resolution.
            pool = nn.MaxPool2d(2, ceil_mode=True) if block < 5 else nn.MaxPool2d(3, stride=1, padding=1)
            self.add_module(f"pool{block}", pool)
        self.conv6 = Convolution(channels, fc_channels, 3, padding=6, dilation=6, batch_norm=batch_norm)
        self.conv7 = Convolution(fc_channels, fc_channels, 1, batch_norm=batch_norm)

    def forward(self, x):  # images, (N, 3, 300, 300)
        for name, layer in self.named_children():  # one after the other, as they were added
            x = layer(x)
            if name == "conv4_3":
                conv4_3 = x  # (N, 512, 38, 38), before its pooling
        return conv4_3, x  # conv7: (N, 1024, 19, 19)


class MobileNetBase(nn.Module):
    """MobileNetV3-Large without its classifier, as torchvision builds it and names its layers.

    Takes images, (N, 3, 320, 320) float, normalised. Returns c4 (N, 672, 20, 20), inside the block that goes to stride
    32, and c5 (N, 480, 10, 10). Source: Howard et al., "Searching for MobileNetV3", 2019, section 6.3.
    """

    def __init__(self, network):
        super().__init__()
        has_half_tail = network.sources[1].channels == 480
        self.features = torchvision.models.mobilenet_v3_large(norm_layer=LiteNorm, reduced_tail=has_half_tail).features
        init_convolutions(self, LITE_INIT_STD)

    def forward(self, x):  # images, (N, 3, 320, 320)
        blocks = list(self.features)
        expand, *others = blocks[13].block  # from stride 16 to 32
        for layer in (*blocks[:13], expand, *others, *blocks[14:]):
            x = layer(x)
            if layer is expand:
                c4 = x  # (N, 672, 20, 20)
        return c4, x  # c5: (N, 480, 10, 10)


BASES = {  # the class, and torchvision's ImageNet weights for it
    "vgg16": (VGGBase, torchvision.models.VGG16_Weights),
    "vgg16_bn": (VGGBase, torchvision.models.VGG16_BN_Weights),
    "mobilenet_v3_large": (MobileNetBase, torchvision.models.MobileNet_V3_Large_Weights),
}

# --- Auxiliary and prediction convolutions --------------------------------------------------------


class AuxiliaryConvolutions(nn.Module):
    """Pairs of convolutions behind the base, each with a smaller grid than the one before.

    Takes the base's second map, (N, 1024, 19, 19) for SSD300. Returns a tuple of those that follow it in the table:
    (N, 512, 10, 10), (N, 256, 5, 5), (N, 256, 3, 3), (N, 256, 1, 1).
    """

    def __init__(self, network=NETWORKS["ssd300_vgg16"]):
        super().__init__()
        channels = network.sources[1].channels
        for source in network.sources[2:]:
            middle, size = source.middle, (source.kernel, source.stride, source.padding)
            if network.is_lite:
                first = LiteConvolution(channels, middle, 1)
                depthwise = LiteConvolution(middle, middle, *size, groups=middle)
                second = nn.Sequential(depthwise, LiteConvolution(middle, source.channels, 1))
            else:  # without batch normalisation: a small batch has too few values in maps of 3 x 3 and 1 x 1
                first, second = Convolution(channels, middle, 1), Convolution(middle, source.channels, *size)
            self.add_module(source.name[:-1] + "1", first)  # conv8_1
            self.add_module(source.name, second)  # conv8_2
            channels = source.channels
        init_convolutions(self, LITE_INIT_STD if network.is_lite else None)

    def forward(self, x):
        maps = [x := layer(x) for layer in self.children()]
        return tuple(maps[1::2])  # of every second convolution, (N, channels, G, G)


class PredictionConvolutions(nn.Module):
    """Two 3 x 3 convolutions on each source map: one for offsets (`loc_*`), one for class scores (`cl_*`).

    Takes the source maps in the order of the table. Returns offsets (N, P, 4) and scores (N, P, C), in the order of the
    priors: map by map, cell by cell along the rows, prior by prior.
    """

    def __init__(self, n_classes, network=NETWORKS["ssd300_vgg16"]):
        super().__init__()
        self.n_classes = n_classes
        for source in network.sources:
            for kind, size in (("loc", 4), ("cl", n_classes)):
                if network.is_lite:
                    depthwise = LiteConvolution(source.channels, source.channels, 3, groups=source.channels)
                    head = nn.Sequential(depthwise, nn.Conv2d(source.channels, source.n_priors * size, 1))
                else:
                    head = nn.Conv2d(source.channels, source.n_priors * size, 3, padding=1)
                self.add_module(f"{kind}_{source.name}", head)
        # Behind batch normalisation weights of 0.01 learn faster than Xavier's.
        init_convolutions(self, LITE_INIT_STD if network.is_lite else 0.01 if network.base == "vgg16_bn" else None)

    def forward(self, source_maps):
        locs, scores, heads = [], [], list(self.children())  # loc, cl, loc, cl, ...
        for x, loc, cl in zip(source_maps, heads[::2], heads[1::2], strict=True):
            # From (N, n_priors * 4, G, G) to (N, G, G, n_priors * 4): flat, it runs through rows, cells and priors.
            locs.append(loc(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4))
            scores.append(cl(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.n_classes))
        return torch.cat(locs, dim=1), torch.cat(scores, dim=1)


# --- SSD300 and its family ------------------------------------------------------------------------


class SSD300(nn.Module):
    """The detector: from normalised images to boxes, one a prior, each with a score for every class.

    n_classes: C, background included. network: a key of NETWORKS; the class has the name of the first.
    mean, std: of the input's three channels, in [0, 1]; they belong to the weights. None: the network's own.
    max_size_offset: for weights whose boxes were decoded with a limit on the offsets of sizes; None: no limit.
    antialias: whether images are resized with antialiasing, as the weights want it. All weights start at random.
    """

    def __init__(self, n_classes, network="ssd300_vgg16", mean=None, std=None, max_size_offset=None, antialias=True):
        super().__init__()
        if n_classes < 2:
            raise ValueError(f"n_classes is {n_classes}: it counts the background, so it must be 2 or more")
        if network not in NETWORKS:
            raise ValueError(f"network is {network!r}; it must be one of {', '.join(NETWORKS)}")
        row = NETWORKS[network]
        self.network, self.input_size, self.n_classes = network, row.input_size, n_classes
        self.max_size_offset, self.antialias = max_size_offset, antialias
        self.label_map = None  # name -> label, from a training run or a checkpoint
        self.build(row)
        own_mean, own_std = (LITE_MEAN, LITE_STD) if row.is_lite else (IMAGENET_MEAN, IMAGENET_STD)
        # Not in the state dict: its keys are those of the layers alone. (Checkpoints bring priors of their own.)
        self.register_buffer("priors_cxcy", self.create_prior_boxes(network), persistent=False)
        self.register_buffer("mean", torch.tensor(mean or own_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or own_std).view(1, 3, 1, 1), persistent=False)

    def build(self, row):
        """Make the layers of a row of the table, with random weights."""
        self.base = BASES[row.base][0](row)
        self.aux_convs = AuxiliaryConvolutions(row)
        self.pred_convs = PredictionConvolutions(self.n_classes, row)
        # conv4_3's values are much larger than those of the deeper maps. They are normalised, then scaled by a factor
        # for each channel, learned from a start at 20 (the paper, section 3.1; ParseNet), less for fewer channels.
        start = torch.full((1, row.sources[0].channels, 1, 1), 20 / row.divisor**0.5)
        self.rescale_factors = None if row.is_lite else nn.Parameter(start)

    def forward(self, images):
        """From images (N, 3, S, S), normalised, to offsets (N, P, 4), gcxgcy form, and scores (N, P, C), before the
        softmax, at every prior."""
        if images.shape[1:] != (3, self.input_size, self.input_size):
            shape = f"(N, 3, {self.input_size}, {self.input_size})"
            raise ValueError(f"images are {shape} for {self.network}, not {tuple(images.shape)}")
        first, second = self.base(images)  # conv4_3, conv7
        if self.rescale_factors is not None:
            first = l2_normalize(first) * self.rescale_factors
        return self.pred_convs((first, second, *self.aux_convs(second)))

    @staticmethod
    def create_prior_boxes(network="ssd300_vgg16"):
        """A network's priors, in the order in which the prediction convolutions' outputs are stacked.

        Returns (P, 4) float32, center-size form, fractional. None is clipped at the edges (SSDLite: only the sizes).
        Source: the paper, section 2.2, equation 4 from conv7 on (0.2 to 0.9), and 0.1 for conv4_3.
        """
        row = NETWORKS[network]
        priors = []
        for source, scale, next_scale in zip(row.sources, row.scales[:-1], row.scales[1:], strict=True):
            sizes = [(scale * ratio**0.5, scale / ratio**0.5) for ratio in source.aspect_ratios]
            sizes.insert(1, ((scale * next_scale) ** 0.5,) * 2)  # after ratio 1: a square between two scales
            if row.is_lite:
                sizes = [(min(w, 1), min(h, 1)) for w, h in sizes]
            centers = [(i + 0.5) / source.grid for i in range(source.grid)]
            priors += [(c_x, c_y, w, h) for c_y in centers for c_x in centers for w, h in sizes]
        return torch.tensor(priors)  # (P, 4)

    def normalize(self, images):
        """Turn bytes, (N, 3, S, S) uint8, RGB, on any device, into the network's input: float32, on the model's."""
        images = images.to(self.mean.device, non_blocking=True).to(torch.float32)  # copied as bytes
        return images.sub_(255 * self.mean).div_(255 * self.std)  # (images / 255 - mean) / std

    def detect_objects(self, predicted_locs, predicted_scores, min_score, max_overlap, top_k, max_candidates=None):
        """Turn this model's predictions for a batch into objects: see the function `detect_objects()`."""
        locs = self.limit_sizes(predicted_locs)
        return detect_objects(locs, predicted_scores, self.priors_cxcy, min_score, max_overlap, top_k, max_candidates)

    def limit_sizes(self, predicted_locs):
        """Predicted offsets (N, P, 4), those of the sizes not above this model's limit, if it has one."""
        if self.max_size_offset is None:
            return predicted_locs
        centers, sizes = predicted_locs[..., :2], predicted_locs[..., 2:]
        return torch.cat([centers, sizes.clamp(max=self.max_size_offset)], dim=-1)

    def freeze_base(self):
        """Keep the base but conv6 and conv7 as it is: weights, and the statistics of batch normalisation."""
        for name, layer in self.base.named_children():
            layer.requires_grad_(name in ("conv6", "conv7"))
        self.train(self.training)

    def train(self, mode=True):
        """As `nn.Module.train()`, but frozen layers of the base stay in evaluation mode, so that statistics stay."""
        super().train(mode)
        for layer in self.base.children():
            layer.train(mode and any(parameter.requires_grad for parameter in layer.parameters()))
        return self


def l2_normalize(features, eps=1e-10):
    """Scale the channels of every cell of features, (N, channels, G, G), to a Euclidean length of 1, as float32."""
    features = features.float()  # half precision's squares may overflow; eps, inside the root as in Caffe, is for zeros
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + eps)


# --- Detection ------------------------------------------------------------------------------------

MAX_COORDINATE = 1e18  # where boxes of absurd offsets end, so that their areas do not overflow float32
PRIORS_FOR_EACH_OBJECT = 8  # so many of the best priors, times top_k, nearly always hold the best top_k objects
NEW_IN_FIRST_POOL, NEW_IN_POOL = 24, 96  # candidates of a class that enter its pool in a round: twice as many each time
PAIRS_AT_ONCE, STEPS_A_ROUND = 2**18, 2  # so many pairs stay in a processor's cache; more steps seldom decide more


@torch.no_grad()
def detect_objects(predicted_locs, predicted_scores, priors_cxcy, min_score, max_overlap, top_k, max_candidates=None):
    """Turn raw predictions into the objects that they show: threshold, non-maximum suppression, top k.

    A pair of a prior and a class (not background) whose softmax score is > min_score is a candidate; it is suppressed
    when its overlap with a better one of its class that survives is > max_overlap. Equal scores rank by prior, then by
    class. Exact, to the last bit, in float32.

    predicted_locs: (N, P, 4) float tensor, offsets_gcxgcy. predicted_scores: (N, P, C), before the softmax.
    priors_cxcy: (P, 4) float32 tensor, center-size form, fractional.
    min_score, max_overlap: floats in [0, 1]. top_k: most objects returned for an image, of all its classes.
    max_candidates: this many best ones of each class of an image enter suppression (Caffe: 400); None: all do.
    Returns three lists of N tensors, each by falling score: boxes (n, 4) float32, fractional boundary form, finite,
    not clipped to the image (as in Caffe's code); labels (n,) int64, 1 to C - 1; scores (n,) float32; n <= top_k.
    Raises ValueError for shapes and limits that make no sense.
    """
    shapes = tuple(predicted_locs.shape), tuple(predicted_scores.shape)
    n_images, n_priors, n_classes = len(predicted_locs), len(priors_cxcy), predicted_scores.shape[-1]
    if shapes != ((n_images, n_priors, 4), (n_images, n_priors, n_classes)) or n_classes < 2:
        raise ValueError(f"the shapes {shapes} are not (N, {n_priors}, 4) and (N, {n_priors}, C) with C of 2 or more")
    if not (max_overlap >= 0 and top_k >= 1 and (max_candidates is None or max_candidates >= 1)):
        values = f"max_overlap is {max_overlap}, top_k is {top_k}, max_candidates is {max_candidates}"
        raise ValueError(f"{values}: they must be at least 0, 1 and 1")
    if n_images == 0:
        return [], [], []
    scores = F.softmax(predicted_scores.float(), dim=2)  # (N, P, C)
    scores = F.threshold_(scores.nan_to_num_(0.0), min_score, 0.0)  # 0: not a candidate
    scores[:, :, 0] = 0.0  # background
    top_k = min(top_k, n_priors * (n_classes - 1))  # there are no more
    parameters = scores, predicted_locs, priors_cxcy, float(max_overlap), top_k, max_candidates
    n_few = min(PRIORS_FOR_EACH_OBJECT * top_k, n_priors)
    return _detect_among(n_few, *parameters) or _detect_among(n_priors, *parameters)


def _detect_among(n, scores, predicted_locs, priors_cxcy, max_overlap, top_k, max_candidates):
    """What `detect_objects()` returns, or None if the n best priors of each image are not enough to know it.

    scores: (N, P, C) float32, 0 where there is no candidate. Each class of each image is a row. The best of a row, its
    pool, are compared with each other, and those suppressed are taken out, with larger and larger pools, until the
    image's top_k best are known to survive.
    """
    n_images, n_priors, n_classes = scores.shape
    images = torch.arange(n_images, device=scores.device)[:, None]  # (N, 1)
    # As integers, the bits of numbers that are not negative are in the order of the numbers.
    best, priors = scores.view(torch.int32).amax(dim=2).topk(n, sorted=False)  # (N, n) each
    left_out = best.amin(dim=1, keepdim=True).long() * (n < n_priors)  # (N, 1): others are no better; 0: there are none
    at = (priors + n_priors * images).flatten()  # (N * n,)
    boxes_xy = _decode(predicted_locs, priors_cxcy, at)  # (N * n, 4)
    # A key: the score's bits and, below them, what ranks equal scores by prior, then by class. No two are equal.
    bits = scores.view(torch.int32).flatten(0, 1).index_select(0, at).view(n_images, n, n_classes)
    bits = bits.transpose(1, 2)[:, 1:]  # (N, C - 1, n)
    places = (n_priors - priors)[:, None] * n_classes - torch.arange(1, n_classes, device=scores.device)[:, None]
    keys = torch.add(places, bits, alpha=2**32).flatten(0, 1)  # (rows, n); a candidate's are >= 2**32
    if max_candidates is not None:
        keys *= keys >= keys.topk(min(max_candidates, n)).values[:, -1:]
    lowest = (left_out + 1) << 32  # (N, 1): candidates from this key on are all here
    rows = torch.arange(len(keys), device=scores.device)
    open_keys, survivors = keys.new_zeros(len(keys)), keys.new_zeros(len(keys), -(-top_k // (n_classes - 1)))
    width, n_new = min(NEW_IN_FIRST_POOL, n), NEW_IN_FIRST_POOL
    while True:
        pool, columns = keys.topk(width)  # (unfinished rows, width), falling
        at = (columns + n * (rows // (n_classes - 1))[:, None]).flatten()
        pool_xy = boxes_xy.index_select(0, at).view(*pool.shape, 4)  # (unfinished rows, width, 4)
        survives, may_survive = _suppress(pool_xy, pool >= 2**32, max_overlap)
        keys.scatter_(1, columns, pool * may_survive)
        survivors = F.pad(survivors, (0, max(0, width - survivors.shape[1])))
        survivors[:, :width].index_copy_(0, rows, pool * survives)
        # The best key of each row that is not known to survive: undecided, or (at most the pool's last) not looked at.
        undecided = (pool * (may_survive ^ survives)).amax(dim=1)
        open_keys.index_copy_(0, rows, undecided.maximum(pool[:, -1]) if width < n else undecided)
        found = survivors.view(n_images, -1).topk(top_k).values  # (N, top_k)
        goes_on = open_keys.view(n_images, -1) >= found[:, -1:].maximum(lowest)
        n_found = (found >= lowest).sum(dim=1)
        is_complete = (n_found == top_k) | (left_out[:, 0] == 0)
        n_stay = torch.where(goes_on.flatten()[rows], may_survive.sum(dim=1), 0)
        # Here, once a round, the host waits for the device: it has to know how many there are.
        counts = torch.cat([n_found, is_complete, n_stay]).tolist()
        n_stay = counts[2 * n_images :]
        unfinished = [row for row, count in enumerate(n_stay) if count > 0]
        if not unfinished:
            break
        keys, rows, n_new = keys[unfinished], rows[unfinished], min(2 * n_new, NEW_IN_POOL)
        width = min(max(width, max(n_stay) + n_new), n)
    if not all(counts[n_images : 2 * n_images]):
        return None
    index = (n_priors * n_classes - (found & 0xFFFFFFFF)).clamp(max=n_priors * n_classes - 1)  # (N, top_k)
    boxes_xy = _decode(predicted_locs, priors_cxcy, (index // n_classes + n_priors * images).flatten())
    results = boxes_xy.view(n_images, top_k, 4), index % n_classes, (found >> 32).int().view(torch.float32)
    return tuple([part[:count] for part, count in zip(parts, counts, strict=False)] for parts in results)


def _decode(predicted_locs, priors_cxcy, at):
    """Boxes (n, 4), fractional boundary form, finite, at some of the N * P priors of a batch, at: (n,) int64."""
    offsets_gcxgcy = predicted_locs.reshape(-1, 4).index_select(0, at).float()
    boxes_xy = cxcy_to_xy(gcxgcy_to_cxcy(offsets_gcxgcy, priors_cxcy.index_select(0, at % len(priors_cxcy))))
    return boxes_xy.clamp_(-MAX_COORDINATE, MAX_COORDINATE)


def _suppress(boxes_xy, is_box, max_overlap):
    """Which boxes of each pool survive for certain, and which may survive, both (rows, K) bool: all pairs at once.

    boxes_xy: (rows, K, 4), best first. is_box: (rows, K) bool. At first all may survive. Those that nothing better
    suppresses that may survive are certain; those that a certain one suppresses may not survive. And so on.
    """
    # The overlap from which the row suppresses the column: none for a column that is better, or the box itself.
    limits = torch.full([is_box.shape[1]] * 2, torch.inf, device=boxes_xy.device).tril_() + max_overlap  # (K, K)
    n_rows, results = max(1, PAIRS_AT_ONCE // limits.numel()), []
    for some_xy, some in zip(boxes_xy.split(n_rows), is_box.split(n_rows), strict=True):
        suppresses = find_jaccard_overlap(some_xy, some_xy).gt_(limits)  # (n_rows, K, K) float, 0 or 1
        may_survive = some = some[:, None].float()  # (n_rows, 1, K)
        for _ in range(STEPS_A_ROUND):
            survives = some * (torch.bmm(may_survive, suppresses) == 0)
            may_survive = some * (torch.bmm(survives, suppresses) == 0)
        results.append((survives[:, 0].bool(), may_survive[:, 0].bool()))
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


# --- The loss -------------------------------------------------------------------------------------


class BatchObjects(NamedTuple):
    """The objects of a batch, numbered 0 to T - 1; number T is background: label 0, the whole image as its box."""

    boxes_xy: torch.Tensor  # (T + 1, 4) float32, boundary form, fractional
    labels: torch.Tensor  # (T + 1,) int64
    images: torch.Tensor  # (T,) int64, the image that each object is in
    numbers: torch.Tensor  # (N, M) int64, the objects of each image; M is 1 at least, T fills what is empty


def stack_objects(boxes, labels, device):
    """The lists of N that `MultiBoxLoss` takes, as BatchObjects on `device`, without waiting for it."""
    # Put together on the CPU, where the data loader leaves the lists: four copies to the device, not 2N.
    n_objects = torch.tensor([len(image_labels) for image_labels in labels])  # (N,)
    n_all = int(n_objects.sum())  # T
    is_object = torch.arange(max(1, int(n_objects.max()))) < n_objects[:, None]  # (N, M)
    objects = BatchObjects(
        boxes_xy=torch.cat([torch.cat(boxes).cpu().float(), torch.tensor([[0.0, 0.0, 1.0, 1.0]])]),
        labels=torch.cat([torch.cat(labels).cpu(), torch.tensor([0])]),
        images=torch.arange(len(labels)).repeat_interleave(n_objects),
        numbers=torch.full(is_object.shape, n_all).masked_scatter_(is_object, torch.arange(n_all)),
    )
    if device.type == "cuda":  # from pinned memory nobody waits for the copy
        objects = [tensor.pin_memory() for tensor in objects]
    return BatchObjects(*(tensor.to(device, non_blocking=True) for tensor in objects))


def match_priors(objects, priors_xy, threshold):
    """Decide for every prior of every image which object it is to predict, if any.

    1. Of all pairs of an object and a prior, the one with the highest overlap is fixed, both are taken out, and so
       on, until every object owns one prior: also when two objects share their best.
    2. Every other prior takes the object that it overlaps most, if that overlap reaches the threshold.

    objects: BatchObjects. priors_xy: (P, 4) float32, boundary form, fractional. Returns (N, P) int64, the number of
    each prior's object, T for background. Source: the paper, section 2.2; step 1 as in the Caffe code's `MatchBBox()`.
    """
    n_all, n_images, n_priors = len(objects.images), len(objects.numbers), len(priors_xy)
    overlap = find_jaccard_overlap(objects.boxes_xy[:n_all], priors_xy)  # (T, P)
    own_priors = assign_own_priors(overlap, objects.numbers)  # (T,)
    overlap.scatter_(1, own_priors[:, None], torch.inf)  # an owner overlaps its prior more than anybody
    # Of the rows of an image, for each prior: the highest overlap, then the first object that has it. (Numbers are
    # floats for a while: on a CPU scatter_reduce_() takes ten times as long for integers.)
    image_of_pair = objects.images[:, None].expand(-1, n_priors)  # (T, P)
    best_overlap = overlap.new_full((n_images, n_priors), threshold).scatter_reduce_(0, image_of_pair, overlap, "amax")
    numbers = torch.arange(n_all, dtype=overlap.dtype, device=overlap.device)[:, None]  # (T, 1)
    candidates = torch.where(overlap >= best_overlap[objects.images], numbers, float(n_all))  # (T, P)
    matched = overlap.new_full((n_images, n_priors), n_all)
    return matched.scatter_reduce_(0, image_of_pair, candidates, "amin").long()


def assign_own_priors(overlap, numbers):
    """Step 1 of the matching, the bipartite one: give every object a prior of its own, best pair first.

    overlap: (T, P) float32. numbers: (N, M) int64, the objects of each image, T for none. Returns (T,) int64: the
    prior of each object, all different in an image. Raises ValueError if an image has more objects than priors.
    """
    (n_all, n_priors), n_objects = overlap.shape, numbers.shape[1]  # T, P, M
    if n_objects > n_priors:
        raise ValueError(f"an image has {n_objects} objects, but there are {n_priors} priors to predict them")
    # When an object's turn comes, M - 1 priors are gone at most: its best M are candidates enough. Of equals, which are
    # common, the first ones: topk()'s own choice would depend on M, that is on the other images.
    places = torch.arange(n_priors, 0, -1, device=overlap.device)
    keys = (overlap.contiguous().view(torch.int32).long() << 32) + places  # (T, P), no two alike in a row
    best_priors = n_priors - (keys.topk(n_objects, dim=1).values & 0xFFFFFFFF)  # (T, M)
    best_overlaps = overlap.gather(1, best_priors)  # (T, M)
    # All pairs of an image in one row, object by object; -1 where there is no object.
    overlaps = F.pad(best_overlaps, (0, 0, 0, 1), value=-1.0)[numbers].flatten(1)  # (N, M * M)
    priors = F.pad(best_priors, (0, 0, 0, 1))[numbers].flatten(1)  # (N, M * M)
    slots = torch.arange(n_objects, device=overlap.device).repeat_interleave(n_objects)  # (M * M,)
    own_priors = priors.new_zeros(n_all + 1)  # the last one is cut off
    for _ in range(n_objects):
        best, pair = overlaps.max(dim=1, keepdim=True)  # (N, 1)
        owner, prior = numbers.gather(1, slots[pair]), priors.gather(1, pair)  # (N, 1)
        owner = torch.where(best >= 0, owner, n_all)  # after an image's last object there is nothing left to fix
        own_priors.scatter_(0, owner[:, 0], prior[:, 0])
        overlaps.masked_fill_((priors == prior) | (slots == slots[pair]), -1.0)
    return own_priors[:-1]


@torch.no_grad()
def mine_hard_negatives(conf_losses, is_positive, n_negatives):
    """The negatives of each image that are furthest from being taken for background (the paper, section 2.2).

    conf_losses: (N, P) float32, of each prior, not negative. is_positive: (N, P) bool. n_negatives: (N, 1), whole
    numbers: how many to take of each image, or all there are; of equally hard ones the first. Returns (N, P) bool.
    """
    # The lowest loss to be taken, bit by bit: in half a sort's time. (As integers, bits have the order of the numbers.)
    bits = (conf_losses.view(torch.int32) & 0x7FFFFFFF).masked_fill(is_positive, -1)  # (N, P), without -0.0's sign
    lowest = torch.zeros_like(n_negatives, dtype=torch.int32)  # (N, 1)
    for bit in reversed(range(31)):
        higher = lowest + 2**bit
        is_enough = (bits >= higher).sum(dim=1, keepdim=True, dtype=torch.int32) >= n_negatives
        lowest = torch.where(is_enough, higher, lowest)
    is_harder, is_equal = bits > lowest, bits == lowest
    n_left = n_negatives - is_harder.sum(dim=1, keepdim=True)  # (N, 1)
    return is_harder | (is_equal & (is_equal.cumsum(dim=1) <= n_left))


class MultiBoxLoss(nn.Module):
    """The loss of SSD: how far the positive priors' boxes are off, and how wrong the class scores are.

    priors_cxcy: (P, 4). threshold: overlap from which a prior matches an object that does not own it.
    neg_pos_ratio: hardest negatives for each positive of an image. alpha: weight of the localisation loss.
    n_negatives_without_objects: hardest negatives in an image without objects. The paper has none (0).
    Source: the paper, section 2.2, equations 1-3. As there, offsets are summed over the four coordinates.
    """

    def __init__(self, priors_cxcy, threshold=0.5, neg_pos_ratio=3, alpha=1.0, n_negatives_without_objects=0):
        super().__init__()
        self.register_buffer("priors_cxcy", priors_cxcy, persistent=False)
        self.threshold, self.neg_pos_ratio, self.alpha = threshold, neg_pos_ratio, alpha
        self.n_negatives_without_objects = n_negatives_without_objects

    def forward(self, predicted_locs, predicted_scores, boxes, labels):
        """The loss of a batch, a float32 scalar, divided as `compute_divisor()` says.

        predicted_locs: (N, P, 4), gcxgcy form; predicted_scores: (N, P, C), before the softmax; any float type.
        boxes: list of N tensors (n_objects, 4) float32, boundary form, fractional, of positive area.
        labels: list of N tensors (n_objects,) int64 in [1, C). Both lists on any device; best on the CPU.
        """
        with torch.autocast(predicted_locs.device.type, enabled=False):
            objects = stack_objects(boxes, labels, predicted_locs.device)
            matched = match_priors(objects, cxcy_to_xy(self.priors_cxcy), self.threshold)  # (N, P)
            is_positive = matched < len(objects.images)  # (N, P)
            n_positives = is_positive.sum(dim=1, keepdim=True)  # (N, 1)

            true_locs = cxcy_to_gcxgcy(xy_to_cxcy(objects.boxes_xy)[matched], self.priors_cxcy)  # (N, P, 4)
            loc_losses = F.smooth_l1_loss(predicted_locs.float(), true_locs, reduction="none").sum(dim=2)  # (N, P)
            scores, true_labels = predicted_scores.flatten(0, 1).float(), objects.labels[matched].flatten()
            conf_losses = F.cross_entropy(scores, true_labels, reduction="none").view_as(loc_losses)  # (N, P)
            has_objects = n_positives > 0  # (N, 1)
            n_negatives = (self.neg_pos_ratio * n_positives).ceil() + self.n_negatives_without_objects * ~has_objects
            counts = is_positive | mine_hard_negatives(conf_losses, is_positive, n_negatives)  # (N, P)

            loss = torch.where(counts, conf_losses, 0.0).sum()
            loss = loss + self.alpha * torch.where(is_positive, loc_losses, 0.0).sum()
            n_negatives = n_negatives.clamp(max=matched.shape[1]).masked_fill(has_objects, 0)
            return loss / compute_divisor(n_positives.sum(), n_negatives.sum(), self.neg_pos_ratio)


def compute_divisor(n_positives, n_negatives_without_objects, neg_pos_ratio):
    """What the loss is divided by: the positives, or the negatives of images without objects, if these are more when
    neg_pos_ratio of them count like one positive; 1 at least. With several processes: those of all of them, divided by
    their number; the mean of their gradients, which DistributedDataParallel takes, is then that of the whole batch."""
    counted, n_processes = torch.stack([n_positives, n_negatives_without_objects]).float(), 1  # (2,)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counted)
        n_processes = torch.distributed.get_world_size()
    return torch.maximum(counted[0], counted[1] / (neg_pos_ratio or 1)).clamp(min=1) / n_processes


# --- What is read from files: pretrained bases, checkpoints ---------------------------------------


def load_pretrained(model, weights):
    """Start the base from a network that was trained to classify ImageNet; take over its mean and std.

    weights: a name of torchvision's weights, such as "IMAGENET1K_V1"; or a file, a state dict as torchvision names it
    (of VGG-16 `features.*` will do). Raises ValueError, or as `read_state_dict()`, naming the file and the way out.
    """
    row = NETWORKS[model.network]
    if row.divisor != 1:
        raise ValueError(f"{model.network} has no pretrained weights; --pretrained= starts from random ones")
    state = utils.read_state_dict(weights, BASES[row.base][1].__members__)
    # Under its own name or another: torchvision's file of Caffe's weights has NaN where fc6 was left out.
    is_caffe = weights == "IMAGENET1K_FEATURES" or bool(state.get("classifier.0.bias", torch.zeros(1)).isnan().any())
    mean, std = (CAFFE_MEAN, CAFFE_STD) if is_caffe else (IMAGENET_MEAN, IMAGENET_STD)
    try:
        entries = {name: tensor for name, tensor in state.items() if name.startswith("features.")}
        if not row.is_lite:
            entries = vgg16_entries(model.base, entries, state)
        fit_to(model, entries, mean, std)
        utils.check_finite(entries)
        model.base.load_state_dict(entries)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{weights}: not weights of {row.base}: {printable(error, 1000)}") from error


def vgg16_entries(base, features, state):
    """A VGG-16's entries under the names of our base; conv6 and conv7 from fc6 and fc7 if they are usable."""
    names = [name for name, layer in base.named_modules() if hasattr(layer, "weight")]  # convolutions and norms
    names = dict(zip(sorted({int(entry.split(".")[1]) for entry in features}), names, strict=False))
    entries = {}
    for entry, tensor in features.items():
        _, number, kind = entry.split(".")  # features.28.bias
        entries[f"{names.get(int(number), number)}.{kind}"] = tensor
    # A fully connected layer is a convolution whose kernel covers its whole input (7 x 7 of 512).
    fc = [state.get(f"classifier.{i}.{kind}", torch.tensor(torch.nan)) for kind in ("bias", "weight") for i in (0, 3)]
    if all(bool(tensor.isfinite().all()) for tensor in fc):
        entries["conv6.bias"], entries["conv7.bias"] = (decimate(bias, steps=(4,)) for bias in fc[:2])
        entries["conv6.weight"] = decimate(fc[2].view(4096, 512, 7, 7), steps=(4, None, 3, 3))
        entries["conv7.weight"] = decimate(fc[3].view(4096, 4096, 1, 1), steps=(4, 4, None, None))
    else:
        init_convolutions(base.conv6)
        init_convolutions(base.conv7)
    own = {name: tensor for name, tensor in base.state_dict().items() if name.startswith(("conv6", "conv7"))}
    return {**own, **entries}


def decimate(tensor, steps):
    """Keep every `step`-th entry along each dimension, from the first on; None: all (the paper, section 3)."""
    return tensor[tuple(slice(None, None, step) for step in steps)]


def fit_to(model, entries, mean, std):
    """Prepare a model for weights: their mean and std, and an SSDLite's tail as wide as theirs."""
    if not 0 < min(std) <= max(std) < math.inf:
        raise ValueError(f"its std is {std}; the input is divided by it, so it must be more than 0")
    model.mean.copy_(torch.tensor(mean).view_as(model.mean))
    model.std.copy_(torch.tensor(std).view_as(model.std))
    row = NETWORKS[model.network]
    tail = entries.get("features.16.0.weight", entries.get("base.features.16.0.weight"))
    if row.is_lite and tail is not None and len(tail) != row.sources[1].channels:
        c4, c5, *others = row.sources
        model.build(row._replace(sources=(c4, c5._replace(channels=len(tail)), *others)))


def model_state(model):
    """What a checkpoint needs to rebuild a model with a label map; its tensors are the model's own, not copies."""
    mean_and_std = {"mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist()}
    names = ("network", "label_map", "priors_cxcy", "max_size_offset", "antialias")
    return {"model": model.state_dict(), **mean_and_std, **{name: getattr(model, name) for name in names}}


@torch.no_grad()
def model_from_checkpoint(saved, name, label_map=None):
    """Rebuild a model on the CPU from what `load_checkpoint()` returned, for its classes, or for those of a label map:
    if they are others, or in another order, the class heads start anew. ValueError names file and fault."""
    try:
        state, n_classes, label_map = saved["model"], len(saved["label_map"]), label_map or saved["label_map"]
        n_scores = [tensor.numel() for entry, tensor in state.items() if entry.startswith("pred_convs.cl_")][-1]
        if n_classes < 2 or n_scores % n_classes:  # before a head is built for every class that a label map claims
            raise ValueError(f"its label map has {n_classes} classes, its weights are for another number")
        model = SSD300(len(label_map), saved.get("network", "ssd300_vgg16"))
        fit_to(model, state, saved["mean"], saved["std"])
        if label_map != saved["label_map"]:
            own = {entry: tensor for entry, tensor in model.state_dict().items() if entry.startswith("pred_convs.cl_")}
            state = {**state, **own}
        model.load_state_dict(state)
        model.priors_cxcy.copy_(saved["priors_cxcy"])
        utils.check_finite({**state, "priors_cxcy": model.priors_cxcy, "mean": model.mean})  # shapes are known now
        model.max_size_offset, model.antialias = saved.get("max_size_offset"), saved.get("antialias", True)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: a checkpoint that does not fit: {printable(error, 1000)}") from error
    model.label_map = label_map
    return model


def load_model(path, device="cpu"):
    """Read a model, with its label map, from a checkpoint to a device, in evaluation mode; ValueError if it is none."""
    model, device = model_from_checkpoint(utils.load_checkpoint(path), path), torch.device(device)
    return model.to(device, memory_format=utils.fastest_memory_format(device, model)).eval()
