"""File, environment and flags become frozen settings, once, at start.

Owns where each value comes from, what only makes sense together, and the words in which a
mistake is reported. Refuses to know what the settings are used for, and touches nothing but
the file it is given: no server, no adapter's folder.

How a configuration is read, in this order:

1. The YAML file becomes a tree, and every key's line is remembered.
2. Environment variables, then flags, are put into the tree over what the file says.
3. The whole tree is judged: keys that do not exist, then names, paths and values that only
   make sense together. These checks look at the raw tree, so that a wrong type in one
   place does not hide a wrong name in another.
4. pydantic checks types and ranges, and builds the dataclasses of `settings` directly.

All faults found in 2 to 4 are reported together. No fault ever quotes a value that could
be a secret: not the URL of an upstream, not its key, not the file's own text.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import (
    TypeAdapter,
    ValidationError,
)
from pydantic_core import ErrorDetails

from lora_proxy.settings import (
    Limits,
    Settings,
    Timeouts,
    TlsSettings,
    UpstreamSettings,
    host_port,
)
from lora_proxy.types import Adapter

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
    draft = _Draft()
    if path is not None:
        _read_file(draft, path)
    _put_all(draft, environ, flags)
    _judge_keys(draft)
    _judge_upstreams(draft)
    _judge_adapters(draft)
    settings = _build(draft)
    if draft.faults or settings is None:
        raise ConfigError(draft.report())
    return settings


# --- the draft: what was said, before any of it is believed -----------------------------

Key = tuple[str | int, ...]
Assignment = tuple[Key, object, str]  # the key, its value, and what said so

_SECTIONS: dict[Key, type] = {
    (): Settings,
    ("upstreams", "*"): UpstreamSettings,
    ("upstreams", "*", "tls"): TlsSettings,
    ("adapters", "*"): Adapter,
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
        "upstreams",
        "adapters",
        "*",
        "aliases",
        "api_keys",
        "defaults",
        "overrides",
        "limits",
        "timeouts",
        "tls",
    )
)
_AFTER_FILE = 1 << 30  # sorts a fault of environment or flags behind those of the file's lines


def _dotted(key: Key) -> str:
    """('adapters', 1, 'name') as adapters[1].name, always on one line."""
    texts = (part if isinstance(part, int) or part.isprintable() else repr(part) for part in key)
    return "".join(f"[{t}]" if isinstance(t, int) else f".{t}" for t in texts).removeprefix(".")


@dataclass(slots=True)
class _Draft:
    """A tree of raw values, where each came from, and what is wrong with them."""

    tree: dict[Any, Any] = dataclasses.field(default_factory=dict)
    origins: dict[Key, tuple[int, str]] = dataclasses.field(default_factory=dict)
    faults: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    def fault(self, key: Key, text: str) -> None:
        """Notes one fault, with the origin of the key or of what it stands in."""
        known = (self.origins.get(key[:length]) for length in range(len(key), 0, -1))
        rank, where = next(filter(None, known), (_AFTER_FILE, ""))
        line = f"{_dotted(key)}: {text}"
        self.faults.append((rank, f"{line} ({where})" if where else line))

    def report(self) -> list[str]:
        """The faults, those of the file first and in its order, none twice."""
        ordered = sorted(self.faults, key=lambda fault: fault[0])
        return list(dict.fromkeys(text for _, text in ordered))

    def put(self, key: Key, value: object, where: str) -> None:
        """Sets one value over what is there, and makes the list or mapping it stands in."""
        node: Any = self.tree
        for depth, part in enumerate(key):
            if isinstance(node, list) and isinstance(part, int):
                if part > len(node):
                    text = f"there are {len(node)} entries; number them from 0 without gaps"
                    self.faults.append((_AFTER_FILE, f"{_dotted(key[:depth])}: {text} ({where})"))
                    return
                node.extend([None] * (part == len(node)))
            elif isinstance(node, dict):
                cast("dict[object, object]", node).setdefault(part, None)
            else:
                return  # the file has something else here, which the type check refuses
            if depth == len(key) - 1:
                node[part] = value
            elif node[part] is None:
                node[part] = [] if isinstance(key[depth + 1], int) else {}
            node = node[part]
        kept = {k: v for k, v in self.origins.items() if k[: len(key)] != key}
        self.origins = {**kept, key: (_AFTER_FILE, where)}

    def mappings(self, section: Key) -> list[tuple[Key, dict[Any, Any]]]:
        """The mappings at a section's place; what is no mapping is left to the type check."""
        found: list[tuple[Key, Any]] = [((), self.tree)]
        for part in section:
            found = [
                ((*key, step), child)
                for key, node in found
                for step, child in _children(node, part)
            ]
        return [(key, node) for key, node in found if isinstance(node, dict)]


