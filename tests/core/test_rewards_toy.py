"""The bundled toy reward, and how prompts of the toy world are read."""

import pytest
import torch

from maskunet_core.rewards.reward import value_and_gradient
from maskunet_core.rewards.toy import ToyReward
from maskunet_core.toy.captions import Caption, Phrase, UnreadablePrompt, parse
from trainer.toy.world import misdescribe, render, sample_captioned


@pytest.fixture(scope="module")
def reward():
    return ToyReward()


@pytest.fixture(scope="module")
def pictures():
    """300 rendered pictures and their captions."""
    stream = torch.Generator().manual_seed(7)
    scenes, captions = sample_captioned(300, stream)
    return render(scenes, stream), captions


def scores(reward, pictures, captions):
    return torch.cat([reward.bind(str(caption))(pictures[n : n + 1]) for n, caption in enumerate(captions)])


def test_every_caption_of_the_world_is_read_back():
    _, captions = sample_captioned(500, torch.Generator().manual_seed(3))
    assert {caption.kind for caption in captions} == {"one", "two", "relation"}
    for caption in captions:
        assert parse(str(caption)) == caption


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        ("red circle", Caption((Phrase(0, 0, None),))),
        ("A photo-realistic, BIG red circle, 8k!", Caption((Phrase(0, 0, 1),))),
        ("the red circle is over the little blue ring", Caption((Phrase(0, 0, None), Phrase(2, 4, 0)), 2)),
        ("a red circle to the left of a red square", Caption((Phrase(0, 0, None), Phrase(0, 1, None)), 0)),
    ],
)
def test_prompts_are_read_as_the_text_encoder_reads_them(prompt, caption):
    assert parse(prompt) == caption


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", 'cannot read the prompt ""'),
        ("a portrait of a woman", "name one object, or two joined by"),
        ("a circle", "colours: red, green"),
        ("a red circle a blue square", "cannot read"),
        ("a red circle and a blue square and a green star", "cannot read"),
        ("a red circle left of", "cannot read"),
        ("a red circle and a small red circle", "names the same coloured shape twice"),
    ],
)
def test_any_other_prompt_gets_one_sentence(reward, prompt, sentence):
    with pytest.raises(UnreadablePrompt, match=sentence) as caught:
        reward.bind(prompt)
    assert "\n" not in str(caught.value)


def test_pictures_of_the_prompt_score_near_zero_and_all_others_far_below(reward, pictures):
    shown, captions = pictures
    stream = torch.Generator().manual_seed(1)
    wrong = [misdescribe(caption, stream) for caption in captions]
    kept = [n for n, caption in enumerate(wrong) if len({p.pair for p in caption.phrases}) == len(caption.phrases)]
    right = scores(reward, shown, captions)
    assert right.min() > -1.0
    assert right.median() > -0.05
    assert scores(reward, shown[kept], [wrong[n] for n in kept]).max() < -3.0


@pytest.mark.parametrize("kind", ["size", "relation"])
def test_sizes_and_relations_count_where_they_are_said(reward, pictures, kind):
    shown, captions = pictures

    def turned(caption):
        if kind == "relation":
            return caption.relation is not None and Caption(caption.phrases, caption.relation ^ 1)
        first, *others = caption.phrases
        said = first.size is not None
        return said and Caption((Phrase(first.colour, first.shape, 1 - first.size), *others), caption.relation)

    those = [n for n, caption in enumerate(captions) if turned(caption)]
    assert len(those) > 20
    right = scores(reward, shown[those], [captions[n] for n in those])
    wrong = scores(reward, shown[those], [turned(captions[n]) for n in those])
    assert (right - wrong).min() > 3.0


def test_the_gradient_leads_from_a_wrong_picture_to_a_right_one(reward, pictures):
    """Plain gradient ascent on the pixels, twenty steps: the score of wrong pictures climbs."""
    bound = reward.bind("a red circle")
    images = pictures[0][:4]
    before, _ = value_and_gradient(bound, images)
    for _ in range(20):
        _, gradient = value_and_gradient(bound, images)
        images = images + gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert (bound(images) - before).min() > 5.0


def test_enlarged_pictures_score_as_the_small_ones(reward, pictures):
    shown, captions = pictures
    large = torch.nn.functional.interpolate(shown[:20], scale_factor=4, mode="bicubic")
    torch.testing.assert_close(
        scores(reward, large, captions[:20]), scores(reward, shown[:20], captions[:20]), rtol=0, atol=0.1
    )
