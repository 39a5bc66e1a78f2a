"""`plan`: compiles a training step ahead of time, from shapes and shardings, and measures its cost."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, dtypes
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from .._compat import compiler_options
from .._core.init import init
from .._core.memory import is_in_host_memory, kind_of
from .._core.paths import Pattern
from .._core.sizes import is_known
from .._core.spec import Spec
from .._core.stored import StoredLeaf
from .._errors import SpecError, refuse_keywords
from .._transform.contraction.costs import FormName
from .._transform.kernels import kernels
from .._transform.lora import lora
from .._transform.program import is_array
from .._transform.settings import CustomDerivatives
from ..sharding import like_base
from .collectives import collectives
from .flops import flops
from .step import Plan, Step


def plan(
    apply: Callable[..., Any],
    abstract_params: Any,
    spec: Spec,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    /,
    *abstract_args: Any,
    kwargs: Mapping[str, Any] | None = None,
    loss: Callable[..., Any] | None = None,
    full: bool = True,
    materialize: Sequence[Pattern] = (),
    custom_derivatives: CustomDerivatives = "refuse",
    form: FormName | None = None,
    param_dtype: Any = jnp.float32,
    **unexpected: Any,
) -> Plan:
    """Compiles a training step on a mesh and reports its memory, FLOPs and bytes sent per device; allocates nothing.

    The step computes the loss and its gradient with respect to the adapter, and updates the adapter. Adapter and
    optimizer state are donated; the parameters are an argument. For comparison, the step of full fine-tuning, which
    trains all floating-point parameters, is compiled as well.

    Parameters and arguments are `ShapeDtypeStruct`s with `sharding=NamedSharding(mesh, …)`; those without a sharding
    are replicated. The adapter is sharded like its kernels. Optimizer state with the shape of a trained array is
    sharded like that array; other state is replicated. Parameters with the memory kind `"pinned_host"`, such as those
    of `sharding.to_host`, and the state of `optim.offload` are in host memory. In full fine-tuning, all parameters are
    in device memory, and quantized leaves are arrays of their dtype.

    The memory is as reported by the compiler. On simulated CPU devices it is an estimate for others, whose compilers
    schedule programs differently, and CPUs multiply and send 16-bit values as float32. The step has no dropout.

    >>> import jax, jax.numpy as jnp, lora_jax as lj, optax
    >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec
    >>> mesh = Mesh(jax.devices()[:1], ("data",))
    >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
    >>> x = jax.ShapeDtypeStruct((64, 4096), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    >>> apply = lambda params, x: x @ params["kernel"]
    >>> found = lj.plan(apply, params, {"kernel": lj.LoRA(rank=8, alpha=16)}, optax.adam(1e-3), mesh, x)
    >>> found.lora.adapter, found.lora.optimizer, found.full.optimizer
    (262144, 524292, 134217732)

    Args:
      apply: the model, `apply(params, *args, **kwargs)`.
      abstract_params: the parameter tree, as arrays or `ShapeDtypeStruct`s.
      spec: as for `init`. The roles of axes are traced from `apply`.
      tx: the optax optimizer.
      mesh: a mesh of any devices, including those of `jax.experimental.topologies`, which need not be attached.
      *abstract_args: the model's positional arguments; arrays may be `ShapeDtypeStruct`s.
      kwargs: the model's keyword arguments, likewise.
      loss: `loss(outputs, *args, **kwargs)`, a scalar function of what `apply` returns. By default, the output itself
        if it is a scalar, otherwise the mean of its floating-point elements in float32.
      full: whether to compile full fine-tuning too.
      materialize: as for `lora`.
      custom_derivatives: as for `lora`.
      form: as for `lora`.
      param_dtype: dtype of the adapter, as for `init`.
      **unexpected: none; the model's keyword arguments are in `kwargs`.

    Returns:
      A `Plan`, which prints as a table.

    Raises:
      TypeError: for a keyword argument that is not in `kwargs`.
      SpecError: if `mesh` is not a mesh of devices; if a sharding is on another mesh or does not divide its array; if
        the loss is not a scalar; where `init` would raise it.
      UnsupportedError: where `lora` would raise it.
    """
    refuse_keywords("plan", unexpected)
    if not isinstance(mesh, Mesh):
        raise SpecError(
            f"Expected a `jax.sharding.Mesh` of devices to compile for; got {type(mesh).__name__}.\n"
            '  To simulate devices, call `jax.config.update("jax_num_cpu_devices", 256)` before JAX is used,\n'
            "  or use the devices of `jax.experimental.topologies`."
        )
    inputs = (
        _abstract("abstract_params", abstract_params, mesh),
        _abstract("abstract_args", abstract_args, mesh),
        _abstract("kwargs", dict(kwargs or {}), mesh),
    )
    arrays, statics = _partition(inputs, is_array)
    scalar_loss = functools.partial(_scalar_loss, loss or _mean)
    adapted = lora(apply, materialize=materialize, custom_derivatives=custom_derivatives, form=form)

    def lora_loss(adapter: Any, arrays: Any) -> Array:
        params, args, kwargs = _combine(arrays, statics)
        return scalar_loss(adapted(params, adapter, *args, **kwargs), args, kwargs)

    def full_loss(trained: Any, arrays: Any) -> Array:
        params, args, kwargs = _combine(arrays, statics)
        return scalar_loss(apply(_combine(trained, params), *args, **kwargs), args, kwargs)

    axes, kind = dict(mesh.shape), mesh.devices.flat[0].device_kind
    params = _bytes(arrays[0])
    adapter = _abstract_adapter(apply, inputs, spec, param_dtype, mesh)
    lora_step = _compile(lora_loss, adapter, arrays, tx, mesh, parameters=params, adapter=_bytes(adapter))
    if not full:
        return Plan(axes, kind, lora_step, None)
    dense_params = jax.tree.map(
        lambda leaf: _struct(leaf, leaf.sharding.with_memory_kind(None)),
        arrays[0],
        is_leaf=lambda leaf: isinstance(leaf, StoredLeaf),
    )
    trained, frozen = _partition(dense_params, _is_floating)
    params = _bytes(dense_params)
    full_step = _compile(full_loss, trained, (frozen, *arrays[1:]), tx, mesh, parameters=params, adapter=0)
    return Plan(axes, kind, lora_step, full_step)


def _abstract(name: str, tree: Any, mesh: Mesh) -> Any:
    """Replaces the arrays of a tree by `ShapeDtypeStruct`s with shardings on the mesh."""

    def abstract(keys: Any, leaf: Any) -> Any:
        if not is_array(leaf):
            return leaf
        where = f"`{name}{jax.tree_util.keystr(keys)}`"
        if not all(map(is_known, leaf.shape)):
            raise SpecError(
                f"Expected known sizes, to compile for them; {where} has the shape {tuple(leaf.shape)}.\n"
                "  Pass the sizes of one batch."
            )
        sharding = _sharding_on(mesh, getattr(leaf, "sharding", None), where)
        try:
            sharding.shard_shape(tuple(leaf.shape))
        except ValueError:
            raise SpecError(
                f"Expected a sharding that divides the array; {where}, shape {tuple(leaf.shape)}, has {sharding.spec} "
                f"on the mesh {dict(mesh.shape)}."
            ) from None
        return _struct(leaf, sharding)

    return jax.tree_util.tree_map_with_path(abstract, tree)


def _struct(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    dtype = dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)  # that of PRNG keys is one
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def _sharding_on(mesh: Mesh, sharding: Any, where: str) -> NamedSharding:
    if sharding is None or isinstance(sharding, SingleDeviceSharding):  # an array has the latter by default
        return NamedSharding(mesh, PartitionSpec(), memory_kind=None if sharding is None else sharding.memory_kind)
    if not isinstance(sharding, NamedSharding) or dict(sharding.mesh.shape) != dict(mesh.shape):
        got = dict(sharding.mesh.shape) if isinstance(sharding, NamedSharding) else type(sharding).__name__
        raise SpecError(
            f"Expected shardings on the mesh {dict(mesh.shape)}; that of {where} is on {got}.\n"
            "  Use a `NamedSharding` on this mesh, or no sharding to replicate the array."
        )
    return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def _abstract_adapter(apply: Callable[..., Any], inputs: Any, spec: Spec, param_dtype: Any, mesh: Mesh) -> Any:
    """Returns the adapter as `ShapeDtypeStruct`s with shardings."""
    params, args, kwargs = inputs
    arrays, statics = _partition(params, is_array)
    with jax.set_mesh(mesh):
        traced = kernels(apply, params, *args, kwargs=kwargs)

        def init_adapter(arrays: Any) -> Any:
            return init(jax.random.key(0), _combine(arrays, statics), spec, kernels=traced, param_dtype=param_dtype)

        shapes = jax.eval_shape(init_adapter, arrays)
    return jax.tree.map(_struct, shapes, like_base(shapes, arrays))


def _compile(
    loss: Callable[..., Array], trained: Any, frozen: Any, tx: Any, mesh: Mesh, *, parameters: int, adapter: int
) -> Step:
    """Compiles the step that minimizes `loss(trained, frozen)` over `trained`, and measures it."""

    def step(frozen: Any, trained: Any, state: Any) -> tuple[Any, Any, Array]:
        value, gradient = jax.value_and_grad(loss)(trained, frozen)
        updates, state = tx.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state = _abstract_state(tx, trained, mesh)
    results = jax.tree.map(lambda leaf: leaf.sharding, (trained, state))
    jitted = jax.jit(step, donate_argnums=(1, 2), out_shardings=(*results, NamedSharding(mesh, PartitionSpec())))
    start = time.perf_counter()
    with jax.set_mesh(mesh):  # for models with shardings that are `PartitionSpec`s
        traced = jitted.trace(frozen, trained, state)
    compiled = traced.lower().compile(compiler_options(mesh.devices.flat[0].platform))
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    host = sum(_bytes(leaf) for leaf in jax.tree.leaves((trained, state, frozen)) if is_in_host_memory(leaf))
    # The compiler for CPUs does not tell the memory of the host from that of the device.
    arguments = memory.argument_size_in_bytes - (0 if memory.host_argument_size_in_bytes else host)
    # An unused parameter is not an argument of the compiled program, but its memory is still allocated.
    held = max(arguments, sum(map(_bytes, (trained, state, frozen))) - host)
    return Step(
        parameters=parameters,
        adapter=adapter,
        optimizer=_bytes(state),
        inputs=_bytes(frozen[1:]),
        temporary=memory.temp_size_in_bytes,
        host=host,
        peak=held + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        flops=_if_known(flops, traced.jaxpr),
        compiled_flops=int(compiled.cost_analysis()["flops"]),
        collectives=_if_known(lambda text: tuple(collectives(text)), compiled.as_text()),
        devices=mesh.size,
        seconds=seconds,
        compiled=compiled,
    )


def _abstract_state(tx: Any, trained: Any, mesh: Mesh) -> Any:
    """Returns the optimizer state as `ShapeDtypeStruct`s; arrays of the shape of a trained one are sharded like it."""
    with jax.set_mesh(mesh):
        jaxpr, shapes = jax.make_jaxpr(tx.init, return_shape=True)(trained)  # the types have memory spaces
    replicated = [NamedSharding(mesh, PartitionSpec(), memory_kind=kind_of(array)) for array in jaxpr.out_avals]
    state = jax.tree.unflatten(jax.tree.structure(shapes), map(_struct, jaxpr.out_avals, replicated))

    def like(leaf: Any, array: Any) -> Any:
        same = array.sharding.with_memory_kind(leaf.sharding.memory_kind)
        return _struct(leaf, same) if leaf.shape == array.shape else leaf

    return optax.tree_map_params(tx, like, state, trained)


def _scalar_loss(loss: Callable[..., Any], out: Any, args: Any, kwargs: Any) -> Array:
    value = loss(out, *args, **kwargs)
    if getattr(value, "shape", None) != () or not _is_floating(value):
        raise SpecError(
            f"Expected a loss that is a floating-point scalar; got {jax.tree.map(jax.typeof, value)}.\n"
            "  Pass plan(..., loss=lambda outputs, *args: ...)."
        )
    return value


def _mean(out: Any, *args: Any, **kwargs: Any) -> Any:
    """Returns the output itself if it is a scalar, otherwise the mean of its floating-point elements."""
    del args, kwargs  # for the signature of a loss
    arrays = [leaf for leaf in jax.tree.leaves(out) if is_array(leaf) and _is_floating(leaf)]
    if len(arrays) == 1 and arrays[0].shape == ():
        return arrays[0]
    count = sum(leaf.size for leaf in arrays)
    return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in arrays) / count if count else out


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _partition(tree: Any, predicate: Callable[[Any], bool]) -> tuple[Any, Any]:
    """Splits a tree into two of the same structure, with None for the leaves of the other one."""
    selected = jax.tree.map(lambda leaf: leaf if predicate(leaf) else None, tree)
    return selected, jax.tree.map(lambda leaf: None if predicate(leaf) else leaf, tree)


def _combine(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda one, other: other if one is None else one, first, second, is_leaf=lambda x: x is None)


def _bytes(tree: Any) -> int:
    """Returns the bytes on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _if_known(count: Callable[[Any], Any], program: Any) -> Any:
    try:
        return count(program)
    except NotImplementedError:
        return None
