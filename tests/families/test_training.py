"""A training step on a tiny transformer of each kind."""

import pytest
import torch

from maskunet_core.training.base import BaseModel
from tests.families.models import TINY, conditioning, load, noises
from trainer.base import require_trainable
from trainer.config_file import parse_config
from trainer.methods import build_method


@pytest.fixture(scope="module", params=TINY)
def base(request) -> BaseModel:
    import comfy.supported_models

    if not hasattr(comfy.supported_models, TINY[request.param].kind):
        pytest.skip(f"This ComfyUI does not know {request.param}.")
    return BaseModel(load(TINY[request.param]), None, None, request.param)


class Step:
    """A step of two samples by a method whose parameters have moved from their start."""

    def __init__(self, base: BaseModel, method: str, checkpointing: bool = False):
        loop = {"checkpointing": checkpointing, "precision": "fp32"}
        config = parse_config({"method": method, "loop": loop, "generator": {"bias": "row_column"}})
        self.base, self.method = base, build_method(base, config)
        self.move(0.1 * torch.ones(()), self.direction(1))
        [(context, more)] = conditioning(TINY[base.name], 3)
        self.conditions = {key: torch.cat([value, value]) for key, value in {"cross_attn": context, **more}.items()}

    def direction(self, seed: int) -> list[torch.Tensor]:
        stream = torch.Generator().manual_seed(seed)
        return [torch.randn(p.shape, generator=stream) for p in self.method.module.parameters()]

    @torch.no_grad()
    def move(self, step: float, direction: list[torch.Tensor]) -> None:
        for parameter, change in zip(self.method.module.parameters(), direction):
            parameter.add_(step * change)

    def loss(self) -> torch.Tensor:
        clean, noise = noises(TINY[self.base.name], (1, 2)), noises(TINY[self.base.name], (3, 4))
        timesteps = torch.tensor([3, 7]) * self.base.timesteps // 10
        return self.base.diffusion_loss(clean, self.conditions, timesteps, noise).mean()

    def gradients(self) -> list[torch.Tensor | None]:
        with self.method.acting():
            self.loss().backward()
        return [parameter.grad for parameter in self.method.module.parameters()]

    @torch.no_grad()
    def slope(self, direction: list[torch.Tensor], step: float = 1e-2) -> float:
        """Of the loss, by central differences."""
        losses = []
        for distance in (step, -2 * step):
            self.move(distance, direction)
            with self.method.acting(training=False):
                losses.append(self.loss().item())
        self.move(step, direction)
        return (losses[0] - losses[1]) / (2 * step)


def test_the_gradient_of_a_lora_is_the_slope_of_the_loss(base):
    require_trainable(base)
    step = Step(base, "lora")
    direction = step.direction(2)
    gradients = step.gradients()
    found = sum(float((gradient * change).sum()) for gradient, change in zip(gradients, direction))
    assert found == pytest.approx(step.slope(direction), rel=2e-2, abs=1e-3)
    assert found != 0


@pytest.mark.parametrize("method", ["maskunet", "lora"])
def test_blocks_that_run_again_give_the_same_gradients_and_leave_the_base_alone(base, method):
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    kept, again = (Step(base, method, checkpointing).gradients() for checkpointing in (False, True))
    for gradient, other in zip(kept, again):
        torch.testing.assert_close(other, gradient)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in kept)
    assert any(gradient.abs().sum() > 0 for gradient in kept)
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())
    assert all(parameter.grad is None for parameter in base.unet.parameters())
