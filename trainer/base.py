"""The frozen base model of a configuration: loaded by the host, and its sampler."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from maskunet_core.toy import vocabulary
from maskunet_core.toy.model import load_toy_model
from maskunet_core.training.base import BaseModel
from maskunet_core.training.seeds import seeded

from .base_files import BadBase, load_checkpoint, load_parts, lora_files, with_lora
from .config import Base


def load_toy_base(weights: str = "", body: str = "unet") -> BaseModel:
    """The toy model, from its shipped weights or a folder; its U-Net (or transformer) in fp32, frozen."""
    from comfy.cli_args import args

    # The host would take half precision on a GPU, in which gradients of so small a model vanish.
    before, args.fp32_unet = args.fp32_unet, True
    try:
        patcher, clip, vae = load_toy_model(Path(weights) if weights else None, body)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        if not weights:
            raise
        reason = str(error).splitlines()[0]
        raise BadBase(
            f"The folder '{weights}' does not hold whole weights of the toy model ({reason}). Name one that `python -m "
            "trainer toy` has filled."
        ) from None
    finally:
        args.fp32_unet = before
    return _frozen(BaseModel(patcher, clip, vae))


def load_base(settings: Base, dtype: torch.dtype = torch.float32) -> BaseModel:
    """The base of a configuration through the host's loaders, its U-Net in `dtype` (the toy's in fp32), frozen.

    Raises BadBase where the host does not know the files, or where a part is lacking.
    """
    if settings.is_toy:
        return load_toy_base(settings.weights, settings.body)
    patcher, clip, vae = load_parts(settings, dtype) if settings.parts else load_checkpoint(settings, dtype)
    for file, strength in lora_files(settings).items():
        patcher, clip = with_lora(patcher, clip, file, strength)
    return _frozen(BaseModel(patcher, clip, vae, Path(settings.named).name))


def require_trainable(base: BaseModel) -> None:
    """Raises BadBase where it is of no kind that can be masked, or takes more than a noisy picture, a timestep and a
    prompt."""
    if base.family is None:
        raise BadBase(
            f"{base.name} is of a kind that has no masks ({type(base.unet).__name__}). Name a checkpoint of SD 1.5, "
            "SD 2.x, SDXL, or of a transformer that MaskUNet Inspect knows."
        )
    if further := base.further_input():
        raise BadBase(f"{further}, which the data does not hold. Name the plain checkpoint in base.checkpoint.")


def _frozen(base: BaseModel) -> BaseModel:
    # `import comfy` alone gives plain patchers on every machine; ComfyUI's main.py is what turns to dynamic ones, whose
    # layers borrow their weights for one product.
    if base.patcher.is_dynamic():
        base.patcher = base.patcher.clone(disable_dynamic=True)
    for module in (base.patcher.model, base.clip.cond_stage_model, base.vae.first_stage_model):
        module.requires_grad_(False)
    return base


@torch.no_grad()
def sample_pictures(
    base: BaseModel,
    patcher,
    texts: list[str],
    seed: int,
    steps: int,
    cfg: float,
    batch: int = 60,
    progress=None,
    encode: Callable[[list[str]], Tensor] | None = None,
) -> Tensor:
    """Pictures `[N, 3, 64, 64]` in [0, 1] of toy prompts, by the base's sampler; noise n depends on seed and n.

    encode: from prompts to their context [B, 16, 128], instead of the base's own.
    """
    import comfy.sample

    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=seeded(10, seed, n)) for n in range(len(texts))])

    def encode_words(texts: list[str]) -> Tensor:
        return base.encode_tokens(torch.tensor([vocabulary.encode_padded(text) for text in texts]))

    encode = encode or encode_words
    empty = encode_words([""])
    pictures = []
    for start in range(0, len(texts), batch):
        part = noise[start : start + batch]
        context = encode(texts[start : start + batch])
        latents = comfy.sample.sample(
            patcher,
            part,
            steps,
            cfg,
            *base.sampler,
            [[context, {}]],
            [[empty, {}]],
            torch.zeros_like(part),
            disable_pbar=True,
            seed=seed,
        )
        pictures.append(base.vae.decode(latents).movedim(-1, 1)[:, :3])
        if progress is not None:
            progress(len(part))
    return torch.cat(pictures)
