"""The transform: `lora(apply)`, the interpreter of traced functions, and the rules of the primitives."""

from . import rules as rules
