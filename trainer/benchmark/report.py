"""Tables and the page of a run: each method's scores with their errors, and paired differences between methods."""

from collections.abc import Sequence

from ..tables import to_markdown, write_table
from .folder import BadRun, MethodFolder, RunFolder
from .page import write_page
from .verdicts import Verdicts, differences, measures


def signature(run: RunFolder, found: Verdicts) -> str:
    """One line that says what a method's numbers are of."""
    settings, sampling = run.settings, run.settings["sampling"]
    how = "/".join(str(sampling[key]) for key in ("sampler", "scheduler", "steps", "cfg")) if sampling else "imported"
    judges = "|".join(sorted({judge for judge, _ in [*found.scores, *found.features]}))
    parts = (settings["suite"], f"v{settings['version']}", found.method, settings["base"], f"p{len(run.prompts)}")
    return "|".join([*parts, f"n{len(found.pairs)}", f"seed{settings['seed']}", how, judges])


def write_report(run: RunFolder) -> str:
    """`table` and `differences` as Markdown and JSON, and the page. Returns what is printed. Raises BadRun."""
    found = [Verdicts.of(run, method) for method in run.methods()]
    found = [one for one in found if one.scores or one.features]
    if not found:
        raise BadRun(f"'{run.path}' holds no judged pictures yet: give the command `run` first.")
    settings = run.settings | {"signatures": [signature(run, one) for one in found]}
    values = [measure for one in found for measure in measures(one)]
    changes = [change for one in found[1:] for change in differences(one, found[0])]
    texts = [write_table(run.path, [one.row for one in values], settings)]
    if changes:
        texts.append(write_table(run.path, [one.row for one in changes], settings, "differences"))
        texts.append("* of one task: told apart from chance, all tasks of the row taken together (Holm).")
    page = write_page(run, found, values, changes, settings["signatures"])
    return "\n\n".join([*texts, "\n".join(settings["signatures"]), f"With pictures: {page}"])


def compare(mine: RunFolder, other: RunFolder, methods: Sequence[str]) -> str:
    """Differences between methods of two runs with the same prompts, seeds and judges: those of the same name, or two
    that are named. Raises BadRun."""
    if mine.prompts != other.prompts or mine.settings["seed"] != other.settings["seed"]:
        raise BadRun(f"'{mine.path}' and '{other.path}' have other prompts or another seed: nothing of them is paired.")
    first, second = ({method.name: method for method in run.methods()} for run in (mine, other))
    pairs = [tuple(methods)] if methods else [(name, name) for name in first if name in second]
    rows = []
    for name, against in pairs:
        if name not in first or against not in second:
            raise BadRun(
                f"There is no '{name}' in '{mine.path}' ({', '.join(first)}), or no '{against}' in '{other.path}' "
                f"({', '.join(second)}): name two others by --methods."
            )
        _require_same_judges(first[name], second[against])
        found = differences(Verdicts.of(mine, first[name]), Verdicts.of(other, second[against]))
        rows += [one.row for one in found]
    if not rows:
        raise BadRun(f"'{mine.path}' and '{other.path}' share no method that both judged: name two by --methods.")
    return f"{mine.path} minus {other.path}\n\n{to_markdown(rows)}"


def _require_same_judges(mine: MethodFolder, other: MethodFolder) -> None:
    for judge in set(mine.judges()) & set(other.judges()):
        if mine.judge_record(judge) != other.judge_record(judge):
            raise BadRun(f"The judge '{judge}' of the two runs is not the same (judge.json): judge one of them again.")
