"""`make demo`: a real ComfyUI draws prompts by its own sampler, with a generator and by searches, side by side.

Two ComfyUIs, where there are two cores: a toy's layers are too small for one of them to keep both busy.
"""

import argparse
import copy
import io
import os
import queue
import shutil
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageDraw, ImageFont

from maskunet_core.toy.captions import UnreadablePrompt, parse
from trainer.host import PROJECT

from .graph import load_workflow, titled, to_prompt
from .server import FOLDER_NAME, Server, ServerError

SEARCH, GENERATOR = "reward_sampler", "generator_off_and_on"
OUTPUT = PROJECT / "output" / "demo"
PROMPTS = (
    "a green circle and a large orange triangle",
    "a large orange star below a large yellow triangle",
    "a black star and a small orange circle",
    "a red star right of a red triangle",
    "a small black ring and an orange star",
    "a black ring left of an orange cross",
)
"""The first of those that `reward-compare` makes its table of, not chosen among others: nothing was trained on them."""
USUAL = 4
"""So many of them are drawn in less than a minute."""
SEED = 0
SERVERS = 2
PRESETS = ("fast", "quality")
PRICE = {
    "CFG 1": "costs half of one",
    "generator": "CFG 1, half of one",
    "plain": "CFG 5, 1 picture",
    "fast": "costs 4 pictures",
    "quality": "costs 15 pictures",
}
RIGHT, WRONG, UNREAD = (34, 160, 80), (208, 60, 60), (150, 150, 150)


def fetch(server: Server, output: dict) -> list[Image.Image]:
    return [Image.open(io.BytesIO(server.view(image))).convert("RGB") for image in output["images"]]


def judge(pictures: list[Image.Image], text: str) -> list[bool | None]:
    """Whether a picture shows just what its prompt says, as a reader sees it that no search asks; None where the prompt
    is none of the toy world's."""
    import numpy as np
    import torch

    from maskunet_core.toy.judge import fully_right, read
    from maskunet_core.toy.model import load_reader

    try:
        caption = parse(text)
    except UnreadablePrompt:
        return [None] * len(pictures)
    small = [np.asarray(picture.resize((64, 64), Image.Resampling.NEAREST)) for picture in pictures]
    batch = torch.from_numpy(np.stack(small)).movedim(-1, 1) / 255
    return fully_right(read(load_reader("reader_b"), batch), [caption] * len(pictures)).tolist()


def contact_sheet(columns: list[tuple[str, dict[str, tuple[Image.Image, bool | None]]]]) -> Image.Image:
    """A column for each prompt, a row for each way to draw it, framed by whether it shows what the prompt says."""
    cell, gap, frame, side, head = 140, 12, 5, 132, 76
    ways = list(columns[0][1])
    width = side + len(columns) * (cell + gap) + gap
    sheet = Image.new("RGB", (width, head + len(ways) * (cell + gap) + 26), "white")
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(17), ImageFont.load_default(13)
    for row, way in enumerate(ways):
        top = head + row * (cell + gap)
        shown = [right for _, pictures in columns for right in (pictures[way][1],) if right is not None]
        draw.text((gap, top + 40), way, fill="black", font=large)
        draw.text((gap, top + 64), PRICE[way], fill=(90, 90, 90), font=small)
        if shown:
            draw.text((gap, top + 82), f"{sum(shown)} of {len(shown)} right", fill=(90, 90, 90), font=small)
    for column, (text, pictures) in enumerate(columns):
        left = side + column * (cell + gap)
        draw.multiline_text((left, 8), textwrap.fill(text, 20), fill=(40, 40, 40), font=small)
        for row, (picture, right) in enumerate(pictures.values()):
            top = head + row * (cell + gap)
            colour = UNREAD if right is None else RIGHT if right else WRONG
            draw.rectangle((left - frame, top - frame, left + cell + frame - 1, top + cell + frame - 1), fill=colour)
            sheet.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), (left, top))
    told = (
        "The same seed in each column. Green: shows just what the prompt says, by a reader that the search never asks."
    )
    draw.text((gap, sheet.height - 24), told, fill=(90, 90, 90), font=small)
    return sheet


