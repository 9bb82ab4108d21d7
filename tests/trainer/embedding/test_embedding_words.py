"""How a learned word stands in prompts, its gradient through the text encoder, and its file."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskunet_core.training.base import BaseModel, UnfitEmbedding
from trainer.embedding.word import BadText, LearnedWord, differentiable, word_of


def small_clip(words: dict[str, int], start: int, end: int, width: int, length: int):
    """The host's CLIP with a vocabulary of its own, random weights and no pretrained part."""
    import comfy.sd
    from comfy import sd1_clip, supported_models_base

    class Words:
        @classmethod
        def from_pretrained(cls, path, **options):
            return cls()

        def __call__(self, text):
            return {"input_ids": [start, *(words[word] for word in text.split()), end]}

        def get_vocab(self):
            return words

    layout = {"num_hidden_layers": 2, "hidden_size": width, "num_attention_heads": 2, "intermediate_size": width}
    layout |= {"hidden_act": "gelu", "max_position_embeddings": length, "eos_token_id": end}

    class Tokenizer(sd1_clip.SDTokenizer):
        def __init__(self, **options):
            super().__init__(max_length=length, embedding_size=width, tokenizer_class=Words, **options)

    class Model(sd1_clip.SDClipModel):
        def __init__(self, **options):
            special = {"start": start, "end": end, "pad": end}
            super().__init__(max_length=length, textmodel_json_config=layout, special_tokens=special, **options)

    class Clip(sd1_clip.SD1ClipModel):
        def __init__(self, **options):
            super().__init__(clip_model=Model, **options)

    class Tokens(sd1_clip.SD1Tokenizer):
        def __init__(self, **options):
            super().__init__(tokenizer=Tokenizer, **options)

    return comfy.sd.CLIP(supported_models_base.ClipTarget(Tokens, Clip), ["."])


@pytest.mark.parametrize(("case", "count"), [("one_vector", 1), ("three_vectors", 3)])
def test_vectors_stand_where_the_original_puts_them(golden, case, count, base, monkeypatch):
    """The original's rows before and after, which are no rows of a table, through the host's tokenizer and encoder."""
    names = ("ids", "embedded", "vectors", "out")
    ids, embedded, vectors, expected = (golden[f"insertion/{case}/{name}"] for name in names)
    clip = small_clip({"five": 5, "seven": 7, "eight": 8}, 900, 901, embedded.shape[2], embedded.shape[1])
    encoder = clip.cond_stage_model.clip_l
    encoder.transformer.requires_grad_(False)
    word = LearnedWord(BaseModel(base.patcher, clip, None), "new", "five", count)
    word.vectors["clip_l"].data.copy_(vectors)
    inputs, process = [], encoder.process_tokens
    monkeypatch.setattr(encoder, "process_tokens", lambda *args: inputs.append(process(*args)) or inputs[-1])
    for row, text in enumerate(("five {} seven", "{} eight {}")):
        found = word.ids(text)
        others = ids[row] != 265
        own = [i for i in found["clip_l"].tolist() if i >= 0]
        assert own == ids[row, others].tolist()[: len(own)]
        rows = embedded[row, others]
        monkeypatch.setattr(
            encoder.transformer,
            "get_input_embeddings",
            lambda rows=rows: lambda tokens, out_dtype: rows[None, : tokens.shape[1]],
        )
        word.encode({"clip_l": found["clip_l"][None]})
        assert torch.equal(inputs[-1][0][0], expected[row])


def real_clip(kind: str):
    """The host's text encoders of SD 2.x or SDXL in their widths, three layers deep, random weights."""
    import comfy.sd
    from comfy import sdxl_clip, supported_models_base
    from comfy.text_encoders import sd2_clip

    tokens, model = {
        "SD 2": (sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel),
        "SDXL": (sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel),
    }[kind]
    shallow = {f"clip_{letter}_model_config": {"num_hidden_layers": 3} for letter in "lgh"}
    import folder_paths

    folders = folder_paths.get_folder_paths("embeddings")
    clip = comfy.sd.CLIP(supported_models_base.ClipTarget(tokens, model), folders, model_options=shallow)
    stream = torch.Generator().manual_seed(0)
    for name, parameter in clip.cond_stage_model.named_parameters():
        parameter.requires_grad_(False).normal_(0, 0.02, generator=stream)
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
    return clip


@pytest.mark.parametrize("kind", ["toy", "SD 2", "SDXL"])
def test_what_is_trained_is_what_a_prompt_with_the_file_gives(kind, base, folder, monkeypatch):
    import comfy.sd1_clip

    if kind != "toy":
        base = BaseModel(base.patcher, real_clip(kind), None, kind)
    monkeypatch.setattr(base.model, "adm_channels", 2816 if kind == "SDXL" else 0, raising=False)
    stock = comfy.sd1_clip.load_embed
    word = LearnedWord(base, "new", "a", 2)
    for vectors in word.vectors.values():
        vectors.data.add_(0.1 * torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1)))
    word.save(folder / "new.safetensors", {})
    texts = ["a red {}", "{}, (large:1.0) and green", "{} left of {}"]
    found = [word.ids(text) for text in texts]
    conditions = word.encode({key: torch.stack([ids[key] for ids in found]) for key in found[0]})
    assert conditions["cross_attn"].requires_grad
    for n, text in enumerate(texts):
        ((context, options),) = base.clip.encode_from_tokens_scheduled(base.clip.tokenize(word.prompt(text)))
        torch.testing.assert_close(conditions["cross_attn"][n].detach(), context[0], rtol=1e-5, atol=1e-5)
        if kind == "SDXL":
            torch.testing.assert_close(conditions["pooled_output"][n].detach(), options["pooled_output"][0])
    empty = base.encode_text("a red")["cross_attn"]
    assert (conditions["cross_attn"][0].detach() - empty).abs().max() > 1e-2
    assert comfy.sd1_clip.load_embed is stock
    keys = {"toy": ["new"], "SD 2": ["new"], "SDXL": ["clip_g", "clip_l"]}[kind]
    assert sorted(load_file(folder / "new.safetensors")) == keys


