"""Trains and judges mask generators. `python -m trainer COMMAND --help` tells about each command."""

import argparse
import sys
from pathlib import Path

from maskunet_core.errors import MaskUNetError

from .host import enter_host


def toy(arguments: argparse.Namespace) -> None:
    enter_host()
    from .evaluate import Protocol
    from .toy.train import Recipe, train_toy

    recipe, protocol = (Recipe.quick(), Protocol.quick()) if arguments.quick else (Recipe(), Protocol())
    train_toy(recipe, arguments.output, protocol)


def train(arguments: argparse.Namespace) -> None:
    from .config import load_config

    config = load_config(arguments.config)
    enter_host()
    from .train import train

    train(config)


def evaluate(arguments: argparse.Namespace) -> None:
    enter_host()
    from .evaluate import Protocol, evaluate

    protocol = Protocol.quick() if arguments.quick else Protocol()
    evaluate(arguments.generator, protocol, arguments.output, arguments.base)


def convert(arguments: argparse.Namespace) -> None:
    from .convert import convert

    print(f"wrote {convert(arguments.generators, arguments.adapters, arguments.output, arguments.family)}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("train", help="train a mask generator")
    command.add_argument("config", help="a TOML file, or the name of a preset (toy)")
    command.set_defaults(run=train)

    command = commands.add_parser("evaluate", help="judge a generator on prompts and noises that training never saw")
    command.add_argument("generator", type=Path, nargs="?", help="generator file; without one the base alone")
    command.add_argument("--base", default="", help="folder of other toy weights (default: the shipped ones)")
    command.add_argument("--output", type=Path, default=Path("output/evaluate"), help="folder for the table")
    command.add_argument("--quick", action="store_true", help="few pictures, to see that it works")
    command.set_defaults(run=evaluate)

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
        print("\nStopped. The same command goes on from the last saved state, where it keeps one.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
