"""The search inside the host's samplers: a PREDICT_NOISE wrapper that improves the masks before each step is taken.

So every sampler, scheduler, guidance and ControlNet of the host works as it does without the search.
"""

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..models.families import family_of
from ..models.families.transformer import Transformer
from ..models.structure import Structure
from ..records.recorded import RecordedMasks, RecordedSource
from ..seam.attach import Attachment, structure_of, with_attachment, with_masks
from ..seam.gradients import LeanGraph, kept_weights
from ..seam.latent import SamplerLatent, before_each_call
from ..seam.sampling import SEARCH, NoRoomForGradients, controls_of, has_hooks, loaded_with_room, mutable, step_of
from ..seam.state import CallState
from .attention import RewardAlone, RewardAndAttention, losses_to_follow
from .graph import FixedBranches, StepGraph, TransformerGraph, UNetGraph, computed_once
from .judge import Judge, views_of
from .loop import Evaluation, Group, search_step
from .masks import SearchedMasks
from .memory import PeakMeter, dtype_of_logits, keeps_ways
from .settings import SearchSettings


class RewardSearch:
    """A search during one sampling run of the MODEL that `searching` gives.

    model: what is sampled with; the search does not keep it. judge: of estimates in the model's latent space, for a
    batch of `images`. structure: of what may be masked, by default that of `targets`. watch: scores `[N]` of estimates
    by a reward that is never optimised; the run goes on without updates once it has fallen at two steps in a row at
    which the optimised one rose, if `stop_by_watch`. report: called with each look (an Evaluation and the estimate);
    raises to stop everything. recompute: whether layers run again in the backward pass, see StepGraph; None for
    transformers, and where memory is scarcer than time, on all devices but the CPU. room: bytes that the host is asked
    to leave free for gradients when it loads the models. After the run `recorded` holds the masks, `history` what was
    seen, `skipped` how many updates of an image were left out because a number was not finite, and `peak` the bytes
    that a look took beside the models, 0 where the device does not tell.
    """

    def __init__(
        self,
        model: Any,
        settings: SearchSettings,
        judge: Judge,
        images: int,
        *,
        targets: str = "decoder attention",
        structure: Structure | None = None,
        seed: int = 0,
        watch: Callable[[Tensor], Tensor] | None = None,
        stop_by_watch: bool = False,
        report: Callable[[Evaluation, Tensor], None] | None = None,
        recompute: bool | None = None,
        room: int = 0,
    ):
        self.settings, self.judge, self.images, self.seed = settings, judge, images, seed
        self.structure = structure_of(model, targets) if structure is None else structure
        self.recorded = RecordedMasks(self.structure, images, targets=targets, branches=settings.branches)
        self.history: list[Evaluation] = []
        self.skipped = 0
        self._watch, self._stop_by_watch, self._report = watch, stop_by_watch, report
        self.peak = 0
        self._recompute, self._room = recompute, room
        self._losses = losses_to_follow(model, settings.attention_weight)
        self._masks: SearchedMasks | None = None
        self._latent: SamplerLatent | None = None
        self._falls = 0
        self._began: float | None = None

    def searching(self, model: Any) -> Any:
        """A clone of a MODEL whose next sampling run is searched."""
        from comfy.patcher_extension import WrappersMP

        clone = with_masks(model)
        clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, SEARCH, partial(loaded_with_room, self._room))
        clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, SEARCH, self._predict_noise)
        if self.settings.latent_lr:
            clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, SEARCH, self._note_latents)
        return clone

    def close(self) -> None:
        """Let go of what lies on the device."""
        self._masks = self._latent = None

    # A call of the sampler --------------------------------------------------------------------------------------

    def _note_latents(self, executor, *args: Any, **kwargs: Any) -> Tensor:
        """SAMPLER_SAMPLE wrapper: the latents that the sampler holds are known before its model is asked about them."""

        def note(latent: SamplerLatent) -> None:
            self._latent = latent

        with before_each_call(executor.class_obj, note):
            return executor(*args, **kwargs)

    def _predict_noise(self, executor, x: Tensor, timestep: Tensor, model_options: dict, seed: int | None) -> Tensor:
        sigma = float(timestep.max())
        if sigma not in self.recorded.steps:
            step, steps = step_of(sigma, model_options)
            iterations = self.settings.iterations_at(step, steps)
            masks = {}
            if iterations and not self._at_an_end():
                masks = self._search(executor, x, timestep, model_options, seed, step, iterations)
            self.recorded.add_packed(sigma, masks)
        if self.recorded.steps[sigma]:
            model_options = with_attachment(model_options, Attachment(RecordedSource(self.recorded)))
        return executor(x, timestep, model_options, seed)

    def _at_an_end(self) -> bool:
        if self._began is None:
            self._began = time.monotonic()
        return self._falls >= 2 or self._out_of_time()

    def _out_of_time(self) -> bool:
        return 0 < self.settings.seconds < time.monotonic() - self._began

    def _search(self, executor, x, timestep, model_options, seed, step: int, iterations: int) -> dict[str, Tensor]:
        """The best masks of this step, packed; the sampler's latent is changed where it is searched, too."""
        guider = executor.class_obj
        conditions = list(guider.conds.values())
        groups, shift = self._groups(x, guider.inner_model)
        masks = self._masks if self.settings.masks else None
        graph = self._graph(guider, masks, fixed=shift is None)
        options = self._options(graph, model_options, fixed=shift is None)
        state = CallState(model_options, x.device)
        look = self._look(guider, model_options, state)

        def predict() -> Tensor:
            # Each look sees what the sampler's own call is going to see.
            state.restore()
            with LeanGraph():
                seen = x if shift is None else x + self._latent.seen_change(shift)
                return look.joined(executor(seen, timestep, graph.of_a_look(options), seed), seen, timestep)

        def current() -> dict[str, Tensor]:
            found = {} if shift is None else {SEARCH: shift.detach().clone()}
            return found if masks is None else found | masks.bits()

        # The same at all looks of a step, or their scores would not compare.
        views = views_of(self.settings.views, hash((self.seed, step)) % (1 << 30))

        def judge(seen: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
            estimate, losses = look.parted(seen)
            if gradient:
                return look.scored(*self.judge.scores_and_gradient(estimate, views), losses)
            return look.scored(self.judge.scores(estimate, views), None, losses)

        first = len(self.history)
        meter = PeakMeter(x.device)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(mutable(model_options, graph.writes_in_place))
                controls = controls_of(conditions)
                if shift is None:
                    stack.enter_context(computed_once(controls))
                else:
                    stack.enter_context(kept_weights(m.model for c in controls for m in c.get_models_only_self()))
                best = search_step(
                    groups=groups,
                    redraw=masks.draw if masks is not None else lambda: None,
                    predict=predict,
                    current=current,
                    judge=judge,
                    iterations=iterations,
                    settings=self.settings,
                    report=partial(self._seen, step, look),
                    skipped=self._count_skipped,
                )
        except torch.OutOfMemoryError:
            raise NoRoomForGradients(self._what_to_lower()) from None
        state.restore()
        self.peak = max(self.peak, meter.bytes)
        self._watch_for_falls(self.history[first:])
        if shift is not None:
            change = best.items.pop(SEARCH)
            if self._latent.masked:
                x.add_(self._latent.seen_change(change))
            self._latent.value.add_(change)
        return best.items

    def _look(self, guider: Any, model_options: dict, state: CallState) -> RewardAlone:
        """What each look of a step asks."""
        if not self._losses:
            return RewardAlone()
        options = with_attachment(model_options, Attachment(self._masks)) if self.settings.masks else model_options
        lent = not _on_cpu(guider) or has_hooks(guider.conds.values())
        return RewardAndAttention(self._losses, self.settings.attention_weight, guider, options, state.restore, lent)

    def _graph(self, guider: Any, masks: SearchedMasks | None, fixed: bool) -> StepGraph:
        """fixed: whether the latent stays as it is."""
        model, on_cpu = guider.inner_model.diffusion_model, _on_cpu(guider)
        hooks = has_hooks(guider.conds.values())
        family = family_of(model)
        learned = {} if masks is None else masks.logits
        # A block of a transformer costs no more where it runs again, because its forward pass is then a plain one.
        again = not on_cpu or isinstance(family, Transformer)
        if self._recompute is not None:
            again = self._recompute
        # Weights that change from call to call are not the same in the backward pass.
        options = {"fixed": fixed, "recompute": again and not hooks, "lent": not on_cpu or hooks}
        if isinstance(family, Transformer):
            return TransformerGraph(family, model, self.structure, learned, **options)
        return UNetGraph(model, self.structure, **options)

    def _groups(self, x: Tensor, model: Any) -> tuple[list[Group], Tensor | None]:
        """What is improved at this step: mask logits, the noisy latent, or both."""
        settings, groups, shift = self.settings, [], None
        if settings.masks:
            if self._masks is None:
                noise = self.seed if settings.noise else None
                positive_only = settings.branches == "positive"
                ways = keeps_ways(settings, model.diffusion_model)
                dtype = dtype_of_logits(settings, model.get_dtype_inference(), ways)
                start = (self.structure, self.images, settings.start, x.device)
                self._masks = SearchedMasks(*start, noise, positive_only, dtype, ways)
            else:
                self._masks.restart(settings.carry)
            leaves = list(self._masks.logits.values())
            if settings.optimiser == "AdamW":
                groups.append(Group(leaves, partial(torch.optim.AdamW, lr=settings.lr), normalised=False))
            else:
                descent = partial(torch.optim.SGD, lr=settings.lr, momentum=settings.momentum)
                groups.append(Group(leaves, descent, normalised=True))
        if settings.latent_lr:
            shift = torch.zeros_like(x).requires_grad_()
            groups.append(Group([shift], partial(torch.optim.Adam, lr=settings.latent_lr), normalised=True))
        return groups, shift

    def _options(self, graph: StepGraph, model_options: dict, fixed: bool) -> dict:
        """Options of the search's own calls: masked, with gradients, and one branch where that is enough."""
        options = graph.options(model_options)
        foreign = "sampler_calc_cond_batch_function" in model_options
        if self.settings.branches == "positive" and fixed and not foreign:
            options = options | {"sampler_calc_cond_batch_function": FixedBranches(options)}
        if self.settings.masks:
            options = with_attachment(options, Attachment(self._masks))
        return options

    def _what_to_lower(self) -> str:
        changes = ["lower the size or the batch"]
        if self.settings.branches != "positive":
            changes.append("set branches to positive (preset quality has it)")
        if not self.settings.small_decode:
            changes.append("switch small_decode on (preset quality has it)")
        changes += ["connect a TAESD to gradient_vae", "load the reward in fp16 and with checkpointing"]
        changes.append("close other programs that use the device")
        return (
            "The search ran out of the device's memory while it looked for masks. What makes it smaller: "
            f"{', '.join(changes)}. Preset fast needs no more than plain sampling."
        )

    # What was seen ----------------------------------------------------------------------------------------------

    def _count_skipped(self, count: int) -> None:
        self.skipped += count

    def _seen(self, step: int, look: RewardAlone, iteration: int, scores: Tensor, seen: Tensor) -> bool:
        estimate, losses = look.parted(seen)
        watched = None if self._watch is None else self._watch(estimate).cpu()
        losses = None if losses is None else losses.cpu()
        evaluation = Evaluation(step, iteration, scores.cpu(), watched, losses, look.weight)
        self.history.append(evaluation)
        if self._report is not None:
            self._report(evaluation, estimate)
        return not self._out_of_time()

    def _watch_for_falls(self, seen: list[Evaluation]) -> None:
        if self._watch is None or not self._stop_by_watch:
            return
        chosen = max(seen, key=lambda evaluation: float(evaluation.scores.nan_to_num(-torch.inf).mean()))
        fell = bool(chosen.watched.mean() < seen[0].watched.mean())
        self._falls = self._falls + 1 if fell else 0


def _on_cpu(guider: Any) -> bool:
    import comfy.model_management

    return comfy.model_management.is_device_cpu(guider.model_patcher.load_device)
