"""Which words of a prompt belong together, and at which tokens of the text encoder's output they stand."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import MaskUNetError

_CLOSED = """
a an the this that these those some any every each no another other both either neither all such
i me my mine you your yours he him his she her hers it its we us our ours they them their theirs who whom whose which
what one two three four five six seven eight nine ten eleven twelve dozen several many few couple pair
of in on at by to from with without within into onto upon over under above below beneath beside besides between among
behind before after against along across around about near inside outside through toward towards off out up down as like
left right side top bottom front back middle center centre next
and or but nor so yet than then while where when if because though although
is are was were be been being am has have had having do does did will would can could may might shall should must not
there here very
"""
CLOSED_WORDS = frozenset(_CLOSED.split())
"""Words that name no thing and no property. They end a run of words that belong together."""
_IS = ("is", "are", "was", "were")
_GLUE = "-"
_WORD_END = "</w>"


@dataclass(frozen=True)
class Word:
    """A word of a prompt as the text encoder reads it, and the positions of its pieces in the encoder's output.

    text: of pieces joined, in lower case; empty for a vector of an embedding, which has no spelling.
    """

    text: str
    positions: tuple[int, ...]


@dataclass(frozen=True)
class WordSet:
    """Token positions of a noun and of each of its modifiers. names: of the modifiers, then of the noun."""

    noun: tuple[int, ...]
    modifiers: tuple[tuple[int, ...], ...] = ()
    names: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """As a person writes it: `red, small > apple`."""
        return " > ".join(filter(None, (", ".join(self.names[:-1]), *self.names[-1:])))

    def words(self) -> list[tuple[str, tuple[int, ...]]]:
        """(name, positions) of the modifiers and of the noun."""
        return list(zip(self.names, (*self.modifiers, self.noun)))

    @cached_property
    def positions(self) -> frozenset[int]:
        return frozenset(self.noun).union(*self.modifiers)


@dataclass(frozen=True)
class PromptWords:
    """What guidance has to know of a prompt.

    words: all of it, in order. sets: those that guidance is about. tokens: length of the encoder's output, of which
    each `chunk` tokens were encoded together, between a begin token and an end token. encoder: the part of the text
    encoder that was asked, `l`, `g` or `h`.
    """

    words: tuple[Word, ...]
    sets: tuple[WordSet, ...]
    tokens: int
    chunk: int
    encoder: str = "l"

    @property
    def prompt(self) -> tuple[int, ...]:
        """Positions of all tokens of the prompt, without those of begin, end and padding."""
        return tuple(position for word in self.words for position in word.positions)

    @property
    def padded(self) -> tuple[int, ...]:
        """All positions but the first and the last of each chunk."""
        return tuple(n for n in range(self.tokens) if n % self.chunk not in (0, self.chunk - 1))

    @property
    def text(self) -> str:
        """The sets as a person writes them."""
        return "; ".join(found.text for found in self.sets)


class UnknownWord(MaskUNetError):
    """A word that the prompt does not hold; the message lists those that it does."""


class UnreadablePrompt(MaskUNetError):
    """A text encoder whose tokens cannot be told apart as words."""


# Tokens -------------------------------------------------------------------------------------------------------------


def _tokens_of(clip: Any, text: str) -> tuple[str, list[list[tuple]]]:
    """(name of the CLIP encoder, its chunks of (token, weight)) of the host's CLIP. Raises UnreadablePrompt."""
    tokens = clip.tokenize(text)
    for name in ("l", "h", "g"):
        if name in tokens and set(tokens) <= {"l", "g", "h"}:
            return name, tokens[name]
    raise UnreadablePrompt(
        f"MaskUNet Prompt Words reads the prompts of CLIP text encoders (SD 1.5, SD 2.x, SDXL), and the connected CLIP "
        f"holds {', '.join(sorted(tokens))}. Connect the CLIP of such a model."
    )


