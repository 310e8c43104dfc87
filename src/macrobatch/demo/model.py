"""A small residual network whose samples do not see each other.

Shape letters: B samples of a micro-batch, C channels, H height, W width, K classes (10).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DigitResNet"]

_NUM_GROUPS = 8
_NUM_CLASSES = 10


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions beside a shortcut: silu(norm(conv(silu(norm(conv(x))))) + shortcut(x))."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(_NUM_GROUPS, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(_NUM_GROUPS, channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, channels_in, H, W) -> (B, channels_out, H / stride, W / stride)."""
        inner_BCHW = F.silu(self.norm1(self.conv1(images_BCHW)))
        return F.silu(self.norm2(self.conv2(inner_BCHW)) + self.shortcut(images_BCHW))


class DigitResNet(nn.Module):
    """ResNet for 8 × 8 grey images with GroupNorm and SiLU; 77,562 parameters.

    GroupNorm, not BatchNorm: BatchNorm normalises with the mean and variance of the batch that it is given, and that
    is a micro-batch here. Its output, and with it the gradient, would depend on how the macro-batch is cut, whichever
    tool accumulates. GroupNorm looks at one sample at a time.

    SiLU, not ReLU: the derivative of ReLU jumps at 0, so an input within a rounding error of 0 can fall on different
    sides in fp32 and fp64. A comparison with fp64 would then show that kink, and not how gradients were accumulated.

    Args:
        width: channels of the first stage, a multiple of 8.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(_NUM_GROUPS, width)
        self.stages = nn.Sequential(
            ResidualBlock(width, width, stride=1),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 4 * width, stride=1),
        )
        self.head = nn.Linear(4 * width, _NUM_CLASSES)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits, (B, 1, H, W) -> (B, K)."""
        features_BCHW = self.stages(F.silu(self.norm(self.stem(images_BCHW))))
        features_BC = torch.mean(features_BCHW, dim=(2, 3))
        return self.head(features_BC)