def test_one_text_alone_is_encoded_bitwise_as_the_host_does(base, folder):
    word = LearnedWord(base, "new", "star red", 4)
    word.save(folder / "new.safetensors", {})
    ids = {key: found[None] for key, found in word.ids("a large {} above a ring").items()}
    expected = base.encode_text(word.prompt("a large {} above a ring"))["cross_attn"]
    assert torch.equal(word.encode(ids)["cross_attn"][0].detach(), expected)


def test_the_gradient_equals_central_differences_through_the_hosts_encoder(base):
    word = LearnedWord(base, "new", "star", 2)
    ids = {key: found[None] for key, found in word.ids("a red {} and a {}").items()}
    weights = torch.randn(word.encode(ids)["cross_attn"].shape, generator=torch.Generator().manual_seed(0))
    vectors = word.vectors["clip_l"]

    def value() -> torch.Tensor:
        return (word.encode(ids)["cross_attn"] * weights).double().sum()

    value().backward()
    for seed in range(4):
        direction = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed))
        step, ends = 1e-3, []
        with torch.no_grad():
            for sign in (1, -1):
                vectors.add_(sign * step * direction)
                ends.append(value().item())
                vectors.sub_(sign * step * direction)
        numerical = (ends[0] - ends[1]) / (2 * step)
        assert (vectors.grad * direction).sum().item() == pytest.approx(numerical, rel=2e-3, abs=2e-2)
    without = base.clip.cond_stage_model.clip_l
    rows = [[vectors[-1 - i] if i < 0 else i for i in ids["clip_l"][0].tolist()]]
    plain = without(rows)[0].sum()
    with pytest.raises(RuntimeError, match="inplace"):
        plain.backward()
    with differentiable(word.encoders):
        without(rows)[0].sum().backward()
    assert "forward" not in vars(without.transformer.text_model.encoder.layers[0].layer_norm1)


def test_an_embedding_of_another_model_is_refused(base, folder):
    save_file({"wide": torch.zeros(1, 768)}, folder / "wide.safetensors")
    with pytest.raises(UnfitEmbedding, match="768 numbers where the text encoder of toy takes 128"):
        base.encode_text("a red embedding:wide")
    with pytest.raises(UnfitEmbedding):
        LearnedWord(base, "new", "embedding:wide")


def test_a_words_file_of_another_model_is_refused(base, folder):
    word = LearnedWord(base, "new", "star")
    word.save(folder / "new.safetensors", {"config": {"embedding": {"start": "star"}}})
    assert torch.equal(word_of(folder / "new.safetensors", base).vectors["clip_l"], word.vectors["clip_l"])
    metadata = {"format": "embedding", "training": '{"config": {"embedding": {"start": "star"}}}'}
    save_file({"wide": torch.zeros(1, 768)}, folder / "wide.safetensors", metadata)
    with pytest.raises(UnfitEmbedding, match="takes 128"):
        word_of(folder / "wide.safetensors", base)


def test_what_a_word_begins_with(base, folder):
    word = LearnedWord(base, "new", "red star")
    table = base.clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight
    red, star = (table[i] for i in word.inner_ids("red star")["clip_l"])
    assert torch.equal(word.vectors["clip_l"].detach(), torch.stack([red, star]))
    assert word.nearest(1) == [["red"], ["star"]]
    assert word.told() == {"length": 1.0, "cosine": pytest.approx(1.0)}
    again = LearnedWord(base, "new", "red star", 3)
    assert torch.equal(again.vectors["clip_l"][2], red)
    word.save(folder / "old.safetensors", {})
    assert torch.equal(LearnedWord(base, "new", "embedding:old").vectors["clip_l"], word.vectors["clip_l"])
    with pytest.raises(BadText, match="2 tokens, more than"):
        LearnedWord(base, "new", "red star", 1)
    with pytest.raises(BadText, match="knows no word of 'dog'"):
        LearnedWord(base, "new", "dog")


def test_a_text_without_room_for_the_vectors_is_refused(base, folder):
    word = LearnedWord(base, "new", "a", 6)
    assert (word.ids("a large {}")["clip_l"] < 0).sum() == 6
    with pytest.raises(BadText, match="needs room for the 6 vectors"):
        word.ids("a large red circle left of a small blue square and {}")
    word.save(folder / "other.safetensors", {})
    with pytest.raises(BadText, match="no other embedding"):
        word.ids("{} embedding:other")
