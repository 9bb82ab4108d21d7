"""What T2I-CompBench asks of each prompt: its noun chunks. They were found once, by two versions of one parser, and lie
beside this file; the prompts themselves come from the user."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskunet_core.training.data import sha256

from .files import BadSuite

CHUNKS = Path(__file__).with_name("noun_chunks.json")


def parsers() -> list[str]:
    """Names of the one that is nearest to the benchmark's own, and of a later one."""
    return _content()["parsers"]


def noun_chunks(name: str, prompts: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """Of each prompt the chunks by both parsers. name: of the list, for people. Raises BadSuite for prompts that are
    no published list."""
    digest = sha256("\n".join(prompts).encode())
    found = next((one for one in _content()["lists"] if one["sha256"] == digest), None)
    if found is None:
        raise BadSuite(
            f"'{name}' is none of T2I-CompBench's published lists, of which the noun chunks are known: take it from "
            "T2I-CompBench's repository, examples/dataset."
        )
    other = {int(number): spans for number, spans in found["other"].items()}
    return [
        (_cut(prompt, spans), _cut(prompt, other.get(number, spans)))
        for number, (prompt, spans) in enumerate(zip(prompts, found["spans"], strict=True))
    ]


def _content() -> dict[str, Any]:
    return json.loads(CHUNKS.read_text(encoding="utf-8"))


def _cut(prompt: str, spans: Sequence[int]) -> list[str]:
    return [prompt[start:end] for start, end in zip(spans[::2], spans[1::2])]
