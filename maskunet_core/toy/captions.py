"""What a prompt of the toy world says: one or two objects, their sizes, their relation."""

import re
import zlib
from dataclasses import dataclass

from ..errors import MaskUNetError
from .vocabulary import COLOURS, RELATIONS, SHAPES, SIZES, known_words

_COLOUR_NAMES = tuple(COLOURS)
_PHRASE = rf"(?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_GRAMMAR = re.compile(rf"{_PHRASE}(?: (and|{'|'.join(RELATIONS)}) {_PHRASE})?")


class UnreadablePrompt(MaskUNetError):
    """A prompt that is no sentence of the toy world."""


@dataclass(frozen=True)
class Phrase:
    """What a caption says of one object; `size` is None where it is not said."""

    colour: int
    shape: int
    size: int | None

    def __str__(self) -> str:
        words = (SIZES[self.size] if self.size is not None else "", _COLOUR_NAMES[self.colour], SHAPES[self.shape])
        phrase = " ".join(word for word in words if word)
        return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"

    @property
    def pair(self) -> int:
        """Index of the colour-shape pair, as the readers count them."""
        return self.colour * len(SHAPES) + self.shape


@dataclass(frozen=True)
class Caption:
    """One or two phrases, joined by a relation or by "and" (`relation` None)."""

    phrases: tuple[Phrase, ...]
    relation: int | None = None

    def __str__(self) -> str:
        joint = " and " if self.relation is None else f" {RELATIONS[self.relation]} "
        return joint.join(str(phrase) for phrase in self.phrases)

    @property
    def kind(self) -> str:
        """ "one", "two" or "relation": the classes that scores are reported by."""
        if len(self.phrases) == 1:
            return "one"
        return "two" if self.relation is None else "relation"

    @property
    def held_out(self) -> bool:
        """True for the fifth of all captions that no training set ever holds."""
        return zlib.crc32(str(self).encode()) % 5 == 0


_CANNOT = {
    "reward": "The toy reward cannot read the prompt",
    "judge": "The toy judge cannot read the prompt",
}
SHOWN = 200
"""Letters of a prompt in a message."""


def _phrase(size: str | None, colour: str, shape: str) -> Phrase:
    return Phrase(_COLOUR_NAMES.index(colour), SHAPES.index(shape), SIZES.index(size) if size else None)


def parse(prompt: str, reader: str = "reward") -> Caption:
    """The caption that `prompt` spells, in the words that the toy's text encoder knows; it skips all others.

    reader: "reward" or "judge", for the message.
    Raises UnreadablePrompt where these words do not name one or two different objects.
    """
    found = _GRAMMAR.fullmatch(" ".join(word for word in known_words(prompt) if word != "a"))
    shown = prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]}..."
    if found is None:
        raise UnreadablePrompt(
            f'{_CANNOT[reader]} "{shown}": name one object, or two joined by "and" or by '
            f'{", ".join(RELATIONS)}, each as [{" or ".join(SIZES)}] colour shape, such as "a red circle left of a '
            f'small blue square" (colours: {", ".join(COLOURS)}; shapes: {", ".join(SHAPES)}). '
            f"Other prompts need another {reader}: see MaskUNet {reader.title()} Loader."
        )
    first, joint, second = found.group(1, 2, 3), found.group(4), found.group(5, 6, 7)
    if joint is None:
        return Caption((_phrase(*first),))
    phrases = (_phrase(*first), _phrase(*second))
    if phrases[0].pair == phrases[1].pair:
        raise UnreadablePrompt(
            f'{_CANNOT[reader]} "{shown}": it names the same coloured shape twice, and the toy '
            "world never holds two of a kind; change a colour or a shape."
        )
    return Caption(phrases, None if joint == "and" else RELATIONS.index(joint))
