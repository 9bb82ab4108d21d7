"""Latents and text embeddings of a data set: encoded once, kept on disk, read batch by batch.

What is kept is named by all that it depends on (content, size, encoder): a change makes only what it concerns anew,
nothing stale is ever found, and a preparation that was interrupted goes on where it stopped.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .buckets import Size, fit, nearest_bucket
from .decoding import BadPicture, Record, decode_bytes, picture_size, read_bytes
from .problems import NAMED, BadData
from .store import TensorStore, key_of, sha256
from .texts import stacked

TEXTS_IN_MEMORY = 4096

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


class CachedData:
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

    def split(self, held_out: int, seed: int) -> tuple["CachedData", "CachedData"]:
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

    def _part(self, samples: list[Sample]) -> "CachedData":
        return CachedData(samples, self._empty, self._read_latent, self._read_text, self.skipped)


@torch.no_grad()
def prepare(
    records: list[Record],
    *,
    sizes: list[Size],
    encode_picture: EncodePicture,
    picture_key: str,
    encode_text: EncodeText,
    text_key: str,
    folder: Path,
    flip: bool,
    broken_limit: float,
    progress: bool = True,
) -> CachedData:
    """Encodes what is not in the cache yet, and gives access to all of it. Interrupted, it loses the current item.

    sizes: of the buckets; encode_picture: [3, H, W] in [0, 1] to a latent [C, ..., h, w]; encode_text: a caption to its
    conditioning without the batch dimension, the first of which may be the text's length; picture_key, text_key: name
    weights and settings of the encoders; flip: keep mirrored latents too; broken_limit: the largest share of pictures
    that may be broken and left out. Raises BadData where more are broken, none is left, or an encoder's values are not
    usable.
    """
    latents, texts = TensorStore(folder / "latents"), TensorStore(folder / "text")
    mirrored = (False, True) if flip else (False,)
    samples, skipped = [], []
    for record in tqdm(records, desc="pictures", mininterval=1, disable=not progress):
        try:
            keys, content, shape = _prepare_picture(record, latents, sizes, encode_picture, picture_key, mirrored)
        except BadPicture as error:
            skipped.append((error.name, error.reason))
            tqdm.write(f"Left out: {error}")
            continue
        text = key_of("text", record.caption, text_key)
        samples.append(Sample(record.name, record.caption, content, shape, keys, text))
    _require_enough(len(samples), skipped, broken_limit)
    empty = key_of("text", "", text_key)
    captions = {empty: "", **{sample.text: sample.caption for sample in samples}}
    _prepare_texts(captions, texts, encode_text, progress)
    # A text embedding is large and comes up again in every epoch; a latent is small.
    read_text = lru_cache(TEXTS_IN_MEMORY)(lambda key: _read(texts, key))
    return CachedData(samples, empty, lambda key: _read(latents, key), read_text, skipped)


def _prepare_picture(
    record: Record,
    store: TensorStore,
    sizes: list[Size],
    encode: EncodePicture,
    picture_key: str,
    mirrored: tuple[bool, ...],
) -> tuple[tuple[str, ...], str, tuple[int, ...]]:
    """(keys of the latents, hash of the content, shape of a latent). Raises BadPicture."""
    data = read_bytes(record)
    content, size = sha256(data), nearest_bucket(*picture_size(record.name, data), sizes)
    keys = tuple(key_of("latent", content, *size, flip, picture_key) for flip in mirrored)
    found = [store.read(key) for key in keys]
    if None in found:
        picture = fit(decode_bytes(record.name, data), size)
    for place, (key, flip) in enumerate(zip(keys, mirrored)):
        if found[place] is None:
            latent = {"latent": encode(picture.flip(-1) if flip else picture)}
            found[place] = store.write(key, _finite(latent, f"The latent of '{record.name}'"))
    return keys, content, tuple(found[0]["latent"].shape)


def _prepare_texts(captions: dict[str, str], store: TensorStore, encode: EncodeText, progress: bool) -> None:
    """captions: by key, the empty one first."""
    expected = None
    for key, caption in tqdm(captions.items(), desc="captions", mininterval=1, disable=not progress):
        text = store.read(key)
        if text is None:
            text = store.write(key, _finite(encode(caption), f"The text embedding of '{caption}'"))
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in text.items()}
        expected = expected or shapes
        if shapes != expected:
            raise BadData(
                f"The text embedding of '{caption}' has the shapes {shapes}, that of the empty caption {expected}, "
                "lengths aside, so that they do not fit into one batch: leave the caption out."
            )


def _require_enough(left: int, skipped: list[tuple[str, str]], limit: float) -> None:
    total = left + len(skipped)
    if total == 0:
        raise BadData("The data set holds no pictures: name another one.")
    share = len(skipped) / total
    if left and share <= limit:
        return
    named = ", ".join(f"'{name}' ({reason})" for name, reason in skipped[:NAMED])
    more = f" and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
    bound = f"and data.broken_limit allows {limit:.1%}" if share > limit else "and none is left"
    raise BadData(
        f"{len(skipped)} of {total} pictures ({share:.1%}) cannot be read, {bound}: {named}{more}. "
        "Repair or remove them, or raise data.broken_limit where enough others are left."
    )


def _finite(tensors: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise BadData(f"{what} holds values that are not finite: run its encoder in fp32.")
    return tensors


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _read(store: TensorStore, key: str) -> dict[str, Tensor]:
    tensors = store.read(key)
    if tensors is None:
        path = store.path(key)
        raise BadData(f"'{path}' was damaged or removed meanwhile: start the run again, which makes it anew.")
    return tensors
