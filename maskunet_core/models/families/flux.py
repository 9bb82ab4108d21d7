"""Flux and what is built of its blocks: Flux.1, Flux.2, Chroma, HunyuanImage, the toy transformer.

A single block's first layer gives query, key and value, and the input of its feed-forward part; its second one takes
the attention's result and the feed-forward part's.
"""

from .family import Target
from .transformer import Transformer, layers

FLUX = Transformer(
    marks=("double_blocks", "single_blocks", "img_in", "txt_in", "hidden_size"),
    names={
        "Flux": "Flux.1",
        "FluxInpaint": "Flux.1",
        "FluxSchnell": "Flux.1 schnell",
        "Flux2": "Flux.2",
        "Chroma": "Chroma",
        "HunyuanImage21": "HunyuanImage 2.1",
        "LongCatImage": "LongCat-Image",
        "MaskUNetToyTransformer": "the MaskUNet toy transformer",
    },
    stacks=("double_blocks", "single_blocks"),
    tokens=("img", 0),
    width="hidden_size",
    attention=(
        *layers("img_attn.qkv", "img_attn.proj", "txt_attn.qkv", "txt_attn.proj"),
        Target("linear1", "qkv", rows=lambda rows, columns: (0, 3 * columns)),
        Target("linear2", "proj", columns=lambda rows, columns: (0, rows)),
    ),
    feed_forward=(
        *layers("img_mlp.0", "img_mlp.2", "txt_mlp.0", "txt_mlp.2"),
        Target("linear1", "mlp", rows=lambda rows, columns: (3 * columns, rows)),
        Target("linear2", "mlp", columns=lambda rows, columns: (rows, columns)),
    ),
)
