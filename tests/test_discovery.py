"""Which upstreams there are: asked, merged, compared and watched."""

import asyncio
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest
from pydantic import SecretStr

from lora_proxy import discovery
from lora_proxy.background import Files
from lora_proxy.discovery import (
    Change,
    DiscoveryError,
    Dns,
    File,
    Source,
    Static,
    Union,
    difference,
    sources_of,
    watch,
)
from lora_proxy.settings import Settings, TlsSettings, UpstreamSettings

SOON = 0.01  # seconds between two looks; nothing is asserted about time


def one(name: str, url: str | None = None) -> UpstreamSettings:
    return UpstreamSettings(name=name, url=url or f"http://{name}:8000")


def names(upstreams: Sequence[UpstreamSettings]) -> list[str]:
    return [one.name for one in upstreams]


async def reason(source: Source) -> str:
    with pytest.raises(DiscoveryError) as caught:
        await source.upstreams()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Told:
    """A source whose next answer the test decides."""

    def __init__(self, *upstreams: UpstreamSettings) -> None:
        self.answer: tuple[UpstreamSettings, ...] | DiscoveryError = upstreams
        self._asked = asyncio.Event()

    async def asked_again(self) -> None:
        """Until the present answer was given, and what came of it is over."""
        for _ in range(2):
            self._asked.clear()
            await self._asked.wait()

    async def upstreams(self) -> Sequence[UpstreamSettings]:
        self._asked.set()
        if isinstance(self.answer, DiscoveryError):
            raise self.answer
        return self.answer


async def test_configured_upstreams_are_always_the_same() -> None:
    assert names(await Static([one("b"), one("a")]).upstreams()) == ["b", "a"]


# --- DNS --------------------------------------------------------------------------------


class Names:
    """Stands in for the resolver: what every name resolves to, or how it fails."""

    def __init__(self) -> None:
        self.known: dict[str, list[str] | Exception] = {}

    async def getaddrinfo(self, host: str, port: object, **how: int) -> list[tuple[object, ...]]:
        found = self.known[host]
        if isinstance(found, Exception):
            raise found
        return [
            (socket.AF_INET6, how["type"], 6, "", (address, 0, 0, 0))
            if ":" in address
            else (socket.AF_INET, how["type"], 6, "", (address, 0))
            for address in found
        ]


@pytest.fixture
async def dns(monkeypatch: pytest.MonkeyPatch) -> Names:
    resolver = Names()
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolver.getaddrinfo)
    return resolver


def behind(name: str, url: str, **more: object) -> UpstreamSettings:
    return replace(one(name, url), dns=True, **more)


async def test_every_address_is_an_upstream_once_and_in_order(dns: Names) -> None:
    dns.known["vllm"] = ["10.0.0.10", "fd00::2", "10.0.0.9", "10.0.0.10"]
    template = behind("gpu", "http://vllm:8000", max_cpu_loras=4, api_key=SecretStr("k"))
    first, second, third = await Dns(template).upstreams()
    assert first == replace(template, dns=False, name="gpu-10.0.0.9", url="http://10.0.0.9:8000")
    assert (second.name, second.url) == ("gpu-10.0.0.10", "http://10.0.0.10:8000")
    assert (third.name, third.url) == ("gpu-fd00::2", "http://[fd00::2]:8000")
    assert {found.max_cpu_loras for found in (first, second, third)} == {4}


async def test_the_order_of_an_answer_changes_nothing(dns: Names) -> None:
    source = Dns(behind("gpu", "http://vllm"))
    dns.known["vllm"] = ["10.0.0.2", "10.0.0.1"]
    before = await source.upstreams()
    dns.known["vllm"] = ["10.0.0.1", "10.0.0.2"]
    assert await source.upstreams() == before
    assert [found.url for found in before] == ["http://10.0.0.1", "http://10.0.0.2"]


async def test_a_certificate_still_names_the_host(dns: Names) -> None:
    dns.known["vllm.internal"] = ["10.0.0.1"]
    tls = TlsSettings(verify=False)
    (found,) = await Dns(behind("gpu", "https://vllm.internal:8443", tls=tls)).upstreams()
    assert found.url == "https://10.0.0.1:8443"
    assert found.tls == TlsSettings(verify=False, server_name="vllm.internal")
    other = TlsSettings(server_name="gpu.example")
    (found,) = await Dns(behind("gpu", "https://vllm.internal", tls=other)).upstreams()
    assert found.tls == other


