"""Who is asking, and may they: client keys, and which paths lead where.

Owns the one reading of a request path, which both decides and is sent on, so that no
upstream can read the same path in another way. Refuses to know names, bodies, where keys
are stored, and sockets.
"""

import enum
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes

from lora_proxy.errors import Api, ProxyError


class Kind(enum.Enum):
    """What is done with a request, as far as its path and method tell."""

    INFERENCE = enum.auto()
    """A POST that an adapter may answer: `model` is resolved, rewritten and restored."""
    OTHER = enum.auto()
    """Forwarded, without the promise that the body is JSON or names a model."""
    MODELS = enum.auto()
    """`GET /v1/models`, answered from the catalog."""
    MODEL = enum.auto()
    """`GET /v1/models/{name}`, answered from the catalog; never forwarded."""
    HEALTH = enum.auto()
    """`GET /health`: the proxy's process is alive."""
    READY = enum.auto()
    """`GET /ready`: the proxy can serve."""
    METRICS = enum.auto()
    """`GET /metrics`: the proxy's own."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a request leads.

    Attributes:
        kind: What is done with it.
        path: The canonical path in ASCII, quoted for the wire: the only one to send on.
        label: For metrics: a path from a fixed list, else "other".
        api: Whose error shape the client understands.
        name: The public name in `/v1/models/{name}`, unquoted; else None.
    """

    kind: Kind
    path: str
    label: str
    api: Api = "openai"
    name: str | None = None


class Keys:
    """The keys that clients may present; only their digests are kept.

    Looking a digest up takes no longer for a near miss than for a wild guess, so timing
    tells nothing about a key.

    Args:
        keys: In clear; none means that everybody may come in.
    """

    __slots__ = ("_digests",)

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = frozenset(_digest(key.encode()) for key in keys)

    def admit(self, authorization: str | None, x_api_key: str | None) -> None:
        """Let a request in, or raise.

        Args:
            authorization: The field's value: `Bearer KEY`, as OpenAI's clients send it.
            x_api_key: The field's value: the bare key, as Anthropic's clients send it.

        Raises:
            ProxyError: `invalid_api_key`.
        """
        if not self._digests:
            return
        presented = x_api_key
        if authorization is not None:
            scheme, _, presented = authorization.partition(" ")
            if scheme.lower() != "bearer":
                presented = x_api_key
        if not presented:
            raise ProxyError("invalid_api_key", f"the request has no API key; {_SEND_KEY}")
        if _digest(presented.strip().encode("utf-8", "surrogateescape")) not in self._digests:
            raise ProxyError("invalid_api_key", f"the request's API key is not known; {_SEND_KEY}")


_SEND_KEY = "send `Authorization: Bearer KEY` or `x-api-key: KEY`, with a key from the operator"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


_INFERENCE = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/v1/score",
    "/v1/rerank",
    "/v2/rerank",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/tokenize",
    "/detokenize",
    "/pooling",
    "/classify",
    "/score",
    "/rerank",
    "/generative_scoring",
    "/invocations",
)
_OWN = {
    "/v1/models": Kind.MODELS,
    "/health": Kind.HEALTH,
    "/ready": Kind.READY,
    "/metrics": Kind.METRICS,
}
_POST = frozenset({"POST"})
_READ = frozenset({"GET", "HEAD"})
_FORWARDED = _READ | {"POST", "PUT", "PATCH", "DELETE"}

_MODEL = "/v1/models/"
_RESPONSE = re.compile(r"/v1/responses/[^/]+(?P<cancel>/cancel)?")

_CONTROL = "lora_adapter"
_SEPARATORS = frozenset("%\\;?#")


def _known() -> Iterator[tuple[str, frozenset[str], Endpoint]]:
    for path in _INFERENCE:
        api: Api = "anthropic" if path.startswith("/v1/messages") else "openai"
        yield path, _POST, Endpoint(Kind.INFERENCE, path, path, api)
    for path, kind in _OWN.items():
        yield path, _READ, Endpoint(kind, path, path)


_KNOWN = {path: (methods, endpoint) for path, methods, endpoint in _known()}


def canonical_path(raw: str) -> str:
    """Return the one way to write a path: decoded once, resolved, quoted again.

    Double slashes become one and dot segments are resolved. A slash at the end goes too,
    so `/v1/models/` is `/v1/models`: a server that redirects from one to the other would
    send clients to the upstream's own address.

    Args:
        raw: The path as it came, without the query.

    Raises:
        ProxyError: `invalid_path` for whatever two readers could read in two ways.
    """
    return _quoted(_resolved(raw))


