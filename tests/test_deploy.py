"""The image, docker-compose and Grafana's provisioning: valid, and true to each other and the code.

No container engine runs here. In its place: hadolint for the Dockerfile, the Compose
specification's schema, promtool, and the health checks as plain commands.
"""

import asyncio
import json
import re
import sys
import tomllib
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployed import (
    DEPLOY,
    DOCKERFILE,
    KUBERNETES,
    LAYOUTS,
    PORT,
    ROOT,
    VLLM_PORT,
    assert_fits,
    instructions,
    last,
    run,
)
from fake_vllm import FakeVllm
from programs import program
from proxied import Start
from pydantic import SecretStr

import lora_proxy
from lora_proxy import config
from lora_proxy.cli import build_parser
from lora_proxy.config import Flags
from lora_proxy.settings import Timeouts

COMPOSE_FILE = DEPLOY / "docker-compose.yaml"
COMPOSE = yaml.safe_load(COMPOSE_FILE.read_text())
PROMETHEUS_FILE = DEPLOY / "prometheus.yml"
PROMETHEUS = yaml.safe_load(PROMETHEUS_FILE.read_text())
PROVISIONING = ROOT / "grafana" / "provisioning"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def every_yaml() -> list[Path]:
    files = [*DEPLOY.rglob("*.y*ml"), *(ROOT / "grafana").rglob("*.y*ml")]
    return sorted(path.relative_to(ROOT) for path in files)


@pytest.mark.parametrize("path", every_yaml(), ids=str)
def test_yaml_parses(path: Path) -> None:
    assert all(yaml.safe_load_all((ROOT / path).read_text()))


# --- the image --------------------------------------------------------------------------


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a path into the build; the last pattern that fits decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if any(fnmatch(one, pattern) for one in (path, path.partition("/")[0])):
            sent = line.startswith("!")
    return sent


def test_hadolint_finds_nothing() -> None:
    assert run(Path(sys.executable).with_name("hadolint"), "--no-color", DOCKERFILE) == ""


