"""Public name -> adapter or base model: one immutable snapshot, swapped whole.

Owns what a client's `model` means and what `GET /v1/models` shows. Refuses to know which
upstream holds what: an adapter is the same whether or not anybody has loaded it yet. Base
models are part of a snapshot because they are names too, but they are learned from the
upstreams, later than the adapters and again and again: `with_bases` makes the next snapshot.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from heapq import nsmallest

from lora_proxy.errors import ProxyError
from lora_proxy.types import Adapter, BaseModel

Target = Adapter | BaseModel

NEIGHBOURS = 8
"""How many names on each side, in each of two orders, a misspelt one is compared with."""

NAME_SHOWN = 80
"""How many characters of a name an error message, or a comparison, goes into."""

ALIKE = 0.5
"""The likeness from which a name is worth suggesting."""

OWNER = "lora-proxy"


class Catalog:
    """Every public name and what it stands for. Immutable; made by `build`.

    A name that is an adapter's and a base model's at once resolves to neither, and is not
    listed: which of the two a client meant cannot be told.
    """

    __slots__ = ("_adapters", "_bases", "_conflicts", "_default", "_named", "_nearest", "_targets")

    def __init__(
        self,
        adapters: tuple[Adapter, ...],
        named: Mapping[str, Adapter],
        bases: Mapping[str, BaseModel],
        default_model: str | None,
    ) -> None:
        self._adapters = adapters
        self._named = named  # adapter names and aliases, shared between snapshots
        self._bases = bases
        self._default = default_model
        self._conflicts = {name: _conflict(name, named[name]) for name in bases if name in named}
        # None is never a key; allowing it makes a missing `model` the same look-up.
        self._targets: dict[str | None, Target] = {}
        self._targets.update((name, named[name]) for name in named if name not in bases)
        self._targets.update((name, bases[name]) for name in bases if name not in named)
        self._nearest = _Nearest(
            name
            for name in [*named, *bases]
            if name not in self._conflicts and not (name in named and named[name].hidden)
        )

    @classmethod
    def build(
        cls,
        adapters: Iterable[Adapter],
        bases: Iterable[BaseModel] = (),
        default_model: str | None = None,
    ) -> "Catalog":
        """Make a snapshot.

        Args:
            adapters: In the order in which they are to be listed.
            bases: As the upstreams report them; the same one may come from several.
            default_model: The public name that stands for every missing or unknown one.

        Raises:
            ValueError: If two adapters claim one public name.
        """
        adapters = tuple(adapters)
        named: dict[str, Adapter] = {}
        for adapter in adapters:
            for name in (adapter.name, *adapter.aliases):
                if name in named:
                    raise ValueError(f"two adapters claim the public name {_shown(name)}")
                named[name] = adapter
        return cls(adapters, named, _merged(bases), default_model)

    def with_bases(self, bases: Iterable[BaseModel]) -> "Catalog":
        """Return the snapshot with these base models; itself if nothing changes."""
        merged = _merged(bases)
        if merged == self._bases:
            return self
        return Catalog(self._adapters, self._named, merged, self._default)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Every adapter, hidden ones too, in the order given."""
        return self._adapters

    @property
    def bases(self) -> tuple[BaseModel, ...]:
        """Every base model known, one for each name."""
        return tuple(self._bases.values())

    def resolve(self, model: str | None) -> Target:
        """Return what a request's `model` stands for.

        1. It is an adapter's name, an alias or a base model's name: that.
        2. It is both an adapter's and a base model's: name_conflict.
        3. `default_model` is set: what that stands for.
        4. It is missing or empty: the first base model.
        5. It is unknown: model_not_found; no_upstream while it may yet be a base model's.

        Raises:
            ProxyError: `name_conflict`; `model_not_found`, also where `default_model`
                itself stands for nothing; `no_upstream`, if only a base model would do
                and no upstream has named one yet.
        """
        # 1. The hot path: one look-up.
        target = self._targets.get(model)
        if target is not None:
            return target
        # 2.
        if model in self._conflicts:
            raise ProxyError("name_conflict", self._conflicts[model], param="model")
        # 3.
        if self._default is not None and model != self._default:
            return self.resolve(self._default)
        # 4.
        if not model:
            return self._first_base()
        # 5.
        raise self.unknown(model)

    def conflicts(self) -> list[str]:
        """Return one line for every name that is an adapter's and a base model's at once."""
        return list(self._conflicts.values())

    def listing(self, created: int) -> list[dict[str, object]]:
        """Return the entries of `GET /v1/models`: base models, adapters, aliases.

        Base models come first, as with vLLM: clients that take the first entry for the
        server's model go on working.

        Args:
            created: Unix seconds, the same for every entry.
        """
        shown = [adapter for adapter in self._adapters if not adapter.hidden]
        names = [*self._bases, *(name for a in shown for name in (a.name, *a.aliases))]
        return [
            self._entry(name, self._targets[name], created)
            for name in names
            if name in self._targets
        ]

    def entry(self, name: str, created: int) -> dict[str, object] | None:
        """Return the entry of one public name, of a hidden adapter too; None if unknown."""
        target = self._targets.get(name)
        return None if target is None else self._entry(name, target, created)

    def _entry(self, name: str, target: Target, created: int) -> dict[str, object]:
        """Write one name in OpenAI's shape, with vLLM's additions but no file's path."""
        entry: dict[str, object] = {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": OWNER,
            "root": target.name,
            "parent": None,
        }
        base = target if isinstance(target, BaseModel) else self._sole_base()
        if base is not None and base is not target:
            entry["parent"] = base.name
        if base is not None and base.max_model_len is not None:
            entry["max_model_len"] = base.max_model_len
        return entry

    def _sole_base(self) -> BaseModel | None:
        """Return the base model under every adapter, where there is no choice."""
        return next(iter(self._bases.values())) if len(self._bases) == 1 else None

    def _first_base(self) -> BaseModel:
        for base in self._bases.values():
            return base
        raise ProxyError(
            "no_upstream",
            "the request names no model, and no upstream has named its base model yet; "
            "name an adapter, or check that the upstreams run",
        )

    def unknown(self, model: str) -> ProxyError:
        """The error for a name that stands for nothing; it names the closest that do."""
        what = f"model {_shown(model)} is not known"
        if model == self._default:
            what = f"default_model {_shown(model)} is neither an adapter nor a base model"
        if not self._bases:  # it may be one: worth another try, unlike a 404
            return ProxyError(
                "no_upstream",
                f"{what}; no upstream has named its base model yet: check that they run",
                retry_after=1.0,
            )
        near = ", ".join(map(_shown, self._nearest.to(model)))
        closest = f"; closest: {near}" if near else ""
        return ProxyError(
            "model_not_found", f"{what}{closest}; every name: GET /v1/models", param="model"
        )


