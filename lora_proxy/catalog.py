"""Public name -> adapter, base model or route: one immutable snapshot, swapped whole.

Owns what a client's `model` means, where a route leads, and what `GET /v1/models` shows.
Refuses to know which upstream holds what: an adapter is the same whether or not anybody has
loaded it yet. Chance comes from outside, as a number. Base models are part of a snapshot
because they are names too, but they are learned from the upstreams, later than the adapters
and again and again: `with_bases` makes the next snapshot.
"""

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from heapq import nsmallest

from lora_proxy.errors import ProxyError
from lora_proxy.types import Adapter, BaseModel, Route

Servable = Adapter | BaseModel
"""What an upstream can be asked for."""

Target = Servable | Route
"""What a public name stands for."""

NEIGHBOURS = 8
"""How many names on each side, in each of two orders, a misspelt one is compared with."""

NAME_SHOWN = 80
"""How many characters of a name an error message, or a comparison, goes into."""

ALIKE = 0.5
"""The likeness from which a name is worth suggesting."""

OWNER = "lora-proxy"


class Catalog:
    """Every public name and what it stands for. Immutable; made by `build`.

    A name that is an adapter's or a route's and a base model's at once resolves to neither,
    and is not listed: which of the two a client meant cannot be told.
    """

    __slots__ = (
        "_adapters",
        "_bases",
        "_by_name",
        "_conflicts",
        "_default",
        "_named",
        "_nearest",
        "_routes",
        "_targets",
    )

    def __init__(
        self,
        adapters: tuple[Adapter, ...],
        routes: tuple[Route, ...],
        bases: Mapping[str, BaseModel],
        default_model: str | None,
    ) -> None:
        named = _named(adapters, routes)
        self._adapters = adapters
        self._routes = routes
        self._bases = bases
        self._default = default_model
        self._by_name = {adapter.name: adapter for adapter in adapters}
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
        routes: Iterable[Route] = (),
    ) -> "Catalog":
        """Make a snapshot.

        Args:
            adapters: In the order in which they are to be listed.
            bases: As the upstreams report them; the same one may come from several.
            default_model: The public name that stands for every missing or unknown one.
            routes: In the order in which they are to be listed.

        Raises:
            ValueError: If two adapters, or an adapter and a route, claim one public name.
        """
        return cls(tuple(adapters), tuple(routes), _merged(bases), default_model)

    def with_bases(self, bases: Iterable[BaseModel]) -> "Catalog":
        """Return the snapshot with these base models; itself if nothing changes."""
        merged = _merged(bases)
        if merged == self._bases:
            return self
        return Catalog(self._adapters, self._routes, merged, self._default)

    def with_adapters(self, adapters: Iterable[Adapter]) -> "Catalog":
        """Return the snapshot with these adapters in place of the present ones.

        Raises:
            ValueError: As `build`.
        """
        return Catalog(tuple(adapters), self._routes, self._bases, self._default)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Every adapter, hidden ones too, in the order given."""
        return self._adapters

    @property
    def bases(self) -> tuple[BaseModel, ...]:
        """Every base model known, one for each name."""
        return tuple(self._bases.values())

    def adapter(self, name: str) -> Adapter | None:
        """Return the adapter of exactly this name, whatever else has it; an alias is none."""
        return self._by_name.get(name)

    def resolve(self, model: str | None) -> Target:
        """Return what a request's `model` stands for.

        1. It is an adapter's name, an alias, a route's or a base model's name: that.
        2. It is one of these and a base model's at once: name_conflict.
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

    def pick(self, route: Route, key: bytes | None, draw: float) -> list[Servable]:
        """Return what to try for one request to a route, in this order.

        The split's choice comes first, then the fallbacks, each once. A name that stands
        for nothing now is left out: a base model's, while no upstream serves it.

        Args:
            route: One that `resolve` returned.
            key: What is to keep its choice, such as a user's name; None for no such thing.
                Alike in every process, and with other weights only keys at the borders of
                the intervals move.
            draw: Chance, from 0 to less than 1; decides where there is no key.

        Raises:
            ProxyError: `name_conflict` or `no_upstream`, if nothing is left to try.
        """
        names = [_chosen(route.split, draw if key is None else _point(route, key))]
        names += route.fallback
        found: dict[str, Servable] = {}
        for name in names:
            target = self._servable(name)
            if target is not None:
                found.setdefault(target.name, target)
        if not found:
            raise self._leads_nowhere(route, names)
        return list(found.values())

    def mirror_of(self, route: Route, draw: float) -> Servable | None:
        """Return what gets a copy of one request to a route; None if nothing does.

        Args:
            route: One that `resolve` returned.
            draw: Chance, from 0 to less than 1; another one than `pick` has.
        """
        if route.mirror is None or draw >= route.sample:
            return None
        return self._servable(route.mirror)

    def _servable(self, name: str) -> Servable | None:
        """Return what a name in a route stands for: no other route, so that none is circular."""
        target = self._targets.get(name)
        return None if isinstance(target, Route) else target

    def _leads_nowhere(self, route: Route, names: list[str]) -> ProxyError:
        for name in names:
            if name in self._conflicts:
                return ProxyError("name_conflict", self._conflicts[name], param="model")
        what = ", ".join(map(_shown, names))
        return ProxyError(
            "no_upstream",
            f"route {_shown(route.name)} leads to {what}, which no upstream serves at the "
            "moment; check that they run, or give the route a fallback",
            retry_after=1.0,
        )

    def conflicts(self) -> list[str]:
        """Return one line for every name that has one meaning here and is a base model's, too."""
        return list(self._conflicts.values())

    def listing(self, created: int) -> list[dict[str, object]]:
        """Return the entries of `GET /v1/models`: base models, adapters, aliases, routes.

        Base models come first, as with vLLM: clients that take the first entry for the
        server's model go on working.

        Args:
            created: Unix seconds, the same for every entry.
        """
        shown = [adapter for adapter in self._adapters if not adapter.hidden]
        names = [*self._bases, *(name for a in shown for name in (a.name, *a.aliases))]
        names += [route.name for route in self._routes if not route.hidden]
        return [
            self._entry(name, self._targets[name], created)
            for name in names
            if name in self._targets
        ]

    def entry(self, name: str, created: int) -> dict[str, object] | None:
        """Return the entry of one public name, of a hidden one too; None if unknown."""
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
        base = target if isinstance(target, BaseModel) else self._base_under(target)
        if base is not None and base is not target:
            entry["parent"] = base.name
        if base is not None and base.max_model_len is not None:
            entry["max_model_len"] = base.max_model_len
        return entry

    def _base_under(self, target: Adapter | Route) -> BaseModel | None:
        """Return the base model that is declared, or the only one there is."""
        declared = target.base if isinstance(target, Adapter) else None
        if declared is not None and declared in self._bases:
            return self._bases[declared]
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
            what = f"default_model {_shown(model)} is no adapter, route or base model"
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


