"""What a run tells: progress bar, `log.csv`, `validation.csv`, `layers.csv`, TensorBoard, grids of samples, warnings.

`left_out.csv` has a row for each step that did without a sample, or updated nothing, because losses or gradients were
not finite.
"""

import csv
import logging
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from maskunet_core.replacing import replacing
from maskunet_core.training.cost import MB

from .choices import TOY_RESOLUTION

COLUMNS = {  # validation.csv has what the validator measures
    "log.csv": ("step", "loss", "keep_ratio", "share_differing", "steps_per_second", "peak_memory_mb"),
    "layers.csv": ("step", "layer", "keep_ratio"),
    "left_out.csv": ("step", "samples", "whole_step"),
}


class Log:
    """Writes into `folder`; does nothing where it is not `enabled` (all processes but the first).

    board: for TensorBoard too, where it is installed. measured: what a validation finds.
    told: what the objective tells of a step besides its loss.
    """

    def __init__(
        self,
        folder: Path,
        enabled: bool = True,
        board: bool = True,
        measured: tuple[str, ...] = (),
        told: tuple[str, ...] = (),
    ):
        self.folder, self.enabled, self.measured = folder, enabled, measured
        self._columns = {**COLUMNS, "validation.csv": ("step", *measured)}
        self._columns["log.csv"] += told
        self.postfix: dict[str, str] = {}
        self._recent: list[float] = []
        self._troubled = 0
        self._base_pictures: torch.Tensor | None = None
        self._plots = enabled and board

    @cached_property
    def _board(self) -> Any:
        """Opened at the first plot: a run that cannot save its first state leaves nothing behind."""
        return _tensorboard(self.folder) if self._plots else None

    def truncate(self, step: int) -> None:
        """Drop what lies after `step`: a resumed run writes it again."""
        if not self.enabled:
            return
        for name, columns in self._columns.items():
            path = self.folder / name
            rows: list[list[str]] = []
            if path.exists():
                # A killed process may leave half a line at the end, and a machine that lost power zeros.
                lines = path.read_text(encoding="utf-8", errors="replace").replace("\0", "").splitlines()
                whole = [r for r in csv.reader(lines[1:]) if len(r) == len(columns) and r[0].isdecimal()]
                rows = [r for r in whole if int(r[0]) <= step]
            with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([columns, *(rows if step else [])])

    def _append(self, name: str, rows: list[tuple]) -> None:
        with (self.folder / name).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)

    def _plot(self, values: dict[str, float], step: int) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def step(self, run: Any, loss: float, observed: bool) -> None:
        """After a step; `run.step` counts it already."""
        if not self.enabled:
            return
        if math.isfinite(loss):
            self._recent = [*self._recent[-49:], loss]
            self.postfix["loss"] = f"{sum(self._recent) / len(self._recent):.4f}"
        self._left_out_at(run)
        keep, differing = "", ""
        speed = round(run.step / max(run.seconds, 1e-9), 3)
        statistics = run.method.statistics
        if observed and statistics is not None:
            keep, differing = round(statistics.keep_ratio, 6), round(statistics.share_differing, 6)
            self.postfix |= {"keep": f"{keep:.4f}", "differ": f"{differing:.4f}"}
            self._plot({"keep_ratio": keep, "share_differing": differing}, run.step)
        memory = run.memory.peak // MB if observed else ""
        told = run.objective.told()
        self.postfix |= {name: f"{value:.3f}" for name, value in told.items()}
        self._append("log.csv", [(run.step, loss, keep, differing, speed, memory, *told.values())])
        self._plot({"loss": loss, "learning_rate": run.schedule.get_last_lr()[0], **told}, run.step)

    def warn(self, sentence: str) -> None:
        if self.enabled:
            logging.getLogger(__name__).warning(sentence)

    def _left_out_at(self, run: Any) -> None:
        """Of the last step: a row at every one that did without something, a warning at the 1st, 10th, 100th..."""
        samples, whole_step = run.left_out.last
        if not samples and not whole_step:
            return
        self._append("left_out.csv", [(run.step, samples, int(whole_step))])
        self._troubled += 1
        if math.log10(self._troubled).is_integer():
            what = f"The losses of {samples} samples" if samples else "The gradients"
            so_far = f"{run.left_out.samples:,} samples left out, {run.left_out.steps:,} steps without an update"
            self.warn(
                f"{what} were not finite at step {run.step}, "
                f"{'which updates nothing' if whole_step else 'and left out'} (so far {so_far})."
            )

    def left_out(self, found: Any) -> None:
        """At the end of a run. found: a LeftOut."""
        if found.samples or found.steps:
            self.warn(
                f"In all {found.samples:,} samples were left out and {found.steps:,} steps updated nothing, because "
                f"losses or gradients were not finite; {self.folder / 'left_out.csv'} says which."
            )

    def validation(self, run: Any, found: dict[str, float]) -> None:
        if not self.enabled:
            return
        self.postfix["change"] = f"{found['change'] * 1e4:+.2f}e-4" if "loss" in found else f"{found['change']:+.3f}"
        self._append("validation.csv", [(run.step, *(found.get(name, "") for name in self.measured))])
        self._plot({f"validation/{name}": value for name, value in found.items()}, run.step)
        if run.method.statistics is not None:
            layers = run.method.statistics.keep_ratio_per_layer
            self._append("layers.csv", [(run.step, name, round(keep, 6)) for name, keep in layers.items()])
            self._plot({f"keep_ratio/{name}": keep for name, keep in layers.items()}, run.step)

    def grid(self, run: Any) -> None:
        """`samples/STEP.png`: a row per prompt, base left and method right, same seeds."""
        if not self.enabled:
            return
        from .samples import draw_prompts
        from .sheets import side_by_side

        config, settings = run.config, run.config.validation
        size = TOY_RESOLUTION if config.is_toy else config.data.resolution
        options = {"size": size, "seed": config.seed, "steps": settings.sample_steps, "cfg": settings.cfg}
        prompts = [run.method.prompt(prompt) for prompt in settings.prompts]
        if self._base_pictures is None:
            with run.method.idle_sampling() as model:
                self._base_pictures = draw_prompts(run.base, model, prompts, **options)
        with run.averaged(), run.method.sampling() as model:
            pictures = draw_prompts(run.base, model, prompts, **options)
        path = self.folder / "samples" / f"{run.step:06d}.png"
        with replacing(path) as temporary:
            names = "base", f"{config.method} after {run.step:,} steps"
            side_by_side(settings.prompts, self._base_pictures, pictures, names).save(temporary, format="PNG")


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))
