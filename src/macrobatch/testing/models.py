"""Tiny models, one of each kind that accumulation gets wrong somewhere. Each is deterministic in training mode.

Shape letters: B samples, T time, C channels or features, H W image sides, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from macrobatch.losses import cross_entropy

__all__ = ["CASES", "Case"]


class Case(NamedTuple):
    """A model, a macro-batch of a given number of samples, and a loss function for both."""

    model: nn.Module
    batch: Any
    loss_fn: Callable[[Any, Any], Any]


class TiedLM(nn.Module):
    """A bag-of-prefix language model whose input and output embedding is one parameter."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        hidden_BTC = self.embed(ids_BT).cumsum(1)
        return self.head(torch.tanh(self.mix(hidden_BTC)))


class Conditional(nn.Module):
    """Uses one of two branches, by the sign of the first feature of its first sample, and never the third."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 8)
        self.branches = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8, 3)])

    def forward(self, x_BC: Tensor) -> Tensor:
        hidden_BC = torch.tanh(self.trunk(x_BC))
        takes_first_B1 = (x_BC[:, :1] > 0).to(x_BC.dtype)
        output_BC = hidden_BC.new_zeros(len(x_BC), 3)
        for branch, takes_B1 in zip(self.branches, (takes_first_B1, 1 - takes_first_B1), strict=False):
            if bool(takes_B1.any()):
                output_BC = output_BC + takes_B1 * branch(hidden_BC)
        return output_BC


class LowRank(nn.Module):
    """A frozen linear layer with a trainable low-rank addition (LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5)
        self.base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(6, 2) / 3)
        self.up = nn.Parameter(torch.randn(2, 5) / 3)
        self.head = nn.Linear(5, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x_BC: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(x_BC) + x_BC @ self.down @ self.up))


def _classes(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _tokens(model: Any, batch: Mapping[str, Tensor]) -> Any:
    return cross_entropy(model(batch["ids"]), batch["labels"], shift=True)


def mlp(num_samples: int) -> Case:
    """Two layers."""
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    return Case(model, (torch.randn(num_samples, 6), torch.randint(0, 3, (num_samples,))), _classes)


def conv(num_samples: int) -> Case:
    """A convolution with group normalisation, in channels-last memory."""
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    )
    model.append(nn.Linear(32, 3))
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return Case(model, (torch.randn(num_samples, 2, 6, 6), torch.randint(0, 3, (num_samples,))), _classes)


def tied_lm(num_samples: int) -> Case:
    """A language model with tied embeddings on rows of very different lengths; one row has no target at all."""
    ids_BT = torch.randint(1, 11, (num_samples, 9))
    lengths_B = torch.randint(2, 10, (num_samples,))
    lengths_B[-1] = 0
    labels_BT = ids_BT.masked_fill(torch.arange(9) >= lengths_B[:, None], -100)
    return Case(TiedLM(11, 8), {"ids": ids_BT, "labels": labels_BT}, _tokens)


def conditional(num_samples: int) -> Case:
    """Branches that some micro-batches, or all, leave unused."""
    return Case(Conditional(), (torch.randn(num_samples, 6), torch.randint(0, 3, (num_samples,))), _classes)


def lora(num_samples: int) -> Case:
    """Frozen weights with low-rank adapters."""
    return Case(LowRank(), (torch.randn(num_samples, 6), torch.randint(0, 3, (num_samples,))), _classes)


def embedding(num_samples: int) -> Case:
    """An embedding bag, of which most rows get no gradient."""
    model = nn.Sequential(nn.EmbeddingBag(50, 6), nn.Tanh(), nn.Linear(6, 3))
    return Case(model, (torch.randint(0, 50, (num_samples, 4)), torch.randint(0, 3, (num_samples,))), _classes)


CASES: Mapping[str, Callable[[int], Case]] = {
    "mlp": mlp,
    "conv": conv,
    "tied_lm": tied_lm,
    "conditional": conditional,
    "lora": lora,
    "embedding": embedding,
}
