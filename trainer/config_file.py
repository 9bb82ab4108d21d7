"""Reads the configuration of a training run: a TOML file, checked as a whole before anything is loaded."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, get_args, get_origin

from maskunet_core.choices import TARGETS
from maskunet_core.errors import MaskUNetError
from maskunet_core.files.checkpoint import ARCHITECTURES
from maskunet_core.masks.generator import BIASES, CODES
from maskunet_core.training.schedules import FALLS

from .choices import BODIES, KINDS, METHODS, OBJECTIVES, PRECISIONS, TOY_RESOLUTION
from .config import Base, Config
from .config_checks import contradictions
from .files import user_path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PRESETS = Path(__file__).with_name("presets")


class BadConfig(MaskUNetError):
    """Every problem of a configuration, a line each."""


_PATHS = (
    "output",
    "base.checkpoint",
    "base.diffusion_model",
    "base.text_encoders",
    "base.vae",
    "base.weights",
    "base.lora",
    "data.path",
    "data.cache",
    "prior.folder",
    "reward.prompts",
    "reward.models",
    "embedding.texts",
    "embedding.generator",
    "embedding.relation.words",
)
"""Keys that hold a path, or paths with values."""


def _one_of(names) -> tuple:
    return (lambda v: v in names, f"must be one of {', '.join(names)}")


_AT_LEAST_1 = (lambda v: v >= 1, "must be at least 1")
_NOT_NEGATIVE = (lambda v: v >= 0, "must not be negative")
_SHARE = (lambda v: 0 <= v <= 1, "must lie between 0 and 1")
_ABOVE_0 = (lambda v: v > 0, "must be above 0")

_RULES = {
    "output": (lambda v: Path(v).name not in ("", ".", ".."), "must name a folder"),
    "method": _one_of(METHODS),
    "objective": _one_of(OBJECTIVES),
    "base.body": _one_of(BODIES),
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
    "reward.models": (lambda v: any(v.values()), "must name a reward with a weight other than 0"),
    "reward.prompts_per_round": _AT_LEAST_1,
    "reward.pictures_per_prompt": (lambda v: v >= 2, "must be at least 2: pictures of a prompt are compared"),
    "reward.passes": _AT_LEAST_1,
    "reward.steps": _AT_LEAST_1,
    "reward.beta": _ABOVE_0,
    "reward.follow": (lambda v: 0 < v <= 1, "must lie between 0 and 1, 0 excluded"),
    "reward.pull": _NOT_NEGATIVE,
    "generator.architecture": _one_of(ARCHITECTURES),
    "generator.bias": _one_of(BIASES),
    "generator.codes": _one_of(CODES),
    "generator.rank": _NOT_NEGATIVE,
    "generator.width": _AT_LEAST_1,
    "generator.tau": _ABOVE_0,
    "generator.delta": (lambda v: 0 < v < 1, "must lie between 0 and 1"),
    "lora.rank": _AT_LEAST_1,
    "lora.alpha": _ABOVE_0,
    "embedding.kind": _one_of(KINDS),
    "embedding.vectors": _NOT_NEGATIVE,
    "embedding.lr": _NOT_NEGATIVE,
    "embedding.relation.alpha": _SHARE,
    "embedding.relation.weight": _NOT_NEGATIVE,
    "embedding.relation.positives": _AT_LEAST_1,
    "embedding.relation.temperature": _ABOVE_0,
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


LARGEST = 2**63 - 1
"""Whole number that torch takes as a seed or a count."""


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
        return {key: _convert(item, float) for key, item in value.items()}
    if type(value) is int and abs(value) > LARGEST:
        raise TypeError(f"{kind.__name__}, not a number of more than 64 bits")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is float and not math.isfinite(value):
        raise TypeError(f"{kind.__name__} and finite, not {value}")
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
        if name in _PATHS:
            if escaped := _escaped_path(value):
                problems.append(f"{name}: {escaped}")
                continue
            value = _expanded(value)
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


def _expanded(value: Any) -> Any:
    """A path, a list of paths, or a table of them, with `~` for the user's home."""
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    if isinstance(value, dict):
        return {_expanded(path): strength for path, strength in value.items()}
    return str(user_path(value)) if value.startswith("~") else value


SLASHES = "in a TOML text of double quotes a backslash begins an escape, so write C:/folder or 'C:\\folder'"


def _escaped_path(value: Any) -> str:
    """What is wrong with a path in which backslashes became tabs or line breaks, or nothing."""
    broken = next(
        (path for path in ([value] if isinstance(value, str) else value) if any(letter < " " for letter in path)), None
    )
    return "" if broken is None else f"{broken!r} holds a character that no path has; {SLASHES}"


def parse_config(values: dict[str, Any]) -> Config:
    """A Config from a TOML document. Raises BadConfig with all problems at once."""
    problems: list[str] = []
    config = _read(Config, values, "", problems)
    data = values.get("data")
    if config.is_toy and not (isinstance(data, dict) and "resolution" in data):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, resolution=TOY_RESOLUTION))
    problems += contradictions(config)
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


def read_toml(path: Path) -> dict[str, Any]:
    """Raises BadConfig."""
    try:
        # Editors of Windows put a byte order mark first.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BadConfig(f"'{path}' is not UTF-8 text: save it as UTF-8.") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        slashes = f" If it is a path: {SLASHES}." if re.search(r'"[^"\n]*\\[^"\n]*"', text) else ""
        raise BadConfig(f"'{path}' is not a TOML file: {error}.{slashes}") from None


def base_named(name: str, body: str = "unet") -> Base:
    """The base in the TOML file of a training, a checkpoint's, or the toy's with this `body`."""
    path = str(user_path(name))
    return load_config(path).base if path.endswith(".toml") else Base(checkpoint=path, body=body)


def load_config(source: str, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """From a file, or from a preset by its name, with overrides of the form `table.key=value`."""
    path = user_path(source)
    # A folder may have a preset's name.
    if not path.is_file() and (PRESETS / f"{source}.toml").exists():
        path = PRESETS / f"{source}.toml"
    if not path.is_file():
        presets = ", ".join(sorted(p.stem for p in PRESETS.glob("*.toml")))
        what = "is a folder" if path.is_dir() else "does not exist"
        raise BadConfig(f"'{source}' {what}. Name a TOML file or a preset ({presets}).")
    values = read_toml(path)
    for assignment in overrides:
        _override(values, assignment)
    return parse_config(values)
