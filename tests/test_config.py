"""What a configuration may say, what it comes to, and how a mistake is reported."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import trustme
from pydantic import SecretStr

from lora_proxy import config
from lora_proxy.config import ConfigError, Flags
from lora_proxy.settings import (
    HealthSettings,
    Limits,
    Listen,
    QueueSettings,
    RetrySettings,
    RoutingSettings,
    Settings,
    Timeouts,
    TlsSettings,
    UpstreamSettings,
)
from lora_proxy.types import Adapter, Route

SECRET = "hunter2-do-not-print"  # searched for in every fault


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lora-proxy.yaml"


def load(
    file: Path, text: str, environ: Mapping[str, str] | None = None, flags: Flags | None = None
) -> Settings:
    file.write_text(text)
    return config.load(file, environ=environ or {}, flags=flags or Flags())


def faults(
    file: Path, text: str, environ: Mapping[str, str] | None = None, flags: Flags | None = None
) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(file, text, environ, flags)
    assert all("\n" not in fault for fault in caught.value.faults)
    assert SECRET not in str(caught.value)
    return caught.value.faults


ONE = "upstreams: [{url: http://gpu:8000}]\n"


# --- what it comes to -----------------------------------------------------------------


def test_the_least_that_is_needed_gives_the_documented_defaults(file: Path) -> None:
    settings = load(file, ONE)
    assert settings == Settings(
        upstreams=(UpstreamSettings(name="gpu:8000", url="http://gpu:8000"),)
    )
    assert str(settings.listen) == "0.0.0.0:8080"
    assert settings.limits == Limits(body=67_108_864, headers=65_536)
    assert settings.timeouts == Timeouts(connect=5, read=600, client=30, drain=30, keepalive=4)
    assert (settings.load_timeout, settings.probe_interval) == (60, 5)
    assert (settings.log_level, settings.strict_paths) == ("info", False)
    assert settings.routing == RoutingSettings("lora-affinity", 1.25, 16)
    assert settings.health == HealthSettings(3, 1, 5, 60, 2, 10)
    assert settings.retry == RetrySettings(3, 0.2, replay_started=False)
    assert settings.queue == QueueSettings(1000, 30)
    assert (settings.routes, settings.base_aliases, settings.upstreams_file) == ((), {}, None)
    assert (settings.watch_interval, settings.discovery_interval) == (10, 5)
    assert (settings.idle_ttl, settings.warm_up, settings.mirror_limit) == (None, False, 8)


def test_every_key_arrives(file: Path, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(ca))
    settings = load(
        file,
        f"""
        listen: "[::1]:0"
        upstreams:
          - name: gpu-0
            url: https://Gpu:8443/
            api_key: {SECRET}
            max_cpu_loras: 16
            max_lora_rank: 64
            base_model: tiny
            weight: 2.5
            max_loras: 4
            max_in_flight: 32
            drain: true
            dns: true
            tls: {{ca_file: {ca}, verify: true, server_name: gpu.internal}}
        upstreams_file: /etc/upstreams.yaml
        discovery_interval: 2
        adapters:
          - name: org/sql:v1
            path: /adapters/sql
            revision: "7"
            aliases: [gpt-3.5-turbo, ein Name]
            defaults: {{temperature: 1e-2, logit_bias: {{50256: -100}}}}
            overrides: {{max_tokens: 5}}
            hidden: true
            base: org/Tiny
            pin: true
            replicas: 2
        base_aliases: {{tiny: [org/Tiny, /models/tiny], other: Other}}
        routes:
          - name: ein Weg
            split: {{"org/sql:v1": 90, tiny: 0.5}}
            sticky: X-Session-Id
            fallback: [tiny, gpt-3.5-turbo]
            mirror: tiny
            sample: 0.05
            hidden: true
        default_model: gpt-3.5-turbo
        strict_paths: true
        load_timeout: 1.5
        probe_interval: 2
        watch_interval: 0
        idle_ttl: 600
        warm_up: true
        mirror_limit: 1
        routing: {{policy: prefix-affinity, spill_factor: 2, spill_floor: 0}}
        health: {{fall: 5, rise: 2, pause: 1, pause_most: 1, trials: 3, ramp: 0}}
        retry: {{attempts: 1, budget: 0, replay_started: true}}
        queue: {{length: 0, timeout: 5}}
        limits: {{body: 1000, headers: 2000}}
        timeouts: {{connect: 1, read: 2, client: 3, drain: 0, keepalive: 0}}
        log_level: debug
        """,
    )
    assert settings == Settings(
        listen=Listen("::1", 0),
        upstreams=(
            UpstreamSettings(
                name="gpu-0",
                url="https://gpu:8443",
                api_key=SecretStr(SECRET),
                max_cpu_loras=16,
                max_lora_rank=64,
                base_model="tiny",
                weight=2.5,
                max_loras=4,
                max_in_flight=32,
                drain=True,
                dns=True,
                tls=TlsSettings(ca_file=ca, verify=True, server_name="gpu.internal"),
            ),
        ),
        upstreams_file=Path("/etc/upstreams.yaml"),
        discovery_interval=2,
        adapters=(
            Adapter(
                name="org/sql:v1",
                path="/adapters/sql",
                revision="7",
                aliases=("gpt-3.5-turbo", "ein Name"),
                defaults={"temperature": 0.01, "logit_bias": {"50256": -100}},
                overrides={"max_tokens": 5},
                hidden=True,
                base="org/Tiny",
                pin=True,
                replicas=2,
            ),
        ),
        base_aliases={"tiny": ("org/Tiny", "/models/tiny"), "other": ("Other",)},
        routes=(
            Route(
                name="ein Weg",
                split=(("org/sql:v1", 90), ("tiny", 0.5)),
                sticky="x-session-id",
                fallback=("tiny", "gpt-3.5-turbo"),
                mirror="tiny",
                sample=0.05,
                hidden=True,
            ),
        ),
        default_model="gpt-3.5-turbo",
        strict_paths=True,
        load_timeout=1.5,
        probe_interval=2,
        watch_interval=0,
        idle_ttl=600,
        warm_up=True,
        mirror_limit=1,
        routing=RoutingSettings(policy="prefix-affinity", spill_factor=2, spill_floor=0),
        health=HealthSettings(fall=5, rise=2, pause=1, pause_most=1, trials=3, ramp=0),
        retry=RetrySettings(attempts=1, budget=0, replay_started=True),
        queue=QueueSettings(length=0, timeout=5),
        limits=Limits(body=1000, headers=2000),
        timeouts=Timeouts(connect=1, read=2, client=3, drain=0, keepalive=0),
        log_level="debug",
    )
    assert SECRET not in repr(settings)
    assert str(settings.listen) == "[::1]:0"


def test_a_key_without_a_value_is_not_given(file: Path) -> None:
    assert load(file, ONE + "limits:\nadapters:\ndefault_model:\n") == load(file, ONE)


def test_a_digest_that_begins_like_a_number_is_text(file: Path) -> None:
    (adapter,) = load(file, ONE + "adapters: [{name: a, path: /a, revision: 12e4f7a}]").adapters
    assert adapter.revision == "12e4f7a"


def test_replicas_may_share_a_base_model(file: Path) -> None:
    settings = load(
        file,
        "upstreams: [{url: http://a:1, base_model: m}, {url: http://b:1, base_model: m}]\n"
        "default_model: m\n",
    )
    assert settings.default_model == "m"


def test_a_file_of_upstreams_is_enough(file: Path) -> None:
    settings = load(file, "upstreams_file: gpus.yaml\n")
    assert (settings.upstreams, settings.upstreams_file) == ((), Path("gpus.yaml"))


def test_one_fallback_needs_no_brackets(file: Path) -> None:
    text = ONE + "adapters: [{name: a, path: /a}]\nroutes: [{name: r, split: {a: 1}, fallback: b}]"
    (route,) = load(file, text).routes
    assert route == Route("r", (("a", 1),), fallback=("b",))


def test_a_split_keeps_the_order_in_which_it_is_written(file: Path) -> None:
    text = ONE + "routes: [{name: r, split: {z: 1, a: 2, m: 3}}]"
    (route,) = load(file, text).routes
    assert route.split == (("z", 1), ("a", 2), ("m", 3))


def test_a_mirror_can_be_turned_off(file: Path) -> None:
    text = ONE + "routes: [{name: r, split: {a: 1}, mirror: b, sample: 0}]"
    (route,) = load(file, text).routes
    assert (route.mirror, route.sample) == ("b", 0)


def test_a_route_may_be_the_default_model(file: Path) -> None:
    text = (
        "upstreams: [{url: http://a:1, base_model: base}]\n"
        "routes: [{name: r, split: {base: 1}}]\ndefault_model: r\n"
    )
    assert load(file, text).default_model == "r"


@pytest.mark.parametrize(
    "upstreams",
    [
        "upstreams: [{url: http://a:1, base_model: base}, {url: http://b:1}]",
        "upstreams: [{url: http://a:1, base_model: base, dns: true}]",
        "upstreams: [{url: http://a:1, base_model: base}]\nupstreams_file: more.yaml",
    ],
)
def test_an_unknown_name_may_be_a_base_model_while_not_all_are_known(
    file: Path, upstreams: str
) -> None:
    text = f"""
{upstreams}
adapters: [{{name: a, path: /a, base: x}}]
base_aliases: {{x: [org/X]}}
routes: [{{name: r, split: {{x: 1}}, fallback: x, mirror: x, sample: 1}}]
default_model: x
"""
    settings = load(file, text)
    assert (settings.default_model, settings.routes[0].mirror) == ("x", "x")


def test_an_unknown_default_model_passes_while_a_base_model_is_undeclared(file: Path) -> None:
    text = "upstreams: [{url: http://a:1, base_model: m}, {url: http://b:1}]\ndefault_model: x\n"
    assert load(file, text).default_model == "x"


@pytest.mark.parametrize(
    ("url", "name", "kept"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://GPU/", "gpu:80", "http://gpu"),
        ("https://gpu", "gpu:443", "https://gpu"),
        ("http://[::1]:8000", "[::1]:8000", "http://[::1]:8000"),
        ("http://vllm_1:8000", "vllm_1:8000", "http://vllm_1:8000"),
    ],
)
def test_an_upstream_is_named_after_its_address(file: Path, url: str, name: str, kept: str) -> None:
    (upstream,) = load(file, f'upstreams: [{{url: "{url}"}}]').upstreams
    assert (upstream.name, upstream.url) == (name, kept)


# --- who wins -------------------------------------------------------------------------


def test_flags_win_over_the_environment_and_that_over_the_file(file: Path) -> None:
    text = ONE + "log_level: error\nlisten: a:1\nlimits: {body: 5, headers: 5000}\n"
    environ = {"LORA_PROXY_LISTEN": "b:2", "LORA_PROXY_LIMITS__BODY": "7"}
    settings = load(file, text, environ, Flags(listen="c:3"))
    assert settings.listen == Listen("c", 3)
    assert settings.limits == Limits(body=7, headers=5000)
    assert settings.log_level == "error"
    assert load(file, text, environ).listen == Listen("b", 2)


def test_flags_alone_are_a_configuration() -> None:
    flags = Flags(
        upstreams=("http://a:1", "gpu-1=http://b:2"),
        adapters=("sql=/adapters/a=b", "hub=org/repo"),
        default_model="sql",
        log_level="warning",
    )
    settings = config.load(None, environ={}, flags=flags)
    assert [(u.name, u.url) for u in settings.upstreams] == [
        ("a:1", "http://a:1"),
        ("gpu-1", "http://b:2"),
    ]
    assert settings.adapters == (Adapter("sql", "/adapters/a=b"), Adapter("hub", "org/repo"))
    assert (settings.default_model, settings.log_level) == ("sql", "warning")


def test_flags_replace_a_list(file: Path) -> None:
    text = ONE + "adapters: [{name: old, path: /old}]\n"
    settings = load(file, text, flags=Flags(adapters=("new=/new",)))
    assert settings.adapters == (Adapter("new", "/new"),)


def test_the_environment_alone_is_a_configuration() -> None:
    settings = config.load(
        None,
        environ={
            "LORA_PROXY_UPSTREAMS__0__URL": "http://a:1",
            "LORA_PROXY_UPSTREAMS__1": '{"url": "http://b:2"}',
            "LORA_PROXY_ADAPTERS": '[{"name": "sql", "path": "/sql"}]',
            "LORA_PROXY_ADAPTERS__0__DEFAULTS": '{"temperature": 0}',
            "LORA_PROXY_STRICT_PATHS": "true",
            "LORA_PROXY_ADAPTERS__0__REPLICAS": "2",
            "LORA_PROXY_ROUTES__0": '{"name": "r", "split": {"sql": 1}}',
            "LORA_PROXY_ROUTES__0__SPLIT": '{"sql": 1, "sql2": 2}',
            "LORA_PROXY_ROUTES__0__FALLBACK": '"tiny"',
            "LORA_PROXY_ROUTES__0__MIRROR": "tiny",
            "LORA_PROXY_ROUTES__0__SAMPLE": "0.5",
            "LORA_PROXY_BASE_ALIASES": '{"tiny": "org/Tiny"}',
            "LORA_PROXY_QUEUE": '{"length": 1}',
            "LORA_PROXY_HEALTH__FALL": "7",
            "LORA_PROXY_DEFAULT_MODEL": "",  # as `${UNSET:-}` in docker-compose
            "HOME": "/root",
        },
    )
    assert [upstream.url for upstream in settings.upstreams] == ["http://a:1", "http://b:2"]
    assert settings.adapters == (Adapter("sql", "/sql", defaults={"temperature": 0}, replicas=2),)
    assert settings.routes == (
        Route("r", (("sql", 1), ("sql2", 2)), fallback=("tiny",), mirror="tiny", sample=0.5),
    )
    assert settings.base_aliases == {"tiny": ("org/Tiny",)}
    assert (settings.queue.length, settings.health.fall) == (1, 7)
    assert settings.strict_paths
    assert settings.default_model is None


def test_a_secret_from_the_environment_joins_an_upstream_from_a_flag() -> None:
    settings = config.load(
        None,
        environ={
            "LORA_PROXY_UPSTREAMS__0__API_KEY": SECRET,
            "LORA_PROXY_UPSTREAMS__0__URL": "http://not-this:1",
        },
        flags=Flags(upstreams=("http://a:1",)),
    )
    (upstream,) = settings.upstreams
    assert upstream.api_key == SecretStr(SECRET)
    assert upstream.url == "http://a:1"


def test_the_environment_names_the_file(file: Path) -> None:
    file.write_text(ONE)
    settings = config.load(None, environ={"LORA_PROXY_CONFIG": str(file)})
    assert settings.upstreams[0].name == "gpu:8000"


def test_variables_of_others_are_left_alone() -> None:
    """Kubernetes makes them for a Service called lora-proxy; the tests have their own."""
    settings = config.load(
        None,
        environ={
            "LORA_PROXY_UPSTREAMS__0__URL": "http://a:1",
            "LORA_PROXY_PORT": "tcp://10.0.0.7:8080",
            "LORA_PROXY_PORT_8080_TCP": "tcp://10.0.0.7:8080",
            "LORA_PROXY_PORT_8080_TCP_ADDR": "10.0.0.7",
            "LORA_PROXY_SERVICE_HOST": "10.0.0.7",
            "LORA_PROXY_SERVICE_PORT": "8080",
            "LORA_PROXY_SERVICE_PORT_HTTP": "8080",
            "LORA_PROXY_METRICS_SERVICE_HOST": "10.0.0.8",
            "LORA_PROXY_TEST_ANYTHING": "1",
            "LORA_PROXY_VLLM_PYTHON": "/venv/bin/python",
        },
    )
    assert len(settings.upstreams) == 1


# --- what is refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "upstreams: name at least one vLLM server, as in `- url: http://127.0.0.1:8000`,"),
        ("upstreams: []", "upstreams: name at least one vLLM server"),
        ("upstreams: http://a:1", "upstreams: must be a list"),
        ("upstreams: [http://a:1]", "upstreams[0]: must be a mapping of keys to values"),
        ("upstreams: [{name: a}]", "upstreams[0].url: is required; add it"),
        ("upstreams: [{name: '', url: http://a:1}]", "upstreams[0].name: must be 1 to 100"),
        ("upstreams: [{name: a b, url: http://a:1}]", "upstreams[0].name: must be 1 to 100"),
        (ONE + "lissten: a:1", "lissten: unknown key; did you mean listen? (lora-proxy.yaml, l"),
        (ONE + "zzz: 1", "zzz: unknown key; the keys here are listen, upstreams, upstreams_file,"),
        (ONE + "limits: {bdy: 1}", "limits.bdy: unknown key; did you mean body?"),
        (
            "upstreams: [{url: http://a:1, max_gpu_loras: 4}]",
            "upstreams[0].max_gpu_loras: unknown key; did you mean max_cpu_loras?",
        ),
        (
            "upstreams: [{url: https://a:1, tls: {cafile: x}}]",
            "upstreams[0].tls.cafile: unknown key; did you mean ca_file?",
        ),
        (
            ONE + "adapters: [{name: a, path: /a, alias: b}]",
            "adapters[0].alias: unknown key; did you mean aliases?",
        ),
        (ONE + "limits: {body: 0}", "limits.body: must be greater than or equal to 1"),
        (ONE + "limits: {body: yes}", "limits.body: must be a number"),
        (ONE + "limits: 5", "limits: must be a mapping of keys to values"),
        (ONE + "load_timeout: 0", "load_timeout: must be greater than 0"),
        (ONE + "load_timeout: .inf", "load_timeout: must be"),
        (ONE + "load_timeout: soon", "load_timeout: must be a valid number"),
        (ONE + "timeouts: {drain: -1}", "timeouts.drain: must be greater than or equal to 0"),
        (ONE + "log_level: loud", "log_level: must be 'debug', 'info', 'warning'"),
        (ONE + "strict_paths: 7", "strict_paths: must be a valid boolean"),
        (ONE + "default_model: ''", "default_model: must not be empty"),
        (ONE + "adapters: [{name: 7, path: /a}]", "adapters[0].name: must be text; put the val"),
        (ONE + "adapters: [{path: /a}]", "adapters[0].name: is required; add it"),
        (ONE + "adapters: [{name: '', path: /a}]", "adapters[0].name: must be 1 to 200 letters"),
        (ONE + "adapters: [{name: a@b, path: /a}]", "adapters[0].name: must be 1 to 200 letters"),
        (
            ONE + f"adapters: [{{name: {'a' * 201}, path: /a}}]",
            "adapters[0].name: must be 1 to 200 letters",
        ),
        (
            ONE + 'adapters: [{name: a, path: /a, aliases: ["x\\ty"]}]',
            "adapters[0].aliases[0]: must be 1 to 200 printable characters",
        ),
        (
            ONE + "adapters: [{name: a, path: /a, aliases: ['']}]",
            "adapters[0].aliases[0]: must be 1 to 200 printable characters",
        ),
        (ONE + "adapters: [{name: a, path: /a, aliases: b}]", "adapters[0].aliases: must be a l"),
        (
            ONE + "adapters: [{name: a, path: /a, defaults: {model: b}}]",
            "adapters[0].defaults.model: is for the client to say; leave it out",
        ),
        (
            ONE + "adapters: [{name: a, path: /a, overrides: {stream: true}}]",
            "adapters[0].overrides.stream: is for the client to say; leave it out",
        ),
        (
            ONE + "adapters: [{name: a, path: /a, defaults: {stop: 2024-01-01}}]",
            "adapters[0].defaults: must hold what JSON can say",
        ),
        (
            ONE + "adapters: [{name: a, path: /a, defaults: {top_p: .nan}}]",
            "adapters[0].defaults: must hold what JSON can say",
        ),
        (
            ONE + "adapters: [{name: a, path: /a, defaults: [1]}]",
            "adapters[0].defaults: must be a mapping of keys to values",
        ),
        (f"upstreams: [{{url: http://a:1, api_key: {SECRET}\u00e9}}]", "upstreams[0].api_key: mu"),
        (f"upstreams: [{{url: http://a:1, api_key: [{SECRET}]}}]", "upstreams[0].api_key: must "),
        ("upstreams: [{url: http://a:1, tls: {verify: no}}]", "upstreams[0].tls: means nothing"),
        (
            "upstreams: [{url: https://a:1, tls: {ca_file: /no/such.pem}}]",
            "upstreams[0].tls.ca_file: cannot be used; give the PEM",
        ),
        ("upstreams: [{url: http://a:1, weight: 0}]", "upstreams[0].weight: must be greater than"),
        ("upstreams: [{url: http://a:1, weight: .inf}]", "upstreams[0].weight: must be"),
        ("upstreams: [{url: http://a:1, max_loras: 0}]", "upstreams[0].max_loras: must be greater"),
        ("upstreams: [{url: http://a:1, max_in_flight: 0}]", "upstreams[0].max_in_flight: must be"),
        ("upstreams: [{url: http://a:1, dns: maybe}]", "upstreams[0].dns: must be a valid boolean"),
        ("upstreams: [{url: http://10.0.0.1:1, dns: yes}]", "upstreams[0].dns: means nothing for"),
        ('upstreams: [{url: "http://[::1]:1", dns: yes}]', "upstreams[0].dns: means nothing for"),
        (
            "upstreams: [{url: http://a:1, drain: true}, {url: http://b:1, drain: true}]",
            "upstreams: every one has drain: true, so that nothing would be answered; let one",
        ),
        ("upstreams_file: ''", "upstreams_file: must be a file's path"),
        (ONE + "discovery_interval: 0", "discovery_interval: must be greater than 0"),
        (ONE + "watch_interval: -1", "watch_interval: must be greater than or equal to 0"),
        (ONE + "idle_ttl: 0", "idle_ttl: must be greater than 0"),
        (ONE + "mirror_limit: 0", "mirror_limit: must be greater than or equal to 1"),
        (ONE + "routing: {policy: random}", "routing.policy: must be 'lora-affinity', 'least-lo"),
        (ONE + "routing: {spill_factor: 0.9}", "routing.spill_factor: must be greater than or eq"),
        (ONE + "routing: {spill_flor: 1}", "routing.spill_flor: unknown key; did you mean spill_f"),
        (ONE + "health: {fall: 0}", "health.fall: must be greater than or equal to 1"),
        (ONE + "health: {pause: 90}", "health: pause_most must not be less than pause"),
        (ONE + "retry: {attempts: 0}", "retry.attempts: must be greater than or equal to 1"),
        (ONE + "retry: {budget: 1.1}", "retry.budget: must be less than or equal to 1"),
        (ONE + "queue: {length: -1}", "queue.length: must be greater than or equal to 0"),
        (ONE + "queue: {timeout: 0}", "queue.timeout: must be greater than 0"),
        (ONE + "base_aliases: [a]", "base_aliases: must be a mapping of keys to values"),
        (ONE + "base_aliases: {a: 7}", "base_aliases.a: must be a list"),
        (ONE + "base_aliases: {a: ['']}", "base_aliases.a[0]: must not be empty"),
        (
            ONE + "base_aliases: {a: [x], b: [y, x]}",
            "base_aliases.b[1]: 'x' is already a name of base model 'a'; keep one",
        ),
        (
            ONE + "base_aliases: {a: [b], b: [y]}",
            "base_aliases.b: 'b' is already a name of base model 'a'; keep one",
        ),
        (
            "upstreams: [{url: http://a:1, base_model: base}]\nbase_aliases: {bsae: [x]}",
            "base_aliases.bsae: no upstream has this base_model; did you mean base?",
        ),
        (
            (
                "upstreams: [{url: http://a:1, base_model: base}]\n"
                "adapters: [{name: a, path: /a, base: bsae}]"
            ),
            "adapters[0].base: no upstream has this base_model; did you mean base?",
        ),
        (ONE + "adapters: [{name: a, path: /a, base: ''}]", "adapters[0].base: must not be empty"),
        (
            ONE + "adapters: [{name: a, path: /a, replicas: 0}]",
            "adapters[0].replicas: must be greater than or equal to 1",
        ),
        (
            ONE + "adapters: [{name: a, path: /a, replicas: yes}]",
            "adapters[0].replicas: must be a number",
        ),
        (ONE + "routes: [{split: {a: 1}}]", "routes[0].name: is required; add it"),
        (ONE + "routes: [{name: r}]", "routes[0].split: is required; add it"),
        (ONE + "routes: [{name: '', split: {a: 1}}]", "routes[0].name: must be 1 to 200 printable"),
        (ONE + "routes: [{name: r, split: {}}]", "routes[0].split: must not be empty"),
        (
            ONE + "routes: [{name: r, split: a}]",
            "routes[0].split: must be a mapping of keys to val",
        ),
        (ONE + "routes: [{name: r, split: {a: 0}}]", "routes[0].split.a: must be greater than 0"),
        (ONE + "routes: [{name: r, split: {a: .nan}}]", "routes[0].split.a: must be"),
        (ONE + "routes: [{name: r, split: {a: yes}}]", "routes[0].split.a: must be a number"),
        (ONE + "routes: [{name: r, split: {7: 1}}]", "routes[0].split[7]: must be text; put the"),
        (
            ONE + "routes: [{name: r, split: {a: 1}, sticky: 'x session'}]",
            "routes[0].sticky: must be user, or a header's name such as x-session-id",
        ),
        (
            ONE + "routes: [{name: r, split: {a: 1}, fallback: {b: 1}}]",
            "routes[0].fallback: must be a list",
        ),
        (ONE + "routes: [{name: r, split: {a: 1}, fallback: ['']}]", "routes[0].fallback[0]: must"),
        (
            ONE + "routes: [{name: r, split: {a: 1}, mirror: 7, sample: 1}]",
            "routes[0].mirror: must be text; put the value in quotes",
        ),
        (
            ONE + "routes: [{name: r, split: {a: 1}, mirror: b, sample: 5}]",
            "routes[0].sample: must be less than or equal to 1",
        ),
        (
            ONE + "routes: [{name: r, split: {a: 1}, mirror: b}]",
            "routes[0].mirror: gets nothing without sample; give one, as in sample: 0.05",
        ),
        (
            ONE + "routes: [{name: r, split: {a: 1}, sample: 0.1}]",
            "routes[0].sample: means nothing without mirror; name what gets the copies",
        ),
        (
            "upstreams: [{url: https://a:1, tls: {server_name: https://b}}]",
            "upstreams[0].tls.server_name: must be the host name that the certificate is for",
        ),
    ],
)
def test_one_mistake_is_one_line_that_names_the_key(file: Path, text: str, fault: str) -> None:
    (found,) = faults(file, text)
    assert found.startswith(fault)


def test_a_ca_file_that_holds_no_certificate(file: Path, tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("not a certificate")
    text = f"upstreams: [{{url: https://a:1, tls: {{ca_file: {junk}}}}}]"
    (found,) = faults(file, text)
    assert found.startswith("upstreams[0].tls.ca_file: cannot be used; give the PEM file")


@pytest.mark.parametrize(
    "url",
    [
        "gpu:8000",
        "ftp://gpu:8000",
        "http://",
        "http://:8000",
        "http://gpu:99999",
        "http://gpu:0",
        "http://gpu:x",
        "http://[::1:8000",
        "http://gpu:8000/v1",
        f"http://gpu:8000?key={SECRET}",
        f"http://gpu:8000#{SECRET}",
        f"http://user:{SECRET}@gpu:8000",
        "http://gpu:80 00",
        "http://gpu\\n:8000",
        "http://gpü:8000",
    ],
)
def test_a_bad_url_is_refused_without_being_quoted(file: Path, url: str) -> None:
    (found,) = faults(file, f'upstreams: [{{url: "{url}"}}]')
    assert found.startswith("upstreams[0].url: ")
    assert found.endswith("(lora-proxy.yaml, line 1)")


@pytest.mark.parametrize(
    "listen",
    [
        "8080",
        "':8080'",
        "host",
        "'host:'",
        "host:65536",
        "host:-1",
        "host:1e3",
        "'::1:8080'",
        "'[x]:1'",
    ],
)
def test_a_bad_listen_is_refused_with_an_example(file: Path, listen: str) -> None:
    (found,) = faults(file, f"{ONE}listen: {listen}")
    assert found.startswith("listen: ")
    assert "0.0.0.0:8080" in found


@pytest.mark.parametrize(
    "path", ["./sql", "sql", "../org/repo", "a/b/c", "~/sql", "''", "'.a/b'", "hf://o/r", '"/a\\n"']
)
def test_a_path_that_depends_on_a_working_directory_is_refused(file: Path, path: str) -> None:
    (found,) = faults(file, f"{ONE}adapters: [{{name: sql, path: {path}}}]")
    assert found.startswith("adapters[0].path: must be an absolute path as vLLM sees it")


@pytest.mark.parametrize(
    ("adapters", "fault"),
    [
        (
            "[{name: a, path: /a}, {name: a, path: /b}]",
            "adapters[1].name: 'a' is already adapters[0].name; choose another name",
        ),
        (
            "[{name: a, path: /a, aliases: [b]}, {name: b, path: /b}]",
            "adapters[0].aliases[0]: 'b' is already adapters[1].name; choose another name",
        ),
        (
            "[{name: a, path: /a, aliases: [x]}, {name: b, path: /b, aliases: [x]}]",
            "adapters[1].aliases[0]: 'x' is already adapters[0].aliases[0]; choose another name",
        ),
        (
            "[{name: a, path: /a, aliases: [a]}]",
            "adapters[0].aliases[0]: 'a' is already adapters[0].name; choose another name",
        ),
        (
            "[{name: base, path: /a}]",
            "adapters[0].name: 'base' is already the base model of upstreams[0]; choose another",
        ),
        (
            "[{name: a, path: /a, aliases: [base]}]",
            "adapters[0].aliases[0]: 'base' is already the base model of upstreams[0]; choose",
        ),
    ],
)
def test_a_public_name_is_one_thing_only(file: Path, adapters: str, fault: str) -> None:
    text = f"upstreams: [{{url: http://a:1, base_model: base}}]\nadapters: {adapters}"
    (found,) = faults(file, text)
    assert found.startswith(fault)


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("a", "adapters[0].name"),
        ("x", "adapters[0].aliases[0]"),
        ("r", "routes[0].name"),
        ("base", "the base model of upstreams[0]"),
    ],
)
def test_a_route_shares_its_name_with_nothing(file: Path, name: str, owner: str) -> None:
    text = f"""
