"""``python -m tests.fuzz``: the package by the name that it has under pytest."""

import sys

from fuzz.run import main

if __name__ == "__main__":
    sys.exit(main())
