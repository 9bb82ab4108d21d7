"""The toy U-Net beside the toy transformer, at an equal number of operations per picture."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from maskunet_core.toy.model import load_reader
from maskunet_core.training.base import BaseModel

from ..base import load_toy_base, sample_pictures
from ..evaluate import Protocol, held_out_prompts, judge_pictures
from ..tables import write_table

TRANSFORMER_CFG, TRANSFORMER_STEPS = 5.0, 21
"""The U-Net's are the protocol's; so many steps cost no more operations than its 15."""


@torch.no_grad()
def operations(base: BaseModel) -> int:
    """Floating-point operations of matrix products and convolutions in one call for a picture of 64x64."""
    context = base.encode_text("a red circle")["cross_attn"][None]
    with FlopCounterMode(display=False) as counter:
        base.denoised(torch.zeros(1, 4, 8, 8), torch.ones(1), {"cross_attn": context})
    return counter.get_total_flops()


def compare_bodies(protocol: Protocol, output: Path, weights: str = "") -> list[dict[str, Any]]:
    """A row for the U-Net in the protocol's steps, and one for the transformer in as many as cost no more.

    weights: a folder of toy weights, or "" for the shipped ones. Written to `output/table.md` and `.json`.
    """
    judge = load_reader("reader_b", Path(weights) if weights else None)
    prompts, real = held_out_prompts(protocol)
    texts = [str(prompt) for prompt in prompts]
    rows, budget = [], 0
    for body, cfg in (("unet", protocol.cfg), ("transformer", TRANSFORMER_CFG)):
        base = load_toy_base(weights, body)
        step = 2 * operations(base)
        steps = budget // step if budget else protocol.steps
        budget = budget or steps * step
        with tqdm(total=len(texts), desc=body, mininterval=1) as bar:
            pictures = sample_pictures(base, base.patcher, texts, protocol.seed, steps, cfg, 60, bar.update)
        row = {"body": body, "steps": steps, "cfg": cfg, "operations": f"{steps * step / 1e9:.2f} G"}
        rows.append(row | judge_pictures(pictures, prompts, real, judge))
    print(write_table(output, rows, vars(protocol)))
    return rows
