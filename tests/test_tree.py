"""Batches of every container kind: taken apart, cut, put together again."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict, defaultdict
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutput

from macrobatch import tree
from macrobatch.errors import ArgumentError, BatchError


class Pair(NamedTuple):
    x: Any
    y: Any


class Record(dict):
    """A dict with an attribute of its own."""

    source = "disk"


class Triple(tuple):
    """A tuple that is no NamedTuple."""

    __slots__ = ()


@dataclasses.dataclass
class Batch:
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class FrozenBatch:
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True, slots=True)
class SlottedBatch:
    x: Any
    y: Any


@dataclasses.dataclass
class Derived:
    """Cannot be built from its fields: one is computed, and the constructor checks the other."""

    x: Any
    num_built: int = dataclasses.field(init=False, default=0)

    def __post_init__(self) -> None:
        assert self.num_built == 0, "built once, by the user"
        self.num_built = 1


def x_B2(num_rows: int) -> Tensor:
    return torch.arange(2.0 * num_rows).view(num_rows, 2)


def y_B(num_rows: int) -> Tensor:
    return torch.arange(num_rows) + 100


CONTAINERS = {
    "tuple": lambda n: (x_B2(n), y_B(n)),
    "list": lambda n: [x_B2(n), y_B(n)],
    "dict": lambda n: {"x": x_B2(n), "y": y_B(n)},
    "dict with integer keys": lambda n: {0: x_B2(n), 1: y_B(n)},
    "OrderedDict": lambda n: OrderedDict([("y", y_B(n)), ("x", x_B2(n))]),
    "defaultdict": lambda n: defaultdict(list, x=x_B2(n), y=y_B(n)),
    "dict subclass": lambda n: Record(x=x_B2(n), y=y_B(n)),
    "mapping": lambda n: MappingProxyType({"x": x_B2(n), "y": y_B(n)}),
    "tuple subclass": lambda n: Triple((x_B2(n), y_B(n), x_B2(n))),
    "NamedTuple": lambda n: Pair(x_B2(n), y_B(n)),
    "dataclass": lambda n: Batch(x_B2(n), y_B(n)),
    "frozen dataclass": lambda n: FrozenBatch(x_B2(n), y_B(n)),
    "slotted dataclass": lambda n: SlottedBatch(x_B2(n), y_B(n)),
    "dataclass with a checking constructor": lambda n: Derived(x_B2(n)),
    "BatchEncoding": lambda n: BatchEncoding({"input_ids": x_B2(n).long(), "labels": y_B(n)}),
    "ModelOutput": lambda n: BaseModelOutput(last_hidden_state=x_B2(n)),  # pyright: ignore[reportArgumentType]
    "nested": lambda n: {"a": (x_B2(n), [Pair(y_B(n), {"b": FrozenBatch(x_B2(n), 1)})]), "c": Batch(y_B(n), None)},
    "with everything that has no rows": lambda n: {
        "x": x_B2(n),
        "temperature": 0.7,
        "name": "train",
        "raw": b"bytes",
        "none": None,
        "flag": True,
        "scalar": torch.tensor(3.0),
        "scalar_array": np.array(2),
        "empty": (),
        "shape": torch.Size([3, 4, 5, 6, 7, 8, 9, 10]),
        "set": frozenset({1}),
    },
}

ROWS = {
    "tensor": x_B2,
    "numpy": lambda n: np.arange(2 * n).reshape(n, 2),
    "strings": lambda n: [f"sample {i}" for i in range(n)],
    "bytes": lambda n: [bytes([i]) for i in range(n)],
    "numbers": lambda n: [i / 2 for i in range(n)],
    "with None": lambda n: [None, *range(n - 1)],
    "lists": lambda n: [[i, -i] for i in range(n)],
    "ragged lists": lambda n: [["token"] * i for i in range(n)],
    "lists of lists": lambda n: [[[i], [], ["text", None]] for i in range(n)],
    "values and lists": lambda n: [0, *([i] for i in range(n - 1))],
}

BATCHES = CONTAINERS | ROWS


def same(one: Any, other: Any) -> bool:
    """Equal in structure, types and values; independent of `tree`."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, BatchEncoding | MappingProxyType | dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    return one == other


