"""What the C twins have room for, and from where on torch is the quicker one. Importing it compiles nothing.

The C files get the numbers of `IN_C` from the compiler's command line, so that each stands here alone.
"""

from __future__ import annotations

MAX_ROWS = 64  # of a linear layer's input
FEW_ROWS = 32  # up to which the C product of a plain matrix is the quicker one
MIN_COLUMNS = 4  # of its result
MAX_GROUP = 2048  # inputs that share a scale of 4-bit numbers
MAX_HEAD_DIM = 256  # of attention
MAX_STATE = 256  # numbers of a channel's recurrent state
CACHED_WEIGHTS = 1 << 16  # of a matrix: models of larger ones do not stay in a core's cache from step to step
SMALL_WEIGHTS = 1 << 18  # of a matrix: larger ones are read from memory, by as many threads as torch has
SHARED_NUMBERS = 1 << 17  # of a tensor: more are shared out among torch's threads

HALVED_ROWS = 2  # up to which a product with the bfloat16 half of a float32 matrix is the quicker one

IN_C = {
    "MAX_ROWS": MAX_ROWS,
    "MAX_GROUP": MAX_GROUP,
    "MAX_HEAD_DIM": MAX_HEAD_DIM,
    "MAX_STATE": MAX_STATE,
    "SMALL_WEIGHTS": SMALL_WEIGHTS,
    "HALVED_ROWS": HALVED_ROWS,
}
