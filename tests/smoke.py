"""Uses an installed lora_jax as a new user would: `make package` runs it in empty environments."""

from __future__ import annotations

import platform
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import lora_jax as lj


def main() -> None:
    """Trains an adapter for a step, saves it in both formats, and merges it."""
    assert Path(lj.__file__).is_relative_to(sys.prefix), f"not the installed package: {lj.__file__}"
    for name in lj.__all__:
        getattr(lj, name)
    model, x = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(3)]), jnp.ones((4, 8))
    params = model.init(jax.random.key(0), x)
    apply, adapter = lj.adapt(model.apply, params, {"**/kernel": lj.LoRA(rank=2, alpha=4)}, x, key=jax.random.key(1))
    tx = optax.adam(1e-2)
    gradient = jax.jit(jax.grad(lambda adapter: jnp.mean((apply(params, adapter, x) - 1) ** 2)))(adapter)
    updates, _ = tx.update(gradient, tx.init(adapter), adapter)
    adapter = optax.apply_updates(adapter, updates)
    mapping = lj.peft.layer("params/layers_{i}", "layers.{i}")
    with tempfile.TemporaryDirectory() as directory:
        lj.save(Path(directory, "orbax"), adapter, base=params)
        lj.peft.export(Path(directory, "peft"), adapter, mapping, base=params)
        restored = lj.restore(Path(directory, "orbax"), base=params)
        loaded = lj.peft.load(Path(directory, "peft"), mapping, params)
    expected = np.asarray(model.apply(lj.merge(params, adapter), x))
    for one in (adapter, restored, loaded):
        np.testing.assert_allclose(apply(params, one, x), expected, rtol=1e-5, atol=1e-6)
    print(lj.explain(model.apply, params, adapter, x))
    versions = f"lora_jax {lj.__version__}, JAX {jax.__version__}, Python {platform.python_version()}"
    print(f"{sys.argv[1]}: works ({versions})")


if __name__ == "__main__":
    main()
