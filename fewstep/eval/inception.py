"""The Inception-v3 of the Frechet inception distance, with the names of its PyTorch port.

Szegedy et al. 2015, https://arxiv.org/abs/1512.00567, as in TensorFlow's graph "inception
2015-12-05", which every published FID was computed with. It differs from the paper's network in
four places that move the distance: pictures are enlarged by TensorFlow 1's bilinear rule (see
`resize`), average pooling leaves the padding out of the average, the last block pools by the
maximum, and there are 1008 logits. 23,850,960 parameters, no auxiliary head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 299
Kernel = int | tuple[int, int]


def resize(x: Tensor, size: int = SIZE) -> Tensor:
    """x: (B, C, H, W) -> (B, C, size, size), by TensorFlow 1's bilinear rule.

    Row i of the result lies at row i H / size of x, without the shift by half a pixel and the
    smoothing that later libraries have; what lies beyond the last row repeats it.
    """
    for dim in (2, 3):
        length = x.shape[dim]
        place = torch.arange(size, dtype=torch.float64) * (length / size)
        low = place.long()
        share = (place - low).to(x.dtype).view(-1, *(1,) * (3 - dim)).to(x.device)
        high = (low + 1).clamp_max(length - 1)
        low, high = low.to(x.device), high.to(x.device)
        x = x.index_select(dim, low).lerp(x.index_select(dim, high), share)
    return x


class Norm(nn.Module):
    """Normalisation by stored statistics, eps 0.001: batch normalisation that never trains."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x: (B, C, H, W) by the stored mean and variance of each channel."""
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(x, mean, var, self.weight, self.bias, eps=1e-3)


class Unit(nn.Module):
    """Convolution without bias, normalisation, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = Norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, inputs, H, W) -> (B, outputs, H', W')."""
        return F.relu(self.bn(self.conv(x)))


def average(x: Tensor) -> Tensor:
    """The mean over 3x3 neighbours; at the border over those that exist."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def greatest(x: Tensor) -> Tensor:
    """The maximum over 3x3 neighbours."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halve(x: Tensor) -> Tensor:
    """The maximum over 3x3 neighbours of every other pixel, no padding."""
    return F.max_pool2d(x, 3, stride=2)


class BlockA(nn.Module):
    """35x35: 1x1, 5x5, two 3x3, and pooling, side by side."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Unit(inputs, 64, 1)
        self.branch5x5_1 = Unit(inputs, 48, 1)
        self.branch5x5_2 = Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Unit(inputs, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, padding=1)
        self.branch_pool = Unit(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenated branches; height and width stay."""
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(average(x))], 1)


class BlockB(nn.Module):
    """35x35 -> 17x17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Unit(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = Unit(inputs, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenated branches, of about half the height and width."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, halve(x)], 1)


class BlockC(nn.Module):
    """17x17: 7x7 as pairs of 1x7 and 7x1, once and twice, `inner` channels wide."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        row: tuple[Kernel, int, Kernel] = (1, 7), 1, (0, 3)  # kernel, stride, padding
        column: tuple[Kernel, int, Kernel] = (7, 1), 1, (3, 0)
        self.branch1x1 = Unit(768, 192, 1)
        self.branch7x7_1 = Unit(768, inner, 1)
        self.branch7x7_2 = Unit(inner, inner, *row)
        self.branch7x7_3 = Unit(inner, 192, *column)
        self.branch7x7dbl_1 = Unit(768, inner, 1)
        self.branch7x7dbl_2 = Unit(inner, inner, *column)
        self.branch7x7dbl_3 = Unit(inner, inner, *row)
        self.branch7x7dbl_4 = Unit(inner, inner, *column)
        self.branch7x7dbl_5 = Unit(inner, 192, *row)
        self.branch_pool = Unit(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenated branches; height and width stay."""
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(average(x))], 1)


class BlockD(nn.Module):
    """17x17 -> 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Unit(768, 192, 1)
        self.branch3x3_2 = Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Unit(768, 192, 1)
        self.branch7x7x3_2 = Unit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Unit(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Unit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenated branches, of about half the height and width."""
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, self.branch7x7x3_4(seven), halve(x)], 1)


class BlockE(nn.Module):
    """8x8: branches that end in a 1x3 and a 3x1 beside each other; `largest` pools by maximum."""

    def __init__(self, inputs: int, largest: bool) -> None:
        super().__init__()
        self.pool = greatest if largest else average
        self.branch1x1 = Unit(inputs, 320, 1)
        self.branch3x3_1 = Unit(inputs, 384, 1)
        self.branch3x3_2a = Unit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Unit(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Unit(inputs, 448, 1)
        self.branch3x3dbl_2 = Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Unit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Unit(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Unit(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenated branches; height and width stay."""
        one = self.branch3x3_1(x)
        two = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [self.branch1x1(x), self.branch3x3_2a(one), self.branch3x3_2b(one)]
        branches += [self.branch3x3dbl_3a(two), self.branch3x3dbl_3b(two)]
        return torch.cat([*branches, self.branch_pool(self.pool(x))], 1)


class InceptionV3(nn.Module):
    """Pictures (B, 3, 299, 299) in [-1, 1] -> pooled features (B, 2048); `logits` from these.

    Sides of the maps: 149, 147, 147, 73, 73, 71, 35 in the stem, then 35 (256, 288, 288
    channels), 17 (768), 8 (1280, 2048, 2048).
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(128)
        self.Mixed_6c = BlockC(160)
        self.Mixed_6d = BlockC(160)
        self.Mixed_6e = BlockC(192)
        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, largest=False)
        self.Mixed_7c = BlockE(2048, largest=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, 299, 299) in [-1, 1] -> pooled features (B, 2048)."""
        x = halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        x = self.Mixed_6e(self.Mixed_6d(x))
        out: Tensor = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        return out

    def logits(self, features: Tensor) -> Tensor:
        """(B, 1008) from features (B, 2048), without the bias: so the inception score has it."""
        return features @ self.fc.weight.T