async def test_an_address_that_only_one_machine_understands_is_none(dns: Names) -> None:
    dns.known["vllm"] = ["fe80::1%eth0", "10.0.0.1"]
    source = Dns(behind("gpu", "http://vllm"))
    assert names(await source.upstreams()) == ["gpu-10.0.0.1"]
    dns.known["vllm"] = ["fe80::1%eth0"]
    assert await reason(source) == "upstream gpu: vllm resolves to no address"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([], "resolves to no address"),
        (
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            "cannot be resolved: Name or service not known",
        ),
        (UnicodeError("label empty or too long"), "is not a name that DNS can hold"),
    ],
)
async def test_no_answer_is_a_reason_and_no_empty_list(
    dns: Names, answer: list[str] | Exception, said: str
) -> None:
    dns.known["vllm"] = answer
    assert await reason(Dns(behind("gpu", "http://vllm"))) == f"upstream gpu: vllm {said}"


async def test_a_resolver_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", never)
    monkeypatch.setattr(discovery, "PATIENCE", SOON)
    assert "vllm was not resolved within 0.01 s" in await reason(Dns(behind("g", "http://vllm")))


async def test_the_machines_own_resolver_is_asked() -> None:
    found = await Dns(behind("here", "http://localhost:8000")).upstreams()
    assert "here-127.0.0.1" in names(found)


# --- a file -----------------------------------------------------------------------------


class Reader:
    """Runs the reading in a real thread, and counts the texts that were judged."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files = Files(1)
        self.judged = 0
        judge = discovery.config.upstreams

        def counted(text: bytes, name: str) -> tuple[UpstreamSettings, ...]:
            self.judged += 1
            return judge(text, name)

        monkeypatch.setattr(discovery.config, "upstreams", counted)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    reader = Reader(monkeypatch)
    yield reader
    reader.files.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fleet.yaml"


@pytest.fixture
def file(path: Path, reader: Reader) -> File:
    return File(path, reader.files.call)


def write(path: Path, text: str) -> None:
    path.write_text(text)


def replace_by(path: Path, text: str) -> None:
    """As careful writers do, so that nobody sees half a file; here with the old one's times."""
    new = path.with_suffix(".new")
    new.write_text(text)
    if path.exists():
        os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    new.replace(path)


def move(path: Path, to: Path) -> None:
    path.rename(to)


def listed(*hosts: str) -> str:
    return "".join(f"- {{name: {host}, url: http://{host}:8000}}\n" for host in hosts)


async def test_a_file_has_the_keys_of_the_configuration(path: Path, file: File) -> None:
    write(path, "- {url: http://a:1, max_cpu_loras: 4}\n- {name: b, url: http://B:2/}\n")
    assert list(await file.upstreams()) == [
        UpstreamSettings(name="a:1", url="http://a:1", max_cpu_loras=4),
        UpstreamSettings(name="b", url="http://b:2"),
    ]


@pytest.mark.parametrize("indent", [None, 2, "\t"])
async def test_json_is_read_however_it_is_indented(
    path: Path, file: File, indent: int | str | None
) -> None:
    write(path, json.dumps([{"url": "http://a:1"}, {"url": "http://b:1"}], indent=indent))
    assert names(await file.upstreams()) == ["a:1", "b:1"]


async def test_a_change_is_noticed_and_only_a_change_is_read(
    path: Path, file: File, reader: Reader
) -> None:
    write(path, listed("a"))
    assert names(await file.upstreams()) == ["a"]
    assert names(await file.upstreams()) == ["a"]
    assert reader.judged == 1
    write(path, listed("a", "b"))
    assert names(await file.upstreams()) == ["a", "b"]
    assert reader.judged == 2


async def test_a_rename_over_it_is_noticed_by_the_inode_alone(path: Path, file: File) -> None:
    write(path, listed("a"))
    assert names(await file.upstreams()) == ["a"]
    replace_by(path, listed("b"))
    assert names(await file.upstreams()) == ["b"]


