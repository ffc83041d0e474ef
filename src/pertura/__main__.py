"""``python -m pertura``: the same as the ``pertura`` command."""

from __future__ import annotations

import sys

from pertura._cli import main

if __name__ == "__main__":
    sys.exit(main())
