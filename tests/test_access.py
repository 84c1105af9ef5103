"""Paths: tables of where each leads, and properties over every spelling of a forbidden one."""

from urllib.parse import unquote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_proxy.access import Endpoint, Keys, Kind, canonical_path, endpoint
from lora_proxy.errors import ProxyError

# A busy machine is not a failure.
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def refusal(method: str, path: str, *, strict: bool = False) -> str:
    with pytest.raises(ProxyError) as caught:
        endpoint(method, path, strict=strict)
    return caught.value.code


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
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
    ],
)
def test_inference_paths(path: str) -> None:
    for strict in (False, True):
        assert endpoint("POST", path, strict=strict) == Endpoint(Kind.INFERENCE, path, path)
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "post"):
        assert refusal(method, path) == "method_not_allowed"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_anthropic_paths(path: str) -> None:
    assert endpoint("POST", path, strict=True) == Endpoint(Kind.INFERENCE, path, path, "anthropic")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/models", Kind.MODELS),
        ("/health", Kind.HEALTH),
        ("/ready", Kind.READY),
        ("/metrics", Kind.METRICS),
    ],
)
def test_paths_that_the_proxy_answers_itself(path: str, kind: Kind) -> None:
    for method in ("GET", "HEAD"):
        assert endpoint(method, path, strict=True) == Endpoint(kind, path, path)
    for method in ("POST", "DELETE", "OPTIONS"):
        assert refusal(method, path) == "method_not_allowed"


@pytest.mark.parametrize(
    ("path", "name", "canonical"),
    [
        ("/v1/models/sql", "sql", "/v1/models/sql"),
        ("/v1/models/sql/", "sql", "/v1/models/sql"),
        ("/v1/models/org/name", "org/name", "/v1/models/org/name"),
        ("/v1/models/org%2Fname", "org/name", "/v1/models/org/name"),  # as the OpenAI client has it
        ("/v1/models/a%3Ab%40c", "a:b@c", "/v1/models/a:b@c"),
        ("/v1/models/a%20b", "a b", "/v1/models/a%20b"),
        ("/v1/models/%C3%A9%22", 'é"', "/v1/models/%C3%A9%22"),
        ("/v1/models/my_lora_adapter", "my_lora_adapter", "/v1/models/my_lora_adapter"),
        ("/v1/models/gpt-3.5-turbo", "gpt-3.5-turbo", "/v1/models/gpt-3.5-turbo"),
    ],
)
def test_one_model(path: str, name: str, canonical: str) -> None:
    expected = Endpoint(Kind.MODEL, canonical, "/v1/models/{name}", name=name)
    assert endpoint("GET", path) == expected
    assert endpoint("HEAD", path, strict=True) == expected
    assert refusal("DELETE", path) == "method_not_allowed"


