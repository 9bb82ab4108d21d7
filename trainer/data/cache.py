"""Latents and text embeddings of a data set: encoded once, by all processes, kept on disk, read batch by batch.

What is kept is named by all that it depends on (content, size, encoder): a change makes only what it concerns anew,
nothing stale is ever found, and a preparation that was interrupted goes on where it stopped, in any number of
processes. Beside it a table tells which picture has which latent: where the files of a data set have not changed, a
run begins from it without reading a picture.
"""

import shutil
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from maskunet_core.training.buckets import Size, fit, nearest_bucket
from maskunet_core.training.data import BadData, EncodedPictures, EncodePicture, EncodeText, content_of, finite

from .decoding import BadPicture, Record, decode_bytes, picture_size, read_bytes
from .encoded import DiskSamples, Rows, captions_of, skipped_in
from .problems import NAMED
from .share import Share
from .store import Damage, ShardStore, key_of

_FEW, _MANY = 16, 2048
"""Pictures of a part: the least, and the most."""
_PARTS = 512
_LOOKS = 0.2
"""Seconds between two looks at whether other processes are done."""


@dataclass(frozen=True)
class Encoders:
    """sizes: of the buckets; picture: [3, H, W] in [0, 1] to a latent [C, ..., h, w]; text: a caption to its
    conditioning without the batch dimension, the first of which may be the text's length; picture_key, text_key: name
    weights and settings of the two; flip: keep mirrored latents too."""

    sizes: list[Size]
    picture: EncodePicture
    picture_key: str
    text: EncodeText
    text_key: str
    flip: bool

    @property
    def mirrored(self) -> tuple[bool, ...]:
        return (False, True) if self.flip else (False,)

    @property
    def empty(self) -> bytes:
        """The empty caption's key."""
        return self.text_of("")

    def text_of(self, caption: str) -> bytes:
        return key_of("text", caption, self.text_key)


@dataclass
class Cache:
    """folder: of this machine; shared: one that all processes see, where `folder` is not; share: of this process."""

    folder: Path
    shared: Path | None = None
    share: Share = field(default_factory=Share)

    def __post_init__(self):
        there, also = self.folder, None
        if not self.share.sees(self.folder):
            there, also = self.shared, self.folder
        self.sets = there / "sets"
        self.latents, self.texts = (
            ShardStore(there / kind, also and ShardStore(also / kind)) for kind in ("latents", "text")
        )

    def refresh(self) -> None:
        self.latents.refresh()
        self.texts.refresh()


@torch.no_grad()
def prepare(
    records: Sequence[Record],
    encoders: Encoders,
    cache: Cache,
    *,
    fingerprint: str = "",
    broken_limit: float,
    progress: bool = True,
) -> EncodedPictures:
    """Encodes what is not in the cache yet, and gives access to all of it. Interrupted, it loses the current item;
    killed, at most a minute's.

    fingerprint: names the records and the state of their files, which are not read again where it is as before; "" for
    none. broken_limit: the largest share of pictures that may be broken and left out. Raises BadData where more are
    broken, none is left, or an encoder's values are not usable.
    """
    return Preparation(records, encoders, cache, fingerprint, broken_limit, progress).run()


