"""Trains the toy transformer: flow matching, with the toy U-Net's own pictures, captions and text encoder."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from maskunet_core.replacing import replacing
from maskunet_core.torch_file import read_torch, write_torch
from maskunet_core.toy import vocabulary
from maskunet_core.toy.model import ROW_SCALE, TRANSFORMER_CONFIG, WEIGHTS, load_autoencoder, read_weights
from maskunet_core.training.seeds import seeded

from ..evaluate import Protocol
from .bodies import compare_bodies
from .data import LatentSet, latent_set
from .train import add_scores, fit, is_done, is_scored, trainable_text_model

SHARED = ("autoencoder", "text_encoder", "reader_a", "reader_b", "unet")
"""Parts that the transformer takes over from the toy model as it is."""

ZERO_AT_FIRST = ("modulation.lin", "modulation_img.lin", "modulation_txt.lin", "final_layer.linear")
"""Layers that gate, shift and scale the blocks, and the last one: at first no block changes anything."""


@dataclass(frozen=True)
class TransformerRecipe:
    """lr: of AdamW, for embeddings, modulation and the like. matrix_lr: of Muon, for the blocks' matrices."""

    seed: int = 0
    pictures: int = 120_000
    caption_noise: float = 0.25
    caption_dropout: float = 0.1
    steps: int = 6000
    batch: int = 32
    lr: float = 2e-3
    matrix_lr: float = 0.02
    ema: float = 0.999

    @classmethod
    def quick(cls) -> "TransformerRecipe":
        """A few steps: shows that the path works, not what it is good for."""
        return cls(pictures=64, steps=6, batch=4)


def norms_on_copies(model: nn.Module) -> list[RemovableHandle]:
    """Lets norms compute on copies: the host's in-place residual sums would overwrite what their backward passes need.

    Returns the hooks.
    """
    norms = [layer for layer in model.modules() if isinstance(layer, nn.LayerNorm)]
    return [norm.register_forward_pre_hook(lambda module, inputs: (inputs[0].clone(),)) for norm in norms]


def trainable_transformer() -> nn.Module:
    """The host's transformer, with weights to start from."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    model = Flux(**TRANSFORMER_CONFIG, dtype=torch.float32, device="cpu", operations=comfy.ops.manual_cast)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.weight) if name.endswith(ZERO_AT_FIRST) else nn.init.xavier_uniform_(layer.weight)
        elif isinstance(layer, nn.RMSNorm):
            nn.init.ones_(layer.weight)
    norms_on_copies(model)
    return model


def matrices_of(transformer: nn.Module) -> list[Tensor]:
    """The weights of the blocks' linear layers."""
    blocks = (*transformer.double_blocks, *transformer.single_blocks)
    return [layer.weight for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]


def flow_loss(transformer: nn.Module, text: nn.Module, data: LatentSet, recipe: TransformerRecipe) -> Callable:
    """The loss of a step, from its number: of the velocity from pictures to noise, with a frozen text encoder."""
    empty = torch.tensor(vocabulary.encode_padded(""))

    def step_loss(step: int) -> Tensor:
        generator = seeded(9, recipe.seed, step)
        rows = torch.randint(len(data), (recipe.batch,), generator=generator)
        clean = data.latents[rows]
        dropped = torch.rand(len(rows), 1, generator=generator) < recipe.caption_dropout
        # More of the middle, where shapes and places are decided.
        time = torch.randn(len(rows), generator=generator).sigmoid()
        noise = torch.randn(clean.shape, generator=generator)
        noisy = torch.lerp(clean, noise, time.view(-1, 1, 1, 1))
        with torch.no_grad():
            context = text(torch.where(dropped, empty, data.tokens[rows]))[0]
        return F.mse_loss(transformer(noisy, time, context=context, transformer_options={}), noise - clean)

    return step_loss


def in_eight_bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as int8 with a scale per row, all else in fp16; `read_weights` is the inverse."""
    stored = {}
    for name, value in tensors.items():
        if value.ndim != 2:
            stored[name] = value.half()
            continue
        scale = (value.abs().amax(1, keepdim=True) / 127).half().clamp_min(6e-8)
        stored[name] = (value / scale.float()).round().clamp(-127, 127).to(torch.int8)
        stored[name + ROW_SCALE] = scale
    return stored


def pictures(recipe: TransformerRecipe, output: Path) -> LatentSet:
    """The toy U-Net's own training set, kept in `output/state` for a run that goes on."""
    file = output / "state" / "pictures.pt"
    if not file.exists():
        made = latent_set(recipe.pictures, seeded(6, recipe.seed), load_autoencoder(output), recipe.caption_noise)
        write_torch(file, {"latents": made.latents, "tokens": made.tokens})
    return LatentSet(**read_torch(file), captions=[])


def train(recipe: TransformerRecipe, output: Path) -> None:
    """Writes `transformer.safetensors` beside the shared parts; a run that was stopped goes on."""
    import comfy.model_management

    torch.manual_seed(recipe.seed)
    transformer = trainable_transformer()
    text = trainable_text_model()
    text.load_state_dict(read_weights("text_encoder", output)[0])
    text.requires_grad_(False)
    # The host's fused operations have no gradients.
    comfy.model_management.in_training = True
    try:
        log = fit(
            "transformer",
            nn.ModuleDict({"transformer": transformer}),
            flow_loss(transformer, text, pictures(recipe, output), recipe),
            recipe.steps,
            recipe.lr,
            output / "state" / "transformer.pt",
            ema=recipe.ema,
            matrices=matrices_of(transformer),
            matrix_lr=recipe.matrix_lr,
        )
    finally:
        comfy.model_management.in_training = False
    preview = read_weights("unet", output)[1]["latent_rgb"]
    metadata = {"recipe": json.dumps(vars(recipe)), "log": json.dumps(log), "latent_rgb": preview}
    with replacing(output / "transformer.safetensors") as temporary:
        save_file(in_eight_bits(transformer.state_dict()), temporary, metadata)


def take_over(base: Path, output: Path) -> None:
    """Copies the shared parts, so that `output` holds a whole toy model."""
    output.mkdir(parents=True, exist_ok=True)
    for part in SHARED:
        if not (output / f"{part}.safetensors").exists():
            shutil.copy(base / f"{part}.safetensors", output)


def train_transformer(recipe: TransformerRecipe, output: Path, protocol: Protocol, base: Path = WEIGHTS) -> None:
    """Train and score what is not in `output` yet, on the parts of the toy model in `base`."""
    take_over(base, output)
    path = output / "transformer.safetensors"
    if not is_done(path, recipe):
        train(recipe, output)
    if not is_scored(path):
        add_scores(path, compare_bodies(protocol, output / "scores", str(output))[-1])
