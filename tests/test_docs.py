"""What is documented exists, and what exists is documented."""

import argparse
import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from lora_proxy import config
from lora_proxy.cli import build_parser
from lora_proxy.config import Flags
from lora_proxy.errors import CODES
from lora_proxy.metrics import LABELS
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

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
EXAMPLE = ROOT / "deploy" / "lora-proxy.example.yaml"

SECTIONS: dict[str, type] = {
    "": Settings,
    "upstreams[].": UpstreamSettings,
    "upstreams[].tls.": TlsSettings,
    "adapters[].": Adapter,
    "routes[].": Route,
    "routing.": RoutingSettings,
    "health.": HealthSettings,
    "retry.": RetrySettings,
    "queue.": QueueSettings,
    "limits.": Limits,
    "timeouts.": Timeouts,
}
FIELDS = {
    prefix + field.name: field
    for prefix, section in SECTIONS.items()
    for field in dataclasses.fields(section)
}


def section(title: str) -> str:
    """One `## title` of the README."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found is not None, f"README has no section {title}"
    return found[1]


def rows(text: str) -> dict[str, list[str]]:
    """The rows of all tables in a text: what the first cell has in `…` -> the other cells."""
    split = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {re.findall(r"`([^`]+)`", cells[0])[0]: cells[1:] for cells in split}


def flags() -> dict[str, str]:
    """Every flag of every command, with the command."""
    (commands,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return {
        option: command
        for command, parser in commands.choices.items()
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }


# --- the README -------------------------------------------------------------------------


def test_every_key_is_documented_and_no_other() -> None:
    # SECTIONS above is a second list of the sections: it must not fall behind.
    known = {".".join(map(str, key)) for key in config.KEYS}
    assert {key.replace("[]", ".*") for key in FIELDS} == known
    assert rows(section("Configuration")).keys() == FIELDS.keys()


@pytest.mark.parametrize("key", FIELDS)
def test_the_documented_default_is_the_default(key: str) -> None:
    field, shown = FIELDS[key], rows(section("Configuration"))[key][0]
    if key == "upstreams[].name":
        assert shown == "HOST:PORT of the url"
    elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        assert shown == "required"
    elif field.default is None or key == "upstreams[].tls":
        assert shown == "none"
    elif f"{key}." in SECTIONS:
        assert shown == "see below"
    else:
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        if isinstance(default, Listen):
            default = str(default)
        elif isinstance(default, tuple):
            default = list(default)
        assert yaml.safe_load(shown.strip("`")) == default


def test_the_errors_table_agrees_with_the_code() -> None:
    documented = rows(section("Errors"))
    assert list(documented) == list(CODES)
    for name, code in CODES.items():
        status, fault, meaning, todo = documented[name]
        assert (int(status), fault, meaning) == (code.status, code.source, code.meaning)
        assert todo


def test_the_metrics_table_agrees_with_the_code() -> None:
    documented = rows(section("Metrics"))
    assert {
        name: tuple(re.findall(r"`(\w+)`", labels)) for name, (labels, _) in documented.items()
    } == LABELS


def test_every_command_and_flag_is_documented_and_no_other() -> None:
    documented = {re.split(r"[ =]", name)[0] for name in rows(section("Commands"))}
    assert documented == {"lora-proxy"} | flags().keys() - {"--help"}
    for command in flags().values():
        assert f"`lora-proxy {command}`" in section("Commands")
    assert "`lora-proxy --version`" in section("Commands")


def test_the_two_commands_come_first() -> None:
    before_the_problem = README.partition("\n## ")[0]
    assert "make demo" in before_the_problem
    assert "make test" in before_the_problem


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
def test_a_configuration_in_the_readme_loads(block: str, tmp_path: Path) -> None:
    file = tmp_path / "lora-proxy.yaml"
    file.write_text(block)
    assert config.load(file, environ={}).upstreams


def test_the_variables_in_the_readme_are_known(tmp_path: Path) -> None:
    file = tmp_path / "lora-proxy.yaml"
    file.write_text("")
    shown = re.findall(r"^    (LORA_PROXY_\w+)=(\S+|'.*')(?:  .*)?$", README, re.MULTILINE)
    environ = {name: value.strip("'") for name, value in shown} | {"LORA_PROXY_CONFIG": str(file)}
    assert len(environ) == 5
    settings = config.load(None, environ=environ)
    assert settings.limits.body == 1_048_576
    assert settings.upstreams[0].api_key is not None


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", (ROOT / page).read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []


# --- CONTRIBUTING -----------------------------------------------------------------------


def test_every_module_is_in_the_layer_table() -> None:
    files = {path.stem for path in (ROOT / "lora_proxy").glob("[a-z]*.py")}
    table = "".join(line for line in CONTRIBUTING.splitlines(True) if line.startswith("|"))
    assert files - set(re.findall(r"`(\w+)`", table)) == set()


# --- deploy -----------------------------------------------------------------------------


def written_keys(value: object, prefix: str = "") -> set[str]:
    """The keys in a YAML tree, in the README's form; what mappings of users hold is not ours."""
    if isinstance(value, list):
        return {key for item in value for key in written_keys(item, prefix + "[]")}
    if not isinstance(value, dict) or prefix.endswith(
        ("base_aliases", "defaults", "overrides", "split")
    ):
        return set()
    found: set[str] = set()
    for name, inner in value.items():
        key = f"{prefix}.{name}".lstrip(".")
        found |= {key} | written_keys(inner, key)
    return found


def test_the_example_loads_and_has_every_key() -> None:
    settings = config.load(EXAMPLE, environ={})
    assert [adapter.name for adapter in settings.adapters] == ["sql", "support"]
    assert written_keys(yaml.safe_load(EXAMPLE.read_text())) == FIELDS.keys()


def test_what_the_example_calls_a_default_is_one() -> None:
    settings = config.load(EXAMPLE, environ={})
    least = config.load(None, environ={}, flags=Flags(upstreams=("http://a:1",)))
    for name in (field.name for field in dataclasses.fields(Settings)):
        if name not in {"upstreams", "adapters", "default_model", "routes"}:
            assert getattr(settings, name) == getattr(least, name)
