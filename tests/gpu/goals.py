"""What masks cost on the device, beside the goals: `python -m tests.gpu.goals NAME FILE`, a name of GOALS.

Variants are measured in turns, and ratios are medians over the turns. On a CPU everything is tiny and there are no
goals: it shows that the measurement runs.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.gpu import host
from tests.gpu.in_host import MB
from tests.gpu.rows import Rows

EAGER, COMPILED, BATCH, EXTRA_MB = 1.08, 1.03, 1.05, 150
"""Goals: a masked step over an unmasked one, eager and compiled; at batch 4; megabytes of peak memory beyond."""
TRAINING, TRAINING_MEMORY = 1.15, 1.1
"""Goals: a training step, and its peak memory, over LoRA's."""
FAST_MB = 8 * 1024
"""Goal: peak memory of the preset `fast` with everything that it needs."""


class Bench:
    """What all measurements share. on_card: whether goals count."""

    def __init__(self, rows: Rows):
        import torch

        from tests.device import DEVICE, NAME

        self.rows, self.device = rows, DEVICE
        self.on_card = NAME in ("cuda", "mps")
        self.dtype = torch.float16 if self.on_card else torch.float32
        if not torch.cuda.is_available():
            # Where there is no card, the clock of tests.bench counts seconds of the processor.
            torch.set_num_threads(1)

    def goal(self, value: float) -> float | None:
        return value if self.on_card else None

    def ratio(self, check: str, ratios: list[float], goal: float | None, **more: Any) -> None:
        told = {"from": round(min(ratios), 3), "to": round(max(ratios), 3)} | more
        self.rows.measured(check, round(statistics.median(ratios), 3), "of the other", goal, **told)


class StepClock:
    """Seconds between the ends of a run's steps: the sampler's callback. On a card nothing waits for them."""

    def __init__(self):
        self.marks: list[Any] = []

    def __call__(self, *_: Any) -> None:
        import torch

        if not torch.cuda.is_available():
            self.marks.append(time.process_time())
            return
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        self.marks.append(mark)

    def seconds(self) -> list[float]:
        import torch

        pairs = list(zip(self.marks, self.marks[1:]))
        if not torch.cuda.is_available():
            return [end - begin for begin, end in pairs]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairs]


def conditioning(model: Any) -> list:
    """Of the widths that the model takes, drawn by chance."""
    import torch

    width = model.model.model_config.unet_config["context_dim"]
    stream = torch.Generator().manual_seed(0)
    return [[torch.randn(1, 77, width, generator=stream), {"pooled_output": torch.randn(1, 1280, generator=stream)}]]


def step_seconds(model: Any, pixels: int, images: int, steps: int) -> float:
    """Median of the steps of a run with classifier-free guidance, the first left out."""
    import comfy.sample
    import torch

    clock, both = StepClock(), conditioning(model)
    noise = torch.randn(images, 4, pixels // 8, pixels // 8, generator=torch.Generator().manual_seed(0))
    options = {"disable_pbar": True, "seed": 0, "callback": clock}
    with torch.inference_mode():
        comfy.sample.sample(model, noise, steps, 7.5, "euler", "normal", both, both, noise, **options)
    return statistics.median(clock.seconds())


def peak_of(action: Callable[[], Any], bench: Bench) -> float:
    """Megabytes."""
    from maskunet_core.training.cost import PeakMemory

    gc.collect()
    with PeakMemory(bench.device) as memory:
        action()
    return memory.peak / MB


def masked_steps(
    bench: Bench, variants: dict[str, Any], pixels: int, images: int, goal: float, turns: int = 5, steps: int = 8
) -> None:
    """variants: MODELs by name, the first of them the one that the others are compared with."""
    run = {name: partial(step_seconds, model, pixels, images, steps) for name, model in variants.items()}
    for step in run.values():
        step()
    peaks = {name: peak_of(step, bench) for name, step in run.items()}
    taken = [{name: step() for name, step in run.items()} for _ in range(turns)]
    plain = next(iter(run))
    about = {"pixels": pixels, "images": images}
    for name in run:
        seconds = statistics.median(turn[name] for turn in taken)
        what = f"{name}, {pixels} pixels, batch {images}"
        bench.rows.measured(f"{what}: a step", round(1000 * seconds, 2), "ms", **about)
        if name == plain:
            continue
        bench.ratio(
            f"{what}: step over {plain}", [turn[name] / turn[plain] for turn in taken], bench.goal(goal), **about
        )
        extra = round(peaks[name] - peaks[plain], 1)
        bench.rows.measured(f"{what}: peak memory beyond {plain}", extra, "MB", bench.goal(EXTRA_MB), **about)


def throughput(bench: Bench, model: Any, pixels: int) -> None:
    """A step's operations a second, over those of the device's own matrix product in the same minute."""
    from tests.bench.sampling import Speed
    from trainer.reward_compare.costs import Operations

    speed = Speed.of(bench.device, bench.dtype)
    bench.rows.measured("this device: matrix product", round(speed.operations / 1e12, 2), "TFLOP/s")
    bench.rows.measured("this device: copy, read and written", round(speed.bytes / 1e9, 1), "GB/s")
    with Operations() as counted:
        step_seconds(model, pixels, 1, 2)
    reached = counted.total / 2 / step_seconds(model, pixels, 1, 6)
    bench.rows.measured("unmasked step over the matrix product", round(reached / speed.operations, 3), "of the other")


def sd15(bench: Bench) -> None:
    from tests.gpu.models import FULL, TINY
    from tests.gpu.scene import Scene

    scene = Scene(FULL if bench.on_card else TINY)
    pixels, turns = scene.size.pixels, 7 if bench.on_card else 1
    variants = {"unmasked": scene.model, "generator": scene.masked(), "random masks": scene.random()}
    steps = 8 if bench.on_card else 3
    with bench.rows.attempt("batch 1"):
        masked_steps(bench, variants, pixels, 1, EAGER, turns, steps)
    with bench.rows.attempt("batch 4"):
        masked_steps(bench, variants, pixels, 4, BATCH, turns, steps)
    with bench.rows.attempt("throughput"):
        throughput(bench, scene.model, pixels)


def sdxl(bench: Bench) -> None:
    """On the CPU a U-Net of SDXL's kind, as narrow as it may be."""
    import torch

    from maskunet_core.models.structure import inspect_model
    from tests.bench.models import random_base
    from tests.builders import make_generator

    if not bench.on_card:
        bench.rows.skipped("SDXL", "2.6 billion weights are too many for a CPU")
        return
    base = random_base("SDXL", bench.dtype, bench.device, small=True)
    node = host.extension()
    with torch.inference_mode():
        random = node("random_mask").MaskUNetRandomMask
        masked = random.execute(base.patcher, 0.95, 1, "decoder attention", True, 0.0, 1.0).result[0]
        variants = {"unmasked": base.patcher, "random masks": masked}
        with bench.rows.attempt("generator"):
            structure = inspect_model(base.unet, "decoder attention", "SDXL")
            variants["generator"] = applied(node, base.patcher, make_generator(structure, lively=True))
    with bench.rows.attempt("batch 1"):
        masked_steps(bench, variants, 1024, 1, EAGER)


def applied(node: Any, model: Any, generator: Any) -> Any:
    """A MODEL masked by a generator that lies in no folder of the host."""
    import tempfile

    import folder_paths

    from maskunet_core.files import checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "made_here.safetensors", generator, "decoder attention", {})
        folder_paths.add_model_folder_path("maskunet", folder)
        loaded = node("generator").MaskUNetLoader.execute("made_here.safetensors").result[0]
    return node("generator").MaskUNetApply.execute(model, loaded, 1.0, 0.0, 1.0, False, 0).result[0]


