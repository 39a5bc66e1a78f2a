"""Settings made before JAX starts: eight CPU devices, bounded and repeatable property tests, one key."""

import functools
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # The programs are small and run once, so compilation dominates.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        # Later versions always use these emitters, which compile three times as slowly, and do not have the flag.
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time is compilation: a second run compiles only the programs that have changed.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import jax.numpy as jnp
import pytest

hypothesis.settings.register_profile("bounded", max_examples=40, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("bounded")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tokenizer of SmolLM2; a test is skipped where its package is not installed."""
    import smollm2  # here, because few tests need it

    try:
        return smollm2.load_tokenizer()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@functools.cache
def compiles_float16() -> bool:
    """Whether XLA can compile float16 for this processor; it cannot without F16C, for example with SSE4.2."""
    try:
        jax.block_until_ready(jnp.ones(3).astype(jnp.float16))
    except jax.errors.JaxRuntimeError:
        return False
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    try:
        return (yield)
    except jax.errors.JaxRuntimeError as error:
        if "Failed to materialize symbols" in str(error) and not compiles_float16():
            pytest.skip("XLA cannot compile float16 for this processor")
        raise
