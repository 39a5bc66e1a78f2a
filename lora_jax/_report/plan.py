"""Compiles a training step ahead of time, from shapes and shardings alone, to say what it will take."""

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
from .._core.paths import Pattern
from .._core.sizes import is_known
from .._core.spec import Spec
from .._errors import SpecError, refuse_keywords
from .._transform.contraction.costs import FormName
from .._transform.kernels import kernels
from .._transform.lora import lora
from .._transform.program import is_array
from .._transform.settings import CustomDerivatives
from ..sharding import like_base as shardings_of
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
    """Compiles the step that trains an adapter on a mesh, and says what it takes of each device; nothing is allocated.

    The step is the loss and its gradient in the adapter, the optimizer's update, and the new adapter. Adapter and
    optimizer state are donated; the parameters are an argument. Beside it the same for full fine-tuning, which trains
    all floating-point parameters.

    Parameters and arguments are `ShapeDtypeStruct`s with `sharding=NamedSharding(mesh, …)`; without a sharding they are
    on every device, whole. The adapter goes where its kernels go, and of the optimizer's state whatever has the shape
    of a trained array goes where that does; the rest is on every device.

    The memory is what the compiler for these devices has laid out. On simulated CPU devices it is an estimate of that
    on others: their compilers order a program otherwise, and the CPU's multiplies 16-bit numbers in float32 and sends
    them so. No dropout key is given, so nothing is dropped.

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
      abstract_params: the parameter tree, as shapes, dtypes and shardings; arrays will do.
      spec: as given to `init`. The roles of axes are traced from `apply`.
      tx: the optax optimizer.
      mesh: of devices of any kind, those of `jax.experimental.topologies` too, which need not be there.
      *abstract_args: the model's positional arguments, arrays as shapes, dtypes and shardings.
      kwargs: the model's keyword arguments, likewise.
      loss: `loss(outputs, *args, **kwargs)`, a scalar, of what `apply` returns. Otherwise the result itself if it is a
        scalar, else the mean of all the floating-point numbers in it, in float32.
      full: whether to compile full fine-tuning too.
      materialize: as given to `lora`.
      custom_derivatives: as given to `lora`.
      form: as given to `lora`.
      param_dtype: of the adapter, as given to `init`.
      **unexpected: none; the model's keyword arguments are in `kwargs`.

    Returns:
      A `Plan`, to print.

    Raises:
      TypeError: for a keyword argument that is not in `kwargs`.
      SpecError: for a mesh without devices, a sharding on another mesh or that does not divide, a loss that is no
        scalar; where `init` would raise it.
      UnsupportedError: where `lora` would raise it.
    """
    refuse_keywords("plan", unexpected)
    if not isinstance(mesh, Mesh):
        raise SpecError(
            f"Expected a `jax.sharding.Mesh` of devices to compile for; got {type(mesh).__name__}.\n"
            '  For more than there are, `jax.config.update("jax_num_cpu_devices", 256)` before the first is used,\n'
            "  or take those of `jax.experimental.topologies`."
        )
    given = (
        _placed("abstract_params", abstract_params, mesh),
        _placed("abstract_args", abstract_args, mesh),
        _placed("kwargs", dict(kwargs or {}), mesh),
    )
    arrays, statics = _parted(given, is_array)
    scalar = functools.partial(_scalar, loss or _mean)
    adapted = lora(apply, materialize=materialize, custom_derivatives=custom_derivatives, form=form)

    def of_adapter(adapter: Any, arrays: Any) -> Array:
        params, args, kwargs = _joined(arrays, statics)
        return scalar(adapted(params, adapter, *args, **kwargs), args, kwargs)

    def of_params(trained: Any, arrays: Any) -> Array:
        params, args, kwargs = _joined(arrays, statics)
        return scalar(apply(_joined(trained, params), *args, **kwargs), args, kwargs)

    axes, kind = dict(mesh.shape), mesh.devices.flat[0].device_kind
    params = _bytes(arrays[0])
    adapter = _adapter(apply, given, spec, param_dtype, mesh)
    ours = _compiled(of_adapter, adapter, arrays, tx, mesh, parameters=params, adapter=_bytes(adapter))
    if not full:
        return Plan(axes, kind, ours, None)
    trained, rest = _parted(arrays[0], _is_floating)
    whole = _compiled(of_params, trained, (rest, *arrays[1:]), tx, mesh, parameters=params, adapter=0)
    return Plan(axes, kind, ours, whole)


def _placed(name: str, tree: Any, mesh: Mesh) -> Any:
    """The tree with its arrays as shapes, dtypes and shardings on the mesh."""

    def place(keys: Any, leaf: Any) -> Any:
        if not is_array(leaf):
            return leaf
        where = f"`{name}{jax.tree_util.keystr(keys)}`"
        if not all(map(is_known, leaf.shape)):
            raise SpecError(
                f"Expected sizes that are numbers, to compile for them; {where} has the shape {tuple(leaf.shape)}.\n"
                "  Give the sizes of one batch."
            )
        sharding = _on(mesh, getattr(leaf, "sharding", None), where)
        try:
            sharding.shard_shape(tuple(leaf.shape))
        except ValueError:
            raise SpecError(
                f"Expected a sharding that divides the array; {where}, shape {tuple(leaf.shape)}, has {sharding.spec} "
                f"on the mesh {dict(mesh.shape)}."
            ) from None
        return _at(leaf, sharding)

    return jax.tree_util.tree_map_with_path(place, tree)


