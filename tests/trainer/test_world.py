import torch

from maskunet_core.toy import vocabulary
from maskunet_core.toy.vocabulary import COLOURS, RELATIONS, SHAPES
from trainer.toy.world import (
    Caption,
    Phrase,
    describe,
    misdescribe,
    render,
    sample_captioned,
    sample_scenes,
)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def test_objects_stay_inside_and_apart_and_are_told_apart():
    scenes = sample_scenes(3000, stream())
    inside = (scenes.centre - scenes.radius[..., None] >= 0) & (scenes.centre + scenes.radius[..., None] <= 64)
    two = scenes.present[:, 1]
    assert bool(inside[:, 0].all())
    assert bool(inside[two, 1].all())
    distance = (scenes.centre[two, 0] - scenes.centre[two, 1]).norm(dim=1)
    assert bool((distance >= scenes.radius[two].sum(1)).all())
    assert bool((scenes.pair[:, 0] != scenes.pair[:, 1]).all())
    assert 0.45 < two.float().mean() < 0.55


def test_pictures_show_the_colour_at_the_centre():
    scenes = sample_scenes(400, stream(1), two_objects=0.0)
    pictures = render(scenes, stream(2))
    assert pictures.shape == (400, 3, 64, 64)
    solid = [n for n in range(400) if SHAPES[scenes.shape[n, 0]] != "ring"]
    palette = torch.tensor(list(COLOURS.values()))
    for n in solid:
        x, y = scenes.centre[n, 0].long().tolist()
        nearest = (palette - pictures[n, :, y, x]).abs().sum(1).argmin()
        assert nearest == scenes.colour[n, 0]


def test_the_same_seed_gives_the_same_pictures():
    first, second = (render(sample_scenes(20, stream(3)), stream(4)) for _ in range(2))
    assert torch.equal(first, second)


def test_captions_tell_what_is_there():
    scenes = sample_scenes(500, stream(5))
    for n, caption in enumerate(describe(scenes, stream(6))):
        count = 1 + int(scenes.present[n, 1])
        assert {phrase.pair for phrase in caption.phrases} == set(scenes.pair[n, :count].tolist())
        if caption.relation is not None:
            index = [scenes.pair[n].tolist().index(phrase.pair) for phrase in caption.phrases]
            first, second = scenes.centre[n, index[0]], scenes.centre[n, index[1]]
            dx, dy = (second - first).tolist()
            truth = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}
            assert truth[RELATIONS[caption.relation]] == max(truth.values())


def test_captions_read_as_english():
    small_red, orange = Phrase(0, 0, 0), Phrase(4, 3, None)
    assert str(Caption((small_red,))) == "a small red circle"
    assert str(Caption((small_red, orange))) == "a small red circle and an orange star"
    assert str(Caption((orange, small_red), relation=0)) == "an orange star left of a small red circle"


def test_wrong_captions_are_wrong():
    captions = describe(sample_scenes(300, stream(7)), stream(8))
    noise = stream(9)
    assert all(misdescribe(caption, noise) != caption for caption in captions)


def test_training_never_meets_a_held_out_caption():
    _, training = sample_captioned(2000, stream(10), caption_noise=0.25)
    _, held_out = sample_captioned(500, stream(11), held_out=True)
    assert len(training) == 2000
    assert len(held_out) == 500
    assert not {str(caption) for caption in training} & {str(caption) for caption in held_out}


def test_every_word_of_a_caption_is_in_the_vocabulary():
    _, captions = sample_captioned(500, stream(12))
    for caption in captions:
        words = str(caption).split()
        assert len(vocabulary.encode(str(caption))) == len(words) + 2 <= vocabulary.MAX_TOKENS


def test_unknown_words_leave_no_trace():
    assert vocabulary.encode("A photo (in 4k) of a RED circle!") == vocabulary.encode("a of a red circle")
    assert vocabulary.encode("masterpiece") == [vocabulary.START, vocabulary.END]
    assert len(vocabulary.encode_padded("a red circle " * 20)) == vocabulary.MAX_TOKENS
