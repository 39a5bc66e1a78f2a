"""Classifies each leaf by the traced model: a kernel of attention, of an MLP, the output head, a bias, a norm.

One walk over the program marks, for each value, the kernels of which it contains products since the last contraction:

- The product of two activations that both contain such products is an attention score, and an activation that is
  contracted with a score is a value. The kernels of both are attention, as is a kernel that is multiplied with the
  result.
- The output head is the one kernel whose product is a result and is not multiplied with another kernel.
- A vector that is multiplied with an activation is the scale of a norm, and a vector that is added is a bias. It is the
  bias of a norm if the activation was just scaled, or divided by a square root.

The names of the leaves decide only if the program does not; they are listed here.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from .._compat import ClosedJaxpr, Jaxpr, JaxprEqn, live_equations
from .walk import Marks, Walk, union

Shape = tuple[int, ...]

ATTENTION_NAMES = frozenset("attention attn cross_attention cross_attn self_attention self_attn".split())
HEAD_NAMES = frozenset("classifier embed_out head lm_head logits logits_dense output_head score".split())


def kinds(jaxpr: ClosedJaxpr, paths: Sequence[str]) -> dict[str, str | None]:
    """Returns the kind of each parameter; the first arguments of the program are the parameters with these paths."""
    others = jaxpr.jaxpr.invars[len(paths) :]
    walk = _Kinds(paths, constants=0 if others else _INPUT | _RAW)
    inputs = [_INPUT | (_RAW if _is_float(var) else 0) for var in others]
    results = walk.mark(jaxpr.jaxpr, [*walk.parameters, *inputs])
    walk.results = [mark for mark, var in zip(results, jaxpr.jaxpr.outvars, strict=True) if _is_float(var)]
    tables, convolved = walk.paths(walk.tables), walk.paths(walk.convolved)
    linear = walk.paths(walk.multiplied) - tables - convolved
    attention = linear & walk.paths(walk.attention)
    head = _head(walk, linear - attention, tables)
    attention |= {path for path in linear - head if not ATTENTION_NAMES.isdisjoint(path.split("/"))}
    paths_of = {
        "embedding": tables,
        "convolution": convolved,
        "attention": attention,
        "head": head,
        "mlp": linear,
        "norm": walk.paths(walk.norms),
        "bias": walk.paths(walk.biases),
    }
    return {path: next((kind for kind, found in paths_of.items() if path in found), None) for path in paths}


def _head(walk: _Kinds, linear: set[str], tables: set[str]) -> set[str]:
    """Returns the output head: the kernel whose product is a result, or kernels with a name in `HEAD_NAMES`."""
    without_residual = [walk.paths(mark >> walk.products) for mark in walk.results if not mark & _RAW]
    single = {path for paths in without_residual if len(paths) == 1 for path in paths}
    if single & tables:
        return set()  # the embedding is the head
    products = [walk.paths(mark >> walk.products) for mark in walk.results]
    last = set().union(*products) - walk.paths(walk.consumed)
    if len(last) == 1:
        return last & single & linear
    return {path for path in linear if not HEAD_NAMES.isdisjoint(path.split("/"))}


# The bits of a mark. They are followed by three for each parameter: whether the value depends only on parameters, with
# this one among them; whether it contains a product of the parameter; whether it is a score of such a product.
_INPUT = 1  # depends on the model's inputs
_RAW = 2  # an input is a summand of it, as in a residual stream
_ATTENDED = 4  # comes from the product of scores and values
_ROOT = 8  # was just divided by a square root
_SCALED = 16  # was just scaled by a vector
_VECTOR = 32  # a parameter with one axis
_ONE_HOT = 64  # zeros and ones from a comparison
_AVERAGED = 128  # a parameter times a constant, which is part of a running average and not a bias
_FLAGS = 8

_CONTRACTIONS = {"dot_general", "ragged_dot_general", "conv_general_dilated"}
_SUMS = {"add", "add_any", "concatenate", "dynamic_update_slice", "scatter", "scatter-add", "select_n"}
_MOVES = set(
    "broadcast_in_dim convert_element_type copy copy_p name optimization_barrier pad reduce_precision reshape rev "
    "sharding_constraint slice squeeze transpose".split()
)
_PRODUCTS = {"mul", "div", "neg"}
_FUNCTIONS = set(  # their results no longer count as the parameter
    "argmax argmin cbrt erf exp exp2 expm1 integer_pow log log1p logistic pow reduce_max reduce_min reduce_sum rsqrt "
    "sqrt square tanh".split()
)


class _Kinds(Walk):
    """The walk over the program. Its sets of parameters are integers with one bit each, the lowest for the first."""

    def __init__(self, paths: Sequence[str], constants: int) -> None:
        super().__init__(constants)
        self.names = paths
        count = len(paths)
        self.only, self.products, self.scores = _FLAGS, _FLAGS + count, _FLAGS + 2 * count  # the lowest bit of each
        self.all = (1 << count) - 1
        self.parameters = [1 << self.only + number for number in range(count)]
        self.multiplied = self.convolved = self.tables = 0  # how a parameter is used
        self.attention = self.consumed = self.norms = self.biases = 0
        self.outputs: dict[str, Shape] = {}  # of each kernel, the sizes of its outputs in its product
        self.unbroadcast: dict[int, Shape] = {}  # of a parameter, its shape before it was broadcast
        self.results: list[int] = []

    def equations(self, jaxpr: Jaxpr) -> list[JaxprEqn]:
        """Returns the equations that a result depends on."""
        return live_equations(jaxpr)

    def paths(self, bits: int) -> set[str]:
        """Returns the paths of a set of parameters; higher bits are ignored."""
        bits &= self.all
        found = set()
        while bits:
            lowest = bits & -bits
            found.add(self.names[lowest.bit_length() - 1])
            bits ^= lowest
        return found

    def _parameters(self, mark: int) -> int:
        """The parameters that a value depends on, if it depends on nothing else."""
        return 0 if mark & _INPUT else mark >> self.only & self.all

    def _products(self, mark: int) -> int:
        return mark >> self.products & self.all

    def _scores(self, mark: int) -> int:
        return mark >> self.scores & self.all

    def mark_results(self, eqn: JaxprEqn, operands: Marks, *, transposed: bool) -> Sequence[int]:
        """Returns the marks of the results of an equation without inner functions."""
        depends = _INPUT if any(mark & _INPUT for mark in operands) else 0
        if transposed:  # a derivative inside the model
            return [depends] * len(eqn.outvars)
        floats = [(var, mark) for var, mark in zip(eqn.invars, operands, strict=True) if _is_float(var)]
        result = self._float_mark(eqn, floats, operands) if any(mark for _, mark in floats) else depends
        name = eqn.primitive.name
        one_hot = operands[0] & _ONE_HOT if name in _MOVES else _ONE_HOT if name == "eq" else 0
        return [(result if _is_float(var) else depends) | one_hot for var in eqn.outvars]

    def _float_mark(self, eqn: JaxprEqn, floats: Sequence[tuple[Any, int]], operands: Marks) -> int:
        name = eqn.primitive.name
        if name in _CONTRACTIONS:
            return self._contraction(eqn, operands[0], operands[1])
        lookup = name in ("gather", "dynamic_slice")
        if lookup and (table := self._parameters(operands[0])) and _selects_rows(eqn, operands):
            self.tables |= table  # with more axes left it may be a kernel again
            return _INPUT | table << self.products
        if name == "broadcast_in_dim" and (parameter := self._parameters(operands[0])):
            self.unbroadcast[parameter] = _without_ones(_shape(eqn.invars[0]))
        if name == "pallas_call" or "attention" in name:
            products = [self._products(mark) for _, mark in floats if mark & _INPUT]
            if sum(map(bool, products)) >= 3:  # query, key and value
                return self._attend(*products)
        active = [mark for _, mark in floats if mark & _INPUT]
        if not active:
            return self._parameter_mark(name, floats)
        scaled = self._find_vectors(name, floats, active) if name in ("add", "add_any", "mul") else 0
        both, either = _intersection(active), union(active)
        is_sum = name in _SUMS
        kept = (either if is_sum else both) & _RAW | (both if is_sum else either) & _ATTENDED
        if name in ("sqrt", "rsqrt"):
            kept |= _ROOT
        if name in _MOVES or name in _PRODUCTS:
            kept |= either & (_ROOT | _SCALED) | scaled
        return _INPUT | kept | either >> self.products << self.products

    def _parameter_mark(self, name: str, floats: Sequence[tuple[Any, int]]) -> int:
        """The mark of a value that depends on no input."""
        if name in _FUNCTIONS:
            return 0
        marked = [(var, mark) for var, mark in floats if mark]
        vectors = all(mark & _VECTOR or _is_vector(var) for var, mark in marked)
        averaged = _AVERAGED if name == "mul" and len(marked) == 1 else 0
        return union([mark & ~_VECTOR for _, mark in marked]) | (_VECTOR if vectors else 0) | averaged

    def _find_vectors(self, name: str, floats: Sequence[tuple[Any, int]], active: Sequence[int]) -> int:
        """Records parameters that are multiplied with an activation or added to it."""
        normalized = union(active) & (_ROOT | _SCALED)
        scaled = 0
        for var, mark in floats:
            parameter = self._parameters(mark)
            if not parameter or (name != "mul" and mark & _AVERAGED):
                continue
            vector = bool(mark & _VECTOR) or _is_vector(var)
            if name == "mul" and (vector or normalized):
                self.norms |= parameter
                scaled = _SCALED
            elif name != "mul" and normalized:
                self.norms |= parameter
            elif name != "mul" and vector:
                self.biases |= parameter
            elif name != "mul":  # a bias with several axes, as in attention, has the shape of the kernel's outputs
                shape = self.unbroadcast.get(parameter, _without_ones(_shape(var)))
                products = self.paths(self._products(union(active)))
                self.biases |= parameter if any(self.outputs.get(path) == shape for path in products) else 0
        return scaled

    def _contraction(self, eqn: JaxprEqn, lhs: int, rhs: int) -> int:
        sides, depends = (self._parameters(lhs), self._parameters(rhs)), (lhs | rhs) & _INPUT
        kernels = sides[0] | sides[1]
        if kernels:
            x = lhs | rhs if depends else 0
            self.consumed |= self._products(x)
            if x & _ATTENDED:
                self.attention |= kernels
            if (lhs | rhs) & _ONE_HOT:
                self.tables |= kernels
            self._find_outputs(eqn, sides)
            return depends | kernels << self.products | (0 if depends else kernels << self.only)
        scores = self._scores(lhs) | self._scores(rhs)
        products = self._products(lhs), self._products(rhs)
        if scores and all(mark & _RAW or mark >> self.products for mark in (lhs, rhs)):
            return self._attend(scores, *products)
        if all(products):
            self.consumed |= products[0] | products[1]
            return depends | (products[0] | products[1]) << self.scores
        return (lhs | rhs) & ~(_RAW | _ROOT | _SCALED | _VECTOR | _ONE_HOT) | lhs & rhs & _RAW

    def _find_outputs(self, eqn: JaxprEqn, sides: tuple[int, int]) -> None:
        """Records the kernels of a contraction and the sizes of their outputs."""
        if eqn.primitive.name == "conv_general_dilated":
            self.convolved |= sides[1]
            outputs = eqn.params["dimension_numbers"].rhs_spec[:1]
            self._set_outputs(sides[1], _shape(eqn.invars[1]), outputs)
            return
        numbers, groups = eqn.params.get("dimension_numbers"), ()
        if numbers is None:
            numbers = eqn.params["ragged_dot_dimension_numbers"]
            numbers, groups = numbers.dot_dimension_numbers, tuple(numbers.rhs_group_dimensions)
        for bits, var, summed, batch in zip(sides, eqn.invars, *numbers, strict=False):
            shape = _shape(var)
            free = [axis for axis in range(len(shape)) if axis not in summed and axis not in (*batch, *groups)]
            if bits and summed and free:
                self.multiplied |= bits
                self._set_outputs(bits, shape, (*batch, *free))

    def _set_outputs(self, kernels: int, shape: Shape, outputs: Sequence[int]) -> None:
        for path in self.paths(kernels):
            self.outputs[path] = _without_ones([shape[axis] for axis in outputs])

    def _attend(self, *kernels: int) -> int:
        for bits in kernels:
            self.attention |= bits
            self.consumed |= bits
        return _INPUT | _ATTENDED


def _selects_rows(eqn: JaxprEqn, operands: Marks) -> bool:
    """Whether a lookup selects rows; a single row only if its index depends on an input, not just on an iteration."""
    sizes = eqn.params["slice_sizes"]
    if eqn.primitive.name == "dynamic_slice":
        return len(_without_ones(sizes)) == 1 and any(mark & _INPUT for mark in operands[1:])
    numbers = eqn.params["dimension_numbers"]
    selected = {axis for axis in numbers.start_index_map if sizes[axis] == 1}
    left = len(sizes) - len({*selected, *numbers.collapsed_slice_dims, *numbers.operand_batching_dims})
    return bool(selected) and left == 1


def _intersection(marks: Sequence[int]) -> int:
    return functools.reduce(operator.and_, marks, -1)


def _is_float(var: Any) -> bool:
    dtype = getattr(var.aval, "dtype", None)  # None for a token
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _is_vector(var: Any) -> bool:
    """Whether an array has at most one axis whose size is not 1, and at least one axis."""
    return len(_shape(var)) > 0 and len(_without_ones(_shape(var))) <= 1


def _shape(var: Any) -> Shape:
    return tuple(var.aval.shape)


def _without_ones(shape: Sequence[int]) -> Shape:
    return tuple(size for size in shape if size != 1)
