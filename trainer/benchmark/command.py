"""The commands `python -m trainer benchmark ...`."""

import argparse
from pathlib import Path

from maskunet_core.errors import MaskUNetError

from ..config import TOY
from ..files import require_folder, user_path
from ..host import enter_host

OUTPUT = Path("output/benchmark")
SUITE_NAMES = ("toy", "geneval", "t2i-compbench", "coco2014", "coco2017")
LAYOUT_NAMES = ("flat", "geneval", "t2i-compbench")


def _plan(arguments: argparse.Namespace):
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
    }
    return Plan(SUITES[arguments.suite], arguments.data, _base(arguments.base), **options)


def _base(name: str) -> str:
    return TOY if name == TOY else str(user_path(name))


def _output(arguments: argparse.Namespace) -> Path:
    output = arguments.output or OUTPUT / arguments.suite
    require_folder(output)
    return output


def check(arguments: argparse.Namespace) -> None:
    enter_host(cpu=arguments.base == TOY)
    from .check import check
    from .methods import parse_methods

    print("\n".join(check(_plan(arguments), parse_methods(arguments.method), arguments.reward)))


def run(arguments: argparse.Namespace) -> None:
    enter_host(cpu=arguments.base == TOY)
    from .folder import RunFolder, Share
    from .methods import parse_methods
    from .report import write_report
    from .run import draw, judge

    plan, methods = _plan(arguments), parse_methods(arguments.method)
    folder, share = RunFolder(_output(arguments)), Share.parse(arguments.part)
    # All judges first: hours of drawing are of no use without them.
    judges = plan.suite.judges(plan.data)
    folder.claim(plan.settings(), plan.prompts)
    with folder.working(share):
        draw(plan, methods, arguments.reward, folder, share)
        judge(folder, judges, share.of(plan.units))
    if share.count == 1:
        print(write_report(folder))
    else:
        print(f"part {share.part} of {share.count} is done; `report {folder.path}` makes the table of what is there")


def score(arguments: argparse.Namespace) -> None:
    enter_host()
    from .folder import RunFolder, Share
    from .layouts import LAYOUTS
    from .report import write_report
    from .run import import_pictures, judge

    plan, folder = _plan(arguments), RunFolder(_output(arguments))
    judges = plan.suite.judges(plan.data)
    folder.claim(plan.settings(drawn=False), plan.prompts)
    with folder.working(Share()):
        name = arguments.name or arguments.pictures.name
        import_pictures(arguments.pictures, LAYOUTS[arguments.layout], name, folder, plan.units)
        judge(folder, judges, plan.units)
    print(write_report(folder))


def report(arguments: argparse.Namespace) -> None:
    enter_host(cpu=True)
    from .folder import RunFolder
    from .report import write_report

    print(write_report(RunFolder(arguments.run_folder)))


def reference(arguments: argparse.Namespace) -> None:
    enter_host()
    from .coco import make_references

    for line in make_references(arguments.suite, arguments.pictures):
        print(line)


def compare(arguments: argparse.Namespace) -> None:
    enter_host(cpu=True)
    from .folder import RunFolder
    from .report import compare

    print(compare(RunFolder(arguments.first), RunFolder(arguments.second), arguments.methods or ()))


def merge(arguments: argparse.Namespace) -> None:
    enter_host(cpu=True)
    from .folder import RunFolder, merge
    from .report import write_report

    into, *others = (RunFolder(path) for path in arguments.folders)
    print(f"{merge(into, others)} files copied into {into.path}")
    print(write_report(into))


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


def _add_suite(command: argparse.ArgumentParser, base: str) -> None:
    command.add_argument("suite", choices=SUITE_NAMES)
    command.add_argument("--data", type=user_path, help="folder with the suite's prompt lists; `check` names them")
    command.add_argument("--base", default=base, help='a checkpoint file, or "toy"')
    command.add_argument("--output", type=user_path, help=f"the run's folder (default: {OUTPUT}/SUITE)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--images", type=int, default=0, help="pictures of each prompt (default: the suite's number)")
    command.add_argument("--batch", type=int, default=0, help="prompts drawn together (default: the suite's number)")
    command.add_argument("--side", type=int, default=0, help="of the pictures, in pixels (default: the suite's)")
    command.add_argument("--steps", type=int, default=0, help="of the sampler (default: the suite's)")
    command.add_argument("--cfg", type=float, help="1 is without guidance (default: the suite's)")
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
    _add_suite(command, "")
    command.add_argument("--layout", default="flat", choices=LAYOUT_NAMES, help="of the folder")
    command.add_argument("--name", default="", help="of what drew them (default: the folder's name)")
    command.set_defaults(run=score)

    command = actions.add_parser("reference", help="make statistics of a suite's real pictures, once")
    command.add_argument("suite", choices=("coco2014", "coco2017"))
    command.add_argument("pictures", type=user_path, help="folder of COCO's own pictures, such as val2017")
    command.set_defaults(run=reference)

    command = actions.add_parser("report", help="write the tables of what is judged")
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
