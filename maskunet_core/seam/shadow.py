"""The one way in which a model is changed: instance attributes that hide those of the class while a block runs."""

from collections.abc import Iterable
from typing import Any


class Shadowed:
    """A context in which objects have other attributes; leaving it puts back what was there, however it is left.

    shadows: (object, its attributes inside the block). It may be entered again, also within itself.
    """

    def __init__(self, shadows: Iterable[tuple[Any, dict[str, Any]]]):
        # nn.Module's own setattr would search its parameters and submodules for each name.
        self._shadows = [(thing.__dict__, attributes) for thing, attributes in shadows]
        self._before: list[list[dict[str, Any]]] = []

    def __enter__(self) -> "Shadowed":
        before = []
        for own, attributes in self._shadows:
            before.append({name: own[name] for name in attributes if name in own})
            own.update(attributes)
        self._before.append(before)
        return self

    def __exit__(self, *error: Any) -> None:
        before = self._before.pop()
        while before:
            own, attributes = self._shadows[len(before) - 1]
            for name in attributes:
                own.pop(name, None)
            own.update(before.pop())
