"""A running machine's control socket: HTTP over a Unix socket, JSON both ways.

| Request | Body | What it does |
| --- | --- | --- |
| `GET /` | | `state`, and `migration` where one was begun |
| `PATCH /vm` | `{"state": "Paused"}` or `"Resumed"` | pause, resume |
| `GET /metrics` | | counters of every device |
| `PUT /actions` | `action_type`: `PowerButton`, `Reset`, `SendCtrlAltDel` | do that |
| `PATCH /machine-config` | `vcpu_count` | plug processors in, or have the guest give some up |
| `PATCH /drives` | `drive_id`, and `path_on_host` or `size` | swap or resize; neither: look again |
| `PATCH /balloon` | `amount_mib`, and maybe `id` | set its target |
| `PATCH /limits` | `id`, and limits by their names in the configuration | change them |
| `PUT /hotplug/devices` | `device`, as `--device` takes it | plug it in; answers its `id` |
| `DELETE /hotplug/devices` | `id` | take it away, when the guest has given it up |
| `GET /hotplug/memory` | | modules by slot, memory devices by name, in bytes |
| `PATCH /hotplug/memory` | `requested_size`, and maybe `id` | resize a memory device |
| `PUT /hotplug/memory/modules` | `size` | plug a module of memory in; answers its `slot` |
| `DELETE /hotplug/memory/modules` | `slot` | take it away, when the guest has given it up |
| `PUT /snapshot/create` | `snapshot_path`, and maybe `base`, `track` | save to a folder |
| `PUT /migration` | `address` and options | move it; answers a line for each progress |
| `DELETE /migration` | | cancel that |
| `PUT /migration/recover` | maybe `address` | bring one that was cut to its end |
| `PUT /migration/resolve` | | run it here, the other side being dead |

Names are Firecracker's where it has them. An answer is lines of JSON; the last one has `result`, or
`fault_message` with the status 400.
"""

from __future__ import annotations

import json
import os
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from vmm_reference.errors import ConfigError, HostError, VmmError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from vmm_reference.machine import Machine
    from vmm_reference.state.incoming import Incoming
    from vmm_reference.state.moving import Progress

__all__ = ["Control", "Server"]

_MOST_BYTES = 1 << 20
_BETWEEN_LINES = 0.1  # seconds
_DRIVE_LIMITS = ("bandwidth", "ops")
_NET_LIMITS = ("rx_bandwidth", "rx_ops", "tx_bandwidth", "tx_ops")


