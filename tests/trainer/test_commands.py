"""The trainer's commands as a user types them."""

import json
import os
import subprocess
import sys

import pytest

from maskunet_core.files import checkpoint
from tests.builders import make_generator, trainer_command
from trainer.__main__ import parse
from trainer.evaluate import Protocol
from trainer.host import PROJECT


def test_evaluate_prints_its_table_and_writes_it_twice(command, monkeypatch, tmp_path, toy_structure):
    few = Protocol(loss_pictures=64, prompts=2, pictures=4, steps=3)
    monkeypatch.setattr(Protocol, "quick", lambda: few)
    path = tmp_path / "generator.safetensors"
    checkpoint.save(path, make_generator(toy_structure, lively=True), "decoder attention", {})
    result = command("evaluate", str(path), "--quick", "--cfg", "2", "--output", str(tmp_path / "table"))
    assert result.returncode == 0, result.stderr
    table = json.loads((tmp_path / "table" / "table.json").read_text())
    assert [row["model"] for row in table["rows"]] == ["base", "generator:generator.safetensors"]
    for column in ("loss", "one", "two", "relation", "frechet"):
        assert column in table["rows"][1]
    assert (tmp_path / "table" / "table.md").read_text() in result.stdout
    assert table["machine"]["torch"]
    assert table["settings"]["cfg"] == 2


def test_info_tells_what_a_file_says_of_itself(command, tmp_path, toy_structure):
    path = tmp_path / "generator.safetensors"
    checkpoint.save(path, make_generator(toy_structure), "decoder attention", {"seconds": 5})
    result = command("info", str(path))
    assert result.returncode == 0, result.stderr
    for line in (
        "architecture: low_rank",
        "base model: the MaskUNet toy model",
        "32 layers, 524,288 weights",
        '"rank": 8',
    ):
        assert line in result.stdout
    first = result.stdout.splitlines()[0]
    assert first.startswith("generator.safetensors, ")
    assert first.endswith("for the MaskUNet toy model.")


def test_sample_draws_prompts_without_and_with_a_generator(tmp_path, toy_structure):
    from PIL import Image

    path = tmp_path / "generator.safetensors"
    checkpoint.save(path, make_generator(toy_structure, lively=True), "decoder attention", {})
    sheet = tmp_path / "sheet.png"
    prompts = ("--prompt", "a red circle", "--prompt", "a green star")
    result = trainer_command("sample", str(path), *prompts, "--steps", "3", "--output", str(sheet))
    assert result.returncode == 0, result.stderr
    with Image.open(sheet) as image:
        # Each picture of 64 pixels is enlarged to 256, and has its prompt above it.
        assert image.width >= 2 * 256
        assert image.height >= 2 * (256 + 20)


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe breaks in another way there")
def test_what_the_output_cannot_take_stops_no_command(tmp_path, toy_structure):
    """Letters that a terminal does not have, and a reader that has read enough."""
    path = tmp_path / "größe.safetensors"
    checkpoint.save(path, make_generator(toy_structure), "decoder attention", {})
    result = trainer_command("info", str(path), env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert result.stdout.startswith(r"gr\xf6\xdfe.safetensors, ")
    assert (result.returncode, result.stderr) == (0, "")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "trainer", "info", str(path)]
    result = subprocess.run(command, cwd=PROJECT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("compare", "--jobs", "0"),
        ("reward-compare", "--jobs", "-1"),
        ("sample", "g.safetensors", "--prompt", "x", "--steps", "0"),
        ("sample", "g.safetensors", "--prompt", "x", "--seed", str(2**70)),
    ],
)
def test_numbers_that_no_command_can_use_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        parse(list(arguments))
    assert f"{arguments[-1]} is too small or too large" in capsys.readouterr().err


def test_help_says_how_captions_are_read(capsys):
    with pytest.raises(SystemExit):
        parse(["train", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert r"zoro \(one piece\)" in told
    assert "What exceeds 75 tokens (some 50 words) is cut" in told


def test_check_tells_cost_and_trains_nothing(tmp_path):
    output = tmp_path / "run"
    result = trainer_command("check", "toy", "--set", f"output={output}")
    assert result.returncode == 0, result.stderr
    assert "Estimated peak memory: " in result.stdout
    assert "Estimated time: " in result.stdout
    assert "20,000 pictures, up to 64x64" in result.stdout
    assert not output.exists()


def test_a_file_that_does_not_exist_gets_one_sentence():
    """By a process of its own, whose imports are those of the command alone."""
    result = trainer_command("evaluate", "nothing.safetensors", "--quick")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("'nothing.safetensors' does not exist")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("train", "nothing.toml"), "'nothing.toml' does not exist. Name a TOML file or a preset"),
        (("convert", "a.pth", "b.pth", "c.safetensors"), "'a.pth' does not exist."),
        (("info", "nothing.safetensors"), "'nothing.safetensors' does not exist"),
        (("resume", "nothing"), "'nothing' holds no run (no config.json)."),
        (("train", "toy", "--set", "loop.stps=3"), "loop.stps: unknown key"),
        (("train", "toy", "--set", "optimiser.name=Nothing"), "torch.optim has no 'Nothing'"),
    ],
)
def test_bad_input_gets_one_sentence(command, arguments, sentence):
    result = command(*arguments)
    assert result.returncode == 2
    assert sentence in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
