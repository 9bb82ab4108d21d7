"""Many records in little memory: their letters, and where their pictures lie, in columns."""

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .decoding import Record


class Listing(Sequence):
    """Records that are made when they are asked for."""

    def __init__(self):
        self._letters = bytearray()
        self._ends, self._places, self._readers = array("Q", [0]), array("Q"), array("L")
        self._reader: list[Callable[[int, int], bytes]] = []

    def reader(self, read: Callable[[int, int], bytes]) -> int:
        """The number of what reads pictures, for instance those of one shard, by two numbers."""
        self._reader.append(read)
        return len(self._reader) - 1

    def add(self, name: str, caption: str, reader: int, place: tuple[int, int]) -> None:
        """place: by which the reader finds the picture."""
        for text in (name, caption):
            # Names of files may hold halves of letters.
            self._letters += text.encode(errors="surrogatepass")
            self._ends.append(len(self._letters))
        self._places.extend(place)
        self._readers.append(reader)

    def __len__(self) -> int:
        return len(self._readers)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        name, caption = (self._text(2 * number + which) for which in (0, 1))
        where = self._places[2 * number], self._places[2 * number + 1]
        return Record(name, caption, partial(self._reader[self._readers[number]], *where))

    def _text(self, number: int) -> str:
        return self._letters[self._ends[number] : self._ends[number + 1]].decode(errors="surrogatepass")
