"""Runs jobs inside the lab, one at a time, and relays their input and output.

Each job gets a process and mount namespace of its own, and in it a fresh mount of the host's files
under a fresh overlay: so it sees them as they are now, and what it leaves behind goes with it.

The interpreter is 25 times slower in here, so this imports next to nothing.
"""

# The import of pathlib would cost a third of a second.
# ruff: noqa: PTH101, PTH102, PTH103, PTH104, PTH108, PTH110, PTH116, PTH120, PTH123, PTH208
from __future__ import annotations

import ctypes
import fcntl
import os
import select
import termios
import time

from lab import wire

ROOT = 3  # the outer machine's own file system, opened by init before it entered the host's
BUFFERED = 1 << 18  # output not yet on its way to the host; a job that writes faster has to wait
PIECE = 1 << 16

libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
MS_RDONLY, MS_MOVE, MS_BIND, MS_REC, MS_PRIVATE = 1, 0x2000, 0x1000, 0x4000, 0x40000
SIGKILL, SIGPIPE, SIGXFSZ = 9, 13, 25
SIG_DFL = 0

FILES = b"trans=virtio,version=9p2000.L,msize=512000"


def log(line: str) -> None:
    """Write a line to the console, whose last ones are shown when the lab dies."""
    os.write(2, f"lab: {line}\n".encode(errors="replace"))


def check(result: int, what: str) -> None:
    """Turn a C result of -1 into the exception it stands for."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(
    source: bytes, target: bytes, kind: bytes = b"", flags: int = 0, data: bytes = b""
) -> None:
    """Mount a file system; the arguments are those of the system call."""
    result = libc.mount(source, target, kind or None, ctypes.c_ulong(flags), data or None)
    check(result, f"mount {os.fsdecode(source)} at {os.fsdecode(target)}")


def warm_up(files: list[bytes]) -> None:
    """Keep copies of files that many jobs map, as long as they are the host's as they are now.

    What a fresh mount serves is read anew, and its code translated anew by the emulator, which
    costs seconds for a program like Python. Memory that stays the same spares both.
    """
    for entry in files:
        size, changed, path = entry.split(b":", 2)
        copy = b"/warm" + path
        try:
            known = os.stat(copy)
            if (known.st_size, known.st_mtime_ns) == (int(size), int(changed)):
                continue
            os.unlink(copy)
            os.removedirs(os.path.dirname(copy))
        except OSError:
            pass
        if int(size) >= 0:
            keep_warm(path, copy)


def keep_warm(path: bytes, copy: bytes) -> None:
    """Copy a file of the host, and the folders that lead to it; leave out what cannot be read."""
    try:
        with open(b"/job/host" + path, "rb") as source:
            at = 1
            while (at := path.find(b"/", at) + 1) > 0:
                folder = b"/warm" + path[: at - 1]
                if not os.path.exists(folder):
                    os.mkdir(folder)
                    os.chmod(folder, os.stat(b"/job/host" + path[: at - 1]).st_mode & 0o7777)
            status = os.fstat(source.fileno())
            with open(copy + b".new", "wb") as target:
                while os.sendfile(target.fileno(), source.fileno(), None, 1 << 22):
                    pass
                os.fchmod(target.fileno(), status.st_mode & 0o7777)
        os.utime(copy + b".new", ns=(status.st_atime_ns, status.st_mtime_ns))
        os.rename(copy + b".new", copy)
    except OSError:
        pass


def enter_fresh_root(start: wire.Start) -> None:
    """Put the job's root together and make it the root of this mount namespace."""
    mount(b"none", b"/", flags=MS_REC | MS_PRIVATE)
    mount(b"job", b"/job", b"tmpfs", data=b"size=75%,mode=755")
    for name in (b"host", b"upper", b"work", b"root"):
        os.mkdir(b"/job/" + name)
    for attempt in range(100):
        try:
            mount(b"job", b"/job/host", b"9p", MS_RDONLY, FILES + b",cache=mmap")
            break
        except OSError:
            # The last job's mount may still be on its way out; a tag serves one mount at a time.
            if attempt == 99:
                raise
            time.sleep(0.02)
    warm_up(start.warm)
    layers = b"lowerdir=/warm:/job/host,upperdir=/job/upper,workdir=/job/work"
    root = b"/job/root"
    mount(b"overlay", root, b"overlay", data=layers)
    mount(b"/dev", root + b"/dev", flags=MS_BIND | MS_REC)
    mount(b"shm", root + b"/dev/shm", b"tmpfs", data=b"mode=1777")
    mount(b"proc", root + b"/proc", b"proc")
    mount(b"sysfs", root + b"/sys", b"sysfs")
    mount(b"cgroup2", root + b"/sys/fs/cgroup", b"cgroup2")
    mount(b"run", root + b"/run", b"tmpfs", data=b"mode=755")
    os.mkdir(root + b"/run/lock", 0o1777)
    for number, share in enumerate(start.shares):
        os.makedirs(root + share, exist_ok=True)
        mount(b"share%d" % number, root + share, b"9p", data=FILES + b",cache=mmap")
    os.chdir(root)
    mount(b".", b"/", flags=MS_MOVE)
    os.chroot(b".")


