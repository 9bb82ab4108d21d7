"""Promises of the nodes in the real host, on SD 1.5's shapes: `python -m tests.gpu.in_host static|dynamic FILE`."""

import sys
from collections.abc import Callable
from pathlib import Path

from tests.gpu import host
from tests.gpu.rows import Rows

MB = 2**20
LEFT_OVER = 8 * MB
"""Bytes that may lie elsewhere after the same work: pieces of the allocator's and of cuBLAS's own."""


def digest(model) -> int:
    """Of all bits of the diffusion model's weights."""
    import torch

    total = 0
    for number, value in enumerate(model.model.diffusion_model.state_dict().values()):
        bits = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        bits = torch.nn.functional.pad(bits, (0, -len(bits) % 4)).view(torch.int32)
        total = (total * 31 + (number + 1) * int(bits.sum(dtype=torch.int64))) % 2**64
    return total


def difference(one, other) -> str:
    return f"largest difference {float((one - other).abs().max()):.3g}"


def same(rows: Rows, check: str, one, other) -> None:
    import torch

    rows.promise(check, torch.equal(one, other), difference(one, other))


def other_picture(rows: Rows, check: str, one, other) -> None:
    import torch

    rows.promise(check, bool(torch.isfinite(one).all()) and not torch.equal(one, other), difference(one, other))


def off_and_on(scene, rows: Rows) -> None:
    from tests.gpu.models import UNTRAINED

    stock = scene.samples(scene.model)
    same(rows, "the stock model draws the same bits twice", scene.samples(scene.model), stock)
    off = {
        "strength 0": scene.masked(strength=0.0),
        "a generator that keeps everything": scene.masked(file=UNTRAINED),
        "random masks that keep everything": scene.random(keep=1.0),
    }
    for name, model in off.items():
        same(rows, f"{name}: the stock model's bits", scene.samples(model), stock)
    on = {"generator": scene.masked(), "stochastic": scene.masked(stochastic=True, seed=4), "random": scene.random()}
    for name, model in on.items():
        drawn = scene.samples(model)
        other_picture(rows, f"{name} masks: another picture", drawn, stock)
        same(rows, f"{name} masks: the same bits twice", scene.samples(model), drawn)
    same(rows, "after masks: the stock model's bits", scene.samples(scene.model), stock)


def record_and_replay(scene, rows: Rows) -> None:
    for images in (1, 4):
        for name, model in {"generator": scene.masked(), "random": scene.random()}.items():
            latent = scene.draw(scene.recording(model), images)
            what = f"{name} masks, batch {images}"
            same(rows, f"{what}: a recorded run draws the same bits", latent["samples"], scene.samples(model, images))
            again = scene.samples(scene.replaying(scene.masks_of(latent)), images)
            same(rows, f"{what}: a replay draws the same bits", again, latent["samples"])


def lora(scene, rows: Rows) -> None:
    from tests.gpu.models import UNTRAINED

    plain = scene.samples(scene.with_lora())
    other_picture(rows, "LoRA: another picture", plain, scene.samples(scene.model))
    kept = scene.samples(scene.masked(scene.with_lora(), UNTRAINED))
    same(rows, "LoRA with everything kept: the LoRA's bits", kept, plain)
    before, after = scene.samples(scene.masked(scene.with_lora())), scene.samples(scene.with_lora(scene.masked()))
    same(rows, "LoRA before and after the masks: the same bits", before, after)
    other_picture(rows, "LoRA with masks: another picture", before, plain)


def controlnet(scene, rows: Rows) -> None:
    from tests.gpu.models import UNTRAINED

    guided = {"conditioning": scene.with_control()}
    plain = scene.samples(scene.model, **guided)
    other_picture(rows, "ControlNet: another picture", plain, scene.samples(scene.model))
    kept = scene.samples(scene.masked(file=UNTRAINED), **guided)
    same(rows, "ControlNet with everything kept: the ControlNet's bits", kept, plain)
    latent = scene.draw(scene.recording(scene.masked()), **guided)
    other_picture(rows, "ControlNet with masks: another picture", latent["samples"], plain)
    again = scene.samples(scene.replaying(scene.masks_of(latent)), **guided)
    same(rows, "ControlNet with masks: a replay draws the same bits", again, latent["samples"])


