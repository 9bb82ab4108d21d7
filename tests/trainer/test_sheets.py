"""Sheets of pictures, and what a file says of itself in a few lines."""

import torch
from PIL import ImageChops

from trainer.files import free_path
from trainer.sheets import side_by_side
from trainer.summary import summary


def test_a_sheet_is_large_and_bears_its_prompts():
    left, right = torch.zeros(2, 64, 64, 3), torch.ones(2, 64, 64, 3)
    sheet = side_by_side(["a red circle", "a green star"], left, right)
    assert sheet.width > 2 * 256
    dark = sheet.convert("L").point(lambda value: 255 * (value == 0)).getcolors()
    # Both pictures of the left column, each four times as wide and high.
    assert {colour: count for count, colour in dark}[255] >= 2 * 256 * 256
    unlabelled = side_by_side(["", ""], left, right)
    assert unlabelled.size == sheet.size
    changed = ImageChops.difference(sheet, unlabelled).getbbox()
    assert changed is not None
    assert changed[2] < sheet.width // 2


def test_a_long_prompt_takes_several_lines():
    picture = torch.zeros(1, 512, 512, 3)
    short, long = (side_by_side([text], picture, picture) for text in ("a cat", "a cat " * 80))
    assert long.width == short.width
    assert long.height > short.height + 40


def test_a_default_name_gets_a_number(tmp_path):
    assert free_path(tmp_path / "samples.png") == tmp_path / "samples.png"
    for name in ("samples.png", "samples_2.png"):
        (tmp_path / name).touch()
    assert free_path(tmp_path / "samples.png") == tmp_path / "samples_3.png"


def test_a_summary_says_whether_training_helped():
    best = {"loss": 1.011, "change": -0.177, "error": 0.02, "step": 60}
    training = {"config": {"data": {"path": "pets"}, "loop": {"steps": 80}}, "base": "toy", "step": 60, "seconds": 35}
    description = {"file": "a", "architecture": "b", "base model": "c", "targets": "d"}
    lines = summary(description | {"training": training | {"validation": best}})
    assert len(lines) == 4
    assert lines[2] == "Trained on pets, base toy: the state after step 60 of 80, 35 s."
    assert lines[3] == (
        "It helped: the held-out loss was 1.1880 before and is 1.0110 at the best step, 60 (-14.9% ± 1.7%)."
    )
    unsure = summary(description | {"training": training | {"validation": best | {"error": 0.1}}})[3]
    assert unsure.startswith("It may have helped, but by less than can be told from chance")
    none = summary(description | {"training": training | {"validation": best | {"change": 0.0, "step": 0}}})[3]
    assert none.startswith("It did not help")
    assert summary(description | {"training": {}}) == lines[:2]
