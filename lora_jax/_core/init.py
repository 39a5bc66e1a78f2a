"""Makes an adapter: for each leaf that the spec names, its variant's arrays at the start."""

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
    """Makes the adapter that a spec describes; the model behaves as before until its first update.

    For a low-rank variant `a` is uniform in ±1/√fan_in and `b` is zero, so that `W0 + s·A·B` is `W0` (the start of
    Hu et al.'s own code, arXiv:2106.09685). Works under `jit` and `eval_shape`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"query": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    >>> lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=2, alpha=4)})
    {'query/kernel': Adapter(LoRA(rank=2, alpha=4), 'io', a=float32[4, 2], b=float32[2, 3])}

    Args:
      key: PRNG key, typed or raw; consumed. Each path folds its name into it: one more layer changes no other's start.
      params: the parameter tree, or its `ShapeDtypeStruct`s. Not changed.
      spec: ordered mapping to a variant, or to None for "leave alone". Its keys are patterns on `/`-joined paths (`*`
        one segment, `**` any number, `{a,b}` either, or a compiled regular expression), and targets, such as
        `targets.all_linear`. The first that matches a path decides.
      kernels: from `kernels(apply, params, *args)`: the roles of the axes; a leaf whose roles the model does not tell
        is then an error. Without it a matrix is `(in, out)`, a kernel of more axes needs `axes=` in its variant, and
        no target can be a key. `axes=` outranks it.
      param_dtype: dtype of all the adapter's arrays, whatever the base's is.

    Returns:
      `{path: Adapter}`.

    Raises:
      SpecError: for a rule that decides nothing or cannot be meant; for leaves that cannot be adapted as the spec says
        (axes that are not known, a rank that is too large, a vector), all of them in one error.
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
