"""What a running node says to the artist beside its results: a line in the node, or a message of the page."""

from __future__ import annotations

import logging
import sys

from comfy_execution.utils import get_executing_context


def say(text: str) -> None:
    """Show a line in the node that is running; nowhere outside of a run.

    Older pages read it as HTML: whoever puts a stranger's words in it lets no tag through.
    """
    server, node = _page()
    if server is not None:
        server.send_progress_text(text, node)


def warn(text: str) -> None:
    """Something to be looked into: a message of the page, which names the node, and a line in the log. (The line in the node
    is not on every page: Nodes 2.0 shows none.)"""
    logging.warning(text)
    server, node = _page()
    if server is not None:
        server.send_sync("sda.warn", {"node": node, "text": text}, server.client_id)  # web/js/warn.js


def _page() -> tuple:
    """(core's server, the id of the node that is running), or (None, None) where one of them is not there."""
    # Not imported: the module brings the whole application. Where there is a page to write to, it is already here.
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    running = get_executing_context()
    return (None, None) if server is None or running is None else (server, running.node_id)
