"""The commands `python -m trainer benchmark ...`."""

import argparse
from pathlib import Path

from maskunet_core.errors import MaskUNetError

from ..choices import TOY
from ..files import require_folder, user_path
from ..host import enter_host

OUTPUT = Path("output/benchmark")
SUITE_NAMES = ("toy", "geneval", "t2i-compbench", "coco2014", "coco2017")
PAPER = "paper"
LAYOUT_NAMES = ("flat", "geneval", "t2i-compbench")


def _plan(arguments: argparse.Namespace, suite: str):
    from .plan import SUITES, Plan

    images = 1 if arguments.quick or arguments.smoke else arguments.images
    options = {
        "seed": arguments.seed,
        "images": images,
        "batch": arguments.batch,
        "smoke": arguments.smoke,
        "side": arguments.side,
        "steps": arguments.steps,
        "cfg": arguments.cfg,
        "sampler": arguments.sampler,
        "scheduler": arguments.scheduler,
    }
    return Plan(SUITES[suite], arguments.data, _base(arguments.base), **options)


def _base(name: str) -> str:
    return TOY if name == TOY else str(user_path(name))


def _parts(arguments: argparse.Namespace) -> list[tuple]:
    """Plan, methods and folder of a suite, or of each of those that the paper's tables are of."""
    from . import paper
    from .methods import parse_methods

    methods, output = parse_methods(arguments.method), _output(arguments)
    if arguments.suite != PAPER:
        return [(_plan(arguments, arguments.suite), methods, output)]
    return [(_plan(arguments, suite), paper.methods_of(suite, methods), output / suite) for suite in paper.SUITES]


def _report(folder: Path) -> str:
    from .folder import RunFolder
    from .paper import runs_in, write_paper_report
    from .report import write_report

    return write_paper_report(folder) if runs_in(folder) else write_report(RunFolder(folder))


def _runs(folder: Path) -> dict:
    """The run in a folder, or those of the paper's suites, by suite."""
    from .folder import RunFolder
    from .paper import runs_in

    return runs_in(folder) or {"": RunFolder(folder)}


def _output(arguments: argparse.Namespace) -> Path:
    output = arguments.output or OUTPUT / arguments.suite
    require_folder(output)
    return output


def check(arguments: argparse.Namespace) -> None:
    enter_host(cpu=arguments.base == TOY)
    from .check import check

    for plan, methods, output in _parts(arguments):
        told = check(plan, methods, arguments.reward, output, arguments.keep_all)
        print("\n".join([f"{plan.suite.name}:", *told]))


def run(arguments: argparse.Namespace) -> None:
    enter_host(cpu=arguments.base == TOY)
    from .folder import Share
    from .run import run_suite

    parts, share = _parts(arguments), Share.parse(arguments.part)
    if len(parts) > 1:
        # Days of drawing are of no use without them. Not kept: together they are too large for a card.
        for plan, *_ in parts:
            plan.suite.judges(plan.data)
    for plan, methods, output in parts:
        run_suite(plan, methods, arguments.reward, output, share, arguments.keep_all)
    output = _output(arguments)
    if share.count == 1:
        print(_report(output))
    else:
        print(f"part {share.part} of {share.count} is done; `report {output}` makes the table of what is there")


def score(arguments: argparse.Namespace) -> None:
    enter_host()
    from .folder import RunFolder, Share
    from .report import write_report
    from .run import import_pictures, judge

    plan, folder = _plan(arguments, arguments.suite), RunFolder(_output(arguments))
    judges = plan.suite.judges(plan.data)
    folder.claim(plan.settings(drawn=False), plan.prompts)
    with folder.working(Share()):
        name = arguments.name or arguments.pictures.name
        import_pictures(arguments.pictures, arguments.layout, name, folder, plan.units)
        judge(folder, judges, plan.units)
    print(write_report(folder))


def report(arguments: argparse.Namespace) -> None:
    enter_host(cpu=True)
    print(_report(arguments.run_folder))


def reference(arguments: argparse.Namespace) -> None:
    enter_host()
    from .coco import make_references

    for line in make_references(arguments.suite, arguments.pictures):
        print(line)


def compare(arguments: argparse.Namespace) -> None:
    enter_host(cpu=True)
    from .report import compare

    first, second = _runs(arguments.first), _runs(arguments.second)
    both = [suite for suite in first if suite in second]
    if not both:
        raise MaskUNetError(f"'{arguments.first}' and '{arguments.second}' are runs of different suites.")
    for suite in both:
        print(compare(first[suite], second[suite], arguments.methods or ()))


def merge(arguments: argparse.Namespace) -> None:
    enter_host(cpu=True)
    from .folder import merge

    into, *others = arguments.folders
    parts = [_runs(path) for path in others]
    for suite, run in _runs(into).items():
        copied = merge(run, [runs[suite] for runs in parts if suite in runs])
        print(f"{copied} files copied into {run.path}")
    print(_report(into))


