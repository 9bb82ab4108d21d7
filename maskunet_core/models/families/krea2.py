"""Krea 2."""

from .transformer import Transformer, layers

KREA2 = Transformer(
    marks=("blocks", "txtfusion", "tproj"),
    names={"Krea2": "Krea 2"},
    stacks=("blocks",),
    tokens=("x", 0),
    width="first.out_features",
    attention=layers("attn.wq", "attn.wk", "attn.wv", "attn.wo", "attn.gate"),
    patch="patch",
    feed_forward=layers("mlp.gate", "mlp.up", "mlp.down"),
)
