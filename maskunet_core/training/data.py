"""Pictures with captions as training reads them: latents and text embeddings."""

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import MaskUNetError
from .buckets import Size, fit, nearest_bucket
from .texts import stacked


class BadData(MaskUNetError):
    """Every problem of a data set, a line each."""


EncodePicture = Callable[[Tensor], Tensor]
EncodeText = Callable[[str], dict[str, Tensor]]
EMPTY = -1
"""In the place of a row: the empty caption."""


class Samples(Protocol):
    """Encoded pictures with captions, by row. What grows with their number is in arrays, or on disk.

    contents: [N] of 32 bytes, SHA-256 of a picture's file; digests: [N] int64, which tell pictures with captions apart;
    shapes: of the latents in use; shape_of: [N], which of them; mirrors: whether mirrored latents are there; on_disk:
    whether reading waits for a disk, and may be done by several threads.
    """

    contents: np.ndarray
    digests: np.ndarray
    shapes: list[tuple[int, ...]]
    shape_of: np.ndarray
    mirrors: bool
    on_disk: bool

    def names(self, rows: np.ndarray) -> list[str]: ...

    def captions(self, rows: np.ndarray) -> list[str]: ...

    def latents(self, rows: np.ndarray, mirrored: np.ndarray) -> list[Tensor]:
        """Raises BadData where the cache was damaged meanwhile."""

    def texts(self, rows: np.ndarray) -> list[dict[str, Tensor]]:
        """Of captions, or of the empty one for EMPTY. Raises BadData where the cache was damaged meanwhile."""


def content_of(data: bytes) -> bytes:
    """32 bytes that name a picture's file."""
    return hashlib.sha256(data).digest()


def digest_of(content: bytes, caption: str) -> int:
    """60 bits that name a picture with its caption."""
    return int(sha256(f"{content.hex()} {caption}".encode())[:15], 16)


