"""Judges that read a prompt: what it asks for, what they saw, and why a picture is wrong."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from maskunet_core.errors import MaskUNetError
from maskunet_core.judges import geneval, objects
from maskunet_core.judges.geneval import Found
from maskunet_core.judges.mask2former import Mask2Former
from maskunet_core.judges.objects import ObjectJudge
from maskunet_core.judges.pictures import levels
from maskunet_core.judges.rules import THINGS, UnreadableRules, parse
from maskunet_core.judges.toy import ToyJudge
from maskunet_core.rewards.clip import ClipReward
from maskunet_core.rewards.clip_layout import ClipLayout
from maskunet_core.toy.captions import UnreadablePrompt
from maskunet_core.toy.judge import fully_right, read
from maskunet_core.toy.vocabulary import SHAPES, pair_name
from tests.judge_files import GOLDEN, detector_tensors, write_detector
from tests.judge_weights import blobs, scaled, weights
from trainer.toy.world import Scenes, render, sample_captioned


def thing(name, count=1, **more):
    return {"class": name, "count": count, **more}


@pytest.mark.parametrize(
    ("text", "include", "exclude", "task"),
    [
        ("a photo of a bench", [thing("bench")], [], ""),
        ("a photo of three persons", [thing("person", 3)], [thing("person", 4)], "counting"),
        ("A photo of two wine  glasses.", [thing("wine glass", 2)], [thing("wine glass", 3)], "counting"),
        ("a photo of an orange orange", [thing("orange", color="orange")], [], ""),
        (
            "a photo of a black broccoli and a yellow cake",
            [thing("broccoli", color="black"), thing("cake", color="yellow")],
            [],
            "",
        ),
        ("a train above a potted plant", [thing("potted plant"), thing("train", position=["above", 0])], [], ""),
        (
            "2 clocks, blue fire hydrant, dog right of teddy bear, no people",
            [
                thing("clock", 2),
                thing("fire hydrant", color="blue"),
                thing("teddy bear"),
                thing("dog", position=["right of", 2]),
            ],
            [thing("clock", 3), thing("person")],
            "counting",
        ),
    ],
)
def test_prompts_and_lists_become_genevals_facts(text, include, exclude, task):
    assert parse(text) == ({"include": include, "exclude": exclude}, task)


def test_all_things_are_read_in_singular_and_plural():
    for name in THINGS:
        for word in (name, f"{name}s", f"{name}es", re.sub("y$", "ies", name)):
            assert parse(f"2 red {word}")[0]["include"] == [thing(name, 2, color="red")], word


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "There is nothing to look for: write what"),
        ("a portrait of a woman", 'cannot read "a portrait of a woman": it knows COCO\'s 80 things'),
        ("a keyboard", "the nearest are computer keyboard"),
        ("a shiny dog", 'cannot read "a shiny dog"'),
        ("99 dogs", "counts to 15 of a kind, not to 99"),
        ("a red apple and a green apple", 'cannot keep two kinds of "apple" apart'),
        ("no red dog", 'cannot read "no red dog": what is not to be there has no colour'),
        ("a bench, no dog left of a cat", 'cannot read "no dog left of a cat": what is not to be there'),
    ],
)
def test_what_cannot_be_asked_for_gets_a_sentence(text, told):
    with pytest.raises(UnreadableRules) as caught:
        parse(text)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("2 clocks", "1 clock, wanted 2"),
        ("no clock", "1 clock, wanted none"),
        ("1 dog", "2 dog, wanted at most 1"),
        ("a red clock", "clock: 1 blue, wanted 1 red"),
        ("a clock right of a bench", "clock left of bench, wanted right of"),
        ("a clock above a cup", "clock not beside cup, wanted above"),
        ("a clock left of a cat", "0 cat, wanted 1"),
        ("a dog left of a clock", "dog right of and below clock, wanted left of"),
    ],
)
def test_faults_are_told_in_few_words(text, fault):
    clock, bench, cup = Found((0, 0, 10, 10), 0.95), Found((80, 0, 90, 10), 0.95), Found((0, 0, 12, 12), 0.95)
    dogs = [Found((70, 70, 80, 80), 0.95), Found((75, 75, 85, 85), 0.95)]
    seen = {"clock": [clock], "bench": [bench], "cup": [cup], "dog": dogs}
    facts, task = parse(text)
    faults = geneval.judge(geneval.kept(seen, task), facts, lambda name, group: ["blue"] * len(group))
    assert faults[0].plain == fault


# The toy judge ---------------------------------------------------------------------------------------------------


def to_pillow(pictures: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((picture.movedim(0, -1) * 255).round().byte().numpy()) for picture in pictures]


@pytest.fixture(scope="module")
def toy_judge() -> ToyJudge:
    return ToyJudge()


@pytest.fixture(scope="module")
def world():
    stream = torch.Generator().manual_seed(7)
    scenes, captions = sample_captioned(40, stream)
    return scenes, captions, to_pillow(render(scenes, stream))


def test_the_toy_judge_says_what_the_benchmark_says(toy_judge, world):
    _, captions, pictures = world
    # Each picture by its own caption, and by that of another.
    asked = [*zip(pictures, captions), *zip(pictures, captions[1:])]
    said = [not toy_judge.bind(str(caption)).look(picture).faults for picture, caption in asked]
    pixels = torch.stack([levels(picture) for picture, _ in asked]) / 255
    right = fully_right(read(toy_judge.reader, pixels), [caption for _, caption in asked])
    assert said == right.tolist()
    assert 35 < sum(said) < 45


def test_the_toy_judges_boxes_lie_around_the_objects(toy_judge, world):
    scenes, captions, pictures = world
    for n, (caption, picture) in enumerate(zip(captions, pictures)):
        boxes = {seen.name: seen.box for seen in toy_judge.bind(str(caption)).look(picture).seen if seen.asked}
        for k in range(int(scenes.present[n].sum())):
            box = torch.tensor(boxes[pair_name(int(scenes.colour[n, k]) * len(SHAPES) + int(scenes.shape[n, k]))])
            (x, y), radius = scenes.centre[n, k], scenes.radius[n, k]
            around = torch.stack([x - radius, y - radius, x + radius, y + radius])
            assert (box - around).abs().max() < 5


def test_a_picture_of_another_size_is_read_and_marked_as_a_small_one(toy_judge, world):
    _, captions, pictures = world
    small = toy_judge.bind(str(captions[0])).look(pictures[0])
    large = toy_judge.bind(str(captions[0])).look(pictures[0].resize((256, 256), Image.Resampling.BICUBIC))
    assert large.faults == small.faults
    for one, other in zip(small.seen, large.seen):
        assert [4 * side for side in one.box] == pytest.approx(other.box, abs=4)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a red cross", "yes"),
        ("a blue ring", "no: blue ring missing; red cross not asked for"),
        ("a small red cross", "no: the red cross is large, wanted small"),
    ],
)
def test_the_toy_judge_tells_what_is_wrong(toy_judge, prompt, said):
    one = torch.tensor([[0, 0]])
    places, radii = torch.full((1, 2, 2), 32.0), torch.full((1, 2), 12.3)
    large_red_cross = Scenes(one == one - 1, one, one + 5, one + 1, places, radii, torch.zeros(1, 2))
    large_red_cross.present[:, 0] = True
    (picture,) = to_pillow(render(large_red_cross, torch.Generator().manual_seed(1)))
    assert str(toy_judge.bind(prompt).look(picture)) == said


def test_what_the_toy_judge_cannot_read_gets_a_sentence(toy_judge):
    with pytest.raises(
        UnreadablePrompt, match=r"The toy judge cannot read .* need another judge: see MaskUNet Judge L"
    ):
        toy_judge.bind("2 clocks")
    assert toy_judge.bind("a shiny red circle").unread == ("shiny",)


# The detector ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip() -> ClipReward:
    layout = json.loads((GOLDEN / "geneval_colour.json").read_text(encoding="utf-8"))["layout"]
    tensors = scaled(weights(layout, 21), {"positional_embedding": 0.3, "class_embedding": 0.3})
    two_heads = ClipLayout(quick=True, image_heads=2, text_heads=2)
    return ClipReward.from_tensors("clip", tensors, torch.float32, scaled=False, layout=two_heads)


def test_a_detector_from_its_file_judges_by_a_prompt(tmp_path):
    judge = objects.load(write_detector(tmp_path / "renamed.pth"))
    picture = blobs(64, 64, 2)
    right, wrong = (judge.bind(text).look(picture) for text in ("a baseball glove", "a bicycle and a carrot"))
    assert (judge.name, str(right)) == ("renamed", "yes")
    assert str(wrong) == "no: 0 bicycle, wanted 1"
    assert {seen.name for seen in right.seen if seen.asked} == {"baseball glove"}
    assert {seen.name for seen in right.seen} == {seen.name for seen in wrong.seen} > {"baseball glove"}


def test_colours_are_told_by_clip_and_refused_without_it(clip):
    detector = Mask2Former.from_tensors(detector_tensors())
    with pytest.raises(MaskUNetError, match=r"names a colour, .* put model\.safetensors of openai/clip-vit-large"):
        ObjectJudge("judge", detector, None).bind("a red baseball glove")
    judge = ObjectJudge("judge", detector, clip)
    verdicts = (judge.bind(f"a {colour} baseball glove").look(blobs(64, 64, 2)) for colour in geneval.COLOURS)
    seen = re.fullmatch("baseball glove: 1 (.+), wanted 1 .+", next(one.faults[0] for one in verdicts if one.faults))
    assert str(judge.bind(f"a {seen[1]} baseball glove").look(blobs(64, 64, 2))) == "yes"


def test_files_that_are_no_judge_get_a_sentence(tmp_path):
    page, other, panoptic = (tmp_path / name for name in ("page.pth", "other.safetensors", "panoptic.pth"))
    page.write_text("<html>")
    save_file({"x": torch.zeros(1)}, other)
    tensors = detector_tensors()
    tensors |= {
        "panoptic_head.cls_embed.weight": torch.zeros(134, 32),
        "panoptic_head.cls_embed.bias": torch.zeros(134),
    }
    torch.save(tensors, panoptic)
    for path in (page, other, tmp_path / "missing.pth"):
        with pytest.raises(MaskUNetError, match=rf"'{path.name}' is not GenEval's detector, .* models/judges"):
            objects.load(path)
    with pytest.raises(MaskUNetError, match="Mask2Former of 133 classes, not of COCO's 80 things"):
        objects.load(panoptic)
