"""vLLM's control API: what it is asked, and what its answers mean.

The only file that knows the control paths, the shapes of the answers and the error texts,
which differ between versions and are therefore read leniently. Decides nothing about when
to load or whether to try again: it says only, by `permanent`, whether that could help.
Texts quoted here were read off vLLM 0.32.0 (vllm/entrypoints/openai/models/serving.py).
"""

import os.path
import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from ssl import SSLContext
from typing import Any, NoReturn

import aiohttp
import msgspec
import orjson

from lora_proxy.errors import ProxyError, rank_too_high
from lora_proxy.types import Card, Module, is_served_name

_MAX_ANSWER = 16 << 20  # some 30,000 cards
_MAX_TEXT = 400
_UNAVAILABLE = frozenset({502, 503, 504})

_MAX_LORA = re.compile(
    rb'^vllm:lora_requests_info\{[^}\n]*max_lora="([1-9][0-9]{0,5})"', re.MULTILINE
)

_PERMANENT = frozenset(
    {
        "adapter_not_found",
        "adapter_invalid",
        "adapter_rank_too_high",
        "adapter_untrained",
        "adapter_conflict",
        "name_conflict",
    }
)


def permanent(error: ProxyError) -> bool:
    """Whether a failed load would fail again for as long as the adapter stays as it is."""
    return error.code in _PERMANENT


# --- names -------------------------------------------------------------------------

_UNSAFE_IN_JSON = re.compile(r'["\\\x00-\x1f\x7f]')


def adopted(cards: Iterable[Card], module: Module) -> str | None:
    """The name under which an upstream already serves a module, if it does.

    1. The module's served name, with the module's path as root.
    2. A name that the operator gave to the same path (`--lora-modules`), preferably the
       adapter's own: then nothing needs rewriting. Never
       a. a base model's card,
       b. a name of our own form: other than in 1 it is another revision, and its weights
          may be older,
       c. a name that JSON would escape: responses could not be restored safely.
    """
    names = [
        card.id
        for card in cards
        if card.parent is not None  # 2a
        and _same_path(card.root, module.path)
    ]
    if module.served in names:  # 1
        return module.served
    given = [
        name
        for name in names
        if not is_served_name(name)  # 2b
        and not _UNSAFE_IN_JSON.search(name)  # 2c
    ]
    return min(given, key=lambda name: name != module.adapter, default=None)


def _same_path(root: str | None, path: str) -> bool:
    return root is not None and os.path.normpath(root) == os.path.normpath(path)


# --- the client --------------------------------------------------------------------


class _WireCard(msgspec.Struct):
    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _ModelList(msgspec.Struct):
    data: list[_WireCard]


_decode_models = msgspec.json.Decoder(_ModelList).decode


