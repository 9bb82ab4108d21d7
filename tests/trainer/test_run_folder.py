"""A run's folder: nothing in it is lost unasked, one process writes into it, and it goes on wherever it lies."""

import errno
import json
import logging
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from maskunet_core.files import checkpoint
from maskunet_core.replacing import replacing
from trainer import __main__ as command_line
from trainer.config import Config
from trainer.config_file import parse_config
from trainer.files import Occupied
from trainer.job_board import InUse
from trainer.logs import Log
from trainer.loop import DiskFull, Run
from trainer.run_folder import CannotResume, RunExists, Stopped, occupied, resume_command
from trainer.train import resume, start

STOP_AT = 2


def config_of(output: Path | str, cache: Path | str = "cache", **changes) -> Config:
    values = {
        "output": str(output),
        "data": {"pictures": 24, "cache": str(cache)},
        "generator": {"width": 8},
        "loop": {"steps": 4, "batch": 4, "precision": "fp32"},
        "validation": {"pictures": 4, "every": 2},
    }
    return parse_config(values | changes)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Twelve of them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(12):
        Image.new("RGB", (64, 64), (20 * n, 90, 200)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text("a red circle", encoding="utf-8")
    return folder


def interrupted(config: Config, monkeypatch) -> str:
    """Ctrl-C in the second step; what the run says to it."""
    step = Log.step

    def then_stop(log, run, loss, observed):
        step(log, run, loss, observed)
        if run.step == STOP_AT:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "step", then_stop)
        with pytest.raises(Stopped) as caught:
            start(config)
    return str(caught.value)


def files_in(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def module_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "state" / "last.pt", weights_only=True)["module"]


