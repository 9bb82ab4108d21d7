"""The extension in the tests' own process."""

import importlib
import importlib.util
import sys

import pytest

from trainer.host import PROJECT


@pytest.fixture(scope="module")
def extension():
    """Imports `nodes.<name>` as the host does: as part of a package with the folder's name."""
    spec = importlib.util.spec_from_file_location(
        "maskunet_extension", PROJECT / "__init__.py", submodule_search_locations=[str(PROJECT)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["maskunet_extension"] = package
    spec.loader.exec_module(package)
    importlib.import_module("maskunet_extension.nodes.folders").register()
    yield lambda name: importlib.import_module(f"maskunet_extension.nodes.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == "maskunet_extension"]:
        del sys.modules[name]
