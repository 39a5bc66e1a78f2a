"""Set up once, before JAX starts: eight devices on the CPU; bounded, repeatable property tests; one key."""

import os
from importlib.metadata import version

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # The programs are small and run once: compiling them is what takes time.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        # Later versions always use these emitters, which take three times as long to compile, and do not know the flag.
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
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
