"""What a run learns from: which samples a step sees, and what their loss is."""

from typing import Any

from torch import Tensor

from .batches import Batch, Batches
from .validate import Validator


class DiffusionObjective:
    """Pictures with captions, by the diffusion loss. run: a Run; training, prior: as it takes them.

    on_disk: whether batches are read from a disk, and several threads may do so.
    """

    def __init__(self, run: Any, training: Any, prior: Any):
        self.run = run
        self.on_disk = getattr(training, "on_disk", False)
        self.batches = Batches(training, run.config, run.base.timesteps, prior)

    def draw(self, step: int) -> Batch:
        """The whole batch of a step, counted from 0, on the CPU."""
        return self.batches.draw(step)

    def draw_part(self, step: int, index: int, parts: int) -> Batch:
        """Part `index` of `parts` equal ones of that batch; of the others nothing is read."""
        return self.batches.draw(step, index, parts)

    def known(self, step: int) -> bool:
        """Whether a step's batch can be drawn before the step in front of it has been made."""
        return True

    def prepared(self, part: Batch) -> Batch:
        """What `losses` takes, made before the method acts. part: on the device."""
        return part

    def losses(self, part: Batch) -> Tensor:
        """`[B]`, weighted, while the method acts."""
        found = self.run.base.diffusion_loss(
            part.clean, part.conditions, part.timesteps, part.noise, self.run.config.loop.min_snr
        )
        return part.weights * found

    def stepped(self) -> None:
        """After a step; the run has counted it."""

    def told(self) -> dict[str, float]:
        """What is told of a step besides its loss."""
        return {}

    def validator(self, held_out: Any) -> Validator:
        return Validator(self.run, held_out)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides the run's own state."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from the result of `state`."""
