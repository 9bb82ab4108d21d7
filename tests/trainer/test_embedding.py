"""Learned words: how they stand in prompts, their gradient, their files, and training on the toy model."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from maskunet_core.files import checkpoint
from maskunet_core.toy.model import WEIGHTS, load_reader, load_toy_model
from maskunet_core.toy.vocabulary import COLOURS, SHAPES, SIZES
from tests.builders import trainer_command
from tests.trainer.test_methods import predict
from tests.trainer.test_train import assert_same, rows_of, state_of
from trainer.base import BaseModel, UnfitEmbedding, load_toy_base
from trainer.config import to_toml_values
from trainer.config_file import BadConfig, load_config, parse_config
from trainer.embedding.pictures import DescribedPictures
from trainer.embedding.relation import Steering, importance, negative_ids, steering_loss
from trainer.embedding.texts import LISTS, lines_of, scan_texts
from trainer.embedding.toy import DIAGONAL, lesson, shows, text_of
from trainer.embedding.word import BadText, LearnedWord, differentiable, word_of
from trainer.loop import Run
from trainer.seeds import seeded
from trainer.toy.judge import read
from trainer.toy.world import render
from trainer.train import check, load_data, make_accelerator, start

SHIPPED = WEIGHTS.with_name("generators") / "toy_shapes.safetensors"


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).with_name("words_golden.safetensors"))


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """ComfyUI's folder of embeddings."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


@pytest.fixture
def base(folder):
    return load_toy_base()


