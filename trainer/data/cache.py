"""Latents and text embeddings of a data set: encoded once, kept on disk, read batch by batch.

What is kept is named by all that it depends on (content, size, encoder): a change makes only what it concerns anew,
nothing stale is ever found, and a preparation that was interrupted goes on where it stopped.
"""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from maskunet_core.training.buckets import Size, fit, nearest_bucket
from maskunet_core.training.data import BadData, EncodedPictures, EncodePicture, EncodeText, Sample, finite, sha256

from .decoding import BadPicture, Record, decode_bytes, picture_size, read_bytes
from .problems import NAMED
from .store import TensorStore, key_of

TEXTS_IN_MEMORY = 4096


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
) -> EncodedPictures:
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
    return EncodedPictures(samples, empty, lambda key: _read(latents, key), read_text, skipped)


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
            found[place] = store.write(key, finite(latent, f"The latent of '{record.name}'"))
    return keys, content, tuple(found[0]["latent"].shape)


def _prepare_texts(captions: dict[str, str], store: TensorStore, encode: EncodeText, progress: bool) -> None:
    """captions: by key, the empty one first."""
    expected = None
    for key, caption in tqdm(captions.items(), desc="captions", mininterval=1, disable=not progress):
        text = store.read(key)
        if text is None:
            text = store.write(key, finite(encode(caption), f"The text embedding of '{caption}'"))
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


def _read(store: TensorStore, key: str) -> dict[str, Tensor]:
    tensors = store.read(key)
    if tensors is None:
        path = store.path(key)
        raise BadData(f"'{path}' was damaged or removed meanwhile: start the run again, which makes it anew.")
    return tensors
