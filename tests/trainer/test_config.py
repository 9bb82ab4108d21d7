import pytest
from PIL import Image

from trainer.config import to_toml_values
from trainer.config_checks import warnings
from trainer.config_file import PRESETS, BadConfig, load_config, parse_config
from trainer.host import add_extra_folders, model_file


def problems_of(values) -> list[str]:
    with pytest.raises(BadConfig) as caught:
        parse_config(values)
    return str(caught.value).splitlines()


def _missing(preset: str) -> list[str]:
    """Keys of a preset that name what is not there."""
    try:
        load_config(preset)
    except BadConfig as error:
        return [line.split(":")[0] for line in str(error).splitlines()]
    return []


def test_every_preset_is_valid_but_for_the_files_that_a_user_brings():
    brought = {
        "toy": [],
        "toy_reward": [],
        "toy_word": [],
        "toy_relation": [],
        "sd15": ["base.checkpoint", "data.path"],
        "paper": ["base.checkpoint", "data.path"],
        "dreambooth": ["base.checkpoint", "data.path"],
        "embedding": ["base.checkpoint", "embedding.start", "data.path"],
        "sd15_reward": ["base.checkpoint", "reward.models", "reward.prompts"],
        "sdxl_reward": ["base.checkpoint", "reward.models", "reward.prompts"],
        "toy_transformer_reward": [],
    }
    assert {path.stem for path in PRESETS.glob("*.toml")} == brought.keys()
    for name, files in brought.items():
        assert _missing(name) == files
        toys = ["base.checkpoint=toy", "data.path=", "reward.prompts=", "reward.models={toy = 1.0}"]
        toys.append("embedding.start=ring")
        targets = "all attention" if name == "toy_transformer_reward" else "decoder attention"
        assert load_config(name, toys).targets == targets
    assert load_config("toy").is_toy


def test_the_papers_learning_rate_is_warned_of():
    (sentence,) = warnings(load_config("paper", ["base.checkpoint=toy", "data.path="]))
    assert "move the static part of a logit by about 0.3, but it starts at 1" in sentence
    assert "by the low-rank part alone" in sentence
    for bias, reach in (("weight", "0.5"), ("group", "0.5")):
        short = ["method=static_mask", "loop.steps=50", f"generator.bias={bias}"]
        (sentence,) = warnings(load_config("toy", short))
        assert f"a logit by about {reach}, but it starts at 1: hardly a weight will be removed" in sentence
    assert warnings(load_config("toy")) == []


def test_a_tilde_is_the_users_home_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in ("base.safetensors", "style.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "run.toml").write_text('[base]\ncheckpoint = "~/base.safetensors"\nlora = {"~/style.safetensors" = 1}')
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (8, 8)).save(data / "a.png")
    (data / "a.txt").touch()
    overrides = ["output=~/run", "data.path=~/data", "data.cache=~/cache", "prior.folder=~/prior", "base.weights=~"]
    config = load_config("~/run.toml", overrides)
    base = config.base
    found = (config.output, base.checkpoint, *base.lora, config.data.path, config.data.cache, config.prior.folder)
    names = ("run", "base.safetensors", "style.safetensors", "data", "cache", "prior")
    assert found == tuple(str(tmp_path / name) for name in names)
    assert base.weights == str(tmp_path)


def test_names_are_found_in_comfyuis_folders(monkeypatch, tmp_path):
    import folder_paths

    for kind in ("checkpoints", "loras"):
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"}))
    values = {"base": {"checkpoint": "mine.safetensors", "lora": {"style.safetensors": 1.0}}, "data": {"path": "no"}}
    folder_paths.filename_list_cache.clear()
    lines = problems_of(values)
    assert lines[0].startswith(
        f"base.checkpoint: 'mine.safetensors' does not exist; '{tmp_path / 'checkpoints'}' holds"
    )
    for name in ("checkpoints/other.safetensors", "loras/ink.safetensors"):
        (tmp_path / name).touch()
    folder_paths.filename_list_cache.clear()
    lines = problems_of(values)
    assert "ComfyUI's folder 'checkpoints' holds other.safetensors; name a file in it" in lines[0]
    assert "base.lora: 'style.safetensors' does not exist; ComfyUI's folder 'loras' holds ink.safetensors" in lines[-1]
    for name in ("checkpoints/mine.safetensors", "loras/style.safetensors"):
        (tmp_path / name).touch()
    assert [line.split(":")[0] for line in problems_of(values)] == ["data.path"]
    folder_paths.filename_list_cache.clear()


