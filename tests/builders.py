"""Small real models for tests, and the trainer's commands."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from maskunet_core.masks.call import Call, Chunk
from maskunet_core.masks.generator import LowRankGenerator, LowRankSettings
from maskunet_core.models.structure import Structure
from trainer.host import PROJECT


def trainer_command(*arguments: str, **options) -> subprocess.CompletedProcess:
    """`python -m trainer ...` from the project's root."""
    command = [sys.executable, "-m", "trainer", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, **options)


def in_two_processes(*arguments: str) -> subprocess.CompletedProcess:
    """A program of Python's, in two processes on the CPU that know of each other as a launcher tells them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    world |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}

    def process(rank: int) -> subprocess.CompletedProcess:
        environment = os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        options = {"cwd": PROJECT, "env": environment, "capture_output": True, "text": True, "timeout": 300}
        return subprocess.run([sys.executable, *arguments], **options)

    with ThreadPoolExecutor() as threads:
        first, second = threads.map(process, range(2))
    code, told = first.returncode or second.returncode, (first.stdout + second.stdout, first.stderr + second.stderr)
    return subprocess.CompletedProcess(arguments, code, *told)


def make_generator(structure: Structure, seed: int = 0, lively: bool = False, **settings) -> LowRankGenerator:
    """A generator on `structure`; `lively` ones flip many bits, and other bits for every sample and step."""
    torch.manual_seed(seed)
    generator = LowRankGenerator(structure, LowRankSettings(**settings))
    if lively:
        with torch.no_grad():
            for name, parameter in generator.logits.named_parameters():
                if name.endswith((".u", ".v")):
                    parameter.mul_(4)
                elif name.endswith(".bias"):
                    parameter.mul_(0.6).add_(0.3 * torch.randn_like(parameter))
    return generator.eval().requires_grad_(False)


def write_tiny_checkpoint(path: Path) -> Path:
    """A checkpoint that the stock loader takes for SD 1.5: a shallow U-Net, CLIP-L in fp8, TAESD; random weights."""
    import comfy.ops
    from comfy.clip_model import CLIPTextModel
    from comfy.taesd.taesd import TAESD

    clip = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    clip |= {"hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407}
    parts = {
        "model.diffusion_model.": (sd15_unet(**tiny_sd15_layout()), torch.float16),
        "cond_stage_model.transformer.": (
            CLIPTextModel(clip, None, "meta", comfy.ops.manual_cast),
            torch.float8_e4m3fn,
        ),
        "first_stage_model.": (TAESD(), torch.float16),
    }
    stream, tensors = torch.Generator().manual_seed(0), {}
    for prefix, (module, dtype) in parts.items():
        for name, value in module.state_dict().items():
            scale = 0.02 if value.ndim > 1 else 0.0
            drawn = scale * torch.randn(value.shape, generator=stream)
            if name == "vae_scale" or (value.ndim == 1 and name.endswith("weight")):
                drawn = torch.ones(value.shape)
            tensors[prefix + name] = drawn.to(dtype).contiguous()
    save_file(tensors, path)
    return path


def tiny_sd15_layout() -> dict[str, list[int] | int]:
    """The U-Net of `write_tiny_checkpoint`, as changes to SD 1.5's."""
    shallow = {"num_res_blocks": [1, 1], "channel_mult": [1, 1], "transformer_depth": [1, 0]}
    return shallow | {"transformer_depth_output": [1, 1, 0, 0], "transformer_depth_middle": 1}


SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "num_heads": 8,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
}
"""What the host tells SD 1.5's U-Net."""
SDXL = {
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
"""What SDXL's U-Net has otherwise than SD 1.5's, for `sd15_unet`."""


def sd15_unet(**changes) -> torch.nn.Module:
    """ComfyUI's U-Net in SD 1.5's shapes on the meta device: structure without memory."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(**SD15 | changes, device="meta", operations=comfy.ops.manual_cast)


def call_of(sigma: float | None = None, guidance: tuple[int, ...] = (0,), images: int = 1) -> Call:
    """A call of a model as a run of the host makes it. guidance: 0 for the positive branch, 1 for the negative."""
    chunks = tuple(Chunk(branch, f"{('positive', 'negative')[branch]}.0") for branch in guidance)
    return Call(images * len(guidance), chunks, lambda: sigma, lambda: (0,) * len(chunks))
