"""The table of families, a test per cell."""

import pytest

from tests.families.checks import COLUMNS, World
from tests.families.models import TINY
from tests.families.searches import SEARCHES


@pytest.fixture(scope="module", params=TINY)
def world(request) -> World:
    import comfy.supported_models

    if not hasattr(comfy.supported_models, TINY[request.param].kind):
        pytest.skip(f"This ComfyUI does not know {request.param}.")
    return World(request.param)


@pytest.mark.parametrize("column", COLUMNS)
def test_masks_on(world, column):
    COLUMNS[column](world)


@pytest.mark.parametrize("column", SEARCHES)
def test_search_on(world, column):
    SEARCHES[column](world)


def test_the_family_has_its_name(world, request):
    assert world.structure.family == request.node.callspec.params["world"]
