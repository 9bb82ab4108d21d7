"""Runs a suite: draws what is not drawn yet, then judges what is not judged yet."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from maskunet_core.replacing import replacing

from ..base import load_base
from .drawing import Drawer, load_rewards, reward_digests, reward_files
from .folder import MethodFolder, RunFolder, Share, Unit
from .layouts import LAYOUTS, Layout
from .methods import Method
from .plan import Plan
from .real import write_real
from .suites import PictureJudge, Prompt

_BYTES = 1.7
"""Of a PNG, per pixel."""
_AT_ONCE = 1000
"""Pictures that are drawn before they are judged, where most of them are removed then."""


def drawers_of(plan: Plan, methods: Sequence[Method], rewards: dict[str, Path | None]) -> list[Drawer]:
    """Of each method. Raises MaskUNetError where a file does not fit the base."""
    base = load_base(plan.base_settings, plan.dtype)
    searches = any(method.preset for method in methods)
    reward = load_rewards(rewards) if rewards and searches else None
    options = {"sampling": plan.sampling, "side": plan.side or plan.suite.side, "seed": plan.seed}
    return [Drawer.of(method, base, reward, **options) for method in methods]


def plan_of(plan: Plan, methods: Sequence[Method], units: Sequence[Unit], output: Path, keep_all: bool = False) -> str:
    """Pictures and disk, for people."""
    pictures = sum(len(unit.pairs) for unit in units)
    kept = pictures if keep_all or plan.suite.kept is None else min(pictures, plan.suite.kept)
    disk = kept * len(methods) * (plan.side or plan.suite.side) ** 2 * _BYTES / 1e9
    there = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free / 1e9
    stay = "" if kept == pictures else f", of which {kept} each are kept"
    told = f"{pictures} pictures by each of {len(methods)} methods{stay}"
    return f"{told}, {disk:.1f} GB on the disk; {free:.0f} GB are free"


def run_suite(
    plan: Plan, methods: Sequence[Method], rewards: Sequence[str], output: Path, share: Share, keep_all: bool = False
) -> None:
    """Draws and judges a share of the suite's units. keep_all: pictures, whatever the suite says. Raises
    MaskUNetError."""
    # All judges first: hours of drawing are of no use without them.
    folder, judges, kept = RunFolder(output), plan.suite.judges(plan.data), None if keep_all else plan.suite.kept
    folder.claim(plan.settings(), plan.prompts)
    units, judged_by = share.of(plan.units), () if kept is None else [one.name for one in judges]
    tqdm.write(f"{plan.suite.name}: {plan_of(plan, methods, units, output, keep_all)}")
    step = len(units) if kept is None else max(1, _AT_ONCE // len(plan.units[0].pairs))
    with folder.working(share):
        for start in range(0, len(units), max(1, step)):
            some = units[start : start + step]
            draw(plan, methods, rewards, folder, some, judged_by)
            judge(folder, judges, some)
            if kept is not None:
                remove_judged(folder, judged_by, some, kept)


def draw(
    plan: Plan,
    methods: Sequence[Method],
    rewards: Sequence[str],
    folder: RunFolder,
    units: Sequence[Unit],
    judged_by: Sequence[str] = (),
) -> None:
    """The units' pictures by all methods. judged_by: judges; of units that all of them have judged no pictures are
    needed."""
    files = reward_files(rewards)
    records = [method.record(reward_digests(files) if method.preset else {}) for method in methods]
    folders = [folder.method(record) for record in records]
    prompts = plan.prompts
    todo = {
        method: [unit for unit in units if not (at.is_drawn(unit) or at.is_judged(unit, judged_by))]
        for method, at in zip(methods, folders)
    }
    if not any(todo.values()):
        return
    # All of them first: a file that does not fit is told before hours of drawing.
    drawers = drawers_of(plan, methods, files)
    for method, at, drawer in zip(methods, folders, drawers):
        with tqdm(total=sum(len(unit.pairs) for unit in todo[method]), desc=f"draw {method}", mininterval=1) as bar:
            for unit in todo[method]:
                at.save_pictures(unit, drawer.pictures(unit.pairs, [prompts[n].text for n, _ in unit.pairs]))
                bar.update(len(unit.pairs))


def remove_judged(folder: RunFolder, judges: Sequence[str], units: Sequence[Unit], kept: int) -> None:
    """Pictures of units that all judges have judged, but for the first `kept` of each method."""
    prompts = len(folder.prompts)
    for method in folder.methods():
        for unit in units:
            if method.is_judged(unit, judges):
                for prompt, number in unit.pairs:
                    if number * prompts + prompt >= kept:
                        method.picture((prompt, number)).unlink(missing_ok=True)


def judge(folder: RunFolder, judges: Sequence[PictureJudge], units: Sequence[Unit]) -> None:
    """What was drawn, of the units, and not judged yet."""
    import comfy.model_management

    # What drew has done its work.
    comfy.model_management.unload_all_models()
    prompts = folder.prompts
    for one in judges:
        if one.real is not None:
            write_real(folder.real_file(one.name), one.real)
        for method in folder.methods():
            method.claim_judge(one.name, one.record)
            todo = [u for u in units if method.is_drawn(u) and not method.rows_file(one.name, u).exists()]
            for unit in tqdm(todo, desc=f"{one.name} judges {method.name}", mininterval=1, disable=not todo):
                rows = one(method.pictures(unit), [prompts[n] for n, _ in unit.pairs])
                method.save_rows(one.name, unit, rows)


def import_pictures(source: Path, layout: str, name: str, folder: RunFolder, units: Sequence[Unit]) -> None:
    """Pictures that others drew, as a method of the run. layout: of LAYOUTS. Units that lack one are left out."""
    method = folder.method({"method": name, "pictures": str(source), "layout": layout})
    prompts = folder.prompts
    for unit in units:
        files = [LAYOUTS[layout].find(source, prompts, pair) for pair in unit.pairs]
        if None in files or method.is_drawn(unit):
            continue
        for pair, file in zip(unit.pairs, files):
            with replacing(method.picture(pair)) as temporary:
                shutil.copyfile(file, temporary)


def export(method: MethodFolder, layout: Layout, prompts: Sequence[Prompt], output: Path) -> int:
    """The pictures of a method in the layout that others' programs read; returns how many."""
    files = sorted(method.path.glob("pictures/*/samples/*.png"))
    for path in files:
        pair = int(path.parent.parent.name), int(path.stem)
        target = output / layout.place(prompts, pair)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    layout.finish(prompts, output)
    return len(files)
