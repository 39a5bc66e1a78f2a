"""QPiSSA: PiSSA with a quantized residual (Meng et al. 2024, arXiv:2404.02948)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax import Array

from .._core.adapter import Adapters
from .._core.targets import Rules
from .._core.uses import Kernel
from ..quant import Format
from ._leaf import Start
from ._quantized import alternate


def qpissa(
    params: Any,
    adapter: Adapters,
    formats: Rules[Format | None],
    *,
    iterations: int = 1,
    kernels: Mapping[str, Kernel] | None = None,
    niter: int | None = None,
    key: Array | None = None,
) -> Start:
    """Initializes the factors with the kernel's r largest singular values, and quantizes the rest.

        Q = 0;   repeat T times:   s·A·B = the best approximation of W0 - Q of rank r,   Q = quantize(W0 - s·A·B)

    (Meng et al. 2024, arXiv:2404.02948, QPiSSA). The first iteration is `pissa` with a quantized residual. The residual
    has smaller values than the kernel, and so a smaller error. The loop is that of `loftq`, which begins with the other
    step: there the factors correct the error, here they are the principal part, which is trained.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32)) + 1}
    >>> adapter = lj.init(jax.random.key(1), params, {"kernel": lj.LoRA(rank=4, alpha=8)})
    >>> base, adapter = starts.qpissa(params, adapter, {"kernel": lj.quant.NF4()})
    >>> merged = lj.merge(lj.quant.dequantize(base), adapter)["kernel"]
    >>> plain = lj.quant.dequantize(lj.quant.quantize(params, {"kernel": lj.quant.NF4()}))["kernel"]
    >>> bool(jnp.linalg.norm(params["kernel"] - merged) < 0.9 * jnp.linalg.norm(params["kernel"] - plain))
    True

    Args:
      params: as for `loftq`.
      adapter: as for `loftq`. A kernel that `formats` does not select is unchanged, and so is its adapter; `pissa`
        initializes it without quantizing.
      formats: as for `loftq`.
      iterations: T, at least 1. The authors' default is 1; they also use 5.
      kernels: as for `loftq`.
      niter: as for `pissa`.
      key: as for `pissa`.

    Returns:
      The base with quantized leaves, and the adapter. `as_plain` does not apply to it.

    Raises:
      SpecError: as for `loftq`.
      AdapterError: as for `loftq`.
    """
    return alternate(
        params, adapter, formats, factors_first=True, iterations=iterations, kernels=kernels, niter=niter, key=key
    )
