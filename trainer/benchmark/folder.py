"""A run's folder: what it is a run of, pictures, and what judges said of them, in units that may be done in any order.

    run.json, prompts.json           what every method in the folder shares
    methods/NAME/method.json         what decides how the method draws
    methods/NAME/pictures/00012/samples/0003.png      of prompt 12, number 3; of COCO the first ones alone stay
    methods/NAME/judged/JUDGE/000007.safetensors      a unit's rows; judge.json says who judged
    real/JUDGE.safetensors           the real pictures that distances are to

A unit is what is drawn together. Its files carry no name of a process or machine, and what is there is done: a run may
be stopped, go on, and be spread over processes and folders, with the same bits.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskunet_core.errors import MaskUNetError
from maskunet_core.replacing import replacing

from ..job_board import InUse, alone, claim
from ..sheets import to_image
from .drawing import Pair
from .suites import Prompt

_SHARED = ("run.json", "prompts.json")
_OTHER = "a run with other settings"


class BadRun(MaskUNetError):
    """A folder that holds no run, or one that does not go with another; the message names it."""


@dataclass(frozen=True)
class Unit:
    """Pictures that are drawn together: of neighbouring prompts, all with one number."""

    index: int
    pairs: tuple[Pair, ...]


def units_of(prompts: int, images: int, batch: int) -> list[Unit]:
    """All prompts once, then all of them again: fewer images are the beginning of more."""
    starts = [(number, start) for number in range(images) for start in range(0, prompts, batch)]
    return [
        Unit(index, tuple((prompt, number) for prompt in range(start, min(start + batch, prompts))))
        for index, (number, start) in enumerate(starts)
    ]


@dataclass(frozen=True)
class Share:
    """The units that a process does: each `count`-th, from `part` (1 to count) on."""

    part: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Of "2/8"; of "", what `accelerate launch` tells a process. Raises BadRun."""
        if not text:
            return cls(int(os.environ.get("RANK", 0)) + 1, int(os.environ.get("WORLD_SIZE", 1)))
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise BadRun(f"--part is '{text}': write for instance 2/8 for the second of eight parts.")
        return cls(int(match[1]), int(match[2]))

    def of(self, units: Sequence[Unit]) -> list[Unit]:
        return [unit for unit in units if unit.index % self.count == self.part - 1]


