"""The gradient buffer: flat, persistent memory that every parameter's `.grad` is a view of.

One buffer per device and accumulation dtype, fp32 or wider: bf16 and fp16 parameters accumulate in fp32 through
`Tensor.grad_dtype` (https://docs.pytorch.org/docs/stable/generated/torch.Tensor.grad_dtype.html). Because autograd adds
into the views in place and nothing ever replaces them, zeroing, scaling, clipping and norms are one operation per
buffer, and the addresses stay valid for captured graphs.

Which parameters a window used is read off the version counters of the views, which autograd moves whenever it adds to
one: no hooks, nothing on the hot path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from macrobatch.core.autograd import accepts_wider, accumulation_dtype, set_gradient
from macrobatch.errors import GradientError

__all__ = ["Flat", "GradientBuffer", "Slot", "shards_of"]

_ALIGN = 64  # elements; keeps every view on a 256-byte boundary, as vectorised kernels like it

_SMALL = 2**16  # elements: adding so many takes no longer than starting to


class Flat(NamedTuple):
    """One flat buffer.

    Attributes:
        numbers: the gradients, 1-d.
        storage: the gradients and, in front of them, room for numbers that travel with them.
        shards: over which the parameters are spread, if they are.
    """

    numbers: Tensor
    storage: Tensor
    shards: tuple[dist.ProcessGroup, ...]

    @property
    def header(self) -> Tensor:
        """The room in front, 1-d and real."""
        room = self.storage[: self.storage.numel() - self.numbers.numel()]
        return torch.view_as_real(room).view(-1) if room.is_complex() else room


class Slot:
    """One parameter's place in a flat buffer."""

    __slots__ = ("address", "flat", "local", "param", "start", "used", "version", "view")

    def __init__(self, param: Tensor, flat: Flat, start: int) -> None:
        self.param = param
        self.flat = flat
        self.start = start
        self.view = _as_gradient(param, _view(flat.numbers, param, start))
        self.local = _local(self.view)
        self.address = self.local.data_ptr()
        self.version = 0
        self.used = False

    @property
    def has_moved(self) -> bool:
        """Whether something was added since the window began."""
        return self.local._version != self.version

    def within(self, numbers: Tensor) -> Tensor:
        """The parameter's part of a buffer that is laid out as its own."""
        return _view(numbers, self.param, self.start)


