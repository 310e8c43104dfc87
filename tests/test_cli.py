"""The command line: what it prints where, and its exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import macrobatch as mb
from macrobatch.cli import main
from macrobatch.errors import ArgumentError

CASES = '''
import typing

import torch
from torch import nn

import macrobatch as mb


def squares(model, x):
    return model(x).square().mean()


def two():
    return 1, 2


def exact():
    return nn.Linear(3, 1), squares, torch.randn(5, 3)


def exact_as_a_dict():
    return {"batch": torch.randn(5, 3), "model": nn.Linear(3, 1), "loss_fn": squares}


class Case(typing.NamedTuple):
    batch: typing.Any
    model: typing.Any
    loss_fn: typing.Any


def exact_as_a_named_tuple():
    return Case(torch.randn(5, 3), nn.Linear(3, 1), squares)


class Other(typing.NamedTuple):
    model: typing.Any
    loss: typing.Any
    batch: typing.Any


def not_these_names():
    return Other(nn.Linear(3, 1), squares, torch.randn(5, 3))


def inexact():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), squares, torch.randn(6, 3)


def exact_in_threes():
    """Its loss doubles in micro-batches of three, and nowhere else."""
    return nn.Linear(3, 1), lambda model, x: squares(model, x) * (2 if len(x) == 3 else 1), torch.randn(6, 3)


def not_a_case():
    return nn.Linear(3, 1), squares


def not_these_keys():
    return {"model": nn.Linear(3, 1), "loss": squares, "batch": torch.randn(5, 3)}


def planned():
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1), squares, torch.randn(20, 3)


def planned_in_bf16():
    return dict(zip(("model", "optimizer", "loss_fn", "batch"), planned()), precision="bf16")


def markup():
    raise RuntimeError("[bold]brackets[/bold] are shown as they are")


def absent():
    open("no such file")


def assertion():
    assert False, "the user's own"


def with_an_argument(x):
    return exact()


def empty():
    return nn.Linear(3, 1), squares, torch.randn(0, 3)


def interrupted():
    raise KeyboardInterrupt


number = 7
'''


FILES = {
    "cases.py": CASES,
    "inner/deeper.py": CASES,
    "inner/cases.py": f"import deeper\n{CASES}\n\ndef only_inside():\n    return deeper.exact()\n",
    "inner/json.py": CASES,
    "package/__init__.py": "",
    "package/data.py": CASES,
    "package/train.py": "from package.data import exact\n",
    "package/relative.py": "from .data import exact\n",
    "broken.py": "import no_such_package_at_all\n",
    "unreadable.py": "def case(:\n",
    "faulty.py": "import torch\ndef helper():\n    torch.no_such_name\nhelper()\n",
}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


def plain(text: str) -> str:
    """Without colours, which some CI services ask for."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, source in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `macrobatch ...` in this process, in the folder above, with none of its modules imported yet."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("MACROBATCH_DEBUG", raising=False)
    original_path = [*sys.path]
    tops = {name.removesuffix(".py").split("/")[i] for name in FILES for i in (0, -1)} - {"json"}

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["macrobatch", *arguments])
        monkeypatch.setattr(sys, "path", [*original_path])
        for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
            del sys.modules[name]
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        code = caught.value.code
        assert code is None or isinstance(code, int)
        return Outcome(code or 0, plain(out), plain(err))

    return run


def refused_in_one_message(outcome: Outcome, code: int = 2) -> str:
    assert outcome.code == code
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    return outcome.err


# --- help, env ---


def test_help_lists_the_commands(command):
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    for named in ("demo", "verify", "env", "--debug"):
        assert re.search(rf"\s{named}\s", out)
    assert "get exactly that batch's gradient" in out


@pytest.mark.parametrize(
    ("name", "options"),
    [("demo", ["--epochs", "--out", "--seed"]), ("verify", ["--micro-batch", "--against"]), ("env", [])],
)
def test_help_of_a_command_names_its_options(command, name, options):
    code, out, err = command(name, "--help")
    assert (code, err) == (0, "")
    assert f"macrobatch {name}" in out
    for option in options:
        assert option in out


def test_no_command_shows_the_help(command):
    code, out, _ = command()
    assert code == 2
    assert "Commands" in out


def test_env_prints_versions_and_devices(command):
    code, out, err = command("env")
    assert (code, err) == (0, "")
    found = dict(line.split(maxsplit=1) for line in out.splitlines() if line.strip())
    assert found["macrobatch"].strip() == mb.__version__
    assert found["torch"].strip() == torch.__version__
    assert {"python", "cpu", "cuda", "numpy"} <= set(found)


@pytest.mark.parametrize(
    "arguments", [("bogus",), ("verify",), ("verify", "a:b", "--bogus"), ("env", "extra")], ids=str
)
def test_usage_error_exits_with_2(command, arguments):
    assert "Usage: " in refused_in_one_message(command(*arguments))


