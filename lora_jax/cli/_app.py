"""The commands, the options that all of them have, and errors in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import cyclopts
from cyclopts import App, Group, Parameter

from .._errors import LoRAError, SpecError
from .._version import __version__
from ._console import error, print_json, results
from ._report import Report, UsageError

_EPILOGUE = """\
Adapters are directories in PEFT's format, or checkpoints that `lora_jax.save` wrote. Exit codes: 0, all is well;
1, adapters differ or one is invalid; 2, wrong arguments. Completion: `lora-jax --install-completion`.
"""

app = App("lora-jax", help="Look into LoRA adapters, compare, verify, convert and merge them.", version=__version__)
app.help_epilogue = _EPILOGUE
app.default_parameter = Parameter(negative="", show_default=lambda value: value if value is not False else "")
app.register_install_completion_command()

# Each is imported when it is called, with the libraries that it needs.
for _name in ("inspect", "diff", "verify", "merge", "convert", "compress", "combine"):
    app.command(f"lora_jax.cli._{_name}:{_name}", name=_name)

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
    except (LoRAError, OSError, UsageError) as problem:
        if traceback:
            raise
        error(str(problem))
        return 2 if isinstance(problem, UsageError | SpecError) else 1
    if not isinstance(report, Report):  # of --help and --version
        return 0
    if as_json:
        print_json(report.data)
    else:
        console = results()
        for shown in report.shown():
            console.print(shown)
    return report.code


def run(arguments: Sequence[str]) -> int:
    """Runs a command and returns the exit code."""
    try:
        code: int = app.meta(list(arguments), exit_on_error=False, print_error=False, result_action="return_value")
    except cyclopts.CycloptsError as problem:
        error(" ".join(str(problem).split()))
        return 2
    return code or 0
