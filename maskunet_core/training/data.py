"""Pictures with captions as training reads them: latents and text embeddings."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

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
ReadTensors = Callable[[str], dict[str, Tensor]]


@dataclass(frozen=True)
class Sample:
    """A prepared picture. content: hash of its file; latents: keys of upright and, with flips, mirrored; text: key."""

    name: str
    caption: str
    content: str
    shape: tuple[int, ...]
    latents: tuple[str, ...]
    text: str


class EncodedPictures:
    """A prepared data set. skipped: (name, reason) of each broken picture."""

    def __init__(
        self,
        samples: list[Sample],
        empty: str,
        read_latent: ReadTensors,
        read_text: ReadTensors,
        skipped: list[tuple[str, str]],
    ):
        """empty: key of the empty caption; read_latent, read_text: tensors by key."""
        self.samples, self.skipped = samples, skipped
        self._empty, self._read_latent, self._read_text = empty, read_latent, read_text

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def names(self) -> list[str]:
        return [sample.name for sample in self.samples]

    @property
    def captions(self) -> list[str]:
        return [sample.caption for sample in self.samples]

    @property
    def digests(self) -> list[int]:
        """A number for each picture with its caption, in rising order: it tells data sets apart."""
        whole = {sha256(f"{sample.content} {sample.caption}".encode()) for sample in self.samples}
        return sorted(int(digest[:15], 16) for digest in whole)

    @cached_property
    def buckets(self) -> list[Tensor]:
        """The rows [N] of each shape of latents in use."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, sample in enumerate(self.samples):
            rows.setdefault(sample.shape, []).append(row)
        return [torch.tensor(rows[shape]) for shape in sorted(rows)]

    def latents(self, rows: Tensor, flips: Tensor | None = None) -> Tensor:
        """[B, C, h, w] in fp32. rows: [B] of one bucket; flips: [B] bool, where the mirrored picture is wanted.

        Raises ValueError for flips of data that was prepared without, BadData where the cache was damaged meanwhile.
        """
        turned = [False] * len(rows) if flips is None else flips.tolist()
        samples = [self.samples[row] for row in rows.tolist()]
        if any(turned) and any(len(sample.latents) < 2 for sample in samples):
            raise ValueError("Mirrored latents are asked for, but the data was prepared without flips.")
        keys = [sample.latents[int(flip)] for sample, flip in zip(samples, turned)]
        return torch.stack([self._read_latent(key)["latent"].float() for key in keys])

    def conditions(self, rows: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """The text encoder's tensors, each [B, ...], fp32 unless they are integers; of texts of unequal lengths as
        `texts.stacked` has them.

        rows: [B]; dropped: [B] bool, where the empty caption takes the caption's place. Raises BadData where the
        cache was damaged meanwhile.
        """
        keys = [self._empty if drop else self.samples[row].text for row, drop in zip(rows.tolist(), dropped.tolist())]
        texts = [self._read_text(key) for key in keys]
        return stacked([{name: _single(value) for name, value in text.items()} for text in texts])

    def split(self, held_out: int, seed: int) -> tuple["EncodedPictures", "EncodedPictures"]:
        """(the rest, a held-out part of at least `held_out` pictures).

        Chosen by the hash of a picture's content: where pictures are added, none that was trained on before becomes
        held out. Copies of a picture stay together. Raises BadData where nothing is left to train on.
        """
        copies = Counter(sample.content for sample in self.samples)
        chosen, count = set(), 0
        for content in sorted(copies, key=lambda content: sha256(f"{seed} {content}".encode())):
            if count >= held_out:
                break
            chosen.add(content)
            count += copies[content]
        if count == len(self):
            raise BadData(
                f"Holding out {held_out} of {len(self)} pictures ({len(copies)} of them different) leaves none to "
                "train on: hold out fewer (validation.pictures), or add pictures."
            )
        rest = [sample for sample in self.samples if sample.content not in chosen]
        return self._part(rest), self._part([sample for sample in self.samples if sample.content in chosen])

    def _part(self, samples: list[Sample]) -> "EncodedPictures":
        return EncodedPictures(samples, self._empty, self._read_latent, self._read_text, self.skipped)


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
    latents: dict[str, dict[str, Tensor]] = {}
    samples = []
    for number, (picture, caption) in enumerate(zip(pictures, captions)):
        fitted = fit(picture, nearest_bucket(*picture.size, sizes))
        keys = tuple(f"{number} {turn}" for turn in (("upright", "mirrored") if flip else ("upright",)))
        for key, view in zip(keys, (fitted, fitted.flip(-1))):
            latents[key] = finite(_compacted({"latent": encode_picture(view)}), f"The latent of picture {number + 1}")
        content = sha256(f"{picture.size}".encode() + picture.tobytes())
        shape = tuple(latents[keys[0]]["latent"].shape)
        samples.append(Sample(f"picture {number + 1}", caption, content, shape, keys, caption))
        progress()
    return EncodedPictures(samples, "", latents.__getitem__, texts.__getitem__, [])


def _compacted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: compact(tensor) for name, tensor in tensors.items()}
