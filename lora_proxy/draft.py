"""A configuration as it was written, before any of it is believed.

Owns the tree of raw values, where each of them came from, what is wrong with it so far, and
how YAML text becomes such a tree. Refuses to know which keys there are and what they mean, and
who reads the files. No fault of the text quotes the text: it may hold secrets.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, cast

import yaml

Key = tuple[str | int, ...]

_AFTER_FILE = 1 << 30  # sorts a fault of environment or flags behind those of the file's lines


def dotted(key: Key) -> str:
    """('adapters', 1, 'name') as adapters[1].name, always on one line."""
    texts = (part if isinstance(part, int) or part.isprintable() else repr(part) for part in key)
    return "".join(f"[{t}]" if isinstance(t, int) else f".{t}" for t in texts).removeprefix(".")


@dataclass(slots=True)
class Draft:
    """A tree of raw values, where each came from, and what is wrong with them.

    Attributes:
        tree: What was said, to be changed freely.
        origins: For a key, its rank among the faults and the words that say where it stands.
        faults: Rank and line each; `report` orders them.
    """

    tree: dict[Any, Any] = dataclasses.field(default_factory=dict)
    origins: dict[Key, tuple[int, str]] = dataclasses.field(default_factory=dict)
    faults: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    def fault(self, key: Key, text: str) -> None:
        """Notes one fault, with the origin of the key or of what it stands in."""
        known = (self.origins.get(key[:length]) for length in range(len(key), 0, -1))
        rank, where = next(filter(None, known), (_AFTER_FILE, ""))
        line = f"{dotted(key)}: {text}"
        self.faults.append((rank, f"{line} ({where})" if where else line))

    def fault_elsewhere(self, line: str) -> None:
        """Notes one fault of a variable or a flag, as a whole line."""
        self.faults.append((_AFTER_FILE, line))

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
                    self.fault_elsewhere(f"{dotted(key[:depth])}: {text} ({where})")
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
        """The mappings at a section's place; what is no mapping is left to the type check.

        Args:
            section: A key in which `*` stands for every index of a list.
        """
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


class _Loader(yaml.SafeLoader):
    """YAML with JSON's numbers: PyYAML alone reads `1e-2`, without a dot, as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"-?[0-9]+[eE][-+]?[0-9]{1,3}\Z"),
    list("-0123456789"),
)


def parse(draft: Draft, text: bytes, key: Key, file: str) -> object:
    """The value of a YAML text, which stands for a key; None where it holds nothing.

    Args:
        draft: Gets the line of every key, and keys given twice as faults.
        text: JSON is YAML, too.
        key: What the text is the value of; () for a whole configuration.
        file: The file's name, for the faults.

    Raises:
        ValueError: It is no YAML; says where, and does not name the file.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:  # an empty file, or comments only
                return None
            _note_lines(draft, node, key, file, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(_yaml_fault(error)) from None
    except (RecursionError, ValueError):  # nested too deep; 2001-99-99 is no date
        raise ValueError("holds values that YAML cannot build") from None


def _note_lines(draft: Draft, node: yaml.Node, key: Key, file: str, seen: set[int]) -> None:
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