class Preparation:
    """parts: the tables of a set, in order, of `size` pictures each."""

    def __init__(
        self,
        records: Sequence[Record],
        encoders: Encoders,
        cache: Cache,
        fingerprint: str,
        broken_limit: float,
        progress: bool,
    ):
        self.records, self.encoders, self.cache, self.broken_limit = records, encoders, cache, broken_limit
        self.share, self.progress = cache.share, progress and cache.share.first
        self.trusted = bool(fingerprint)
        e = encoders
        # Of records that nothing names, the table is for this time alone.
        named = fingerprint or f"once {self.share.agreed()}"
        key = key_of("set", named, *(side for size in e.sizes for side in size), e.flip, e.picture_key, e.text_key)
        self.folder = cache.sets / key.hex()[:32]
        self.damaged = self.folder / "damaged"
        self.size = min(_MANY, max(_FEW, len(records) // _PARTS))
        self.parts = [self.folder / f"{first:012}.arrow" for first in range(0, len(records), self.size)]

    def run(self) -> EncodedPictures:
        found = self._opened() if self.trusted else None
        if self.share.everywhere(found is not None):
            return found
        if self.share.first and self.damaged.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        self.share.wait()
        self._encode_pictures()
        self._require_enough()
        self._encode_texts()
        self.cache.refresh()
        found = self._opened()
        if found is None:
            raise BadData(f"Files in '{self.folder.parent.parent}' were removed meanwhile: start the run again.")
        if not self.trusted:
            weakref.finalize(found.samples, shutil.rmtree, self.folder, ignore_errors=True)
        return found

    def _opened(self) -> EncodedPictures | None:
        """The set, if all of it is there and may be trusted."""
        if self.damaged.exists() or not all(part.exists() for part in self.parts):
            return None
        inputs = self.cache.latents, self.cache.texts, self.encoders.empty, self.encoders.flip, self.damaged
        try:
            self._require_enough()
            samples = DiskSamples(self.parts, *inputs)
        except Damage:
            self.damaged.touch()
            return None
        if samples.latents_are_there:
            return EncodedPictures(samples, skipped_in(self.parts)) if samples.texts_are_there else None
        self.damaged.touch()
        return None

    # Pictures ---------------------------------------------------------------------------------------------------

    def _encode_pictures(self) -> None:
        """The parts of the set, each a table; done by all processes."""
        missing = [number for number, part in enumerate(self.parts) if not part.exists()]
        # Before anybody writes, all have seen the same.
        self.share.wait()
        done: list[tuple[Path, Rows]] = []
        bar = tqdm(total=len(self.records), desc="pictures", mininterval=1, disable=not self.progress)
        bar.update(max(0, len(self.records) - self.size * len(missing)))
        try:
            for number in self.share.mine(missing):
                done.append((self.parts[number], self._part(number, bar)))
                if self.cache.latents.due:
                    self._write(done)
        finally:
            self._write(done)
            bar.close()
        self._await(lambda: all(part.exists() for part in self.parts))

    def _write(self, done: list[tuple[Path, Rows]]) -> None:
        """Parts are written after their latents."""
        self.cache.latents.flush()
        for part, rows in done:
            rows.write(part)
        done.clear()

    def _part(self, number: int, bar: tqdm) -> Rows:
        rows = Rows()
        first = number * self.size
        for record in self.records[first : first + self.size]:
            try:
                keys, content, shape = self._encode_picture(record)
                rows.add(record.name, record.caption, content, shape, keys, self.encoders.text_of(record.caption))
            except BadPicture as error:
                rows.skipped.append((error.name, error.reason))
                tqdm.write(f"Left out: {error}")
            bar.update(min(self.share.count, bar.total - bar.n))
        return rows

    def _encode_picture(self, record: Record) -> tuple[tuple[bytes, ...], bytes, tuple[int, ...]]:
        """(keys of the latents, hash of the content, shape of a latent). Raises BadPicture."""
        encoders, store = self.encoders, self.cache.latents
        data = read_bytes(record)
        content, size = content_of(data), nearest_bucket(*picture_size(record.name, data), encoders.sizes)
        mirrored = encoders.mirrored
        keys = tuple(key_of("latent", content.hex(), *size, flip, encoders.picture_key) for flip in mirrored)
        found = [store.get(key) for key in keys]
        if None in found:
            picture = fit(decode_bytes(record.name, data), size)
        for place, (key, flip) in enumerate(zip(keys, mirrored)):
            if found[place] is None:
                latent = {"latent": encoders.picture(picture.flip(-1) if flip else picture)}
                found[place] = store.add(key, finite(latent, f"The latent of '{record.name}'"))
        if store.due:
            store.flush()
        return keys, content, tuple(found[0]["latent"].shape)

    # Texts ------------------------------------------------------------------------------------------------------

    def _encode_texts(self) -> None:
        """Those of all captions, by all processes."""
        keys, captions = captions_of(self.parts)
        store = self.cache.texts
        store.refresh()
        missing = np.flatnonzero(store.find(keys) < 0) if self.trusted else np.arange(len(keys))
        self.share.wait()
        with store.writing():
            expected = _shapes(self._text(self.encoders.empty, ""))
            mine = self.share.mine(missing)
            shown = {"total": len(mine), "desc": "captions", "mininterval": 1, "disable": not self.progress}
            for key, caption in tqdm(captions(mine), **shown):
                self._text(key, caption, expected)
                if store.due:
                    store.flush()
        self._await(lambda: self._all_there(keys))

    def _all_there(self, keys: np.ndarray) -> bool:
        self.cache.texts.refresh()
        return bool((self.cache.texts.find(keys) >= 0).all())

    def _text(self, key: bytes, caption: str, expected: dict[str, tuple[int, ...]] | None = None) -> dict[str, Tensor]:
        """Raises BadData where it has other shapes than are expected."""
        found = self.cache.texts.get(key)
        text = found or finite(self.encoders.text(caption), f"The text embedding of '{caption}'")
        shapes = _shapes(text)
        if expected is not None and shapes != expected:
            raise BadData(
                f"The text embedding of '{caption}' has the shapes {shapes}, that of the empty caption {expected}, "
                "lengths aside, so that they do not fit into one batch: leave the caption out."
            )
        return found or self.cache.texts.add(key, text)

    # All --------------------------------------------------------------------------------------------------------

    def _await(self, done: Callable[[], bool]) -> None:
        """Until other processes are done, which may take hours: longer than they wait for each other's messages."""
        while not done():
            time.sleep(_LOOKS)
        self.share.wait()

    def _require_enough(self) -> None:
        skipped = skipped_in(self.parts)
        _require_enough(len(self.records) - len(skipped), skipped, self.broken_limit)


def _shapes(text: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape[1:]) for name, tensor in text.items()}


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
