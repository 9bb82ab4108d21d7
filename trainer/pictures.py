"""A user's pictures for a base model: read, bucketed, encoded once, and cached on disk."""

import hashlib
import json
import mmap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from maskunet_core.replacing import replacing
from maskunet_core.toy.model import WEIGHTS
from maskunet_core.training.buckets import Size, bucket_sizes, fit, nearest_bucket
from maskunet_core.training.data import EncodedPictures, EncodeText, sha256

from .base_files import checkpoint_file, lora_files, part_files
from .config import Base, Config
from .data.cache import Cache, Encoders, prepare
from .data.decoding import BadPicture, Record, decode_bytes, picture_size, read_bytes
from .data.problems import NAMED
from .data.records import Scan, fingerprint, scan
from .data.share import ALONE, Share

ENCODED = "encoded"
"""Folder of a run for latents and text embeddings, where its processes have no cache in common."""
TRIED = 4
"""Pictures by which the time of encoding is estimated."""
U_NET = "model.diffusion_model."


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return hashlib.sha256(content).hexdigest()


def _toy_digest(base: Base, *parts: str) -> str:
    folder = Path(base.weights) if base.weights else WEIGHTS
    return sha256(b"".join((folder / f"{part}.safetensors").read_bytes() for part in parts))


def _parts_digest(base: Base, *keys: str) -> str:
    files = part_files(base)
    digests = [file_digest(path) for key in keys for path in files[key]]
    return sha256(" ".join([base.text_encoder_type, *digests]).encode())


def _merged(base: Base) -> str:
    """Names the LoRAs in the base."""
    return "".join(f" {sha256(file.read_bytes())}*{s}" for file, s in sorted(lora_files(base).items()))


def _embeddings(prompts: list[str], base: Any) -> str:
    """Names the vectors of the embeddings that captions name: their files may change."""
    named = (prompt for prompt in prompts if "embedding:" in prompt)
    chunks = (chunk for prompt in named for of_encoder in base.tokens(prompt).values() for chunk in of_encoder)
    vectors = [token for chunk in chunks for token, _ in chunk if torch.is_tensor(token)]
    return sha256(b"".join(v.float().numpy().tobytes() for v in vectors)) if vectors else ""


def base_digest(base: Base) -> str:
    """Names everything that decides what the base draws: the files of its parts, and LoRAs."""
    if base.is_toy:
        return _toy_digest(base, "autoencoder", "text_encoder", base.body)
    if base.parts:
        return _parts_digest(base, *base.parts) + _merged(base)
    return file_digest(checkpoint_file(base)) + _merged(base)


def encoders_digest(base: Base) -> str:
    """SHA-256 of what encodes pictures and texts, as the files hold it.

    Loaded modules would not do: the host leaves parameters that a checkpoint lacks as the memory was.
    """
    if base.is_toy:
        return _toy_digest(base, "autoencoder", "text_encoder")
    if base.parts:
        return _parts_digest(base, "text_encoders", "vae")
    path = checkpoint_file(base)
    if path.suffix != ".safetensors":
        return file_digest(path)
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(name for name in file.keys() if not name.startswith(U_NET)):  # noqa: SIM118 - no mapping
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def scan_data(config: Config, sample: bool = False) -> Scan:
    """The pictures at `data.path` with their captions, or with texts about a word that is learned."""
    if config.learns_word:
        from .embedding.texts import scan_texts

        return scan_texts(config)
    return scan(config.data.path, config.data.caption_column, sample)


def read_data(config: Config, sample: bool = False) -> Scan:
    """Raises BadData with all problems at once. sample: of many shards or tables look into a few."""
    found = scan_data(config, sample)
    found.require()
    return found


def picture_sizes(config: Config) -> list[Size]:
    """(width, height) of the buckets."""
    settings = config.data
    step = 64 if settings.resolution >= 256 else 8
    return bucket_sizes(settings.resolution, step, limit=2.0 if settings.buckets else 1.0)


def sizes_in_use(config: Config) -> Counter[Size]:
    """How many of the pictures at `data.path` fall into which bucket; broken ones into none. Raises BadData."""
    sizes, found = picture_sizes(config), Counter()
    for record in read_data(config).records:
        try:
            found[nearest_bucket(*picture_size(record.name, read_bytes(record)), sizes)] += 1
        except BadPicture:
            continue
    return found


