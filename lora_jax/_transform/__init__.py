"""The transform: `lora(apply)`, an interpreter of traced functions, and its rules by kind."""

from . import rules as rules