def _at(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtypes.canonicalize_dtype(leaf.dtype), sharding=sharding)


def _on(mesh: Mesh, sharding: Any, where: str) -> NamedSharding:
    if sharding is None or isinstance(sharding, SingleDeviceSharding):  # the second is that of an array nobody placed
        return NamedSharding(mesh, PartitionSpec())
    if not isinstance(sharding, NamedSharding) or dict(sharding.mesh.shape) != dict(mesh.shape):
        got = dict(sharding.mesh.shape) if isinstance(sharding, NamedSharding) else type(sharding).__name__
        raise SpecError(
            f"Expected shardings on the mesh {dict(mesh.shape)}; that of {where} is on {got}.\n"
            "  Give its `NamedSharding` this mesh, or none to have the array on every device."
        )
    return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)


def _adapter(apply: Callable[..., Any], given: Any, spec: Spec, param_dtype: Any, mesh: Mesh) -> Any:
    """The shapes of the adapter, and where its arrays go."""
    params, args, kwargs = given
    arrays, statics = _parted(params, is_array)
    with jax.set_mesh(mesh):
        start = functools.partial(init, spec=spec, kernels=kernels(apply, params, *args, kwargs=kwargs))
        shapes = jax.eval_shape(
            lambda arrays: start(jax.random.key(0), _joined(arrays, statics), param_dtype=param_dtype), arrays
        )
    return jax.tree.map(_at, shapes, shardings_of(shapes, arrays))


def _compiled(
    loss: Callable[..., Array], trained: Any, frozen: Any, tx: Any, mesh: Mesh, *, parameters: int, adapter: int
) -> Step:
    """The step that differentiates `loss(trained, frozen)` in its first argument, compiled and measured."""

    def step(frozen: Any, trained: Any, state: Any) -> tuple[Any, Any, Array]:
        value, gradient = jax.value_and_grad(loss)(trained, frozen)
        updates, state = tx.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state = _state(tx, trained, mesh)
    results = jax.tree.map(lambda leaf: leaf.sharding, (trained, state))
    jitted = jax.jit(step, donate_argnums=(1, 2), out_shardings=(*results, NamedSharding(mesh, PartitionSpec())))
    start = time.perf_counter()
    with jax.set_mesh(mesh):  # for models that name its axes alone
        traced = jitted.trace(frozen, trained, state)
    compiled = traced.lower().compile(compiler_options(mesh.devices.flat[0].platform))
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    # A parameter that the step does not need is no argument of the program, but somebody holds it all the same.
    held = max(memory.argument_size_in_bytes, sum(map(_bytes, (trained, state, frozen))))
    return Step(
        parameters=parameters,
        adapter=adapter,
        optimizer=_bytes(state),
        inputs=_bytes(frozen[1:]),
        temporary=memory.temp_size_in_bytes,
        peak=held + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        flops=_if_known(flops, traced.jaxpr),
        compiled_flops=int(compiled.cost_analysis()["flops"]),
        collectives=_if_known(lambda text: tuple(collectives(text)), compiled.as_text()),
        devices=mesh.size,
        seconds=seconds,
        compiled=compiled,
    )


def _state(tx: Any, trained: Any, mesh: Mesh) -> Any:
    """The shapes of the optimizer's state; what has a trained array's shape goes where that does."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(tx.init, trained)
    return optax.tree_map_params(
        tx,
        lambda leaf, its: _at(leaf, its.sharding if leaf.shape == its.shape else everywhere),
        shapes,
        trained,
        transform_non_params=lambda leaf: _at(leaf, everywhere),
    )


def _scalar(loss: Callable[..., Any], out: Any, args: Any, kwargs: Any) -> Array:
    value = loss(out, *args, **kwargs)
    if getattr(value, "shape", None) != () or not _is_floating(value):
        raise SpecError(
            f"Expected a loss that is one floating-point number; got {jax.tree.map(jax.typeof, value)}.\n"
            "  Give plan(..., loss=lambda outputs, *args: ...)."
        )
    return value


def _mean(out: Any, *args: Any, **kwargs: Any) -> Any:
    """The result itself if it is a scalar; else the mean of its floating-point numbers."""
    del args, kwargs  # only what the model returns
    arrays = [leaf for leaf in jax.tree.leaves(out) if is_array(leaf) and _is_floating(leaf)]
    if len(arrays) == 1 and arrays[0].shape == ():
        return arrays[0]
    count = sum(leaf.size for leaf in arrays)
    return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in arrays) / count if count else out


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _parted(tree: Any, inside: Callable[[Any], bool]) -> tuple[Any, Any]:
    """Two trees of the same structure, with None where a leaf is in the other."""
    its = jax.tree.map(lambda leaf: leaf if inside(leaf) else None, tree)
    return its, jax.tree.map(lambda leaf: None if inside(leaf) else leaf, tree)


def _joined(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda one, other: other if one is None else one, first, second, is_leaf=lambda x: x is None)


def _bytes(tree: Any) -> int:
    """Of one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _if_known(count: Callable[[Any], Any], program: Any) -> Any:
    try:
        return count(program)
    except NotImplementedError:
        return None
