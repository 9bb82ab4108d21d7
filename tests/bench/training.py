"""What a training step costs: MaskUNet beside LoRA, the authors' generator, and masks kept for the backward pass."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from maskunet_core.families import Structure
from maskunet_core.patch import installed
from maskunet_core.reference import ReferenceGenerator
from maskunet_core.sources import GeneratorMasks
from tests.bench.models import random_sd15
from trainer.base import BaseModel, load_toy_base
from trainer.config import parse_config
from trainer.cost import MB, PeakMemory
from trainer.methods import build_method
from trainer.optimisers import build_optimiser

AUTHORS_HIDDEN = 64


class _Kept:
    """A mask source whose masks and masked weights stay in memory from the forward to the backward pass."""

    trainable = False

    def __init__(self, source: GeneratorMasks):
        self.structure = source.structure
        self.begin = source.begin


def authors_generator(structure: Structure, unet: torch.nn.Module) -> ReferenceGenerator:
    """The released architecture in the released sizes; its last map does not start at zero, so that gradients flow."""
    maps = {}
    for block in structure.blocks:
        convolution = unet.get_submodule(block.anchor).in_layers[2]
        maps[block.name] = (convolution.out_channels // 4, convolution.in_channels // 4, AUTHORS_HIDDEN)
    return ReferenceGenerator(structure, maps)


@contextlib.contextmanager
def _acting(base: BaseModel, source: Any) -> Iterator[None]:
    with installed(base.unet, [(source, 1.0)]):
        yield


LORA, MASKUNET, KEPT, AUTHORS = "LoRA rank 8", "MaskUNet", "MaskUNet, masks kept", "authors' generator"


def _build(name: str, base: BaseModel) -> tuple[torch.nn.Module, Any]:
    """(trained module, context manager around a call and its backward pass)."""
    method = build_method(base, parse_config({"method": "lora" if name == LORA else "maskunet"}))
    if name == KEPT:
        return method.module, lambda: _acting(base, _Kept(method.source))
    if name == AUTHORS:
        authors = authors_generator(method.structure, base.unet)
        return authors, lambda: _acting(base, GeneratorMasks(authors, trainable=True))
    return method.module, method.acting


def _step(base: BaseModel, optimiser: Any, acting: Any, batch: int, pixels: int, width: int, tokens: int):
    """(seconds, peak bytes) of one training step."""
    clean, noise = torch.randn(2, batch, 4, pixels // 8, pixels // 8)
    conditions = {"cross_attn": torch.randn(batch, tokens, width)}
    with PeakMemory(torch.device("cpu")) as memory:
        began = time.perf_counter()
        with acting():
            base.diffusion_loss(clean, conditions, torch.randint(1000, (batch,)), noise).mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
    return seconds, memory.peak


def measure(model: str, pixels: int, batches: list[int], repetitions: int) -> list[dict]:
    """A row per batch and method: medians after a first step, and their ratios to LoRA's."""
    torch.manual_seed(0)
    base = load_toy_base() if model == "toy" else random_sd15()
    shape = {"width": 128, "tokens": 16} if model == "toy" else {"width": 768, "tokens": 77}
    rows = []
    for batch in batches:
        lora = None
        for name in (LORA, MASKUNET, KEPT, AUTHORS):
            module, acting = _build(name, base)
            parameters = list(module.parameters())
            optimiser = build_optimiser([{"params": parameters}], parse_config({}).optimiser)
            turns = [_step(base, optimiser, acting, batch, pixels, **shape) for _ in range(repetitions + 1)][1:]
            seconds, peak = (statistics.median(values) for values in zip(*turns))
            lora = lora or (seconds, peak)
            rows.append(
                {
                    "model": model,
                    "pixels": pixels,
                    "batch": batch,
                    "method": name,
                    "parameters": sum(p.numel() for p in parameters),
                    "s per step": round(seconds, 3),
                    "over LoRA": round(seconds / lora[0], 3),
                    "peak MB": round(peak / MB),
                    "peak over LoRA": round(peak / lora[1], 3),
                }
            )
    return rows