class GradientBuffer:
    """Flat gradients of a changing set of parameters.

    Args:
        parameters: called at the start of every window for the parameters in play, for instance all of an
            optimizer's groups, so that a group added later or a parameter unfrozen later takes part. Repeated
            parameters (tied weights) get one view; those that do not require grad get none. Of a `DTensor`, the local
            shard is in the buffer.
        header: from the number of parameters, how many numbers to leave room for in front of the first buffer.
        widens: sum gradients of 16-bit parameters in float32.

    ```pycon
    >>> layer = torch.nn.Linear(2, 1, dtype=torch.bfloat16)
    >>> buffer = GradientBuffer(layer.parameters)
    >>> buffer.start()
    >>> _ = layer(torch.ones(3, 2, dtype=torch.bfloat16)).sum().backward()
    >>> buffer.collect()
    >>> layer.weight.grad.dtype, round(float(buffer.norm()), 6)  # sqrt(3² + 3² + 3²)
    (torch.float32, 5.196152)

    ```
    """

    def __init__(
        self,
        parameters: Callable[[], Iterable[Tensor]],
        *,
        header: Callable[[int], int] = lambda _: 0,
        widens: bool = True,
    ) -> None:
        self._parameters = parameters
        self._header = header
        self._dtype = accumulation_dtype if widens else lambda dtype: dtype
        self.shards = shards_of
        """From a parameter, the groups over which it is cut into pieces; a sync may know better than its type tells."""
        self._ids: list[int] = []
        self._accepts: dict[tuple[Any, ...], dict[tuple[torch.dtype, torch.device], bool]] = {}
        self.slots: list[Slot] = []
        """The parameters' places, in the order in which they were given."""
        self.flats: list[Flat] = []
        """The buffers, one per device, dtype and shards. Their addresses change only with the parameters."""

    def start(self) -> None:
        """A window begins: every `.grad` is its view again, and zero."""
        params: list[Tensor] = []
        for param in self._parameters():
            if param.requires_grad:
                params.append(param)
            elif param.grad is not None:
                param.grad = None  # an optimizer would go on moving a frozen parameter along it
        if not params:
            raise GradientError(
                "the trained parameters",
                given="none that requires grad",
                expected="at least one",
                fix="unfreeze a part of the model",
            )
        if list(map(id, params)) != self._ids or not all(map(self._is_in_place, self.slots)):
            self._lay_out(params)
        for flat in self.flats:
            flat.storage.zero_()
        for slot in self.slots:
            if slot.param.grad is not slot.view:
                set_gradient(slot.param, slot.view)
            slot.version = slot.local._version

    def collect(self, *, adopts: bool = False) -> None:
        """The last backward is through: note which parameters were used.

        Args:
            adopts: take over gradients that replaced their views, as a wrapper around the model may do.

        Raises:
            GradientError: somebody has set a `.grad` inside the window, to None for one; what it held is lost.
        """
        for slot in self.slots:
            grad = slot.param.grad
            if grad is slot.view:
                slot.used = slot.has_moved
            elif adopts:
                slot.used = grad is not None
                if grad is None:
                    slot.local.zero_()
                else:
                    slot.local.copy_(_local(grad.to_dense() if grad.is_sparse else grad))
                set_gradient(slot.param, slot.view)
            else:
                raise GradientError(
                    f"the gradient of a parameter of shape {tuple(slot.param.shape)}",
                    given="another .grad than the window began with",
                    expected="gradients that nobody sets inside a window",
                    fix="leave zero_grad() to the step: it clears gradients at the start of every window",
                )

        if [id(param) for param in self._parameters() if param.requires_grad] != self._ids:
            known = set(self._ids)
            for param in self._parameters():
                if id(param) not in known:
                    param.grad = None  # unfrozen inside the window: it takes part from the next one on

    def touch(self, slots: Iterable[Slot]) -> None:
        """Something added to these, of which autograd does not know: count them as used by the window."""
        torch.autograd.graph.increment_version([slot.local for slot in slots])

    @contextmanager
    def adding_at_once(self) -> Generator[None]:
        """A backward in this context keeps the gradients of small parameters to itself; then they are added by one
        operation instead of one for each, of which a device takes longer to start the next than to add."""
        small = [slot for slot in self.slots if slot.local.numel() <= _SMALL and slot.param.dtype == slot.view.dtype]
        for slot in small:
            slot.param.grad = None
        try:
            yield
            added = [(slot.local, _local(slot.param.grad)) for slot in small if slot.param.grad is not None]
            if added:
                torch._foreach_add_(*map(list, zip(*added, strict=True)))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage, reportArgumentType]
        finally:
            for slot in small:
                slot.param.grad = slot.view

    def clear(self) -> None:
        """The window is given up: no parameter has a gradient."""
        for slot in self.slots:
            slot.param.grad = None
            slot.used = False

    def holds_strays(self) -> bool:
        """Whether a parameter has a gradient that is not its place in the buffer."""
        views = {id(slot.param): slot.view for slot in self.slots}
        return any(p.grad is not None and p.grad is not views.get(id(p)) for p in self._parameters())

    def empty(self, params: Collection[int]) -> None:
        """Take back what a window has added to some parameters, given by their `id`."""
        for slot in self.slots:
            if id(slot.param) in params:
                if slot.param.grad is not slot.view:  # a wrapper's own, which `collect` would adopt
                    slot.param.grad = None
                slot.local.zero_()
                slot.version, slot.used = slot.local._version, False

    def norm(self, order: float = 2.0, *, dtype: torch.dtype | None = None) -> Tensor:
        """Norm of all gradients together, as a 0-d tensor on the first buffer's device; computed in `dtype`, or in
        each buffer's own."""
        norms = [_norm(flat, order, dtype) for flat in self.flats]
        if len(norms) == 1:
            return norms[0]
        return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, torch.float64) for n in norms]), order)

    def scale_(self, factor: float | Tensor) -> None:
        """Multiply all gradients by a number or a 0-d tensor."""
        for flat in self.flats:
            if isinstance(factor, Tensor):
                factor = factor.to(flat.numbers.device)
            flat.numbers.mul_(factor)

    def clamp_(self, limit: float) -> None:
        """Clip every element of the gradients to [-limit, limit]; real and imaginary parts alike."""
        for numbers, *_ in self.flats:
            (torch.view_as_real(numbers) if numbers.is_complex() else numbers).clamp_(-limit, limit)

    @contextmanager
    def lent_to(self, optimizers: Sequence[Optimizer]) -> Generator[None]:
        """Gradients as these optimizers may see them, for the time of their step.

        A parameter that the window did not use has `.grad` None (a zero would still decay its weight and move its
        momentum), and keeps it until the next window starts. Where an optimizer refuses an fp32 gradient for a 16-bit
        parameter, it gets the finished sum rounded once to the parameter's dtype.
        """
        for slot in self.slots:
            if not slot.used:
                slot.param.grad = None
        cast = [slot for slot in self._cast_for(optimizers) if slot.used]
        rounded = {(id(slot.flat), slot.param.dtype): (slot.flat.numbers, slot.param.dtype) for slot in cast}
        rounded = {key: numbers.to(dtype) for key, (numbers, dtype) in rounded.items()}
        for slot in cast:
            numbers = rounded[id(slot.flat), slot.param.dtype]
            set_gradient(slot.param, _as_gradient(slot.param, slot.within(numbers)))
        try:
            yield
        finally:
            for slot in cast:
                set_gradient(slot.param, slot.view)

    def release(self) -> None:
        """Give the parameters back: each `.grad` is None and of the parameter's own dtype again."""
        for slot in self.slots:
            _detach(slot)
        self.slots, self._ids, self.flats = [], [], []

    def groups(self) -> tuple[dist.ProcessGroup, ...]:
        """Ranks that have other pieces of the same parameters."""
        return tuple(dict.fromkeys(group for flat in self.flats for group in flat.shards))

    def used(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters that the window used, each with its view of the buffer."""
        return [(slot.param, slot.view) for slot in self.slots if slot.used]

    def _is_in_place(self, slot: Slot) -> bool:
        # A model moved or cast since the last window carries its `.grad` along, and the view leaves the buffer.
        param, local = _local(slot.param), slot.local
        return (
            local.data_ptr() == slot.address
            and param.shape == local.shape
            and self._dtype(param.dtype) == local.dtype
            and param.device == local.device
        )

    def _lay_out(self, params: list[Tensor]) -> None:
        unique = list({id(param): param for param in params}.values())
        for slot in self.slots:
            _detach(slot)
        groups: dict[tuple[Any, ...], list[Tensor]] = {}
        for param in unique:
            key = (_local(param).device, self._dtype(param.dtype), self.shards(param))
            groups.setdefault(key, []).append(param)
        self.slots, self.flats = [], []
        widest_first = sorted(groups.items(), key=lambda item: (item[0][1].is_complex, -item[0][1].itemsize))
        for (device, dtype, shards), members in widest_first:
            starts = [0]
            for param in members:
                starts.append(starts[-1] + _aligned(_local(param).numel()))
            size = starts.pop()
            room = 0 if self.flats else _aligned(self._header(len(unique)))
            storage = torch.zeros(room + size, dtype=dtype, device=device)
            flat = Flat(storage[room:], storage, shards)
            self.flats.append(flat)
            self.slots += [Slot(param, flat, start) for param, start in zip(members, starts, strict=True)]
        self._ids = list(map(id, params))

    def _cast_for(self, optimizers: Sequence[Optimizer]) -> list[Slot]:
        wider = {id(slot.param): slot for slot in self.slots if slot.param.dtype != slot.view.dtype}
        if not wider:
            return []
        cast: list[Slot] = []
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                takes = self._takes(optimizer, group)
                cast += [wider[id(p)] for p in group["params"] if id(p) in wider and not takes(wider[id(p)])]
        return cast

    def _takes(self, optimizer: Optimizer, group: dict[str, Any]) -> Callable[[Slot], bool]:
        """Whether an optimizer takes the wider gradients of a group's parameters."""
        options = {name: value for name, value in group.items() if name != "params"}
        switches = tuple(
            (name, bool(value)) for name, value in options.items() if isinstance(value, bool | int | float)
        )
        known = self._accepts.setdefault((type(optimizer), switches), {})

        def takes(slot: Slot) -> bool:
            key = (slot.param.dtype, slot.local.device)
            if key not in known:
                known[key] = accepts_wider(type(optimizer), options, slot.param, slot.local)
            return known[key]

        return takes


def _norm(flat: Flat, order: float, dtype: torch.dtype | None) -> Tensor:
    numbers = torch.view_as_real(flat.numbers).view(-1, 2).norm(dim=1) if flat.numbers.is_complex() else flat.numbers
    if numbers.device.type == "cpu":  # where a float32 norm adds up one by one: 4e-4 off for 20,000 elements
        dtype = torch.float64
    norm = torch.linalg.vector_norm(numbers, order, dtype=dtype)
    for group in flat.shards:
        whole = norm if math.isinf(order) else norm**order
        dist.all_reduce(whole, dist.ReduceOp.MAX if math.isinf(order) else dist.ReduceOp.SUM, group=group)
        norm = whole if math.isinf(order) else whole ** (1 / order)
    return norm


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _local(tensor: Tensor) -> Tensor:
    # to_local() would make a new tensor, whose version counter nobody else moves.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # pyright: ignore[reportPrivateUsage]


def shards_of(param: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups over which a parameter is cut into pieces."""
    if not isinstance(param, DTensor):
        return ()
    placed = enumerate(param.placements)
    return tuple(param.device_mesh.get_group(axis) for axis, placement in placed if placement.is_shard())


def _as_gradient(param: Tensor, local: Tensor) -> Tensor:
    """A buffer's view as it may be a parameter's `.grad`: for a `DTensor`, a `DTensor` on top of it."""
    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def _detach(slot: Slot) -> None:
    if slot.param.grad is slot.view:
        slot.param.grad = None
    if slot.param.grad is None:
        slot.param.grad_dtype = slot.param.dtype


def _view(flat: Tensor, param: Tensor, start: int) -> Tensor:
    """A parameter's part of a flat buffer, in the parameter's own memory layout where that is dense, so that an
    optimizer finds both in one order (autograd's gradient layout contract)."""
    param = _local(param)
    part = flat[start : start + param.numel()]
    dense = torch.empty_like(param, device="meta").stride()  # preserve_format: the param's own strides if dense
    # .data gives every view a version counter of its own; autograd's additions to it can then be told apart.
    return part.as_strided(param.shape, dense).data
