"""One error type, and the one list of codes that clients can meet.

Everything that the proxy itself refuses or gives up on is a `ProxyError`; foreign
exceptions are translated at the edge that met them. An upstream's own error answer is
not one of these: it is passed on with its status and body.
"""

from dataclasses import dataclass
from typing import Literal

Source = Literal["client", "upstream", "proxy"]
Api = Literal["openai", "anthropic"]


@dataclass(frozen=True, slots=True)
class Code:
    """What a code means, whatever the request that met it.

    Attributes:
        status: The HTTP status sent with it.
        source: Whose fault it is.
        meaning: One sentence for the documentation; README's table is checked against it.
        replayable: Another candidate, or a later try, may answer the same request.
    """

    status: int
    source: Source
    meaning: str
    replayable: bool = False


CODES: dict[str, Code] = {
    # the request itself
    "invalid_json": Code(400, "client", "The body is not a JSON object."),
    "invalid_model": Code(400, "client", "`model` is present and is not a string."),
    "invalid_api_key": Code(401, "client", "The request has no key, or one that is not known."),
    "invalid_path": Code(400, "client", "The path is ambiguous once decoded."),
    "bad_request": Code(400, "client", "The bytes are not a well-formed HTTP request."),
    "control_path": Code(
        403, "client", "The path belongs to vLLM's control API, which clients never reach."
    ),
    "unknown_path": Code(404, "client", "The proxy forwards no such path."),
    "model_not_found": Code(404, "client", "No adapter, alias or base model has this name."),
    "method_not_allowed": Code(405, "client", "The path does not take this method."),
    "request_timeout": Code(408, "client", "The client stopped sending its body halfway."),
    "body_too_large": Code(413, "client", "The body is larger than `limits.body`."),
    "headers_too_large": Code(431, "client", "A header, or the request line, is too large."),
    # the adapter
    "adapter_not_found": Code(404, "proxy", "The upstream finds no adapter at the path."),
    "adapter_invalid": Code(422, "proxy", "vLLM refuses this adapter, or would."),
    "adapter_rank_too_high": Code(
        422, "proxy", "The adapter's rank is above the server's --max-lora-rank."
    ),
    "adapter_untrained": Code(
        422, "proxy", "Every lora_B is zero: the adapter would change nothing."
    ),
    "adapter_changed": Code(
        503, "proxy", "The adapter's files changed while it was being loaded.", replayable=True
    ),
    "adapter_conflict": Code(
        422, "proxy", "The upstream serves other weights under this served name."
    ),
    "name_conflict": Code(422, "proxy", "The name is an adapter's and a base model's at once."),
    # the upstream
    "runtime_updating_disabled": Code(
        503, "upstream", "The upstream does not take runtime LoRA loads.", replayable=True
    ),
    "adapter_load_failed": Code(
        503, "upstream", "The load failed for a reason that may pass.", replayable=True
    ),
    "adapter_load_timeout": Code(
        504, "upstream", "The adapter was not loaded within `load_timeout`.", replayable=True
    ),
    "adapter_capacity": Code(
        503, "upstream", "Every adapter slot of the upstream is in use.", replayable=True
    ),
    "upstream_busy": Code(503, "upstream", "The upstream is overloaded, or sick.", replayable=True),
    "queue_full": Code(503, "proxy", "Too many requests wait for an upstream.", replayable=True),
    "queue_timeout": Code(503, "proxy", "No upstream was free within `queue.timeout`."),
    "no_upstream": Code(503, "upstream", "No upstream is usable at the moment.", replayable=True),
    "upstream_connect": Code(
        502, "upstream", "The upstream could not be connected to.", replayable=True
    ),
    "upstream_closed": Code(
        502, "upstream", "The upstream closed the connection before its answer was complete."
    ),
    "upstream_invalid": Code(502, "upstream", "The upstream's answer is not valid HTTP/1.1."),
    "upstream_timeout": Code(504, "upstream", "The upstream sent nothing for `timeouts.read`."),
    # the proxy
    "draining": Code(503, "proxy", "The proxy is shutting down.", replayable=True),
    "internal_error": Code(500, "proxy", "A fault in the proxy; its log has the request id."),
}


class ProxyError(Exception):
    """A request, or a load, that the proxy refuses or gives up on.

    Args:
        code: A key of `CODES`; gives status, source and replayability.
        message: For the client, in one line, ending with the next step. No paths of the
            proxy's machine beyond what the operator configured, no secrets.
        param: The request field at fault, if one is.
        replayable: Overrides the code's; False once bytes may have started a generation.
        retry_after: Seconds until another try makes sense.
        allow: The methods that the path takes, for 405.
    """

    def __init__(  # noqa: PLR0913  # keywords, each a property of its own
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        replayable: bool | None = None,
        retry_after: float | None = None,
        allow: str = "",
    ) -> None:
        super().__init__(message)
        known = CODES[code]
        self.code = code
        self.message = message
        self.param = param
        self.status = known.status
        self.source: Source = known.source
        self.replayable = known.replayable if replayable is None else replayable
        self.retry_after = retry_after
        self.allow = allow

    def __repr__(self) -> str:
        return f"ProxyError({self.code!r}, {self.message!r})"

    def body(self, api: Api) -> dict[str, object]:
        """The error in the shape that clients of this API expect."""
        if api == "anthropic":
            kind = _ANTHROPIC.get(self.status, "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return {
            "error": {
                "message": self.message,
                "type": _OPENAI.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }


MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's `--max-lora-rank` takes (vllm/config/lora.py)."""


def rank_too_high(rank: int, limit: int, subject: str = "the adapter") -> ProxyError:
    """The error for an adapter of `rank` on a server that takes ranks up to `limit`."""
    fitting = next((allowed for allowed in MAX_LORA_RANKS if allowed >= rank), None)
    step = (
        f"start vLLM with --max-lora-rank {fitting}"
        if fitting
        else f"no vLLM server takes more than {MAX_LORA_RANKS[-1]}: train it with a lower rank"
    )
    return ProxyError(
        "adapter_rank_too_high",
        f"{subject} has rank {rank}, above the server's --max-lora-rank {limit}; {step}",
    )


# From each API's reference: what the `type` of an error says about its status.
_OPENAI = {
    **dict.fromkeys((400, 408, 413, 422, 431), "invalid_request_error"),
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
}
_ANTHROPIC = {
    **dict.fromkeys((400, 405, 408, 422, 431), "invalid_request_error"),
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}
