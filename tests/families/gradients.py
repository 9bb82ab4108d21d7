"""Gradients of masks inside the host's sampler, as the search takes them, and in other ways to compare with."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maskunet_core.models.families import family_of
from maskunet_core.models.structure import Structure
from maskunet_core.seam.attach import Attachment, with_attachment, with_masks
from maskunet_core.seam.gradients import LeanGraph, ordinary_tensors
from maskunet_core.seam.sampling import loaded_with_room, mutable
from maskunet_core.search.graph import TransformerGraph
from maskunet_core.search.masks import SearchedMasks
from tests.families.models import Tiny, conditioning, noises

CFG = 3.0


@dataclass(frozen=True)
class Found:
    """gradients: of the logits by layer. of_latent: where the latent is searched for, too."""

    estimate: Tensor
    gradients: dict[str, Tensor]
    of_latent: Tensor | None

    def equals(self, other: "Found") -> bool:
        """Bit for bit. A layer without a gradient equals none."""
        latents = self.of_latent is None or torch.equal(self.of_latent, other.of_latent)
        pairs = [(gradient, other.gradients[name]) for name, gradient in self.gradients.items()]
        return latents and torch.equal(self.estimate, other.estimate) and all(torch.equal(*pair) for pair in pairs)


class _Done(Exception):
    """Leaves the sampler."""


def inside_a_step(model: Any, tiny: Tiny, look: Callable, seeds: tuple[int, ...] = (5, 6), cfg: float = CFG) -> Any:
    """What `look` gives for the sampler's second step; it is called as a PREDICT_NOISE wrapper is.

    Outside of inference mode, as a search runs, with texts and weights as nodes leave them.
    """
    import comfy.sample
    from comfy.patcher_extension import WrappersMP

    found, calls = [], []

    def wrapper(executor, *args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            return executor(*args)
        found.append(look(executor, *args))
        raise _Done

    looked_at = with_masks(model)
    looked_at.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "look", wrapper)
    looked_at.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "look", partial(loaded_with_room, 0))
    noise = noises(tiny, seeds)
    texts = (ordinary_tensors(conditioning(tiny, seed)) for seed in (3, 4))
    settings = (3, cfg, "euler", "simple", *texts, torch.zeros_like(noise))
    with torch.inference_mode(False), torch.no_grad(), contextlib.suppress(_Done):
        comfy.sample.sample(looked_at, noise, *settings, disable_pbar=True, seed=5)
    return found[0]


class Look:
    """Looks at an estimate, and takes the gradients of masks of some random logits.

    recompute, lent, fixed: as in TransformerGraph. looks: how many are taken with the same latent; the last is told.
    """

    def __init__(
        self,
        structure: Structure,
        recompute: bool = True,
        lent: bool = True,
        fixed: bool = True,
        looks: int = 1,
        images: int = 2,
    ):
        self.structure, self.images, self.looks = structure, images, looks
        self.graph_options = {"recompute": recompute, "lent": lent, "fixed": fixed}
        self.masks = SearchedMasks(structure, images, 1.0, torch.device("cpu"))
        stream = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for logits in self.masks.logits.values():
                logits.add_(torch.randn(logits.shape, generator=stream))

    def __call__(self, executor, x: Tensor, timestep: Tensor, model_options: dict, seed: int) -> Found:
        model = executor.class_obj.inner_model.diffusion_model
        learned = self.masks.logits
        graph = TransformerGraph(family_of(model), model, self.structure, learned, **self.graph_options)
        options = with_attachment(graph.options(model_options), Attachment(self.masks))
        x = x.clone().requires_grad_(not self.graph_options["fixed"])
        leaves = [*learned.values(), *([] if self.graph_options["fixed"] else [x])]
        with mutable(options, graph.writes_in_place):
            for _ in range(self.looks):
                with torch.enable_grad(), LeanGraph():
                    estimate = executor(x, timestep, options, seed)
                found = torch.autograd.grad(estimate, leaves, weights_of(estimate), allow_unused=True)
        return Found(estimate.detach().clone(), dict(zip(learned, found)), found[-1] if x.requires_grad else None)


def weights_of(estimate: Tensor) -> Tensor:
    """Of the estimate's numbers in the scalar whose gradients are taken."""
    return torch.randn(estimate.shape, generator=torch.Generator().manual_seed(9))
