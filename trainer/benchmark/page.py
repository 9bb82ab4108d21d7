"""The page of a run: one HTML file for people, which needs no network.

`page.html` shows what is told here, all of it as text: prompts and names of files become no part of its markup.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from maskunet_core.judges.inception import PROTOCOLS
from maskunet_core.judges.verdict import Seen
from maskunet_core.replacing import replacing

from .columns import REASON, SEEN, seen_from_text
from .distances import DISTANCES
from .drawing import Pair
from .folder import RunFolder
from .published import of_base
from .repeat import commands_of
from .suites import Prompt
from .verdicts import DIVERSITY, Difference, Measure, Verdicts

TEMPLATE = Path(__file__).with_name("page.html")
NAME = "page.html"
_DATA = "{{ run }}"
"""What the template has where the run is told."""
PICTURES, SIDE = 480, 224
"""Pictures in a page at most, and their longer side in pixels: some 10 MB."""
Key = tuple[str, str]
"""Judge and measure."""
_DISTANCES = {distance.name for distance in DISTANCES}
_IN_WORDS = {DIVERSITY: ("more varied", "more alike")}
_IN_WORDS |= dict.fromkeys(_DISTANCES, ("farther from real pictures", "nearer to real pictures"))
_USED_BY = {f"fid-{name}": protocol.used_by for name, protocol in PROTOCOLS.items()}
_USED_BY |= {"fd-dinov2": "dgm-eval", "cmmd": "cmmd-pytorch"}


def write_page(
    run: RunFolder,
    found: Sequence[Verdicts],
    values: Sequence[Measure],
    changes: Sequence[Difference],
    signatures: Sequence[str],
) -> Path:
    """found: of each method, the base first."""
    # Right or wrong is what people look for first.
    scores = sorted(found[0].scores, key=lambda key: not _is_whole(found, key))
    diversities = dict.fromkeys((one.judge, one.name) for one in values if one.name == DIVERSITY)
    changes = sorted(changes, key=lambda one: [*scores, (one.judge, one.name)].index((one.judge, one.name)))
    told = {
        "suite": run.settings["suite"],
        "compared": _compared(run, found),
        "methods": [one.method for one in found],
        "answers": [_answer(one, values) for one in changes],
        "measures": [_bars(key, values) for key in [*scores, *diversities]],
        "distances": _distances(run, values, changes),
        "pictures": _pictures(run, found, scores),
        "signatures": list(signatures),
        "commands": commands_of(run),
    }
    # The end of a script is the one thing that would be read as markup.
    data = json.dumps(told, allow_nan=False).replace("<", "\\u003c")
    with replacing(run.path / NAME) as temporary:
        temporary.write_text(TEMPLATE.read_text(encoding="utf-8").replace(_DATA, data), encoding="utf-8")
    return run.path / NAME


def _compared(run: RunFolder, found: Sequence[Verdicts]) -> list[list[str]]:
    """What was compared: names and values for people."""
    settings, sampling = run.settings, run.settings["sampling"]
    counts = sorted({len(one.pairs) for one in found})
    told = {"prompts": str(len(run.prompts)), "pictures by each method": " to ".join(map(str, counts))}
    if sampling:
        side = settings["side"]
        how = "{sampler}, {scheduler}, {steps} steps, guidance {cfg:g}".format(**sampling)
        told |= {"base": settings["base"], "drawn by": f"{how}, {side}x{side}, {settings['dtype']}"}
    told |= {"seed": str(settings["seed"])} | {f"list {name}": version for name, version in settings["lists"].items()}
    return [[name, value] for name, value in told.items()]


def _answer(change: Difference, values: Sequence[Measure]) -> dict[str, Any]:
    """A difference in words. gain: whether it is for the better, None where it is not told apart."""
    of = {one.method: one.whole.mean for one in values if (one.judge, one.name) == (change.judge, change.name)}
    distance, higher = change.name in _DISTANCES, change.whole.mean > 0
    more, less = _IN_WORDS.get(change.name, ("higher", "lower"))
    numbers = f"{change.whole.mean:+.3f}, 95 % {change.interval}, p {change.p:.4f}"
    if not change.is_told:
        numbers += f"; {change.whole.smallest_shown:.3f} would have been found four times in five"
    return {
        "method": change.method,
        "measure": f"{change.name} ({change.judge})",
        "told": (more if higher else less) if change.is_told else "cannot be told apart",
        "gain": higher != distance if change.is_told else None,
        "values": f"{of[change.method]:.3f} against {of[change.against]:.3f}",
        "numbers": numbers,
    }


def _bars(key: Key, values: Sequence[Measure]) -> dict[str, Any]:
    """Of a score, of all tasks together and of each, a bar for each method."""
    values = [one for one in values if (one.judge, one.name) == key]
    tasks = [{"all": one.whole, **one.tasks} for one in values]
    groups = []
    for task in tasks[0]:
        of_task = [(one.method, by_task[task]) for one, by_task in zip(values, tasks) if by_task.get(task)]
        bars = [
            {"method": method, "text": str(one), "value": one.mean, "interval": one.interval}
            for method, one in of_task
            if math.isfinite(one.mean)
        ]
        groups += [{"task": task, "bars": bars}] if bars else []
    return {"judge": key[0], "name": key[1], "groups": groups}


def _distances(run: RunFolder, values: Sequence[Measure], changes: Sequence[Difference]) -> dict[str, Any]:
    """All protocols side by side, a row each and a cell for each method."""
    differences = {(one.judge, one.name, one.method): one.row["all"] for one in changes}
    rows: dict[Key, dict[str, Any]] = {}
    for one in values:
        if one.name in _DISTANCES:
            names = {"judge": one.judge, "name": one.name, "used": _USED_BY.get(one.judge, ""), "cells": {}}
            cell = {"text": str(one.whole), "difference": differences.get((one.judge, one.name, one.method), "")}
            rows.setdefault((one.judge, one.name), names)["cells"][one.method] = cell
    order = sorted(rows, key=lambda key: (key[1], key[0]))
    return {"rows": [rows[key] for key in order], "paper": of_base(run.settings["suite"])}


# Pictures ----------------------------------------------------------------------------------------------------


def _pictures(run: RunFolder, found: Sequence[Verdicts], scores: Sequence[Key]) -> dict[str, Any]:
    """scores: in the order in which they are offered."""
    pairs = sorted({pair for one in found for pair in one.pairs})
    there = [pair for pair in pairs if any(one.folder.picture(pair).is_file() for one in found)]
    prompts = run.prompts
    chosen, samples = _chosen(found, there, scores[:1], max(1, PICTURES // len(found)))
    return {
        "scores": [{"name": f"{judge}: {name}", "whole": _is_whole(found, (judge, name))} for judge, name in scores],
        "counts": [{one.method: _counts(found[0], one, key) for one in found[1:]} for key in scores],
        "total": len(pairs),
        "samples": samples,
        "rows": [_row(prompts[pair[0]], found, scores, pair) for pair in chosen],
    }


def _chosen(
    found: Sequence[Verdicts], pairs: Sequence[Pair], scores: Sequence[Key], most: int
) -> tuple[list[Pair], int]:
    """Those that are shown, in their order, and how many of them are a fair sample: each of so many. The others are
    those on which a method and the base differ most by some scores."""
    if len(pairs) <= most:
        return list(pairs), len(pairs)
    samples = pairs[:: -(-len(pairs) // max(1, most // 2))]
    gaps = {pair: max((abs(gap) for key in scores for gap in _gaps(found, key, pair)), default=0.0) for pair in pairs}
    others = sorted(set(pairs) - set(samples), key=lambda pair: (-gaps[pair], pair[1], pair[0]))
    return sorted([*samples, *others[: most - len(samples)]]), len(samples)


def _gaps(found: Sequence[Verdicts], key: Key, pair: Pair) -> list[float]:
    """Each method minus the base, where both have been judged."""
    of_base, *others = (_score(one, key, pair) for one in found)
    return [] if of_base is None else [other - of_base for other in others if other is not None]


def _score(found: Verdicts, key: Key, pair: Pair) -> float | None:
    table = found.scores.get(key)
    if table is None or pair[1] >= table.shape[1] or not table[pair].isfinite():
        return None
    return float(table[pair])


def _is_whole(found: Sequence[Verdicts], key: Key) -> bool:
    """Whether a score is right or wrong alone."""
    return all(_is_right_or_wrong(one.scores[key]) for one in found if key in one.scores)


def _is_right_or_wrong(table: Tensor) -> bool:
    values = table[table.isfinite()]
    return bool(((values == 0) | (values == 1)).all())


def _counts(base: Verdicts, other: Verdicts, key: Key) -> dict[str, int]:
    """Of how many pictures of the whole run either scores higher."""
    of_base, mine = (one.scores.get(key, torch.empty(len(one.run.prompts), 0)) for one in (base, other))
    images = min(of_base.shape[1], mine.shape[1])
    gaps = mine[:, :images] - of_base[:, :images]
    found = {"base": gaps < 0, "other": gaps > 0, "both": gaps.isfinite()}
    return {name: int(pictures.sum()) for name, pictures in found.items()}


def _row(prompt: Prompt, found: Sequence[Verdicts], scores: Sequence[Key], pair: Pair) -> dict[str, Any]:
    shots = [_shot(one, scores, pair) for one in found]
    return {"prompt": prompt.text, "task": prompt.task, "place": list(pair), "shots": shots}


def _shot(found: Verdicts, scores: Sequence[Key], pair: Pair) -> dict[str, Any] | None:
    """A method's picture with what was said of it, None where it is not there."""
    file = found.folder.picture(pair)
    if not file.is_file():
        return None
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    reasons = {judge: texts.get(pair, "") for (judge, column), texts in found.texts.items() if column == REASON}
    seen = [texts[pair] for (_, column), texts in found.texts.items() if column == SEEN and pair in texts]
    return {
        "source": _small(picture),
        "coarse": max(picture.size) < SIDE,
        "scores": [_score(found, key, pair) for key in scores],
        "reasons": [reasons.get(judge, "") for judge, _ in scores],
        "boxes": [_box(one, picture.size) for text in seen for one in seen_from_text(text)],
    }


def _box(seen: Seen, size: tuple[int, int]) -> dict[str, Any]:
    """Sides in percent of the picture's."""
    sides = [100 * side / length for side, length in zip(seen.box, (*size, *size))]
    return {"name": seen.name, "asked": seen.asked, "box": sides}


def _small(picture: Image.Image) -> str:
    """As an address that holds the picture itself."""
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=85, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
