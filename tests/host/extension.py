"""The extension in this process, imported as the host imports it."""

import importlib
import importlib.util
import sys
from types import ModuleType

from trainer.host import PROJECT

NAME = "maskunet_extension"


def load_extension() -> ModuleType:
    """The project's folder as a package called NAME. The host must be importable already."""
    spec = importlib.util.spec_from_file_location(
        NAME, PROJECT / "__init__.py", submodule_search_locations=[str(PROJECT)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = package
    spec.loader.exec_module(package)
    return package


def core_module(name: str) -> ModuleType:
    """A module of the extension's own `maskunet_core`, whose classes are others than those that tests import."""
    return importlib.import_module(f"{NAME}.maskunet_core.{name}")
