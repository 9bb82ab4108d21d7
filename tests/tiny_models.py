"""Small models of the host's own classes with random weights: VAEs, a ControlNet, LoRAs, and a U-Net in 8 bits."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.builders import sd15_unet, tiny_sd15_layout

CONTEXT = 768
"""Width of the text that `write_unet` is conditioned on."""


def drawn(shapes: dict[str, torch.Size], seed: int, gain: float = 1.0) -> dict[str, Tensor]:
    """Weights of a network that neither fades nor explodes."""
    stream = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            weights[name] = torch.randn(shape, generator=stream) * gain / shape[1:].numel() ** 0.5
        else:
            weights[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    return weights


def shapes_of(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


LAYOUT = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32}
LAYOUT |= {"ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}


def kl_vae() -> Any:
    """The host's VAE around its AutoencoderKL, 8 pixels per cell, whose weights may be streamed in."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    params = {"ddconfig": LAYOUT, "embed_dim": 4}
    weights = drawn(_kl_shapes(AutoencoderKL, params), seed=1)
    return comfy.sd.VAE(sd=weights, config={"params": params})


def _kl_shapes(network: Any, params: dict) -> dict[str, torch.Size]:
    return shapes_of(_at_full_size(lambda: network(**params)))


def _at_full_size(make: Any) -> torch.nn.Module:
    """Made while dynamic VRAM is off: with it the host's layers have no shapes before they are loaded."""
    import comfy.memory_management

    before, comfy.memory_management.aimdo_enabled = comfy.memory_management.aimdo_enabled, False
    try:
        return make()
    finally:
        comfy.memory_management.aimdo_enabled = before


def taesd_vae() -> Any:
    """The host's VAE around TAESD."""
    import comfy.sd
    from comfy.taesd.taesd import TAESD

    weights = drawn(shapes_of(_at_full_size(TAESD)), seed=2)
    weights |= {"vae_scale": torch.tensor(0.18215), "vae_shift": torch.tensor(0.0)}
    return comfy.sd.VAE(sd=weights)


def controlnet(model: Any, load_device: torch.device) -> Any:
    """A ControlNet of a MODEL's shape, with a hint of 64 x 64 pixels."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    unet = model.model.model_config.unet_config
    unwanted = ("out_channels", "disable_unet_model_creation", "dtype")
    config = {key: value for key, value in unet.items() if key not in unwanted}
    options = {"hint_channels": 3, "operations": comfy.ops.manual_cast, "dtype": torch.float32}
    network = _at_full_size(lambda: comfy.cldm.cldm.ControlNet(**config, **options))
    network.load_state_dict(drawn(shapes_of(network), seed=3))
    control = comfy.controlnet.ControlNet(network, load_device=load_device)
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    return control.set_cond_hint(hint, 1.0)


def lora(model: Any, rank: int = 4) -> dict[str, Tensor]:
    """A LoRA file's tensors for the attention of a MODEL's decoder."""
    stream, tensors = torch.Generator().manual_seed(5), {}
    for name, weight in model.model.diffusion_model.state_dict().items():
        if name.startswith("output_blocks") and ".attn" in name and name.endswith("weight"):
            base = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            tensors[base + ".lora_down.weight"] = 0.1 * torch.randn(rank, weight.shape[1], generator=stream)
            tensors[base + ".lora_up.weight"] = 0.1 * torch.randn(weight.shape[0], rank, generator=stream)
    return tensors


QUANTISED = {
    "fp8": ("float8_e4m3fn", "TensorCoreFP8E4M3Layout", {"scale": "recalculate"}),
    "int8": ("int8_tensorwise", "TensorWiseINT8Layout", {}),
}


def write_unet(path: Path, kind: str = "fp16") -> Path:
    """A U-Net of SD 1.5's kind for the stock loader; its attention is quantised where `kind` is one of QUANTISED."""
    from comfy.quant_ops import QuantizedTensor

    tensors = {}
    for name, value in drawn(shapes_of(sd15_unet(**tiny_sd15_layout())), seed=6, gain=0.7).items():
        if kind in QUANTISED and value.ndim == 2 and ".attn" in name:
            file_format, layout, options = QUANTISED[kind]
            quantised = QuantizedTensor.from_float(value.to(torch.bfloat16), layout, **options)
            tensors |= quantised.state_dict(name)
            tensors[name.removesuffix("weight") + "comfy_quant"] = torch.tensor(
                list(json.dumps({"format": file_format}).encode()), dtype=torch.uint8
            )
        else:
            tensors[name] = value.to(torch.float16)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)
    return path


def gligen(model: Any) -> Any:
    """A GLIGEN model of a MODEL's shape with random weights, as the host's loader hands it over."""
    import comfy.gligen
    import comfy.model_patcher

    config, weights = model.model.model_config.unet_config, {}
    channels, text = config["model_channels"], config["context_dim"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for part, count in (("input_blocks", 2), ("middle_block", 1), ("output_blocks", 4)):
            for block in range(count):
                fuser = comfy.gligen.GatedSelfAttentionDense(channels, text, channels // 64, 64)
                fuser.alpha_attn.data.fill_(0.5)
                weights |= {f"{part}.{block}.fuser.{name}": value for name, value in fuser.state_dict().items()}
        position = comfy.gligen.PositionNet(text, text)
        weights |= {f"position_net.{name}": value for name, value in position.state_dict().items()}
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(comfy.gligen.load_gligen(weights), load_device=cpu, offload_device=cpu)
