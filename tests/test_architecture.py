"""The package's shape: which module may import which, what may be named where, and how large things may grow.

A rule is a function from modules to findings. Each rule is also shown sources that it must refuse, and some that it
must not, so that no rule is kept for the reason that it looks at nothing.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

import macrobatch

ROOT = Path(__file__).parents[1]

LAYERS = (
    ("cli",),
    ("demo",),
    ("__init__",),
    ("verify",),
    ("train", "accelerate", "colossalai"),  # the doors
    ("arguments", "losses", "diagnose", "data", "checkpoint", "observe", "launch"),
    ("plan",),
    ("core.__init__",),
    ("core.step", "core.accumulation"),
    ("core.update", "core.handover", "core.microstep", "core.fused"),
    ("sync", "core.precision"),
    ("core.gradients", "core.result", "core.twopass"),
    ("core.tally",),
    ("core.term",),
    ("core.weighting", "core.autograd", "core.rounded"),
    ("core.window", "core.events", "core.loss", "core.snapshot", "core.arrival", "core.leaves"),
    ("env",),
    ("tree", "ranks"),
    ("checks",),
    ("errors",),
)
"""From top to bottom. An import may only point down; those on one line do not import each other. A name stands for a
module, or for a package with all that is in it."""

LAYER_OF = {part: level for level, line in enumerate(LAYERS) for part in line}
DOORS = LAYER_OF["train"]
TESTING = "testing"  # may import `verify` and what is below it; nothing imports it

DOOR_WORDS = ("accelerate", "colossal")

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60  # without the docstring
MAX_PARAMETERS = 8  # without self and cls

ENVIRONMENTS = ("accelerate.utils.environment", "colossalai.environment", "testing.scripts")
"""Where a compatible door reads the variables of the launchers that it stands in for, and a test passes them on."""

EXCEPTIONS = {
    # what it is: (what may be larger, how large, why)
    "train.TrainStep.__init__": ("parameters", 17, "the public API: one keyword for each thing to choose"),
    # What the compatible doors mirror.
    "accelerate.accelerator.Accelerator.__init__": ("parameters", 21, "the original's arguments, in its order"),
    "accelerate.state.AcceleratorState.__init__": ("parameters", 9, "the original's arguments, in its order"),
    "accelerate.launchers.notebook_launcher": ("parameters", 15, "the original's arguments, in its order"),
    "accelerate.data_loader.prepare_data_loader": ("parameters", 15, "the original's arguments, in its order"),
    "accelerate.dispatching.DataLoaderDispatcher.__init__": ("parameters", 10, "the original's, in its order"),
    "accelerate.loading.DataLoaderShard.__init__": ("parameters", 11, "the original's arguments, in its order"),
    "colossalai.initialize.initialize": ("parameters", 9, "the original's arguments and tail="),
    "colossalai.launching.launch": ("parameters", 9, "the original's arguments, in its order"),
    "colossalai.nn.lr_scheduler.onecycle.OneCycleLR.__init__": ("parameters", 10, "torch's arguments"),
}

PUBLIC_NAMES = [
    "Auto",
    "Bf16",
    "Constant",
    "Event",
    "Finding",
    "Fp16",
    "Listener",
    "LocalSync",
    "Loss",
    "MacroBatchLoader",
    "MicroBatchDone",
    "Policy",
    "Precision",
    "ReplicatedSync",
    "Report",
    "Rows",
    "ShardedSync",
    "Skipped",
    "StepResult",
    "Sync",
    "Tokens",
    "TrainStep",
    "TwoPass",
    "Updated",
    "WrappedSync",
    "accumulate",
    "cross_entropy",
    "errors",
    "launch",
    "on",
    "shard",
    "track",
    "verify",
]


@dataclass(frozen=True)
class Module:
    name: str  # within macrobatch: "core.step", "core.__init__", "__init__"
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def part(self) -> str | None:
        """The entry of LAYERS that it belongs to, TESTING, or None."""
        return next((prefix for prefix in prefixes(self.name) if prefix in LAYER_OF or prefix == TESTING), None)

    @property
    def is_below_doors(self) -> bool:
        return LAYER_OF.get(self.part or "", DOORS) > DOORS


def read_package() -> list[Module]:
    package = ROOT / "src" / "macrobatch"
    paths = sorted(package.rglob("*.py"))
    assert paths, f"no module in {package}"
    return [
        Module(".".join(path.relative_to(package).with_suffix("").parts), path.read_text(encoding="utf-8"))
        for path in paths
    ]


# --- the rules -------------------------------------------------------------------------------------------------------


def imports_point_down(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if module.part is None:
            yield f"{module.name}: not in LAYERS. Give it a place there, as low as it can stand"
            continue
        for line, target in imports_from_package(module):
            if not may_import(module.part, target):
                yield f"{module.name}:{line}: {target} is not below it. Move what both need down, or pass it on"


def every_folder_is_a_package(modules: list[Module]) -> Iterator[str]:
    names = {module.name for module in modules}
    for folder in sorted({name.rpartition(".")[0] for name in names} - {""}):
        if f"{folder}.__init__" not in names:
            yield f"{folder}: without an __init__.py, which the API documentation needs to find its modules"


def no_door_is_named_below_the_doors(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for number, line in enumerate(module.source.splitlines(), start=1):
            if module.is_below_doors and any(word in line.lower() for word in DOOR_WORDS):
                yield f"{module.name}:{number}: names a door. What differs between the doors is a parameter of the core"


def the_window_imports_no_torch(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for line, target in imports(module):
            if module.name == "core.window" and target.split(".")[0] == "torch":
                yield f"{module.name}:{line}: the window is plain Python. What needs tensors belongs to core.step"


def sizes_stay_in_budget(modules: list[Module]) -> Iterator[str]:
    for what, measure, size in beyond_budget(modules):
        excepted, limit, _ = EXCEPTIONS.get(what, ("", 0, ""))
        if measure != excepted or size > limit:
            yield f"{what}: {size} {measure}. Split it; an entry in EXCEPTIONS is a change of its own"


def every_exception_is_needed(modules: list[Module]) -> Iterator[str]:
    needed = {(what, measure) for what, measure, _ in beyond_budget(modules)}
    for what, (measure, *_) in EXCEPTIONS.items():
        if (what, measure) not in needed:
            yield f"{what}: its {measure} are within the budget. Remove it from EXCEPTIONS"


def the_environment_is_read_in_one_place(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if module.part not in ("env", "launch") and module.name not in ENVIRONMENTS:
            for line in environment_uses(module):
                yield f"{module.name}:{line}: uses the environment. Read it in env.py and pass the value on"


def no_state_in_modules(modules: list[Module]) -> Iterator[str]:
    for module in filter(lambda module: module.is_below_doors, modules):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Global):
                yield f"{module.name}:{node.lineno}: rebinds a global. State belongs to an object"
        for name, value in variables(module):
            if is_mutable(value) and not re.fullmatch(r"_?[A-Z][A-Z0-9_]*|__all__", name):
                yield f"{module.name}:{value.lineno}: {name} can change. State belongs to an object; a table is UPPER"


def public_names_are_the_listed_ones(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        found = [ast.literal_eval(value) for name, value in variables(module) if name == "__all__"]
        if module.name == "__init__" and found != [PUBLIC_NAMES]:
            yield f"__all__ is {found}. It is to equal PUBLIC_NAMES; a new name is also added to docs/api.md"


Rule = Callable[[list[Module]], Iterator[str]]
RULES: tuple[Rule, ...] = (
    imports_point_down,
    every_folder_is_a_package,
    no_door_is_named_below_the_doors,
    the_window_imports_no_torch,
    sizes_stay_in_budget,
    every_exception_is_needed,
    the_environment_is_read_in_one_place,
    no_state_in_modules,
    public_names_are_the_listed_ones,
)


# --- how they see it -------------------------------------------------------------------------------------------------


def prefixes(name: str) -> Iterator[str]:
    """a.b.c, a.b, a"""
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(len(parts), 0, -1))


def may_import(part: str, target: str) -> bool:
    if part == target:
        return True
    if target == TESTING:
        return False
    return LAYER_OF[target] >= LAYER_OF["verify"] if part == TESTING else LAYER_OF[target] > LAYER_OF[part]


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """Line and full name of all that is imported: at the top, in functions, under TYPE_CHECKING."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import counts as one from the package's own __init__: refused here as it is by the linter.
            base = "macrobatch" if node.level else node.module
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def imports_from_package(module: Module) -> Iterator[tuple[int, str]]:
    """Line and entry of LAYERS, or TESTING: `from macrobatch.core import step` comes from core.step."""
    for line, name in imports(module):
        package, _, inner = name.partition(".")
        if package == "macrobatch":
            candidates = (entry for prefix in prefixes(inner) for entry in (prefix, f"{prefix}.__init__"))
            yield line, next((entry for entry in candidates if entry in LAYER_OF or entry == TESTING), "__init__")


