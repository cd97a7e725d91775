"""The command line. Commands live in the modules beside this; each imports what is heavy when it runs."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from bitdistill.cli import (
    artifacts,
    augment,
    compare,
    exchange,
    native,
    perplexity,
    plan,
    predict,
    probe,
    runs,
    serve,
    start,
    sweep,
)
from bitdistill.errors import BitDistillError

EPILOG = """Exit codes: 0 success, 1 a bug, 2 usage, 3 recipe, 4 data, 5 model, 6 artifact or checkpoint,
7 file system, 8 training diverged, 9 missing optional package, 10 a training process ended too early,
130 or 143 interrupted after saving."""

COMMANDS: dict[str, list[tuple[str, Callable[..., Any]]]] = {
    "Start": [
        ("demo", runs.demo),
        ("init", start.init),
        ("plan", plan.plan),
        ("run", runs.run),
        ("sweep", sweep.sweep),
    ],
    "One stage (and the ones it needs)": [
        ("sft", runs.sft),
        ("refine", runs.refine),
        ("pretrain", runs.pretrain),
        ("augment", augment.augment),
        ("distill", runs.distill),
        ("export", exchange.export),
        ("eval", runs.evaluate),
    ],
    "Use and look": [
        ("predict", predict.predict),
        ("import", exchange.import_),
        ("results", artifacts.results),
        ("compare", compare.compare),
        ("perplexity", perplexity.perplexity),
        ("report", artifacts.report),
        ("inspect", artifacts.inspect),
        ("probe-layers", probe.probe_layers),
    ],
    "Native engine": [
        ("generate", native.generate),
        ("chat", native.chat),
        ("serve", serve.serve),
        ("bench", native.bench),
    ],
    "More": [
        ("tokenize", artifacts.tokenize),
        ("needle", artifacts.needle),
        ("tasks", artifacts.tasks),
        ("version", artifacts.version),
    ],
}

app = typer.Typer(
    name="bitdistill",
    help="Turn a Hugging Face causal language model into a 1.58-bit (ternary) model for a task.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(artifacts.installed_version())
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Turn a Hugging Face causal language model into a 1.58-bit (ternary) model for a task."""


for _panel, _entries in COMMANDS.items():
    for _name, _function in _entries:
        app.command(_name, rich_help_panel=_panel)(_function)


# What the file system may refuse at any moment; any other OSError is a bug.
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


def main() -> None:
    """Entry point: typed errors become one line and their exit code, anything else is reported as a bug."""
    try:
        app(prog_name="bitdistill")
    except BitDistillError as error:
        _fail(" ".join(str(error).split("\n")), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as error:
        if error.errno not in _STORAGE:
            _bug()
        _fail(f"{error.filename or 'file system'}: {error.strerror}; free space or mend permissions", 7)
    except Exception:
        _bug()


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _bug() -> None:
    import traceback

    traceback.print_exc()
    _fail(f"this is a bug in bitdistill {artifacts.installed_version()}; please report the lines above", 1)


if __name__ == "__main__":
    main()
