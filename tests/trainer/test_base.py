"""Any checkpoint that the host loads is a base: a user's pictures to a generator file."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from maskunet_core.files import checkpoint
from maskunet_core.seam.attach import structure_of
from maskunet_core.toy.model import WEIGHTS
from maskunet_core.training.base import load_for_training
from maskunet_core.training.cost import PeakMemory
from tests.builders import write_tiny_checkpoint
from trainer.base import BadBase, load_base, load_toy_base
from trainer.config import Base
from trainer.config_file import BadConfig, parse_config
from trainer.data.store import open_tables
from trainer.pictures import base_digest, cached_pictures, encoders_digest
from trainer.train import check, start


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny.safetensors")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(6):
        Image.new("RGB", (160, 120) if n % 2 else (120, 160), (40 * n, 90, 200 - 30 * n)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"a flat picture, number {n}", encoding="utf-8")
    return folder


def config_of(tiny, pictures, tmp_path, **changes):
    values = {
        "output": str(tmp_path / "run"),
        "base": {"checkpoint": str(tiny)},
        "data": {"path": str(pictures), "resolution": 128, "cache": str(tmp_path / "cache")},
        "loop": {"steps": 2, "batch": 2, "precision": "fp32"},
        "validation": {"pictures": 2, "every": 1},
    }
    return parse_config(values | changes)


def test_a_users_pictures_become_a_generator(tiny, pictures, tmp_path):
    path = start(config_of(tiny, pictures, tmp_path))
    loaded = checkpoint.load(path)
    assert loaded.structure.family == "SD 1.5"
    assert loaded.training["base"] == "tiny.safetensors"
    loaded.require_fit(structure_of(load_base(Base(str(tiny))).patcher, "decoder attention"))
    cache = tmp_path / "cache"
    files = {p: p.stat().st_mtime_ns for p in cache.rglob("*.arrow")}
    # Two orientations of six pictures; six captions and the empty one.
    for kind, rows in (("latents", 2 * 6), ("text", 7)):
        assert len(open_tables((cache / kind).glob("*.arrow"))) == rows
    start(config_of(tiny, pictures, tmp_path, seed=1), overwrite=True)
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*.arrow")} == files


def test_captions_that_are_cut_are_counted(tiny, pictures, tmp_path, capsys):
    (pictures / "2.txt").write_text("a flat picture of a colour, " * 20, encoding="utf-8")
    (pictures / "4.txt").write_text("a" * 80, encoding="utf-8")
    cached_pictures(config_of(tiny, pictures, tmp_path), load_base(Base(str(tiny))))
    assert "Cut: 1 captions have more tokens than the text encoder takes at once, of 2.png." in capsys.readouterr().out


def test_class_pictures_come_in_the_sizes_of_a_users_pictures(tiny, pictures, tmp_path):
    """Five of the subject's six pictures are upright, and so are five of the six class pictures."""
    for n in (3, 5):
        Image.new("RGB", (120, 160), (90, 40 * n, 10)).save(pictures / f"{n}.png")
    prior = {"prompt": "a flat picture", "pictures": 6, "folder": str(tmp_path / "prior"), "steps": 1}
    config = config_of(tiny, pictures, tmp_path, prior=prior, validation={"every": 0, "pictures": 0})
    assert "Prior: 6 pictures of 'a flat picture', of which 6 are yet to be drawn" in "\n".join(check(config))
    assert not (tmp_path / "prior").exists()
    path = start(config)
    sizes = Counter(Image.open(path).size for path in (tmp_path / "prior").rglob("*.png"))
    assert sizes == {(144, 112): 1, (112, 144): 5}
    assert checkpoint.load(path).training["config"]["prior"]["prompt"] == "a flat picture"


def test_a_lora_is_merged_into_the_base(tiny, tmp_path):
    key = "lora_unet_output_blocks_3_1_transformer_blocks_0_attn1_to_q"
    file = tmp_path / "style.safetensors"
    tensors = {f"{key}.lora_up.weight": torch.ones(320, 1), f"{key}.lora_down.weight": torch.full((1, 320), 0.5)}
    save_file(tensors | {f"{key}.alpha": torch.tensor(1.0)}, file)
    weights = []
    for lora in ({}, {str(file): 0.5}):
        base = load_base(Base(str(tiny), lora=lora))
        load_for_training(base)
        weights.append(base.unet.output_blocks[3][1].transformer_blocks[0].attn1.to_q.weight.detach().float())
    torch.testing.assert_close(weights[1], weights[0] + 0.25, rtol=1e-3, atol=1e-3)


