"""The loop: evaluates a traced function in which some leaves are adapted kernels.

An equation that no adapted kernel reaches goes to JAX's own evaluator, together with its neighbours. One that a kernel
reaches goes to the rule of its primitive. Where there is no rule, or the rule does not apply, the kernel is refused,
unless the caller has allowed it to be materialized there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax import Array

from .._compat import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    Var,
    context_of,
    evaluate,
    last_uses,
    live_equations,
    parameters,
    user_line,
    variables,
)
from .._core.base import apply_to_base, as_array, type_of
from .._core.contract import computable, is_narrow
from .._core.kernel import AdaptedKernel, PlainKernel, TrackedKernel, delta, materialize
from .._core.uses import Evidence, Use
from .contraction.costs import added
from .contraction.forms import Contraction, Sum, add_pending, contract, gain_misfit, in_training
from .contraction.tokens import NO_TOKENS, misfit
from .refusal import Refusal, Refused, is_custom
from .registry import named_by, rule_of
from .settings import Settings
from .statistics import Operation, observed

Value = Any  # an Array or a TrackedKernel; what a rule returns may also be a Sum


def base_of(value: Value) -> Any:
    """What has the type that the model sees: the base of a kernel, or an array."""
    return value.w if isinstance(value, TrackedKernel) else value.base if isinstance(value, Sum) else value


NO_RULE = "it has no low-rank rule"
OWN_DERIVATIVE = "the model defines it for an array"
OBSERVED = "observed"  # the kind of a use whose activations are summed up
REFUSED = "refused"  # of one that has no low-rank form


class NoRule(Exception):  # noqa: N818  (not an error: it sends the equation to the refusal, with a reason)
    """Raised by a rule, before it has done anything, for a case that has no low-rank form; says why."""


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a rule acts: the equation, and what holds there."""

    settings: Settings
    eqn: JaxprEqn
    evidence: Mapping[str, Evidence] = dataclasses.field(default_factory=dict)  # of its uses, by path

    @classmethod
    def of(cls, settings: Settings, eqn: JaxprEqn, operands: Sequence[Value], *, live: bool) -> Site:
        """The site of an equation with these operands."""
        if settings.origins is None:
            return cls(settings, eqn)
        paths = [operand.paths if isinstance(operand, TrackedKernel) else () for operand in operands]
        evidence = settings.origins.evidence((*settings.within, id(eqn)), paths)
        return cls(dataclasses.replace(settings, live=live and settings.live), eqn, evidence)

    def in_turn(self, length: int) -> Site:
        """The same equation in each iteration of its loop."""
        settings = dataclasses.replace(self.settings, times=length * self.settings.times)
        return dataclasses.replace(self, settings=settings)

    def interpret(self, jaxpr: ClosedJaxpr, operands: Sequence[Value]) -> list[Value]:
        """Interprets a function inside this equation."""
        return interpret(self.inside, jaxpr.jaxpr, jaxpr.consts, operands)

    @property
    def inside(self) -> Settings:
        """What holds inside of this equation."""
        if self.settings.origins is None:
            return self.settings
        return dataclasses.replace(self.settings, within=(*self.settings.within, id(self.eqn)))

    def left(self, kernel: TrackedKernel) -> Value:
        """What is left of a kernel that lost axes; one row or one column is a lookup's result, and no kernel."""
        if not isinstance(kernel, AdaptedKernel) or {"i", "o"} <= set(kernel.roles):
            return kernel
        on_all_tokens(kernel)
        self.used(kernel, "factored", flops=kernel.w.size * (2 * kernel.a.shape[-1] + 1))
        if is_narrow(kernel.w.dtype) and kernel.gain is None:
            return Sum(kernel.w, delta(kernel).astype(computable(kernel.w.dtype)))
        return materialize(kernel)

    def contract(self, kernel: AdaptedKernel, x: Array, contraction: Contraction, *, roles: Sequence[str]) -> Value:
        """Evaluates a contraction with a kernel in the form that is wanted, and notes the use."""
        if self.settings.observe:
            return self.observe(kernel, x, contraction.base, contraction.thin, roles=roles)
        if reason := gain_misfit(kernel, contraction, x):
            raise NoRule(reason)
        y: Any = self.eqn.outvars[0].aval
        if kernel.active is not None and (reason := misfit(kernel, contraction.y, y.shape)):
            raise NoRule(reason)
        form = in_training(kernel, contraction, self.settings.form)
        gain = 0 if kernel.gain is None else contraction.costs.y
        self.used(kernel, form.value, roles=roles, flops=added(form, contraction.costs) + gain)
        if self.settings.log is not None:  # only shapes are asked for, and those of the base's result are the same
            return apply_to_base(lambda w, x: contraction.base(x, w), kernel.w, x)
        return contract(kernel, x, contraction, self.settings.form)

    def observe(
        self, kernel: AdaptedKernel, x: Array, base: Operation, thin: Operation, *others: Array, roles: Sequence[str]
    ) -> Array:
        """Evaluates the base's operation; its `x` is observed if it meets what the adapter has for inputs."""
        each = zip(kernel.roles, roles, kernel.w.shape, strict=True)
        if any((use == "i") != (its == "i") for its, use, size in each if size != 1):
            return apply_to_base(lambda w, x, *others: base(x, w, *others), kernel.w, x, *others)
        self.used(kernel, OBSERVED, roles=roles)
        return observed(kernel.with_array(), x, base, thin, *others)

    def used(self, kernel: TrackedKernel, kind: str, *, roles: Sequence[str] = (), flops: int = 0) -> None:
        """Notes that the equation consumes a kernel; `roles` gives the role of each axis of `kernel.w` in this use."""
        if self.settings.log is not None:
            self.settings.log.extend(self.uses(kernel, kind, roles=roles, flops=flops))

    def uses(self, kernel: TrackedKernel, kind: str, *, roles: Sequence[str] = (), flops: int = 0) -> tuple[Use, ...]:
        """What `used` would note."""
        axes = tuple(zip(kernel.roles, roles, strict=True)) if roles else None
        times = self.settings.times
        live = self.settings.live
        use = Use("", self.eqn.primitive.name, kind, axes, times, times * flops, user_line(self.eqn), live=live)
        each = of_each_leaf(use, kernel)
        return tuple(dataclasses.replace(its, evidence=self.evidence.get(its.path, its.evidence)) for its in each)

    def plain(self, value: Value, roles: Sequence[str]) -> Array:
        """An operand beside a kernel with factors; of a leaf without, the use is noted."""
        if isinstance(value, PlainKernel):
            self.used(value, "factored", roles=roles)
        return as_array(base_of(value))

    def array(self, value: Value, reason: str) -> Array:
        """Materializes a kernel that the caller has listed, refuses any other; an array is returned as it is."""
        return materialized(self.settings, value, self.eqn.primitive.name, reason, user_line(self.eqn))


