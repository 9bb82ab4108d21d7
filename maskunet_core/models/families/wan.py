"""Wan."""

from .transformer import Transformer, layers

WAN = Transformer(
    marks=("blocks", "head", "time_projection", "text_embedding", "dim"),
    names={"WAN21_T2V": "Wan 2.1", "WAN21_I2V": "Wan 2.1", "WAN22_T2V": "Wan 2.2"},
    stacks=("blocks",),
    tokens=("x", 0),
    width="dim",
    attention=layers(
        *(f"self_attn.{name}" for name in ("q", "k", "v", "o")),
        *(f"cross_attn.{name}" for name in ("q", "k", "v", "o")),
    ),
    feed_forward=layers("ffn.0", "ffn.2"),
)
