"""Trains and judges mask generators. `python -m trainer COMMAND --help` tells about each command."""

import argparse
import io
import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from maskunet_core.errors import MaskUNetError

from .benchmark.command import add_benchmark
from .choices import BODIES
from .files import NO_ROOM, free_path, require_folder, require_free, user_path
from .host import enter_host

SHEET = Path("output/sample/samples.png")
_MASKED_SIDES = "without masks left, with them right"
CAPTIONS = (
    "Captions and prompts are read as ComfyUI reads prompts: (word) and (word:1.2) weigh a word, and embedding:NAME "
    "looks an embedding up. Write \\( and \\) for brackets that are meant as such: zoro \\(one piece\\). What exceeds "
    "75 tokens (some 50 words) is cut."
)


def train(arguments: argparse.Namespace) -> None:
    enter_host()
    from .config_file import load_config
    from .train import start

    start(load_config(arguments.config, arguments.set), overwrite=arguments.overwrite)


def resume(arguments: argparse.Namespace) -> None:
    enter_host()
    from .train import resume

    resume(arguments.folder)


def check(arguments: argparse.Namespace) -> None:
    enter_host()
    from .config_file import load_config
    from .train import check

    print("\n".join(check(load_config(arguments.config, arguments.set))))


def evaluate(arguments: argparse.Namespace) -> None:
    from maskunet_core.files.checkpoint import read_metadata

    if arguments.generator:
        read_metadata(arguments.generator)
    require_folder(arguments.output)
    require_free(arguments.output / "table.json", arguments.overwrite)
    enter_host(cpu=True)
    from .benchmark.methods import parse_methods
    from .evaluate import Protocol, evaluate

    generators = [f"generator:{arguments.generator}"] if arguments.generator else []
    protocol = Protocol.quick() if arguments.quick else Protocol()
    if arguments.cfg is not None:
        protocol = replace(protocol, cfg=arguments.cfg)
    weights = str(user_path(arguments.base)) if arguments.base else ""
    evaluate(parse_methods(generators + arguments.method), protocol, arguments.output, weights, arguments.body)


def sample(arguments: argparse.Namespace) -> None:
    output = arguments.output or free_path(SHEET)
    require_folder(output.parent)
    require_free(output, arguments.overwrite)
    enter_host()
    from .config_file import base_named
    from .embedding.word import training_of
    from .samples import sample, sample_word

    is_word = training_of(arguments.generator) is not None
    draw, sides = (sample_word, "its start left, the word right") if is_word else (sample, _MASKED_SIDES)
    base = base_named(arguments.base, arguments.body)
    path = draw(base, arguments.generator, arguments.prompt, output, arguments.seed, arguments.steps)
    print(f"wrote {path}: {sides}")


def info(arguments: argparse.Namespace) -> None:
    from maskunet_core.files.checkpoint import describe

    from .embedding.word import word_summary
    from .summary import summary

    if lines := word_summary(arguments.file):
        print("\n".join(lines))
        return
    description = describe(arguments.file)
    print("\n".join(summary(description)), end="\n\n")
    for name, value in description.items():
        print(f"{name}: {json.dumps(value, indent=2) if isinstance(value, dict) else value}")


def convert(arguments: argparse.Namespace) -> None:
    require_folder(arguments.output.parent)
    require_free(arguments.output, arguments.overwrite)
    from .convert import convert

    print(f"wrote {convert(arguments.generators, arguments.adapters, arguments.output, arguments.family)}")


def toy(arguments: argparse.Namespace) -> None:
    enter_host(cpu=True)
    from .evaluate import Protocol
    from .toy.train import Recipe, train_toy

    recipe, protocol = (Recipe.quick(), Protocol.quick()) if arguments.quick else (Recipe(), Protocol())
    train_toy(recipe, arguments.output, protocol)


def toy_transformer(arguments: argparse.Namespace) -> None:
    enter_host(cpu=True)
    from maskunet_core.toy.model import WEIGHTS

    from .evaluate import Protocol
    from .toy.transformer import TransformerRecipe, train_transformer

    quick = TransformerRecipe.quick(), Protocol.quick()
    recipe, protocol = quick if arguments.quick else (TransformerRecipe(), Protocol())
    train_transformer(recipe, arguments.output, protocol, arguments.base or WEIGHTS)


