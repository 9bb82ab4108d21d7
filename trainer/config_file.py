"""Reads the configuration of a training run: a TOML file, checked as a whole before anything is loaded."""

import dataclasses
from pathlib import Path
from typing import Any, get_args, get_origin

from maskunet_core.errors import MaskUNetError
from maskunet_core.files.checkpoint import ARCHITECTURES
from maskunet_core.masks.generator import BIASES, CODES, LowRankGenerator, LowRankSettings
from maskunet_core.masks.reference import ReferenceGenerator
from maskunet_core.models.structure import TARGETS

from .config import METHODS, PRECISIONS, TOY, Config
from .data.records import scan
from .optimisers import UnknownOptimiser, find_optimiser
from .schedules import FALLS

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PRESETS = Path(__file__).with_name("presets")


class BadConfig(MaskUNetError):
    """Every problem of a configuration, a line each."""


def _one_of(names) -> tuple:
    return (lambda v: v in names, f"must be one of {', '.join(names)}")


_AT_LEAST_1 = (lambda v: v >= 1, "must be at least 1")
_NOT_NEGATIVE = (lambda v: v >= 0, "must not be negative")
_SHARE = (lambda v: 0 <= v <= 1, "must lie between 0 and 1")
_ABOVE_0 = (lambda v: v > 0, "must be above 0")

_RULES = {
    "output": (lambda v: Path(v).name not in ("", "."), "must name a folder"),
    "method": _one_of(METHODS),
    "targets": _one_of(TARGETS),
    "data.resolution": (lambda v: v >= 64 and v % 8 == 0, "must be a multiple of 8 from 64 on"),
    "data.caption_dropout": _SHARE,
    "data.broken_limit": _SHARE,
    "data.pictures": _AT_LEAST_1,
    "data.caption_noise": _SHARE,
    "prior.pictures": _AT_LEAST_1,
    "prior.weight": _NOT_NEGATIVE,
    "prior.share": (lambda v: 0 < v < 1, "must lie between 0 and 1, both excluded"),
    "prior.steps": _AT_LEAST_1,
    "generator.architecture": _one_of(ARCHITECTURES),
    "generator.bias": _one_of(BIASES),
    "generator.codes": _one_of(CODES),
    "generator.rank": _NOT_NEGATIVE,
    "generator.width": _AT_LEAST_1,
    "generator.tau": _ABOVE_0,
    "generator.delta": (lambda v: 0 < v < 1, "must lie between 0 and 1"),
    "lora.rank": _AT_LEAST_1,
    "lora.alpha": _ABOVE_0,
    "optimiser.lr": _NOT_NEGATIVE,
    "optimiser.lr_bias": _NOT_NEGATIVE,
    "optimiser.weight_decay": _NOT_NEGATIVE,
    "optimiser.eps": _ABOVE_0,
    "optimiser.clip": _NOT_NEGATIVE,
    "loop.steps": _AT_LEAST_1,
    "loop.batch": _AT_LEAST_1,
    "loop.accumulate": _AT_LEAST_1,
    "loop.schedule": _one_of(FALLS),
    "loop.warm_up": _NOT_NEGATIVE,
    "loop.min_snr": _NOT_NEGATIVE,
    "loop.ema": (lambda v: 0 <= v < 1, "must lie between 0 and 1, 1 excluded"),
    "loop.precision": _one_of(PRECISIONS),
    "loop.save_every": _AT_LEAST_1,
    "validation.pictures": _NOT_NEGATIVE,
    "validation.every": _NOT_NEGATIVE,
    "validation.patience": _NOT_NEGATIVE,
    "validation.sample_every": _NOT_NEGATIVE,
    "validation.sample_steps": _AT_LEAST_1,
}


def _convert(value: Any, kind: Any) -> Any:
    """`value` as a field of type `kind` holds it; raises TypeError with what it should be."""
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise TypeError("a list of texts")
        return tuple(value)
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise TypeError("a table")
        if get_args(kind)[1] is not float:
            return value
        if not all(type(item) in (int, float) for item in value.values()):
            raise TypeError("a table of numbers")
        return {key: float(item) for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__}, not {type(value).__name__}")
    return value


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
        try:
            value = _convert(value, kind)
        except TypeError as error:
            problems.append(f"{name}: must be of type {error}")
            continue
        check, sentence = _RULES.get(name, (None, ""))
        if check is not None and not check(value):
            problems.append(f"{name}: is {value!r}, but {sentence}")
            continue
        known[key] = value
    try:
        return cls(**known)
    except ValueError as error:
        problems.append(f"{prefix.rstrip('.')}: {error}")
        return cls()


