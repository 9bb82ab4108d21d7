"""What all files of the project have in common: one `.safetensors`, metadata that say what it is, checks before use."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import MaskUNetError
from .replacing import replacing

_KNOWN = {
    "maskunet": "is a mask generator: choose it in MaskUNet Loader",
    "maskunet_masks": "holds recorded masks: choose it in MaskUNet Load Masks",
}
"""Formats of the project, for a file that was chosen in the wrong place."""

_OTHERS = {
    "a LoRA": (r"lora_|\.lora\.|lokr_|hada_", "models/loras, for Load LoRA"),
    "a ControlNet": (
        r"^control_model\.|input_hint_block|controlnet_cond",
        "models/controlnet",
    ),
    "a checkpoint": (r"^model\.diffusion_model\.|^first_stage_model\.", "models/checkpoints, for Load Checkpoint"),
    "a VAE": (r"^(decoder|encoder)\.conv_in\.", "models/vae, for Load VAE"),
    "a diffusion model": (r"^(input_blocks|down_blocks|double_blocks|transformer_blocks)\.", "models/diffusion_models"),
}
"""Files that people have in the same place, by the name of some tensor: where they belong."""

Expected = dict[str, tuple[torch.dtype | None, tuple[int, ...]]]
"""Kind and shape of each tensor by name: uint8, or None for floating point."""


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    """safetensors has an error of its own for a full disk and the like; the system's number is in its words."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(str(error)) if number is None else OSError(int(number[1]), os.strerror(int(number[1])), str(path))


@dataclass(frozen=True)
class FileKind:
    """A kind of file, and the sentences for a person whose file is not of this kind or was spoilt.

    format, version: as its metadata say; later: versions that are read, too. noun: "MaskUNet generator". error: what is
    raised. place, choose, unreadable, again: what to do about a file that is missing, of another format, no
    safetensors, or damaged.
    """

    format: str
    version: str
    noun: str
    error: type[MaskUNetError]
    place: str
    choose: str
    unreadable: str
    again: str
    later: tuple[str, ...] = ()

    def write(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Write the file under a temporary name beside `path`, then rename it. Raises OSError."""
        metadata = {"format": self.format, "format_version": self.version, **metadata}
        with replacing(path) as temporary:
            try:
                save_file(tensors, temporary, metadata)
            except SafetensorError as error:
                raise _as_os_error(error, path) from None
            # safetensors makes files that only their owner can read.
            temporary.chmod(0o644)

    def read_metadata(self, path: Path) -> dict[str, str]:
        """The file's metadata, after the checks that need nothing else. Raises `error`."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata, names = file.metadata() or {}, list(file.keys())
        except FileNotFoundError:
            raise self.error(f"'{path}' does not exist. {self.place}") from None
        except (SafetensorError, OSError) as error:
            raise self.error(
                f"'{path.name}' is not a readable safetensors file ({error}). It may be truncated or of another kind: "
                f"{self.unreadable}"
            ) from None
        found = metadata.get("format")
        if found != self.format and found in _KNOWN:
            raise self.error(f"'{path.name}' {_KNOWN[found]}.")
        for kind, (pattern, place) in _OTHERS.items() if found != self.format else ():
            if any(re.search(pattern, name) for name in names):
                raise self.error(f"'{path.name}' is {kind}, not a {self.noun}: it belongs into {place}. {self.choose}")
        if found != self.format:
            raise self.error(
                f"'{path.name}' is a safetensors file, but not a {self.noun} (its metadata has no format "
                f'"{self.format}"). {self.choose}'
            )
        version = metadata.get("format_version", "")
        if version not in (self.version, *self.later):
            raise self.error(
                f"'{path.name}' has format version {version or 'unknown'}; this extension reads version "
                f"{' and '.join((self.version, *self.later))}. Update ComfyUI-MaskUNet."
            )
        return metadata

    def damaged_metadata(self, path: Path, error: Exception) -> MaskUNetError:
        return self.error(f"'{path.name}' has damaged metadata ({type(error).__name__}: {error}). {self.again}")

    def read_tensors(self, path: Path, expected: Expected) -> dict[str, Tensor]:
        """All tensors, after their names, shapes and kinds were held against `expected`. Raises `error`."""
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for what, wrong in (("lacks", set(expected) - names), ("holds the unknown", names - set(expected))):
                if wrong:
                    first, more = min(wrong), f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
                    raise self.error(f"'{path.name}' {what} tensor {first}{more}. {self.again}")
            for name, (dtype, shape) in expected.items():
                found = file.get_slice(name)
                kind = {torch.uint8: "U8"}.get(dtype)
                right = found.get_dtype() == "U8" if kind else found.get_dtype().startswith(("F", "BF"))
                if tuple(found.get_shape()) != shape or not right:
                    raise self.error(
                        f"Tensor {name} of '{path.name}' is {found.get_dtype()} {tuple(found.get_shape())}, but should "
                        f"be {kind or 'floating point'} {shape}. {self.again}"
                    )
            return {name: file.get_tensor(name) for name in expected}
