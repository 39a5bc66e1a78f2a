"""Initializes an adapter from a spec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from .._errors import SpecError
from .adapter import Adapter
from .keys import key_for
from .paths import flatten
from .spec import Problem, Spec, fit, refuse
from .uses import Kernel


def init(
    key: Array, params: Any, spec: Spec, *, kernels: Mapping[str, Kernel] | None = None, param_dtype: Any = jnp.float32
) -> dict[str, Adapter]:
    """Initializes the adapter that a spec describes. Initially it does not change the model.

    For `LoRA`, `a` is uniform in ±1/√fan_in and `b` is zero, as in the code of Hu et al. 2021 (arXiv:2106.09685).
    Works under `jit` and `eval_shape`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"query": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    >>> lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=2, alpha=4)})
    {'query/kernel': Adapter(LoRA(rank=2, alpha=4), 'io', a=float32[4, 2], b=float32[2, 3])}

    Args:
      key: PRNG key, typed or raw; consumed. It is folded by path, so the values for a leaf do not depend on others.
      params: the parameter tree, or its `ShapeDtypeStruct`s.
      spec: ordered mapping to a variant, or to None for "leave frozen". Its keys are patterns on `/`-joined paths (`*`
        one segment, `**` any number, `{a,b}` either, or a compiled regular expression), and targets, such as
        `targets.all_linear`. The first key that matches a path decides.
      kernels: from `kernels(apply, params, *args)`, for targets and the roles of axes. Without it, a kernel of two axes
        is `(in, out)`, one of more axes needs `axes=` in its variant, and targets are errors. `axes=` takes precedence.
      param_dtype: dtype of all arrays of the adapter, for any dtype of the base.

    Returns:
      `{path: Adapter}`.

    Raises:
      SpecError: if a rule is invalid or has no effect, or if leaves cannot be adapted as the spec says (unknown axes, a
        rank that is too large, a vector); one error lists all of these leaves.
    """
    leaves = flatten(params)[0]
    adapters, problems = {}, []
    for path, choice in fit(spec, leaves, kernels).items():
        try:
            arrays = choice.variant.init(key_for(key, path), leaves[path], choice.axes, param_dtype)
        except SpecError as error:
            problems.append(Problem(path, leaves[path], choice, str(error)))
            continue
        adapters[path] = Adapter(choice.variant, choice.axes, **arrays)
    refuse(problems, len(adapters))
    return adapters