def beyond_budget(modules: list[Module]) -> Iterator[tuple[str, str, int]]:
    for module in modules:
        sizes = [(module.name, "lines", len(module.source.splitlines()), MAX_MODULE_LINES)]
        for name, function in functions(module.tree, module.name):
            sizes.append((name, "lines", num_lines(function), MAX_FUNCTION_LINES))
            sizes.append((name, "parameters", num_parameters(function), MAX_PARAMETERS))
        yield from ((what, measure, size) for what, measure, size, budget in sizes if size > budget)


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(node: ast.AST, path: str) -> Iterator[tuple[str, Function]]:
    for child in ast.iter_child_nodes(node):
        inner = f"{path}.{child.name}" if isinstance(child, Function | ast.ClassDef) else path
        if isinstance(child, Function):
            yield inner, child
        yield from functions(child, inner)


def num_lines(function: Function) -> int:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    end = (body or function.body)[-1].end_lineno or 0
    docstring = function.body[0]
    skipped = (docstring.end_lineno or 0) - docstring.lineno + 1 if body is not function.body else 0
    return end - function.lineno + 1 - skipped


def num_parameters(function: Function) -> int:
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def environment_uses(module: Module) -> Iterator[int]:
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os":
            used = {node.attr}
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            used = {alias.name for alias in node.names}
        else:
            continue
        if used & names:
            yield node.lineno


