"""Published weight files: read without running anything in them, recognised by the tensors they hold."""

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import MaskUNetError
from .aesthetic import AestheticReward
from .blip import ImageReward
from .clip import ClipReward, to_openclip
from .layers import BadTensors
from .reward import Reward

KNOWN = (
    "ImageReward.pt (THUDM/ImageReward), HPS_v2.1_compressed.pt or HPS_v2_compressed.pt (xswu/HPSv2), "
    "model.safetensors (yuvalkirstain/PickScore_v1, or laion/CLIP-ViT-H-14-laion2B-s32B-b79K), "
    "sac+logos+ava1-l14-linearMSE.pth (christophschuhmann/improved-aesthetic-predictor)"
)
"""The files that are read, and where they are published."""
_CLIP_L = "model.safetensors of openai/clip-vit-large-patch14"
_PREFIXES = ("module.", "model.", "state_dict.")


class BadRewardFile(MaskUNetError):
    """A file that is no usable reward; the message names it and says which file is expected where."""


@torch.inference_mode(False)
def load(
    path: Path, others: Iterable[Path] = (), dtype: torch.dtype = torch.float32, checkpointing: bool = False
) -> Reward:
    """The reward in a published file, on the CPU, named after the file.

    others: files where the image tower may lie that the aesthetic predictor's file lacks. dtype: of the work on
    pictures. checkpointing: backward passes compute the blocks' insides anew instead of keeping them.
    Raises BadRewardFile.
    """
    published = read_tensors(path)
    tensors = to_openclip(published)
    try:
        if "blip.visual_encoder.cls_token" in tensors:
            return ImageReward.from_tensors(path.stem, tensors, dtype, checkpointing=checkpointing)
        if _is_aesthetic(tensors):
            tower = _find_tower(path, tensors["layers.0.weight"].shape[1], others)
            return AestheticReward.from_tensors(path.stem, tensors, tower, dtype, checkpointing=checkpointing)
        if "visual.class_embedding" in tensors and "token_embedding.weight" in tensors:
            # HPSv2 comes under OpenCLIP's names and is a cosine; PickScore under transformers', and is CLIP's logit.
            scaled = "vision_model.embeddings.class_embedding" in published
            return ClipReward.from_tensors(path.stem, tensors, dtype, scaled=scaled, checkpointing=checkpointing)
    except BadTensors as error:
        raise BadRewardFile(f"'{path.name}' {error}: it is damaged. Download it again.") from None
    except KeyError as error:
        raise BadRewardFile(
            f"'{path.name}' lacks the tensor {error.args[0]}: it is damaged. Download it again."
        ) from None
    if "visual.class_embedding" in tensors:
        raise BadRewardFile(
            f"'{path.name}' is an image tower of CLIP without its text tower, so it knows no prompt. It serves the "
            "aesthetic predictor: choose sac+logos+ava1-l14-linearMSE.pth itself as the reward."
        )
    raise BadRewardFile(
        f"'{path.name}' holds no reward that is known here. Put one of these into models/reward: {KNOWN}."
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file or a checkpoint of torch, without wrappers and the prefixes of trainers.

    Raises BadRewardFile.
    """
    if not path.is_file():
        raise BadRewardFile(f"'{path}' does not exist. Put one of these into models/reward: {KNOWN}.")
    with path.open("rb") as file:
        start = file.read(9)
    # A safetensors file begins with the length of its header, a zip or a pickle with a mark of its own.
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:
        try:
            content = load_file(path)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
    elif start.startswith((b"PK", b"\x80")):
        content = _unpickle(path)
    else:
        raise BadRewardFile(
            f"'{path.name}' is neither a safetensors file nor a checkpoint of torch; it may be a web page or a "
            f"placeholder that was saved instead. Put one of these into models/reward: {KNOWN}."
        )
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    found = content.items() if isinstance(content, Mapping) else ()
    return {_bare(name): value for name, value in found if isinstance(value, Tensor)}


def _unpickle(path: Path) -> object:
    zipped = zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle can raise anything
        told = str(error)
        if "numpy" in told and "GLOBAL" in told:
            raise BadRewardFile(
                f"'{path.name}' is the state of a training run (it holds numpy objects), as HPS_v2.pt is, and is not "
                "opened because such files can run programs. Put HPS_v2_compressed.pt or HPS_v2.1_compressed.pt "
                "(xswu/HPSv2) into models/reward instead."
            ) from None
        if "GLOBAL" in told or "TorchScript" in told:
            raise BadRewardFile(
                f"'{path.name}' holds a program or objects besides tensors, and is not opened because it could do "
                f"harm. Put one of these into models/reward instead: {KNOWN}; CLIP ViT-L/14 is read from {_CLIP_L}."
            ) from None
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> BadRewardFile:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return BadRewardFile(
        f"'{path.name}' cannot be read ({reason[:120]}). It may be truncated: download it again into models/reward."
    )


def _bare(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _is_aesthetic(tensors: Mapping[str, Tensor]) -> bool:
    return {"layers.0.weight", "layers.7.weight"} <= tensors.keys()


def _find_tower(head: Path, width: int, others: Iterable[Path]) -> dict[str, Tensor]:
    """The first image tower among `others` that looks at 224x224 pixels and gives embeddings of this width."""
    for path in others:
        try:
            tensors = to_openclip(read_tensors(path))
        except BadRewardFile:
            continue
        places, patches = tensors.get("visual.positional_embedding"), tensors.get("visual.conv1.weight")
        if places is None or patches is None or "visual.proj" not in tensors:
            continue
        side = patches.shape[-1]
        if tensors["visual.proj"].shape[1] == width and len(places) == (224 // side) ** 2 + 1:
            return tensors
    raise BadRewardFile(
        f"'{head.name}' holds only the head of the aesthetic predictor, and the image tower it works on, OpenAI's CLIP "
        f"ViT-L/14, was not found. Put {_CLIP_L} into models/clip_vision or models/reward."
    )
