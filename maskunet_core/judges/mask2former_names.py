"""Mask2Former's tensors under the names of mmdetection 2, from files of mmdetection 3 and of transformers."""

from collections.abc import Mapping

from torch import Tensor

from .names import joined, renamed

_OF_MMDETECTION_3 = {
    r"^(panoptic_head\.pixel_decoder\.encoder\.layers\.\d+)\.self_attn\.": r"\1.attentions.0.",
    r"^(panoptic_head\.transformer_decoder\.layers\.\d+)\.cross_attn\.": r"\1.attentions.0.",
    r"^(panoptic_head\.transformer_decoder\.layers\.\d+)\.self_attn\.": r"\1.attentions.1.",
    r"^(panoptic_head\..*layers\.\d+)\.ffn\.layers": r"\1.ffns.0.layers",
}
_OF_TRANSFORMERS = {
    r"^class_predictor\.": "panoptic_head.cls_embed.",
    r"^pixel_level_module\.encoder\.encoder\.layers\.": "backbone.stages.",
    r"^pixel_level_module\.encoder\.embeddings\.(patch_embeddings\.)?": "backbone.patch_embed.",
    r"^pixel_level_module\.encoder\.hidden_states_norms\.stage(\d)": lambda match: f"backbone.norm{int(match[1]) - 1}",
    r"^(backbone\..*)\.layernorm_before\.": r"\1.norm1.",
    r"^(backbone\..*)\.layernorm_after\.": r"\1.norm2.",
    r"^(backbone\..*)\.attention\.self\.": r"\1.attn.w_msa.",
    r"^(backbone\..*)\.attention\.output\.dense\.": r"\1.attn.w_msa.proj.",
    r"^(backbone\..*)\.intermediate\.dense\.": r"\1.ffn.layers.0.0.",
    r"^(backbone\..*)\.output\.dense\.": r"\1.ffn.layers.1.",
    r"^pixel_level_module\.decoder\.": "panoptic_head.pixel_decoder.",
    r"\.level_embed$": ".level_encoding.weight",
    r"\.mask_projection\.": ".mask_feature.",
    r"\.adapter_1\.": ".lateral_convs.0.",
    r"\.layer_1\.": ".output_convs.0.",
    r"\.input_projections\.": ".input_convs.",
    r"(_convs\.\d)\.0\.": r"\1.conv.",
    r"(_convs\.\d)\.1\.": r"\1.gn.",
    r"(pixel_decoder\.encoder\.layers\.\d+)\.self_attn\.": r"\1.attentions.0.",
    r"(pixel_decoder\.encoder\.layers\.\d+)\.self_attn_layer_norm\.": r"\1.norms.0.",
    r"(pixel_decoder\.encoder\.layers\.\d+)\.final_layer_norm\.": r"\1.norms.1.",
    r"^transformer_module\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.": lambda match: (
        f"panoptic_head.mask_embed.{2 * int(match[1])}."
    ),
    r"^transformer_module\.decoder\.layernorm\.": "panoptic_head.transformer_decoder.post_norm.",
    r"^transformer_module\.decoder\.": "panoptic_head.transformer_decoder.",
    r"^transformer_module\.queries_embedder\.": "panoptic_head.query_embed.",
    r"^transformer_module\.queries_features\.": "panoptic_head.query_feat.",
    r"^transformer_module\.": "panoptic_head.",
    r"(transformer_decoder\.layers\.\d+)\.cross_attn\.": r"\1.attentions.0.attn.",
    r"(transformer_decoder\.layers\.\d+)\.self_attn\.": r"\1.attentions.1.attn.",
    r"(transformer_decoder\.layers\.\d+)\.cross_attn_layer_norm\.": r"\1.norms.0.",
    r"(transformer_decoder\.layers\.\d+)\.self_attn_layer_norm\.": r"\1.norms.1.",
    r"(transformer_decoder\.layers\.\d+)\.final_layer_norm\.": r"\1.norms.2.",
    r"^(panoptic_head\..*layers\.\d+)\.fc1\.": r"\1.ffns.0.layers.0.0.",
    r"^(panoptic_head\..*layers\.\d+)\.fc2\.": r"\1.ffns.0.layers.1.",
}
_JOINED = (("w_msa.query.", "w_msa.key.", "w_msa.value.", "w_msa.qkv."), ("q_proj.", "k_proj.", "v_proj.", "in_proj_"))
"""Queries, keys and values that transformers keeps apart, and their name where they are one."""


def to_mmdet2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of mmdetection 3; those of mmdetection 2 pass through."""
    return renamed(tensors, _OF_MMDETECTION_3)


def transformers_to_mmdet2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of transformers' Mask2Former on Swin, without the prefix `model.`."""
    found = joined(renamed(tensors, _OF_TRANSFORMERS), _JOINED)
    return {name: _unfolded(value) if ".downsample." in name else value for name, value in found.items()}


def _unfolded(value: Tensor) -> Tensor:
    """`[..., 4 C]` of four neighbouring cells, which transformers takes cell by cell and column by column, in the order
    of torch's `unfold`: channel by channel, and row by row."""
    cells = value.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
    return cells.transpose(-1, -2).flatten(-2)
