"""An argument parser whose mistakes are answered in one line that suggests the nearest name."""

import argparse
from typing import Any, NoReturn

from rescompress.cli import console
from rescompress.errors import did_you_mean


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` with examples kept as they are written, no abbreviations, and errors in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Return the arguments; wrong usage ends the process with code 2."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            parser = self._command(getattr(args, "command", None))
            known = [option for action in parser._actions for option in action.option_strings]
            hint = did_you_mean(unknown[0].partition("=")[0], known) if unknown[0].startswith("-") else ""
            hint = hint if hint.startswith("; did you mean") else f"; see {parser.prog} --help"
            parser.error(f"unknown argument {unknown[0]!r}{hint}")
        return args

    def _command(self, name: str | None) -> "Parser":
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and name in action.choices:
                chosen = action.choices[name]
                return chosen if isinstance(chosen, Parser) else self
        return self

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = "command" if isinstance(action, argparse._SubParsersAction) else action.dest
            raise argparse.ArgumentError(None, f"unknown {what} {value!r}{did_you_mean(str(value), action.choices)}")

    def _print_message(self, message: str, file: Any = None) -> None:
        console.out(message.rstrip("\n"))  # help and version; argparse's own way hides that stdout takes nothing

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and end with code 2."""
        console.error(
            message if "--help" in message or "did you mean" in message else f"{message}; see {self.prog} --help"
        )
        raise SystemExit(2)
