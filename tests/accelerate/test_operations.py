"""Trees of tensors between devices and ranks: as in the original, except where the original is wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from macrobatch.accelerate.utils import operations as ours
from macrobatch.accelerate.utils.environment import patch_environment
from macrobatch.errors import ArgumentError
from tests.accelerate.doors import ORIGINAL, OURS, entered

pytestmark = pytest.mark.xdist_group("ranks")


class Point(NamedTuple):
    x: Any
    y: Any


@contextmanager
def door(name: str, **variables: Any) -> Generator[Any]:
    """The operations of one door, with its state made for the ranks of this process and taken back."""
    with entered(name) as package, patch_environment(**variables):
        package.state.PartialState(cpu=True)
        yield package.utils.operations


def tree(rank: int) -> dict[str, Any]:
    return {"a": torch.arange(4.0).view(2, 2) + rank, "b": [torch.tensor([rank]), (torch.tensor(rank + 0.5),)]}


def collectives(name: str) -> dict[str, Any]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    with door(name) as operations:
        ragged = torch.ones(2 + rank, 3) * (rank + 1)
        objects = [{"rank": rank}, None]
        return {
            "gather": operations.gather(tree(rank)),
            "gather of a scalar": operations.gather(torch.tensor(float(rank))),
            "gather of objects": operations.gather_object([rank, str(rank)]),
            "broadcast": operations.broadcast(tree(rank), from_process=0),
            "broadcast of objects": operations.broadcast_object_list(objects),
            "sum": operations.reduce(tree(rank)["a"], "sum"),
            "mean": operations.reduce(tree(rank)["a"]),
            "max": operations.reduce(tree(rank)["a"], "max"),
            "padded": operations.pad_across_processes(ragged, pad_index=7),
            "padded in front": operations.pad_across_processes(ragged, pad_index=7, pad_first=True),
            "padded beyond": operations.pad_across_processes(torch.tensor([rank]), dim=1),
        }


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def test_collectives_of_one_process_are_the_originals():
    assert plain(collectives(OURS)) == plain(collectives(ORIGINAL))


def test_collectives_of_two_ranks_are_the_originals(ranks: Callable[..., Any]):
    expected = ranks(2).run(collectives, ORIGINAL)
    assert plain(ranks(2).run(collectives, OURS)) == plain(expected)
    assert plain(expected[0]["sum"]) == [[1.0, 3.0], [5.0, 7.0]]


def reduced_by_none(name: str) -> list[float]:
    with door(name) as operations:
        return operations.reduce(torch.tensor([dist.get_rank() + 1.0]), reduction="none").tolist()


def test_no_reduction_keeps_each_ranks_own(ranks: Callable[..., Any]):
    assert ranks(2).run(reduced_by_none, ORIGINAL) == [[3.0], [3.0]]  # the control: it sums
    assert ranks(2).run(reduced_by_none, OURS) == [[1.0], [2.0]]


def lent_by_one_rank(lenders: list[int]) -> list[int] | str:
    with door(OURS) as operations:
        mine = torch.tensor([3, 4]) if dist.get_rank() in lenders else None
        try:
            return operations.copy_tensor_to_devices(mine).tolist()
        except ArgumentError as error:
            return str(error)


def test_a_tensor_of_one_rank_is_copied_to_all(ranks: Callable[..., Any]):
    assert ranks(2).run(lent_by_one_rank, [1]) == [[3, 4], [3, 4]]
    for lenders in ([], [0, 1]):
        assert all("one on one rank" in text for text in ranks(2).run(lent_by_one_rank, lenders))


def mean_of_integers(_: str) -> list[float]:
    with door(OURS) as operations:
        return operations.reduce(torch.tensor([dist.get_rank()])).tolist()


def test_mean_of_integers_is_not_one(ranks: Callable[..., Any]):
    assert ranks(2).run(mean_of_integers, "") == [[0.5], [0.5]]


def test_unknown_reduction_is_refused():
    with pytest.raises(ArgumentError, match="reduction"):
        ours.reduce(torch.ones(1), "average")


def gathered_shapes_that_differ(name: str) -> str:
    with door(name, ACCELERATE_DEBUG_MODE=1) as operations:
        try:
            operations.gather(torch.ones(1 + dist.get_rank()))
        except operations.DistributedOperationException as error:
            return type(error).__name__
    return "no error"


@pytest.mark.parametrize("name", [ORIGINAL, OURS])
def test_debug_mode_compares_shapes(name: str, ranks: Callable[..., Any]):
    assert ranks(2).run(gathered_shapes_that_differ, name) == ["DistributedOperationException"] * 2


LOCAL: dict[str, Callable[[Any], Any]] = {
    "apply": lambda o: o.recursively_apply(lambda t: t + 1, {"a": [torch.ones(2)], "b": Point(torch.ones(1), "c")}),
    "send": lambda o: o.send_to_device(Point(torch.ones(2), [torch.zeros(1), "text", None]), torch.device("cpu")),
    "device": lambda o: o.find_device([{"a": "text"}, torch.ones(1)]),
    "batch size": lambda o: o.find_batch_size({"a": [torch.ones(3, 2)], "b": torch.ones(3)}),
    "no batch size": lambda o: o.ignorant_find_batch_size(["text"]),
    "lists": lambda o: o.listify({"a": torch.ones(2, dtype=torch.bfloat16), "b": [torch.tensor(3)]}),
    "slice": lambda o: o.slice_tensors({"a": torch.arange(5)}, slice(1, 3)),
    "concatenate": lambda o: o.concatenate([{"a": (torch.ones(1, 2),)}, {"a": (torch.zeros(2, 2),)}]),
    "fp32": lambda o: o.convert_to_fp32([torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.int64)]),
    "structure": lambda o: o.initialize_tensors(o.get_data_structure({"a": torch.ones(2, 0)})),
}


@pytest.mark.parametrize("case", LOCAL)
def test_local_operations_are_the_originals(case: str):
    original = import_module("accelerate.utils.operations")
    assert plain(LOCAL[case](ours)) == plain(LOCAL[case](original))


class Encoding(dict[str, Tensor]):
    """Like a tokenizer's `BatchEncoding`: a mapping with a `to` of its own, and more than its items."""

    def __init__(self, items: dict[str, Tensor], where: str = "start") -> None:
        super().__init__(items)
        self.where = where

    def to(self, device: Any) -> Encoding:
        return Encoding({key: value.to(device) for key, value in self.items()}, str(device))


