"""Set up once, before JAX starts: eight devices on the CPU; bounded, repeatable property tests; one key."""

import os

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",  # the programs are small and run once: compiling them is what takes time
        "--xla_llvm_disable_expensive_passes=true",
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile("bounded", max_examples=40, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("bounded")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
