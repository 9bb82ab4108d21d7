"""Trains the embedded toy model from nothing: autoencoder, two readers, text encoder and U-Net.

Every stage is seeded step by step, so that a run which was stopped goes on where it was and ends with the same
weights as one that was not.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from maskunet_core.errors import MaskUNetError
from maskunet_core.replacing import replacing
from maskunet_core.torch_file import read_torch, write_torch
from maskunet_core.toy import vocabulary
from maskunet_core.toy.autoencoder import ToyAutoencoder
from maskunet_core.toy.model import TEXT_CONFIG, UNET_CONFIG, WEIGHTS, load_autoencoder, read_weights, text_model_class
from maskunet_core.toy.readers import AttentiveReader, ConvolutionalReader
from maskunet_core.training.schedules import learning_rate_factor
from maskunet_core.training.seeds import seeded

from ..benchmark.methods import Method
from ..evaluate import Protocol, evaluate
from ..host import cpu_has_bf16
from .data import LatentSet, latent_set
from .muon import Muon
from .world import Scenes, render, sample_scenes


class OtherRecipe(MaskUNetError):
    """The folder holds parts that were trained with another recipe."""


SAVE_EVERY = 250
"""Steps."""
WIDER = {"rotation": 0.4, "jitter": 1.5}
"""Autoencoder and readers see shapes turned and moved further than the world's: drawn ones never surprise them."""


@dataclass(frozen=True)
class Recipe:
    """Steps, batch sizes and rates of all stages. `pictures` is the size of the U-Net's training set."""

    seed: int = 0
    autoencoder_steps: int = 2200
    autoencoder_batch: int = 32
    reader_a_steps: int = 1500
    reader_b_steps: int = 2000
    reader_batch: int = 64
    pictures: int = 120_000
    caption_noise: float = 0.25
    caption_dropout: float = 0.1
    unet_steps: int = 7000
    unet_batch: int = 32
    unet_lr: float = 8e-4
    ema: float = 0.999

    @classmethod
    def quick(cls) -> "Recipe":
        """A few steps of everything: shows that the path works, not what it is good for."""
        return cls(
            autoencoder_steps=6,
            autoencoder_batch=4,
            reader_a_steps=6,
            reader_b_steps=6,
            reader_batch=4,
            pictures=64,
            unet_steps=6,
            unet_batch=4,
        )


