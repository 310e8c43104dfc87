"""Files and folders of a checkpoint: whole at every moment, refused if they are not, and nothing in them is run."""

from __future__ import annotations

import os
import pickle
import random
import signal
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from macrobatch.checkpoint import load_file, replaced_folder, save_file
from macrobatch.checkpoint.io import check_complete, recover
from macrobatch.errors import ArgumentError, StateError
from macrobatch.testing.scripts import run_script

pytestmark = pytest.mark.xdist_group("ranks")

OLD, NEW = {"x": torch.tensor([1.0])}, {"x": torch.tensor([2.0])}
FILES = ["state.bin", "state.safetensors"]

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from macrobatch.checkpoint import io

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

folder, where = Path(sys.argv[1]), sys.argv[2]
renames = [0]
rename = Path.rename
def counted(path, target):
    renames[0] += 1
    if where == f"before rename {renames[0]}":
        die()
    return rename(path, target)
Path.rename = counted
if where == "before the clean-up":
    io.shutil.rmtree = lambda path, **_: die() if str(path).endswith(".old") else None
with io.replaced_folder(folder) as place:
    io.save_file({"x": torch.tensor([2.0])}, place / "state.bin")
    if where == "in a file":
        torch.save = lambda value, path: (Path(path).write_bytes(b"half"), die())
    io.save_file({"y": torch.tensor([2.0])}, place / "more.bin")
"""


def written(folder: Path, value: Any) -> Path:
    with replaced_folder(folder) as place:
        save_file(value, place / "state.bin")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".contents.json")


# --- files ---


@pytest.mark.parametrize("name", FILES)
def test_a_file_comes_back(tmp_path: Path, name: str):
    save_file(OLD, tmp_path / "deeper" / name)
    assert torch.equal(load_file(tmp_path / "deeper" / name)["x"], OLD["x"])
    assert names(tmp_path / "deeper") == [name]


@pytest.mark.parametrize("name", FILES)
def test_after_an_error_the_old_file_is_whole(tmp_path: Path, name: str):
    save_file(OLD, tmp_path / name)
    with pytest.raises((AttributeError, pickle.PicklingError, ValueError, TypeError)):
        save_file({"x": lambda: None}, tmp_path / name)
    assert torch.equal(load_file(tmp_path / name)["x"], OLD["x"])
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", FILES)
def test_after_a_kill_the_old_file_is_whole(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    save_file(OLD, tmp_path / name)
    child = os.fork()
    if not child:  # the kill comes when everything is written, but not in its place
        monkeypatch.setattr(Path, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        save_file(NEW, tmp_path / name)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert torch.equal(load_file(tmp_path / name)["x"], OLD["x"])
    save_file(NEW, tmp_path / name)
    assert torch.equal(load_file(tmp_path / name)["x"], NEW["x"])
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused(tmp_path: Path, name: str):
    save_file({"x": torch.arange(100.0), "y": torch.ones(3)}, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for size in range(0, len(whole), 37):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(StateError, match=rf"{name}.*To fix it"):
            load_file(tmp_path / name)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_or_read(tmp_path: Path, name: str):
    save_file({"x": torch.arange(20.0), "step": torch.tensor(3)}, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    dice = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(dice.choice([1, 4])):
            damaged[dice.randrange(len(whole))] = dice.randrange(256)
        (tmp_path / name).write_bytes(damaged)
        with suppress(StateError):
            load_file(tmp_path / name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"some text\n", b"\x00" * 64, b"\x80\x02."], ids=["empty", "text", "0", "p"])
def test_a_foreign_file_is_refused(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StateError, match="To fix it"):
        load_file(tmp_path / name)


def test_a_foreign_archive_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "state.bin", "w") as archive:
        archive.writestr("readme.txt", "no tensors")
    with pytest.raises(StateError):
        load_file(tmp_path / "state.bin")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path, name: str):
    with pytest.raises(StateError, match="no file"):
        load_file(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(StateError):
        load_file(tmp_path / name)


class Code:
    """What runs something when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_code_is_refused_and_not_run(tmp_path: Path, writer: str):
    target = tmp_path / "it_ran"
    if writer == "pickle":
        (tmp_path / "state.bin").write_bytes(pickle.dumps(Code(target), protocol=2))
    else:
        torch.save(Code(target), tmp_path / "state.bin")
    with pytest.raises(StateError, match="more than tensors"):
        load_file(tmp_path / "state.bin")
    with pytest.raises(ArgumentError, match="weights_only"):
        load_file(tmp_path / "state.bin", weights_only=False)
    assert not target.exists()
    if writer == "pickle":
        pickle.loads((tmp_path / "state.bin").read_bytes())
    else:
        torch.load(tmp_path / "state.bin", weights_only=False)
    assert target.exists()  # the control: it is code


