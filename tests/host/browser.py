"""A Chromium for the browser tests: one that is there, or one that can be had. Uses the standard library alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

VARIABLE = "MASKUNET_BROWSER"
REQUIRED = "MASKUNET_BROWSER_REQUIRED"
"""Set by CI: without a browser its tests fail there, where elsewhere they are skipped."""

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOW = (
    "No Chromium was found for the tests in tests/browser. Install one (Debian: `apt-get install chromium`; elsewhere: "
    "`.venv/bin/python -m playwright install --with-deps chromium`), or name one that is there: "
    f"{VARIABLE}=/path/to/chromium."
)


def _answers(path: str) -> bool:
    """Whether a program starts and tells its version: Ubuntu's `chromium` may only say that a snap is needed."""
    try:
        return subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _of_playwright(python: str) -> str | None:
    """The browser that `playwright install chromium` put into its own folder."""
    code = "from playwright.sync_api import sync_playwright as p\nwith p() as it: print(it.chromium.executable_path)"
    asked = subprocess.run([python, "-c", code], capture_output=True, text=True)
    found = asked.stdout.strip()
    return found if asked.returncode == 0 and Path(found).is_file() else None


def find_browser(python: str = sys.executable) -> str | None:
    """MASKUNET_BROWSER, the first on the PATH that answers, or Playwright's own. python: one that has Playwright."""
    named = os.environ.get(VARIABLE)
    if named:
        return named if _answers(named) else None
    on_path = (found for found in map(shutil.which, NAMES) if found)
    return next(filter(_answers, on_path), None) or _of_playwright(python)


def ways_to_install(python: str) -> list[list[str]]:
    """Commands that bring a Chromium, the likeliest first; each may fail."""
    ways = [[python, "-m", "playwright", "install", "chromium"]]
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        # First where it may be used: Debian's package brings the libraries that a bare machine lacks.
        install = "apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium"
        ways.insert(0, ["sh", "-c", install])
    return ways


def get_browser(python: str) -> str | None:
    """A browser that is there, or the first that can be installed; None where neither is so."""
    found = find_browser(python)
    if found or os.environ.get(VARIABLE):
        return found
    for command in ways_to_install(python):
        print(f"[setup] fetching a Chromium for the browser tests: {' '.join(command[-3:])}", flush=True)
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        if subprocess.run(command, capture_output=True, env=quiet).returncode == 0 and (found := find_browser(python)):
            return found
    return None