class Job:
    """A command, the namespaces around it, and the ends of its input and output."""

    def __init__(self, number: int, body: bytes) -> None:
        start = wire.Start.unpack(body)
        self.number = number
        self.title = os.fsdecode(b" ".join(start.argv))[:200]
        self.backlog = bytearray()  # standard input the job has not taken
        self.ending = False  # no more of it comes
        self.status: int | None = None
        self.terminal = -1
        if start.pty:
            self.terminal, inner = os.openpty()
            ends = [inner, inner, inner]
            self.stdin: int = self.terminal
            self.outputs = {self.terminal: wire.STDOUT}
        else:
            (stdin, self.stdin), (stdout, out), (stderr, err) = os.pipe(), os.pipe(), os.pipe()
            ends = [stdin, out, err]
            self.outputs = {stdout: wire.STDOUT, stderr: wire.STDERR}
        for end in {self.stdin, *self.outputs}:
            os.set_blocking(end, False)
        # The command's exec closes its end: from then on there is someone to send signals to.
        self.starting, started = os.pipe()
        ends.append(started)
        self.signals: list[int] = []
        self.pid = os.fork()
        if self.pid == 0:
            self._outer(ends, start)
        for end in {*ends}:
            os.close(end)
        self.exit = os.pidfd_open(self.pid)

    def _outer(self, ends: list[int], start: wire.Start) -> None:
        """In the first child: make the namespaces, and wait for the process that is 1 in them."""
        status = 125
        try:
            # Before the mounts are copied, so that root and working directory follow the copy.
            os.fchdir(ROOT)
            os.chroot(b".")
            os.close(ROOT)
            check(libc.unshare(CLONE_NEWNS | CLONE_NEWPID), "unshare")
            first = os.fork()
            if first == 0:
                status = self._first(ends, start)
                os._exit(status)
            for end in {*ends, self.stdin, self.starting, *self.outputs}:
                os.close(end)
            status = exit_status(os.waitpid(first, 0)[1])
        except BaseException as error:
            log(f"cannot start the job: {error}")
        finally:
            os._exit(status)

    def _first(self, ends: list[int], start: wire.Start) -> int:
        """In process 1 of the namespaces: run the command and reap until it has ended."""
        try:
            enter_fresh_root(start)
        except OSError as error:
            os.write(ends[2], f"lab: cannot set the job up: {error}\n".encode())
            return 125
        command = os.fork()
        if command == 0:
            os._exit(execute(ends, start))
        for end in {*ends, self.stdin, self.starting, *self.outputs}:
            os.close(end)
        while True:
            pid, status = os.wait()
            if pid == command:
                return exit_status(status)

    def feed(self) -> bytes:
        """Hand standard input on as far as the job takes it; returns the frame that says so."""
        taken = 0
        try:
            while self.backlog:
                count = os.write(self.stdin, self.backlog[:PIECE])
                del self.backlog[:count]
                taken += count
        except BlockingIOError:
            pass
        except OSError:  # nobody reads it any more: swallow the rest, as a shell's pipe would
            taken += len(self.backlog)
            self.backlog.clear()
        if self.ending and not self.backlog:
            if self.terminal < 0:
                os.close(self.stdin)
            self.stdin = -1
        return wire.frame(wire.TAKEN, self.number, wire.NUMBER.pack(taken)) if taken else b""

    def drain(self, end: int) -> bytes:
        """What the job has written to one of its outputs, as a frame; empty at its end."""
        try:
            data = os.read(end, PIECE)
        except BlockingIOError:
            return b""
        except OSError:  # how a pseudo-terminal says that nobody has it open any more
            data = b""
        if data:
            return wire.frame(self.outputs[end], self.number, data)
        del self.outputs[end]
        if end != self.terminal:
            os.close(end)
        return b""

    def signal(self, number: int) -> None:
        """Send a signal to the command, once there is one; SIGKILL ends the whole job."""
        self.signals.append(number)
        if self.starting < 0:
            self.deliver()

    def deliver(self) -> None:
        """Send the signals that have waited for the command's start."""
        if self.starting >= 0:
            os.close(self.starting)
            self.starting = -1
        for number in self.signals:
            first = child(self.pid)
            target = first if number == SIGKILL or first is None else child(first)
            if target is not None:
                os.kill(target, number)
        self.signals.clear()

    def resize(self, body: bytes) -> None:
        """Give the terminal its size."""
        if self.terminal >= 0:
            rows, columns = wire.WINDOW.unpack(body)
            size = wire.WINDOW.pack(rows, columns) + bytes(4)
            fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, size)

    def close(self) -> None:
        """Release what is left open after the end."""
        for end in {self.exit, self.starting, self.stdin, self.terminal, *self.outputs} - {-1}:
            os.close(end)


