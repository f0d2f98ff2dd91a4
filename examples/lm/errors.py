"""The one exception that ends a run with one line and exit code 2."""


class UsageError(Exception):
    """An argument, path or checkpoint that does not fit; the message says which and what to do."""
