"""Reads the configuration of a training run: a TOML file, checked as a whole before anything is loaded."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, get_args, get_origin

import torch

from maskunet_core.errors import MaskUNetError
from maskunet_core.files.checkpoint import ARCHITECTURES
from maskunet_core.masks.generator import BIASES, CODES, LowRankGenerator, LowRankSettings
from maskunet_core.masks.reference import ReferenceGenerator
from maskunet_core.models.structure import TARGETS
from maskunet_core.training.optimisers import UnknownOptimiser, build_optimiser
from maskunet_core.training.schedules import FALLS

from .config import BODIES, KINDS, METHODS, OBJECTIVES, PARTS, PRECISIONS, TOY, TOY_RESOLUTION, Base, Config
from .embedding.toy import TAUGHT
from .files import user_path
from .host import GENERATORS, REWARD, model_choice, model_file
from .pictures import scan_data

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


def _contradicting_architecture(config: Config) -> list[str]:
    problems, generator = [], config.generator
    reference = generator.architecture == ReferenceGenerator.architecture
    if generator.freed and not reference:
        problems.append(
            f'generator.freed: only architecture = "{ReferenceGenerator.architecture}" has gradients to free; '
            f"{generator.architecture} has them from the first step"
        )
    if config.of_weights == "static_mask" and reference:
        problems.append(
            f"method: static_mask is a {LowRankGenerator.architecture} generator of rank 0; with "
            f'generator.architecture = "{ReferenceGenerator.architecture}" the method is maskunet'
        )
    return problems


def _contradicting_parts(base: Base) -> list[str]:
    if not base.parts:
        return []
    import comfy.sd

    problems = []
    if base.checkpoint != TOY:
        problems.append("base.checkpoint: leave it out where separate files are named, or leave those out")
    kinds = [kind.lower() for kind in comfy.sd.CLIPType.__members__]
    if base.text_encoder_type not in kinds:
        problems.append(f"base.text_encoder_type: is '{base.text_encoder_type}', but must be one of {', '.join(kinds)}")
    for key, names in base.parts.items():
        if not names:
            problems.append(f"base.{key}: is missing; a base of separate files needs {', '.join(PARTS)}")
        problems += [
            f"base.{key}: '{name}' does not exist; {model_choice(PARTS[key])}; name a file in it, or a path"
            for name in names
            if model_file(PARTS[key], name) is None
        ]
    return problems


def _contradicting_body(config: Config) -> list[str]:
    if config.base.body == "unet":
        return []
    if not config.is_toy:
        return [f'base.body: is of the toy model alone; leave it out, or name "{TOY}" in base.checkpoint']
    return for_unets_alone(config)


def for_unets_alone(config: Config) -> list[str]:
    """What is asked for that no transformer can be trained by, a sentence each."""
    problems = []
    if config.learns_word:
        problems.append("method: words are learned for U-Nets alone; name another method for a transformer")
    if config.generator.architecture == ReferenceGenerator.architecture:
        problems.append(
            f"generator.architecture: {ReferenceGenerator.architecture} is made for U-Nets alone; for a transformer it "
            f"must be {LowRankGenerator.architecture}"
        )
    return problems


def _contradicting_reward(config: Config) -> list[str]:
    reward, data = config.reward, config.data
    if config.objective != "reward":
        return []
    problems = [
        f"reward.models: '{name}' does not exist; {model_choice(REWARD)}; name a file in it, or a path"
        for name in reward.models
        if name != TOY and model_file(REWARD, name) is None
    ]
    if TOY in reward.models and not config.is_toy:
        problems.append(f'reward.models: "{TOY}" reads pictures of the toy model alone; name a file in models/reward')
    if reward.prompts and not Path(reward.prompts).is_file():
        what = "is a folder" if Path(reward.prompts).is_dir() else "does not exist"
        problems.append(f"reward.prompts: the file '{reward.prompts}' {what}; name a text file")
    if not config.is_toy and not reward.prompts and not data.path:
        problems.append("reward.prompts: is missing; name a text file with a prompt in each line")
    if reward.pictures * reward.passes % config.loop.batch:
        problems.append(
            f"loop.batch: is {config.loop.batch}, but must divide the {reward.pictures * reward.passes} that a round "
            "learns from (reward.prompts_per_round x pictures_per_prompt x passes)"
        )
    if config.prior.prompt:
        problems.append('prior.prompt: class pictures need objective = "diffusion"; reward.pull keeps the base here')
    problems += [
        f"reward.{key}: is '{name}', which this ComfyUI does not have; it has {', '.join(names)}"
        for key, name, names in _how_to_draw(reward)
        if name not in names
    ]
    return problems


def _contradicting_word(config: Config) -> list[str]:
    settings, problems = config.embedding, []
    if not config.learns_word:
        return []
    name = config.result.stem
    if re.search(r"[\s<>\[\](),:]", name):
        problems.append(
            f"output: the word is written as embedding:{name}, in which ComfyUI would find no name; name a folder "
            "without spaces, brackets, commas and colons"
        )
    if not settings.start.strip():
        problems.append(
            'embedding.start: is missing; name words near to what is learned, such as "dog", "painting" or "and" for '
            "a relation"
        )
    for key, file in (("texts", settings.texts), ("relation.words", settings.relation.words)):
        if file and not Path(file).is_file():
            problems.append(f"embedding.{key}: the file '{file}' does not exist")
    if settings.generator and model_file(GENERATORS, settings.generator) is None:
        problems.append(f"embedding.generator: '{settings.generator}' does not exist; name a generator file")
    if settings.generator and config.of_weights:
        problems.append(
            f'embedding.generator: acts on what method = "{config.method}" trains as well; use method = "embedding"'
        )
    if config.is_toy and not config.data.path and settings.toy not in TAUGHT:
        problems.append(f"embedding.toy: is '{settings.toy}', but must be one of {', '.join(TAUGHT)}")
    if config.objective == "reward":
        problems.append('method: a word is learned from pictures, so objective must be "diffusion"')
    if config.prior.prompt:
        problems.append("prior.prompt: class pictures lack the word; leave them out where a word is learned")
    return problems


def _how_to_draw(reward: Any) -> list[tuple[str, str, list[str]]]:
    """(key, value, what the host has)."""
    import comfy.samplers

    return [
        ("sampler", reward.sampler, comfy.samplers.SAMPLER_NAMES),
        ("scheduler", reward.scheduler, comfy.samplers.SCHEDULER_NAMES),
    ]


def _contradictions(config: Config) -> list[str]:
    """What is wrong between keys, and what they name that does not exist."""
    problems = []
    base, data = config.base, config.data
    problems += _contradicting_parts(base)
    if not config.is_toy and not base.parts and model_file("checkpoints", base.checkpoint) is None:
        problems.append(
            f"base.checkpoint: '{base.checkpoint}' does not exist; {model_choice('checkpoints')}; name a file in it, "
            f'a path or "{TOY}"'
        )
    problems += _contradicting_word(config)
    if not config.is_toy and not data.path and config.objective == "diffusion":
        problems.append("data.path: is missing; name a folder of pictures with captions, or a data set")
    problems += _contradicting_body(config)
    if config.is_toy and base.lora:
        problems.append("base.lora: the toy model takes none")
    if base.weights and not Path(base.weights).is_dir():
        problems.append(f"base.weights: the folder '{base.weights}' does not exist")
    if data.path:
        problems += [f"data.path: {sentence}" for sentence in scan_data(config).problems]
    problems += [
        f"base.lora: '{file}' does not exist; {model_choice('loras')}; name a file in it, or a path"
        for file in base.lora
        if model_file("loras", file) is None
    ]
    problems += _contradicting_reward(config)
    try:
        one = [{"params": [torch.nn.Parameter(torch.zeros(1, 1))]}]
        build_optimiser(one, config.optimiser.name, config.optimiser.arguments)
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


def _slow_biases(config: Config) -> list[str]:
    """Whether the static biases move too little for weights to be removed."""
    generator, optimiser = config.generator, config.optimiser
    low_rank = generator.architecture == LowRankGenerator.architecture
    if config.of_weights not in ("maskunet", "static_mask") or not low_rank or not optimiser.name.startswith("Adam"):
        return []
    biases = 2 if generator.bias == "row_column" else 1
    reach = biases * optimiser.lr_bias * config.loop.steps
    if reach >= generator.start:
        return []
    moves = (
        f"optimiser.lr_bias of {optimiser.lr_bias:g} and {config.loop.steps} steps move the static part of a logit by"
    )
    sentence = f"{moves} about {reach:.2g}, but it starts at {generator.start:g}: "
    if config.of_weights == "static_mask" or not generator.rank:
        return [f"{sentence}hardly a weight will be removed. Raise optimiser.lr_bias."]
    return [f"{sentence}weights will be removed by the low-rank part alone. Raise optimiser.lr_bias."]


def warnings(config: Config) -> list[str]:
    """What works but will not do what people expect, a sentence each."""
    found = _slow_biases(config)
    if config.is_toy and config.data.path and config.data.resolution > TOY_RESOLUTION:
        found.append(
            f"data.resolution is {config.data.resolution}, but the toy model draws {TOY_RESOLUTION}x{TOY_RESOLUTION}: "
            f"steps take some {(config.data.resolution / TOY_RESOLUTION) ** 2:,.0f} times as long. Set it to "
            f"{TOY_RESOLUTION}."
        )
    if config.of_weights == "maskunet" and config.generator.architecture == ReferenceGenerator.architecture:
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
    data = values.get("data")
    if config.is_toy and not (isinstance(data, dict) and "resolution" in data):
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, resolution=TOY_RESOLUTION))
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
