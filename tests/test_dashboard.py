"""The Grafana dashboard: known to Grafana's own schema, and every query of it has an answer.

The queries run in a real Prometheus that has scraped a real proxy under traffic. Grafana itself
does not run here: its part, replacing variables, is done by `filled`.
"""

import asyncio
import json
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from fake_vllm import FakeVllm, Reply
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from programs import program
from proxied import CHAT, PATIENCE, Proxied, Start, chat, until
from pydantic import SecretStr

from lora_proxy.metrics import LABELS
from lora_proxy.types import Route

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD: dict[str, Any] = json.loads((ROOT / "grafana" / "lora-proxy.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
QUERIES = {name: one["query"]["query"] for name, one in VARIABLES.items() if one["type"] == "query"}

KEY = {"authorization": "Bearer client-key"}
BROKEN = "/adapters/broken"
ADAPTERS = {"sql": "/adapters/sql", "pirate": "/a/pirate", "haiku": "/a/haiku", "broken": BROKEN}
RATE_INTERVAL = "10s"


@dataclass(frozen=True, slots=True)
class Query:
    """One query of one panel, as Prometheus gets it."""

    panel: str
    expr: str
    legend: str
    instant: bool


# --- the file ---------------------------------------------------------------------------


def test_grafana_knows_every_field() -> None:
    register_default_plugins()
    read = Dashboard.from_json(DASHBOARD)
    written = json.loads(JSONEncoder(sort_keys=True).encode(read))
    assert list(differences(DASHBOARD, written)) == []  # what Grafana does not know is dropped


def differences(ours: Any, theirs: Any, at: str = "") -> Iterator[str]:
    """Where `theirs` lacks or changes what `ours` has."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from differences(value, theirs.get(key, "nothing"), f"{at}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(*pair, f"{at}[{number}]")
    elif ours != theirs:
        yield f"{at}: {ours!r}, and Grafana reads {theirs!r}"


def test_every_panel_says_what_it_shows() -> None:
    for panel in PANELS:
        assert panel["title"], panel
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
    titles = Counter(panel["title"] for panel in PANELS)
    assert [title for title, count in titles.items() if count > 1] == []


def test_panels_have_ids_and_places_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_only_the_variable_names_a_data_source() -> None:
    assert VARIABLES["datasource"]["type"] == "datasource"
    wanted = {"type": "prometheus", "uid": "${datasource}"}
    asking = [*PANELS, *(VARIABLES[name] for name in QUERIES)]
    asking += [target for panel in PANELS for target in panel["targets"]]
    assert [one for one in asking if one["datasource"] != wanted] == []


def test_every_metric_exists_and_every_metric_is_shown() -> None:
    shown = {
        family(metric): panel["title"]
        for panel in PANELS
        for target in panel["targets"]
        for metric in re.findall(r"\blora_proxy_\w+", target["expr"])
    }
    assert shown.keys() == LABELS.keys()


def test_labels_are_those_of_the_metric() -> None:
    """Prometheus takes a label that no metric has, and answers with too much or nothing."""
    selector = r"\b(lora_proxy_\w+){([^}]*)}"
    for text in [target["expr"] for panel in PANELS for target in panel["targets"]] + [
        query for query in QUERIES.values() if "{" in query
    ]:
        found = re.findall(selector, text)
        assert found, text
        for metric, matchers in found:
            labels = set(re.findall(r"(\w+)(?:=~|!~|!=|=)", matchers))
            assert labels <= {"job", *LABELS[family(metric)]}, text


def test_variables_are_used_and_defined() -> None:
    texts = json.dumps([PANELS, list(QUERIES.values())])
    used = set(re.findall(r"\$\{?([a-z]\w*)", texts))
    assert used == VARIABLES.keys()
    assert {"datasource", "adapter", "upstream"} <= used


def family(metric: str) -> str:
    """The name that LABELS has for a sample's name."""
    return re.sub(r"_(bucket|count|sum)$", "", metric)


# --- the queries ------------------------------------------------------------------------


async def test_every_query_has_an_answer(proxied: Start, tmp_path: Path) -> None:
    async with (
        FakeVllm() as first,
        FakeVllm() as second,
        proxied(
            first,
            second,
            adapters=ADAPTERS,
            upstream={"max_cpu_loras": 1, "max_in_flight": 1},
            routes=(Route("copied", (("tiny", 1.0),), mirror="sql", sample=1.0),),
            api_keys=(SecretStr("client-key"),),
        ) as proxy,
        prometheus(tmp_path, proxy.url) as server,
    ):
        fakes = (first, second)
        for fake in fakes:
            fake.disk[BROKEN] = None
        await retry_once(proxy, fakes)
        seen = await values_of_variables(server, proxy, fakes)
        assert seen == {
            "job": {"lora-proxy"},
            "adapter": {"tiny", *ADAPTERS},
            "upstream": {"gpu-0", "gpu-1"},
        }
        everything = {name: VARIABLES[name]["allValue"] for name in QUERIES}
        chosen = {name: chosen_values(values) for name, values in seen.items()}
        pending = [*queries(everything), *queries(chosen)]
        assert len(pending) >= 2 * len(PANELS)
        try:
            async with asyncio.timeout(PATIENCE * 3):
                while pending := [one for one in pending if not await server.answers(one)]:
                    await traffic(proxy, fakes)
        except TimeoutError:
            pytest.fail("no answer to\n" + "\n".join(f"{q.panel}: {q.expr}" for q in pending))


def queries(values: Mapping[str, str]) -> list[Query]:
    """Every query of every panel, filled."""
    return [
        Query(
            panel["title"],
            filled(target["expr"], values),
            target["legendFormat"],
            target["instant"],
        )
        for panel in PANELS
        for target in panel["targets"]
    ]


def filled(text: str, values: Mapping[str, str]) -> str:
    """What Grafana sends for a query."""
    for name, value in {"__rate_interval": RATE_INTERVAL, **values}.items():
        text = re.sub(rf"\${name}\b", lambda _, value=value: value, text)
    assert "$" not in text, text
    return text


def chosen_values(values: set[str]) -> str:
    """How Grafana writes several chosen values into a query."""
    return f"({'|'.join(sorted(values))})"


async def values_of_variables(
    server: "Prometheus", proxy: Proxied, fakes: tuple[FakeVllm, ...]
) -> dict[str, set[str]]:
    """What the variables offer, once the traffic has been scraped."""
    await traffic(proxy, fakes)
    await server.scraped_from_now()
    every = {name: VARIABLES[name]["allValue"] for name in QUERIES}
    seen = {}
    for name, query in QUERIES.items():
        call = re.fullmatch(r"label_values\((.+), (\w+)\)", filled(query, every))
        assert call is not None, query
        seen[name] = set(await server.get(f"label/{call[2]}/values", {"match[]": call[1]}))
    return seen


# --- the traffic ------------------------------------------------------------------------


async def traffic(proxy: Proxied, fakes: tuple[FakeVllm, ...]) -> None:
    """One round of everything that the metrics count, but for the retry.

    There are three good adapters and two upstreams with room for one each, so that each round
    loads and evicts.
    """
    for model in ("sql", "pirate", "haiku", "tiny"):
        assert (await ask(proxy, model)).status == 200
        assert (await ask(proxy, model, stream=True)).status == 200
    assert (await ask(proxy, "copied")).status == 200
    crowd = await asyncio.gather(*(ask(proxy, "sql") for _ in range(6)))
    assert {answer.status for answer in crowd} == {200}
    assert (await ask(proxy, "broken")).code == "adapter_not_found"
    assert (await ask(proxy, "nobody")).code == "model_not_found"
    assert (await proxy.post(CHAT, chat("sql"))).code == "invalid_api_key"
    for fake in fakes:
        fake.inject(Reply(500, b"no"), path=CHAT, times=1)
    assert (await ask(proxy, "tiny")).status == 500
    for fake in fakes:
        fake.clear_faults()


async def ask(proxy: Proxied, model: str, **fields: object) -> Any:
    return await proxy.post(CHAT, chat(model, **fields), headers=KEY)


async def retry_once(proxy: Proxied, fakes: tuple[FakeVllm, ...]) -> None:
    """The upstream that the base model's requests go to is away for one of them."""
    assert (await ask(proxy, "tiny")).status == 200
    (preferred,) = (fake for fake in fakes if fake.requests_to(CHAT))
    await preferred.stop()
    assert (await ask(proxy, "tiny")).status == 200
    await preferred.start()
    assert await proxy.samples("lora_proxy_retries_total")


# --- Prometheus -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running Prometheus and a client for it."""

    url: str
    session: aiohttp.ClientSession

    async def get(self, path: str, params: Mapping[str, str | float]) -> Any:
        """The data of one call of the HTTP API; it must succeed."""
        async with self.session.get(f"{self.url}/api/v1/{path}", params=params) as response:
            answer = await response.json()
        assert answer["status"] == "success", f"{params}: {answer}"
        return answer["data"]

    async def answers(self, query: Query) -> bool:
        """Whether a query has a value that is a number, under the labels of its legend."""
        now = time.time()
        if query.instant:
            data = await self.get("query", {"query": query.expr, "time": now})
        else:
            span: dict[str, str | float] = {"start": now - 10, "end": now, "step": 1}
            data = await self.get("query_range", {"query": query.expr, **span})
        labels = set(re.findall(r"{{(\w+)}}", query.legend))
        for series in data["result"]:
            assert labels <= series["metric"].keys(), f"{query.panel}: {series['metric']}"
        return any(
            not math.isnan(float(value))
            for series in data["result"]
            for _, value in series.get("values") or [series["value"]]
        )

    async def scraped_from_now(self) -> None:
        """Returns once there is a scrape that began later than this call."""
        began = time.time()
        last = 0.0
        async with asyncio.timeout(PATIENCE):
            while last <= began:
                data = await self.get("query", {"query": 'timestamp(up{job="lora-proxy"} == 1)'})
                last = float(data["result"][0]["value"][1]) if data["result"] else 0.0
                await asyncio.sleep(0.05)


@asynccontextmanager
async def prometheus(folder: Path, target: str) -> AsyncIterator[Prometheus]:
    """A Prometheus that scrapes one server each second."""
    address = target.removeprefix("http://")
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [
            {"job_name": "lora-proxy", "static_configs": [{"targets": [address]}]},
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            program("prometheus", "prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            "--web.listen-address=127.0.0.1:0",
            stderr=output,
        )
    try:
        listening = re.compile(r'msg="Listening on".* address=(\S+)')
        await until(lambda: listening.search(log.read_text()), "a Prometheus that listens")
        found = listening.search(log.read_text())
        assert found is not None
        async with aiohttp.ClientSession() as session:
            yield Prometheus(f"http://{found[1]}", session)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
