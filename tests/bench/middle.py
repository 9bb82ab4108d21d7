"""Transformers of the host's own classes in a middle size, with random weights: 6 blocks of width 512, 1024 tokens."""

from dataclasses import replace
from typing import Any

from tests.families.models import TINY, Tiny

_WIDTH, _BLOCKS = 512, 6
_FLUX = {"hidden_size": _WIDTH, "num_heads": 4, "depth": 2, "depth_single_blocks": 4, "mlp_ratio": 4.0}
_CONTEXT = {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": _WIDTH}}
_CHANGES: dict[str, dict[str, Any]] = {
    "Z-Image": {"dim": _WIDTH, "n_heads": 4, "n_kv_heads": 4, "n_layers": _BLOCKS},
    # Its heads are 96 wide.
    "Lumina 2": {"dim": 480, "n_heads": 5, "n_kv_heads": 5, "n_layers": _BLOCKS},
    "Flux.1": _FLUX,
    "Flux.2": _FLUX,
    "Chroma": _FLUX | {"out_dim": _WIDTH},
    "HunyuanImage 2.1": _FLUX,
    "Krea 2": {"features": _WIDTH, "heads": 4, "kvheads": 2, "layers": _BLOCKS},
    "Qwen-Image": {"num_attention_heads": 4, "num_layers": _BLOCKS},
    "Cosmos-Predict2": {"model_channels": _WIDTH, "num_heads": 8, "num_blocks": _BLOCKS},
    # Its width is 64 times its depth.
    "SD 3": {"depth": _WIDTH // 64, "context_embedder_config": _CONTEXT, "x_block_self_attn_layers": [0, 1, 2]},
    "Wan 2.1": {"dim": _WIDTH, "num_heads": 4, "ffn_dim": 4 * _WIDTH, "num_layers": _BLOCKS},
    "LTX-Video": {
        "attention_head_dim": 64,
        "num_attention_heads": 8,
        "cross_attention_dim": _WIDTH,
        "num_layers": _BLOCKS,
    },
}
_SIDES_OF_TOKENS = {"Flux.2": 1, "HunyuanImage 2.1": 1, "LTX-Video": 1}
"""In cells, where they are not 2."""


def middle(name: str, tokens: int = 32) -> Tiny:
    """tokens: of a picture, along each side."""
    tiny, side = TINY[name], tokens * _SIDES_OF_TOKENS.get(name, 2)
    frames = (1,) * (len(tiny.latent) - 3)
    latent = (tiny.latent[0], *frames, side, side)
    return replace(tiny, layout=tiny.layout | _CHANGES[name], latent=latent)
