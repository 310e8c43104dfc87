"""Cutting a macro-batch by rows and by tokens."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from macrobatch import tree
from macrobatch.errors import ArgumentError, BatchError
from macrobatch.plan.split import Auto, Rows, Tokens, make_split

PAD = 0


def padded(lengths: list[int], *, width: int | None = None) -> dict[str, Tensor]:
    """Rows of the given lengths, padded on the right; every token is another number."""
    width = max([1, *lengths]) if width is None else width
    ids_BT = torch.arange(1, len(lengths) * width + 1).view(len(lengths), width)
    ids_BT = ids_BT.masked_fill(torch.arange(width) >= torch.tensor(lengths)[:, None], PAD)
    return {"ids": ids_BT, "row": torch.arange(len(lengths))}


def count_tokens(batch: Any) -> Tensor:
    return (batch["ids"] != PAD).sum(1)


def cut(batch: Any, width: int) -> Any:
    return batch | {"ids": batch["ids"][:, :width]}


def rows_of(parts: list[tuple[Any, int]]) -> list[int]:
    return [int(row) for part, _ in parts for row in part["row"]]


# --- Rows ---


@settings(deadline=None)
@given(num_rows=st.integers(1, 40), size=st.integers(1, 45))
def test_rows_keep_order_and_take_every_row_once(num_rows, size):
    batch = {"row": torch.arange(num_rows), "x": torch.arange(2 * num_rows).view(num_rows, 2), "t": 0.5}
    parts = Rows(size).split(batch)
    assert rows_of(parts) == list(range(num_rows))
    sizes = [num for _, num in parts]
    assert sizes == [tree.num_rows(part) for part, _ in parts]
    assert all(num == size for num in sizes[:-1])
    assert 1 <= sizes[-1] <= size
    assert torch.equal(torch.cat([part["x"] for part, _ in parts]), batch["x"])


@pytest.mark.parametrize(
    ("num_rows", "size", "expected"), [(6, 2, [2, 2, 2]), (7, 3, [3, 3, 1]), (2, 5, [2]), (1, 1, [1]), (4, 4, [4])]
)
def test_rows_last_micro_batch_takes_what_is_left(num_rows, size, expected):
    assert [num for _, num in Rows(size).split(torch.arange(num_rows))] == expected


def test_rows_are_views():
    x = torch.arange(5)
    assert [part.data_ptr() for part, _ in Rows(2).split(x)] == [x.data_ptr() + 8 * start for start in (0, 2, 4)]


@pytest.mark.parametrize("size", [0, -2, True, 1.5, 2.0, "4", None])
def test_rows_size_out_of_domain_is_refused(size):
    with pytest.raises(ArgumentError, match=r"micro_batch: given .* the samples in a micro-batch"):
        Rows(size)


def test_rows_batch_without_rows_is_refused():
    with pytest.raises(BatchError):
        Rows(2).split({"a": 1})


# --- Tokens ---


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=25)


@settings(deadline=None)
@given(lengths=LENGTHS, cap=st.integers(1, 40), trim=st.sampled_from([None, cut]), extra=st.integers(0, 3))
def test_tokens_keep_order_take_every_row_once_and_hold_the_cap(lengths, cap, trim, extra):
    assume(max(lengths) <= cap)
    batch = padded(lengths, width=max(lengths) + extra + 1)
    parts = Tokens(cap, lengths=count_tokens, trim=trim).split(batch)
    assert rows_of(parts) == list(range(len(lengths)))
    for part, num_rows in parts:
        assert tree.num_rows(part) == num_rows >= 1
        assert num_rows * max(1, *(lengths[int(row)] for row in part["row"])) <= cap


@settings(deadline=None)
@given(lengths=LENGTHS, cap=st.integers(9, 40), extra=st.integers(0, 3))
def test_tokens_trimming_keeps_every_token_and_cuts_all_padding_columns(lengths, cap, extra):
    batch = padded(lengths, width=max(lengths) + extra + 1)
    parts = Tokens(cap, lengths=count_tokens, trim=cut).split(batch)
    kept = torch.cat([part["ids"][part["ids"] != PAD] for part, _ in parts])
    assert torch.equal(kept, batch["ids"][batch["ids"] != PAD])
    for part, _ in parts:
        longest = int(count_tokens(part).max())
        assert part["ids"].shape[1] == max(longest, 1)  # rows without a token keep one column


@settings(deadline=None)
@given(lengths=LENGTHS, cap=st.integers(9, 40))
def test_tokens_next_row_would_not_have_fitted(lengths, cap):
    """Greedy: a micro-batch ends only where one row more breaks the cap. A row without a token has one column."""
    parts = Tokens(cap, lengths=count_tokens).split(padded(lengths))
    for (part, num_rows), (following, _) in pairwise(parts):
        longest = max(1, *(lengths[int(row)] for row in [*part["row"], following["row"][0]]))
        assert (num_rows + 1) * longest > cap


def test_tokens_without_trim_are_untouched_views():
    batch = padded([1, 1, 4])
    parts = Tokens(4, lengths=count_tokens).split(batch)
    assert [part["ids"].shape for part, _ in parts] == [(2, 4), (1, 4)]
    assert parts[0][0]["ids"].data_ptr() == batch["ids"].data_ptr()


def test_tokens_trimmed_micro_batches_may_be_views():
    batch = padded([1, 1, 4])
    parts = Tokens(4, lengths=count_tokens, trim=cut).split(batch)
    assert [part["ids"].shape for part, _ in parts] == [(2, 1), (1, 4)]
    assert parts[1][0]["ids"].data_ptr() == batch["ids"][2].data_ptr()


def test_tokens_trim_gets_each_micro_batch_and_the_length_of_its_longest_row():
    calls: list[tuple[list[int], tuple[int, ...], int]] = []

    def trim(part: Any, width: int) -> Any:
        calls.append((part["row"].tolist(), tuple(part["ids"].shape), width))
        return part

    Tokens(4, lengths=count_tokens, trim=trim).split(padded([1, 2, 3, 0, 0], width=6))
    assert calls == [([0, 1], (2, 6), 2), ([2], (1, 6), 3), ([3, 4], (2, 6), 1)]


def test_tokens_what_trim_returns_is_the_micro_batch():
    """It alone decides what is padding: other leaves stay as they are, even if they happen to be as wide."""
    batch = padded([1, 1, 3]) | {"features": torch.ones(3, 3), "wide": torch.ones(3, 10), "text": ["a", "b", "c"]}
    (first, _), (second, _) = Tokens(4, lengths=count_tokens, trim=cut).split(batch)
    assert first["ids"].shape == (2, 1)
    assert (first["features"].shape, first["wide"].shape, first["text"]) == ((2, 3), (2, 10), ["a", "b"])
    assert second["ids"].shape == (1, 3)
    parts = Tokens(4, lengths=count_tokens, trim=lambda part, width: ("other", width)).split(batch)
    assert parts == [(("other", 1), 2), (("other", 3), 1)]


@pytest.mark.parametrize("kind", [tuple, list, torch.tensor])
def test_tokens_lengths_may_be_any_sequence_or_tensor(kind):
    tokens = Tokens(4, lengths=lambda batch: kind([2, 2, 4]))
    assert [num for _, num in tokens.split(padded([2, 2, 4]))] == [2, 1]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_tokens_lengths_may_be_an_array(dtype):
    lengths: Any = np.array([2, 2, 4], dtype)
    tokens = Tokens(4, lengths=lambda batch: lengths)
    assert [num for _, num in tokens.split(padded([2, 2, 4]))] == [2, 1]


def test_tokens_row_at_the_cap_is_alone():
    assert [num for _, num in Tokens(4, lengths=count_tokens).split(padded([4, 0, 4]))] == [1, 1, 1]


@pytest.mark.parametrize(("cap", "expected"), [(1, [1, 1, 1]), (2, [2, 1]), (3, [3])])
def test_tokens_row_without_a_token_counts_as_one_column(cap, expected):
    """As wide as its micro-batch is at least."""
    assert [num for _, num in Tokens(cap, lengths=count_tokens).split(padded([0, 0, 0]))] == expected


def test_tokens_row_longer_than_the_cap_is_refused_naming_it():
    with pytest.raises(BatchError, match=r"row 2: given 5 tokens; expected at most max_tokens=4"):
        Tokens(4, lengths=count_tokens).split(padded([1, 4, 5, 6]))


@pytest.mark.parametrize(
    "lengths",
    [
        [1, 2],
        [1, 2, 3, 4],
        [],
        [1.0, 2.0, 3.0],
        [1, -1, 2],
        ["1", "2", "3"],
        [True, True, True],
        torch.ones(3),
        torch.ones(3, 1).long(),
        torch.ones(3, dtype=torch.bool),
        np.ones(3),
    ],
    ids=str,
)
def test_tokens_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(BatchError, match=r"Tokens\.lengths.*an integer >= 0 for each of the 3 rows"):
        Tokens(9, lengths=lambda batch: lengths).split(padded([1, 2, 3]))


@pytest.mark.parametrize("lengths", [6, torch.tensor(6), np.array(6), None, "123", {0: 1, 1: 2, 2: 3}], ids=str)
def test_tokens_lengths_that_are_no_sequence_are_refused(lengths):
    with pytest.raises(BatchError, match=r"Tokens\.lengths.*an integer >= 0 for each of the 3 rows"):
        Tokens(9, lengths=lambda batch: lengths).split(padded([1, 2, 3]))


def test_tokens_long_list_of_wrong_lengths_is_shown_in_part():
    with pytest.raises(BatchError, match=r"given \[1, 1, .* from a batch of 3 rows") as caught:
        Tokens(9, lengths=lambda batch: [1] * 100).split(padded([1, 2, 3]))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("max_tokens", [0, -1, True, 2.0, "8", None])
def test_tokens_cap_out_of_domain_is_refused(max_tokens):
    with pytest.raises(ArgumentError, match=r"Tokens\.max_tokens"):
        Tokens(max_tokens, lengths=count_tokens)


@pytest.mark.parametrize("lengths", [[1, 2, 3], torch.ones(3), "ids", 4, None], ids=str)
def test_tokens_lengths_that_is_no_function_is_refused(lengths):
    with pytest.raises(ArgumentError, match=r"Tokens\.lengths: given .*expected a function"):
        Tokens(4, lengths=lengths)


@pytest.mark.parametrize("trim", [True, 4, "right", [4], False, 0, "", []], ids=repr)
def test_tokens_trim_that_is_no_function_is_refused(trim):
    with pytest.raises(ArgumentError, match=r"Tokens\.trim: given .*expected a function"):
        Tokens(4, lengths=count_tokens, trim=trim)


def test_tokens_batch_that_disagrees_is_refused():
    with pytest.raises(BatchError, match="different numbers of rows"):
        Tokens(4, lengths=lambda batch: [1, 1]).split({"ids": torch.ones(2, 2), "y": torch.ones(3)})


# --- make_split ---


def test_make_split_integer_means_rows():
    assert make_split(4) == Rows(4)


@pytest.mark.parametrize("split", [Rows(3), Tokens(9, lengths=count_tokens)], ids=["Rows", "Tokens"])
def test_make_split_passes_splits_through(split):
    assert make_split(split) is split


@pytest.mark.parametrize("auto", ["auto", Auto()], ids=str)
def test_make_split_leaves_auto_to_a_step(auto):
    with pytest.raises(ArgumentError, match=r"micro_batch: given ('auto'|Auto).*only a TrainStep.*micro_batch=16"):
        make_split(auto)


@pytest.mark.parametrize("micro_batch", [0, -1, True, 2.0, "16", None, [4], Rows], ids=str)
def test_make_split_out_of_domain_is_refused(micro_batch):
    with pytest.raises(ArgumentError, match=r"micro_batch: given .*expected an integer >= 1"):
        make_split(micro_batch)


@pytest.mark.parametrize(("split", "name"), [(Rows(3), "num_rows"), (Tokens(3, lengths=count_tokens), "max_tokens")])
def test_splits_are_frozen(split, name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(split, name, 5)
