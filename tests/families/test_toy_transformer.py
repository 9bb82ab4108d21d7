"""Masks on the toy transformer: a trained model of one of the families."""

import pytest

from maskunet_core.toy.model import load_toy_model
from tests.families.checks import ATTENTION, COLUMNS, World
from tests.families.models import Tiny


class ToyWorld(World):
    """It is loaded from its own files, which keep it in 8 bits already."""

    def __init__(self):
        self.tiny = Tiny("Flux2", {}, latent=(4, 8, 8), text=128)
        self.model = load_toy_model(body="transformer")[0]
        self.stock = self.draw(self.model)
        self.structure = self.structure_of(ATTENTION)


@pytest.fixture(scope="module")
def world() -> ToyWorld:
    return ToyWorld()


@pytest.mark.parametrize("column", [column for column in COLUMNS if column != "quantised"])
def test_masks_on_it(world, column):
    COLUMNS[column](world)


def test_its_structure_is_that_of_its_family(world):
    structure = world.structure
    assert structure.family == "the MaskUNet toy transformer"
    assert [block.name for block in structure.blocks] == ["single_blocks.4", "single_blocks.5"]
    assert structure.masked_weights == 2 * 4 * 128 * 128
