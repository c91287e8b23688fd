"""Read the command line, run one command, and turn errors into one line and an exit code."""

import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NoReturn

from rescompress.cli import compress, console, families, inspect, measure, methods
from rescompress.cli._parser import Parser
from rescompress.errors import RescompressError, one_line

OK, FAILED, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

# Importing them costs nothing: torch is imported by a command's run, so that --help answers at once.
_COMMANDS: tuple[ModuleType, ...] = (compress, measure, inspect, methods, families)

_EPILOG = """examples:
  rescompress compress resnet50 --scale 0.5 --out small.pt
  rescompress measure torchvision:vit_b_16
  rescompress inspect small.pt
  rescompress methods stem_resize

exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 130 interrupted,
143 terminated
"""


def main(argv: list[str] | None = None) -> int:
    """Run `rescompress` with these arguments, by default those of the process, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if sys.stdout is None:
        console.error("stdout is closed, so the result cannot be printed; send it to a file or to /dev/null")
        return FAILED
    with _termination_cleans_up():
        try:
            code = _run(argv, debug="--debug" in argv)
            console.flush()
            return code
        except BrokenPipeError:  # the reader (head, less) has what it wanted
            console.drop_stdout()
        except console.StdoutError as error:
            console.drop_stdout()
            console.error(str(error))
    return FAILED


def _run(argv: list[str], debug: bool) -> int:
    try:
        with console.messages(debug):
            try:
                args = _parser().parse(argv)
                with console.only_results_on_stdout():
                    return int(args.run(args))
            except (BrokenPipeError, console.StdoutError):
                raise
            except Exception as error:
                if debug:
                    traceback.print_exc()
                console.error(_line(error))
                return FAILED
    except KeyboardInterrupt:
        console.error("interrupted")
        return INTERRUPTED
    except SystemExit as stop:  # argparse ends so after --help, --version and wrong usage
        if stop.code == TERMINATED:
            console.error("terminated")
        return stop.code if isinstance(stop.code, int) else OK


@contextmanager
def _termination_cleans_up() -> Iterator[None]:
    """Let SIGTERM end the process as an exception does, so that no half-written file is left."""

    def stop(*_signal: Any) -> NoReturn:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():  # only there may signals be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> Parser:
    parser = Parser(
        prog="rescompress",
        description="Make vision models cheaper by letting them compute on fewer pixels and tokens.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for module in _COMMANDS:
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=f"{module.SUMMARY[0].upper()}{module.SUMMARY[1:]}.",
            epilog=module.EPILOG,
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show tracebacks and the warnings of other libraries")
        command.set_defaults(run=module.run)
    return parser


def _version() -> str:
    import rescompress

    return f"rescompress {rescompress.__version__}"


def _line(error: Exception) -> str:
    if isinstance(error, RescompressError):
        return one_line(error, 2000)
    return f"{type(error).__name__}: {one_line(error)} (unexpected; --debug shows where)"