class _Nearest:
    """The names that look most like a given one, at a price that a client cannot drive up.

    Comparing with all of 10,000 names would let one bad request hold up every other, and
    so would difflib, which takes 50 ms for some pairs of 80 characters. But a misspelt name
    agrees with the right one before the slip or after it, so it stands beside it in the
    alphabet, or in the alphabet of the names read backwards: two searches by halves, and
    a handful of comparisons in linear time.
    """

    __slots__ = ("_backward", "_forward")

    def __init__(self, names: Iterable[str]) -> None:
        folded = [(name[:NAME_SHOWN].casefold(), name) for name in names]
        self._forward = sorted(folded)
        self._backward = sorted((key[::-1], name) for key, name in folded)

    def to(self, model: str) -> list[str]:
        """Return up to three names, the closest first."""
        key = model[:NAME_SHOWN].casefold()
        near = self.candidates(key).items()
        scored = [(-_likeness(key, folded), name) for name, folded in near]
        return [name for score, name in nsmallest(3, scored) if -score >= ALIKE]

    def candidates(self, key: str) -> dict[str, str]:
        """Return the names worth a comparison with a folded one, each with its folded form."""
        near = {name: folded for folded, name in _around(self._forward, key)}
        near.update((name, back[::-1]) for back, name in _around(self._backward, key[::-1]))
        return near


def _likeness(a: str, b: str) -> float:
    """Rate two names from 0 to 1: how far their ends agree, and how many letters they share."""
    ends = min(_agreement(a, b) + _agreement(a[::-1], b[::-1]), len(a), len(b))
    letters = (Counter(a) & Counter(b)).total()
    return (ends + letters) / (2 * max(len(a), len(b), 1))


def _agreement(a: str, b: str) -> int:
    """Count the characters from the start in which two strings agree."""
    for at, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return at
    return min(len(a), len(b))


def _around(ordered: list[tuple[str, str]], key: str) -> list[tuple[str, str]]:
    """Return the neighbours on both sides of where `key` would stand."""
    at = bisect_left(ordered, (key, ""))
    return ordered[max(0, at - NEIGHBOURS) : at + NEIGHBOURS]


def _merged(bases: Iterable[BaseModel]) -> dict[str, BaseModel]:
    """Return one base model for each name, promising the context that all its servers have."""
    merged: dict[str, BaseModel] = {}
    for base in bases:
        known = merged.setdefault(base.name, base)
        lengths = [b.max_model_len for b in (known, base) if b.max_model_len is not None]
        merged[base.name] = replace(known, max_model_len=min(lengths, default=None))
    return merged


def _conflict(name: str, adapter: Adapter) -> str:
    if name == adapter.name:
        what, fix = f"adapter {_shown(name)} has", "rename the adapter"
    else:
        what, fix = f"adapter {_shown(adapter.name)} has, as an alias,", "remove the alias"
    return (
        f"{what} the name of base model {_shown(name)}; {fix}, "
        "or start vLLM with another --served-model-name"
    )


def _shown(name: str) -> str:
    """Quote a name for a message: bounded, and with nothing in it that a terminal obeys."""
    return repr(name if len(name) <= NAME_SHOWN else name[:NAME_SHOWN] + "…")
