"""The exception and the warning that a person at the keyboard is meant to read."""


class UserError(Exception):
    """An error whose one-line message is for the person at the keyboard; the CLI prints it and exits 2."""


class NeuroadaWarning(UserWarning):
    """Something the user should know, though the work goes on."""


def install_line(extra: str) -> str:
    """Return the command that installs an extra from a clone; the package is on no index yet."""
    return f'pip install -e ".[{extra}]"'
