"""Records in webdataset shards: tar files whose members make up a sample where names agree up to the first dot.

Members are found once and read in place; nothing is extracted.
"""

import json
import posixpath
import tarfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from .decoding import caption_in, decode_text
from .folders import PICTURES
from .listing import Listing
from .places import read_span
from .problems import Problems

TEXTS = ("txt", "json")
Span = tuple[int, int]  # (offset, bytes) in the shard


@dataclass
class Sample:
    """spans, texts: of its members by their endings, of which texts are read at once."""

    spans: dict[str, Span] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)


def shard_records(files: dict[str, Path], caption_names: tuple[str, ...], problems: Problems) -> Listing:
    """The samples of all shards. files: {name for messages: path}."""
    records = Listing()
    for name, path in files.items():
        try:
            samples = _index(path)
        except (tarfile.TarError, OSError) as error:
            sentence = f"'{name}' is not a readable .tar file ({error}): copy or download it again."
            problems.add("Damaged shards", sentence)
            continue
        reader = records.reader(partial(read_span, path))
        for sample in sorted(samples):
            _add(records, reader, f"{name}/{sample}", samples[sample], caption_names, problems)
    return records


def _index(path: Path) -> dict[str, Sample]:
    """The samples of an uncompressed tar file. Raises TarError where it is damaged."""
    samples: dict[str, Sample] = {}
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            folder, base = posixpath.split(member.name)
            stem, dot, extension = base.partition(".")
            if member.isfile() and stem and dot:
                sample, extension = samples.setdefault(posixpath.join(folder, stem), Sample()), extension.lower()
                sample.spans[extension] = (member.offset_data, member.size)
                if extension in TEXTS:
                    sample.texts[extension] = archive.extractfile(member).read()
        # A damaged header ends the loop like the end of the file, after which there are only zeros.
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError("a header in its middle is damaged")
    return samples


def _add(
    records: Listing, reader: int, name: str, sample: Sample, caption_names: tuple[str, ...], problems: Problems
) -> None:
    """Where picture or caption is missing, that is told instead."""
    picture = next((ending for ending in PICTURES if ending in sample.spans), None)
    text = next((ending for ending in TEXTS if ending in sample.texts), None)
    if picture is None:
        if text is not None:
            sentence = f"'{name}.{text}' has no picture in the shard: add it or remove the caption."
            problems.add("Captions without pictures", sentence)
        return
    caption = _caption(sample, caption_names)
    if caption is None:
        wanted = "' or '".join(caption_names)
        problems.add(
            "Pictures without captions",
            f"'{name}.{picture}' has no caption: it needs a .txt in UTF-8, or a .json with '{wanted}', in the shard.",
        )
        return
    records.add(f"{name}.{picture}", caption, reader, sample.spans[picture])


def _caption(sample: Sample, caption_names: tuple[str, ...]) -> str | None:
    """From the .json where the user named a field in it, else from the .txt if there is one."""
    texts = {ending: decode_text(data) for ending, data in sample.texts.items()}
    try:
        named = caption_in(json.loads(texts.get("json") or "{}"), caption_names)
    except (ValueError, RecursionError):
        named = None
    found = (named, texts.get("txt")) if len(caption_names) == 1 else (texts.get("txt"), named)
    return next((caption for caption in found if caption is not None), None)