class LaterRecords(Sequence):
    """Records of a known number, which are looked for when one of them is needed."""

    def __init__(self, count: int, find: Callable[[], Sequence[Record]]):
        self._count, self._find = count, lru_cache(1)(find)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        return self._find()[place]


def cached_pictures(config: Config, base: Any, share: Share = ALONE) -> EncodedPictures:
    """The configured data as latents and text embeddings. base: a BaseModel. Raises BadData.

    What has to be known of all captions is kept beside them, so that files that are as they were are not read again.
    """
    settings = config.data
    cache = Cache(Path(settings.cache), Path(config.output) / ENCODED, share)
    state = sha256(f"{fingerprint(settings.path, settings.caption_column)} {encoders_digest(config.base)}".encode())
    # Times of files may differ between machines.
    name = f"{share.from_first(int(state[:15], 16)):015x}"
    file = cache.sets / f"{name}.json"
    facts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if share.everywhere(facts is not None):
        records = LaterRecords(facts["pictures"], lambda: read_data(config).records)
    else:
        found = read_data(config)
        records = found.records
        cut = told_cut(((record.name, record.caption) for record in records), "captions", base)
        special = [record.caption for record in records if "embedding:" in record.caption]
        facts = {"pictures": len(records), "notes": found.notes + cut, "with embeddings": special}
        if share.first:
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(facts), encoding="utf-8")
    for note in facts["notes"] if share.first else ():
        tqdm.write(note)
    prompts = facts["with embeddings"]
    return encoded(records, picture_sizes(config), config, base, cache=cache, fingerprint=name, prompts=prompts)


def told_cut(texts: Iterable[tuple[str, str]], what: str, base: Any) -> list[str]:
    """Counts texts whose end the text encoder leaves out, in a sentence; none where there are none.

    texts: (name, text); what: they are; base: a BaseModel.
    """
    cut = [name for name, text in texts if base.cuts(text)]
    if not cut:
        return []
    named = ", ".join(cut[:NAMED]) + (f" and {len(cut) - NAMED} more" if len(cut) > NAMED else "")
    return [f"Cut: {len(cut)} {what} have more tokens than the text encoder takes at once, of {named}."]


def encoded(
    records: Sequence[Record],
    sizes: list[Size],
    config: Config,
    base: Any,
    encode_text: EncodeText | None = None,
    cache: Cache | None = None,
    fingerprint: str = "",
    prompts: list[str] | None = None,
) -> EncodedPictures:
    """Records as latents of buckets of these sizes, and text embeddings; what is not in the cache yet is encoded.

    base: a BaseModel. encode_text: instead of the base's. cache: of this machine alone if there is none. fingerprint:
    as `prepare` takes it. prompts: the captions that name embeddings, if they are known. Raises BadData.
    """
    settings = config.data
    key = encoders_digest(config.base)
    if encode_text is None:
        prompts = [record.caption for record in records] if prompts is None else prompts
        text_key = key + _merged(config.base) + _embeddings(prompts, base)
    else:
        text_key = "no text"
    encoders = Encoders(
        sizes=sizes,
        picture=base.encode_picture,
        picture_key=key,
        text=encode_text or base.encode_text,
        text_key=text_key,
        flip=settings.flip,
    )
    cache = cache or Cache(Path(settings.cache))
    return prepare(records, encoders, cache, fingerprint=fingerprint, broken_limit=settings.broken_limit)


@torch.no_grad()
def encoding_seconds(records: Sequence[Record], config: Config, base: Any) -> float:
    """Of a picture with its caption, by a few of them. base: a BaseModel. Raises BadPicture."""
    some = records[:: max(1, len(records) // TRIED)][:TRIED]
    sizes, turns = picture_sizes(config), 2 if config.data.flip else 1
    began = time.monotonic()
    for number, record in enumerate([some[0], *some]):
        data = read_bytes(record)
        picture = fit(decode_bytes(record.name, data), nearest_bucket(*picture_size(record.name, data), sizes))
        for _ in range(turns):
            base.encode_picture(picture)
        base.encode_text(record.caption)
        if number == 0:
            # The first sets up what the others find.
            began = time.monotonic()
    return (time.monotonic() - began) / len(some)
