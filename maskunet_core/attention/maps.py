"""Attention maps: how much each place of a picture looks at each text token, read from the projections of the model.

They are computed beside the model's own attention, so it does not matter what computes that, and masks, LoRAs and
patches that act on the projections are seen.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MaskUNetError
from ..models.families import family_of
from ..models.families.unet import UNET, execution_order
from ..models.structure import family_name
from ..records.recorded import RecordedSource
from ..seam.attach import OPTION, with_options
from ..seam.attention import with_differentiable_attention
from ..seam.gradients import kept_weights, on_a_copy
from ..seam.run import RUN

KEY = "maskunet_attention"
"""Of the wrappers of attention maps and of attention guidance."""
_QUARTER = 2
"""Halvings of the latent's sides at which the published methods read attention."""


class NoAttentionMaps(MaskUNetError):
    """A model or a conditioning whose attention to the text cannot be read as one map for each token."""


class _LastMapRead(Exception):
    """Leaves the network once nothing that it still computes is asked for."""


@dataclass(frozen=True)
class MapLayers:
    """Cross-attentions that look at one size of picture.

    names: of the modules, in the order of execution. halvings: of the latent's sides before them. blocks: how many
    blocks of the network run until the last of them has run.
    """

    names: tuple[str, ...]
    halvings: int
    blocks: int

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Of a map, from those of the latent; an odd side is rounded up each time that it is halved."""
        for _ in range(self.halvings):
            height, width = -(-height // 2), -(-width // 2)
        return height, width


def map_layers(model: Any) -> MapLayers:
    """The layers to read in the host's BaseModel: at a quarter of the latent's sides as published, or the finest where
    the network has none there. Raises NoAttentionMaps."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample

    unet, halvings = model.diffusion_model, 0
    found: dict[int, list[tuple[int, str]]] = {}
    for number, (block_name, block) in enumerate(execution_order(unet) if family_of(unet) is UNET else ()):
        halvings += any(isinstance(layer, Downsample) for layer in block)
        for name, module in block.named_modules():
            if name.endswith(".attn2") and ".time_stack." not in name and hasattr(module, "to_k"):
                found.setdefault(halvings, []).append((number, f"{block_name}.{name}"))
        # The attention of a block comes before its upsampling.
        halvings -= any(isinstance(layer, Upsample) for layer in block)
    if not found:
        raise NoAttentionMaps(
            f"Attention to the words can be read in U-Nets (SD 1.5, SD 2.x, SDXL), and the connected model is "
            f"{family_name(model)}. Connect such a model, or remove the node."
        )
    level = _QUARTER if _QUARTER in found else min(found)
    return MapLayers(tuple(name for _, name in found[level]), level, found[level][-1][0] + 1)


class MapReader:
    """Reads the maps of the positive branch in calls of the host's BaseModel.

    lent: whether weights may be others by the time of a backward pass, so that layers compute with copies.
    """

    def __init__(self, model: Any, lent: bool):
        self.layers = map_layers(model)
        unet = model.diffusion_model
        self._model, self._lent = model, lent
        self._modules = [unet.get_submodule(name) for name in self.layers.names]
        self._blocks = [block for _, block in execution_order(unet)[: self.layers.blocks]]
        self._encoder = self._blocks[: len(unet.input_blocks) + 1]

    def read(self, positive: list[dict], x: Tensor, sigma: Tensor, model_options: dict[str, Any]) -> Tensor | None:
        """Maps `[N, h, w, T]` float32 of the latent `[N, C, ...]` that the model is asked about, averaged over heads
        and layers; differentiable. None where the conditioning does not act at this noise level.

        positive: the run's conditioning of the positive branch, model_options: of a call of the sampler. The network is
        left after the last layer that is read. Raises NoAttentionMaps.
        """
        from comfy.patcher_extension import WrappersMP
        from comfy.samplers import calc_cond_batch

        if len(positive) != 1 or {"area", "mask"} & positive[0].keys():
            raise NoAttentionMaps(
                "Attention is read for one prompt that acts on the whole picture, but the positive conditioning has "
                "several parts, an area or a mask. Use one prompt, as MaskUNet Prompt Words gives it."
            )
        read = _Reading(self._modules)

        @torch.compiler.disable
        def call(executor, *args: Any, **kwargs: Any) -> Tensor:
            """DIFFUSION_MODEL wrapper, the innermost: nothing that surrounds the network sees it left early."""
            with contextlib.ExitStack() as stack:
                if self._lent:
                    stack.enter_context(kept_weights(self._blocks))
                # The host adds ControlNet's residuals in place.
                stack.enter_context(on_a_copy(self._encoder))
                stack.enter_context(read.hooks())
                with contextlib.suppress(_LastMapRead):
                    executor(*args, **kwargs)
            return torch.zeros_like(args[0])

        options = model_options.get("transformer_options", {})
        wrappers = options.get("wrappers", {})
        around = wrappers.get(WrappersMP.DIFFUSION_MODEL, {})
        more = {"wrappers": wrappers | {WrappersMP.DIFFUSION_MODEL: around | {KEY: [call]}}}
        if OPTION in options:
            more[OPTION] = tuple(each for each in options[OPTION] if not _is_found_by_search(each.source))
        if RUN in options:
            # What is computed here does not count among the sampler's own calls.
            more[RUN] = options[RUN].fork()
        calc_cond_batch(
            self._model, [positive], x, sigma, with_options(model_options, with_differentiable_attention(more))
        )
        return read.maps(self.layers, len(x), *x.shape[-2:])