@pytest.mark.parametrize("arguments", [("--micro-batch", "0"), ("--micro-batch", "two"), ("--against", "-1")], ids=str)
def test_verify_option_out_of_domain_exits_with_2(command, arguments):
    assert arguments[0] in refused_in_one_message(command("verify", "cases:exact", *arguments))


# --- verify ---


@pytest.mark.parametrize(
    "target",
    [
        "cases:exact",
        "cases:exact_as_a_dict",
        "cases.py:exact",
        "./cases.py:exact",
        "inner/../cases.py:exact",
        "inner.deeper:exact",
        "inner/deeper:exact",
        "inner/deeper.py:exact",
        "inner/cases.py:only_inside",  # which is not in ./cases.py, and needs its neighbour
        "package.train:exact",
        "package.relative:exact",
        "package/train.py:exact",
        pytest.param("package/relative.py:exact"),
        pytest.param("inner/json.py:exact"),
    ],
)
def test_verify_exact_case_exits_with_0(command, target):
    code, out, err = command("verify", target)
    assert (code, err) == (0, "")
    assert out.startswith("exact: relative gradient error ")


def test_verify_target_may_be_a_file_anywhere(command, folder, monkeypatch):
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert command("verify", f"{folder}/inner/cases.py:only_inside").code == 0
    assert command("verify", "../cases.py:exact").code == 0
    assert command("verify", "cases.py:exact").code == 2


def test_verify_inexact_case_exits_with_1_and_names_the_culprit(command):
    code, out, err = command("verify", "cases:inexact")
    assert (code, err) == (1, "")
    first, second, *_ = out.splitlines()
    assert first.startswith("NOT exact")
    assert second.startswith("  - BatchNorm1d at model.1: ")
    assert second.endswith("eval().")  # one line per finding, wider than the terminal
    assert len(second) > 100


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ((), 0),
        (("--micro-batch", "3"), 1),
        (("--micro-batch", "2", "--against", "1"), 0),
        (("--against", "3"), 1),
        (("--micro-batch", "3", "--against", "3"), 0),
        (("--micro-batch", "3", "--against", "0"), 1),
    ],
    ids=str,
)
def test_verify_options_choose_the_splits(command, options, code):
    assert command("verify", "cases:exact_in_threes", *options).code == code


def test_verify_case_may_be_a_named_tuple(command):
    assert command("verify", "cases:exact_as_a_named_tuple").code == 0


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("no_such_module_at_all:case", "No module named 'no_such_module_at_all'"),
        ("cases:no_such_function", "no_such_function"),
        ("cases", "'cases'"),
        ("cases:", "'cases:'"),
        (":exact", "':exact'"),
        ("", "''"),
        ("broken:case", "No module named 'no_such_package_at_all'"),
        ("broken.py:case", "No module named 'no_such_package_at_all'"),
        ("no_such_file.py:case", "No such file"),
        ("no_such_folder/cases.py:exact", "No such file"),
        ("cases.py:no_such_function", "no_such_function"),
        ("cases.py", "'cases.py'"),
    ],
)
def test_verify_target_that_is_not_there_exits_with_2(command, target, named):
    message = refused_in_one_message(command("verify", target))
    assert message.startswith("error: MODULE:FUNCTION: given ")
    assert named in message
    assert message.endswith("To fix it, name it as in train.py:case, where case is a function of train.py.\n")


@pytest.mark.parametrize("target", ["cases:number", "cases.py:number"])
def test_verify_target_that_is_no_function_exits_with_2(command, target):
    message = refused_in_one_message(command("verify", target))
    assert message == (
        f"error: {target}: given a int; expected a function without arguments. To fix it, write def case().\n"
    )


@pytest.mark.parametrize(
    ("target", "kind"),
    [("cases:not_a_case", "a tuple"), ("cases:not_these_keys", "a dict"), ("cases:not_these_names", "a Other")],
)
def test_verify_function_that_returns_no_case_exits_with_2(command, target, kind):
    message = refused_in_one_message(command("verify", target))
    assert (
        message == f"error: {target}: given {kind}; expected (model, loss_fn, batch). To fix it, return these three.\n"
    )


# --- errors and --debug ---


def test_error_of_the_package_is_one_message_and_exits_with_2(command):
    message = refused_in_one_message(command("verify", "cases:empty"))
    assert message == "error: batch: given no samples; expected at least one row. To fix it, skip empty batches.\n"


def test_error_of_the_user_is_one_message_and_exits_with_2(command):
    """1 says that the gradient is not exact, and nothing else."""
    message = refused_in_one_message(command("verify", "cases:markup"))
    assert message == "RuntimeError: [bold]brackets[/bold] are shown as they are\n(--debug shows where)\n"


