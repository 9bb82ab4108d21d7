"""A user's pictures for a base model: read, bucketed, encoded once, and cached on disk."""

import hashlib
import mmap
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from maskunet_core.toy.model import WEIGHTS

from .config import TOY, Base, Config
from .data.buckets import bucket_sizes
from .data.cache import CachedData, prepare
from .data.decoding import Record
from .data.records import scan
from .data.store import sha256

U_NET = "model.diffusion_model."


def encoders_digest(base: Base) -> str:
    """SHA-256 of what encodes pictures and texts, as the files hold it.

    Loaded modules would not do: the host leaves parameters that a checkpoint lacks as the memory was.
    """
    if base.checkpoint == TOY:
        folder = Path(base.weights) if base.weights else WEIGHTS
        parts = ("autoencoder", "text_encoder")
        return sha256(b"".join((folder / f"{part}.safetensors").read_bytes() for part in parts))
    path = Path(base.checkpoint)
    if path.suffix != ".safetensors":
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(name for name in file.keys() if not name.startswith(U_NET)):  # noqa: SIM118 - no mapping
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
    encoders = encoders_digest(config.base)
    merged = "".join(f" {sha256(Path(file).read_bytes())}*{s}" for file, s in sorted(config.base.lora.items()))
    return prepare(
        read_records(config),
        sizes=picture_sizes(config),
        encode_picture=base.encode_picture,
        picture_key=encoders,
        encode_text=base.encode_text,
        text_key=encoders + merged,
        folder=Path(settings.cache),
        flip=settings.flip,
        broken_limit=settings.broken_limit,
    )
