"""The other end of a control socket, for the verbs that act on a running machine."""

from __future__ import annotations

import json
import socket
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

from vmm_reference.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ask", "stream"]


class _Connection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


def stream(path: str, method: str, target: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Make a request; each line of the answer as it comes.

    Args:
        path: of the machine's control socket.
        method: of HTTP.
        target: such as `/vm`.
        body: fields; what is None is left out.

    Raises:
        HostError: nobody serves the socket, or the machine says that it can't.
    """
    connection = _Connection(path)
    fields = {name: value for name, value in body.items() if value is not None}
    ended = False
    try:
        connection.request(method, target, json.dumps(fields).encode())
        for text in connection.getresponse():
            line = json.loads(text)
            if "fault_message" in line:
                raise HostError("the machine refuses", line["fault_message"])
            ended = ended or "result" in line
            yield line
    except HostError:
        raise
    except (OSError, ValueError) as error:
        hint = "is a machine running with --api-socket there?"
        raise HostError(f"control socket {path}", error, hint) from error
    finally:
        connection.close()
    if not ended:
        raise HostError(f"control socket {path}", "the machine ended before it answered")


def ask(path: str, method: str, target: str, body: dict[str, Any]) -> Any:
    """Make a request, and give its result; arguments and errors are those of `stream`."""
    result: Any = None
    for line in stream(path, method, target, body):
        result = line.get("result", result)
    return result