def test_the_build_has_what_it_needs_and_no_more() -> None:
    copied = {
        source
        for name, rest in instructions()
        if name == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert [source for source in copied if not is_sent(source)] == []
    for needless in (".git", ".venv", "tests", "deploy", "lora_proxy/__pycache__"):
        assert not is_sent(needless), needless
    project = PYPROJECT["project"]
    packages = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {"pyproject.toml", "constraints.txt", project["readme"]}
    assert copied == needed | set(project["license-files"]) | set(packages)


def test_the_image_runs_the_command_as_nobody_in_particular() -> None:
    user, _, group = last("USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert last("EXPOSE") == str(PORT)
    assert last("STOPSIGNAL") == "SIGTERM"
    (entry,) = json.loads(last("ENTRYPOINT"))
    assert entry in PYPROJECT["project"]["scripts"]
    assert build_parser().parse_args(json.loads(last("CMD"))).command == "serve"


def test_one_version_everywhere() -> None:
    version = lora_proxy.__version__
    assert last("ARG") == f"VERSION={version}"
    assert f"--tag lora-proxy:{version} " in DOCKERFILE.read_text()
    assert services()["lora-proxy"]["image"] == f"lora-proxy:{version}"
    for layout in LAYOUTS:
        kustomization = yaml.safe_load((KUBERNETES / layout / "kustomization.yaml").read_text())
        assert [image["newTag"] for image in kustomization["images"]] == [version]


HEALTH_CHECKS: dict[str, list[str]] = {
    "Dockerfile": json.loads(last("HEALTHCHECK").partition("CMD ")[2]),
    "docker-compose": COMPOSE["services"]["lora-proxy"]["healthcheck"]["test"][1:],
}


@pytest.mark.parametrize("where", HEALTH_CHECKS)
async def test_the_health_check_tells_a_living_proxy(where: str, proxied: Start) -> None:
    async def check() -> int:
        command = [word.replace(str(PORT), port) for word in HEALTH_CHECKS[where]]
        assert command[0] == "python"
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command[1:],
            stderr=asyncio.subprocess.DEVNULL,
            env={"http_proxy": "http://127.0.0.1:1"},  # must not lead it astray
        )
        return await process.wait()

    async with FakeVllm() as fake, proxied(fake, api_keys=(SecretStr("key"),)) as proxy:
        port = proxy.url.rpartition(":")[2]
        assert await check() == 0
    assert await check() == 1


# --- docker-compose ---------------------------------------------------------------------


def interpolated(value: Any, given: Mapping[str, str]) -> Any:
    """Replaces ${NAME:-default} and ${NAME:?why}, as Compose does."""
    if isinstance(value, dict):
        return {key: interpolated(one, given) for key, one in value.items()}
    if isinstance(value, list):
        return [interpolated(one, given) for one in value]
    if not isinstance(value, str):
        return value
    return re.sub(
        r"\$\{(\w+)(?::-([^}]*)|:\?[^}]+)\}",
        lambda found: given[found[1]] if found[2] is None else given.get(found[1], found[2]),
        value,
    )


def services() -> dict[str, Any]:
    """The services of somebody who gives what must be given."""
    given = {"BASE_MODEL": "org/model", "ADAPTERS": "/srv/adapters"}
    found: dict[str, Any] = interpolated(COMPOSE["services"], given)
    return found


def networks() -> dict[str, set[str]]:
    return {name: set(one["networks"]) for name, one in services().items()}


def test_compose_is_valid() -> None:
    checker = [sys.executable, "-m", "check_jsonschema"]
    run(*checker, "--builtin-schema", "vendor.compose-spec", COMPOSE_FILE)


def test_compose_starts_a_proxy_that_fits_its_vllm() -> None:
    vllm, proxy = services()["vllm"], services()["lora-proxy"]
    args = build_parser().parse_args(proxy["command"])
    flags = Flags(upstreams=tuple(args.upstream), adapters=tuple(args.adapter))
    settings = config.load(args.config, environ=proxy["environment"], flags=flags)
    assert [one.url for one in settings.upstreams] == [f"http://vllm:{VLLM_PORT}"]
    assert_fits(vllm["command"], vllm["environment"], settings)
    # The same folder at the same path, read-only.
    (folder,) = (volume for volume in vllm["volumes"] if volume.endswith(":ro"))
    assert proxy["volumes"] == [folder]
    mounted = folder.split(":")[1]
    assert all(adapter.path.startswith(f"{mounted}/") for adapter in settings.adapters)


def test_compose_lets_requests_under_way_end() -> None:
    proxy = services()["lora-proxy"]
    leaving = Timeouts().notice + Timeouts().drain
    assert float(proxy["stop_grace_period"].rstrip("s")) > leaving
    assert proxy["depends_on"] == ["vllm"]  # what depends on another is stopped before it


def test_compose_builds_the_image() -> None:
    build = services()["lora-proxy"]["build"]
    context = (DEPLOY / build["context"]).resolve()
    assert (context, context / build["dockerfile"]) == (ROOT, DOCKERFILE)


def test_compose_publishes_the_proxy_and_not_vllm() -> None:
    published = {name: one["ports"] for name, one in services().items() if "ports" in one}
    assert published == {
        "lora-proxy": [f"127.0.0.1:{PORT}:{PORT}"],
        "grafana": ["127.0.0.1:3000:3000"],
    }
    assert networks()["lora-proxy"] & networks()["vllm"]
    assert not networks()["grafana"] & networks()["vllm"]
    assert set().union(*networks().values()) == COMPOSE["networks"].keys()


def test_compose_mounts_what_exists() -> None:
    volumes = [volume.split(":")[0] for one in services().values() for volume in one["volumes"]]
    files = [volume for volume in volumes if volume.startswith(".")]
    assert len(files) == 3
    assert [file for file in files if not (DEPLOY / file).exists()] == []
    named = {volume for volume in volumes if volume[0] not in "./"}
    assert named == COMPOSE["volumes"].keys()


def test_compose_names_no_moving_image() -> None:
    for name, one in services().items():
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", one["image"]), name


# --- Prometheus and Grafana -------------------------------------------------------------


def test_promtool_takes_the_configuration() -> None:
    run(program("promtool", "prometheus"), "check", "config", PROMETHEUS_FILE)


def test_prometheus_reaches_what_it_scrapes() -> None:
    targets = [
        target
        for scrape in PROMETHEUS["scrape_configs"]
        for group in scrape["static_configs"]
        for target in group["targets"]
    ]
    assert targets == [f"lora-proxy:{PORT}", f"vllm:{VLLM_PORT}"]
    for target in targets:
        assert networks()["prometheus"] & networks()[target.partition(":")[0]], target


def test_grafana_reaches_prometheus() -> None:
    file = PROVISIONING / "datasources" / "prometheus.yaml"
    (source,) = yaml.safe_load(file.read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert networks()["grafana"] & networks()["prometheus"]
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]


def test_grafana_finds_the_dashboard() -> None:
    file = PROVISIONING / "dashboards" / "lora-proxy.yaml"
    (provider,) = yaml.safe_load(file.read_text())["providers"]
    grafana = services()["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    dashboard = mounts["../grafana/lora-proxy.json"]
    assert str(Path(dashboard).parent) == provider["options"]["path"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == dashboard
    assert mounts["../grafana/provisioning"] == "/etc/grafana/provisioning"
