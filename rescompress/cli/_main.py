"""Read the command line, run one command, and turn errors into one line and an exit code."""

import os
import sys
import traceback
from types import ModuleType

from rescompress.cli import compress, console, families, inspect, measure, methods
from rescompress.cli._parser import Parser
from rescompress.errors import RescompressError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

# Importing them costs nothing: torch is imported by a command's run, so that --help answers at once.
_COMMANDS: tuple[ModuleType, ...] = (compress, measure, inspect, methods, families)

_EPILOG = """examples:
  rescompress compress resnet50 --scale 0.5 --out small.pt
  rescompress measure torchvision:vit_b_16
  rescompress inspect small.pt
  rescompress methods stem_resize

exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 130 interrupted
"""


def main(argv: list[str] | None = None) -> int:
    """Run `rescompress` with these arguments, by default those of the process, and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        with console.messages(debug):
            try:
                args = _parser().parse(argv)
                code = int(args.run(args))
                sys.stdout.flush()
                return code
            except BrokenPipeError:
                # The reader (head, less) has what it wanted; without this, Python complains again while shutting down.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return FAILED
            except Exception as error:
                if debug:
                    traceback.print_exc()
                console.error(_line(error))
                return FAILED
    except KeyboardInterrupt:
        console.error("interrupted")
        return INTERRUPTED
    except SystemExit as stop:  # argparse ends so after --help, --version and wrong usage
        return stop.code if isinstance(stop.code, int) else OK


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
    message = " ".join(str(error).split())
    if isinstance(error, RescompressError):
        return message
    return f"{type(error).__name__}: {message[:300]} (unexpected; --debug shows where)"
