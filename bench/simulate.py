"""Compares the routing policies on a large fleet, in virtual time: `python bench/simulate.py`.

Runs one scenario under each policy and prints what became of the requests, phase by phase.
`--write` puts the same table into SIMULATION.md, which explains it. The same seed gives the
same numbers on every machine. Standard library and the proxy's pure modules only.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from virtual import Tally, VirtualFleet
from workload import REPORTED, Scenario, phases, shared_cache

from lora_proxy.routing import POLICIES, Spill

PAGE = Path(__file__).resolve().parent / "SIMULATION.md"
BEGIN, END = "<!-- simulate.py: begin -->", "<!-- simulate.py: end -->"

HEADINGS = (
    "policy",
    "loads/1k",
    "p50 s",
    "p99 s",
    "max/mean",
    "spill/1k",
    "retry/1k",
    "back %",
    "failed",
)

Results = Mapping[str, Mapping[str, Tally]]
"""Policy -> phase -> what became of its requests."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the simulation as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(description="the routing policies on a simulated fleet")
    default = Scenario()
    parser.add_argument("--requests", type=int, default=default.requests, help="per policy")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument(
        "--policy", action="append", choices=POLICIES, help="only this one; may be repeated"
    )
    parser.add_argument("--spill-factor", type=float, default=Spill().factor)
    parser.add_argument("--spill-floor", type=int, default=Spill().floor)
    parser.add_argument("--write", action="store_true", help=f"update the table in {PAGE.name}")
    given = parser.parse_args(arguments)
    scenario = replace(default, requests=given.requests, seed=given.seed)
    spill = Spill(given.spill_factor, given.spill_floor)
    try:
        phases(scenario)
    except ValueError as error:
        parser.error(str(error))
    results: dict[str, Mapping[str, Tally]] = {}
    for policy in given.policy or POLICIES:
        print(f"{policy} …", file=sys.stderr, flush=True)
        results[policy] = VirtualFleet(scenario, POLICIES[policy], spill).run()
    ideal = shared_cache(scenario)
    print("\n".join(terminal(scenario, spill, results, ideal)))
    if given.write:
        page = PAGE.read_text("utf-8")
        table = "\n".join(markdown(scenario, spill, results, ideal))
        PAGE.write_text(replaced(page, table), "utf-8")
    return 0


def described(scenario: Scenario, spill: Spill) -> list[str]:
    """The scenario in words, each line below 80 columns."""
    return [
        (
            f"{scenario.upstreams} upstreams, each with {scenario.slots} adapter slots; "
            f"{scenario.batch} requests computed at once"
        ),
        (
            f"{scenario.adapters:,} adapters, Zipf({scenario.exponent:g}); "
            f"a load takes {scenario.load_least:g} to {scenario.load_most:g} s"
        ),
        (
            f"{scenario.requests:,} requests per policy, Poisson, {scenario.rate:.0f} per second "
            f"({scenario.utilisation:.0%} of capacity)"
        ),
        (
            f"service lognormal, mean {scenario.service:g} s, sigma {scenario.sigma:g}; "
            f"{scenario.conversations} conversations per adapter"
        ),
        (
            f"flash crowd: adapter {scenario.crowd_rank} gets {scenario.crowd_share:.0%} of the "
            f"requests for {scenario.crowd_time:g} s"
        ),
        (
            f"restarts: each upstream is gone for {scenario.downtime:g} s, "
            f"{scenario.down_at_once} at any time, and comes back empty"
        ),
        f"spill factor {spill.factor:g}, spill floor {spill.floor}, seed {scenario.seed}",
    ]


def row(policy: str, tally: Tally) -> list[str]:
    """One policy in one phase, under `HEADINGS`."""
    return [
        policy,
        f"{tally.per_thousand(tally.loads):.0f}",
        f"{tally.wait(0.5):.2f}",
        f"{tally.wait(0.99):.2f}",
        f"{tally.imbalance:.2f}",
        f"{tally.per_thousand(tally.spilled):.1f}",
        f"{tally.per_thousand(tally.retries):.1f}",
        f"{100 * tally.came_back:.0f}",
        f"{tally.failed}",
    ]


def terminal(
    scenario: Scenario, spill: Spill, results: Results, ideal: Mapping[str, float]
) -> Iterator[str]:
    """The report for a terminal of 80 columns."""
    yield from described(scenario, spill)
    widths = [max(len(policy) for policy in POLICIES), *(len(name) for name in HEADINGS[1:])]
    for phase in REPORTED:
        yield ""
        yield f"{phase} (one cache of all slots: {ideal[phase]:.0f} loads/1k)"
        for cells in (HEADINGS, *(row(policy, found[phase]) for policy, found in results.items())):
            first, *others = cells
            numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            yield " ".join((first.ljust(widths[0]), *numbers))


def markdown(
    scenario: Scenario, spill: Spill, results: Results, ideal: Mapping[str, float]
) -> Iterator[str]:
    """The report for SIMULATION.md."""
    yield from (f"- {line}" for line in described(scenario, spill))
    for phase in REPORTED:
        yield ""
        yield f"**{phase.capitalize()}** (one cache of all slots: {ideal[phase]:.0f} loads/1k)"
        yield ""
        yield f"| {' | '.join(HEADINGS)} |"
        yield "|---" + "|---:" * (len(HEADINGS) - 1) + "|"
        for policy, found in results.items():
            yield f"| {' | '.join(row(policy, found[phase]))} |"


def replaced(page: str, table: str) -> str:
    """The page with another table between its marks.

    Raises:
        ValueError: If it has no marks.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} … {END}")
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"


if __name__ == "__main__":
    sys.exit(main())
