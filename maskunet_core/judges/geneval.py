"""GenEval's rules (arXiv 2310.11513): whether the objects that a detector found are those that a prompt names.

No picture is looked at here, but for the colours of objects.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..rewards.clip import ClipReward
from .clip import embedded
from .mask2former import Detections

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_SURE, _SURE_IN_COUNTING, _MOST = 0.3, 0.9, 16
"""Scores that a detection must exceed, and how many of a class are kept."""
_MARGIN = 0.1
"""Of the sum of two objects' sides: nearer to each other they have no relation."""
_GREY = (153, 153, 153)


@dataclass(frozen=True)
class Found:
    """box: x0, y0, x1, y1, y downward. mask: `[H, W]` bool, None where colours are not asked for."""

    box: tuple[float, float, float, float]
    score: float
    mask: Tensor | None = None


ColoursOf = Callable[[str, Sequence[Found]], list[str]]
"""The colour of each object, from the name of their class."""


def by_class(detections: Detections, names: Sequence[str]) -> dict[str, list[Found]]:
    found: dict[str, list[Found]] = {}
    rows = zip(detections.classes.tolist(), detections.boxes.tolist(), detections.scores.tolist(), detections.masks)
    for label, box, score, mask in rows:
        found.setdefault(names[label], []).append(Found(tuple(box), score, mask))
    return found


def kept(found: Mapping[str, Sequence[Found]], task: str) -> dict[str, list[Found]]:
    """Those that are sure enough for a task, the surest first; overlapping ones as well."""
    least = _SURE_IN_COUNTING if task == "counting" else _SURE
    chosen = {
        name: sorted((one for one in objects if one.score > least), key=lambda one: -one.score)[:_MOST]
        for name, objects in found.items()
    }
    return {name: objects for name, objects in chosen.items() if objects}


def relations(first: Sequence[float], second: Sequence[float]) -> list[str]:
    """Where the first box lies, as seen from the second: none, one or two of left of, right of, above and below."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = first, second
    dx, dy = (ax0 + ax1 - bx0 - bx1) / 2, (ay0 + ay1 - by0 - by1) / 2
    distance = (dx**2 + dy**2) ** 0.5
    if not distance:
        return []
    across = max(abs(dx) - _MARGIN * (ax1 - ax0 + bx1 - bx0), 0) / distance
    down = max(abs(dy) - _MARGIN * (ay1 - ay0 + by1 - by0), 0) / distance
    found = ["left of" if dx < 0 else "right of"] if across > 0.5 else []
    return found + (["above" if dy < 0 else "below"] if down > 0.5 else [])


@dataclass(frozen=True)
class Fault:
    """What is wrong with a picture. published: in the benchmark's own words; plain: in fewer."""

    published: str
    plain: str


def judge(objects: Mapping[str, Sequence[Found]], facts: Mapping[str, Any], colours_of: ColoursOf) -> list[Fault]:
    """What is wrong; nothing where the picture is right. objects: of `kept`."""
    wrong: list[Fault] = []
    groups: list[Sequence[Found] | None] = []
    for wanted in facts.get("include", ()):
        name, count = wanted["class"], wanted["count"]
        group = objects.get(name, ())[:count]
        if len(group) < count:
            published = f"expected {name}>={count}, found {len(group)}"
            fault = Fault(published, f"{len(group)} {name}, wanted {count}")
        else:
            fault = _wrong_colour(wanted, group, colours_of) or _wrong_place(facts["include"], wanted, group, groups)
        wrong += [fault] if fault else []
        groups.append(None if fault else group)
    for wanted in facts.get("exclude", ()):
        name, count, seen = wanted["class"], wanted["count"], len(objects.get(wanted["class"], ()))
        if seen >= count:
            most = f"at most {count - 1}" if count > 1 else "none"
            wrong.append(Fault(f"expected {name}<{count}, found {seen}", f"{seen} {name}, wanted {most}"))
    return wrong


def _wrong_colour(wanted: Mapping[str, Any], group: Sequence[Found], colours_of: ColoursOf) -> Fault | None:
    if "color" not in wanted:
        return None
    colour, name, count = wanted["color"], wanted["class"], wanted["count"]
    seen = colours_of(name, group)
    if seen.count(colour) >= count:
        return None
    others = ", ".join(f"{seen.count(one)} {one}" for one in COLOURS if one in seen)
    return Fault(
        f"expected {colour} {name}>={count}, found {seen.count(colour)} {colour}; and {others}",
        f"{name}: {others}, wanted {count} {colour}",
    )


def _wrong_place(
    include: Sequence[Mapping[str, Any]],
    wanted: Mapping[str, Any],
    group: Sequence[Found],
    groups: Sequence[Sequence[Found] | None],
) -> Fault | None:
    """Every one of the group must stand so to every one of an earlier group."""
    if "position" not in wanted:
        return None
    relation, number = wanted["position"]
    name, target_name = wanted["class"], include[number]["class"]
    if groups[number] is None:
        return Fault(f"no target for {name} to be {relation}", f"nothing for {name} to be {relation}")
    for one in group:
        for target in groups[number]:
            seen = " and ".join(relations(one.box, target.box))
            if relation not in seen.split(" and "):
                return Fault(
                    f"expected {name} {relation} target, found {seen} target",
                    f"{name} {seen or 'not beside'} {target_name}, wanted {relation}",
                )
    return None


class Colours:
    """Tells objects' colours by CLIP (the benchmark's is OpenAI's ViT-L/14): their crops on grey against sentences."""

    def __init__(self, clip: ClipReward):
        self.clip = clip
        self._of_classes: dict[str, Tensor] = {}

    def sentences(self, name: str) -> Tensor:
        """`[10, E]`: of each colour the mean of three sentences about a class, of length 1. Computed once."""
        if name not in self._of_classes:
            templates = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
            texts = [[template.format(colour, name) for template in templates] for colour in COLOURS]
            means = [torch.stack([self.clip.feature(text) for text in of_one]).mean(0) for of_one in texts]
            self._of_classes[name] = F.normalize(torch.stack(means), dim=-1)
        return self._of_classes[name]

    def crop(self, picture: Image.Image, found: Found) -> Image.Image:
        """The object's box, grey where its mask is not."""
        mask = Image.fromarray(found.mask.numpy())
        alone = Image.composite(picture, Image.new("RGB", picture.size, _GREY), mask)
        return alone.crop(tuple(float(side) for side in found.box))

    def of(self, picture: Image.Image) -> ColoursOf:
        """For the objects of one picture."""

        def colours(name: str, group: Sequence[Found]) -> list[str]:
            seen = embedded(self.clip, [self.crop(picture, one) for one in group])
            return [COLOURS[row] for row in (seen @ self.sentences(name).T).argmax(1).tolist()]

        return colours