async def test_a_swapped_symlink_is_noticed(tmp_path: Path, reader: Reader) -> None:
    """As Kubernetes does it: fleet.yaml -> ..data/fleet.yaml, and ..data -> ..N."""
    for number, host in enumerate(("a", "b")):
        (tmp_path / f"..{number}").mkdir()
        (tmp_path / f"..{number}" / "fleet.yaml").write_text(listed(host))
    data = tmp_path / "..data"
    data.symlink_to("..0")
    (tmp_path / "fleet.yaml").symlink_to("..data/fleet.yaml")
    file = File(tmp_path / "fleet.yaml", reader.files.call)
    assert names(await file.upstreams()) == ["a"]
    (tmp_path / "..tmp").symlink_to("..1")
    (tmp_path / "..tmp").replace(data)
    assert names(await file.upstreams()) == ["b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a list of at least one upstream"),
        ("[]", "must be a list of at least one upstream"),
        ("upstreams: []", "must be a list of at least one upstream"),
        (listed("a") + "- {name: b, url: htt", "expected"),
        (listed("a", "a"), "upstreams[1].url: the same server as upstreams[0]"),
        ("- {name: a}\n", "upstreams[0].url: is required; add it (fleet.yaml, line 1)"),
        (listed("a") + "- {url: 'http://b', max: 1}\n", "upstreams[1].max: unknown key"),
        ("- {url: 'http://b', dns: true}\n", "upstreams[0].dns: is for the configuration"),
        ("- {url: 'http://u:hunter2@b'}\n", "must hold no user name"),
    ],
)
async def test_what_is_half_written_or_wrong_is_a_reason_that_names_the_file(
    path: Path, file: File, text: str, said: str
) -> None:
    write(path, text)
    found = await reason(file)
    assert found.startswith(f"{path}: ")
    assert said in found
    assert "hunter2" not in found


async def test_all_faults_are_told_and_the_end_of_the_writing_is_seen(
    path: Path, file: File
) -> None:
    write(path, "- {name: a}\n- {name: b}\n")
    found = await reason(file)
    assert "upstreams[0].url: is required" in found
    assert "upstreams[1].url: is required" in found
    write(path, listed("a", "b"))
    assert names(await file.upstreams()) == ["a", "b"]


async def test_a_fault_that_lies_outside_the_file_passes_without_a_change_to_it(
    path: Path, file: File, tmp_path: Path
) -> None:
    trustme = pytest.importorskip("trustme")
    ca = tmp_path / "ca.pem"
    write(path, f"- {{url: 'https://a', tls: {{ca_file: {ca}}}}}\n")
    assert "tls.ca_file: cannot be used" in await reason(file)
    trustme.CA().cert_pem.write_to_path(str(ca))
    assert names(await file.upstreams()) == ["a:443"]


async def test_a_file_that_is_away_for_a_while(path: Path, file: File, tmp_path: Path) -> None:
    assert await reason(file) == f"{path} cannot be read: No such file or directory"
    write(path, listed("a"))
    assert names(await file.upstreams()) == ["a"]
    move(path, tmp_path / "away")
    assert await reason(file) == f"{path} cannot be read: No such file or directory"
    move(tmp_path / "away", path)
    assert names(await file.upstreams()) == ["a"]


async def test_a_volume_that_hangs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def hangs(function: Callable[[], object]) -> object:
        return await asyncio.Event().wait()

    monkeypatch.setattr(discovery, "PATIENCE", SOON)
    assert await reason(File(path, hangs)) == f"{path} was not read within 0.01 s"


# --- several sources --------------------------------------------------------------------


async def test_a_union_has_all_in_the_order_of_its_sources() -> None:
    union = Union([Told(one("b"), one("a")), Static([one("d")]), Told(one("c"))])
    assert names(await union.upstreams()) == ["b", "a", "d", "c"]


async def test_of_two_upstreams_with_one_name_or_one_address_the_first_counts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    second = Told(one("a", "http://other"), one("b", "http://a:8000"), one("c"))
    union = Union([Static([one("a")]), second])
    for _ in range(3):
        assert list(await union.upstreams()) == [one("a"), one("c")]
    assert [record.message for record in caplog.records] == [
        "two upstreams are named a; the second is left out",
        "upstream b is a again; it is left out",
    ]
    second.answer = (one("c"),)
    await union.upstreams()
    second.answer = (one("a"),)
    await union.upstreams()
    assert len(caplog.records) == 3  # it had been gone, so it is said again


async def test_a_source_that_fails_keeps_what_it_told_and_others_go_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "lora_proxy")
    first, second = Told(one("a")), Told(one("b"))
    union = Union([first, second])
    assert names(await union.upstreams()) == ["a", "b"]
    first.answer = DiscoveryError("no DNS")
    second.answer = (one("c"),)
    for _ in range(2):
        assert names(await union.upstreams()) == ["a", "c"]
    first.answer = (one("d"),)
    assert names(await union.upstreams()) == ["d", "c"]
    assert [record.message for record in caplog.records] == [
        "no DNS; the upstreams known so far stay",
        "upstreams are told again, after: no DNS",
    ]