def test_a_name_between_colons_is_shown_as_it_is(command):
    """To rich, ":two:" is a picture."""
    message = refused_in_one_message(command("verify", "cases.py:two"))
    assert message.startswith("error: cases.py:two: given a tuple; ")


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("cases:absent", "FileNotFoundError"),
        ("cases:assertion", "AssertionError"),
        ("cases:with_an_argument", "TypeError"),
        ("unreadable:case", "SyntaxError"),
        ("unreadable.py:case", "SyntaxError"),
    ],
)
def test_error_of_any_kind_is_one_message_and_exits_with_2(command, target, kind):
    message = refused_in_one_message(command("verify", target))
    assert message.startswith(f"{kind}: ")
    assert message.endswith("\n(--debug shows where)\n")


@pytest.mark.parametrize(
    ("target", "kind"), [("cases:markup", RuntimeError), ("cases:nothing", ArgumentError)], ids=["user", "package"]
)
@pytest.mark.parametrize(
    "arguments",
    [
        ("--debug", "verify", "TARGET"),
        ("verify", "--debug", "TARGET"),
        ("verify", "TARGET", "--debug"),  # where one types it, after reading "(--debug shows where)"
        ("verify", "TARGET", "--micro-batch", "3", "--debug"),
        ("--debug", "verify", "TARGET", "--debug"),
        ("verify", "TARGET"),
    ],
    ids=" ".join,
)
def test_debug_shows_the_traceback(command, monkeypatch, target, kind, arguments):
    if "--debug" not in arguments:
        monkeypatch.setenv("MACROBATCH_DEBUG", "1")
    outcome = command(*(target if word == "TARGET" else word for word in arguments))
    assert outcome.code == 2
    assert "Traceback (most recent call last)" in outcome.err
    assert kind.__name__ in outcome.err


@pytest.mark.parametrize("target", ["faulty:case", "faulty.py:case"])
def test_debug_shows_where_a_module_failed(command, target):
    assert "faulty.py" not in command("verify", "faulty:case").err
    error = command("verify", target, "--debug").err
    assert "in helper" in error
    assert "torch.no_such_name" in error


@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_debug_changes_nothing_about_a_run_without_errors(command, place):
    for name, code in (("exact", 0), ("inexact", 1)):
        arguments = ["verify", f"cases:{name}", "--micro-batch", "2"]
        assert command(*arguments[:place], "--debug", *arguments[place:]).code == code


def test_interrupt_exits_with_130(command):
    message = refused_in_one_message(command("verify", "cases:interrupted"), code=130)
    assert "cases.py" not in message


def test_installed_command_is_main():
    (script,) = metadata.entry_points(group="console_scripts", name="macrobatch")
    assert script.load() is main


@pytest.mark.parametrize(("options", "returncode"), [([], 2), (["--debug"], 2)], ids=["plain", "debug"])
def test_command_in_a_process_of_its_own(folder: Path, options, returncode):
    """Once for real: exit code, streams, and a traceback where it was asked for."""
    code = "import sys; from macrobatch.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, *options, "verify", "cases:markup"],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "MACROBATCH_DEBUG"} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == returncode
    assert result.stdout == ""
    assert ("Traceback (most recent call last)" in result.stderr) is bool(options)
    assert ("cases.py" in result.stderr) is bool(options)
    assert "[bold]brackets[/bold]" in result.stderr


@pytest.mark.parametrize("case", ["planned", "planned_in_bf16"])
def test_plan_of_a_model_shows_what_was_tried_and_chosen(command, tmp_path, case):
    code, out, err = command("plan", f"cases:{case}", "--plot", str(tmp_path / "plan.png"))
    assert (code, err) == (0, "")
    assert "A macro-batch of 20 samples" in out
    chosen = re.search(r"^micro_batch=(\d+)$", out, flags=re.MULTILINE)
    assert chosen is not None
    assert 1 <= int(chosen[1]) <= 20
    row = next(line for line in out.splitlines() if "chosen" in line)
    assert row.split()[0] == chosen[1]
    assert re.search(r"^chosen: \w+", out, flags=re.MULTILINE)  # and why
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_plan_of_something_else_exits_with_2(command):
    message = refused_in_one_message(command("plan", "cases:exact"))
    assert message.endswith("expected (model, optimizer, loss_fn, batch). To fix it, return these four.\n")


@pytest.mark.parametrize("options", [("--world", "8"), ("--step", "4:1"), ("--policy", "keep-last")], ids=" ".join)
def test_plan_of_a_model_takes_no_option_of_the_estimate(command, options):
    message = refused_in_one_message(command("plan", "cases:planned", *options))
    assert message.startswith(f"error: plan: given {options[0]} beside MODULE:FUNCTION; ")


@pytest.mark.parametrize("target", [(), ("cases:absent",)], ids=["estimate", "measure"])
@pytest.mark.parametrize(
    ("path", "expected"), [("no_such_folder/plan.png", "make no_such_folder first"), ("plan.xyz", "ends in .png")]
)
def test_plot_that_could_not_be_written_is_refused_before_anything_is_measured(command, target, path, expected):
    message = refused_in_one_message(command("plan", *target, "--plot", path))
    assert message.startswith(f"error: --plot: given {path}; ")
    assert expected in message
