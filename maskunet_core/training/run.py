"""A training: what a step does, what it leaves behind, and the loop around it.

What a step sees depends on the seed and the step's number alone: a training that was stopped and resumed goes on as if
it had not been. On the CPU it ends with the same bits; elsewhere some of torch's kernels sum in another order each
time, and two trainings differ by roundings anyway.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import MaskUNetError
from ..torch_file import write_torch
from .ahead import ReadAhead
from .base import BaseModel
from .batches import Batch
from .method import MaskMethod
from .objective import DiffusionObjective
from .optimisers import build_optimiser
from .schedules import learning_rate_factor
from .settings import Settings, plain_values

STATE = "state/last.pt"
"""Of a training, in its folder."""


class Diverged(MaskUNetError):
    """No step has a finite loss and gradient any more."""


PATIENCE = 30
"""Steps in a row without a finite loss and gradient after which a run stops. The loss scale of fp16, which is halved at
each of them, has come from 2^16 to 2^-14 by then."""


@dataclass
class LeftOut:
    """What a run did without, because losses or gradients were not finite.

    samples, steps: of the whole run; in_a_row: the last steps, all of them left out; last: (samples, whether the whole
    step) of the last step.
    """

    samples: int = 0
    steps: int = 0
    in_a_row: int = 0
    last: tuple[int, bool] = (0, False)

    def count(self, samples: int, step: bool) -> None:
        self.last = samples, step
        self.samples += samples
        self.steps += step
        self.in_a_row = self.in_a_row + 1 if step else 0


def held_out_count(config: Settings, pictures: int) -> int:
    """Of few pictures most are needed to learn from."""
    return min(config.validation.pictures, pictures // 5)


class Training:
    """A training whose state and result lie in a folder.

    data, prior: what is trained on and held out, and pictures of its class or None; anything with the methods of
    `EncodedPictures`. accelerator: accelerate's, or `Alone`. result: the file that it makes, inside of `folder`.
    """

    def __init__(
        self,
        config: Settings,
        base: BaseModel,
        data: Any,
        accelerator: Any,
        result: Path,
        prior: Any = None,
    ):
        self.config, self.base, self.accelerator = config, base, accelerator
        self.folder, self.result = result.parent, result
        base.load()
        held = held_out_count(config, len(data))
        training, held_out = data.split(held, config.seed)
        self.data, self.held_out = training, held_out
        self.digests = torch.as_tensor(data.digests, dtype=torch.int64)
        self.method = self.build_method()
        # Again: a method may need the text encoder as well.
        self.device = base.load()
        self.module = self.method.module.to(self.device)
        optimiser = build_optimiser(self.method.groups(), config.optimiser.name, config.optimiser.arguments)
        self.optimiser = accelerator.prepare_optimizer(optimiser, device_placement=False)
        factor = learning_rate_factor(config.loop.schedule, config.loop.steps, config.loop.warm_up, floor=0.05)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        self.objective = self.build_objective(training, prior)
        self.average = [p.detach().clone() for p in self.module.parameters()] if config.loop.ema else None
        self.validator = self.objective.validator(held_out) if config.validation.every and held else None
        self.left_out = LeftOut()
        self.reading = ReadAhead(self._batch, config.loop.steps, self.objective.on_disk)
        self.step = 0
        self.seconds = 0.0
        self.best: dict[str, float] | None = None
        self.validated_step = -1

    # What a kind of training decides ----------------------------------------------------------------------------

    def build_method(self) -> Any:
        """What is trained, its parameters seeded, on the CPU in fp32."""
        return MaskMethod(self.base, self.config)

    def build_objective(self, training: Any, prior: Any) -> Any:
        return DiffusionObjective(self, training, prior)

    def after_divergence(self) -> str:
        """What to do where no step updates anything any more."""
        return "Train with lower learning rates."

    def warn(self, sentence: str) -> None:
        logging.getLogger(__name__).warning(sentence)

    def shown(self, turns: list[Any], what: str) -> Iterable[Any]:
        """The turns of some longer work, as a bar may show them."""
        return turns

    def stepped(self, loss: float, observed: bool) -> None:
        """After each step, which is counted already. observed: whether the method has statistics of it."""

    def validated(self, found: dict[str, float]) -> None:
        """After each validation."""

    def between_steps(self) -> None:
        """After a step and its validation."""
        if self.step % self.config.loop.save_every == 0:
            self.save_state()

    # One step ---------------------------------------------------------------------------------------------------

    def _batch(self, step: int) -> Batch:
        """This process's part of a step's batch, where the copies to the device do not wait if it can be told so."""
        import comfy.model_management

        batch = self.objective.draw_part(step, self.accelerator.process_index, self.accelerator.num_processes)
        if self.device.type != "cpu" and comfy.model_management.device_supports_non_blocking(self.device):
            return batch.pinned()
        return batch

    def _forward_backward(self, batch: Batch, finite: list[bool] | None = None) -> Tensor:
        """Adds the gradients of this process's samples to the parameters'. Returns their weighted losses [N] there.

        batch: of this process. finite: [N], which samples take part; the others' losses are left out of the result.
        """
        turns = self.config.loop.accumulate
        parts = self.accelerator.num_processes * turns
        size = len(batch.clean) // turns
        losses = []
        for turn in range(turns):
            index = self.accelerator.process_index * turns + turn
            part = batch.part(turn, turns, self.device)
            if finite is not None:
                part = part.chosen(finite[turn * size : (turn + 1) * size])
                if not len(part.clean):
                    continue
            part = self.objective.prepared(part)
            torch.manual_seed(self.step * parts + index)
            weighted = torch.empty(len(part.clean), device=self.device)
            for rows, group in part.by_length():
                with self.method.acting():
                    with self.accelerator.autocast():
                        of_group = self.objective.losses(group)
                    share = len(of_group) / size / turns
                    self.accelerator.backward(of_group.mean() * share)
                weighted[rows] = of_group.detach()
            losses.append(weighted)
        return torch.cat(losses) if losses else torch.empty(0, device=self.device)

    def _gradients(self) -> tuple[list[float], int, bool]:
        """The gradients of this process's samples of the step, from those with finite losses.

        Returns their weighted losses, the number of samples that were left out, and whether the gradients are finite.
        """
        batch = self.reading.take(self.step)
        losses = self._forward_backward(batch)
        if self.objective.known(self.step + 1):
            # The device is at work, and is asked for its results only then.
            self.reading.look_ahead(self.step + 1)
        *weighted, largest = torch.cat([losses, self._largest_gradient()]).tolist()
        finite = [math.isfinite(loss) for loss in weighted]
        if not all(finite):
            # Where activations overflow, zero times a sample's loss is still NaN in the gradient: do it without them.
            self.optimiser.zero_grad(set_to_none=True)
            losses = self._forward_backward(batch, finite)
            *weighted, largest = torch.cat([losses, self._largest_gradient()]).tolist()
        return weighted, finite.count(False), math.isfinite(largest)

    def _largest_gradient(self) -> Tensor:
        """[1], fp32: NaN or infinite where a gradient has such an entry."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        if not gradients:
            return torch.zeros(1, device=self.device)
        return torch.stack(torch._foreach_norm(gradients, math.inf)).max().float()[None]

    def _average_gradients(self) -> None:
        """One gradient for all processes. DDP would do it in the forward pass of the module, which has none here."""
        for parameter in self.module.parameters():
            if parameter.grad is None:  # This process had no sample with a finite loss.
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.module.parameters()]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))

    def train_step(self) -> float:
        """One update of the parameters; returns the mean loss of the samples of all processes.

        A sample whose loss is not finite is left out. Where none is left, or gradients are not finite, the parameters,
        the optimiser and the average stay as they are, and the loss is NaN where there is none. Raises Diverged after
        `PATIENCE` such steps in a row.
        """
        losses, lost, finite = self._gradients()
        total, count = math.fsum(losses), len(losses)
        if self.accelerator.num_processes > 1:
            self._average_gradients()
            sums = torch.tensor([total, count, lost, not finite], device=self.device)
            total, count, lost, broken = self.accelerator.reduce(sums, reduction="sum").tolist()
            lost, finite = int(lost), not broken
        if count and finite:
            self._update()
        elif count and self.accelerator.scaler:
            # Updates nothing either, but lowers the scale of the loss.
            self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.schedule.step()
        self.step += 1
        self.objective.stepped()
        self.left_out.count(lost, not (count and finite))
        if self.left_out.in_a_row >= PATIENCE:
            raise Diverged(
                f"Losses or gradients were not finite in each of the {PATIENCE} steps up to step {self.step}. "
                f"{self.after_divergence()}"
            )
        return total / count if count else math.nan

    def _update(self) -> None:
        """From the gradients to the parameters and their average."""
        if self.config.optimiser.clip:
            self.accelerator.clip_grad_norm_(self.module.parameters(), self.config.optimiser.clip)
        self.optimiser.step()
        if self.average is not None:
            # Follows closely at first: the start is no good average.
            decay = min(self.config.loop.ema, (self.step + 1) / (self.step + 11))
            torch._foreach_lerp_(self.average, list(self.module.parameters()), 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The module holds its averaged weights inside the block."""
        if self.average is None:
            yield
            return
        with self.holding(self.average):
            yield

    @contextlib.contextmanager
    def holding(self, values: list[Tensor]) -> Iterator[None]:
        """The module's parameters have other values inside the block."""
        parameters = list(self.module.parameters())
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_copy_(parameters, values)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, kept)

    # What is kept -----------------------------------------------------------------------------------------------

    @property
    def state_file(self) -> Path:
        return self.folder / STATE

    def save_state(self) -> None:
        """Raises OSError."""
        if self.accelerator.is_main_process:
            write_torch(self.state_file, self.state())

    def state(self) -> dict[str, Any]:
        return {
            "config": json.dumps(plain_values(self.config)),
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "validated_step": self.validated_step,
            "module": self.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "stale": self.validator.stale if self.validator else 0,
            "left_out": asdict(self.left_out),
            "data": self.digests,
            "objective": self.objective.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a result of `state`. Raises errors of many kinds where it lacks something, or is of another."""
        if _shapes(state["module"]) != _shapes(self.module.state_dict()):
            raise ValueError
        self.module.load_state_dict(state["module"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            torch._foreach_copy_(self.average, state["average"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        # Older states were saved when the validation of their step was done.
        self.validated_step = state.get("validated_step", self.step)
        if self.validator:
            self.validator.stale = state["stale"]
        self.left_out = LeftOut(**state.get("left_out", {}))
        self.objective.load(state.get("objective", {}))

    def save_result(self) -> None:
        """The file for the nodes, with how it was made. Raises OSError."""
        if self.accelerator.is_main_process:
            with self.averaged():
                self.method.save(self.result, self.record())

    def record(self) -> dict[str, Any]:
        """How the result was made."""
        found = {"config": plain_values(self.config), "base": self.base.name, "step": self.step}
        return found | {"seconds": round(self.seconds), "validation": self.best}

    # The loop ---------------------------------------------------------------------------------------------------

    def train(self, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end, to an early stop, or until `interrupted` says so after a step, and save where it is.

        Returns whether it stopped early, because validations were no longer better. A finished one has its result.
        """
        self._validate_if_due()
        try:
            stopped_early = self._steps(interrupted)
        finally:
            self.reading.close()
        halted = interrupted()
        if not halted and self.validated_step != self.step:
            self.validate()
        self.save_state()
        if not halted and (self.validator is None or self.best is None):
            self.save_result()
        return stopped_early

    def _steps(self, interrupted: Callable[[], bool]) -> bool:
        loop, settings = self.config.loop, self.config.validation
        began, before = time.monotonic(), self.seconds
        while self.step < loop.steps and not interrupted():
            # Statistics wait for the device: now and then is enough.
            observed = self.step % 10 == 0
            self.method.observe(observed)
            loss = self.train_step()
            self.seconds = before + time.monotonic() - began
            self.stepped(loss, observed)
            self._validate_if_due()
            self.between_steps()
            if self.validator and settings.patience and self.validator.stale >= settings.patience:
                return True
        return False

    def _validate_if_due(self) -> None:
        """Also where a training goes on that was stopped while it validated."""
        every = self.config.validation.every
        if every and self.step % every == 0 and self.validated_step != self.step:
            self.validate()

    def validate(self) -> None:
        """Measure on what is held out; the best state so far is written as the result."""
        if self.validator is None:
            return
        self.method.observe(True)
        with self.averaged():
            found = self.validator.measure()
        self.validated_step = self.step
        self.validated(found)
        better = self.validator.better(found, self.best)
        self.validator.stale = 0 if better else self.validator.stale + 1
        if better:
            self.best = found | {"step": self.step}
            self.save_result()


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
