"""Tiny transformers of the host's own classes, with random weights, as MODELs that its samplers take."""

import functools
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.tiny_models import QUANTISED, drawn

CPU = torch.device("cpu")
TEXT = 64


@dataclass(frozen=True)
class Tiny:
    """kind: the host's class of configurations. layout: what it tells the model. latent: shape of one image's latent.
    text: channels of the conditioning. more: shapes of its other tensors."""

    kind: str
    layout: dict[str, Any]
    latent: tuple[int, ...] = (16, 8, 8)
    text: int = TEXT
    more: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @functools.cached_property
    def weights(self) -> tuple[dict[str, Tensor], set[str]]:
        """(all parameters, names of linear layers).

        What the host computes at the start stays, and what it leaves as the memory was is drawn. A host with dynamic
        VRAM makes models without parameters, so they are drawn before.
        """
        model = _new(self).diffusion_model
        linear = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        shapes |= {name: buffer.shape for name, buffer in model.named_buffers() if name.endswith("pos_embed")}
        weights = drawn(shapes, seed=1)
        stream = torch.Generator().manual_seed(2)
        for name, value in weights.items():
            if value.ndim == 1 and not name.endswith("weight"):
                # A gate of zero would hide what its block computes.
                value += 0.3 * torch.randn(value.shape, generator=stream)
        return weights, linear


_NEXTDIT = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "cap_feat_dim": TEXT, "n_layers": 3}
_NEXTDIT |= {"qk_norm": True, "n_heads": 2}
_Z_IMAGE = _NEXTDIT | {"dim": 256, "n_kv_heads": 2, "axes_dims": [32, 48, 48], "axes_lens": [64, 64, 64]}
_Z_IMAGE |= {"rope_theta": 256.0, "ffn_dim_multiplier": 1.0, "z_image_modulation": True, "time_scale": 1000.0}
_Z_IMAGE |= {"pad_tokens_multiple": 32, "allow_fp16": False}
_LUMINA = _NEXTDIT | {"dim": 192, "n_kv_heads": 1, "axes_dims": [32, 32, 32], "axes_lens": [64, 64, 64]}
_LUMINA |= {"rope_theta": 10000.0, "ffn_dim_multiplier": 1.0}
_OF_FLUX = {"num_heads": 1, "hidden_size": 128, "context_in_dim": TEXT, "depth": 1, "depth_single_blocks": 2}
_FLUX = _OF_FLUX | {"image_model": "flux", "axes_dim": [16, 56, 56], "mlp_ratio": 2.0, "theta": 10000}
_FLUX |= {"out_channels": 16, "in_channels": 16, "qkv_bias": True, "txt_ids_dims": [], "patch_size": 2}
_FLUX |= {"vec_in_dim": 48, "guidance_embed": True, "yak_mlp": False, "txt_norm": False}
_FLUX2 = _OF_FLUX | {"image_model": "flux2", "axes_dim": [32, 32, 32, 32], "mlp_ratio": 2.0, "theta": 2000}
_FLUX2 |= {"out_channels": 128, "in_channels": 128, "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False}
_FLUX2 |= {"ops_bias": False, "default_ref_method": "index", "ref_index_scale": 10.0, "txt_ids_dims": [3]}
_FLUX2 |= {"patch_size": 1, "vec_in_dim": None, "guidance_embed": False, "yak_mlp": False, "txt_norm": False}
_CHROMA = _OF_FLUX | {"image_model": "chroma", "axes_dim": [16, 56, 56], "mlp_ratio": 2.0, "theta": 10000}
_CHROMA |= {"out_channels": 64, "in_channels": 64, "qkv_bias": True, "patch_size": 2, "vec_in_dim": None}
_CHROMA |= {"txt_ids_dims": [], "in_dim": 64, "out_dim": 128, "hidden_dim": 32, "n_layers": 1}
_HUNYUAN = _OF_FLUX | {"image_model": "hunyuan_video", "in_channels": 64, "out_channels": 64, "patch_size": [1, 1]}
_HUNYUAN |= {"vec_in_dim": None, "axes_dim": [64, 64], "meanflow": False, "mlp_ratio": 2.0, "theta": 256}
_HUNYUAN |= {"qkv_bias": True, "byt5": False, "guidance_embed": False, "use_cond_type_embedding": False}
_HUNYUAN |= {"vision_in_dim": None, "meanflow_sum": False}
_KREA2 = {"image_model": "krea2", "features": 128, "channels": 16, "patch": 2, "layers": 3, "heads": 1, "kvheads": 1}
_KREA2 |= {"txtlayers": 2, "txtdim": 40, "txtheads": 2, "txtkvheads": 2}
_QWEN = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 3, "num_attention_heads": 1}
_QWEN |= {"attention_head_dim": 128, "joint_attention_dim": TEXT}
_COSMOS = {"image_model": "cosmos_predict2", "max_img_h": 240, "max_img_w": 240, "max_frames": 128}
_COSMOS |= {"in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 128}
_COSMOS |= {"concat_padding_mask": True, "crossattn_emb_channels": TEXT, "pos_emb_cls": "rope3d", "num_blocks": 3}
_COSMOS |= {"pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30, "num_heads": 2}
_COSMOS |= {"use_adaln_lora": True, "adaln_lora_dim": 16, "extra_per_block_abs_pos_emb": False}
_COSMOS |= {f"rope_{axis}_extrapolation_ratio": ratio for axis, ratio in (("h", 4.0), ("w", 4.0), ("t", 1.0))}
_COSMOS |= {f"extra_{axis}_extrapolation_ratio": 1.0 for axis in "hwt"} | {"rope_enable_fps_modulation": False}
_SD3 = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "depth": 3, "input_size": None, "adm_in_channels": 48}
_SD3 |= {"context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": 192}}}
_SD3 |= {"num_patches": 36 * 36, "pos_embed_max_size": 36, "qk_norm": "rms", "pos_embed_scaling_factor": None}
_SD3 |= {"x_block_self_attn_layers": [0, 1, 2]}
_WAN = {"image_model": "wan2.1", "model_type": "t2v", "dim": 128, "out_dim": 16, "num_heads": 1, "ffn_dim": 256}
_WAN |= {"num_layers": 3, "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1), "qk_norm": True}
_WAN |= {"cross_attn_norm": True, "eps": 1e-6, "in_dim": 16, "text_dim": TEXT}
_LTX = {"image_model": "ltxv", "num_layers": 3, "attention_head_dim": 4, "cross_attention_dim": 128}
_LTX |= {"num_attention_heads": 32, "caption_channels": TEXT}

TINY = {
    "Z-Image": Tiny("ZImage", _Z_IMAGE),
    "Lumina 2": Tiny("Lumina2", _LUMINA),
    "Flux.1": Tiny("Flux", _FLUX, more={"pooled_output": (48,)}),
    "Flux.2": Tiny("Flux2", _FLUX2, (128, 4, 4)),
    "Chroma": Tiny("Chroma", _CHROMA),
    "HunyuanImage 2.1": Tiny("HunyuanImage21", _HUNYUAN, (64, 4, 4)),
    "Krea 2": Tiny("Krea2", _KREA2, (16, 1, 8, 8), text=80),
    "Qwen-Image": Tiny("QwenImage", _QWEN, (16, 1, 8, 8)),
    "Cosmos-Predict2": Tiny("CosmosT2IPredict2", _COSMOS, (16, 1, 8, 8)),
    "SD 3": Tiny("SD3", _SD3, more={"pooled_output": (48,)}),
    "Wan 2.1": Tiny("WAN21_T2V", _WAN, (16, 2, 8, 8)),
    "LTX-Video": Tiny("LTXV", _LTX, (128, 2, 4, 4), more={"attention_mask": (7,)}),
}
"""By what the structure calls them."""


def load(tiny: Tiny, quantised: str | None = None, device: torch.device = CPU) -> Any:
    """A MODEL in fp32. quantised: one of QUANTISED, for the linear layers of its blocks. device: where it computes."""
    import comfy.model_patcher

    weights, linear = tiny.weights
    if quantised:
        # The host finds out by what a file holds.
        model = _new(tiny, quant_config={"mixed_ops": True})
        weights = _in_eight_bits(weights, {name for name in linear if "block" in name or "layers." in name}, quantised)
    else:
        model, weights = _new(tiny), dict(weights)
    patcher = comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=CPU)
    model.load_model_weights(weights, assign=patcher.is_dynamic())
    model.requires_grad_(False)
    return patcher


