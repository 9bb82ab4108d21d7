"""What a run on rewards trains on: prompts, some of them held out."""

import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from maskunet_core.errors import MaskUNetError

from ..config import Config
from ..seeds import seeded


class BadPrompts(MaskUNetError):
    """No prompts, or a file of them that cannot be read."""


class Prompts:
    """Different prompts to train on, and those that a run is validated by; in the place of pictures with captions."""

    def __init__(self, texts: Sequence[str], held_out: Sequence[str] | None = None):
        self.texts = list(texts)
        self._held_out = held_out

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def digests(self) -> list[int]:
        return sorted(zlib.crc32(text.encode()) for text in self.texts)

    def split(self, held_out: int, seed: int) -> tuple["Prompts", "Prompts"]:
        """(training, held out): the second are those that were named, else drawn by the seed, at most a fifth."""
        if self._held_out is not None:
            return self, Prompts(self._held_out[:held_out])
        held_out = min(held_out, len(self) // 5)
        order = torch.randperm(len(self), generator=seeded(60, seed)).tolist()
        parts = order[held_out:], order[:held_out]
        return tuple(Prompts([self.texts[n] for n in sorted(part)]) for part in parts)


def load_prompts(config: Config) -> Prompts:
    """Of `reward.prompts`, else the captions of `data.path`, else those of the toy world. Raises BadPrompts."""
    if config.reward.prompts:
        return Prompts(_lines(Path(config.reward.prompts)))
    if config.data.path:
        from ..pictures import read_data

        return Prompts(list(dict.fromkeys(record.caption for record in read_data(config).records)))
    from .toy import toy_prompts

    return Prompts(*toy_prompts())


def _lines(path: Path) -> list[str]:
    """The different lines of a text file, without those that are empty or begin with a #."""
    try:
        # Editors of Windows put a byte order mark first.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise BadPrompts(f"'{path}' is not UTF-8 text: save it as UTF-8.") from None
    stripped = (line.strip() for line in text.splitlines())
    found = list(dict.fromkeys(line for line in stripped if line and not line.startswith("#")))
    if not found:
        raise BadPrompts(f"'{path}' holds no prompt: write one in each line.")
    return found