def presets(bench: Bench) -> None:
    """The presets that people begin with, whole: 15 steps at 512 pixels, with a reward of PickScore's size."""
    from tests.bench.clock import seconds
    from tests.gpu.models import FULL, TINY
    from tests.gpu.scene import Scene

    scene = Scene(FULL if bench.on_card else TINY)
    search, steps = scene.searcher(), 15 if bench.on_card else 2
    scene.draw(scene.model, steps=steps)
    plain = seconds(lambda: scene.draw(scene.model, steps=steps))
    bench.rows.measured("a plain picture", round(plain, 3), "s", pixels=scene.size.pixels, steps=steps)
    for preset, goal in (("fast", FAST_MB), ("quality", None)):
        with bench.rows.attempt(f"preset {preset}"):
            few = {} if bench.on_card else {"candidates": 2}
            run = partial(search, scene.size.pixels, preset=preset, steps=steps, sampler_name="dpmpp_2m", **few)
            taken = []
            host.empty()
            peak = peak_of(lambda run=run, taken=taken: taken.append(seconds(run)), bench)
            taken += [seconds(run) for _ in range(2 if bench.on_card else 0)]
            typical = statistics.median(taken)
            told = {"from": round(min(taken), 3), "to": round(max(taken), 3)}
            bench.rows.measured(f"preset {preset}: a whole picture", round(typical, 3), "s", **told)
            bench.rows.measured(f"preset {preset}: in plain pictures", round(typical / plain, 2), "pictures")
            limit = None if goal is None else bench.goal(goal)
            bench.rows.measured(f"preset {preset}: peak memory, models loaded in it", round(peak), "MB", limit)


def training(bench: Bench) -> None:
    from tests.bench import training as steps

    model, pixels, batch, turns = ("SD 1.5", 512, 4, 7) if bench.on_card else ("toy", 64, 4, 1)
    rows = steps.measure(model, pixels, {batch: turns}, bench.device, methods=(steps.LORA, "MaskUNet"))
    for row in rows:
        about = {"pixels": pixels, "images": batch}
        bench.rows.measured(f"training, {row['method']}: a step", row["s per step"], "s", **about)
        bench.rows.measured(f"training, {row['method']}: peak memory", row["peak MB"], "MB", **about)
        if row["method"] != steps.LORA:
            check = f"training, {row['method']}"
            bench.rows.measured(f"{check}: step over LoRA's", row["over LoRA"], "of the other", bench.goal(TRAINING))
            ratio, goal = row["peak over LoRA"], bench.goal(TRAINING_MEMORY)
            bench.rows.measured(f"{check}: peak over LoRA's", ratio, "of the other", goal)


def compiled(bench: Bench) -> None:
    """Through the host's own node for torch.compile."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    from tests.gpu.models import FULL, TINY
    from tests.gpu.scene import Scene

    scene = Scene(FULL if bench.on_card else TINY)
    if not bench.on_card:
        bench.rows.skipped("compiled", "compiling for a CPU takes minutes, and there is no goal for it")
        return
    plain = {"compiled, unmasked": scene.model, "compiled, generator": scene.masked()}
    variants = {name: TorchCompileModel.execute(model, "inductor").args[0] for name, model in plain.items()}
    masked_steps(bench, variants, scene.size.pixels, 1, COMPILED)


GOALS = {"sd15": sd15, "sdxl": sdxl, "presets": presets, "training": training, "compiled": compiled}


def main(goal: str, path: Path) -> None:
    rows = Rows(path)
    host.enter()
    with rows.attempt(goal):
        GOALS[goal](Bench(rows))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