def test_same_tells_batches_apart():
    assert same(CONTAINERS["nested"](3), CONTAINERS["nested"](3))
    assert not same({"x": x_B2(2)}, {"x": x_B2(2) + 1})
    assert not same({"x": x_B2(2)}, OrderedDict(x=x_B2(2)))
    assert not same(Batch(x_B2(2), 1), Batch(x_B2(2), 2))
    assert not same([x_B2(2)], [x_B2(2), x_B2(2)])


# --- num_rows, leaves ---


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_num_rows_of_every_kind(kind, num_rows):
    assert tree.num_rows(BATCHES[kind](num_rows)) == num_rows


@pytest.mark.parametrize("kind", BATCHES)
def test_flatten_and_rebuild_gives_the_batch_back(kind):
    batch = BATCHES[kind](3)
    flat = tree.flatten(batch)
    assert same(flat.rebuild(flat.leaves), batch)


def test_leaves_are_depth_first_in_the_containers_own_order():
    one, two, four, rows = torch.ones(2), torch.ones(2), np.ones(2), ["row", "row"]
    batch = {"b": [one, (two, None)], "a": Pair({"z": "three"}, Batch(four, 5)), "c": rows}
    expected = [one, two, None, "three", four, 5, rows]
    assert [id(leaf) for leaf in tree.leaves(batch)] == [id(leaf) for leaf in expected]


def test_leaves_of_a_leaf_is_itself():
    tensor = torch.ones(2)
    assert tree.leaves(tensor)[0] is tensor
    assert tree.leaves("text") == ["text"]
    assert tree.leaves(Batch) == [Batch]  # the class, not an instance


def test_list_of_plain_values_is_one_leaf_with_rows():
    assert tree.leaves(["a", "b"]) == [["a", "b"]]
    assert tree.num_rows({"text": ["a", "b", "c"], "x": torch.ones(3)}) == 3


@pytest.mark.parametrize("rows", [[["a", "b"], ["c"]], [[1], "a", []], [[], []], [[[1, 2]], [[3]]]], ids=str)
def test_list_of_lists_of_plain_values_is_one_leaf_with_rows(rows):
    assert tree.leaves({"rows": rows}) == [rows]
    assert tree.num_rows({"rows": rows, "x": torch.ones(len(rows))}) == len(rows)


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("other", [torch.ones(3), np.ones(3), Pair(torch.ones(3), 1)], ids=lambda o: type(o).__name__)
def test_list_or_tuple_that_holds_a_tensor_is_a_container(kind, other):
    batch = kind([["a", "b", "c"], other])
    assert tree.leaves(batch)[0] == ["a", "b", "c"]
    assert tree.num_rows(batch) == 3
    assert tree.split(batch, [1, 2])[1][0] == ["b", "c"]


@pytest.mark.parametrize(
    ("batch", "second"),
    [
        ((["a", "b", "c"], [1, 2, 3]), (["b", "c"], [2, 3])),
        ({"x": x_B2(3), "pair": (["a", "b", "c"], [1, 2, 3])}, {"x": x_B2(3)[1:], "pair": (["b", "c"], [2, 3])}),
        (({"text": ["a", "b", "c"]}, 0.5), ({"text": ["b", "c"]}, 0.5)),
    ],
    ids=["alone", "beside a tensor", "in a dict"],
)
def test_row_lists_in_a_tuple_are_cut(batch, second):
    assert same(tree.split(batch, [1, 2])[1], second)


@pytest.mark.parametrize("extra", [(224, 224), torch.Size([3, 4]), (None, "text")], ids=repr)
def test_part_that_has_as_many_rows_as_a_tuple_values_is_a_batch(extra):
    parts = tree.split({"x": x_B2(5), "extra": extra}, [1, 2, 2])
    assert [tree.num_rows(part) for part in parts] == [1, 2, 2]
    assert all(part["extra"] is extra for part in parts)


