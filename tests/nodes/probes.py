"""Patches as packs of other people make them, written anew for tests: each is a function (World, Graph) to Graph."""

from dataclasses import replace
from typing import Any

import comfy.samplers
import torch

from tests.host.extension import core_module


def couple(world: Any, graph: Any) -> Any:
    """Regional attention: the positive branch's queries are repeated for each of two regions, and averaged after.

    The second region's text is another one.
    """
    model = graph.model.clone()

    def repeated(q, k, v, extra):
        counts = [2 if branch == 0 else 1 for branch in extra["cond_or_uncond"]]
        cut = [x.chunk(len(counts)) for x in (q, k, v)]
        q, k, v = (torch.cat([part.repeat(n, 1, 1) for part, n in zip(parts, counts)]) for parts in cut)
        size = q.shape[0] // sum(counts)
        second = [region == 1 for count in counts for region in range(count) for _ in range(size)]
        return q, torch.where(torch.tensor(second).view(-1, 1, 1), 0.5 * k, k), v

    def averaged(out, extra):
        counts = [2 if branch == 0 else 1 for branch in extra["cond_or_uncond"]]
        size = out.shape[0] // sum(counts)
        parts = out.split([count * size for count in counts])
        return torch.cat([part.unflatten(0, (count, size)).mean(0) for part, count in zip(parts, counts)])

    model.set_model_attn2_patch(repeated)
    model.set_model_attn2_output_patch(averaged)
    return replace(graph, model=model)


def tiles(batched: bool):
    """The picture is cut in two, whose parts go to the model one by one, or as one batch."""

    def probe(world: Any, graph: Any) -> Any:
        model = graph.model.clone()

        def wrapper(apply, given):
            x, t, c = given["input"], given["timestep"], given["c"]
            parts = x.chunk(2, dim=3)
            if not batched:
                return torch.cat([apply(part, t, **c) for part in parts], dim=3)
            twice = {name: torch.cat([v, v]) if torch.is_tensor(v) else v for name, v in c.items()}
            return torch.cat(apply(torch.cat(parts), torch.cat([t, t]), **twice).chunk(2), dim=3)

        model.set_model_unet_function_wrapper(wrapper)
        return replace(graph, model=model)

    return probe


def adapter(world: Any, graph: Any) -> Any:
    """Adds something else to each branch of guidance, as image adapters do."""
    model, stream = graph.model.clone(), torch.Generator().manual_seed(0)
    added = {0: torch.randn(1, 1, 128, generator=stream), 1: torch.zeros(1, 1, 128)}

    def patch(out, extra):
        guidance = extra["cond_or_uncond"]
        parts = zip(out.chunk(len(guidance)), guidance)
        return torch.cat([part + 0.5 * added[branch].to(part) for part, branch in parts])

    model.set_model_attn2_output_patch(patch)
    return replace(graph, model=model)


def sliding_windows(world: Any, graph: Any) -> Any:
    """Guidance by windows of the picture, whose positive prediction is computed after the whole picture's."""
    model = graph.model.clone()

    def guide(given):
        x = given["input"]
        seen = torch.zeros_like(x)
        for left in range(0, x.shape[3], 4):
            part = x[..., left : left + 4].contiguous()
            options = given["model_options"]
            (of_part,) = comfy.samplers.calc_cond_batch(given["model"], [given["cond"]], part, given["sigma"], options)
            seen[..., left : left + 4] = of_part
        return given["denoised"] + 0.5 * (given["cond_denoised"] - seen)

    model.set_model_sampler_post_cfg_function(guide)
    return replace(graph, model=model)


def positive_masks(world: Any, graph: Any) -> Any:
    """Recorded masks of the positive branch in front."""
    recorded = core_module("records.recorded")
    masks = recorded.RecordedMasks(world.structure, 1, {}, "decoder attention", "positive")
    stream = torch.Generator().manual_seed(3)
    masks.add(
        1.0,
        {
            name: torch.rand(1, layer.out_features, layer.in_features, generator=stream) < 0.8
            for name, layer in world.structure.layers.items()
        },
    )
    return replace(graph, model=world.extension("masks").MaskUNetApplyMasks.execute(graph.model, masks, 1.0).result[0])


def timestep_gap(world: Any, graph: Any) -> Any:
    """No positive conditioning acts in the second half of the run."""
    return replace(graph, positive=[[text, {**more, "end_percent": 0.4}] for text, more in graph.positive])


def timestep_gap_first(world: Any, graph: Any) -> Any:
    """No positive conditioning acts in the first half of the run."""
    return replace(graph, positive=[[text, {**more, "start_percent": 0.4}] for text, more in graph.positive])


def counting(world: Any, graph: Any) -> Any:
    """Guidance that changes with each call that it sees, and with random numbers."""
    model, calls = graph.model.clone(), {"count": 0}

    def guide(given):
        calls["count"] += 1
        return given["denoised"] * (1 + 0.01 * calls["count"]) + 0.01 * torch.randn(given["denoised"].shape)

    model.set_model_sampler_post_cfg_function(guide)
    return replace(graph, model=model)


PROBES = {
    "attention couple": couple,
    "tiles one by one": tiles(batched=False),
    "tiles as one batch": tiles(batched=True),
    "adapter by branch": adapter,
    "sliding windows": sliding_windows,
    "positive masks": positive_masks,
    "no positive late": timestep_gap,
    "no positive early": timestep_gap_first,
    "guidance that counts": counting,
}
