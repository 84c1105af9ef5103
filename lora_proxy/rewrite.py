"""Bytes in, bytes out: request bodies, response bodies and the headers around them.

Owns how a request's `model` is read and replaced, how the public name is put back into
an answer, and which header fields may cross the proxy. Refuses to know what a name
means, where bytes come from or go to, and anything about a body beyond its top level.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain

import msgspec

from lora_proxy.errors import ProxyError
from lora_proxy.types import EMPTY, Headers

_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_model = msgspec.json.Decoder(str | None).decode
_encode = msgspec.json.Encoder().encode

_TEMPLATE = "chat_template"
_ARGUMENTS = "chat_template_kwargs"
_NULL = msgspec.Raw(b"null")
_TRUE = msgspec.Raw(b"true")


# Requests


@dataclass(frozen=True, slots=True)
class Peek:
    """What the proxy reads of a JSON request body.

    Attributes:
        model: The public name asked for; None when missing, null or "".
        stream: The client wants events. Only JSON's `true` counts, as it does in vLLM.
        fields: The top level, name -> the value's bytes as the client wrote them. Of
            duplicate names the last value stays, which is the one that Python's json,
            and so vLLM, would read.
        cut: Something of the body is no longer among the fields.
    """

    model: str | None
    stream: bool
    fields: dict[str, msgspec.Raw]
    cut: bool = False


def peek(body: bytes) -> Peek:
    """Read the top level of a JSON request body.

    Raises:
        ProxyError: `invalid_json` where the body is not one JSON object in UTF-8;
            `invalid_model` where `model` is neither a string nor null.
    """
    try:
        fields = _decode_object(body)
        # The decoder skips over strings without looking at their encoding.
        if not body.isascii():
            body.decode()
    except RecursionError:
        raise ProxyError(
            "invalid_json", "The body is nested too deeply; send a flatter JSON object"
        ) from None
    except ValueError as error:  # msgspec.DecodeError and UnicodeDecodeError both are
        raise ProxyError(
            "invalid_json", f"The body must be a JSON object in UTF-8. {error}"
        ) from None
    raw = fields.get("model")
    try:
        model = None if raw is None else _decode_model(raw)
    except msgspec.ValidationError:
        raise ProxyError(
            "invalid_model",
            "`model` must be a string; GET /v1/models lists the names",
            param="model",
        ) from None
    return Peek(model or None, fields.get("stream") == _TRUE, fields)


def without_template(peeked: Peek) -> Peek:
    """Drop a client's own chat template, at either place where vLLM would take it from.

    A template is a program that runs inside the server; see the advisories behind vLLM's
    --trust-request-chat-template.
    """
    fields = peeked.fields
    arguments = fields.get(_ARGUMENTS)
    inner = None if arguments is None else _object(arguments)
    nested = inner is not None and _TEMPLATE in inner
    if _TEMPLATE not in fields and not nested:
        return peeked
    kept = {name: value for name, value in fields.items() if name != _TEMPLATE}
    if inner is not None and nested:
        del inner[_TEMPLATE]
        kept[_ARGUMENTS] = msgspec.Raw(_encode(inner))
    return replace(peeked, fields=kept, cut=True)


_PREFIX = 1024  # bytes of a conversation's beginning: its system prompt, or what stands there


def prefix(peeked: Peek) -> bytes:
    """Return how the conversation begins, for whoever wants like ones in one place."""
    for name in ("messages", "prompt", "input"):
        value = peeked.fields.get(name)
        if value is not None:
            return bytes(memoryview(value)[:_PREFIX])
    return b""


def unnamed(peeked: Peek, body: bytes) -> bytes:
    """Return the body that goes upstream where no model is to be put in."""
    return _encode(peeked.fields) if peeked.cut else body


def _object(raw: msgspec.Raw) -> dict[str, msgspec.Raw] | None:
    """A value's own fields; None for what is no object, and so holds no template either."""
    try:
        return _decode_object(raw)
    except (ValueError, RecursionError):
        return None


def write(
    peeked: Peek,
    body: bytes,
    model: str,
    defaults: Mapping[str, object] = EMPTY,
    overrides: Mapping[str, object] = EMPTY,
) -> bytes:
    """Return the body that goes upstream: `peeked.fields` with `model` put in.

    Every value that is not replaced keeps the client's bytes. `model` is always written
    out, where it stood or else first: vLLM answers with its base model, silently, where
    it is missing.

    Args:
        peeked: What `peek` made of `body`.
        body: The client's bytes; returned as they are where nothing is to change.
        model: The served name.
        defaults: JSON values for fields that are absent or null. A null is OpenAI's way
            to say "unset", so it does not keep a default out.
        overrides: JSON values that replace the client's, whatever they are.
    """
    fields = peeked.fields
    added = {k: v for k, v in defaults.items() if fields.get(k, _NULL) == _NULL}
    added.update(overrides)
    if not added and not peeked.cut and peeked.model == model and _names_model_once(fields, body):
        return body
    written: dict[str, object] = {**fields} if "model" in fields else {"model": model, **fields}
    written.update(added)
    written["model"] = model
    return _encode(written)


