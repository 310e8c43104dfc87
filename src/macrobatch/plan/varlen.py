"""Several samples in one row, end to end, each seeing only itself: no token is padding.

Shape letters: S samples (documents), T tokens of all of them, H heads, D channels per head.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from macrobatch.errors import ArgumentError, BatchError

__all__ = ["Packer", "flash_arguments", "packed_attention"]

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Packer:
    """A collate function that puts samples into one row and says where each begins.

    A sample is a sequence of token ids, or a mapping with "input_ids" and perhaps "labels" of the same length; without
    them, the ids are the labels. The first label of each sample becomes `ignore_index`, since the token before it
    belongs to another sample: a shifted loss (`cross_entropy(..., shift=True)`) then has the sum and the count of the
    samples one by one.

    A micro-batch is a dictionary; its tensors have one row:

    | key | shape | |
    |---|---|---|
    | input_ids, labels | (1, T) int64 | end to end |
    | position_ids | (1, T) int64 | begins at 0 in every sample |
    | cu_seqlens | (1, S + 1) int32 | where samples begin in the row, and T: as attention kernels take it |
    | max_seqlen | int | the longest sample |

    One row stands for many samples, so a loss that is a mean does not say over how many: return `Loss(total, weight)`,
    as `macrobatch.cross_entropy` does.

    Args:
        ignore_index: the label that counts nothing.

    Raises:
        BatchError: when called: no sample, an empty one, or labels of another length.

    ```pycon
    >>> packed = Packer()([[5, 6, 7], [8]])
    >>> packed["input_ids"].tolist(), packed["position_ids"].tolist(), packed["labels"].tolist()
    ([[5, 6, 7, 8]], [[0, 1, 2, 0]], [[-100, 6, 7, -100]])
    >>> packed["cu_seqlens"].tolist(), packed["max_seqlen"]
    ([[0, 3, 4]], 3)

    ```
    """

    ignore_index: int = -100

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """The micro-batch of some samples, in their order."""
        ids = [_tokens(sample, "input_ids", at) for at, sample in enumerate(samples)]
        labels = [
            _tokens(sample, "labels", at) if isinstance(sample, Mapping) and "labels" in sample else ids[at]
            for at, sample in enumerate(samples)
        ]
        if not ids or any(len(one) == 0 or len(one) != len(other) for one, other in zip(ids, labels, strict=True)):
            raise BatchError(
                "samples to pack",
                given=f"input_ids of {[*map(len, ids)]!s:.60} and labels of {[*map(len, labels)]!s:.60} tokens",
                expected="at least one sample, none of them empty, with a label for each token",
                fix="leave empty samples out, and mark what is not to be learnt by ignore_index",
            )
        lengths_S = torch.tensor([len(sample) for sample in ids])
        begins = torch.cat([lengths_S.new_zeros(1), lengths_S.cumsum(0)])
        labels_T = torch.cat(labels).index_fill(0, begins[:-1], self.ignore_index)
        positions_T = torch.arange(len(labels_T)) - begins[:-1].repeat_interleave(lengths_S)
        return {
            "input_ids": torch.cat(ids)[None],
            "position_ids": positions_T[None],
            "labels": labels_T[None],
            "cu_seqlens": begins.to(torch.int32)[None],
            "max_seqlen": int(lengths_S.max()),
        }


def packed_attention(
    query_THD: Tensor, key_THD: Tensor, value_THD: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, causal: bool = True
) -> Tensor:
    """Attention within each sample of a packed row.

    On CUDA in 16 bits by `torch.nn.attention.varlen`, in time and memory that grow with the samples' own lengths;
    elsewhere by a block-diagonal mask of (T, T), to the same numbers.

    Args:
        query_THD: (T, H, D); keys and values may have fewer heads, by which H is divisible.
        cu_seqlens: (S + 1) or (1, S + 1) int32, where samples begin, and T.
        max_seqlen: the longest sample, or more.
        causal: whether a token sees those before it in its sample and itself, or all of its sample.

    Returns:
        (T, H, D).

    Source:
        https://docs.pytorch.org/docs/stable/nn.attention.varlen.html

    ```pycon
    >>> q = k = v = torch.ones(4, 1, 2)
    >>> packed_attention(q, k, v, torch.tensor([0, 3, 4]), 3).shape
    torch.Size([4, 1, 2])

    ```
    """
    bounds = cu_seqlens.flatten()
    shares_heads = query_THD.shape[1] != key_THD.shape[1]
    if query_THD.is_cuda and query_THD.dtype in _HALF:
        from torch.nn.attention.varlen import varlen_attn

        window = (-1, 0) if causal else (-1, -1)
        options: dict[str, Any] = {}
        if shares_heads and _knows_gqa():
            options["enable_gqa"] = True
        elif shares_heads:
            num_sharing = query_THD.shape[1] // key_THD.shape[1]
            key_THD, value_THD = (part.repeat_interleave(num_sharing, dim=1) for part in (key_THD, value_THD))
        mixed: Any = varlen_attn(
            query_THD, key_THD, value_THD, bounds, bounds, max_seqlen, max_seqlen, window_size=window, **options
        )
        return mixed
    sample_T = torch.searchsorted(bounds[1:], torch.arange(len(query_THD), device=bounds.device), right=True)
    sees_TT = sample_T[:, None] == sample_T
    if causal:
        sees_TT = sees_TT.tril()
    q_HTD, k_HTD, v_HTD = (part.transpose(0, 1) for part in (query_THD, key_THD, value_THD))
    mixed_HTD = F.scaled_dot_product_attention(q_HTD, k_HTD, v_HTD, attn_mask=sees_TT, enable_gqa=shares_heads)
    return mixed_HTD.transpose(0, 1)


@cache
def _knows_gqa() -> bool:
    """Whether torch's kernel (2.12 and later) shares heads by itself."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def flash_arguments(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model of the library transformers takes of a packed micro-batch: all but its labels.

    Under attn_implementation="sdpa" and "eager" the model finds the samples by the positions that begin anew, but only
    with `use_cache=False`, which is among the arguments: with a cache it takes the row for one sample, in silence.
    Under flash attention it uses the boundaries, without waiting for the device to read the positions.

    Source:
        https://huggingface.co/docs/transformers/main_classes/data_collator, DataCollatorWithFlattening

    ```pycon
    >>> sorted(flash_arguments(Packer()([[5, 6, 7], [8]])))
    ['cu_seq_lens_k', 'cu_seq_lens_q', 'input_ids', 'max_length_k', 'max_length_q', 'position_ids', 'use_cache']

    ```
    """
    missing = {"input_ids", "position_ids", "cu_seqlens", "max_seqlen"} - batch.keys()
    if missing:
        raise ArgumentError(
            "batch", given=f"one without {sorted(missing)}", expected="what Packer() made", fix="collate with Packer()"
        )
    bounds = batch["cu_seqlens"][0]
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": batch["max_seqlen"],
        "max_length_k": batch["max_seqlen"],
        "use_cache": False,
    }


def _tokens(sample: Any, key: str, at: int) -> Tensor:
    """(length,) int64: what a sample has under a key, or the sample itself."""
    values = sample.get(key) if isinstance(sample, Mapping) else sample
    try:
        tokens = torch.as_tensor(np.asarray(values) if not isinstance(values, Tensor) else values)
    except (TypeError, ValueError):
        tokens = torch.empty(0, 0)
    if tokens.ndim != 1 or (len(tokens) and (tokens.is_floating_point() or tokens.dtype == torch.bool)):
        raise BatchError(
            f"sample {at}",
            given=f"{values!r:.60} for {key}",
            expected="a flat sequence of token ids",
            fix='yield a list of integers, a 1-d tensor, or {"input_ids": ...}',
        )
    return tokens.to(torch.int64)
