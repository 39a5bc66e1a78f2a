"""The commands, the options that all of them have, and errors in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import cyclopts
from cyclopts import App, Group, Parameter

from .._errors import LoRAError, SpecError
from .._version import __version__
from ._combine import combine
from ._compress import compress
from ._console import error, print_json, print_report
from ._convert import convert
from ._diff import diff
from ._inspect import inspect
from ._merge import merge
from ._report import Report, UsageError, advice
from ._verify import verify

_HELP = """\
Look into LoRA adapters, compare, verify, convert and merge them.

Adapters are directories in PEFT's format, or checkpoints that `lora_jax.save` wrote. Exit codes: 0 if all is well, 1 if
adapters differ or one is invalid, 2 for wrong arguments. `lora-jax COMMAND --help` has an example.
"""

app = App("lora-jax", help=_HELP, version=__version__)
app.default_parameter = Parameter(negative="", show_default=False)
app.register_install_completion_command()
for _command in (inspect, diff, verify, merge, convert, compress, combine):
    app.command(_command)

_ALL = Group("All commands")


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    as_json: Annotated[bool, Parameter("--json", group=_ALL, help="Print JSON on stdout.")] = False,
    traceback: Annotated[bool, Parameter(group=_ALL, help="Show where an error is raised.")] = False,
) -> int:
    command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    try:
        report = command(*bound.args, **bound.kwargs)
        if not isinstance(report, Report):  # of --help and --version
            return 0
        if as_json:
            print_json(report.data)
        else:
            print_report(report)
    except Exception as problem:
        if traceback:
            raise
        if isinstance(problem, LoRAError | OSError | UsageError):
            error(advice(str(problem)))
        else:
            error(f"{type(problem).__name__}: {problem}\n--traceback shows where it is raised.")
        return 2 if isinstance(problem, UsageError | SpecError) else 1
    return report.code


def run(arguments: Sequence[str]) -> int:
    """Runs a command and returns the exit code."""
    try:
        code: int = app.meta(list(arguments), exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as problem:
        error(" ".join(str(problem).split()))
        return 2
    return code or 0
