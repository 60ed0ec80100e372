"""The networks (SSD300 and its family), their priors, detection, and the loss that they learn by.

Shapes in comments: N images, S the side of the input (300 for SSD300), G the side of a source map's grid, P priors
(8732 for SSD300), C classes (background = 0 included), M objects in an image, K candidates in an image, T positive
priors in a batch.
Source: Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016 ("the paper"), and the authors' Caffe code.
"""

import math
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import nms
from torchvision.ops.misc import Conv2dNormActivation

import utils
from utils import cxcy_to_gcxgcy, cxcy_to_xy, find_jaccard_overlap, gcxgcy_to_cxcy, printable, xy_to_cxcy

# Mean and standard deviation of the input, RGB in [0, 1]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CAFFE_MEAN = (0.48235, 0.45882, 0.40784)  # of weights that were trained with Caffe
CAFFE_STD = (1 / 255, 1 / 255, 1 / 255)
LITE_MEAN = (0.5, 0.5, 0.5)  # of SSDLite
LITE_STD = (0.5, 0.5, 0.5)

# --- The table of networks: layers and priors are made from it ------------------------------------


class SourceMap(NamedTuple):
    """A feature map from which objects are predicted: its priors and, after the base, the layers that make it."""

    name: str
    channels: int
    grid: int  # G: cells in a row, and rows
    aspect_ratios: tuple  # width : height
    # A map after the base is made by two convolutions: 1 x 1 to fewer channels, then one of the following kind.
    reduced_channels: int = 0  # 0: it is a map of the base
    kernel: int = 3
    stride: int = 2
    padding: int = 1

    @property
    def n_priors(self):
        return len(self.aspect_ratios) + 1  # per cell: one for each aspect ratio, and the extra square one


class Architecture(NamedTuple):
    """A row of the table: all that tells one network of the family from the others."""

    input_size: int  # S, in pixels
    base: str  # a key of BASES
    sources: tuple  # of SourceMap: those of the base, then those of the auxiliary convolutions
    # Side of each map's square prior, as a fraction of the image's; and one more, the next scale after the last map's.
    scales: tuple
    divisor: int = 1  # the paper's numbers of channels are divided by this
    batch_norm: bool = False  # batch normalisation after every convolution but the heads
    l2_norm: bool = False  # the first map's cells are scaled to one length: see SSD300.build()
    is_lite: bool = False  # SSDLite: separable convolutions, priors no larger than the image

    @property
    def base_sources(self):
        return [source for source in self.sources if source.reduced_channels == 0]

    @property
    def aux_sources(self):
        return [source for source in self.sources if source.reduced_channels > 0]