def draw_graph(server: Server, graph: dict, text: str, saved: dict[str, str], **search: str) -> dict[str, Image.Image]:
    """The first pictures of a graph by the titles of the nodes that save them, under the names that `saved` gives.

    search: inputs of the reward sampler.
    """
    prompt = copy.deepcopy(graph)
    titled(prompt, "Prompt")["text"] = text
    for node in prompt.values():
        inputs = node["inputs"]
        inputs |= {"seed": SEED} if "seed" in inputs else {}
        inputs |= {"batch_size": 1} if "batch_size" in inputs else {}
        inputs |= {"prompt": text, **search} if node["class_type"] == "MaskUNetRewardSampler" else {}
    outputs = server.run(prompt)
    nodes = {value["_meta"]["title"]: key for key, value in prompt.items()}
    # A server may leave out nodes that it need not run again.
    return {way: fetch(server, outputs[nodes[title]])[0] for title, way in saved.items() if nodes[title] in outputs}


def draw_prompt(server: Server, graphs: dict[str, dict], text: str) -> dict[str, Image.Image]:
    """The prompt's picture in each way of PRICE."""
    found = draw_graph(server, graphs[GENERATOR], text, {"Save without masks": "CFG 1", "Save with masks": "generator"})
    for preset in PRESETS:
        saved = {"Save without a search": "plain", "Save with a search": preset}
        found |= draw_graph(server, graphs[SEARCH], text, saved, preset=preset)
        print(f"  {preset:<8} {text}", flush=True)
    return found


def draw_all(folder_name: str, port: int | None, prompts: tuple[str, ...]) -> list[dict[str, Image.Image]]:
    """Of each prompt its pictures, by as many servers as there is work and room for."""
    began = time.monotonic()
    cores = os.cpu_count() or 1
    count = min(SERVERS, cores, len(prompts))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
    waiting: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    for numbered in enumerate(prompts):
        waiting.put(numbered)
    found: list[dict[str, Image.Image]] = [{} for _ in prompts]

    def work(server_number: int) -> None:
        with Server(folder_name, port + server_number if port else None) as server:
            print(f"  running at {server.url} ({time.monotonic() - began:.0f} s)", flush=True)
            info = server.object_info()
            graphs = {name: to_prompt(load_workflow(name), info) for name in (SEARCH, GENERATOR)}
            while True:
                try:
                    number, text = waiting.get_nowait()
                except queue.Empty:
                    return
                found[number] = draw_prompt(server, graphs, text)

    print("starting ComfyUI ...", flush=True)
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))
    return found


def demo(port: int | None, folder_name: str, prompts: tuple[str, ...]) -> None:
    began = time.monotonic()
    drawn = draw_all(folder_name, port, prompts)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    columns = []
    for number, (text, pictures) in enumerate(zip(prompts, drawn), 1):
        verdicts = judge(list(pictures.values()), text)
        columns.append((text, dict(zip(pictures, zip(pictures.values(), verdicts)))))
        for way, picture in pictures.items():
            picture.save(OUTPUT / f"{number}_{text.replace(' ', '_')}_{way}.png")
    contact_sheet(columns).save(OUTPUT / "contact_sheet.png")
    for way in columns[0][1]:
        verdicts = [pictures[way][1] for _, pictures in columns if pictures[way][1] is not None]
        if verdicts:
            print(f"  {way:<8} {sum(verdicts)} of {len(verdicts)} show just what the prompt says ({PRICE[way]})")
    print(f"done in {time.monotonic() - began:.0f} s. Look at {(OUTPUT / 'contact_sheet.png').relative_to(PROJECT)}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument(
        "--port", type=int, help="port on the loopback interface; the next is used, too (default: free ones)"
    )
    parser.add_argument("--folder-name", default=FOLDER_NAME, help="the extension's name inside custom_nodes")
    parser.add_argument("--count", type=int, choices=range(1, len(PROMPTS) + 1), default=USUAL, help="how many prompts")
    parser.add_argument("prompts", nargs="*", help="prompts to draw instead of the usual ones")
    arguments = parser.parse_args()
    try:
        demo(arguments.port, arguments.folder_name, tuple(arguments.prompts) or PROMPTS[: arguments.count])
    except ServerError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
