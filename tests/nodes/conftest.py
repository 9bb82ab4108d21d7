"""The extension in the tests' own process."""

import importlib
import sys

import pytest

from tests.host.extension import NAME, load_extension

pytest.register_assert_rewrite("tests.nodes.scene")


@pytest.fixture(scope="module")
def extension():
    """Imports `nodes.<name>` as the host does: as part of a package with the folder's name."""
    load_extension()
    importlib.import_module(f"{NAME}.nodes.folders").register()
    yield lambda name: importlib.import_module(f"{NAME}.nodes.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == NAME]:
        del sys.modules[name]