upstreams: [{{url: http://a:1, base_model: base}}]
adapters: [{{name: a, path: /a, aliases: [x]}}]
routes: [{{name: r, split: {{a: 1}}}}, {{name: {name}, split: {{a: 1}}}}]
"""
    assert faults(file, text) == (
        (
            f"routes[1].name: '{name}' is already {owner}; choose another name "
            "(lora-proxy.yaml, line 4)"
        ),
    )


def test_every_name_in_a_route_must_lead_somewhere_and_not_to_a_route(file: Path) -> None:
    text = """
upstreams: [{url: http://a:1, base_model: base}]
adapters: [{name: support, path: /a, aliases: [x]}]
routes:
  - name: one
    split:
      support: 1
      suport: 1
    fallback: [base, x, two]
    mirror: zzzzzz
    sample: 0.5
  - {name: two, split: {two: 1}, fallback: bsae}
"""
    missing = "no adapter, alias or base model has this name"
    circular = "is a route; name an adapter, an alias or a base model"
    assert faults(file, text) == (
        f"routes[0].split.suport: {missing}; did you mean support? (lora-proxy.yaml, line 8)",
        f"routes[0].fallback[2]: {circular} (lora-proxy.yaml, line 9)",
        (
            f"routes[0].mirror: {missing}; name an adapter, an alias or a base_model "
            "(lora-proxy.yaml, line 10)"
        ),
        f"routes[1].split.two: {circular} (lora-proxy.yaml, line 12)",
        f"routes[1].fallback[0]: {missing}; did you mean base? (lora-proxy.yaml, line 12)",
    )


def test_one_route_written_twice_by_an_anchor_is_one_fault(file: Path) -> None:
    text = (
        "upstreams: [{url: http://a:1, base_model: b}]\nroutes: [&r {name: r, split: {b: 1}}, *r]"
    )
    (found,) = faults(file, text)
    assert found.startswith("routes[1].name: 'r' is already routes[0].name")


def test_a_drained_upstream_may_be_one_of_several(file: Path) -> None:
    text = "upstreams: [{url: http://a:1, drain: true}, {url: http://b:1}]"
    assert [one.drain for one in load(file, text).upstreams] == [True, False]
    text = "upstreams: [{url: http://a:1, drain: true}]\nupstreams_file: more.yaml"
    assert [one.drain for one in load(file, text).upstreams] == [True]


def test_an_adapters_base_may_be_another_name_of_one(file: Path) -> None:
    text = """
upstreams: [{url: http://a:1, base_model: base}]
base_aliases: {base: org/Base}
adapters: [{name: a, path: /a, base: org/Base}, {name: b, path: /b, base: base}]
"""
    assert [adapter.base for adapter in load(file, text).adapters] == ["org/Base", "base"]


def test_one_server_under_two_names_and_two_servers_under_one(file: Path) -> None:
    text = """
upstreams:
  - {name: a, url: "http://gpu"}
  - {name: b, url: "http://GPU:80/"}
  - {name: a, url: "http://other:80"}
"""
    assert faults(file, text) == (
        (
            "upstreams[1].url: the same server as upstreams[0]; keep one of them "
            "(lora-proxy.yaml, line 4)"
        ),
        (
            "upstreams[2].name: already the name of upstreams[0]; choose another "
            "(lora-proxy.yaml, line 5)"
        ),
    )


def test_a_default_model_that_nothing_answers_to(file: Path) -> None:
    text = (
        "upstreams: [{url: http://a:1, base_model: base}]\n"
        "adapters: [{name: support, path: /s}]\n"
        "default_model: suport\n"
    )
    assert faults(file, text) == (
        (
            "default_model: no adapter, alias, route or base model has this name; "
            "did you mean support? "
            "(lora-proxy.yaml, line 3)"
        ),
    )


def test_all_faults_are_told_at_once_in_the_order_of_the_file(file: Path) -> None:
    text = f"""
listen: nowhere
upstreams:
  - {{url: "http://user:{SECRET}@a:1", api_key: 7}}
adapters:
  - {{name: sql, path: ./sql}}
  - {{name: sql, path: /sql}}
limits: {{bdy: 1}}
"""
    found = faults(
        file,
        text,
        {"LORA_PROXY_LOG_LEVEL": "loud", "LORA_PROXY_LIMIT__BODY": "1"},
        Flags(default_model=""),
    )
    assert [fault.partition(":")[0] for fault in found] == [
        "listen",
        "upstreams[0].url",
        "upstreams[0].api_key",
        "adapters[0].path",
        "adapters[1].name",
        "limits.bdy",
        "LORA_PROXY_LIMIT__BODY",
        "default_model",
        "log_level",
    ]
    assert found[5].endswith("(lora-proxy.yaml, line 8)")
    assert found[-2].endswith("(--default-model)")
    assert found[-1].endswith("(LORA_PROXY_LOG_LEVEL)")


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        (
            "LORA_PROXY_LIMITS__BDY",
            "1",
            "LORA_PROXY_LIMITS__BDY: unknown variable; did you mean LORA_PROXY_LIMITS__BODY?",
        ),
        (
            "LORA_PROXY_UPSTREAMS__0__APIKEY",
            SECRET,
            (
                "LORA_PROXY_UPSTREAMS__0__APIKEY: unknown variable; did you mean "
                "LORA_PROXY_UPSTREAMS__0__API_KEY?"
            ),
        ),
        ("LORA_PROXY_listen", "a:1", "LORA_PROXY_listen: unknown variable; "),
        ("LORA_PROXY_PORT", "8080", "LORA_PROXY_PORT: unknown variable; "),
        ("LORA_PROXY_", "x", "LORA_PROXY_: unknown variable; "),
        (
            "LORA_PROXY_ADAPTERS",
            f"[{SECRET}",
            "LORA_PROXY_ADAPTERS: must hold JSON for adapters, and this is none",
        ),
        ("LORA_PROXY_ADAPTERS", "7", "adapters: must be a list (LORA_PROXY_ADAPTERS)"),
        ("LORA_PROXY_LIMITS__BODY", "big", "limits.body: must be a valid integer"),
        (
            "LORA_PROXY_UPSTREAMS__2__API_KEY",
            SECRET,
            (
                "upstreams: there are 1 entries; number them from 0 without gaps "
                "(LORA_PROXY_UPSTREAMS__2__API_KEY)"
            ),
        ),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(
    file: Path, name: str, value: str, fault: str
) -> None:
    (found,) = faults(file, ONE, {name: value})
    assert found.startswith(fault)
    assert name in found


def test_a_variable_below_what_is_no_mapping_leaves_the_fault_to_the_file(file: Path) -> None:
    (found,) = faults(file, ONE + "limits: 5", {"LORA_PROXY_LIMITS__BODY": "7"})
    assert found == "limits: must be a mapping of keys to values (lora-proxy.yaml, line 2)"


def test_an_adapter_flag_without_a_path(file: Path) -> None:
    assert faults(file, ONE, flags=Flags(adapters=("sql",))) == (
        "--adapter: 'sql' is not NAME=PATH",
    )


# --- the file itself ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("- a", "must be a mapping of keys to values"),
        ("just text", "must be a mapping of keys to values"),
        ("a: [1", "line 1, column 6: expected ',' or ']', but got '<stream end>'"),
        ("listen: a\n\tb: 1", "line 2, column 1: found character '\\t' that cannot start any"),
        (f"api_key: *{SECRET}", "line 1, column 10: found undefined alias (a name); correct"),
        (f"api_key: !{SECRET} x", "line 1, column 10: could not determine a constructor for"),
        (f"api_key: !{SECRET}!x y", "line 1, column 10: found undefined tag handle (a name)"),
        ("? [a]\n: b", "line 1, column 3: found unhashable key"),
        ("a: 1\n---\nb: 2", "line 2, column 1: but found another document"),
        ("a: 2024-99-99", "holds values that YAML cannot build"),
        ("[" * 5000, "holds values that YAML cannot build"),
        ("\x00", "holds bytes that are not YAML text; save it as UTF-8"),
    ],
)
def test_a_file_that_is_no_configuration(file: Path, text: str, fault: str) -> None:
    (found,) = faults(file, text)
    assert found.startswith(f"{file}: {fault}")


def test_bytes_that_are_not_utf8(file: Path) -> None:
    file.write_bytes(b"listen: \xff\xfe")
    with pytest.raises(ConfigError, match="save it as UTF-8"):
        config.load(file, environ={})


def test_no_such_file(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(file, environ={})
    assert caught.value.faults == (
        f"{file}: cannot be read: No such file or directory; give the file with --config",
    )


def test_a_key_given_twice_is_refused_wherever_it_is(file: Path) -> None:
    text = ONE + "limits:\n  body: 1\n  headers: 5000\n  body: 2\nadapters: []\nlimits: {}\n"
    assert faults(file, text) == (
        "limits.body: already given in line 3; keep one (lora-proxy.yaml, line 5)",
        "limits: already given in line 2; keep one (lora-proxy.yaml, line 7)",
    )


def test_an_anchor_that_holds_itself_is_a_wrong_value_and_no_endless_loop(file: Path) -> None:
    text = ONE + "adapters: [{name: a, path: /a, defaults: &x {y: *x}}]"
    (found,) = faults(file, text)
    assert found.startswith("adapters[0].defaults: must hold what JSON can say")


def test_anchors_save_typing(file: Path) -> None:
    text = ONE + (
        "adapters:\n"
        "  - {name: a, path: /a, defaults: &mild {temperature: 0.1}}\n"
        "  - {name: b, path: /b, defaults: *mild}\n"
    )
    assert [adapter.defaults for adapter in load(file, text).adapters] == [
        {"temperature": 0.1},
        {"temperature": 0.1},
    ]
