"""The toy model in the stock nodes' hands: text, latents, samplers, previews, batches, LoRAs."""

import numpy as np
import pytest
import torch

from maskunet_core.toy.judge import present_pairs, read
from maskunet_core.toy.model import load_reader, load_toy_model, read_weights
from maskunet_core.toy.vocabulary import encode_padded, pair_name


@pytest.fixture(scope="module", params=["unet", "transformer"])
def body(request):
    return request.param


@pytest.fixture(scope="module")
def toy(body):
    return load_toy_model(body=body)


def test_the_node_gives_the_unet_unless_told(extension):
    node = extension("toy").MaskUNetToyModel
    kinds = [node.execute(*told).result[0].model.model_type.name for told in ((), ("U-Net",), ("transformer",))]
    assert kinds == ["EPS", "EPS", "FLOW"]


def encoded(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def ksampler(
    model, clip, sampler="euler", scheduler="normal", steps=3, batch=1, size=64, text="a red circle", **options
):
    """What the stock nodes EmptyLatentImage and KSampler do."""
    import comfy.sample

    latent = torch.zeros(batch, 4, size // 8, size // 8)
    noise = comfy.sample.prepare_noise(latent, 5)
    conditioning = encoded(clip, text), encoded(clip, "")
    return comfy.sample.sample(
        model, noise, steps, 5.0, sampler, scheduler, *conditioning, latent, disable_pbar=True, seed=5
    )


def test_every_sampler_and_every_scheduler_works(toy):
    import comfy.samplers

    model, clip, _ = toy
    for sampler in comfy.samplers.KSampler.SAMPLERS:
        result = ksampler(model, clip, sampler=sampler)
        assert result.shape == (1, 4, 8, 8), sampler
        assert torch.isfinite(result).all(), sampler
    for scheduler in comfy.samplers.KSampler.SCHEDULERS:
        assert torch.isfinite(ksampler(model, clip, scheduler=scheduler)).all(), scheduler


PROMPTS = (
    "",
    "masterpiece, best quality",
    "(red:1.3) circle",
    "a red circle " * 30,
    "ein roter Kreis \N{LARGE RED CIRCLE}",
)


@pytest.mark.parametrize("text", [*PROMPTS, "embedding:none"])
def test_any_prompt_text_is_accepted(toy, text):
    model, clip, _ = toy
    assert torch.isfinite(ksampler(model, clip, text=text)).all()


def test_unknown_words_do_not_change_the_conditioning(toy):
    clip = toy[1]
    plain, decorated = (encoded(clip, text)[0][0] for text in ("a red circle", "a photo-realistic red circle, 8k!"))
    assert torch.equal(plain, decorated)


def test_weights_in_a_prompt_act(toy):
    clip = toy[1]
    plain, heavier = (encoded(clip, text)[0][0] for text in ("a red circle", "a (red:1.5) circle"))
    assert plain.shape == heavier.shape == (1, 16, 128)
    assert not torch.equal(plain, heavier)


def test_the_hosts_objects_hold_the_shipped_weights(toy, body):
    model, clip, vae = toy
    modules = {
        body: model.model.diffusion_model,
        "text_encoder": clip.cond_stage_model.clip_l.transformer,
        "autoencoder": vae.first_stage_model,
    }
    for name, module in modules.items():
        weights, metadata = read_weights(name)
        assert metadata["recipe"]
        state = module.state_dict()
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[key].float(), value) for key, value in weights.items())


def test_the_host_can_make_a_copy_with_weights_of_its_own(toy):
    """As Train LoRA asks for, and as hosts that stream weights do for a search."""
    model = toy[0]
    copied = model.clone(force_deepcopy=True)
    ours, theirs = (patcher.model.diffusion_model.state_dict() for patcher in (model, copied))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name])
        assert weight.data_ptr() != theirs[name].data_ptr()


def test_the_trainers_text_path_equals_the_hosts(toy):
    from trainer.base import BaseModel

    model, clip, vae = toy
    texts = ["a red circle left of a small blue square", ""]
    base = BaseModel(model, clip, vae)
    batch = base.encode_tokens(torch.tensor([encode_padded(text) for text in texts]))
    for n, text in enumerate(texts):
        torch.testing.assert_close(batch[n], encoded(clip, text)[0][0][0])
        torch.testing.assert_close(base.encode_text(text)["cross_attn"], batch[n])


