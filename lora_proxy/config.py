"""File, environment and flags become frozen settings, once, at start.

Owns where each value comes from, what only makes sense together, and the words in which a
mistake is reported. Refuses to know what the settings are used for, and touches nothing but
the file it is given: no server, no adapter's folder.

How a configuration is read, in this order:

1. The YAML file becomes a tree, and every key's line is remembered.
2. Environment variables, then flags, are put into the tree over what the file says.
3. The whole tree is judged: keys that do not exist, then names, paths and values that only
   make sense together. These checks look at the raw tree, so that a wrong type in one
   place does not hide a wrong name in another. Values of the pure core, whose types are
   plain, are judged and read here already.
4. pydantic checks types and ranges, and builds the dataclasses of `settings` directly.

All faults found in 2 to 4 are reported together. No fault ever quotes a value that could
be a secret: not the URL of an upstream, not its key, not the file's own text.
"""

import dataclasses
import difflib
import ipaddress
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from lora_proxy.draft import Draft, Key, dotted, parse
from lora_proxy.settings import (
    VALUES,
    HealthSettings,
    Limits,
    QueueSettings,
    RetrySettings,
    RoutingSettings,
    Settings,
    Timeouts,
    TlsSettings,
    UpstreamSettings,
    host_port,
)
from lora_proxy.types import Adapter, Route

PREFIX = "LORA_PROXY_"
CONFIG_VARIABLE = "LORA_PROXY_CONFIG"


class ConfigError(Exception):
    """The configuration cannot be used.

    Args:
        faults: One line each: the key, what is wrong, what to do, and where it stands.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


@dataclass(frozen=True, slots=True)
class Flags:
    """What the command line says, as text. Everything left out stays as it is elsewhere.

    Attributes:
        listen: HOST:PORT.
        upstreams: URL or NAME=URL each; given at all, they replace the file's list.
        adapters: NAME=PATH each; given at all, they replace the file's list.
        default_model: A public name.
        log_level: As in the file.
    """

    listen: str | None = None
    upstreams: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    default_model: str | None = None
    log_level: str | None = None


def load(path: Path | None, *, environ: Mapping[str, str], flags: Flags = Flags()) -> Settings:
    """The settings that file, environment and flags give together.

    Args:
        path: The YAML file; None takes `LORA_PROXY_CONFIG`, or else no file.
        environ: Usually `os.environ`.
        flags: These win over the environment, and the environment over the file.

    Raises:
        ConfigError: With every fault found.
    """
    if path is None and environ.get(CONFIG_VARIABLE):
        path = Path(environ[CONFIG_VARIABLE])
    draft = Draft()
    if path is not None:
        _read_file(draft, path)
    _put_all(draft, environ, flags)
    _judge_keys(draft)
    _judge_values(draft)
    _judge_presence(draft)
    _judge_upstreams(draft)
    _judge_names(draft)
    settings = _build(draft)
    if draft.faults or settings is None:
        raise ConfigError(draft.report())
    return settings


def upstreams(text: bytes, name: str) -> tuple[UpstreamSettings, ...]:
    """The upstreams of a file that lists nothing else, judged like those of a configuration.

    Args:
        text: A list, in YAML or JSON.
        name: The file's, for the faults.

    Raises:
        ConfigError: With every fault found. An empty list is one: it is what a file holds
            that is just being written.
    """
    draft = Draft()
    if text.lstrip().startswith(b"["):  # JSON may be indented with tabs, and YAML may not
        text = text.replace(b"\t", b" ")
    try:
        entries = parse(draft, text, ("upstreams",), name)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    if not isinstance(entries, list) or not entries:
        raise ConfigError([_NO_LIST])
    draft.tree = {"upstreams": entries}
    _judge_keys(draft)
    _judge_upstreams(draft)
    for key, entry in draft.mappings(("upstreams", "*")):
        if _is_true(entry.get("dns")):
            draft.fault((*key, "dns"), "is for the configuration; list the addresses here")
    settings = _build(draft)
    if draft.faults or settings is None:
        raise ConfigError(draft.report())
    return settings.upstreams


# --- the keys there are -------------------------------------------------------------------

Assignment = tuple[Key, object, str]  # the key, its value, and what said so

_SECTIONS: dict[Key, type] = {
    (): Settings,
    ("upstreams", "*"): UpstreamSettings,
    ("upstreams", "*", "tls"): TlsSettings,
    ("adapters", "*"): Adapter,
    ("routes", "*"): Route,
    ("routing",): RoutingSettings,
    ("health",): HealthSettings,
    ("retry",): RetrySettings,
    ("queue",): QueueSettings,
    ("limits",): Limits,
    ("timeouts",): Timeouts,
}
"""The mappings with fixed keys; `*` stands for a list's index."""


