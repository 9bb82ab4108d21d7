"""The bundled toy judge: reader B of the toy world, which no reward and no training follows."""

from PIL.Image import Image
from torch import nn

from ..rewards.preprocess import fit
from ..toy.captions import Caption, parse
from ..toy.judge import faults, present_pairs, read
from ..toy.model import load_reader
from ..toy.readers import Reading
from ..toy.vocabulary import pair_name, unknown_words
from .pictures import levels
from .verdict import BoundJudge, PromptJudge, Seen, Verdict

SIDE = 64
"""In pixels, of the pictures that the readers were trained on."""
_RADII = (8.4, 12.6)
"""Of small and large objects in such a picture, at most."""


class ToyJudge(PromptJudge):
    """Right are just the objects that a prompt names and no others, in the sizes and in the relation that it says."""

    name = "toy judge"

    def __init__(self):
        self.reader = load_reader("reader_b")

    def bind(self, prompt: str) -> BoundJudge:
        """Raises UnreadablePrompt for what is no sentence of the toy world."""
        caption = parse(prompt, "judge")
        return BoundJudge(lambda picture: self._look(picture, caption), tuple(unknown_words(prompt)))

    def modules(self) -> list[nn.Module]:
        return [self.reader]

    def _look(self, picture: Image, caption: Caption) -> Verdict:
        pixels = fit(levels(picture)[None] / 255, SIDE)
        reading = read(self.reader, pixels.to(next(self.reader.parameters()).device))
        return verdict_of(reading, 0, caption, picture.size)


def verdict_of(reading: Reading, number: int, caption: Caption, size: tuple[int, int]) -> Verdict:
    """Of picture `number` of a reading. size: of the picture, whose central square was read."""
    wanted = [phrase.pair for phrase in caption.phrases]
    pairs = present_pairs(reading, number)
    seen = (Seen(pair_name(pair), _box(reading, number, pair, size), pair in wanted) for pair in pairs)
    return Verdict(tuple(faults(reading, number, caption)), tuple(seen))


def _box(reading: Reading, number: int, pair: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Around the place that the reader tells, as large as the objects of the size that it tells."""
    short = min(size)
    x, y = (float(at) * short + (side - short) / 2 for at, side in zip(reading.position[number, pair], size))
    reach = _RADII[int(reading.size[number, pair] > 0)] / SIDE * short
    return max(0.0, x - reach), max(0.0, y - reach), min(size[0], x + reach), min(size[1], y + reach)