def toy_bodies(arguments: argparse.Namespace) -> None:
    require_folder(arguments.output)
    require_free(arguments.output / "table.json", arguments.overwrite)
    enter_host(cpu=True)
    from .evaluate import Protocol
    from .toy.bodies import compare_bodies

    protocol = Protocol.quick() if arguments.quick else Protocol()
    compare_bodies(protocol, arguments.output, str(arguments.base) if arguments.base else "")


def compare(arguments: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    enter_host(cpu=True)
    from .compare.plan import WORLDS, Scale
    from .compare.run import compare

    scale = Scale.quick(arguments.body) if arguments.quick else Scale.of(arguments.body)
    known = {task.world for task in scale.tasks}
    if unknown := set(arguments.task or ()) - known:
        choice = ", ".join(sorted(known))
        raise MaskUNetError(f"There is no task {', '.join(sorted(unknown))} on the {arguments.body}: choose {choice}.")
    compare(arguments.output, scale, arguments.jobs, tuple(arguments.task or WORLDS))


def reward_compare(arguments: argparse.Namespace) -> None:
    enter_host(cpu=True)
    from .reward_compare.plan import Scale
    from .reward_compare.run import reward_compare

    whole = Scale.of(arguments.body, arguments.prompts, arguments.seeds)
    scale = Scale.quick(arguments.body) if arguments.quick else whole
    if unknown := set(arguments.method) - set(scale.methods):
        choice = ", ".join(scale.methods)
        raise MaskUNetError(f"There is no method {', '.join(sorted(unknown))}: choose among {choice}.")
    reward_compare(arguments.output, scale, arguments.jobs, arguments.method)


def word_compare(arguments: argparse.Namespace) -> None:
    enter_host(cpu=True)
    from .embedding.study import Scale, word_compare

    print(word_compare(arguments.output, Scale.quick() if arguments.quick else Scale()))


def _add_configuration(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", help="a TOML file, or the name of a preset (toy, toy_reward, sd15, ...)")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, for instance loop.steps=500"
    )


def _number(least: int) -> Callable[[str], int]:
    """Reads a whole number from `least` on that fits into 64 bits."""

    def number(text: str) -> int:
        if least <= (value := int(text)) < 2**63:
            return value
        raise argparse.ArgumentTypeError(f"{text} is too small or too large: the least is {least}")

    return number


def _add_body(command: argparse.ArgumentParser) -> None:
    command.add_argument("--body", choices=BODIES, default=BODIES[0], help="of the toy model (default: %(default)s)")


def _add_overwrite(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--overwrite", action="store_true", help=f"replace {what}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("train", help="train a mask generator, or a baseline", epilog=CAPTIONS)
    _add_configuration(command)
    _add_overwrite(command, "the training that the output folder holds")
    command.set_defaults(run=train)

    command = commands.add_parser("resume", help="go on with a run that was stopped")
    command.add_argument("folder", type=user_path, help="the run's output folder")
    command.set_defaults(run=resume)

    command = commands.add_parser(
        "check", help="read configuration, model and data; tell memory and time; train nothing"
    )
    _add_configuration(command)
    command.set_defaults(run=check)

    command = commands.add_parser("evaluate", help="judge generators and LoRAs on prompts and noises not trained on")
    command.add_argument("generator", type=user_path, nargs="?", help="generator file; without one the base alone")
    command.add_argument(
        "--method", action="append", default=[], help="beside it: lora:FILE, full:FILE or generator:FILE; several times"
    )
    command.add_argument("--base", default="", help="folder of other toy weights (default: the shipped ones)")
    _add_body(command)
    command.add_argument("--output", type=user_path, default=Path("output/evaluate"), help="folder for the table")
    _add_overwrite(command, "the table that the folder holds")
    command.add_argument("--cfg", type=float, help="of the pictures; 1 is without guidance (default: 5)")
    command.add_argument("--quick", action="store_true", help="few pictures, to see that it works")
    command.set_defaults(run=evaluate)

    command = commands.add_parser("compare", help="masks beside what else could be trained, at equal data and steps")
    command.add_argument(
        "--output", type=user_path, default=Path("output/compare"), help="folder for tables and figures"
    )
    command.add_argument("--jobs", type=_number(1), default=os.cpu_count() or 1, help="processes at once, of a thread")
    _add_body(command)
    command.add_argument("--task", action="append", choices=("noise", "style", "subject"), help="only this one")
    command.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    command.set_defaults(run=compare)

    command = commands.add_parser("reward-compare", help="the search for masks beside best-of-N and other rivals")
    command.add_argument(
        "--output", type=user_path, default=Path("output/reward-compare"), help="folder for table and plot"
    )
    command.add_argument("--body", choices=BODIES, default=BODIES[0], help="what draws (default: %(default)s)")
    command.add_argument("--method", action="append", default=[], help="only this one; may be given several times")
    command.add_argument("--prompts", type=_number(1), help="another number of prompts")
    command.add_argument("--seeds", type=_number(1), help="another number of seeds")
    command.add_argument("--jobs", type=_number(1), default=os.cpu_count() or 1, help="processes at once, of a thread")
    command.add_argument("--quick", action="store_true", help="few prompts, to see that it works")
    command.set_defaults(run=reward_compare)

    add_benchmark(commands)

    command = commands.add_parser("word-compare", help="what learned words gain, alone and with masks")
    command.add_argument("--output", type=user_path, default=Path("output/word-compare"), help="folder for the table")
    command.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    command.set_defaults(run=word_compare)

    command = commands.add_parser("sample", help="draw prompts without and with a generator or a learned word")
    command.add_argument("generator", type=user_path, help="generator file, or a learned word: {} in prompts")
    command.add_argument("--prompt", action="append", required=True, help="a prompt; may be given several times")
    command.add_argument(
        "--base", default="toy", help='a checkpoint file, the TOML file of a training, or "toy" (default)'
    )
    _add_body(command)
    command.add_argument(
        "--output", type=user_path, help=f"the picture to write (default: {SHEET}, with a number where it exists)"
    )
    _add_overwrite(command, "the picture where it exists")
    command.add_argument("--seed", type=_number(-(2**62)), default=0)
    command.add_argument("--steps", type=_number(1), default=20)
    command.set_defaults(run=sample)

    command = commands.add_parser("info", help="tell what a file of a training says of itself")
    command.add_argument("file", type=user_path, help="generator file, or a learned word")
    command.set_defaults(run=info)

    command = commands.add_parser("convert", help="convert the authors' .pth files to a generator file")
    command.add_argument("generators", type=user_path, help="mask_generators.pth")
    command.add_argument("adapters", type=user_path, help="adapters.pth")
    command.add_argument("output", type=user_path, help="the .safetensors file to write")
    _add_overwrite(command, "the file where it exists")
    command.add_argument("--family", default="SD 1.5", help="base model that they were trained for (default: SD 1.5)")
    command.set_defaults(run=convert)

    command = commands.add_parser("toy", help="train the embedded toy model from nothing")
    command.add_argument(
        "--output", type=user_path, default=Path("output/toy"), help="folder for the five weight files"
    )
    command.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it works")
    command.set_defaults(run=toy)

    command = commands.add_parser("toy-transformer", help="train the toy world's transformer, beside its U-Net")
    command.add_argument("--base", type=user_path, help="folder of other toy weights (default: the shipped ones)")
    command.add_argument(
        "--output", type=user_path, default=Path("output/toy_transformer"), help="folder for the weight files"
    )
    command.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    command.set_defaults(run=toy_transformer)

    command = commands.add_parser("toy-bodies", help="judge the toy's U-Net and transformer at equal cost per picture")
    command.add_argument("--base", type=user_path, help="folder of other toy weights (default: the shipped ones)")
    command.add_argument("--output", type=user_path, default=Path("output/toy_bodies"), help="folder for the table")
    _add_overwrite(command, "the table that the folder holds")
    command.add_argument("--quick", action="store_true", help="few pictures, to see that it works")
    command.set_defaults(run=toy_bodies)

    return parser.parse_args(arguments)


def _about_files(error: OSError) -> str:
    """A sentence for a file that cannot be read or written, wherever that was noticed."""
    name = f"'{error.filename}'" if error.filename else "A file"
    if error.errno in NO_ROOM:
        return f"{name} does not fit on the disk: free some space, and give the same command again."
    return f"{name} cannot be read or written ({error.strerror or error}): mend that, or name another place."


def _one_voice() -> None:
    """TensorBoard writes in a thread, whose errors of the system the main thread gets, too: they are told there."""
    before = threading.excepthook
    threading.excepthook = lambda told: None if isinstance(told.exc_value, OSError) else before(told)


def main() -> int:
    _one_voice()
    for stream in (sys.stdout, sys.stderr):
        # Not every terminal or file has the letters of every prompt and every name of a file.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = parse(sys.argv[1:])
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except MaskUNetError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever was reading has read enough, as `| head` does; what Python says at its end would fail, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(_about_files(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        told = str(stopped) or "Stopped. The same command goes on from what is saved, where it saves anything."
        print(f"\n{told}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