def _names_model_once(fields: Mapping[str, msgspec.Raw], body: bytes) -> bool:
    r"""Whether no reader can find a second `model` in a body that is known to have one.

    A false "no" costs a rewrite, nothing else.

    1. A second one takes at least the ten bytes of `"model":1,`. A compact body has no
       bytes to spare beside its fields.
    2. JSON spells a key's letters literally or as `\u00XX`. Without such an escape, one
       literal is the only one. (Searching costs more than writing, for a large body.)
    """
    # 1. Per field two quotes, a colon and a comma; a key's spelling is no shorter than it.
    fewest = 1 + sum(4 + len(key) + len(memoryview(raw)) for key, raw in fields.items())
    if len(body) - fewest < len(b'"model":1,'):
        return True
    # 2.
    return body.count(b'"model"') == 1 and b"\\u00" not in body


# Responses


_KEY = b'"model":'


@dataclass(frozen=True, slots=True)
class _Spellings:
    """Every way that `"model": "SERVED"` is written, and what to write instead.

    Why replacing these literals is safe in JSON, and in events that carry JSON: inside a
    string a quote is escaped, so the pattern's first quote opens or closes a string. One
    that closes is never followed by `m`. So it opens one, whose text is `model`; the
    colon makes that a key, and the rest is its whole value. Text that a model wrote sits
    inside strings and cannot look like this. (JSON that a model wrote as JSON, such as
    the `input` of Anthropic's tool_use, can, if it repeats the served name as the value
    of a `model` key.)

    Each pattern has four quotes, the first and last of them at its ends, so none lies
    inside another. A match is therefore never undone by one that began earlier.

    Attributes:
        usual: (pattern, replacement) as vLLM writes it: compact, in UTF-8.
        others: The other pairs.
        letters: Each byte that stands in a pattern.
        longest: Bytes in the longest pattern.
    """

    usual: tuple[bytes, bytes]
    others: tuple[tuple[bytes, bytes], ...]
    letters: frozenset[int]
    longest: int

    def swap(self, data: bytes) -> bytes:
        """Return `data` with every match replaced; `data` itself if there is none."""
        # `find`, since `in` costs bytes twice as much: it tries them as a number first.
        for pattern, _ in self.others:
            if data.find(pattern) >= 0:
                done, end = self.scan(data)
                return done + data[end:]
        return data.replace(*self.usual)

    def scan(self, data: bytes) -> tuple[bytes, int]:
        """Go through `data` from left to right.

        Returns:
            What goes out for `data` up to the end of its last match, and where that is.
        """
        pieces: list[bytes] = []
        end = 0
        at = data.find(_KEY)
        while at >= 0:
            for pattern, replacement in (self.usual, *self.others):
                if data.startswith(pattern, at):
                    pieces += data[end:at], replacement
                    at = end = at + len(pattern)
                    break
            else:
                at += len(_KEY)
            at = data.find(_KEY, at)
        return b"".join(pieces), end

    def partial(self, data: bytes, start: int) -> int:
        """Where, from `start` on, a pattern begins that `data` cuts off; else its end."""
        at = data.find(b'"', max(start, len(data) - self.longest + 1))
        while at >= 0:
            rest = data[at:]
            if self.usual[0].startswith(rest) or any(p.startswith(rest) for p, _ in self.others):
                return at
            at = data.find(b'"', at + 1)
        return len(data)


@lru_cache(maxsize=1024)  # one entry for each name that is served, not for each request
def _spellings(served: str, public: str) -> _Spellings:
    if not served or any(char in '"\\' or char < " " for char in served):
        raise ValueError(f"{served!r} cannot be a served name: JSON would have to escape it")
    names = {_encode(served): _encode(public)}
    # é as \u00e9; for an ASCII name that is no second spelling
    names.setdefault(json.dumps(served).encode(), json.dumps(public).encode())
    usual, *others = (
        (_KEY + space + name, _KEY + space + names[name])
        for space in (b"", b" ")  # Python's json writes the space
        for name in names
    )
    patterns = [usual[0], *(pattern for pattern, _ in others)]
    return _Spellings(
        usual=usual,
        others=tuple(others),
        letters=frozenset(b"".join(patterns)),
        longest=max(map(len, patterns)),
    )


