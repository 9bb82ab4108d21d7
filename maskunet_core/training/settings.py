"""What a training is told. A configuration of the trainer has all of these parts, and more."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ..masks.generator import LowRankGenerator, LowRankSettings


@dataclass(frozen=True)
class Generator(LowRankSettings):
    """The mask generator's hyper-parameters. noise: Gumbel noise while training.

    architecture: `low_rank`, or `reference`: the authors' networks in their sizes, which have `start`, `noise` and
    `freed` alone. freed: their last convolution starts at torch's default instead of at zero, where no
    gradient passes it and the masks stay the same for every step and sample.
    """

    noise: bool = False
    architecture: str = LowRankGenerator.architecture
    freed: bool = False


@dataclass(frozen=True)
class Optimiser:
    """name: a class of torch.optim, or `package.Class` of an installed package; options: its further arguments.

    lr: of the low-rank part, of a LoRA or of full weights; lr_bias: of the static bias of mask logits, which in the
    architecture `reference` are the biases of the adapters (all else there has `lr`). A logit moves
    by about the learning rate per step, so that `lr_bias * steps` must exceed `start` several times for weights to
    cross the threshold. eps is far below the usual 1e-8, which would hide the gradients of logits. clip: of the
    gradient's norm, 0 for none.
    """

    name: str = "AdamW"
    lr: float = 1e-3
    lr_bias: float = 1e-2
    weight_decay: float = 0.0
    eps: float = 1e-12
    clip: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the class is called with, besides parameter groups."""
        arguments: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        if "Adam" in self.name:
            arguments["eps"] = self.eps
        if self.name in ("Adam", "AdamW"):
            # One pass over the parameters, of which a bias per weight has as many as there are masked weights.
            arguments["fused"] = True
        return arguments | self.options


@dataclass(frozen=True)
class Loop:
    """batch: pictures per step, over all processes and `accumulate` parts of a step, class pictures included.

    schedule: of the learning rates, after `warm_up` steps. min_snr: gamma of min-SNR weighting, 0 for none. ema: decay
    of the averaged weights, 0 for none. precision: of the network; a CPU without bf16 trains in fp32 instead.
    checkpointing: of the model's blocks, less memory for more time. save_every: steps between saved states.
    """

    steps: int = 1200
    batch: int = 32
    accumulate: int = 1
    schedule: str = "cosine"
    warm_up: int = 50
    min_snr: float = 0.0
    ema: float = 0.0
    precision: str = "bf16"
    checkpointing: bool = False
    save_every: int = 200


@dataclass(frozen=True)
class Validation:
    """pictures: held out of training, at most a fifth of all, with fixed noises and timesteps, or so many prompts where
    rewards are trained on; every: steps between validations, 0 for none.

    patience: stop after so many validations without a better one, 0 for never. prompts: of the sample grid, made
    every `sample_every` steps (0 for never) with `sample_steps` steps and `cfg`.
    """

    pictures: int = 64
    every: int = 200
    patience: int = 0
    prompts: tuple[str, ...] = ()
    sample_every: int = 0
    sample_steps: int = 20
    cfg: float = 7.5


@dataclass(frozen=True)
class Pictures:
    """flip: mirror half of the pictures. caption_dropout: share of empty captions, which CFG needs."""

    flip: bool = True
    caption_dropout: float = 0.1


@dataclass(frozen=True)
class Settings:
    """A training of a mask generator. targets: name of the set of layers."""

    targets: str = "decoder attention"
    method: str = "maskunet"
    seed: int = 0
    data: Pictures = field(default_factory=Pictures)
    generator: Generator = field(default_factory=Generator)
    optimiser: Optimiser = field(default_factory=Optimiser)
    loop: Loop = field(default_factory=Loop)
    validation: Validation = field(default_factory=Validation)


def plain_values(config: Any) -> dict[str, Any]:
    """Of a dataclass, as JSON and TOML hold them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))
