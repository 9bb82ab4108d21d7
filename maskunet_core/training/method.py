"""What is trained on a frozen base: a mask generator. The trainer has other methods, its baselines.

A method owns its parameters, says how they act on the model while training and while sampling, and writes a file.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import checkpoint
from ..masks.call import Call
from ..masks.generator import LowRankGenerator, LowRankSettings
from ..masks.reference import ReferenceGenerator, authors_maps
from ..masks.sources import GeneratorMasks, LearningGenerator
from ..models.structure import Structure
from ..seam.attach import attach, structure_of
from ..seam.layers import masked, modules_of
from .base import BaseModel, Learned
from .settings import Settings


class MaskCounts:
    """Keep ratio, and the share of weights whose bit differs inside a batch, per layer of the calls since `reset`."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        # Per layer: [kept, differing] on the mask's device, so that no layer waits for it; [bits, weights].
        self._counted: dict[str, Tensor] = {}
        self._sizes: dict[str, tuple[int, int]] = {}

    def __call__(self, layer: str, mask: Tensor) -> None:
        bits = mask.detach() > 0.5
        counted = torch.stack([bits.sum(), (bits.any(0) & ~bits.all(0)).sum()])
        before, (total, weights) = self._counted.get(layer), self._sizes.get(layer, (0, 0))
        self._counted[layer] = counted if before is None else before + counted
        self._sizes[layer] = total + bits.numel(), weights + bits[0].numel()

    def _totals(self) -> list[int]:
        """[kept, differing] of all layers."""
        return torch.stack(list(self._counted.values())).sum(0).tolist() if self._counted else [0, 0]

    @property
    def keep_ratio(self) -> float:
        return self._totals()[0] / max(1, sum(total for total, _ in self._sizes.values()))

    @property
    def share_differing(self) -> float:
        return self._totals()[1] / max(1, sum(weights for _, weights in self._sizes.values()))

    @property
    def keep_ratio_per_layer(self) -> dict[str, float]:
        if not self._counted:
            return {}
        kept = torch.stack(list(self._counted.values()))[:, 0].tolist()
        return {layer: count / self._sizes[layer][0] for layer, count in zip(self._counted, kept)}


class Method:
    """What all methods share. base: the frozen model; module: the trained parameters."""

    statistics: MaskCounts | None = None
    module: nn.Module
    destination = ("maskunet", "press R in ComfyUI and choose it in MaskUNet Loader")
    """ComfyUI's folder of models that the file belongs into, and what is to be done with it there."""

    def __init__(self, base: BaseModel, config: Settings):
        self.base, self.config = base, config
        self.structure = structure_of(base.patcher, config.targets)
        self.modules = modules_of(base.unet)

    @contextlib.contextmanager
    def _passes(self, training: bool, learned: Learned) -> Iterator[None]:
        """Around a call of the model and, while training, its backward pass."""
        if not training:
            yield
            return
        again = self.config.loop.checkpointing
        with self.base.differentiable(), self.base.recomputed(learned) if again else self.base.kept():
            yield

    def observe(self, on: bool) -> None:
        """Collect statistics from now on, or stop; nothing to see in most methods."""

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """The base is as it was before training, for one call of the U-Net: what `acting` is compared with."""
        yield

    @contextlib.contextmanager
    def idle_sampling(self) -> Iterator[Any]:
        """Yields a MODEL as it was before training: what `sampling` is compared with."""
        yield self.base.patcher

    def prompt(self, text: str) -> str:
        """A prompt of the configuration as the host's prompts spell it."""
        return text

    def example(self, count: int) -> dict[str, Tensor]:
        """The conditions of `count` samples of a training step, to measure what a step takes."""
        empty = self.base.encode_text("")
        return {key: value.expand(count, *value.shape) for key, value in empty.items()}

    def files(self, result: Path) -> dict[Path, tuple[str, str]]:
        """What `save` writes for the file of a run, and for each the folder of ComfyUI's models and its use."""
        return {result: self.destination}


def _new_generator(structure: Structure, unet: nn.Module, config: Settings) -> LowRankGenerator | ReferenceGenerator:
    settings = config.generator
    if settings.architecture == ReferenceGenerator.architecture:
        generator = ReferenceGenerator(structure, authors_maps(structure, unet))
        generator.start_training(settings.start, settings.freed)
        return generator
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(LowRankSettings)}
    if config.method == "static_mask":
        values["rank"] = 0
    return LowRankGenerator(structure, LowRankSettings(**values))


class MaskMethod(Method):
    """`maskunet`, and `static_mask`, which is a generator of rank 0. Its file is what MaskUNet Loader reads."""

    def __init__(self, base: BaseModel, config: Settings):
        super().__init__(base, config)
        torch.manual_seed(config.seed)
        self.module = _new_generator(self.structure, base.unet, config)
        self.statistics = MaskCounts()
        self.source = LearningGenerator(self.module, config.generator.noise)

    def groups(self) -> list[dict[str, Any]]:
        """The static bias learns faster than the rest: it has to carry logits across the threshold."""
        static = self.module.static_parameters()
        chosen = {id(p) for p in static}
        dynamic = [p for p in self.module.parameters() if id(p) not in chosen]
        settings = self.config.optimiser
        groups = [{"params": static, "lr": settings.lr_bias}, {"params": dynamic, "lr": settings.lr}]
        return [group for group in groups if group["params"]]

    def observe(self, on: bool) -> None:
        self.statistics.reset()
        self.source.observe = self.statistics if on else None

    @contextlib.contextmanager
    def acting(self, training: bool = True) -> Iterator[None]:
        """The method acts on the U-Net, for one call of it and, while training, its backward pass."""
        source = self.source if training else GeneratorMasks(self.module, observe=self.source.observe)
        call = Call()

        def learned(block: str) -> list[Tensor]:
            return [leaf for of_source in call.leaves for leaf in of_source(block)]

        with self._passes(training, learned), masked(self.modules, [(source, 1.0)], call):
            yield

    @contextlib.contextmanager
    def sampling(self) -> Iterator[Any]:
        """Yields a MODEL on which the method acts as the nodes apply it."""
        yield attach(self.base.patcher, GeneratorMasks(self.module), 1.0, 0.0, 1.0)

    def save(self, path: Path, record: dict[str, Any]) -> None:
        checkpoint.save(path, self.module, self.config.targets, record)
