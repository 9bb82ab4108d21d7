"""NextDiT: Z-Image and Lumina 2."""

from .transformer import Transformer, layers

NEXTDIT = Transformer(
    marks=("layers", "noise_refiner", "context_refiner", "x_embedder", "cap_embedder"),
    names={"ZImage": "Z-Image", "ZImagePixelSpace": "Z-Image", "Lumina2": "Lumina 2"},
    prelude=("context_refiner", "noise_refiner"),
    stacks=("layers",),
    tokens=("x", 0),
    width="dim",
    attention=layers("attention.qkv", "attention.out"),
    feed_forward=layers("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
)
