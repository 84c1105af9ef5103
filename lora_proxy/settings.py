"""Everything that an operator can decide: the frozen values, their defaults and their meaning.

Owns the types and ranges of single values, in pydantic's terms, because untrusted text
becomes these. Refuses to know where the text comes from (config) and what the values are
used for. Touches nothing but the CA files that they name.
"""

import ipaddress
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    StringConstraints,
    TypeAdapter,
)

from lora_proxy.types import Adapter, Route

_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Listen:
    """Where clients connect.

    Attributes:
        host: A name or address, IPv6 without brackets.
        port: 0 for any free port.
    """

    host: str = "0.0.0.0"  # noqa: S104  # a sidecar must be reachable from its neighbours
    port: int = 8080

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _listen(value: object) -> Listen:
    """Reads HOST:PORT; IPv6 is [ADDRESS]:PORT."""
    hint = 'write HOST:PORT, as in 0.0.0.0:8080 or "[::]:8080"'
    if isinstance(value, Listen):
        return value
    if not isinstance(value, str):
        raise ValueError(hint)  # noqa: TRY004  # pydantic reports ValueError, not TypeError
    host, colon, port = value.rpartition(":")
    if not colon or not _is_host(host):
        raise ValueError(hint)
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) <= 65_535):
        raise ValueError(f"the port must be a number from 0 to 65535; {hint}")
    return Listen(host.strip("[]"), int(port))


def _is_host(host: str) -> bool:
    """Whether this is a host name, an IPv4 address, or an IPv6 address in brackets."""
    if host.startswith("[") and host.endswith("]"):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            return False
        return True
    return re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,252})", host) is not None


def _split_url(text: str) -> SplitResult:
    """Takes an upstream's URL apart, and refuses what is more than scheme, host and port."""
    hint = "write http://HOST:PORT or https://HOST:PORT"
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError(f"holds a blank or another character that no URL has; {hint}")
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        raise ValueError(f"the host or the port is not valid; {hint}") from None
    if url.scheme not in ("http", "https"):
        raise ValueError(f"must begin with http:// or https://; {hint}")
    if "@" in url.netloc:
        raise ValueError("must hold no user name or password; use this upstream's api_key")
    if url.path not in ("", "/"):
        raise ValueError(
            f"must have no path; leave out what follows the port, also /v1; {hint}",
        )
    if "?" in text or "#" in text:
        raise ValueError(f"must have no query and no fragment; {hint}")
    host = url.netloc.removesuffix(f":{port}") if port is not None else url.netloc
    if not _is_host(host.removesuffix(":")) or port == 0:
        raise ValueError(f"the host or the port is not valid; {hint}")
    return url


def _upstream_url(text: str) -> str:
    url = _split_url(text)
    return f"{url.scheme}://{url.netloc.lower().removesuffix(':')}"


def host_port(text: str) -> str:
    """HOST:PORT of a URL that the checks below accept, the port always written out."""
    url = _split_url(text)
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
    return f"{host}:{url.port or (443 if url.scheme == 'https' else 80)}"


def _header_safe(secret: SecretStr) -> SecretStr:
    if re.fullmatch(r"[\x21-\x7e]+", secret.get_secret_value()) is None:
        raise ValueError("must be one or more printable ASCII characters without blanks")
    return secret


def _ca_file(path: Path) -> Path:
    try:
        ssl.create_default_context(cafile=path)
    except OSError:  # ssl.SSLError is one
        raise ValueError("cannot be used; give the PEM file of the CA to trust") from None
    return path


def _server_name(text: str) -> str:
    if not _is_host(text) or text.startswith("["):
        raise ValueError("must be the host name that the certificate is for")
    return text


def _file(path: Path) -> Path:
    if path == Path():  # what an empty text is read as
        raise ValueError("must be a file's path")
    return path


def _sticky(text: str) -> str:
    # RFC 9110, 5.1 and 5.6.2: a field's name is a token, in any case.
    if re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,200}", text) is None:
        raise ValueError("must be user, or a header's name such as x-session-id")
    return text.lower()


def _one_or_more(value: object) -> object:
    """A single name may stand without the brackets of a list."""
    return [value] if isinstance(value, str) else value


def _no_boolean(value: object) -> object:
    """Python counts True as 1; in a file `max_cpu_loras: yes` is a slip."""
    if isinstance(value, bool):
        raise ValueError("must be a number")  # noqa: TRY004  # pydantic reports ValueError
    return value


