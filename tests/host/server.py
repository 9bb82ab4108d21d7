"""Starts ComfyUI's real server on the loopback interface and talks to it over HTTP and the web socket."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

from trainer.host import PROJECT, find_host

FOLDER_NAME = "comfyui-maskunet"


class ServerError(Exception):
    """The server did not start, or an execution failed; the message is for the person at the screen."""


class ExecutionError(ServerError):
    """A node raised. Attributes: node_type, exception_type, exception_message."""

    def __init__(self, details: dict[str, Any]):
        self.node_type = details.get("node_type", "")
        self.exception_type = details.get("exception_type", "")
        self.exception_message = details.get("exception_message", "").strip()
        super().__init__(f"{self.node_type}: {self.exception_message}")


def link_folder(link: Path, target: Path) -> None:
    """A link to a folder that needs no special rights: a junction on Windows, a symbolic link elsewhere."""
    link.parent.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def require_free(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ServerError(f"Port {port} is in use. Choose another, or leave the port out for a free one.") from None
    return port


class Server:
    """A running ComfyUI with the extension, in a base folder of its own (models, input, output, temp).

    `with Server() as server: images = server.run(prompt)`. folder_name: of the extension inside custom_nodes.
    arguments: more of them for main.py. other_nodes: files that lie beside the extension in custom_nodes.
    extension: its folder. packages: a folder of packages that the server gets in place of this environment's.
    """

    def __init__(
        self,
        folder_name: str = FOLDER_NAME,
        port: int | None = None,
        arguments: tuple[str, ...] = (),
        other_nodes: tuple[Path, ...] = (),
        extension: Path = PROJECT,
        packages: Path | None = None,
    ):
        self.folder_name = folder_name
        self.other_nodes = other_nodes
        self.extension = extension
        self.packages = packages
        self.port = require_free(port) if port else free_port()
        self.arguments = arguments
        self.base = Path(tempfile.mkdtemp(prefix="comfyui-"))
        self.log = self.base / "server.log"
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Server":
        link_folder(self.base / "custom_nodes" / self.folder_name, self.extension)
        for file in self.other_nodes:
            shutil.copy(file, self.base / "custom_nodes")
        for folder in ("models", "input", "output", "temp", "user"):
            (self.base / folder).mkdir()
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop()
        # A link is removed as a link: what it points to must survive.
        link = self.base / "custom_nodes" / self.folder_name
        if os.name == "nt":
            os.rmdir(link)
        else:
            link.unlink()
        shutil.rmtree(self.base, ignore_errors=True)

    def interpreter(self) -> tuple[list[str], dict[str, str]]:
        """Python with its options, and its environment variables."""
        if self.packages is None:
            return [sys.executable], dict(os.environ)
        # Without the module `site`, Python has no packages but those on PYTHONPATH.
        return [sys.executable, "-S"], {**os.environ, "PYTHONPATH": str(self.packages)}

    def start(self, timeout: float = 180) -> None:
        import torch

        python, environment = self.interpreter()
        command = [*python, "main.py", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-auto-launch", "--disable-api-nodes", "--preview-method", "latent2rgb"]
        command += [] if torch.cuda.is_available() else ["--cpu"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, *self.arguments], cwd=find_host(), env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI stopped while it started. Its last lines:\n{self.log_tail()}")
            try:
                self.get("/system_stats")
                return
            except (aiohttp.ClientError, OSError):
                time.sleep(0.25)
        self.stop()
        raise ServerError(f"ComfyUI did not answer within {timeout:.0f} s. Its last lines:\n{self.log_tail()}")

    def stop(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        # Not as by Ctrl-C: what was started in the background may be told to overlook that.
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    async def _request(self, method: str, path: str, **options) -> bytes:
        async with aiohttp.ClientSession() as session, session.request(method, self.url + path, **options) as answer:
            body = await answer.read()
            if answer.status >= 400:
                raise ServerError(f"{method} {path} answered {answer.status}: {body.decode(errors='replace')}")
            return body

    def get(self, path: str, **query) -> Any:
        return json.loads(asyncio.run(self._request("GET", path, params=query)))

    def post(self, path: str, data: dict | None = None) -> None:
        asyncio.run(self._request("POST", path, json=data or {}))

    def object_info(self) -> dict[str, Any]:
        return self.get("/object_info")

    def read(self, path: str) -> bytes:
        """Any file that the server serves. Raises ServerError where it has none."""
        return asyncio.run(self._request("GET", path))

    def view(self, image: dict[str, str]) -> bytes:
        return asyncio.run(self._request("GET", "/view", params=image))

    def interrupt(self) -> None:
        self.post("/interrupt")

    def run(
        self, prompt: dict[str, Any], on_event: Callable[[str, dict], None] | None = None
    ) -> dict[str, dict[str, Any]]:
        """Queue a prompt, wait for its end and return the outputs by node id.

        on_event gets every message of the web socket (type, data); preview pictures come as ("preview", {"bytes"}).
        Raises ExecutionError where a node raised, ServerError where the prompt was refused or interrupted.
        """
        return asyncio.run(self._run(prompt, on_event or (lambda kind, data: None)))

    async def _run(self, prompt: dict[str, Any], on_event: Callable[[str, dict], None]) -> dict[str, dict[str, Any]]:
        client = uuid.uuid4().hex
        async with aiohttp.ClientSession() as session:
            address = f"{self.url}/ws?clientId={client}"
            async with session.ws_connect(address, max_msg_size=0) as socket_:
                async with session.post(f"{self.url}/prompt", json={"prompt": prompt, "client_id": client}) as answer:
                    reply = await answer.json()
                    if answer.status != 200 or reply.get("node_errors"):
                        raise ServerError(f"The graph was refused: {json.dumps(reply)}")
                await self._follow(socket_, reply["prompt_id"], on_event)
            async with session.get(f"{self.url}/history/{reply['prompt_id']}") as answer:
                history = await answer.json()
        return history[reply["prompt_id"]]["outputs"]

    async def _follow(self, socket_, prompt_id: str, on_event: Callable[[str, dict], None]) -> None:
        async for message in socket_:
            if message.type == aiohttp.WSMsgType.BINARY:
                on_event("preview", {"bytes": message.data})
                continue
            if message.type != aiohttp.WSMsgType.TEXT:
                break
            event = json.loads(message.data)
            kind, data = event["type"], event.get("data", {})
            if kind == "execution_error" and data.get("prompt_id") == prompt_id:
                raise ExecutionError(data)
            if kind == "execution_interrupted" and data.get("prompt_id") == prompt_id:
                raise ServerError("The execution was interrupted.")
            on_event(kind, data)
            # The last message of an execution, sent when its outputs are in the history.
            if kind == "executing" and data.get("node") is None and data.get("prompt_id") == prompt_id:
                return
        raise ServerError(f"The server closed the connection. Its last lines:\n{self.log_tail()}")
