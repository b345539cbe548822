"""The error for mistakes that a user can fix."""


class UserError(ValueError):
    """Invalid input: the message is one line that names the key or file, the value and the fix.

    The command line prints it without a traceback and exits with status 2.
    """
