"""Where masks come from while a diffusion model runs: a trained generator, or chance."""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from .families import Structure
from .gumbel import straight_through
from .masked_linear import shared_by_all_samples


@dataclass
class Call:
    """One call of the diffusion model.

    sigma: of this step, None outside a sampler. branches: of CFG that are computed together; the batch holds all images
    of the first, then those of the next. on_block: whoever wants to know what enters a block; called with the
    block's name, the feature map [B, C, H, W] and t_emb [B, E], before the block's layers ask for masks.
    """

    sigma: float | None
    branches: int = 1
    on_block: list[Callable[[str, Tensor, Tensor], None]] = field(default_factory=list)

    def enter(self, block: str, features: Tensor, t_emb: Tensor) -> None:
        for tell in self.on_block:
            tell(block, features, t_emb)


class MaskSource(Protocol):
    """Gives masks for the layers of its structure. Holds no state of a call: `begin` starts one."""

    structure: Structure
    trainable: bool

    def begin(self, call: Call) -> Callable[[str, Tensor], Tensor | None]:
        """Returns `mask(layer, weight)`, called when the layer's block was entered: [out, in] where all samples share
        the mask, [B, out, in] where each has its own, None where everything is kept.

        Where the source is `trainable`, masks carry gradients, and the same call may ask for one again (with the
        global random state as it was) to compute it anew in the backward pass.
        """


def noise_generator(device: torch.device, seed: int, layer: int, sigma: float | None) -> torch.Generator:
    """A random stream of its own for every layer and step: the sampler's is never touched.

    It does not depend on the batch, so that a sample's mask does not either.
    """
    step = struct.unpack("<Q", struct.pack("<d", sigma or 0.0))[0]
    state = 0
    for key in (seed, layer, step):
        state = (state * 6_364_136_223_846_793_005 + key + 1_442_695_040_888_963_407) % (1 << 63)
    return torch.Generator(device).manual_seed(state)


class GeneratorMasks:
    """Masks of a mask generator (`LowRankGenerator`, `ReferenceGenerator`).

    seed: draws instead of taking the likelier decision, with noise that all samples of a step share; None does not.
    trainable: masks carry the straight-through gradient, with fresh noise per sample if `training_noise`.
    observe: called with (layer, mask) for statistics.
    """

    def __init__(
        self,
        generator: nn.Module,
        seed: int | None = None,
        trainable: bool = False,
        training_noise: bool = False,
        observe: Callable[[str, Tensor], None] | None = None,
    ):
        self.generator = generator
        self.structure = generator.structure
        self.seed = seed
        self.trainable = trainable
        self.training_noise = training_noise
        self.observe = observe
        self._order = {name: index for index, name in enumerate(self.structure.layers)}
        self._blocks = {block.name: block for block in self.structure.blocks}

    def _trainable_mask(self, logits: Tensor) -> Tensor:
        if not self.training_noise:
            return straight_through(logits, self.generator.threshold, self.generator.tau)
        stream = torch.Generator(logits.device).manual_seed(int(torch.randint(1 << 62, ())))
        noise = self.generator.noise(logits.shape, stream, logits.dtype)
        return straight_through(logits + noise, self.generator.noisy_threshold, self.generator.tau)

    def _mask(self, layer: str, logits: Tensor, sigma: float | None) -> Tensor:
        if self.seed is None:
            return logits > self.generator.threshold
        stream = noise_generator(logits.device, self.seed, self._order[layer], sigma)
        noise = self.generator.noise(logits.shape[1:], stream, logits.dtype)
        return logits + noise > self.generator.noisy_threshold

    def begin(self, call: Call) -> Callable[[str, Tensor], Tensor]:
        conditions: dict[str, Tensor] = {}

        # Logits are compared with a threshold: under autocast many would be rounded across it.
        def enter(block: str, features: Tensor, t_emb: Tensor) -> None:
            if block in self._blocks:
                with torch.autocast(features.device.type, enabled=False):
                    conditions.update(self.generator.condition(self._blocks[block], features, t_emb))

        def mask(layer: str, weight: Tensor) -> Tensor:
            with torch.autocast(weight.device.type, enabled=False):
                logits = self.generator.layer_logits(layer, conditions[layer])
                result = self._trainable_mask(logits) if self.trainable else self._mask(layer, logits, call.sigma)
            if self.observe is not None:
                self.observe(layer, result)
            return shared_by_all_samples(result).to(weight.device)

        call.on_block.append(enter)
        return mask


class RandomMasks:
    """Each weight is kept with probability `keep_ratio`: the paper's figure 1. All samples share the mask.

    per_step: another mask at every sigma; otherwise one for the whole run.
    """

    trainable = False

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
