"""The frozen values that every layer speaks in.

Owns no behaviour beyond what follows from a value alone. The words are those of
README.md ("Words"): public name, adapter, served name, upstream, resident, lease.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

EMPTY: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Adapter:
    """A registry entry: what the operator wants clients to reach under `name`.

    Attributes:
        name: The public name; also the stem of the served name.
        path: The adapter's location *as vLLM sees it*, passed on verbatim as `lora_path`.
        revision: What the operator says identifies the content, for a path whose files
            the proxy cannot read. Ignored where they can be read.
        aliases: Further public names.
        defaults: Top-level request fields filled in where the client is silent.
        overrides: Top-level request fields set whatever the client says.
        hidden: Not listed by `GET /v1/models`; reachable all the same.
    """

    name: str
    path: str
    revision: str | None = None
    aliases: tuple[str, ...] = ()
    defaults: Mapping[str, object] = field(default_factory=lambda: EMPTY, hash=False)
    overrides: Mapping[str, object] = field(default_factory=lambda: EMPTY, hash=False)
    hidden: bool = False


_SERVED = re.compile(r".+@[0-9a-f]{8}\Z", re.DOTALL)


def served_name(adapter: str, revision: str) -> str:
    """The served name of an adapter's content: `NAME@REV`, REV being 8 hex digits."""
    return f"{adapter}@{revision}"


def is_served_name(name: str) -> bool:
    """Whether some proxy of ours gave this name to a vLLM server."""
    return _SERVED.match(name) is not None


@dataclass(frozen=True, slots=True)
class Module:
    """One content of one adapter: what a vLLM server is asked to load.

    Attributes:
        adapter: The public adapter this content belongs to.
        served: The served name, `NAME@REV`; never given to other weights.
        path: Sent as `lora_path`, and compared with `root` in `/v1/models`.
        watched: The proxy can see the files, so that changed content is a new served name.
    """

    adapter: str
    served: str
    path: str
    watched: bool = True


@dataclass(frozen=True, slots=True)
class Card:
    """One entry of an upstream's `/v1/models`.

    Attributes:
        id: The name that a request's `model` must equal.
        root: The model folder or the adapter path behind it.
        parent: The base model's id for a LoRA module, None for a base model.
        max_model_len: Context length in tokens; vLLM gives it for base models only.
    """

    id: str
    root: str | None
    parent: str | None
    max_model_len: int | None = None


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model that some upstream serves under `name`."""

    name: str
    max_model_len: int | None = None


Headers = list[tuple[bytes, bytes]]
"""Header fields as they stand on the wire: order kept, names in any case."""
