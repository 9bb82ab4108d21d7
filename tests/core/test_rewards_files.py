"""Which files are rewards, whatever they are called, and what is said of those that are none."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from maskunet_core.rewards.aesthetic import AestheticReward
from maskunet_core.rewards.blip import ImageReward
from maskunet_core.rewards.clip import ClipReward
from maskunet_core.rewards.files import BadRewardFile, load
from tests.reward_files import aesthetic_head, clip_l_image_model, clip_model, hps_tensors, image_reward_tensors

PICTURES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def as_safetensors(path, tensors):
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def as_state_dict(path, tensors):
    torch.save({"state_dict": tensors, "epoch": 3}, path)


def as_legacy(path, tensors):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def prefixed(prefix):
    return lambda path, tensors: torch.save({prefix + name: value for name, value in tensors.items()}, path)


def with_extra_keys(path, tensors):
    torch.save({**tensors, "blip.queue": torch.zeros(3), "optimizer_step": 7}, path)


WRITERS = {
    "torch": lambda path, tensors: torch.save(tensors, path),
    "legacy": as_legacy,
    "safetensors": as_safetensors,
    "state_dict": as_state_dict,
    "module.": prefixed("module."),
    "module.model.": prefixed("module.model."),
    "state_dict.": prefixed("state_dict."),
    "extra": with_extra_keys,
}
LAYOUTS = {
    "image_reward": (image_reward_tensors, ImageReward),
    "hps": (hps_tensors, ClipReward),
    "pickscore": (lambda: clip_model().state_dict(), ClipReward),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_is_recognised_by_what_it_holds(tmp_path, layout, writer):
    make, kind = LAYOUTS[layout]
    plain, path = tmp_path / "plain.pt", tmp_path / "any name.bin"
    torch.save(make(), plain)
    WRITERS[writer](path, make())
    reward = load(path)
    assert type(reward) is kind
    assert reward.name == "any name"
    with torch.no_grad():
        assert torch.equal(reward.bind("a red dog")(PICTURES), load(plain).bind("a red dog")(PICTURES))


def test_hps_is_a_cosine_and_pickscore_a_logit(tmp_path):
    torch.save(hps_tensors(), tmp_path / "a.pt")
    torch.save(clip_model().state_dict(), tmp_path / "b.pt")
    assert load(tmp_path / "a.pt").scale == 1.0
    assert load(tmp_path / "b.pt").scale == pytest.approx(clip_model().logit_scale.exp().item())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.float16, torch.float32])
def test_weights_take_the_dtype_that_is_asked_for(tmp_path, stored, wanted):
    tensors = {name: value.to(stored) for name, value in hps_tensors().items()}
    torch.save({"state_dict": tensors}, tmp_path / "a.pt")
    reward = load(tmp_path / "a.pt", dtype=wanted)
    assert {parameter.dtype for parameter in reward.image.parameters()} == {wanted}
    assert not any(parameter.requires_grad for parameter in reward.image.parameters())
    assert torch.isfinite(reward.bind("a red dog")(PICTURES)).all()


def test_what_was_loaded_does_not_hang_on_its_file(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(hps_tensors(), path)
    reward = load(path)
    expected = reward.bind("a red dog")(PICTURES)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\0" * size)
    assert torch.equal(reward.bind("a red dog")(PICTURES), expected)


def test_loading_inside_inference_mode_gives_weights_that_pass_gradients(tmp_path):
    torch.save(hps_tensors(), tmp_path / "a.pt")
    with torch.inference_mode():
        reward = load(tmp_path / "a.pt")
    assert not any(parameter.is_inference() for parameter in reward.image.parameters())
    leaf = PICTURES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward.bind("a red dog")(leaf).sum(), leaf)
    assert gradient.abs().sum() > 0


def test_the_aesthetic_predictor_takes_its_tower_from_another_file(tmp_path):
    head, other, tower = tmp_path / "head.pth", tmp_path / "other.safetensors", tmp_path / "tower.safetensors"
    torch.save(aesthetic_head(), head)
    as_safetensors(other, clip_model().state_dict())
    as_safetensors(tower, clip_l_image_model().state_dict())
    reward = load(head, [tmp_path / "none.pt", other, tower])
    assert type(reward) is AestheticReward
    assert reward.bind("").size == 224


@pytest.mark.parametrize("wrong", [{}, {"embedding": 32}, {"pixels": 320}])
def test_the_aesthetic_predictor_without_its_tower_says_which_file_is_missing(tmp_path, wrong):
    head, others = tmp_path / "head.pth", []
    torch.save(aesthetic_head(), head)
    if wrong:
        others = [tmp_path / "tower.safetensors"]
        as_safetensors(others[0], clip_l_image_model(**wrong).state_dict())
    with pytest.raises(
        BadRewardFile, match=r"'head.pth' holds only the head .* openai/clip-vit-large-patch14 into models/"
    ):
        load(head, others)


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle ran')",)


def missing(path):
    pass


def empty(path):
    path.write_bytes(b"")


def web_page(path):
    path.write_text("<html>404</html>")


def truncated_torch(path):
    torch.save(hps_tensors(), path)
    path.write_bytes(path.read_bytes()[:-5000])


def truncated_legacy(path):
    as_legacy(path, hps_tensors())
    path.write_bytes(path.read_bytes()[:-5000])


def truncated_safetensors(path):
    as_safetensors(path, hps_tensors())
    path.write_bytes(path.read_bytes()[:-5000])


def foreign(path):
    torch.save({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4)}, path)


def no_dictionary(path):
    torch.save([torch.zeros(2)], path)


def image_tower_alone(path):
    torch.save(clip_l_image_model().state_dict(), path)


def lacking(path):
    tensors = image_reward_tensors()
    del tensors["blip.visual_encoder.norm.bias"]
    torch.save(tensors, path)


def lacking_a_shape(path):
    tensors = hps_tensors()
    del tensors["visual.conv1.weight"]
    torch.save(tensors, path)


def misshapen(path):
    torch.save(hps_tensors() | {"visual.ln_post.bias": torch.zeros(3)}, path)


def harmful(path):
    torch.save({"state_dict": hps_tensors(), "more": Harmful()}, path)


def harmful_legacy(path):
    path.write_bytes(pickle.dumps({"more": Harmful()}, protocol=2))


def training_state(path):
    torch.save({"state_dict": hps_tensors(), "loss": np.float64(1.0)}, path)


def program(path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (missing, r"reward.pt' does not exist. Put one of these into models/reward: ImageReward.pt \(THUDM"),
        (empty, "is neither a safetensors file nor a checkpoint of torch"),
        (web_page, "it may be a web page or a placeholder .* into models/reward: ImageReward.pt"),
        (truncated_torch, "cannot be read .* truncated: download it again into models/reward"),
        (truncated_legacy, "cannot be read .* truncated: download it again into models/reward"),
        (truncated_safetensors, "cannot be read .* truncated: download it again into models/reward"),
        (foreign, "holds no reward that is known here. Put one of these into models/reward"),
        (no_dictionary, "holds no reward that is known here"),
        (image_tower_alone, "image tower of CLIP without its text tower"),
        (lacking, "lacks the tensor blip.visual_encoder.norm.bias: it is damaged"),
        (lacking_a_shape, "lacks the tensor visual.conv1.weight: it is damaged"),
        (misshapen, r"holds the tensor visual.ln_post.bias in the shape \(3,\), where \(80,\) fits"),
        (harmful, "holds a program or objects besides tensors, and is not opened"),
        (harmful_legacy, "holds a program or objects besides tensors, and is not opened"),
        (training_state, "state of a training run .* Put HPS_v2_compressed.pt or HPS_v2.1_compressed.pt"),
        (program, "holds a program .* openai/clip-vit-large-patch14"),
    ],
)
def test_any_other_file_gets_one_sentence_that_says_what_is_expected(tmp_path, make, sentence):
    path = tmp_path / "reward.pt"
    make(path)
    with pytest.raises(BadRewardFile, match=sentence) as caught:
        load(path)
    assert "reward.pt" in str(caught.value)
    assert "\n" not in str(caught.value)
