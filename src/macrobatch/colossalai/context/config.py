"""A config: a dict whose keys are attributes too, read from Python code."""

from __future__ import annotations
import __future__

import importlib
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from macrobatch.errors import ArgumentError

__all__ = ["Config", "ConfigException"]

FROM_FUTURE = type(__future__.annotations)
_MODULE = "macrobatch_config"  # what a config file is called while it runs


class ConfigException(ArgumentError):
    """A config that cannot be read, or a key in it that is not right."""


class Config(dict[str, Any]):
    """A dict with its keys as attributes, in dicts within it as well. Lists are kept as they are.

    ```pycon
    >>> config = Config({"gradient_accumulation": 4, "parallel": {"tensor": {"size": 1}}})
    >>> config.gradient_accumulation, config.parallel.tensor.size
    (4, 1)
    >>> config.BATCH_SIZE = 128
    >>> config["BATCH_SIZE"], hasattr(config, "NUM_EPOCHS")
    (128, False)

    ```
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.update({} if config is None else config)

    def __setitem__(self, key: str, value: Any) -> None:
        is_plain = isinstance(value, Mapping) and not isinstance(value, Config)
        super().__setitem__(key, Config(value) if is_plain else value)  # pyright: ignore[reportUnknownArgumentType]

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no {name!r}, but {sorted(map(str, self))}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self[name]
        except KeyError:
            raise AttributeError(f"the config has no {name!r}, but {sorted(map(str, self))}") from None

    def update(self, config: Mapping[str, Any]) -> Config:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take over every entry of another config; this one again."""
        if not isinstance(config, Mapping):
            raise ConfigException("Config", given=repr(config), expected="a dict or a Config", fix="pass a dict")
        for key, value in config.items():
            self[key] = value
        return self

    def copy(self) -> Config:
        """A config with the same entries; dicts within it are copied as well."""
        return Config({key: value.copy() if isinstance(value, Config) else value for key, value in self.items()})

    @staticmethod
    def from_file(filename: str | Path) -> Config:
        """The global variables of a `.py` file, without those that are modules, classes, or begin with `__`.

        While it runs, the file can import its neighbours. Unless their folder is one that Python searches anyway, none
        of them stays imported. The file itself never does.

        Args:
            filename: relative to the working directory, or absolute.

        Raises:
            ConfigException: there is no such file, or it does not end in `.py`.
        """
        path = Path(filename).absolute()
        if path.suffix != ".py":
            raise ConfigException("config", given=str(filename), expected="a .py file", fix="rename it, or pass a dict")
        if not path.is_file():
            raise ConfigException(
                "config",
                given=str(filename),
                expected=f"a file; there is none in {Path.cwd()}" if str(path) != str(filename) else "a file",
                fix="run the script from the folder that the path starts in, or pass an absolute path",
            )
        module = ModuleType(_MODULE)
        module.__file__ = str(path)
        with _running(module, str(path.parent)):
            exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
        return Config({name: value for name, value in vars(module).items() if _is_entry(name, value)})


def _is_entry(name: str, value: object) -> bool:
    return not name.startswith("__") and not isinstance(value, ModuleType | type | FROM_FUTURE)


@contextmanager
def _running(module: ModuleType, folder: str) -> Generator[None]:
    """The file's folder is searched first, and what came from it is forgotten afterwards."""
    before, path, has_folder = dict(sys.modules), list(sys.path), folder in sys.path
    sys.modules[_MODULE] = module  # dataclasses look up the module that they are defined in
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        for name in sys.modules.keys() - before.keys():
            if name == _MODULE or (not has_folder and _is_within(sys.modules[name], folder)):
                del sys.modules[name]


def _is_within(module: ModuleType, folder: str) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and Path(folder) in Path(file).parents
