"""`python -m lora_jax.cli` is `lora-jax`."""

import sys

from . import main

sys.exit(main())