def export(arguments: argparse.Namespace) -> None:
    enter_host(cpu=True)
    from .folder import RunFolder
    from .layouts import LAYOUTS
    from .run import export

    folder = RunFolder(arguments.run_folder)
    found = {method.name: method for method in folder.methods()}
    if arguments.method not in found:
        raise MaskUNetError(f"'{folder.path}' holds no method '{arguments.method}': choose among {', '.join(found)}.")
    count = export(found[arguments.method], LAYOUTS[arguments.layout], folder.prompts, arguments.output)
    print(f"wrote {count} pictures to {arguments.output}")


def _add_suite(command: argparse.ArgumentParser, base: str, suites: tuple[str, ...] = (*SUITE_NAMES, PAPER)) -> None:
    command.add_argument("suite", choices=suites)
    command.add_argument("--data", type=user_path, help="folder with the suite's prompt lists; `check` names them")
    command.add_argument("--base", default=base, help='a checkpoint file, the TOML file of a training, or "toy"')
    command.add_argument("--output", type=user_path, help=f"the run's folder (default: {OUTPUT}/SUITE)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--images", type=int, default=0, help="pictures of each prompt (default: the suite's number)")
    command.add_argument("--batch", type=int, default=0, help="prompts drawn together (default: the suite's number)")
    command.add_argument("--side", type=int, default=0, help="of the pictures, in pixels (default: the suite's)")
    command.add_argument("--steps", type=int, default=0, help="of the sampler (default: the suite's)")
    command.add_argument("--cfg", type=float, help="1 is without guidance (default: the suite's)")
    command.add_argument("--sampler", default="", help="ComfyUI's name of it, such as lcm (default: the suite's)")
    command.add_argument("--scheduler", default="", help="likewise, such as sgm_uniform")
    command.add_argument("--quick", action="store_true", help="every prompt once: the beginning of the full run")
    command.add_argument("--smoke", action="store_true", help="a few prompts once, to see that it works")


def _add_methods(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--method",
        action="append",
        default=[],
        help="beside the base: generator:FILE, lora:FILE, full:FILE or masks:FILE, each with @STRENGTH if it is not 1, "
        "or search:PRESET, joined by +; may be given several times",
    )
    command.add_argument(
        "--reward", action="append", default=[], help='what searches follow: a file in models/reward, or "toy"'
    )
    command.add_argument(
        "--keep-all",
        action="store_true",
        help="all pictures stay, not just the first 200 of COCO's suites",
    )


def add_benchmark(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("benchmark", help="judge a checkpoint, plain and with methods, by published suites")
    actions = parser.add_subparsers(dest="action", required=True)

    command = actions.add_parser("check", help="tell what is missing, what it costs, and draw nothing that is kept")
    _add_suite(command, TOY)
    _add_methods(command)
    command.set_defaults(run=check)

    command = actions.add_parser("run", help="draw and judge what is not there yet, and write the table")
    _add_suite(command, TOY)
    _add_methods(command)
    command.add_argument("--part", default="", help="do just this part of the work, such as 2/8")
    command.set_defaults(run=run)

    command = actions.add_parser("score", help="judge pictures that others drew")
    command.add_argument("pictures", type=user_path, help="their folder")
    _add_suite(command, "", SUITE_NAMES)
    command.add_argument("--layout", default="flat", choices=LAYOUT_NAMES, help="of the folder")
    command.add_argument("--name", default="", help="of what drew them (default: the folder's name)")
    command.set_defaults(run=score)

    command = actions.add_parser("reference", help="make statistics of a suite's real pictures, once")
    command.add_argument("suite", choices=("coco2014", "coco2017"))
    command.add_argument("pictures", type=user_path, help="folder of COCO's own pictures, such as val2017")
    command.set_defaults(run=reference)

    command = actions.add_parser("report", help="write the tables and the page of what is judged")
    command.add_argument("run_folder", type=user_path, help="the --output of a run")
    command.set_defaults(run=report)

    command = actions.add_parser("compare", help="paired differences between methods of two runs")
    command.add_argument("first", type=user_path)
    command.add_argument("second", type=user_path)
    command.add_argument("--methods", nargs=2, metavar=("FIRST", "SECOND"), help="one of each, where names differ")
    command.set_defaults(run=compare)

    command = actions.add_parser("merge", help="put the parts of one run together in the first folder")
    command.add_argument("folders", type=user_path, nargs="+")
    command.set_defaults(run=merge)

    command = actions.add_parser("export", help="lay out a method's pictures as others' programs read them")
    command.add_argument("run_folder", type=user_path)
    command.add_argument("output", type=user_path)
    command.add_argument("--method", default="base")
    command.add_argument("--layout", default="flat", choices=LAYOUT_NAMES)
    command.set_defaults(run=export)