def test_tuple_of_plain_values_has_no_rows():
    assert tree.num_rows({"size": (224, 224, 3), "x": torch.ones(2)}) == 2


# --- split ---


@pytest.mark.parametrize("kind", BATCHES)
def test_split_keeps_type_and_gives_each_part_its_rows(kind):
    batch = BATCHES[kind](6)
    parts = tree.split(batch, [1, 3, 2])
    assert [tree.num_rows(part) for part in parts] == [1, 3, 2]
    assert all(type(part) is type(batch) for part in parts)
    for part, rows in zip(parts, (slice(0, 1), slice(1, 4), slice(4, 6)), strict=True):
        assert same(part, tree.select(batch, rows))


def test_split_gives_views_of_tensors_and_arrays():
    batch = {"x": x_B2(5), "nested": [Pair(y_B(5), np.arange(5))]}
    parts = tree.split(batch, [2, 3])
    batch["x"].fill_(-1)
    batch["nested"][0].y[:] = -2
    assert all(bool((part["x"] == -1).all()) for part in parts)
    assert all((part["nested"][0].y == -2).all() for part in parts)
    whole = batch["nested"][0].x
    assert [part["nested"][0].x.untyped_storage().data_ptr() for part in parts] == [
        whole.untyped_storage().data_ptr()
    ] * 2


def test_split_leaves_without_rows_go_along_unchanged():
    scalar, extra = torch.tensor(1.5), object()
    for part in tree.split({"x": x_B2(4), "scalar": scalar, "extra": extra, "n": 3}, [3, 1]):
        assert part["scalar"] is scalar
        assert part["extra"] is extra
        assert part["n"] == 3


def test_split_does_not_change_the_batch():
    batch = defaultdict(list, x=x_B2(4))
    tree.split(batch, [1, 3])[0]["new"] = []
    assert list(batch) == ["x"]


def test_split_keeps_what_a_mapping_subclass_adds():
    parts = tree.split(defaultdict(list, x=x_B2(4)), [2, 2])
    assert parts[0]["missing"] == []
    record = Record(x=x_B2(2))
    record.source = "network"
    assert tree.split(record, [1, 1])[1].source == "network"


def test_split_batch_encoding_keeps_attribute_access():
    encoding = BatchEncoding({"input_ids": torch.arange(6).view(3, 2)})
    assert tree.split(encoding, [2, 1])[1].input_ids.tolist() == [[4, 5]]


def test_split_batch_encoding_is_built_from_its_items():
    """Its `encodings` have an entry per row of the whole, which would be wrong in a part."""
    items = {"input_ids": torch.arange(6).view(3, 2), "labels": [7, 8, 9]}
    parts = tree.split(BatchEncoding(items, encoding=[Encoding()] * 3), [2, 1])  # pyright: ignore[reportArgumentType]
    assert same(parts[0], BatchEncoding({"input_ids": torch.tensor([[0, 1], [2, 3]]), "labels": [7, 8]}))
    assert same(parts[1], BatchEncoding({"input_ids": torch.tensor([[4, 5]]), "labels": [9]}))
    assert [part.encodings for part in parts] == [None, None]


class Encoding:
    """What a fast tokenizer knows of one row."""

    n_sequences = 1


def test_split_never_takes_columns_for_rows():
    parts = tree.split({"x": x_B2(2), "words": [["a", "b"], ["c", "d"]]}, [1, 1])
    assert [part["words"] for part in parts] == [[["a", "b"]], [["c", "d"]]]


@pytest.mark.parametrize("sizes", [[], [2], [2, 2], [3, 0], [4, -1], [1, 1, 2]])
def test_split_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ArgumentError, match=r"tree\.split sizes.*add up to the 3 rows") as caught:
        tree.split((x_B2(3), y_B(3)), sizes)
    assert caught.value.given == sizes


