"""The configuration of a training run: a TOML file, checked as a whole before anything is loaded."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomllib

from maskunet_core.errors import MaskUNetError
from maskunet_core.families import TARGETS
from maskunet_core.generator import BIASES, LowRankSettings

PRESETS = Path(__file__).with_name("presets")


class BadConfig(MaskUNetError):
    """Every problem of a configuration, a line each."""


@dataclass(frozen=True)
class Base:
    """The frozen model. model: "toy", the embedded one. weights: folder of other toy weights, "" for the shipped."""

    model: str = "toy"
    weights: str = ""


@dataclass(frozen=True)
class Data:
    """Rendered pictures of the toy world. pictures: how many; caption_noise: share of wrong captions."""

    pictures: int = 20_000
    caption_noise: float = 0.0
    caption_dropout: float = 0.1


@dataclass(frozen=True)
class Generator(LowRankSettings):
    """What is trained: the generator's hyper-parameters and its target set. noise: Gumbel noise while training."""

    targets: str = "decoder attention"
    noise: bool = False


@dataclass(frozen=True)
class Optimiser:
    """AdamW with warm-up and cosine decay. lr: of the low-rank part; lr_bias: of the static bias.

    A logit moves by about the learning rate per step, so that `lr_bias * steps` must exceed `start` several times for
    weights to cross the threshold. eps is far below the usual 1e-8, which would hide the gradients of logits.
    """

    steps: int = 1200
    batch: int = 32
    lr: float = 1e-3
    lr_bias: float = 3e-2
    eps: float = 1e-12
    clip: float = 0.0


@dataclass(frozen=True)
class Config:
    """A run. output: the generator file; its log is written beside it."""

    output: str = "output/train/generator.safetensors"
    seed: int = 0
    base: Base = field(default_factory=Base)
    data: Data = field(default_factory=Data)
    generator: Generator = field(default_factory=Generator)
    optimiser: Optimiser = field(default_factory=Optimiser)


_RULES = {
    "base.model": (lambda v: v == "toy", 'must be "toy"'),
    "data.pictures": (lambda v: v >= 1, "must be at least 1"),
    "data.caption_noise": (lambda v: 0 <= v <= 1, "must lie between 0 and 1"),
    "data.caption_dropout": (lambda v: 0 <= v <= 1, "must lie between 0 and 1"),
    "generator.targets": (lambda v: v in TARGETS, f"must be one of {', '.join(TARGETS)}"),
    "generator.bias": (lambda v: v in BIASES, f"must be one of {', '.join(BIASES)}"),
    "generator.rank": (lambda v: v >= 1, "must be at least 1"),
    "generator.width": (lambda v: v >= 1, "must be at least 1"),
    "generator.tau": (lambda v: v > 0, "must be above 0"),
    "generator.delta": (lambda v: 0 < v < 1, "must lie between 0 and 1"),
    "optimiser.steps": (lambda v: v >= 1, "must be at least 1"),
    "optimiser.batch": (lambda v: v >= 1, "must be at least 1"),
    "optimiser.lr": (lambda v: v >= 0, "must not be negative"),
    "optimiser.lr_bias": (lambda v: v >= 0, "must not be negative"),
}


def _read(cls: type, values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    known = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in fields:
            problems.append(f"{name}: unknown key; known are {', '.join(fields)}")
            continue
        kind = fields[key].type
        if dataclasses.is_dataclass(kind):
            if isinstance(value, dict):
                known[key] = _read(kind, value, f"{name}.", problems)
            else:
                problems.append(f"{name}: must be a table [{name}]")
            continue
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            problems.append(f"{name}: must be of type {kind.__name__}, not {type(value).__name__}")
            continue
        check, sentence = _RULES.get(name, (None, ""))
        if check is not None and not check(value):
            problems.append(f"{name}: is {value!r}, but {sentence}")
            continue
        known[key] = value
    return cls(**known)


def parse_config(values: dict[str, Any]) -> Config:
    """A Config from a TOML document. Raises BadConfig with all problems at once."""
    problems: list[str] = []
    config = _read(Config, values, "", problems)
    if problems:
        raise BadConfig("\n".join(problems))
    return config


def load_config(source: str) -> Config:
    """From a file, or from a preset by its name."""
    path = Path(source)
    if not path.exists() and (PRESETS / f"{source}.toml").exists():
        path = PRESETS / f"{source}.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        presets = ", ".join(sorted(p.stem for p in PRESETS.glob("*.toml")))
        raise BadConfig(f"'{source}' does not exist. Name a TOML file or a preset ({presets}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"'{path}' is not a TOML file: {error}.") from None
    return parse_config(values)
