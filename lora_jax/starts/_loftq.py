"""LoftQ: LoRA-Fine-Tuning-Aware Quantization (Li et al. 2023, arXiv:2310.08659)."""

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


def loftq(
    params: Any,
    adapter: Adapters,
    formats: Rules[Format | None],
    *,
    iterations: int = 1,
    kernels: Mapping[str, Kernel] | None = None,
    niter: int | None = None,
    key: Array | None = None,
) -> Start:
    """Quantizes the base, and initializes the factors with the best approximation of the error of the quantization.

        A·B = 0;   repeat T times:   Q = quantize(W0 - s·A·B),   s·A·B = the best approximation of W0 - Q of rank r

    (Li et al. 2023, arXiv:2310.08659). Each factor has the square root of the singular values, divided by
    √s, so the result does not depend on α. PEFT ignores s, and is only correct for α = r.

    The first iteration reduces the error of each kernel, ‖W0 - Q - s·A·B‖, for any format; further ones usually reduce
    it more. The rest of the error remains, so the model is not exactly the same as before.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import starts
    >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
    >>> adapter = lj.init(jax.random.key(1), params, {"kernel": lj.LoRA(rank=4, alpha=8)})
    >>> base, adapter = starts.loftq(params, adapter, {"kernel": lj.quant.NF4()})
    >>> merged = lj.merge(lj.quant.dequantize(base), adapter)["kernel"]
    >>> plain = lj.quant.dequantize(lj.quant.quantize(params, {"kernel": lj.quant.NF4()}))["kernel"]
    >>> bool(jnp.linalg.norm(params["kernel"] - merged) < 0.9 * jnp.linalg.norm(params["kernel"] - plain))
    True

    Args:
      params: the parameter tree that the adapter was initialized for, not quantized; not modified. NumPy arrays are
        moved to the device one at a time.
      adapter: from `init`; the factors of kernels that `formats` selects are replaced. Other arrays, such as DoRA's
        magnitude, stay those of `params`, and so do the adapters of kernels that stay arrays.
      formats: as the spec of `quant.quantize`. A leaf without factors is only quantized.
      iterations: T, at least 1.
      kernels: as for `quant.quantize`, for targets and the roles of axes of `formats`.
      niter: as for `pissa`: power iterations of a randomized decomposition; None for the exact one.
      key: PRNG key for the randomized decomposition; consumed.

    Returns:
      The base with quantized leaves, and the adapter. A direction in which a kernel has no error gets zero factors,
      which cannot be trained: a kernel of zeros needs another initialization.

    Raises:
      SpecError: where `quant.quantize` raises it; if `iterations` is below 1, only one of `niter` and `key` is given,
        or a scale is not positive; if a variant is not of the form s·A·B for all tokens, or `Full` trains a leaf that
        `formats` selects.
      AdapterError: if the adapter does not fit `params` or adapts only some layers of a stack, or an adapted kernel is
        already quantized.
    """
    return alternate(
        params, adapter, formats, factors_first=False, iterations=iterations, kernels=kernels, niter=niter, key=key
    )
