"""Tells from the traced model what each leaf is: a kernel of attention, of an MLP, the output head, a bias, a norm.

One pass over the program follows, for each value, which kernels' products it consists of since the last contraction:

- The product of two activations that both consist of such products is a score; what a score is contracted with is a
  value. The kernels of both are attention, and so is a kernel that is multiplied with their product.
- The output head is the one kernel whose product is a result, and goes into no other kernel.
- A vector that multiplies is the scale of a norm, and one that is added is a bias: of a norm where the value was just
  scaled, or divided by a root.

Names decide what the program does not tell; they are listed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from .._compat import ClosedJaxpr, Jaxpr, JaxprEqn, live_equations
from .walk import Marks, Walk, union

Shape = tuple[int, ...]

ATTENTION_NAMES = frozenset("attention attn cross_attention cross_attn self_attention self_attn".split())
HEAD_NAMES = frozenset("classifier embed_out head lm_head logits logits_dense output_head score".split())


def kinds(jaxpr: ClosedJaxpr, paths: Sequence[str]) -> dict[str, str | None]:
    """The kind of each parameter; the first arguments of the program are the parameters, with these paths."""
    others = jaxpr.jaxpr.invars[len(paths) :]
    walk = _Kinds(paths, constants=0 if others else _INPUT | _RAW)
    given = [_INPUT | (_RAW if _is_float(var) else 0) for var in others]
    results = walk.through(jaxpr.jaxpr, [*walk.parameters, *given])
    walk.results = [mark for mark, var in zip(results, jaxpr.jaxpr.outvars, strict=True) if _is_float(var)]
    tables, convolved = walk.paths(walk.tables), walk.paths(walk.convolved)
    linear = walk.paths(walk.multiplied) - tables - convolved
    attention = linear & walk.paths(walk.attention)
    head = _head(walk, linear - attention, tables)
    attention |= {path for path in linear - head if not ATTENTION_NAMES.isdisjoint(path.split("/"))}
    of_kind = {
        "embedding": tables,
        "convolution": convolved,
        "attention": attention,
        "head": head,
        "mlp": linear,
        "norm": walk.paths(walk.norms),
        "bias": walk.paths(walk.biases),
    }
    return {path: next((kind for kind, its in of_kind.items() if path in its), None) for path in paths}


def _head(walk: _Kinds, linear: set[str], tables: set[str]) -> set[str]:
    """The output head, if there is one: the kernel whose product is a result, or those with a name."""
    ends = [walk.paths(mark >> walk.products) for mark in walk.results if not mark & _RAW]
    single = {path for paths in ends if len(paths) == 1 for path in paths}
    if single & tables:
        return set()  # the embedding is the head
    products = [walk.paths(mark >> walk.products) for mark in walk.results]
    last = set().union(*products) - walk.paths(walk.consumed)
    if len(last) == 1:
        return last & single & linear
    return {path for path in linear if not HEAD_NAMES.isdisjoint(path.split("/"))}


# The bits of a mark. Beyond them are three for each parameter: whether the value is made of it alone, whether it
# consists of a product of it, and whether it is a score that such a product has a part in.
_INPUT = 1  # depends on the model's inputs
_RAW = 2  # an input is a summand of it: a residual stream
_ATTENDED = 4  # comes from the product of scores and values
_ROOT = 8  # was just divided by a root
_SCALED = 16  # was just scaled by a vector
_VECTOR = 32  # a parameter of one axis
_ONE_HOT = 64  # zeros and ones, by a comparison
_AVERAGED = 128  # a parameter times a number: added to something it is a running average, and no bias
_FLAGS = 8

_CONTRACTIONS = {"dot_general", "ragged_dot_general", "conv_general_dilated"}
_SUMS = {"add", "add_any", "concatenate", "dynamic_update_slice", "scatter", "scatter-add", "select_n"}
_MOVES = set(
    "broadcast_in_dim convert_element_type copy copy_p name optimization_barrier pad reduce_precision reshape rev "
    "sharding_constraint slice squeeze transpose".split()
)
_PRODUCTS = {"mul", "div", "neg"}
_FUNCTIONS = set(  # after which a parameter is another one
    "argmax argmin cbrt erf exp exp2 expm1 integer_pow log log1p logistic pow reduce_max reduce_min reduce_sum rsqrt "
    "sqrt square tanh".split()
)


class _Kinds(Walk):
    """The pass over the program, and what it finds: sets of parameters as bits, the first parameter's the lowest."""

    def __init__(self, paths: Sequence[str], constants: int) -> None:
        super().__init__(constants)
        self.names = paths
        count = len(paths)
        self.own, self.products, self.scores = _FLAGS, _FLAGS + count, _FLAGS + 2 * count  # where the bits start
        self.all = (1 << count) - 1
        self.parameters = [1 << self.own + number for number in range(count)]
        self.multiplied = self.convolved = self.tables = 0  # how a parameter is used
        self.attention = self.consumed = self.norms = self.biases = 0
        self.outputs: dict[str, Shape] = {}  # of a kernel, the sizes of its outputs as it is multiplied
        self.stood: dict[int, Shape] = {}  # of a parameter, its shape before it was repeated
        self.results: list[int] = []

    def equations(self, jaxpr: Jaxpr) -> list[JaxprEqn]:
        """Those that a result needs."""
        return live_equations(jaxpr)

    def paths(self, bits: int) -> set[str]:
        """The parameters of the lowest bits."""
        bits &= self.all
        found = set()
        while bits:
            lowest = bits & -bits
            found.add(self.names[lowest.bit_length() - 1])
            bits ^= lowest
        return found

    def _own(self, mark: int) -> int:
        """The parameters that a value is made of, if of nothing else."""
        return 0 if mark & _INPUT else mark >> self.own & self.all

    def _products(self, mark: int) -> int:
        return mark >> self.products & self.all

    def _scores(self, mark: int) -> int:
        return mark >> self.scores & self.all

    def plain(self, eqn: JaxprEqn, operands: Marks, *, transposed: bool) -> Sequence[int]:
        """The marks of the results of an equation that holds no function."""
        depends = _INPUT if any(mark & _INPUT for mark in operands) else 0
        if transposed:  # a derivative inside the model
            return [depends] * len(eqn.outvars)
        floats = [(var, mark) for var, mark in zip(eqn.invars, operands, strict=True) if _is_float(var)]
        result = self._of_floats(eqn, floats, operands) if any(mark for _, mark in floats) else depends
        name = eqn.primitive.name
        one_hot = operands[0] & _ONE_HOT if name in _MOVES else _ONE_HOT if name == "eq" else 0
        return [(result if _is_float(var) else depends) | one_hot for var in eqn.outvars]

    def _of_floats(self, eqn: JaxprEqn, floats: Sequence[tuple[Any, int]], operands: Marks) -> int:
        name = eqn.primitive.name
        if name in _CONTRACTIONS:
            return self._contraction(eqn, operands[0], operands[1])
        if name in ("gather", "dynamic_slice") and (own := self._own(operands[0])) and _takes_rows(eqn, operands):
            self.tables |= own  # what has more axes left may be a kernel again
            return _INPUT | own << self.products
        if name == "broadcast_in_dim" and (own := self._own(operands[0])):
            self.stood[own] = _without_ones(_shape(eqn.invars[0]))
        if name == "pallas_call" or "attention" in name:
            products = [self._products(mark) for _, mark in floats if mark & _INPUT]
            if sum(map(bool, products)) >= 3:  # query, key and value
                return self._attend(*products)
        active = [mark for _, mark in floats if mark & _INPUT]
        if not active:
            return self._of_parameters(name, floats)
        scaled = self._vectors(name, floats, active) if name in ("add", "add_any", "mul") else 0
        both, either = _common(active), union(active)
        sums = name in _SUMS
        kept = (either if sums else both) & _RAW | (both if sums else either) & _ATTENDED
        if name in ("sqrt", "rsqrt"):
            kept |= _ROOT
        if name in _MOVES or name in _PRODUCTS:
            kept |= either & (_ROOT | _SCALED) | scaled
        return _INPUT | kept | either >> self.products << self.products

    def _of_parameters(self, name: str, floats: Sequence[tuple[Any, int]]) -> int:
        if name in _FUNCTIONS:
            return 0
        made = [(var, mark) for var, mark in floats if mark]
        vectors = all(mark & _VECTOR or _is_vector(var) for var, mark in made)
        averaged = _AVERAGED if name == "mul" and len(made) == 1 else 0
        return union([mark & ~_VECTOR for _, mark in made]) | (_VECTOR if vectors else 0) | averaged

    def _vectors(self, name: str, floats: Sequence[tuple[Any, int]], active: Sequence[int]) -> int:
        """Notes the parameters that an activation is multiplied with, or that are added to it."""
        normalized = union(active) & (_ROOT | _SCALED)
        scaled = 0
        for var, mark in floats:
            own = self._own(mark)
            if not own or (name != "mul" and mark & _AVERAGED):
                continue
            vector = bool(mark & _VECTOR) or _is_vector(var)
            if name == "mul" and (vector or normalized):
                self.norms |= own
                scaled = _SCALED
            elif name != "mul" and normalized:
                self.norms |= own
            elif name != "mul" and vector:
                self.biases |= own
            elif name != "mul":  # one of several axes, as attention has: it has the shape of the product's outputs
                shape = self.stood.get(own, _without_ones(_shape(var)))
                products = self.paths(self._products(union(active)))
                self.biases |= own if any(self.outputs.get(path) == shape for path in products) else 0
        return scaled

    def _contraction(self, eqn: JaxprEqn, lhs: int, rhs: int) -> int:
        own, depends = (self._own(lhs), self._own(rhs)), (lhs | rhs) & _INPUT
        kernels = own[0] | own[1]
        if kernels:
            x = lhs | rhs if depends else 0
            self.consumed |= self._products(x)
            if x & _ATTENDED:
                self.attention |= kernels
            if (lhs | rhs) & _ONE_HOT:
                self.tables |= kernels
            self._multiplied(eqn, own)
            return depends | kernels << self.products | (0 if depends else kernels << self.own)
        scores = self._scores(lhs) | self._scores(rhs)
        products = self._products(lhs), self._products(rhs)
        if scores and all(mark & _RAW or mark >> self.products for mark in (lhs, rhs)):
            return self._attend(scores, *products)
        if all(products):
            self.consumed |= products[0] | products[1]
            return depends | (products[0] | products[1]) << self.scores
        return (lhs | rhs) & ~(_RAW | _ROOT | _SCALED | _VECTOR | _ONE_HOT) | lhs & rhs & _RAW

    def _multiplied(self, eqn: JaxprEqn, own: tuple[int, int]) -> None:
        """Notes that parameters are kernels of a contraction, and their outputs."""
        if eqn.primitive.name == "conv_general_dilated":
            self.convolved |= own[1]
            outputs = eqn.params["dimension_numbers"].rhs_spec[:1]
            self._of_shape(own[1], _shape(eqn.invars[1]), outputs)
            return
        numbers, groups = eqn.params.get("dimension_numbers"), ()
        if numbers is None:
            numbers = eqn.params["ragged_dot_dimension_numbers"]
            numbers, groups = numbers.dot_dimension_numbers, tuple(numbers.rhs_group_dimensions)
        for bits, var, summed, batch in zip(own, eqn.invars, *numbers, strict=False):
            shape = _shape(var)
            free = [axis for axis in range(len(shape)) if axis not in summed and axis not in (*batch, *groups)]
            if bits and summed and free:
                self.multiplied |= bits
                self._of_shape(bits, shape, (*batch, *free))

    def _of_shape(self, kernels: int, shape: Shape, outputs: Sequence[int]) -> None:
        for path in self.paths(kernels):
            self.outputs[path] = _without_ones([shape[axis] for axis in outputs])

    def _attend(self, *kernels: int) -> int:
        for bits in kernels:
            self.attention |= bits
            self.consumed |= bits
        return _INPUT | _ATTENDED


