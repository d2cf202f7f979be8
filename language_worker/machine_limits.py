"""Settings that this machine cannot honour, refused before anything is started or allocated.

They are no error of the configuration by itself, which may be written for another machine; so they are checked where
the engine is built.
"""

import torch

from kernels.machine import GIB, memory_bytes, most_threads, num_cpus
from language_worker.config import EngineConfig
from language_worker.errors import InvalidRequest


def require_threads(config: EngineConfig) -> None:
    """Raises InvalidRequest for more threads than this machine's CPUs can have any use for."""
    if config.num_threads > most_threads():
        raise InvalidRequest(
            f"num_threads is {config.num_threads}, and this machine has {num_cpus()} CPUs; use {most_threads()} at "
            "most, or 0 for torch's own choice"
        )


def require_memory(what: str, num_tokens: int, bytes_per_token: int, device: torch.device, setting: str) -> None:
    """Raises InvalidRequest when the device has less memory in all than the KV of so many positions takes."""
    needed, there = num_tokens * bytes_per_token, memory_bytes(device)
    if needed > there:
        raise InvalidRequest(
            f"{what} of {num_tokens} tokens needs {needed / GIB:,.1f} GiB, and "
            f"{'this machine' if device.type == 'cpu' else str(device)} has {there / GIB:,.1f} GiB of memory; "
            f"lower {setting}"
        )
