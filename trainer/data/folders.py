"""Records in a folder of pictures: captions in NAME.txt beside each picture, or in files `metadata.jsonl`."""

import json
import os
import posixpath
import unicodedata
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from .decoding import Record, caption_in, decode_text
from .places import read_file
from .problems import Problems

PICTURES = ("bmp", "jpeg", "jpg", "png", "webp")
METADATA = "metadata.jsonl"
OTHER_PICTURES = ("avif", "gif", "heic", "heif", "jfif", "jp2", "jpe", "jxl", "psd", "svg", "tga", "tif", "tiff")
"""Endings of pictures that are not read."""
TEXTS_ABOUT = ("changelog", "copying", "credits", "licence", "license", "notes", "notice", "readme")
"""Names of texts that tell about a folder and are no captions."""


def folder_records(
    files: dict[str, Path], pictures: dict[str, Path], caption_names: tuple[str, ...], problems: Problems
) -> list[Record]:
    """A picture that a metadata.jsonl names gets its captions there, any other from NAME.txt.

    files, pictures: all files of the folder and those that are pictures, by path relative to it, sorted.
    """
    captioned: list[tuple[str, str | None]] = []
    for name in files:
        if posixpath.basename(name) == METADATA:
            captioned += _listed_captions(name, files, pictures, caption_names, problems)
    listed = {picture for picture, _ in captioned}
    texts = {_stem(name): name for name in files if name.lower().endswith(".txt")}
    for picture in pictures:
        if picture not in listed:
            captioned.append((picture, _caption_beside(picture, texts.get(_stem(picture)), files, problems)))
    others = [name for name in files if posixpath.splitext(name)[1][1:].lower() in OTHER_PICTURES]
    of_others = {_stem(name): name for name in others}
    alone = texts.keys() - {_stem(picture) for picture in pictures}
    about = sorted(stem for stem in alone - of_others.keys() if posixpath.basename(stem).lower() in TEXTS_ABOUT)
    for stem in sorted(alone.difference(about)):
        sentence = f"'{texts[stem]}' has no picture beside it: add it or remove the caption."
        if stem in of_others:
            sentence = f"'{texts[stem]}' belongs to '{of_others[stem]}': {_CONVERT}, or remove both."
        problems.add("Captions without pictures", sentence)
    problems.note("pictures of kinds that are not read", others, f"To train on them, {_CONVERT}.")
    problems.note("texts that are no captions", [texts[stem] for stem in about], "They have no picture of their name.")
    captioned.sort(key=lambda entry: entry[0])
    return [
        Record(name, caption, partial(read_file, files[name])) for name, caption in captioned if caption is not None
    ]


_CONVERT = f"convert pictures of other kinds to one of {', '.join(PICTURES)}"


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _caption_beside(picture: str, text: str | None, files: dict[str, Path], problems: Problems) -> str | None:
    if text is None:
        wanted = f"{posixpath.basename(_stem(picture))}.txt"
        problems.add("Pictures without captions", f"'{picture}' has no caption: write it into '{wanted}' beside it.")
        return None
    return _read_text(text, files[text], problems)


def _read_text(name: str, path: Path, problems: Problems) -> str | None:
    text = decode_text(read_file(path))
    if text is None:
        problems.add("Captions in another encoding", f"'{name}' is not UTF-8 text: save it as UTF-8.")
    return text


def _listed_captions(
    name: str, files: dict[str, Path], pictures: dict[str, Path], caption_names: tuple[str, ...], problems: Problems
) -> Iterator[tuple[str, str | None]]:
    """(picture, caption) of each line that names a picture; None stands for a caption whose lack has been told."""
    path = files[name]
    # Not splitlines, which splits at characters that JSON may hold as they are.
    for number, line in enumerate((_read_text(name, path, problems) or "").split("\n"), 1):
        where = f"Line {number} of '{name}'"
        fields = _json_object(line, where, problems) if line.strip() else None
        if fields is None:
            continue
        if not isinstance(fields.get("file_name"), str):
            problems.add("Lines without file_name", f"{where} has no 'file_name' with the path of a picture.")
            continue
        caption = caption_in(fields, caption_names)
        if caption is None:
            wanted = "' or '".join(caption_names)
            problems.add("Lines without captions", f"{where} has no caption: it needs '{wanted}' with a text.")
        file_name = fields["file_name"]
        if os.path.isabs(file_name) and isinstance(path, Path):
            file_name = os.path.relpath(file_name, path.parent)
        file_name = unicodedata.normalize("NFC", file_name.replace("\\", "/"))
        picture = posixpath.normpath(posixpath.join(posixpath.dirname(name), file_name))
        if picture in pictures:
            yield picture, caption
        else:
            reason = "but there is no such picture: add it or remove the line"
            if picture in files:
                reason = f"which is of a kind that is not read: {_CONVERT}, or remove the line"
            problems.add("Lines without pictures", f"{where} names '{fields['file_name']}', {reason}.")


def _json_object(line: str, where: str, problems: Problems) -> dict | None:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        problems.add("Lines that are not JSON", f"{where} is not JSON: {error}.")
        return None
    if not isinstance(fields, dict):
        problems.add("Lines that are not JSON", f"{where} is not a JSON object with 'file_name' and a caption.")
        return None
    return fields
