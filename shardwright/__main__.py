"""``python -m shardwright``: see :mod:`shardwright.cli.main`."""

import sys

from shardwright.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
