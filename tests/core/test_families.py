import pytest
import torch
from torch import nn

from maskunet_core.choices import TARGETS
from maskunet_core.models.structure import NothingToMask, Structure, inspect_model
from tests.builders import SDXL, sd15_unet


def test_decoder_attention_of_sd15_is_what_the_paper_masks(sd15_structure):
    assert len(sd15_structure.layers) == 72
    assert sd15_structure.masked_weights == 49_029_120
    assert [(b.name, b.anchor, b.channels, len(b.layers)) for b in sd15_structure.blocks] == [
        ("up.1", "output_blocks.3.0", 2560, 24),
        ("up.2", "output_blocks.6.0", 1920, 24),
        ("up.3", "output_blocks.9.0", 960, 24),
    ]
    assert sd15_structure.embedding == 1280
    layer = sd15_structure.layers["output_blocks.3.1.transformer_blocks.0.attn2.to_k"]
    assert (layer.out_features, layer.in_features) == (1280, 768)


def test_sd2_and_sdxl_are_found_by_structure():
    sd2 = inspect_model(sd15_unet(context_dim=1024, use_linear_in_transformer=True), "decoder attention", "SD 2.x")
    assert (len(sd2.layers), round(sd2.masked_weights / 1e6, 1)) == (72, 52.5)
    sdxl = inspect_model(sd15_unet(**SDXL), "decoder attention", "SDXL")
    assert [(b.name, len(b.layers)) for b in sdxl.blocks] == [("up.0", 240), ("up.1", 48)]
    assert round(sdxl.masked_weights / 1e6, 1) == 482.7


def test_target_sets_grow_in_the_named_order():
    unet = sd15_unet()
    attention, feed_forward, everywhere = (inspect_model(unet, name, "SD 1.5") for name in TARGETS)
    assert set(attention.layers) < set(feed_forward.layers)
    assert {n.rsplit(".transformer_blocks.0.")[1] for n in set(feed_forward.layers) - set(attention.layers)} == {
        "ff.net.0.proj",
        "ff.net.2",
    }
    assert set(attention.layers) < set(everywhere.layers)
    assert [b.name for b in everywhere.blocks] == ["down.0", "down.1", "down.2", "mid", "up.1", "up.2", "up.3"]
    assert len(everywhere.layers) == 128


def test_structure_survives_the_way_through_metadata(sd15_structure):
    assert Structure.from_dict(sd15_structure.to_dict()) == sd15_structure
    assert sd15_structure.difference(sd15_structure) is None


def test_difference_names_what_does_not_fit(sd15_structure):
    sd2 = inspect_model(sd15_unet(context_dim=1024), "decoder attention", "SD 2.x")
    assert "attn2.to_k of 1280x768 is not in the model" in sd15_structure.difference(sd2)
    smaller = inspect_model(sd15_unet(model_channels=64, num_heads=2), "decoder attention", "tiny")
    assert "1280 channels, the model's has 256" in sd15_structure.difference(smaller)


def test_a_model_of_another_kind_is_refused_by_name():
    with pytest.raises(
        NothingToMask,
        match=r"Foreign, Linear.*is of a kind that MaskUNet has no masks for.*Reward Sampler without masks",
    ):
        inspect_model(nn.Linear(2, 2), "decoder attention", "Foreign")


def test_no_matching_layer_is_an_error():
    unet = sd15_unet(transformer_depth_output=[0] * 12)
    with pytest.raises(NothingToMask, match="No layer of the connected model"):
        inspect_model(unet, "decoder attention", "SD 1.5")


def test_a_layer_with_a_kernel_of_its_own_is_refused_with_its_class():
    class ForeignLinear(nn.Module):
        weight = torch.zeros(1)
        in_features = out_features = 320

    unet = sd15_unet()
    unet.output_blocks[9][1].transformer_blocks[0].attn1.to_q = ForeignLinear()
    with pytest.raises(NothingToMask, match=r"output_blocks\.9.*attn1\.to_q is a .*ForeignLinear"):
        inspect_model(unet, "decoder attention", "SD 1.5")


def test_layers_that_see_a_place_over_time_are_left_out():
    """Their rows are places of the picture, and the frames of a sample lie apart in them."""
    mixing = {"merge_strategy": "learned_with_images", "merge_factor": 0.0, "video_kernel_size": [3, 1, 1]}
    video = sd15_unet(use_temporal_attention=True, use_temporal_resblock=True, **mixing)
    names = [name for name, _ in video.named_modules() if name.endswith("attn1.to_q") and "output_blocks" in name]
    assert any(".time_stack." in name for name in names)
    structure = inspect_model(video, "decoder attention", "SVD")
    assert len(structure.layers) == 72
    assert not any(".time_stack." in name for name in structure.layers)


def test_a_layer_that_computes_before_the_host_casts_is_refused_with_its_class():
    import comfy.ops

    class OwnForward(comfy.ops.manual_cast.Linear):
        """As loaders with kernels of their own have: no mask would reach it."""

        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias)

    unet = sd15_unet()
    layer = unet.output_blocks[3][1].transformer_blocks[0].attn1
    layer.to_q = OwnForward(1280, 1280, bias=False, device="meta")
    with pytest.raises(NothingToMask, match=r"OwnForward, which computes with its weight in a way of its own"):
        inspect_model(unet, "decoder attention", "SD 1.5")
