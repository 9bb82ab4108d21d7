"""The toy model as the host knows models: MODEL (its own U-Net or transformer class), CLIP and VAE.

Everything here imports ComfyUI when it is called, never when it is imported.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from . import vocabulary
from .autoencoder import ToyAutoencoder
from .readers import AttentiveReader, ConvolutionalReader

WEIGHTS = Path(__file__).with_name("weights")
EMBEDDINGS = Path(__file__).with_name("embeddings")
"""Learned words that ship. Only the toy's text encoder finds them: no other has vectors of their width."""
FAMILY = "MaskUNetToy"

TEXT_CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_act": "gelu",
    "max_position_embeddings": vocabulary.MAX_TOKENS,
    "eos_token_id": vocabulary.END,
}
UNET_CONFIG = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 128,
    "channel_mult": [1, 1],
    "num_res_blocks": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
    "context_dim": TEXT_CONFIG["hidden_size"],
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
}
TRANSFORMER_CONFIG = {
    "image_model": "flux2",
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 1,
    "hidden_size": 128,
    "num_heads": 4,
    "depth": 2,
    "depth_single_blocks": 6,
    "mlp_ratio": 3.0,
    "axes_dim": [2, 10, 10, 10],
    "theta": 100,
    "txt_ids_dims": [3],
    "context_in_dim": TEXT_CONFIG["hidden_size"],
    "vec_in_dim": None,
    "guidance_embed": False,
    "global_modulation": True,
    "mlp_silu_act": True,
    "qkv_bias": False,
    "ops_bias": False,
}
"""Flux.2's shape, with the toy world's latents, text and size: double blocks, then single ones, with shared adaLN."""

ROW_SCALE = ".row_scale"
"""Of a matrix [rows, columns] that is kept in 8 bits: the name of what its rows [rows, 1] are multiplied by."""


def read_weights(name: str, directory: Path | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (fp32) and metadata of a part: `autoencoder`, `text_encoder`, `unet`, `transformer` or a reader."""
    path = (directory or WEIGHTS) / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        stored = {name: file.get_tensor(name).float() for name in names}
        metadata = file.metadata() or {}
    scales = {name.removesuffix(ROW_SCALE): stored.pop(name) for name in list(stored) if name.endswith(ROW_SCALE)}
    return {name: value * scales[name] if name in scales else value for name, value in stored.items()}, metadata


def load_reader(name: str, directory: Path | None = None) -> nn.Module:
    """Reader `reader_a` (reward) or `reader_b` (judge), frozen, on the CPU."""
    reader = {"reader_a": ConvolutionalReader, "reader_b": AttentiveReader}[name]()
    reader.load_state_dict(read_weights(name, directory)[0])
    return reader.eval().requires_grad_(False)


def load_autoencoder(directory: Path | None = None) -> ToyAutoencoder:
    autoencoder = ToyAutoencoder()
    autoencoder.load_state_dict(read_weights("autoencoder", directory)[0])
    return autoencoder.eval().requires_grad_(False)


def text_model_class() -> type[nn.Module]:
    """The host's CLIP text transformer with the toy world's own vocabulary."""
    import comfy.clip_model

    class ToyTextModel(comfy.clip_model.CLIPTextModel):
        def __init__(self, config: dict, dtype, device, operations):
            super().__init__(config, dtype, device, operations)
            size = config["hidden_size"]
            self.set_input_embeddings(operations.Embedding(len(vocabulary.WORDS), size, dtype=dtype, device=device))

    return ToyTextModel


class _WordTokenizer:
    """What the host's SDTokenizer asks of a tokeniser."""

    @classmethod
    def from_pretrained(cls, path: str, **options) -> "_WordTokenizer":
        return cls()

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": vocabulary.encode(text)}

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(vocabulary.WORDS)}


