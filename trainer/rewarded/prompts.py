"""What a run on rewards trains on: prompts, some of them held out."""

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from maskunet_core.errors import MaskUNetError
from maskunet_core.toy.captions import UnreadablePrompt, parse
from maskunet_core.training.seeds import seeded

from ..choices import TOY
from ..config import Config
from ..data.decoding import decode_text
from ..pictures import read_data, told_cut
from .toy import toy_prompts

SHOWN = 40
"""Letters of a prompt by which a message names it."""


class BadPrompts(MaskUNetError):
    """No prompts, a file of them that cannot be read, or some that the toy reward cannot read."""


class Prompts:
    """Different prompts to train on, and those that a run is validated by; in the place of pictures with captions.

    notes: what is left out, a sentence each.
    """

    def __init__(self, texts: Iterable[str], held_out: Sequence[str] | None = None):
        self.texts = list(texts)
        self.notes: list[str] = []
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
        prompts = _of_file(Path(config.reward.prompts))
    elif config.data.path:
        found = read_data(config)
        prompts = _different([record.caption for record in found.records], config.data.path, "captions")
        prompts.notes = found.notes + prompts.notes
    else:
        return Prompts(*toy_prompts())
    if TOY in config.reward.models:
        _require_readable(prompts.texts)
    return prompts


def _of_file(path: Path) -> Prompts:
    """The different lines of a text file, without those that are empty or begin with a #."""
    text = decode_text(path.read_bytes())
    if text is None:
        raise BadPrompts(f"'{path}' is not UTF-8 text: save it as UTF-8.")
    # Not splitlines, which splits at characters that a prompt may hold.
    return _different(text.replace("\r", "\n").split("\n"), str(path), "lines", "#")


def _different(lines: list[str], origin: str, what: str, remark: str | None = None) -> Prompts:
    """What is left out is counted in the notes. remark: how a line begins that is no prompt. Raises BadPrompts."""
    filled = [line.strip() for line in lines if line.strip()]
    texts = [line for line in filled if remark is None or not line.startswith(remark)]
    prompts = Prompts(dict.fromkeys(texts))
    if not prompts.texts:
        raise BadPrompts(f"'{origin}' holds no prompt: write one in each line of a text file.")
    counts = {
        "are empty": 0 if remark else len(lines) - len(filled),
        f"begin with {remark}": len(filled) - len(texts),
        "repeat another": len(texts) - len(prompts),
    }
    left_out = [f"{count:,} {what} that {why}" for why, count in counts.items() if count]
    prompts.notes = [f"Left out of '{origin}': {', '.join(left_out)}."] if left_out else []
    return prompts


def tell(prompts: Prompts, base: Any) -> None:
    """Says what is left out of prompts. base: a BaseModel."""
    for note in prompts.notes + told_cut([(f"'{text[:SHOWN]}...'", text) for text in prompts.texts], "prompts", base):
        tqdm.write(note)


def _require_readable(texts: list[str]) -> None:
    """Raises BadPrompts where the toy reward cannot read some, before anything is drawn."""
    unread = []
    for text in texts:
        try:
            parse(text)
        except UnreadablePrompt as error:
            unread.append(error)
    if unread:
        raise BadPrompts(
            f"{len(unread):,} of {len(texts):,} prompts cannot be trained on, such as the first. {unread[0]}"
        )
