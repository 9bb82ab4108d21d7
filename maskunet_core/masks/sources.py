"""Where masks come from while a diffusion model runs: a trained generator, or chance."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from ..models.structure import Structure
from .linear import MaskLogits, shared_by_all_samples, thresholded_linear


@dataclass
class Call:
    """One call of the diffusion model.

    sigma: of this step, None outside a sampler. guidance: the branches of classifier-free guidance in the batch, 0 for
    positive and 1 for negative; the batch holds all images of the first, then all of the next. on_block: whoever wants
    to know what enters a block; called with the block's name, the feature map [B, C, H, W] and t_emb [B, E], before the
    block's layers ask for masks.
    """

    sigma: float | None
    guidance: tuple[int, ...] = (0,)
    on_block: list[Callable[[str, Tensor, Tensor], None]] = field(default_factory=list)

    def enter(self, block: str, features: Tensor, t_emb: Tensor) -> None:
        for tell in self.on_block:
            tell(block, features, t_emb)


class MaskSource(Protocol):
    """Gives masks for the layers of its structure. Holds no state of a call: `begin` starts one."""

    structure: Structure
    learning = False

    def begin(self, call: Call) -> Callable[[str, Tensor], Tensor | None]:
        """Returns `mask(layer, weight)`, called when the layer's block was entered: [out, in] where all samples share
        the mask, [B, out, in] where each has its own, None where everything is kept.
        """


class LearningSource(Protocol):
    """Masks that are being learned: they carry gradients, and the layers that they act on are computed by the source.

    `begin` returns `linear(layer, x, weight, bias)`, see `thresholded_linear`.
    """

    structure: Structure
    learning = True

    def begin(self, call: Call) -> Callable[[str, Tensor, Tensor, Tensor | None], Tensor]: ...


def noise_generator(device: torch.device, seed: int, layer: int, sigma: float | None) -> torch.Generator:
    """A random stream of its own for every layer and step: the sampler's is never touched.

    It does not depend on the batch, so that a sample's mask does not either.
    """
    step = struct.unpack("<Q", struct.pack("<d", sigma or 0.0))[0]
    state = 0
    for key in (seed, layer, step):
        state = (state * 6_364_136_223_846_793_005 + key + 1_442_695_040_888_963_407) % (1 << 63)
        # On a CPU torch looks at the lower half alone, in which a float32's bits are nearly all zero.
        state ^= state >> 32
    return torch.Generator(device).manual_seed(state)


class _Conditions:
    """What a generator makes of the blocks that were entered in one call: the condition of each of their layers.

    learning: gradients reach the generator's weights. Without it none do, also where others flow through the model.
    """

    def __init__(self, generator: nn.Module, call: Call, learning: bool = False):
        self.generator, self.learning = generator, learning
        self._blocks = {block.name: block for block in generator.structure.blocks}
        self._found: dict[str, Tensor] = {}
        call.on_block.append(self._enter)

    # Logits are compared with a threshold: under autocast many would be rounded across it.
    def _enter(self, block: str, features: Tensor, t_emb: Tensor) -> None:
        if block in self._blocks:
            with torch.autocast(features.device.type, enabled=False), self._gradients():
                self._found.update(self.generator.condition(self._blocks[block], features, t_emb))

    def _gradients(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(self.learning and torch.is_grad_enabled())

    def logits(self, layer: str) -> MaskLogits:
        condition = self._found[layer]
        with torch.autocast(condition.device.type, enabled=False), self._gradients():
            return self.generator.layer_logits(layer, condition)


class GeneratorMasks:
    """Masks of a mask generator (`LowRankGenerator`, `ReferenceGenerator`).

    seed: draws instead of taking the likelier decision, with noise that all samples of a step share; None does not.
    observe: called with (layer, mask) for statistics.
    """

    learning = False

    def __init__(
        self, generator: nn.Module, seed: int | None = None, observe: Callable[[str, Tensor], None] | None = None
    ):
        self.generator = generator
        self.structure = generator.structure
        self.seed = seed
        self.observe = observe
        self._order = {name: index for index, name in enumerate(self.structure.layers)}

    def _mask(self, layer: str, terms: MaskLogits, sigma: float | None) -> Tensor:
        if self.seed is None:
            return terms.above(self.generator.threshold)
        logits = terms.full()
        stream = noise_generator(logits.device, self.seed, self._order[layer], sigma)
        noise = self.generator.noise(logits.shape[1:], stream, logits.dtype)
        return logits + noise > self.generator.noisy_threshold

    def begin(self, call: Call) -> Callable[[str, Tensor], Tensor]:
        conditions = _Conditions(self.generator, call)

        def mask(layer: str, weight: Tensor) -> Tensor:
            with torch.autocast(weight.device.type, enabled=False), torch.no_grad():
                result = self._mask(layer, conditions.logits(layer), call.sigma)
            if self.observe is not None:
                self.observe(layer, result)
            return shared_by_all_samples(result).to(weight.device)

        return mask


class LearningGenerator:
    """The masks of a generator that is being trained. noise: fresh Gumbel noise per sample. observe: as above."""

    learning = True

    def __init__(self, generator: nn.Module, noise: bool = False):
        self.generator = generator
        self.structure = generator.structure
        self.noise = noise
        self.observe: Callable[[str, Tensor], None] | None = None

    def _noise(self, device: torch.device) -> Callable[[torch.Size], Tensor]:
        seed = int(torch.randint(1 << 62, ()))
        return lambda shape: self.generator.noise(shape, torch.Generator(device).manual_seed(seed), torch.float32)

    def begin(self, call: Call) -> Callable[[str, Tensor, Tensor, Tensor | None], Tensor]:
        conditions = _Conditions(self.generator, call, learning=True)
        threshold = self.generator.noisy_threshold if self.noise else self.generator.threshold

        def linear(layer: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            logits = conditions.logits(layer)
            noise = self._noise(x.device) if self.noise else None
            if self.observe is not None:
                with torch.no_grad():
                    full = logits.full()
                    self.observe(layer, (full if noise is None else full + noise(full.shape)) > threshold)
            return thresholded_linear(x, weight, bias, logits, threshold, self.generator.tau, noise)

        return linear


class RandomMasks:
    """Each weight is kept with probability `keep_ratio`: the paper's figure 1. All samples share the mask.

    per_step: another mask at every sigma; otherwise one for the whole run.
    """

    learning = False

    def __init__(self, structure: Structure, keep_ratio: float, seed: int, per_step: bool):
        self.structure = structure
        self.keep_ratio = keep_ratio
        self.seed = seed
        self.per_step = per_step
        self._order = {name: index for index, name in enumerate(structure.layers)}

    def begin(self, call: Call) -> Callable[[str, Tensor], Tensor]:
        sigma = call.sigma if self.per_step else None

        def mask(layer: str, weight: Tensor) -> Tensor:
            stream = noise_generator(weight.device, self.seed, self._order[layer], sigma)
            return torch.rand(weight.shape, generator=stream, device=weight.device) < self.keep_ratio

        return mask