THREE_RATIOS = (1, 2, 1 / 2)  # four priors per cell: one of each ratio, and the extra square one
FIVE_RATIOS = (1, 2, 3, 1 / 2, 1 / 3)  # six priors per cell
SSD300_SOURCES = (
    SourceMap("conv4_3", 512, 38, THREE_RATIOS),
    SourceMap("conv7", 1024, 19, FIVE_RATIOS),
    SourceMap("conv8_2", 512, 10, FIVE_RATIOS, reduced_channels=256),
    SourceMap("conv9_2", 256, 5, FIVE_RATIOS, reduced_channels=128),
    SourceMap("conv10_2", 256, 3, THREE_RATIOS, reduced_channels=128, stride=1, padding=0),
    SourceMap("conv11_2", 256, 1, THREE_RATIOS, reduced_channels=128, stride=1, padding=0),
)
SSD512_SOURCES = (  # the Caffe code's ssd_pascal_512.py
    SourceMap("conv4_3", 512, 64, THREE_RATIOS),
    SourceMap("conv7", 1024, 32, FIVE_RATIOS),
    SourceMap("conv8_2", 512, 16, FIVE_RATIOS, reduced_channels=256),
    SourceMap("conv9_2", 256, 8, FIVE_RATIOS, reduced_channels=128),
    SourceMap("conv10_2", 256, 4, FIVE_RATIOS, reduced_channels=128),
    SourceMap("conv11_2", 256, 2, THREE_RATIOS, reduced_channels=128),
    SourceMap("conv12_2", 256, 1, THREE_RATIOS, reduced_channels=128, kernel=4, stride=1),
)
SSDLITE_SOURCES = (  # torchvision's ssdlite320_mobilenet_v3_large
    SourceMap("c4", 672, 20, FIVE_RATIOS),
    # torchvision halves the 960 channels of c5, unless ImageNet's weights are loaded: see fit_tail().
    SourceMap("c5", 480, 10, FIVE_RATIOS),
    SourceMap("extra1_2", 512, 5, FIVE_RATIOS, reduced_channels=256),
    SourceMap("extra2_2", 256, 3, FIVE_RATIOS, reduced_channels=128),
    SourceMap("extra3_2", 256, 2, FIVE_RATIOS, reduced_channels=128),
    SourceMap("extra4_2", 128, 1, FIVE_RATIOS, reduced_channels=64),
)
RESNET_SOURCES = (  # ResNet's conv4_x, and five maps after it, as in NVIDIA's DeepLearningExamples
    SourceMap("layer3", 1024, 38, THREE_RATIOS),
    SourceMap("extra1_2", 512, 19, FIVE_RATIOS, reduced_channels=256),
    SourceMap("extra2_2", 512, 10, FIVE_RATIOS, reduced_channels=256),
    SourceMap("extra3_2", 256, 5, FIVE_RATIOS, reduced_channels=128),
    SourceMap("extra4_2", 256, 3, THREE_RATIOS, reduced_channels=128, stride=1, padding=0),
    SourceMap("extra5_2", 256, 1, THREE_RATIOS, reduced_channels=128, stride=1, padding=0),
)
TINY_SOURCES = tuple(
    source._replace(channels=source.channels // 8, reduced_channels=source.reduced_channels // 8)
    for source in SSD300_SOURCES
)
SCALES_300 = (0.1, 0.2, 0.375, 0.55, 0.725, 0.9, 1.0)
LITE_SCALES = (0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0)
NETWORKS = {
    "ssd300_vgg16": Architecture(300, "vgg16", SSD300_SOURCES, SCALES_300, l2_norm=True),
    "ssd512_vgg16": Architecture(
        512, "vgg16", SSD512_SOURCES, (0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05), l2_norm=True
    ),
    "ssd300_vgg16_bn": Architecture(300, "vgg16_bn", SSD300_SOURCES, SCALES_300, batch_norm=True, l2_norm=True),
    "ssd300_tiny": Architecture(300, "vgg16_bn", TINY_SOURCES, SCALES_300, divisor=8, batch_norm=True, l2_norm=True),
    "ssdlite320_mobilenet_v3_large": Architecture(
        320, "mobilenet_v3_large", SSDLITE_SOURCES, LITE_SCALES, is_lite=True
    ),
    "ssd300_resnet50": Architecture(300, "resnet50", RESNET_SOURCES, SCALES_300, batch_norm=True),
    # The Caffe code's ssd_coco.py: smaller priors
    "ssd300_vgg16_coco": Architecture(
        300, "vgg16", SSD300_SOURCES, (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05), l2_norm=True
    ),
    "ssd512_vgg16_coco": Architecture(
        512, "vgg16", SSD512_SOURCES, (0.04, 0.1, 0.26, 0.42, 0.58, 0.74, 0.9, 1.06), l2_norm=True
    ),
}

# --- The bases ------------------------------------------------------------------------------------


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that can also be trained on one image, whose 1 x 1 map has one value a channel."""

    def forward(self, x):
        has_one_value_a_channel = x.numel() == x.shape[1]
        if self.training and has_one_value_a_channel:
            # One value has no variance to divide by, so the running statistics normalise it, as in evaluation.
            statistics = self.running_mean, self.running_var
            return F.batch_norm(x, *statistics, self.weight, self.bias, training=False, eps=self.eps)
        return super().forward(x)


class Convolution(nn.Conv2d):
    """A convolution, batch normalisation if asked for, and ReLU."""

    def __init__(self, *sizes, batch_norm=False, **options):
        super().__init__(*sizes, **options)
        # For a base without pretrained weights. The auxiliary layers call init_convolutions() afterwards.
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")
        nn.init.zeros_(self.bias)
        self.norm = BatchNorm(self.out_channels) if batch_norm else None

    def forward(self, x):
        x = super().forward(x)
        if self.norm is not None:
            x = self.norm(x)
        return F.relu(x, inplace=True)


LiteNorm = partial(BatchNorm, eps=0.001, momentum=0.03)
LITE_INIT_STD = 0.03
# Convolution without bias, batch normalisation, ReLU6. Without a stride it keeps the size of a map: it pads by itself.
LiteConvolution = partial(Conv2dNormActivation, norm_layer=LiteNorm, activation_layer=nn.ReLU6)


def init_convolutions(module, std=None):
    """Start the weights of all convolutions in a module from a normal distribution with the standard deviation std, or
    without std by Xavier's method, which the Caffe code takes for all that it adds to VGG. Biases start at 0."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            if std is None:
                nn.init.xavier_uniform_(conv.weight)
            else:
                nn.init.normal_(conv.weight, std=std)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


# Output channels of VGG-16's convolutions, block by block; a pooling layer follows each block.
VGG_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGGBase(nn.Module):
    """VGG-16, its two large fully connected layers turned into the convolutions conv6 and conv7.

    Takes images, (N, 3, 300, 300) float, normalised. Returns conv4_3 (N, 512, 38, 38) and conv7 (N, 1024, 19, 19).
    Source: Simonyan and Zisserman 2015; the changes: the paper, section 3, and the Caffe code.
    """

    def __init__(self, architecture=NETWORKS["ssd300_vgg16"]):
        super().__init__()
        batch_norm = architecture.batch_norm
        channels = 3
        for block, widths in enumerate(VGG_BLOCKS, start=1):
            for i, width in enumerate(widths, start=1):
                width //= architecture.divisor
                self.add_module(f"conv{block}_{i}", Convolution(channels, width, 3, padding=1, batch_norm=batch_norm))
                channels = width
            # 300 -> 150 -> 75 -> 38 (not 37: rounded up, as Caffe does) -> 19; the fifth keeps the resolution.
            pool = nn.MaxPool2d(2, ceil_mode=True) if block < 5 else nn.MaxPool2d(3, stride=1, padding=1)
            self.add_module(f"pool{block}", pool)
        fc_channels = 1024 // architecture.divisor
        # fc6 looks at a whole map of 7 x 7 cells, so it is a convolution with a 7 x 7 kernel. Every third row and
        # column of that is kept (by entries_from_fc_layers()): 3 x 3 weights, for cells three apart. In VGG, pool5
        # halves the grid before. Here it does not, so the same distance is 2 * 3 = 6 cells: dilation=6.
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

    Takes images, (N, 3, 320, 320) float, normalised. Returns c4 (N, 672, 20, 20), from inside the block that halves the
    map, and c5 (N, 480, 10, 10). Source: Howard et al., "Searching for MobileNetV3", 2019, section 6.3.
    """

    def __init__(self, architecture):
        super().__init__()
        # In the table, c5 has 480 channels, as in torchvision's detector (reduced_tail). ImageNet's weights have 960.
        # When they are to be loaded, fit_tail() builds the model again, from a row in which c5 has 960.
        c5 = architecture.base_sources[-1]
        is_halved = c5.channels == 480
        self.features = torchvision.models.mobilenet_v3_large(norm_layer=LiteNorm, reduced_tail=is_halved).features
        init_convolutions(self, LITE_INIT_STD)

    def forward(self, x):  # images, (N, 3, 320, 320)
        for block in self.features[:13]:
            x = block(x)
        # c4 is inside block 13: its first layer, a 1 x 1 convolution, makes c4, and its other layers go on from there.
        # (There is no shortcut around this block, because it halves the map.)
        expand, *others = self.features[13].block
        c4 = expand(x)  # (N, 672, 20, 20)
        x = c4
        for layer in others:
            x = layer(x)
        for block in self.features[14:]:
            x = block(x)
        return c4, x  # c5: (N, 480, 10, 10)


class ResNetBase(nn.Module):
    """ResNet-50 up to conv4_x (`layer3`), as torchvision builds it and names its layers, without the stride of conv4_x.

    Takes images, (N, 3, 300, 300) float, normalised. Returns layer3 alone, (N, 1024, 38, 38): it is the only source
    map of this base. Source: He et al. 2016; the change of stride as in NVIDIA's DeepLearningExamples.
    """

    def __init__(self, architecture):
        super().__init__()
        resnet = torchvision.models.resnet50()
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
            self.add_module(name, getattr(resnet, name))
        # torchvision's layer3 halves the map in the 3 x 3 convolution of its first block and in the shortcut beside it.
        self.layer3[0].conv2.stride = (1, 1)
        self.layer3[0].downsample[0].stride = (1, 1)

    def forward(self, x):  # images, (N, 3, 300, 300)
        for layer in self.children():  # one after the other, as they were added
            x = layer(x)
        return (x,)


BASES = {  # the class, and torchvision's ImageNet weights for it (None: there are none)
    "vgg16": (VGGBase, torchvision.models.VGG16_Weights),
    "vgg16_bn": (VGGBase, torchvision.models.VGG16_BN_Weights),
    "mobilenet_v3_large": (MobileNetBase, torchvision.models.MobileNet_V3_Large_Weights),
    "resnet50": (ResNetBase, torchvision.models.ResNet50_Weights),
}

# --- Auxiliary and prediction convolutions --------------------------------------------------------


class AuxiliaryConvolutions(nn.Module):
    """Pairs of convolutions after the base, each with a smaller grid than the one before.

    Takes the base's last map, (N, 1024, 19, 19) for SSD300. Returns a list of those that follow it in the table:
    (N, 512, 10, 10), (N, 256, 5, 5), (N, 256, 3, 3), (N, 256, 1, 1).
    """

    def __init__(self, architecture=NETWORKS["ssd300_vgg16"]):
        super().__init__()
        self.source_names = [source.name for source in architecture.aux_sources]
        channels = architecture.base_sources[-1].channels
        for source in architecture.aux_sources:
            reduced = source.reduced_channels
            options = {"kernel_size": source.kernel, "stride": source.stride, "padding": source.padding}
            if architecture.is_lite:
                first = LiteConvolution(channels, reduced, 1)
                # A separable convolution: depthwise, a kernel for each channel alone, then 1 x 1, which mixes them.
                depthwise = LiteConvolution(reduced, reduced, **options, groups=reduced)
                second = nn.Sequential(depthwise, LiteConvolution(reduced, source.channels, 1))
            else:
                first = Convolution(channels, reduced, 1, batch_norm=architecture.batch_norm)
                second = Convolution(reduced, source.channels, **options, batch_norm=architecture.batch_norm)
            self.add_module(source.name.removesuffix("_2") + "_1", first)  # conv8_1
            self.add_module(source.name, second)  # conv8_2
            channels = source.channels
        # This replaces the initial weights from Convolution.__init__().
        init_convolutions(self, LITE_INIT_STD if architecture.is_lite else None)

    def forward(self, x):
        source_maps = []
        for name, layer in self.named_children():
            x = layer(x)
            if name in self.source_names:  # the second convolution of a pair
                source_maps.append(x)  # (N, channels, G, G)
        return source_maps


class PredictionConvolutions(nn.Module):
    """Two 3 x 3 convolutions on each source map: one for offsets (`loc_*`), one for class scores (`cl_*`).

    Takes the source maps in the order of the table. Returns offsets (N, P, 4) and scores (N, P, C), in the order of the
    priors: map by map, cell by cell along the rows, prior by prior.
    """

    def __init__(self, n_classes, architecture=NETWORKS["ssd300_vgg16"]):
        super().__init__()
        self.n_classes = n_classes
        self.source_names = [source.name for source in architecture.sources]
        for source in architecture.sources:
            for kind, n_outputs in (("loc", 4), ("cl", n_classes)):  # numbers per prior
                if architecture.is_lite:
                    depthwise = LiteConvolution(source.channels, source.channels, 3, groups=source.channels)
                    head = nn.Sequential(depthwise, nn.Conv2d(source.channels, source.n_priors * n_outputs, 1))
                else:
                    head = nn.Conv2d(source.channels, source.n_priors * n_outputs, 3, padding=1)
                self.add_module(f"{kind}_{source.name}", head)
        if architecture.is_lite:
            init_convolutions(self, LITE_INIT_STD)
        elif architecture.batch_norm:  # then small weights learn faster than Xavier's
            init_convolutions(self, 0.01)
        else:
            init_convolutions(self)

    def forward(self, source_maps):
        all_locs = []
        all_scores = []
        for name, source_map in zip(self.source_names, source_maps, strict=True):
            locs = getattr(self, f"loc_{name}")(source_map)  # (N, n_priors * 4, G, G)
            scores = getattr(self, f"cl_{name}")(source_map)  # (N, n_priors * C, G, G)
            # With channels last, the numbers stand in the order row, column, prior, as the priors do.
            n_images = source_map.shape[0]
            locs = locs.permute(0, 2, 3, 1).reshape(n_images, -1, 4)  # (N, G * G * n_priors, 4)
            scores = scores.permute(0, 2, 3, 1).reshape(n_images, -1, self.n_classes)
            all_locs.append(locs)
            all_scores.append(scores)
        return torch.cat(all_locs, dim=1), torch.cat(all_scores, dim=1)  # (N, P, 4), (N, P, C)


# --- SSD300 and its family ------------------------------------------------------------------------


class SSD300(nn.Module):
    """The detector: from normalised images to boxes, one per prior, each with a score for every class.

    The class has the name of the first row of the table; `network` makes it any other row, such as "ssd512_vgg16".

    n_classes: C, background included. network: a key of NETWORKS.
    mean, std: of the input's three channels, in [0, 1]; they belong to the weights. None: the network's own.
    max_size_offset: predicted offsets of width and height are not taken above it; torchvision's weights were trained
        with such a limit. None: no limit.
    antialias: whether the weights were trained on images that were resized with antialiasing; it is kept here for those
        who prepare images, see `transform()`.
    All weights start at random; `load_pretrained()` and `load_model()` read others.
    """

    def __init__(self, n_classes, network="ssd300_vgg16", mean=None, std=None, max_size_offset=None, antialias=True):
        super().__init__()
        if n_classes < 2:
            raise ValueError(f"n_classes is {n_classes}: it counts the background, so it must be 2 or more")
        if network not in NETWORKS:
            raise ValueError(f"network is {network!r}; it must be one of {', '.join(NETWORKS)}")
        self.network = network
        self.n_classes = n_classes
        self.max_size_offset = max_size_offset
        self.antialias = antialias
        self.label_map = None  # name -> label, from a training run or a checkpoint
        self.build(NETWORKS[network])  # sets self.architecture
        own_mean = LITE_MEAN if self.architecture.is_lite else IMAGENET_MEAN
        own_std = LITE_STD if self.architecture.is_lite else IMAGENET_STD
        # persistent=False: the state dict holds the layers' weights alone. (Checkpoints save these three beside it.)
        self.register_buffer("priors_cxcy", self.create_prior_boxes(network), persistent=False)
        self.register_buffer("mean", torch.tensor(mean or own_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or own_std).view(1, 3, 1, 1), persistent=False)

    def build(self, architecture):
        """Make the layers of a row of the table, with random weights."""
        self.architecture = architecture
        self.input_size = architecture.input_size
        self.base = BASES[architecture.base][0](architecture)
        self.aux_convs = AuxiliaryConvolutions(architecture)
        self.pred_convs = PredictionConvolutions(self.n_classes, architecture)
        self.rescale_factors = None
        if architecture.l2_norm:
            # VGG's values in conv4_3 have another scale than those of the deeper maps. So each cell is divided by its
            # norm. Then each channel is multiplied by a factor of its own, which is learned from a start at 20 (the
            # paper, section 3.1; ParseNet). After the division, values are about 1 / sqrt(512) = 0.044 in 512 channels,
            # and 1 / sqrt(64) = 0.125 in 64. So a network an eighth as wide starts at 20 / sqrt(8) = 7.07, for the same
            # result: 7.07 * 0.125 = 20 * 0.044 = 0.88.
            start = 20 / architecture.divisor**0.5
            self.rescale_factors = nn.Parameter(torch.full((1, architecture.sources[0].channels, 1, 1), start))

    def forward(self, images):
        """From images (N, 3, S, S), normalised, to offsets (N, P, 4), gcxgcy form, and scores (N, P, C), before the
        softmax, at every prior."""
        if images.shape[1:] != (3, self.input_size, self.input_size):
            shape = f"(N, 3, {self.input_size}, {self.input_size})"
            raise ValueError(f"images are {shape} for {self.network}, not {tuple(images.shape)}")
        source_maps = list(self.base(images))  # conv4_3, conv7
        aux_maps = self.aux_convs(source_maps[-1])  # conv8_2, conv9_2, conv10_2, conv11_2
        if self.rescale_factors is not None:
            conv4_3 = source_maps[0]
            rescaled = l2_normalize(conv4_3) * self.rescale_factors  # float32
            source_maps[0] = rescaled.to(conv4_3.dtype)  # in half precision, the convolutions want the type of weights
        return self.pred_convs(source_maps + aux_maps)

    @staticmethod
    def create_prior_boxes(network="ssd300_vgg16"):
        """A network's priors, in the order in which the prediction convolutions' outputs are stacked.

        Returns (P, 4) float32, center-size form, fractional. Priors may reach beyond the image. (SSDLite limits their
        width and height to 1.)
        Source: the paper, section 2.2, equation 4 from conv7 on (0.2 to 0.9), and 0.1 for conv4_3.
        """
        architecture = NETWORKS[network]
        priors = []
        for source, scale, next_scale in zip(
            architecture.sources, architecture.scales[:-1], architecture.scales[1:], strict=True
        ):
            sizes = [(scale * ratio**0.5, scale / ratio**0.5) for ratio in source.aspect_ratios]
            between = (scale * next_scale) ** 0.5
            sizes.insert(1, (between, between))  # after ratio 1: a square between two scales
            if architecture.is_lite:
                sizes = [(min(w, 1), min(h, 1)) for w, h in sizes]
            centers = [(i + 0.5) / source.grid for i in range(source.grid)]
            for c_y in centers:  # row by row
                for c_x in centers:
                    priors += [(c_x, c_y, w, h) for w, h in sizes]
        return torch.tensor(priors)  # (P, 4)

    def normalize(self, images):
        """Turn bytes, (N, 3, S, S) uint8, RGB, on any device, into the network's input: on its own device, and float32,
        or what `model.half()` or `model.to(torch.bfloat16)` made of the network."""
        device = self.mean.device
        images = images.to(device, non_blocking=device.type == "cuda")  # first, because bytes are smaller than floats
        images = images.to(torch.float32)
        images = (images - 255 * self.mean) / (255 * self.std)  # (images / 255 - mean) / std
        return images.to(self.mean.dtype)

    def detect_objects(self, predicted_locs, predicted_scores, min_score, max_overlap, top_k, max_candidates=None):
        """Turn this model's predictions for a batch into objects: see the function `detect_objects()`."""
        locs = self.limit_sizes(predicted_locs)
        return detect_objects(locs, predicted_scores, self.priors_cxcy, min_score, max_overlap, top_k, max_candidates)

    def limit_sizes(self, predicted_locs):
        """Predicted offsets (N, P, 4). If this model has a limit for those of width and height, they are cut there."""
        if self.max_size_offset is None:
            return predicted_locs
        centers = predicted_locs[..., :2]
        sizes = predicted_locs[..., 2:].clamp(max=self.max_size_offset)
        return torch.cat([centers, sizes], dim=-1)

    def freeze_base(self, up_to):
        """Keep the first layers of the base as they are: weights, and the statistics of batch normalisation.

        up_to: name of the last layer that is frozen, such as "conv5_3" (VGG) or "layer2" (ResNet).
        Raises ValueError, listing the names, if the base has no such layer.
        """
        names = [name for name, _ in self.base.named_children()]
        if up_to not in names:
            raise ValueError(f"the base of {self.network} has no layer {up_to!r}; its layers are {', '.join(names)}")
        for name in names[: names.index(up_to) + 1]:
            getattr(self.base, name).requires_grad_(False)
        self.train(self.training)  # our own train(), below, puts the frozen layers into evaluation mode

    def train(self, mode=True):
        """As `nn.Module.train()`, but frozen layers of the base stay in evaluation mode, so that statistics stay."""
        super().train(mode)
        for layer in self.base.children():
            parameters = list(layer.parameters())
            is_frozen = len(parameters) > 0 and not any(parameter.requires_grad for parameter in parameters)
            layer.train(mode and not is_frozen)
        return self

    def change_classes(self, label_map):
        """Predict the classes of another label map. Classes that have the same name in both, background among them,
        keep their weights in the class heads; those of the others start at random.

        Raises ValueError if this model has no label map, which says what its heads know, or the new one is not one.
        """
        if not self.label_map:
            raise ValueError("this model has no label_map; set it to that of the classes which its weights know")
        utils.check_label_map(label_map)
        old_heads = self.pred_convs
        old_label_map = self.label_map
        self.label_map = label_map
        self.n_classes = len(label_map)
        self.pred_convs = PredictionConvolutions(self.n_classes, self.architecture)
        self.pred_convs.to(self.mean)  # the device and the type of the other layers
        for name, old_head in old_heads.named_children():
            if name.startswith("loc_"):  # offsets know no classes: the old head replaces the new one
                setattr(self.pred_convs, name, old_head)
                continue
            new_head = getattr(self.pred_convs, name)
            if self.architecture.is_lite:  # a head is two layers: depthwise, which knows no classes, then 1 x 1
                new_head[0] = old_head[0]
                old_conv = old_head[1]
                new_conv = new_head[1]
            else:
                old_conv = old_head
                new_conv = new_head
            copy_classes(old_conv.weight, new_conv.weight, old_label_map, label_map)
            copy_classes(old_conv.bias, new_conv.bias, old_label_map, label_map)


@torch.no_grad()
def copy_classes(old_parameter, new_parameter, old_label_map, new_label_map):
    """Copy the weights, or biases, of classes with the same name from one class head to another.

    A head has n_priors * C outputs, prior by prior, and for each prior class by class: parameters are (n_priors * C,
    ...).
    """
    old_by_class = old_parameter.unflatten(0, (-1, len(old_label_map)))  # (n_priors, C, ...)
    new_by_class = new_parameter.unflatten(0, (-1, len(new_label_map)))  # a view: writing to it changes new_parameter
    for name, label in new_label_map.items():
        if name in old_label_map:
            new_by_class[:, label] = old_by_class[:, old_label_map[name]]


def l2_normalize(features, eps=1e-10):
    """Scale the channels of every cell of features, (N, channels, G, G), to a Euclidean length of 1, as float32."""
    features = features.float()  # in half precision the squares may overflow
    squared_length = features.square().sum(dim=1, keepdim=True)  # (N, 1, G, G)
    return features / torch.sqrt(squared_length + eps)  # eps: a cell of zeros must not give 0 / 0


# --- Detection ------------------------------------------------------------------------------------

MAX_COORDINATE = 1e4  # absurd offsets would give infinite boxes; they are cut off 10,000 image widths away
FIRST_CANDIDATES = 5  # times top_k: usually enough candidates to find the best top_k objects


@torch.no_grad()
def detect_objects(predicted_locs, predicted_scores, priors_cxcy, min_score, max_overlap, top_k, max_candidates=None):
    """Turn raw predictions into the objects that they show: score, decode, suppress, limit.

    A pair of a prior and a class (not background) whose softmax score is > min_score is a candidate. Go through the
    candidates of a class from the best one down: each one that survives suppresses all worse ones that overlap it by
    more than max_overlap. Equal scores rank by prior, then by class.

    predicted_locs: (N, P, 4) float tensor, offsets_gcxgcy. predicted_scores: (N, P, C), before the softmax.
    priors_cxcy: (P, 4) float32 tensor, center-size form, fractional.
    min_score, max_overlap: floats in [0, 1]. top_k: most objects returned for an image, of all its classes.
    max_candidates: this many best ones of each class of an image enter suppression (Caffe: 400); None: all do.
    Returns three lists of N tensors, each by falling score: boxes (n, 4) float32, fractional boundary form, finite,
    not clipped to the image (as in Caffe's code); labels (n,) int64, 1 to C - 1; scores (n,) float32; n <= top_k.
    They are on the device of the predictions. (From MPS and XPU they come back on the CPU: suppression computes in
    float64, which these do not have, or not all of them.)
    Raises ValueError for shapes and limits that make no sense.
    """
    check_predictions(predicted_locs, predicted_scores, priors_cxcy)
    if not 0 <= min_score <= 1:  # NaN, or 50 for 50 percent, would find nothing
        raise ValueError(f"min_score is {min_score}; it must lie between 0 and 1")
    if not (max_overlap >= 0 and top_k >= 1 and (max_candidates is None or max_candidates >= 1)):
        values = f"max_overlap is {max_overlap}, top_k is {top_k}, max_candidates is {max_candidates}"
        raise ValueError(f"{values}: they must be at least 0, 1 and 1")
    if predicted_locs.device.type in ("mps", "xpu"):
        predicted_locs = predicted_locs.cpu()
        predicted_scores = predicted_scores.cpu()
        priors_cxcy = priors_cxcy.cpu()
    all_boxes = []
    all_labels = []
    all_scores = []
    for image_locs, image_scores in zip(predicted_locs.float(), predicted_scores.float(), strict=True):
        # 1. Score. Every pair of a prior and a class whose score is high enough is a candidate.
        class_scores = F.softmax(image_scores, dim=1)[:, 1:]  # (P, C - 1), without the background
        if max_candidates is not None:
            class_scores = keep_best_of_each_class(class_scores, max_candidates)
        rows, columns = (class_scores > min_score).nonzero(as_tuple=True)  # (K,) each: row by row, that is by prior
        scores = class_scores[rows, columns]  # (K,)
        labels = columns + 1  # (K,)
        # 2. Decode. Each prior and its offsets make a box; a candidate has that of its prior.
        boxes_cxcy = gcxgcy_to_cxcy(image_locs, priors_cxcy)  # (P, 4)
        boxes_xy = cxcy_to_xy(boxes_cxcy).nan_to_num().clamp(-MAX_COORDINATE, MAX_COORDINATE)  # (P, 4)
        boxes_xy = boxes_xy[rows]  # (K, 4)
        # 3. Suppress what overlaps a better candidate, and 4. limit the number of those that are left.
        kept = suppress(boxes_xy, labels, scores, max_overlap, top_k)  # (n,)
        all_boxes.append(boxes_xy[kept])
        all_labels.append(labels[kept])
        all_scores.append(scores[kept])
    return all_boxes, all_labels, all_scores


def check_predictions(predicted_locs, predicted_scores, priors_cxcy):
    """ValueError if the shapes of predictions do not fit each other, or the priors."""
    n_images = len(predicted_locs)
    n_priors = len(priors_cxcy)
    n_classes = predicted_scores.shape[-1]
    shapes = tuple(predicted_locs.shape), tuple(predicted_scores.shape)
    if shapes != ((n_images, n_priors, 4), (n_images, n_priors, n_classes)) or n_classes < 2:
        raise ValueError(f"the shapes {shapes} are not (N, {n_priors}, 4) and (N, {n_priors}, C) with C of 2 or more")


def keep_best_of_each_class(class_scores, n):
    """The scores (P, C - 1) of an image, with 0 in place of all but the n highest of each class.

    0 is never above min_score, so these are no candidates.
    """
    kept = torch.zeros_like(class_scores)
    for column in range(class_scores.shape[1]):
        scores = class_scores[:, column]  # (P,)
        best = scores.argsort(descending=True, stable=True)[:n]
        kept[best, column] = scores[best]
    return kept


def suppress(boxes_xy, labels, scores, max_overlap, top_k):
    """Non-maximum suppression in each class of an image: from the best candidate on, drop all that overlap it.

    boxes_xy: (K, 4) float32, boundary form. labels: (K,) int64. scores: (K,) float32.
    Returns the (n,) int64 indices of the best top_k survivors, by falling score.
    """
    # There may be 100,000 candidates, but only top_k survivors are asked for. So look at the best few first: the others
    # are worse, and a worse candidate never suppresses a better one. If too few survive, look at twice as many.
    n_best = FIRST_CANDIDATES * top_k
    while n_best < len(scores):
        best = find_best(scores, n_best)  # (n_best,) indices, and more if some scores are equal
        survivors = suppress_in_each_class(boxes_xy[best], labels[best], scores[best], max_overlap)  # indices of `best`
        if len(survivors) >= top_k:
            return best[survivors[:top_k]]
        n_best = 2 * n_best
    return suppress_in_each_class(boxes_xy, labels, scores, max_overlap)[:top_k]


def find_best(scores, n):
    """Indices of the n highest scores, and of all others that equal the lowest of these.

    Example: of the scores 0.5, 0.9, 0.5 and n = 2, all three. topk() alone might leave out the first 0.5, which ranks
    before the other, and may suppress it. The indices are in ascending order, which nms() keeps for equal scores.
    """
    lowest = scores.topk(n).values[-1]
    return (scores >= lowest).nonzero()[:, 0]


def suppress_in_each_class(boxes_xy, labels, scores, max_overlap):
    """Indices of the boxes that survive, by falling score; of equal scores the first box comes first.

    torchvision's nms() knows no classes. So boxes of different classes are moved apart, where they do not overlap, and
    one call serves all classes. In float64 the moved boxes keep their precision. (nms() wants scores of the same type.)
    """
    if len(boxes_xy) == 0:
        return torch.empty(0, dtype=torch.int64, device=boxes_xy.device)
    boxes_xy = boxes_xy.double()
    distance = boxes_xy.max() - boxes_xy.min() + 1  # so far apart, boxes of different classes cannot overlap
    moved_xy = boxes_xy + (labels * distance)[:, None]
    return nms(moved_xy, scores.double(), max_overlap)


def hide_classes(predicted_scores, hidden):
    """Count some classes as background: those that nobody wants to see, or that a data set does not have.

    This is done to the scores, before suppression, so that what is hidden takes no place among the top_k.
    predicted_scores: (N, P, C) float tensor, before the softmax. hidden: list of labels, without 0.
    Returns such a tensor: hidden classes have no probability, the background has its own and theirs, the others keep
    theirs.
    Example: with class 2 hidden, scores (0, 1, 2) become (2.13, 1, -inf), so the probabilities (0.09, 0.24, 0.67)
    become (0.76, 0.24, 0).
    """
    if not hidden:
        return predicted_scores
    result = predicted_scores.float().clone()
    # Softmax divides each exp(score) by their sum. Here exp(new score) = exp(background's) + exp(each hidden one's), so
    # the sum stays the same, and with it the probability of every other class.
    result[:, :, 0] = result[:, :, [0, *hidden]].logsumexp(dim=2)
    result[:, :, hidden] = -torch.inf
    return result


# --- The loss -------------------------------------------------------------------------------------

BACKGROUND = -1  # the object of a prior that has none
CROSSED_OUT = -1.0  # in the table of overlaps: lower than any overlap


def match_priors(boxes_xy, priors_xy, threshold):
    """Decide for every prior of an image which object it has to predict, if any.

    boxes_xy: (M, 4), priors_xy: (P, 4) float32 tensors on the CPU, boundary form, fractional. threshold: see step 2.
    Returns (P,) int64: the number of each prior's object, or BACKGROUND. Every object gets a prior of its own.
    Raises ValueError if there are more objects than priors.
    Source: the paper, section 2.2; step 1 as in the Caffe code's `MatchBBox()`.
    """
    n_objects = len(boxes_xy)
    n_priors = len(priors_xy)
    matched = torch.full((n_priors,), BACKGROUND)
    if n_objects == 0:
        return matched
    if n_objects > n_priors:
        raise ValueError(f"an image has {n_objects} objects, but there are {n_priors} priors to predict them")
    overlap = find_jaccard_overlap(boxes_xy, priors_xy)  # (M, P): a table, one row per object, one column per prior

    # Step 1. Take the highest number of the table: its object owns its prior from now on. Cross out the row and the
    # column, and repeat until every object has its prior.
    for object_number, prior in take_pairs(overlap):
        matched[prior] = object_number

    # Step 2. Every other prior takes the object that it overlaps most, if that overlap reaches the threshold.
    best_overlap, best_object = overlap.max(dim=0)  # (P,) each
    takes_best = (matched == BACKGROUND) & (best_overlap >= threshold)  # (P,)
    return torch.where(takes_best, best_object, matched)


def take_pairs(table):
    """The highest number of a table, then the highest in other rows and columns, and so on, until all rows are taken.

    table: (M, P) float tensor on the CPU, without negative numbers, M <= P. It is not changed.
    Returns M pairs (row, column), in this order. Of equal numbers the first comes first, row by row.
    """
    # The loop in the README searches the whole table at every turn. This one remembers the highest number of each row,
    # and gives the same pairs; with 300 objects it is four times as fast. (It is in NumPy, whose argmax() is faster
    # on a CPU than PyTorch's.)
    table = table.numpy().copy()
    best_columns = table.argmax(axis=1)  # (M,): where each row has its highest number
    highest = table.max(axis=1)  # (M,): and this number
    pairs = []
    for _ in range(len(table)):
        row = int(highest.argmax())
        column = int(best_columns[row])
        pairs.append((row, column))
        table[row, :] = CROSSED_OUT
        table[:, column] = CROSSED_OUT
        # Crossing out only lowers numbers. So a row keeps its highest number, unless that was in this column. Such rows
        # are searched again, also the one just taken, which from now on has nothing higher than CROSSED_OUT.
        for changed in np.flatnonzero(best_columns == column):
            best_columns[changed] = table[changed].argmax()
            highest[changed] = table[changed, best_columns[changed]]
    return pairs


def mine_hard_negatives(conf_losses, is_positive, n_negatives):
    """The losses of the hardest negatives of each image: those whose background loss is highest.

    conf_losses: (N, P) float32, of each prior. is_positive: (N, P) bool. n_negatives: (N, 1), how many to take of each
    image. Returns (N, P): the losses of the negatives taken, the highest first, then zeros.
    Source: the paper, section 2.2, "hard negative mining".
    """
    negative_losses = conf_losses.masked_fill(is_positive, 0.0)  # set the positives aside
    sorted_losses = negative_losses.sort(dim=1, descending=True).values  # (N, P)
    rank = torch.arange(conf_losses.shape[1], device=conf_losses.device)  # (P,): 0, 1, 2, ...
    return torch.where(rank < n_negatives, sorted_losses, 0.0)  # the first n


class MultiBoxLoss(nn.Module):
    """The loss of SSD: how far the positive priors' boxes are off, and how wrong the class scores are.

    priors_cxcy: (P, 4). threshold: the overlap of step 2 of `match_priors()`.
    neg_pos_ratio: hardest negatives for each positive of an image. alpha: weight of the localisation loss.
    n_negatives_without_objects: hardest negatives in an image without objects. The paper has none (0).
    After a call, `conf_loss` and `loc_loss` hold the two parts of the loss, detached: loss = conf + alpha * loc.
    Source: the paper, section 2.2, equations 1-3. As there, offsets are summed over the four coordinates.
    """

    def __init__(self, priors_cxcy, threshold=0.5, neg_pos_ratio=3, alpha=1.0, n_negatives_without_objects=0):
        super().__init__()
        # Priors and objects are matched on the CPU, where a data loader leaves the objects: in match_priors()'s loop,
        # Python would have to wait for a GPU's answer at each turn. (Meanwhile a GPU goes on with the network.)
        self.priors_cxcy = priors_cxcy.cpu()
        self.priors_xy = cxcy_to_xy(self.priors_cxcy)
        self.threshold = threshold
        self.neg_pos_ratio = neg_pos_ratio
        self.alpha = alpha
        self.n_negatives_without_objects = n_negatives_without_objects

    def forward(self, predicted_locs, predicted_scores, boxes, labels):
        """The loss of a batch, a float32 scalar.

        predicted_locs: (N, P, 4), gcxgcy form; predicted_scores: (N, P, C), before the softmax; any float type.
        boxes: list of N tensors (n_objects, 4) float32, boundary form, fractional, of positive area.
        labels: list of N tensors (n_objects,) int64 in [1, C). Both lists on the CPU, or they are copied there.
        Raises ValueError, saying which image it is, for objects that are not so.
        """
        check_objects(boxes, labels, n_classes=predicted_scores.shape[-1])
        # What the network should have said: the label of each prior, (N, P); which of the N * P priors have an object,
        # (T,); and the offsets of these objects, (T, 4).
        true_labels, positive_indices, true_locs = self.make_targets(boxes, labels)  # on the CPU
        n_positives = (true_labels > 0).sum(dim=1, keepdim=True)  # (N, 1)
        n_negatives = (self.neg_pos_ratio * n_positives).ceil()  # (N, 1), rounded up if the ratio is a fraction
        n_negatives[n_positives == 0] = self.n_negatives_without_objects

        device = predicted_locs.device
        divisor = self.compute_divisor(n_positives, device)
        true_labels = copy_to(device, true_labels)
        positive_indices = copy_to(device, positive_indices)
        true_locs = copy_to(device, true_locs)
        n_negatives = copy_to(device, n_negatives)
        with torch.autocast(device.type, enabled=False):  # sums of thousands of numbers need float32
            # Localisation: smooth L1, of the positive priors only.
            all_locs = predicted_locs.flatten(0, 1)  # (N * P, 4)
            positive_locs = all_locs[positive_indices].float()  # (T, 4)
            loc_loss = F.smooth_l1_loss(positive_locs, true_locs, reduction="sum") / divisor

            # Confidence: cross entropy, of the positives and the hardest negatives.
            scores = predicted_scores.flatten(0, 1).float()  # (N * P, C)
            conf_losses = F.cross_entropy(scores, true_labels.flatten(), reduction="none").view_as(true_labels)
            is_positive = true_labels > 0  # (N, P)
            positive_losses = torch.where(is_positive, conf_losses, 0.0)  # (N, P)
            negative_losses = mine_hard_negatives(conf_losses, is_positive, n_negatives)  # (N, P)
            conf_loss = (positive_losses.sum() + negative_losses.sum()) / divisor

        self.loc_loss = loc_loss.detach()
        self.conf_loss = conf_loss.detach()
        return conf_loss + self.alpha * loc_loss

    def make_targets(self, boxes, labels):
        """What the network should have said, on the CPU.

        Returns true_labels, (N, P) int64, 0 for background; positive_indices, (T,) int64, which of the N * P priors of
        a batch have an object, image by image; and true_locs, (T, 4) float32, the offsets of these objects.
        """
        n_priors = len(self.priors_cxcy)
        true_labels = torch.zeros(len(boxes), n_priors, dtype=torch.int64)
        positive_indices = []
        true_locs = []
        for i, (boxes_xy, image_labels) in enumerate(zip(boxes, labels, strict=True)):
            boxes_xy = boxes_xy.cpu().float()
            matched = match_priors(boxes_xy, self.priors_xy, self.threshold)  # (P,)
            positives = (matched != BACKGROUND).nonzero()[:, 0]  # numbers of the priors that have an object
            objects = matched[positives]  # and which one
            true_labels[i, positives] = image_labels.cpu()[objects]
            positive_indices.append(i * n_priors + positives)
            boxes_cxcy = xy_to_cxcy(boxes_xy[objects])
            true_locs.append(cxcy_to_gcxgcy(boxes_cxcy, self.priors_cxcy[positives]))
        return true_labels, torch.cat(positive_indices), torch.cat(true_locs)

    def compute_divisor(self, n_positives, device):
        """What the loss of a batch is divided by, a float32 scalar: the number of positives, at least 1.

        n_positives: (N, 1) int64, of each image, on the CPU.
        With n_negatives_without_objects (0 by default), a batch may have, for example, 60 negatives of images without
        objects and only 5 positives. Divided by 5, its loss would outweigh those of other batches. So the divisor is at
        least the number of these negatives divided by the ratio: max(5, 60 / 3) = 20.
        """
        # On several GPUs, each has a process of its own, with its share of the batch. All positives of the batch count.
        divisor = sum_over_processes(copy_to(device, n_positives.sum().float()))
        if self.n_negatives_without_objects > 0:
            n_empty_images = (n_positives == 0).sum()  # those without objects
            n_of_each = min(self.n_negatives_without_objects, len(self.priors_cxcy))  # no more than there are priors
            n_extra_negatives = sum_over_processes(copy_to(device, (n_empty_images * n_of_each).float()))
            ratio = self.neg_pos_ratio if self.neg_pos_ratio > 0 else 1  # one cannot divide by 0
            divisor = torch.maximum(divisor, n_extra_negatives / ratio)
        # DistributedDataParallel takes the mean of the processes' gradients. Say 2 processes have the sums of losses a
        # and b, and 10 positives together. We want (a + b) / 10, so each divides by 10 / 2 = 5: the mean of a / 5 and
        # b / 5 is (a + b) / 10.
        return divisor.clamp(min=1) / count_processes()


def check_objects(boxes, labels, n_classes):
    """ValueError for objects of a batch that would make the loss infinite, NaN, or wrong without a sign of it.

    boxes, labels: lists of N tensors, as the loss takes them.
    """
    for i, (boxes_xy, image_labels) in enumerate(zip(boxes, labels, strict=True)):
        n_objects = len(image_labels)
        if boxes_xy.shape != (n_objects, 4) or image_labels.shape != (n_objects,) or image_labels.dtype != torch.int64:
            shapes = f"{tuple(boxes_xy.shape)} and {tuple(image_labels.shape)} {image_labels.dtype}"
            raise ValueError(f"image {i} of the batch: boxes and labels are {shapes}, not (n, 4) and (n,) torch.int64")
        if not ((image_labels > 0) & (image_labels < n_classes)).all():
            known = f"they go from 1 to {n_classes - 1}; 0 is the background"
            raise ValueError(f"image {i} of the batch: its labels are {image_labels.tolist()}, but {known}")
        sizes = boxes_xy[:, 2:] - boxes_xy[:, :2]  # (n, 2)
        has_area = ((sizes > 0) & sizes.isfinite()).all(dim=1)  # (n,); False for NaN
        if not has_area.all():
            raise ValueError(f"image {i} of the batch: the box {boxes_xy[~has_area][0].tolist()} has no finite area")


def count_processes():
    """How many processes share each batch: 1, or as many as torchrun started."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_distributed else 1


def sum_over_processes(count):
    """The sum of a float32 scalar over all processes."""
    if count_processes() > 1:
        torch.distributed.all_reduce(count)  # replaces it by the sum
    return count


def copy_to(device, tensor):
    """A tensor of the CPU, copied to a device; for CUDA without waiting until that is done.

    If Python does not wait, the tensor may be gone, and its memory in use for another one, before it is copied. PyTorch
    prevents that for pinned memory: it gives it to no other tensor before the copy is done.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# --- What is read from files: pretrained bases, checkpoints ---------------------------------------


def load_pretrained(model, weights):
    """Start the base from a network that was trained to classify ImageNet; take over its mean and std.

    weights: a name of torchvision's weights, such as "IMAGENET1K_V1"; or a file, a state dict as torchvision names it
    (of VGG-16, `features.*` are enough).
    Raises ValueError, FileNotFoundError or ConnectionError, naming the file or URL and the way out.
    """
    architecture = model.architecture
    if architecture.divisor != 1:
        raise ValueError(f"{model.network} has no pretrained weights; --pretrained= starts from random ones")
    _, torchvision_weights = BASES[architecture.base]
    has_weights = torchvision_weights is not None  # a base of your own may have none
    known_weights = torchvision_weights.__members__ if has_weights else {}  # an enum: name -> where to download it
    state = utils.read_state_dict(weights, known_weights)
    # IMAGENET1K_FEATURES are Caffe's weights, which have a mean and std of their own. They are without the fully
    # connected layers, such as classifier.0, in whose place torchvision has put NaN. So NaN there marks such a file.
    is_caffe = weights == "IMAGENET1K_FEATURES"
    if "classifier.0.bias" in state and state["classifier.0.bias"].isnan().any():
        is_caffe = True
    mean = CAFFE_MEAN if is_caffe else IMAGENET_MEAN
    std = CAFFE_STD if is_caffe else IMAGENET_STD
    try:
        if isinstance(model.base, VGGBase):
            entries = vgg16_entries(model.base, state)
        else:  # torchvision's own names, without the layers that our base leaves out
            own_names = model.base.state_dict().keys()
            entries = {name: tensor for name, tensor in state.items() if name in own_names}
        set_mean_and_std(model, mean, std)
        fit_tail(model, entries)  # SSDLite alone: rebuilds the model, since ImageNet's weights have more channels in c5
        utils.check_finite(entries)
        model.base.load_state_dict(entries)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{weights}: not weights of {architecture.base}: {printable(error)}") from error


def vgg16_entries(base, state):
    """The state dict for our base, made of a VGG-16's: its layers under our names, and fc6 and fc7 as conv6 and conv7.

    Where fc6 and fc7 are missing, conv6 and conv7 of our base get new random weights.
    """
    # torchvision numbers all layers: features.0 is our conv1_1, features.1 a ReLU, features.2 conv1_2.
    number = 0
    entries = {}
    for block, widths in enumerate(VGG_BLOCKS, start=1):
        for i in range(1, len(widths) + 1):
            name = f"conv{block}_{i}"
            entries.update(rename_layer(state, f"features.{number}", name))
            number += 1
            if base.conv1_1.norm is not None:
                entries.update(rename_layer(state, f"features.{number}", f"{name}.norm"))
                number += 1
            number += 1  # ReLU
        number += 1  # pooling

    has_fc = has_usable_fc_layers(state)
    if not has_fc:
        init_convolutions(base.conv6)  # in place; as all layers that SSD adds to VGG
        init_convolutions(base.conv7)
    # load_state_dict() wants an entry for every name. So take conv6 and conv7 as they are in our base, perhaps with
    # batch normalisation, which fc6 and fc7 do not have.
    for layer in ("conv6", "conv7"):
        entries.update(rename_layer(base.state_dict(), layer, layer))  # the same name: this only picks them out
    if has_fc:
        entries.update(entries_from_fc_layers(state))
    return entries


def rename_layer(state, old_name, new_name):
    """The entries of one layer in a state dict, such as features.2.weight and features.2.bias, under another name."""
    start = f"{old_name}."
    return {
        f"{new_name}.{name.removeprefix(start)}": tensor for name, tensor in state.items() if name.startswith(start)
    }


FC_ENTRIES = ("classifier.0.weight", "classifier.0.bias", "classifier.3.weight", "classifier.3.bias")  # fc6 and fc7


def has_usable_fc_layers(state):
    """Whether a VGG-16's state dict has fc6 and fc7. (torchvision's file of Caffe's weights has NaN in their place.)"""
    return all(name in state and bool(state[name].isfinite().all()) for name in FC_ENTRIES)


def entries_from_fc_layers(state):
    """conv6 and conv7 from fc6 and fc7: a fully connected layer is a convolution that covers its whole input.

    4096 channels and 7 x 7 numbers would be slow. So every fourth channel and every third row and column are kept.
    """
    fc6_weight = state["classifier.0.weight"].view(4096, 512, 7, 7)
    fc7_weight = state["classifier.3.weight"].view(4096, 4096, 1, 1)
    return {
        "conv6.weight": decimate(fc6_weight, steps=(4, None, 3, 3)),  # (1024, 512, 3, 3)
        "conv6.bias": decimate(state["classifier.0.bias"], steps=(4,)),
        "conv7.weight": decimate(fc7_weight, steps=(4, 4, None, None)),  # (1024, 1024, 1, 1)
        "conv7.bias": decimate(state["classifier.3.bias"], steps=(4,)),
    }


def decimate(tensor, steps):
    """Keep every `step`-th entry along each dimension, from the first on; None: all (the paper, section 3)."""
    return tensor[tuple(slice(None, None, step) for step in steps)]


def set_mean_and_std(model, mean, std):
    """Take over the mean and standard deviation of the input that belong to weights; ValueError for a wrong std."""
    if not all(0 < value < math.inf for value in std):
        raise ValueError(f"its std is {std}; the input is divided by it, so it must be more than 0")
    model.mean.copy_(torch.tensor(mean).view_as(model.mean))
    model.std.copy_(torch.tensor(std).view_as(model.std))


def fit_tail(model, entries):
    """Rebuild an SSDLite with as many channels in c5 as weights have: 960 in ImageNet's, 480 in torchvision's detector.

    entries: the weights, ImageNet's for the base or a checkpoint's for the whole model.
    """
    if not model.architecture.is_lite:
        return
    for name in ("features.16.0.weight", "base.features.16.0.weight"):  # the convolution that makes c5
        if name in entries:
            c4, c5, *others = model.architecture.sources
            n_channels = entries[name].shape[0]
            c5 = c5._replace(channels=n_channels)
            model.build(model.architecture._replace(sources=(c4, c5, *others)))


def model_state(model):
    """What a checkpoint needs to rebuild a model with a label map; its tensors are the model's own, not copies."""
    return {
        "model": model.state_dict(),
        "network": model.network,
        "label_map": model.label_map,
        "priors_cxcy": model.priors_cxcy,
        "mean": model.mean.flatten().tolist(),
        "std": model.std.flatten().tolist(),
        "max_size_offset": model.max_size_offset,
        "antialias": model.antialias,
    }


@torch.no_grad()
def model_from_checkpoint(saved, name, label_map=None):
    """Rebuild a model on the CPU from what `load_checkpoint()` returned.

    name: the checkpoint's file, for errors. label_map: None keeps the classes; for others see `change_classes()`.
    Raises ValueError, naming the file and what is wrong with it.
    """
    try:
        state = saved["model"]
        saved_label_map = saved["label_map"]
        check_number_of_classes(state, len(saved_label_map))
        utils.check_label_map(saved_label_map)
        model = SSD300(len(saved_label_map), saved.get("network", "ssd300_vgg16"))
        set_mean_and_std(model, saved["mean"], saved["std"])
        fit_tail(model, state)  # SSDLite alone: rebuilds the model if the weights have more channels in c5
        model.load_state_dict(state)
        model.priors_cxcy.copy_(saved["priors_cxcy"])  # weights of other projects have priors of their own
        utils.check_finite({**state, "priors_cxcy": model.priors_cxcy, "mean": model.mean})
        model.max_size_offset = saved.get("max_size_offset")
        model.antialias = saved.get("antialias", True)
        model.label_map = saved_label_map
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: a checkpoint that does not fit: {printable(error)}") from error
    if label_map is not None and label_map != saved_label_map:
        model.change_classes(label_map)
    return model


def check_number_of_classes(state, n_classes):
    """ValueError if a state dict's class heads cannot be for so many classes.

    A damaged label map may claim a million classes, and a model for them would fill the memory. The last head has
    n_priors * C outputs, 84 for 4 priors and 21 classes. If n_classes divides 84, it is at most 84. So the model that
    is built next is small, even if the number is wrong. (Then load_state_dict() refuses the weights.)
    """
    biases = [tensor for name, tensor in state.items() if name.startswith("pred_convs.cl_") and name.endswith("bias")]
    n_scores = biases[-1].numel()  # of the last head's last layer: n_priors * C
    if n_classes < 2 or n_scores % n_classes != 0:
        raise ValueError(f"its label map has {n_classes} classes, its weights are for another number")


def load_model(path, device="cpu"):
    """Read a model, with its label map, from a checkpoint to a device, for detection and evaluation.

    Its batch normalisation is fused, so it can be neither trained nor saved. (See `model_from_checkpoint()` for that.)
    Raises FileNotFoundError or ValueError, naming the file.
    """
    model = model_from_checkpoint(utils.load_checkpoint(path), path).eval()
    device = torch.device(device)
    model = model.to(device, memory_format=utils.fastest_memory_format(device, model))  # channels first or last
    fuse_batch_norm(model)
    return model


@torch.no_grad()
def fuse_batch_norm(model):
    """Put batch normalisation into the weights of the convolutions before it, in place: detection becomes faster.

    In evaluation mode it multiplies each channel by a fixed number and adds another one. The convolution can do that
    itself, with its weights and bias changed. (`fuse_conv_bn_eval()` returns such a new convolution.)
    model: any nn.Module in evaluation mode.
    """
    for module in list(model.modules()):
        if isinstance(module, Convolution) and module.norm is not None:  # our own layers
            fused = fuse_conv_bn_eval(module, module.norm)
            module.weight = fused.weight
            module.bias = fused.bias
            module.norm = None
        # torchvision's layers: conv1 is followed by bn1, and so on. The new convolution takes conv1's place; bn1 would
        # still be called, so an Identity, which changes nothing, takes its place.
        children = list(module.named_children())
        for (name, layer), (next_name, next_layer) in pairwise(children):
            if isinstance(layer, nn.Conv2d) and isinstance(next_layer, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(layer, next_layer))
                setattr(module, next_name, nn.Identity())
