"""Does one job of the plan, in a process of its own: `python -m trainer.compare.jobs FOLDER NAME`."""

import contextlib
import json
import shutil
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from maskunet_core.errors import MaskUNetError
from maskunet_core.replacing import replacing
from maskunet_core.toy.model import load_reader, read_weights
from maskunet_core.training.base import BaseModel
from maskunet_core.training.run import Diverged
from maskunet_core.training.seeds import seeded

from ..base import load_toy_base
from ..config import Config, to_toml_values
from ..host import enter_host
from ..job_board import folder_of, result_of, write_result
from ..loop import Run
from ..run_folder import CannotResume
from ..toy.data import ToyData, latent_set
from .data import OLD_NOISE, FixedSplit, Sets, load_sets, make_sets, save_sets
from .measure import change, losses, mask_grid, mask_map, mask_scores, picture_scores
from .plan import ABLATIONS, TRIAL_SEED, Job, Scale, configuration, make_plan, scale_from_values

NEW, OLD = "new", "old"
STRIP = "pictures.png"
GENERATOR = "generator.safetensors"
"""Of the masks with the first seed, for MaskUNet Loader."""


class NoSettings(MaskUNetError):
    """No tuning trial of an arm came to an end."""


def weights_of(output: Path, world: str) -> Path | None:
    """Folder of a world's base; None for the shipped one."""
    return output / "noisy_base" if world == "noise" else None


def load_base(output: Path, world: str, scale: Scale) -> BaseModel:
    weights = weights_of(output, world)
    return load_toy_base(str(weights) if weights else "", scale.body)


def train_noisy_base(scale: Scale, output: Path) -> dict[str, Any]:
    """The shipped U-Net, trained further where half of the captions are wrong; everything else stays as shipped."""
    from ..toy.train import Recipe, denoising_loss, fit, save_further, trainable_text_model, trainable_unet

    recipe = Recipe(caption_noise=OLD_NOISE["noise"], pictures=scale.base_pictures, unet_steps=scale.base_steps)
    folder = weights_of(output, "noise")
    unet = trainable_unet()
    unet.load_state_dict(read_weights("unet")[0])
    text = trainable_text_model()
    text.load_state_dict(read_weights("text_encoder")[0])
    text.requires_grad_(False)
    data = latent_set(recipe.pictures, seeded(53), load_toy_base().vae.first_stage_model, recipe.caption_noise)
    step_loss = denoising_loss(unet, text, data, recipe)
    modules = nn.ModuleDict({"unet": unet})
    log = fit("noisy base", modules, step_loss, recipe.unet_steps, 4e-4, folder / "state" / "unet.pt", ema=0.99)
    save_further(folder, unet, log)
    shutil.rmtree(folder / "state", ignore_errors=True)
    return {"steps": recipe.unet_steps, "seconds": log["seconds"], "loss": log["loss"]}


def _measured_base(base: BaseModel, world: str, sets: Sets, scale: Scale, strip: Path) -> dict[str, Any]:
    return {"pictures": picture_scores(base, base.patcher, world, sets, scale, load_reader("reader_b"), strip)}


def make_data(world: str, scale: Scale, output: Path, folder: Path) -> dict[str, Any]:
    """The sets of a world, its base's losses on them, and the base's pictures; for noise the shipped base's too."""
    base = load_base(output, world, scale)
    sets = make_sets(world, scale, base, load_reader("reader_b"))
    save_sets(sets, folder / "sets.safetensors")
    # As the other jobs find them.
    sets = load_sets(folder / "sets.safetensors")
    of_base = {f"{part}_{domain}": None for part in ("validation", "test") for domain in (NEW, OLD)}
    for name in of_base:
        of_base[name] = losses(base, sets, name)
    with replacing(folder / "base.safetensors") as temporary:
        save_file(of_base, temporary)
    result = {"base": _measured_base(base, world, sets, scale, folder / STRIP)}
    result["losses"] = {name: found.mean().item() for name, found in of_base.items()}
    if world == "noise":
        shipped = load_toy_base()
        found = {d: change(losses(shipped, sets, f"test_{d}"), of_base[f"test_{d}"]) for d in (NEW, OLD)}
        result["shipped"] = _measured_base(shipped, world, sets, scale, folder / "shipped.png") | {"last": found}
    return result


class _Run(Run):
    """Keeps the best parameters instead of files for the nodes, and times its steps."""

    tensorboard = False

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.durations: list[float] = []

    @property
    def best_file(self) -> Path:
        return self.folder / "state" / "best.safetensors"

    def save_result(self) -> None:
        with replacing(self.best_file) as temporary:
            save_file({key: value.contiguous() for key, value in self.module.state_dict().items()}, temporary)

    def train_step(self) -> float:
        began = time.process_time()
        loss = super().train_step()
        self.durations.append(time.process_time() - began)
        return loss


