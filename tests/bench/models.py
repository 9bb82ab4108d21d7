"""Full-size models with random weights."""

from functools import lru_cache
from types import SimpleNamespace

import torch

from maskunet_core.rewards.blip import ImageReward, ImageRewardModel
from maskunet_core.rewards.clip import ImageTower
from maskunet_core.rewards.clip_layout import ClipLayout
from maskunet_core.rewards.preprocess import normalise
from maskunet_core.rewards.reward import BoundModel, BoundReward, BoundSum
from maskunet_core.training.base import BaseModel
from tests.builders import SD15, SDXL, sd15_unet


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
        said = {"cross_attn": torch.randn(77, self.model.model_config.unet_config["context_dim"])}
        return said | ({"pooled_output": torch.randn(1280)} if self.model.adm_channels else {})


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
    model.diffusion_model = (randomly_filled(sd15_unet(**changes)) if small else random_unet(**changes)).to(dtype)
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device(device), torch.device("cpu"))
    return RandomBase(patcher, None, None, f"{family}, random weights")


_POOL = 1 << 25
"""Numbers that all weights of a full-size search are cut from: more than the largest layer has."""


@lru_cache(maxsize=1)
def _pool() -> torch.Tensor:
    return torch.randn(_POOL, generator=torch.Generator().manual_seed(0))


def randomly_filled(module: torch.nn.Module, std: float = 0.02) -> torch.nn.Module:
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
    network = randomly_filled(network, std=0.05)
    if small:
        torch.nn.init.ones_(network.vae_scale)
    cpu = torch.device("cpu")
    return SimpleNamespace(first_stage_model=network, vae_dtype=torch.float32, device=cpu)


def random_rewards() -> BoundReward:
    """The authors' sum of rewards, in fp32 on the CPU: ImageReward's and HPSv2's networks in their published sizes."""
    torch.manual_seed(2)
    with torch.device("meta"):
        blip = ImageRewardModel(_image_reward_shapes())
        tower = ImageTower(vit_shapes(1280, 14, 224, 32, 1024), ClipLayout(quick=False, image_heads=16, text_heads=16))
    image_reward, image = ImageReward("ImageReward", randomly_filled(blip)), randomly_filled(tower)
    told = torch.nn.functional.normalize(torch.randn(1024), dim=0)

    def cosine(pictures: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(image(normalise(pictures)), dim=-1) @ told

    hps = BoundModel("HPSv2", image.size, image, cosine)
    return BoundSum("authors' rewards", [(1.0, image_reward.bind("a red circle left of a blue square")), (5.0, hps)])


def _image_reward_shapes() -> dict[str, torch.Tensor]:
    """Those that tell ImageReward's size: ViT-L/16 at 224 and BERT-base."""
    shapes = _blip_vision("blip.visual_encoder.", 1024, 14, 24) | _bert("blip.text_encoder.", 1024)
    widths = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    shapes |= {f"mlp.layers.{n}.weight": width for n, width in widths.items()}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def blip_vqa_shapes() -> dict[str, torch.Tensor]:
    """Those that tell BLIP-VQA's size: ViT-B/16 at 480, and BERT-base twice."""
    shapes = _blip_vision("visual_encoder.", 768, 30, 12) | _bert("text_encoder.", 768)
    shapes |= _bert("text_decoder.bert.", 768) | {"text_decoder.cls.predictions.transform.dense.bias": (768,)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def dinov2_shapes() -> dict[str, torch.Tensor]:
    """Those that tell DINOv2's size: ViT-L/14, of pictures of 518."""
    shapes = _blip_vision("", 1024, 37, 24, patch=14) | {"blocks.0.ls1.gamma": (1024,)}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _blip_vision(prefix: str, width: int, patches: int, depth: int, patch: int = 16) -> dict[str, tuple[int, ...]]:
    shapes = {f"{prefix}cls_token": (1, 1, width), f"{prefix}pos_embed": (1, patches**2 + 1, width)}
    shapes |= {f"{prefix}patch_embed.proj.weight": (width, 3, patch, patch)}
    return shapes | {f"{prefix}blocks.{n}.mlp.fc1.bias": (4 * width,) for n in range(depth)}


def _bert(prefix: str, seen: int) -> dict[str, tuple[int, ...]]:
    """BERT-base that looks at what is `seen` wide."""
    shapes = {f"{prefix}embeddings.LayerNorm.bias": (768,), f"{prefix}embeddings.word_embeddings.weight": (30524, 768)}
    shapes |= {f"{prefix}embeddings.position_embeddings.weight": (512, 768)}
    shapes |= {f"{prefix}encoder.layer.{n}.intermediate.dense.bias": (3072,) for n in range(12)}
    return shapes | {f"{prefix}encoder.layer.0.crossattention.self.key.weight": (768, seen)}


def vit_shapes(width: int, patch: int, side: int, depth: int, embedding: int) -> dict[str, torch.Tensor]:
    """Those that tell the size of an image tower of CLIP."""
    shapes = {"positional_embedding": ((side // patch) ** 2 + 1, width), "conv1.weight": (width, 3, patch, patch)}
    shapes |= {"class_embedding": (width,), "proj": (width, embedding)}
    shapes |= {f"transformer.resblocks.{n}.mlp.c_fc.bias": (4 * width,) for n in range(depth)}
    return {f"visual.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}
