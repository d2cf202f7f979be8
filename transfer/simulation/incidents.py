"""Incidents: what strikes links, hosts and streams while a run goes on, and how it is made good again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from transfer.protocol.messages import Grant, Message
from transfer.simulation.cancels import Cancels
from transfer.simulation.controller import Controller
from transfer.simulation.faults import PRODUCER_KINDS, Incident
from transfer.simulation.hosts import Host, ReceiverHost, SenderHost
from transfer.simulation.network import VirtualNetwork
from transfer.simulation.onlooker import Onlooker
from transfer.simulation.outages import Outages
from transfer.simulation.passing import VirtualPassing
from transfer.simulation.story import Story

LONG_S = 18.0
COUNTED_WHERE_THEY_MEET = ("cancel", "released_lost", "segment_refused", "replay")  # what they are for
# States that pass quickly come first: a cancellation meets the first of these that it finds.
CANCEL_RARITY = {
    kind: rank
    for rank, kind in enumerate(
        (
            "cancel_by_sender_draining",
            "cancel_by_sender_accepted",
            "cancel_by_receiver_orphaned",
            "cancel_by_receiver_opened",
            "cancel_by_sender_granted",
            "cancel_by_receiver_registered",
            "cancel_by_receiver_held",
            "cancel_by_sender_opening",
        )
    )
}


class Incidents:
    """Strikes when its time has come, counted in messages; every blow heals after its seconds."""

    def __init__(
        self,
        controller: Controller,
        network: VirtualNetwork,
        onlooker: Onlooker,
        story: Story,
        outages: Outages,
        receivers: list[ReceiverHost],
        senders: list[SenderHost],
        passing: VirtualPassing,
        fired: Counter[str],
    ) -> None:
        self._controller = controller
        self.cancels = Cancels(controller, controller.dice, fired)
        self._passing = passing
        self._network = network
        self._onlooker = onlooker
        self._story = story
        self._outages = outages
        self._receivers = receivers
        self._senders = senders
        self._fired = fired
        self._pending = list(reversed(controller.scenario.incidents))
        self.num_open = 0
        network.on_carried = self._on_carried
        network.rewrite = self._falsify

    # -- what single messages set off -----------------------------------------------------------------------------

    def _on_carried(self, message: Message) -> None:
        while self._pending and self._pending[-1].at_message <= self._network.num_messages:
            self._network.timeline.after(0.0, self._strike, self._pending.pop())
        found = self._controller.streams.get(getattr(message, "stream_id", ""))
        if found is None:
            return
        request, _ = found
        if request.num_messages == request.plan.cancel_at:
            self._network.timeline.after(0.0, self.cancels.cancel, request, request.plan.cancel_side)
        request.num_messages += 1

    def _falsify(self, message: Message) -> Message:
        if not isinstance(message, Grant):
            return message
        found = self._controller.streams.get(message.stream_id)
        if found is None or found[0].is_falsified or found[0].plan.misaligned_round != message.round:
            return message
        request, attempt = found
        request.is_falsified = True
        attempt.harms.append("misaligned_grant")
        self._fired["misaligned_grant"] += 1
        # less than a block more: floor division would not see it
        return replace(message, allocated_tokens=message.allocated_tokens + max(1, message.block_size - 1))

    # -- what strikes ---------------------------------------------------------------------------------------------

    def _strike(self, incident: Incident) -> None:
        now = self._network.timeline.now
        blow: Callable[[Incident], int] = getattr(self, f"_{incident.kind}")
        num_hit = blow(incident)
        self._story.tell(now, "fault", None, f"{incident.kind} for {incident.seconds:.3f} s hits {num_hit} streams")
        if num_hit and incident.kind not in COUNTED_WHERE_THEY_MEET:
            self._fired[incident.kind] += 1
            if incident.kind not in PRODUCER_KINDS:
                self._fired["long_outage"] += incident.seconds >= LONG_S

    def _later(self, seconds: float, heal: Callable[..., None], *arguments: object) -> None:
        self.num_open += 1

        def run() -> None:
            self.num_open -= 1
            heal(*arguments)

        self._network.timeline.after(seconds, run)

    def _pair(self, incident: Incident) -> tuple[SenderHost, ReceiverHost]:
        sender = self._senders[incident.target % len(self._senders)]
        return sender, self._receivers[incident.target // 7 % len(self._receivers)]

    def _num_live(self, sender: SenderHost | None, receiver: ReceiverHost | None) -> int:
        attempts = [request.attempt for request in self._controller.requests]
        return sum(
            attempt is not None
            and (sender is None or attempt.sending.host is sender)
            and (receiver is None or attempt.host is receiver)
            for attempt in attempts
        )

    def _cut(self, incident: Incident, forth: bool, back: bool) -> int:
        sender, receiver = self._pair(incident)
        self._outages.add(self._network.timeline.now, incident.seconds, sender=sender.name, receiver=receiver.name)
        links = []
        if forth:
            links.append(self._network.link(sender.name, receiver.name))
        if back:
            links.append(self._network.link(receiver.name, sender.name))
        for link in links:
            link.num_cuts += 1

        def heal() -> None:
            for link in links:
                link.num_cuts -= 1

        self._later(incident.seconds, heal)
        return self._num_live(sender, receiver)

    def _partition(self, incident: Incident) -> int:
        return self._cut(incident, True, True)

    def _partition_to_receiver(self, incident: Incident) -> int:
        return self._cut(incident, True, False)

    def _partition_to_sender(self, incident: Incident) -> int:
        return self._cut(incident, False, True)

    def _half_open(self, incident: Incident) -> int:
        """One connection's way back is dead until it is made anew, when what was under way is lost too."""
        routes = [r for r in self._network.routes.values() if not r.is_half_open and not r.is_sealed_path]
        if not routes:
            return 0
        route = routes[incident.target % len(routes)]
        route.is_half_open = True
        sender = route.connector.process.host
        receiver = route.address.removeprefix("virtual://")
        self._outages.add(self._network.timeline.now, incident.seconds, sender=sender, receiver=receiver)
        self._later(incident.seconds, self._reconnect, route, sender, receiver)
        live = [r.attempt for r in self._controller.requests if r.attempt is not None]
        return sum(a is not None and a.sending.host.name == sender and a.host.name == receiver for a in live)

    def _reconnect(self, route: object, sender: str, receiver: str) -> None:
        self._network.break_route(route)  # type: ignore[arg-type]
        self._onlooker.link_disturbed(sender, receiver)

    def _crash(self, host: Host, incident: Incident, num_hit: int) -> int:
        host.crash()
        self._later(incident.seconds, host.boot)
        return num_hit

    def _crash_sender(self, incident: Incident) -> int:
        host, _ = self._pair(incident)
        if not host.is_up:
            return 0
        return self._crash(host, incident, self._controller.sender_crashed(host))

    def _crash_receiver(self, incident: Incident) -> int:
        _, host = self._pair(incident)
        if not host.is_up:
            return 0
        self._outages.add(self._network.timeline.now, incident.seconds, receiver=host.name)
        return self._crash(host, incident, self._controller.receiver_crashed(host))

    def _stop(self, host: Host, incident: Incident) -> None:
        if host.is_up:
            host.stop()
            self._onlooker.link_disturbed(host.name, None)
            self._onlooker.link_disturbed(None, host.name)
            self._later(incident.seconds, host.wake, host.process)

    def _stop_sender(self, incident: Incident) -> int:
        host, _ = self._pair(incident)
        self._outages.add(self._network.timeline.now, incident.seconds, sender=host.name)
        self._stop(host, incident)
        return self._num_live(host, None)

    def _stop_receiver(self, incident: Incident) -> int:
        _, host = self._pair(incident)
        self._outages.add(self._network.timeline.now, incident.seconds, receiver=host.name)
        self._stop(host, incident)
        return self._num_live(None, host)

    def _clock_jump_sender(self, incident: Incident) -> int:
        host, _ = self._pair(incident)
        self._outages.add_leap(self._network.timeline.now, incident.seconds, sender=host.name)
        host.process.jump(incident.seconds)
        return self._num_live(host, None)

    def _clock_jump_receiver(self, incident: Incident) -> int:
        _, host = self._pair(incident)
        self._outages.add_leap(self._network.timeline.now, incident.seconds, receiver=host.name)
        host.process.jump(incident.seconds)
        return self._num_live(None, host)

    def _slow_producer(self, incident: Incident) -> int:
        """A producer stands still for long; its host, its sender and everybody else go on."""
        attempts = [request.attempt for request in self._controller.requests if request.outcome is None]
        producers = [attempt.sending.producer for attempt in attempts if attempt is not None]
        busy = [producer for producer in producers if producer is not None and producer.is_busy]
        if not busy:
            return 0
        producer = busy[incident.target % len(busy)]
        producer.hold()
        self._later(incident.seconds, producer.release)
        return 1

    def _restart_loop(self, incident: Incident) -> int:
        """A receiving loop dies and is started anew: what was on its way is lost, what it acknowledged is not."""
        _, host = self._pair(incident)
        if not host.is_up:
            return 0
        if incident.target % 2:
            host.process.after(0.0, host.endpoint.restart_loop)
        else:
            host.process.doom(incident.target // 2 % 9)  # in the middle of one of its next steps
        return self._num_live(None, host)

    def _cancel(self, incident: Incident) -> int:
        """One end gives up, in the rarest state that there is."""
        found = self.cancels.ways()
        if not found:
            return 0
        rarest = min(CANCEL_RARITY.get(kind, len(CANCEL_RARITY)) for kind, _, _ in found)
        _, request, side = next(way for way in found if CANCEL_RARITY.get(way[0], len(CANCEL_RARITY)) == rarest)
        self.cancels.cancel(request, side)
        return 1

    def _lifeline_lost(self, incident: Incident) -> int:
        """A connection that shows each end of a segment that the other lives ends, and both do live."""
        live = self._passing.live()
        if not live:
            return 0
        lifeline = live[incident.target % len(live)]
        hit = self._controller.segment_lost(lifeline.offer.generation)
        lifeline.close()
        return hit

    def _released_lost(self, incident: Incident) -> int:
        """For a while a receiver does not hear that its sender let go of slots."""
        sender, receiver = self._pair(incident)
        link = self._network.link(sender.name, receiver.name)
        self._outages.add_mute(self._network.timeline.now, incident.seconds, sender=sender.name, receiver=receiver.name)
        link.num_mutes += 1

        def heal() -> None:
            link.num_mutes -= 1

        self._later(incident.seconds, heal)
        return self._num_live(sender, receiver)

    def _replay(self, incident: Incident) -> int:
        """For a while, what was said of blocks comes once more when they are granted anew."""
        sender, receiver = self._pair(incident)
        link = self._network.link(sender.name, receiver.name)
        link.num_replays += 1

        def heal() -> None:
            link.num_replays -= 1

        self._later(incident.seconds, heal)
        return self._num_live(sender, receiver)

    def _segment_refused(self, incident: Incident) -> int:
        """For a while a sender gets no segment, or a receiver can make none."""
        host = self._pair(incident)[incident.target % 2]
        self._passing.out_of_order[host.name] += 1

        def heal() -> None:
            self._passing.out_of_order[host.name] -= 1

        self._later(incident.seconds, heal)
        return self._num_live(None, None)

    def _take_over(self, incident: Incident, content_number: int) -> int:
        live = [(request, request.attempt) for request in self._controller.requests]
        able = [(r, a) for r, a in live if a is not None and not a.is_replacing and a.host.is_up and r.outcome is None]
        if not able:
            return 0
        request, attempt = able[incident.target % len(able)]
        self._controller.replace_sender(request, attempt, content_number)
        return 1

    def _take_over_same_key(self, incident: Incident) -> int:
        return self._take_over(incident, 0)

    def _take_over_other_key(self, incident: Incident) -> int:
        return self._take_over(incident, 1 + incident.target % 2)