def test_a_lora_that_does_not_fit_is_refused_and_one_that_fits_in_part_is_told(tiny, tmp_path, caplog):
    def lora(name: str, *layers: str) -> str:
        tensors = {f"{layer}.lora_up.weight": torch.ones(320, 1) for layer in layers}
        tensors |= {f"{layer}.lora_down.weight": torch.ones(1, 320) for layer in layers}
        save_file(tensors, tmp_path / name)
        return str(tmp_path / name)

    here = "lora_unet_output_blocks_3_1_transformer_blocks_0_attn1_to_q"
    nowhere = "lora_unet_output_blocks_99_1_transformer_blocks_0_attn1_to_q"
    with pytest.raises(BadBase, match=r"None of the 2 tensors of '.*other\.safetensors' fits the base"):
        load_base(Base(str(tiny), lora={lora("other.safetensors", nowhere): 1.0}))
    load_base(Base(str(tiny), lora={lora("part.safetensors", here, nowhere): 1.0}))
    assert (
        f"2 of the 4 tensors of '{tmp_path / 'part.safetensors'}' fit nothing in the base and are left out"
        in caplog.text
    )
    assert "lora key not loaded" not in caplog.text
    (tmp_path / "broken.safetensors").write_text("x")
    with pytest.raises(BadBase, match=r"The LoRA '.*broken\.safetensors' cannot be read"):
        load_base(Base(str(tiny), lora={str(tmp_path / "broken.safetensors"): 1.0}))


def test_a_checkpoint_for_inpainting_is_refused_before_anything_is_encoded(tiny, pictures, tmp_path):
    tensors = load_file(tiny)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[first] = torch.cat([tensors[first], tensors[first], tensors[first][:, :1]], dim=1)
    save_file(tensors, tmp_path / "inpaint.safetensors")
    for command in (start, check):
        with pytest.raises(BadBase, match=r"The U-Net of inpaint\.safetensors takes 9 channels instead of 4"):
            command(config_of(tmp_path / "inpaint.safetensors", pictures, tmp_path))
    assert not (tmp_path / "cache").exists()


def test_checkpoint_and_lora_are_loaded_by_comfyuis_names(tiny, tmp_path, monkeypatch):
    import folder_paths

    key = "lora_unet_output_blocks_3_1_transformer_blocks_0_attn1_to_q"
    save_file(
        {f"{key}.lora_up.weight": torch.ones(320, 1), f"{key}.lora_down.weight": torch.ones(1, 320)},
        tmp_path / "style.safetensors",
    )
    for kind, folder in (("checkpoints", tiny.parent), ("loras", tmp_path)):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(folder)], {".safetensors"}))
    named, whole = (
        Base(tiny.name, lora={"style.safetensors": 1.0}),
        Base(str(tiny), lora={str(tmp_path / "style.safetensors"): 1.0}),
    )
    assert load_base(named).patcher.patches
    assert base_digest(named) == base_digest(whole)
    assert encoders_digest(named) == encoders_digest(whole)


@pytest.fixture(scope="module")
def parts(tiny):
    """The checkpoint's parts as separate files, by key of a configuration."""
    prefixes = {
        "diffusion_model": "model.diffusion_model.",
        "text_encoders": "cond_stage_model.transformer.",
        "vae": "first_stage_model.",
    }
    tensors, found = load_file(tiny), {}
    for key, prefix in prefixes.items():
        found[key] = str(tiny.with_name(f"{key}.safetensors"))
        own = {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}
        save_file(own, found[key])
    return found | {"text_encoders": [found["text_encoders"]]}


def test_separate_files_are_the_checkpoint_that_they_came_from(tiny, parts, pictures, tmp_path):
    config = config_of(tiny, pictures, tmp_path, base=parts)
    whole, found = load_base(Base(str(tiny))), load_base(config.base)
    weights = found.unet.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in whole.unet.state_dict().items())
    text, picture = "a flat picture", torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found.encode_text(text)["cross_attn"], whole.encode_text(text)["cross_attn"])
    assert torch.equal(found.encode_picture(picture), whole.encode_picture(picture))
    assert found.name == "diffusion_model.safetensors"
    assert structure_of(found.patcher, "decoder attention") == structure_of(whole.patcher, "decoder attention")


def test_the_cache_is_keyed_by_the_separate_files_that_encode(parts, tmp_path):
    def digests(**changes) -> tuple[str, str]:
        values = parts | changes
        base = Base(**values | {"text_encoders": tuple(values["text_encoders"])})
        return base_digest(base), encoders_digest(base)

    def changed(file: str) -> str:
        tensors = load_file(file)
        name = next(name for name in sorted(tensors) if tensors[name].ndim > 1)
        path = tmp_path / Path(file).name
        save_file(tensors | {name: torch.ones_like(tensors[name].float()).to(tensors[name].dtype)}, path)
        return str(path)

    stock = digests()
    other_model = digests(diffusion_model=changed(parts["diffusion_model"]))
    assert (other_model[0] != stock[0], other_model[1] == stock[1]) == (True, True)
    others = [digests(vae=changed(parts["vae"])), digests(text_encoders=[changed(parts["text_encoders"][0])])]
    others.append(digests(text_encoder_type="sd3"))
    assert len({stock[1], *(encoders for _, encoders in others)}) == 4


