"""`lora(apply)`: the function that the whole library is about."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .._core.adapter import Adapters
from .._core.attach import attach, check_active
from .._core.paths import Pattern, flatten
from .._errors import LoRAError, SpecError
from .boundary import check_names
from .cache import ProgramCache
from .contraction.costs import Form, FormName
from .contraction.forms import custom_jvp_works
from .program import trace
from .settings import CustomDerivatives, settings_of


def lora(
    apply: Callable[..., Any],
    *,
    materialize: Sequence[Pattern] = (),
    custom_derivatives: CustomDerivatives = "refuse",
    form: FormName | None = None,
) -> Callable[..., Any]:
    """Turns `apply(params, *args)` into `adapted(params, adapter, *args)`, in which kernels act as `W0 + s·A·B`.

        y = x·W0 + ((x·A)·s)·B

    (Hu et al. 2021, arXiv:2106.09685). The model is traced as it stands and need not know. `params` is neither changed
    nor copied; the adapter is the one thing to differentiate and optimize. The result composes with `jit`, `grad`,
    `vmap`, `pmap`, `scan`, `remat` and shardings as `apply` does.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
    >>> apply = lambda params, x: x @ params["dense"]["kernel"]
    >>> adapter = lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=2, alpha=4)})
    >>> lj.lora(apply)(params, adapter, jnp.ones((1, 4)))
    Array([[4., 4., 4.]], dtype=float32)

    Args:
      apply: any JAX function of a parameter tree and other arguments: `model.apply`, a plain function, one around
        `nnx.merge`. Arguments and results that are no arrays (flags, strings, callables, None) stay Python values.
      materialize: patterns of paths whose kernels may be materialized, as `W0 + s·A·B`, where the model passes them to
        an operation that has no low-rank rule. `explain` says where that happens.
      custom_derivatives: `"materialize"` allows that for every kernel that the model passes to a function with a
        derivative of its own (`custom_vjp`, `custom_jvp`), or to a Pallas kernel.
      form: how contractions are evaluated. `"factored"` is the equation above, which forms nothing of a kernel's size;
        `"merged"` is x·(W0 + s·A·B); `"hybrid"` is merged in the forward pass and for the gradient of x, factored for
        those of A and B. None takes for each contraction the form that needs the least memory among those within one
        percent of the fewest operations: factored, unless the rank is wide against the kernel or the kernel small
        against the activations. What is used in 16 bits stays factored, as a small update would be rounded away. What
        is used in fewer, as a kernel cast to fp8 for its product, is factored whatever is asked for: the low-rank term
        is computed in bfloat16 or wider, and never in a narrower range than that of the base's result.
        The choice, like `"hybrid"`, needs a `custom_jvp`, which `jax.experimental.jet` does not support: there None
        is `"factored"`. What transforms a function that is traced already (`jet` of a `jit`, `sparsify`) comes too late
        for that: ask for `"factored"`.

    Returns:
      `adapted(params, adapter, *args, dropout_key=None, active_tokens=None, **kwargs)`, with the result of `apply`.
      `adapter` is what `init` returns. `dropout_key` is a PRNG key for variants with `dropout`, folded for each path,
      use and turn of a loop; without it nothing is dropped. `active_tokens` is for `ALoRA`: booleans, of the shape
      that the axes of tokens have where its kernels are used, such as `(batch, tokens)`.

    Raises:
      AdapterError: at the call, if the adapter does not fit `params`.
      TracingError: at the call, if Python code of `apply` needs the value of an array, as in `if x.sum() > 0:`, or if
        a result that JAX does not know holds one.
      UnsupportedError: at the call, if an adapted kernel reaches an operation without a low-rank form and is not
        listed in `materialize`: the primitive, the path and the line of the model.
      SpecError: if there is no such form; at the call, if the transformation around it does not support `"hybrid"`.
    """
    check_names(apply, ("dropout_key", "active_tokens"), "lora")
    asked = settings_of(materialize=materialize, custom_derivatives=custom_derivatives, form=form)
    functions = ProgramCache()

    def adapted(
        params: Any, adapter: Adapters, /, *args: Any, dropout_key: Any = None, active_tokens: Any = None, **kwargs: Any
    ) -> Any:
        # First: what is wrong with the adapter is not the model's fault.
        kernels = attach(flatten(params)[0], adapter, dropout_key, active_tokens)
        check_active(adapter, active_tokens)
        settings = dataclasses.replace(asked, cache=weakref.ref(functions))
        program = trace(apply, params, args, kwargs)
        try:
            return program.run(kernels, settings)
        except LoRAError:
            raise
        except Exception as error:
            # `jet` fails at a `custom_jvp`, with an error that depends on JAX's version.
            if settings.form not in (None, Form.HYBRID) or custom_jvp_works(jax.tree.leaves((program.arrays, kernels))):
                raise
            if settings.form is None:
                return program.run(kernels, dataclasses.replace(settings, form=Form.FACTORED))
            raise SpecError(
                "Expected a form without a `custom_jvp`, which the transformation around the call, such as "
                "`jax.experimental.jet`, does not support; got form='hybrid'.\n"
                "  Ask for 'factored' or 'merged', or for None, which is 'factored' there."
            ) from error

    adapted.__name__ = f"lora({getattr(apply, '__name__', type(apply).__name__)})"
    return adapted
