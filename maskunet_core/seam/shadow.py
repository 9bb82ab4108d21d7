"""The one way in which a model is changed: instance attributes that hide those of the class while a block runs."""

from collections.abc import Iterable
from typing import Any

_ABSENT = object()


class Shadowed:
    """A context in which objects have other attributes; leaving it puts back what was there, however it is left.

    shadows: (object, its attributes inside the block). It may be entered again, also within itself.
    """

    def __init__(self, shadows: Iterable[tuple[Any, dict[str, Any]]]):
        # nn.Module's own setattr would search its parameters and submodules for each name.
        self._shadows = [(thing.__dict__, name, new) for thing, own in shadows for name, new in own.items()]
        self._before: list[list[Any]] = []

    def __enter__(self) -> "Shadowed":
        before = []
        for own, name, new in self._shadows:
            before.append(own.get(name, _ABSENT))
            own[name] = new
        self._before.append(before)
        return self

    def __exit__(self, *error: Any) -> None:
        for (own, name, _), old in zip(reversed(self._shadows), reversed(self._before.pop())):
            if old is _ABSENT:
                own.pop(name, None)
            else:
                own[name] = old
