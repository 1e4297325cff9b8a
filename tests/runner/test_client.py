"""The websocket reader against a real socket."""

from __future__ import annotations

import json
import socket
import struct
import threading

import pytest
from semantic_diffusion_adapter.runner.client import WebSocket
from semantic_diffusion_adapter.runner.environment import Failure


def frame(kind: int, payload: bytes) -> bytes:
    if len(payload) < 126:
        return bytes([0x80 | kind, len(payload)]) + payload
    if len(payload) < 1 << 16:
        return bytes([0x80 | kind, 126]) + struct.pack(">H", len(payload)) + payload
    return bytes([0x80 | kind, 127]) + struct.pack(">Q", len(payload)) + payload


def serve_once(reply: bytes, after: list[bytes]) -> tuple[str, threading.Thread, list[bytes]]:
    """Answers one handshake with `reply`; then whatever the client sends is kept."""
    listener, kept = socket.create_server(("127.0.0.1", 0)), []

    def talk() -> None:
        with listener, listener.accept()[0] as peer:
            peer.recv(4096)
            peer.sendall(reply + b"".join(after))
            peer.settimeout(5)
            kept.append(peer.recv(4096))

    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/ws?clientId=x", thread, kept


SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"


@pytest.mark.parametrize("size", [0, 1, 100, 125, 126, 65_535, 65_536, 200_000])
def test_messages_of_every_length_class_arrive(size: int) -> None:
    text = {"type": "x", "data": {"text": "a" * size}}
    url, thread, _ = serve_once(SWITCH, [frame(2, b"\x00preview"), frame(1, json.dumps(text).encode()), frame(8, b"")])
    stream = WebSocket(url)
    assert list(stream.messages()) == [text]
    stream.close()
    thread.join(5)


def test_a_ping_is_answered_with_its_payload() -> None:
    url, thread, kept = serve_once(SWITCH, [frame(9, b"are you there"), frame(8, b"")])
    stream = WebSocket(url)
    assert list(stream.messages()) == []
    thread.join(5)
    stream.close()
    head, mask, payload = kept[0][:2], kept[0][2:6], kept[0][6:]
    assert head == bytes([0x8A, 0x80 | len(b"are you there")])
    assert bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload)) == b"are you there"


def test_a_connection_cut_inside_a_frame_ends_the_messages() -> None:
    url, thread, _ = serve_once(SWITCH, [frame(1, b'{"type": "a"}'), b"\x81"])
    stream = WebSocket(url)
    stream.connection.shutdown(socket.SHUT_WR)
    assert list(stream.messages()) == [{"type": "a"}]
    stream.close()
    thread.join(5)


def test_a_server_that_is_not_comfyui_is_named() -> None:
    url, _, _ = serve_once(b"HTTP/1.1 404 Not Found\r\n\r\n", [])
    with pytest.raises(Failure, match="does not speak ComfyUI's websocket protocol"):
        WebSocket(url)