@pytest.mark.parametrize(
    "sizes",
    [
        [1.5, 1.5],
        [1.0, 2.0],
        ["1", "2"],
        [None, 3],
        pytest.param([True, 2]),
    ],
    ids=str,
)
def test_split_sizes_that_are_no_integers_are_refused(sizes):
    with pytest.raises(ArgumentError, match=r"tree\.split sizes"):
        tree.split(x_B2(3), sizes)


# --- select ---


@pytest.mark.parametrize("kind", BATCHES)
def test_select_by_numbers_picks_rows_in_their_order(kind):
    batch = BATCHES[kind](4)
    picked = tree.select(batch, [2, 0, 2])
    assert type(picked) is type(batch)
    assert same(picked, tree.cat([tree.select(batch, slice(i, i + 1)) for i in (2, 0, 2)]))


def test_select_values():
    batch = {"x": x_B2(3), "ids": np.array([7, 8, 9]), "text": ["a", "b", "c"], "t": 0.5}
    picked = tree.select(batch, [2, 0])
    assert same(
        picked, {"x": torch.tensor([[4.0, 5.0], [0.0, 1.0]]), "ids": np.array([9, 7]), "text": ["c", "a"], "t": 0.5}
    )


def test_select_slice_gives_views_and_numbers_give_copies():
    x = x_B2(4)
    assert tree.select(x, slice(1, 3)).data_ptr() == x[1].data_ptr()
    copy = tree.select(x, [1, 2])
    copy.fill_(-1)
    assert x.min() == 0


# --- cat ---


def rows_and_cuts(max_rows: int = 8) -> st.SearchStrategy[tuple[int, list[int]]]:
    sizes = st.lists(st.integers(1, 4), min_size=1, max_size=max_rows)
    return sizes.map(lambda sizes: (sum(sizes), sizes))


def leaves_with_rows(num_rows: int) -> st.SearchStrategy[Any]:
    values = st.integers(-5, 5)
    tensors = st.tuples(
        st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16]),
        st.sampled_from([(), (1,), (3,), (2, 2), (0,)]),
        values,
    ).map(lambda d: (torch.arange(num_rows).view(-1, *[1] * len(d[1])) * d[2] + torch.zeros(d[1])).to(d[0]))
    arrays = st.sampled_from([np.float32, np.int16, np.str_]).map(lambda dtype: np.arange(num_rows).astype(dtype))
    plain = st.text(max_size=3) | values | st.none()
    lists = st.lists(plain | st.lists(plain | st.lists(plain), max_size=3), min_size=num_rows, max_size=num_rows)
    return tensors | arrays | lists


@functools.cache  # building a strategy takes longer than drawing from it
def batches(num_rows: int) -> st.SearchStrategy[Any]:
    without_rows = st.sampled_from([None, 1, 0.5, "text", torch.tensor(2.0), np.array(1), ()])
    inner = st.recursive(
        leaves_with_rows(num_rows) | without_rows,
        lambda nodes: (
            st.lists(nodes, min_size=1, max_size=3).map(tuple)
            # the empty tuple keeps a list of plain values from being a leaf with rows
            | st.lists(nodes | leaves_with_rows(num_rows), min_size=1, max_size=3).map(lambda nodes: [*nodes, ()])
            | st.dictionaries(st.text(max_size=2) | st.integers(), nodes, max_size=3)
            | st.dictionaries(st.text(max_size=2), nodes, max_size=3).map(OrderedDict)
            | st.dictionaries(st.text(max_size=2), nodes, max_size=3).map(lambda d: defaultdict(int, d))
            | st.tuples(nodes, nodes).map(lambda pair: Pair(*pair))
            | st.tuples(nodes, nodes).map(lambda pair: Batch(*pair))
            | st.tuples(nodes, nodes).map(lambda pair: SlottedBatch(*pair))
        ),
        max_leaves=6,
    )
    return st.builds(Pair, leaves_with_rows(num_rows), inner)  # at least one leaf that has rows


