"""What a sampler of the host does with its model, found out by running it on a model that predicts zeros."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_KEY = "maskunet_trial"
_FACTOR = 1.5


class SamplerTrial:
    """model: the MODEL; its network is not run. sample: runs the host's sampler on (MODEL, noise, seed) until the last
    step but one. like: latents `[N, C, h, w]`."""

    def __init__(self, model: Any, sample: Callable[[Any, Tensor, int], Tensor], like: Tensor):
        self._model, self._sample, self._like = model, sample, like

    def _run(self, scale: float, seed: int = 0, changed: int | None = None) -> tuple[Tensor, list[float]]:
        """The end of a run from noise times `scale`, and the noise levels at which the model was asked.

        changed: the latent of this noise level, counted from 0, is multiplied in place when the model first sees it.
        """
        from comfy.patcher_extension import WrappersMP

        levels: list[float] = []

        def predict_zeros(executor, x: Tensor, timestep: Tensor, *_: Any) -> Tensor:
            sigma = float(timestep.max())
            if sigma not in levels:
                levels.append(sigma)
                if changed == len(levels) - 1:
                    x.mul_(_FACTOR)
            return torch.zeros_like(x)

        model = self._model.clone()
        model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, _KEY, predict_zeros)
        noise = torch.randn(self._like.shape, generator=torch.Generator().manual_seed(0)).to(self._like)
        return self._sample(model, scale * noise, seed).double(), levels

    def adds_noise(self) -> bool:
        """Whether the sampler draws noise of its own, which depends on its seed."""
        return not torch.equal(self._run(1.0, seed=0)[0], self._run(1.0, seed=1)[0])

    def takes_up_changes(self) -> bool:
        """Whether a latent that is changed in place, when the model sees it, is the latent that is sampled on from.

        The sampler is linear here: of two runs whose noises differ, the difference grows by what it was multiplied by.
        """
        stock = self._run(1.0)[0] - self._run(-1.0)[0]
        for level in range(len(self._run(1.0)[1])):
            changed = self._run(1.0, changed=level)[0] - self._run(-1.0, changed=level)[0]
            if not torch.allclose(changed, _FACTOR * stock, rtol=1e-2, atol=1e-3 * float(stock.abs().max())):
                return False
        return True
