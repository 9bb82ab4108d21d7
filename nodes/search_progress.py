"""Progress of a reward search on its node: bar, previews, and the reward of now."""

import comfy.model_management
import comfy.utils
import latent_preview
from torch import Tensor

from ..maskunet_core.search.loop import Evaluation
from ..maskunet_core.search.settings import SearchSettings
from .node_text import tell


class SearchProgress:
    """The node's bar over all candidates, steps and updates. node_id: None where nobody looks."""

    def __init__(self, model, settings: SearchSettings, steps: int, node_id: str | None):
        self.steps, self.node_id, self.settings = steps, node_id, settings
        updates = [settings.iterations_at(step, steps) for step in range(steps)]
        self._peeked = settings.candidate_steps(steps)
        drawn = settings.candidates * self._peeked if settings.candidates > 1 else 0
        self._before = [drawn + step + sum(updates[:step]) for step in range(steps + 1)]
        self._candidate = 0 if drawn else None
        ends_there = drawn and self._peeked == steps and not any(updates)
        self.bar = comfy.utils.ProgressBar(drawn if ends_there else self._before[-1])
        self._previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self._done = 0

    def tell(self, text: str) -> None:
        """A line of text on the node."""
        tell(text, self.node_id)

    def _show(self, done: int, estimate: Tensor) -> None:
        # Samplers that look twice at a step ask for an earlier step again.
        self._done = max(self._done, done)
        preview = self._previewer.decode_latent_to_preview_image("JPEG", estimate) if self._previewer else None
        self.bar.update_absolute(self._done, preview=preview)

    def step(self, step: int, x0: Tensor, x: Tensor, steps: int) -> None:
        """The host's callback after each step."""
        # Some samplers take more steps than planned.
        if self._candidate is None:
            self._show(self._before[min(step + 1, self.steps)], x0)
        else:
            self._show(self._candidate * self._peeked + min(step + 1, self._peeked), x0)

    def candidate(self, number: int, scores: Tensor) -> None:
        """A candidate was judged."""
        count = self.settings.candidates
        self.tell(f"candidate {number + 1} of {count}: reward {numbers(scores)}")
        self._candidate = number + 1 if number + 1 < count else None

    def look(self, seen: Evaluation, estimate: Tensor) -> None:
        """After each look at an estimate; raises where the user cancelled."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._show(self._before[seen.step] + seen.iteration, estimate)
        attention = "" if seen.losses is None else f", attention loss {numbers(seen.losses)}"
        told = f"reward {numbers(seen.rewards)}{attention}"
        self.tell(f"step {seen.step + 1} of {self.steps}, update {seen.iteration}: {told}")


def numbers(scores: Tensor) -> str:
    """Scores in words, the first four of them."""
    shown = ", ".join(f"{float(score):.3f}" for score in scores[:4])
    return shown + (", ..." if len(scores) > 4 else "")
