"""The search inside the host's samplers: a PREDICT_NOISE wrapper that improves the masks before each step is taken.

So every sampler, scheduler, guidance and ControlNet of the host works as it does without the search.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..records.recorded import RecordedMasks, RecordedSource
from ..seam.patch import ENCODER, Attachment, enabled, structure_of, with_attachment
from ..seam.prefix import EncoderCache, LiveEncoder
from .judge import Judge, views_of
from .lean import LeanGraph, with_lean_attention
from .loop import Evaluation, Group, search_step
from .masks import SearchedMasks
from .settings import SearchSettings

KEY = "maskunet_search"


def step_of(sigma: float, model_options: dict) -> tuple[int, int]:
    """The sampler's step that is nearest to `sigma`, counted from 0, and how many there are."""
    sigmas = model_options["transformer_options"]["sample_sigmas"]
    return int((sigmas[:-1] - sigma).abs().argmin()), len(sigmas) - 1


class RewardSearch:
    """A search during one sampling run; `model` is the MODEL to sample with.

    judge: of estimates in the model's latent space, for a batch of `images`. watch: scores `[N]` of estimates by a
    reward that is never optimised; the run goes on without updates once it has fallen at two steps in a row at which
    the optimised one rose, if `stop_by_watch`. report: told of each look (an Evaluation and the estimate); raises to
    stop everything. After the run `recorded` holds the masks and `history` what was seen. encoder: serves this step.
    """

    def __init__(
        self,
        model: Any,
        settings: SearchSettings,
        judge: Judge,
        images: int,
        *,
        targets: str = "decoder attention",
        seed: int = 0,
        watch: Callable[[Tensor], Tensor] | None = None,
        stop_by_watch: bool = False,
        report: Callable[[Evaluation, Tensor], None] | None = None,
    ):
        from comfy.patcher_extension import WrappersMP

        self.settings, self.judge, self.images, self.seed = settings, judge, images, seed
        self.structure = structure_of(model, targets)
        self.recorded = RecordedMasks(self.structure, images, targets=targets, branches=settings.branches)
        self.history: list[Evaluation] = []
        self._watch, self._stop_by_watch, self._report = watch, stop_by_watch, report
        self._masks: SearchedMasks | None = None
        self.encoder: EncoderCache | LiveEncoder = LiveEncoder()
        self._falls = 0
        self._began: float | None = None
        self.model = enabled(model)
        self.model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self._predict_noise)

    def leaves(self) -> list[Tensor]:
        """The logits of now."""
        return [] if self._masks is None else list(self._masks.logits.values())

    # A call of the sampler --------------------------------------------------------------------------------------

    def _predict_noise(self, executor, x: Tensor, timestep: Tensor, model_options: dict, seed: int | None) -> Tensor:
        sigma = float(timestep.max())
        if sigma not in self.recorded.steps:
            step, steps = step_of(sigma, model_options)
            iterations = self.settings.iterations_at(step, steps)
            masks = {}
            if iterations and not self._at_an_end():
                masks = self._search(executor, x, timestep, model_options, seed, step, iterations)
            self.recorded.add(sigma, masks)
        if self.recorded.steps[sigma]:
            model_options = with_attachment(model_options, Attachment(RecordedSource(self.recorded), 1.0))
        return executor(x, timestep, model_options, seed)

    def _at_an_end(self) -> bool:
        if self._began is None:
            self._began = time.monotonic()
        return self._falls >= 2 or self._out_of_time()

    def _out_of_time(self) -> bool:
        return 0 < self.settings.seconds < time.monotonic() - self._began

    def _search(self, executor, x, timestep, model_options, seed, step: int, iterations: int) -> dict[str, Tensor]:
        """The best masks of this step; the latent is changed in place where it is searched, too."""
        groups, shift = self._groups(x)
        masks = self._masks if self.settings.masks else None
        options = self._options(model_options, cached=shift is None)

        def predict() -> Tensor:
            with LeanGraph():
                return executor(x if shift is None else x + shift, timestep, options, seed)

        def current() -> dict[str, Tensor]:
            found = {} if shift is None else {KEY: shift.detach().clone()}
            return found if masks is None else found | masks.bits()

        # The same at all looks of a step, or their scores would not compare.
        views = views_of(self.settings.views, hash((self.seed, step)) % (1 << 30))

        def judge(estimate: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
            if gradient:
                return self.judge.scores_and_gradient(estimate, views)
            return self.judge.scores(estimate, views), None

        first = len(self.history)
        best = search_step(
            groups=groups,
            redraw=masks.draw if masks is not None else lambda: None,
            predict=predict,
            current=current,
            judge=judge,
            iterations=iterations,
            settings=self.settings,
            report=lambda *seen: self._seen(step, *seen),
        )
        self._watch_for_falls(self.history[first:])
        if shift is not None:
            x.add_(best.items.pop(KEY))
        return best.items

    def _groups(self, x: Tensor) -> tuple[list[Group], Tensor | None]:
        """What is improved at this step: mask logits, the noisy latent, or both."""
        settings, groups, shift = self.settings, [], None
        if settings.masks:
            if self._masks is None:
                noise = self.seed if settings.noise else None
                self._masks = SearchedMasks(self.structure, self.images, settings.start, x.device, noise)
            else:
                self._masks.restart(settings.carry)
            leaves = list(self._masks.logits.values())
            if settings.optimiser == "AdamW":
                groups.append(Group(leaves, torch.optim.AdamW(leaves, lr=settings.lr), normalised=False))
            else:
                descent = torch.optim.SGD(leaves, lr=settings.lr, momentum=settings.momentum)
                groups.append(Group(leaves, descent, normalised=True))
        if settings.latent_lr:
            shift = torch.zeros_like(x).requires_grad_()
            groups.append(Group([shift], torch.optim.Adam([shift], lr=settings.latent_lr), normalised=True))
        return groups, shift

    def _options(self, model_options: dict, cached: bool) -> dict:
        """Options of the search's own calls: masked, with one encoder pass, and one branch where that is enough."""
        if self.settings.branches == "positive" and "sampler_calc_cond_batch_function" not in model_options:
            unmasked = model_options
            model_options = model_options | {
                "sampler_calc_cond_batch_function": _PositiveBranch(unmasked, fixed=cached)
            }
        if self.settings.masks:
            model_options = with_attachment(model_options, Attachment(self._masks, 1.0))
        self.encoder = EncoderCache() if cached else LiveEncoder()
        of_calls = with_lean_attention(model_options["transformer_options"]) | {ENCODER: self.encoder}
        return model_options | {"transformer_options": of_calls}

    # What was seen ----------------------------------------------------------------------------------------------

    def _seen(self, step: int, iteration: int, scores: Tensor, estimate: Tensor) -> bool:
        watched = None if self._watch is None else self._watch(estimate).cpu()
        evaluation = Evaluation(step, iteration, scores.cpu(), watched)
        self.history.append(evaluation)
        if self._report is not None:
            self._report(evaluation, estimate)
        return not self._out_of_time()

    def _watch_for_falls(self, seen: list[Evaluation]) -> None:
        if self._watch is None or not self._stop_by_watch:
            return
        chosen = max(seen, key=lambda evaluation: float(evaluation.scores.mean()))
        fell = bool(chosen.watched.mean() < seen[0].watched.mean())
        self._falls = self._falls + 1 if fell else 0


class _PositiveBranch:
    """Masks act on the positive branch of guidance alone.

    fixed: the latent stays as it is, so that the negative branch is computed once, and without gradients.
    """

    def __init__(self, unmasked: dict, fixed: bool):
        self._unmasked, self._fixed = unmasked, fixed
        self._negative: Tensor | None = None

    def __call__(self, arguments: dict) -> list[Tensor]:
        from comfy.samplers import calc_cond_batch

        positive, negative = arguments["conds"]
        model, x, sigma = arguments["model"], arguments["input"], arguments["sigma"]
        options = {k: v for k, v in arguments["model_options"].items() if k != "sampler_calc_cond_batch_function"}
        if self._negative is None or not self._fixed:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self._fixed):
                self._negative = calc_cond_batch(model, [negative], x, sigma, self._unmasked)[0]
        return [calc_cond_batch(model, [positive], x, sigma, options)[0], self._negative]
