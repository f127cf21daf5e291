"""The exception and the warning whose messages are written for the user."""


class UserError(Exception):
    """An error whose one-line message is for the user; the command line prints it and exits with 2."""


class NeuroadaWarning(UserWarning):
    """A warning for the user; work continues."""


def install_line(extra: str) -> str:
    """Return the command that installs an extra from a clone, since the package is on no index yet."""
    return f'pip install -e ".[{extra}]"'
