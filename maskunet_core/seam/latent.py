"""The latent that a sampler of the host holds, to be changed so that its step goes on from the change.

What a wrapper of the model's calls gets is the sampler's own tensor only where there is no inpainting mask: with one
the host hands on a mixture. So the change is made one call further out, where the sampler asks its model.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import MaskUNetError
from .shadow import Shadowed

_OWN = "maskunet_own_function"
"""Attribute of a function in a sampler function's place, under which that lies."""


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """`[N]` as `[N, 1, ...]`, which broadcasts over `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


class UnchangeableLatent(MaskUNetError):
    """A sampler that does not go on from a latent that was changed, or that is not known to do so."""


class _Mixed:
    """In the place of the host's guider: gives back what the model would be asked about."""

    def __init__(self, guider: Any):
        self.inner_model = guider.inner_model

    def __call__(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        self.x = x
        return x


class SamplerLatent:
    """A sampler's latent at one call of its model.

    value: the sampler's own tensor `[N, ...]`; what is written into it is what the step goes on from. sigma: `[N]`.
    options: the call's model options.
    """

    def __init__(self, model: Any, value: Tensor, sigma: Tensor, more: dict[str, Any]):
        self.value, self.sigma, self.options = value, sigma, more.get("model_options", {})
        self.masked = more.get("denoise_mask") is not None
        while isinstance(model, _AskedFirst):
            model = model._model
        self._model, self._more = model, more

    def seen(self, value: Tensor) -> Tensor:
        """What the model is asked about where the sampler holds `value`: under an inpainting mask the original shows
        through. Differentiable."""
        if not self.masked:
            return value
        model, mixed = copy.copy(self._model), _Mixed(self._model.inner_model)
        model.inner_model = mixed
        model(value, self.sigma, **self._more)
        return mixed.x

    def seen_change(self, change: Tensor) -> Tensor:
        """What a change of the sampler's latent changes of that which the model is asked about."""
        return self.seen(self.value + change) - self.seen(self.value) if self.masked else change


class _AskedFirst:
    """A sampler's model, before whose calls something else is called with the sampler's latent."""

    def __init__(self, model: Any, before: Callable[[SamplerLatent], None]):
        self._model, self._before = model, before

    def __call__(self, x: Tensor, sigma: Tensor, **more: Any) -> Any:
        self._before(SamplerLatent(self._model, x, sigma, more))
        return self._model(x, sigma, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def before_each_call(sampler: Any, before: Callable[[SamplerLatent], None]) -> Shadowed:
    """Inside the block the host's sampler calls `before` each time that it is about to ask its model.

    Raises UnchangeableLatent for samplers of another kind than the host's.
    """
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        raise UnchangeableLatent(
            f"{type(sampler).__name__} is no sampler of ComfyUI's own kind, so its latents cannot be changed while it "
            "samples. Choose another sampler, such as euler or dpmpp_2m."
        )

    @functools.wraps(function)
    def sample(model: Any, *args: Any, **kwargs: Any) -> Tensor:
        return function(_AskedFirst(model, before), *args, **kwargs)

    setattr(sample, _OWN, function)
    return Shadowed([(sampler, {"sampler_function": sample})])


def untouched(sampler: Any) -> Any:
    """A copy of a sampler that calls nothing before it asks its model."""
    sampler = copy.copy(sampler)
    while hasattr(getattr(sampler, "sampler_function", None), _OWN):
        sampler.sampler_function = getattr(sampler.sampler_function, _OWN)
    return sampler
