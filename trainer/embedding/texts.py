"""The texts that may describe pictures to learn a word from: `{}` stands for the word in them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from ..config import Config
from ..data.decoding import Record, decode_text
from ..data.folders import PICTURES
from ..data.places import Unreachable, place_of, reaching, read_file
from ..data.problems import Problems
from ..data.records import Scan
from ..files import user_path
from .word import MARK

LISTS = Path(__file__).with_name("lists")
OF_PICTURES = "text.json"


def lines_of(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that hold something. Raises OSError, or ValueError for another encoding."""
    text = decode_text(path.read_bytes())
    if text is None:
        raise ValueError(f"'{path}' is not UTF-8 text: save it as UTF-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def common_texts(config: Config) -> list[str]:
    """Those for pictures that have none of their own; none for relations. Raises as `lines_of`."""
    settings = config.embedding
    if settings.texts:
        return lines_of(user_path(settings.texts))
    return [] if settings.kind == "relation" else lines_of(LISTS / f"{settings.kind}.txt")


def scan_texts(config: Config) -> Scan:
    """The pictures of a folder; a record's caption holds the texts of its picture, a line each."""
    if not config.data.path:
        from .toy import rendered

        return Scan(rendered(config), [])
    try:
        with reaching(config.data.path):
            return _scanned(place_of(config.data.path), common_texts(config))
    except Unreachable as error:
        return Scan([], [str(error)])


def _scanned(folder: Path, common: list[str]) -> Scan:
    problems = Problems()
    if not folder.is_dir():
        problems.add("Missing", f"'{folder}' is no folder: name a folder of pictures.")
        return Scan([], problems.sentences())
    pictures = sorted(p for p in folder.iterdir() if p.suffix.lower()[1:] in PICTURES and not p.name.startswith("."))
    if not pictures:
        problems.add("Empty", f"'{folder}' holds no pictures ({', '.join(PICTURES)}).")
    records = _records(pictures, _listed(folder, problems), common, problems)
    return Scan(records, problems.sentences())


def _records(pictures: list[Path], listed: dict[str, list[str]], common: list[str], problems: Problems) -> list[Record]:
    records = []
    for picture in pictures:
        texts = listed.get(picture.name) or _beside(picture, problems) or common
        if not texts:
            problems.add(
                "Pictures without texts",
                f"'{picture.name}' has no text that says what stands in the relation: write some into "
                f"'{picture.stem}.txt', such as \"a cat {MARK} a stone\".",
            )
        for text in texts:
            if MARK not in text:
                problems.add(
                    "Texts without the word", f"'{text}' of '{picture.name}' lacks {MARK}, which stands for the word."
                )
        records.append(Record(picture.name, "\n".join(texts), partial(read_file, picture)))
    return records


def _beside(picture: Path, problems: Problems) -> list[str]:
    try:
        return lines_of(picture.with_suffix(".txt"))
    except FileNotFoundError:
        return []
    except ValueError as error:
        problems.add("Texts in another encoding", f"{error}.")
        return []


def _listed(folder: Path, problems: Problems) -> dict[str, list[str]]:
    """The texts of a folder's `text.json`, by the picture's file name."""
    path = folder / OF_PICTURES
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        problems.add("Not JSON", f"'{path}' is not JSON ({error}).")
        return {}
    if not isinstance(found, dict) or not all(_is_texts(texts) for texts in found.values()):
        problems.add("Not texts", f'\'{path}\' must be of the form {{"NAME.jpg": ["a cat {{}} a stone", ...], ...}}.')
        return {}
    for name in sorted(found):
        if not (folder / name).is_file():
            problems.add("Texts without pictures", f"'{path}' names '{name}', which is not there: add or remove it.")
    return found


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
