"""The pairs of workers that are fuzzed: payloads as they are, sealed on a path of their own, or in shared memory."""

from __future__ import annotations

from tests.transfer.virtual import Pair, VirtualEndpoint
from transfer.config import TransferConfig
from transfer.memory.segment_area import SegmentArea
from transfer.service.service import Service
from transfer.streams.stream_sender import StreamSender


class WirePair(Pair):
    """One sender for all streams; `beside`: the sender of the stream that is left alone."""

    has_segments = False

    @property
    def beside(self) -> StreamSender:
        return self.sender

    def segment_of(self, stream_id: str) -> SegmentArea | None:
        """Where a stream is received, if that is in shared memory."""
        stream = self.receiver._streams.by_id.get(stream_id)
        area = None if stream is None else stream.area
        return area if isinstance(area, SegmentArea) and area.is_open else None


class EncryptedEndpoint(VirtualEndpoint):
    """As between hosts."""

    encrypted = True


class SealedPair(WirePair):
    """Blocks and Probes travel sealed, and apart from the rest."""

    def _service(self, address: str, config: TransferConfig) -> Service:
        return Service(EncryptedEndpoint(self.network, address), config, clock=lambda: self.network.now)


class SegmentPair(WirePair):
    """Rows lie in the segment of their pair. Who lies about slots harms its own streams, and no other peer's."""

    has_segments = True

    def __init__(self, config: TransferConfig, **more: object) -> None:
        super().__init__(config, **more)  # type: ignore[arg-type]
        self._beside = self.another_sender()

    @property
    def beside(self) -> StreamSender:
        return self._beside

    def assert_ledger_zero(self) -> None:
        super().assert_ledger_zero()
        assert self._beside.stats()["transfer_streams_sending"] == 0


PAIRS: dict[str, type[WirePair]] = {"wire": WirePair, "sealed": SealedPair, "segments": SegmentPair}
