"""Workers on tcp, as between hosts: connections encrypted, keys handed out by the controller, strangers kept out."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import zmq

from cluster.config import build_config
from cluster.directory import WorkerAddress
from cluster.launch import RayCluster
from tests.e2e.conftest import cluster_tree
from tests.e2e.serving import Serving, ask_demo_question
from tests.transfer.test_endpoints import Answers
from tests.waiting import eventually
from transfer.config import TransferConfig
from transfer.endpoints.endpoint import open_endpoint
from transfer.endpoints.peer_book import KEY_BYTES
from transfer.service.service import Service

pytestmark = pytest.mark.ray
HOST = "127.0.0.3"  # of this machine too, and no default of anything
WAIT_S = 120.0
CONFIG = TransferConfig(ping_interval_s=0.2, peer_timeout_s=1.0, tick_s=0.01)


@pytest.fixture(scope="module")
def tcp_cluster(ray_cluster: RayCluster) -> Iterator[RayCluster]:
    tree = cluster_tree()
    tree["transfer"] |= {"transport": "tcp", "host": HOST}
    with RayCluster(build_config(tree).resolve()) as cluster:
        yield cluster


def test_workers_between_hosts_know_each_other_by_their_keys_and_nobody_else(tcp_cluster: RayCluster) -> None:
    with Serving(tcp_cluster.url) as serving:
        ask_demo_question(serving)
        addresses = [health.address for health in tcp_cluster.workers.values()]
        keys = {worker.public_key for worker in addresses}
        assert len(keys) == 2 and all(key and len(key) == 40 for key in keys)
        assert all(worker.address.startswith(f"tcp://{HOST}:") for worker in addresses)
        assert {values["refused_keys"] for values in serving.settled().values()} == {0}

        stranger = Service(open_endpoint("tcp://127.0.0.1:0", CONFIG, curve=True), CONFIG)
        stranger.start()
        try:
            for worker in addresses:
                assert_call_is_lost(stranger, worker)

            def are_counted() -> bool:
                figures = serving.settled()
                unheard = [worker for worker in addresses if not figures[worker.name]["refused_keys"]]
                for worker in unheard:  # the stranger may have given up before a busy worker looked at its key
                    assert_call_is_lost(stranger, worker)
                return not unheard

            eventually(are_counted, "the refused key was not counted")
        finally:
            stranger.close()
        for worker in addresses:
            assert_plain_client_is_cut_off(worker.address)
        for values in serving.settled().values():
            assert values["dropped_malformed"] == values["dropped_old_link"] == 0
        ask_demo_question(serving)
        serving.await_empty_ledger()


def assert_call_is_lost(stranger: Service, worker: WorkerAddress) -> None:
    answers = Answers()
    target = stranger.endpoint.connect(worker.address, worker.public_key)
    stranger.call(target, "stats", {}, on_end=answers.on_end)
    assert answers.ended.wait(WAIT_S)
    assert answers.failure().code == "PeerLost"


def assert_plain_client_is_cut_off(address: str) -> None:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.ROUTING_ID, os.urandom(KEY_BYTES))
    try:
        monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_DISCONNECTED)
        dealer.connect(address)
        dealer.send(b"\x02\x80")
        assert monitor.poll(int(WAIT_S * 1000)), "the handshake was not refused"
        dealer.disable_monitor()
    finally:
        context.destroy(linger=0)
