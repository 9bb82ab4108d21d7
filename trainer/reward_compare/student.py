"""A few-step student of the toy model, as Turbo, LCM and Lightning are of large ones: 4 steps, no guidance.

From a state on the teacher's trajectory (16 guided steps) the student foretells the trajectory's end, so that its first
estimate is a picture already. It is trained at the noise levels of its own 4 steps, and sampled like a consistency
model (Luo et al., arXiv 2310.04378).
"""

import itertools
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from maskunet_core.toy import vocabulary
from maskunet_core.toy.model import UNET_CONFIG

from ..files import replacing
from ..seeds import seeded
from ..toy.train import fit
from ..toy.world import sample_captioned
from .stage import Sampling, Stage

SAMPLING = Sampling(steps=4, cfg=1.0, sampler="lcm", scheduler="sgm_uniform")
_PER_STEP = 4
"""Steps of the teacher for one of the student."""


def _sigmas(stage: Stage, steps: int) -> Tensor:
    import comfy.samplers

    sampling = stage.base.patcher.get_model_object("model_sampling")
    return comfy.samplers.calculate_sigmas(sampling, SAMPLING.scheduler, steps)


@torch.no_grad()
def trajectories(stage: Stage, count: int, batch: int = 100) -> dict[str, Tensor]:
    """The teacher's, for captions that no prompt of the tables is among.

    states: `[count, 4, 4, 8, 8]` before each step of the student; ends: `[count, 4, 8, 8]`; tokens: `[count, 16]`.
    """
    _, captions = sample_captioned(count, seeded(80))
    tokens = torch.tensor([vocabulary.encode_padded(str(caption)) for caption in captions])
    sigmas = _sigmas(stage, _PER_STEP * SAMPLING.steps)
    stream, empty = seeded(81), stage.empty[0][0]
    states, ends = [], []
    for part in tqdm(tokens.split(batch), desc="trajectories", mininterval=1):
        context = torch.cat([stage.base.encode_tokens(part), empty.expand(len(part), -1, -1)])
        x = torch.randn(len(part), 4, 8, 8, generator=stream) * torch.sqrt(1 + sigmas[0] ** 2)
        seen = []
        for now, after in itertools.pairwise(sigmas):
            seen.append(x)
            both = stage.base.model.apply_model(torch.cat([x, x]), now.expand(2 * len(x)), c_crossattn=context)
            positive, negative = both.chunk(2)
            clean = negative + stage.sampling.cfg * (positive - negative)
            x = x + (x - clean) / now * (after - now)
        states.append(torch.stack(seen[::_PER_STEP], 1))
        ends.append(x)
    return {"states": torch.cat(states), "ends": torch.cat(ends), "tokens": tokens}


def train_student(folder: Path, count: int, steps: int, batch: int = 32, lr: float = 2e-4) -> dict:
    """Writes `unet.safetensors` to `folder`; goes on where it was stopped. Returns the log of `fit`."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    stage, data = Stage(), folder / "trajectories.safetensors"
    if not data.exists():
        with replacing(data) as temporary:
            save_file(trajectories(stage, count), temporary)
    seen = load_file(data)
    sigmas = _sigmas(stage, SAMPLING.steps)[:-1]
    timesteps = stage.base.model.model_sampling.timestep(sigmas).float()
    unet = UNetModel(**UNET_CONFIG, device="cpu", operations=comfy.ops.manual_cast)
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
    with replacing(folder / "unet.safetensors") as temporary:
        save_file(unet.state_dict(), temporary)
    return log