def test_stored_responses() -> None:
    one = Endpoint(Kind.OTHER, "/v1/responses/resp_1", "/v1/responses/{id}")
    cancel = Endpoint(Kind.OTHER, "/v1/responses/resp_1/cancel", "/v1/responses/{id}/cancel")
    assert endpoint("GET", "/v1/responses/resp_1", strict=True) == one
    assert endpoint("POST", "/v1/responses/resp_1/cancel", strict=True) == cancel
    assert refusal("POST", "/v1/responses/resp_1") == "method_not_allowed"
    assert refusal("GET", "/v1/responses/resp_1/cancel") == "method_not_allowed"


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])
def test_future_paths_are_forwarded_unless_strict(method: str) -> None:
    assert endpoint(method, "/v1//files/./x%20y/") == Endpoint(
        Kind.OTHER, "/v1/files/x%20y", "other"
    )
    assert refusal(method, "/v1/files/x", strict=True) == "unknown_path"


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE", "CONNECT", "get", ""])
def test_odd_methods_are_not_forwarded(method: str) -> None:
    assert refusal(method, "/v1/files") == "method_not_allowed"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/",
        "/V1/models",
        "/v1x/models",
        "/V1/chat/completions",
        "/adapters",
        "/adapters/sql",
        "/collective_rpc",
        "/docs",
        "/load",
        "/openapi.json",
        "/ping",
        "/redoc",
        "/reset_prefix_cache",
        "/scale_elastic_ep",
        "/server_info",
        "/sleep",
        "/version",
        "/wake_up",
        "/v1/../load",
        "/v1/%2e%2e/sleep",
        "//sleep",
        "/v2/models",
        "/metrics/x",
    ],
)
def test_nothing_else_outside_v1_is_forwarded(path: str) -> None:
    for method in ("GET", "POST"):
        assert refusal(method, path) == "unknown_path"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/load_lora_adapter", "control_path"),
        ("/v1/unload_lora_adapter", "control_path"),
        ("/v1/load_lora_adapter/", "control_path"),
        ("/v1//load_lora_adapter", "control_path"),
        ("//v1/load_lora_adapter", "control_path"),
        ("/v1/./load_lora_adapter", "control_path"),
        ("/v1/x/../load_lora_adapter", "control_path"),
        ("/v1/models/../load_lora_adapter", "control_path"),
        ("/v1/models/x/%2e%2E/../load_lora_adapter", "control_path"),
        ("/v1/%6coad_lora_adapter", "control_path"),
        ("/v1/load%5Flora%5Fadapter", "control_path"),
        ("/%761/load_lora_adapter", "control_path"),
        ("/V1/Load_Lora_Adapter", "control_path"),
        ("/v1/load_lora_adapter/x", "control_path"),
        ("/v1/x/lora_adapters/y", "control_path"),
        ("/load_lora_adapter", "control_path"),
        ("/v1/load_lora_adapter%20", "control_path"),
        ("/v1/%256coad_lora_adapter", "invalid_path"),
        ("/v1/%25%36coad_lora_adapter", "invalid_path"),
        ("/v1/load_lora_adapter%00", "invalid_path"),
        ("/v1/load_lora_adapter;x=1", "invalid_path"),
        ("/v1/load_lora_adapter%3Bx", "invalid_path"),
        ("/v1/load_lora_adapter#x", "invalid_path"),
        ("/v1/load_lora_adapter?x", "invalid_path"),
        ("/v1\\load_lora_adapter", "invalid_path"),
        ("/v1%5Cload_lora_adapter", "invalid_path"),
        ("/v1%2fload_lora_adapter", "invalid_path"),
        ("/v1/models/..%2Fload_lora_adapter", "invalid_path"),
        ("/v1/models%2F..%2F..%2Fsleep", "invalid_path"),
        ("/v1/..%2fadapters", "invalid_path"),
        ("/v1/..;/adapters", "invalid_path"),
        ("/v1/../../adapters", "invalid_path"),
        ("/..", "invalid_path"),
    ],
)
def test_bypasses(path: str, code: str) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        for strict in (False, True):
            assert refusal(method, path, strict=strict) == code


def test_the_refusal_of_a_control_path_says_why() -> None:
    with pytest.raises(ProxyError, match="not reachable through the proxy") as caught:
        endpoint("POST", "/v1/load_lora_adapter")
    assert caught.value.status == 403


def test_dot_segments_lead_to_the_proxys_own_metrics_at_most() -> None:
    assert endpoint("GET", "/v1/../metrics") == Endpoint(Kind.METRICS, "/metrics", "/metrics")


@pytest.mark.parametrize(
    "path",
    [
        "",
        "*",
        "v1/models",
        "http://host/v1/models",
        "/v1/a b",
        "/v1/\ta",
        "/v1/a%0d%0aHost:x",
        "/v1/a%09",
        "/v1/a%7f",
        "/v1/%C2%A0",  # blanks and controls beyond ASCII
        "/v1/%E2%80%A8",
        "/v1/%C2%85",
        "/v1/%",
        "/v1/%4",
        "/v1/%zz",
        "/v1/%25",
        "/v1/%u006c",
        "/v1/%ff",
        "/v1/%c0%af",  # an overlong slash
        "/v1/%ed%a0%80",
        "/v1/é",
        "/v1/\udcff",
        "/v1/a%3Fb",
        "/v1/a%23b",
        "/v1/files/a%2Fb",
        "/v1/responses/..%2fx",
    ],
)
def test_ambiguous_paths(path: str) -> None:
    with pytest.raises(ProxyError) as caught:
        canonical_path(path)
    assert (caught.value.code, caught.value.status) == ("invalid_path", 400)
    assert refusal("GET", path) == "invalid_path"


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        ("/", "/"),
        ("//", "/"),
        ("/v1/models/", "/v1/models"),
        ("/v1/x/..", "/v1"),
        ("/v1/.../x", "/v1/.../x"),
        ("/v1/~a-b.c_d", "/v1/~a-b.c_d"),
        ("/v1/%7Ea%2Db", "/v1/~a-b"),
        ("/v1/a%20%22<b>", "/v1/a%20%22%3Cb%3E"),
        ("/v1/a!$&'()*+,=:@b", "/v1/a!$&'()*+,=:@b"),
        ("/%76%31/%6d%6F%64els", "/v1/models"),
    ],
)
def test_canonical_path(raw: str, canonical: str) -> None:
    assert canonical_path(raw) == canonical
    assert canonical_path(canonical) == canonical


