"""Where masks come from while a diffusion model runs: a trained generator, one that is being trained, or chance."""

import struct
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ..models.structure import Structure
from .call import Call
from .gumbel import binary_mask
from .linear import LearnedMask, Mask, MaskLogits, shared_by_all_samples, without_autocast

MaskOf = Callable[[str, Tensor], Mask | None]
"""`mask(layer, weight)`, called when the layer's block was entered; None where everything is kept."""


class MaskSource(Protocol):
    """Gives masks for the layers of its structure. Holds no state of a call: `begin` starts one."""

    structure: Structure

    def begin(self, call: Call) -> MaskOf: ...


_WITH_RANDOM_NUMBERS = ("cpu", "cuda", "mps", "xpu")
"""Kinds of devices on which torch draws random numbers itself."""


def noise_generator(device: torch.device, seed: int, layer: int, sigma: float | None) -> torch.Generator:
    """A random stream of its own for every layer and step: the sampler's is never touched.

    It does not depend on the batch, so that a sample's mask does not either. Kinds of devices draw other numbers.
    """
    step = struct.unpack("<Q", struct.pack("<d", sigma or 0.0))[0]
    state = 0
    for key in (seed, layer, step):
        state = (state * 6_364_136_223_846_793_005 + key + 1_442_695_040_888_963_407) % (1 << 63)
        # On a CPU torch looks at the lower half alone, in which a float32's bits are nearly all zero.
        state ^= state >> 32
    return torch.Generator(device if device.type in _WITH_RANDOM_NUMBERS else "cpu").manual_seed(state)


class _Conditions:
    """What a generator makes of the blocks that were entered in one call: the condition of each of their layers.

    learning: gradients reach the generator's weights. Without it none do, also where others flow through the model.
    """

    def __init__(self, generator: nn.Module, call: Call, learning: bool = False):
        self.generator, self.learning = generator, learning
        self._blocks = {block.name: block for block in generator.structure.blocks}
        self._conditions: dict[str, Tensor] = {}
        call.on_block.append(self._enter)

    # Logits are compared with a threshold: under autocast many would be rounded across it.
    def _enter(self, block: str, features: Tensor, t_emb: Tensor) -> None:
        if block in self._blocks:
            with without_autocast(features.device), self._gradients():
                self._conditions.update(self.generator.condition(self._blocks[block], features, t_emb))

    def _gradients(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(self.learning and torch.is_grad_enabled())

    def leaves(self, block: str) -> list[Tensor]:
        """What the masks of a block that was entered are computed from, as far as gradients go."""
        names = [layer.name for layer in self._blocks[block].layers] if block in self._blocks else []
        found = [leaf for name in names for leaf in (self._conditions[name], *self.generator.parameters_of(name))]
        return [leaf for leaf in found if leaf.requires_grad]

    def logits(self, layer: str) -> MaskLogits:
        condition = self._conditions[layer]
        with without_autocast(condition.device), self._gradients():
            return self.generator.layer_logits(layer, condition)


class GeneratorMasks:
    """Masks of a mask generator (`LowRankGenerator`, `ReferenceGenerator`).

    seed: draws instead of taking the likelier decision, with noise that all samples of a step share; None does not.
    observe: called with (layer, mask) for statistics.
    """

    def __init__(
        self, generator: nn.Module, seed: int | None = None, observe: Callable[[str, Tensor], None] | None = None
    ):
        self.generator = generator
        self.structure = generator.structure
        self.seed = seed
        self.observe = observe
        self._order = {name: index for index, name in enumerate(self.structure.layers)}

    def _mask(self, layer: str, terms: MaskLogits, call: Call) -> Tensor:
        if self.seed is None:
            return terms.above(self.generator.threshold)
        logits = terms.full()
        stream = noise_generator(logits.device, self.seed, self._order[layer], call.sigma)
        noise = self.generator.noise(logits.shape[1:], stream, logits.dtype).to(logits.device)
        return binary_mask(logits, self.generator.noisy_threshold, noise)

    def begin(self, call: Call) -> MaskOf:
        conditions = _Conditions(self.generator, call)

        def mask(layer: str, weight: Tensor) -> Tensor:
            with without_autocast(weight.device), torch.no_grad():
                result = self._mask(layer, conditions.logits(layer), call)
            if self.observe is not None:
                self.observe(layer, result)
            return shared_by_all_samples(result).to(weight.device)

        return mask


class LearningGenerator:
    """The masks of a generator that is being trained. noise: fresh Gumbel noise per sample. observe: as above."""

    def __init__(self, generator: nn.Module, noise: bool = False):
        self.generator = generator
        self.structure = generator.structure
        self.noise = noise
        self.observe: Callable[[str, Tensor], None] | None = None

    def _noise(self, device: torch.device) -> Callable[[torch.Size], Tensor]:
        seed = int(torch.randint(1 << 62, ()))
        return lambda shape: self.generator.noise(shape, torch.Generator(device).manual_seed(seed), torch.float32)

    def begin(self, call: Call) -> MaskOf:
        conditions = _Conditions(self.generator, call, learning=True)
        call.leaves.append(conditions.leaves)
        noises: dict[str, Callable[[torch.Size], Tensor]] = {}
        threshold = self.generator.noisy_threshold if self.noise else self.generator.threshold

        def mask(layer: str, weight: Tensor) -> LearnedMask:
            logits = conditions.logits(layer)
            if self.noise and layer not in noises:
                # A layer that runs again in the backward pass gets the same.
                noises[layer] = self._noise(logits.static.device)
            noise = noises.get(layer)
            if self.observe is not None:
                with torch.no_grad():
                    full = logits.full()
                    self.observe(layer, binary_mask(full, threshold, None if noise is None else noise(full.shape)))
            return LearnedMask(logits, threshold, self.generator.tau, noise)

        return mask


class RandomMasks:
    """Each weight is kept with probability `keep_ratio`: the paper's figure 1. All samples share the mask.

    per_step: another mask at every sigma; otherwise one for the whole run.
    """

    def __init__(self, structure: Structure, keep_ratio: float, seed: int, per_step: bool):
        self.structure = structure
        self.keep_ratio = keep_ratio
        self.seed = seed
        self.per_step = per_step
        self._order = {name: index for index, name in enumerate(structure.layers)}

    def begin(self, call: Call) -> MaskOf:
        def mask(layer: str, weight: Tensor) -> Tensor:
            sigma = call.sigma if self.per_step else None
            stream = noise_generator(weight.device, self.seed, self._order[layer], sigma)
            chance = torch.rand(weight.shape, generator=stream, device=stream.device)
            return (chance < self.keep_ratio).to(weight.device)

        return mask