Count = Annotated[int, BeforeValidator(_no_boolean), Field(ge=1)]
CountOrZero = Annotated[int, BeforeValidator(_no_boolean), Field(ge=0)]
Share = Annotated[float, BeforeValidator(_no_boolean), Field(ge=0, le=1)]
Weight = Annotated[
    float, BeforeValidator(_no_boolean), Field(gt=0, le=1_000_000, allow_inf_nan=False)
]
Seconds = Annotated[float, BeforeValidator(_no_boolean), Field(gt=0, le=_DAY, allow_inf_nan=False)]
SecondsOrZero = Annotated[
    float, BeforeValidator(_no_boolean), Field(ge=0, le=_DAY, allow_inf_nan=False)
]
Text = Annotated[str, StringConstraints(min_length=1, max_length=200)]
# The default, HOST:PORT, must also be a name that one can write down.
UpstreamName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:\[\]-]{1,100}$")]
Names = Annotated[tuple[Text, ...], BeforeValidator(_one_or_more)]
Policy = Literal["lora-affinity", "least-loaded", "round-robin", "prefix-affinity"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]

VALUES: Mapping[tuple[type, str], TypeAdapter[object]] = {
    (Adapter, "base"): TypeAdapter(Text),
    (Adapter, "replicas"): TypeAdapter(Count),
    (Route, "split"): TypeAdapter(Annotated[dict[Text, Weight], Field(min_length=1)]),
    (Route, "sticky"): TypeAdapter(Annotated[str, AfterValidator(_sticky)]),
    (Route, "fallback"): TypeAdapter(Names),
    (Route, "mirror"): TypeAdapter(Text),
    (Route, "sample"): TypeAdapter(Share),
}
"""What the fields of the pure core's values must be, where their own types do not say it."""


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """How an https upstream's certificate is checked.

    Attributes:
        ca_file: PEM file to trust instead of the system's CAs.
        verify: False accepts any certificate.
        server_name: Whose certificate it must be, and the name sent as SNI, where that is
            not the url's host.
    """

    ca_file: Annotated[Path, AfterValidator(_ca_file)] | None = None
    verify: bool = True
    server_name: Annotated[str, AfterValidator(_server_name)] | None = None


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """One vLLM server process.

    Attributes:
        name: Used in logs, metrics and messages.
        url: `http://HOST:PORT` or `https://HOST:PORT`, nothing behind it.
        api_key: Sent to this upstream as a Bearer token.
        max_cpu_loras: Adapters that the proxy keeps resident here; None is no bound.
        max_lora_rank: The server's own limit, checked before a load.
        base_model: The served base model's name, so that collisions are found at start.
        weight: Its capacity, relative to the others'.
        max_loras: Adapters that its GPU computes at once; None for what vLLM reports.
        max_in_flight: Requests sent to it at once; None is no bound.
        drain: Gets no new requests.
        dns: Every address of the url's host name is an upstream of its own.
        tls: For an https url.
    """

    name: UpstreamName
    url: Annotated[str, AfterValidator(_upstream_url)]
    api_key: Annotated[SecretStr, AfterValidator(_header_safe)] | None = None
    max_cpu_loras: Count | None = None
    max_lora_rank: Count | None = None
    base_model: Text | None = None
    weight: Weight = 1.0
    max_loras: Count | None = None
    max_in_flight: Count | None = None
    drain: bool = False
    dns: bool = False
    tls: TlsSettings = TlsSettings()


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """How an upstream is chosen.

    Attributes:
        policy: `lora-affinity`, `least-loaded`, `round-robin` or `prefix-affinity`.
        spill_factor: An upstream with more than this many times the average load gives
            requests to a further one, although that has yet to load the adapter.
        spill_floor: Requests in flight up to which an upstream never does so.
    """

    policy: Policy = "lora-affinity"
    spill_factor: Annotated[
        float, BeforeValidator(_no_boolean), Field(ge=1, le=1000, allow_inf_nan=False)
    ] = 1.25
    spill_floor: CountOrZero = 16


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """When an upstream counts as down, and how it comes back. Times in seconds.

    Attributes:
        fall: Failures in a row, of probes or of requests, that take it out.
        rise: Successful probes in a row that bring it back.
        pause: For how long failed requests take it out the first time; doubles with each
            failed trial.
        pause_most: For how long at most.
        trials: Requests that it is then tried with at once, and that must succeed.
        ramp: For how long the share of one that is back grows to the whole.
    """

    fall: Count = 3
    rise: Count = 1
    pause: Seconds = 5.0
    pause_most: Seconds = 60.0
    trials: Count = 2
    ramp: SecondsOrZero = 10.0

    def __post_init__(self) -> None:
        if self.pause_most < self.pause:
            raise ValueError("pause_most must not be less than pause; raise it, or lower pause")


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """What is sent again after an upstream's fault.

    Attributes:
        attempts: Upstreams tried for one request at most.
        budget: The share of traffic that retries may come to.
        replay_started: Also send again what may have begun to generate.
    """

    attempts: Count = 3
    budget: Share = 0.2
    replay_started: bool = False


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """Where requests wait while every upstream is at its `max_in_flight`.

    Attributes:
        length: Requests that wait at most; 0 refuses them at once.
        timeout: Seconds that one waits.
    """

    length: CountOrZero = 1000
    timeout: Seconds = 30.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes.

    Attributes:
        body: Largest request body.
        headers: A request's longest header field or request line, and an upstream's whole
            header section.
    """

    body: Count = 64 * 1024 * 1024
    headers: Annotated[Count, Field(ge=1024)] = 64 * 1024


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Times in seconds.

    Attributes:
        connect: TCP and TLS to an upstream.
        read: Silence of an upstream.
        client: Silence of a client in the middle of its body.
        notice: How long a shutdown goes on taking requests while `/ready` says 503, so
            that load balancers look away first.
        drain: What a shutdown then leaves to requests under way.
        keepalive: How long an idle upstream connection is kept; uvicorn, and so vLLM,
            closes its side after 5.
    """

    connect: Seconds = 5.0
    read: Seconds = 600.0
    client: Seconds = 30.0
    notice: SecondsOrZero = 3.0
    drain: SecondsOrZero = 30.0
    keepalive: SecondsOrZero = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that an operator can decide.

    Attributes:
        listen: Where clients connect.
        upstreams: At least one, unless there is a file of them.
        upstreams_file: Lists further ones, and is watched.
        discovery_interval: Seconds between two looks at DNS names and that file.
        adapters: The registry, in the order given.
        base_aliases: A base model's name -> its names in adapters' adapter_config.json.
        routes: Public names that lead to several adapters, in the order given.
        default_model: The public name for requests that name none, or an unknown one.
        api_keys: Clients must present one of these; none means that everybody may come in.
        allow_chat_template: Pass a client's own `chat_template` on, instead of dropping it.
        strict_paths: Forward listed paths only, not all of `/v1/`.
        load_timeout: Seconds that a request waits for its adapter.
        probe_interval: Seconds between two looks at an upstream.
        watch_interval: Seconds between two looks at adapters' files; 0 is never.
        idle_ttl: Seconds after which an adapter that nobody uses is unloaded; None is never.
        warm_up: After a load, one request of one token before the adapter gets traffic.
        mirror_limit: Mirrored requests at once.
        routing: How an upstream is chosen.
        health: When an upstream counts as down.
        retry: What is sent again.
        queue: Where requests wait.
        limits: Sizes.
        timeouts: Times.
        log_level: Of the `lora_proxy` logger.
    """

    listen: Annotated[Listen, BeforeValidator(_listen)] = Listen()
    upstreams: tuple[UpstreamSettings, ...] = ()
    upstreams_file: Annotated[Path, AfterValidator(_file)] | None = None
    discovery_interval: Seconds = 5.0
    adapters: tuple[Adapter, ...] = ()
    base_aliases: Mapping[Text, Names] = field(default_factory=dict, hash=False)
    routes: tuple[Route, ...] = ()
    default_model: Text | None = None
    api_keys: tuple[Annotated[SecretStr, AfterValidator(_header_safe)], ...] = ()
    allow_chat_template: bool = False
    strict_paths: bool = False
    load_timeout: Seconds = 60.0
    probe_interval: Seconds = 5.0
    watch_interval: SecondsOrZero = 10.0
    idle_ttl: Seconds | None = None
    warm_up: bool = False
    mirror_limit: Count = 8
    routing: RoutingSettings = RoutingSettings()
    health: HealthSettings = HealthSettings()
    retry: RetrySettings = RetrySettings()
    queue: QueueSettings = QueueSettings()
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    log_level: LogLevel = "info"