def _new(tiny: Tiny, **settings: Any) -> Any:
    import comfy.supported_models

    config = getattr(comfy.supported_models, tiny.kind)(dict(tiny.layout))
    config.set_inference_dtype(torch.float32, torch.float32 if settings else None)
    for name, value in settings.items():
        setattr(config, name, value)
    return config.get_model({}, "")


def _in_eight_bits(weights: dict[str, Tensor], layers: set[str], kind: str) -> dict[str, Tensor]:
    from comfy.quant_ops import QuantizedTensor

    file_format, layout, options = QUANTISED[kind]
    marker = torch.tensor(list(json.dumps({"format": file_format}).encode()), dtype=torch.uint8)
    tensors = {}
    for name, value in weights.items():
        layer = name.removesuffix(".weight")
        if layer in layers:
            tensors |= QuantizedTensor.from_float(value.to(torch.bfloat16), layout, **options).state_dict(name)
            tensors[f"{layer}.comfy_quant"] = marker
        else:
            tensors[name] = value
    return tensors


def conditioning(tiny: Tiny, seed: int) -> list:
    stream = torch.Generator().manual_seed(seed)
    more = {name: torch.randn(1, *shape, generator=stream) for name, shape in tiny.more.items()}
    if "attention_mask" in more:
        more["attention_mask"] = torch.ones_like(more["attention_mask"], dtype=torch.long)
    return [[torch.randn(1, 7, tiny.text, generator=stream), more]]


def noises(tiny: Tiny, seeds: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.randn(1, *tiny.latent, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def sample(model: Any, tiny: Tiny, seeds: tuple[int, ...] = (5, 6), steps: int = 2) -> Tensor:
    """The host's sampler with CFG, as its nodes call it: in inference mode."""
    import comfy.sample

    noise = noises(tiny, seeds)
    with torch.inference_mode():
        texts = conditioning(tiny, 3), conditioning(tiny, 4)
        settings = (steps, 3.0, "euler", "simple", *texts, torch.zeros_like(noise))
        return comfy.sample.sample(model, noise, *settings, disable_pbar=True, seed=5)


def lora(model: Any, layers: set[str], rank: int = 2) -> dict[str, Tensor]:
    """A LoRA file's tensors for these layers of a MODEL."""
    stream, tensors = torch.Generator().manual_seed(5), {}
    for name in sorted(layers):
        rows, columns = model.model.diffusion_model.get_submodule(name).weight.shape
        tensors[f"diffusion_model.{name}.lora_A.weight"] = 0.2 * torch.randn(rank, columns, generator=stream)
        tensors[f"diffusion_model.{name}.lora_B.weight"] = 0.2 * torch.randn(rows, rank, generator=stream)
    return tensors