def _keys_of(section: Key) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(_SECTIONS[section]))


KEYS: frozenset[Key] = frozenset(
    (*section, name) for section in _SECTIONS for name in _keys_of(section)
)
"""Every key there is, as a path; `*` stands for a list's index."""

# A variable for one of these holds JSON; for any other key, the bare text.
_JSON_KEYS = frozenset(
    (
        "*",
        "adapters",
        "aliases",
        "api_keys",
        "base_aliases",
        "defaults",
        "fallback",
        "health",
        "limits",
        "overrides",
        "queue",
        "retry",
        "routes",
        "routing",
        "split",
        "timeouts",
        "tls",
        "upstreams",
    )
)


# --- 1. the file ------------------------------------------------------------------------


def _read_file(draft: Draft, path: Path) -> None:
    """Fills the draft from a YAML file.

    Raises:
        ConfigError: There is nothing to judge: no file, no YAML, or no mapping.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        fault = f"{path}: cannot be read: {error.strerror}; give the file with --config"
        raise ConfigError([fault]) from None
    try:
        tree = parse(draft, text, (), path.name)
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from None
    if tree is None:  # an empty file, or comments only
        return
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: must be a mapping of keys to values"])
    draft.tree = tree


# --- 2. environment and flags -------------------------------------------------------------


# Kubernetes sets such variables in every pod for a Service named lora-proxy or lora-proxy-x.
_SERVICE_LINK = re.compile(
    r"LORA_PROXY_(.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_(TCP|UDP|SCTP)(_[A-Z]+)?)"
)


def _is_foreign(name: str, value: str) -> bool:
    """Whether a LORA_PROXY_ variable is meant for somebody else than the settings."""
    return (
        name == CONFIG_VARIABLE
        or name.startswith(("LORA_PROXY_TEST_", "LORA_PROXY_VLLM_PYTHON"))
        or _SERVICE_LINK.fullmatch(name) is not None
        or (name.endswith("_PORT") and "://" in value)
    )


def _variable(key: Key) -> str:
    return PREFIX + "__".join(str(part).upper() for part in key)


def _key_of(variable: str) -> Key | None:
    """LORA_PROXY_UPSTREAMS__0__API_KEY as ('upstreams', 0, 'api_key'); None if unknown."""
    parts = variable.removeprefix(PREFIX).split("__")
    key = tuple(int(p) if re.fullmatch(r"[0-9]{1,4}", p) else p.lower() for p in parts)
    general = tuple("*" if isinstance(part, int) else part for part in key)
    known = general in KEYS or general in _SECTIONS
    return key if known and variable.isupper() else None


def _environment(draft: Draft, environ: Mapping[str, str]) -> list[Assignment]:
    """What the variables say, whole lists before single entries. Empty ones say nothing."""
    found: list[Assignment] = []
    for name, text in environ.items():
        if not name.startswith(PREFIX) or not text or _is_foreign(name, text):
            continue
        key = _key_of(name)
        if key is None:
            known = [_variable(key).replace("*", "0") for key in KEYS]
            hint = _nearest(name, known) or "the name is LORA_PROXY_ and the key in upper case"
            draft.fault_elsewhere(f"{name}: unknown variable; {hint}")
            continue
        value: object = text
        if isinstance(key[-1], int) or key[-1] in _JSON_KEYS:
            try:
                value = json.loads(text)
            except ValueError:
                hint = f"must hold JSON for {dotted(key)}, and this is none"
                draft.fault_elsewhere(f"{name}: {hint}")
                continue
        found.append((key, value, name))
    return sorted(found, key=lambda assignment: assignment[0])


def _command_line(draft: Draft, flags: Flags) -> list[Assignment]:
    """What the flags say."""
    found: list[Assignment] = [
        ((name,), value, "--" + name.replace("_", "-"))
        for name, value in (
            ("listen", flags.listen),
            ("default_model", flags.default_model),
            ("log_level", flags.log_level),
        )
        if value is not None
    ]
    if flags.upstreams:
        found.append((("upstreams",), [], "--upstream"))
    for index, text in enumerate(flags.upstreams):
        name, equals, url = text.partition("=")
        if equals and "://" not in name:
            found.append((("upstreams", index, "name"), name, "--upstream"))
        else:  # the = is the URL's own
            url = text
        found.append((("upstreams", index, "url"), url, "--upstream"))
    if flags.adapters:
        found.append((("adapters",), [], "--adapter"))
    for index, text in enumerate(flags.adapters):
        name, equals, path = text.partition("=")
        if not equals:
            draft.fault_elsewhere(f"--adapter: {text!r} is not NAME=PATH")
        entry = {"name": name, "path": path if equals else "/"}
        found.append((("adapters", index), entry, "--adapter"))
    return found


def _put_all(draft: Draft, environ: Mapping[str, str], flags: Flags) -> None:
    """Puts environment and flags over the file.

    A variable for one entry of a list (`LORA_PROXY_UPSTREAMS__0__API_KEY`) counts whoever
    gave the list, so that a secret can join an upstream named by a flag; only what the flag
    itself says is not its to change.
    """
    variables = _environment(draft, environ)
    said = _command_line(draft, flags)
    fixed = {key[:length] for key, _, _ in said for length in range(1, len(key) + 1)}
    whole = [a for a in variables if not any(isinstance(part, int) for part in a[0])]
    single = [a for a in variables if a not in whole and a[0] not in fixed]
    for key, value, where in (*whole, *said, *single):
        draft.put(key, value, where)


# --- 3. what pydantic cannot see ----------------------------------------------------------

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,199}")
_NAME_RULE = (
    "must be 1 to 200 letters, digits and . _ - / : that begin with a letter or digit "
    "(@ is kept for served names); give clients other names with aliases"
)
_PATH_RULE = (
    "must be an absolute path as vLLM sees it, or a Hugging Face ORG/REPO; vLLM would look "
    "for a relative path in its own working directory"
)
_NO_UPSTREAM = (
    "name at least one vLLM server, as in `- url: http://127.0.0.1:8000`, or give --upstream URL "
    "or an upstreams_file"
)
_NO_LIST = "must be a list of at least one upstream, as in `- url: http://127.0.0.1:8000`"
# What takes the place of a wrong value, so that it is a fault once; None for all others.
_UNTOLD: Mapping[str, object] = {"split": {}, "fallback": (), "sample": 0.0}
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def _nearest(word: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"did you mean {close[0]}?" if close else None


def _judge_keys(draft: Draft) -> None:
    """Refuses unknown keys. A key without a value (`limits:`) counts as not given."""
    for section in _SECTIONS:
        known = _keys_of(section)
        for key, mapping in draft.mappings(section):
            for name in list(mapping):
                if name not in known:
                    hint = _nearest(str(name), known) or f"the keys here are {', '.join(known)}"
                    draft.fault((*key, str(name)), f"unknown key; {hint}")
                if name not in known or mapping[name] is None:
                    del mapping[name]


def _judge_values(draft: Draft) -> None:
    """Judges the fields whose own types say too little, and puts what was read in place."""
    for section, kind in _SECTIONS.items():
        for key, entry in draft.mappings(section):
            for name in [name for name in entry if (kind, name) in VALUES]:
                try:
                    entry[name] = VALUES[kind, name].validate_python(entry[name])
                except ValidationError as error:
                    _fault_all(draft, (*key, name), error)
                    entry[name] = _UNTOLD.get(name)


def _judge_presence(draft: Draft) -> None:
    """Asks for one upstream at least that may get requests; those of a file may be it."""
    upstreams = draft.tree.setdefault("upstreams", [])
    if "upstreams_file" in draft.tree:
        return
    if not upstreams:
        draft.fault(("upstreams",), _NO_UPSTREAM)
    entries = draft.mappings(("upstreams", "*"))
    if entries and all(_is_true(entry.get("drain")) for _, entry in entries):
        text = "every one has drain: true, so that nothing would be answered; let one work"
        draft.fault(("upstreams",), text)


def _judge_upstreams(draft: Draft) -> None:
    """Names the nameless, and refuses one server or one name twice."""
    places: dict[str, Key] = {}
    names: dict[str, Key] = {}
    for key, entry in draft.mappings(("upstreams", "*")):
        url, given = entry.get("url"), entry.get("name")
        try:
            place = host_port(url) if isinstance(url, str) else None
        except ValueError:  # the type check says why
            place = None
        name = entry.setdefault("name", place or "unnamed")
        if "tls" in entry and isinstance(url, str) and url.startswith("http://"):
            draft.fault((*key, "tls"), "means nothing for an http:// url; write https://")
        if place and _is_true(entry.get("dns")) and _is_address(str(url)):
            draft.fault((*key, "dns"), "means nothing for an address; give url a host name")
        if place in places:
            first = dotted(places[place])
            draft.fault((*key, "url"), f"the same server as {first}; keep one of them")
        elif isinstance(name, str) and name in names and (given or place):
            first = dotted(names[name])
            draft.fault((*key, "name"), f"already the name of {first}; choose another")
        if place:
            places.setdefault(place, key)
        if isinstance(name, str) and (given or place):
            names.setdefault(name, key)


def _is_address(url: str) -> bool:
    try:
        ipaddress.ip_address(urlsplit(url).hostname or "")
    except ValueError:
        return False
    return True


def _judge_names(draft: Draft) -> None:
    """Refuses a public name for two things, and names that lead nowhere."""
    taken = _base_models(draft)
    _judge_base_names(draft, frozenset(taken))
    _judge_adapters(draft, taken)
    _judge_routes(draft, taken)
    _judge_default_model(draft, taken)


def _judge_base_names(draft: Draft, bases: AbstractSet[str]) -> None:
    """Refuses one name for two base models, and base models that no upstream serves."""
    owners = {base: base for base in bases}
    aliases = _base_aliases(draft)
    for key, base, name in aliases:
        owner = owners.setdefault(name, base)
        if owner != base:
            draft.fault(key, f"{name!r} is already a name of base model {owner!r}; keep one")
    if not _bases_are_known(draft):
        return
    for key, base, _ in aliases:
        _judge_base(draft, bases, key[:2], base)
    for key, entry in draft.mappings(("adapters", "*")):
        _judge_base(draft, owners.keys(), (*key, "base"), entry.get("base"))


def _judge_base(draft: Draft, known: AbstractSet[str], key: Key, name: str | None) -> None:
    if name is not None and name not in known:
        hint = _nearest(name, known) or "give the base_model of an upstream"
        draft.fault(key, f"no upstream has this base_model; {hint}")


def _base_aliases(draft: Draft) -> list[tuple[Key, str, str]]:
    """Each name of `base_aliases`: its place, the base model, and the name; that itself, too."""
    found: list[tuple[Key, str, str]] = []
    for key, table in draft.mappings(("base_aliases",)):
        for base, names in table.items():
            if not isinstance(base, str):
                continue  # the type check says so
            found.append(((*key, base), base, base))
            listed = names if isinstance(names, list) else [names]
            places = [((*key, base, index), name) for index, name in enumerate(listed)]
            found += [(place, base, name) for place, name in places if isinstance(name, str)]
    return found


def _judge_adapters(draft: Draft, taken: dict[str, str]) -> None:
    """Refuses bad names, one public name for two things, and paths and fields of no use."""
    adapters = draft.mappings(("adapters", "*"))
    for key, entry in adapters:  # all names before all aliases: of a clash the alias is at fault
        _judge_name(draft, taken, (*key, "name"), entry.get("name"))
    for key, entry in adapters:
        aliases = entry.get("aliases")
        for index, alias in enumerate(aliases if isinstance(aliases, list) else ()):
            _judge_alias(draft, taken, (*key, "aliases", index), alias)
        path = entry.get("path")
        if isinstance(path, str) and not _is_path(path):
            draft.fault((*key, "path"), _PATH_RULE)
        for field in ("defaults", "overrides"):
            if isinstance(entry.get(field), dict):
                entry[field] = _json_fields(draft, (*key, field), entry[field])


def _judge_routes(draft: Draft, taken: dict[str, str]) -> None:
    """Refuses routes with a name that is taken, that lead nowhere, or to each other."""
    targets = frozenset(taken)
    routes = draft.mappings(("routes", "*"))
    for key, entry in routes:
        _judge_alias(draft, taken, (*key, "name"), entry.get("name"))
    names = {entry["name"] for _, entry in routes if isinstance(entry.get("name"), str)}
    known = _bases_are_known(draft)
    for key, entry in routes:
        for place, target in _targets(key, entry):
            if target in targets:
                continue
            if target in names:
                draft.fault(place, "is a route; name an adapter, an alias or a base model")
            elif known:
                hint = _nearest(target, targets) or "name an adapter, an alias or a base_model"
                draft.fault(place, f"no adapter, alias or base model has this name; {hint}")
        _judge_mirror(draft, key, entry)
    for _, entry in routes:  # last, as with YAML's anchors two may be one
        if isinstance(entry.get("split"), dict):
            entry["split"] = tuple(entry["split"].items())


def _targets(key: Key, route: Mapping[str, Any]) -> list[tuple[Key, str]]:
    """The names that a route leads to, each with its place."""
    found: list[tuple[Key, str]] = [((*key, "split", to), to) for to in route.get("split", ())]
    fallback = enumerate(route.get("fallback", ()))
    found += [((*key, "fallback", index), name) for index, name in fallback]
    if route.get("mirror") is not None:
        found.append(((*key, "mirror"), route["mirror"]))
    return found


def _judge_mirror(draft: Draft, key: Key, route: Mapping[str, Any]) -> None:
    """Refuses a mirror that gets nothing, and a sample that goes nowhere."""
    if "mirror" not in route and route.get("sample"):
        draft.fault((*key, "sample"), "means nothing without mirror; name what gets the copies")
    if "mirror" in route and "sample" not in route:
        draft.fault((*key, "mirror"), "gets nothing without sample; give one, as in sample: 0.05")


def _judge_name(draft: Draft, taken: dict[str, str], key: Key, name: object) -> None:
    if isinstance(name, str) and _NAME.fullmatch(name) is None:
        draft.fault(key, _NAME_RULE)
    elif isinstance(name, str):
        _claim(draft, taken, key, name)


def _judge_alias(draft: Draft, taken: dict[str, str], key: Key, alias: object) -> None:
    if isinstance(alias, str) and not (alias.isprintable() and 1 <= len(alias) <= 200):
        draft.fault(key, "must be 1 to 200 printable characters")
    elif isinstance(alias, str):
        _claim(draft, taken, key, alias)


def _is_path(path: str) -> bool:
    if not path.isprintable():
        return False
    return path.startswith("/") or _REPOSITORY.fullmatch(path) is not None


def _base_models(draft: Draft) -> dict[str, str]:
    """The declared base models' names; replicas may share one."""
    bases = [(entry.get("base_model"), key) for key, entry in draft.mappings(("upstreams", "*"))]
    return {
        base: f"the base model of {dotted(key)}"
        for base, key in reversed(bases)
        if isinstance(base, str)
    }


