"""Trains a mask generator on the diffusion loss of its frozen base (Eq. 2)."""

import csv
import dataclasses
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from maskunet_core import checkpoint
from maskunet_core.errors import MaskUNetError
from maskunet_core.generator import LowRankGenerator, LowRankSettings
from maskunet_core.patch import installed, structure_of
from maskunet_core.sources import GeneratorMasks

from .base import BaseModel, load_base
from .config import Config
from .files import replacing
from .schedules import warm_up_and_cosine
from .seeds import seeded
from .toy.data import LatentSet, latent_set


class Diverged(MaskUNetError):
    """The loss is no longer a number."""


class MaskStatistics:
    """Keep ratio, and the share of weights whose bit differs inside a batch, over the layers of one call."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.kept = self.bits = self.differing = self.weights = 0

    def __call__(self, layer: str, mask: Tensor) -> None:
        bits = mask.detach() > 0.5
        self.kept += int(bits.sum())
        self.bits += bits.numel()
        self.differing += int((bits.any(0) & ~bits.all(0)).sum())
        self.weights += bits[0].numel()

    @property
    def keep_ratio(self) -> float:
        return self.kept / max(1, self.bits)

    @property
    def share_differing(self) -> float:
        return self.differing / max(1, self.weights)


def parameter_groups(generator: LowRankGenerator, config: Config) -> list[dict]:
    """The static bias learns faster than the low-rank part: it has to carry logits across the threshold."""
    endings = (".bias", ".row", ".column")
    static = [p for name, p in generator.logits.named_parameters() if name.endswith(endings)]
    chosen = {id(p) for p in static}
    dynamic = [p for p in generator.parameters() if id(p) not in chosen]
    settings = config.optimiser
    return [{"params": static, "lr": settings.lr_bias}, {"params": dynamic, "lr": settings.lr}]


def build_generator(base: BaseModel, config: Config) -> LowRankGenerator:
    names = {f.name for f in dataclasses.fields(LowRankSettings)}
    settings = {k: v for k, v in dataclasses.asdict(config.generator).items() if k in names}
    torch.manual_seed(config.seed)
    return LowRankGenerator(structure_of(base.patcher, config.generator.targets), LowRankSettings(**settings))


def training_step(base: BaseModel, source: GeneratorMasks, data: LatentSet, config: Config, step: int) -> Tensor:
    """The loss of one batch, whose content depends on seed and step alone; calls backward."""
    stream = seeded(20, config.seed, step)
    rows = torch.randint(len(data), (config.optimiser.batch,), generator=stream)
    timesteps = torch.randint(1000, (len(rows),), generator=stream)
    noise = torch.randn(len(rows), *data.latents.shape[1:], generator=stream)
    dropped = torch.rand(len(rows), generator=stream) < config.data.caption_dropout
    context = base.encode(data.tokens[rows])
    context[dropped] = base.encode_texts([""])
    torch.manual_seed(step)
    with installed(base.unet, [(source, 1.0)]):
        with torch.autocast("cpu", torch.bfloat16):
            loss = base.diffusion_loss(data.latents[rows], context, timesteps, noise).mean()
        loss.backward()
    return loss.detach()


def train(config: Config, progress: bool = True) -> Path:
    """Run the whole configuration; returns the path of the generator file."""
    base = load_base(config.base.weights)
    autoencoder = base.vae.first_stage_model
    data = latent_set(config.data.pictures, seeded(21, config.seed), autoencoder, config.data.caption_noise)
    generator = build_generator(base, config)
    statistics = MaskStatistics()
    source = GeneratorMasks(generator, trainable=True, training_noise=config.generator.noise, observe=statistics)
    settings = config.optimiser
    optimiser = torch.optim.AdamW(parameter_groups(generator, config), eps=settings.eps, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, warm_up_and_cosine(settings.steps, 50, floor=0.05))
    parameters = sum(p.numel() for p in generator.parameters())
    print(f"generator of {parameters:,} parameters for {generator.structure.masked_weights:,} weights", flush=True)

    rows, losses, began = [], [], time.monotonic()
    bar = tqdm(range(settings.steps), desc="train", mininterval=1, disable=not progress)
    for step in bar:
        statistics.reset()
        loss = training_step(base, source, data, config, step)
        if not math.isfinite(loss):
            raise Diverged(f"The loss is not finite at step {step}. Train with a lower learning rate.")
        if settings.clip:
            nn.utils.clip_grad_norm_(generator.parameters(), settings.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(float(loss))
        recent = losses[-50:]
        values = (sum(recent) / len(recent), statistics.keep_ratio, statistics.share_differing)
        rows.append((step, float(loss), *values[1:]))
        bar.set_postfix(loss=f"{values[0]:.4f}", keep=f"{values[1]:.4f}", differ=f"{values[2]:.4f}", refresh=False)

    output = Path(config.output)
    seconds = time.monotonic() - began
    record = {
        "config": dataclasses.asdict(config),
        "seconds": round(seconds),
        "final": {"loss": values[0], "keep_ratio": values[1], "share_differing_in_batch": values[2]},
    }
    checkpoint.save(output, generator, config.generator.targets, record)
    with replacing(output.with_suffix(".csv")) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "loss", "keep_ratio", "share_differing"))
        writer.writerows(rows)
    print(f"wrote {output} ({output.stat().st_size / 1e6:.2f} MB) after {seconds:.0f} s", flush=True)
    return output
