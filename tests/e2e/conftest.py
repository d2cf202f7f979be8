"""The clusters that the tests share, on one local Ray."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.config import build_config
from cluster.demo import MODEL_DIR, MODEL_NAME
from cluster.launch import RayCluster
from tests.e2e.ray_head import RayHead, ray_head
from tests.e2e.serving import Serving

TOKEN = secrets.token_hex(32)  # one for the whole process: Ray keeps the first, and this Ray may be started twice
SILENCE_S = 15.0  # after which a peer of the wide cluster counts as lost


def cluster_tree(**workers: Any) -> dict[str, Any]:
    """The shipped model in float32. Grants of one block of 4 rows, from a pool of 16 blocks for all streams: any image
    takes several rounds, and large ones wait for each other's blocks. A KV cache in which not every request fits at
    the same time. Nobody is lost or replaced because a process of a slow machine had to wait for its turn.
    """
    return {
        "model": {"path": str(MODEL_DIR), "served_model_name": MODEL_NAME, "dtype": "float32", "device": "cpu"},
        "embedding": {"num_threads": 1},
        "language": {"num_threads": 1, "kv_cache_tokens": 8192, "max_model_len": 4096},
        "transfer": {"block_size": 4, "default_allocate_tokens": 4, "pool_tokens": 64, "peer_timeout_s": 90.0},
        "gateway": {"port": 0},
        # three clusters share a Ray of two CPUs
        "workers": {"num_cpus": 0.125, "health_timeout_s": 120.0, **workers},
    }


@pytest.fixture(scope="package")
def ray_token() -> Iterator[None]:
    """A token of this run for the local Ray: without one it writes a file below the home folder. Ray asks for tokens
    unless told otherwise; told by RAY_AUTH_MODE it must be before it is imported, so that one stays unset here.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_AUTH_MODE", raising=False)
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        yield


@pytest.fixture(scope="package")
def guarded_head() -> Iterator[RayHead]:
    """A Ray beside the local one, for what users do to a cluster that runs."""
    with ray_head() as head:
        yield head


@pytest.fixture(scope="package")
def ray_cluster(ray_token: None) -> Iterator[RayCluster]:
    """One embedding and one language worker. Starts the local Ray, and ends it last."""
    with RayCluster(build_config(cluster_tree()).resolve()) as cluster:
        yield cluster


@pytest.fixture(scope="package")
def serving(ray_cluster: RayCluster) -> Iterator[Serving]:
    with Serving(ray_cluster.url) as serving:
        yield serving


@pytest.fixture(scope="module")
def wide_cluster(ray_cluster: RayCluster) -> Iterator[RayCluster]:
    """Two embedding and two language workers on the same Ray. A silence is noticed while a test waits, but not before
    a live worker on a slow machine has had its turn.
    """
    tree = cluster_tree(embedding=2, language=2)
    tree["transfer"] |= {"peer_timeout_s": SILENCE_S, "ping_interval_s": 1.0}
    with RayCluster(build_config(tree).resolve()) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def split_cluster(ray_cluster: RayCluster) -> Iterator[RayCluster]:
    """One embedding, one prefill and one decode worker on the same Ray."""
    with RayCluster(build_config(cluster_tree(prefill=1, decode=1)).resolve()) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def wide_serving(wide_cluster: RayCluster) -> Iterator[Serving]:
    with Serving(wide_cluster.url) as serving:
        yield serving
