"""The command `llmasos`: `main` takes arguments and returns an exit code.

Exit codes are those of `llmasos.errors`; besides them 0 (done), 1 (unexpected error), 130 (Ctrl-C), 141 (the reader of
a pipe went away). What others read by machine goes to stdout, everything for people around it to stderr.

Help of the whole command and calls that need no parsing are answered from the command table alone, so that they start
in a fraction of the time that a parser takes to load.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from llmasos.errors import DiskFullError, LLMasOSError, StoreError

__all__ = ["main"]

_HELP, _VERSION = ("--help", "-h", "help"), ("--version", "-V")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code. Nothing is raised for bad input."""
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    try:
        code = _dispatch(args)
        sys.stdout.flush()
        return code
    except LLMasOSError as e:
        from llmasos.cli.render import show_error

        show_error(e, as_json="--json" in args)
        return e.exit_code
    except KeyboardInterrupt as e:
        from llmasos.cli.messages import t
        from llmasos.cli.render import Told, say

        if not isinstance(e, Told):
            say(t("stopped"))
        return 130
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # the interpreter flushes stdout once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as e:  # a file or folder that nobody asked about beforehand
        from llmasos.cli.render import show_error

        error = _disk_error(e)
        show_error(error, as_json="--json" in args)
        return error.exit_code
    except Exception as e:
        from llmasos.cli.render import show_unexpected

        show_unexpected(e, as_json="--json" in args)
        return 1


def _disk_error(e: OSError) -> StoreError:
    import errno

    what = f"{e.filename}: {e.strerror}." if e.filename and e.strerror else f"{e}."
    if e.errno == errno.ENOSPC:
        return DiskFullError(what, hint="`llmasos ls` shows sizes, `llmasos rm` removes.")
    error = StoreError(what, hint="Check that the file is there and may be read and written.")
    error.__cause__ = e
    return error


def _dispatch(args: list[str]) -> int:
    from llmasos.cli.commands import COMMANDS, root_help, unknown_command

    _check_settings()
    if not args or args[0] in _HELP:
        if len(args) > 1 and args[1] in COMMANDS:
            return _dispatch([args[1], "--help"])
        print(root_help())
        return 0
    if args[0] in _VERSION:
        args = ["version", *args[1:]]
    elif args[0] == "--install-completion":
        args = ["completion", "--install", *args[1:]]
    command = COMMANDS.get(args[0])
    if command is None:
        raise unknown_command(args[0])
    if command.is_bare and args[1:] in ([], ["--json"]):
        return command.function()(json=True) or 0 if args[1:] else command.function()() or 0
    from llmasos.cli.app import call

    return call(command, args[1:])


def _check_settings() -> None:
    """Wrong environment variables and a broken config.toml are said before anything else is done."""
    from llmasos.settings import settings

    level = settings().log_level
    if level == "warning":
        return  # the default needs no logging set up, and no import
    import logging

    logger = logging.getLogger("llmasos")
    logger.setLevel(level.upper())
    if not logger.handlers and not logging.getLogger().handlers:
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
