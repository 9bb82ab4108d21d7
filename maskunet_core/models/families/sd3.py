"""SD 3 and SD 3.5 (MMDiT)."""

from .transformer import Transformer, layers

SD3 = Transformer(
    marks=("joint_blocks", "context_embedder", "hidden_size"),
    names={"SD3": "SD 3"},
    stacks=("joint_blocks",),
    tokens=("x", 1),
    width="hidden_size",
    attention=layers("attn.qkv", "attn.proj", "attn2.qkv", "attn2.proj"),
    feed_forward=layers("mlp.fc1", "mlp.fc2"),
    # The host calls no DIFFUSION_MODEL wrappers here.
    wrapper="APPLY_MODEL",
)
