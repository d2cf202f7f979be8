"""The command line: `tandem ...`, or `python -m cluster ...` where no console script is (a Ray job, say).

The only place that reads the environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cluster.cli.parser import build_parser
from cluster.errors import ClusterError
from cluster.logs import configure_logging
from embedding_worker.errors import EmbedError
from language_worker.errors import EngineError
from transfer.errors import TransferError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors that are the user's to repair are one line on stderr, code 2."""
    parser = build_parser(ray_address=os.environ.get("RAY_ADDRESS"))
    options = parser.parse_args(arguments)
    configure_logging(options.log_level)
    try:
        code: int = options.run(options)
        return code
    except (ClusterError, EmbedError, EngineError, TransferError) as error:
        print(f"tandem: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
