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
        base: The base model that it belongs to, or one of that model's `base_aliases`; None
            for what adapter_config.json says.
        pin: Never evicted, and loaded ahead on every upstream that it fits.
        replicas: Loaded ahead on so many upstreams; None is all of them for what is pinned,
            and none for anything else.
    """

    name: str
    path: str
    revision: str | None = None
    aliases: tuple[str, ...] = ()
    defaults: Mapping[str, object] = field(default_factory=lambda: EMPTY, hash=False)
    overrides: Mapping[str, object] = field(default_factory=lambda: EMPTY, hash=False)
    hidden: bool = False
    base: str | None = None
    pin: bool = False
    replicas: int | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """A public name that leads to one of several adapters or base models.

    Attributes:
        name: The public name.
        split: Where it leads, with weights above 0: names of adapters, aliases and base
            models, never of routes. At least one; the order decides which keys move when
            weights do.
        sticky: What keeps its target from one request to the next: "user" for the request's
            field of that name, else a header's name in lower case; None for nothing.
        fallback: Tried in this order where the target is unavailable.
        mirror: Gets a copy of a sample of the requests; its answers are dropped.
        sample: The share of requests that are mirrored, from 0 to 1.
        hidden: Not listed by `GET /v1/models`; reachable all the same.
    """

    name: str
    split: tuple[tuple[str, float], ...]
    sticky: str | None = None
    fallback: tuple[str, ...] = ()
    mirror: str | None = None
    sample: float = 0.0
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
        fingerprint: The state of the files that the content was read from; None where the
            proxy cannot see them, and so would not notice a change.
        declared: The operator's `revision`, for such a path.
    """

    adapter: str
    served: str
    path: str
    fingerprint: object = field(default=None, compare=False)
    declared: str | None = field(default=None, compare=False)


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