class Control:
    """What may be asked of a machine, or of a VMM that waits for one.

    Attributes:
        machine: None until one has come.
        incoming: where the VMM waits, or None.
    """

    def __init__(self, machine: Machine | None, incoming: Incoming | None = None) -> None:
        self.machine = machine
        self.incoming = incoming

    def request(
        self, method: str, path: str, body: dict[str, Any], tell: Callable[[object], None]
    ) -> object:
        """Carry out a request; what it gives is JSON.

        Args:
            method: of HTTP.
            path: without a query.
            body: its fields.
            tell: called with JSON before the end, any number of times.

        Raises:
            VmmError, OSError: it can't be done.
        """
        known = self._known()
        if (method, path) not in known:
            words = ", ".join(f"{method} {path}" for method, path in known)
            raise ConfigError("request", f"{method} {path}", f"is unknown; known are {words}")
        call, fields = known[method, path]
        for name in body:
            if fields is not None and name not in fields:
                raise ConfigError(path, name, f"unknown field; known are {', '.join(fields)}")
        return call(body, tell)

    def _known(
        self,
    ) -> dict[tuple[str, str], tuple[Callable[..., object], tuple[str, ...] | None]]:
        return {
            ("GET", "/"): (self._state, ()),
            ("PATCH", "/vm"): (self._vm, ("state",)),
            ("GET", "/metrics"): (self._metrics, ()),
            ("PUT", "/actions"): (self._act, ("action_type",)),
            ("PATCH", "/machine-config"): (self._set_cpus, ("vcpu_count",)),
            ("PATCH", "/drives"): (self._drive, ("drive_id", "path_on_host", "size")),
            ("PATCH", "/balloon"): (self._balloon, ("amount_mib", "id")),
            ("PATCH", "/limits"): (self._limit, ("id", *_DRIVE_LIMITS, *_NET_LIMITS)),
            ("PUT", "/hotplug/devices"): (self._plug, ("device",)),
            ("DELETE", "/hotplug/devices"): (self._unplug, ("id",)),
            ("GET", "/hotplug/memory"): (self._memory, ()),
            ("PATCH", "/hotplug/memory"): (self._resize_memory, ("requested_size", "id")),
            ("PUT", "/hotplug/memory/modules"): (self._add_memory, ("size",)),
            ("DELETE", "/hotplug/memory/modules"): (self._remove_memory, ("slot",)),
            ("PUT", "/snapshot/create"): (self._snapshot, ("snapshot_path", "base", "track")),
            ("PUT", "/migration"): (self._migrate, None),
            ("DELETE", "/migration"): (self._cancel, ()),
            ("PUT", "/migration/recover"): (self._recover, ("address",)),
            ("PUT", "/migration/resolve"): (self._resolve, ()),
        }

    @property
    def _machine(self) -> Machine:
        if self.machine is None:
            raise HostError("machine", "none has come yet", "migrate one to this VMM")
        return self.machine

    def _state(self, _body: dict[str, Any], _tell: object) -> object:
        if self.machine is not None:
            return self.machine.describe()
        assert self.incoming is not None
        side = self.incoming.side.phase.value
        return {"state": "Incoming", "migration": side, "reports": list(self.incoming.reports)}

    def _vm(self, body: dict[str, Any], _tell: object) -> object:
        match body.get("state"):
            case "Paused":
                self._machine.pause()
            case "Resumed":
                self._machine.resume()
            case other:
                raise ConfigError("state", other, "must be Paused or Resumed")
        return {}

    def _metrics(self, _body: dict[str, Any], _tell: object) -> object:
        return self._machine.metrics()

    def _act(self, body: dict[str, Any], _tell: object) -> object:
        match body.get("action_type"):
            case "PowerButton":
                self._machine.press_power_button()
            case "Reset":
                self._machine.reset()
            case "SendCtrlAltDel":
                self._machine.send_ctrl_alt_del()
            case other:
                rule = "must be PowerButton, Reset or SendCtrlAltDel"
                raise ConfigError("action_type", other, rule)
        return {}

    def _set_cpus(self, body: dict[str, Any], _tell: object) -> object:
        self._machine.set_cpus(_number(body, "vcpu_count"))
        return {}

    def _drive(self, body: dict[str, Any], _tell: object) -> object:
        name = _text(body, "drive_id")
        if "path_on_host" in body and "size" in body:
            raise ConfigError("size", body["size"], "is the image's where one is given")
        if "path_on_host" in body:
            self._machine.swap_drive(name, _text(body, "path_on_host"))
        else:
            size = _number(body, "size") if "size" in body else None
            self._machine.resize_drive(name, size)
        return {}

    def _balloon(self, body: dict[str, Any], _tell: object) -> object:
        from vmm_reference.devices.balloon import Controls

        name = _text(body, "id") if "id" in body else "balloon0"
        amount = _number(body, "amount_mib")
        control = self._device(name)
        if not isinstance(control, Controls):
            raise ConfigError("id", name, "is no balloon")
        control.set_size(amount << 20)
        return {}

    def _limit(self, body: dict[str, Any], _tell: object) -> object:
        from vmm_reference.devices.blk.setup import DriveControl
        from vmm_reference.devices.net.setup import Controls

        name = _text(body, "id")
        control = self._device(name)
        known = {DriveControl: _DRIVE_LIMITS, Controls: _NET_LIMITS}.get(type(control), ())
        texts = {key: value for key, value in body.items() if key != "id"}
        for key, value in texts.items():
            if key not in known:
                rule = f"{name} has no such limit; it has {', '.join(known) or 'none'}"
                raise ConfigError("/limits", key, rule)
            if not isinstance(value, str):
                raise ConfigError(key, value, "must be text")
        if not texts:
            raise ConfigError("/limits", name, "name a limit that is to change")
        control.limit(**texts)
        return {}

    def _plug(self, body: dict[str, Any], _tell: object) -> object:
        from vmm_reference.deviceconfig import parse_device

        return {"id": self._machine.plug(parse_device(_text(body, "device")))}

    def _unplug(self, body: dict[str, Any], _tell: object) -> object:
        self._machine.unplug(_text(body, "id"))
        return {}

    def _device(self, name: str) -> Any:
        try:
            return self._machine.device(name)
        except KeyError:
            raise ConfigError("id", name, "is no device of this machine") from None

    def _memory(self, _body: dict[str, Any], _tell: object) -> object:
        return self._machine.describe_memory()

    def _resize_memory(self, body: dict[str, Any], _tell: object) -> object:
        name = _text(body, "id") if "id" in body else "memory0"
        self._machine.resize_memory(_number(body, "requested_size"), name)
        return {}

    def _add_memory(self, body: dict[str, Any], _tell: object) -> object:
        return {"slot": self._machine.add_memory(_number(body, "size"))}

    def _remove_memory(self, body: dict[str, Any], _tell: object) -> object:
        self._machine.remove_memory(_number(body, "slot"))
        return {}

    def _snapshot(self, body: dict[str, Any], _tell: object) -> object:
        folder, base = _text(body, "snapshot_path"), body.get("base")
        if base is not None:
            base = _text(body, "base")
        track = body.get("track", False)
        if not isinstance(track, bool):
            raise ConfigError("track", track, "must be true or false")
        return {"sha256": self._machine.snapshot(folder, base=base, track=track)}

    def _migrate(self, body: dict[str, Any], tell: Callable[[object], None]) -> object:
        from vmm_reference.state.connection import Tls
        from vmm_reference.state.moving import Options

        address = _text(body, "address")
        options = {name: value for name, value in body.items() if name != "address"}
        known = [field.name for field in attrs.fields(Options)]
        for name in options:
            if name not in known:
                raise ConfigError("/migration", name, f"unknown field; known are {known}")
        if options.get("tls") is not None:
            options["tls"] = Tls(_text(body, "tls"))
        phase, due = "", 0.0

        def progress(now: Progress) -> None:
            nonlocal phase, due
            # Rounds may be short, and whoever watches takes time from them.
            if now.phase != phase or time.monotonic() >= due:
                phase, due = now.phase, time.monotonic() + _BETWEEN_LINES
                tell({"progress": attrs.asdict(now)})

        return attrs.asdict(self._machine.migrate(address, progress=progress, **options))

    def _cancel(self, _body: dict[str, Any], _tell: object) -> object:
        self._machine.cancel_migration()
        return {}

    def _recover(self, body: dict[str, Any], _tell: object) -> object:
        address = _text(body, "address") if "address" in body else None
        return attrs.asdict(self._machine.recover(address))

    def _resolve(self, _body: dict[str, Any], _tell: object) -> object:
        if self.machine is None and self.incoming is not None:
            self.incoming.resolve()
        else:
            self._machine.resolve()
        return {}


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise ConfigError(name, value, "must be text")
    return value


