"""What the proxy relies on in vLLM, asserted over the fake server and over a real one alike.

Where the two differ the real one is right: change `fake_vllm`, and what depended on it.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import aiohttp
import orjson
import pytest
from fake_vllm import REFUSALS, FakeVllm, OnDisk

Json = dict[str, object]

QUESTION = "Who are you?"
CHAT = [{"role": "user", "content": QUESTION}]
# Each path with the rest of a body that it takes, and with what names an answer's model.
BODIES: dict[str, Json] = {
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 20, "temperature": 0},
    "/v1/completions": {"prompt": QUESTION, "max_tokens": 20, "temperature": 0},
    "/v1/responses": {"input": QUESTION, "max_output_tokens": 20, "temperature": 0},
    "/v1/messages": {"messages": CHAT, "max_tokens": 20, "temperature": 0},
}
OPENAI = [path for path in BODIES if path != "/v1/messages"]


@dataclass(slots=True)
class Answer:
    """A whole answer: its status, headers and body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Json:
        parsed = orjson.loads(self.body)
        assert isinstance(parsed, dict)
        return parsed

    @property
    def error(self) -> Json:
        found = self.json["error"]
        assert isinstance(found, dict)
        return found


@dataclass(slots=True)
class Server:
    """The server under test, with what differs between the fake and the real one.

    Attributes:
        url: Where it listens.
        base_root: The base model's folder.
        adapters: The folder of the adapters' folders.
        says: A part of what each model answers to `QUESTION`.
        hold: Makes streams wait after their first events; the fake would be too fast.
        release: Lets them go on.
    """

    url: str
    base_root: str
    adapters: str
    says: Mapping[str, str]
    http: aiohttp.ClientSession
    hold: Callable[[], None] = field(default=lambda: None)
    release: Callable[[], None] = field(default=lambda: None)

    def path(self, adapter: str) -> str:
        return f"{self.adapters}/{adapter}"

    async def send(self, method: str, path: str, **options: object) -> Answer:
        async with self.http.request(method, self.url + path, **options) as response:
            return Answer(response.status, response.headers, await response.read())

    async def post(self, path: str, body: Json) -> Answer:
        return await self.send("POST", path, json=body)

    async def load(self, name: str, adapter: str | None = None) -> Answer:
        body: Json = {"lora_name": name, "lora_path": self.path(adapter or name)}
        return await self.post("/v1/load_lora_adapter", body)

    async def unload(self, name: str) -> Answer:
        return await self.post("/v1/unload_lora_adapter", {"lora_name": name})

    async def cards(self) -> dict[str, Json]:
        answer = await self.send("GET", "/v1/models")
        found = answer.json["data"]
        assert isinstance(found, list)
        return {card["id"]: card for card in found}

    async def running(self) -> float:
        metrics = (await self.send("GET", "/metrics")).body.decode()
        found = re.search(r"^vllm:num_requests_running\{[^}]*\} (\S+)$", metrics, re.MULTILINE)
        assert found
        return float(found[1])


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.real)])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    async with aiohttp.ClientSession() as http:
        if request.param == "fake":
            async with FakeVllm() as fake:
                yield _fake_server(fake, http)
            return
        real = request.getfixturevalue("real_vllm")
        models = request.getfixturevalue("models")
        says = {"tiny": models.answers["base"], **models.answers}
        found = Server(real.url, str(models.base), str(models.adapters), says, http)
        yield found
        for name in (await found.cards()).keys() - {"tiny"}:
            await found.unload(name)


def _fake_server(fake: FakeVllm, http: aiohttp.ClientSession) -> Server:
    fake.disk["/adapters/rank128"] = OnDisk(rank=128)
    fake.disk["/adapters/empty"] = fake.disk["/adapters/nope"] = None
    for name, refusal in REFUSALS.items():
        fake.disk[f"/adapters/{name}"] = OnDisk(refusal=refusal)
    says = {name: f"I am {name}." for name in ("tiny", "sql", "pirate")}

    def hold() -> None:
        fake.stream_gate.shut()
        fake.stream_gate.let(2)

    return Server(
        fake.url, "/models/tiny", "/adapters", says, http, hold, release=fake.stream_gate.open
    )


# --- loading and unloading -----------------------------------------------------------------


