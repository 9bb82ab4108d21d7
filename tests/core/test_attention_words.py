"""Which words of a prompt belong together, and at which tokens they stand."""

from dataclasses import replace

import pytest
import torch

from maskunet_core.attention.words import UnknownWord, UnreadablePrompt, Word, read, sets_as_told, sets_in


class Clip:
    """A tokeniser as the host's CLIP holds it: no weights are needed to tell words apart."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def tokenize(self, text):
        return self.tokenizer.tokenize_with_weights(text)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    import comfy.sd1_clip

    folder = tmp_path_factory.mktemp("embeddings")
    torch.save({"emb_params": torch.zeros(2, 768)}, folder / "style.pt")
    return Clip(comfy.sd1_clip.SD1Tokenizer(embedding_directory=str(folder)))


def plain_words(text):
    return [Word(word, (place,)) for place, word in enumerate(text.split(), 1)]


def found(text):
    return "; ".join(each.text for each in sets_in(plain_words(text)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red apple and a blue car", "red > apple; blue > car"),
        ("a furry spotted cat and a red wooden chair", "furry, spotted > cat; red, wooden > chair"),
        ("a cat and a frog", "cat; frog"),
        ("a red circle left of a small blue square", "red > circle; small, blue > square"),
        ("the apple is red and the sky is dark blue", "red > apple; dark, blue > sky"),
        ("a bowl on a red and blue table", "bowl; red, blue > table"),
        ("a red , white and blue flag", "red, white, blue > flag"),
        ("apple , blue car", "apple; blue > car"),
        ("two dogs , three old cats", "dogs; old > cats"),
        ("a blue - eyed cat", "blue, eyed > cat"),
        ("the of and .", ""),
        ("", ""),
    ],
)
def test_runs_of_words_are_sets_of_which_the_last_is_the_noun(text, expected):
    assert found(text) == expected


def test_words_have_the_places_of_their_pieces(clip):
    prompt = read(clip, "a checkered bowl, and a Blue canister")
    assert [(word.text, word.positions) for word in prompt.words] == [
        ("a", (1,)),
        ("checkered", (2, 3)),
        ("bowl", (4,)),
        (",", (5,)),
        ("and", (6,)),
        ("a", (7,)),
        ("blue", (8,)),
        ("canister", (9, 10)),
    ]
    assert prompt.prompt == tuple(range(1, 11))
    assert (prompt.tokens, prompt.chunk) == (77, 77)
    assert prompt.padded == tuple(range(1, 76))


def test_weights_in_brackets_take_no_places(clip):
    assert read(clip, "a (red:1.3) ((apple))").words == read(clip, "a red apple").words


def test_vectors_of_an_embedding_take_places_and_part_what_stands_beside_them(clip):
    prompt = read(clip, "red embedding:style apple")
    assert [(word.text, word.positions) for word in prompt.words] == [
        ("red", (1,)),
        ("", (2,)),
        ("", (3,)),
        ("apple", (4,)),
    ]
    assert [each.text for each in sets_in(prompt.words)] == ["red", "apple"]


def test_words_of_a_long_prompt_have_places_in_the_chunk_that_they_are_in(clip):
    text = "a quiet street, " * 25 + "a red apple"
    prompt = read(clip, text)
    tokens = [token for chunk in clip.tokenize(text)["l"] for token, _ in chunk]
    assert prompt.tokens == len(tokens) == 154
    apple = next(word for word in prompt.words if word.text == "apple")
    assert apple.positions[0] > 77
    assert tokens[apple.positions[0]] == clip.tokenizer.clip_l.tokenizer("apple")["input_ids"][1]
    assert sets_in(prompt.words)[-1].text == "red > apple"
    assert {76, 77} & {*prompt.padded, *prompt.prompt} == set()


def test_both_encoders_of_sdxl_have_the_same_places(clip):
    import comfy.sdxl_clip
    from comfy.text_encoders.sd2_clip import SD2Tokenizer

    text = "a checkered bowl and a (red:1.2) apple"
    expected = read(clip, text)
    for tokenizer, encoder in ((comfy.sdxl_clip.SDXLTokenizer(), "l"), (SD2Tokenizer(), "h")):
        prompt = read(Clip(tokenizer), text)
        assert prompt == replace(expected, encoder=encoder)


def test_a_text_encoder_of_another_kind_is_refused():
    class Other:
        tokenizer = None

        def tokenize(self, text):
            return {"l": [[]], "t5xxl": [[]]}

    with pytest.raises(UnreadablePrompt, match="the connected CLIP holds l, t5xxl"):
        read(Other(), "a red apple")


def told(clip, text, words):
    prompt = read(clip, text)
    return sets_as_told(prompt, words, clip)


def test_a_person_s_sets_count_as_they_are_written(clip):
    sets = told(
        clip, "a red small apple and a checkered bowl with a frog", "small, RED > apple; checkered > bowl\nfrog"
    )
    assert [(each.text, each.modifiers, each.noun) for each in sets] == [
        ("small, red > apple", ((3,), (2,)), (4,)),
        ("checkered > bowl", ((7, 8),), (9,)),
        ("frog", (), (12,)),
    ]


def test_a_modifier_is_the_one_that_is_nearest_to_its_noun_and_repeated_nouns_follow_each_other(clip):
    sets = told(clip, "a red car and a red bowl and a blue car", "red > bowl; red > car; blue > car")
    assert [(each.modifiers, each.noun) for each in sets] == [(((6,),), (7,)), (((2,),), (3,)), (((10,),), (11,))]


def test_a_word_may_be_several_words(clip):
    assert told(clip, "a red fire truck", "red > fire truck")[0].noun == (3, 4)


@pytest.mark.parametrize("words", ["red > car", "apple; apple", "red >", "> apple; blue"])
def test_words_that_the_prompt_does_not_hold_are_named(clip, words):
    with pytest.raises(UnknownWord, match=r"is not in the prompt, or not as often.* a red apple"):
        told(clip, "a red apple", words)
