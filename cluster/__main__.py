"""The command line: `tandem ...`, or `python -m cluster ...` where no console script is (a Ray job, say).

The only place that reads the environment.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from cluster.cli.parser import build_parser
from cluster.errors import ClusterError
from cluster.logs import configure_logging
from embedding_worker.errors import EmbedError
from language_worker.errors import EngineError
from transfer.errors import TransferError

logger = logging.getLogger(__name__)

MAX_LINE_CHARS = 2000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors that are the user's to repair are one line on stderr, code 2; the
    traceback comes with --log-level DEBUG.
    """
    parser = build_parser(ray_address=os.environ.get("RAY_ADDRESS"))
    options = parser.parse_args(arguments)
    configure_logging(options.log_level)
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # what workers log appears here, and may well go into a file
    try:
        code: int = options.run(options)
        return code
    except (ClusterError, EmbedError, EngineError, TransferError) as error:
        logger.debug("the command failed", exc_info=error)
        print(f"tandem: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def one_line(error: BaseException) -> str:
    """An error's text with its list of findings, if it has one, behind the first line."""
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join([first, "; ".join(line.removeprefix("- ") for line in others)]).strip()
    return text if len(text) <= MAX_LINE_CHARS else text[:MAX_LINE_CHARS] + " ... (cut; `tandem doctor` tells all)"


if __name__ == "__main__":
    sys.exit(main())
