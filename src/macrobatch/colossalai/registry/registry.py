"""A table of classes that a config can name."""

from __future__ import annotations

from typing import TypeVar

from macrobatch.errors import ArgumentError

__all__ = ["GRADIENT_HANDLER", "Registry"]

C = TypeVar("C", bound=type)


class Registry:
    """Classes by their names.

    ```pycon
    >>> handlers = Registry("gradient_handler")
    >>> @handlers.register_module
    ... class Mine: ...
    >>> handlers.has("Mine"), handlers.get_module("Mine") is Mine
    (True, True)

    ```
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._classes: dict[str, type] = {}

    @property
    def name(self) -> str:
        """What the classes are."""
        return self._name

    def register_module(self, module_class: C) -> C:
        """Add a class under its name; to be written above it, as a decorator.

        Raises:
            ArgumentError: another class has that name. (The same one again is fine: a notebook's cell that is run twice
                replaces it.)
        """
        name = module_class.__name__
        known = self._classes.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (
            module_class.__module__,
            module_class.__qualname__,
        ):
            raise ArgumentError(
                f"the registry {self._name!r}",
                given=f"a second {name}, of {module_class.__module__}",
                expected=f"a name of its own; {known.__module__} has one",
                fix="rename the class",
            )
        self._classes[name] = module_class
        return module_class

    def get_module(self, module_name: str) -> type:
        """The class of a name.

        Raises:
            ArgumentError: there is none.
        """
        if module_name not in self._classes:
            raise ArgumentError(
                f"the registry {self._name!r}",
                given=repr(module_name),
                expected=f"one of {sorted(self._classes)}",
                fix=f"write @{self._name.upper()}.register_module above your class, in a module that is imported",
            )
        return self._classes[module_name]

    def has(self, module_name: str) -> bool:
        """Whether there is a class of this name."""
        return module_name in self._classes


GRADIENT_HANDLER = Registry("gradient_handler")
