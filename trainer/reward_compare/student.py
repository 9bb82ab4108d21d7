"""A few-step student of the toy model, as Turbo, LCM and Lightning are of large ones: 4 steps, no guidance.

From a state on the teacher's trajectory (16 guided steps) the student foretells the trajectory's end, so that its first
estimate is a picture already. It is trained at the noise levels of its own 4 steps, and sampled like a consistency
model (Luo et al., arXiv 2310.04378).
"""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from maskunet_core.replacing import replacing
from maskunet_core.toy.captions import Caption
from maskunet_core.training.seeds import seeded

from ..toy.train import fit, save_further, trainable_unet
from ..toy.world import sample_captioned
from .stage import Sampling, Stage, tokens_of

SAMPLING = Sampling(steps=4, cfg=1.0, sampler="lcm", scheduler="sgm_uniform")
_PER_STEP = 4
"""Steps of the teacher for one of the student."""
TEACHER = replace(SAMPLING, steps=_PER_STEP * SAMPLING.steps, cfg=5.0, sampler="euler")


def _trajectory(stage: Stage, captions: list[Caption], noise: Tensor) -> tuple[Tensor, Tensor]:
    seen = []

    def keep(step: int, x0: Tensor, x: Tensor, total: int) -> None:
        if step % _PER_STEP == 0:
            seen.append(x.clone())

    latents = stage.sample(stage.base.patcher, captions, noise, callback=keep)
    return torch.stack(seen, 1), stage.format.process_in(latents)


def trajectories(count: int, batch: int = 100) -> dict[str, Tensor]:
    """The teacher's, for captions that no prompt of the tables is among.

    states: `[count, 4, 4, 8, 8]` before each step of the student; ends: `[count, 4, 8, 8]`; tokens: `[count, 16]`.
    """
    stage, stream = Stage(TEACHER), seeded(81)
    _, captions = sample_captioned(count, seeded(80))
    states, ends = [], []
    for start in tqdm(range(0, count, batch), desc="trajectories", mininterval=1):
        part = captions[start : start + batch]
        of_states, of_ends = _trajectory(stage, part, torch.randn(len(part), 4, 8, 8, generator=stream))
        states.append(of_states)
        ends.append(of_ends)
    return {"states": torch.cat(states), "ends": torch.cat(ends), "tokens": tokens_of(captions)}


def train_student(folder: Path, count: int, steps: int, batch: int = 32, lr: float = 2e-4) -> dict:
    """Writes toy weights to `folder`, which `base.weights` may name; goes on where it was stopped. Returns the log of
    `fit`."""
    import comfy.samplers

    stage, data = Stage(SAMPLING), folder / "trajectories.safetensors"
    if not data.exists():
        with replacing(data) as temporary:
            save_file(trajectories(count), temporary)
    seen = load_file(data)
    schedule = stage.base.model.model_sampling
    sigmas = comfy.samplers.calculate_sigmas(schedule, SAMPLING.scheduler, SAMPLING.steps)[:-1]
    timesteps = schedule.timestep(sigmas).float()
    unet = trainable_unet()
    unet.load_state_dict(stage.base.unet.state_dict())

    def step_loss(step: int) -> Tensor:
        stream = seeded(82, step)
        rows = torch.randint(len(seen["ends"]), (batch,), generator=stream)
        which = torch.randint(len(sigmas), (batch,), generator=stream)
        noisy, sigma = seen["states"][rows, which], sigmas[which].view(-1, 1, 1, 1)
        context = stage.base.encode_tokens(seen["tokens"][rows])
        scaled = noisy / torch.sqrt(1 + sigma**2)
        # In full precision: at the first step an error of the predicted noise counts 15-fold in the picture.
        noise = unet(scaled, timesteps[which], context=context, transformer_options={})
        return (noisy - sigma * noise - seen["ends"][rows]).square().mean()

    log = fit("student", nn.ModuleDict({"unet": unet}), step_loss, steps, lr, folder / "student.pt", ema=0.995)
    save_further(folder, unet, log)
    return log
