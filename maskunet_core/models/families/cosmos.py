"""Cosmos-Predict2 and Anima."""

from .transformer import Transformer, layers

COSMOS = Transformer(
    marks=("blocks", "t_embedder", "t_embedding_norm", "final_layer"),
    names={"Anima": "Anima", "CosmosT2IPredict2": "Cosmos-Predict2", "CosmosI2VPredict2": "Cosmos-Predict2"},
    stacks=("blocks",),
    tokens=("x_B_T_H_W_D", 0),
    width="model_channels",
    attention=layers(
        *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "output")),
        *(f"cross_attn.{name}_proj" for name in ("q", "k", "v", "output")),
    ),
    patch="patch_spatial",
    feed_forward=layers("mlp.layer1", "mlp.layer2"),
)
