"""Training of learned words on the toy model: texts of pictures, runs, files."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from maskunet_core.files import checkpoint
from maskunet_core.toy.model import WEIGHTS, load_toy_model
from tests.trainer.embedding.learned_words import RELATION, config_of, make_run, values_of
from tests.trainer.test_methods import predict
from tests.trainer.test_train import assert_same, rows_of, state_of
from trainer.base import load_toy_base
from trainer.config import to_toml_values
from trainer.config_file import BadConfig, load_config, parse_config
from trainer.embedding.pictures import DescribedPictures
from trainer.embedding.texts import LISTS, lines_of, scan_texts
from trainer.train import check, load_data, start

SHIPPED = WEIGHTS.with_name("generators") / "toy_shapes.safetensors"


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
        assert found.data.samples.mirrors is mirrored
        make_run(config_of(tmp_path, **changes), base).train_step()


# Training -------------------------------------------------------------------------------------------------------


def test_a_removed_word_is_learned_back(base, command, tmp_path):
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
    told = command("info", str(run.result)).stdout
    assert "mystar.safetensors: a learned word, vectors of 1 x 128 (mystar)" in told
    assert "embedding:mystar" in told
    assert "It helped: the held-out loss" in told
    sheet = tmp_path / "sheet.png"
    drawn = command("sample", str(run.result), "--prompt", "a red {}", "--steps", "4", "--output", str(sheet))
    assert "its start left, the word right" in drawn.stdout, drawn.stderr
    with Image.open(sheet) as image:
        left, right = (image.crop((x, 60, x + 190, 250)).tobytes() for x in (6, 280))
    assert left != right


WITH_MASKS = {"method": "embedding+maskunet"}


@pytest.mark.parametrize("changes", [RELATION, RELATION | WITH_MASKS], ids=["relation", "relation with masks"])
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


@pytest.mark.parametrize("taught", [{}, RELATION], ids=["object", "relation"])
def test_a_word_and_masks_are_trained_together_into_two_files(taught, base, tmp_path):
    config = config_of(tmp_path, **taught, **WITH_MASKS, optimiser={"lr": 0.1, "lr_bias": 0.5})
    run = make_run(config, base)
    before = {name: p.detach().clone() for name, p in run.module.named_parameters()}
    run.run()
    assert all(not torch.equal(before[name], p) for name, p in run.module.named_parameters())
    assert ("steering" in run.objective.told()) is bool(taught)
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