def test_what_is_wrong_with_separate_files_is_told_at_once(tiny, parts):
    wrong = {"checkpoint": str(tiny), "diffusion_model": "none.safetensors", "text_encoder_type": "other"}
    with pytest.raises(BadConfig) as told:
        parse_config({"base": wrong, "data": {"path": "nowhere"}})
    for sentence in (
        "base.checkpoint: leave it out where separate files are named",
        "base.diffusion_model: 'none.safetensors' does not exist",
        "base.text_encoders: is missing; a base of separate files needs diffusion_model, text_encoders, vae",
        "base.vae: is missing",
        "base.text_encoder_type: is 'other', but must be one of stable_diffusion",
    ):
        assert sentence in str(told.value)
    with pytest.raises(BadBase, match=r"ComfyUI cannot load '.*vae\.safetensors' .*Name another file in base\.diff"):
        load_base(Base(diffusion_model=parts["vae"], text_encoders=tuple(parts["text_encoders"]), vae=parts["vae"]))
    with pytest.raises(BadBase, match=r"'gone\.safetensors' does not exist; .* in base\.vae"):
        load_base(Base(diffusion_model=parts["diffusion_model"], vae="gone.safetensors"))


def test_a_file_that_is_no_checkpoint_gets_a_sentence(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(BadBase, match=r"other.safetensors' is no checkpoint that ComfyUI can load"):
        load_base(Base(str(path)))


def test_a_folder_without_whole_toy_weights_gets_a_sentence(tmp_path):
    unet = tmp_path / "unet.safetensors"
    for damage, reason in (
        (lambda: None, "unet"),
        (lambda: unet.write_text("no weights"), "header"),
        (lambda: save_file(load_file(WEIGHTS / unet.name), unet), "latent_rgb"),  # without what it says of itself
    ):
        damage()
        with pytest.raises(BadBase, match=rf"does not hold whole weights of the toy model \(.*{reason}"):
            load_toy_base(str(tmp_path))


def test_v_prediction_is_trained_on_v():
    import comfy.model_base

    base = load_toy_base()
    kind = comfy.model_base.ModelType.V_PREDICTION
    base.model.model_type = kind
    base.model.model_sampling = comfy.model_base.model_sampling(base.model.model_config, kind)
    clean, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([10, 400, 900])
    context = base.encode_text("a red circle")["cross_attn"].expand(3, -1, -1)
    alpha = (1 / (1 + base.model.model_sampling.sigma(timesteps.float()) ** 2)).view(-1, 1, 1, 1)
    with torch.no_grad():
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        predicted = base.unet(noisy, timesteps.float(), context=context, transformer_options={})
        expected = (predicted - (alpha.sqrt() * noise - (1 - alpha).sqrt() * clean)).square().mean((1, 2, 3))
        found = base.diffusion_loss(clean, {"cross_attn": context}, timesteps, noise)
        weighted = base.diffusion_loss(clean, {"cross_attn": context}, timesteps, noise, min_snr=5.0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    snr = base.model.model_sampling.sigma(timesteps.float()) ** -2
    torch.testing.assert_close(weighted, found * snr.clamp(max=5.0) / (snr + 1))


def test_check_estimates_the_peak_within_20_percent(tiny, pictures, tmp_path):
    config = config_of(tiny, pictures, tmp_path, loop={"steps": 2, "batch": 6, "precision": "fp32"})
    told = "\n".join(check(config))
    assert "6 pictures, up to 128x128" in told
    estimated = float(re.search(r"peak memory: ([\d,]+) MB", told)[1].replace(",", ""))
    with PeakMemory(torch.device("cpu")) as memory:
        start(config)
    assert estimated == pytest.approx(memory.peak / 2**20, rel=0.2)


def test_the_cache_is_keyed_by_what_encodes_and_nothing_else(tiny, tmp_path):
    tensors = load_file(tiny)
    digests = [encoders_digest(Base(str(tiny)))]
    for part in ("model.diffusion_model.", "first_stage_model.", "cond_stage_model."):
        name = next(name for name in sorted(tensors) if name.startswith(part))
        changed = tensors | {name: torch.ones_like(tensors[name].float()).to(tensors[name].dtype)}
        path = tmp_path / "changed.safetensors"
        save_file(changed, path)
        digests.append(encoders_digest(Base(str(path))))
    stock, other_unet, other_vae, other_text = digests
    assert other_unet == stock
    assert len({stock, other_vae, other_text}) == 3