def variables(module: Module) -> Iterator[tuple[str, ast.expr]]:
    """Name and value of every assignment at module level."""
    for statement in module.tree.body:
        if isinstance(statement, ast.Assign):
            yield from ((ast.unparse(target), statement.value) for target in statement.targets)
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            yield ast.unparse(statement.target), statement.value


def is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        makers = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict"}
        return ast.unparse(value.func).split(".")[-1] in makers
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def begins_with_its_version(changelog: str, version: str) -> bool:
    """Whether the first entry, `## [1.2.3] - ...`, is that of the version."""
    heading = re.search(r"^## \[(.+?)\]", changelog, flags=re.MULTILINE)
    return heading is not None and heading[1] == version


# --- the package -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_rule(rule: Rule):
    findings = list(rule(read_package()))
    assert not findings, "\n" + "\n".join(findings)


def test_changelog_begins_with_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert begins_with_its_version(changelog, macrobatch.__version__)


def test_public_names_exist():
    assert not [name for name in PUBLIC_NAMES if not hasattr(macrobatch, name)]


# --- the controls ----------------------------------------------------------------------------------------------------

LONG = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES
DOCUMENTED = 'def f(self, a, b, c, d, e, f, g, h):\n    """A' + "\n" * MAX_FUNCTION_LINES + '"""\n    pass'
WIDE = "def f(a, b, c, d, /, e, f, *, g, h, i): ..."