def values_of(tmp_path, **changes) -> dict:
    values = {
        "output": str(tmp_path / "mystar"),
        "method": "embedding",
        "data": {"pictures": 10, "cache": str(tmp_path / "cache")},
        "embedding": {"start": "a", "lr": 2e-2},
        "loop": {"steps": 6, "batch": 4, "precision": "fp32", "schedule": "constant", "warm_up": 0},
        "validation": {"every": 0},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return values


def config_of(tmp_path, **changes):
    return parse_config(values_of(tmp_path, **changes))


RELATION = {"embedding": {"kind": "relation", "toy": DIAGONAL, "start": "and", "lr": 2e-2}}


def make_run(config, base) -> Run:
    return Run(config, base, load_data(config, base), make_accelerator(config))


# In prompts -----------------------------------------------------------------------------------------------------


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


# Relations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "temperature"), [("one", 0.07), ("batch", 0.07), ("warm", 0.5)])
def test_the_steering_loss_is_the_originals(golden, case, temperature):
    table = golden["relation/table"].clone()
    placeholder, begin, end = 119, 117, 118
    vector = table[placeholder][None].clone().requires_grad_()
    ids = golden[f"relation/{case}/input_ids"].long()
    ids[ids == placeholder] = -1
    near = golden[f"relation/{case}/positive_ids"].long()
    near = near[(near != begin) & (near != end)]
    far = negative_ids(ids, torch.tensor([*range(40), begin, end]))
    loss = steering_loss(vector, table[near], table[far], temperature)
    loss.backward()
    torch.testing.assert_close(loss.detach()[None], golden[f"relation/{case}/loss"], rtol=1e-5, atol=0)
    expected = golden[f"relation/{case}/grad_placeholder"]
    assert (vector.grad[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_timesteps_are_drawn_by_the_originals_importance(golden):
    torch.testing.assert_close(importance(1000, 0.5), golden["relation/importance_p"], rtol=1e-6, atol=0)
    assert torch.equal(importance(1000, 0.0), torch.full((1000,), 1e-3))


def test_positives_are_words_of_relations_and_negatives_describe_the_things(base, tmp_path):
    run = make_run(config_of(tmp_path, **RELATION), base)
    steering, word = run.objective.steering, run.method.word
    batch = run.objective.draw(0)
    names = word.encoders[0].tokenizer.inv_vocab
    positives = {names[i] for i in batch.positives["clip_l"].flatten().tolist() if i >= 0}
    assert positives <= {"above", "below", "left", "right", "of"}
    described = {names[i] for i in negative_ids(batch.ids["clip_l"], steering._excluded["clip_l"]).tolist()}
    assert described
    assert described <= {*SIZES, *COLOURS, *SHAPES}
    drawn = torch.cat([run.objective.draw(step).timesteps for step in range(200)]).float()
    assert drawn.mean() == pytest.approx(601, abs=4 * 275 / 800**0.5)


def test_the_steering_loss_draws_the_vectors_to_words_of_relations(base, tmp_path):
    far = []
    for weight in (0.0, 10.0):
        embedding = RELATION["embedding"] | {"start": "red", "relation": {"weight": weight}}
        run = make_run(config_of(tmp_path, embedding=embedding), base)
        steering = Steering(run.method.word, run.config.embedding.relation)
        for _ in range(6):
            run.train_step()
        assert ("steering" in run.objective.told()) is (weight > 0)
        batch = run.objective.draw(0)
        far.append(steering(batch.ids, steering.drawn(4, seeded(0))).item())
    assert far[1] < far[0]


def test_word_lists_hold_words_of_one_text(base):
    for kind in ("object", "style"):
        texts = lines_of(LISTS / f"{kind}.txt")
        assert len(texts) == len(set(texts)) >= 15
        assert all(text.count("{}") == 1 for text in texts)
    words = lines_of(LISTS / "relations.txt")
    assert len(words) == len(set(words)) >= 40


def test_the_judge_tells_the_relation_from_those_of_the_vocabulary():
    reader, stream = load_reader("reader_b"), seeded(1)
    scenes, captions = lesson(DIAGONAL, 40, stream)
    assert shows(read(reader, render(scenes, stream)), captions, DIAGONAL).float().mean() > 0.9
    assert text_of(captions[0], DIAGONAL).count("{}") == 1
    turned = scenes[torch.arange(40)]
    turned.centre = scenes.centre.flip(1)
    assert not shows(read(reader, render(turned, stream)), captions, DIAGONAL).any()
    scenes, captions = lesson("star", 40, stream)
    assert all("star" in str(c) and "star" not in text_of(c, "star") for c in captions)
    assert shows(read(reader, render(scenes, stream)), captions, "star").float().mean() > 0.9


# Texts of pictures ----------------------------------------------------------------------------------------------


def pictures_in(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for n, name in enumerate(names):
        Image.new("RGB", (64, 64), (20 * n, 0, 0)).save(folder / name)
    return folder


def test_pictures_of_an_object_need_no_captions_and_may_have_some(tmp_path):
    data = pictures_in(tmp_path / "data", "a.png", "b.jpg", "c.png")
    (data / "b.txt").write_text("a red {}\n\na {} above a ring\n")
    (data / "text.json").write_text(json.dumps({"c.png": ["{} alone"]}))
    found = scan_texts(config_of(tmp_path, data={"path": str(data)})).require()
    assert [record.name for record in found] == ["a.png", "b.jpg", "c.png"]
    assert found[0].caption.split("\n") == lines_of(LISTS / "object.txt")
    assert [record.caption for record in found[1:]] == ["a red {}\na {} above a ring", "{} alone"]


def problems_of(values) -> str:
    with pytest.raises(BadConfig) as caught:
        parse_config(values)
    return str(caught.value)


def test_what_is_wrong_with_texts_is_told(tmp_path):
    data = pictures_in(tmp_path / "data", "a.png", "b.png")
    (data / "b.txt").write_text("a red ring")
    (data / "text.json").write_text(json.dumps({"lost.png": ["{}"]}))
    told = problems_of(values_of(tmp_path, data={"path": str(data)}, embedding={"kind": "relation"}))
    for sentence in (
        "'a.png' has no text that says what stands in the relation",
        "'a red ring' of 'b.png' lacks {}",
        "names 'lost.png', which is not there",
    ):
        assert sentence in told
    (data / "text.json").write_text("[1]")
    assert "must be of the form" in problems_of(values_of(tmp_path, data={"path": str(data)}))


def test_settings_that_learn_no_word_are_refused(tmp_path):
    for changes, sentence in (
        ({"embedding": {"start": " "}}, "embedding.start: is missing"),
        ({"embedding": {"toy": "dog"}}, "embedding.toy: is 'dog', but must be one of red"),
        ({"embedding": {"generator": "none.safetensors"}}, "embedding.generator: 'none.safetensors' does not exist"),
        ({"embedding": {"generator": str(SHIPPED)}, "method": "embedding+lora"}, "trains as well"),
        ({"embedding": {"texts": "none.txt"}}, "embedding.texts: the file 'none.txt' does not exist"),
        ({"output": str(tmp_path / "my star")}, "without spaces, brackets"),
        ({"output": str(tmp_path / "<R>")}, "without spaces, brackets"),
        ({"objective": "reward"}, 'objective must be "diffusion"'),
        ({"prior": {"prompt": "a star"}}, "class pictures lack the word"),
        ({"embedding": {"kind": "person"}}, "embedding.kind"),
    ):
        assert sentence in problems_of(values_of(tmp_path, **changes))


def test_pictures_of_relations_are_never_mirrored(tmp_path, base):
    data = pictures_in(tmp_path / "data", *(f"{n}.png" for n in range(4)))
    (data / "text.json").write_text(json.dumps({f"{n}.png": ["red {} ring"] for n in range(4)}))
    for kind, mirrored in (("object", True), ("relation", False)):
        changes = {"data": {"path": str(data), "resolution": 64}, "embedding": {"kind": kind}}
        found = load_data(config_of(tmp_path, **changes), base)
        assert isinstance(found, DescribedPictures)
        assert {len(sample.latents) for sample in found.data.samples} == {2 if mirrored else 1}
        make_run(config_of(tmp_path, **changes), base).train_step()


# Training -------------------------------------------------------------------------------------------------------


def test_a_removed_word_is_learned_back(base, tmp_path):
    """The held-out loss of pictures of stars falls below that of the start, by more than chance."""
    config = config_of(
        tmp_path,
        data={"pictures": 24},
        loop={"steps": 40, "batch": 8},
        validation={"every": 40, "pictures": 4, "prompts": ["a red {}"], "sample_every": 40, "sample_steps": 2},
    )
    stock = predict(base)
    run = make_run(config, base)
    run.run()
    assert run.best["step"] == 40
    assert run.best["change"] < -2 * run.best["error"]
    assert rows_of(run.folder / "validation.csv")[0]["change"] == "0.0"
    assert torch.equal(predict(base), stock)
    assert (run.folder / "samples" / "000040.png").exists()
    told = trainer_command("info", str(run.result)).stdout
    assert "mystar.safetensors: a learned word, vectors of 1 x 128 (mystar)" in told
    assert "embedding:mystar" in told
    assert "It helped: the held-out loss" in told
    sheet = tmp_path / "sheet.png"
    drawn = trainer_command("sample", str(run.result), "--prompt", "a red {}", "--steps", "4", "--output", str(sheet))
    assert "its start left, the word right" in drawn.stdout, drawn.stderr
    with Image.open(sheet) as image:
        left, right = (image.crop((x, 60, x + 190, 250)).tobytes() for x in (6, 280))
    assert left != right


@pytest.mark.parametrize("changes", [RELATION, {"method": "embedding+maskunet"}], ids=["relation", "with masks"])
def test_a_resumed_run_ends_with_the_same_bits(changes, tmp_path):
    values = {**changes, "loop": {"steps": 4, "ema": 0.9}, "validation": {"every": 2, "pictures": 2}}
    whole = config_of(tmp_path / "whole", **values)
    start(whole)
    stopped = config_of(tmp_path / "stopped", **values)
    first = make_run(stopped, load_toy_base())
    first.log.truncate(0)
    first.validate()
    for _ in range(2):
        first.train_step()
    first.validate()
    first.save_state()
    second = make_run(stopped, load_toy_base())
    second.load_state()
    second.run()
    assert_same(state_of(Path(whole.output)), state_of(Path(stopped.output)))
    for one, other in zip(whole.results, stopped.results):
        assert_same(load_file(one), load_file(other))


def test_a_word_and_masks_are_trained_together_into_two_files(base, tmp_path):
    config = config_of(tmp_path, method="embedding+maskunet", optimiser={"lr": 0.1, "lr_bias": 0.5})
    run = make_run(config, base)
    before = {name: p.detach().clone() for name, p in run.module.named_parameters()}
    run.run()
    assert all(not torch.equal(before[name], p) for name, p in run.module.named_parameters())
    generator = checkpoint.load(tmp_path / "mystar" / "mystar_maskunet.safetensors")
    assert generator.targets == "decoder attention"
    assert list(load_file(run.result)) == ["mystar"]
    with run.method.idle_sampling() as model:
        assert model is base.patcher


@pytest.mark.parametrize("beside", ["static_mask", "lora", "full"])
def test_every_method_of_weights_stands_beside_a_word(beside, base, tmp_path):
    run = make_run(config_of(tmp_path, method=f"embedding+{beside}", loop={"steps": 2}), base)
    run.run()
    assert [path.exists() for path in run.config.results] == [True, True]


def test_a_word_is_learned_under_a_trained_generator(base, tmp_path):
    losses = []
    for generator in ("", str(SHIPPED)):
        run = make_run(config_of(tmp_path, embedding={"generator": generator}), base)
        losses.append(run.train_step())
        with run.method.idle_sampling() as model:
            assert (model is base.patcher) is (not generator)
    assert losses[0] != losses[1]
    assert sum(p.numel() for p in run.module.parameters()) == 128


def test_checkpointing_gives_the_same_gradient(base, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        config = config_of(tmp_path, method="embedding+maskunet", loop={"checkpointing": checkpointing})
        run = make_run(config, base)
        run._forward_backward(run.objective.draw(0))
        gradients.append([p.grad for p in run.module.parameters()])
    for first, second in zip(*gradients):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-9)


def test_check_tells_memory_and_files(tmp_path, folder):
    told = " ".join(check(config_of(tmp_path, method="embedding+maskunet")))
    assert "10 pictures, up to 64x64" in told
    assert "mystar.safetensors, for ComfyUI's models/embeddings" in told
    assert "mystar_maskunet.safetensors, for ComfyUI's models/maskunet" in told
    assert "Estimated peak memory" in told


def test_a_new_run_replaces_both_files(tmp_path, folder):
    config = config_of(tmp_path, method="embedding+maskunet", loop={"steps": 1})
    start(config)
    config.results[1].write_bytes(b"old")
    start(config, overwrite=True)
    checkpoint.load(config.results[1])


def test_the_presets_of_the_toy_are_whole():
    for name, kind in (("toy_word", "object"), ("toy_relation", "relation")):
        config = load_config(name)
        assert config.embedding.kind == kind
        assert config.is_toy
        assert parse_config(to_toml_values(config)) == config


def test_the_preset_for_ones_own_pictures_asks_what_they_are_near_to(tmp_path, monkeypatch):
    with pytest.raises(BadConfig) as caught:
        load_config("embedding")
    asked = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert asked == ["base.checkpoint", "embedding.start", "data.path"]
    data = pictures_in(tmp_path / "data", "a.png")
    config = load_config("embedding", ["base.checkpoint=toy", f"data.path={data}", "embedding.start=a"])
    assert (config.learns_word, config.of_weights, config.mirrors) == (True, "", True)


def test_captions_that_name_an_embedding_are_encoded_anew_where_its_file_changed(folder, base):
    data, found = pictures_in(folder / "data", "a.png"), []
    (data / "a.txt").write_text("a red embedding:x")
    for value in (1.0, 2.0):
        save_file({"x": torch.full((1, 128), value)}, folder / "x.safetensors")
        config = parse_config({"data": {"path": str(data), "cache": str(folder / "cache")}})
        row = torch.zeros(1, dtype=torch.long)
        found.append(load_data(config, base).conditions(row, row.bool())["cross_attn"])
    assert not torch.equal(*found)


def test_the_toys_clip_finds_embeddings(folder):
    save_file({"x": torch.ones(1, 128)}, folder / "x.safetensors")
    _, clip, _ = load_toy_model()
    tokens = clip.tokenize("a embedding:x")["l"][0]
    assert sum(torch.is_tensor(token) for token, _ in tokens) == 1
