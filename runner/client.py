"""Speaks to ComfyUI as its own page does: HTTP to upload, queue and fetch, one websocket to follow the progress."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from .environment import Failure


class Client:
    def __init__(self, url: str) -> None:
        self.url = url
        self.id = uuid.uuid4().hex

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def json(self, path: str) -> dict:
        return json.loads(self.get(path))

    def _post(self, path: str, body: bytes, kind: str) -> dict:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"{}")

    def upload(self, image: Path) -> str:
        """Puts a picture into ComfyUI's input folder; returns the name that LoadImage takes."""
        border = uuid.uuid4().hex
        head = (
            f'--{border}\r\nContent-Disposition: form-data; name="image"; filename="{border}{image.suffix}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        body = head.encode() + image.read_bytes() + f"\r\n--{border}--\r\n".encode()
        return self._post("/upload/image", body, f"multipart/form-data; boundary={border}")["name"]

    def run(self, prompt: dict, progress: Callable[[str, int, int], None] = lambda node, value, maximum: None) -> dict:
        """Queues an API prompt and waits; returns {node id: outputs}. `progress` gets (node id, step, steps).

        Raises Failure with the node's own message when the prompt is refused or a node fails.
        """
        socket_ = WebSocket(self.url + f"/ws?clientId={self.id}")
        try:
            body = json.dumps({"prompt": prompt, "client_id": self.id}).encode()
            ticket = self._post("/prompt", body, "application/json")["prompt_id"]
            for message in socket_.messages():
                data = message.get("data", {})
                if data.get("prompt_id") != ticket:
                    continue
                if message["type"] == "executing" and data.get("node"):
                    progress(data["node"], 0, 0)
                elif message["type"] == "progress":
                    progress(data["node"], data["value"], data["max"])
                elif message["type"] == "execution_error":
                    raise Failure(f"{data['node_type']}: {data['exception_message'].strip()}")
                elif message["type"] == "execution_interrupted":
                    raise Failure("ComfyUI was told to interrupt the run.")
                elif message["type"] == "execution_success":
                    return self._outputs(ticket)
            raise Failure("ComfyUI closed the connection before the run had ended.")
        except urllib.error.HTTPError as error:
            raise Failure(_refusal(error)) from error
        finally:
            socket_.close()

    def _outputs(self, ticket: str) -> dict:
        # ComfyUI writes a run into its history just after it has told of the success.
        while not (entry := self.json(f"/history/{ticket}").get(ticket)):
            time.sleep(0.05)
        return entry["outputs"]

    def image(self, output: dict) -> bytes:
        """The file behind one entry of a node's `images` output."""
        return self.get("/view?" + urllib.parse.urlencode({k: output[k] for k in ("filename", "subfolder", "type")}))


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        answer = json.loads(error.read())
    except ValueError:
        return f"ComfyUI refused the request ({error})."
    for node in answer.get("node_errors", {}).values():
        for reason in node["errors"]:
            _, _, sentence = reason["details"].partition(" - ")  # of a node's own check, behind the input's name
            if reason["type"] != "custom_validation_failed" or not sentence:
                sentence = f"{reason['message']} ({reason['details']})"
            return f"{node['class_type']}: {sentence}"
    return f"ComfyUI refused the workflow: {answer.get('error', {}).get('message', error)}"


class WebSocket:
    """The reading half of RFC 6455, enough for ComfyUI's status messages (never fragmented, never masked)."""

    def __init__(self, url: str) -> None:
        address = urllib.parse.urlsplit(url)
        self.connection = socket.create_connection((address.hostname, address.port), timeout=600)
        key = base64.b64encode(os.urandom(16)).decode()
        self.connection.sendall(
            f"GET {address.path}?{address.query} HTTP/1.1\r\nHost: {address.netloc}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self.stream = self.connection.makefile("rb")
        if b" 101 " not in self.stream.readline():
            raise Failure(f"{address.netloc} does not speak ComfyUI's websocket protocol.")
        while self.stream.readline().strip():
            pass

    def messages(self) -> Iterator[dict]:
        """Text messages as JSON until the server closes; preview pictures (binary) are skipped."""
        while len(head := self.stream.read(2)) == 2:
            kind, size = head[0] & 0x0F, head[1] & 0x7F
            if size >= 126:
                size = struct.unpack(*((">H", self.stream.read(2)) if size == 126 else (">Q", self.stream.read(8))))[0]
            payload = self.stream.read(size)
            if kind == 1:
                yield json.loads(payload)
            elif kind == 8:
                return
            elif kind == 9:  # a ping wants its payload back; a client masks, and a mask of zeros changes nothing
                self.connection.sendall(bytes([0x8A, 0x80 | size]) + bytes(4) + payload)

    def close(self) -> None:
        self.stream.close()
        self.connection.close()