def test_presets_name_a_checkpoint_as_comfyui_lists_it(monkeypatch, tmp_path):
    import folder_paths

    (tmp_path / "v1-5-pruned-emaonly-fp16.safetensors").touch()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([str(tmp_path)], {".safetensors"}))
    for name in ("sd15", "paper", "dreambooth", "sd15_reward"):
        assert "base.checkpoint" not in _missing(name)


def test_extra_model_paths_are_read(monkeypatch, tmp_path):
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([], {".safetensors"}))
    (tmp_path / "extra_model_paths.yaml").write_text("shared:\n  base_path: elsewhere\n  checkpoints: sd\n")
    add_extra_folders(tmp_path)
    (tmp_path / "elsewhere" / "sd").mkdir(parents=True)
    (tmp_path / "elsewhere" / "sd" / "mine.safetensors").touch()
    assert model_file("checkpoints", "mine.safetensors") == tmp_path / "elsewhere" / "sd" / "mine.safetensors"


def test_the_toy_model_takes_its_own_resolution(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").touch()
    assert load_config("toy", [f"data.path={tmp_path}"]).data.resolution == 64
    config = load_config("toy", [f"data.path={tmp_path}", "data.resolution=512"])
    assert config.data.resolution == 512
    assert "the toy model draws 64x64: steps take some 64 times as long" in warnings(config)[0]


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
        "method: is 'magic', but must be one of maskunet, static_mask, lora, full, embedding, embedding+maskunet, "
        "embedding+static_mask, embedding+lora, embedding+full",
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
        BadConfig,
        match=r"does not exist. Name a TOML file or a preset \(dreambooth, embedding, paper, sd15, sd15_rew",
    ):
        load_config("nothing")
    path = tmp_path / "run.toml"
    path.write_text("steps = = 3")
    with pytest.raises(BadConfig, match=r"is not a TOML file: .*\)\.$"):
        load_config(str(path))
    with pytest.raises(BadConfig, match=r"is a folder\. Name a TOML file or a preset"):
        load_config(str(tmp_path))


def test_what_windows_writes_is_read_or_told(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfseed = 3")
    assert load_config(str(path)).seed == 3
    path.write_text("seed = 3", encoding="utf-16")
    with pytest.raises(BadConfig, match="is not UTF-8 text: save it as UTF-8"):
        load_config(str(path))
    path.write_text(r'output = "C:\Users\me"')
    with pytest.raises(BadConfig, match=r"is not a TOML file: .* so write C:/folder or 'C:\\folder'"):
        load_config(str(path))
    path.write_text(r'output = "C:\train\new"')
    with pytest.raises(BadConfig, match=r"output: 'C:\\train\\new' holds a character that no path has; .* C:/folder"):
        load_config(str(path))


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("optimiser.lr=inf", "optimiser.lr: must be of type float and finite, not inf"),
        ("validation.cfg=nan", "validation.cfg: must be of type float and finite, not nan"),
        ("reward.models={toy = nan}", "reward.models: must be of type float and finite, not nan"),
        ("seed=99999999999999999999", "seed: must be of type int, not a number of more than 64 bits"),
        ("optimiser.lr=" + 400 * "9", "optimiser.lr: must be of type float, not a number of more than 64 bits"),
        ("output=runs/..", "output: is 'runs/..', but must name a folder"),
        ("optimiser.options={nothing = 1}", "optimiser.options: AdamW does not take them"),
        ("optimiser.options={betas = [2.0, 3.0]}", "optimiser.options: AdamW does not take them"),
        ("optimiser.name=os.system", "optimiser.name: 'os.system' is no optimiser of torch"),
        ("optimiser.name=..", "optimiser.name: '..' cannot be imported"),
    ],
)
def test_what_no_run_can_use_is_told_before_anything_is_loaded(assignment, sentence):
    with pytest.raises(BadConfig) as caught:
        load_config("toy", [assignment])
    assert str(caught.value).startswith(sentence)


def test_a_folder_of_a_presets_name_hides_no_preset(tmp_path, monkeypatch):
    (tmp_path / "toy").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("toy").output == "output/train/toy_shapes"
