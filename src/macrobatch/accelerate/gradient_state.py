"""Where training stands, for whoever looks: which loaders are being read, and the window of the accelerator in use."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

__all__ = ["GradientState", "Reading"]


class Reading:
    """One loader that is being read: its latest batch."""

    __slots__ = ("loader", "num_rows", "serial")

    def __init__(self, loader: Any) -> None:
        self.loader = weakref.ref(loader)
        self.num_rows = 1
        self.serial = 0
        """The how-manieth batch of all loaders together it was; 0 before the first."""

    @property
    def is_at_end(self) -> bool:
        """Whether the latest batch is the loader's last."""
        return bool(getattr(self.loader(), "end_of_dataloader", False))


class GradientState:
    """A view of what is accumulated, constructible anywhere.

    Unless it is an accelerator's own, it shows that of the one that was used last. Loaders report to it, whoever owns
    it, since an epoch's end concerns every window that they feed.

    Attributes:
        num_steps: micro-batches of a full window.
        sync_gradients: whether this micro-batch is the last of its window (True where there is no window).
        end_of_dataloader: whether the loader that was started last, and not finished, has yielded its last batch.
        remainder: rows that count of its last batch, over all ranks; -1 if that is not known or no loader is read.
    """

    _shared_state: ClassVar[dict[str, Any]] = {}

    def __init__(self, gradient_accumulation_plugin: Any = None, *, is_own: bool = False) -> None:
        shared = GradientState._shared_state
        if not shared:
            shared.update(readings=[], begun=[], serial=0, owner=None)
        self._plugin = gradient_accumulation_plugin
        self._is_own = is_own or gradient_accumulation_plugin is not None
        if self._is_own:
            shared.update(owner=weakref.ref(self), latest_plugin=gradient_accumulation_plugin)
        self._sync_gradients = True
        self.is_held = False

    @property
    def initialized(self) -> bool:
        """Whether anybody has constructed one since the last reset."""
        return bool(GradientState._shared_state)

    @property
    def plugin_kwargs(self) -> dict[str, Any]:
        """The plugin's settings."""
        plugin = self._of_owner()._plugin
        return {} if plugin is None else plugin.to_kwargs()

    @property
    def num_steps(self) -> int:
        """Micro-batches of a full window."""
        plugin = self._of_owner()._plugin
        return 1 if plugin is None else plugin.num_steps

    def set_num_steps(self, num_steps: int) -> None:
        """Another number of them, from now on."""
        self._of_owner()._plugin.num_steps = num_steps

    @property
    def adjust_scheduler(self) -> bool:
        """Whether schedulers move with every micro-batch instead of with every update."""
        return bool(self.plugin_kwargs.get("adjust_scheduler", False))

    @property
    def normalize(self) -> str:
        """What a window's gradient is divided by: "exact", "uniform" or "constant"."""
        return getattr(self._of_owner()._plugin, "normalize", "exact")

    @property
    def widens(self) -> bool:
        """Whether gradients of 16-bit parameters are summed in float32."""
        return bool(getattr(self._of_owner()._plugin, "widens", True))

    @property
    def sync_with_dataloader(self) -> bool:
        """Whether the end of a loader ends a window."""
        return bool(getattr(self._of_owner()._plugin, "sync_with_dataloader", True))

    @property
    def sync_each_batch(self) -> bool:
        """Whether gradients are reduced in every micro-batch, to hold less of them."""
        return bool(getattr(self._of_owner()._plugin, "sync_each_batch", False))

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-batch is the last of its window."""
        return self._of_owner()._sync_gradients

    def _set_sync_gradients(self, sync_gradients: bool) -> None:
        """Of a loop that decides by itself which micro-batch is the last: no step, no sync, until it is True."""
        owner = self._of_owner()
        owner._sync_gradients, owner.is_held = sync_gradients, not sync_gradients

    def show(self, sync_gradients: bool) -> None:
        """What a window found for its micro-batch; its accelerator is now the one in use."""
        self._sync_gradients = sync_gradients
        GradientState._shared_state["owner"] = weakref.ref(self)

    @property
    def is_xla_gradients_synced(self) -> bool:
        """Always False: there is no XLA here."""
        return False

    @property
    def readings(self) -> list[Reading]:
        """The loaders that are being read, in the order in which they were started."""
        shared = GradientState._shared_state
        return shared["readings"] if shared else self._shared()["readings"]

    @property
    def dataloader_references(self) -> list[Any]:
        """The loaders that are being read, the innermost last, after a None."""
        return [None, *(reading.loader() for reading in self.readings)]

    @property
    def active_dataloader(self) -> Any:
        """The loader that was started last and is not finished."""
        return self.readings[-1].loader() if self.readings else None

    @property
    def in_dataloader(self) -> bool:
        """Whether a prepared loader is being read."""
        return bool(self.readings)

    @property
    def end_of_dataloader(self) -> bool:
        """Whether the active loader has yielded its last batch."""
        return bool(self.readings) and self.readings[-1].is_at_end

    @property
    def remainder(self) -> int:
        """Rows that count of the active loader's last batch, over all ranks."""
        return getattr(self.active_dataloader, "remainder", -1)

    def _add_dataloader(self, dataloader: Any) -> None:
        readings = [reading for reading in self.readings if reading.loader() not in (None, dataloader)]
        self.readings[:] = [*readings, Reading(dataloader)]
        self._shared()["begun"].append(weakref.ref(dataloader))

    def _yielded(self, dataloader: Any, num_rows: int) -> None:
        shared = self._shared()
        shared["serial"] += 1
        for reading in shared["readings"]:
            if reading.loader() is dataloader:
                reading.num_rows, reading.serial = num_rows, shared["serial"]

    def _remove_dataloader(self, dataloader: Any) -> None:
        self.readings[:] = [reading for reading in self.readings if reading.loader() not in (None, dataloader)]

    def _exhausted(self, dataloader: Any) -> None:
        shared = self._shared()
        shared["begun"] = [reference for reference in shared["begun"] if reference() is not dataloader]

    def _shared(self) -> dict[str, Any]:
        if not GradientState._shared_state:
            GradientState()
        return GradientState._shared_state

    def _of_owner(self) -> GradientState:
        if self._is_own:
            return self
        owner = self._shared()["owner"]
        found = None if owner is None else owner()
        return self if found is None else found

    def __repr__(self) -> str:
        return (
            f"Sync Gradients: {self.sync_gradients}\n"
            f"At end of current dataloader: {self.end_of_dataloader}\n"
            f"Extra samples added: {self.remainder}\n"
            f"Gradient accumulation plugin: {self.plugin_kwargs}\n"
        )

    @staticmethod
    def _reset_state() -> None:
        """Forget everything, as tests do between two of them."""
        GradientState._shared_state.clear()
