"""Cross-frame attention: all frames of a batch look at one of them where they would look at themselves.

Keys and values are exchanged after their projections, so masks and LoRAs act on each frame before that, and it does not
matter what computes the attention. ControlNets, whose blocks know nothing of the host's options, are treated alike.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..choices import FIRST
from ..errors import MaskUNetError
from ..masks.sources import GeneratorMasks
from ..models.families import family_of
from ..models.families.unet import UNET
from ..models.structure import family_name
from ..seam.attach import OPTION, with_options
from ..seam.sampling import SEARCH, controls_of
from ..seam.window import acts_at, is_whole, require_order
from .shared_masks import FirstFrameMasks

KEY = "maskunet_cross_frame"
"""Of the wrapper on a MODEL."""


class NoCrossFrameAttention(MaskUNetError):
    """A model, or a way of calling it, in which frames cannot look at each other."""


def self_attentions(network: nn.Module) -> list[nn.Module]:
    """Those of the pictures of a U-Net, or of its ControlNet."""
    named = ((name, module) for name, module in network.named_modules() if not UNET.is_idle(network, name))
    blocks = (module for _, module in named if hasattr(module, "attn1") and hasattr(module, "disable_self_attn"))
    return [block.attn1 for block in blocks if not block.disable_self_attn]


class _Exchange:
    """Keys and values of one call of a network, each frame's replaced by those of the frame that it looks at."""

    def __init__(self, references: list[int]):
        self._references, self._rows = references, 0

    def entered(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Pre-hook of the network."""
        self._rows = len(args[0] if args else kwargs["x"])

    def projected(self, _: nn.Module, __: Any, tokens: Tensor) -> Tensor:
        """Hook of a projection. tokens: `[branches * frames * tiles, N, C]`; other nodes cut frames into tiles."""
        tiles = len(tokens) // self._rows
        of_frames = tokens.unflatten(0, (-1, len(self._references), tiles))
        return of_frames[:, self._references].flatten(0, 2)


@contextlib.contextmanager
def crossed(network: nn.Module, references: list[int]) -> Iterator[None]:
    """Inside the block a network computes batches of as many frames as there are references, once or for several
    branches of guidance one after the other, and each frame attends to the one that `references` names for it."""
    exchange = _Exchange(references)
    with contextlib.ExitStack() as stack:
        stack.callback(network.register_forward_pre_hook(exchange.entered, with_kwargs=True).remove)
        for attention in self_attentions(network):
            for projection in (attention.to_k, attention.to_v):
                stack.callback(projection.register_forward_hook(exchange.projected).remove)
        yield


@dataclass(frozen=True)
class CrossFrameAttention:
    """Cross-frame attention in the calls of the MODEL that `crossing` gives.

    reference: of REFERENCES. start_percent, end_percent: where in sampling it acts. share_masks: whether mask
    generators look at the first frame alone, whose masks then act on all frames.
    """

    reference: str = FIRST
    start_percent: float = 0.0
    end_percent: float = 1.0
    share_masks: bool = False

    def crossing(self, model: Any) -> Any:
        """A clone of a MODEL whose batches are the frames of one video; what another of these was set to before no
        longer counts. Raises NoCrossFrameAttention, and MaskUNetError where the percents are not in order."""
        from comfy.patcher_extension import WrappersMP

        if family_of(model.model.diffusion_model) is not UNET:
            raise NoCrossFrameAttention(
                "Cross-frame attention works in U-Nets (SD 1.5, SD 2.x, SDXL), and the connected model is "
                f"{family_name(model.model)}. Connect such a model, or remove the node."
            )
        require_order(self.start_percent, self.end_percent, "cross-frame attention")
        clone = model.clone()
        clone.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, KEY)
        clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self._computed)
        return clone

    def _computed(self, executor, model, conditions, x: Tensor, sigma: Tensor, options: dict[str, Any]) -> Any:
        """CALC_COND_BATCH wrapper: one call of the sampler, in which all rows of `x` are frames."""
        if len(x) == 1 or not self._acts(model, sigma):
            return executor(model, conditions, x, sigma, options)
        _require_plain_calls(options)
        if self.share_masks:
            options = _with_shared_masks(options)
        references = [0 if self.reference == FIRST else max(0, frame - 1) for frame in range(len(x))]
        controls = [getattr(control, "control_model", None) for control in controls_of(conditions)]
        with contextlib.ExitStack() as stack:
            for network in (model.diffusion_model, *dict.fromkeys(filter(None, controls))):
                stack.enter_context(crossed(network, references))
            return executor(model, conditions, x, sigma, options)

    def _acts(self, model: Any, sigma: Tensor) -> bool:
        window = self.start_percent, self.end_percent
        return is_whole(*window) or acts_at(float(sigma.max()), model.model_sampling, *window)


def _require_plain_calls(options: dict[str, Any]) -> None:
    """Raises NoCrossFrameAttention where hooks would not reach the network that computes, or not each time."""
    from comfy.patcher_extension import WrappersMP
    from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

    if "multigpu_clones" in options:
        raise NoCrossFrameAttention(
            "Cross-frame attention acts on one device, but the connected model is set to work on several. Connect the "
            "model without MultiGPU Work Units."
        )
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    if wrappers.get(WrappersMP.APPLY_MODEL, {}).get(COMPILE_KEY):
        raise NoCrossFrameAttention(
            "Cross-frame attention cannot be put into a compiled model. Connect the model without TorchCompileModel."
        )
    # It computes layers once more for gradients, and goes on without images that are good enough.
    if wrappers.get(WrappersMP.PREDICT_NOISE, {}).get(SEARCH):
        raise NoCrossFrameAttention(
            "A search looks at each image of a batch for itself, but cross-frame attention makes one video of them. "
            "Search on one picture, and replay its masks by MaskUNet Apply Masks for all frames."
        )


def _with_shared_masks(options: dict[str, Any]) -> dict[str, Any]:
    attachments = options.get("transformer_options", {}).get(OPTION, ())
    shared = tuple(
        replace(each, source=FirstFrameMasks(each.source)) if isinstance(each.source, GeneratorMasks) else each
        for each in attachments
    )
    return with_options(options, {OPTION: shared}) if attachments else options