class Restorer:
    """Puts the public name back where an answer has the served name as its `model`.

    For bodies of JSON and of events that carry JSON; one per response. However the bytes
    are cut up, the output is that of one scan over the whole.

    Args:
        served: The name that the upstream writes.
        public: The name that the client asked for.

    Raises:
        ValueError: `served` is empty, or has a quote, backslash or control character.
    """

    __slots__ = ("_held", "_spellings")

    def __init__(self, served: str, public: str) -> None:
        self._spellings = None if served == public else _spellings(served, public)
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Return what can be sent now: `data` itself where nothing is to change.

        Less than one pattern's length is held back, and only where `data` ends inside
        what may be a match.
        """
        spellings = self._spellings
        if spellings is None:
            return data
        if self._held:
            data = self._held + data
            self._held = b""
        # An event ends with a newline and an object with a brace; no pattern goes on there.
        if data and data[-1] not in spellings.letters:
            return spellings.swap(data)
        done, end = spellings.scan(data)
        # From the end on: a quote that ends a match cannot begin another.
        cut = spellings.partial(data, end)
        self._held = data[cut:]
        return done + data[end:cut]

    def flush(self) -> bytes:
        """Return what was held back, at the end of the body."""
        held, self._held = self._held, b""
        return held


def restore_text(body: bytes, served: str, public: str) -> bytes:
    """Replace the served name wherever it stands as a name of its own.

    For an upstream's error answers, whose prose speaks of it. Left alone are longer names
    that contain it, paths that end in it, and JSON keys that are spelled like it.
    """
    if served == public:
        return body
    name = re.escape(_encode(served)[1:-1])
    own = rb"(?:(?<![\w@/-])|(?<=\\[nrt]))" + name + rb'(?![\w@/-]|"\s*:)'
    new = _encode(public)[1:-1]
    return re.sub(own, lambda _: new, body)


# Headers

# RFC 9110 section 7.6.1: these speak of one connection, and end with it. `Connection` may
# name more.
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)

_NOT_UPSTREAM = _HOP_BY_HOP | {
    # the client's credentials, which are for the proxy
    b"authorization",
    b"x-api-key",
    b"api-key",
    b"cookie",
    # taken off together with the coding
    b"content-encoding",
    # the proxy writes its own
    b"host",
    b"content-length",
    b"x-request-id",
    b"accept-encoding",
    # answered by the proxy itself
    b"expect",
}

_NOT_CLIENT = _HOP_BY_HOP | {
    # the upstream's credentials and sessions, which are for the proxy
    b"set-cookie",
    b"www-authenticate",
    # the proxy writes its own
    b"server",
    b"date",
    b"x-request-id",
}
_NOT_CLIENT_NOR_LENGTH = _NOT_CLIENT | {b"content-length"}

# Bytes that end a field or a line for some reader. The parsers refuse them; that they
# never get past here is not left to the parsers.
_BREAK = re.compile(rb"[\r\n\0]").search

_IDENTITY = (b"accept-encoding", b"identity")  # in a compressed answer no name can be restored


def upstream_headers(
    client: Headers,
    *,
    host: bytes,
    request_id: bytes,
    authorization: bytes | None,
    length: int | None,
) -> Headers:
    """Return a request's header fields as they go to an upstream.

    Args:
        client: The client's fields.
        host: The upstream's `host:port`.
        request_id: The proxy's, in place of any that the client sent.
        authorization: The upstream's own credentials, scheme included; None for none.
        length: Bytes in the body; None for a request without one.
    """
    fields = _pass(client, _NOT_UPSTREAM)
    fields += ((b"host", host), (b"x-request-id", request_id), _IDENTITY)
    if authorization is not None:
        fields.append((b"authorization", authorization))
    if length is not None:
        fields.append((b"content-length", b"%d" % length))
    return fields


def client_headers(upstream: Headers, *, request_id: bytes, keep_length: bool) -> Headers:
    """Return an answer's header fields as they go to the client.

    Args:
        upstream: The upstream's fields.
        request_id: The proxy's, in place of any that the upstream sent.
        keep_length: The body passes untouched, so its `content-length` still holds.
    """
    fields = _pass(upstream, _NOT_CLIENT if keep_length else _NOT_CLIENT_NOR_LENGTH)
    fields.append((b"x-request-id", request_id))
    return fields


def _pass(fields: Headers, drop: frozenset[bytes]) -> Headers:
    """Return a new list without `drop`, what `Connection` names, and broken fields."""
    passed: Headers = []
    named: set[bytes] = set()
    for field in fields:
        name = field[0].lower()
        if name not in drop:
            passed.append(field)
        elif name == b"connection":
            named.update(token.strip() for token in field[1].lower().split(b","))
    if not named <= drop:
        passed = [field for field in passed if field[0].lower() not in named]
    if _BREAK(b"".join(chain.from_iterable(passed))):
        passed = [field for field in passed if not _BREAK(field[0]) and not _BREAK(field[1])]
    return passed
