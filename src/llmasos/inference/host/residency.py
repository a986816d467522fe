"""Which models are resident where: the policy, without clock, files or torch.

A *replica* is one process of a model. It holds its memory from the moment that its load is decided until its process is
known to be gone; what is held never exceeds the budgets. Who wants a model waits in one line, first come first served.
Room is made by evicting the replicas whose reloading would cost least: seconds to load x recent uses, each use counting
half after ten minutes. Pinned, busy and loading ones are never evicted. If only busy ones could make room, they
*drain*: they take no new request, and go when their last one has ended; so nobody waits for ever, however busy others
are.

The caller passes the time (seconds on any one clock) and the budgets into `step`, and carries out what it answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count
from typing import Literal

from llmasos.errors import InsufficientMemoryError

HALF_LIFE = 600.0
"""Seconds after which a use counts half."""
LEAST_STAY = 5.0
"""Seconds that a busy model runs before it drains for another one; as long as it took to load, if that is more."""
_SEARCHED = 20_000
"""Sets of models that are looked at for one decision; beyond, the best so far is taken."""

Bytes = Mapping[str, int]
"""By device."""
Reason = Literal["room", "idle", "unloaded"]
"""Why a replica is stopped: another model needs its room, nobody used it for its keep-alive, somebody said so."""


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"


@dataclass(frozen=True)
class Place:
    """Where a model could run and what it takes there: `fixed` bytes by device, and on each of `paged` between
    `least_pages` and `most_pages` bytes of keys and values. `context`: the tokens that the least pages hold."""

    device: str
    fixed: Bytes
    paged: tuple[str, ...] = ()
    least_pages: int = 0
    most_pages: int = 0
    context: int = 0

    def bytes(self, pages: int) -> dict[str, int]:
        return {
            device: self.fixed.get(device, 0) + (pages if device in self.paged else 0)
            for device in {*self.fixed, *self.paged}
        }

    @property
    def least(self) -> dict[str, int]:
        return self.bytes(self.least_pages)


@dataclass(eq=False)
class Replica:
    id: int
    model: str
    device: str
    memory: dict[str, int]
    """Held, by device."""
    pages: int
    """Bytes of keys and values on each device that has some."""
    load_seconds: float
    state: State = State.LOADING
    ready_at: float = math.inf
    busy: int = 0
    """Leases."""
    pinned: bool = False
    draining: bool = False
    """It takes no new lease: when the last one ends it makes room for another model."""
    expires_at: float = math.inf
    uses: float = 0.0
    used_at: float = 0.0

    def recent_uses(self, now: float) -> float:
        return self.uses * math.exp2(-max(0.0, now - self.used_at) / HALF_LIFE)

    def use(self, now: float) -> None:
        self.uses, self.used_at = self.recent_uses(now) + 1.0, now

    def cost(self, now: float) -> float:
        """What evicting it is expected to cost."""
        return self.load_seconds * self.recent_uses(now)

    @property
    def stays_until(self) -> float:
        return self.ready_at + max(LEAST_STAY, self.load_seconds)


@dataclass(eq=False)
class Want:
    """One replica that somebody waits for. One that is not `urgent` takes free room only."""

    model: str
    places: Sequence[Place]
    load_seconds: float
    pinned: bool
    urgent: bool
    plan: Plan | None = None


@dataclass(frozen=True)
class Plan:
    place: Place
    victims: frozenset[int]


@dataclass(frozen=True)
class Load:
    replica: Replica
    place: Place


@dataclass(frozen=True)
class Stop:
    replica: Replica
    reason: Reason
    wanted_by: str | None = None
    """The model that needs the room."""


@dataclass(frozen=True)
class Refuse:
    model: str
    error: InsufficientMemoryError


Action = Load | Stop | Refuse


@dataclass
class Residency:
    """The replicas there are and the wants in line.

    `page_share`: the part of the room left on a device that a new model's pages take beyond the least they need.
    """

    page_share: float = 0.5
    replicas: dict[int, Replica] = field(default_factory=dict)
    wants: list[Want] = field(default_factory=list)
    _ids: count[int] = field(default_factory=lambda: count(1))

    # what happened

    def want(
        self,
        model: str,
        places: Sequence[Place],
        *,
        load_seconds: float,
        num_replicas: int = 1,
        urgent: bool = True,
        pinned: bool = False,
    ) -> None:
        """See to it that the model has `num_replicas`. The first counts as `urgent` if that is said, the others take
        what room is free. What is there already, loads or stands in line counts."""
        lined = [want for want in self.wants if want.model == model]
        there = sum(replica.state is not State.STOPPING for replica in self.of(model))
        if urgent and not there and lined:
            lined[0].urgent = True
        for number in range(there + len(lined), num_replicas):
            self.wants.append(Want(model, places, load_seconds, pinned, urgent and number == 0))

    def withdraw(self, model: str) -> None:
        """Nobody waits for the model any more. Loads that were begun go on."""
        self.wants = [want for want in self.wants if want.model != model]

    def ready(self, replica: Replica, now: float, *, load_seconds: float, keep_alive: float) -> None:
        assert replica.state is State.LOADING
        replica.state, replica.ready_at, replica.load_seconds = State.READY, now, load_seconds
        replica.use(now)
        replica.expires_at = now + keep_alive

    def gone(self, replica: Replica) -> None:
        """Its process has ended, in whatever way."""
        self.replicas.pop(replica.id, None)

    def begin(self, replica: Replica, now: float) -> None:
        """A lease begins."""
        assert self.takes(replica)
        replica.busy += 1
        replica.use(now)

    def end(self, replica: Replica, now: float, *, keep_alive: float) -> None:
        """A lease ends; from now on the replica stays `keep_alive` seconds."""
        assert replica.busy > 0
        replica.busy -= 1
        replica.used_at, replica.uses = now, replica.recent_uses(now)
        replica.expires_at = now + keep_alive

    def keep(self, model: str, now: float, keep_alive: float) -> None:
        """Replicas that nobody uses stay as long from now."""
        for replica in self.of(model):
            if replica.state is State.READY and not replica.busy:
                replica.expires_at = now + keep_alive

    def pin(self, model: str, pinned: bool) -> None:
        for replica in self.of(model):
            replica.pinned = pinned
        for want in self.wants:
            if want.model == model:
                want.pinned = pinned

    def stop(self, replica: Replica, reason: Reason, wanted_by: str | None = None) -> Stop:
        replica.state, replica.draining = State.STOPPING, False
        return Stop(replica, reason, wanted_by)

    # what is

    def of(self, model: str) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.model == model]

    def takes(self, replica: Replica) -> bool:
        """Whether a lease may begin on it."""
        return replica.state is State.READY and not replica.draining

    def held(self) -> dict[str, int]:
        return total(replica.memory for replica in self.replicas.values())

    def next_event(self, now: float) -> float | None:
        """When `step` will find something to do though nothing has happened by then."""
        times = [r.expires_at for r in self.replicas.values() if _expires(r)]
        if any(want.urgent for want in self.wants):
            times += [r.stays_until for r in self.replicas.values() if r.state is State.READY and r.stays_until > now]
        found = min(times, default=math.inf)
        return None if found == math.inf else found

    # what to do

    def is_due(self, now: float) -> bool:
        """Whether `step` may find something to do."""
        event = self.next_event(now)
        drains = any(r.draining for r in self.replicas.values())
        return bool(self.wants) or drains or (event is not None and event <= now)

    def step(self, now: float, budgets: Bytes) -> list[Action]:
        """Decide. Replicas of Load actions hold memory from now on; those of Stop actions until `gone`."""
        actions: list[Action] = []
        for replica in self.replicas.values():
            replica.draining = False
            if _expires(replica) and replica.expires_at <= now:
                actions.append(self.stop(replica, "idle"))
        round_ = _Round(self, now, budgets)
        for want in list(self.wants):
            want.plan = round_.plan(want)
            if want.plan is None:
                if not want.urgent:
                    continue
                if (error := round_.impossible(want)) is not None:
                    actions.append(Refuse(want.model, error))
                    self.withdraw(want.model)
                    continue
                break  # what those behind take it could wait for in vain
            for id in want.plan.victims:
                victim = self.replicas[id]
                if victim.busy:
                    victim.draining = True
                elif victim.state is State.READY:
                    actions.append(self.stop(victim, "room", want.model))
            round_.reserve(want.plan)
            begun = self._start(want, want.plan.place, round_)
            actions += [Load(begun, want.plan.place)] if begun is not None else []
        return actions

    def _start(self, want: Want, place: Place, round_: _Round) -> Replica | None:
        """Begin the load if the room is there already, not only promised."""
        held = self.held()
        if not fits(held, place.least, round_.budgets):
            return None
        free = [round_.budgets.get(d, 0) - max(held.get(d, 0) + place.least[d], round_.later[d]) for d in place.paged]
        extra = int(self.page_share * max(0, min(free, default=0)))
        pages = min(place.most_pages, place.least_pages + extra)
        replica = Replica(
            next(self._ids), want.model, place.device, place.bytes(pages), pages, want.load_seconds, pinned=want.pinned
        )
        self.replicas[replica.id] = replica
        self.wants.remove(want)
        for device in place.paged:
            round_.later[device] += pages - place.least_pages
        return replica


class _Round:
    """One pass over the line. `later`: bytes by device that are held when all plans made so far are carried out."""

    def __init__(self, residency: Residency, now: float, budgets: Bytes) -> None:
        self.now, self.budgets = now, budgets
        self.replicas = residency.replicas
        self.staying = {r.id: r for r in self.replicas.values() if r.state is not State.STOPPING}
        self.later = total(r.memory for r in self.staying.values())

    def reserve(self, plan: Plan) -> None:
        for id in plan.victims:
            _add(self.later, self.staying.pop(id).memory, -1)
        _add(self.later, plan.place.least)

    def plan(self, want: Want) -> Plan | None:
        """Free room, else the room of idle replicas, else what was planned before, else the room of busy ones."""
        free = [place for place in want.places if fits(self.later, place.least, self.budgets)]
        if free:
            return Plan(max(free, key=self._room), frozenset())
        if not want.urgent:
            return None
        evictable = [r for r in self.staying.values() if r.state is State.READY and not r.pinned]
        idle = [r for r in evictable if not r.busy]
        return (
            self._cheapest(want, idle)
            or self._as_before(want)
            or self._cheapest(want, [r for r in evictable if not r.busy or r.stays_until <= self.now])
        )

    def _room(self, place: Place) -> int:
        """Bytes left on the device where that is least."""
        return min(self.budgets.get(d, 0) - self.later.get(d, 0) - n for d, n in place.least.items())

    def _as_before(self, want: Want) -> Plan | None:
        if want.plan is None or not want.plan.victims:
            return None
        there = {id for id in want.plan.victims if id in self.staying}
        if any(self.staying[id].pinned for id in there):
            return None
        later = dict(self.later)
        for id in there:
            _add(later, self.staying[id].memory, -1)
        place = want.plan.place
        return (
            Plan(place, frozenset(there)) if place in want.places and fits(later, place.least, self.budgets) else None
        )

    def _cheapest(self, want: Want, candidates: list[Replica]) -> Plan | None:
        best: tuple[float, Plan] | None = None
        for place in want.places:
            lacking = {
                d: lack
                for d, n in place.least.items()
                if (lack := self.later.get(d, 0) + n - self.budgets.get(d, 0)) > 0
            }
            options = [(r.cost(self.now), r.memory, r.id) for r in candidates]
            found = cheapest_cover(options, lacking)
            if found is not None and (best is None or found[0] < best[0]):
                best = found[0], Plan(place, frozenset(found[1]))
        return best and best[1]

    def impossible(self, want: Want) -> InsufficientMemoryError | None:
        """The error for a want that no eviction can meet; None while what loads or stops may change that."""
        if any(r.state is not State.READY for r in self.replicas.values()):
            return None
        pinned = [r for r in self.staying.values() if r.pinned]
        held = total(r.memory for r in pinned)
        if any(fits(held, place.least, self.budgets) for place in want.places):
            return None
        place = min(
            want.places, key=lambda p: max(n + held.get(d, 0) - self.budgets.get(d, 0) for d, n in p.least.items())
        )
        return insufficient(want.model, place, self.budgets, held, sorted({r.model for r in pinned}))


def insufficient(
    model: str, place: Place, budgets: Bytes, held: Bytes, pinned: Sequence[str]
) -> InsufficientMemoryError:
    """The error with the numbers of the device that lacks most, and the context that would fit."""
    need = place.least
    device = max(need, key=lambda d: need[d] + held.get(d, 0) - budgets.get(d, 0))
    room = budgets.get(device, 0) - held.get(device, 0)
    kept = f", {gigabytes(held[device])} of it by pinned models ({', '.join(pinned)})" if held.get(device) else ""
    with_pages = (
        f" ({gigabytes(place.least_pages)} of them for a context of {place.context} tokens)"
        if device in place.paged and place.least_pages
        else ""
    )
    hint = "Choose a smaller model or quantisation, or another device."
    if kept:
        hint = "Unpin one of them, or choose a smaller model."
    if device in place.paged and place.least_pages:
        tokens = (room - place.fixed.get(device, 0)) * place.context // place.least_pages
        if tokens > 0 and all(fits(held, {d: place.fixed[d]}, budgets) for d in place.fixed):
            hint = f"A context of {tokens} tokens would fit: max_model_len={tokens}."
    return InsufficientMemoryError(
        f"{model} needs {gigabytes(need[device])} on {device}{with_pages}; "
        f"{gigabytes(budgets.get(device, 0))} may be used there{kept}.",
        hint=hint,
    )


def cheapest_cover(options: Iterable[tuple[float, Bytes, int]], lacking: Bytes) -> tuple[float, tuple[int, ...]] | None:
    """The (cost, memory, id)s of least total cost whose memory covers `lacking`; of equal cost the fewest. None if all
    of them don't. Branch and bound, exact for a dozen options, and never worse than taking the cheapest in turn."""
    helpful = sorted((o for o in options if any(o[1].get(d, 0) for d in lacking)), key=lambda o: (o[0], o[2]))
    rest: list[dict[str, int]] = [dict.fromkeys(lacking, 0)]
    for _, memory, _ in reversed(helpful):
        rest.append({d: n + memory.get(d, 0) for d, n in rest[-1].items()})
    rest.reverse()
    if any(rest[0][d] < n for d, n in lacking.items()):
        return None
    best: tuple[float, int, tuple[int, ...]] = (math.inf, 0, ())
    looked = 0

    def search(i: int, lack: dict[str, int], cost: float, taken: tuple[int, ...]) -> None:
        nonlocal best, looked
        looked += 1
        if (cost, len(taken)) >= best[:2]:
            return
        if not lack:
            best = cost, len(taken), taken
            return
        if looked > _SEARCHED and best[0] < math.inf:
            return
        if any(rest[i][d] < n for d, n in lack.items()):
            return
        price, memory, id = helpful[i]
        left = {d: n - memory.get(d, 0) for d, n in lack.items() if n > memory.get(d, 0)}
        search(i + 1, left, cost + price, (*taken, id))
        search(i + 1, lack, cost, taken)

    search(0, dict(lacking), 0.0, ())
    return best[0], best[2]


def fits(held: Bytes, more: Bytes, budgets: Bytes) -> bool:
    return all(held.get(d, 0) + n <= budgets.get(d, 0) for d, n in more.items())


def total(parts: Iterable[Bytes]) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in parts:
        _add(found, part)
    return found


def _add(to: dict[str, int], part: Bytes, sign: int = 1) -> None:
    for device, n in part.items():
        to[device] = to.get(device, 0) + sign * n


def _expires(replica: Replica) -> bool:
    return replica.state is State.READY and not replica.busy and not replica.pinned and replica.expires_at < math.inf


def gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
