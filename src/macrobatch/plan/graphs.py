"""Micro-steps recorded once for each form of micro-batch, and replayed.

A form's first micro-batches run eagerly and count: they are the rehearsal. The next one is recorded, which changes
nothing, and replayed, which counts. Losses and weights are copied out of the recording, the factors that its backward
starts from are written into it once per window, and which parameters it uses is noted when it is made. What cannot be
recorded runs eagerly, and one line in the log says why.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from macrobatch import tree
from macrobatch.core.autograd import backward
from macrobatch.core.gradients import Slot
from macrobatch.core.loss import Part, taken_apart
from macrobatch.core.microstep import LossFn, MicroStep
from macrobatch.core.snapshot import rng_states, set_rng_states
from macrobatch.core.tally import Tally
from macrobatch.errors import MacrobatchError
from macrobatch.plan.recorder import CudaRecorder, Recorder
from macrobatch.plan.surroundings import Surroundings, Unfit, form_of
from macrobatch.plan.trial import disagreement

__all__ = ["Graphs"]

_LOG = logging.getLogger("macrobatch")


class Graphs(MicroStep):
    """Micro-steps as CUDA graphs, one for each form of micro-batch.

    A recording holds for micro-batches of one structure whose tensors have the same shapes, strides and dtypes and
    whose other values are equal, and for a model in one state: parameters and buffers in their places, modules in
    training or not, what requires grad, autocast, and no hooks. Anything else is recorded anew or runs eagerly.

    Args:
        recorder: what records; by default CUDA graphs.
        verifies: before a recording is trusted, run every micro-batch of the window it was made in, and of the next
            window, both ways, and compare losses, weights, gradients and which parameters were used. Eager results
            count meanwhile.
        num_rehearsals: eager micro-batches of a form before it is recorded.
        max_recordings: forms beyond these run eagerly.
    """

    def __init__(
        self,
        recorder: Recorder | None = None,
        *,
        verifies: bool = False,
        num_rehearsals: int = 2,
        max_recordings: int = 8,
    ) -> None:
        self._recorder = recorder
        self._verifies = verifies
        self._num_rehearsals = num_rehearsals
        self._max_recordings = max_recordings
        self._buckets: dict[Hashable, _Bucket] = {}
        self._modes: dict[Hashable, tuple[int, list[nn.Module]]] = {}
        self._mode = 0
        self._places: Hashable = None
        self._slots: list[Slot] = []
        self._obstacle: str | None = None
        self._is_distrusted = False
        self._tally: Tally | None = None
        self._num_windows = 0
        self._said: set[str] = set()

    @property
    def num_first(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Rehearsals, and a recording."""
        return self._num_rehearsals + 1

    @property
    def num_copies(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """To be compared: gradients from before a micro-batch, and those of its replay."""
        return 2 * self._verifies

    @property
    def keeps_memory(self) -> bool:
        """A graph's memory is its own: an eager micro-batch, of a form that is new or on trial, needs as much again."""
        return Surroundings.of(self.model, self.gradients, self.device).obstacle is None

    def fresh(self) -> Graphs:
        if self._recorder is None and hasattr(self, "device"):
            self._recorder = CudaRecorder(self.device)  # one for all: libraries keep a workspace for each stream
        other = Graphs(self._recorder, num_rehearsals=self._num_rehearsals)
        other._said = self._said
        return other

    def release(self) -> None:
        self._forget()

    @property
    def num_recordings(self) -> int:
        """Recordings that exist."""
        return sum(bucket.recording is not None for bucket in self._buckets.values())

    def window(self) -> AbstractContextManager[Any]:
        if self._recorder is None:
            self._recorder = CudaRecorder(self.device)
        return self._recorder.window()

    def __call__(self, loss_fn: LossFn, micro_batch: Any, num_rows: int, tally: Tally) -> None:
        try:
            self._run(loss_fn, micro_batch, num_rows, tally)
        except torch.OutOfMemoryError:  # whoever tries again may need what the recordings have
            self._forget()
            raise

    def _run(self, loss_fn: LossFn, micro_batch: Any, num_rows: int, tally: Tally) -> None:
        bucket = None
        if num_rows and not self._is_distrusted:
            if tally is not self._tally:
                self._begin_window(tally)
            try:
                bucket = self._bucket(micro_batch, num_rows)
            except Unfit as obstacle:
                self._say(str(obstacle))
        eager = super().__call__
        if bucket is None:
            eager(loss_fn, micro_batch, num_rows, tally)
        elif bucket.recording is not None or self._is_recorded(bucket, loss_fn, num_rows, tally):
            assert bucket.recording is not None
            bucket.load()
            bucket.recording.begin(tally, self)
            if self._verifies and self._num_windows <= bucket.recording.made_in + 1:
                self._try(bucket.recording, loss_fn, micro_batch, num_rows, tally)
            else:
                bucket.recording.run(tally, self)
        elif bucket.is_rehearsing:
            self._rehearse(bucket, loss_fn, micro_batch, num_rows, tally)
        else:
            eager(loss_fn, micro_batch, num_rows, tally)

    def _begin_window(self, tally: Tally) -> None:
        self._tally = tally
        self._num_windows += 1
        places, mode, self._obstacle, modules = Surroundings.of(self.model, self.gradients, self.device)
        self._mode, _ = self._modes.setdefault(mode, (len(self._modes), modules))
        if self._obstacle is not None:
            self._say(self._obstacle)
        elif places != self._places or self.gradients.slots is not self._slots:
            if self.num_recordings:
                self._say("the trained parameters have changed, or lie elsewhere", "capture: records anew")
            self._forget()
            self._places, self._slots = places, self.gradients.slots

    def _bucket(self, micro_batch: Any, num_rows: int) -> _Bucket | None:
        """Where a micro-batch belongs, with its tensors; None if it runs eagerly."""
        if self._obstacle is not None:
            return None
        form = form_of(micro_batch)
        key = (self._mode, self.model.training, num_rows, form.key)
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= self._max_recordings:
                raise Unfit(f"there are more than {self._max_recordings} forms of micro-batch; further ones")
            bucket = self._buckets[key] = _Bucket()
        if bucket.is_hopeless:
            return None
        bucket.tensors = form.tensors
        return bucket

    def _rehearse(self, bucket: _Bucket, loss_fn: LossFn, micro_batch: Any, num_rows: int, tally: Tally) -> None:
        run = super().__call__

        def noting(model: Any, batch: Any) -> Any:
            output = loss_fn(model, batch)
            parts = taken_apart(output, num_rows)
            bucket.expected = {name: _blank(part) for name, part in parts.items()}
            return output

        if bucket.batch is None:
            bucket.batch = tree.map_tensors(lambda tensor: bucket.input_like(tensor, self.device), micro_batch)
        bucket.load()
        drawn = _host_draws(self.device)
        assert self._recorder is not None
        obstacle = self._recorder.rehearse(lambda: run(noting, bucket.batch, num_rows, tally))
        bucket.num_rehearsals += 1
        if obstacle is None and drawn != _host_draws(self.device):
            obstacle = "it draws random numbers on the host, which a replay would not"
        if bucket.num_rehearsals < self._num_rehearsals:
            return
        bucket.is_rehearsing = False
        if obstacle is not None:
            bucket.give_up()
            self._say(obstacle)

    def _is_recorded(self, bucket: _Bucket, loss_fn: LossFn, num_rows: int, tally: Tally) -> bool:
        """Record a micro-batch that has been rehearsed. Afterwards nothing is different but the bucket."""
        if bucket.is_rehearsing:
            return False
        bucket.load()
        recording = _Recording(self._num_windows, bucket)
        draws = rng_states(self.device)
        buffers = [(m, name, b) for m in self.model.modules() for name, b in m._buffers.items()]  # pyright: ignore[reportPrivateUsage]
        assert self._recorder is not None
        try:
            recording.make(self, self._recorder, lambda: loss_fn(self.model, bucket.batch), num_rows, tally)
            if any(module._buffers.get(name) is not buffer for module, name, buffer in buffers):  # pyright: ignore[reportPrivateUsage]
                raise Unfit("the model replaces its buffers, which a replay would not")
            bucket.recording = recording
        except Exception as error:  # whatever it is, it is raised again if it comes from the eager run too
            bucket.give_up()
            self._say(_reason(error))
        finally:
            set_rng_states(self.device, draws)
            for module, name, buffer in buffers:
                module._buffers[name] = buffer  # pyright: ignore[reportPrivateUsage]
        return bucket.recording is not None

    def _try(self, recording: _Recording, loss_fn: LossFn, micro_batch: Any, num_rows: int, tally: Tally) -> None:
        eager, plain = super().__call__, getattr(loss_fn, "eager", loss_fn)
        differs = disagreement(
            self,
            replay=recording.replay,
            parts=recording.parts,
            used=recording.slots,
            eager=lambda: eager(plain, micro_batch, num_rows, tally),
            tally=tally,
        )
        if differs is not None:
            self._is_distrusted = True
            self._forget()
            self._say(differs)

    def _forget(self) -> None:
        self._buckets.clear()
        if self._recorder is not None:
            self._recorder.forget()

    def _say(self, cause: str, what: str = "capture: runs eagerly") -> None:
        if cause not in self._said:
            self._said.add(cause)
            _LOG.warning("%s, since %s", what, cause)


class _Bucket:
    """Micro-batches of one form, and the memory that they are copied to: rehearsals run on what is to be recorded."""

    __slots__ = (
        "batch",
        "expected",
        "inputs",
        "is_hopeless",
        "is_rehearsing",
        "num_rehearsals",
        "recording",
        "tensors",
    )

    def __init__(self) -> None:
        self.num_rehearsals = 0
        self.is_rehearsing = True
        self.is_hopeless = False
        self.batch: Any = None
        self.inputs: list[Tensor] = []
        self.tensors: list[Tensor] = []
        self.expected: dict[str, Part] = {}
        self.recording: _Recording | None = None

    def input_like(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Memory for one of a micro-batch's tensors."""
        self.inputs.append(torch.empty_like(tensor, device=device))
        return self.inputs[-1]

    def give_up(self) -> None:
        """It runs eagerly from now on, and needs no memory of its own."""
        self.is_hopeless = True
        self.batch, self.inputs, self.tensors = None, [], []

    def load(self) -> None:
        """Copy the micro-batch at hand, from the host through pinned memory, without waiting."""
        tensors, self.tensors = self.tensors, []
        if not tensors:
            return
        if self.inputs[0].is_cuda and not all(tensor.is_cuda for tensor in tensors):
            tensors = [tensor if tensor.is_cuda else tree.pinned(tensor) for tensor in tensors]
        torch._foreach_copy_(self.inputs, tensors, non_blocking=True)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


class _Recording:
    """A recorded micro-step with memory of its own for what its backward starts from, its losses and its weights."""

    def __init__(self, num_windows: int, bucket: _Bucket) -> None:
        self.made_in = num_windows
        self.parts = bucket.expected
        self.seeds = [torch.zeros_like(part.tensor) for part in self.parts.values() if part.tensor.requires_grad]
        self.slots: list[Slot] = []
        self._window: Tally | None = None
        self._results: dict[str, Part] = {}
        self._has_weights = False

    def make(self, graphs: Graphs, recorder: Recorder, forward: Any, num_rows: int, tally: Tally) -> None:
        """Record it."""
        slots = graphs.gradients.slots
        versions = [slot.local._version for slot in slots]

        def run() -> dict[str, Part]:
            torch.clear_autocast_cache()  # a cast of the weights made before would stay as it is, one made here
            with graphs.precision.forward():  # belongs to the recording
                output = forward()
            parts = taken_apart(output, num_rows)
            torch.clear_autocast_cache()
            if _kinds(parts) != _kinds(self.parts):
                raise Unfit("loss_fn does not return the same kind of loss for each micro-batch")
            tensors = [part.tensor for part in parts.values() if part.tensor.requires_grad]
            if tensors:
                with graphs.gradients.adding_at_once():
                    backward(tensors, tally.over_weights(parts, [seed.detach() for seed in self.seeds]))
            return {
                name: part._replace(tensor=part.tensor.detach().requires_grad_(part.tensor.requires_grad))
                for name, part in parts.items()
            }

        self.parts, self.replay = recorder.record(run)
        self._results = {name: part._replace(tensor=part.tensor.detach()) for name, part in self.parts.items()}
        self._has_weights = any(isinstance(part.weight, Tensor) for part in self.parts.values())
        self.slots = [slot for slot, version in zip(slots, versions, strict=True) if slot.local._version != version]

    def begin(self, tally: Tally, graphs: Graphs) -> None:
        """Once per window, take in what its backward starts from."""
        if tally is self._window:
            return
        tally.begin(self.parts)
        for seed, value in zip(self.seeds, graphs.precision.seeds(tally.seeds(self.parts)), strict=True):
            seed.copy_(value)

    def run(self, tally: Tally, graphs: Graphs) -> None:
        """Replay, and note losses and weights before the next replay overwrites them."""
        if tally is not self._window:
            self._window = tally
            graphs.gradients.touch(self.slots)
        self.replay()
        results = self._results  # the tally copies losses, since they are no result of autograd
        tally.note({name: _copied_out(part) for name, part in results.items()} if self._has_weights else results)


def _copied_out(part: Part) -> Part:
    """A part whose weight the next replay does not overwrite."""
    return part._replace(weight=part.weight.clone()) if isinstance(part.weight, Tensor) else part


def _blank(part: Part) -> Part:
    like = torch.empty_like(part.tensor.detach()).requires_grad_(part.tensor.requires_grad)
    return part._replace(tensor=like)


def _kinds(parts: dict[str, Part]) -> list[Hashable]:
    """All that must be the same in every micro-batch of one form."""
    return [
        (name, tensor.dtype, tensor.device, tensor.requires_grad, factor, weight)
        if not isinstance(weight, Tensor)
        else (name, tensor.dtype, tensor.device, tensor.requires_grad, factor, weight.dtype, weight.device)
        for name, (tensor, factor, weight) in parts.items()
    ]


def _host_draws(device: torch.device) -> Hashable:
    """Where the host's random number generators are; on a CPU without torch's, which is the device's own there."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    numpy = (kind, np.asarray(keys).tobytes(), *rest)
    torchs = None if device.type == "cpu" else torch.get_rng_state().numpy().tobytes()
    return random.getstate(), numpy, torchs


def _reason(error: Exception) -> str:
    if isinstance(error, Unfit | MacrobatchError):
        return str(error)
    first = str(error).strip().partition("\n")[0]
    return f"recording failed with {type(error).__name__}: {first}"
