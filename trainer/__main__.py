"""Trains and judges mask generators. `python -m trainer COMMAND --help` tells about each command."""

import argparse
import json
import os
import sys
from pathlib import Path

from maskunet_core.errors import MaskUNetError

from .host import enter_host


def train(arguments: argparse.Namespace) -> None:
    from .config_file import load_config

    config = load_config(arguments.config, arguments.set)
    enter_host()
    from .train import start

    start(config)


def resume(arguments: argparse.Namespace) -> None:
    enter_host()
    from .train import resume

    resume(arguments.folder)


def check(arguments: argparse.Namespace) -> None:
    from .config_file import load_config

    config = load_config(arguments.config, arguments.set)
    enter_host()
    from .train import check

    print("\n".join(check(config)))


def evaluate(arguments: argparse.Namespace) -> None:
    enter_host(cpu=True)
    from .evaluate import Protocol, evaluate

    protocol = Protocol.quick() if arguments.quick else Protocol()
    evaluate(arguments.generator, protocol, arguments.output, arguments.base)


def sample(arguments: argparse.Namespace) -> None:
    enter_host()
    from .config import Base
    from .samples import sample

    base = Base(checkpoint=arguments.base)
    path = sample(base, arguments.generator, arguments.prompt, arguments.output, arguments.seed, arguments.steps)
    print(f"wrote {path}: without masks left, with them right")


def info(arguments: argparse.Namespace) -> None:
    from maskunet_core.files.checkpoint import describe

    for name, value in describe(arguments.file).items():
        print(f"{name}: {json.dumps(value, indent=2) if isinstance(value, dict) else value}")


def convert(arguments: argparse.Namespace) -> None:
    from .convert import convert

    print(f"wrote {convert(arguments.generators, arguments.adapters, arguments.output, arguments.family)}")


def toy(arguments: argparse.Namespace) -> None:
    enter_host(cpu=True)
    from .evaluate import Protocol
    from .toy.train import Recipe, train_toy

    recipe, protocol = (Recipe.quick(), Protocol.quick()) if arguments.quick else (Recipe(), Protocol())
    train_toy(recipe, arguments.output, protocol)


def compare(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    enter_host(cpu=True)
    from .compare.plan import WORLDS, Scale
    from .compare.run import compare

    scale = Scale.quick() if arguments.quick else Scale()
    compare(arguments.output, scale, arguments.jobs, tuple(arguments.task or WORLDS))


def reward_compare(arguments: argparse.Namespace) -> None:
    enter_host(cpu=True)
    from .reward_compare.plan import Scale
    from .reward_compare.run import reward_compare

    reward_compare(arguments.output, Scale.quick() if arguments.quick else Scale(), arguments.jobs)


def _add_configuration(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", help="a TOML file, or the name of a preset (toy, sd15, dreambooth, paper)")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, for instance loop.steps=500"
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("train", help="train a mask generator, or a baseline")
    _add_configuration(command)
    command.set_defaults(run=train)

    command = commands.add_parser("resume", help="go on with a run that was stopped")
    command.add_argument("folder", type=Path, help="the run's output folder")
    command.set_defaults(run=resume)

    command = commands.add_parser(
        "check", help="read configuration, model and data; tell memory and time; train nothing"
    )
    _add_configuration(command)
    command.set_defaults(run=check)

    command = commands.add_parser("evaluate", help="judge a generator on prompts and noises that training never saw")
    command.add_argument("generator", type=Path, nargs="?", help="generator file; without one the base alone")
    command.add_argument("--base", default="", help="folder of other toy weights (default: the shipped ones)")
    command.add_argument("--output", type=Path, default=Path("output/evaluate"), help="folder for the table")
    command.add_argument("--quick", action="store_true", help="few pictures, to see that it works")
    command.set_defaults(run=evaluate)

    command = commands.add_parser("compare", help="masks beside what else could be trained, at equal data and steps")
    command.add_argument("--output", type=Path, default=Path("output/compare"), help="folder for tables and figures")
    command.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once, a thread each")
    command.add_argument("--task", action="append", choices=("noise", "style", "subject"), help="only this one")
    command.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    command.set_defaults(run=compare)

    command = commands.add_parser("reward-compare", help="the search for masks beside best-of-N and other rivals")
    command.add_argument("--output", type=Path, default=Path("output/reward-compare"), help="folder for table and plot")
    command.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once, a thread each")
    command.add_argument("--quick", action="store_true", help="few prompts, to see that it works")
    command.set_defaults(run=reward_compare)

    command = commands.add_parser("sample", help="draw prompts without and with a generator")
    command.add_argument("generator", type=Path, help="generator file")
    command.add_argument("--prompt", action="append", required=True, help="a prompt; may be given several times")
    command.add_argument("--base", default="toy", help='a checkpoint file, or "toy" (default)')
    command.add_argument("--output", type=Path, default=Path("output/sample/samples.png"), help="the picture to write")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, default=20)
    command.set_defaults(run=sample)

    command = commands.add_parser("info", help="tell what a generator file says of itself")
    command.add_argument("file", type=Path, help="generator file")
    command.set_defaults(run=info)

    command = commands.add_parser("convert", help="convert the authors' .pth files to a generator file")
    command.add_argument("generators", type=Path, help="mask_generators.pth")
    command.add_argument("adapters", type=Path, help="adapters.pth")
    command.add_argument("output", type=Path, help="the .safetensors file to write")
    command.add_argument("--family", default="SD 1.5", help="base model that they were trained for (default: SD 1.5)")
    command.set_defaults(run=convert)

    command = commands.add_parser("toy", help="train the embedded toy model from nothing")
    command.add_argument("--output", type=Path, default=Path("output/toy"), help="folder for the five weight files")
    command.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    command.set_defaults(run=toy)

    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse(sys.argv[1:])
    try:
        arguments.run(arguments)
    except MaskUNetError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = {"train": "`python -m trainer resume` with the run's folder", "resume": "The same command"}
        print(
            f"\nStopped. {again.get(arguments.command, 'The same command')} goes on from the saved state, "
            "where there is one.",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
