"""What of a configuration contradicts itself, its files or its host, and what it may not mean."""

import dataclasses
import re
from pathlib import Path

import torch

from maskunet_core.masks.generator import LowRankGenerator, LowRankSettings
from maskunet_core.masks.reference import ReferenceGenerator
from maskunet_core.training.optimisers import UnknownOptimiser, build_optimiser

from .choices import PARTS, TOY, TOY_RESOLUTION
from .config import Base, Config
from .embedding.toy import TAUGHT
from .host import GENERATORS, REWARD, drawing_names, model_choice, model_file
from .pictures import scan_data


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
        for key, names in drawing_names().items()
        if (name := getattr(reward, key)) not in names
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


def contradictions(config: Config) -> list[str]:
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
