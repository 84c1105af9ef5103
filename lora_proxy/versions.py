"""What each adapter's files hold now, and which content its public name stands for.

Owns the way from an adapter to a `Module`: reading files is slow, so it is done once for
however many ask, in threads, and remembered with the state of the files that was read.
Refuses to know where a module is loaded, and decides nothing about when a new one takes
over: `take` is the one assignment that repoints a public name.
"""

import asyncio
from dataclasses import dataclass

from lora_proxy import sources
from lora_proxy.background import Files, Tasks
from lora_proxy.errors import ProxyError
from lora_proxy.types import Adapter, Module, served_name

RECHECK = 1.0  # seconds between two looks at the files of an adapter that is resident nowhere


@dataclass(frozen=True, slots=True)
class Version:
    """One content of an adapter.

    Attributes:
        module: What a server is asked to load.
        base: The base model that adapter_config.json names; None where it cannot be read.
        checked: When the files were last looked at, on the loop's clock.
    """

    module: Module
    base: str | None
    checked: float


class Versions:
    """The present version of every adapter that has been asked for.

    Args:
        files: Where the looking is done.
        tasks: Owns the looks under way.
        patience: Seconds that a request waits for a look.
    """

    def __init__(self, files: Files, tasks: Tasks, patience: float) -> None:
        self._files = files
        self._tasks = tasks
        self._patience = patience
        self._present: dict[str, Version] = {}
        self._looking: dict[str, asyncio.Task[Version]] = {}

    def present(self, adapter: str) -> Version | None:
        """What the public name stands for now; None if nobody has asked yet."""
        return self._present.get(adapter)

    def take(self, version: Version) -> None:
        """From now on the public name stands for this version."""
        self._present[version.module.adapter] = version

    def forget(self, adapter: str) -> None:
        """The adapter is registered no more."""
        self._present.pop(adapter, None)

    async def look(self, adapter: Adapter, *, fresh: bool = False) -> Version:
        """What the files hold now; at most one look in `RECHECK`, unless it must be `fresh`.

        Raises:
            ProxyError: `adapter_load_timeout` where the files cannot be read in time.
        """
        known = self._present.get(adapter.name)
        now = asyncio.get_running_loop().time()
        if known is not None and not fresh and now - known.checked < RECHECK:
            return known
        task = self._looking.get(adapter.name)
        if task is None:
            task = self._looking[adapter.name] = self._tasks.spawn(self._look(adapter))
            task.add_done_callback(lambda _: self._looking.pop(adapter.name))
        try:
            async with asyncio.timeout(self._patience):
                return await asyncio.shield(task)  # others wait for it too
        except TimeoutError:
            raise ProxyError(
                "adapter_load_timeout",
                f"the files of adapter '{adapter.name}' were not read within "
                f"{self._patience:g} s; check the volume that they are on",
                replayable=False,
            ) from None

    async def _look(self, adapter: Adapter) -> Version:
        known = self._present.get(adapter.name)
        fingerprint = await self._files.call(sources.fingerprint, adapter.path)
        now = asyncio.get_running_loop().time()
        if (
            known is not None
            and known.module.fingerprint == fingerprint
            and known.module.path == adapter.path
            and (fingerprint is not None or known.module.declared == adapter.revision)
        ):
            version = Version(known.module, known.base, now)
            if self._present.get(adapter.name) is known:
                self.take(version)
            return version
        revision = await self._files.call(sources.revision, adapter.path, adapter.revision)
        base = await self._files.call(_base_of, adapter.path) if fingerprint is not None else None
        module = Module(
            adapter.name,
            served_name(adapter.name, revision),
            adapter.path,
            fingerprint=fingerprint,
            declared=adapter.revision,
        )
        return Version(module, base, now)


def _base_of(path: str) -> str | None:
    """What adapter_config.json says; a folder with faults is judged at its load."""
    try:
        return sources.inspect(path).base_model
    except ProxyError:
        return None