@dataclass(frozen=True)
class Batch:
    inputs: Tensor
    name: str


def test_send_asks_objects_with_a_to_of_their_own():
    assert ours.send_to_device([Encoding({"a": torch.ones(1)})], "cpu", non_blocking=True)[0].where == "cpu"
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2)])
    assert ours.send_to_device(packed, "meta").data.is_meta


def test_send_moves_what_a_dataclass_holds():
    batch = ours.send_to_device(Batch(torch.ones(2), "name"), "meta")
    assert batch.inputs.is_meta
    assert batch.name == "name"


def test_send_leaves_skipped_keys():
    sent = ours.send_to_device({"a": torch.ones(1), "b": [{"c": torch.ones(1)}]}, "meta", skip_keys="c")
    assert sent["a"].is_meta
    assert not sent["b"][0]["c"].is_meta


def test_mappings_keep_what_they_add():
    batch = defaultdict(list, {"a": torch.ones(1)})
    with pytest.raises(TypeError):  # the control
        import_module("accelerate.utils.operations").send_to_device(batch, "cpu")
    sent = ours.send_to_device(batch, "cpu")
    assert sent["b"] == []


@pytest.mark.parametrize(("batch_size", "num_processes"), [(3, 4), (9, 4), (10, 4), (8, 4)])
def test_padded_inputs_divide_over_ranks(batch_size: int, num_processes: int):
    padded = ours.pad_input_tensors(torch.arange(batch_size), batch_size, num_processes)
    assert len(padded) % num_processes == 0
    assert len(padded) - batch_size < num_processes
    assert padded[batch_size:].tolist() == [batch_size - 1] * (len(padded) - batch_size)


def test_padded_inputs_of_the_original_do_not():
    original = import_module("accelerate.utils.operations")
    assert len(original.pad_input_tensors(torch.arange(9), 9, 4)) == 11


@pytest.mark.parametrize("function", ["find_batch_size", "concatenate"])
def test_what_holds_no_tensor_is_refused(function: str):
    with pytest.raises(TypeError, match=f"{function}: given a str"):
        getattr(ours, function)("text")
