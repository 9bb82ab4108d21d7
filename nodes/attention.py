"""Attention guidance: the words of a prompt, guidance by what the model looks at, and that as pictures."""

from dataclasses import replace
from typing import TYPE_CHECKING

import comfy.sample
import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ..maskunet_core.attention.parsers import parsers
from ..maskunet_core.choices import ATTENTION_METHODS, PERCENT_STEP, PUBLISHED_STEP
from .legend import captioned
from .node_text import tell
from .types import WordsType

if TYPE_CHECKING:
    from ..maskunet_core.attention.words import PromptWords

_NOTHING = "No words were found that name things. Name them in `words`, for instance red > apple."
_RULE = "simple rule"
_TILE = 128
"""Pixels of a map's longer side, at least."""


class MaskUNetPromptWords(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetPromptWords",
            display_name="MaskUNet Prompt Words",
            category="MaskUNet/attention",
            description="CLIP Text Encode that also finds what the prompt names, and which words describe what: "
            "'a red apple and a checkered bowl' gives red > apple; checkered > bowl. What it found is shown on the "
            "node; it can be overruled. For MaskUNet Attention Guidance and MaskUNet Attention Maps.",
            search_aliases=["prompt words", "subjects", "nouns", "modifiers", "tokens", "attend and excite", "syngen"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of SD 1.5, SD 2.x, SDXL or the toy model."),
                io.String.Input(
                    "text", multiline=True, dynamic_prompts=True, tooltip="The prompt, as for CLIP Text Encode."
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Empty: words are found by a simple rule. Else what you write counts instead: "
                    "red, small > apple; checkered > bowl; frog. Before > stand the words that describe, after it the "
                    "thing.",
                ),
                io.Combo.Input(
                    "finder",
                    options=[_RULE, *parsers()],
                    default=_RULE,
                    optional=True,
                    advanced=True,
                    tooltip="How words are found where `words` is empty. Beside the simple rule stand the parsers of "
                    "spaCy that are installed in ComfyUI's Python; none is needed.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("CONDITIONING", tooltip="The prompt, for the sampler's positive input."),
                WordsType.Output(
                    "MASKUNET_WORDS", tooltip="What was found, with the places of the words in the prompt."
                ),
                io.String.Output("found", tooltip="What was found, as text. It can be pasted into `words`."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, text: str, words: str = "", finder: str = _RULE) -> io.NodeOutput:
        from ..maskunet_core.attention.grammar import sets_by_grammar
        from ..maskunet_core.attention.words import read, sets_as_told, sets_in

        prompt = read(clip, text)
        if words.strip():
            sets = sets_as_told(prompt, words, clip)
        else:
            sets = sets_in(prompt.words) if finder == _RULE else sets_by_grammar(prompt.words, finder)
        prompt = replace(prompt, sets=sets)
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        tell(prompt.text or _NOTHING, cls.hidden.unique_id)
        return io.NodeOutput(conditioning, prompt, prompt.text)


class MaskUNetAttentionGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetAttentionGuidance",
            display_name="MaskUNet Attention Guidance",
            category="MaskUNet/attention",
            description="Makes the image show all that the prompt names, each with its own properties: before a step "
            "the noisy latent is moved to where the model's attention follows the words. Attend-and-Excite keeps any "
            "thing from being left out, SynGen keeps colours and textures with their things. No reward, no download, "
            "nothing is trained; the model itself is never changed.",
            search_aliases=[
                "attend and excite",
                "attend-and-excite",
                "syngen",
                "linguistic binding",
                "attribute binding",
                "color bleeding",
                "missing objects",
            ],
            inputs=[
                io.Model.Input("model", tooltip="SD 1.5, SD 2.x, SDXL or the toy model, with any LoRAs and masks."),
                WordsType.Input(
                    "words", tooltip="From MaskUNet Prompt Words, whose conditioning the sampler must get."
                ),
                io.Combo.Input(
                    "method",
                    options=list(ATTENTION_METHODS),
                    default=ATTENTION_METHODS[1],
                    tooltip="attend-and-excite: no thing is left out. syngen: words that describe stay with their "
                    "things, and away from others.",
                ),
                io.Float.Input(
                    "step",
                    default=20.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="How far the latent is moved at a step; 0 leaves the image as it is. 20 was published for "
                    "SD 1.4 at 512 pixels. The toy model wants 5.",
                ),
                io.Float.Input(
                    "guided_share",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the sampler's steps that are guided, from the first on. Published: half of 50, "
                    "and all where there are only 15.",
                ),
                io.Combo.Input(
                    "step_unit",
                    options=[PUBLISHED_STEP, PERCENT_STEP],
                    default=PUBLISHED_STEP,
                    optional=True,
                    advanced=True,
                    tooltip="What `step` counts in. times the gradient: as published. percent of the latent: each step "
                    "moves the latent by so much of its size, whatever the model or its gradient; begin at 5.",
                ),
                io.Boolean.Input(
                    "refine",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="attend-and-excite alone: at three steps the update is repeated, up to 20 times, until "
                    "each thing is attended to well enough. Published as on; it can take half as long again.",
                ),
            ],
            outputs=[io.Model.Output("MODEL", tooltip="The model to sample with. The input model stays as it was.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        words: "PromptWords",
        method: str,
        step: float,
        guided_share: float,
        step_unit: str = PUBLISHED_STEP,
        refine: bool = False,
    ) -> io.NodeOutput:
        if step == 0.0 or guided_share == 0.0:
            return io.NodeOutput(model)
        from ..maskunet_core.attention.guidance import AttentionGuidance, GuidanceSettings
        from .sampler_trial import takes_up_changes

        settings = GuidanceSettings(method, step, step_unit, guided_share, refine)
        return io.NodeOutput(AttentionGuidance(words, settings, takes_up_changes).guiding(model))


class MaskUNetAttentionMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetAttentionMaps",
            display_name="MaskUNet Attention Maps",
            category="MaskUNet/attention",
            description="Shows where in a finished picture the model sees each word of the prompt: noise is added to "
            "the latent, the model looks at it once, and its attention to each word is drawn, bright where it is high.",
            search_aliases=["attention map", "heat map", "daam", "cross attention", "visualize attention", "where"],
            inputs=[
                io.Model.Input("model", tooltip="SD 1.5, SD 2.x, SDXL or the toy model."),
                WordsType.Input("words", tooltip="From MaskUNet Prompt Words: the words whose maps are drawn."),
                io.Conditioning.Input("positive", tooltip="The conditioning of the same MaskUNet Prompt Words."),
                io.Latent.Input("latent", tooltip="The finished latent, straight from a sampler."),
                io.Float.Input(
                    "percent",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="At which point of sampling the model looks: 0 is pure noise, 1 the finished picture. "
                    "The layout is settled before the middle.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "IMAGE", tooltip="For each image of the batch one picture for each word, brightest at its highest."
                )
            ],
        )

    @classmethod
    def execute(cls, model, words: "PromptWords", positive, latent: dict, percent: float) -> io.NodeOutput:
        from ..maskunet_core.attention.maps import NoAttentionMaps, maps_of

        samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
        noise = comfy.sample.prepare_noise(samples, 0, latent.get("batch_index"))
        maps = maps_of(model, positive, samples, percent, noise)
        if maps is None:
            raise NoAttentionMaps("The positive conditioning does not act at this percent. Choose another percent.")
        shown = {word: positions for found in words.sets for word, positions in found.words()}
        if not shown:
            raise NoAttentionMaps(_NOTHING)
        pictures = [_picture(maps[..., list(positions)].sum(-1)) for positions in shown.values()]
        lines = [[word] for _ in range(len(maps)) for word in shown]
        return io.NodeOutput(captioned(torch.stack(pictures, 1).flatten(0, 1), lines))


def _picture(shares: Tensor) -> Tensor:
    """`[N, H, W, 3]` in [0, 1] of maps `[N, h, w]`, each from its lowest to its highest value."""
    low, high = shares.amin((1, 2), keepdim=True), shares.amax((1, 2), keepdim=True)
    bright = ((shares - low) / (high - low).clamp_min(1e-12)).cpu().float()
    factor = max(1, -(-_TILE // max(shares.shape[1:])))
    large = F.interpolate(bright[:, None], scale_factor=factor, mode="nearest")[:, 0]
    # Black, red, yellow, white.
    return torch.stack([3 * large, 3 * large - 1, 3 * large - 2], -1).clamp(0, 1)
