"""What is compared: tasks, arms, trials, and the jobs that they come to, in the order in which they are done.

Core-seconds of the whole plan, from 0.1 s (LoRA, full, static), 0.23 s (MaskUNet) and 0.3 s (the authors' networks) for
a step of 16, 140 losses and 4.5 pictures a second, and 10 s to start a job:

    base and data                                 1,800
    noise     30 trials x  68, 18 finals x 169    5,100     ablations   6 x 170   1,000
    style     30 trials x  68, 18 finals x 169    5,100     ablations  39 x 140   5,500
      on more layers   20 trials x 75, 12 finals x 180      3,700
    subject   60 trials x  36, 36 finals x 137    7,100     together             29,300

A final measures 4,096 losses for its last state, as many for its best one where that is another, and 192 pictures.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..config import Config
from ..config_file import parse_config
from ..toy.bodies import TRANSFORMER_CFG, TRANSFORMER_STEPS
from .worlds import CLASS

ARMS = ("static_mask", "maskunet", "reference_released", "reference_freed", "lora", "full")
PLAIN_ARMS = ("static_mask", "maskunet", "lora", "full")
"""Without the authors' networks, which are made for a U-Net's decoder attention."""


@dataclass(frozen=True)
class Task:
    """world: what is tuned to, and from which base; tasks may share one. steps, batch, targets: of every arm alike.

    weighs_forgetting: settings are chosen by gain plus forgetting, not by gain alone. prior: the base's own pictures
    of the class make half of every batch. targets: the layers that are masked or trained. ablations: of ABLATIONS.
    body: of the toy model, `unet` or `transformer`.
    """

    name: str
    world: str
    steps: int
    batch: int
    weighs_forgetting: bool = True
    prior: bool = False
    targets: str = "decoder attention"
    arms: tuple[str, ...] = ARMS
    ablations: tuple[str, ...] = ()
    body: str = "unet"


@dataclass(frozen=True)
class Scale:
    """How much of everything. factors: of the central learning rates, a tuning trial each.

    pairs: (picture, noise, timestep) of a test loss; prompts: distinct ones of each kind, drawn twice. body: what is
    tuned.
    """

    seeds: int = 3
    factors: tuple[float, ...] = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)
    base_steps: int = 2000
    base_pictures: int = 60_000
    noise_steps: int = 250
    style_steps: int = 250
    subject_steps: int = 150
    noise_pictures: int = 6000
    style_pictures: int = 300
    subject_pictures: int = 12
    prior_pictures: int = 100
    validation_pairs: int = 512
    pairs: int = 2048
    prompts: int = 32
    real_pictures: int = 1000
    sampling_steps: int = 15
    cfg: float = 5.0
    body: str = "unet"

    @classmethod
    def of(cls, body: str) -> "Scale":
        """The whole comparison. A step of the transformer costs half as much again as one of the U-Net, and it wants
        lower rates: a ninth is the lowest at which a bias that starts at 1 comes to cross the threshold.
        """
        if body == "unet":
            return cls()
        factors = (1 / 9, 3**-1.5, 1 / 3, 3**-0.5, 1.0)
        sampling = {"sampling_steps": TRANSFORMER_STEPS, "cfg": TRANSFORMER_CFG}
        return cls(factors=factors, style_steps=150, body=body, **sampling)

    @classmethod
    def quick(cls, body: str = "unet") -> "Scale":
        """A few steps of everything: shows that the path works, not which arm is better."""
        return replace(
            cls.of(body),
            seeds=1,
            factors=(1.0,),
            base_steps=10,
            base_pictures=256,
            noise_steps=3,
            style_steps=3,
            subject_steps=3,
            noise_pictures=64,
            style_pictures=48,
            prior_pictures=8,
            validation_pairs=16,
            pairs=64,
            prompts=2,
            real_pictures=64,
            sampling_steps=3,
        )

    @property
    def tasks(self) -> tuple[Task, ...]:
        if self.body == "transformer":
            on_all = {"targets": "all attention", "body": self.body}
            return (Task("style", "style", self.style_steps, 16, arms=PLAIN_ARMS, ablations=BIASES, **on_all),)
        return (
            Task("noise", "noise", self.noise_steps, 16, weighs_forgetting=False, ablations=INPUTS),
            Task("style", "style", self.style_steps, 16, ablations=tuple(ABLATIONS)),
            Task(
                "style, more layers",
                "style",
                self.style_steps,
                16,
                targets="decoder attention and feed-forward",
                arms=PLAIN_ARMS,
            ),
            Task("subject", "subject", self.subject_steps, 8),
            Task("subject, prior", "subject", self.subject_steps, 8, prior=True),
        )


WORLDS = ("noise", "style", "subject")
ABLATIONS: dict[str, dict[str, Any]] = {
    "no t_emb": {"generator": {"use_time": False}},
    "no sample": {"generator": {"use_sample": False}},
    "codes per layer": {"generator": {"codes": "layer"}},
    "Gumbel noise": {"generator": {"noise": True}},
    "with feed-forward": {"targets": "decoder attention and feed-forward"},
    "rank 2": {"generator": {"rank": 2}},
    "rank 32": {"generator": {"rank": 32}},
    "tau 1": {"generator": {"tau": 1.0}},
    "tau 5": {"generator": {"tau": 5.0}},
    "start 0.3": {"generator": {"start": 0.3}},
    "bias per row and column": {"generator": {"bias": "row_column"}},
    "bias per group": {"generator": {"bias": "group"}},
    "min-SNR 1": {"loop": {"min_snr": 1.0}},
}
"""Changes of `maskunet`, at the learning rates that were chosen for it."""

INPUTS = ("no t_emb", "no sample")
"""Those that take one of the generator's two inputs away."""
BIASES = ("bias per row and column", "bias per group")
"""Those that share a logit of the bias, which is most of a generator's size, among weights."""

