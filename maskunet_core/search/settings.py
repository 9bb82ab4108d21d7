"""How masks are searched for: hyper-parameters, and the presets."""

from dataclasses import dataclass

from ..choices import BRANCHES

OPTIMISERS = ("normalised SGD", "AdamW")
SMALL_SIDE = 224
"""Side in pixels of what `small_decode` decodes: as the published rewards look at it."""


@dataclass(frozen=True)
class SearchSettings:
    """Hyper-parameters of algorithm 1, for each step of the sampler.

    iterations: updates at a step from `start_percent` to `end_percent`, where 0 is the first step and 1 the last;
    early_iterations: at a step before that. optimiser: AdamW as in the paper, or SGD on gradients that are divided by
    their root mean square over all logits of an image, with `momentum`. lr: in units of logits. start: logit of every
    weight; those above 0 are kept. noise: Gumbel noise on the logits. clip: of the gradient's norm per image, 0 for
    none. keep_best: a step is taken with the best masks seen, else with the last. carry: share of what was learned at a
    step that the next begins with. patience: iterations of a step without a better reward before it stops, 0 for any;
    target: reward that is good enough, None to go on. views: shifted, blurred and noised copies that the reward is
    averaged over, against reward hacking. branches: of classifier-free guidance that are masked; with the positive one
    alone an iteration costs half. small_decode: the reward looks at a picture no larger than it needs. latent_lr: of
    the noisy latent itself, which is then changed along with the masks (Adam); 0 leaves it alone. masks: off searches
    by `latent_lr` and candidates alone. candidates: starting noises that are drawn and judged first; candidate_percent:
    share of the steps after which they are judged by their estimates; at 1, and where nothing else is searched for,
    they are drawn to the end. seconds: after which no iteration begins, 0 for no limit. attention_weight: of the losses
    of the model's attention guidance, which are subtracted from the reward of each look, but not from a candidate's; 0
    asks the reward alone.
    """

    iterations: int = 10
    early_iterations: int = 0
    start_percent: float = 0.0
    end_percent: float = 1.0
    optimiser: str = OPTIMISERS[0]
    lr: float = 3e-2
    momentum: float = 0.9
    start: float = 1.0
    noise: bool = False
    clip: float = 0.0
    keep_best: bool = True
    carry: float = 0.0
    patience: int = 0
    target: float | None = None
    views: int = 0
    branches: str = BRANCHES[0]
    small_decode: bool = False
    latent_lr: float = 0.0
    masks: bool = True
    candidates: int = 1
    candidate_percent: float = 1.0
    seconds: float = 0.0
    attention_weight: float = 0.0

    def iterations_at(self, step: int, steps: int) -> int:
        """Updates at `step` of `steps`, counted from 0; none where there is nothing to improve."""
        if not (self.masks or self.latent_lr):
            return 0
        position = step / (steps - 1) if steps > 1 else 1.0
        if position < self.start_percent:
            return self.early_iterations
        return self.iterations if position <= self.end_percent else 0

    def candidate_steps(self, steps: int) -> int:
        """After how many of the steps a candidate is judged."""
        if not (self.masks or self.latent_lr):
            return steps
        return max(1, min(steps, round(self.candidate_percent * steps)))

    def total_iterations(self, steps: int) -> int:
        return sum(self.iterations_at(step, steps) for step in range(steps))


PRESETS = {
    # The paper: 15 at each of 15 steps, AdamW at 1e-2, logits begin at 1, Gumbel noise, the last masks.
    "paper": SearchSettings(iterations=15, optimiser="AdamW", lr=1e-2, noise=True, keep_best=False),
    # The authors' release: 1 at each of the first 7 of 15 steps, 10 at each later one.
    "reference": SearchSettings(
        iterations=10, early_iterations=1, start_percent=7 / 15, optimiser="AdamW", lr=1e-2, noise=True, keep_best=False
    ),
    # By trials on the toy model: many candidates, judged when half is drawn, then gentle updates of the best. Faster
    # rates, earlier steps and masks that carry over please the reward more and leave dirt in the image. At the price of
    # 4 images no number of updates was worth the candidates that it would have cost.
    "fast": SearchSettings(candidates=6, candidate_percent=0.47, iterations=0, small_decode=True),
    "quality": SearchSettings(
        candidates=14,
        candidate_percent=0.47,
        iterations=6,
        start_percent=0.45,
        lr=1e-2,
        views=1,
        branches="positive",
        small_decode=True,
        patience=6,
    ),
    # Distilled models (Turbo, LCM, Lightning: 1 to 8 steps, CFG 1): a whole image is cheap, and its first estimate
    # tells little of what the noise of later steps makes of it. At the last step the estimate is the image.
    "few_step": SearchSettings(
        candidates=16,
        iterations=8,
        start_percent=1.0,
        lr=3e-2,
        branches="positive",
        small_decode=True,
    ),
}