def _is_found_by_search(source: Any) -> bool:
    """Masks that a search found after the latent had been moved: a replay moves it without them, too."""
    return isinstance(source, RecordedSource) and "reward" in source.masks.record


def attention_of(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """`[N, places, T]`, float32 at least, the mean over heads. q: `[N, places, heads * channels]`, k: `[N, T, ...]`."""
    precise = torch.promote_types(q.dtype, torch.float32)
    q, k = (tensor.to(precise).unflatten(2, (heads, -1)).transpose(1, 2) for tensor in (q, k))
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)


class _Reading:
    """Queries and keys of one call, turned into maps as they come."""

    def __init__(self, modules: list[nn.Module]):
        self._modules = modules
        self._queries: dict[nn.Module, Tensor] = {}
        self._sum: Tensor | None = None
        self._read = 0

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module in self._modules:

                def queries(_: nn.Module, __: Any, q: Tensor, module: nn.Module = module) -> None:
                    self._queries[module] = q

                def keys(_: nn.Module, __: Any, k: Tensor, module: nn.Module = module) -> None:
                    self._add(self._queries.pop(module), k, module.heads)

                stack.callback(module.to_q.register_forward_hook(queries).remove)
                stack.callback(module.to_k.register_forward_hook(keys).remove)
            yield

    def _add(self, q: Tensor, k: Tensor, heads: int) -> None:
        shares = attention_of(q, k, heads)
        if self._sum is not None and self._sum.shape != shares.shape:
            raise NoAttentionMaps(
                "Another node changes the size of the model's features between its layers, so their attention cannot "
                "be averaged. Remove that node (PatchModelAddDownscale)."
            )
        self._sum = shares if self._sum is None else self._sum + shares
        self._read += 1
        if self._read == len(self._modules):
            raise _LastMapRead

    def maps(self, layers: MapLayers, images: int, height: int, width: int) -> Tensor | None:
        if self._sum is None:
            return None
        rows, places, _ = self._sum.shape
        sides = layers.sides(height, width)
        if rows != images or places != sides[0] * sides[1]:
            raise NoAttentionMaps(
                f"The model was asked about {rows} pictures of {places} places where {images} of {sides[0]} x "
                f"{sides[1]} were expected. Remove the node that cuts or scales its input."
            )
        return (self._sum / self._read).unflatten(1, sides)


def maps_of(model: Any, positive: Any, latents: Tensor, percent: float, noise: Tensor) -> Tensor | None:
    """Maps `[N, h, w, T]` of finished latents `[N, C, H, W]` to which noise like that of a sampling run is added.

    model: the MODEL. positive: the host's CONDITIONING. percent: where in sampling, 0 for pure noise. None where the
    conditioning does not act there. Raises NoAttentionMaps.
    """
    from comfy.samplers import KSAMPLER, CFGGuider

    found: list[Tensor | None] = []

    def look(asked: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any], **_: Any) -> Tensor:
        guider = asked.inner_model
        reader = MapReader(guider.inner_model, lent=False)
        sigma = sigmas[:1].expand(len(x))
        found.append(reader.read(guider.conds["positive"], x, sigma, extra_args["model_options"]))
        return x

    map_layers(model.model)
    level = float(model.get_model_object("model_sampling").percent_to_sigma(percent))
    guider = CFGGuider(model)
    guider.set_conds(positive, positive)
    guider.sample(noise, latents, KSAMPLER(look), torch.tensor([level, 0.0]), disable_pbar=True)
    return found[0]