def endpoint(method: str, raw_path: str, *, strict: bool = False) -> Endpoint:
    """Decide where a request leads.

    1. A path that the proxy knows by heart.
    2. `/v1/models/{name}`, the name with slashes in it or without. A name may contain
       `lora_adapter`: nothing below this path is forwarded.
    3. A control path: refused, wherever it stands.
    4. A stored response, by its id.
    5. Anything else below `/v1/` is forwarded unless `strict`; nothing else is.

    Args:
        method: In capitals, as HTTP has it.
        raw_path: The path as it came, without the query.
        strict: Forward listed paths only.

    Raises:
        ProxyError: `invalid_path`, `control_path`, `unknown_path` or `method_not_allowed`.
    """
    # 1. Tried on the raw path first: usually it is canonical already.
    known = _KNOWN.get(raw_path)
    if known is None:
        path = _resolved(raw_path)
        known = _KNOWN.get(path)
        if known is None:
            return _unlisted(method, path, strict=strict)
    methods, found = known
    _allow(method, methods, found.path)
    return found


def _unlisted(method: str, path: str, *, strict: bool) -> Endpoint:
    """Go on with `endpoint` at 2, for a canonical path that is not quoted."""
    quoted = _quoted(path)
    # 2.
    if path.startswith(_MODEL):
        _allow(method, _READ, quoted)
        return Endpoint(Kind.MODEL, quoted, "/v1/models/{name}", name=path[len(_MODEL) :])
    # 3.
    if _CONTROL in path.lower():
        raise ProxyError(
            "control_path",
            "vLLM's control API is not reachable through the proxy; "
            "adapters are registered in the proxy's configuration and loaded on demand",
        )
    # 4.
    if response := _RESPONSE.fullmatch(path):
        cancel = response["cancel"] or ""
        _allow(method, _POST if cancel else _READ, quoted)
        return Endpoint(Kind.OTHER, quoted, "/v1/responses/{id}" + cancel)
    # 5.
    if strict or not path.startswith("/v1/"):
        raise ProxyError(
            "unknown_path", f"{quoted} is not forwarded; see the README for the paths that are"
        )
    _allow(method, _FORWARDED, quoted)
    return Endpoint(Kind.OTHER, quoted, "other")


def _allow(method: str, methods: frozenset[str], path: str) -> None:
    if method not in methods:
        raise ProxyError(
            "method_not_allowed",
            f"{path} takes {' or '.join(sorted(methods))}, not {method}",
            allow=", ".join(sorted(methods)),
        )


def _resolved(raw: str) -> str:
    """Return the canonical path, not quoted."""
    segments: list[str] = []
    for segment in _decoded(raw).split("/"):
        if segment == "..":
            if not segments:
                raise _ambiguous("it leaves the root")
            segments.pop()
        elif segment not in {"", "."}:
            segments.append(segment)
    path = "/" + "/".join(segments)
    # The OpenAI client encodes the slash of a name such as org/name. Only there is it
    # harmless to read it as a slash: what lies below is never forwarded.
    if "%2f" in raw.lower() and not path.startswith(_MODEL):
        raise _ambiguous("an encoded slash may stand in a model's name only")
    return path


def _decoded(raw: str) -> str:
    """Take percent-encoding off once."""
    if not raw.startswith("/"):
        raise _ambiguous("begin it with a slash")
    if not raw.isascii() or " " in raw:
        raise _ambiguous("percent-encode spaces and what is not ASCII")
    try:
        decoded = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise _ambiguous("percent-encode UTF-8") from None
    # A percent sign left over was not an escape, or hides a second one. A backslash is a
    # slash to some readers; what comes after ; ? or # is not part of the path to others.
    # Printable leaves out control characters and every blank but the space.
    if not decoded.isprintable() or not _SEPARATORS.isdisjoint(decoded):
        raise _ambiguous("leave out control characters and any of % \\ ; ? #")
    return decoded


def _quoted(path: str) -> str:
    return quote(path, safe="/:@!$&'()*+,=")


def _ambiguous(why: str) -> ProxyError:
    return ProxyError("invalid_path", f"The path is ambiguous: {why}")
