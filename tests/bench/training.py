"""What a training step costs: MaskUNet beside LoRA, the authors' generator, and masks kept for the backward pass."""

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from maskunet_core.masks.call import Call
from maskunet_core.masks.gumbel import straight_through
from maskunet_core.masks.sources import LearningGenerator
from maskunet_core.seam.layers import masked, modules_of
from maskunet_core.training.base import BaseModel, load_for_training
from maskunet_core.training.cost import MB, PeakMemory, estimate
from maskunet_core.training.optimisers import build_optimiser
from tests.bench.allocator import freed_at_once, keep_freed_memory
from tests.bench.clock import seconds
from tests.bench.models import random_base
from trainer.base import load_toy_base
from trainer.config_file import parse_config
from trainer.methods import build_method
from trainer.train import make_accelerator


class _Kept:
    """A mask source whose masks and masked weights stay in memory from the forward to the backward pass."""

    def __init__(self, source: LearningGenerator):
        self.generator, self.structure = source.generator, source.structure

    def begin(self, call: Call):
        conditions = {}
        blocks = {block.name: block for block in self.structure.blocks}
        call.on_block.append(lambda name, *inputs: conditions.update(self.generator.condition(blocks[name], *inputs)))

        def mask(layer: str, weight: torch.Tensor) -> torch.Tensor:
            logits = self.generator.layer_logits(layer, conditions[layer]).full()
            return straight_through(logits, self.generator.threshold, self.generator.tau)

        return mask


@contextlib.contextmanager
def _acting(base: BaseModel, source: Any) -> Iterator[None]:
    with masked(modules_of(base.unet), [(source, 1.0)]):
        yield


LORA, KEPT, AUTHORS = "LoRA rank 8", "MaskUNet, masks kept", "authors' generator"
METHODS = (LORA, "MaskUNet", KEPT, AUTHORS)
SETTINGS = {LORA: {"method": "lora"}, AUTHORS: {"generator": {"architecture": "reference", "freed": True}}}


@dataclass
class _Method:
    """A method to train. acting: context around a call and its backward pass; example: conditions of a batch."""

    module: torch.nn.Module
    acting: Any
    example: Any


def _build(name: str, base: BaseModel) -> _Method:
    method = build_method(base, parse_config(SETTINGS.get(name, {})))
    acting = partial(_acting, base, _Kept(method.source)) if name == KEPT else method.acting
    return _Method(method.module, acting, method.example)


@dataclass
class _Trained:
    """A method that is being trained."""

    parameters: list[torch.nn.Parameter]
    acting: Any
    optimiser: Any


def _start(name: str, base: BaseModel) -> _Trained:
    method = _build(name, base)
    method.module.to(base.patcher.load_device)
    parameters = list(method.module.parameters())
    settings = parse_config({}).optimiser
    optimiser = build_optimiser([{"params": parameters}], settings.name, settings.arguments)
    return _Trained(parameters, method.acting, optimiser)


def _step(base: BaseModel, trained: _Trained, batch: int, pixels: int) -> float:
    """Seconds of one training step."""
    device = base.patcher.load_device
    clean, noise = torch.randn(2, batch, 4, pixels // 8, pixels // 8).to(device)
    conditions = {"cross_attn": base.encode_text("")["cross_attn"].repeat(batch, 1, 1).to(device)}
    timesteps = torch.randint(1000, (batch,)).to(device)
    half = base.unet.dtype if base.unet.dtype != torch.float32 else None

    def step() -> None:
        with trained.acting():
            with torch.autocast(device.type, half, enabled=half is not None):
                loss = base.diffusion_loss(clean, conditions, timesteps, noise).mean()
            loss.backward()
        trained.optimiser.step()
        trained.optimiser.zero_grad(set_to_none=True)

    return seconds(step)


def _peak(name: str, base: BaseModel, batch: int, pixels: int) -> int:
    """Peak memory in bytes of the second step of a method that is alone in memory with the base."""
    trained = _start(name, base)
    _step(base, trained, batch, pixels)
    with freed_at_once(), PeakMemory(base.patcher.load_device) as memory:
        _step(base, trained, batch, pixels)
    return memory.peak


def _estimated(name: str, base: BaseModel, batch: int, pixels: int) -> int:
    """What `check` would say of the peak, in bytes."""
    config = parse_config({"loop": {"batch": batch}})
    with freed_at_once():
        return estimate(base, _build(name, base), config, make_accelerator(config), (pixels, pixels)).peak


def measure(
    model: str,
    pixels: int,
    turns_of: dict[int, int],
    device: torch.device = torch.device("cpu"),  # noqa: B008 - devices do not change
    methods: tuple[str, ...] = METHODS,
) -> list[dict]:
    """A row per batch and method: steps in turns, medians, and the median of the ratios to LoRA's within a turn.

    turns_of: how many, by batch; one more warms up. On a card the base is bf16, as the trainer loads it there.
    """
    torch.manual_seed(0)
    keep_freed_memory()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    base = load_toy_base() if model == "toy" else random_base(dtype=dtype, device=device, small=device.type != "cpu")
    load_for_training(base)
    rows = []
    for batch, count in turns_of.items():
        estimates = {name: _estimated(name, base, batch, pixels) for name in methods}
        peaks = {name: _peak(name, base, batch, pixels) for name in methods}
        trained = {name: _start(name, base) for name in methods}
        turns = [{n: _step(base, t, batch, pixels) for n, t in trained.items()} for _ in range(count + 1)][1:]
        for name in methods:
            rows.append(
                {
                    "model": model,
                    "pixels": pixels,
                    "batch": batch,
                    "method": name,
                    "parameters": sum(p.numel() for p in trained[name].parameters),
                    "s per step": round(statistics.median(turn[name] for turn in turns), 3),
                    "over LoRA": round(statistics.median(turn[name] / turn[LORA] for turn in turns), 3),
                    "peak MB": round(peaks[name] / MB),
                    "peak over LoRA": round(peaks[name] / peaks[LORA], 3),
                    "estimate over peak": round(estimates[name] / peaks[name], 3),
                }
            )
    return rows
