"""The window: every transition by itself, then random sequences of them against a plain model."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from macrobatch.core.window import Tail, Window
from macrobatch.errors import ArgumentError, StateError, WindowError

TAILS = get_args(Tail)


def window_with(num_pending: int, *, size: int = 4, tail: Tail = "apply") -> Window:
    window = Window(size, tail=tail)
    for _ in range(num_pending):
        window.admit()
    return window


def counters(window: Window) -> dict[str, int]:
    return {name: getattr(window, name) for name in ("num_pending", "num_updates", "num_skipped", "num_dropped")}


# --- construction and size ---


def test_tails_are_three():
    assert TAILS == ("apply", "drop", "carry")


def test_window_new_is_open_and_empty():
    window = Window(3)
    assert not window.is_closed
    assert window.size == 3
    assert window.tail == "apply"
    assert counters(window) == {"num_pending": 0, "num_updates": 0, "num_skipped": 0, "num_dropped": 0}


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "4", None])
def test_size_not_a_positive_integer_is_refused(size):
    with pytest.raises(ArgumentError, match="window size") as caught:
        Window(size)
    assert caught.value.given == repr(size)


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "4", None])
def test_size_set_to_no_positive_integer_is_refused_and_kept(size):
    window = Window(3)
    with pytest.raises(ArgumentError, match="window size"):
        window.size = size
    assert window.size == 3


@pytest.mark.parametrize("tail", ["", "keep", "Apply", None, 1])
def test_tail_unknown_is_refused(tail):
    with pytest.raises(ArgumentError, match="tail"):
        Window(2, tail=tail)


def test_window_has_no_room_for_a_second_counter():
    with pytest.raises(AttributeError):
        Window(2).num_micro_batches = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_size_raised_in_a_window_prolongs_it():
    window = window_with(1, size=2)
    window.size = 3
    assert [window.admit(), window.admit()] == [False, True]
    assert window.num_pending == 3


def test_size_lowered_below_pending_closes_with_the_next_micro_batch():
    window = window_with(3, size=4)
    window.size = 2
    assert not window.is_closed  # takes effect with the next one
    assert window.admit()
    assert window.num_pending == 4


def test_size_changed_on_a_closed_window_leaves_it_closed():
    window = window_with(2, size=2)
    window.size = 5
    assert window.is_closed
    window.applied()
    assert [window.admit() for _ in range(5)] == [False] * 4 + [True]


# --- admit ---


@pytest.mark.parametrize("size", [1, 2, 5])
def test_admit_closes_with_the_last_of_size(size):
    window = Window(size)
    assert [window.admit() for _ in range(size)] == [False] * (size - 1) + [True]
    assert window.is_closed
    assert window.num_pending == size


@pytest.mark.parametrize(("tail", "closes"), [("apply", True), ("drop", False), ("carry", False)])
def test_admit_at_end_of_data_closes_a_short_window_only_to_apply_it(tail, closes):
    window = window_with(1, tail=tail)
    assert window.admit(end_of_data=True) is closes
    assert window.is_closed is closes
    assert window.num_pending == 2


@pytest.mark.parametrize("tail", TAILS)
def test_admit_at_end_of_data_closes_a_full_window(tail):
    assert window_with(1, size=2, tail=tail).admit(end_of_data=True)


@pytest.mark.parametrize("end_of_data", [False, True])
def test_admit_on_a_closed_window_is_refused_and_changes_nothing(end_of_data):
    window = window_with(2, size=2)
    before = window.state_dict()
    with pytest.raises(WindowError, match=r"closed window of 2.*applied\(\) or skipped\(\)"):
        window.admit(end_of_data=end_of_data)
    assert window.state_dict() == before


# --- finish ---


@pytest.mark.parametrize("tail", TAILS)
def test_finish_on_an_empty_window_does_nothing(tail):
    window = Window(3, tail=tail)
    before = window.state_dict()
    assert window.finish() is False
    assert window.state_dict() == before


def test_finish_under_apply_closes_the_short_window():
    window = window_with(2, tail="apply")
    assert window.finish() is True
    assert window.is_closed
    assert window.num_pending == 2
    window.applied()
    assert counters(window) == {"num_pending": 0, "num_updates": 1, "num_skipped": 0, "num_dropped": 0}


def test_finish_under_drop_throws_the_short_window_away():
    window = window_with(2, tail="drop")
    assert window.finish() is False
    assert counters(window) == {"num_pending": 0, "num_updates": 0, "num_skipped": 0, "num_dropped": 2}


def test_finish_under_carry_keeps_the_short_window_pending():
    window = window_with(3, tail="carry")
    assert window.finish() is False
    assert window.num_pending == 3
    assert window.admit() is True  # the fourth comes from the next pass over the data


@pytest.mark.parametrize("tail", TAILS)
def test_finish_on_a_closed_window_says_that_it_must_be_applied(tail):
    window = window_with(4, tail=tail)
    before = window.state_dict()
    assert window.finish() is True
    assert window.state_dict() == before


def test_finish_twice_says_the_same():
    window = window_with(1)
    assert [window.finish(), window.finish()] == [True, True]
    assert window.num_pending == 1


# --- applied, skipped, discard ---


@pytest.mark.parametrize(("end", "counter"), [("applied", "num_updates"), ("skipped", "num_skipped")])
def test_end_of_a_closed_window_counts_it_and_opens_the_next(end, counter):
    window = window_with(2, size=2)
    getattr(window, end)()
    assert not window.is_closed
    assert counters(window) == {"num_pending": 0, "num_updates": 0, "num_skipped": 0, "num_dropped": 0} | {counter: 1}


@pytest.mark.parametrize("num_pending", [0, 1])
@pytest.mark.parametrize("end", ["applied", "skipped"])
def test_end_of_an_open_window_is_refused_and_changes_nothing(end, num_pending):
    window = window_with(num_pending, size=2)
    before = window.state_dict()
    with pytest.raises(WindowError, match=rf"Window\.{end}: given an open window with {num_pending} of 2"):
        getattr(window, end)()
    assert window.state_dict() == before


@pytest.mark.parametrize("end", ["applied", "skipped"])
def test_end_twice_is_refused(end):
    window = window_with(2, size=2)
    getattr(window, end)()
    with pytest.raises(WindowError):
        getattr(window, end)()


@pytest.mark.parametrize("num_pending", [0, 1, 4])
def test_discard_returns_and_counts_what_is_lost(num_pending):
    window = window_with(num_pending)
    assert window.discard() == num_pending
    assert not window.is_closed
    assert counters(window) == {"num_pending": 0, "num_updates": 0, "num_skipped": 0, "num_dropped": num_pending}


def test_discard_adds_up():
    window = window_with(1)
    window.discard()
    window.admit()
    window.admit()
    assert window.discard() == 2
    assert window.num_dropped == 3


def test_repr_shows_state_and_progress():
    window = window_with(1, size=2)
    assert repr(window) == "Window(open, 1/2 micro-batches, 0 updates)"
    window.admit()
    assert repr(window) == "Window(closed, 2/2 micro-batches, 0 updates)"


# --- state ---


def test_state_dict_survives_json_and_restores_a_closed_window():
    window = window_with(3, size=3, tail="carry")
    window.applied()
    window.admit()
    window.discard()
    for _ in range(3):
        window.admit()
    resumed = Window(1)
    resumed.load_state_dict(json.loads(json.dumps(window.state_dict())))
    assert resumed.state_dict() == window.state_dict()
    assert resumed.is_closed
    resumed.skipped()
    assert counters(resumed) == {"num_pending": 0, "num_updates": 1, "num_skipped": 1, "num_dropped": 1}


def test_state_dict_is_a_copy():
    window = Window(2)
    state = window.state_dict()
    window.admit()
    assert state["num_pending"] == 0
    state["num_pending"] = 7
    assert window.num_pending == 1


COUNTER_NAMES = ("num_pending", "num_updates", "num_skipped", "num_dropped")
KEYS = ("version", "size", "tail", "is_closed", *COUNTER_NAMES)


def test_state_dict_has_the_keys_that_this_file_corrupts():
    assert set(Window(1).state_dict()) == set(KEYS)


CORRUPT: list[tuple[str, Any]] = [
    *((name, value) for name in ("size", *COUNTER_NAMES) for value in (-1, True, False, 1.5, 2.0, "1", None, [1])),
    ("size", 0),
    *(("version", value) for value in (0, 2, "1", None)),
    *(("tail", value) for value in ("keep", "", None, 1, ["apply"])),
    *(("is_closed", value) for value in (1, 0, "True", None)),
]


def refused(state: Any) -> StateError:
    """Loading the state raises StateError and leaves a window in the middle of things as it was."""
    window = Window(3, tail="carry")
    window.admit()
    window.admit()
    window.discard()
    window.admit()
    before = window.state_dict()
    with pytest.raises(StateError, match=r"Window\.load_state_dict") as caught:
        window.load_state_dict(state)
    assert window.state_dict() == before
    return caught.value


@pytest.mark.parametrize(("key", "value"), CORRUPT)
def test_load_corrupted_value_is_refused(key, value):
    error = refused(window_with(1).state_dict() | {key: value})
    assert repr(value) in str(error)


@pytest.mark.parametrize("version", [True, 1.0])
def test_load_version_that_only_equals_one_is_refused(version):
    refused(Window(2).state_dict() | {"version": version})


@pytest.mark.parametrize("key", KEYS)
def test_load_missing_key_is_refused(key):
    state = Window(2).state_dict()
    del state[key]
    refused(state)


@pytest.mark.parametrize("key", ["num_epochs", "", 3, None])
def test_load_unknown_key_is_refused(key):
    error = refused({**Window(2).state_dict(), key: 0})
    assert str(key) in str(error)


def test_load_closed_without_micro_batch_is_refused():
    error = refused(Window(2).state_dict() | {"is_closed": True})
    assert "without a micro-batch" in str(error)


@pytest.mark.parametrize("state", [None, [], 3, "state", {}, [("version", 1)]])
def test_load_something_else_is_refused(state):
    refused(state)


# --- the plain loop ---


@settings(deadline=None)
@given(
    size=st.integers(1, 5),
    passes=st.lists(st.integers(0, 12), max_size=4),
    tail=st.sampled_from(TAILS),
    announced=st.booleans(),
)
def test_windows_over_passes_are_the_chunks_of_the_plain_loop(size, passes, tail, announced):
    """`announced`: the last micro-batch of a pass is known to be the last when it comes."""
    window, windows, current = Window(size, tail=tail), [], []

    def close() -> None:
        windows.append(tuple(current))
        current.clear()
        window.applied()

    for epoch, num_micro_batches in enumerate(passes):
        for i in range(num_micro_batches):
            current.append((epoch, i))
            if window.admit(end_of_data=announced and i + 1 == num_micro_batches):
                close()
        if window.finish():
            close()
        if tail == "drop":
            current.clear()

    def chunks(items: list[Any]) -> list[tuple[Any, ...]]:
        return [tuple(items[start : start + size]) for start in range(0, len(items), size)]

    data = [[(epoch, i) for i in range(num)] for epoch, num in enumerate(passes)]
    if tail == "carry":
        expected = chunks([item for part in data for item in part])
        pending = expected.pop() if expected and len(expected[-1]) < size else ()
    else:
        expected = [chunk for part in data for chunk in chunks(part) if tail == "apply" or len(chunk) == size]
        pending = ()
    assert windows == expected
    assert window.num_updates == len(expected)
    assert window.num_pending == len(pending)
    assert window.num_dropped == sum(passes) - sum(map(len, expected)) - len(pending)


# --- random sequences ---


class WindowMachine(RuleBasedStateMachine):
    """The same things done to a Window and to lists of the micro-batches themselves."""

    @initialize(size=st.integers(1, 4), tail=st.sampled_from(TAILS))
    def begin(self, size: int, tail: Tail) -> None:
        self.window = Window(size, tail=tail)
        self.tail = tail
        self.size = self.largest = size  # `largest`: that was in force since the window's first micro-batch
        self.closed = False
        self.num_admitted = 0
        self.pending: list[int] = []
        self.updates: list[list[int]] = []
        self.skips: list[list[int]] = []
        self.dropped: list[int] = []

    def end_window(self) -> list[int]:
        ended, self.pending, self.closed, self.largest = self.pending, [], False, self.size
        return ended

    @rule(end_of_data=st.booleans())
    def admit(self, end_of_data: bool) -> None:
        if self.closed:
            with pytest.raises(WindowError):
                self.window.admit(end_of_data=end_of_data)
            return
        self.pending.append(self.num_admitted)
        self.num_admitted += 1
        full = len(self.pending) >= self.size
        self.closed = full or (end_of_data and self.tail == "apply")
        assert self.window.admit(end_of_data=end_of_data) is self.closed

    @rule(num_micro_batches=st.integers(1, 6))
    def run_until_break(self, num_micro_batches: int) -> None:
        """A loop over data that is left early: nothing is called that says so."""
        for _ in range(num_micro_batches):
            if self.closed:
                self.applied()
            self.admit(end_of_data=False)

    @rule()
    def finish(self) -> None:
        if not self.closed and self.pending:
            if self.tail == "apply":
                self.closed = True
            elif self.tail == "drop":
                self.dropped += self.end_window()
        assert self.window.finish() is self.closed

    @rule()
    def applied(self) -> None:
        if not self.closed:
            with pytest.raises(WindowError):
                self.window.applied()
            return
        self.window.applied()
        self.updates.append(self.end_window())

    @rule()
    def skipped(self) -> None:
        if not self.closed:
            with pytest.raises(WindowError):
                self.window.skipped()
            return
        self.window.skipped()
        self.skips.append(self.end_window())

    @rule()
    def discard(self) -> None:
        lost = self.end_window()
        assert self.window.discard() == len(lost)
        self.dropped += lost

    @rule(size=st.integers(1, 6))
    def resize(self, size: int) -> None:
        self.window.size = self.size = size
        if not self.closed:
            self.largest = max(self.largest, size) if self.pending else size

    @rule(size=st.sampled_from([0, -3, True, 1.5]))
    def resize_wrongly(self, size: Any) -> None:
        with pytest.raises(ArgumentError):
            self.window.size = size

    @rule(size=st.integers(1, 9), tail=st.sampled_from(TAILS))
    def resume(self, size: int, tail: Tail) -> None:
        """The process ends; another one, set up differently, loads what was saved."""
        saved = json.dumps(self.window.state_dict())
        fresh = Window(size, tail=tail)
        fresh.load_state_dict(json.loads(saved))
        assert json.dumps(fresh.state_dict()) == saved
        self.window = fresh

    @rule(corrupt=st.sampled_from(CORRUPT))
    def resume_from_a_corrupted_state(self, corrupt: tuple[str, Any]) -> None:
        key, value = corrupt
        before = self.window.state_dict()
        with pytest.raises(StateError):
            self.window.load_state_dict(before | {key: value})
        assert self.window.state_dict() == before

    @invariant()
    def matches_the_model(self) -> None:
        assert self.window.size == self.size
        assert self.window.tail == self.tail
        assert self.window.is_closed is self.closed
        assert self.window.num_pending == len(self.pending)
        assert self.window.num_updates == len(self.updates)
        assert self.window.num_skipped == len(self.skips)
        assert self.window.num_dropped == len(self.dropped)

    @invariant()
    def closed_windows_hold_from_one_to_size(self) -> None:
        if self.window.is_closed:
            assert 1 <= self.window.num_pending <= self.largest

    @invariant()
    def micro_batches_are_conserved(self) -> None:
        ended = [index for window in [*self.updates, *self.skips] for index in window]
        assert self.num_admitted == len(ended) + self.window.num_dropped + self.window.num_pending
        assert sorted([*ended, *self.dropped, *self.pending]) == list(range(self.num_admitted))


WindowMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestWindowMachine = WindowMachine.TestCase


@settings(deadline=None)
@given(
    state=st.fixed_dictionaries(
        {
            "version": st.just(1),
            "size": st.integers(1, 3),
            "tail": st.sampled_from(TAILS),
            "is_closed": st.booleans(),
            **{name: st.integers(0, 3) for name in COUNTER_NAMES},
        }
    )
)
def test_load_any_state_within_the_domain_can_go_on(state):
    window = Window(1)
    if state["is_closed"] and not state["num_pending"]:
        with pytest.raises(StateError):
            window.load_state_dict(state)
        return
    window.load_state_dict(state)
    assert window.state_dict() == state
    if window.is_closed:
        window.applied()
    while not window.admit():
        assert window.num_pending < window.size
    window.applied()
    assert window.num_updates > state["num_updates"]
