"""The frozen base model as training uses it: its conditioning, its loss, its place in memory."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import MaskUNetError
from ..models.families import family_of
from ..models.families.family import Family
from ..models.families.unet import UNET
from ..seam.attention import with_differentiable_attention
from ..seam.blocks import recomputed_blocks
from ..seam.gradients import LeanGraph
from ..seam.saved import writable
from ..seam.shadow import Shadowed

FLOW_SAMPLER = ("euler", "simple")
"""The host's sampler and scheduler for models that have learned a flow."""
SHORT = 75
"""Letters of a prompt that fits into CLIP's first chunk whatever they are."""


Learned = Callable[[str], Sequence[Tensor]]
"""Gives what a block's layers learn, or what that comes from, by the block's name; asked once the block is entered."""


class UnfitEmbedding(MaskUNetError):
    """A prompt names an embedding whose vectors have another width than the base's text encoder."""


class OutOfMemory(MaskUNetError):
    """Something does not fit into the device's memory; the message says what, and what to do."""


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed: CUDA, ROCm and XPU have a class for it, MPS and the CPU a sentence."""
    import comfy.model_management

    told = "out of memory" in str(error) or "allocate memory" in str(error)
    return told or comfy.model_management.is_oom(error)


@contextlib.contextmanager
def fitting(what: str, device: torch.device, advice: str) -> Iterator[None]:
    """Raises OutOfMemory, in one sentence, where an allocation inside the block fails."""
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{what} does not fit into the memory of {device}: {advice}.") from None


@dataclass
class BaseModel:
    """patcher, clip, vae: as the host's loaders give them. name: the checkpoint's, for messages and records.

    encodes_in_steps: whether training steps need the text encoder beside the U-Net.
    """

    patcher: Any
    clip: Any
    vae: Any
    name: str = "toy"
    encodes_in_steps: bool = False

    @property
    def model(self) -> nn.Module:
        return self.patcher.model

    @property
    def unet(self) -> nn.Module:
        return self.patcher.model.diffusion_model

    @property
    def family(self) -> Family | None:
        """The kind of the U-Net, or of the transformer in its place."""
        return family_of(self.unet)

    @property
    def is_flow(self) -> bool:
        """Whether it has learned a flow from noise to pictures (flow matching), and no timesteps of a diffusion."""
        import comfy.model_sampling

        return not isinstance(self.model.model_sampling, comfy.model_sampling.ModelSamplingDiscrete)

    @property
    def sampler(self) -> tuple[str, str]:
        """The host's sampler and scheduler that pictures are drawn by."""
        return FLOW_SAMPLER if self.is_flow else ("ddim", "normal")

    @property
    def timesteps(self) -> int:
        return len(self.model.model_sampling.sigmas)

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Of a picture of so many pixels: [C, h, w], or [C, 1, h, w] where the model also draws films."""
        latents = self.model.latent_format
        cell = latents.spacial_downscale_ratio
        return (latents.latent_channels, *[1] * (latents.latent_dimensions - 2), height // cell, width // cell)

    def further_input(self) -> str:
        """In words that it takes another picture beside the noisy one; nothing where it does not."""
        if self.family is UNET:
            takes, has = self.model.model_config.unet_config["in_channels"], self.model.latent_format.latent_channels
            why = "as for inpainting or editing: it needs a second picture"
            return f"The U-Net of {self.name} takes {takes} channels instead of {has}, {why}" if takes != has else ""
        noise = torch.zeros(1, *self.latent_shape(64, 64))
        none = self.model.concat_cond(noise=noise, device=noise.device) is None
        return "" if none else f"{self.name} takes a second picture, as for inpainting or editing"

    @property
    def predicts_v(self) -> bool:
        import comfy.model_base

        return self.model.model_type is comfy.model_base.ModelType.V_PREDICTION

    @torch.no_grad()
    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Cross-attention context `[B, 16, 128]`, on the CPU, of the toy's token ids `[B, 16]`."""
        encoder = self.clip.cond_stage_model.clip_l.transformer
        # The host moves it to a device for a sample grid, and back when it needs the room.
        return encoder(tokens.to(next(encoder.parameters()).device))[0].cpu()

    @torch.no_grad()
    def encode_text(self, text: str) -> dict[str, Tensor]:
        """What the model takes of one prompt: `cross_attn` [T, C] and, for SDXL, `pooled_output` [P]; for a transformer
        whatever its text encoders give (masks, ids), without the batch's dimension.

        A prompt is cut after the encoder's first chunk (75 tokens for CLIP; others take any length).
        """
        tokens = {key: chunks[:1] for key, chunks in self.tokens(text).items()}
        found = self.clip.encode_from_tokens(tokens, return_dict=True)
        found = {"cross_attn": found.pop("cond")} | found
        # SD 1.5's files hold no projection for it: what comes out there is whatever the memory held.
        if self.family is UNET and not self.model.adm_channels:
            del found["pooled_output"]
        return {key: _plain(value[0]) for key, value in found.items() if isinstance(value, Tensor)}

    def tokens(self, text: str) -> dict[str, list[list[tuple[Any, float]]]]:
        """A prompt as the host cuts it: for each text encoder chunks of (id or vector of an embedding, weight).

        The host leaves out what does not fit with a line in its log: raises UnfitEmbedding.
        """
        found = self.clip.tokenize(text)
        for letter, chunks in found.items():
            width = getattr(getattr(self.clip.tokenizer, f"clip_{letter}", None), "embedding_size", None)
            for token in (token for chunk in chunks for token, _ in chunk if torch.is_tensor(token)):
                if width and token.shape[-1] != width:
                    raise UnfitEmbedding(
                        f"An embedding in '{text.strip()}' has vectors of {token.shape[-1]} numbers where the text "
                        f"encoder of {self.name} takes {width}: it was made for another model. Name one for this model."
                    )
        return found

    def cuts(self, text: str) -> bool:
        """Whether `encode_text` leaves out the end of a prompt."""
        # No token is shorter than a letter.
        return len(text) > SHORT and any(len(chunks) > 1 for chunks in self.clip.tokenize(text).values())

    @torch.no_grad()
    def encode_picture(self, picture: Tensor) -> Tensor:
        """Latent as in `latent_shape`, scaled as the model takes it, of a picture `[3, H, W]` in [0, 1]."""
        # Autoencoders that draw from their posterior do so the same way every time.
        torch.manual_seed(0)
        latent = self.vae.encode(picture.movedim(0, -1)[None])
        return self.model.process_latent_in(latent)[0].float().cpu()

    def sigmas(self, clean: Tensor, timesteps: Tensor) -> Tensor:
        """`[B]`: the noise at integer timesteps `[B]`, in the dtype and on the device of `clean`."""
        sampling = self.model.model_sampling
        if self.is_flow:
            # Here the host counts timesteps in units that differ between models.
            return sampling.sigmas[timesteps.to(sampling.sigmas.device)].to(clean)
        return sampling.sigma(timesteps.float()).to(clean)

    def timesteps_at(self, sigmas: Tensor) -> Tensor:
        """The inverse of `sigmas`: integer timesteps `[N]`, on the CPU, whose noise is nearest to `[N]`."""
        sampling = self.model.model_sampling
        if self.is_flow:
            known = sampling.sigmas.cpu()
            return (sigmas.cpu()[:, None] - known).abs().argmin(1)
        return sampling.timestep(sigmas).long().cpu()

    def noised(self, clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """Latents `[B, ...]` with the noise of levels sigma `[B]`, as the host's samplers would have them."""
        return self.model.model_sampling.noise_scaling(sigma, noise, clean)

    def error_unit(self, sigma: Tensor, latents: Tensor) -> Tensor:
        """`[B, 1, ...]`: by what an error of the denoised latents is divided to be one of what the model predicts:
        noise, v, or the velocity of a flow. sigma: `[B]`; latents: `[B, ...]`, for their dimensions."""
        nothing = latents.new_zeros(len(latents), *[1] * (latents.ndim - 1))
        # The estimate is linear in the prediction.
        return self.model.model_sampling.calculate_denoised(sigma, nothing + 1, nothing)

    def denoised(self, noisy: Tensor, sigma: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """The model's estimate of the clean latents `[B, C, ..., h, w]`, differentiable where gradients are on (through
        a transformer inside of `differentiable`).

        noisy: [B, C, ..., h, w]. sigma: [B]. conditions: stacked results of `encode_text`.
        """
        cell = self.model.latent_format.spacial_downscale_ratio
        height, width = (cell * side for side in noisy.shape[-2:])
        extra = self.model.extra_conds(**conditions, noise=noisy, device=noisy.device, width=width, height=height)
        of_batch = {"batch_size": len(noisy), "device": noisy.device, "area": None}
        inputs = {key: value.process_cond(**of_batch).cond for key, value in extra.items()}
        options = {"sigmas": sigma}
        if not torch.is_grad_enabled():
            return self.model.apply_model(noisy, sigma, transformer_options=options, **inputs)
        options = with_differentiable_attention(options)
        with self._graph():
            return self.model.apply_model(noisy, sigma, transformer_options=options, **inputs)

    def _graph(self) -> contextlib.AbstractContextManager:
        """Around a call with gradients."""
        return contextlib.nullcontext() if self.family is UNET else LeanGraph()

    def differentiable(self) -> contextlib.AbstractContextManager:
        """Around forward and backward pass: transformers write into what autograd keeps."""
        if self.family is UNET:
            return contextlib.nullcontext()
        return writable()

    def recomputed(self, learned: Learned) -> contextlib.AbstractContextManager:
        """The masked blocks keep their inputs alone for the backward pass, and compute anew in it."""
        return checkpointed(self.unet.output_blocks) if self.family is UNET else recomputed(self, learned)

    def kept(self) -> contextlib.AbstractContextManager:
        """The masked blocks keep what they compute for the backward pass."""
        return contextlib.nullcontext()

    def load(self) -> torch.device:
        """Puts it where it is trained; returns the device. Raises OutOfMemory."""
        return load_for_training(self)

    def diffusion_loss(
        self, clean: Tensor, conditions: dict[str, Tensor], timesteps: Tensor, noise: Tensor, min_snr: float = 0.0
    ) -> Tensor:
        """Eq. 2, per sample `[B]`: the mean squared error of what the model predicts, noise, v, or a flow's velocity.

        clean, noise: [B, C, ..., h, w]. conditions: stacked results of `encode_text`. timesteps: [B] integers. min_snr:
        gamma of min-SNR weighting (Hang et al., arXiv 2303.09556), 0 for none.
        """
        sigma = self.sigmas(clean, timesteps)
        denoised = self.denoised(self.noised(clean, sigma, noise), sigma, conditions)
        unit = self.error_unit(sigma, clean)
        error = ((denoised - clean) / unit).square().flatten(1).mean(1)
        if min_snr:
            snr = self._snr(sigma)
            error = error * snr.clamp(max=min_snr) / (snr + 1 if self.predicts_v else unit.flatten() ** -2)
        return error

    def _snr(self, sigma: Tensor) -> Tensor:
        """`[B]`: the share of the clean latents in the noisy ones over that of the noise, squared."""
        nothing = torch.zeros_like(sigma)
        clean, noise = self.noised(nothing + 1, sigma, nothing), self.noised(nothing, sigma, nothing + 1)
        return (noise / clean) ** -2


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, and in fp32 unless it holds integers."""
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu()


def checkpointed(*parts: nn.Module) -> Shadowed:
    """The blocks of parts of a U-Net keep their inputs alone for the backward pass, and compute anew in it."""

    def forward_of(module: nn.Module):
        compute = module.forward
        return lambda *args, **kwargs: checkpoint(compute, *args, use_reentrant=False, **kwargs)

    modules = (module for part in parts for module in part.modules())
    blocks = [m for m in modules if type(m).__name__ in ("ResBlock", "BasicTransformerBlock")]
    return Shadowed((module, {"forward": forward_of(module)}) for module in blocks)


def recomputed(base: BaseModel, learned: Learned) -> Shadowed:
    """As `checkpointed`, for the blocks of a transformer."""
    model, family = base.unet, base.family
    blocks = ((model.get_submodule(name), partial(learned, name)) for name in family.blocks(model))
    return recomputed_blocks(blocks, family.channels(model))


def load_for_training(base: BaseModel) -> torch.device:
    """Put the whole U-Net on its device, LoRAs merged, and everything else off it, but for a text encoder that training
    steps need. Returns the device.

    Partial loads would hand layers buffers that are used again, and gradients would be wrong without a word: raises
    OutOfMemory where the host cannot load it as a whole.
    """
    import comfy.model_management as management

    device = base.patcher.load_device
    needed = [base.patcher, base.clip.patcher] if base.encodes_in_steps else [base.patcher]
    what = f"The U-Net {'with the text encoder ' if base.encodes_in_steps else ''}of {base.name}"
    advice = "close other programs that use it, train in loop.precision bf16, or take a smaller base"
    with fitting(what, device, advice):
        management.load_models_gpu(needed, force_full_load=True)
        # The others have done their work: the step needs the room.
        management.free_memory(1e30, device, keep_loaded=[management.LoadedModel(one) for one in needed])
    lent = any(hasattr(module, "prev_comfy_cast_weights") for module in base.unet.modules())
    # The host casts all weights of text encoders, wherever they are.
    elsewhere = any(p.device.type != one.load_device.type for one in needed[1:] for p in one.model.parameters())
    if lent or elsewhere:
        raise OutOfMemory(f"{what} is on {device} only in part, and training needs it whole: {advice}.")
    return device
