"""Which files are rewards, whatever they are called, and what is said of those that are none."""

import copy
import json
import pickle

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from maskunet_core.rewards.aesthetic import AestheticReward
from maskunet_core.rewards.blip import ImageReward
from maskunet_core.rewards.clip import ClipReward
from maskunet_core.rewards.files import BadRewardFile, files_of, load, read_shapes, read_tensors
from maskunet_core.rewards.preprocess import fit, normalise
from maskunet_core.rewards.tokens import clip_tokens
from tests.reward_files import (
    HPS_DESCRIPTION,
    aesthetic_head,
    as_openai_released,
    clip_description,
    clip_l_image_model,
    clip_model,
    describe,
    hps_tensors,
    image_reward_tensors,
    shallow_clip,
)

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
    "image_reward": (image_reward_tensors, ImageReward, {}),
    "hps": (hps_tensors, ClipReward, HPS_DESCRIPTION),
    "pickscore": (lambda: clip_model().state_dict(), ClipReward, clip_description()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_is_recognised_by_what_it_holds(tmp_path, layout, writer):
    make, kind, description = LAYOUTS[layout]
    plain, path = describe(tmp_path / "plain.pt", description), describe(tmp_path / "any name.bin", description)
    torch.save(make(), plain)
    WRITERS[writer](path, make())
    reward = load(path)
    assert type(reward) is kind
    assert reward.name == "any name"
    with torch.no_grad():
        assert torch.equal(reward.bind("a red dog")(PICTURES), load(plain).bind("a red dog")(PICTURES))


def test_hps_is_a_cosine_and_pickscore_a_logit(tmp_path):
    torch.save(hps_tensors(), describe(tmp_path / "a.pt"))
    torch.save(clip_model().state_dict(), describe(tmp_path / "b.pt", clip_description()))
    assert load(tmp_path / "a.pt").scale == 1.0
    assert load(tmp_path / "b.pt").scale == pytest.approx(clip_model().logit_scale.exp().item())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.float16, torch.float32])
def test_weights_take_the_dtype_that_is_asked_for(tmp_path, stored, wanted):
    tensors = {name: value.to(stored) for name, value in hps_tensors().items()}
    torch.save({"state_dict": tensors}, describe(tmp_path / "a.pt"))
    reward = load(tmp_path / "a.pt", dtype=wanted)
    assert {parameter.dtype for parameter in reward.image.parameters()} == {wanted}
    assert not any(parameter.requires_grad for parameter in reward.image.parameters())
    assert torch.isfinite(reward.bind("a red dog")(PICTURES)).all()


