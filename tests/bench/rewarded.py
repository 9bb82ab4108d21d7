"""What training on rewards takes on SD's shapes: the presets' pictures and passes, with random weights."""

import dataclasses

import torch

from maskunet_core.training.base import load_for_training
from maskunet_core.training.cost import MB, PeakMemory
from tests.bench.allocator import freed_at_once
from tests.bench.clock import seconds
from tests.bench.models import random_base, random_rewards, random_vae
from trainer.config_file import PRESETS as FOLDER
from trainer.config_file import parse_config, read_toml
from trainer.methods import build_method

PRESETS = {"SD 1.5": "sd15_reward", "SDXL": "sdxl_reward"}
PLAIN_STEPS = 25
"""Of the guided picture in whose price a round is told."""
_MOMENTS = 2
"""Numbers that the optimiser keeps of each weight; as many bytes as the weight."""


def measure(family: str, resolution: int, biases: tuple[str, ...] = ("weight", "row_column")) -> list[dict]:
    """A row for each kind of bias: a sample's passes, drawing and judging a picture, and what a round comes to."""
    torch.manual_seed(0)
    base = random_base(family, small=True)
    device = load_for_training(base)
    vae, rewards = random_vae(False).first_stage_model, random_rewards()
    clean, noise = torch.randn(2, 1, *base.latent_shape(resolution, resolution))
    timesteps = torch.tensor([500])
    with torch.no_grad():
        decoding = seconds(lambda: vae.decode(clean))
        judging = seconds(lambda: rewards(torch.rand(1, 3, resolution, resolution)))
    preset, rows = read_toml(FOLDER / f"{PRESETS[family]}.toml"), []
    for bias in biases:
        loop = {"batch": 1, "checkpointing": preset["loop"]["checkpointing"]}
        generator = preset["generator"] | {"bias": bias}
        config = parse_config({"targets": preset["targets"], "generator": generator, "loop": loop})
        how = dataclasses.replace(config.reward, steps=preset["reward"]["steps"])
        with freed_at_once():
            before = PeakMemory(device).now
            method = build_method(base, config)
            conditions = method.example(1)

            def loss() -> torch.Tensor:
                return base.diffusion_loss(clean, conditions, timesteps, noise).mean()  # noqa: B023 - called at once

            with torch.no_grad():
                plain = seconds(loss)
                with method.acting(training=False):
                    masked = seconds(loss)
            with PeakMemory(device) as memory, method.acting():
                learning = seconds(lambda: loss().backward())
        numbers = [p.numel() for p in method.module.parameters()]
        # Each sample is looked at by the policy that is compared with, too.
        drawing, passes = how.pictures * how.steps * masked, how.pictures * how.passes * (masked + learning)
        told, picture = how.pictures * (decoding + judging), 2 * PLAIN_STEPS * plain
        rows.append(
            {
                "family": family,
                "pixels": resolution,
                "bias": bias,
                "parameters": sum(numbers),
                "beside the model MB": round((memory.peak - before + 4 * _MOMENTS * sum(numbers)) / MB),
                "s of a plain forward": round(plain, 1),
                "masked forward": round(masked / plain, 2),
                "forward and backward": round(learning / plain, 2),
                "decoding": round(decoding / plain, 2),
                "judging": round(judging / plain, 2),
                "round in plain pictures": round((drawing + passes + told) / picture, 1),
                "of which decoding and judging": round(told / picture, 1),
            }
        )
        del method
    return rows