def _claim(draft: Draft, taken: dict[str, str], key: Key, name: str) -> None:
    if name in taken:
        draft.fault(key, f"'{name}' is already {taken[name]}; choose another name")
    else:
        taken[name] = dotted(key)


def _json_fields(draft: Draft, key: Key, fields: dict[Any, Any]) -> dict[str, object]:
    """Request fields as JSON has them: {50256: -100} gets a text key, a date is refused."""
    for name in ("model", "stream"):
        if name in fields:
            draft.fault((*key, name), "is for the client to say; leave it out")
    try:
        return dict(json.loads(json.dumps(fields, allow_nan=False)))
    except (TypeError, ValueError, RecursionError):
        draft.fault(key, "must hold what JSON can say; put dates in quotes, no .nan or .inf")
        return {}


def _judge_default_model(draft: Draft, taken: Mapping[str, str]) -> None:
    """Refuses a name that nothing answers to."""
    default = draft.tree.get("default_model")
    if isinstance(default, str) and default not in taken and _bases_are_known(draft):
        hint = _nearest(default, taken) or "name an adapter, an alias, a route or a base_model"
        text = f"no adapter, alias, route or base model has this name; {hint}"
        draft.fault(("default_model",), text)


def _bases_are_known(draft: Draft) -> bool:
    """Whether every base model that there can be is declared: a name may not be one else."""
    entries = [entry for _, entry in draft.mappings(("upstreams", "*"))]
    return "upstreams_file" not in draft.tree and all(
        isinstance(entry.get("base_model"), str) and not _is_true(entry.get("dns"))
        for entry in entries
    )