def trained(config: Config, base: BaseModel, sets: Sets, prior: bool) -> _Run:
    """The run of a configuration, at its end; goes on where it was killed. Raises Diverged."""
    from ..train import make_accelerator

    data = FixedSplit(sets["training"], sets["validation_new"], base.encode_tokens)
    options = {"prior": ToyData(sets["prior"], base.encode_tokens)} if prior else {}
    run = _Run(config, base, data, make_accelerator(config), **options)
    if run.state_file.exists():
        # A version with other settings may have left it.
        with contextlib.suppress(CannotResume):
            run.load_state()
    run.run()
    return run


def trial(job: Job, scale: Scale, output: Path, folder: Path) -> dict[str, Any]:
    """The score of one setting on the validation sets, which no table uses: the lower, the better."""
    weights = weights_of(output, job.world)
    config = configuration(job.task, job.arm, scale.factors[job.number], TRIAL_SEED, folder / "run", weights)
    base, sets, of_base = _loaded(job, scale, output)
    result = {"factor": scale.factors[job.number], "optimiser": asdict(config.optimiser)}
    try:
        run = trained(config, base, sets, job.task.prior)
    except Diverged:
        return result | {"diverged": True, "score": None}
    changes = {d: _change(run, base, sets, f"validation_{d}", of_base) for d in (NEW, OLD)}
    score = changes[NEW][0] + (changes[OLD][0] if job.task.weighs_forgetting else 0.0)
    return result | changes | {"score": score}


def _loaded(job: Job, scale: Scale, output: Path) -> tuple[BaseModel, Sets, dict]:
    data = folder_of(output, f"{job.world}/data")
    return (
        load_base(output, job.world, scale),
        load_sets(data / "sets.safetensors"),
        load_file(data / "base.safetensors"),
    )


def _change(run: _Run, base: BaseModel, sets: Sets, name: str, of_base: dict) -> list[float]:
    return change(losses(base, sets, name, run.method), of_base[name])


def chosen_factor(job: Job, scale: Scale, output: Path) -> float:
    """The factor of the arm's best trial. Raises NoSettings where all of them diverged."""
    found = [result_of(output, name) for name in job.needs if "/trial-" in name]
    scored = [result for result in found if result["score"] is not None]
    if not scored:
        raise NoSettings(f"All trials of {job.arm} on {job.task.name} diverged, so there are no settings for it.")
    return min(scored, key=lambda result: result["score"])["factor"]


def final(job: Job, scale: Scale, output: Path, folder: Path) -> dict[str, Any]:
    """One run at the chosen settings, measured on the test sets."""
    factor = chosen_factor(job, scale, output)
    changes = ABLATIONS[job.ablation] if job.ablation else {}
    weights = weights_of(output, job.world)
    validated = not job.ablation
    config = configuration(job.task, job.arm, factor, job.number, folder / "run", weights, changes, validated)
    base, sets, of_base = _loaded(job, scale, output)
    run = trained(config, base, sets, job.task.prior)
    result: dict[str, Any] = {"factor": factor, "config": to_toml_values(config)}
    result["parameters"] = sum(p.numel() for p in run.module.parameters())
    result["seconds_per_step"] = statistics.median(run.durations) if run.durations else None
    result["last"] = {d: _change(run, base, sets, f"test_{d}", of_base) for d in (NEW, OLD)}
    with run.method.sampling() as patched:
        judge = load_reader("reader_b")
        result["pictures"] = picture_scores(base, patched, job.world, sets, scale, judge, folder / STRIP)
    if run.method.statistics is not None:
        result["masks"] = mask_scores(mask_grid(base, run.method, sets["test_new"], 8, 8))
    first_masks = job.arm == "maskunet" and job.number == 0 and not job.ablation
    if first_masks:
        found = mask_map(base, run.method, sets["test_new"], 10, 20)
        with replacing(folder / "masks.json") as temporary:
            temporary.write_text(json.dumps(found), encoding="utf-8")
    if not job.ablation:
        result["best"] = {"step": run.best["step"]}
        if run.best["step"] == run.step:
            result["best"] |= result["last"]
        else:
            run.module.load_state_dict(load_file(run.best_file))
            result["best"] |= {d: _change(run, base, sets, f"test_{d}", of_base) for d in (NEW, OLD)}
    if first_masks:
        run.method.save(folder / GENERATOR, run.record())
    return result


def do(job: Job, scale: Scale, output: Path) -> dict[str, Any]:
    """Do a job and keep what it found; done before, it is not done again."""
    done = result_of(output, job.name)
    if done is not None:
        return done
    folder = folder_of(output, job.name)
    began = time.monotonic()
    if job.kind == "base":
        result = train_noisy_base(scale, output)
    elif job.kind == "data":
        result = make_data(job.world, scale, output, folder)
    elif job.kind == "trial":
        result = trial(job, scale, output, folder)
    else:
        result = final(job, scale, output, folder)
    result = write_result(output, job.name, result, began)
    shutil.rmtree(folder / "run" / "state", ignore_errors=True)
    return result


def main() -> int:
    output, name = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    enter_host(cpu=True)
    scale = scale_from_values(json.loads((output / "scale.json").read_text(encoding="utf-8")))
    do(next(job for job in make_plan(scale) if job.name == name), scale, output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
