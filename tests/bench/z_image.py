"""Z-Image at 1024x1024 on paper: operations and bytes of its published shapes. Nothing of its size is computed.

The preset `few_step` at 8 steps without guidance, with a KL autoencoder of 16 channels, ImageReward and HPSv2.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from maskunet_core.models.families.nextdit import NEXTDIT
from maskunet_core.models.structure import inspect_model
from maskunet_core.rewards.reward import value_and_gradient
from maskunet_core.search.graph import first_masked
from maskunet_core.search.judge import Judge
from maskunet_core.search.memory import bytes_of_blocks, bytes_of_masks, keeps_ways, room_for
from maskunet_core.search.settings import PRESETS, SMALL_SIDE
from tests.bench.models import random_rewards
from tests.bench.search import Imagined
from trainer.reward_compare.costs import Operations

STEPS, CELLS, TEXT, PRESET = 8, 128, 128, PRESETS["few_step"]
_SHAPES = {"patch_size": 2, "in_channels": 16, "cap_feat_dim": 2560, "dim": 3840, "n_layers": 30, "qk_norm": True}
_SHAPES |= {"n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512]}
_SHAPES |= {"rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0}
_SHAPES |= {"pad_tokens_multiple": 32}


def _z_image() -> nn.Module:
    """On the meta device, in bf16."""
    import comfy.ops
    from comfy.ldm.lumina.model import NextDiT

    where = {"device": "meta", "dtype": torch.bfloat16, "operations": comfy.ops.disable_weight_init}
    return NextDiT(**_SHAPES, **where)


@dataclass(frozen=True)
class _Operations:
    """Of a forward pass, and of an update with the look after it, without a judge."""

    forward: int
    update: int


def _operations(model: nn.Module, masked: list[str], first: int) -> _Operations:
    """masked: names of layers. first: the number of the first block in which one of them lies.

    An update runs the blocks from there on forward, once more in the backward pass, and back to their inputs, where a
    product costs as much as forward and attention twice; masked weights have gradients of their own.
    """
    tokens, width = (CELLS // 2) ** 2 + TEXT, _SHAPES["dim"]
    per_token = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "adaLN" not in n]
    attention = 2 * 2 * tokens**2 * width

    def products(names: list[str], length: int) -> int:
        return sum(2 * model.get_submodule(name).weight.numel() * length for name in names)

    layers = [name for name in per_token if name.startswith("layers.")]
    lengths = {"context_refiner.": TEXT, "noise_refiner.": tokens - TEXT}
    refined = 0
    for stack, length in lengths.items():
        names = [name for name in per_token if name.startswith(stack)]
        blocks = len(model.get_submodule(stack[:-1]))
        refined += products(names, length) + blocks * 2 * 2 * length**2 * width
    region = [name for name in layers if int(name.split(".")[1]) >= first]
    behind = len(model.layers) - first
    of_region = products(region, tokens) + behind * attention
    forward = refined + products(layers, tokens) + len(model.layers) * attention
    return _Operations(forward, 3 * of_region + behind * attention + products(masked, tokens))


def _decoding(cells: int, backward: bool) -> int:
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.model import pytorch_attention

    layout = {"double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    layout |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    with torch.device("meta"):
        network = AutoencoderKL(ddconfig=layout, embed_dim=16).requires_grad_(False)
        # The CPU's asks how much memory the device has.
        network.decoder.mid.attn_1.optimized_attention = pytorch_attention
        latents = torch.empty(1, 16, cells, cells, requires_grad=backward)
        with Operations() as counted, torch.set_grad_enabled(backward):
            pictures = network.decode(latents)
            if backward:
                pictures.sum().backward()
    return counted.total


def _rewarding(backward: bool) -> int:
    reward, pictures = random_rewards(), torch.rand(1, 3, SMALL_SIDE, SMALL_SIDE)
    with Imagined() as counted, torch.no_grad():
        value_and_gradient(reward, pictures) if backward else reward(pictures)
    return counted.total


def _in_plain_images(costs: _Operations) -> float:
    small = SMALL_SIDE // 8
    plain = STEPS * costs.forward + _decoding(CELLS, False)
    judged = plain + _rewarding(False)
    looks = _decoding(small, True) + _rewarding(True)
    last = _decoding(small, False) + _rewarding(False)
    # The first look computes what the others find, and the sampler takes its step with the masks that were found.
    improved = judged + costs.forward + PRESET.iterations * (costs.update + looks) + last
    return (PRESET.candidates * judged + improved) / plain


def _room(model: nn.Module, structure: Any) -> dict[str, float]:
    """GB that the host is asked to leave free, by what they are for."""
    ways, computing = keeps_ways(PRESET, model), torch.bfloat16
    masks = bytes_of_masks(structure, PRESET, computing, ways)
    blocks = bytes_of_blocks(model, structure, CELLS**2, computing)
    # As the host plans for its KL autoencoders.
    vae = SimpleNamespace(
        latent_dim=2,
        latent_channels=16,
        vae_dtype=computing,
        memory_used_decode=lambda shape, dtype: 2178 * shape[2] * shape[3] * 64 * dtype.itemsize,
    )
    judge = Judge(lambda latents: latents, lambda pictures: (pictures, pictures), SMALL_SIDE)
    whole = room_for(masks, blocks, vae, 1, judge.decoded_size(CELLS, CELLS))
    parts = {"masks GB": masks, "blocks GB": blocks, "decoder GB": whole - masks - blocks}
    return {"whole": whole / 1e9} | {name: round(value / 1e9, 2) for name, value in parts.items()}


def on_paper() -> dict[str, Any]:
    """images: plain images that `few_step` costs. update: in plain forwards. room: GB, with its parts. state: bytes of
    a masked weight."""
    model = _z_image()
    structure = inspect_model(model, "decoder attention", "Z-Image")
    first = first_masked(NEXTDIT.blocks(model), structure)
    costs = _operations(model, [layer.module_name for layer in structure.layers.values()], first)
    room = _room(model, structure)
    return {
        "images": round(_in_plain_images(costs), 1),
        "update": round(costs.update / costs.forward, 2),
        "room": round(room.pop("whole"), 2),
        "parts": room,
        "state": round(room["masks GB"] * 1e9 / structure.masked_weights, 2),
    }