async def test_a_load_succeeds_in_plain_text_and_is_listed(server: Server) -> None:
    answer = await server.load("sql@0123abcd", "sql")
    assert answer.status == 200
    assert answer.body == b"Success: LoRA adapter 'sql@0123abcd' added successfully."
    card = (await server.cards())["sql@0123abcd"]
    assert card["root"] == server.path("sql")
    assert card["parent"] == "tiny"
    assert card["max_model_len"] is None


async def test_the_base_model_is_listed_with_its_folder(server: Server) -> None:
    answer = await server.send("GET", "/v1/models")
    assert answer.json["object"] == "list"
    card = (await server.cards())["tiny"]
    assert card["object"] == "model"
    assert card["root"] == server.base_root
    assert card["parent"] is None
    assert card["max_model_len"] == 4096


async def test_a_name_is_loaded_only_once(server: Server) -> None:
    await server.load("sql")
    answer = await server.load("sql", "pirate")
    assert answer.status == 400
    assert answer.error == {
        "message": "The lora adapter 'sql' has already been loaded. If you want to load the "
        "adapter in place, set 'load_inplace' to True.",
        "type": "InvalidUserInput",
        "param": None,
        "code": 400,
    }
    assert (await server.cards())["sql"]["root"] == server.path("sql")


async def test_of_concurrent_loads_one_succeeds(server: Server) -> None:
    answers = await asyncio.gather(*(server.load("sql") for _ in range(12)))
    assert sorted(answer.status for answer in answers) == [200] + [400] * 11
    refused = [answer for answer in answers if answer.status == 400]
    assert all("has already been loaded" in str(answer.error["message"]) for answer in refused)


async def test_a_base_models_name_is_refused(server: Server) -> None:
    answer = await server.load("tiny", "sql")
    assert answer.status == 400
    assert answer.error["message"] == "The lora adapter 'tiny' conflicts with a served base model."
    assert answer.error["type"] == "InvalidUserInput"


@pytest.mark.parametrize("adapter", ["nope", "empty"])
async def test_no_adapter_at_the_path(server: Server, adapter: str) -> None:
    answer = await server.load("x@1", adapter)
    assert answer.status == 404
    # vLLM masks paths below /home, /tmp, /opt and their like, but not others.
    message = str(answer.error["message"]).replace(str(server.path(adapter)), "<path>")
    assert message == "Loading lora x@1 failed: No adapter found for <path>"
    assert answer.error["type"] == "NotFoundError"


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ("rank128", "LoRA rank 128 is greater than max_lora_rank 64."),
        ("dora", "vLLM does not yet support DoRA."),
        ("modules_to_save", "vLLM only supports modules_to_save being either None or"),
        ("corrupt", "Error while deserializing header"),
        ("truncated", "Error while deserializing header: incomplete metadata"),
        ("no_weights", " doesn't contain tensors"),
        ("wrong_shape", "must match the size of tensor b"),
    ],
)
async def test_an_adapter_that_it_cannot_use(server: Server, adapter: str, reason: str) -> None:
    answer = await server.load(adapter)
    assert answer.status == 500
    message = str(answer.error["message"])
    assert message.startswith("Call to add_lora method failed: Worker failed with error '")
    assert reason in message
    assert answer.error["type"] == "InternalServerError"
    assert (await server.send("GET", "/health")).status == 200
    assert list(await server.cards()) == ["tiny"]


@pytest.mark.parametrize("adapter", ["untrained", "bad_prefix", "nan"])
async def test_an_adapter_without_effect_is_not_noticed(server: Server, adapter: str) -> None:
    assert (await server.load(adapter)).status == 200


@pytest.mark.parametrize(
    ("body", "field"),
    [({"lora_name": "sql"}, "lora_path"), ({"lora_path": "/x"}, "lora_name"), ({}, "lora_name")],
)
async def test_a_load_without_a_field(server: Server, body: Json, field: str) -> None:
    answer = await server.post("/v1/load_lora_adapter", body)
    assert answer.status == 400
    assert "validation error" in str(answer.error["message"])
    assert f"'body.{field}', 'msg': 'Field required'" in str(answer.error["message"])


async def test_a_load_with_an_empty_name(server: Server) -> None:
    answer = await server.load("", "sql")
    assert answer.status == 400
    assert answer.error["message"] == "Both 'lora_name' and 'lora_path' must be provided."


