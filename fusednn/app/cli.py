"""The command `fusednn`. Whatever goes wrong is one line on stderr: what is wrong; what to do."""

import io
import os
import sys

import torch

from .options import CommandError, parser, printable


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`, or the process's own.

    Returns the exit code: 0, or 2 for a wrong call, 1 for a run that failed, 130 when interrupted, 141 when nobody
    reads the output any more; the last two as a shell has them.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may be no text
    try:
        try:
            return _run(argv)
        finally:
            _flush_stdout()
    except CommandError as failure:
        return _report(failure.code, str(failure))
    except KeyboardInterrupt:
        return _report(130, "interrupted; run it again to start over")
    except BrokenPipeError:
        return 141
    except OSError as error:
        return _report(1, printable(f"{error}; make room where the output goes"))


def _report(code: int, line: str) -> int:
    print("error:", line, file=sys.stderr)
    return code


def _flush_stdout() -> None:
    """Flush, so that a failure is met here; the interpreter, where it meets one when it ends, prints a traceback."""
    if sys.stdout is None:  # closed by whoever started us
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _run(argv: list[str] | None) -> int:
    top = parser()
    try:
        options = top.parse(argv)
    except SystemExit:  # argparse has printed the help or the version
        return 0
    if options.command is None:
        top.print_help()
        return 2
    # matplotlib raises where this names no backend of its own, and the picture is drawn without one.
    os.environ.pop("MPLBACKEND", None)
    try:
        from .train import train
    except ImportError as error:
        raise CommandError(2, f"{error}; install what the command line needs: pip install 'fusednn[app]'") from error
    try:
        train(options)
    except FloatingPointError as error:
        raise CommandError(1, f"{error}; try a smaller --lr") from error
    except (MemoryError, RuntimeError) as error:
        # The allocator of CPU tensors raises a plain RuntimeError.
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise CommandError(1, "out of memory; try a smaller --hidden or --batch-size") from error
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