class ControlClient:
    """Asks one upstream; one call is one request, never repeated here.

    Args:
        session: Shared with other clients; stays the caller's to close.
        url: The upstream's root, without `/v1`.
        api_key: The upstream's own, sent as a bearer token.
        timeout: Seconds for one call, connecting included.
        load_timeout: The same for a load, which reads gigabytes; `timeout` if not given.
        ssl: As aiohttp takes it: True verifies by the system's certificates.
        server_name: Whose certificate it must show, where that is not the url's host.
    """

    def __init__(  # noqa: PLR0913 - keywords, each a setting of its own
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float,
        load_timeout: float | None = None,
        ssl: SSLContext | bool = True,
        server_name: str | None = None,
    ) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._api_key = api_key
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = timeout
        self._load_timeout = timeout if load_timeout is None else load_timeout
        self._ssl = ssl
        self._server_name = server_name

    async def healthy(self) -> None:
        """Ask whether the server and its engine live.

        Raises:
            ProxyError: `upstream_*`, if the answer is not 200, or there is none.
        """
        status, body = await self._call("GET", "/health")
        if status != 200:
            self._unexpected("GET /health", status, body)

    async def models(self) -> list[Card]:
        """List what the server serves at this moment: base models, then LoRA modules.

        Raises:
            ProxyError: `upstream_connect`, `upstream_closed`, `upstream_timeout`, or
                `upstream_invalid` for an answer that is no model list.
        """
        status, body = await self._call("GET", "/v1/models")
        if status != 200:
            self._unexpected("GET /v1/models", status, body)
        try:
            listed = _decode_models(body).data
        except (ValueError, RecursionError):
            raise ProxyError(
                "upstream_invalid",
                "the upstream's /v1/models is not a model list; check that its url is a vLLM's",
            ) from None
        return [Card(card.id, card.root, card.parent, card.max_model_len) for card in listed]

    async def max_loras(self) -> int | None:
        """The server's --max-loras, out of its metrics; None where they do not say.

        vLLM exports it with its first LoRA request, as a label of `vllm:lora_requests_info`.
        """
        status, body = await self._call("GET", "/metrics")
        found = _MAX_LORA.search(body) if status == HTTPStatus.OK else None
        return int(found[1]) if found else None

    async def load(self, module: Module) -> str:
        """Have the module loaded, or find that it is.

        `load_inplace` is never sent: vLLM remembers it, and then reads the files again
        for every request.

        Returns:
            The name under which it is served.

        Raises:
            ProxyError: Why not. `permanent` tells whether another try may help.
        """
        try:
            status, body = await self._call(
                "POST",
                "/v1/load_lora_adapter",
                {"lora_name": module.served, "lora_path": module.path},
                within=self._load_timeout,
            )
        except ProxyError as error:
            raise self._load_broken(module, error) from error
        if status == 200:
            return module.served
        reason = self._redacted(parse_error(status, body))
        if _ALREADY_LOADED in reason:
            await self._confirm(module)
            return module.served
        raise _refusal(status, reason.replace(module.served, module.adapter), module)

    async def unload(self, name: str) -> None:
        """Have a served name forgotten; one that is not known is gone already.

        Raises:
            ProxyError: `runtime_updating_disabled`, or `upstream_*`.
        """
        status, body = await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if status == 200:
            return
        if status == 404:
            if _is_missing_route(parse_error(status, body)):
                raise _updating_disabled()
            return
        self._unexpected("POST /v1/unload_lora_adapter", status, body)

    async def _confirm(self, module: Module) -> None:
        """Check that a name vLLM calls loaded stands for the path that we mean."""
        roots = [card.root for card in await self.models() if card.id == module.served]
        if not roots:  # unloaded in between, by another proxy or by hand
            raise ProxyError(
                "adapter_load_failed",
                f"adapter '{module.adapter}' was unloaded while it was asked for; try again",
            )
        if not _same_path(roots[0], module.path):
            raise ProxyError(
                "adapter_conflict",
                f"adapter '{module.adapter}': vLLM serves another path under its served name; "
                "unload that one from vLLM, or restart vLLM",
            )

    def _load_broken(self, module: Module, error: ProxyError) -> ProxyError:
        if error.code == "upstream_connect":
            return error
        if error.code == "upstream_timeout":
            return ProxyError(
                "adapter_load_timeout",
                f"adapter '{module.adapter}' was not loaded within {self._load_timeout:g} s; "
                "try again, or raise `load_timeout`",
            )
        return ProxyError(
            "adapter_load_failed",
            f"the load of adapter '{module.adapter}' was broken off: {error.message}",
        )

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, str] | None = None,
        *,
        within: float | None = None,
    ) -> tuple[int, bytes]:
        """One request; returns status and body, raises `upstream_*` where there are none."""
        seconds = self._timeout if within is None else within
        try:
            async with self._session.request(
                method,
                self._url + path,
                json=body,
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=seconds),
                ssl=self._ssl,
                server_hostname=self._server_name,
                allow_redirects=False,  # our key goes nowhere else
            ) as response:
                return response.status, await _read(response)
        except TimeoutError:
            raise ProxyError(
                "upstream_timeout",
                f"the upstream did not answer {method} {path} within {seconds:g} s; "
                "check that it is not overloaded",
            ) from None
        except aiohttp.ClientConnectorError:
            raise ProxyError(
                "upstream_connect",
                "the upstream cannot be connected to; check that it runs, and its url",
            ) from None
        except (
            aiohttp.ServerDisconnectedError,
            aiohttp.ClientOSError,
            aiohttp.ClientPayloadError,
        ):
            raise ProxyError(
                "upstream_closed",
                f"the upstream closed the connection during {method} {path}; see vLLM's log",
            ) from None
        except aiohttp.ClientError:
            raise ProxyError(
                "upstream_invalid",
                f"the upstream's answer to {method} {path} is not HTTP; check its url",
            ) from None

    def _unexpected(self, call: str, status: int, body: bytes) -> NoReturn:
        reason = self._redacted(parse_error(status, body))
        if status in (401, 403):
            raise ProxyError("upstream_invalid", f"the upstream refuses {call}: {_SET_KEY}")
        # A gateway's word that nobody is there is as good as a refused connection.
        code = "upstream_connect" if status in _UNAVAILABLE else "upstream_invalid"
        raise ProxyError(
            code, f"the upstream answered {call} with {status}: {reason}; see vLLM's log"
        )

    def _redacted(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > _MAX_ANSWER:
            raise ProxyError(
                "upstream_invalid",
                f"the upstream's answer is larger than {_MAX_ANSWER} bytes; check its url",
            )
    return bytes(body)


# --- what a refused load means -----------------------------------------------------

_SET_KEY = "it wants a key, or another one; set upstreams[].api_key"
_ALREADY_LOADED = "already been loaded"
_RANK = re.compile(r"rank (\d+) is greater than max_lora_rank (\d+)")
# Without --enable-lora there is no LoRA manager: newer versions say so, 0.8 fails on it.
_NO_LORA = re.compile(r"LoRA is not enabled|no attribute 'lora_manager'", re.IGNORECASE)
# Faults of the server that come as a 500 like those of the adapter.
_PASSING = re.compile(
    r"EngineCore encountered an issue|EngineDeadError|out of memory|timed out",
    re.IGNORECASE,
)


def _refusal(status: int, reason: str, module: Module) -> ProxyError:
    """Read an error answer to a load.

    1. Our key is refused: the operator's configuration, may pass.
    2. vLLM gives one of the reasons that have a code of their own.
    3. There is no such path on the server: updating is not allowed there.
    4. vLLM gives a reason that speaks of the adapter: permanent.
    5. Anything else may pass.
    """
    subject = f"adapter '{module.adapter}'"
    if status in (401, 403):  # 1
        return ProxyError(
            "adapter_load_failed", f"{subject}: the upstream refuses the load: {_SET_KEY}"
        )
    if rank := _RANK.search(reason):  # 2
        return rank_too_high(int(rank[1]), int(rank[2]), subject)
    if "No adapter found" in reason:
        return ProxyError(
            "adapter_not_found",
            f"{subject}: vLLM finds no adapter at '{module.path}'; the path is as vLLM's own "
            "machine or container sees it, so check what is mounted there",
        )
    if "conflicts with a served base model" in reason:
        return ProxyError(
            "name_conflict", f"{subject}: a base model of the upstream has this name; rename it"
        )
    if _NO_LORA.search(reason):
        return ProxyError(
            "runtime_updating_disabled",
            "the upstream runs without LoRA; start vLLM with --enable-lora",
        )
    if status == 404 and _is_missing_route(reason):  # 3
        return _updating_disabled()
    speaks_of_adapter = status in (400, 422, 500) and reason != _phrase(status)
    if speaks_of_adapter and not _PASSING.search(reason):  # 4
        return ProxyError(
            "adapter_invalid",
            f"{subject}: vLLM refuses it: {reason}; correct the adapter's files, or its `path`",
        )
    return ProxyError(  # 5
        "adapter_load_failed",
        f"{subject}: the load failed with {status}: {reason}; try again, or see vLLM's log",
    )


def _updating_disabled() -> ProxyError:
    return ProxyError(
        "runtime_updating_disabled",
        "the upstream takes no LoRA loads at run time; start vLLM with the environment variable "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and with --enable-lora",
    )


def _is_missing_route(reason: str) -> bool:
    return reason == _phrase(404)


def is_unknown_model(status: int, body: bytes, name: str) -> bool:
    """Whether an inference answer says that the upstream serves no model of this name.

    A 404 alone does not: it may speak of a path, or of a stored response.
    """
    return status == HTTPStatus.NOT_FOUND and name in parse_error(status, body)


# --- error bodies ------------------------------------------------------------------

_ENGINE_CALL = re.compile(r"^Call to \w+ method failed: ")
_WORKER = re.compile(r"^Worker failed with error '(.*)', please check the stack trace.*$")
_TRACEBACK = "Traceback (most recent call last)"


def parse_error(status: int, body: bytes) -> str:
    """The reason in an error body of any vLLM version, or of a gateway before it.

    Returns:
        One line of bounded length, without vLLM's own wrapping and without a full stop;
        the status' standard phrase where the body gives no reason.
    """
    try:
        text = _message(orjson.loads(body))
    except orjson.JSONDecodeError:
        text = body.decode("utf-8", "replace")
        if text.lstrip().startswith("<"):  # a gateway's HTML page
            text = ""
    line = _WORKER.sub(r"\1", _ENGINE_CALL.sub("", _one_line(text))).rstrip(".")
    if len(line) > _MAX_TEXT:
        line = line[:_MAX_TEXT] + "…"
    return line or _phrase(status)


def _message(body: Any) -> str:
    """Find the message: nested or flat OpenAI shape, FastAPI's detail, a bare string."""
    match body:
        case str(text):
            return text
        case (
            {"error": {"message": str(text)}}
            | {"error": str(text)}
            | {"message": str(text)}
            | {"detail": str(text)}
            | {"msg": str(text)}
        ):
            return text
        case {"detail": list(faults)}:
            return "; ".join(filter(None, map(_message, faults)))
        case _:
            return ""


def _one_line(text: str) -> str:
    before, _, trace = text.partition(_TRACEBACK)
    if not before.strip() and trace.strip():
        before = trace.strip().splitlines()[-1]  # the exception itself
    return "".join(c for c in " ".join(before.split()) if c.isprintable())


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"HTTP {status}"