REFUSED: list[tuple[Rule, str, str]] = [
    (imports_point_down, "core.stray", ""),
    (imports_point_down, "core.gradients", "from macrobatch.core.step import run_window"),
    (imports_point_down, "core.gradients", "from macrobatch.core import step"),
    (imports_point_down, "core.gradients", "import macrobatch.train"),
    (imports_point_down, "core.gradients", "from ..errors import StateError"),
    (imports_point_down, "core.gradients", "def f():\n    from macrobatch import TrainStep"),
    (imports_point_down, "core.window", "from macrobatch.core.events import Event"),
    (imports_point_down, "accelerate.accelerator", "from macrobatch.train import TrainStep"),
    (imports_point_down, "cli", "from macrobatch.testing import reference"),
    (imports_point_down, "testing.reference", "from macrobatch.cli import main"),
    (every_folder_is_a_package, "core.window", ""),
    (no_door_is_named_below_the_doors, "sync.base", "# as Accelerate does"),
    (no_door_is_named_below_the_doors, "plan.split", "kind = 'colossalai'"),
    (no_door_is_named_below_the_doors, "core.step", "def is_accelerated(): ..."),
    (the_window_imports_no_torch, "core.window", "import torch"),
    (the_window_imports_no_torch, "core.window", "def f():\n    from torch.nn import Module"),
    (sizes_stay_in_budget, "tree", "\n" * (MAX_MODULE_LINES + 1)),
    (sizes_stay_in_budget, "tree", LONG),
    (sizes_stay_in_budget, "tree", "class C:\n    async " + LONG.replace("\n", "\n    ")),
    (sizes_stay_in_budget, "tree", WIDE),
    (every_exception_is_needed, "train", "class TrainStep:\n    def __init__(self): ..."),
    (the_environment_is_read_in_one_place, "core.step", "import os\nos.environ['A'] = '1'"),
    (the_environment_is_read_in_one_place, "cli", "import os\nx = os.getenv('A')"),
    (the_environment_is_read_in_one_place, "tree", "from os import environ as e"),
    (no_state_in_modules, "sync.base", "cache = {}"),
    (no_state_in_modules, "sync.base", "seen: set[int] = set()"),
    (no_state_in_modules, "sync.base", "import collections\nqueue = collections.deque()"),
    (no_state_in_modules, "core.step", "n = 0\ndef f():\n    global n\n    n += 1"),
    (public_names_are_the_listed_ones, "__init__", "__all__ = ['TrainStep']"),
    (public_names_are_the_listed_ones, "__init__", ""),
]

ALLOWED: list[tuple[Rule, str, str]] = [
    (
        imports_point_down,
        "core.step",
        "import torch\nfrom macrobatch.core import events\nfrom macrobatch.errors import E",
    ),
    (imports_point_down, "sync.local", "from macrobatch.sync.base import Sync"),
    (imports_point_down, "testing.reference", "from macrobatch.train import accumulate"),
    (imports_point_down, "demo.report", "import macrobatch as mb"),
    (every_folder_is_a_package, "core.__init__", ""),
    (no_door_is_named_below_the_doors, "sync.base", "device = torch.accelerator.current_accelerator()"),
    (no_door_is_named_below_the_doors, "cli", "import macrobatch.accelerate"),
    (the_window_imports_no_torch, "core.window", "import torchlike\nfrom macrobatch.errors import WindowError"),
    (sizes_stay_in_budget, "tree", DOCUMENTED),
    (the_environment_is_read_in_one_place, "env", "import os\nos.environ"),
    (the_environment_is_read_in_one_place, "launch.ranks", "import os\nos.environ"),
    (no_state_in_modules, "sync.base", "__all__ = []\n_TABLE = {}\nname = ()\ndef f():\n    x = []"),
    (public_names_are_the_listed_ones, "__init__", f"__all__ = {PUBLIC_NAMES}"),
]


@pytest.mark.parametrize(("rule", "name", "source"), REFUSED)
def test_rule_refuses(rule: Rule, name: str, source: str):
    assert list(rule([Module(name, source)]))


@pytest.mark.parametrize(("rule", "name", "source"), ALLOWED)
def test_rule_allows(rule: Rule, name: str, source: str):
    assert not list(rule([Module(name, source)]))


def test_every_rule_has_a_control():
    assert {rule for rule, *_ in REFUSED} == set(RULES)


@pytest.mark.parametrize("changelog", ["", "# Changelog\n", "## [0.2.0] - Unreleased\n## [0.1.0] - 2000-01-01\n"])
def test_another_version_is_seen(changelog: str):
    assert not begins_with_its_version(changelog, "0.1.0")
    assert begins_with_its_version("## [0.1.0] - Unreleased\n" + changelog, "0.1.0")