async def test_a_union_without_any_upstream_tells_every_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = Told(), Told()
    first.answer, second.answer = DiscoveryError("no DNS"), DiscoveryError("no file")
    assert await reason(Union([first, second])) == "no DNS; no file"
    assert await reason(Union([Static([])])) == "no source names an upstream"
    assert caplog.records == []  # whoever catches it says so


async def test_the_configured_sources_in_their_order(
    dns: Names, path: Path, reader: Reader
) -> None:
    dns.known["pool"] = ["10.0.0.1"]
    write(path, listed("f"))
    settings = Settings(
        upstreams=(behind("p", "http://pool:1"), one("a"), one("b")), upstreams_file=path
    )
    source = sources_of(settings, reader.files)
    assert names(await source.upstreams()) == ["a", "b", "p-10.0.0.1", "f"]
    dns.known["pool"] = socket.gaierror(socket.EAI_AGAIN, "Temporary failure")
    move(path, path.with_suffix(".away"))
    assert names(await source.upstreams()) == ["a", "b", "p-10.0.0.1", "f"]


# --- change -----------------------------------------------------------------------------


def test_what_differs_between_two_lists() -> None:
    a, b, c = one("a"), one("b"), one("c")
    assert difference([], [a, b]) == Change(added=(a, b))
    assert difference([a, b], [b]) == Change(removed=(a,))
    assert difference([a, b], [b, a]) == Change()
    lower = replace(a, max_cpu_loras=2)
    assert difference([a, b], [lower, c]) == Change(removed=(b,), added=(c,), changed=(lower,))


def test_an_upstream_that_is_elsewhere_is_another_one() -> None:
    a, moved = one("a"), one("a", "http://elsewhere")
    assert difference([a], [moved]) == Change(removed=(a,), added=(moved,))
    trusted = replace(a, tls=TlsSettings(verify=False))
    assert difference([a], [trusted]) == Change(removed=(a,), added=(trusted,))


# --- watching ---------------------------------------------------------------------------


class Watched:
    """Runs `watch`; the lists it told arrive in a queue."""

    def __init__(self, source: Source, known: Sequence[UpstreamSettings] = ()) -> None:
        self._lists: asyncio.Queue[list[str]] = asyncio.Queue()
        self._task = asyncio.create_task(watch(source, SOON, self._take, known))

    async def _take(self, found: Sequence[UpstreamSettings]) -> None:
        await self._lists.put(names(found))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self._task
        assert self._lists.empty()  # every list that was told was expected

    async def told(self) -> list[str]:
        return await self._lists.get()


async def test_only_a_list_that_differs_is_told() -> None:
    source = Told(one("a"))
    async with Watched(source) as watched:
        assert await watched.told() == ["a"]
        await source.asked_again()
        source.answer = (one("a"), one("b"))
        assert await watched.told() == ["a", "b"]
        await source.asked_again()


async def test_the_list_that_is_known_is_not_told() -> None:
    source = Told(one("a"))
    async with Watched(source, known=[one("a")]) as watched:
        await source.asked_again()
        source.answer = (one("b"),)
        assert await watched.told() == ["b"]


async def test_a_source_that_fails_is_logged_once_for_each_reason_and_keeps_its_list(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "lora_proxy")
    source = Told(one("a"))
    async with Watched(source) as watched:
        assert await watched.told() == ["a"]
        for why in ("no DNS", "no file"):
            source.answer = DiscoveryError(why)
            await source.asked_again()
        source.answer = (one("a"),)
        await source.asked_again()
        source.answer = (one("b"),)
        assert await watched.told() == ["b"]
    assert [record.message for record in caplog.records] == [
        "no DNS; the upstreams known so far stay",
        "no file; the upstreams known so far stay",
        "upstreams are told again, after: no file",
    ]


async def test_a_file_is_watched_through_its_whole_life(path: Path, file: File) -> None:
    async with Watched(file) as watched:
        for hosts in (["a"], ["a", "b"], ["b"]):
            replace_by(path, listed(*hosts))
            assert await watched.told() == hosts
        move(path, path.with_suffix(".away"))  # says nothing about b
        replace_by(path, listed("c"))
        assert await watched.told() == ["c"]


async def test_what_takes_the_lists_need_not_be_a_coroutine() -> None:
    lists: list[list[str]] = []
    told = asyncio.Event()

    def take(found: Sequence[UpstreamSettings]) -> None:
        lists.append(names(found))
        told.set()

    task = asyncio.create_task(watch(Static([one("a")]), SOON, take))
    await told.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert lists == [["a"]]
