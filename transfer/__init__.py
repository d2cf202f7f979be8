"""Named tensors on the move: block-aligned streams between workers, calls beside them, and tensors at rest.

Knows blocks, planes and peers; knows no model, no KV cache and no Ray. Import what you need from its module
(`from transfer.streams.stream_receiver import StreamReceiver`); only the block pool is re-exported here, so that
importing the package stays light.
"""

from transfer.block_pool import Allocation, BlockPool
from transfer.errors import DoubleFree, ForeignOwner, PoolExhausted

__all__ = ["Allocation", "BlockPool", "DoubleFree", "ForeignOwner", "PoolExhausted"]
