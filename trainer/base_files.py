"""The files of a base model: where ComfyUI has them, and its loaders."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from maskunet_core.errors import MaskUNetError

from .choices import PARTS, TOY
from .config import Base
from .host import model_choice, model_file


class BadBase(MaskUNetError):
    """A base model that cannot be trained on; the message names the file and says what to do."""


def load_checkpoint(settings: Base, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE) of a checkpoint file. Raises BadBase."""
    import comfy.sd

    path = checkpoint_file(settings)
    try:
        patcher, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(
            str(path),
            embedding_directory=_embeddings(),
            model_options={"dtype": dtype},
            disable_dynamic=True,
        )
    except Exception as error:
        raise BadBase(
            f"'{settings.checkpoint}' is no checkpoint that ComfyUI can load ({_reason(error)}). Name a full "
            "checkpoint file with U-Net, text encoder and VAE in base.checkpoint."
        ) from None
    for part, found in (("U-Net", patcher), ("text encoder", clip), ("VAE", vae)):
        if found is None:
            raise BadBase(f"'{settings.checkpoint}' holds no {part}. Name a full checkpoint file in base.checkpoint.")
    return patcher, clip, vae


def load_parts(settings: Base, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """(MODEL, CLIP, VAE) of separate files. Raises BadBase."""
    import comfy.sd
    import comfy.utils

    files = {key: [str(path) for path in paths] for key, paths in part_files(settings).items()}
    with _loading("diffusion_model", files):
        options = {"dtype": dtype}
        patcher = comfy.sd.load_diffusion_model(files["diffusion_model"][0], options, disable_dynamic=True)
    with _loading("text_encoders", files):
        kind = comfy.sd.CLIPType[settings.text_encoder_type.upper()]
        clip = comfy.sd.load_clip(files["text_encoders"], _embeddings(), kind, disable_dynamic=True)
    with _loading("vae", files):
        tensors, metadata = comfy.utils.load_torch_file(files["vae"][0], safe_load=True, return_metadata=True)
        vae = comfy.sd.VAE(sd=tensors, metadata=metadata)
        vae.throw_exception_if_invalid()
    return patcher, clip, vae


@contextlib.contextmanager
def _loading(key: str, files: dict[str, list[str]]) -> Iterator[None]:
    """Raises BadBase for whatever the host's loader says of the files of a key."""
    try:
        yield
    except Exception as error:  # the host raises errors of every kind over files that it does not know
        names = ", ".join(f"'{name}'" for name in files[key])
        raise BadBase(f"ComfyUI cannot load {names} ({_reason(error)}). Name another file in base.{key}.") from None


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _embeddings() -> Sequence[str]:
    import folder_paths

    return folder_paths.get_folder_paths("embeddings")


def part_files(settings: Base) -> dict[str, list[Path]]:
    """Where separate files lie, by the keys of a configuration. Raises BadBase."""
    found = {}
    for key, names in settings.parts.items():
        paths = {name: model_file(PARTS[key], name) for name in names}
        for name in (name for name, path in paths.items() if path is None):
            raise BadBase(
                f"'{name}' does not exist; {model_choice(PARTS[key])}. Name a file in it, or a path, in base.{key}."
            )
        found[key] = list(paths.values())
    return found


def checkpoint_file(settings: Base) -> Path:
    """Where the checkpoint lies. Raises BadBase."""
    path = model_file("checkpoints", settings.checkpoint)
    if path is None:
        raise BadBase(
            f"'{settings.checkpoint}' does not exist; {model_choice('checkpoints')}. Name a file in it, a path or "
            f'"{TOY}" as the base.'
        )
    return path


def lora_files(settings: Base) -> dict[Path, float]:
    """Where the LoRAs lie, with their strengths. Raises BadBase."""
    found = {}
    for name, strength in settings.lora.items():
        path = model_file("loras", name)
        if path is None:
            raise BadBase(
                f"'{name}' does not exist; {model_choice('loras')}. Name a file in it, or a path, in base.lora."
            )
        found[path] = strength
    return found


def with_lora(patcher: Any, clip: Any, file: Path, strength: float) -> tuple[Any, Any]:
    """The two with a LoRA. Raises BadBase where none of its tensors fits them; warns where some do not."""
    import comfy.sd
    import comfy.utils

    try:
        lora = comfy.utils.load_torch_file(str(file), safe_load=True)
    except Exception as error:  # the host raises errors of every kind over damaged files
        raise BadBase(f"The LoRA '{file}' cannot be read ({_reason(error)}). Copy or download it again.") from None
    with _unmatched() as lost:
        merged = comfy.sd.load_lora_for_models(patcher, clip, lora, strength, strength)
    pairs = ((patcher, merged[0]), (clip.patcher, merged[1].patcher))
    if all(_patches(before) == _patches(after) for before, after in pairs):
        raise BadBase(
            f"None of the {len(lora):,} tensors of '{file}' fits the base: it is no LoRA, or one of another model. "
            "Name another file, or none."
        )
    if lost:
        logging.getLogger(__name__).warning(
            f"{len(lost):,} of the {len(lora):,} tensors of '{file}' fit nothing in the base and are left out."
        )
    return merged


def _patches(patcher: Any) -> int:
    return sum(len(patches) for patches in patcher.patches.values())


@contextlib.contextmanager
def _unmatched() -> Iterator[list[str]]:
    """The host's log lines about tensors of a LoRA that it cannot place, which are kept from the screen."""
    lines: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        told = record.getMessage()
        if not told.startswith(("lora key not loaded", "NOT LOADED")):
            return True
        lines.append(told)
        return False

    logger = logging.getLogger()
    logger.addFilter(note)
    try:
        yield lines
    finally:
        logger.removeFilter(note)
