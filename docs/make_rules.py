"""Writes `rules.md` from the registry: for each primitive, what happens to an adapted kernel.

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

Generated from the registry by `python docs/make_rules.py`; a test checks that it is up to date.

For each primitive, this page says what happens to an adapted kernel. Any other primitive, and the cases that the tables
exclude, raise an error that names the primitive, the path and the line of the model. If the path is listed in
`materialize=`, the kernel is materialized there.
"""
KINDS = {
    "low-rank": "Consumed: the result is the base's result plus a low-rank term",
    "moved": "Moved: the result is again an adapted kernel",
    "rebuilt": "Rebuilt: the inner function is interpreted, and the public function is called again",
}
TAIL = """\
## Refused

`custom_jvp_call` and `custom_vjp_call`, because a custom derivative is defined for a dense kernel
(`custom_derivatives="materialize"` materializes kernels there); `pallas_call` and other hand-written kernels;
elementwise functions of a kernel, sums over it, comparisons, decompositions; and every primitive that is not in the
tables above.
"""


def page() -> str:
    """The page's text."""
    # JAX 0.12 renamed `closed_call`.
    renamed = {primitives.closed_call_p.name: "closed_call"}
    known = {renamed.get(name, name): entry for name, entry in rules().items()}
    text = HEAD
    for kind, title in KINDS.items():
        rows = [f"| `{name}` | {how} |" for name, (rule_kind, how) in sorted(known.items()) if rule_kind == kind]
        text += f"\n## {title}\n\n| primitive | how |\n|---|---|\n" + "\n".join(rows) + "\n"
    return text + "\n" + TAIL


if __name__ == "__main__":
    PAGE.write_text(page())