def command(monkeypatch, *arguments: str) -> int:
    """`python -m trainer ...` in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["trainer", *map(str, arguments)])
    return command_line.main()


# Nothing is replaced unasked ------------------------------------------------------------------------------------


def test_a_training_is_replaced_only_when_asked(tmp_path):
    output = tmp_path / "run"
    path = start(config_of(output))
    before = files_in(output)
    with pytest.raises(RunExists) as caught:
        start(config_of(output, seed=1))
    for way in (resume_command(output), "--set output=FOLDER", "--overwrite"):
        assert way in str(caught.value)
    assert files_in(output) == before
    (output / "samples").mkdir()
    (output / "samples" / "000002.png").touch()
    (output / "mine.png").touch()
    assert start(config_of(output, seed=1), overwrite=True) == path
    assert checkpoint.load(path).training["config"]["seed"] == 1
    assert "samples/000002.png" not in files_in(output)
    assert "mine.png" in files_in(output)


def test_a_run_that_made_no_step_is_no_loss(tmp_path, monkeypatch):
    def fail(run):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Run, "run", fail)
        with pytest.raises(MemoryError):
            start(config_of(tmp_path / "run"))
    assert start(config_of(tmp_path / "run", seed=1)).exists()


def test_a_file_of_the_runs_name_is_kept(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.safetensors").write_text("mine")
    with pytest.raises(RunExists, match=r"holds a training already \(run\.safetensors\)"):
        start(config_of(tmp_path / "run"))


def test_one_process_trains_in_a_folder(tmp_path, monkeypatch):
    config = config_of(tmp_path / "run")
    interrupted(config, monkeypatch)
    with occupied(tmp_path / "run"):
        for again in (lambda: start(config, overwrite=True), lambda: resume(tmp_path / "run")):
            with pytest.raises(InUse, match=r"Another process trains in .*another folder by `--set output=FOLDER`"):
                again()
    assert resume(tmp_path / "run").exists()


def test_other_commands_replace_nothing_unasked(tmp_path, monkeypatch, capsys):
    mine = tmp_path / "mine.png"
    mine.write_text("mine")
    (tmp_path / "table.json").write_text("mine")
    for arguments in (
        ("sample", "g.safetensors", "--prompt", "a red circle", "--output", mine),
        ("evaluate", "--quick", "--output", tmp_path),
        ("convert", "a.pth", "b.pth", mine),
    ):
        assert command(monkeypatch, *arguments) == 2
        assert "exists: name another file or folder, or replace it by --overwrite." in capsys.readouterr().err
    assert command(monkeypatch, "sample", "g.safetensors", "--prompt", "x", "--output", tmp_path) == 2
    assert "is a folder: name a file to write by --output" in capsys.readouterr().err
    assert mine.read_text() == (tmp_path / "table.json").read_text() == "mine"


# Going on -------------------------------------------------------------------------------------------------------


def test_ctrl_c_names_the_step_and_the_whole_command(tmp_path, monkeypatch):
    told = interrupted(config_of(tmp_path / "my run"), monkeypatch)
    assert told == f"Stopped. Step 2 is saved; `{resume_command(tmp_path / 'my run')}` goes on from there."
    assert resume_command(Path("my run")) in ("python -m trainer resume 'my run'", 'python -m trainer resume "my run"')


def test_a_copied_run_goes_on_in_the_copy_with_the_same_bits(tmp_path, monkeypatch):
    interrupted(config_of(tmp_path / "run"), monkeypatch)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    before = files_in(tmp_path / "run")
    # The best state so far bears the run's name, and must not stay behind beside another file.
    assert resume(tmp_path / "copy") == tmp_path / "copy" / "run.safetensors"
    assert files_in(tmp_path / "run") == before
    resume(tmp_path / "run")
    first, second = module_of(tmp_path / "run"), module_of(tmp_path / "copy")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_with_relative_paths_goes_on_from_any_folder(tmp_path, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    data = {"path": "pictures", "cache": "cache"}
    interrupted(config_of("run", data=data), monkeypatch)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = resume(Path("../run"))
    assert path.resolve() == (tmp_path / "run" / "run.safetensors").resolve()
    assert Path.cwd() == tmp_path / "elsewhere"
    assert not any((tmp_path / "elsewhere").iterdir())


def test_what_cannot_be_resumed_says_why_and_what_to_do(tmp_path, monkeypatch):
    run = tmp_path / "run"
    interrupted(config_of(run), monkeypatch)
    settings = run / "config.json"
    values = json.loads(settings.read_text())
    values["loop"]["steps"] = 9
    settings.write_text(json.dumps(values))
    sentence = r"another configuration: loop\.steps was 4 and is 9\. Set that back in '.*config\.json', or train"
    with pytest.raises(CannotResume, match=sentence):
        resume(run)
    values["loop"]["steps"] = 4
    settings.write_text(json.dumps(values))
    state = run / "state" / "last.pt"
    whole = torch.load(state, weights_only=True)
    for other, sentence in (([], "is not the state of a run"), (whole | {"config": "of old"}, "is of another version")):
        torch.save(other, state)
        with pytest.raises(CannotResume, match=sentence):
            resume(run)
    lacking = {name: value for name, value in whole.items() if name != "optimiser"}
    foreign = whole | {"module": {name: value[..., :1] for name, value in whole["module"].items()}}
    for other in (lacking, foreign):
        torch.save(other, state)
        with pytest.raises(CannotResume, match="is of another version of the trainer"):
            resume(run)
    torch.save(whole, state)
    # torch has an error of another kind for each of them.
    for damaged in (state.read_bytes()[:1000], b"", b"\x80\x02h\x05."):
        state.write_bytes(damaged)
        with pytest.raises(CannotResume, match=r"last\.pt' is damaged \(.*\)\. Start the run anew .* --overwrite"):
            resume(run)
    state.unlink()
    with pytest.raises(CannotResume, match=r"holds no saved state\. Start the run anew .* --overwrite"):
        resume(run)
    settings.write_text("[" * 100_000)
    with pytest.raises(CannotResume, match=r"config\.json' is damaged"):
        resume(run)
    settings.write_text("[]")
    with pytest.raises(CannotResume, match="is not the configuration of a run"):
        resume(run)
    with pytest.raises(CannotResume, match=r"config\.json' is a file\. Name the output folder"):
        resume(settings)


def test_what_editors_and_crashes_leave_stops_no_run(tmp_path, monkeypatch):
    """A byte order mark, zeros where a machine lost power, and temporary files of processes that were killed."""
    run = tmp_path / "run"
    interrupted(config_of(run), monkeypatch)
    settings, log = run / "config.json", run / "log.csv"
    settings.write_text(settings.read_text(), encoding="utf-8-sig")
    log.write_bytes(log.read_bytes() + b"x,1,1,1,1,1\r\n\xff" + bytes(9) + b"\r\n")
    left = [run / ".0123abcd.tmp", run / "state" / ".4567cdef.tmp"]
    for path in (*left, run / ".mine.tmp"):
        path.touch()
    resume(run)
    assert [row.split(",")[0] for row in log.read_text().splitlines()] == ["step", "1", "2", "3", "4"]
    assert not any(path.exists() for path in left)
    assert (run / ".mine.tmp").exists()


def test_data_that_changed_meanwhile_is_told(tmp_path, monkeypatch, pictures, caplog):
    interrupted(config_of(tmp_path / "run", data={"path": str(pictures), "cache": str(tmp_path)}), monkeypatch)
    (pictures / "3.txt").write_text("a green star")
    Image.new("RGB", (64, 64), "white").save(pictures / "new.png")
    (pictures / "new.txt").write_text("a red circle")
    with caplog.at_level(logging.WARNING):
        resume(tmp_path / "run")
    assert "1 of its 12 pictures and captions are gone or changed, 2 are new" in caplog.text


# What a person is told ------------------------------------------------------------------------------------------


def test_a_run_says_what_it_held_out_whether_it_helped_and_what_next(tmp_path, pictures, capsys):
    values = {"path": str(pictures), "cache": str(tmp_path / "cache")}
    path = start(config_of(tmp_path / "run", data=values))
    told = capsys.readouterr().out
    assert "10 pictures, 2 more held out for validation (validation.pictures: 4, but at most a fifth)" in told
    best = checkpoint.load(path).training["validation"]
    assert f"the held-out loss was {best['loss'] - best['change']:.4f} before" in told
    assert "models/maskunet, press R in ComfyUI and choose it in MaskUNet Loader" in told.replace("\\", "/")


def test_a_place_that_is_a_file_is_told(tmp_path, monkeypatch, pictures, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(Occupied, match=r"file' is a file, so that '.*run' cannot be a folder"):
        start(config_of(tmp_path / "file" / "run"))
    keys = {"data.path": pictures, "data.cache": tmp_path / "file" / "x", "output": tmp_path / "run", "loop.batch": 4}
    changes = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    assert command(monkeypatch, "train", "toy", *changes) == 2
    told = capsys.readouterr().err
    assert "cannot be read or written" in told.splitlines()[-1]
    assert "Traceback" not in told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_first_state_on_a_full_disk_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    save = torch.save

    def full(state, file):
        with open("/dev/full", "wb") as disk:
            save(state, disk)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(DiskFull, match=r"No space left for .*last\.pt'.* then give the same command again"):
            start(config_of(tmp_path / "run"))
    assert start(config_of(tmp_path / "run")).exists()


def test_a_file_that_cannot_be_written_is_named_and_the_longest_name_can_be(tmp_path):
    path = tmp_path / ("n" * 255)
    with pytest.raises(OSError, match="nnn") as caught, replacing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(path)
    with replacing(path) as temporary:
        temporary.write_text("mine")
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_a_thread_that_the_main_one_gets_is_told_once(monkeypatch):
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    assert command(monkeypatch, "info", "nothing.safetensors") == 2

    def fail(error):
        raise error

    for error in (OSError(), ValueError()):
        thread = threading.Thread(target=fail, args=(error,))
        thread.start()
        thread.join()
    assert [of_thread.exc_type for of_thread in told] == [ValueError]


def test_a_log_on_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(log, name, rows):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Log, "_append", full)
    with pytest.raises(DiskFull, match=r"No space left for .*python -m trainer resume"):
        start(config_of(tmp_path / "run"))
