"""`adapt`: `kernels`, `init` and `lora` in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from .._core.adapter import Adapter
from .._core.init import init
from .._core.paths import Pattern
from .._core.spec import Spec
from .._errors import refuse_keywords
from .contraction.costs import FormName
from .kernels import kernels
from .lora import lora
from .settings import CustomDerivatives


def adapt(
    apply: Callable[..., Any],
    params: Any,
    spec: Spec,
    /,
    *args: Any,
    key: Array,
    kwargs: Mapping[str, Any] | None = None,
    param_dtype: Any = jnp.float32,
    materialize: Sequence[Pattern] = (),
    custom_derivatives: CustomDerivatives = "refuse",
    form: FormName | None = None,
    **unexpected: Any,
) -> tuple[Callable[..., Any], dict[str, Adapter]]:
    """Returns the adapted function and its adapter: `kernels`, `init` and `lora` in one call.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"up": jnp.ones((4, 8)), "head": jnp.ones((8, 3))}
    >>> model = lambda params, x: jnp.tanh(x @ params["up"]) @ params["head"]
    >>> x = jnp.ones((2, 4))
    >>> spec = {lj.targets.all_linear: lj.LoRA(rank=2, alpha=4)}
    >>> apply, adapter = lj.adapt(model, params, spec, x, key=jax.random.key(0))
    >>> adapter
    {'up': Adapter(LoRA(rank=2, alpha=4), 'io', a=float32[4, 2], b=float32[2, 8])}
    >>> apply(params, adapter, x).shape, apply.kernels["head"].kind
    ((2, 3), 'head')

    Args:
      apply: the model, `apply(params, *args, **kwargs)`.
      params: the parameter tree.
      spec: as in `init`; its keys are patterns, and targets such as `targets.all_linear`.
      *args: the model's positional arguments, for tracing; arrays may be `ShapeDtypeStruct`s.
      key: PRNG key; consumed.
      kwargs: the model's keyword arguments, for tracing; arrays may be `ShapeDtypeStruct`s.
      param_dtype: as in `init`.
      materialize: as in `lora`.
      custom_derivatives: as in `lora`.
      form: as in `lora`.
      **unexpected: not allowed; the model's keyword arguments are passed in `kwargs`.

    Returns:
      `adapted(params, adapter, *args, **kwargs)`, as `lora` returns it, and the adapter. `adapted.kernels` is what
      `kernels` returns.

    Raises:
      TypeError: if there are other keyword arguments.
      SpecError: if `init` or `lora` raises it.
      TracingError: if `apply` is not a function, or Python code of the model needs the value of an array.
    """
    refuse_keywords("adapt", unexpected)
    adapted = lora(apply, materialize=materialize, custom_derivatives=custom_derivatives, form=form)
    found = kernels(apply, params, *args, kwargs=kwargs)
    adapter = init(key, params, spec, kernels=found, param_dtype=param_dtype)
    adapted.kernels = found  # type: ignore[attr-defined]
    return adapted, adapter