def _number(body: dict[str, Any], name: str) -> int:
    value = body.get(name)
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ConfigError(name, value, "must be a whole number")
    return value


class Server:
    """Serves a control on a Unix socket by threads; usable as a context manager.

    Args:
        path: of the socket, which must not be there yet; only this user may connect.
        control: what is served.

    Raises:
        HostError: the socket can't be had.
    """

    def __init__(self, path: str, control: Control) -> None:
        self._path = path
        handler = type("Handler", (_Handler,), {"control": control})
        # It gets its name once it listens: who sees it is answered.
        nameless = Path(path).with_name(f".{os.urandom(4).hex()}")
        old = os.umask(0o177)
        try:
            self._server = _Listener(str(nameless), handler)
            try:
                Path(path).hardlink_to(nameless)
            except BaseException:
                self._server.server_close()
                raise
            finally:
                nameless.unlink()
        except OSError as error:
            hint = "remove it, if no VMM serves it" if Path(path).exists() else ""
            raise HostError(f"control socket {path}", error.strerror or error, hint) from error
        finally:
            os.umask(old)
        self._thread = threading.Thread(target=self._server.serve_forever, name="api", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more requests, and remove the socket."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        Path(self._path).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Listener(socketserver.ThreadingUnixStreamServer):
    # The last answer, such as that of a migration, is sent before the process ends.
    daemon_threads = False
    block_on_close = True


class _Handler(BaseHTTPRequestHandler):
    control: ClassVar[Control]
    protocol_version = "HTTP/1.0"  # the end of an answer is the end of the connection
    timeout = 30

    def _serve(self) -> None:
        started = False

        def tell(line: object) -> None:
            nonlocal started
            if not started:
                self._begin(200)
                started = True
            self._line(line)

        try:
            tell({"result": self.control.request(self.command, self.path, self._body(), tell)})
        except (BrokenPipeError, ConnectionResetError):
            return  # whoever asked has gone
        except (VmmError, OSError, TypeError) as error:
            if not started:
                self._begin(400)
            self._line({"fault_message": str(error)})

    do_GET = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815

    def _body(self) -> dict[str, Any]:
        text = self.headers.get("Content-Length") or "0"
        if not text.isascii() or not text.isdigit() or int(text) > _MOST_BYTES:
            raise ConfigError("Content-Length", text, f"must be at most {_MOST_BYTES}")
        data = self.rfile.read(int(text)) or b"{}"
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ConfigError("body", data[:40], f"is no JSON: {error}") from None
        if not isinstance(body, dict):
            raise ConfigError("body", data[:40], "must be an object")
        return body

    def _begin(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()

    def _line(self, line: object) -> None:
        self.wfile.write(json.dumps(line).encode() + b"\n")
        self.wfile.flush()

    def address_string(self) -> str:
        """Who asks: nobody has a name here."""
        return "unix"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing is logged of each request."""
