"""Run a script of the repo with a small network in place of VGG-16: `python tests/standin.py train.py --name=value`.

The stand-in has SSD300's interface, priors and shapes, and takes milliseconds: for tests of all that is not
the network itself (resuming, signals, several processes, soaking).
"""

import os
import runpy
import sys
from pathlib import Path

import torch.nn.functional as F
from torch import nn

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import model  # noqa: E402


class SmallBase(nn.Module):
    """One convolution on a 38 x 38 image, in place of VGG-16."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, kernel_size=3, padding=1)

    def forward(self, images):
        x = F.relu(self.conv(F.adaptive_avg_pool2d(images, 38)))
        return x, F.adaptive_avg_pool2d(x, 19)


class SmallAuxiliary(nn.Module):
    """Pooling down to the grids of the auxiliary convolutions."""

    def forward(self, conv7):
        return tuple(F.adaptive_avg_pool2d(conv7, source.grid) for source in model.SOURCE_MAPS[2:])


def shrink_network():
    """Replace the parts of SSD300 by small ones, of 8 channels a source map."""
    model.SOURCE_MAPS = tuple(source._replace(channels=8) for source in model.SOURCE_MAPS)
    model.VGGBase, model.AuxiliaryConvolutions = SmallBase, SmallAuxiliary
    l2_normalize = model.l2_normalize

    def scale(features):
        return l2_normalize(features) * 20

    model.l2_normalize = scale
    original = model.SSD300.__init__

    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.rescale_factors = nn.Parameter(self.rescale_factors[:, :8].clone() / 20)

    model.SSD300.__init__ = __init__


if __name__ == "__main__":
    shrink_network()
    if "STANDIN_BF16" in os.environ:  # train as on a machine whose CPU has units for it: slow here, but it runs
        model.has_bf16_units = lambda device: True
    del sys.argv[0]
    runpy.run_path(str(REPO / sys.argv[0]), run_name="__main__")