@settings(deadline=None, max_examples=150)
@given(data=st.data(), cut=rows_and_cuts())
def test_cat_of_split_is_the_batch(data, cut):
    num_rows, sizes = cut
    batch = data.draw(batches(num_rows))
    try:
        parts = tree.split(batch, sizes)
    except BatchError as error:
        assume("items without rows" not in str(error))  # of a tuple as long as the batch nobody knows what it is
        raise
    assert [len(part.x) for part in parts] == sizes
    assert same(tree.cat(parts), batch)


@pytest.mark.parametrize("kind", BATCHES)
def test_cat_of_split_is_the_batch_for_every_kind(kind):
    batch = BATCHES[kind](5)
    assert same(tree.cat(tree.split(batch, [2, 1, 2])), batch)


def test_cat_takes_leaves_without_rows_from_the_first():
    assert tree.cat([{"x": torch.ones(1), "t": 1}, {"x": torch.ones(2), "t": 2}])["t"] == 1


def test_cat_nothing_is_refused():
    with pytest.raises(BatchError, match=r"tree\.cat: given 0 batches"):
        tree.cat([])


def test_cat_puts_lists_of_lists_together():
    parts = tree.split({"x": y_B(3), "words": [["a"], [], ["b", "c"]]}, [2, 1])
    assert tree.cat(parts)["words"] == [["a"], [], ["b", "c"]]


def test_cat_counts_batches_and_their_structures():
    one, other = {"x": torch.ones(1)}, {"x": torch.ones(1), "y": torch.ones(1)}
    with pytest.raises(BatchError, match=r"tree\.cat: given 4 batches of 2 structures"):
        tree.cat([one, other, one, other])
    with pytest.raises(BatchError, match=r"given 3 batches of 3 structures"):
        tree.cat([one, other, (torch.ones(1),)])


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"y": torch.ones(1)}, id="another key"),
        pytest.param((torch.ones(1),), id="another container"),
        pytest.param({"x": 3}, id="no rows"),
        pytest.param({"x": ["text"]}, id="another kind of rows"),
        pytest.param({"x": (torch.ones(1),)}, id="deeper"),
        pytest.param({"x": torch.ones(1), "y": 3}, id="one leaf more"),
        pytest.param({}, id="one leaf less"),
        pytest.param(OrderedDict(x=torch.ones(1)), id="another mapping"),
    ],
)
def test_cat_different_structures_are_refused(other):
    with pytest.raises(BatchError, match="2 batches of 2 structures"):
        tree.cat([{"x": torch.ones(1)}, other])


def test_cat_another_order_of_keys_is_refused():
    """Leaves are put together in their order."""
    with pytest.raises(BatchError, match="2 batches of 2 structures"):
        tree.cat([{"x": torch.ones(1), "y": torch.zeros(1)}, {"y": torch.zeros(1), "x": torch.ones(1)}])


# --- map_tensors, to_device ---


@pytest.mark.parametrize("kind", CONTAINERS)
def test_map_tensors_keeps_types_and_touches_tensors_only(kind):
    batch = CONTAINERS[kind](3)
    mapped = tree.map_tensors(lambda tensor: tensor * 2, batch)
    assert type(mapped) is type(batch)
    for before, after in zip(tree.leaves(batch), tree.leaves(mapped), strict=True):
        assert torch.equal(after, before * 2) if isinstance(before, Tensor) else after is before


def test_map_tensors_leaves_arrays_alone():
    array = np.ones(3)
    assert tree.map_tensors(lambda tensor: tensor * 2, {"a": array})["a"] is array


@pytest.mark.parametrize("kind", BATCHES)
def test_to_device_cpu_is_the_identity(kind):
    batch = BATCHES[kind](3)
    assert tree.to_device(batch, torch.device("cpu")) is batch


