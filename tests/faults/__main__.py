"""``python -m tests.faults``: the package by the name that it has under pytest."""

import sys

from faults.run import main

if __name__ == "__main__":
    sys.exit(main())