def _children(node: object, part: str | int) -> list[tuple[str | int, Any]]:
    """What stands in a node under one part of a section's key."""
    if part == "*":
        return list(enumerate(node)) if isinstance(node, list) else []
    return [(part, node[part])] if isinstance(node, dict) and part in node else []


# --- 1. the file ------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML with JSON's numbers: PyYAML alone reads `1e-2`, without a dot, as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"-?[0-9]+[eE][-+]?[0-9]{1,3}\Z"),
    list("-0123456789"),
)


def _read_file(draft: _Draft, path: Path) -> None:
    """Fills the draft from a YAML file.

    Raises:
        ConfigError: There is nothing to judge: no file, no YAML, or no mapping.
    """
    try:
        loader = _Loader(path.read_bytes())
        try:
            node = loader.get_single_node()
            if node is None:  # an empty file, or comments only
                return
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError([f"{path}: must be a mapping of keys to values"])
            _note_lines(draft, node, (), path.name, set())
            draft.tree = loader.construct_document(node)
        finally:
            loader.dispose()
    except OSError as error:
        fault = f"{path}: cannot be read: {error.strerror}; give the file with --config"
        raise ConfigError([fault]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: {_yaml_fault(error)}"]) from None
    except (RecursionError, ValueError):  # nested too deep; 2001-99-99 is no date
        raise ConfigError([f"{path}: holds values that YAML cannot build"]) from None


def _note_lines(draft: _Draft, node: yaml.Node, key: Key, file: str, seen: set[int]) -> None:
    """Remembers each key's line, and refuses a key given twice (PyYAML takes the last)."""
    if id(node) in seen:  # an alias, perhaps one to what it stands in
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            line = item.start_mark.line + 1
            draft.origins[*key, index] = (line, f"{file}, line {line}")
            _note_lines(draft, item, (*key, index), file, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str | int, int] = {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            inner = (*key, str(name.value))
            draft.origins[inner] = (line, f"{file}, line {line}")
            if inner[-1] in first:
                draft.fault(inner, f"already given in line {first[inner[-1]]}; keep one")
            first.setdefault(inner[-1], line)
            _note_lines(draft, value, inner, file, seen)


def _yaml_fault(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the file's text: it may be a secret."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return "holds bytes that are not YAML text; save it as UTF-8"
    mark = error.problem_mark
    # What PyYAML quotes are single characters and <token names>, or names from the file.
    problem = re.sub(r"""(['"])(.*?)\1""", _unquoted, error.problem or "not valid YAML")
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}; correct the YAML there"


def _unquoted(quoted: re.Match[str]) -> str:
    return quoted[0] if len(quoted[2]) <= 2 or quoted[2].startswith("<") else "(a name)"


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


def _environment(draft: _Draft, environ: Mapping[str, str]) -> list[Assignment]:
    """What the variables say, whole lists before single entries. Empty ones say nothing."""
    found: list[Assignment] = []
    for name, text in environ.items():
        if not name.startswith(PREFIX) or not text or _is_foreign(name, text):
            continue
        key = _key_of(name)
        if key is None:
            known = [_variable(key).replace("*", "0") for key in KEYS]
            hint = _nearest(name, known) or "the name is LORA_PROXY_ and the key in upper case"
            draft.faults.append((_AFTER_FILE, f"{name}: unknown variable; {hint}"))
            continue
        value: object = text
        if isinstance(key[-1], int) or key[-1] in _JSON_KEYS:
            try:
                value = json.loads(text)
            except ValueError:
                hint = f"must hold JSON for {_dotted(key)}, and this is none"
                draft.faults.append((_AFTER_FILE, f"{name}: {hint}"))
                continue
        found.append((key, value, name))
    return sorted(found, key=lambda assignment: assignment[0])


def _command_line(draft: _Draft, flags: Flags) -> list[Assignment]:
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
            draft.faults.append((_AFTER_FILE, f"--adapter: {text!r} is not NAME=PATH"))
        entry = {"name": name, "path": path if equals else "/"}
        found.append((("adapters", index), entry, "--adapter"))
    return found


def _put_all(draft: _Draft, environ: Mapping[str, str], flags: Flags) -> None:
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
    "name at least one vLLM server, as in `- url: http://127.0.0.1:8000`, or give --upstream URL"
)
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def _nearest(word: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"did you mean {close[0]}?" if close else None


def _judge_keys(draft: _Draft) -> None:
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


def _judge_upstreams(draft: _Draft) -> None:
    """Asks for one at least, names the nameless, and refuses one server or one name twice."""
    if not draft.tree.setdefault("upstreams", []):
        draft.fault(("upstreams",), _NO_UPSTREAM)
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
        if place in places:
            first = _dotted(places[place])
            draft.fault((*key, "url"), f"the same server as {first}; keep one of them")
        elif isinstance(name, str) and name in names and (given or place):
            first = _dotted(names[name])
            draft.fault((*key, "name"), f"already the name of {first}; choose another")
        if place:
            places.setdefault(place, key)
        if isinstance(name, str) and (given or place):
            names.setdefault(name, key)


def _judge_adapters(draft: _Draft) -> None:
    """Refuses bad names, one public name for two things, and paths and fields of no use."""
    taken = _base_models(draft)
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
    _judge_default_model(draft, taken)


def _judge_name(draft: _Draft, taken: dict[str, str], key: Key, name: object) -> None:
    if isinstance(name, str) and _NAME.fullmatch(name) is None:
        draft.fault(key, _NAME_RULE)
    elif isinstance(name, str):
        _claim(draft, taken, key, name)


def _judge_alias(draft: _Draft, taken: dict[str, str], key: Key, alias: object) -> None:
    if isinstance(alias, str) and not (alias.isprintable() and 1 <= len(alias) <= 200):
        draft.fault(key, "must be 1 to 200 printable characters")
    elif isinstance(alias, str):
        _claim(draft, taken, key, alias)


def _is_path(path: str) -> bool:
    if not path.isprintable():
        return False
    return path.startswith("/") or _REPOSITORY.fullmatch(path) is not None


def _base_models(draft: _Draft) -> dict[str, str]:
    """The declared base models' names; replicas may share one."""
    bases = [(entry.get("base_model"), key) for key, entry in draft.mappings(("upstreams", "*"))]
    return {
        base: f"the base model of {_dotted(key)}"
        for base, key in reversed(bases)
        if isinstance(base, str)
    }


def _claim(draft: _Draft, taken: dict[str, str], key: Key, name: str) -> None:
    if name in taken:
        draft.fault(key, f"'{name}' is already {taken[name]}; choose another name")
    else:
        taken[name] = _dotted(key)


def _json_fields(draft: _Draft, key: Key, fields: dict[Any, Any]) -> dict[str, object]:
    """Request fields as JSON has them: {50256: -100} gets a text key, a date is refused."""
    for name in ("model", "stream"):
        if name in fields:
            draft.fault((*key, name), "is for the client to say; leave it out")
    try:
        return dict(json.loads(json.dumps(fields, allow_nan=False)))
    except (TypeError, ValueError, RecursionError):
        draft.fault(key, "must hold what JSON can say; put dates in quotes, no .nan or .inf")
        return {}


def _judge_default_model(draft: _Draft, taken: Mapping[str, str]) -> None:
    """Refuses a name that nothing answers to, once every base model's name is known."""
    default = draft.tree.get("default_model")
    upstreams = draft.mappings(("upstreams", "*"))
    declared = all(isinstance(entry.get("base_model"), str) for _, entry in upstreams)
    if isinstance(default, str) and declared and default not in taken:
        hint = _nearest(default, taken) or "name an adapter, an alias or a base_model"
        draft.fault(("default_model",), f"no adapter, alias or base model has this name; {hint}")


# --- 4. types and ranges --------------------------------------------------------------------

_SETTINGS = TypeAdapter(Settings)
_MAPPING = "must be a mapping of keys to values"
_WORDS = {
    "missing": "is required; add it",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be 1 to 100 letters, digits and . _ - : [ ]",
    "string_type": "must be text; put the value in quotes",
    "tuple_type": "must be a list",
    "dict_type": _MAPPING,
    "mapping_type": _MAPPING,
    "dataclass_type": _MAPPING,
}


def _build(draft: _Draft) -> Settings | None:
    """The settings, or None and the reasons in the draft."""
    try:
        return _SETTINGS.validate_python(draft.tree)
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_input=False):
            draft.fault(fault["loc"], _words(fault))
        return None


def _words(fault: ErrorDetails) -> str:
    """A finding of pydantic's as this project says it: what the value must be."""
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    return _WORDS.get(fault["type"], re.sub(r"^(Input|String) should", "must", fault["msg"]))
