"""Writes `rules.md` from the registry: for each primitive, what becomes of an adapted kernel there.

Usage:
    python docs/make_rules.py
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from lora_jax._compat import primitives
from lora_jax._transform._interpreter import rules

PAGE = Path(__file__).parent / "rules.md"
HEAD = """\
# Rules

Made from the registry by `python docs/make_rules.py`; a test holds it to that.

What becomes of an adapted kernel, primitive by primitive. Whatever is not in these tables, and the cases that they
name, is refused, with the primitive, the path and the line of the model, or formed where the path is listed in
`dense=`.
"""
KINDS = {
    "low-rank": "Low-rank: the kernel is consumed, and its result has a low-rank term",
    "moved": "Moved along: the result is a kernel again, of the same ranks",
    "rebuilt": "Rebuilt: the function inside is interpreted, and the public function is called again",
}
TAIL = """\
## Refused

`custom_jvp_call` and `custom_vjp_call`, as a derivative of the model's own is defined for a dense kernel; `pallas_call`
and other kernels written by hand; elementwise functions of a kernel, sums over it, comparisons, decompositions. Of
the primitives that JAX names in public:

"""


def page() -> str:
    """The page's text."""
    known = rules()
    text = HEAD
    for kind, title in KINDS.items():
        rows = [f"| `{name}` | {how} |" for name, (its, how) in sorted(known.items()) if its == kind]
        text += f"\n## {title}\n\n| primitive | how |\n|---|---|\n" + "\n".join(rows) + "\n"
    named = {value.name for name in dir(primitives) if hasattr(value := getattr(primitives, name), "multiple_results")}
    refused = ", ".join(f"`{name}`" for name in sorted(named - known.keys()))
    return text + "\n" + TAIL + textwrap.fill(refused, 120, break_long_words=False, break_on_hyphens=False) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
