"""The folder of a training run: what lies in it, who writes into it, and how to go on."""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskunet_core.errors import MaskUNetError
from maskunet_core.replacing import replacing
from maskunet_core.torch_file import Damaged, read_torch
from maskunet_core.training.run import STATE

from .config import Config, to_toml_values
from .config_file import parse_config
from .files import remove_unfinished, require_folder
from .job_board import alone

CONFIG = "config.json"
STARTED_IN = "started_in"
"""Key of config.json that no configuration has: the folder that relative paths start from."""
_LEFT_BY_RUNS = (
    STATE,
    CONFIG,
    "log.csv",
    "validation.csv",
    "layers.csv",
    "left_out.csv",
    "samples/[0-9]*.png",
    "tensorboard/events.out.tfevents.*",
)


_ANEW = "Start the run anew by `python -m trainer train`, with --overwrite or another output"


class RunExists(MaskUNetError):
    """The folder holds a run that a new one would replace."""


class CannotResume(MaskUNetError):
    """A folder without a saved state, or with one that cannot be read or is another configuration's."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C; the message says how to go on."""


def resume_command(folder: Path) -> str:
    """As it is typed."""
    quoted = shlex.quote(str(folder)) if os.name == "posix" else f'"{folder}"'
    return f"python -m trainer resume {quoted}"


@contextlib.contextmanager
def claimed(config: Config, overwrite: bool) -> Iterator[None]:
    """A new run has the folder for itself. Raises RunExists, InUse, or Occupied where a file lies in its place."""
    with occupied(Path(config.output)):
        if not overwrite and (sentence := earlier_run(config)):
            raise RunExists(sentence)
        yield


def earlier_run(config: Config) -> str:
    """What a new run would replace, and what to do instead; nothing where no step was made."""
    folder, found = Path(config.output), _left(config)
    if not found or _steps_made(folder) == 0:
        return ""
    names = ", ".join(path.relative_to(folder).as_posix() for path in found[:3])
    return (
        f"'{folder}' holds a training already ({names}): go on with it by `{resume_command(folder)}`, train into "
        "another folder by `--set output=FOLDER`, or replace it by --overwrite."
    )


@contextlib.contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """No other run writes into the folder. Raises InUse, or Occupied where a file lies in its place."""
    require_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder, "trains", "`--set output=FOLDER`"):
        for written in (folder, (folder / STATE).parent, folder / "samples"):
            remove_unfinished(written)
        yield


def clear(config: Config) -> None:
    """Remove what an earlier run left; nothing else that may lie in the folder."""
    for path in _left(config):
        path.unlink()


def _left(config: Config) -> list[Path]:
    """What an earlier run left, that of most worth first."""
    folder = Path(config.output)
    found = [path for pattern in _LEFT_BY_RUNS for path in sorted(folder.glob(pattern))]
    return [*(path for path in config.results if path.exists()), *found]


def _steps_made(folder: Path) -> int | None:
    """Of the saved state; None where there is none or it is damaged."""
    try:
        return read_state(folder).get("step")
    except CannotResume:
        return None


def read_state(folder: Path) -> dict[str, Any]:
    """The saved state, its tensors on the CPU. Raises CannotResume."""
    path = folder / STATE
    try:
        state = read_torch(path)
    except FileNotFoundError:
        raise CannotResume(f"'{folder}' holds no saved state. {_ANEW}.") from None
    except Damaged as error:
        raise CannotResume(f"'{path}' is damaged ({error.reason}). {_ANEW}.") from None
    if not isinstance(state, dict) or "config" not in state:
        raise CannotResume(f"'{path}' is not the state of a run. {_ANEW}.")
    return state


def write_config(config: Config) -> None:
    with replacing(Path(config.output) / CONFIG) as temporary:
        values = {STARTED_IN: str(Path.cwd()), **to_toml_values(config)}
        temporary.write_text(json.dumps(values, indent=2), encoding="utf-8")


@contextlib.contextmanager
def reopened(folder: Path) -> Iterator[Config]:
    """The configuration of the run in `folder`; inside the block relative paths mean what they meant to it.

    Raises CannotResume where there is none, BadConfig where it names what is no more.
    """
    path = folder / CONFIG
    if folder.is_file():
        raise CannotResume(f"'{folder}' is a file. Name the output folder of a run.")
    try:
        # Editors of Windows put a byte order mark first.
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CannotResume(f"'{folder}' holds no run (no {CONFIG}). Name the output folder of a run.") from None
    except (ValueError, RecursionError) as error:
        raise CannotResume(f"'{path}' is damaged ({error}). Start the run anew by `python -m trainer train`.") from None
    if not isinstance(values, dict):
        raise CannotResume(f"'{path}' is not the configuration of a run. Name the output folder of a run.")
    before, started_in = Path.cwd(), str(values.pop(STARTED_IN, "."))
    # The run may have come from another machine.
    os.chdir(started_in if os.path.isdir(started_in) else before)
    try:
        yield parse_config(values)
    finally:
        os.chdir(before)


def other_version(folder: Path) -> CannotResume:
    """For a state that holds something else than this version's."""
    return CannotResume(f"The state in '{folder}' is of another version of the trainer. {_ANEW}.")


def require_same(saved: str, config: Config, folder: Path) -> None:
    """saved: JSON of the configuration of a state. Raises CannotResume with all that differs."""
    try:
        then, now = _flat(json.loads(saved)), _flat(to_toml_values(config))
    except (ValueError, AttributeError, TypeError):
        raise other_version(folder) from None
    # A version that did not know a key yet did what its default does.
    then = _flat(to_toml_values(Config())) | then
    changed = [
        f"{key} was {json.dumps(then.get(key))} and is {json.dumps(now.get(key))}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
    ]
    if changed:
        raise CannotResume(
            f"The state in '{folder}' was saved with another configuration: {'; '.join(changed)}. Set that back in "
            f"'{folder / CONFIG}', or train with the new values into another folder by `--set output=FOLDER`."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def stopped(folder: Path) -> Stopped:
    """What Ctrl-C is answered with."""
    steps = _steps_made(folder)
    if steps is None:
        return Stopped("Stopped before a state was saved. The same command starts again; what is encoded is kept.")
    return Stopped(f"Stopped. Step {steps} is saved; `{resume_command(folder)}` goes on from there.")
