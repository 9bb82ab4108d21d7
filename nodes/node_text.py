"""A line of text on a node, where both ways of drawing nodes show it."""

from ..maskunet_core.rewards.reward import BoundReward


def tell(text: str, node_id: str | None) -> None:
    """Shown until the next one. node_id: None where nobody looks."""
    if node_id is None:
        return
    from server import PromptServer

    if getattr(PromptServer, "instance", None) is not None:
        PromptServer.instance.send_progress_text(text, node_id)


def words_in_a_line(bound: BoundReward) -> str:
    """What of the prompt a reward did not read, in a sentence; empty where it read everything."""
    parts = [(part.name, ", ".join(part.unread)) for _, part in bound.parts() if part.unread]
    return "\n".join(dict.fromkeys(f"The {name} did not read: {words}" for name, words in parts))
