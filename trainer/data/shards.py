"""Records in webdataset shards: tar files whose members make up a sample where names agree up to the first dot.

Members are found once and read in place; nothing is extracted.
"""

import json
import posixpath
import tarfile
from functools import partial
from pathlib import Path

from .decoding import Record, caption_in, decode_text
from .folders import PICTURES
from .problems import Problems

Span = tuple[int, int]  # (offset, bytes) in the shard


def shard_records(files: dict[str, Path], caption_names: tuple[str, ...], problems: Problems) -> list[Record]:
    """The samples of all shards. files: {name for messages: path}."""
    records = []
    for name, path in files.items():
        try:
            samples = _index(path)
        except (tarfile.TarError, OSError) as error:
            sentence = f"'{name}' is not a readable .tar file ({error}): copy or download it again."
            problems.add("Damaged shards", sentence)
            continue
        found = (_record(name, path, sample, samples[sample], caption_names, problems) for sample in sorted(samples))
        records += [record for record in found if record is not None]
    return records


def _index(path: Path) -> dict[str, dict[str, Span]]:
    """{sample: {extension: span}} of an uncompressed tar file. Raises TarError where it is damaged."""
    samples: dict[str, dict[str, Span]] = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            folder, base = posixpath.split(member.name)
            stem, dot, extension = base.partition(".")
            if member.isfile() and stem and dot:
                sample = samples.setdefault(posixpath.join(folder, stem), {})
                sample[extension.lower()] = (member.offset_data, member.size)
        # A damaged header ends the loop like the end of the file, after which there are only zeros.
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError("a header in its middle is damaged")
    return samples


def _record(
    shard: str, path: Path, sample: str, members: dict[str, Span], caption_names: tuple[str, ...], problems: Problems
) -> Record | None:
    """None where picture or caption is missing, which is told, or both are."""
    picture = next((ending for ending in PICTURES if ending in members), None)
    text = next((ending for ending in ("txt", "json") if ending in members), None)
    if picture is None:
        if text is not None:
            sentence = f"'{shard}/{sample}.{text}' has no picture in the shard: add it or remove the caption."
            problems.add("Captions without pictures", sentence)
        return None
    name, caption = f"{shard}/{sample}.{picture}", _caption(path, members, caption_names)
    if caption is None:
        wanted = "' or '".join(caption_names)
        problems.add(
            "Pictures without captions",
            f"'{name}' has no caption: it needs a .txt in UTF-8, or a .json with '{wanted}', in the shard.",
        )
        return None
    return Record(name, caption, partial(_read, path, members[picture]))


def _read(path: Path, span: Span) -> bytes:
    offset, size = span
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _caption(path: Path, members: dict[str, Span], caption_names: tuple[str, ...]) -> str | None:
    """From the .json where the user named a field in it, else from the .txt if there is one."""
    texts = {ending: decode_text(_read(path, members[ending])) for ending in ("txt", "json") if ending in members}
    try:
        field = caption_in(json.loads(texts.get("json") or "{}"), caption_names)
    except (ValueError, RecursionError):
        field = None
    found = (field, texts.get("txt")) if len(caption_names) == 1 else (texts.get("txt"), field)
    return next((caption for caption in found if caption is not None), None)
