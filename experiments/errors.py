"""Errors that are shown to the user as one line, without a traceback."""


class UserError(Exception):
    """A mistake of the user's that one line explains."""
