"""The training loop: any method on any base, by the diffusion loss (Eq. 2) on pictures, or by rewards on prompts.

What a step sees depends on the seed and the step's number alone: two processes see the batch that one process would
have seen, and a run that was killed and resumed goes on as if it had not been. On the CPU it ends with the same bits;
elsewhere some of torch's kernels sum in another order each time, and two runs differ by roundings anyway.
"""

import contextlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from maskunet_core.errors import MaskUNetError

from .base import BaseModel, load_for_training
from .batches import Batch
from .config import Config, to_toml_values
from .cost import PeakMemory
from .files import NO_ROOM
from .host import models_folder
from .logs import Log
from .methods import build_method
from .objective import DiffusionObjective
from .optimisers import build_optimiser
from .run_folder import STATE, other_version, read_state, require_same, resume_command
from .schedules import learning_rate_factor
from .torch_files import write_torch
from .validate import told_gain


class Diverged(MaskUNetError):
    """No step has a finite loss and gradient any more."""


class DiskFull(MaskUNetError):
    """No room for a checkpoint; the last one is as it was."""


_WIDER_PRECISION = {"fp16": ", or with loop.precision bf16 or fp32", "bf16": ", or with loop.precision fp32"}
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


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C, or SIGTERM, fills the list instead of stopping the program: a step is never cut in two. A second one does
    stop it."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        print("\nStopping after this step, to save the state. Ctrl-C again stops at once.", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def held_out_count(config: Config, pictures: int) -> int:
    """Of few pictures most are needed to learn from."""
    return min(config.validation.pictures, pictures // 5)


class Run:
    """A training run in a folder: state in `state/`, log and grids beside the file that it makes.

    data, prior: what is trained on and held out, and pictures of its class or None; anything with the methods of
    `CachedData`, or `Prompts` where rewards are trained on. accelerator: accelerate's. folder: where the run lies, if
    that is not `config.output`. tensorboard: whether it is written for, where it is installed.
    """

    tensorboard = True

    def __init__(
        self,
        config: Config,
        base: BaseModel,
        data: Any,
        accelerator: Any,
        prior: Any = None,
        folder: Path | None = None,
    ):
        self.config, self.base, self.accelerator = config, base, accelerator
        self.folder = folder or Path(config.output)
        self.result = self.folder / config.result.name
        load_for_training(base)
        held = held_out_count(config, len(data))
        training, held_out = data.split(held, config.seed)
        self.data, self.held_out = training, held_out
        self.digests = torch.tensor(data.digests, dtype=torch.int64)
        self.method = build_method(base, config)
        # Again: a method may need the text encoder as well.
        self.device = load_for_training(base)
        self.module = self.method.module.to(self.device)
        optimiser = build_optimiser(self.method.groups(), config.optimiser.name, config.optimiser.arguments)
        self.optimiser = accelerator.prepare_optimizer(optimiser, device_placement=False)
        factor = learning_rate_factor(config.loop.schedule, config.loop.steps, config.loop.warm_up, floor=0.05)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        self.objective = self._objective(training, prior)
        self.average = [p.detach().clone() for p in self.module.parameters()] if config.loop.ema else None
        self.validator = self.objective.validator(held_out) if config.validation.every and held else None
        self.left_out = LeftOut()
        self._ahead: tuple[int, Batch] | None = None
        self.step = 0
        self.seconds = 0.0
        self.best: dict[str, float] | None = None
        self.memory = PeakMemory(self.device)
        measured = self.validator.columns if self.validator else ()
        told = tuple(self.objective.told())
        self.log = Log(self.folder, accelerator.is_main_process, self.tensorboard, measured, told)

    def _objective(self, training: Any, prior: Any) -> Any:
        if self.config.objective == "reward":
            from .rewarded.objective import RewardObjective

            return RewardObjective(self, training)
        if self.config.learns_word:
            from .embedding.objective import EmbeddingObjective

            return EmbeddingObjective(self, training)
        return DiffusionObjective(self, training, prior)

    # One step ---------------------------------------------------------------------------------------------------

    def _batch(self, step: int) -> Batch:
        """The batch of a step, where the copies to the device do not wait if it can be told so."""
        import comfy.model_management

        batch = self.objective.draw(step)
        if self.device.type != "cpu" and comfy.model_management.device_supports_non_blocking(self.device):
            return batch.pinned()
        return batch

    def _forward_backward(self, batch: Batch, finite: list[bool] | None = None) -> Tensor:
        """Adds the gradients of this process's samples to the parameters'. Returns their weighted losses [N] there.

        finite: [N], which samples take part; the others' losses are left out of the result.
        """
        parts = self.accelerator.num_processes * self.config.loop.accumulate
        size = len(batch.clean) // parts
        losses = []
        for turn in range(self.config.loop.accumulate):
            index = self.accelerator.process_index * self.config.loop.accumulate + turn
            part = batch.part(index, parts, self.device)
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
                    share = len(of_group) / size / self.config.loop.accumulate
                    self.accelerator.backward(of_group.mean() * share)
                weighted[rows] = of_group.detach()
            losses.append(weighted)
        return torch.cat(losses) if losses else torch.empty(0, device=self.device)

    def _gradients(self) -> tuple[list[float], int, bool]:
        """The gradients of this process's samples of the step, from those with finite losses.

        Returns their weighted losses, the number of samples that were left out, and whether the gradients are finite.
        """
        if self._ahead is None or self._ahead[0] != self.step:
            self._ahead = self.step, self._batch(self.step)
        _, batch = self._ahead
        losses = self._forward_backward(batch)
        if self.step + 1 < self.config.loop.steps and self.objective.known(self.step + 1):
            # The device is at work, and is asked for its results only then.
            self._ahead = self.step + 1, self._batch(self.step + 1)
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
                f"Losses or gradients were not finite in each of the {PATIENCE} steps up to step {self.step}. The last "
                f"good state is in {self.state_file}. Train with lower optimiser.lr and optimiser.lr_bias"
                f"{_WIDER_PRECISION.get(self.config.loop.precision, '')}."
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
            "left_out": asdict(self.left_out),
            "data": self.digests,
            "objective": self.objective.state(),
        }
        with _room_for(self.state_file, self.folder):
            write_torch(self.state_file, state)

    def load_state(self) -> None:
        """Go on from the saved state. Raises CannotResume where there is none, or one of another configuration; warns
        where the data is not what it was."""
        state = read_state(self.folder)
        require_same(state["config"], self.config, self.folder)
        then, now = (set(digests.tolist()) for digests in (state.get("data", self.digests), self.digests))
        if then != now:
            self.log.warn(
                f"The data has changed since the run was stopped: {len(then - now):,} of its {len(then):,} pictures "
                f"and captions are gone or changed, {len(now - then):,} are new. The run goes on with what is there."
            )
        try:
            self._restore(state)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise other_version(self.folder) from None

    def _restore(self, state: dict[str, Any]) -> None:
        """Raises errors of many kinds where the state lacks something or holds something else."""
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
        if self.validator:
            self.validator.stale = state["stale"]
        self.left_out = LeftOut(**state.get("left_out", {}))
        self.objective.load(state.get("objective", {}))

    def save_result(self) -> None:
        """The file for the nodes, with how it was made."""
        if not self.accelerator.is_main_process:
            return
        record = {"config": to_toml_values(self.config), "base": self.base.name, "step": self.step}
        record |= {"seconds": round(self.seconds), "validation": self.best}
        with _room_for(self.result, self.folder), self.averaged():
            self.method.save(self.result, record)

    # The loop ---------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to the end, to an early stop, or to Ctrl-C; returns the path of the file."""
        with _room_for(self.folder, self.folder):
            return self._run()

    def _run(self) -> Path:
        self.log.truncate(self.step)
        with _interrupts() as interrupted, self.memory:
            if self.step == 0:
                self.validate()
            stopped_early = self._steps(interrupted)
            if not interrupted and self.validator and self.step % self.config.validation.every:
                self.validate()
        self.save_state()
        if interrupted:
            raise KeyboardInterrupt
        if self.validator is None or self.best is None:
            self.save_result()
        self.log.left_out(self.left_out)
        why = " (no better validation for a while)" if stopped_early else ""
        self.accelerator.print(f"wrote {self.result} after {self.step} steps, {self.seconds:.0f} s{why}")
        self.accelerator.print(told_gain(self.best))
        for file, (folder, use) in self.method.files(self.result).items():
            self.accelerator.print(f"Next: copy {file.name} into {models_folder() / folder}, {use}.")
        return self.result

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
        """Measure on what is held out; the best state so far is written as the result."""
        if self.validator is None:
            return
        self.method.observe(True)
        with self.averaged():
            found = self.validator.measure()
        self.log.validation(self, found)
        better = self.validator.better(found, self.best)
        self.validator.stale = 0 if better else self.validator.stale + 1
        if better:
            self.best = found | {"step": self.step}
            self.save_result()


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


@contextlib.contextmanager
def _room_for(path: Path, folder: Path) -> Iterator[None]:
    """Raises DiskFull where `path`, of the run in `folder`, cannot be written for lack of space."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        saved = (folder / STATE).exists()
        again = f"go on with `{resume_command(folder)}`" if saved else "give the same command again"
        raise DiskFull(
            f"No space left for '{path}'. Whatever was saved before is untouched: free some space, then {again}."
        ) from None