def fit(
    name: str,
    modules: nn.ModuleDict,
    step_loss: Callable[[int], Tensor],
    steps: int,
    lr: float,
    state_file: Path,
    ema: float | None = None,
    matrices: Sequence[Tensor] = (),
    matrix_lr: float = 0.02,
) -> dict:
    """AdamW with warm-up and cosine decay, Muon for `matrices`; saves its state now and then and goes on from there.

    Returns {"seconds", "loss": a curve of at most 50 means}. With `ema` the modules end with averaged weights.
    """
    others = [parameter for parameter in modules.parameters() if all(parameter is not matrix for matrix in matrices)]
    optimisers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)]
    if matrices:
        optimisers.append(Muon(matrices, matrix_lr))
    factor = learning_rate_factor("cosine", steps, 200, floor=0.02)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, factor) for optimiser in optimisers]
    average = {k: v.clone() for k, v in modules.state_dict().items()} if ema else None
    start, losses, seconds = 0, [], 0.0
    if state_file.exists():
        state = read_torch(state_file)
        modules.load_state_dict(state["modules"])
        for restored, states in ((optimisers, state["optimisers"]), (schedules, state["schedules"])):
            for part, part_state in zip(restored, states, strict=True):
                part.load_state_dict(part_state)
        start, losses, seconds, average = state["step"], state["losses"], state["seconds"], state["average"]

    began = time.monotonic()
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, mininterval=1)
    for step in bar:
        loss = step_loss(step)
        modules.zero_grad(set_to_none=True)
        loss.backward()
        # Muon's steps are of one size whatever the gradients are.
        nn.utils.clip_grad_norm_(others, 1.0)
        for part in (*optimisers, *schedules):
            part.step()
        losses.append(loss.item())
        if average is not None:
            decay = min(ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.values()), list(modules.state_dict().values()), 1 - decay)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{sum(losses[-100:]) / len(losses[-100:]):.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < steps:
            state = {"modules": modules.state_dict(), "average": average, "step": step + 1, "losses": losses}
            state |= {"optimisers": [part.state_dict() for part in optimisers]}
            state |= {"schedules": [part.state_dict() for part in schedules]}
            write_torch(state_file, state | {"seconds": seconds + time.monotonic() - began})
    if average is not None:
        modules.load_state_dict(average)
    width = max(1, math.ceil(len(losses) / 50))
    curve = [round(sum(part) / len(part), 5) for part in (losses[i : i + width] for i in range(0, steps, width))]
    return {"seconds": round(seconds + time.monotonic() - began), "loss": curve}


def save_part(path: Path, module: nn.Module, metadata: dict) -> None:
    """fp16 weights with the training log in the metadata (JSON strings)."""
    tensors = {key: value.half().contiguous() for key, value in module.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {key: json.dumps(value) for key, value in metadata.items()})


def save_further(folder: Path, unet: nn.Module, log: dict) -> None:
    """A folder of toy weights, as `base.weights` names it: those that ship, and a U-Net that learned further from its
    own. log: of `fit`."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in WEIGHTS.glob("*.safetensors"):
        if path.stem != "unet":
            shutil.copy(path, folder / path.name)
    preview = json.loads(read_weights("unet")[1]["latent_rgb"])
    save_part(folder / "unet.safetensors", unet, {"latent_rgb": preview, "log": log})


def train_autoencoder(recipe: Recipe, output: Path) -> None:
    torch.manual_seed(recipe.seed)
    model = ToyAutoencoder()

    def step_loss(step: int) -> Tensor:
        generator = seeded(1, recipe.seed, step)
        pictures = render(sample_scenes(recipe.autoencoder_batch, generator, 0.6, **WIDER), generator) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            mean, log_variance = model.posterior(pictures)
            noise = torch.randn(mean.shape, generator=generator)
            decoded = model.decoder(mean + noise * (0.5 * log_variance).exp())
        # Small shapes cover little of a picture; what stands out from its surroundings counts more.
        surroundings = F.avg_pool2d(F.pad(pictures, (8, 8, 8, 8), mode="replicate"), 17, stride=1)
        weight = 1 + 4 * (pictures - surroundings).abs().mean(1, keepdim=True)
        error = (decoded.float() - pictures) * weight
        divergence = 0.5 * (mean.float() ** 2 + log_variance.float().exp() - 1 - log_variance.float()).mean()
        return error.abs().mean() + error.square().mean() + 3e-4 * divergence

    log = fit(
        "autoencoder",
        nn.ModuleDict({"model": model}),
        step_loss,
        recipe.autoencoder_steps,
        2e-3,
        output / "state" / "autoencoder.pt",
    )
    model.eval().requires_grad_(False)
    generator = seeded(2, recipe.seed)
    pictures = render(sample_scenes(512, generator, 0.6, **WIDER), generator) * 2 - 1
    raw = torch.cat([model.posterior(part)[0] for part in pictures.split(64)])
    model.latent_mean.copy_(raw.mean((0, 2, 3), keepdim=True))
    model.latent_std.copy_(raw.std((0, 2, 3), keepdim=True))
    error = torch.cat([model.decode(model.encode(part)) - part for part in pictures.split(64)])
    log["psnr_db"] = round(-10 * math.log10((error / 2).square().mean().item()), 2)
    save_part(output / "autoencoder.safetensors", model, {"recipe": vars(recipe), "log": log})


def reading_targets(scenes: Scenes) -> tuple[Tensor, Tensor, Tensor]:
    """Presence `[N, P]`, positions `[N, P, 2]` in [0, 1], sizes `[N, P]` (1 is large) as the readers report them."""
    count = len(scenes)
    presence = torch.zeros(count, vocabulary.PAIRS)
    position = torch.zeros(count, vocabulary.PAIRS, 2)
    size = torch.zeros(count, vocabulary.PAIRS)
    for k in range(2):
        rows = scenes.present[:, k].nonzero()[:, 0]
        pairs = scenes.pair[rows, k]
        presence[rows, pairs] = 1
        position[rows, pairs] = scenes.centre[rows, k] / 64
        size[rows, pairs] = scenes.size[rows, k].float()
    return presence, position, size


def _weathered(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Blur and noise of random strength, so that readers bear what an autoencoder does to pictures."""
    blur = torch.rand(len(pictures), 1, 1, 1, generator=generator)
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = torch.randn(pictures.shape, generator=generator)
    strength = 0.08 * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    return torch.lerp(pictures, soft, blur) + noise * strength


def train_reader(name: str, recipe: Recipe, output: Path) -> None:
    stage = {"reader_a": 3, "reader_b": 4}[name]
    steps = {"reader_a": recipe.reader_a_steps, "reader_b": recipe.reader_b_steps}[name]
    torch.manual_seed(recipe.seed + stage)
    model = {"reader_a": ConvolutionalReader, "reader_b": AttentiveReader}[name]()

    def step_loss(step: int) -> Tensor:
        generator = seeded(stage, recipe.seed, step)
        scenes = sample_scenes(recipe.reader_batch, generator, 0.8, **WIDER)
        pictures = _weathered(render(scenes, generator), generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            reading = model(pictures)
        presence, position, size = reading_targets(scenes)
        logits = F.binary_cross_entropy_with_logits(reading.presence.float(), presence, reduction="none")
        sizes = F.binary_cross_entropy_with_logits(reading.size.float(), size, reduction="none")
        places = (reading.position.float() - position).abs().sum(-1)
        return (logits + presence * (sizes + 4 * places)).sum(1).mean()

    modules = nn.ModuleDict({"model": model})
    log = fit(name, modules, step_loss, steps, 1.5e-3, output / "state" / f"{name}.pt", ema=0.99)
    model.eval().requires_grad_(False)
    generator = seeded(5, recipe.seed)
    scenes = sample_scenes(min(2000, recipe.pictures), generator, 0.8, **WIDER)
    presence, position, size = reading_targets(scenes)
    pictures = render(scenes, generator)
    autoencoder = load_autoencoder(output)
    decoded = torch.cat([autoencoder.decode(autoencoder.encode(part * 2 - 1)) / 2 + 0.5 for part in pictures.split(64)])
    for label, shown in (("rendered", pictures), ("through_autoencoder", decoded.clamp(0, 1))):
        readings = [model(part) for part in shown.split(250)]
        found = torch.cat([r.presence for r in readings]) > 0
        large = (torch.cat([r.size for r in readings]) > 0).float()
        places = torch.cat([r.position for r in readings])
        exact = (found == presence.bool()).all(1)
        log[label] = {
            "exact_set": round(exact.float().mean().item(), 4),
            "size": round((large == size)[presence.bool()].float().mean().item(), 4),
            "position_error": round((places - position).abs()[presence.bool()].mean().item(), 4),
        }
    save_part(output / f"{name}.safetensors", model, {"recipe": vars(recipe), "log": log})


def initialise(module: nn.Module) -> None:
    """Torch's default initialisation, which the host's layers skip; zeros where a diffusion U-Net starts with none."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.02)
        elif isinstance(layer, nn.Linear):
            nn.Linear.reset_parameters(layer)
        elif isinstance(layer, nn.Conv2d):
            nn.Conv2d.reset_parameters(layer)
        elif isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)


def trainable_unet() -> nn.Module:
    """The host's U-Net, with weights still to be set."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(**UNET_CONFIG, device="cpu", operations=comfy.ops.manual_cast)


def trainable_text_model() -> nn.Module:
    """The host's text transformer, whose in-place residual sums would overwrite what the backward pass needs."""
    import comfy.ops

    model = text_model_class()(TEXT_CONFIG, torch.float32, "cpu", comfy.ops.manual_cast)
    for layer in model.text_model.encoder.layers:
        for norm in (layer.layer_norm1, layer.layer_norm2):
            norm.register_forward_pre_hook(lambda module, inputs: (inputs[0].clone(),))
    return model


def denoising_loss(unet: nn.Module, text: nn.Module, data: LatentSet, recipe: Recipe) -> Callable[[int], Tensor]:
    """The loss of a step, from its number, for U-Net and text encoder (a frozen one gets no gradient)."""
    import comfy.model_sampling

    sigmas = comfy.model_sampling.ModelSamplingDiscrete().sigmas
    alphas = (1 / (1 + sigmas**2)).float()
    empty = torch.tensor(vocabulary.encode_padded(""))

    def step_loss(step: int) -> Tensor:
        generator = seeded(7, recipe.seed, step)
        rows = torch.randint(len(data), (recipe.unet_batch,), generator=generator)
        clean, ids = data.latents[rows], data.tokens[rows]
        dropped = torch.rand(len(rows), 1, generator=generator) < recipe.caption_dropout
        # Around the middle of the schedule, where shapes and places are decided.
        timesteps = (torch.randn(len(rows), generator=generator).sigmoid() * 1000).long()
        noise = torch.randn(clean.shape, generator=generator)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bf16()):
            context = text(torch.where(dropped, empty, ids))[0]
            predicted = unet(noisy, timesteps.float(), context=context, transformer_options={})
        return F.mse_loss(predicted.float(), noise)

    return step_loss


def train_unet(recipe: Recipe, output: Path) -> None:
    torch.manual_seed(recipe.seed)
    unet = trainable_unet()
    text = trainable_text_model()
    for module in (unet, text):
        initialise(module)
    autoencoder = load_autoencoder(output)
    data = latent_set(recipe.pictures, seeded(6, recipe.seed), autoencoder, recipe.caption_noise)
    log = fit(
        "u-net",
        nn.ModuleDict({"unet": unet, "text": text}),
        denoising_loss(unet, text, data, recipe),
        recipe.unet_steps,
        recipe.unet_lr,
        output / "state" / "unet.pt",
        ema=recipe.ema,
    )
    metadata = {"recipe": vars(recipe), "log": log, "latent_rgb": latent_to_rgb(autoencoder, recipe)}
    save_part(output / "text_encoder.safetensors", text, {"recipe": vars(recipe)})
    save_part(output / "unet.safetensors", unet, metadata)


@torch.no_grad()
def latent_to_rgb(autoencoder: ToyAutoencoder, recipe: Recipe) -> dict:
    """The linear map from latents to colours in [-1, 1] that fits best: what the host's previews use."""
    generator = seeded(8, recipe.seed)
    pictures = render(sample_scenes(256, generator), generator) * 2 - 1
    latents = autoencoder.encode(pictures).movedim(1, -1).reshape(-1, 4)
    colours = F.avg_pool2d(pictures, 8).movedim(1, -1).reshape(-1, 3)
    design = torch.cat([latents, torch.ones(len(latents), 1)], 1)
    solution = torch.linalg.lstsq(design, colours).solution
    return {"factors": solution[:4].tolist(), "bias": solution[4].tolist()}


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def is_done(path: Path, recipe: Any) -> bool:
    """Whether this part was trained already. Raises OtherRecipe where it was trained in another way."""
    if not path.exists():
        return False
    if json.loads(_metadata(path).get("recipe", "{}")) != vars(recipe):
        raise OtherRecipe(f"'{path}' was trained with another recipe. Delete it, or choose another folder by --output.")
    return True


def is_scored(path: Path) -> bool:
    return "scores" in _metadata(path)


def add_scores(path: Path, row: dict[str, Any]) -> None:
    """What the judging reader says of a finished model, added to its metadata."""
    metadata = _metadata(path) | {"scores": json.dumps(row)}
    with replacing(path) as temporary:
        save_file(load_file(path), temporary, metadata)


def train_toy(recipe: Recipe, output: Path, protocol: Protocol) -> None:
    """Train and score what is not in `output` yet; a run that was stopped goes on."""
    if not is_done(output / "autoencoder.safetensors", recipe):
        train_autoencoder(recipe, output)
    for reader in ("reader_a", "reader_b"):
        if not is_done(output / f"{reader}.safetensors", recipe):
            train_reader(reader, recipe, output)
    if not is_done(output / "unet.safetensors", recipe):
        train_unet(recipe, output)
    if not is_scored(output / "unet.safetensors"):
        add_scores(output / "unet.safetensors", evaluate([Method()], protocol, output / "scores", str(output))[0])