# --- folders ---


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path):
    folder = written(tmp_path / "a" / "checkpoint", OLD)
    save_file(OLD, folder / "own_of_another_tool.bin")
    with replaced_folder(folder) as place:
        assert names(place) == []
        save_file(NEW, place / "other.bin")
        assert torch.equal(load_file(folder / "state.bin")["x"], OLD["x"])
    assert names(folder) == ["other.bin", "own_of_another_tool.bin"]
    assert names(folder.parent) == ["checkpoint"]


def test_files_of_others_stay(tmp_path: Path):
    folder = tmp_path / "out"
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "events").write_text("mine")
    for value in (OLD, NEW):
        written(folder, value)
        (folder / "notes.txt").write_text("mine, too")
    assert names(folder) == ["logs", "notes.txt", "state.bin"]
    assert (folder / "logs" / "events").read_text() == "mine"
    assert torch.equal(load_file(folder / "state.bin")["x"], NEW["x"])


def test_after_an_error_the_old_folder_is_as_it_was(tmp_path: Path):
    folder = written(tmp_path / "checkpoint", OLD)
    with pytest.raises(StateError), replaced_folder(folder) as place:
        load_file(place / "what is not there.bin")
    assert torch.equal(load_file(folder / "state.bin")["x"], OLD["x"])
    assert names(tmp_path) == ["checkpoint"]


def test_the_working_folder_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    written(Path("checkpoint"), OLD)
    written(Path("checkpoint/"), NEW)
    assert torch.equal(load_file("checkpoint/state.bin")["x"], NEW["x"])


@pytest.mark.parametrize(
    ("where", "survivor"),
    [("in a file", 1.0), ("before rename 1", 1.0), ("before rename 2", 1.0), ("before the clean-up", 2.0)],
)
def test_after_a_kill_a_folder_is_whole(tmp_path: Path, where: str, survivor: float):
    folder = written(tmp_path / "checkpoint", OLD)
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "script.py").write_text(KILLED, encoding="utf-8")
    done = run_script(tmp_path / "script.py", str(folder), where)
    assert done.codes == [-signal.SIGKILL], done.stderr
    assert folder.exists() == (where != "before rename 2")
    recover(folder)
    assert load_file(folder / "state.bin")["x"].item() == survivor
    assert names(folder) == ["more.bin", "notes.txt", "state.bin"][survivor == 1.0 :]
    written(folder, {"x": torch.tensor([3.0])})
    assert load_file(folder / "state.bin")["x"].item() == 3.0
    assert names(folder) == ["notes.txt", "state.bin"]
    assert names(tmp_path) == ["checkpoint", "script.py"]


def test_a_folder_that_has_lost_a_file_is_refused(tmp_path: Path):
    folder = written(tmp_path / "checkpoint", OLD)
    (folder / "notes.txt").write_text("mine")
    check_complete(folder)
    (folder / "state.bin").rename(tmp_path / "state.bin")
    with pytest.raises(StateError, match=r"given no state\.bin; expected all files that were saved together"):
        check_complete(folder)


@pytest.mark.parametrize("text", ["", "[", '{"a": 1}', "[1]"])
def test_a_damaged_list_of_files_is_refused_and_can_be_replaced(tmp_path: Path, text: str):
    folder = written(tmp_path / "checkpoint", OLD)
    (folder / ".contents.json").write_text(text, encoding="utf-8")
    with pytest.raises(StateError, match=r"a damaged \.contents\.json"):
        check_complete(folder)
    written(folder, NEW)
    check_complete(folder)
    assert load_file(folder / "state.bin")["x"].item() == NEW["x"].item()


def test_a_folder_of_others_is_taken_as_it_is(tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(b"")
    check_complete(tmp_path)
