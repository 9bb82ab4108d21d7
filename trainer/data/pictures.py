"""A user's pictures for a base model: read, bucketed, encoded once, and cached on disk."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Config
from .buckets import bucket_sizes
from .cache import CachedData, prepare
from .records import Record, scan


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _file_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_records(config: Config) -> list[Record]:
    """The pictures and captions at `data.path`. Raises BadData with all problems at once."""
    return scan(config.data.path, config.data.caption_column).require()


def picture_sizes(config: Config) -> list[tuple[int, int]]:
    """(width, height) of the buckets."""
    settings = config.data
    step = 64 if settings.resolution >= 256 else 8
    return bucket_sizes(settings.resolution, step, limit=2.0 if settings.buckets else 1.0)


def cached_pictures(config: Config, base: Any) -> CachedData:
    """The configured data as latents and text embeddings; what is not in the cache yet is encoded.

    base: a BaseModel. Raises BadData.
    """
    settings = config.data
    # LoRAs change the text encoder too, but its own weights only once it is loaded.
    merged = "".join(f"{_file_digest(file)}*{strength}" for file, strength in sorted(config.base.lora.items()))
    return prepare(
        read_records(config),
        sizes=picture_sizes(config),
        encode_picture=base.encode_picture,
        picture_key=fingerprint(base.vae.first_stage_model) + type(base.model.latent_format).__name__,
        encode_text=base.encode_text,
        text_key=fingerprint(base.clip.cond_stage_model) + merged,
        folder=Path(settings.cache),
        flip=settings.flip,
        broken_limit=settings.broken_limit,
    )
