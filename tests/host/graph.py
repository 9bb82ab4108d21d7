"""Graphs as people open them (`workflows/*.json`, UI format), and what the server is sent (API format)."""

import json
from pathlib import Path
from typing import Any

from trainer.host import PROJECT

WORKFLOWS = PROJECT / "workflows"
TEMPLATES = {
    "generator_off_and_on": "MaskUNet 1 - generator off and on",
    "reward_sampler": "MaskUNet 2 - reward sampler",
    "reward_sampler_and_best_of_n": "MaskUNet 3 - plain, best of 16, search",
    "inpainting": "MaskUNet 4 - inpainting",
    "save_masks": "MaskUNet 5 - save masks",
    "random_masks": "MaskUNet 6 - random masks",
    "replay_masks": "MaskUNet 7 - replay masks",
    "with_lora": "MaskUNet 8 - with a LoRA",
    "inspect": "MaskUNet 9 - inspect masks",
    "attention_guidance": "MaskUNet 10 - attention guidance",
    "check_and_compare": "MaskUNet 11 - check and compare",
    "train_on_my_pictures": "MaskUNet 12 - train on my pictures",
    "video": "MaskUNet 13 - video",
    "learned_word": "MaskUNet 14 - learned word",
    "attention_and_search": "MaskUNet 15 - attention guidance with the reward sampler",
    "random_masks_on_a_transformer": "MaskUNet 16 - random masks on a transformer",
    "sd15_best_of_6": "MaskUNet SD 1.5 - best of 6",
    "sd15_reward_sampler": "MaskUNet SD 1.5 - reward sampler",
    "sd15_random_masks": "MaskUNet SD 1.5 - random masks",
    "sd15_train_on_my_pictures": "MaskUNet SD 1.5 - train on my pictures",
    "sdxl_best_of_6": "MaskUNet SDXL - best of 6",
    "sdxl_reward_sampler": "MaskUNet SDXL - reward sampler",
    "sdxl_random_masks": "MaskUNet SDXL - random masks",
    "z_image_best_of_6": "MaskUNet Z-Image - best of 6",
    "z_image_random_masks": "MaskUNet Z-Image - random masks",
    "flux_best_of_6": "MaskUNet Flux - best of 6",
}
"""The graphs that ship: short names, and the names of their files, which the template browser shows as titles."""
SUBGRAPHS = PROJECT / "subgraphs"
BLUEPRINTS = ("MaskUNet best of 6", "MaskUNet masks off and on", "MaskUNet score my pictures")
"""The subgraphs that ship: names of their files, under which the front end lists them."""
MUTED, BYPASSED = 2, 4
_NOT_SENT = ("Note", "MarkdownNote", "Reroute", "PrimitiveNode")
_SUBGRAPH_INPUTS, _SUBGRAPH_OUTPUTS = -10, -20
"""Ids of what stands for a subgraph's own inputs and outputs in its links."""
_WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")


def template_file(name: str, ending: str) -> Path:
    """Of a template by its short name: `.json` the graph, `.jpg` the thumbnail."""
    return WORKFLOWS / (TEMPLATES[name] + ending)


def load_workflow(name: str) -> dict[str, Any]:
    return json.loads(template_file(name, ".json").read_text(encoding="utf-8"))


def _widgets(info: dict[str, Any]) -> list[tuple[str, bool]]:
    """(name, whether a control_after_generate value follows) of the inputs that are widgets, in their order."""
    widgets = []
    for group in ("required", "optional"):
        names = info.get("input_order", {}).get(group, [])
        for name in names:
            kind, *options = info["input"][group][name]
            options = options[0] if options else {}
            if options.get("forceInput") or not (isinstance(kind, list) or kind in _WIDGET_TYPES):
                continue
            # The front end gives that control to every whole number with one of these names.
            controlled = options.get("control_after_generate") or (kind == "INT" and name in ("seed", "noise_seed"))
            widgets.append((name, bool(controlled)))
    return widgets


