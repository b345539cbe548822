"""The one error that a user is meant to read."""


class UserError(ValueError):
    """Input that can't be honoured: the message is one line that names the key or file, the value and the fix.

    The command line prints it without a traceback and exits with status 2.
    """