def _named(adapters: Iterable[Adapter], routes: Iterable[Route]) -> dict[str, Adapter | Route]:
    """Return what every public name but the base models' stands for.

    Raises:
        ValueError: If a name stands for two things.
    """
    claims: list[tuple[str, Adapter | Route]] = [
        (name, adapter) for adapter in adapters for name in (adapter.name, *adapter.aliases)
    ]
    claims += [(route.name, route) for route in routes]
    named: dict[str, Adapter | Route] = {}
    for name, target in claims:
        if name in named:
            raise ValueError(f"two adapters or routes claim the public name {_shown(name)}")
        named[name] = target
    return named


def _conflict(name: str, target: Adapter | Route) -> str:
    if isinstance(target, Route):
        what, fix = f"route {_shown(name)} has", "rename the route"
    elif name == target.name:
        what, fix = f"adapter {_shown(name)} has", "rename the adapter"
    else:
        what, fix = f"adapter {_shown(target.name)} has, as an alias,", "remove the alias"
    return (
        f"{what} the name of base model {_shown(name)}; {fix}, "
        "or start vLLM with another --served-model-name"
    )


def _chosen(split: tuple[tuple[str, float], ...], point: float) -> str:
    """Return the name on whose interval of [0, 1) a point lies, the intervals in order."""
    at = sum(weight for _, weight in split) * point
    end = 0.0
    for name, weight in split:
        end += weight
        if at < end:
            return name
    return split[-1][0]  # rounding only


def _point(route: Route, key: bytes) -> float:
    """Return where in [0, 1) a key lies, alike in every process; other routes differ."""
    # The name's length keeps two pairs from making the same bytes.
    name = route.name.encode()
    digest = hashlib.blake2b(b"%d:%b%b" % (len(name), name, key), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / (1 << 53)  # as many bits as a float has: never 1.0


def _shown(name: str) -> str:
    """Quote a name for a message: bounded, and with nothing in it that a terminal obeys."""
    return repr(name if len(name) <= NAME_SHOWN else name[:NAME_SHOWN] + "…")
