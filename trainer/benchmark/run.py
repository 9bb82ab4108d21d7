"""Runs a suite: draws what is not drawn yet, then judges what is not judged yet."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from maskunet_core.replacing import replacing

from ..base import load_base
from ..config import Base
from .drawing import Drawer, load_rewards, reward_digests, reward_files
from .folder import MethodFolder, RunFolder, Share, Unit
from .layouts import Layout
from .methods import Method
from .plan import Plan
from .real import write_real
from .suites import PictureJudge, Prompt


def drawers_of(plan: Plan, methods: Sequence[Method], rewards: dict[str, Path | None]) -> list[Drawer]:
    """Of each method. Raises MaskUNetError where a file does not fit the base."""
    base = load_base(Base(checkpoint=plan.base), plan.dtype)
    searches = any(method.preset for method in methods)
    reward = load_rewards(rewards) if rewards and searches else None
    options = {"sampling": plan.sampling, "side": plan.side or plan.suite.side, "seed": plan.seed}
    return [Drawer.of(method, base, reward, **options) for method in methods]


def run_suite(plan: Plan, methods: Sequence[Method], rewards: Sequence[str], output: Path, share: Share) -> None:
    """Draws and judges a share of the suite's units. Raises MaskUNetError."""
    # All judges first: hours of drawing are of no use without them.
    folder, judges = RunFolder(output), plan.suite.judges(plan.data)
    folder.claim(plan.settings(), plan.prompts)
    with folder.working(share):
        draw(plan, methods, rewards, folder, share)
        judge(folder, judges, share.of(plan.units))


def draw(plan: Plan, methods: Sequence[Method], rewards: Sequence[str], folder: RunFolder, share: Share) -> None:
    """The pictures of the share's units by all methods."""
    files = reward_files(rewards)
    records = [method.record(reward_digests(files) if method.preset else {}) for method in methods]
    folders = [folder.method(record) for record in records]
    prompts, units = plan.prompts, share.of(plan.units)
    todo = {m: [unit for unit in units if not at.is_drawn(unit)] for m, at in zip(methods, folders)}
    if not any(todo.values()):
        return
    # All of them first: a file that does not fit is told before hours of drawing.
    drawers = drawers_of(plan, methods, files)
    for method, at, drawer in zip(methods, folders, drawers):
        with tqdm(total=sum(len(unit.pairs) for unit in todo[method]), desc=f"draw {method}", mininterval=1) as bar:
            for unit in todo[method]:
                at.save_pictures(unit, drawer.pictures(unit.pairs, [prompts[n].text for n, _ in unit.pairs]))
                bar.update(len(unit.pairs))


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


def import_pictures(source: Path, layout: Layout, name: str, folder: RunFolder, units: Sequence[Unit]) -> None:
    """Pictures that others drew, as a method of the run. Units that lack one are left out."""
    method = folder.method({"method": name, "pictures": str(source)})
    prompts = folder.prompts
    for unit in units:
        files = [layout.find(source, prompts, pair) for pair in unit.pairs]
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
