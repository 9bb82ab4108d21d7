import pytest

from trainer.config import PRESETS, BadConfig, Config, load_config, parse_config


def test_every_preset_is_valid():
    names = [path.stem for path in PRESETS.glob("*.toml")]
    assert "toy" in names
    for name in names:
        assert isinstance(load_config(name), Config)


def test_what_is_not_said_has_its_default():
    config = parse_config({"seed": 3, "optimiser": {"steps": 7, "lr": 1}})
    assert (config.seed, config.optimiser.steps, config.optimiser.lr) == (3, 7, 1.0)
    assert config.generator.targets == "decoder attention"


def test_all_problems_are_listed_at_once():
    wrong = {
        "sed": 1,
        "data": {"pictures": "many", "caption_noise": 2.0},
        "generator": {"targets": "everything", "rank": 0},
        "optimiser": 5,
    }
    with pytest.raises(BadConfig) as caught:
        parse_config(wrong)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "sed",
        "data.pictures",
        "data.caption_noise",
        "generator.targets",
        "generator.rank",
        "optimiser",
    ]
    assert lines[1] == "data.pictures: must be of type int, not str"
    assert "must be one of decoder attention, decoder attention and feed-forward, all attention" in lines[3]


def test_a_file_that_is_missing_or_no_toml_gets_a_sentence(tmp_path):
    with pytest.raises(BadConfig, match=r"does not exist. Name a TOML file or a preset \(toy\)"):
        load_config("nothing")
    path = tmp_path / "run.toml"
    path.write_text("steps = = 3")
    with pytest.raises(BadConfig, match="is not a TOML file"):
        load_config(str(path))
