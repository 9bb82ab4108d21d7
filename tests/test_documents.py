"""The Markdown files: links and anchors lead somewhere, and the README quotes sentences that the code says."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

from trainer.host import PROJECT

OWN_PAGES = "https://github.com/comfyui-maskunet/comfyui-maskunet/blob/main/"
README = PROJECT / "README.md"
ERRORS = "## Errors that people meet"
GAP = "…"
"""Stands in the README for what a message fills in."""


def files(*options: str) -> set[Path]:
    """Files that git tracks, or would; with options, fewer of them."""
    command = ["git", "ls-files", "-z", "--cached", *(options or ("--others", "--exclude-standard"))]
    listed = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    return {PROJECT / name for name in listed.split("\0") if name}


@pytest.fixture(scope="module")
def documents() -> list[Path]:
    if not (PROJECT / ".git").exists():
        pytest.skip("This folder is no git repository: what belongs to it is not known.")
    return sorted(path for path in files() if path.suffix == ".md" and path.is_file())


def without_code(page: str) -> str:
    page = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", page)


def links_of(page: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(page))


def anchors_of(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    page = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE):
        text = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = 0
        while (anchor := f"{text}-{number}" if number else text) in anchors:
            number += 1
        anchors.add(anchor)
    return anchors


def broken_links(document: Path, page: str) -> list[str]:
    """Links to files of this repository, or to headings in them, that are not there."""
    broken = []
    for link in links_of(page):
        own = link.removeprefix(OWN_PAGES)
        if own == link and re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = own.partition("#")
        folder = PROJECT if own != link else document.parent
        target = folder / name
        text = page if not name else target.read_text(encoding="utf-8") if target.is_file() and anchor else ""
        if (name and not target.is_file()) or (anchor and anchor not in anchors_of(text)):
            broken.append(link)
    return broken


def test_links_lead_to_files_and_headings(documents):
    assert README in documents
    pages = {path: path.read_text(encoding="utf-8") for path in documents}
    broken = {str(path): links for path, page in pages.items() if (links := broken_links(path, page))}
    assert broken == {}


def test_what_the_registry_packs_links_to_what_it_packs(documents):
    """Pages of folders that stay out are linked to by their address."""
    left_out = files("--ignored", "--exclude-from=.comfyignore")
    for document in set(documents) - left_out:
        for link in links_of(document.read_text(encoding="utf-8")):
            target = (document.parent / link.partition("#")[0]).resolve()
            assert target not in left_out, f"{document}: {link}"


@pytest.mark.parametrize(
    ("page", "broken"),
    [
        ("[a](README.md#install) ![b](workflows/demo_sheet.jpg) [c](https://example.org/x)", []),
        ("[a](no_such_page.md)", ["no_such_page.md"]),
        ("[a](README.md#no-such-heading)", ["README.md#no-such-heading"]),
        ("[a](#here)\n# There", ["#here"]),
        ("[a](#here-it-is-1)\n# Here, it `is`\n## Here it is", []),
        (
            f"[a]({OWN_PAGES}tests/bench/README.md#sampling) [b]({OWN_PAGES}tests/none.md)",
            [f"{OWN_PAGES}tests/none.md"],
        ),
        ("`[a](none.md)`\n```\n[a](none.md)\n```\n", []),
    ],
)
def test_a_broken_link_is_noticed(page, broken):
    assert broken_links(PROJECT / "page.md", page) == broken


@pytest.mark.parametrize("path", sorted((PROJECT / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_notes_of_templates_say_above_where_something_lies_above(path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    notes = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    assert notes
    told = " ".join(notes).replace("left of, right of, above, below", "")
    if re.search(r"\b(above|below)\b", told):
        assert len({group["bounding"][1] for group in graph["groups"]}) > 1


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160


def texts_of(path: Path) -> list[str]:
    """Strings in a file of Python, with `GAP` for each value of an f-string."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


def test_the_errors_that_the_readme_explains_are_those_of_the_code():
    chapter = README.read_text(encoding="utf-8").split(f"{ERRORS}\n", 1)[1].split("\n## ", 1)[0]
    quotes = re.findall(r"^\| (.+?) \| .+ \|$", chapter, flags=re.MULTILINE)[2:]
    assert len(quotes) >= 10
    rooms = ("nodes", "maskunet_core", "trainer")
    texts = [text for room in rooms for path in (PROJECT / room).rglob("*.py") for text in texts_of(path)]
    assert [quote for quote in quotes if not any(quote in text for text in texts)] == []