TRIAL_SEED = 1000
"""Of all trials: no run of the tables has it."""

REACH = 12.0
"""Centre of the masks' learning rates: lr_bias * steps, in units of the logits' start."""


def arm_values(arm: str, factor: float, steps: int) -> dict[str, Any]:
    """Method and learning rates of an arm, as tables of a configuration; `factor` scales the central rates.

    On validation pictures of noise and of style on more layers, a temperature of 0.2 instead of 1 served masks that
    change and not the static one; other ranks of LoRA (2, 32) and weight decay or another beta for full weights did not
    help.
    """
    if arm == "lora":
        return {"method": "lora", "lora": {"rank": 8, "alpha": 8.0}, "optimiser": {"lr": 2e-3 * factor}}
    if arm == "full":
        return {"method": "full", "optimiser": {"lr": 5e-4 * factor}}
    lr_bias = REACH / steps * factor
    optimiser = {"lr": lr_bias / 30, "lr_bias": lr_bias}
    if arm.startswith("reference"):
        generator = {"architecture": "reference", "freed": arm == "reference_freed"}
        return {"method": "maskunet", "generator": generator, "optimiser": optimiser}
    generator = {"tau": 1.0} if arm == "static_mask" else {}
    return {"method": arm, "generator": generator, "optimiser": optimiser}


def configuration(
    task: Task,
    arm: str,
    factor: float,
    seed: int,
    output: Path,
    weights: Path | None = None,
    changes: dict[str, Any] | None = None,
    validated: bool = False,
) -> Config:
    """The configuration of one run. weights: folder of the base, None for the shipped one; changes: of an ablation.

    validated: five times on the way, so that the best state is known.
    """
    values = {
        "targets": task.targets,
        **arm_values(arm, factor, task.steps),
        "output": str(output),
        "seed": seed,
        "base": {"weights": str(weights) if weights else "", "body": task.body},
        "loop": {"steps": task.steps, "batch": task.batch, "save_every": 100},
        "validation": {"pictures": 64, "every": max(1, task.steps // 5) if validated else 0},
    }
    if task.prior:
        values["prior"] = {"prompt": CLASS, "share": 0.5, "weight": 1.0}
    for key, value in (changes or {}).items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_config(values)


@dataclass(frozen=True)
class Job:
    """name: also its folder. kind: `base`, `data`, `trial` or `final`. needs: names of jobs that come before.

    number: of the trial, or the seed. ablation: of ABLATIONS, "" for none.
    """

    name: str
    kind: str
    world: str
    needs: tuple[str, ...] = ()
    task: Task | None = None
    arm: str = ""
    number: int = 0
    ablation: str = ""


def _trials(task: Task, arm: str, scale: Scale) -> list[Job]:
    needs = (f"{task.world}/data",)
    return [
        Job(f"{task.name}/{arm}/trial-{n}", "trial", task.world, needs, task, arm, n) for n in range(len(scale.factors))
    ]


def _final(task: Task, arm: str, seed: int, scale: Scale, ablation: str = "") -> Job:
    needs = (f"{task.world}/data", *(trial.name for trial in _trials(task, arm, scale)))
    name = f"{task.name}/{ablation or arm}/seed-{seed}"
    return Job(name, "final", task.world, needs, task, arm, seed, ablation)


def make_plan(scale: Scale, worlds: tuple[str, ...] = WORLDS) -> list[Job]:
    """All jobs. Stopped at any time, what is done makes the fullest table that this time allows."""
    jobs = []
    tasks = [task for task in scale.tasks if task.world in worlds]
    for task in tasks:
        base = [Job("noise/base", "base", "noise")] if task.world == "noise" else []
        data = Job(f"{task.world}/data", "data", task.world, tuple(job.name for job in base))
        jobs += [job for job in (*base, data) if job not in jobs]
        for arm in task.arms:
            jobs += _trials(task, arm, scale)
        jobs += [_final(task, arm, 0, scale) for arm in task.arms]
    for seed in range(1, scale.seeds):
        jobs += [_final(task, arm, seed, scale) for task in tasks for arm in task.arms]
    for task in tasks:
        jobs += [_final(task, "maskunet", seed, scale, name) for seed in range(scale.seeds) for name in task.ablations]
    return jobs


def scale_to_values(scale: Scale) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(scale).items()}


def scale_from_values(values: dict[str, Any]) -> Scale:
    return Scale(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
