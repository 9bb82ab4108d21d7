"""The frozen base model as the trainer uses it: loaded by the host, its loss, its sampler."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskunet_core.toy import vocabulary
from maskunet_core.toy.model import load_toy_model

from .seeds import seeded


@dataclass
class BaseModel:
    """patcher, clip, vae: as the host's loaders give them."""

    patcher: Any
    clip: Any
    vae: Any

    @property
    def model(self) -> nn.Module:
        return self.patcher.model

    @property
    def unet(self) -> nn.Module:
        return self.patcher.model.diffusion_model

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> Tensor:
        """Cross-attention context `[B, 16, 128]` of token ids `[B, 16]`."""
        return self.clip.cond_stage_model.clip_l.transformer(tokens)[0]

    def encode_texts(self, texts: list[str]) -> Tensor:
        return self.encode(torch.tensor([vocabulary.encode_padded(text) for text in texts]))

    def diffusion_loss(self, clean: Tensor, context: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Eq. 2, per sample `[B]`: the mean squared error of the predicted noise. timesteps: [B] integers."""
        sampling = self.model.model_sampling
        sigma = sampling.sigma(timesteps.float())
        spread = sigma.view(-1, 1, 1, 1)
        noisy = clean + spread * noise
        denoised = self.model.apply_model(noisy, sigma, c_crossattn=context, transformer_options={"sigmas": sigma})
        return ((noisy - denoised) / spread - noise).square().mean(dim=(1, 2, 3))


def load_base(weights: str = "") -> BaseModel:
    """The toy model, from its shipped weights or a folder; frozen."""
    patcher, clip, vae = load_toy_model(Path(weights) if weights else None)
    for module in (patcher.model, clip.cond_stage_model, vae.first_stage_model):
        module.requires_grad_(False)
    return BaseModel(patcher, clip, vae)


@torch.no_grad()
def sample_pictures(
    base: BaseModel, patcher, texts: list[str], seed: int, steps: int, cfg: float, batch: int = 60, progress=None
) -> Tensor:
    """Pictures `[N, 3, 64, 64]` in [0, 1] of the prompts, by the host's DDIM sampler; noise n depends on seed and n."""
    import comfy.sample

    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=seeded(10, seed, n)) for n in range(len(texts))])
    empty = base.encode_texts([""])
    pictures = []
    for start in range(0, len(texts), batch):
        part = noise[start : start + batch]
        context = base.encode_texts(texts[start : start + batch])
        latents = comfy.sample.sample(
            patcher,
            part,
            steps,
            cfg,
            "ddim",
            "normal",
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
