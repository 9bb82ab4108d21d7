"""BLIP that answers questions about pictures (arXiv 2201.12086), as T2I-CompBench asks it: how probable is "yes"?

Parameters have the names of the published file, `model_base_vqa_capfilt_large.pth`.
"""

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..rewards.blip_layers import ImageEncoder, TextEncoder
from ..rewards.layers import fill, heads_of
from ..rewards.preprocess import normalise
from ..rewards.tokens import bert_tokens
from .pictures import levels

_YES, _NO = 2748, 2053
_DECODE, _ENCODE = 30522, 30523
"""Ids of the words that an answer begins with, and of the marks that an answer and a question begin with."""
_WORDS = 50
"""Of a question, at most."""
_HEAD = "text_decoder.cls.predictions."


class BlipVqa(nn.Module):
    """tensors: of the file, for their shapes. heads: of the image encoder and of the text's encoder and decoder."""

    def __init__(self, tensors: Mapping[str, Tensor], heads: tuple[int, int] | None = None):
        super().__init__()
        vision, text = tensors["visual_encoder.cls_token"].shape[-1], len(tensors[_HEAD + "transform.dense.bias"])
        image_heads, text_heads = heads or (heads_of(vision), heads_of(text))
        self.visual_encoder = ImageEncoder(tensors, "visual_encoder.", image_heads)
        self.text_encoder = TextEncoder(tensors, "text_encoder.", text_heads)
        transform = {"dense": nn.Linear(text, text), "LayerNorm": nn.LayerNorm(text, eps=1e-12)}
        # Of the words that an answer may begin with just two are asked for.
        predictions = nn.ModuleDict({"transform": nn.ModuleDict(transform), "decoder": nn.Linear(text, 2)})
        self.text_decoder = nn.ModuleDict(
            {
                "bert": TextEncoder(tensors, "text_decoder.bert.", text_heads),
                "cls": nn.ModuleDict({"predictions": predictions}),
            }
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], heads: tuple[int, int] | None = None) -> "BlipVqa":
        """Raises BadTensors."""
        with torch.device("meta"):
            model = cls(tensors, heads)
        words = {
            f"{_HEAD}decoder.{part}": tensors[f"{_HEAD}decoder.{part}"][[_YES, _NO]] for part in ("weight", "bias")
        }
        return fill(model, {**tensors, **words}, torch.float32)

    def forward(self, seen: Tensor, ids: Tensor) -> Tensor:
        """Logits `[1, 2]` of "yes" and "no". seen: the image encoder's `[1, M, width]`; ids: `[1, N]` of a question."""
        asked = self.text_encoder(ids, seen)
        first = torch.tensor([[_DECODE]], device=ids.device)
        head = self.text_decoder["cls"]["predictions"]
        x = self.text_decoder["bert"](first, asked)[:, 0]
        return head["decoder"](head["transform"]["LayerNorm"](F.gelu(head["transform"]["dense"](x))))

    @torch.no_grad()
    def answers(self, picture: Image.Image, questions: Sequence[str]) -> list[float]:
        """Of each question, how probable the answer "yes" is if there were just "yes" and "no"."""
        device = self.visual_encoder.cls_token.device
        seen = self.visual_encoder(self.prepare(picture).to(device))
        logits = [self(seen, question_ids(question).to(device)) for question in questions]
        return [float(of_one.softmax(-1)[0, 0]) for of_one in logits]

    def prepare(self, picture: Image.Image) -> Tensor:
        """`[1, 3, size, size]`: squashed, bicubic, as Pillow does."""
        side = self.visual_encoder.size
        small = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        return normalise(levels(small).float() / 255)[None]


def question_ids(question: str) -> Tensor:
    """`[1, N]`: of a question as BLIP's data brings it, in lower case and without some marks."""
    words = re.sub(r"""[.!"()*#:;~]""", "", question.lower()).rstrip(" ").split(" ")
    ids, mask = bert_tokens(" ".join(words[:_WORDS]))
    ids = ids[mask.bool()]
    ids[0] = _ENCODE
    return ids[None]
