"""Which upstreams there are at present: configured ones, those behind a DNS name, a file's.

Owns how each of these is asked, when an answer counts, and what differs between two. Refuses
to know what is done about it: connections, health and leases belong to others. A source that
cannot be asked never takes an upstream away: what it told last stands until it tells more.
"""

import asyncio
import inspect
import ipaddress
import logging
import os
import random
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from lora_proxy import config
from lora_proxy.background import Files
from lora_proxy.config import ConfigError
from lora_proxy.settings import Settings, UpstreamSettings, host_port

log = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds for one look; as long as resolvers try two servers, 5 s each

Upstreams = Sequence[UpstreamSettings]


class DiscoveryError(Exception):
    """A source cannot tell its upstreams now. The message is one line and holds no secret."""


class Source(Protocol):
    """Something that knows upstreams."""

    async def upstreams(self) -> Upstreams:
        """All that there are now.

        Raises:
            DiscoveryError: They cannot be told; the caller keeps those that it knows.
        """
        ...


class Static:
    """Upstreams that never change.

    Args:
        upstreams: As configured, none of them behind a DNS name.
    """

    def __init__(self, upstreams: Iterable[UpstreamSettings]) -> None:
        self._upstreams = tuple(upstreams)

    async def upstreams(self) -> Upstreams:
        """Always the same."""
        return self._upstreams


# --- DNS --------------------------------------------------------------------------------


class Dns:
    """An upstream for every address behind one name, as of a headless Service.

    Args:
        template: What they have in common; the host of its url is the name.
    """

    def __init__(self, template: UpstreamSettings) -> None:
        self._template = template
        self._host = urlsplit(template.url).hostname or ""

    async def upstreams(self) -> Upstreams:
        """The template with each address, in the addresses' order.

        Raises:
            DiscoveryError: No answer in time, or one without an address. Where the last
                server really went away, there is nothing to be had from believing it.
        """
        told = f"upstream {self._template.name}: {self._host}"
        try:
            async with asyncio.timeout(PATIENCE):
                found = await asyncio.get_running_loop().getaddrinfo(
                    self._host, None, type=socket.SOCK_STREAM
                )
        except TimeoutError:
            raise DiscoveryError(f"{told} was not resolved within {PATIENCE:g} s") from None
        except OSError as error:
            raise DiscoveryError(f"{told} cannot be resolved: {error.strerror}") from None
        except UnicodeError:  # from the codec that splits a name into labels
            raise DiscoveryError(f"{told} is not a name that DNS can hold") from None
        # An address with a scope (fe80::1%eth0) means something on one machine only.
        texts = {str(address[0]) for *_, address in found if "%" not in str(address[0])}
        if not texts:
            raise DiscoveryError(f"{told} resolves to no address")
        addresses = sorted(map(ipaddress.ip_address, texts), key=lambda a: (a.version, int(a)))
        return tuple(_at(self._template, self._host, address) for address in addresses)


def _at(
    template: UpstreamSettings, host: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address
) -> UpstreamSettings:
    """The upstream at one address of a host; its certificate still names the host."""
    url, tls = urlsplit(template.url), template.tls
    port = "" if url.port is None else f":{url.port}"
    place = f"[{address}]" if address.version == 6 else str(address)
    if url.scheme == "https" and tls.server_name is None:
        tls = replace(tls, server_name=host)
    return replace(
        template,
        name=f"{template.name}-{address}",
        url=f"{url.scheme}://{place}{port}",
        tls=tls,
        dns=False,
    )


# --- a file -----------------------------------------------------------------------------

State = tuple[int, int, int]  # changes when the file is written, renamed over or relinked


@dataclass(frozen=True, slots=True)
class _Reading:
    """What a file listed when its state was this."""

    state: State
    upstreams: tuple[UpstreamSettings, ...]


class File:
    """The upstreams that a file lists, in YAML or JSON, with the keys of the configuration.

    Args:
        path: May be a symlink, as in a mounted ConfigMap: what counts is where it leads.
        call: Runs a function in a thread, like `Files.call`; the file's volume may hang.
    """

    def __init__(
        self,
        path: Path,
        call: Callable[[Callable[[], _Reading]], Awaitable[_Reading]],
    ) -> None:
        self._path = path
        self._call = call
        self._known: _Reading | None = None

    async def upstreams(self) -> Upstreams:
        """What the file lists now; it is read only if it has changed since it was good.

        Raises:
            DiscoveryError: It is not there, not readable, half-written, or lists what is
                not an upstream; has every fault with its line.
        """
        try:
            async with asyncio.timeout(PATIENCE):
                self._known = await self._call(partial(_read, self._path, self._known))
        except TimeoutError:
            raise DiscoveryError(f"{self._path} was not read within {PATIENCE:g} s") from None
        except OSError as error:
            raise DiscoveryError(f"{self._path} cannot be read: {error.strerror}") from None
        except ConfigError as error:
            raise DiscoveryError(f"{self._path}: {'; '.join(error.faults)}") from None
        return self._known.upstreams