class RunFolder:
    def __init__(self, path: Path):
        self.path = path

    def claim(self, settings: dict[str, Any], prompts: Sequence[Prompt]) -> None:
        """Raises OtherScale where the folder holds a run with other settings or prompts."""
        claim(self.path, settings, "run.json", _OTHER)
        claim(self.path, {"prompts": [asdict(prompt) for prompt in prompts]}, "prompts.json", _OTHER)

    @property
    def settings(self) -> dict[str, Any]:
        return self._read("run.json")

    @property
    def prompts(self) -> list[Prompt]:
        return [Prompt(**values) for values in self._read("prompts.json")["prompts"]]

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BadRun(f"'{self.path}' holds no run (it lacks {name}): name the --output of a run.") from None

    def methods(self) -> "list[MethodFolder]":
        """Those in the folder, the base first."""
        self._read("run.json")
        found = [MethodFolder(path.parent) for path in sorted(self.path.glob("methods/*/method.json"))]
        return sorted(found, key=lambda folder: folder.name != "base")

    def method(self, record: dict[str, Any]) -> "MethodFolder":
        """That of the method with this record. Raises OtherScale where another method has its name."""
        folder = self.path / "methods" / re.sub(r"[^\w.@+-]+", "-", record["method"])
        claim(folder, record, "method.json", "another method of this name")
        return MethodFolder(folder)

    def real_file(self, judge: str) -> Path:
        """What the judge's features of drawn pictures are held against."""
        return self.path / "real" / f"{judge}.safetensors"

    def units(self) -> list[Unit]:
        """As far as any method has been drawn or judged."""
        prompts, batch = len(self.prompts), self.settings["batch"]
        drawn = {int(path.stem) for path in self.path.glob("methods/*/pictures/*/samples/*.png")}
        # Of some suites pictures are removed when they are judged.
        judged = {int(path.stem) for path in self.path.glob("methods/*/judged/*/*.safetensors")}
        numbers = drawn | {index // -(-prompts // batch) for index in judged}
        return units_of(prompts, max(numbers, default=-1) + 1, batch)

    @contextlib.contextmanager
    def working(self, share: Share) -> Iterator[None]:
        """No other process does the same units in the meantime. Raises InUse."""
        parts = self.path / "parts"
        mine = parts / f"{share.part}-of-{share.count}"
        mine.mkdir(parents=True, exist_ok=True)
        with alone(mine, "draws or judges"):
            for other in sorted(parts.iterdir()):
                if not other.name.endswith(f"-of-{share.count}"):
                    _require_unused(other)
            yield


def _require_unused(folder: Path) -> None:
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InUse(
            f"Another process divides the same run into other parts, '{folder}'. Wait for it, stop it, or choose "
            "another folder by --output."
        ) from None
    lock.release()


class MethodFolder:
    def __init__(self, path: Path):
        self.path = path

    @property
    def record(self) -> dict[str, Any]:
        """What decides how the method draws, under `method` its name."""
        return json.loads((self.path / "method.json").read_text(encoding="utf-8"))

    @property
    def name(self) -> str:
        return self.record["method"]

    def picture(self, pair: Pair) -> Path:
        return self.path / "pictures" / f"{pair[0]:05}" / "samples" / f"{pair[1]:04}.png"

    def is_drawn(self, unit: Unit) -> bool:
        return all(self.picture(pair).exists() for pair in unit.pairs)

    def is_judged(self, unit: Unit, judges: Sequence[str]) -> bool:
        """Whether all of the judges have judged it; False where none is named."""
        return bool(judges) and all(self.rows_file(judge, unit).exists() for judge in judges)

    def save_pictures(self, unit: Unit, pictures: Tensor) -> None:
        """pictures: `[N, H, W, 3]` in [0, 1]."""
        for pair, picture in zip(unit.pairs, pictures):
            with replacing(self.picture(pair)) as temporary:
                to_image(picture).save(temporary, format="PNG")

    def pictures(self, unit: Unit) -> list[Image.Image]:
        return [Image.open(self.picture(pair)).convert("RGB") for pair in unit.pairs]

    def rows_file(self, judge: str, unit: Unit) -> Path:
        return self.path / "judged" / judge / f"{unit.index:06}.safetensors"

    def claim_judge(self, name: str, record: dict[str, Any]) -> None:
        """Raises OtherScale where another judge of that name has judged."""
        claim(self.path / "judged" / name, record, "judge.json", "what another judge said")

    def save_rows(self, judge: str, unit: Unit, rows: dict[str, Tensor]) -> None:
        with replacing(self.rows_file(judge, unit)) as temporary:
            save_file({name: values.contiguous() for name, values in rows.items()}, temporary)

    def judges(self) -> list[str]:
        return sorted(path.parent.name for path in self.path.glob("judged/*/judge.json"))

    def judge_record(self, judge: str) -> dict[str, Any]:
        return json.loads((self.path / "judged" / judge / "judge.json").read_text(encoding="utf-8"))

    def rows(self, judge: str, units: Sequence[Unit]) -> dict[Pair, dict[str, Tensor]]:
        """What a judge said of each picture, of the units that it has judged."""
        found: dict[Pair, dict[str, Tensor]] = {}
        for unit in units:
            path = self.rows_file(judge, unit)
            if path.exists():
                columns = load_file(path)
                for row, pair in enumerate(unit.pairs):
                    found[pair] = {name: values[row] for name, values in columns.items()}
        return found


def merge(into: RunFolder, others: Sequence[RunFolder]) -> int:
    """Copy what `into` lacks of the same run's parts in other folders; returns the number of files. Raises BadRun."""
    copied = 0
    for other in others:
        for name in _SHARED:
            if other._read(name) != into._read(name):
                raise BadRun(f"'{other.path}' and '{into.path}' are different runs: their {name} differ.")
        for method in other.methods():
            into.method(method.record)
        for source in sorted(other.path.glob("methods/**/*")):
            target = into.path / source.relative_to(other.path)
            if source.is_file() and not source.name.startswith(".") and not target.exists():
                with replacing(target) as temporary:
                    shutil.copyfile(source, temporary)
                copied += 1
    return copied
