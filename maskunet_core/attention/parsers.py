"""Which parsers of spaCy somebody has installed."""

import importlib.util
from functools import cache
from importlib.metadata import entry_points


@cache
def parsers() -> tuple[str, ...]:
    """Names of spaCy's models that are installed. Does not import spaCy, which takes a second."""
    if importlib.util.find_spec("spacy") is None:
        return ()
    return tuple(sorted({entry.name for entry in entry_points(group="spacy_models")}))