def test_what_was_loaded_does_not_hang_on_its_file(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(hps_tensors(), describe(path))
    reward = load(path)
    expected = reward.bind("a red dog")(PICTURES)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\0" * size)
    assert torch.equal(reward.bind("a red dog")(PICTURES), expected)


def test_loading_inside_inference_mode_gives_weights_that_pass_gradients(tmp_path):
    torch.save(hps_tensors(), describe(tmp_path / "a.pt"))
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


@pytest.mark.parametrize("wrong", [{}, {"embedding": 32}, {"pixels": 336}])
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
    torch.save(hps_tensors() | {"visual.ln_post.bias": torch.zeros(3)}, describe(path))


def not_a_number(path):
    tensors = hps_tensors()
    tensors["visual.proj"][0, 0] = torch.nan
    torch.save(tensors, describe(path))


def infinite_in_the_text_tower(path):
    tensors = hps_tensors()
    tensors["ln_final.weight"][0] = torch.inf
    torch.save(tensors, describe(path))


def impossible_scale(path):
    torch.save(clip_model().state_dict() | {"logit_scale": torch.tensor(torch.nan)}, describe(path, clip_description()))


def of_unknown_origin(path):
    torch.save(hps_tensors(), path)


def other_vocabulary(path):
    torch.save(hps_tensors() | {"token_embedding.weight": torch.zeros(1000, 32)}, describe(path))


def described_as(change):
    def make(path):
        description = copy.deepcopy(HPS_DESCRIPTION)
        change(description["model_cfg"])
        torch.save(hps_tensors(), describe(path, description))

    return make


def with_too_few_dimensions(name):
    def make(path):
        for known, description in ((image_reward_tensors(), {}), (hps_tensors(), None), (aesthetic_head(), {})):
            if name in known:
                torch.save(known | {name: torch.zeros(3)}, describe(path, description))

    return make


def head_that_does_not_hang_together(path):
    torch.save(aesthetic_head() | {"layers.4.weight": torch.zeros(8, 5)}, path)


def names_that_are_no_text(path):
    torch.save({0: torch.zeros(2)}, path)


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
        (not_a_number, "holds numbers in visual.proj that are NaN or infinite: it is damaged. Download it again"),
        (infinite_in_the_text_tower, "holds numbers in ln_final.weight that are NaN or infinite"),
        (impossible_scale, "has a logit_scale of nan, which no CLIP has: it is damaged"),
        (of_unknown_origin, "does not tell whether .* GELU or quick GELU .* put config.json or open_clip_config.json"),
        (other_vocabulary, "reads prompts by a vocabulary of 1000 words: only CLIP's own"),
        (described_as(lambda cfg: cfg["vision_cfg"].update(width=64)), "of towers 64 and 32 wide, where .* 80 and 32"),
        (described_as(lambda cfg: cfg["vision_cfg"].update(head_width=0)), "does not describe a CLIP .ZeroDivision"),
        (described_as(lambda cfg: cfg["vision_cfg"].update(head_width=100)), "0 and 4 heads do not fit towers 80 and"),
        (described_as(lambda cfg: cfg["text_cfg"].update(heads=5)), "4 and 5 heads do not fit towers 80 and 32"),
        (described_as(lambda cfg: cfg.pop("text_cfg")), "does not describe a CLIP .KeyError: 'text_cfg'"),
        (with_too_few_dimensions("blip.visual_encoder.pos_embed"), "tensors of unexpected shapes .* it is damaged"),
        (with_too_few_dimensions("visual.conv1.weight"), r"visual.conv1.weight in the shape \(3,\), where \(80, 3"),
        (with_too_few_dimensions("token_embedding.weight"), "tensors of unexpected shapes .* it is damaged"),
        (with_too_few_dimensions("mlp.layers.2.weight"), r"mlp.layers.2.weight in the shape \(3,\), where a matrix of"),
        (with_too_few_dimensions("layers.0.weight"), "holds no reward that is known here"),
        (names_that_are_no_text, "holds no reward that is known here"),
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


LAION_H = (1280, 16, "gelu", 14, 224, 1024)
LAION_L = (1024, 16, "gelu", 14, 224, 768)
OPENAI = {
    "ViT-L/14": (1024, 16, "quick_gelu", 14, 224, 768),
    "ViT-B/16": (768, 12, "quick_gelu", 16, 224, 512),
    "ViT-B/32": (768, 12, "quick_gelu", 32, 224, 512),
}
OF_OTHERS = {
    "ViT-H/14 of LAION": LAION_H,
    "ViT-H/14 of DFN": (1280, 16, "quick_gelu", 14, 378, 1024),
    "ViT-g/14 of LAION": (1408, 16, "gelu", 14, 224, 1024),
    "ViT-bigG/14 of LAION": (1664, 16, "gelu", 14, 224, 1280),
    "ViT-L/14 of OpenAI for larger pictures": (1024, 16, "quick_gelu", 14, 336, 768),
}


def scores_of(model, pictures, prompt):
    """As transformers computes them."""
    ids = clip_tokens(prompt)[None]
    ids = ids[:, : int(ids.argmax()) + 1]
    size = model.config.vision_config.image_size
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=normalise(fit(pictures, size))).logits_per_image[:, 0]


def assert_scores_as_transformers(path, model):
    prompt = "a red circle"
    with torch.no_grad():
        found = load(path).bind(prompt)(PICTURES)
    torch.testing.assert_close(found, scores_of(model, PICTURES, prompt), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [*OPENAI, *OF_OTHERS])
def test_published_clips_score_as_in_transformers(tmp_path, name):
    """The number of heads and the approximation of GELU are those of the published model, though no file tells them."""
    model = shallow_clip(*(OPENAI | OF_OTHERS)[name])
    path = tmp_path / "clip.safetensors"
    as_safetensors(path, (as_openai_released(model) if name in OPENAI else model).state_dict())
    assert_scores_as_transformers(path, model)


@pytest.mark.parametrize("name", ["ViT-L/14", "ViT-B/32"])
def test_what_has_the_shape_of_openais_and_other_weights_needs_a_description(tmp_path, name):
    width, heads, _, patch, pixels, text_width = OPENAI[name]
    model = shallow_clip(width, heads, "gelu", patch, pixels, text_width)
    path = tmp_path / "clip.safetensors"
    as_safetensors(path, model.state_dict())
    with pytest.raises(BadRewardFile, match=r"'clip.safetensors' is a CLIP .* config.json .* ending .json"):
        load(path)
    describe(path, json.loads(model.config.to_json_string()))
    assert_scores_as_transformers(path, model)


def test_a_description_of_openclip_counts_for_more_than_the_shape(tmp_path):
    """Rounded as OpenAI's weights are, but with GELU, as that description says."""
    width, heads, _, patch, pixels, text_width = OPENAI["ViT-B/32"]
    model = as_openai_released(shallow_clip(width, heads, "gelu", patch, pixels, text_width))
    path = tmp_path / "clip.safetensors"
    as_safetensors(path, model.state_dict())
    describe(path, {"model_cfg": {"vision_cfg": {"patch_size": 32}, "text_cfg": {"layers": 1}}, "preprocess_cfg": {}})
    assert_scores_as_transformers(path, model)


