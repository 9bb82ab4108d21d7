"""A package that is not there: its modules can be imported, and whatever is used of them says what is missing.

The host imports packages at its start that these checks never use. A packed folder brings them in this form.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Missing:
    """Whatever is taken from a stand-in. A class may derive from it; all else raises ImportError."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> "Missing":
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self._name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise ImportError(f"{self._name} is not here: the packed folder has a stand-in for it. Install the package.")

    def __mro_entries__(self, bases: tuple) -> tuple:
        return ()

    # Annotations such as `Missing | None`.
    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__


class StandIn(ModuleType):
    """A module with every name."""

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")


class Finder(MetaPathFinder, Loader):
    """Finds the modules inside of the named package."""

    def __init__(self, package: str):
        self._inside = f"{package}."

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(self._inside) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def install(name: str) -> None:
    """Called by the package's `__init__.py`."""
    sys.modules[name].__class__ = StandIn
    sys.meta_path.insert(0, Finder(name))