def outcome(method: str, path: str) -> Endpoint | str:
    """Where a request leads, or the code that it is refused with."""
    try:
        return endpoint(method, path)
    except ProxyError as error:
        return error.code


INSERTED = ["", "", "/", "./", "x/../", "%2e/", "a/%2E%2e/", "\\", "%2f"]
APPENDED = ["", "", "/", "/.", "//", "%20", "%00", ";", "/x"]


def encoded(char: str, times: int) -> str:
    for _ in range(times):
        char = "".join(f"%{byte:02x}" for byte in char.encode())
    return char


@st.composite
def spellings(draw: st.DrawFn, path: str) -> str:
    """A way to write `path` that some server may take for it."""
    letters = []
    for char in path:
        written = draw(st.sampled_from([char, char, char, char.upper()]))
        letters.append(encoded(written, draw(st.sampled_from([0, 0, 0, 1, 2]))))
        if char == "/":
            letters.append(draw(st.sampled_from(INSERTED)))
    return "".join(letters) + draw(st.sampled_from(APPENDED))


@FUZZ
@given(
    st.sampled_from(
        [
            "/v1/load_lora_adapter",
            "/v1/unload_lora_adapter",
            "/v1/models/../load_lora_adapter",
            "/v1/chat/completions/../../load_lora_adapter",
            "/load_lora_adapter",
        ]
    ).flatmap(spellings),
    st.sampled_from(["GET", "POST", "DELETE"]),
)
def test_no_spelling_of_a_control_path_is_forwarded(path: str, method: str) -> None:
    found = outcome(method, path)
    if isinstance(found, Endpoint):
        # Too few ".." to leave the models again: a name, and looked up as one.
        assert found.kind is Kind.MODEL
    else:
        assert found in {"control_path", "invalid_path", "unknown_path", "method_not_allowed"}


@FUZZ
@given(
    st.sampled_from(
        ["/sleep", "/adapters", "/collective_rpc", "/server_info", "/v1/../wake_up", "/load"]
    ).flatmap(spellings)
)
def test_no_spelling_of_a_path_outside_v1_is_forwarded(path: str) -> None:
    assert refusal("POST", path) in {"unknown_path", "invalid_path"}


PIECES = [*"/.%25fF\\;_a1 ", "..", "%2e", "%2f", "%5c", "%25"]
PIECES += ["/v1/", "models/", "load_", "lora_adapter"]


@FUZZ
@given(st.lists(st.sampled_from(PIECES), max_size=12).map(lambda parts: "/v1/" + "".join(parts)))
def test_what_is_sent_on_can_be_read_in_one_way_only(path: str) -> None:
    found = outcome("GET", path)
    if isinstance(found, str):
        return
    sent = found.path
    decoded = unquote(sent)
    assert canonical_path(sent) == sent == canonical_path(path)
    assert unquote(decoded) == decoded
    assert not {"", ".", ".."} & set(decoded.split("/")[1:])
    assert not set("\\;?#") & set(decoded)
    if found.kind is Kind.OTHER:
        assert sent.startswith("/v1/")
        assert "lora_adapter" not in decoded.lower()


# --- client keys ------------------------------------------------------------------------


KEYS = Keys(["k-one", "k-two"])


@pytest.mark.parametrize(
    ("authorization", "x_api_key"),
    [
        ("Bearer k-one", None),
        ("bearer k-two", None),
        ("BEARER  k-one ", None),
        (None, "k-two"),
        ("Basic dXNlcg==", "k-one"),
    ],
)
def test_a_known_key_comes_in(authorization: str | None, x_api_key: str | None) -> None:
    KEYS.admit(authorization, x_api_key)


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "word"),
    [
        (None, None, "no API key"),
        ("Bearer ", None, "no API key"),
        ("Bearer k-on", None, "not known"),
        ("Bearer k-one2", None, "not known"),
        ("k-one", None, "no API key"),
        ("Basic k-one", None, "no API key"),
        (None, "K-ONE", "not known"),
        ("Bearer wrong", "k-one", "not known"),
        ("Bearer \udcff", None, "not known"),
    ],
)
def test_any_other_is_turned_away(
    authorization: str | None, x_api_key: str | None, word: str
) -> None:
    with pytest.raises(ProxyError, match=word) as caught:
        KEYS.admit(authorization, x_api_key)
    assert (caught.value.code, caught.value.status) == ("invalid_api_key", 401)
    assert "k-one" not in caught.value.message


def test_without_keys_everybody_comes_in() -> None:
    Keys([]).admit(None, None)
    Keys([]).admit("Bearer anything", None)


def test_keys_are_not_kept_in_clear() -> None:
    assert all(b"k-one" not in digest for digest in KEYS._digests)