def _takes_rows(eqn: JaxprEqn, operands: Marks) -> bool:
    """Whether a lookup leaves rows: one of a single place if an input says where, and not the counter of a loop."""
    sizes = eqn.params["slice_sizes"]
    if eqn.primitive.name == "dynamic_slice":
        return len(_without_ones(sizes)) == 1 and any(mark & _INPUT for mark in operands[1:])
    numbers = eqn.params["dimension_numbers"]
    picked = {axis for axis in numbers.start_index_map if sizes[axis] == 1}
    left = len(sizes) - len({*picked, *numbers.collapsed_slice_dims, *numbers.operand_batching_dims})
    return bool(picked) and left == 1


def _common(marks: Sequence[int]) -> int:
    common = -1
    for mark in marks:
        common &= mark
    return common


def _is_float(var: Any) -> bool:
    dtype = getattr(var.aval, "dtype", None)  # a token has none
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _is_vector(var: Any) -> bool:
    """Whether an array has one axis, and others of size 1 at most."""
    return len(_shape(var)) > 0 and len(_without_ones(_shape(var))) <= 1


def _shape(var: Any) -> Shape:
    return tuple(var.aval.shape)


def _without_ones(shape: Sequence[int]) -> Shape:
    return tuple(size for size in shape if size != 1)
