"""The words of the toy world, and what they name."""

import re

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.13, 0.62, 0.20),
    "blue": (0.12, 0.25, 0.85),
    "yellow": (0.95, 0.86, 0.15),
    "orange": (0.96, 0.52, 0.08),
    "purple": (0.55, 0.15, 0.70),
    "black": (0.05, 0.05, 0.06),
    "white": (0.97, 0.97, 0.96),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
PAIRS = len(COLOURS) * len(SHAPES)
"""Number of colour-shape pairs, the unit in which the readers report: pair = colour * len(SHAPES) + shape."""


START, END = 0, 1
WORDS = ("<start>", "<end>", "a", "and", "left", "right", "above", "below", "of", *SIZES, *COLOURS, *SHAPES)
MAX_TOKENS = 16
_ALIASES = {"an": "a", "the": "a", "big": "large", "little": "small", "over": "above", "under": "below"}
_INDEX = {word: index for index, word in enumerate(WORDS)}


def _words(text: str) -> list[str]:
    return [_ALIASES.get(word, word) for word in re.findall(r"[a-z]+", text.lower())]


def known_words(text: str) -> list[str]:
    """The words of `text` that the toy world knows, aliases replaced. Unknown words leave no trace."""
    return [word for word in _words(text) if word in _INDEX]


def unknown_words(text: str) -> list[str]:
    """The words of `text` that the toy world skips, each once."""
    return list(dict.fromkeys(word for word in _words(text) if word not in _INDEX))


def encode(text: str) -> list[int]:
    """Token ids of the known words of `text`, between START and END."""
    return [START, *(_INDEX[word] for word in known_words(text)), END]


def encode_padded(text: str) -> list[int]:
    """`encode`, cut and padded with END to MAX_TOKENS, as the text encoder reads a prompt of one chunk."""
    ids = encode(text)[: MAX_TOKENS - 1]
    return ids + [END] * (MAX_TOKENS - len(ids))


def pair_name(pair: int) -> str:
    """Colour and shape of a pair."""
    return f"{tuple(COLOURS)[pair // len(SHAPES)]} {SHAPES[pair % len(SHAPES)]}"
