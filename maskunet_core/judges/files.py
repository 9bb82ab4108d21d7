"""The judges' published files, recognised by the tensors they hold."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..rewards.clip import ClipReward, to_openclip
from ..rewards.clip_layout import layout_of, picture_side, read_description
from ..rewards.files import BadRewardFile, naming, read_shapes, read_tensors
from ..rewards.layers import BadTensors
from .blip_vqa import BlipVqa
from .dinov2 import Dinov2, to_published
from .inception import Inception
from .mask2former import Mask2Former
from .mask2former_names import to_mmdet2, transformers_to_mmdet2


@dataclass(frozen=True)
class JudgeFile:
    """name, address, size: of the published file. holds: whether tensors, on the meta device, are those of one.

    read: the model, from its file, on the CPU in fp32. stand_in: a file of other weights that serves where this
    one is missing; its scores are told apart. digest: SHA-256, or what it begins with; "" where nobody here knows it.
    """

    name: str
    address: str
    size: str
    holds: Callable[[Mapping[str, Tensor]], bool]
    read: Callable[[Path], Any]
    stand_in: "JudgeFile | None" = None
    digest: str = ""

    @property
    def choices(self) -> tuple["JudgeFile", ...]:
        """What serves, the best first."""
        return (self,) if self.stand_in is None else (self, self.stand_in)

    def find(self, files: Iterable[Path]) -> Path | None:
        """The first of the files that is one."""
        return next(filter(self._is_in, files), None)

    def _is_in(self, path: Path) -> bool:
        try:
            status = path.stat()
        except OSError:
            return False
        return _holds(self, path, status.st_mtime_ns, status.st_size)

    def load(self, path: Path) -> Any:
        """Raises MaskUNetError for a damaged file."""
        with torch.inference_mode(False), naming(path):
            return self.read(path)

    def __str__(self) -> str:
        other = f"; {self.stand_in.name} ({self.stand_in.address}) stands in for it" if self.stand_in else ""
        return f"{self.name} ({self.size}, {self.address}; {told_digest(self.digest)}), to models/judges{other}"


def told_digest(digest: str) -> str:
    """For people. digest: see JudgeFile."""
    if not digest:
        return "SHA-256 not known here"
    return f"SHA-256 {digest}" if len(digest) == 64 else f"SHA-256 begins with {digest}"


@lru_cache(maxsize=1024)
def _holds(judge: JudgeFile, path: Path, changed: int, size: int) -> bool:
    """changed, size: of the file, for the cache: to look into many files takes time where their format is torch's old
    one."""
    try:
        return judge.holds(read_shapes(path))
    except BadRewardFile:
        return False


def _read_detector(path: Path) -> Mask2Former:
    return Mask2Former.from_tensors(to_mmdet2(read_tensors(path)))


def _read_stand_in(path: Path) -> Mask2Former:
    return Mask2Former.from_tensors(transformers_to_mmdet2(read_tensors(path)))


def _read_inception(path: Path) -> Inception:
    return Inception.from_tensors(read_tensors(path))


def _read_blip_vqa(path: Path) -> BlipVqa:
    return BlipVqa.from_tensors(read_tensors(path))


def _read_dinov2(path: Path) -> Dinov2:
    return Dinov2.from_tensors(to_published(read_tensors(path)))


def _read_clip(path: Path) -> ClipReward:
    tensors = to_openclip(read_tensors(path))
    layout = layout_of(tensors, read_description(path))
    if not layout.quick:
        raise BadTensors("is no CLIP of OpenAI's: it works without quick GELU", "put OpenAI's file there.")
    return ClipReward.from_tensors(path.stem, tensors, torch.float32, scaled=False, layout=layout)


def _holds_blip_vqa(tensors: Mapping[str, Tensor]) -> bool:
    """For pictures of 480x480 in patches of 16x16, of which T2I-CompBench asks."""
    positions = tensors.get("visual_encoder.pos_embed")
    answers = "text_decoder.cls.predictions.decoder.weight" in tensors
    return answers and positions is not None and positions.shape[1:2] == (30 * 30 + 1,)


def _holds_dinov2(tensors: Mapping[str, Tensor]) -> bool:
    """ViT-L in patches of 14x14, without registers; the published file's names, or transformers'."""
    names = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
    shapes = [tuple(tensors[name].shape) for name in names if name in tensors]
    scaled = {"blocks.0.ls1.gamma", "encoder.layer.0.layer_scale1.lambda1"} & tensors.keys()
    registers = {"register_tokens", "embeddings.register_tokens"} & tensors.keys()
    return bool(shapes == [(1024, 3, 14, 14)] and scaled and not registers)


def _holds_clip(width: int, patch: int, side: int) -> Callable[[Mapping[str, Tensor]], bool]:
    """With both towers, for pictures of `side` pixels."""

    def holds(tensors: Mapping[str, Tensor]) -> bool:
        tensors = to_openclip(tensors)
        names = ("visual.conv1.weight", "visual.positional_embedding", "token_embedding.weight", "visual.proj")
        if not all(name in tensors and tensors[name].ndim in (2, 4) for name in names):
            return False
        shape = tensors["visual.conv1.weight"].shape
        return (shape[0], shape[-1], picture_side(tensors)) == (width, patch, side)

    return holds


def _clip(
    model: str, size: str, shape: tuple[int, int, int], digest: str = "", file: str = "model.safetensors"
) -> JudgeFile:
    """shape: width, side of a patch and of the pictures."""
    name, address = f"{file} of openai/{model}", f"https://huggingface.co/openai/{model}"
    return JudgeFile(name, address, size, _holds_clip(*shape), _read_clip, digest=digest)


DETECTOR_STAND_IN = JudgeFile(
    "model.safetensors of facebook/mask2former-swin-small-coco-instance",
    "https://huggingface.co/facebook/mask2former-swin-small-coco-instance",
    "0.3 GB",
    lambda tensors: {"transformer_module.queries_features.weight", "class_predictor.weight"} <= tensors.keys(),
    _read_stand_in,
)
DETECTOR = JudgeFile(
    "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
    "https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco",
    "275 MB",
    lambda tensors: {"panoptic_head.query_feat.weight", "panoptic_head.cls_embed.weight"} <= tensors.keys(),
    _read_detector,
    DETECTOR_STAND_IN,
    "743b7d99",
)
INCEPTION = JudgeFile(
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights",
    "96 MB",
    lambda tensors: {"Mixed_7c.branch_pool.conv.weight", "Conv2d_1a_3x3.bn.weight"} <= tensors.keys(),
    _read_inception,
    digest="6726825d",
)
CLIP_L = _clip(
    "clip-vit-large-patch14",
    "1.71 GB",
    (1024, 14, 224),
    "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
)
CLIP_L336 = _clip(
    "clip-vit-large-patch14-336",
    "1.71 GB",
    (1024, 14, 336),
    "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801",
    "pytorch_model.bin",
)
CLIP_B16 = _clip("clip-vit-base-patch16", "0.6 GB", (768, 16, 224))
CLIP_B32 = _clip(
    "clip-vit-base-patch32",
    "0.6 GB",
    (768, 32, 224),
    "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f",
    "pytorch_model.bin",
)
BLIP_VQA = JudgeFile(
    "model_base_vqa_capfilt_large.pth",
    "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models",
    "1.5 GB",
    _holds_blip_vqa,
    _read_blip_vqa,
)
DINOV2 = JudgeFile(
    "dinov2_vitl14_pretrain.pth",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14",
    "1.22 GB",
    _holds_dinov2,
    _read_dinov2,
    digest="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
)