async def test_more_names_than_fit_into_memory(server: Server) -> None:
    names = [f"sql@{number}" for number in range(6)]
    assert [(await server.load(name, "sql")).status for name in names] == [200] * 6
    assert list(await server.cards()) == ["tiny", *names]


async def test_unloading(server: Server) -> None:
    await server.load("sql")
    answer = await server.unload("sql")
    assert answer.status == 200
    assert answer.body == b"Success: LoRA adapter 'sql' removed successfully."
    assert list(await server.cards()) == ["tiny"]


async def test_unloading_what_is_not_there(server: Server) -> None:
    answer = await server.unload("zzz")
    assert answer.status == 404
    assert answer.error == {
        "message": "The lora adapter 'zzz' cannot be found.",
        "type": "NotFoundError",
        "param": None,
        "code": 404,
    }


async def test_unloading_without_a_name(server: Server) -> None:
    missing = await server.post("/v1/unload_lora_adapter", {})
    assert (missing.status, missing.error["param"]) == (400, "body.lora_name")
    empty = await server.unload("")
    assert empty.status == 400
    assert empty.error["message"] == "'lora_name' needs to be provided to unload a LoRA adapter."


async def test_a_stream_outlives_the_unloading_of_its_adapter(server: Server) -> None:
    await server.load("sql")
    server.hold()
    async with _endless_stream(server, "sql", tokens=200) as response:
        await response.content.readuntil(b"\n\n")
        assert (await server.unload("sql")).status == 200
        server.release()
        rest = await response.content.read()
    assert rest.endswith(b"data: [DONE]\n\n")
    assert b'"finish_reason":"length"' in rest
    assert (await server.post("/v1/completions", {"model": "sql", "prompt": "x"})).status == 404


# --- which model answers -------------------------------------------------------------------


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("model", ["tiny", "sql", "pirate"])
async def test_each_model_answers_for_itself(server: Server, path: str, model: str) -> None:
    await server.load("sql")
    await server.load("pirate")
    answer = await server.post(path, {"model": model, **BODIES[path]})
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json["model"] == model
    assert f'"model":"{model}"'.encode() in answer.body
    assert server.says[model].encode() in answer.body


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", OPENAI)
async def test_an_unknown_model(server: Server, path: str, stream: bool) -> None:  # noqa: FBT001 - a parameter of the test
    await server.load("pirate")
    answer = await server.post(path, {"model": "sql", "stream": stream, **BODIES[path]})
    assert answer.status == 404
    assert answer.error == {
        "message": "The model `sql` does not exist. Valid aliases: tiny.",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }


async def test_an_unknown_model_in_anthropics_shape(server: Server) -> None:
    answer = await server.post("/v1/messages", {"model": "sql", **BODIES["/v1/messages"]})
    assert answer.status == 404
    assert answer.json == {
        "type": "error",
        "error": {
            "type": "NotFoundError",
            "message": "The model `sql` does not exist. Valid aliases: tiny.",
        },
    }


NO_MODEL = [{}, {"model": None}, {"model": ""}]


@pytest.mark.parametrize("path", OPENAI)
@pytest.mark.parametrize("model", NO_MODEL)
async def test_no_model_is_the_base_model(server: Server, path: str, model: Json) -> None:
    answer = await server.post(path, {**model, **BODIES[path]})
    assert answer.status == 200
    assert answer.json["model"] == "tiny"


@pytest.mark.parametrize("model", NO_MODEL)
async def test_messages_demand_a_model(server: Server, model: Json) -> None:
    answer = await server.post("/v1/messages", {**model, **BODIES["/v1/messages"]})
    assert answer.status == 400
    assert answer.error["param"] == "body.model"


@pytest.mark.parametrize("path", BODIES)
async def test_a_model_that_is_no_string(server: Server, path: str) -> None:
    answer = await server.post(path, {"model": 5, **BODIES[path]})
    assert answer.status == 400
    assert answer.error["param"] == "body.model"
    assert "Input should be a valid string" in str(answer.error["message"])


# --- requests that are wrong ---------------------------------------------------------------


