"""The Kubernetes manifests: valid, and true to each other, to the image and to the code.

No cluster runs here. `kubectl kustomize` renders what `kubectl apply` would send, Kubernetes'
own schemas judge it, and vLLM's own parser reads the flags.
"""

import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from deployed import (
    DEPLOY,
    KUBERNETES,
    LAYOUTS,
    PORT,
    ROOT,
    VLLM_PORT,
    assert_fits,
    last,
    options,
    run,
)
from programs import program

from lora_proxy import access, config
from lora_proxy.access import Kind
from lora_proxy.cli import build_parser
from lora_proxy.settings import Settings

OLDEST = "1.30"  # the first with all that the manifests use: sidecars, and preStop's `sleep`
NEWEST = kubernetes_validate.latest_version()
SECRETS = {"client-api-keys": '["client-key"]', "vllm-api-key": "upstream-key"}
OPTIONAL = {"hf-token"}
VLLM_PYTHON = Path(
    os.environ.get("LORA_PROXY_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python"
)

Tree = dict[str, Any]


# --- what is rendered -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layout:
    """The objects of one layout."""

    objects: tuple[Tree, ...]

    def all(self, *kinds: str) -> list[Tree]:
        return [one for one in self.objects if one["kind"] in kinds]

    def get(self, kind: str, name: str) -> Tree:
        (found,) = (one for one in self.all(kind) if one["metadata"]["name"] == name)
        return found

    def pod(self, container: str) -> Tree:
        """The template of the pods that have a container."""
        templates = [one["spec"]["template"] for one in self.all("Deployment", "StatefulSet")]
        (found,) = (one for one in templates if container in containers(one))
        return found

    def container(self, name: str) -> Tree:
        return containers(self.pod(name))[name]


@functools.cache
def rendered(name: str) -> Layout:
    kubectl = program("kubectl", "kubernetes-client")
    return Layout(tuple(yaml.safe_load_all(run(kubectl, "kustomize", KUBERNETES / name))))


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return rendered(request.param)


@pytest.fixture
def settings(layout: Layout, tmp_path: Path) -> Settings:
    """What the proxy makes of its ConfigMap, its variables and its arguments."""
    spec, proxy = layout.pod("lora-proxy")["spec"], layout.container("lora-proxy")
    args = build_parser().parse_args(proxy["args"])
    assert args.command == "serve"
    assert mounts(proxy)["config"] == (str(args.config.parent), True)
    (volume,) = (one for one in spec["volumes"] if one["name"] == "config")
    data = layout.get("ConfigMap", volume["configMap"]["name"])["data"]
    file = tmp_path / args.config.name
    file.write_text(data[args.config.name])
    return config.load(file, environ=variables(proxy))


def containers(template: Tree) -> dict[str, Tree]:
    spec = template["spec"]
    return {one["name"]: one for one in (*spec.get("initContainers", ()), *spec["containers"])}


def mounts(container: Tree) -> dict[str, tuple[str, bool]]:
    """Volume -> where it is mounted, and whether read-only."""
    found = container["volumeMounts"]
    return {one["name"]: (one["mountPath"], one.get("readOnly", False)) for one in found}


def variables(container: Tree) -> dict[str, str]:
    """The container's environment, with a made-up pod name and the test's secrets."""
    found = {}
    for one in container["env"]:
        match one:
            case {"value": value}:
                found[one["name"]] = value
            case {"valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}:
                found[one["name"]] = "pod-7d9f-abcde"
            case {"valueFrom": {"secretKeyRef": {"name": "lora-proxy", "key": key}}}:
                found[one["name"]] = SECRETS.get(key, "")
    assert len(found) == len(container["env"])
    return found


def port_number(container: Tree, port: str | int) -> int:
    """What a named port of a container is."""
    if isinstance(port, int):
        return port
    (found,) = (one["containerPort"] for one in container["ports"] if one.get("name") == port)
    return int(found)


def fits(selector: Tree, template: Tree) -> bool:
    labels = selector.get("matchLabels", selector)
    return bool(labels.items() <= template["metadata"]["labels"].items())


# --- valid ------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_takes_every_object(layout: Layout, version: str) -> None:
    for one in layout.objects:
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_file_is_in_its_kustomization(name: str) -> None:
    kustomization = yaml.safe_load((KUBERNETES / name / "kustomization.yaml").read_text())
    (generated,) = kustomization["configMapGenerator"]
    listed = {*kustomization["resources"], *generated["files"], "kustomization.yaml"}
    assert listed == {path.name for path in (KUBERNETES / name).iterdir()}


@pytest.mark.real
def test_a_real_vllm_takes_the_flags() -> None:
    """Its own parser, without a server: an unknown flag ends it."""
    if not VLLM_PYTHON.exists() and os.environ.get("CI") != "true":
        pytest.skip(f"no vLLM environment at {VLLM_PYTHON}; `make test` makes it")
    compose = yaml.safe_load((DEPLOY / "docker-compose.yaml").read_text())
    flags = [compose["services"]["vllm"]["command"]]
    flags += [rendered(name).container("vllm")["args"] for name in LAYOUTS]
    script = """\
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
for flags in json.loads(sys.argv[1]):
    make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
"""
    run(VLLM_PYTHON, "-c", script, json.dumps(flags))


# --- the proxy and its vLLM -------------------------------------------------------------


def test_the_proxy_fits_its_vllm(layout: Layout, settings: Settings) -> None:
    vllm = layout.container("vllm")
    assert_fits(vllm["args"], variables(vllm), settings)
    key = variables(vllm)["VLLM_API_KEY"]
    for upstream in settings.upstreams:
        assert upstream.api_key is not None
        assert upstream.api_key.get_secret_value() == key == SECRETS["vllm-api-key"]
    assert len(settings.api_keys) == 1


def test_a_sidecar_is_reached_inside_its_pod(tmp_path: Path) -> None:
    layout = rendered("sidecar")
    template = layout.pod("vllm")
    assert template is layout.pod("lora-proxy")
    data = layout.all("ConfigMap")[0]["data"]["lora-proxy.yaml"]
    assert [one["url"] for one in yaml.safe_load(data)["upstreams"]] == [
        f"http://127.0.0.1:{VLLM_PORT}"
    ]
    # Kubernetes starts such a container before the others and stops it after them.
    (vllm,) = template["spec"]["initContainers"]
    assert (vllm["name"], vllm["restartPolicy"]) == ("vllm", "Always")


def test_the_fleet_lists_every_pod_by_its_own_name() -> None:
    layout = rendered("fleet")
    pods = layout.get("StatefulSet", "vllm")
    service = layout.get("Service", pods["spec"]["serviceName"])
    assert service["spec"]["clusterIP"] == "None"
    data = layout.all("ConfigMap")[0]["data"]["lora-proxy.yaml"]
    upstreams = yaml.safe_load(data)["upstreams"]
    names = [f"{pods['metadata']['name']}-{n}" for n in range(pods["spec"]["replicas"])]
    assert [one["name"] for one in upstreams] == names
    assert [one["url"] for one in upstreams] == [
        f"http://{name}.{service['metadata']['name']}:{VLLM_PORT}" for name in names
    ]


def test_adapters_lie_at_one_path_and_cannot_be_written(layout: Layout, settings: Settings) -> None:
    vllm, proxy = mounts(layout.container("vllm")), mounts(layout.container("lora-proxy"))
    path, read_only = proxy["adapters"]
    assert vllm["adapters"] == (path, read_only)
    assert read_only
    assert settings.adapters
    assert all(adapter.path.startswith(f"{path}/") for adapter in settings.adapters)
    (claim,) = layout.all("PersistentVolumeClaim")
    for container in ("vllm", "lora-proxy"):
        volumes = {one["name"]: one for one in layout.pod(container)["spec"]["volumes"]}
        named = {"claimName": claim["metadata"]["name"], "readOnly": True}
        assert volumes["adapters"]["persistentVolumeClaim"] == named


def test_every_secret_is_explained(layout: Layout) -> None:
    """The manifests hold none: whoever applies them makes it as the README says."""
    assert layout.all("Secret") == []
    readme = (ROOT / "README.md").read_text()
    for container in ("vllm", "lora-proxy"):
        for one in layout.container(container)["env"]:
            if (ref := one.get("valueFrom", {}).get("secretKeyRef")) is not None:
                assert ref.get("optional", False) == (ref["key"] in OPTIONAL)
                assert f"--from-literal={ref['key']}=" in readme


# --- probes, ports, and the end of a pod ------------------------------------------------


def test_probes_ask_real_endpoints(layout: Layout, settings: Settings) -> None:
    proxy = layout.container("lora-proxy")
    kinds = {}
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        probe = proxy[name]["httpGet"]
        assert port_number(proxy, probe["port"]) == settings.listen.port
        kinds[name] = access.endpoint("GET", probe["path"]).kind
    assert kinds == {
        "startupProbe": Kind.HEALTH,
        "livenessProbe": Kind.HEALTH,
        "readinessProbe": Kind.READY,
    }
    vllm = layout.container("vllm")
    for name in ("startupProbe", "livenessProbe"):
        assert vllm[name]["httpGet"]["path"] == "/health"
        assert port_number(vllm, vllm[name]["httpGet"]["port"]) == VLLM_PORT


def test_ports_agree(layout: Layout, settings: Settings) -> None:
    assert settings.listen.port == PORT
    service = layout.get("Service", "lora-proxy")
    assert fits(service["spec"]["selector"], layout.pod("lora-proxy"))
    (port,) = service["spec"]["ports"]
    assert port["port"] == PORT
    assert port_number(layout.container("lora-proxy"), port["targetPort"]) == PORT
    notes = layout.pod("lora-proxy")["metadata"]["annotations"]
    assert notes["prometheus.io/port"] == str(PORT)
    assert access.endpoint("GET", notes["prometheus.io/path"]).kind is Kind.METRICS


def test_the_pod_monitor_finds_the_proxies(layout: Layout) -> None:
    monitor = yaml.safe_load((KUBERNETES / "podmonitor.yaml").read_text())["spec"]
    assert fits(monitor["selector"], layout.pod("lora-proxy"))
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert port_number(layout.container("lora-proxy"), endpoint["port"]) == PORT
    assert access.endpoint("GET", endpoint["path"]).kind is Kind.METRICS


def test_requests_under_way_can_end(layout: Layout, settings: Settings) -> None:
    spec, proxy = layout.pod("lora-proxy")["spec"], layout.container("lora-proxy")
    pause = proxy["lifecycle"]["preStop"]["sleep"]["seconds"]
    leaving = settings.timeouts.notice + settings.timeouts.drain
    assert spec["terminationGracePeriodSeconds"] > pause + leaving
    vllm = layout.pod("vllm")["spec"]
    patience = int(options(layout.container("vllm")["args"]).get("shutdown-timeout", "0"))
    assert vllm["terminationGracePeriodSeconds"] > patience


# --- what a pod may do, and who may reach it --------------------------------------------


def test_the_proxy_has_no_rights_that_it_does_not_need(layout: Layout) -> None:
    user, _, group = last("USER").partition(":")
    assert layout.container("lora-proxy")["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": int(user),
        "runAsGroup": int(group),
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def test_no_pod_has_more_than_it_asks_for(layout: Layout) -> None:
    for container in ("vllm", "lora-proxy"):
        spec, one = layout.pod(container)["spec"], layout.container(container)
        assert spec["automountServiceAccountToken"] is False
        # Or a Service called vllm would set VLLM_PORT, which vLLM reads as its own setting.
        assert spec["enableServiceLinks"] is False
        assert one["securityContext"]["allowPrivilegeEscalation"] is False
        assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert one["resources"]["requests"].keys() == {"cpu", "memory"}
        assert "memory" in one["resources"]["limits"]
        assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", one["image"])


def test_only_the_proxy_reaches_vllm(layout: Layout) -> None:
    template = layout.pod("vllm")
    rules = [
        rule
        for policy in layout.all("NetworkPolicy")
        if fits(policy["spec"]["podSelector"], template)
        for rule in policy["spec"]["ingress"]
    ]
    assert rules
    for rule in rules:
        (port,) = (one["port"] for one in rule["ports"])
        if port == VLLM_PORT:
            (peer,) = rule["from"]
            assert peer.keys() == {"podSelector"}
            assert fits(peer["podSelector"], layout.pod("lora-proxy"))
            assert not fits(peer["podSelector"], template)
        else:
            assert port == PORT  # the proxy's, in the same pod
    assert all(p["spec"]["policyTypes"] == ["Ingress"] for p in layout.all("NetworkPolicy"))


def test_every_workload_has_a_disruption_budget(layout: Layout) -> None:
    budgets = layout.all("PodDisruptionBudget")
    for workload in layout.all("Deployment", "StatefulSet"):
        template = workload["spec"]["template"]
        assert fits(workload["spec"]["selector"], template)
        (budget,) = (one for one in budgets if fits(one["spec"]["selector"], template))
        assert 0 < budget["spec"]["maxUnavailable"] < workload["spec"]["replicas"]