def test_what_other_programs_write_beside_a_file_is_no_description(tmp_path):
    path = tmp_path / "clip.safetensors"
    as_safetensors(path, as_openai_released(shallow_clip(*OPENAI["ViT-B/32"])).state_dict())
    for note in ('{"description": "", "notes": "nice"}', "[1]", "{", "[" * 100_000, "\udcff"):
        path.with_suffix(".json").write_text(note, errors="surrogateescape")
        assert load(path).image.transformer.resblocks[0].quick


def test_copies_of_vit_l_in_half_precision_are_taken_for_openais(tmp_path):
    path = tmp_path / "clip.safetensors"
    as_safetensors(path, shallow_clip(*OPENAI["ViT-L/14"]).half().state_dict())
    assert load(path).image.transformer.resblocks[0].quick


def test_numbers_that_a_dtype_cannot_hold_ask_for_another_dtype(tmp_path):
    tensors = hps_tensors()
    tensors["visual.proj"][0, 0] = 1e6
    torch.save(tensors, describe(tmp_path / "a.pt"))
    with pytest.raises(BadRewardFile, match=r"'a.pt' holds numbers in visual.proj that fp16 cannot: choose another"):
        load(tmp_path / "a.pt", dtype=torch.float16)
    assert load(tmp_path / "a.pt", dtype=torch.bfloat16)


def test_a_head_that_does_not_hang_together_is_damaged(tmp_path):
    tower = tmp_path / "tower.safetensors"
    as_safetensors(tower, clip_l_image_model().state_dict())
    head_that_does_not_hang_together(tmp_path / "head.pth")
    sentence = r"'head.pth' holds the tensor layers.4.weight in the shape \(8, 5\), where a matrix of 16 columns fits"
    with pytest.raises(BadRewardFile, match=sentence):
        load(tmp_path / "head.pth", [tower])


def test_a_tower_of_other_origin_is_passed_over_and_named(tmp_path):
    """It has the shape of OpenAI's, but the head was trained on OpenAI's embeddings."""
    head, other, tower = tmp_path / "head.pth", tmp_path / "laion.safetensors", tmp_path / "openai.safetensors"
    torch.save(aesthetic_head(32), head)
    as_safetensors(other, shallow_clip(*LAION_L).state_dict())
    with pytest.raises(BadRewardFile, match=r"'head.pth' holds only the head .*'laion.safetensors' .* other origin"):
        load(head, [other])
    model = clip_l_image_model(32)
    as_safetensors(tower, model.state_dict())
    expected, found = load(head, [tower]), load(head, [other, tower])
    with torch.no_grad():
        assert torch.equal(found.bind("")(PICTURES), expected.bind("")(PICTURES))


def test_a_damaged_tower_is_named_itself(tmp_path):
    head, tower = tmp_path / "head.pth", tmp_path / "tower.safetensors"
    torch.save(aesthetic_head(), head)
    tensors = clip_l_image_model().state_dict()
    as_safetensors(tower, tensors | {"vision_model.post_layernorm.bias": torch.full((1024,), torch.nan)})
    with pytest.raises(BadRewardFile, match=r"'tower.safetensors' holds numbers in visual.ln_post.bias that are NaN"):
        load(head, [tower])


def read_by(function) -> int:
    """Bytes that this process reads from files meanwhile."""
    before = psutil.Process().io_counters().read_chars
    function()
    return psutil.Process().io_counters().read_chars - before


@pytest.mark.parametrize("writer", [as_safetensors, WRITERS["torch"], as_legacy])
def test_looking_for_a_tower_reads_no_content_of_other_files(tmp_path, writer):
    """But of torch's old format: such a file is read through, and not again until it changes."""
    head, other = tmp_path / "head.pth", tmp_path / "other.bin"
    torch.save(aesthetic_head(), head)
    writer(other, clip_l_image_model().state_dict())
    first = read_by(lambda: files_of(head, [other]))
    assert files_of(head, [other]) == [head, other]
    little = 0.1 * other.stat().st_size
    assert writer is as_legacy or first < little
    assert read_by(lambda: files_of(head, [other])) < little
    shapes = read_shapes(other)
    assert all(value.is_meta for value in shapes.values())
    assert {name: value.shape for name, value in shapes.items()} == {
        name: value.shape for name, value in read_tensors(other).items()
    }
    writer(other, clip_l_image_model(embedding=25).state_dict())
    assert files_of(head, [other]) == [head]


def test_the_files_of_a_reward_are_those_that_it_changes_with(tmp_path):
    head, clip, tower = tmp_path / "head.pth", tmp_path / "clip.pt", tmp_path / "tower.safetensors"
    torch.save(aesthetic_head(), head)
    torch.save(hps_tensors(), describe(clip))
    as_safetensors(tower, clip_l_image_model().state_dict())
    web_page(tmp_path / "page.pt")
    others = [tmp_path / "page.pt", clip, tower, tmp_path / "none.pt"]
    assert files_of(head, others) == [head, tower]
    assert files_of(clip, others) == [clip, clip.with_suffix(".json")]
    assert files_of(tmp_path / "page.pt", others) == [tmp_path / "page.pt"]
