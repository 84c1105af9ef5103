"""The bodies that vLLM 0.32 answers with, byte for byte in shape: JSON, and server-sent events.

Owns what an answer looks like; refuses to know sockets, state, or when it is sent. The
contract tests hold these shapes against a real server's.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import orjson

Json = Mapping[str, object]

CREATED = 1_700_000_000
FINGERPRINT = "vllm-0.32.0-fa4efa4e"
DONE = b"data: [DONE]\n\n"


def encode(value: object) -> bytes:
    """JSON as vLLM writes it: compact, UTF-8."""
    return orjson.dumps(value)


def error(status: int, message: str, kind: str, param: str | None = None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def invalid(kind: str, loc: str, message: str, given: str) -> Json:
    """What becomes of a body that is not what the endpoint takes; always a 400."""
    fault = f"{{'type': '{kind}', 'loc': '{loc}', 'msg': '{message}', 'input': '{given}'}}"
    return error(400, f"1 validation error:\n  {fault}", "Bad Request", loc)


def invalid_json() -> Json:
    return invalid("json_invalid", "body.1", "JSON decode error", "<dict of 0 items>")


def missing(field: str, body: Json) -> Json:
    return invalid("missing", f"body.{field}", "Field required", f"<dict of {len(body)} items>")


def anthropic_error(message: str, kind: str) -> Json:
    return {"type": "error", "error": {"type": kind, "message": message}}


def card(name: str, root: str, parent: str | None, max_model_len: int | None) -> Json:
    """One entry of `/v1/models`."""
    return {
        "id": name,
        "object": "model",
        "created": CREATED,
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [{"id": f"modelperm-{name}", "object": "model_permission"}],
    }


@dataclass(frozen=True, slots=True)
class Generation:
    """What was generated, before it takes an endpoint's shape.

    Attributes:
        id: Without the endpoint's prefix.
        model: The name asked for, or the base model's.
        prompt: The text of the question.
        tokens: The answer in pieces; one event each when it is streamed.
        whole: Whether the answer is at its end; False when a limit cut it off.
    """

    id: str
    model: str
    prompt: str
    tokens: tuple[str, ...]
    whole: bool

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def finish_reason(self) -> str:
        return "stop" if self.whole else "length"

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt.split())

    def usage(self) -> Json:
        spoken = len(self.tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + spoken,
            "completion_tokens": spoken,
        }


def generate(name: str, model: str, prompt: str, limit: int, *, endless: bool) -> Generation:
    """Says which model speaks and what it was asked, in at most `limit` tokens.

    Args:
        name: The generation's id.
        model: The name asked for, or the base model's.
        prompt: The text of the question.
        limit: How many tokens at most.
        endless: Whether to begin again at the end, up to the limit (`ignore_eos`).
    """
    words = re.findall(r"\s*\S+", f"I am {model}. You said: {prompt}")
    if endless:
        words *= -(-limit // len(words))
    whole = len(words) <= limit and not endless
    return Generation(name, model, prompt, tuple(words[:limit]), whole)


# --- /v1/chat/completions ------------------------------------------------------------------


def chat(made: Generation) -> Json:
    message = {"role": "assistant", "content": made.text, "refusal": None, "reasoning": None}
    choice = {"index": 0, "message": message, "logprobs": None}
    return {
        "id": f"chatcmpl-{made.id}",
        "object": "chat.completion",
        "created": CREATED,
        "model": made.model,
        "choices": [choice | {"finish_reason": made.finish_reason, "stop_reason": None}],
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": made.usage(),
    }


def chat_events(made: Generation, body: Json) -> Iterator[bytes]:
    head = {
        "id": f"chatcmpl-{made.id}",
        "object": "chat.completion.chunk",
        "created": CREATED,
        "model": made.model,
    }
    first = {"role": "assistant", "content": ""}
    yield _data(head | {"choices": [_choice({"delta": first}, None)]})
    for token, reason in _with_reasons(made):
        yield _data(head | {"choices": [_choice({"delta": {"content": token}}, reason)]})
    yield from _stream_end(head, made, body)


# --- /v1/completions -----------------------------------------------------------------------


def completion(made: Generation) -> Json:
    return {
        "id": f"cmpl-{made.id}",
        "object": "text_completion",
        "created": CREATED,
        "model": made.model,
        "choices": [_choice({"text": made.text}, made.finish_reason)],
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": made.usage(),
    }


def completion_events(made: Generation, body: Json) -> Iterator[bytes]:
    head = {
        "id": f"cmpl-{made.id}",
        "object": "text_completion",
        "created": CREATED,
        "model": made.model,
    }
    for token, reason in _with_reasons(made):
        yield _data(head | {"choices": [_choice({"text": token}, reason)]})
    yield from _stream_end(head, made, body)


# --- /v1/messages --------------------------------------------------------------------------


def message(made: Generation) -> Json:
    return {
        "id": f"chatcmpl-{made.id}",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": made.text}],
        "model": made.model,
        "stop_reason": "end_turn" if made.whole else "max_tokens",
        "usage": {"input_tokens": made.prompt_tokens, "output_tokens": len(made.tokens)},
    }


def message_events(made: Generation, _body: Json) -> Iterator[bytes]:
    begun: dict[str, object] = {**message(made), "content": [], "stop_reason": None}
    begun["usage"] = {"input_tokens": made.prompt_tokens, "output_tokens": 0}
    yield _event("message_start", {"message": begun})
    block = {"type": "text", "text": ""}
    yield _event("content_block_start", {"content_block": block, "index": 0})
    for token in made.tokens:
        delta = {"type": "text_delta", "text": token}
        yield _event("content_block_delta", {"delta": delta, "index": 0})
    yield _event("content_block_stop", {"index": 0})
    end = {"stop_reason": message(made)["stop_reason"], "stop_sequence": None}
    yield _event("message_delta", {"delta": end, "usage": message(made)["usage"]})
    yield _event("message_stop", {})


# --- /v1/responses -------------------------------------------------------------------------


def response(made: Generation) -> Json:
    return {
        "id": f"resp_{made.id}",
        "created_at": CREATED,
        "incomplete_details": None if made.whole else {"reason": "max_output_tokens"},
        "instructions": None,
        "metadata": None,
        "model": made.model,
        "object": "response",
        "output": [_output_item(made)],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "none",
        "tools": [],
        "top_p": 1.0,
        "status": "completed" if made.whole else "incomplete",
        "usage": {
            "input_tokens": made.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": len(made.tokens),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": made.prompt_tokens + len(made.tokens),
        },
    }


def response_events(made: Generation, _body: Json) -> Iterator[bytes]:
    for number, (name, fields) in enumerate(_response_events(made)):
        kind = f"response.{name}"
        data = encode({**fields, "sequence_number": number, "type": kind})
        yield b"event: %s\ndata: %s\n\n" % (kind.encode(), data)


def _response_events(made: Generation) -> Iterator[tuple[str, Json]]:
    begun = {**response(made), "output": [], "status": "in_progress", "usage": None}
    item = _output_item(made)
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    text = _output_text(made)
    yield "created", {"response": begun}
    yield "in_progress", {"response": begun}
    fresh = {**item, "content": [], "status": "in_progress"}
    yield "output_item.added", {"item": fresh, "output_index": 0}
    yield "content_part.added", {**place, "part": {**text, "text": ""}}
    for token in made.tokens:
        yield "output_text.delta", {**place, "delta": token, "logprobs": []}
    yield "output_text.done", {**place, "text": made.text, "logprobs": []}
    yield "content_part.done", {**place, "part": text}
    yield "output_item.done", {"item": item, "output_index": 0}
    yield "completed", {"response": response(made)}


def _output_item(made: Generation) -> Json:
    return {
        "id": f"msg_{made.id}",
        "content": [_output_text(made)],
        "role": "assistant",
        "status": "completed",
        "type": "message",
    }


def _output_text(made: Generation) -> Json:
    return {"annotations": [], "text": made.text, "type": "output_text", "logprobs": None}


# --- the rest ------------------------------------------------------------------------------


def tokens(made: Generation) -> Json:
    """An answer of `/tokenize`."""
    count = made.prompt_tokens
    return {"count": count, "max_model_len": 4096, "tokens": [*range(count)], "token_strs": None}


def token_count(made: Generation) -> Json:
    """An answer of `/v1/messages/count_tokens`."""
    count = made.prompt_tokens
    return {"input_tokens": count, "context_management": {"original_input_tokens": count}}


def embedding(made: Generation) -> Json:
    return {
        "id": f"embd-{made.id}",
        "object": "list",
        "created": CREATED,
        "model": made.model,
        "data": [{"index": 0, "object": "embedding", "embedding": [0.5, -0.5]}],
        "usage": {"prompt_tokens": made.prompt_tokens, "total_tokens": made.prompt_tokens},
    }


def _data(value: Json) -> bytes:
    return b"data: %s\n\n" % encode(value)


def _event(kind: str, fields: Json) -> bytes:
    return b"event: %s\n%s" % (kind.encode(), _data({"type": kind, **fields}))


def _choice(content: Json, finish_reason: str | None) -> Json:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


def _with_reasons(made: Generation) -> Iterator[tuple[str, str | None]]:
    for place, token in enumerate(made.tokens, 1):
        yield token, made.finish_reason if place == len(made.tokens) else None


def _stream_end(head: Json, made: Generation, body: Json) -> Iterator[bytes]:
    options = body.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage"):
        yield _data({**head, "choices": [], "usage": made.usage()})
    yield DONE


# --- who answers what ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How one path reads its question and shapes its answer.

    Attributes:
        asks: The field that holds the question; without it the body is invalid.
        whole: The answer in one piece.
        events: The answer as a stream, where there is one.
        limit: The field that limits the answer's tokens.
        model_required: Whether a missing, null or empty model is an error, not the base's.
    """

    asks: str
    whole: Callable[[Generation], Json]
    events: Callable[[Generation, Json], Iterator[bytes]] | None = None
    limit: str = "max_tokens"
    model_required: bool = False


ENDPOINTS = {
    "/v1/chat/completions": Endpoint("messages", chat, chat_events),
    "/v1/completions": Endpoint("prompt", completion, completion_events),
    "/v1/responses": Endpoint("input", response, response_events, limit="max_output_tokens"),
    "/v1/messages": Endpoint("messages", message, message_events, model_required=True),
    "/v1/messages/count_tokens": Endpoint("messages", token_count, model_required=True),
    "/v1/embeddings": Endpoint("input", embedding),
    "/tokenize": Endpoint("prompt", tokens),
}


def question(asked: object) -> str:
    """The text of a prompt, an input, or a chat's last message."""
    match asked:
        case str():
            return asked
        case [*_, {"content": content}]:
            return question(content)
        case [*_, {"text": str(text)}]:
            return text
        case _:
            return encode(asked).decode()
