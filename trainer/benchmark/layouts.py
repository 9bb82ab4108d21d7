"""How others lay out the pictures of a benchmark, to read theirs and to give them ours."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .drawing import Pair
from .suites import Prompt
from .t2i_compbench import IMAGES

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Layout:
    """place: of a picture inside the folder. finish: writes what else belongs there."""

    place: Callable[[Sequence[Prompt], Pair], str]
    finish: Callable[[Sequence[Prompt], Path], None] = lambda prompts, output: None

    def find(self, folder: Path, prompts: Sequence[Prompt], pair: Pair) -> Path | None:
        """The picture with whatever ending, or None."""
        expected = folder / self.place(prompts, pair)
        return next(filter(Path.is_file, map(expected.with_suffix, _ENDINGS)), None)


def _geneval_facts(prompts: Sequence[Prompt], output: Path) -> None:
    for number, prompt in enumerate(prompts):
        folder = output / f"{number:05}"
        if folder.is_dir():
            facts = {"tag": prompt.task, **prompt.facts, "prompt": prompt.text}
            (folder / "metadata.jsonl").write_text(json.dumps(facts), encoding="utf-8")


def _compbench_place(prompts: Sequence[Prompt], pair: Pair) -> str:
    """A folder of each category, and in it a number that runs over all pictures, behind the prompt."""
    prompt = prompts[pair[0]]
    before = sum(other.task == prompt.task for other in prompts[: pair[0]])
    return f"{prompt.task}/samples/{prompt.text}_{before * IMAGES + pair[1]:06}.png"


LAYOUTS = {
    "flat": Layout(lambda prompts, pair: f"{pair[0]:05}_{pair[1]:02}.png"),
    "geneval": Layout(lambda prompts, pair: f"{pair[0]:05}/samples/{pair[1]:04}.png", _geneval_facts),
    "t2i-compbench": Layout(_compbench_place),
}
