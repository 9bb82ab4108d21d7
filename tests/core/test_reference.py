import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maskunet_core.files import checkpoint
from maskunet_core.masks.call import Call
from maskunet_core.masks.reference import ReferenceGenerator, authors_maps
from maskunet_core.masks.sources import GeneratorMasks
from maskunet_core.models.structure import inspect_model
from tests import authors_files
from tests.authors_files import GOLDEN_LAYERS, MAP_STEP, kept
from tests.builders import sd15_unet
from trainer.convert import BadReference, convert


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """Generators and adapters in the authors' layout."""
    return authors_files.write(tmp_path_factory.mktemp("authors"))


@pytest.fixture(scope="module")
def converted(files, tmp_path_factory) -> Path:
    return convert(*files, tmp_path_factory.mktemp("converted") / "reference.safetensors", "SD 1.5")


@pytest.fixture(scope="module")
def golden() -> dict:
    """By the authors' code: the map S, and logits of three layers at the places that `kept` keeps."""
    return load_file(authors_files.GOLDEN)


def features_and_embedding():
    given = {name: value.float() for name, value in authors_files.inputs().items()}
    return torch.cat([given["h"], given["skip"]], dim=1), given["t_emb"]


def host_name(authors_name: str) -> str:
    """attentions_0_transformer_blocks_0_attn1_to_q -> the host's layer name in up-block 1."""
    parts = authors_name.removeprefix("attentions_").split("_transformer_blocks_0_")
    layer = parts[1].replace("_to_", ".to_").replace("out_0", "out.0")
    return f"output_blocks.{2 + int(parts[0])}.1.transformer_blocks.0.{layer}"


def test_logits_equal_those_of_the_authors_code(converted, golden):
    generator = checkpoint.load(converted).generator
    block = generator.structure.blocks[0]
    conditions = generator.condition(block, *features_and_embedding())
    torch.testing.assert_close(kept(conditions[block.layers[0].name], MAP_STEP), golden["S"], rtol=1e-5, atol=1e-5)
    for layer in GOLDEN_LAYERS:
        name = host_name(layer)
        logits = generator.layer_logits(name, conditions[name]).full()
        torch.testing.assert_close(kept(logits), golden[layer], rtol=1e-5, atol=1e-5)


def test_golden_logits_meet_every_row_and_every_column(golden):
    for layer in GOLDEN_LAYERS:
        rows, columns = 320, 768 if layer.endswith("attn2_to_k") else 320
        places = torch.arange(rows * columns).view(1, rows, columns)
        met = kept(places)
        assert set((met // columns).tolist()) == set(range(rows))
        assert set((met % columns).tolist()) == set(range(columns))
        assert len(golden[layer]) == 3 * len(met)


def authors_unet():
    """The fixture's U-Net: two levels of 320 channels, one ResBlock each, attention in the outer level."""
    return sd15_unet(
        channel_mult=[1, 1],
        num_res_blocks=[1, 1],
        transformer_depth=[1, 0],
        transformer_depth_output=[1, 1, 0, 0],
        transformer_depth_middle=1,
    )


def test_converted_names_and_shapes_are_those_of_the_host(converted):
    structure = inspect_model(authors_unet(), "decoder attention", "SD 1.5")
    assert checkpoint.load(converted).structure.difference(structure) is None


def test_maps_have_the_sizes_that_the_authors_files_have(converted, sd15_structure):
    unet = authors_unet()
    assert (
        authors_maps(inspect_model(unet, "decoder attention", "SD 1.5"), unet)
        == checkpoint.load(converted).generator.maps
    )
    with torch.device("meta"):
        full_size = ReferenceGenerator(sd15_structure, authors_maps(sd15_structure, sd15_unet()))
    # Measured on the authors' code: 40.9 M parameters in the adapters.
    assert sum(p.numel() for p in full_size.adapters.parameters()) == pytest.approx(40.9e6, rel=2e-3)


def masks_of(generator, seed=None):
    """Per golden layer, at the places of its golden logits."""
    call = Call()
    mask = GeneratorMasks(generator, seed=seed).begin(call)
    call.enter("up.1", *features_and_embedding())
    return {layer: kept(mask(host_name(layer), torch.zeros(1))) for layer in GOLDEN_LAYERS}


def test_the_likelier_decision_is_the_authors(converted, golden):
    generator = checkpoint.load(converted).generator
    for layer, mask in masks_of(generator).items():
        likelier = 1 - torch.exp(-torch.exp(golden[layer])) > 0.5
        assert (mask != likelier).float().mean() < 1e-4
    assert generator.threshold == pytest.approx(math.log(math.log(2)))


def test_stochastic_masks_keep_with_the_authors_probability(converted, golden):
    generator = checkpoint.load(converted).generator
    for layer, mask in masks_of(generator, seed=1).items():
        expected = (1 - torch.exp(-torch.exp(golden[layer]))).mean().item()
        assert abs(mask.float().mean().item() - expected) < 0.01


def test_files_that_are_no_reference_get_a_sentence(files, tmp_path):
    generators, adapters = files
    output = tmp_path / "out.safetensors"
    with pytest.raises(BadReference, match="does not exist"):
        convert(tmp_path / "none.pth", adapters, output, "SD 1.5")
    for content in ("no tensors", ""):
        (tmp_path / "text.pth").write_text(content)
        with pytest.raises(BadReference, match="is not a file of tensors"):
            convert(tmp_path / "text.pth", adapters, output, "SD 1.5")
    with pytest.raises(BadReference, match=r"holds no key such as 1\.attentions_0"):
        convert(adapters, generators, output, "SD 1.5")
    torch.save({"1.proj_temb.weight": torch.zeros(4, 4)}, tmp_path / "partial.pth")
    with pytest.raises(BadReference, match="lacks the tensor"):
        convert(tmp_path / "partial.pth", adapters, output, "SD 1.5")
    assert not output.exists()


class Trap:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickled_code_is_never_run(files, tmp_path):
    torch.save({"x": Trap(tmp_path / "written")}, tmp_path / "trap.pth")
    with pytest.raises(BadReference):
        convert(tmp_path / "trap.pth", files[1], tmp_path / "out.safetensors", "SD 1.5")
    assert not (tmp_path / "written").exists()