def read(clip: Any, text: str) -> PromptWords:
    """The words of a prompt for the host's CLIP, with no sets. Brackets and their weights take no tokens."""
    encoder, chunks = _tokens_of(clip, text)
    tokenizer = getattr(clip.tokenizer, f"clip_{encoder}")
    special = {tokenizer.start_token, tokenizer.end_token}
    in_pieces = any(spelling.endswith(_WORD_END) for spelling in tokenizer.inv_vocab.values())
    words: list[Word] = []
    pieces: list[tuple[str, int]] = []

    def finish() -> None:
        if pieces:
            words.append(Word("".join(text for text, _ in pieces), tuple(position for _, position in pieces)))
            pieces.clear()

    position = 0
    for chunk in chunks:
        for index, (token, *_) in enumerate(chunk):
            if isinstance(token, int) and token in special and index:
                break
            if not isinstance(token, int):
                finish()
                words.append(Word("", (position + index,)))
            elif index:
                spelling = tokenizer.inv_vocab[token].lower()
                pieces.append((spelling.removesuffix(_WORD_END), position + index))
                if not in_pieces or spelling.endswith(_WORD_END):
                    finish()
        position += len(chunk)
    finish()
    return PromptWords(tuple(words), (), position, len(chunks[0]), encoder)


# Sets ---------------------------------------------------------------------------------------------------------------


def set_of(words: Sequence[Word]) -> WordSet:
    """The last of the words is the noun."""
    *modifiers, noun = words
    return WordSet(noun.positions, tuple(word.positions for word in modifiers), tuple(word.text for word in words))


def runs(words: Iterable[Word]) -> list[tuple[tuple[str, ...], list[Word]]]:
    """(what stands before it, words) of each run of words that no closed-class word and no punctuation interrupts."""
    found: list[tuple[tuple[str, ...], list[Word]]] = []
    between: list[str] = []
    run: list[Word] = []
    for word in [*words, Word(".", ())]:
        if word.text == _GLUE and run:
            continue
        if word.text and word.text not in CLOSED_WORDS and re.search(r"[^\W_]", word.text):
            run.append(word)
            continue
        if run:
            found.append((tuple(between), run))
            between, run = [], []
        between.append(word.text)
    return found


def sets_in(words: Iterable[Word]) -> tuple[WordSet, ...]:
    """Sets without grammar: runs of words, the last of which is the noun; also "apple is red" and "red and blue table".

    A run of one word is a noun without modifiers.
    """
    groups: list[tuple[tuple[str, ...], list[Word]]] = []
    for before, run in runs(words):
        if len(before) == 1 and before[0] in _IS and groups:
            # "the apple is red": what follows describes the noun before.
            groups[-1][1][-1:-1] = run
            continue
        joints = (("and",),)
        while groups and len(run) > 1 and before in joints and len(groups[-1][1]) == 1:
            # "a red, white and blue flag"
            before, single = groups.pop()
            run, joints = single + run, (("and",), (",",))
        groups.append((before, run))
    return tuple(set_of(run) for _, run in groups)


def sets_as_told(prompt: PromptWords, told: str, clip: Any) -> tuple[WordSet, ...]:
    """Sets that a person wrote: `red > apple; checkered, small > bowl; frog`. Raises UnknownWord.

    The second time that a noun is told of, its second place in the prompt is meant, and so on; of a modifier the place
    that is nearest to its noun.
    """
    free = list(prompt.words)
    sets = []
    for part in filter(str.strip, re.split(r"[;\n]", told)):
        *described, named = part.split(">")
        noun = _taken(free, read(clip, named).words, named, prompt)
        names = [name for text in described for name in text.split(",") if name.strip()]
        modifiers = [_taken(free, read(clip, name).words, name, prompt, near=noun.positions[0]) for name in names]
        sets.append(set_of([*modifiers, noun]))
    return tuple(sets)


def _taken(free: list[Word], wanted: Sequence[Word], name: str, prompt: PromptWords, near: int | None = None) -> Word:
    """One or several words in a row, as one, no longer free. near: a position, without which the first is meant."""
    texts = [word.text for word in wanted]
    starts = [n for n in range(len(free)) if texts and [word.text for word in free[n : n + len(texts)]] == texts]
    if not starts:
        held = " ".join(word.text for word in prompt.words if word.text)
        raise UnknownWord(
            f"'{name.strip()}' is not in the prompt, or not as often as it is asked for. The prompt's words: {held}."
        )
    start = min(starts, key=lambda n: n if near is None else abs(free[n].positions[0] - near))
    taken = free[start : start + len(texts)]
    del free[start : start + len(texts)]
    return Word(" ".join(texts), tuple(position for word in taken for position in word.positions))