@pytest.mark.parametrize("kind", CONTAINERS)
def test_to_device_other_moves_every_tensor_and_keeps_types(kind):
    batch = CONTAINERS[kind](3)
    moved = tree.to_device(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    for before, after in zip(tree.leaves(batch), tree.leaves(moved), strict=True):
        if isinstance(before, Tensor):
            assert after.device.type == "meta"
            assert (after.shape, after.dtype) == (before.shape, before.dtype)
        else:
            assert after is before
    assert all(leaf.device.type == "cpu" for leaf in tree.leaves(batch) if isinstance(leaf, Tensor))


def test_to_device_host_leaves_tensors_of_other_devices_where_they_are():
    """Some inputs belong elsewhere, and the host can reach them all."""
    batch = {"x": torch.ones(2, device="meta"), "y": torch.ones(2)}
    assert tree.to_device(batch, torch.device("cpu")) is batch


def test_to_device_where_it_is_already_is_the_identity():
    batch = {"x": torch.ones(2, device="meta"), "n": 1}
    assert tree.to_device(batch, torch.device("meta")) is batch


def test_spread_out_gives_each_element_a_place_and_keeps_what_has_one():
    """Memory cannot be pinned otherwise: position ids are often one row, expanded."""
    expanded = torch.arange(3).expand(4, -1)
    whole = tree.spread_out(expanded)
    assert whole.is_contiguous()
    assert torch.equal(whole, expanded)
    with pytest.raises(RuntimeError, match="single memory location"):
        expanded.copy_(whole)  # the control
    whole.copy_(expanded)
    channels_last = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for tensor in (channels_last, torch.tensor(1.0), torch.rand(3).expand(1, 3), torch.rand(3, 4).t()):
        assert tree.spread_out(tensor) is tensor


def test_to_device_moves_the_rest_of_a_mixed_batch():
    there = torch.ones(2, device="meta")
    moved = tree.to_device({"x": there, "y": torch.ones(2)}, torch.device("meta"))
    assert moved["x"] is there
    assert moved["y"].device.type == "meta"


# --- errors ---


@pytest.mark.parametrize(
    "batch",
    [
        None,
        3,
        "text",
        (),
        {},
        [()],
        torch.tensor(1.0),
        np.array(1.0),
        {"a": 1, "b": (None, "x", torch.tensor(2))},
        Batch(1, "y"),
        iter([torch.ones(2)]),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_batch_without_rows_is_refused(batch):
    with pytest.raises(BatchError, match="without a tensor, array or list that has one row per sample") as caught:
        tree.num_rows(batch)
    assert type(batch).__name__ in str(caught.value)
    assert "DataLoader" in str(caught.value)


@pytest.mark.parametrize(
    "batch",
    [torch.ones(0, 3), {"x": np.ones((0, 2)), "y": torch.ones(0)}, [], {"rows": []}],
    ids=["tensor", "dict", "list", "list in a dict"],
)
def test_batch_of_no_samples_is_refused(batch):
    with pytest.raises(BatchError, match=r"given no samples.*skip empty batches"):
        tree.num_rows(batch)


def test_batch_with_leaves_that_disagree_is_refused_naming_each():
    batch = {"x": torch.ones(4, 2), "inner": (np.ones(3), Pair(["a", "b"], 7)), "more": [Batch(torch.ones(4), None)]}
    with pytest.raises(BatchError, match="different numbers of rows") as caught:
        tree.num_rows(batch)
    message = str(caught.value)
    for named in (
        "batch['x']: 4",
        "batch['inner'][0]: 3",
        "batch['inner'][1]['x']: 2",
        "batch['more'][0]['x']: 4",
    ):
        assert named in message
    assert "['y']" not in message  # it has no rows
    assert "TrainStep.window" in message


@pytest.mark.parametrize("empty", [torch.ones(0), []], ids=["tensor", "list"])
def test_batch_with_one_empty_leaf_is_refused_naming_it(empty):
    with pytest.raises(BatchError, match=r"batch\[0\]: 2, batch\[1\]: 0"):
        tree.num_rows((torch.ones(2), empty))


@pytest.mark.parametrize("use", [tree.flatten, tree.num_rows, lambda batch: tree.split(batch, [1])])
def test_every_use_that_needs_rows_refuses_alike(use):
    with pytest.raises(BatchError, match="different numbers of rows"):
        use((torch.ones(2), torch.ones(3)))