def test_the_vae_encodes_and_decodes(toy):
    from trainer.toy.world import render, sample_scenes

    vae = toy[2]
    stream = torch.Generator().manual_seed(0)
    pictures = render(sample_scenes(4, stream), stream).movedim(1, -1)
    latents = vae.encode(pictures)
    assert latents.shape == (4, 4, 8, 8)
    assert 0.5 < latents.std() < 1.5
    decoded = vae.decode(latents)
    assert decoded.shape == pictures.shape
    assert (decoded - pictures).square().mean().sqrt() < 0.05
    assert vae.encode(torch.rand(1, 70, 90, 3)).shape == (1, 4, 8, 11)


def test_batches_and_other_sizes(toy):
    model, clip, vae = toy
    assert vae.decode(ksampler(model, clip, batch=3)).shape == (3, 64, 64, 3)
    assert vae.decode(ksampler(model, clip, size=96)).shape == (1, 96, 96, 3)


def test_previews_look_like_the_picture(toy):
    """The host's latent preview of a picture has the picture's colours."""
    import latent_preview

    from trainer.toy.world import render, sample_scenes

    model, _, vae = toy
    stream = torch.Generator().manual_seed(1)
    picture = render(sample_scenes(1, stream), stream).movedim(1, -1)
    latent_format = model.model.latent_format
    previewer = latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    )
    _, image, _ = previewer.decode_latent_to_preview_image("JPEG", vae.encode(picture))
    assert image.size == (8, 8)
    shown = torch.tensor(np.asarray(image)) / 255
    small = picture[0].reshape(8, 8, 8, 8, 3).mean(dim=(1, 3))
    assert (shown - small).abs().mean() < 0.1


LORA_KEYS = {
    "unet": "lora_unet_output_blocks_3_1_transformer_blocks_0_attn2_to_q",
    "transformer": "lora_unet_double_blocks_1_img_attn_proj",
}


def test_loras_find_the_body_and_the_text_encoder(toy, body):
    import comfy.lora
    import comfy.sd

    model, clip, _ = toy
    torch.manual_seed(0)
    text_key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    file = {}
    for key, width in ((LORA_KEYS[body], 128), (text_key, 128)):
        file[f"{key}.lora_up.weight"] = torch.randn(width, 2)
        file[f"{key}.lora_down.weight"] = torch.randn(2, width)
        file[f"{key}.alpha"] = torch.tensor(2.0)
    patched, patched_clip = comfy.sd.load_lora_for_models(model, clip, file, 1.0, 1.0)
    assert len(patched.patches) == 1
    assert len(patched_clip.patcher.patches) == 1
    assert not torch.equal(encoded(patched_clip, "a red circle")[0][0], encoded(clip, "a red circle")[0][0])
    assert not torch.equal(ksampler(patched, clip), ksampler(model, clip))


def test_image_to_image_and_inpainting(toy):
    model, clip, vae = toy
    import comfy.sample

    from trainer.toy.world import render, sample_scenes

    stream = torch.Generator().manual_seed(2)
    latent = vae.encode(render(sample_scenes(1, stream), stream).movedim(1, -1))
    noise = comfy.sample.prepare_noise(latent, 1)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1.0
    result = comfy.sample.sample(
        model, noise, 6, 5.0, "euler", "normal", encoded(clip, "a red circle"), encoded(clip, ""), latent,
        denoise=0.6, noise_mask=mask, disable_pbar=True, seed=1,
    )  # fmt: skip
    torch.testing.assert_close(result[..., :4], latent[..., :4], rtol=0, atol=1e-4)
    assert (result[..., 4:] - latent[..., 4:]).abs().max() > 0.1


def test_the_learned_word_that_ships_is_found_and_draws_what_it_was_taught(toy):
    model, clip, vae = toy
    seen = []
    for text in ("a red embedding:toy_star", "a red a"):
        latents = ksampler(model, clip, "ddim", steps=10, batch=6, text=text)
        reading = read(load_reader("reader_b"), vae.decode(latents).movedim(-1, 1).clamp(0, 1))
        seen.append([[pair_name(pair) for pair in present_pairs(reading, number)] for number in range(6)])
    learned, start = (found.count(["red star"]) for found in seen)
    assert learned >= 5
    assert start == 0