def _contradicting_architecture(config: Config) -> list[str]:
    problems, generator = [], config.generator
    reference = generator.architecture == ReferenceGenerator.architecture
    if generator.freed and not reference:
        problems.append(
            f'generator.freed: only architecture = "{ReferenceGenerator.architecture}" has gradients to free; '
            f"{generator.architecture} has them from the first step"
        )
    if config.method == "static_mask" and reference:
        problems.append(
            f"method: static_mask is a {LowRankGenerator.architecture} generator of rank 0; with "
            f'generator.architecture = "{ReferenceGenerator.architecture}" the method is maskunet'
        )
    return problems


def _contradictions(config: Config) -> list[str]:
    """What is wrong between keys, and what they name that does not exist."""
    problems = []
    base, data = config.base, config.data
    if not config.is_toy and not Path(base.checkpoint).is_file():
        problems.append(f"base.checkpoint: '{base.checkpoint}' does not exist; name a checkpoint file or \"{TOY}\"")
    if not config.is_toy and not data.path:
        problems.append("data.path: is missing; name a folder of pictures with captions, or a data set")
    if config.is_toy and base.lora:
        problems.append("base.lora: the toy model takes none")
    if base.weights and not Path(base.weights).is_dir():
        problems.append(f"base.weights: the folder '{base.weights}' does not exist")
    if data.path:
        problems += [f"data.path: {sentence}" for sentence in scan(data.path, data.caption_column).problems]
    problems += [f"base.lora: '{file}' does not exist" for file in base.lora if not Path(file).is_file()]
    try:
        find_optimiser(config.optimiser.name)
    except UnknownOptimiser as error:
        problems.append(str(error))
    problems += _contradicting_architecture(config)
    if config.prior.prompt and config.loop.batch < 2:
        problems.append("prior.prompt: a batch holds class pictures and others, so loop.batch must be at least 2")
    if config.loop.batch % config.loop.accumulate:
        problems.append(f"loop.accumulate: must divide loop.batch ({config.loop.batch})")
    if config.validation.sample_every and not config.validation.prompts:
        problems.append("validation.prompts: is empty, but validation.sample_every asks for sample grids")
    if config.validation.patience and not config.validation.every:
        problems.append("validation.patience: needs validation.every")
    return problems


def warnings(config: Config) -> list[str]:
    """What works but will not do what people expect, a sentence each."""
    found = []
    masked = config.method in ("maskunet", "static_mask")
    reach = max(config.optimiser.lr, config.optimiser.lr_bias) * config.loop.steps
    if masked and config.optimiser.name.startswith("Adam") and reach < config.generator.start:
        found.append(
            f"No logit can cross the threshold: with learning rates of at most {reach / config.loop.steps:g} and "
            f"{config.loop.steps} steps a logit moves by {reach:.2g} at most, but starts at "
            f"{config.generator.start:g}. Every weight will be kept. Raise optimiser.lr_bias."
        )
    if config.method == "maskunet" and config.generator.architecture == ReferenceGenerator.architecture:
        unread = [
            f"generator.{f.name}"
            for f in dataclasses.fields(LowRankSettings)
            if f.name != "start" and getattr(config.generator, f.name) != f.default
        ]
        if unread:
            found.append(f"{', '.join(unread)}: without effect on the architecture reference.")
    return found


def parse_config(values: dict[str, Any]) -> Config:
    """A Config from a TOML document. Raises BadConfig with all problems at once."""
    problems: list[str] = []
    config = _read(Config, values, "", problems)
    problems += _contradictions(config)
    if problems:
        raise BadConfig("\n".join(problems))
    return config


def _override(values: dict[str, Any], assignment: str) -> None:
    """Apply `table.key=value`, where value is TOML, or a bare text."""
    key, equals, text = assignment.partition("=")
    if not equals:
        raise BadConfig(f"--set {assignment}: must be of the form key=value, for instance loop.steps=500")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, name = key.strip().split(".")
    for table in tables:
        values = values.setdefault(table, {})
        if not isinstance(values, dict):
            raise BadConfig(f"--set {assignment}: '{table}' is not a table")
    values[name] = value


def load_config(source: str, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """From a file, or from a preset by its name, with overrides of the form `table.key=value`."""
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
    for assignment in overrides:
        _override(values, assignment)
    return parse_config(values)
