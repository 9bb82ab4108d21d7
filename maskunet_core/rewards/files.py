"""Published weight files: read without running anything in them, recognised by the tensors they hold."""

import contextlib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..errors import MaskUNetError
from .aesthetic import AestheticReward
from .blip import ImageReward
from .clip import ClipReward, ImageTower, to_openclip
from .clip_layout import layout_of, picture_side, read_description
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
    with naming(path):
        if "blip.visual_encoder.cls_token" in tensors:
            return ImageReward.from_tensors(path.stem, tensors, dtype, checkpointing=checkpointing)
        if _is_aesthetic(tensors):
            tower = _load_tower(path, tensors, others, dtype, checkpointing)
            return AestheticReward.from_tensors(path.stem, tensors, tower)
        if "visual.class_embedding" in tensors and "token_embedding.weight" in tensors:
            # HPSv2 comes under OpenCLIP's names and is a cosine; PickScore under transformers', and is CLIP's logit.
            scaled = "vision_model.embeddings.class_embedding" in published
            layout = layout_of(tensors, read_description(path))
            return ClipReward.from_tensors(
                path.stem, tensors, dtype, scaled=scaled, layout=layout, checkpointing=checkpointing
            )
    if "visual.class_embedding" in tensors:
        raise BadRewardFile(
            f"'{path.name}' is an image tower of CLIP without its text tower, so it knows no prompt. It serves the "
            "aesthetic predictor: choose sac+logos+ava1-l14-linearMSE.pth itself as the reward."
        )
    raise BadRewardFile(
        f"'{path.name}' holds no reward that is known here. Put one of these into models/reward: {KNOWN}."
    )


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What is wrong with tensors becomes a sentence about the file that they came from."""
    try:
        yield
    except BadTensors as error:
        raise BadRewardFile(f"'{path.name}' {error}") from None
    except KeyError as error:
        raise BadRewardFile(
            f"'{path.name}' lacks the tensor {error.args[0]}: it is damaged. Download it again."
        ) from None
    except (IndexError, TypeError, ValueError) as error:
        # Tensors are unpacked by their shapes, which may have any number of dimensions where a file is damaged.
        if isinstance(error, MaskUNetError):
            raise
        raise BadRewardFile(
            f"'{path.name}' holds tensors of unexpected shapes ({error}): it is damaged. Download it again."
        ) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file or a checkpoint of torch, without wrappers and the prefixes of trainers.

    Raises BadRewardFile.
    """
    return _read(path, load_file, "cpu")


def read_shapes(path: Path) -> dict[str, Tensor]:
    """The same on the meta device, with names and shapes alone: of the tensors' content nothing is read."""
    return _read(path, _shapes_of_safetensors, "meta")


def _shapes_of_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}


def _read(path: Path, of_safetensors: Callable[[Path], dict[str, Tensor]], device: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise BadRewardFile(f"'{path}' does not exist. Put one of these into models/reward: {KNOWN}.")
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise _damaged(path, error) from None
    # A safetensors file begins with the length of its header, a zip or a pickle with a mark of its own.
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:
        try:
            content = of_safetensors(path)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
    elif start.startswith((b"PK", b"\x80")):
        content = _unpickle(path, device)
    else:
        raise BadRewardFile(
            f"'{path.name}' is neither a safetensors file nor a checkpoint of torch; it may be a web page or a "
            f"placeholder that was saved instead. Put one of these into models/reward: {KNOWN}."
        )
    while isinstance(content, Mapping) and (inner := _wrapped(content)) is not None:
        content = inner
    found = content.items() if isinstance(content, Mapping) else ()
    return {_bare(name): value for name, value in found if isinstance(name, str) and isinstance(value, Tensor)}


def _wrapped(content: Mapping) -> Mapping | None:
    """The tensors of a checkpoint that names them as a whole: CLIP's and mmdetection's, or BLIP's."""
    return next((content[name] for name in ("state_dict", "model") if isinstance(content.get(name), Mapping)), None)


def _unpickle(path: Path, device: str) -> object:
    zipped = zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=zipped)
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
    return {"layers.0.weight", "layers.7.weight"} <= tensors.keys() and tensors["layers.0.weight"].ndim == 2


@lru_cache(maxsize=256)
def _tower_width(path: Path, changed: int, size: int) -> int | None:
    """Width of the embeddings that the image tower of CLIP in this file gives, if there is one for pictures of 224x224.

    changed, size: of the file, for the cache: to look into many files takes time where their format is torch's old one.
    """
    try:
        tensors = to_openclip(read_shapes(path))
    except BadRewardFile:
        return None
    dimensions = {"visual.positional_embedding": 2, "visual.conv1.weight": 4, "visual.proj": 2}
    if any(name not in tensors or tensors[name].ndim != wanted for name, wanted in dimensions.items()):
        return None
    return tensors["visual.proj"].shape[1] if picture_side(tensors) == 224 else None


def _towers(head: Mapping[str, Tensor], others: Iterable[Path]) -> Iterator[Path]:
    """Those of the files that hold a tower of the shape that the aesthetic predictor's head works on."""
    width = head["layers.0.weight"].shape[1]
    for path in others:
        with contextlib.suppress(OSError):
            status = path.stat()
            if _tower_width(path, status.st_mtime_ns, status.st_size) == width:
                yield path


def _load_tower(
    path: Path, head: Mapping[str, Tensor], others: Iterable[Path], dtype: torch.dtype, checkpointing: bool
) -> ImageTower:
    """The first tower among `others` that fits the head and is OpenAI's. Raises BadRewardFile."""
    refused = ""
    for other in _towers(head, others):
        with naming(other):
            tensors = to_openclip(read_tensors(other))
            try:
                layout = layout_of(tensors, read_description(other))
            except BadTensors:
                refused = f" ('{other.name}' has its shape, but is of other origin)"
                continue
            return ImageTower.from_tensors(tensors, dtype, layout, checkpointing=checkpointing)
    raise BadRewardFile(
        f"'{path.name}' holds only the head of the aesthetic predictor, and the image tower it works on, OpenAI's CLIP "
        f"ViT-L/14, was not found{refused}. Put {_CLIP_L} into models/clip_vision or models/reward."
    )


def files_in_host(*folders: str) -> Iterator[Path]:
    """All files in some of the host's folders of models."""
    import folder_paths

    for folder in folders:
        for name in folder_paths.get_filename_list(folder):
            found = folder_paths.get_full_path(folder, name)
            if found is not None:
                yield Path(found)


def others_in_host(path: Path) -> Iterator[Path]:
    """Files in the host's folders where the reward at `path` may find the image tower that it lacks."""
    return (found for found in files_in_host("clip_vision", "reward") if found != path)


def files_of(path: Path, others: Iterable[Path] = ()) -> list[Path]:
    """The files that a reward is made of: `path`, and those among `others` that may be the tower which it lacks, each
    with its description where there is one. Nothing of the tensors' content is read."""
    found = [path]
    with contextlib.suppress(BadRewardFile):
        head = read_shapes(path)
        if _is_aesthetic(head):
            found += _towers(head, others)
    return [file for one in found for file in (one, one.with_suffix(".json")) if file.is_file()]