@pytest.mark.parametrize("path", [*BODIES, "/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
@pytest.mark.parametrize("body", [b"{bad", b"[1]", b""])
async def test_a_body_that_is_no_object(server: Server, path: str, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = await server.send("POST", path, data=body, headers=headers)
    assert answer.status == 400
    assert str(answer.error["message"]).startswith("1 validation error:\n")
    assert answer.error["type"] == "Bad Request"


async def test_a_body_of_another_type(server: Server) -> None:
    headers = {"content-type": "text/plain"}
    answer = await server.send("POST", "/v1/chat/completions", data=b"{}", headers=headers)
    assert answer.status == 400
    assert "Only 'application/json' is allowed" in str(answer.error["message"])


async def test_a_chat_without_messages(server: Server) -> None:
    answer = await server.post("/v1/chat/completions", {"model": "tiny"})
    assert (answer.status, answer.error["param"]) == (400, "body.messages")


async def test_a_chat_template_is_refused(server: Server) -> None:
    body = {"model": "tiny", "chat_template": "x", **BODIES["/v1/chat/completions"]}
    answer = await server.post("/v1/chat/completions", body)
    assert answer.status == 400
    assert str(answer.error["message"]).startswith("Chat template is passed with request, but")
    assert answer.error["type"] == "BadRequestError"


async def test_the_model_is_looked_up_before_a_chat_template_is_refused(server: Server) -> None:
    body = {"model": "nope", "chat_template": "x", **BODIES["/v1/chat/completions"]}
    assert (await server.post("/v1/chat/completions", body)).status == 404


@pytest.mark.parametrize("path", ["/nope", "/v1/nope", "/v1/models/tiny"])
async def test_an_unknown_path(server: Server, path: str) -> None:
    answer = await server.send("GET", path)
    assert (answer.status, answer.body) == (404, b'{"detail":"Not Found"}')


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("GET", "/v1/load_lora_adapter", "POST"),
        ("POST", "/v1/models", "GET"),
    ],
)
async def test_a_wrong_method(server: Server, method: str, path: str, allow: str) -> None:
    answer = await server.send(method, path)
    assert (answer.status, answer.body) == (405, b'{"detail":"Method Not Allowed"}')
    assert answer.headers["allow"] == allow


async def test_head_is_not_allowed(server: Server) -> None:
    assert (await server.send("HEAD", "/v1/models")).status == 405


# --- the shapes of answers -----------------------------------------------------------------


async def test_a_request_id_becomes_part_of_the_answers(server: Server) -> None:
    body = {"model": "tiny", **BODIES["/v1/chat/completions"]}
    headers = {"x-request-id": "abc"}
    answer = await server.send("POST", "/v1/chat/completions", json=body, headers=headers)
    assert answer.json["id"] == "chatcmpl-abc"


async def test_a_chat_stream(server: Server) -> None:
    await server.load("sql")
    events = await _events(server, "/v1/chat/completions", "sql")
    assert [name for name, _ in events] == [None] * len(events)
    assert events[-1] == (None, "[DONE]")
    chunks = [orjson.loads(data) for _, data in events[:-1]]
    assert {chunk["model"] for chunk in chunks} == {"sql"}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all('"model":"sql"' in data for _, data in events[:-1])
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert server.says["sql"] in "".join(delta.get("content", "") for delta in deltas)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_the_usage_of_a_stream(server: Server, path: str) -> None:
    options: Json = {"stream_options": {"include_usage": True}}
    events = await _events(server, path, "tiny", options)
    assert events[-1] == (None, "[DONE]")
    usage = orjson.loads(events[-2][1])
    assert usage["choices"] == []
    assert usage["model"] == "tiny"
    assert usage["usage"]["total_tokens"] == (
        usage["usage"]["prompt_tokens"] + usage["usage"]["completion_tokens"]
    )


async def test_a_completions_stream(server: Server) -> None:
    await server.load("pirate")
    events = await _events(server, "/v1/completions", "pirate")
    assert events[-1] == (None, "[DONE]")
    chunks = [orjson.loads(data) for _, data in events[:-1]]
    assert {chunk["model"] for chunk in chunks} == {"pirate"}
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert server.says["pirate"] in text


async def test_a_messages_stream(server: Server) -> None:
    await server.load("sql")
    events = await _events(server, "/v1/messages", "sql")
    parsed = [orjson.loads(data) for _, data in events]
    assert [name for name, _ in events] == [event["type"] for event in parsed]
    names = [name for name, _ in events if name != "content_block_delta"]
    assert names == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert parsed[0]["message"]["model"] == "sql"
    assert [event for event in parsed if "model" in event] == []
    deltas = [event["delta"]["text"] for event in parsed if event["type"] == "content_block_delta"]
    assert server.says["sql"] in "".join(deltas)
    assert parsed[-2]["delta"]["stop_reason"] == "end_turn"


async def test_a_responses_stream(server: Server) -> None:
    await server.load("sql")
    events = await _events(server, "/v1/responses", "sql")
    parsed = [orjson.loads(data) for _, data in events]
    assert [name for name, _ in events] == [event["type"] for event in parsed]
    assert [event["sequence_number"] for event in parsed] == [*range(len(parsed))]
    names = [name for name, _ in events if name != "response.output_text.delta"]
    assert names == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    models = {event["type"]: event["response"]["model"] for event in parsed if "response" in event}
    assert models == {
        "response.created": "sql",
        "response.in_progress": "sql",
        "response.completed": "sql",
    }
    deltas = [event["delta"] for event in parsed if event["type"].endswith("text.delta")]
    assert server.says["sql"] in "".join(deltas)


async def test_an_answer_that_is_cut_off(server: Server) -> None:
    body = {"model": "tiny", **BODIES["/v1/chat/completions"], "max_tokens": 2}
    answer = await server.post("/v1/chat/completions", body)
    choices = answer.json["choices"]
    assert isinstance(choices, list)
    assert choices[0]["finish_reason"] == "length"
    assert choices[0]["message"]["content"] == "I am"


async def test_tokenize_knows_adapters(server: Server) -> None:
    await server.load("sql")
    known = await server.post("/tokenize", {"model": "sql", "prompt": QUESTION})
    assert known.status == 200
    tokens = known.json["tokens"]
    assert isinstance(tokens, list)
    assert known.json["count"] == len(tokens)
    unknown = await server.post("/tokenize", {"model": "nope", "prompt": QUESTION})
    assert (unknown.status, unknown.error["type"]) == (404, "NotFoundError")


# --- what it shows of itself ---------------------------------------------------------------


async def test_health(server: Server) -> None:
    answer = await server.send("GET", "/health")
    assert (answer.status, answer.body) == (200, b"")


async def test_a_client_that_goes_away_ends_the_generation(server: Server) -> None:
    server.hold()
    async with _endless_stream(server, "tiny", tokens=4000) as response:
        await response.content.readuntil(b"\n\n")
        await _eventually(server.running, 1)
        response.close()
    await _eventually(server.running, 0)


async def test_the_metrics_name_the_adapters_in_use(server: Server) -> None:
    await server.load("sql")
    await server.post("/v1/completions", {"model": "sql", **BODIES["/v1/completions"]})
    metrics = (await server.send("GET", "/metrics")).body.decode()
    pattern = (
        r'^vllm:lora_requests_info\{max_lora="2",running_lora_adapters="sql",'
        r'waiting_lora_adapters="[^"]*"\} \S+$'
    )
    assert re.search(pattern, metrics, re.MULTILINE)


# --- helpers -------------------------------------------------------------------------------


async def _events(
    server: Server, path: str, model: str, options: Json | None = None
) -> list[tuple[str | None, str]]:
    """Every event of a stream: the name on its `event:` line, if it has one, and its data."""
    body = {"model": model, "stream": True, **BODIES[path], **(options or {})}
    answer = await server.post(path, body)
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    pattern = re.compile(r"(?:event: (?P<name>[^\n]+)\n)?data: (?P<data>[^\n]+)\n\n")
    text = answer.body.decode().rstrip("\n") + "\n\n"
    found = [*pattern.finditer(text)]
    assert "".join(match[0] for match in found) == text
    return [(match["name"], match["data"]) for match in found]


@contextlib.asynccontextmanager
async def _endless_stream(
    server: Server, model: str, tokens: int
) -> AsyncIterator[aiohttp.ClientResponse]:
    """A completion that does not end before so many tokens, however short the answer is."""
    body = {"model": model, "prompt": QUESTION, "max_tokens": tokens, "ignore_eos": True}
    url = f"{server.url}/v1/completions"
    async with server.http.post(url, json={**body, "stream": True}) as response:
        assert response.status == 200
        yield response


async def _eventually(read: Callable[[], Awaitable[float]], wanted: float) -> None:
    """Polls, as a real server tells nobody when its numbers change."""
    while await read() != wanted:  # noqa: ASYNC110 - the other side is another process
        await asyncio.sleep(0.02)
