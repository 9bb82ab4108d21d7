"""`make demo`: a real ComfyUI draws prompts with a mask generator off and on, and puts the pictures side by side."""

import argparse
import copy
import io
import shutil
import sys
import time

from PIL import Image

from trainer.host import PROJECT
from trainer.sheets import contact_sheet

from .graph import load_workflow, titled, to_prompt
from .server import FOLDER_NAME, Server, ServerError

WORKFLOW = "generator_off_and_on"
OUTPUT = PROJECT / "output" / "demo"
PROMPTS = (
    "a red circle left of a small blue square",
    "a green star and a black ring",
    "a large yellow triangle above a purple cross",
    "a small orange star",
)


class Progress:
    """One line per node on the screen, with its progress."""

    def __init__(self, prompt: dict):
        self.titles = {key: node["_meta"]["title"] for key, node in prompt.items()}

    def __call__(self, kind: str, data: dict) -> None:
        if kind == "progress":
            title, value, total = self.titles.get(data["node"], data["node"]), data["value"], data["max"]
            bar = "#" * round(24 * value / total)
            end = "\n" if value == total else ""
            print(f"\r  {title:<28} [{bar:<24}] {value}/{total}", end=end, flush=True)


def fetch(server: Server, output: dict) -> list[Image.Image]:
    return [Image.open(io.BytesIO(server.view(image))).convert("RGB") for image in output["images"]]


def demo(port: int | None, folder_name: str, prompts: tuple[str, ...]) -> None:
    began = time.monotonic()
    print("starting ComfyUI ...", flush=True)
    with Server(folder_name, port) as server:
        print(f"  running at {server.url} ({time.monotonic() - began:.0f} s)")
        graph = to_prompt(load_workflow(WORKFLOW), server.object_info())
        shutil.rmtree(OUTPUT, ignore_errors=True)
        OUTPUT.mkdir(parents=True)
        rows = []
        for number, text in enumerate(prompts, 1):
            print(f'"{text}"')
            prompt = copy.deepcopy(graph)
            titled(prompt, "Prompt")["text"] = text
            outputs = server.run(prompt, Progress(prompt))
            pair = []
            for title, label in (("Save without masks", "off"), ("Save with masks", "on")):
                node = next(key for key, value in prompt.items() if value["_meta"]["title"] == title)
                pair.append(fetch(server, outputs[node]))
                for index, picture in enumerate(pair[-1], 1):
                    picture.save(OUTPUT / f"{number}_{text.replace(' ', '_')}_{index}_{label}.png")
            rows.append((text, *pair))
        contact_sheet(rows, ("without masks", "with MaskUNet (same seeds)"), shown=128).save(
            OUTPUT / "contact_sheet.png"
        )
    print(f"done in {time.monotonic() - began:.0f} s. Look at {(OUTPUT / 'contact_sheet.png').relative_to(PROJECT)}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--port", type=int, help="port on the loopback interface (default: a free one)")
    parser.add_argument("--folder-name", default=FOLDER_NAME, help="the extension's name inside custom_nodes")
    parser.add_argument("prompts", nargs="*", help="prompts to draw instead of the usual four")
    arguments = parser.parse_args()
    try:
        demo(arguments.port, arguments.folder_name, tuple(arguments.prompts) or PROMPTS)
    except ServerError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