def on_all_tokens(kernel: AdaptedKernel) -> None:
    """Raises `NoRule` for a kernel that acts on some tokens alone, where it is not multiplied with tokens."""
    if kernel.active is not None:
        raise NoRule(NO_TOKENS)


def of_each_leaf(use: Use, kernel: TrackedKernel) -> tuple[Use, ...]:
    """A use of a kernel, for each leaf that it is, the operations in equal parts."""
    count, total = len(kernel.paths), use.flops
    shares = [total * (number + 1) // count - total * number // count for number in range(count)]
    return tuple(
        dataclasses.replace(use, path=path, flops=share) for path, share in zip(kernel.paths, shares, strict=True)
    )


def materialized(settings: Settings, value: Value, primitive: str, reason: str, line: str) -> Array:
    """Materializes an adapted kernel where it cannot stay one, if the caller allows that.

    Raises:
      Refused: if it is not listed, and refusals are not collected.
    """
    if not isinstance(value, TrackedKernel):
        return add_pending(value)
    kind, cost = "opaque", 0
    if isinstance(value, AdaptedKernel):
        kind, cost = "materialized", value.w.size * (2 * value.a.shape[-1] + 1) + value.a.size  # product, scale, sum
        if not settings.may_materialize(value, primitive):
            if settings.refusals is None:
                raise Refused
            settings.refusals.append(Refusal(value.paths, primitive, reason, line, value.active is None))
            kind, cost = REFUSED, 0
    if settings.log is not None:
        use = Use("", primitive, kind, None, settings.times, settings.times * cost, line, live=settings.live)
        lookup = value.lookup if isinstance(value, PlainKernel) else ()
        settings.log.extend(lookup or of_each_leaf(use, value))
    return materialize(value)


def interpret(settings: Settings, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Value]) -> list[Value]:
    """Evaluates a jaxpr whose arguments may be adapted kernels; so may its results."""
    values: dict[Var, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    live = live_equations(jaxpr)
    eqns = live if settings.origins is None else list(jaxpr.eqns)
    is_live = set(map(id, live))
    last = last_uses(eqns, jaxpr.outvars)
    plain: list[JaxprEqn] = []  # equations that no kernel reaches, not yet evaluated
    makers: dict[Var, JaxprEqn] = {}  # of sums that are not added yet

    def read(atom: Any) -> Value:
        return atom.val if isinstance(atom, Literal) else values[atom]

    def settle(var: Var) -> None:
        """Adds what is not added yet where it was made: what reads it may stand on another mesh."""
        if var in makers:
            with context_of(makers.pop(var)):
                values[var] = add_pending(values[var])

    def free(evaluated: Sequence[JaxprEqn], done: int) -> None:
        """Forgets what is not read after equation `done`: outside `jit` it would hold its memory to the end."""
        for var in {var for eqn in evaluated for var in variables(eqn.invars)}:
            if last[var] <= done:
                values.pop(var, None)

    def evaluate_plain(before: int) -> None:
        """Evaluates the waiting equations, which all stand before equation `before`, and keeps what is read later."""
        made = {var for eqn in plain for var in eqn.outvars}
        inputs = list(dict.fromkeys(var for eqn in plain for var in variables(eqn.invars) if var not in made))
        outputs = [var for eqn in plain for var in eqn.outvars if last.get(var, -1) >= before]
        values.update(zip(outputs, evaluate(plain, inputs, outputs, [values[var] for var in inputs]), strict=True))
        free(plain, before - 1)
        plain.clear()

    for number, eqn in enumerate(eqns):
        operands = variables(eqn.invars)
        for var in operands:
            value = values.get(var)
            if not (isinstance(value, Sum) and value.waits_for(eqn.primitive.name) and last[var] == number):
                settle(var)
        if not any(isinstance(values.get(var), (TrackedKernel, Sum)) for var in operands):
            plain.append(eqn)
            continue
        if plain:
            evaluate_plain(number)
        given = [_in_use(read(atom), number) for atom in eqn.invars]
        results = _apply_rule(Site.of(settings, eqn, given, live=id(eqn) in is_live), given)
        values.update(zip(eqn.outvars, results, strict=True))
        makers.update((var, eqn) for var, its in zip(eqn.outvars, results, strict=True) if isinstance(its, Sum))
        free([eqn], number)
    if plain:
        evaluate_plain(len(eqns))
    for var in variables(jaxpr.outvars):
        settle(var)
    return [read(atom) for atom in jaxpr.outvars]


def _in_use(value: Value, number: int) -> Value:
    return value.for_use(number) if isinstance(value, TrackedKernel) else value


def _apply_rule(site: Site, operands: list[Value]) -> list[Value]:
    eqn = site.eqn
    with context_of(eqn):
        try:
            function = rule_of(eqn.primitive)
            if function is None:
                raise NoRule(_no_rule(eqn.primitive))
            out = function(site, *operands, **parameters(eqn, *named_by(function)))
            results = list(out) if eqn.primitive.multiple_results else [out]
        except NoRule as reason:
            arrays = [site.array(operand, str(reason)) for operand in operands]
            given = {var: x for var, x in zip(eqn.invars, arrays, strict=True) if not isinstance(var, Literal)}
            return evaluate([eqn], list(given), eqn.outvars, list(given.values()))
    for var, result in zip(eqn.outvars, results, strict=True):
        got: Any = type_of(base_of(result))
        expected: Any = var.aval
        assert (expected.shape, expected.dtype) == (got.shape, got.dtype), f"{eqn.primitive}: {expected} became {got}"
    return results


def _no_rule(primitive: Primitive) -> str:
    return OWN_DERIVATIVE if is_custom(primitive.name) else NO_RULE
