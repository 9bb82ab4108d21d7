"""How problems of a data set are told: all at once, in sentences."""

NAMED = 10  # of one kind; further ones are counted


class Problems:
    """Sentences for the user, collected by kind. notes: about what is left out, and stops nothing."""

    def __init__(self):
        self._kinds: dict[str, list[str]] = {}
        self.notes: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def add(self, kind: str, sentence: str) -> None:
        self._kinds.setdefault(kind, []).append(sentence)

    def note(self, what: str, names: list[str], advice: str) -> None:
        """Counts files that are left out, where there are any."""
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            self.notes.append(f"Left out: {len(names)} {what} ({', '.join(names[:NAMED])}{more}). {advice}")

    def sentences(self) -> list[str]:
        """The first ten of every kind, and how many more there are."""
        told = []
        for kind, found in self._kinds.items():
            told += found[:NAMED]
            if len(found) > NAMED:
                told.append(f"{kind}: {len(found) - NAMED} more.")
        return told
