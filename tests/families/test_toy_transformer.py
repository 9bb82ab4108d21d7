"""Masks on the toy transformer: a trained model of one of the families."""

import pytest

from maskunet_core.files import checkpoint
from maskunet_core.masks.sources import GeneratorMasks
from maskunet_core.seam.attach import attach
from maskunet_core.toy.model import WEIGHTS, load_toy_model
from maskunet_core.training.seeds import seeded
from tests.families.checks import ATTENTION, COLUMNS, World
from tests.families.models import Tiny
from trainer.compare.worlds import style_strength
from trainer.reward_compare.plan import BODIES
from trainer.reward_compare.stage import Stage
from trainer.toy.world import sample_captioned


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


def test_the_generator_that_ships_gives_its_style_to_pictures():
    stage = Stage(BODIES["transformer"], body="transformer")
    file = checkpoint.load(WEIGHTS.with_name("generators") / "toy_transformer_style.safetensors")
    masked = attach(stage.base.patcher, GeneratorMasks(file.generator), 1.0, 0.0, 1.0)
    _, captions = sample_captioned(8, seeded(5))
    noise = stage.noise(captions, 0)
    plain, styled = (
        style_strength(stage.verdict(stage.sample(model, captions, noise), captions).pictures).mean()
        for model in (stage.base.patcher, masked)
    )
    # Of 192 pictures: 0.40, and -0.02 without masks.
    assert styled - plain > 0.25
