"""Where the tests of the front end get their browser, and what is said where there is none."""

import os
import subprocess
import sys

import pytest

from tests.host import browser
from trainer.host import PROJECT


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The only folder on the PATH; `path(name, status)` puts a program there that ends with this status."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(browser.VARIABLE, raising=False)
    monkeypatch.setattr(browser, "_of_playwright", lambda python: None)

    def program(name: str, status: int = 0) -> str:
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
        return str(tmp_path / name)

    return program


posix = pytest.mark.skipif(os.name == "nt", reason="programs of these tests are shell scripts")


@posix
def test_a_browser_on_the_path_is_taken(path):
    assert browser.find_browser() is None
    chrome = path("google-chrome")
    assert browser.find_browser() == chrome


@posix
def test_a_browser_that_does_not_start_is_passed_over(path):
    path("chromium", status=1)
    chrome = path("google-chrome")
    assert browser.find_browser() == chrome


@posix
def test_the_named_browser_is_taken_or_none(path, monkeypatch):
    path("chromium")
    named = path("my-browser")
    monkeypatch.setenv(browser.VARIABLE, named)
    assert browser.find_browser() == named
    monkeypatch.setenv(browser.VARIABLE, "/nowhere/chromium")
    assert browser.find_browser() is None
    assert browser.get_browser(sys.executable) is None


@posix
def test_ways_to_install_are_tried_until_one_gives_a_browser(path, monkeypatch):
    wanted = path("installer")
    tried = []

    def run(command, **options):
        tried.append(command[0])
        if command[0] == wanted:
            path("chromium")
        return subprocess.CompletedProcess(command, 1 if command[0] == "fails" else 0)

    monkeypatch.setattr(browser, "ways_to_install", lambda python: [["fails"], ["brings nothing"], [wanted], ["never"]])
    monkeypatch.setattr(browser, "_answers", lambda program: program.endswith("chromium"))
    monkeypatch.setattr(browser.subprocess, "run", run)
    assert browser.get_browser(sys.executable).endswith("chromium")
    assert tried == ["fails", "brings nothing", wanted]


@pytest.mark.parametrize(("required", "outcome"), [("", "1 skipped"), ("1", "1 error")])
def test_without_a_browser_a_person_skips_its_tests_and_ci_fails(required, outcome):
    one = "tests/browser/test_person.py::test_an_error_of_a_node_is_shown_as_its_sentence"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", one]
    without = os.environ | {browser.VARIABLE: "/nowhere/chromium", browser.REQUIRED: required}
    result = subprocess.run(command, cwd=PROJECT, env=without, capture_output=True, text=True)
    assert outcome in result.stdout
    assert "No Chromium was found for the tests in tests/browser. Install one" in result.stdout
    assert result.returncode == (1 if required else 0)
