"""Everything that an operator can decide: the frozen values, their defaults and their meaning.

Owns the types and ranges of single values, in pydantic's terms, because untrusted text
becomes these. Refuses to know where the text comes from (config) and what the values are
used for. Touches nothing but the CA files that they name.
"""

import ipaddress
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, StringConstraints

from lora_proxy.types import Adapter

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


def _no_boolean(value: object) -> object:
    """Python counts True as 1; in a file `max_cpu_loras: yes` is a slip."""
    if isinstance(value, bool):
        raise ValueError("must be a number")  # noqa: TRY004  # pydantic reports ValueError
    return value


Count = Annotated[int, BeforeValidator(_no_boolean), Field(ge=1)]
Seconds = Annotated[float, BeforeValidator(_no_boolean), Field(gt=0, le=_DAY, allow_inf_nan=False)]
SecondsOrZero = Annotated[
    float, BeforeValidator(_no_boolean), Field(ge=0, le=_DAY, allow_inf_nan=False)
]
Text = Annotated[str, StringConstraints(min_length=1, max_length=200)]
# The default, HOST:PORT, must also be a name that one can write down.
UpstreamName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:\[\]-]{1,100}$")]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """How an https upstream's certificate is checked.

    Attributes:
        ca_file: PEM file to trust instead of the system's CAs.
        verify: False accepts any certificate.
    """

    ca_file: Annotated[Path, AfterValidator(_ca_file)] | None = None
    verify: bool = True


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
        tls: For an https url.
    """

    name: UpstreamName
    url: Annotated[str, AfterValidator(_upstream_url)]
    api_key: Annotated[SecretStr, AfterValidator(_header_safe)] | None = None
    max_cpu_loras: Count | None = None
    max_lora_rank: Count | None = None
    base_model: Text | None = None
    tls: TlsSettings = TlsSettings()


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
        drain: What a shutdown leaves to requests under way.
        keepalive: How long an idle upstream connection is kept; uvicorn, and so vLLM,
            closes its side after 5.
    """

    connect: Seconds = 5.0
    read: Seconds = 600.0
    client: Seconds = 30.0
    drain: SecondsOrZero = 30.0
    keepalive: SecondsOrZero = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that an operator can decide.

    Attributes:
        listen: Where clients connect.
        upstreams: At least one.
        adapters: The registry, in the order given.
        default_model: The public name for requests that name none, or an unknown one.
        api_keys: Clients must present one of these; none means that everybody may come in.
        allow_chat_template: Pass a client's own `chat_template` on, instead of dropping it.
        strict_paths: Forward listed paths only, not all of `/v1/`.
        load_timeout: Seconds that a request waits for its adapter.
        probe_interval: Seconds between two looks at an upstream.
        limits: Sizes.
        timeouts: Times.
        log_level: Of the `lora_proxy` logger.
    """

    listen: Annotated[Listen, BeforeValidator(_listen)] = Listen()
    upstreams: tuple[UpstreamSettings, ...]
    adapters: tuple[Adapter, ...] = ()
    default_model: Text | None = None
    api_keys: tuple[Annotated[SecretStr, AfterValidator(_header_safe)], ...] = ()
    allow_chat_template: bool = False
    strict_paths: bool = False
    load_timeout: Seconds = 60.0
    probe_interval: Seconds = 5.0
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    log_level: LogLevel = "info"
