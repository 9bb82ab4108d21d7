"""LTX-Video, without sound."""

from .transformer import Transformer, layers

LTX = Transformer(
    marks=("transformer_blocks", "adaln_single", "patchify_proj", "inner_dim"),
    names={"LTXV": "LTX-Video"},
    # With sound its blocks take two pictures' worth of tokens at once.
    lacks=("audio_patchify_proj",),
    stacks=("transformer_blocks",),
    tokens=("x", 0),
    width="inner_dim",
    attention=layers(
        *(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    ),
    patch="patchifier.patch_size",
    feed_forward=layers("ff.net.0.proj", "ff.net.2"),
)