def _read(path: Path, known: _Reading | None) -> _Reading:
    """The reading known, or a new one. State and text are of one open file: the same one."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        state = (status.st_mtime_ns, status.st_size, status.st_ino)
        if known is not None and known.state == state:
            return known
        text = file.read()
    return _Reading(state, config.upstreams(text, path.name))


# --- several sources as one ---------------------------------------------------------------


class Union:
    """All upstreams of several sources, in the sources' order.

    Of two with one name, or two at one address, the first counts: metrics could not tell
    the former apart, and the latter would have one server's load counted half. A source
    that cannot tell its upstreams is there with those that it told last.

    Args:
        sources: The first first.
    """

    def __init__(self, sources: Iterable[Source]) -> None:
        self._parts = [_Part(source) for source in sources]
        self._doubles: set[str] = set()

    async def upstreams(self) -> Upstreams:
        """All of them, each once.

        Raises:
            DiscoveryError: There is none at all; has the reason of every source.
        """
        async with asyncio.TaskGroup() as group:  # together: a slow one delays, once
            for part in self._parts:
                group.create_task(part.ask())
        merged = self._merged()
        if not merged:
            reasons = [part.reason for part in self._parts if part.reason]
            raise DiscoveryError("; ".join(reasons) or "no source names an upstream")
        for part in self._parts:
            part.trouble.note(part.reason)
        return merged

    def _merged(self) -> Upstreams:
        names: dict[str, UpstreamSettings] = {}
        places: dict[str, str] = {}
        doubles = set()
        for one in (one for part in self._parts for one in part.told):
            place = host_port(one.url)
            if one.name in names:
                doubles.add(f"two upstreams are named {one.name}; the second is left out")
            elif place in places:
                doubles.add(f"upstream {one.name} is {places[place]} again; it is left out")
            else:
                names[one.name] = one
                places[place] = one.name
        for double in sorted(doubles - self._doubles):
            log.warning("%s", double)
        self._doubles = doubles
        return tuple(names.values())


class _Part:
    """One source of a union, what it told last, and why it told no more since."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.told: Upstreams = ()
        self.reason = ""
        self.trouble = _Trouble()

    async def ask(self) -> None:
        try:
            self.told, self.reason = await self._source.upstreams(), ""
        except DiscoveryError as error:
            self.reason = str(error)


class _Trouble:
    """Logs why upstreams cannot be told: once, until the reason is another or gone."""

    def __init__(self) -> None:
        self._reason = ""

    def note(self, reason: str) -> None:
        """Takes the present reason; empty where there is none."""
        if reason and reason != self._reason:
            log.warning("%s; the upstreams known so far stay", reason)
        elif self._reason and not reason:
            log.info("upstreams are told again, after: %s", self._reason)
        self._reason = reason


def sources_of(settings: Settings, files: Files) -> Source:
    """The source of everything configured: `upstreams`, then `upstreams_file`.

    Args:
        settings: Validated.
        files: For the file; best its own, as a volume that hangs takes its threads.
    """
    sources: list[Source] = [Static(one for one in settings.upstreams if not one.dns)]
    sources += [Dns(one) for one in settings.upstreams if one.dns]
    if settings.upstreams_file is not None:
        sources.append(File(settings.upstreams_file, files.call))
    return Union(sources)


# --- change -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """What to do to get from one list of upstreams to another.

    Attributes:
        removed: As they were. To be done first: an upstream that is now elsewhere is here
            and, under the same name, in `added`.
        added: In the new list's order.
        changed: Same name and same server, other settings: these are the new ones.
    """

    removed: tuple[UpstreamSettings, ...] = ()
    added: tuple[UpstreamSettings, ...] = ()
    changed: tuple[UpstreamSettings, ...] = ()


def difference(before: Upstreams, after: Upstreams) -> Change:
    """What differs between two lists, by name; their order does not count.

    Another url, key, or way to check who answers there, is another upstream: nothing that
    is known of the old one holds, and none of its connections may be used.
    """
    old = {one.name: one for one in before}
    new = {one.name: one for one in after}
    kept = {name for name in old.keys() & new.keys() if _way(old[name]) == _way(new[name])}
    return Change(
        removed=tuple(one for one in before if one.name not in kept),
        added=tuple(one for one in after if one.name not in kept),
        changed=tuple(one for one in after if one.name in kept and one != old[one.name]),
    )


def _way(one: UpstreamSettings) -> object:
    return one.url, one.tls, one.api_key


async def watch(
    source: Source,
    interval: float,
    on_change: Callable[[Upstreams], Awaitable[None] | None],
    known: Upstreams = (),
) -> None:
    """Asks a source again and again; runs until it is cancelled, or until `on_change` fails.

    Args:
        source: Asked at once, and then after every interval.
        interval: Seconds between two looks, jittered by a tenth.
        on_change: Gets every list that differs from the one before it.
        known: The list before the first.
    """
    trouble = _Trouble()
    while True:
        try:
            found = tuple(await source.upstreams())
        except DiscoveryError as error:
            trouble.note(str(error))
        else:
            trouble.note("")
            if found != tuple(known):
                known = found
                done = on_change(found)
                if inspect.isawaitable(done):
                    await done
        # Jitter, so that many proxies do not ask in step.
        await asyncio.sleep(interval * random.uniform(0.9, 1.1))  # noqa: S311  # no secret
