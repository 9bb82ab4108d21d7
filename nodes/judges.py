"""Load a judge of single pictures, and check pictures with it."""

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..maskunet_core.judges.verdict import BoundJudge, PromptJudge, Verdict
from .boxes import boxed
from .folders import JUDGES, REWARD, fingerprint
from .legend import captioned
from .node_text import tell
from .patchers import whole_patcher
from .pictures import coloured, to_pillow
from .types import JudgeType

TOY_JUDGE = "toy judge (bundled)"
_TOLD = 4
"""Wrong pictures that are told on the node itself."""


class LoadedJudge:
    """What travels on a MASKUNET_JUDGE link: the judge, and the patchers by which the host manages its memory."""

    def __init__(self, judge: PromptJudge, work: int = 0):
        """work: bytes that it needs on the device beside its weights."""
        self.judge, self.work = judge, work
        self._patchers = [whole_patcher(module) for module in judge.modules()]

    def patchers(self) -> list[comfy.model_patcher.ModelPatcher]:
        return list(self._patchers)

    def verdicts(self, images: Tensor, prompt: str) -> tuple[BoundJudge, list[Verdict]]:
        """Of pictures `[B, H, W, 3]`, and what read the prompt."""
        bound, found = self.judge.bind(prompt), []
        comfy.model_management.load_models_gpu(self.patchers(), memory_required=self.work)
        progress = comfy.utils.ProgressBar(len(images))
        for picture in images:
            comfy.model_management.throw_exception_if_processing_interrupted()
            found.append(bound.look(to_pillow(picture)))
            progress.update(1)
        return bound, found


class MaskUNetJudgeLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetJudgeLoader",
            display_name="MaskUNet Judge Loader",
            category="MaskUNet/judge",
            description="Loads a judge: what tells whether a picture shows the things that a prompt names, and marks "
            "them. GenEval's detector (Mask2Former of COCO's 80 things) is read from its published file in "
            "models/judges, whatever the file is called. The toy judge comes with the extension and reads the pictures "
            "of MaskUNet Toy Model.",
            search_aliases=["geneval", "object detector", "mask2former", "benchmark", "evaluate"],
            inputs=[
                io.Combo.Input(
                    "judge_name",
                    options=[TOY_JUDGE, *folder_paths.get_filename_list(JUDGES)],
                    tooltip="Detector's file in models/judges, or the bundled toy judge. Colours also need OpenAI's "
                    "CLIP ViT-L/14 in models/judges, models/clip_vision or models/reward.",
                )
            ],
            outputs=[JudgeType.Output("MASKUNET_JUDGE", tooltip="The judge, to check or to compare pictures with.")],
        )

    @classmethod
    def validate_inputs(cls, judge_name: str | None) -> bool | str:
        """Replaces the host's own check of the list, which would not say where the file is to be had."""
        if judge_name in (None, TOY_JUDGE) or folder_paths.get_full_path(JUDGES, judge_name):
            return True
        from ..maskunet_core.judges.files import DETECTOR

        return f"'{judge_name}' is not in models/judges. This file can be put there: {DETECTOR}."

    @classmethod
    def fingerprint_inputs(cls, judge_name: str) -> list[list[int]]:
        if judge_name == TOY_JUDGE:
            return []
        from ..maskunet_core.judges.objects import files_of

        return fingerprint(*files_of(Path(folder_paths.get_full_path_or_raise(JUDGES, judge_name)), _in_host()))

    @classmethod
    def execute(cls, judge_name: str) -> io.NodeOutput:
        with torch.inference_mode(False):
            # The architectures are imported where one is wanted: ComfyUI's start does not wait for them.
            from ..maskunet_core.judges.objects import WORK, load
            from ..maskunet_core.judges.toy import ToyJudge

            if judge_name == TOY_JUDGE:
                return io.NodeOutput(LoadedJudge(ToyJudge()))
            path = Path(folder_paths.get_full_path_or_raise(JUDGES, judge_name))
            return io.NodeOutput(LoadedJudge(load(path, _in_host()), WORK))


def _in_host() -> list[Path]:
    """Where CLIP may lie."""
    from ..maskunet_core.rewards.files import files_in_host

    return list(files_in_host(JUDGES, "clip_vision", REWARD))


class MaskUNetCheckPicture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaskUNetCheckPicture",
            display_name="MaskUNet Check Picture",
            category="MaskUNet/judge",
            description="Tells whether pictures show what a prompt names: the things, how many, in which colour and "
            "where. Draws a box around what was seen, and says why a picture is wrong.",
            search_aliases=["count objects", "detect", "bounding box", "why is it wrong", "geneval", "verify"],
            inputs=[
                io.Image.Input("images", tooltip="The pictures, one or a batch."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    tooltip='What to look for: a prompt such as "a photo of a dog right of a teddy bear", or a list '
                    'such as "2 clocks, a blue fire hydrant, no person". A number is meant exactly. The toy judge '
                    "reads toy prompts.",
                ),
                JudgeType.Input("judge", tooltip="From MaskUNet Judge Loader."),
            ],
            outputs=[
                io.Float.Output("scores", is_output_list=True, tooltip="Per picture: 1 where it is right, else 0."),
                io.Image.Output(
                    "IMAGE",
                    tooltip="Each picture with what was seen in it, green where the prompt names it, and the verdict "
                    "under it.",
                ),
                io.String.Output("reasons", tooltip='A line per picture, such as "2: no: 1 clock, wanted 2".'),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: Tensor, prompt: str, judge: LoadedJudge) -> io.NodeOutput:
        images = coloured(images, "images")
        with torch.inference_mode(False), torch.no_grad():
            bound, verdicts = judge.verdicts(images, prompt)
        drawn = torch.stack([boxed(picture, verdict) for picture, verdict in zip(images, verdicts)])
        lines = [f"{number}: {verdict}" for number, verdict in enumerate(verdicts, 1)]
        wrong = [line for line, verdict in zip(lines, verdicts) if verdict.faults]
        shown = [f"{len(lines) - len(wrong)} of {len(lines)} right", *wrong[:_TOLD]]
        shown += ["and more"] if len(wrong) > _TOLD else []
        # The newer way of drawing shows all in one line.
        tell(".\n".join(shown + unread_words(bound, judge.judge.name)), cls.hidden.unique_id)
        scores = [verdict.score for verdict in verdicts]
        return io.NodeOutput(scores, captioned(drawn, list(map(lines_of, verdicts))), "\n".join(lines))


def lines_of(verdict: Verdict) -> list[str]:
    """A verdict as text under its picture, a line for each fault."""
    first, *more = verdict.faults or ("",)
    return [f"no: {first}", *more] if verdict.faults else ["yes"]


def unread_words(bound: BoundJudge, name: str) -> list[str]:
    """What of the prompt a judge did not read, in a sentence."""
    return [f"The {name} did not read: {', '.join(bound.unread)}"] if bound.unread else []
