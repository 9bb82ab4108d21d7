"""The training loop: any method on any base and data, by the diffusion loss (Eq. 2).

What a step does depends on the seed and the step's number alone: a run that was killed and resumed ends with the
same bits as one that was not, and two processes see the batch that one process would have seen.
"""

import contextlib
import errno
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from maskunet_core.errors import MaskUNetError

from .base import BaseModel, load_for_training
from .batches import Batch, Batches
from .config import Config, to_toml_values
from .cost import PeakMemory
from .files import replacing
from .logs import Log
from .methods import build_method
from .optimisers import build_optimiser
from .schedules import learning_rate_factor
from .validate import Validator


class Diverged(MaskUNetError):
    """The loss is no longer a number."""


class CannotResume(MaskUNetError):
    """A folder without a saved state, or with one of another configuration."""


class DiskFull(MaskUNetError):
    """No room for a checkpoint; the last one is as it was."""


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C fills the list instead of stopping the program: a step is never cut in two. A second one does stop it."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


class Run:
    """A training run in `config.output`: state in `state/`, log and grids beside the file that it makes.

    data, prior: what is trained on and held out, and pictures of its class or None; anything with the methods of
    `CachedData`. accelerator: accelerate's. tensorboard: whether it is written for, where it is installed.
    """

    tensorboard = True

    def __init__(self, config: Config, base: BaseModel, data: Any, accelerator: Any, prior: Any = None):
        self.config, self.base, self.accelerator = config, base, accelerator
        self.folder = Path(config.output)
        self.device = load_for_training(base)
        held = min(config.validation.pictures, len(data) // 2)
        training, held_out = data.split(held, config.seed)
        self.data = training
        self.batches = Batches(training, config, base.timesteps, prior)
        self.method = build_method(base, config)
        self.module = self.method.module.to(self.device)
        optimiser = build_optimiser(self.method.groups(), config.optimiser.name, config.optimiser.arguments)
        self.optimiser = accelerator.prepare_optimizer(optimiser, device_placement=False)
        factor = learning_rate_factor(config.loop.schedule, config.loop.steps, config.loop.warm_up, floor=0.05)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        self.average = [p.detach().clone() for p in self.module.parameters()] if config.loop.ema else None
        self.validator = Validator(self, held_out) if config.validation.every and held else None
        self.step = 0
        self.seconds = 0.0
        self.best: dict[str, float] | None = None
        self.memory = PeakMemory(self.device)
        self.log = Log(self.folder, enabled=accelerator.is_main_process, board=self.tensorboard)

    # One step ---------------------------------------------------------------------------------------------------

    def _forward_backward(self, batch: Batch) -> float:
        """The loss of one part, with its gradients added to the parameters'."""
        parts = self.accelerator.num_processes * self.config.loop.accumulate
        total = 0.0
        for turn in range(self.config.loop.accumulate):
            index = self.accelerator.process_index * self.config.loop.accumulate + turn
            part = batch.part(index, parts, self.device)
            torch.manual_seed(self.step * parts + index)
            with self.method.acting():
                with self.accelerator.autocast():
                    losses = self.base.diffusion_loss(
                        part.clean, part.conditions, part.timesteps, part.noise, self.config.loop.min_snr
                    )
                loss = (part.weights * losses).mean() / self.config.loop.accumulate
                self.accelerator.backward(loss)
            total += loss.item()
        return total

    def _average_gradients(self) -> None:
        """One gradient for all processes. DDP would do it in the forward pass of the module, which has none here."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))

    def train_step(self) -> float:
        """One update of the parameters; returns the loss over all processes."""
        loss = self._forward_backward(self.batches.draw(self.step))
        if self.accelerator.num_processes > 1:
            loss = self.accelerator.reduce(torch.tensor(loss, device=self.device), reduction="mean").item()
        if not math.isfinite(loss):
            raise Diverged(
                f"The loss is not finite at step {self.step}. The last good state is in {self.state_file}. "
                "Train with a lower learning rate, or with loop.precision bf16 instead of fp16."
            )
        self._average_gradients()
        if self.config.optimiser.clip:
            self.accelerator.clip_grad_norm_(self.module.parameters(), self.config.optimiser.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.schedule.step()
        self.step += 1
        if self.average is not None:
            # Follows closely at first: the start is no good average.
            decay = min(self.config.loop.ema, self.step / (self.step + 10))
            torch._foreach_lerp_(self.average, list(self.module.parameters()), 1 - decay)
        return loss

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The module holds its averaged weights inside the block."""
        if self.average is None:
            yield
            return
        parameters = list(self.module.parameters())
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_copy_(parameters, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, kept)

    # What is kept -----------------------------------------------------------------------------------------------

    @property
    def state_file(self) -> Path:
        return self.folder / "state" / "last.pt"

    def save_state(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "config": json.dumps(to_toml_values(self.config)),
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "module": self.module.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "stale": self.validator.stale if self.validator else 0,
        }
        with _room_for(self.state_file), replacing(self.state_file) as temporary:
            torch.save(state, temporary)

    def load_state(self) -> None:
        """Go on from the saved state. Raises CannotResume where there is none, or one of another configuration."""
        if not self.state_file.exists():
            raise CannotResume(f"'{self.folder}' holds no saved state. Start the run by `python -m trainer train`.")
        state = torch.load(self.state_file, weights_only=True, map_location="cpu")
        if state["config"] != json.dumps(to_toml_values(self.config)):
            raise CannotResume(f"The state in '{self.folder}' was saved with another configuration.")
        self.module.load_state_dict(state["module"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            torch._foreach_copy_(self.average, state["average"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        if self.validator:
            self.validator.stale = state["stale"]

    def save_result(self) -> None:
        """The file for the nodes, with how it was made."""
        if not self.accelerator.is_main_process:
            return
        record = {"config": to_toml_values(self.config), "base": self.base.name, "step": self.step}
        record |= {"seconds": round(self.seconds), "validation": self.best}
        path = self.config.result
        with _room_for(path), self.averaged():
            self.method.save(path, record)

    # The loop ---------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to the end, to an early stop, or to Ctrl-C; returns the path of the file."""
        self.log.truncate(self.step)
        if self.step == 0:
            self.validate()
        with _interrupts() as interrupted, self.memory:
            stopped_early = self._steps(interrupted)
            if not interrupted and self.validator and self.step % self.config.validation.every:
                self.validate()
        self.save_state()
        if interrupted:
            raise KeyboardInterrupt
        if self.validator is None or self.best is None:
            self.save_result()
        why = " (no better validation for a while)" if stopped_early else ""
        self.accelerator.print(f"wrote {self.config.result} after {self.step} steps, {self.seconds:.0f} s{why}")
        return self.config.result

    def _steps(self, interrupted: list[int]) -> bool:
        loop, settings = self.config.loop, self.config.validation
        began, before = time.monotonic(), self.seconds
        bar = tqdm(
            total=loop.steps,
            initial=self.step,
            desc="train",
            mininterval=1,
            disable=not self.accelerator.is_main_process,
        )
        with bar:
            while self.step < loop.steps and not interrupted:
                # Statistics wait for the device: now and then is enough.
                observed = self.step % 10 == 0
                self.method.observe(observed)
                loss = self.train_step()
                self.seconds = before + time.monotonic() - began
                self.log.step(self, loss, observed)
                bar.set_postfix(self.log.postfix, refresh=False)
                bar.update()
                if settings.every and self.step % settings.every == 0:
                    self.validate()
                if settings.sample_every and self.step % settings.sample_every == 0:
                    self.log.grid(self)
                    load_for_training(self.base)
                if self.step % loop.save_every == 0:
                    self.save_state()
                if self.validator and settings.patience and self.validator.stale >= settings.patience:
                    return True
        return False

    def validate(self) -> None:
        """Measure the held-out loss; the best state so far is written as the result."""
        if self.validator is None:
            return
        self.method.observe(True)
        with self.averaged():
            found = self.validator.measure()
        self.log.validation(self, found)
        better = self.best is None or found["change"] < self.best["change"]
        self.validator.stale = 0 if better else self.validator.stale + 1
        if better:
            self.best = found | {"step": self.step}
            self.save_result()


@contextlib.contextmanager
def _room_for(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DiskFull(
            f"No space left for '{path}'. Whatever was saved before is untouched: free some space, then go on with "
            f"`python -m trainer resume {path.parent.parent if path.parent.name == 'state' else path.parent}`."
        ) from None