def child(pid: int) -> int | None:
    """The eldest child of a process."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return int(file.read().split()[0])
    except (OSError, IndexError):
        return None


def exit_status(status: int) -> int:
    """An exit status as shells count: 128 + n after signal n."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def execute(ends: list[int], start: wire.Start) -> int:
    """Become the command; returns the exit status if that cannot be done."""
    os.setsid()
    for number, end in enumerate(ends[:3]):
        os.dup2(end, number)
    if start.pty:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for ignored_by_python in (SIGPIPE, SIGXFSZ):
        libc.signal(ignored_by_python, ctypes.c_void_p(SIG_DFL))
    environment = dict(entry.split(b"=", 1) for entry in start.env)
    runtime = environment.get(b"XDG_RUNTIME_DIR", b"")
    if runtime.startswith(b"/run/"):  # the host's own is not to be seen in here
        os.makedirs(runtime, 0o700, exist_ok=True)
    try:
        os.chdir(start.cwd)
        os.execvpe(start.argv[0], start.argv, environment)
    except OSError as error:
        os.write(
            2, f"lab: {os.fsdecode(error.filename or start.argv[0])}: {error.strerror}\n".encode()
        )
        return 127 if isinstance(error, FileNotFoundError) else 126


def open_port() -> int:
    """Open the virtio-serial port, once the host's side of it is there."""
    folder = "/sys/class/virtio-ports"
    for name in os.listdir(folder):
        with open(f"{folder}/{name}/name") as file:
            if file.read().strip() == wire.PORT:
                port = os.open(f"/dev/{name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                break
    else:
        raise FileNotFoundError(f"no virtio-serial port named {wire.PORT}")
    poll = select.poll()
    poll.register(port, 0)
    for _ in range(500):
        if not any(events & select.POLLHUP for _, events in poll.poll(0)):
            return port
        time.sleep(0.02)
    raise TimeoutError("the host does not open its side of the virtio-serial port")


def main() -> None:
    """Serve until the host hangs up."""
    port = open_port()
    incoming = bytearray()
    outgoing = bytearray(wire.frame(wire.READY, 0))
    job: Job | None = None
    while True:
        poll = select.poll()
        poll.register(port, select.POLLIN | (select.POLLOUT if outgoing else 0))
        if job is not None:
            if len(outgoing) < BUFFERED:
                for end in job.outputs:
                    poll.register(end, select.POLLIN)
            if job.backlog:
                events = select.POLLOUT
                if job.stdin in job.outputs and len(outgoing) < BUFFERED:
                    events |= select.POLLIN
                poll.register(job.stdin, events)
            if job.status is None:
                poll.register(job.exit, select.POLLIN)
            if job.starting >= 0:
                poll.register(job.starting, 0)
        ready = dict(poll.poll())

        if ready.get(port, 0) & select.POLLHUP:
            return
        if ready.get(port, 0) & select.POLLIN:
            incoming += os.read(port, PIECE)
            for kind, number, body in wire.frames(incoming):
                if kind == wire.START:
                    if job is not None:
                        raise RuntimeError("a job while another runs")
                    job = Job(number, body)
                    log(f"job {number}: {job.title}")
                elif job is None or number != job.number:
                    continue
                elif kind == wire.STDIN:
                    job.backlog += body
                    job.ending = not body
                    outgoing += job.feed()
                elif kind == wire.SIGNAL:
                    job.signal(wire.NUMBER.unpack(body)[0])
                elif kind == wire.RESIZE:
                    job.resize(body)
        if job is not None:
            if job.backlog and ready.get(job.stdin, 0) & ~select.POLLIN:
                outgoing += job.feed()
            for end in [end for end in job.outputs if ready.get(end)]:
                outgoing += job.drain(end)
            if ready.get(job.starting):
                job.deliver()
            if job.status is None and ready.get(job.exit):
                job.status = exit_status(os.waitpid(job.pid, 0)[1])
            if job.status is not None and not job.outputs:
                outgoing += wire.frame(wire.EXIT, job.number, wire.NUMBER.pack(job.status))
                log(f"job {job.number} has ended with status {job.status}")
                job.close()
                job = None
        if outgoing:
            try:
                count = os.write(port, outgoing[:PIECE])
            except BlockingIOError:
                count = 0
            del outgoing[:count]


if __name__ == "__main__":
    main()