def perturbed_attention(scene, rows: Rows) -> None:
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    from tests.gpu.models import UNTRAINED

    def perturbed(model):
        return PerturbedAttentionGuidance.execute(model, 3.0).args[0]

    plain = scene.samples(perturbed(scene.model))
    other_picture(rows, "PAG: another picture", plain, scene.samples(scene.model))
    same(rows, "PAG with everything kept: PAG's bits", scene.samples(perturbed(scene.masked(file=UNTRAINED))), plain)
    other_picture(rows, "PAG with masks: another picture", scene.samples(perturbed(scene.masked())), plain)


def batch_of_four(scene, rows: Rows) -> None:
    import torch

    together = scene.samples(scene.masked(), 4)
    rows.promise("batch 4: finite", bool(torch.isfinite(together).all()))
    apart = min(float((together[n] - together[(n + 1) % 4]).abs().mean()) for n in range(4))
    rows.promise("batch 4: four pictures", apart > 0.01, f"mean difference at least {apart:.3g}")
    same(rows, "batch 4: the same bits twice", scene.samples(scene.masked(), 4), together)


def presets(scene, rows: Rows) -> None:
    """Each preset of the reward sampler on small pictures, with few steps and two candidates."""
    import torch

    search = scene.searcher()
    stock = scene.samples(scene.model, pixels=scene.size.small)
    for preset in ("fast", "quality", "paper", "reference", "few_step"):
        few = preset == "few_step"
        sampling = {"steps": 1 if few else scene.size.steps, "cfg": 1.0 if few else 5.0}
        with rows.attempt(f"preset {preset}"):
            latent, masks, *_ = search(scene.size.small, preset=preset, candidates=2, **sampling)
            rows.promise(f"preset {preset}: finite", bool(torch.isfinite(latent["samples"]).all()))
            ratios, seed = masks.keep_ratio(), masks.record["seeds"][0]
            removed = f"keeps from {min(ratios):.5f}, scores {masks.record['scores']}"
            # So few updates remove nothing in some presets.
            rows.promise(f"preset {preset}: masks in range", 0.0 < min(ratios) <= max(ratios) <= 1.0, removed)
            again = scene.samples(scene.replaying(masks), seed=seed, pixels=scene.size.small, **sampling)
            same(rows, f"preset {preset}: a replay draws the same bits", again, latent["samples"])
    same(rows, "after the searches: the stock model's bits", scene.samples(scene.model, pixels=scene.size.small), stock)


PARTS: dict[str, tuple[Callable, ...]] = {
    "nodes": (off_and_on, record_and_replay, batch_of_four, lora, controlnet, perturbed_attention),
    "presets": (presets,),
}


def main(mode: str, part: str, path: Path) -> None:
    rows = Rows(path)
    try:
        host.enter(dynamic=mode == "dynamic")
    except host.NoDynamicVram as error:
        rows.skipped("dynamic VRAM", str(error))
        return
    import torch

    from tests.device import NAME
    from tests.gpu.models import FULL, TINY
    from tests.gpu.scene import Scene

    scene = Scene(FULL if NAME in ("cuda", "mps") else TINY)
    rows.promise("the model's loader", scene.model.is_dynamic() == (mode == "dynamic"), type(scene.model).__name__)
    # What a first run sets up stays for the life of the process.
    scene.samples(scene.masked())
    weights, before = digest(scene.model), host.empty()
    for check in PARTS[part]:
        with rows.attempt(check.__name__.replace("_", " ")):
            check(scene, rows)
    rows.promise("the model's weights: the bits of before", digest(scene.model) == weights)
    after = host.empty()
    if not torch.cuda.is_available():
        rows.skipped("memory: what it was before", "there is no card")
        return
    for what in ("allocated", "used"):
        left = getattr(after, what) - getattr(before, what)
        detail = f"{getattr(before, what) / MB:.0f} MB before, {getattr(after, what) / MB:.0f} MB after"
        # Kernels that are loaded on first use count as used, too, and other processes on the card.
        goal = LEFT_OVER / MB if what == "allocated" else None
        rows.measured(f"memory {what} after all: more than before", round(left / MB, 1), "MB", goal, detail=detail)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
