"""Does one job, in a process of its own: `python -m trainer.reward_compare.jobs FOLDER NAME`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from maskunet_core.judges.frechet import Gaussian, frechet_distance
from maskunet_core.replacing import replacing

from ..host import enter_host
from ..job_board import folder_of, result_of, write_result
from ..toy.held_out import TABLE, held_out_prompts
from .costs import Operations
from .plan import BODIES, DIFFICULTY, METHODS, STUDENT, STUDENT_METHODS, Job, Scale, make_plan
from .rivals import drawn_plainly
from .stage import Stage
from .student import SAMPLING, train_student

JUDGED = "judged.safetensors"
"""The judge's `features` of all pictures, and the first `pictures`, in bytes."""
_OTHER = 1000
"""Seed of the draws that tell how hard a prompt is: no method has it."""


def measure(stage: Stage, job: Job, scale: Scale, folder: Path) -> dict[str, Any]:
    """Draw all prompts by the job's method, and judge. Times are CPU seconds of one thread per image."""
    captions = held_out_prompts(scale.prompts, TABLE)[: scale.prompts_of(job.method)]
    draw = METHODS[job.method]
    with Operations() as counted:
        draw(stage, captions[:1], job.seed)
    verdicts, seconds = [], 0.0
    for start in range(0, len(captions), scale.batch):
        part = captions[start : start + scale.batch]
        began = time.process_time()
        latents = draw(stage, part, job.seed)
        seconds += time.process_time() - began
        verdicts.append(stage.verdict(latents, part))
    features = torch.cat([verdict.features for verdict in verdicts])
    folder.mkdir(parents=True, exist_ok=True)
    shown = (255 * verdicts[0].pictures).round().byte()
    with replacing(folder / JUDGED) as temporary:
        save_file({"features": features, "pictures": shown}, temporary)
    real_features, real_patches = stage.real(scale.real_pictures)
    return {
        "frechet": frechet_distance(features, Gaussian.of(real_features)),
        "frechet_patches": frechet_distance(torch.cat([v.patches for v in verdicts]), Gaussian.of(real_patches)),
        "right": [bool(v) for verdict in verdicts for v in verdict.right],
        "right_by_reward": [bool(v) for verdict in verdicts for v in verdict.right_by_reward],
        "reward": [round(float(v), 4) for verdict in verdicts for v in verdict.reward],
        "seconds": seconds / len(captions),
        "operations": counted.total,
    }


def difficulty(stage: Stage, scale: Scale) -> dict[str, Any]:
    """How many of the base's draws the judge finds right, for each prompt."""
    captions = held_out_prompts(scale.prompts, TABLE)
    found = torch.zeros(len(captions), dtype=torch.long)
    for number in range(scale.draws):
        for rows in torch.arange(len(captions)).split(scale.batch):
            part = [captions[n] for n in rows.tolist()]
            found[rows] += stage.verdict(drawn_plainly(stage, part, _OTHER, number), part).right.long()
    kinds = [caption.kind for caption in captions]
    return {"successes": found.tolist(), "draws": scale.draws, "kinds": kinds, "prompts": [str(c) for c in captions]}


def stage_of(scale: Scale) -> Stage:
    return Stage(BODIES[scale.body], body=scale.body)


def do(output: Path, job: Job, scale: Scale) -> dict[str, Any]:
    """What the job finds; its files lie in its folder."""
    if job.method == STUDENT:
        return train_student(folder_of(output, job.name), scale.student_pictures, scale.student_steps)
    if job.method == DIFFICULTY:
        return difficulty(stage_of(scale), scale)
    is_few = job.method in STUDENT_METHODS
    stage = Stage(SAMPLING, str(folder_of(output, STUDENT))) if is_few else stage_of(scale)
    return measure(stage, job, scale, folder_of(output, job.name))


def main() -> int:
    output, name = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    enter_host(cpu=True)
    scale = Scale(**json.loads((output / "scale.json").read_text(encoding="utf-8")))
    job = next(job for job in make_plan(scale) if job.name == name)
    if result_of(output, name) is None:
        began = time.monotonic()
        write_result(output, name, do(output, job, scale), began)
    return 0


if __name__ == "__main__":
    sys.exit(main())
