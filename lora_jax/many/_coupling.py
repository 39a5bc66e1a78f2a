"""Finds operations of a model that combine the examples of a batch, such as the mean of BatchNorm in training.

The model is traced with two and with three examples, and the programs are compared. A value that has an element for
each example must not become one that has not, and an operation along an axis must not depend on the number of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from .._compat import Jaxpr, JaxprEqn, normal_parameters, user_line
from .._report.flops import bodies
from .._transform.program import Program, is_array, trace

# Operations along one axis whose result has the size of the operand, by the parameter with the axis or axes.
_ALONG_AXIS = {
    "cumsum": "axis",
    "cumprod": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumlogsumexp": "axis",
    "sort": "dimension",
    "rev": "dimensions",
}

_WITH_REDUCER = ("scatter", "select_and_scatter", "reduce")  # their jaxpr is of two elements


def couplings(
    apply: Callable[..., Any], params: Any, args: Sequence[Any], kwargs: Mapping[str, Any], axes: Any
) -> list[str]:
    """Returns a line for each operation that combines examples; none if the model cannot be traced for two and three.

    Args:
      apply: the model.
      params: its parameters.
      args: its other arguments, with a batch of any size.
      kwargs: likewise.
      axes: a tree like `(args, kwargs)`, with the axis of the examples of each leaf, or -1 for none.
    """

    def resized(count: int) -> Any:
        def resize(leaf: Any, axis: int) -> Any:
            if axis < 0 or not is_array(leaf):
                return leaf
            shape = (*leaf.shape[:axis], count, *leaf.shape[axis + 1 :])
            return jax.ShapeDtypeStruct(shape, leaf.dtype)

        return jax.tree.map(resize, (tuple(args), dict(kwargs)), axes)

    programs: list[Program] = []
    for count in (2, 3):
        try:
            programs.append(trace(apply, params, *resized(count)))
        except Exception:  # a model of one batch size: whatever it raises, it cannot be compared
            return []
    one, other = (program.jaxpr.jaxpr for program in programs)
    return list(dict.fromkeys(_compare(one, other)))


def _compare(one: Jaxpr, other: Jaxpr) -> Iterator[str]:
    for x, y in zip(one.eqns, other.eqns, strict=False):
        if x.primitive is not y.primitive:  # the program depends on the number of examples
            return
        is_function = not x.primitive.name.startswith(_WITH_REDUCER)
        inner = list(zip(bodies(x), bodies(y), strict=False)) if is_function else []
        if _combines_in_loop(x, y) if inner else _combines(x, y):
            yield f"`{x.primitive.name}` at {user_line(x) or 'an unknown line'}"
        for x_body, y_body in inner:
            yield from _compare(getattr(x_body, "jaxpr", x_body), getattr(y_body, "jaxpr", y_body))


def _combines(x: JaxprEqn, y: JaxprEqn) -> bool:
    inputs = [_growth(a, b) for a, b in zip(x.invars, y.invars, strict=True)]
    if not any(growth != 1 for growth in inputs) or x.primitive.name == "optimization_barrier":
        return False
    outputs = [_growth(a, b) for a, b in zip(x.outvars, y.outvars, strict=True)]
    if any(growth != 1.5 for growth in outputs):  # 1: an axis is lost; 2.25: pairs of examples
        return True
    return _sizes_along_axes(x) != _sizes_along_axes(y)


def _growth(x: Any, y: Any) -> float:
    """Returns the number of elements with three examples over that with two."""
    sizes = [getattr(var.aval, "size", 0) for var in (x, y)]
    return sizes[1] / sizes[0] if all(sizes) else 1


def _sizes_along_axes(eqn: JaxprEqn) -> list[int]:
    axes = eqn.params.get(_ALONG_AXIS.get(eqn.primitive.name, ""), ())
    operand: Any = eqn.invars[0].aval
    return [operand.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,))]


def _combines_in_loop(x: JaxprEqn, y: JaxprEqn) -> bool:
    """Whether the equations are a loop over the examples with a carry."""
    if x.primitive.name != "scan":
        return False
    loop, other = normal_parameters(x), normal_parameters(y)
    return bool(loop["length"] != other["length"] and loop["num_carry"])
