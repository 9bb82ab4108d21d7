"""What a text asks of a picture, as GenEval's rules have it: things, how many of them, in which colour and where."""

import difflib
import re
from typing import Any

from ..errors import MaskUNetError
from .geneval import COLOURS

THINGS = tuple(
    """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator,
book, clock, vase, scissors, teddy bear, hair drier, toothbrush
    """.strip()
    .replace("\n", " ")
    .split(", ")
)
"""The detector's classes, COCO's, by the names that GenEval gives them."""
_RELATIONS = ("left of", "right of", "above", "below")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_MOST = 15
"""Of a kind that can be asked for: one more must be seen, to tell that there are too many."""
_PLURALS = {"people": "person", "knives": "knife", "mice": "computer mouse"}
_EXAMPLE = '"2 clocks, a blue fire hydrant, a dog right of a teddy bear, no person"'


class UnreadableRules(MaskUNetError):
    """A text that asks for what the judge does not know."""


def parse(text: str) -> tuple[dict[str, Any], str]:
    """GenEval's facts (`include`, `exclude`), and "counting" where numbers are asked for, else "".

    A number is meant exactly; a thing without one is there at least once. Raises UnreadableRules.
    """
    plain = re.sub(r"^ *(?:an? )?(?:photo|picture|image)s? of ", "", " ".join(text.lower().split()).rstrip("."))
    items = [item.strip() for item in re.split(r"[,;]|\band\b", plain) if item.strip()]
    if not items:
        raise UnreadableRules(f"There is nothing to look for: write what the picture should show, such as {_EXAMPLE}.")
    facts: dict[str, Any] = {"include": [], "exclude": []}
    for item in items:
        _read_item(item, facts)
    every = [entry["class"] for entry in facts["include"]]
    twice = next((name for name in every if every.count(name) > 1), None)
    if twice:
        raise UnreadableRules(
            f'The judge cannot keep two kinds of "{twice}" apart: name each thing once, with a number and a colour '
            f'before it where they are wanted, such as "2 red {twice}".'
        )
    return facts, "counting" if facts["exclude"] else ""


def _read_item(item: str, facts: dict[str, Any]) -> None:
    """A thing, or two with a relation between them: the second is then looked for first."""
    first, *rest = re.split(rf" (?:to the |is |on the )*({'|'.join(_RELATIONS)}) ", item, maxsplit=1)
    if not rest:
        return _add(first, facts)
    relation, second = rest
    target = len(facts["include"])
    for part in (second, first):
        _add(part, facts)
    if len(facts["include"]) < target + 2:
        raise UnreadableRules(f'The judge cannot read "{item}": what is not to be there stands nowhere; leave it out.')
    facts["include"][-1]["position"] = [relation, target]


def _add(phrase: str, facts: dict[str, Any]) -> None:
    count, words = _count(phrase)
    first, _, rest = words.partition(" ")
    plain, coloured = _thing(words), _thing(rest) if first in COLOURS else None
    name = plain or coloured
    if name is None:
        raise UnreadableRules(_unknown(phrase, words))
    if count == 0 and not plain:
        raise UnreadableRules(
            f'The judge cannot read "{phrase}": what is not to be there has no colour; write no {name}.'
        )
    if count != 0:
        facts["include"].append({"class": name, "count": count or 1} | ({} if plain else {"color": first}))
    if count is not None:
        facts["exclude"].append({"class": name, "count": count + 1})


def _count(phrase: str) -> tuple[int | None, str]:
    """The number before a thing, None where there is none, and the rest."""
    first, _, rest = phrase.partition(" ")
    if first in ("a", "an", "the"):
        return None, rest
    if first in _NUMBERS:
        return _NUMBERS.index(first), rest
    if not first.isdecimal():
        return None, phrase
    if int(first) > _MOST:
        raise UnreadableRules(f'The judge counts to {_MOST} of a kind, not to {first}: ask for fewer in "{phrase}".')
    return int(first), rest


def _thing(words: str) -> str | None:
    """The class that the words name, in singular or plural."""
    singular = [words, re.sub(r"s$", "", words), re.sub(r"es$", "", words), re.sub(r"ies$", "y", words)]
    found = (one for one in [_PLURALS.get(words), *singular] if one in THINGS)
    return next(found, None)


def _unknown(phrase: str, words: str) -> str:
    alike = [thing for thing in THINGS if set(thing.split()) & set(words.split())]
    near = alike or difflib.get_close_matches(words, THINGS, 3, 0.5)
    hint = f"the nearest are {', '.join(near)}" if near else "its page of help lists them"
    return (
        f'The judge cannot read "{phrase}": it knows COCO\'s 80 things ({hint}), a number or one of the colours '
        f"{', '.join(COLOURS)} before them, and {', '.join(_RELATIONS)} between two, such as {_EXAMPLE}."
    )
