"""Full-size models with random weights."""

from functools import lru_cache
from types import SimpleNamespace

import torch

from maskunet_core.rewards.blip import ImageReward, ImageRewardModel
from maskunet_core.rewards.clip import ImageTower
from maskunet_core.rewards.preprocess import normalise
from maskunet_core.rewards.reward import BoundModel, BoundReward, BoundSum
from tests.builders import SD15, SDXL, sd15_unet
from trainer.base import BaseModel


def random_unet(**changes) -> torch.nn.Module:
    """SD 1.5's U-Net (or one with changes) in memory, fp32 on the CPU, with small random weights."""
    unet = sd15_unet(**changes).to_empty(device="cpu").requires_grad_(False).eval()
    torch.manual_seed(0)
    for parameter in unet.parameters():
        parameter.normal_(std=0.02)
    return unet


class RandomBase(BaseModel):
    """Has no text encoder: what it says of a prompt is random."""

    def encode_text(self, text: str) -> dict[str, torch.Tensor]:
        return {"cross_attn": torch.randn(77, self.model.model_config.unet_config["context_dim"])}


def random_base(
    family: str = "SD 1.5",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    small: bool = False,
) -> RandomBase:
    """SD 1.5 or SDXL whose U-Net is `random_unet`, or one that takes little memory; without text encoder and VAE."""
    import comfy.model_patcher
    import comfy.supported_models

    kind = {"SD 1.5": comfy.supported_models.SD15, "SDXL": comfy.supported_models.SDXL}[family]
    changes = SDXL if family == "SDXL" else {}
    config = kind({**SD15, **changes, "disable_unet_model_creation": True})
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device="cpu")
    model.diffusion_model = (_drawn(sd15_unet(**changes)) if small else random_unet(**changes)).to(dtype)
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device(device), torch.device("cpu"))
    return RandomBase(patcher, None, None, f"{family}, random weights")


_POOL = 1 << 25
"""Numbers that all weights of a full-size search are cut from: more than the largest layer has."""


@lru_cache(maxsize=1)
def _pool() -> torch.Tensor:
    return torch.randn(_POOL, generator=torch.Generator().manual_seed(0))


def _drawn(module: torch.nn.Module, std: float = 0.02) -> torch.nn.Module:
    """A module of the meta device on the CPU, frozen: small random weights, and norms that pass what they get.

    Modules of 8 GB are cut from few numbers, so that a search fits beside them into the memory of a small machine.
    """
    weights = std * _pool()
    offsets = torch.Generator().manual_seed(1)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            start = 16 * int(torch.randint((_POOL - parameter.numel()) // 16, (1,), generator=offsets))
            values = weights[start : start + parameter.numel()].view(parameter.shape)
            if parameter.ndim < 2:
                values = torch.full(parameter.shape, float(name == "weight"))
            part._parameters[name] = torch.nn.Parameter(values, requires_grad=False)
    return module.eval()


def random_vae(small: bool) -> SimpleNamespace:
    """What a search needs of SD's VAE in fp32: the KL autoencoder of 84 M parameters, or TAESD."""
    import comfy.taesd.taesd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    layout = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
    layout |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    torch.manual_seed(1)
    with torch.device("meta"):
        network = comfy.taesd.taesd.TAESD() if small else AutoencoderKL(ddconfig=layout, embed_dim=4)
    network = _drawn(network, std=0.05)
    if small:
        torch.nn.init.ones_(network.vae_scale)
    cpu = torch.device("cpu")
    return SimpleNamespace(first_stage_model=network, vae_dtype=torch.float32, device=cpu)


def random_rewards() -> BoundReward:
    """The authors' sum of rewards, in fp32 on the CPU: ImageReward's and HPSv2's networks in their published sizes."""
    torch.manual_seed(2)
    with torch.device("meta"):
        blip = ImageRewardModel(_image_reward_shapes())
        tower = ImageTower(_vit_h_shapes(), quick=False)
    image_reward, image = ImageReward("ImageReward", _drawn(blip)), _drawn(tower)
    told = torch.nn.functional.normalize(torch.randn(1024), dim=0)

    def cosine(pictures: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(image(normalise(pictures)), dim=-1) @ told

    hps = BoundModel("HPSv2", image.size, image, cosine)
    return BoundSum("authors' rewards", [(1.0, image_reward.bind("a red circle left of a blue square")), (5.0, hps)])


def _image_reward_shapes() -> dict[str, torch.Tensor]:
    """Those that tell ImageReward's size: ViT-L/16 at 224 and BERT-base."""
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    shapes = {f"{vision}cls_token": (1, 1, 1024), f"{vision}pos_embed": (1, 197, 1024)}
    shapes |= {f"{vision}patch_embed.proj.weight": (1024, 3, 16, 16)}
    shapes |= {f"{vision}blocks.{n}.mlp.fc1.bias": (4096,) for n in range(24)}
    shapes |= {f"{text}embeddings.LayerNorm.bias": (768,), f"{text}embeddings.word_embeddings.weight": (30524, 768)}
    shapes |= {f"{text}embeddings.position_embeddings.weight": (512, 768)}
    shapes |= {f"{text}encoder.layer.{n}.intermediate.dense.bias": (3072,) for n in range(12)}
    shapes |= {f"{text}encoder.layer.0.crossattention.self.key.weight": (768, 1024)}
    widths = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    shapes |= {f"mlp.layers.{n}.weight": width for n, width in widths.items()}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _vit_h_shapes() -> dict[str, torch.Tensor]:
    """Those that tell the size of HPSv2's image tower, ViT-H/14 at 224."""
    shapes = {"positional_embedding": (257, 1280), "conv1.weight": (1280, 3, 14, 14), "proj": (1280, 1024)}
    shapes |= {"class_embedding": (1280,)} | {f"transformer.resblocks.{n}.mlp.c_fc.bias": (5120,) for n in range(32)}
    return {f"visual.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}