def _load_clip(directory: Path | None):
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models_base
    import folder_paths

    special_tokens = {"start": vocabulary.START, "end": vocabulary.END, "pad": vocabulary.END}

    class Tokenizer(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data={}):  # noqa: B006 - the host's signature
            super().__init__(
                max_length=vocabulary.MAX_TOKENS,
                embedding_directory=embedding_directory,
                embedding_size=TEXT_CONFIG["hidden_size"],
                tokenizer_class=_WordTokenizer,
                tokenizer_data=tokenizer_data,
            )

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006 - the host's signature
            super().__init__(
                device=device,
                dtype=dtype,
                max_length=vocabulary.MAX_TOKENS,
                textmodel_json_config=dict(TEXT_CONFIG),
                model_class=text_model_class(),
                special_tokens=special_tokens,
                return_projected_pooled=False,
                model_options=model_options,
            )

    class Clip(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006 - the host's signature
            super().__init__(device=device, dtype=dtype, model_options=model_options, clip_model=Encoder)

    class ClipTokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data={}):  # noqa: B006 - the host's signature
            super().__init__(embedding_directory, tokenizer_data, tokenizer=Tokenizer)

    tensors, _ = read_weights("text_encoder", directory)
    target = comfy.supported_models_base.ClipTarget(ClipTokenizer, Clip)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    folders = [*folder_paths.get_folder_paths("embeddings"), str(EMBEDDINGS)]
    return comfy.sd.CLIP(target, folders, parameters=parameters, state_dict=[tensors])


def _load_vae(directory: Path | None):
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    # The host builds a VAE from a configuration of its own class. It gets the smallest one that the class allows,
    # which sets up devices, dtypes and scaling for latents of 4 channels; then the toy's autoencoder takes its place.
    layout = {"double_z": True, "z_channels": 4, "resolution": 8, "in_channels": 3, "out_ch": 3, "ch": 32}
    layout |= {"ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    params = {"ddconfig": layout, "embed_dim": 4}
    vae = comfy.sd.VAE(sd=AutoencoderKL(**params).state_dict(), config={"params": params})

    vae.first_stage_model = load_autoencoder(directory).to(vae.vae_dtype)
    comfy.model_management.archive_model_dtypes(vae.first_stage_model)
    vae.disable_offload = True
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=comfy.model_management.vae_offload_device()
    )
    vae.size = None
    vae.model_size()
    return vae


def _latent_format(metadata: dict[str, str]) -> type:
    import comfy.latent_formats

    preview = json.loads(metadata["latent_rgb"])

    class ToyLatents(comfy.latent_formats.LatentFormat):
        latent_rgb_factors = preview["factors"]
        latent_rgb_factors_bias = preview["bias"]

    return ToyLatents


def _unet_settings(latents: type) -> Any:
    import comfy.supported_models_base

    class MaskUNetToy(comfy.supported_models_base.BASE):
        unet_extra_config = {}
        latent_format = latents
        memory_usage_factor = 1.0

    return MaskUNetToy(UNET_CONFIG)


def _transformer_settings(latents: type) -> Any:
    import comfy.model_base
    import comfy.supported_models_base

    class MaskUNetToyTransformer(comfy.supported_models_base.BASE):
        unet_extra_config = {}
        latent_format = latents
        memory_usage_factor = 1.0
        sampling_settings = {"shift": 1.0, "multiplier": 1.0}

        def get_model(self, state_dict, prefix="", device=None):
            return comfy.model_base.Flux(self, model_type=comfy.model_base.ModelType.FLOW, device=device)

    return MaskUNetToyTransformer(TRANSFORMER_CONFIG)


_SETTINGS = {"unet": _unet_settings, "transformer": _transformer_settings}


def _load_body(body: str, directory: Path | None, disable_dynamic: bool = False):
    """MODEL of the part `unet` or `transformer`, which share text encoder and autoencoder."""
    import comfy.model_management
    import comfy.model_patcher

    tensors, metadata = read_weights(body, directory)
    management = comfy.model_management
    config = _SETTINGS[body](_latent_format(metadata))
    load_device = management.get_torch_device()
    parameters = sum(tensor.numel() for tensor in tensors.values())
    dtype = management.unet_dtype(model_params=parameters, supported_dtypes=config.supported_inference_dtypes)
    cast = management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    model = config.get_model(tensors, device=management.unet_inital_load_device(parameters, dtype))
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=load_device, offload_device=management.unet_offload_device())
    model.load_model_weights(tensors, "", assign=patcher.is_dynamic())
    # By this the host makes a copy with weights of its own, to train on or to lie on the device as a whole.
    patcher.cached_patcher_init = (_load_body, (body, directory))
    return patcher


def load_toy_model(directory: Path | None = None, body: str = "unet"):
    """(MODEL, CLIP, VAE) of the toy world, from the shipped weights or from those in `directory`.

    body: `unet` or `transformer`, what denoises. Text encoder and autoencoder are the same for both.
    """
    return _load_body(body, directory), _load_clip(directory), _load_vae(directory)
