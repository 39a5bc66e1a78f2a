"""Writes `rules.md` from the registry: for each primitive, what becomes of an adapted kernel there.

Usage:
    python docs/make_rules.py
"""

from __future__ import annotations

from pathlib import Path

from lora_jax._compat import primitives
from lora_jax._transform.registry import rules

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
and other kernels written by hand; elementwise functions of a kernel, sums over it, comparisons, decompositions; and
every primitive that is not in the tables above.
"""


def page() -> str:
    """The page's text."""
    # JAX 0.12 has another name for `closed_call`.
    known = {"closed_call" if name == primitives.closed_call_p.name else name: its for name, its in rules().items()}
    text = HEAD
    for kind, title in KINDS.items():
        rows = [f"| `{name}` | {how} |" for name, (its, how) in sorted(known.items()) if its == kind]
        text += f"\n## {title}\n\n| primitive | how |\n|---|---|\n" + "\n".join(rows) + "\n"
    return text + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(page())
