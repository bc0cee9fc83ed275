"""``python -m cupy_pagedkv``: see :mod:`cupy_pagedkv.replay.command`."""

import sys

from .replay.command import main

if __name__ == "__main__":
    sys.exit(main())
