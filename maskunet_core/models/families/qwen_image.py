"""Qwen-Image."""

from .transformer import Transformer, layers

QWEN_IMAGE = Transformer(
    marks=("transformer_blocks", "img_in", "txt_in", "time_text_embed"),
    names={"QwenImage": "Qwen-Image", "MageFlow": "MageFlow"},
    stacks=("transformer_blocks",),
    tokens=("hidden_states", 0),
    width="inner_dim",
    attention=layers(
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    ),
    feed_forward=layers("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    # The text's own tokens are not used behind the last block.
    idle=("add_q_proj", "to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
)