# --- 4. types and ranges --------------------------------------------------------------------

_SETTINGS = TypeAdapter(Settings)
_BOOLEAN = TypeAdapter(bool)
_MAPPING = "must be a mapping of keys to values"
_WORDS = {
    "missing": "is required; add it",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "string_pattern_mismatch": "must be 1 to 100 letters, digits and . _ - : [ ]",
    "string_type": "must be text; put the value in quotes",
    "tuple_type": "must be a list",
    "dict_type": _MAPPING,
    "mapping_type": _MAPPING,
    "dataclass_type": _MAPPING,
}


def _build(draft: Draft) -> Settings | None:
    """The settings, or None and the reasons in the draft."""
    try:
        return _SETTINGS.validate_python(draft.tree)
    except ValidationError as error:
        _fault_all(draft, (), error)
        return None


def _fault_all(draft: Draft, key: Key, error: ValidationError) -> None:
    """Notes pydantic's findings about what stands at a key."""
    for fault in error.errors(include_url=False, include_input=False):
        # '[key]' is how pydantic says that a mapping's key is meant, not its value.
        place = tuple(part for part in fault["loc"] if part != "[key]")
        draft.fault((*key, *place), _words(fault))


def _is_true(value: object) -> bool:
    """What a value will be read as; one that is no boolean is left to the type check."""
    try:
        return _BOOLEAN.validate_python(value)
    except ValidationError:
        return False


def _words(fault: ErrorDetails) -> str:
    """A finding of pydantic's as this project says it: what the value must be."""
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    return _WORDS.get(fault["type"], re.sub(r"^(Input|String) should", "must", fault["msg"]))
