"""The training loop of the command line: any method on any base, by the diffusion loss (Eq. 2) on pictures, or by
rewards on prompts, in one process or several, with logs.

Two processes see the batch that one process would have seen.
"""

import contextlib
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from maskunet_core.errors import MaskUNetError
from maskunet_core.training.base import BaseModel, load_for_training
from maskunet_core.training.cost import PeakMemory
from maskunet_core.training.run import Training
from maskunet_core.training.validate import told_gain

from .config import Config
from .files import NO_ROOM
from .host import models_folder
from .logs import Log
from .methods import build_method
from .run_folder import STATE, other_version, read_state, require_same, resume_command


class DiskFull(MaskUNetError):
    """No room for a checkpoint; the last one is as it was."""


_WIDER_PRECISION = {"fp16": ", or with loop.precision bf16 or fp32", "bf16": ", or with loop.precision fp32"}


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


class Run(Training):
    """A training run of a configuration: state in `state/`, log and grids beside the file that it makes.

    data: also `Prompts`, where rewards are trained on. accelerator: accelerate's. folder: where the run lies, if that
    is not `config.output`. tensorboard: whether it is written for, where it is installed.
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
        folder = folder or Path(config.output)
        super().__init__(config, base, data, accelerator, folder / config.result.name, prior)
        self.memory = PeakMemory(self.device)
        measured = self.validator.columns if self.validator else ()
        told = tuple(self.objective.told())
        self.log = Log(self.folder, accelerator.is_main_process, self.tensorboard, measured, told)

    def build_method(self) -> Any:
        return build_method(self.base, self.config)

    def build_objective(self, training: Any, prior: Any) -> Any:
        if self.config.objective == "reward":
            from .rewarded.objective import RewardObjective

            return RewardObjective(self, training)
        if self.config.learns_word:
            from .embedding.objective import EmbeddingObjective

            return EmbeddingObjective(self, training)
        return super().build_objective(training, prior)

    def after_divergence(self) -> str:
        return (
            f"The last good state is in {self.state_file}. Train with lower optimiser.lr and optimiser.lr_bias"
            f"{_WIDER_PRECISION.get(self.config.loop.precision, '')}."
        )

    # What is told -----------------------------------------------------------------------------------------------

    def warn(self, sentence: str) -> None:
        self.log.warn(sentence)

    def shown(self, turns: list[Any], what: str) -> Iterable[Any]:
        return tqdm(turns, desc=what, leave=False, mininterval=1, disable=not self.accelerator.is_main_process)

    def stepped(self, loss: float, observed: bool) -> None:
        self.log.step(self, loss, observed)
        self._bar.set_postfix(self.log.postfix, refresh=False)
        self._bar.update()

    def validated(self, found: dict[str, float]) -> None:
        self.log.validation(self, found)

    def between_steps(self) -> None:
        settings = self.config.validation
        if settings.sample_every and self.step % settings.sample_every == 0:
            self.log.grid(self)
            load_for_training(self.base)
        super().between_steps()

    # What is kept -----------------------------------------------------------------------------------------------

    def save_state(self) -> None:
        with _room_for(self.state_file, self.folder):
            super().save_state()

    def save_result(self) -> None:
        with _room_for(self.result, self.folder):
            super().save_result()

    def load_state(self) -> None:
        """Go on from the saved state. Raises CannotResume where there is none, or one of another configuration; warns
        where the data is not what it was."""
        state = read_state(self.folder)
        require_same(state["config"], self.config, self.folder)
        then, now = state.get("data", self.digests).numpy(), self.digests.numpy()
        if not np.array_equal(then, now):
            gone, new = (len(np.setdiff1d(*pair, assume_unique=True)) for pair in ((then, now), (now, then)))
            self.warn(
                f"The data has changed since the run was stopped: {gone:,} of its {len(then):,} pictures "
                f"and captions are gone or changed, {new:,} are new. The run goes on with what is there."
            )
        try:
            self.restore(state)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise other_version(self.folder) from None

    # The loop ---------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to the end, to an early stop, or to Ctrl-C; returns the path of the file."""
        with _room_for(self.folder, self.folder):
            self.log.truncate(self.step)
            shown = {"desc": "train", "mininterval": 1, "disable": not self.accelerator.is_main_process}
            with (
                _interrupts() as interrupts,
                self.memory,
                tqdm(total=self.config.loop.steps, initial=self.step, **shown) as self._bar,
            ):
                stopped_early = self.train(lambda: bool(interrupts))
            if interrupts:
                raise KeyboardInterrupt
            return self._finished(stopped_early)

    def _finished(self, stopped_early: bool) -> Path:
        self.log.left_out(self.left_out)
        why = " (no better validation for a while)" if stopped_early else ""
        self.accelerator.print(f"wrote {self.result} after {self.step} steps, {self.seconds:.0f} s{why}")
        if (waited := self.reading.waited / max(self.seconds, 1e-9)) > 0.05 and self.objective.on_disk:
            self.accelerator.print(f"It waited for data {waited:.0%} of the time: a faster disk for data.cache helps.")
        self.accelerator.print(told_gain(self.best))
        for file, (folder, use) in self.method.files(self.result).items():
            self.accelerator.print(f"Next: copy {file.name} into {models_folder() / folder}, {use}.")
        return self.result


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
