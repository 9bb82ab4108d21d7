"""Model files with random weights, which the host's own loaders read: SD 1.5's shapes in full size, or tiny ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from maskunet_core.files import checkpoint
from maskunet_core.models.structure import Structure, inspect_model
from tests.builders import make_generator, sd15_unet, tiny_sd15_layout, write_tiny_checkpoint
from tests.reward_files import clip_model

TARGETS = "decoder attention"
CHECKPOINT, CONTROLNET = "random.safetensors", "control.safetensors"
REWARD, LORA = "reward.safetensors", "lora.safetensors"
LIVELY, UNTRAINED = "lively.safetensors", "untrained.safetensors"
_POOL = 1 << 26
"""Numbers that all weights of a file are cut from, more than the largest has (an embedding of 49,408 tokens): drawing
each anew would take longer than the tests."""


@dataclass(frozen=True)
class Size:
    """full: SD 1.5's shapes. pixels: side of pictures; small: of those that are searched; steps: of a run."""

    full: bool
    pixels: int
    small: int
    steps: int

    @property
    def layout(self) -> dict:
        """As changes to SD 1.5's."""
        return {} if self.full else tiny_sd15_layout()


FULL, TINY = Size(True, 512, 256, 4), Size(False, 32, 32, 2)


def _cut(shapes: nn.Module, dtype: torch.dtype, std: float, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Weights by name for a module of the meta device: small random ones, and norms that pass what they get."""
    pool = std * torch.randn(_POOL, generator=torch.Generator().manual_seed(seed))
    offsets = torch.Generator().manual_seed(seed + 1)
    for name, value in shapes.state_dict().items():
        if value.ndim < 2:
            yield name, torch.full(value.shape, float(name.endswith("weight")), dtype=dtype)
            continue
        start = int(torch.randint(_POOL - value.numel(), (1,), generator=offsets))
        yield name, pool[start : start + value.numel()].view(value.shape).to(dtype)


def _full_checkpoint(path: Path) -> None:
    import comfy.ops
    from comfy.clip_model import CLIPTextModel
    from comfy.ldm.models.autoencoder import AutoencoderKL

    clip = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    clip |= {"hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407}
    vae = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    vae |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    with torch.device("meta"):
        autoencoder = AutoencoderKL(ddconfig=vae, embed_dim=4)
    parts = {
        "model.diffusion_model.": (sd15_unet(), 0.02),
        "cond_stage_model.transformer.": (CLIPTextModel(clip, None, "meta", comfy.ops.manual_cast), 0.02),
        "first_stage_model.": (autoencoder, 0.03),
    }
    tensors = {}
    for seed, (prefix, (module, std)) in enumerate(parts.items()):
        tensors |= {prefix + name: value for name, value in _cut(module, torch.float16, std, seed)}
    save_file(tensors, path)


def _controlnet(path: Path, size: Size) -> None:
    """In the layout of the published files of SD 1.5, which the stock ControlNetLoader reads."""
    import comfy.cldm.cldm
    import comfy.ops

    from tests.builders import SD15

    config = {key: value for key, value in (SD15 | size.layout).items() if key not in ("out_channels", "legacy")}
    config.pop("transformer_depth_output")
    network = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, device="meta", operations=comfy.ops.manual_cast, dtype=torch.float16
    )
    std = 0.02 if size.full else 0.05
    save_file({f"control_model.{name}": value for name, value in _cut(network, torch.float16, std, 5)}, path)


def _lora(path: Path, structure: Structure, rank: int = 4) -> None:
    """On every masked layer, in the kohya layout."""
    stream, tensors = torch.Generator().manual_seed(6), {}
    for name, layer in structure.layers.items():
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_up.weight"] = torch.randn(layer.out_features, rank, generator=stream) * 0.05
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, layer.in_features, generator=stream) * 0.05
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)


def _reward(path: Path, full: bool) -> None:
    """A CLIP model in PickScore's layout; the full one has the published size, ViT-H/14 in fp16."""
    if not full:
        model = clip_model()
        tensors = model.state_dict()
        # Of a shape that nobody has published the loader wants to be told.
        path.with_suffix(".json").write_text(model.config.to_json_string(), encoding="utf-8")
    else:
        from transformers import CLIPConfig, CLIPModel

        text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        image = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
        shared = {"hidden_act": "gelu", "projection_dim": 1024}
        vision = image | shared | {"image_size": 224, "patch_size": 14}
        with torch.device("meta"):
            model = CLIPModel(CLIPConfig(text_config=text | shared, vision_config=vision, projection_dim=1024))
        tensors = dict(_cut(model, torch.float16, 0.02, 8))
        tensors = {name: value for name, value in tensors.items() if "position_ids" not in name}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def structure_of(size: Size) -> Structure:
    return inspect_model(sd15_unet(**size.layout), TARGETS, "SD 1.5")


def write_models(folder: Path, size: Size) -> None:
    """All files of a size, unless they are there: every step that needs them asks for them."""
    finished = folder / "finished"
    if finished.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    _full_checkpoint(folder / CHECKPOINT) if size.full else write_tiny_checkpoint(folder / CHECKPOINT)
    structure = structure_of(size)
    checkpoint.save(folder / LIVELY, make_generator(structure, lively=True), TARGETS, {})
    checkpoint.save(folder / UNTRAINED, make_generator(structure), TARGETS, {})
    _controlnet(folder / CONTROLNET, size)
    _lora(folder / LORA, structure)
    _reward(folder / REWARD, size.full)
    finished.touch()
