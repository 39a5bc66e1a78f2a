"""`lora`: the transform that applies an adapter to a function."""

from __future__ import annotations

import dataclasses
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .._core.adapter import Adapters
from .._core.attach import attach
from .._core.paths import Pattern, flatten
from .._errors import LoRAError, SpecError
from .boundary import check_function, check_keywords
from .cache import ProgramCache
from .contraction.costs import Form, FormName
from .contraction.forms import custom_jvp_works
from .program import trace
from .settings import CustomDerivatives, make_settings


def lora(
    apply: Callable[..., Any],
    *,
    materialize: Sequence[Pattern] = (),
    custom_derivatives: CustomDerivatives = "refuse",
    form: FormName | None = None,
) -> Callable[..., Any]:
    """Transforms `apply(params, *args)` into `adapted(params, adapter, *args)`, in which kernels act as `W0 + s·A·B`.

        y = x·W0 + ((x·A)·s)·B

    (Hu et al. 2021, arXiv:2106.09685). The model is traced and not modified. `params` is neither modified nor copied;
    only the adapter is differentiated and optimized. The result composes with `jit`, `grad`, `vmap`, `pmap`, `scan`,
    `remat` and shardings as `apply` does.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
    >>> apply = lambda params, x: x @ params["dense"]["kernel"]
    >>> adapter = lj.init(jax.random.key(0), params, {"**/kernel": lj.LoRA(rank=2, alpha=4)})
    >>> lj.lora(apply)(params, adapter, jnp.ones((1, 4)))
    Array([[4., 4., 4.]], dtype=float32)

    Args:
      apply: any JAX function of a parameter tree and other arguments, such as `model.apply`, a plain function, or a
        function that calls `nnx.merge`. Arguments and results that are not arrays (flags, strings, callables, None)
        stay Python values.
      materialize: patterns of paths whose kernels may be materialized, as `W0 + s·A·B`, where the model passes them to
        an operation without a low-rank rule. `explain` shows where that happens.
      custom_derivatives: `"materialize"` allows that for every kernel that the model passes to a function with a custom
        derivative (`custom_vjp`, `custom_jvp`) or to a Pallas kernel.
      form: how contractions are evaluated. `"factored"` is the equation above, which makes no array of the kernel's
        size; `"merged"` is x·(W0 + s·A·B); `"hybrid"` is merged in the forward pass and for the gradient of x, and
        factored for those of A and B. None selects, for each contraction, the form that needs the least memory among
        those within one percent of the fewest FLOPs: factored, unless the rank is large relative to the kernel or the
        kernel is small relative to the activations. With None, a kernel that the model uses in 16 bits is factored,
        because a small update would be rounded away. A kernel that the model uses in fewer bits, such as fp8, is always
        factored; its low-rank term is computed in bfloat16 or wider, with at least the range of the base's result.
        None and `"hybrid"` use a `custom_jvp`. Under `jax.experimental.jet`, which does not support it, None is
        `"factored"`; a function that is already traced (`jet` of a `jit`, `sparsify`) requires `form="factored"`.

    Returns:
      `adapted(params, adapter, *args, dropout_key=None, token_weights=None, **kwargs)`, with the result of `apply`.
      `adapter` is what `init` returns. `dropout_key` is a PRNG key for variants with `dropout`, folded for each path,
      use, loop iteration and, in a `shard_map` with `check_vma`, shard of the activation; without it, no dropout is
      applied. `token_weights` is for `ALoRA`, (tokens…), and for mixtures with `many.Given`, (tokens…, experts): one
      array for all kernels, or `{pattern: array}`. The tokens are the axes of the activation that the kernel does not
      have, in order, such as `(batch, tokens)`; an axis of size 1 is repeated. If sizes coincide and a part of the
      model has its axes in another order, pass it an array of its own.

    Raises:
      AdapterError: at the call, if the adapter does not fit `params`.
      TracingError: if `apply` is not a function, such as a module of Flax; at the call, if Python code of `apply` needs
        the value of an array, as in `if x.sum() > 0:`, or if a result that is not a pytree contains one.
      UnsupportedError: at the call, if an adapted kernel reaches an operation without a low-rank rule and may not be
        materialized; names the primitive, the path and the line of the model.
      SpecError: if an argument has an invalid value; at the call, if a transformation does not support `"hybrid"`.
    """
    check_function(apply)
    if not (isinstance(apply, types.FunctionType) and apply in _adapted):  # of a nested one the outer takes them
        check_keywords(apply, ("dropout_key", "token_weights"), "the function that `lora` returns")
    options = make_settings(materialize=materialize, custom_derivatives=custom_derivatives, form=form)
    cache = ProgramCache()

    def adapted(
        params: Any, adapter: Adapters, /, *args: Any, dropout_key: Any = None, token_weights: Any = None, **kwargs: Any
    ) -> Any:
        # Before the trace, so that an invalid adapter does not raise inside the model.
        kernels = attach(flatten(params)[0], adapter, dropout_key, token_weights)
        settings = dataclasses.replace(options, cache=weakref.ref(cache))
        program = trace(apply, params, args, kwargs)
        try:
            return program.run(kernels, settings)
        except LoRAError:
            raise
        except Exception as error:
            # `jet` fails at a `custom_jvp`, with an error that depends on the version of JAX.
            if settings.form not in (None, Form.HYBRID) or custom_jvp_works(jax.tree.leaves((program.arrays, kernels))):
                raise
            if settings.form is None:
                return program.run(kernels, dataclasses.replace(settings, form=Form.FACTORED))
            raise SpecError(
                "Expected a form without a `custom_jvp`, which the transformation around the call, such as "
                "`jax.experimental.jet`, does not support; got form='hybrid'.\n"
                "  Use 'factored' or 'merged', or None, which is 'factored' there."
            ) from error

    adapted.__name__ = f"lora({getattr(apply, '__name__', type(apply).__name__)})"
    _adapted.add(adapted)
    return adapted


_adapted: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()  # the functions that `lora` has returned
