"""The typer application, its commands, and what becomes of an error: one line and an exit code."""

import errno
import functools
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import typer

from mmdiff_cache import __version__
from mmdiff_cache.cli import backbones, caption, everyday, experiments, paper, store_commands
from mmdiff_cache.cli.console import clean, err, fail, out
from mmdiff_cache.errors import MMDiffError, StorageError, StorageRefused

INTERRUPTED = 130
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_FAILED = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

app = typer.Typer(
    name="mmdiff-cache",
    help="Run a diffusion transformer once, keep its features, train heads on them as often as you like.",
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        out.print(f"mmdiff-cache {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Run a diffusion transformer once, keep its features, train heads on them as often as you like."""


class _Interrupted(Exception):
    """Ctrl-C on its way past typer, which would turn it into a bare exit code."""


def _interruptible(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def run_command(**options: Any) -> Any:
        try:
            return command(**options)
        except KeyboardInterrupt as stop:
            raise _Interrupted from stop

    return run_command


EVERYDAY = "Everyday"
for command in (
    everyday.demo,
    everyday.extract,
    everyday.train,
    everyday.evaluate,
    everyday.predict,
    everyday.inspect,
):
    app.command(rich_help_panel=EVERYDAY)(_interruptible(command))

for command in (experiments.sweep, experiments.compare, paper.table):
    app.command(rich_help_panel="Experiments")(_interruptible(command))

STORE = "Store"
for command in (store_commands.verify, store_commands.repair, store_commands.convert):
    app.command(rich_help_panel=STORE)(_interruptible(command))

app.command(rich_help_panel="Prompts")(_interruptible(caption.caption))
app.command(rich_help_panel="Reference")(_interruptible(backbones.backbones))
store_commands.labels.command(name="add")(_interruptible(store_commands.add))
app.add_typer(store_commands.labels, name="labels", rich_help_panel=STORE)


class _CleanFormatter(logging.Formatter):
    """Log lines name files and samples, whose names may hold anything."""

    def format(self, record: logging.LogRecord) -> str:
        return clean(super().format(record))


def main() -> None:
    """The console script."""
    handler = logging.StreamHandler()
    handler.setFormatter(_CleanFormatter("%(levelname)s: %(message)s"))
    handler.setLevel(logging.WARNING)  # on the handler, so that a run's own log file may hold more
    logging.basicConfig(handlers=[handler])
    # Pillow warns of pictures that are large but taken; what is too large is refused (datasets.pictures)
    warnings.filterwarnings("ignore", message="Image size .* could be decompression bomb")
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")  # their advice on image processors that are never used
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    0 done, 1 damage found, 2 a wrong request, 3 finished with failed samples or partitions, 4 the disk
    refuses, 5 the cluster was lost, 130 interrupted.
    """
    try:
        code = app(args=list(arguments) or ["--help"], prog_name="mmdiff-cache", standalone_mode=False)
    except MMDiffError as error:
        fail(str(error))
        return error.exit_code
    except typer.TyperException as error:
        return _wrong_usage(error)
    except (_Interrupted, KeyboardInterrupt, typer.Abort) as stop:
        return _interrupted(stop, shlex.join(["mmdiff-cache", *arguments]))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _REFUSED + _FAILED:
            raise
        fail(
            f"{error.strerror}: {error.filename or 'while writing'}; free some space or choose another folder"
        )
        return (StorageRefused if error.errno in _REFUSED else StorageError).exit_code
    return code if isinstance(code, int) else 0


def _interrupted(stop: BaseException, same: str) -> int:
    """Say how to go on: with the line that the work itself left as a note, else with the same command."""
    notes = getattr(stop, "__notes__", None) or getattr(stop.__cause__, "__notes__", None)
    say = "Go on with:" if notes else "The same command continues:"
    err.print(f"\ninterrupted; what was finished is kept. {say}", markup=False)
    err.print(notes[0] if notes else same, markup=False, soft_wrap=True)
    return INTERRUPTED


def _wrong_usage(error: typer.TyperException) -> int:
    """An unknown option or a missing argument, with the help to read."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "mmdiff-cache"
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    fail(f"{text.rstrip('.')}; see '{command} --help'")
    return MMDiffError.exit_code
