"""Machines for programs with asyncio: the same names as `Machine` has, awaited.

Each call is made on a thread of its own, so that the event loop goes on meanwhile.

```python
async with Machine(config) as machine:
    await machine.expect("login:")
    await machine.migrate("tcp:host-b:4444")
```
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from vmm_reference import machine as synchronous

if TYPE_CHECKING:
    import os
    import re
    from types import TracebackType
    from typing import Self

    from .config import MachineConfig
    from .outcome import Outcome
    from .state.moving import Report

__all__ = ["Machine"]


class Machine:
    """A `vmm_reference.machine.Machine` whose calls are awaited.

    Args:
        config: what it is; or None with `machine`.
        machine: one that there is already, such as `Incoming` gave.

    Attributes:
        machine: the other one, for all that needs no waiting.
    """

    def __init__(
        self, config: MachineConfig | None = None, *, machine: synchronous.Machine | None = None
    ) -> None:
        if (config is None) == (machine is None):
            raise TypeError("a configuration or a machine, one of them")
        if machine is None:
            assert config is not None
            machine = synchronous.Machine(config)
        self.machine = machine

    @classmethod
    async def restore(
        cls, folder: str | os.PathLike[str], how: str = "copy-on-write", **overrides: Any
    ) -> Self:
        """A machine from a snapshot, as `Machine.restore` gives it."""
        made = partial(synchronous.Machine.restore, folder, how, **overrides)
        return cls(machine=await asyncio.to_thread(made))

    async def start(self) -> None:
        """Power on."""
        await asyncio.to_thread(self.machine.start)

    async def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for the machine to end, without a thread that waits; as `Machine.wait`."""
        end = None if timeout is None else asyncio.get_running_loop().time() + timeout
        while self.machine.outcome is None:
            if end is not None and asyncio.get_running_loop().time() >= end:
                raise TimeoutError(f"the machine still runs after {timeout:g} s")
            await asyncio.sleep(0.05)
        return self.machine.wait(0)

    async def expect(self, pattern: str, timeout: float = 60.0) -> re.Match[str]:
        """Wait for the console's output, as `Console.expect` does."""
        return await asyncio.to_thread(self.machine.console.expect, pattern, timeout)

    async def pause(self) -> None:
        """As `Machine.pause`."""
        await asyncio.to_thread(self.machine.pause)

    async def resume(self) -> None:
        """As `Machine.resume`."""
        await asyncio.to_thread(self.machine.resume)

    async def snapshot(self, folder: str | os.PathLike[str], **options: Any) -> str:
        """As `Machine.snapshot`."""
        return await asyncio.to_thread(partial(self.machine.snapshot, folder, **options))

    async def fork(
        self, count: int, folder: str | os.PathLike[str], **overrides: Any
    ) -> list[Machine]:
        """As `Machine.fork`."""
        forked = await asyncio.to_thread(partial(self.machine.fork, count, folder, **overrides))
        return [Machine(machine=machine) for machine in forked]

    async def migrate(self, address: str, **options: Any) -> Report:
        """As `Machine.migrate`; where the task is cancelled, the migration is."""
        work = asyncio.ensure_future(
            asyncio.to_thread(partial(self.machine.migrate, address, **options))
        )
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            self.machine.cancel_migration()
            await asyncio.wait([work])
            work.exception()  # it was asked for
            raise

    async def recover(self, address: str | None = None) -> Report:
        """As `Machine.recover`."""
        return await asyncio.to_thread(self.machine.recover, address)

    async def resolve(self) -> None:
        """As `Machine.resolve`."""
        await asyncio.to_thread(self.machine.resolve)

    async def close(self) -> None:
        """As `Machine.close`."""
        await asyncio.to_thread(self.machine.close)

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.machine.__enter__)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
