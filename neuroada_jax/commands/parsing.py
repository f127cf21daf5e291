"""The parser of the command line: commands listed in groups, errors in one line, and the nearest name of a mistyped one."""

import argparse
import difflib
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from neuroada_jax.commands import shared


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line on standard error, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print the error and end the process."""
        self.exit(2, f"neuroada: error: {message}; see {self.prog} --help\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # As argparse does it, whose words depend on the version of Python.
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action, f"expected one of {', '.join(known)}, found {value!r}{_nearest(str(value), known)}"
            )


class MainParser(Parser):
    """The parser of `neuroada` itself. Without a command it lists all of them."""

    def __init__(self, groups: Mapping[str, Sequence[Any]], **options: Any) -> None:
        """Describe the commands.

        Args:
          groups: title -> the modules whose `add` describes the group's commands.
          **options: of `argparse.ArgumentParser`.
        """
        form = argparse.RawDescriptionHelpFormatter
        super().__init__("neuroada", usage="neuroada COMMAND ...", formatter_class=form, **options)
        self.commands: shared.Commands = self.add_subparsers(
            required=True, metavar="COMMAND", prog="neuroada", parser_class=Parser, help=argparse.SUPPRESS
        )
        names: dict[str, list[str]] = {}
        for title, modules in groups.items():
            before = set(self.commands.choices)
            for module in modules:
                module.add(self.commands)
            names[title] = [name for name in self.commands.choices if name not in before]
        self.epilog = "\n\n".join(
            "\n".join([f"{title}:", *(f"  {name:<10}{_summary(self.commands.choices[name])}" for name in found)])
            for title, found in names.items()
        )
        self.epilog += "\n\n`neuroada COMMAND --help` has the options of a command."

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; a mistyped command or option is an error that names the nearest one."""
        words = list(sys.argv[1:] if args is None else args)
        if not words:
            self.print_help()
            self.exit(2)
        self._check_words(words)
        return super().parse_known_args(words, namespace)

    def _check_words(self, words: Sequence[str]) -> None:
        # Before argparse, which reports a missing option where one is mistyped.
        name = words[0]
        if name.startswith("-"):
            return
        if name not in self.commands.choices:
            self.error(f"no command {name!r}{_nearest(name, list(self.commands.choices)) or '; `neuroada` lists them'}")
        parser = self.commands.choices[name]
        known = [option for action in parser._actions for option in action.option_strings]
        for word in itertools.takewhile(lambda word: word != "--", words[1:]):
            option = word.partition("=")[0]
            # With a space in it, argparse takes a word as a value: `--prompt "-- she said"`.
            if not option.startswith("--") or " " in option or any(each.startswith(option) for each in known):
                continue
            takes_overrides = any(action.dest == "overrides" for action in parser._actions)
            as_override = _override(option) if takes_overrides else ""
            parser.error(f"unrecognized arguments: {option}{as_override or _nearest(option, known)}")


def _summary(parser: argparse.ArgumentParser) -> str:
    text = parser.description or ""
    return f"{text[:1].lower()}{text[1:].removesuffix('.')}"


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _override(option: str) -> str:
    """Return the end of a message about an option that has the name of a config's field, else an empty text."""
    from neuroada_jax.training import config_file

    paths = config_file.paths_of_field(option.removeprefix("--").replace("-", "_"))
    return f"; a field of the config is written {' or '.join(f'{path}=VALUE' for path in paths)}" if paths else ""
