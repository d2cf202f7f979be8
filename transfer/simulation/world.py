"""World: one run, from its first event to quiescence, and the checks that only the end allows."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from transfer.protocol.actions import Timers
from transfer.simulation.books import Breach
from transfer.simulation.controller import Controller
from transfer.simulation.hosts import Host, ReceiverHost, SenderHost
from transfer.simulation.incidents import Incidents
from transfer.simulation.judge import Judge
from transfer.simulation.network import VirtualNetwork
from transfer.simulation.onlooker import Onlooker
from transfer.simulation.outages import Outages
from transfer.simulation.passing import VirtualPassing
from transfer.simulation.scenario import Scenario
from transfer.simulation.slot_rules import SLOT_COUNTS, SlotRules
from transfer.simulation.story import Story
from transfer.simulation.timeline import Timeline

PROGRESS_LIMIT_S = 900.0  # virtual seconds from the start in which every request must be over
QUIET_LIMIT_S = 60.0  # virtual seconds after that, and after the last fault, until every end has let go of its streams
MAX_STEPS = 400_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one seed came to."""

    seed: int
    breach: Breach | None
    fired: dict[str, int]
    counts: dict[str, int]
    story: Story


class World:
    """Hosts, links, requests and faults of one scenario."""

    def __init__(self, scenario: Scenario, *, is_told: bool = False) -> None:
        self.scenario = scenario
        self.timeline = Timeline()
        self.story = Story(is_told)
        self.judge = Judge(scenario.config, self.story, lambda: self.timeline.now)
        self.fired: Counter[str] = Counter()
        self._disturbed_s = 0.0  # until then, at the end of a run, something kept its ends from letting go
        self._states: dict[Host, dict[str, str]] = {}
        self.onlooker = Onlooker(self.judge, self.story, scenario.config, lambda: self.timeline.now)
        self.network = VirtualNetwork(
            self.timeline,
            self.onlooker,
            random.Random(f"{scenario.seed}/network"),
            scenario.rates,
            self.timeline.now + scenario.lossy_s,
        )
        self.network.fired = self.fired
        config = scenario.config
        self.rules = SlotRules(self.judge, config.block_size)

        def names(role: str, count: int) -> list[str]:
            return [f"{role}-{number}" for number in range(1, count + 1)]

        receivers, senders = names("receiver", scenario.num_receivers), names("sender", scenario.num_senders)
        local = (*receivers, *(senders[number] for number in scenario.local_senders))
        self.passing = VirtualPassing(local, self.fired)
        parts = (self.network, self.passing, self.judge, self.rules, scenario)
        self.receivers = [ReceiverHost(name, *parts) for name in receivers]
        self.senders = [SenderHost(name, *parts) for name in senders]
        timers = Timers.of(config)
        self.outages = Outages(timers.idle_timeout_s - 2 * timers.max_probe_s - 1)
        if scenario.rates.total:
            self.outages.add(self.timeline.now, scenario.lossy_s)
        hosts = (self.receivers, self.senders)
        self.controller = Controller(scenario, self.timeline, self.judge, self.outages, *hosts, self.rules, self.fired)
        self.incidents = Incidents(
            self.controller, self.network, self.onlooker, self.story, self.outages, *hosts, self.passing, self.fired
        )

    def run(self) -> Result:
        """Play the scenario to its end, or to the first broken promise."""
        start_s = self.timeline.now
        limit_s = start_s + PROGRESS_LIMIT_S
        while not (self.controller.is_done and not self.incidents.num_open) and not self._is_beyond(limit_s):
            self._step()
        if self.judge.breach is None and not self.controller.is_done:
            self._complain_of_the_unfinished()
        self._disturbed_s = self.timeline.now
        while not self._is_quiet() and not self._is_beyond(self._quiet_limit_s()):
            self._step()
        if self.judge.breach is None:
            self._check_ledger()
        self.fired["pool_exhaustion"] += self.judge.shares.num_exhausted
        counts = {
            "streams": sum(len(request.attempts) for request in self.controller.requests),
            "requests": len(self.controller.requests),
            "complete": sum(request.outcome == "complete" for request in self.controller.requests),
            "messages": self.network.num_messages,
            "steps": self.timeline.num_steps,
            "virtual_seconds": int(self.timeline.now - start_s),
            "segments": len(self.judge.segments),
            **{name: self.rules.counts[name] for name in SLOT_COUNTS},
        }
        return Result(
            seed=self.scenario.seed,
            breach=self.judge.breach,
            fired=dict(self.fired),
            counts=counts,
            story=self.story,
        )

    def _step(self) -> None:
        self.timeline.step()
        if self.story.is_told:
            for host in (*self.receivers, *self.senders):
                self._tell_states(host)

    def _tell_states(self, host: Host) -> None:
        states, before = host.states(), self._states.get(host, {})
        if states == before:
            return
        self._states[host] = states
        for stream_id in {**before, **states}:
            now, old = states.get(stream_id, "over"), before.get(stream_id, "new")
            if now != old:
                book = self.judge.streams.get(stream_id)
                number = None if book is None else book.number
                self.story.tell(self.timeline.now, host.process, number, f"state: {old} -> {now}")

    def _is_beyond(self, limit_s: float) -> bool:
        if self.timeline.num_steps > MAX_STEPS:
            self.judge.complain("6: the work of a run is bounded", None, f"{MAX_STEPS} steps were not enough")
        return self.judge.breach is not None or self.timeline.now > limit_s

    def _quiet_limit_s(self) -> float:
        """Who is stopped cannot let go, and a loop that begins anew waits anew for a sender that is silent."""
        if self.incidents.num_open:
            self._disturbed_s = self.timeline.now
        return max(self._disturbed_s, self.onlooker.last_restart_s) + QUIET_LIMIT_S

    def _complain_of_the_unfinished(self) -> None:
        for request in self.controller.requests:
            if request.outcome is None:
                attempt = request.attempts[-1] if request.attempts else None
                self.judge.complain(
                    "5: every request ends",
                    request.plan.number,
                    f"{len(request.attempts)} attempts in {PROGRESS_LIMIT_S:g} s; the last: {attempt}",
                )

    def _is_quiet(self) -> bool:
        return all(host.is_up for host in (*self.receivers, *self.senders)) and not self._leftovers()

    def _leftovers(self) -> str:
        for host in self.receivers:
            stats = host.receiver.stats()
            open_ = [
                f"{name} {stats[name]}"
                for name in stats
                if name.endswith(("_in_use", "_open", "_parked")) and stats[name]
            ]
            if host.watch.owners:
                open_.append(f"blocks {sorted(host.watch.owners)} still owned")
            if open_:
                return f"{host.name}: {', '.join(open_)}"
        for sender in self.senders:
            count = sender.sender.stats()["transfer_streams_sending"]
            if count:
                return f"{sender.name}: {count} streams are still being sent"
            num_stale = sender.guest.num_mapped - self.passing.num_lifelines(sender.process)
            if num_stale:
                return f"{sender.name}: {num_stale} segments are mapped whose receiver let go of them"
        return ""

    def _check_ledger(self) -> None:
        left = self._leftovers()
        if left:
            text = f"{QUIET_LIMIT_S:g} s after the last request and fault: {left}"
            self.judge.complain("7: nothing leaks", None, text)
        for host in self.receivers:
            wild = [i for i in range(self.scenario.config.num_pool_blocks) if not host.buffers.is_poisoned(i)]
            for watch in self.judge.segments_of(host.process):
                wild += [slot for slot in range(watch.num_blocks) if not watch.memory.is_poisoned(slot)]
            if wild and not left:
                self.judge.complain(
                    "4: a freed block is never written", None, f"{host.name}: blocks {wild} were written"
                )
        for request in self.controller.requests:
            for attempt in request.attempts:
                for sending in attempt.sendings:
                    if sending.stream is not None and sending.book.outcome is None and sending.book.process.is_alive:
                        epoch = sending.ticket.epoch
                        self.judge.complain(
                            "7: nothing leaks", request.plan.number, f"the sender of epoch {epoch} never heard the end"
                        )