def _widget_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    saved = node.get("widgets_values") or []
    if isinstance(saved, dict):
        return {name: saved[name] for name, _ in _widgets(info) if name in saved}
    values, position = {}, 0
    for name, controlled in _widgets(info):
        if position >= len(saved):
            break
        values[name] = saved[position]
        position += 2 if controlled else 1
    return values


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """What the front end would send for this graph: muted nodes left out, bypassed nodes passed through."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}

    def source(link: int | None) -> list | None:
        """[node id, output index] at the start of a link, past bypassed nodes and reroutes."""
        while link is not None:
            origin, slot = links[link]
            node = nodes[origin]
            if node.get("mode") == MUTED:
                return None
            if node.get("mode") != BYPASSED and node["type"] != "Reroute":
                return [str(origin), slot]
            inputs = node.get("inputs", [])
            if node["type"] == "Reroute":
                link = inputs[0]["link"]
                continue
            kind = node["outputs"][slot]["type"]
            link = next((entry["link"] for entry in inputs if entry["type"] == kind), None)
        return None

    prompt = {}
    for node in nodes.values():
        if node["type"] in _NOT_SENT or node.get("mode") in (MUTED, BYPASSED):
            continue
        inputs = _widget_values(node, object_info[node["type"]])
        for entry in node.get("inputs", []):
            found = source(entry.get("link"))
            if found is not None:
                inputs[entry["name"]] = found
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": node.get("title", node["type"])},
        }
    return prompt


def load_blueprint(name: str) -> dict[str, Any]:
    return json.loads((SUBGRAPHS / f"{name}.json").read_text(encoding="utf-8"))


def expanded(
    name: str, given: dict[str, Any], object_info: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[str, int]]]:
    """What the front end would send for the nodes inside a blueprint, and where its outputs come from.

    given: by the blueprint's inputs, a link ([node id, output index]) or a widget's value. Widgets that are not given
    keep the value inside. The second is (node id, output index) by the blueprint's outputs. Node ids start with the
    blueprint's name.
    """
    (subgraph,) = load_blueprint(name)["definitions"]["subgraphs"]
    nodes = {node["id"]: node for node in subgraph["nodes"]}
    links, outputs, inputs = [], {}, []
    for link in subgraph["links"]:
        if link["origin_id"] == _SUBGRAPH_INPUTS:
            entry = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            inputs.append((subgraph["inputs"][link["origin_slot"]]["name"], link["target_id"], entry["name"]))
            entry["link"] = None
        elif link["target_id"] == _SUBGRAPH_OUTPUTS:
            source = f"{name} {link['origin_id']}", link["origin_slot"]
            outputs[subgraph["outputs"][link["target_slot"]]["name"]] = source
        else:
            links.append([link["id"], link["origin_id"], link["origin_slot"]])
    for node in nodes.values():
        node["id"] = f"{name} {node['id']}"
    links = [[key, f"{name} {origin}", slot] for key, origin, slot in links]
    prompt = to_prompt({"nodes": subgraph["nodes"], "links": links}, object_info)
    for outer, node, inner in inputs:
        if outer in given:
            prompt[f"{name} {node}"]["inputs"][inner] = given[outer]
    return prompt, outputs


def nodes_of(prompt: dict[str, Any], class_type: str) -> list[str]:
    """Ids of the nodes of a class, in the order of the graph."""
    return [key for key, node in prompt.items() if node["class_type"] == class_type]


def titled(prompt: dict[str, Any], title: str) -> dict[str, Any]:
    """The inputs of the node with this title, to be read or changed."""
    return next(node["inputs"] for node in prompt.values() if node["_meta"]["title"] == title)


def shows_pictures(output: dict[str, Any]) -> bool:
    """Whether a node's output is pictures; of videos the host says that they are animated."""
    return bool(output.get("images")) and not output.get("animated")