class EncodedPictures:
    """A prepared data set, or a part of it. skipped: (name, reason) of each broken picture; rows: those of the part."""

    def __init__(self, samples: Samples, skipped: list[tuple[str, str]] = (), rows: np.ndarray | None = None):
        self.samples, self.skipped = samples, list(skipped)
        self._rows = np.arange(len(samples.shape_of)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def on_disk(self) -> bool:
        return self.samples.on_disk

    @property
    def names(self) -> list[str]:
        return self.samples.names(self._rows)

    @property
    def captions(self) -> list[str]:
        return self.samples.captions(self._rows)

    @property
    def digests(self) -> np.ndarray:
        """A number for each different picture with its caption, in rising order: they tell data sets apart."""
        return np.unique(self.samples.digests[self._rows])

    @cached_property
    def buckets(self) -> list[Tensor]:
        """The rows [N] of each shape of latents in use."""
        shapes, used = self.samples.shapes, self.samples.shape_of[self._rows]
        found = ((shape, np.flatnonzero(used == number)) for number, shape in enumerate(shapes))
        return [torch.from_numpy(rows) for _, rows in sorted(found, key=lambda pair: pair[0]) if len(rows)]

    def latents(self, rows: Tensor, flips: Tensor | None = None) -> Tensor:
        """[B, C, h, w] in fp32. rows: [B] of one bucket; flips: [B] bool, where the mirrored picture is wanted.

        Raises ValueError for flips of data that was prepared without, BadData where the cache was damaged meanwhile.
        """
        mirrored = np.zeros(len(rows), bool) if flips is None else flips.numpy()
        if mirrored.any() and not self.samples.mirrors:
            raise ValueError("Mirrored latents are asked for, but the data was prepared without flips.")
        return torch.stack([latent.float() for latent in self.samples.latents(self._rows[rows.numpy()], mirrored)])

    def conditions(self, rows: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """The text encoder's tensors, each [B, ...], fp32 unless they are integers; of texts of unequal lengths as
        `texts.stacked` has them.

        rows: [B]; dropped: [B] bool, where the empty caption takes the caption's place. Raises BadData where the
        cache was damaged meanwhile.
        """
        texts = self.samples.texts(np.where(dropped.numpy(), EMPTY, self._rows[rows.numpy()]))
        return stacked([{name: _single(value) for name, value in text.items()} for text in texts])

    def split(self, held_out: int, seed: int) -> tuple["EncodedPictures", "EncodedPictures"]:
        """(the rest, a held-out part of at least `held_out` pictures).

        Chosen by the hash of a picture's content: where pictures are added, none that was trained on before becomes
        held out. Copies of a picture stay together. Raises BadData where nothing is left to train on.
        """
        if not held_out:
            return self, self._part(np.zeros(len(self), bool), True)
        contents = self.samples.contents[self._rows]
        # Of a million pictures, whole hashes would be sorted ten times as slowly.
        kinds = np.ascontiguousarray(contents).view(np.uint64).reshape(-1, 4)[:, 0]
        kinds, firsts, which, copies = np.unique(kinds, return_index=True, return_inverse=True, return_counts=True)
        hashes = (content_of(f"{seed} {contents[first].tobytes().hex()}".encode()) for first in firsts)
        places = np.fromiter((int.from_bytes(found[:8], "big") for found in hashes), np.uint64, len(firsts))
        order = np.argsort(places)
        # As many, by rising hash, as give enough pictures with their copies.
        count = int(np.searchsorted(np.cumsum(copies[order]), held_out)) + 1
        chosen = np.zeros(len(kinds), bool)
        chosen[order[:count]] = True
        if chosen.all():
            raise BadData(
                f"Holding out {held_out} of {len(self)} pictures ({len(kinds)} of them different) leaves none to "
                "train on: hold out fewer (validation.pictures), or add pictures."
            )
        return self._part(chosen[which], False), self._part(chosen[which], True)

    def _part(self, chosen: np.ndarray, held_out: bool) -> "EncodedPictures":
        return EncodedPictures(self.samples, self.skipped, self._rows[chosen == held_out])


class _HeldSamples:
    """Samples in memory. latents: upright and, with flips, mirrored ones; texts: by caption."""

    on_disk = False

    def __init__(self, captions: list[str], contents: list[bytes], latents: list[list[Tensor]], texts: dict[str, dict]):
        self._captions, self._latents, self._texts = captions, latents, texts
        self.contents = np.array([np.void(content) for content in contents], dtype="V32")
        self.digests = np.array([digest_of(*pair) for pair in zip(contents, captions)], dtype=np.int64)
        shapes = [tuple(of_one[0].shape) for of_one in latents]
        self.shapes = sorted(set(shapes))
        self.shape_of = np.array([self.shapes.index(shape) for shape in shapes], dtype=np.int64)
        self.mirrors = bool(latents) and len(latents[0]) > 1

    def names(self, rows: np.ndarray) -> list[str]:
        return [f"picture {row + 1}" for row in rows.tolist()]

    def captions(self, rows: np.ndarray) -> list[str]:
        return [self._captions[row] for row in rows.tolist()]

    def latents(self, rows: np.ndarray, mirrored: np.ndarray) -> list[Tensor]:
        return [self._latents[row][int(flip)] for row, flip in zip(rows.tolist(), mirrored.tolist())]

    def texts(self, rows: np.ndarray) -> list[dict[str, Tensor]]:
        return [self._texts["" if row == EMPTY else self._captions[row]] for row in rows.tolist()]


def finite(tensors: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise BadData(f"{what} holds values that are not finite: run its encoder in fp32.")
    return tensors


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def compact(tensor: Tensor) -> Tensor:
    """As it is kept: fp32 as fp16, unless a value overflows; on the CPU."""
    tensor = tensor.detach().to("cpu", copy=True).contiguous()
    if tensor.dtype not in (torch.float32, torch.float64):
        return tensor
    half = tensor.half()
    return half if bool(half.isfinite().all()) else tensor.float()


def sha256(data: bytes) -> str:
    """As 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


@torch.no_grad()
def encode_pictures(
    pictures: list[Image.Image],
    captions: list[str],
    *,
    sizes: list[Size],
    encode_picture: EncodePicture,
    encode_text: EncodeText,
    flip: bool,
    progress: Callable[[], None] = lambda: None,
) -> EncodedPictures:
    """RGB pictures with their captions, encoded in memory, to the same numbers that files of them would give.

    sizes: of the buckets. encode_picture: [3, H, W] in [0, 1] to a latent [C, ..., h, w]. encode_text: a caption to its
    conditioning without the batch dimension. flip: keep mirrored latents, too. progress: called after each picture.
    Raises BadData where an encoder's values are not finite.
    """
    texts = {
        caption: finite(_compacted(encode_text(caption)), f"The text embedding of '{caption}'")
        for caption in dict.fromkeys(["", *captions])
    }
    latents, contents = [], []
    for number, picture in enumerate(pictures):
        fitted = fit(picture, nearest_bucket(*picture.size, sizes))
        views = (fitted, fitted.flip(-1)) if flip else (fitted,)
        what = f"The latent of picture {number + 1}"
        latents.append([finite(_compacted({"latent": encode_picture(view)}), what)["latent"] for view in views])
        contents.append(content_of(f"{picture.size}".encode() + picture.tobytes()))
        progress()
    return EncodedPictures(_HeldSamples(captions, contents, latents, texts))


def _compacted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: compact(tensor) for name, tensor in tensors.items()}
