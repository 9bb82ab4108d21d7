"""Methods by name: `base`, or parts joined by `+`, such as `lora:style.safetensors@0.8+search:fast`."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from maskunet_core.errors import MaskUNetError
from maskunet_core.files import checkpoint, mask_file
from maskunet_core.masks.sources import GeneratorMasks
from maskunet_core.records.recorded import RecordedSource
from maskunet_core.seam.attach import attach, structure_of
from maskunet_core.search.settings import PRESETS, SearchSettings
from maskunet_core.training.base import BaseModel

from ..base import with_lora
from ..host import GENERATORS, MASKS, model_choice, model_file
from ..pictures import file_digest

BASE = "base"
FOLDERS = {"generator": GENERATORS, "masks": MASKS, "lora": "loras", "full": "loras"}
"""ComfyUI's folder of models for the files of each kind of part. `full` is what the trainer writes of a full
fine-tune: the differences, which are read as a LoRA is."""
_PART = re.compile(r"(generator|masks|lora|full):(.+?)(?:@(-?\d+(?:\.\d+)?))?|search:(\w+)")


class BadMethod(MaskUNetError):
    """A method that cannot be read, or whose file cannot be found; the message names it."""


@dataclass(frozen=True)
class Part:
    """kind: of FOLDERS. file: a path, or a name in that folder."""

    kind: str
    file: str
    strength: float = 1.0

    def find(self) -> Path:
        """Raises BadMethod."""
        path = model_file(FOLDERS[self.kind], self.file)
        if path is None:
            raise BadMethod(
                f"'{self.file}' does not exist; {model_choice(FOLDERS[self.kind])}. Name a file in it, or a path."
            )
        return path

    def __str__(self) -> str:
        strength = "" if self.strength == 1.0 else f"@{self.strength:g}"
        return f"{self.kind}:{Path(self.file).name}{strength}"

    def on(self, base: BaseModel) -> BaseModel:
        """The base with this part. Raises MaskUNetError where the file does not fit it."""
        if self.kind in ("lora", "full"):
            patcher, clip = with_lora(base.patcher, base.clip, self.find(), self.strength)
            return replace(base, patcher=patcher, clip=clip)
        if self.kind == "generator":
            loaded = checkpoint.load(self.find())
            loaded.require_fit(structure_of(base.patcher, loaded.targets))
            source = GeneratorMasks(loaded.generator)
        else:
            masks = mask_file.load(self.find())
            masks.require_fit(structure_of(base.patcher, masks.targets))
            source = RecordedSource(masks)
        return replace(base, patcher=attach(base.patcher, source, self.strength, 0.0, 1.0))


@dataclass(frozen=True)
class Method:
    """parts: act together. preset: of the search that draws, "" for the plain sampler."""

    parts: tuple[Part, ...] = ()
    preset: str = ""

    @property
    def search(self) -> SearchSettings | None:
        return PRESETS[self.preset] if self.preset else None

    def __str__(self) -> str:
        names = [str(part) for part in self.parts] + ([f"search:{self.preset}"] if self.preset else [])
        return "+".join(names) or BASE

    def on(self, base: BaseModel) -> BaseModel:
        for part in self.parts:
            base = part.on(base)
        return base

    def record(self, rewards: dict[str, str]) -> dict[str, Any]:
        """What decides how the method draws. rewards: digests of what a search follows, by name."""
        files = {str(part): file_digest(part.find()) for part in self.parts}
        found = {"method": str(self), "files": files}
        return found | {"search": asdict(self.search), "rewards": rewards} if self.preset else found


def _read(text: str, whole: str) -> Part | str:
    match = _PART.fullmatch(text)
    if match is None:
        raise BadMethod(
            f"'{text}' in the method '{whole}' is unknown: write {BASE}, generator:FILE, lora:FILE, full:FILE or "
            "masks:FILE, each with @STRENGTH if it is not 1, or search:PRESET, joined by +."
        )
    if match[4] is None:
        return Part(match[1], match[2], float(match[3] or 1.0))
    if match[4] not in PRESETS:
        raise BadMethod(f"The method '{whole}' names the preset '{match[4]}': choose among {', '.join(PRESETS)}.")
    return match[4]


def parse_method(text: str) -> Method:
    """Raises BadMethod."""
    # A + inside of a file's name does not part: it is followed by no kind.
    texts = re.split(rf"\+(?=(?:{'|'.join((*FOLDERS, 'search'))}):)", text.removeprefix(f"{BASE}+"))
    found = [_read(one, text) for one in texts] if text != BASE else []
    presets = [one for one in found if isinstance(one, str)]
    if len(presets) > 1:
        raise BadMethod(f"The method '{text}' names several searches: leave one.")
    return Method(tuple(one for one in found if isinstance(one, Part)), *presets)


def parse_methods(texts: Sequence[str]) -> list[Method]:
    """The base first, which the others are held against. Raises BadMethod."""
    methods = list(dict.fromkeys([Method(), *(parse_method(text) for text in texts)]))
    names = [str(method) for method in methods]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise BadMethod(f"Two methods are called '{twice[0]}': rename one of the files.")
    return methods
