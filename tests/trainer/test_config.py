import pytest

from trainer.config import to_toml_values
from trainer.config_file import PRESETS, BadConfig, load_config, parse_config, warnings


def problems_of(values) -> list[str]:
    with pytest.raises(BadConfig) as caught:
        parse_config(values)
    return str(caught.value).splitlines()


def test_every_preset_is_valid_but_for_the_files_that_a_user_brings():
    names = {path.stem for path in PRESETS.glob("*.toml")}
    assert names == {"toy", "sd15", "paper", "dreambooth"}
    for name in names - {"toy"}:
        with pytest.raises(BadConfig) as caught:
            load_config(name)
        lines = str(caught.value).splitlines()
        assert [line.split(":")[0] for line in lines] == ["base.checkpoint", "data.path"]
        assert load_config(name, ["base.checkpoint=toy", "data.path="]).targets == "decoder attention"
    assert load_config("toy").is_toy


def test_the_papers_learning_rate_is_warned_of():
    (sentence,) = warnings(load_config("paper", ["base.checkpoint=toy", "data.path="]))
    assert "No logit can cross the threshold" in sentence
    assert "a logit moves by 0.15 at most, but starts at 1" in sentence
    assert warnings(load_config("toy")) == []


def test_what_is_not_said_has_its_default():
    config = parse_config({"seed": 3, "loop": {"steps": 7}, "optimiser": {"lr": 1}})
    assert (config.seed, config.loop.steps, config.optimiser.lr) == (3, 7, 1.0)
    assert config.targets == "decoder attention"


def test_all_problems_are_listed_at_once():
    wrong = {
        "sed": 1,
        "method": "static_mask",
        "base": {"checkpoint": "nothing.safetensors", "lora": {"style.safetensors": 0.5}},
        "data": {"pictures": "many", "caption_noise": 2.0},
        "prior": {"prompt": "a dog", "pictures": 0, "share": 1.0, "weight": -1},
        "generator": {"rank": -1, "architecture": "reference"},
        "targets": "everything",
        "lora": 5,
        "optimiser": {"name": "Nothing"},
        "loop": {"batch": 1, "accumulate": 4},
        "validation": {"prompts": "a red circle", "sample_every": 5},
    }
    lines = problems_of(wrong)
    assert [line.split(":")[0] for line in lines] == [
        "sed",
        "data.pictures",
        "data.caption_noise",
        "prior.pictures",
        "prior.share",
        "prior.weight",
        "generator.rank",
        "targets",
        "lora",
        "validation.prompts",
        "base.checkpoint",
        "data.path",
        "base.lora",
        "optimiser.name",
        "method",
        "prior.prompt",
        "loop.accumulate",
        "validation.prompts",
    ]
    assert lines[1] == "data.pictures: must be of type int, not str"
    assert lines[4] == "prior.share: is 1.0, but must lie between 0 and 1, both excluded"
    assert "must be one of decoder attention, decoder attention and feed-forward, all attention" in lines[7]
    assert lines[-3] == "prior.prompt: a batch holds class pictures and others, so loop.batch must be at least 2"


def test_architecture_and_method_must_agree():
    assert problems_of({"method": "magic", "generator": {"architecture": "mlp"}}) == [
        "method: is 'magic', but must be one of maskunet, static_mask, lora, full",
        "generator.architecture: is 'mlp', but must be one of low_rank, reference",
    ]
    assert problems_of({"generator": {"freed": True}}) == [
        'generator.freed: only architecture = "reference" has gradients to free; low_rank has them from the first step'
    ]
    assert problems_of({"method": "static_mask", "generator": {"architecture": "reference"}}) == [
        "method: static_mask is a low_rank generator of rank 0; with generator.architecture = "
        '"reference" the method is maskunet'
    ]
    ignored = parse_config({"generator": {"architecture": "reference", "freed": True, "rank": 4, "use_time": False}})
    assert warnings(ignored) == ["generator.rank, generator.use_time: without effect on the architecture reference."]


def test_a_dynamic_mask_needs_an_input():
    (line,) = problems_of({"generator": {"use_time": False, "use_sample": False}})
    assert line == "generator: a dynamic mask needs use_time or use_sample; a static one has rank 0"


def test_overrides_reach_every_key():
    overrides = ["loop.steps=5", "method=lora", "data.flip=false", 'validation.prompts=["a", "b"]', "base.weights=."]
    config = load_config("toy", overrides)
    assert (config.loop.steps, config.method, config.data.flip, config.base.weights) == (5, "lora", False, ".")
    assert config.validation.prompts == ("a", "b")
    with pytest.raises(BadConfig, match="must be of the form key=value"):
        load_config("toy", ["loop.steps"])
    with pytest.raises(BadConfig, match="'seed' is not a table"):
        load_config("toy", ["seed.x=1"])


def test_a_configuration_survives_being_written_down():
    config = load_config("toy")
    assert parse_config(to_toml_values(config)) == config


def test_a_file_that_is_missing_or_no_toml_gets_a_sentence(tmp_path):
    with pytest.raises(
        BadConfig, match=r"does not exist. Name a TOML file or a preset \(dreambooth, paper, sd15, toy\)"
    ):
        load_config("nothing")
    path = tmp_path / "run.toml"
    path.write_text("steps = = 3")
    with pytest.raises(BadConfig, match="is not a TOML file"):
        load_config(str(path))
