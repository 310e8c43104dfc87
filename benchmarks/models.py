"""Models that several benchmarks train.

Shape letters: B samples, T time, C channels, H heads, D channels per head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GPT", "ResNet", "TinyViT", "gpt_1b", "gpt_124m", "gpt_tiny", "mlp", "mlp_tiny"]

VOCABULARY = 50304
LENGTH = 1024


class Block(nn.Module):
    """Attention and a perceptron, each normed before it and added after it."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        q_BHTD, k_BHTD, v_BHTD = (
            part_BTC.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part_BTC in self.qkv(self.norm1(x_BTC)).chunk(3, dim=-1)
        )
        mixed_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        x_BTC = x_BTC + self.out(mixed_BHTD.transpose(1, 2).flatten(2))
        return x_BTC + self.down(F.gelu(self.up(self.norm2(x_BTC))))


class GPT(nn.Module):
    """A GPT-2 without dropout, its input and output embeddings not tied.

    Called with ids of shape (B, T + 1), it returns the mean loss of predicting each from those before it.
    """

    def __init__(self, width: int, num_heads: int, num_layers: int, *, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, num_heads) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for param in self.parameters():
            if param.ndim > 1:
                nn.init.normal_(param, std=0.02)

    def forward(self, ids_BT: Tensor) -> Tensor:
        inputs_BT, labels_BT = ids_BT[:, :-1], ids_BT[:, 1:]
        x_BTC = self.embed(inputs_BT) + self.position(torch.arange(inputs_BT.shape[1], device=ids_BT.device))
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits_BTV = self.head(self.norm(x_BTC))
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten())

    def shard_units(self) -> list[list[nn.Module]]:
        """What is gathered at once under FSDP2, in torchtitan's cut; the last unit is used last in the forward."""
        return [[self.embed], *([block] for block in self.blocks), [self.norm, self.head]]

    def get_input_embeddings(self) -> nn.Module:
        """For Accelerate, which then cuts like `shard_units`."""
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        """For Accelerate, which then cuts like `shard_units`."""
        return self.head


def gpt_124m() -> GPT:
    """GPT-2's smallest: 124 M parameters, and 39 M more because its embeddings are not tied."""
    return GPT(768, 12, 12, vocabulary=VOCABULARY, length=LENGTH)


def gpt_1b() -> GPT:
    """A GPT of 1.2 B parameters, 0.1 B of them in each embedding."""
    return GPT(2048, 16, 20, vocabulary=VOCABULARY, length=LENGTH)


def gpt_tiny() -> GPT:
    """A GPT that shows that a script runs, and nothing else."""
    return GPT(32, 2, 2, vocabulary=97, length=16)


def mlp_tiny() -> nn.Sequential:
    """So little work that hardly anything but overhead is left: 16 features, 4 classes."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


class Residual(nn.Module):
    """ResNet's basic block."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_in, num_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(num_out),
            nn.ReLU(),
            nn.Conv2d(num_out, num_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(num_out),
        )
        same = stride == 1 and num_in == num_out
        self.shortcut: nn.Module = nn.Identity()
        if not same:
            self.shortcut = nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride, bias=False), nn.BatchNorm2d(num_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Sequential):
    """A ResNet-18 for images of 32 x 32, if it has four widths. Its batch normalisation sees micro-batches."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        before = widths[0]
        layers: list[nn.Module] = [nn.Conv2d(3, before, 3, 1, 1, bias=False), nn.BatchNorm2d(before), nn.ReLU()]
        for width in widths:
            layers += [Residual(before, width, 1 if width == widths[0] else 2), Residual(width, width, 1)]
            before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


class TinyViT(nn.Module):
    """Blocks over the 64 patches of an image of 32 x 32."""

    def __init__(self, width: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.patches = nn.Linear(48, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(num_layers)))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(images.view(-1, 64, 48))).mean(1))


def mlp(width: int) -> nn.Sequential:
    """A perceptron over images of 3 x 32 x 32."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
