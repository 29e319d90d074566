"""What goes wrong in a run, and the plans of a whole suite."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass

# kind of trial -> the calls at which it makes sense
KILLS = {"kill": None, "kill-after": None, "torn": ("write",)}
ERRORS = {
    "enospc": ("open", "write", "fsync", "rename", "symlink", "link", "mkdir"),
    "eio": ("open", "write", "fsync", "rename", "unlink", "symlink", "link", "mkdir", "truncate"),
    "erofs": ("open", "write", "rename", "unlink", "symlink", "link", "mkdir", "truncate"),
    "short": ("write",),
}
SIGNALS = ("SIGKILL", "SIGINT", "SIGTERM")  # at any moment
HOURS = (3600.0, -3600.0, -10 * 365 * 86400.0)
FOREVER = 0


@dataclass(frozen=True)
class Plan:
    """One fault. at: the number of the call; or a signal after so many seconds."""

    do: str = ""
    at: int = 0
    count: int = 1  # calls that an error lasts; FOREVER
    clock: float = 0.0
    seconds: float | None = None

    @property
    def kills(self) -> bool:
        return self.do in KILLS or self.do == "SIGKILL"

    def changed(self) -> dict[str, object]:
        """What differs from no fault, as it is reported."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v != getattr(NONE, k)}


NONE = Plan()


@dataclass(frozen=True)
class Event:
    """A call of a run in which nothing goes wrong."""

    number: int
    kind: str
    path: str


def _single(events: list[Event], duration: float, random: random.Random) -> dict[str, list[Plan]]:
    """Every plan by the kind of its fault, in an order that mixes the calls."""
    plans = {do: [Plan(do, e.number) for e in events if kinds is None or e.kind in kinds]
             for do, kinds in KILLS.items()}  # fmt: skip
    for do, kinds in ERRORS.items():
        at = [e.number for e in events if e.kind in kinds]
        plans[do] = [Plan(do, n, random.choice((1, 2, 10, FOREVER)) if do != "erofs" else FOREVER) for n in at]
    plans["clock"] = [Plan("clock", e.number, clock=random.choice(HOURS)) for e in events]
    for signal in SIGNALS:
        plans[signal] = [Plan(signal, seconds=random.random() * duration) for _ in events]
    for several in plans.values():
        random.shuffle(several)
    return plans


def suite(events: list[Event], duration: float, tries: int, seed: int) -> Iterator[list[Plan]]:
    """`tries` lists of plans, for a run and its resumptions, the kinds of fault in turn; half of them are kills.

    Each call has its turn with each kind before one has its second.
    """
    chance = random.Random(seed)
    plans = _single(events, duration, chance)
    kills = [do for do in plans if do in KILLS or do == "SIGKILL"]
    others = [do for do in plans if do not in kills]
    for i in range(tries):
        among = kills if i % 2 == 0 else others
        of_kind = plans[among[i // 2 % len(among)]]
        first = of_kind[i // 2 // len(among) % len(of_kind)]
        chosen = [first]
        while chance.random() < 0.25:  # the resumed run is faulted too
            again = chance.choice(plans[chance.choice(list(plans))])
            chosen.append(dataclasses.replace(again, at=again.at and chance.randint(1, len(events))))
        yield chosen
