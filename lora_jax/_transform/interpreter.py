"""Evaluates a jaxpr in which some leaves are adapted kernels.

Runs of equations that no adapted kernel reaches are evaluated by JAX. Any other equation is evaluated by the rule of
its primitive. If there is no rule, or the rule does not apply, the kernel is materialized if the caller allows that,
and refused otherwise.
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
from .._core.contract import Labeled, computable, is_narrow
from .._core.kernel import AdaptedKernel, PlainKernel, TrackedKernel, delta, materialize
from .._core.uses import Evidence, Use
from .contraction.costs import added_flops
from .contraction.forms import Sum, add_pending, evaluate_contraction, form_in_training, gain_problem
from .contraction.operation import Contraction
from .contraction.routing import NO_TOKENS, routing_flops, routing_problem, weights_by_rank
from .refusal import Refusal, Refused, is_custom
from .registry import parameter_names, rule_of
from .settings import Settings
from .statistics import Operation, Product, sum_activations

Value = Any  # an Array or a TrackedKernel; what a rule returns may also be a Sum


def base_value(value: Value) -> Any:
    """Returns the base of a kernel or of a `Sum`, which has the type that the model sees; an array as it is."""
    return value.w if isinstance(value, TrackedKernel) else value.base if isinstance(value, Sum) else value


NO_RULE = "it has no low-rank rule"
CUSTOM = "it is defined for arrays, and has no low-rank rule"
# Kinds of uses besides those of `Use.kind`.
OBSERVED = "observed"  # its activations are summed
REFUSED = "refused"  # it has no low-rank form


class NoRule(Exception):  # noqa: N818  (the interpreter catches it)
    """Raised by a rule with a reason, before it has any effect, for a case without a low-rank form."""


@dataclasses.dataclass(frozen=True)
class Site:
    """The equation that a rule evaluates, and the settings of the interpretation there."""

    settings: Settings
    eqn: JaxprEqn
    evidence: Mapping[str, Evidence] = dataclasses.field(default_factory=dict)  # of the uses in `eqn`, by path

    @classmethod
    def of(cls, settings: Settings, eqn: JaxprEqn, operands: Sequence[Value], *, live: bool) -> Site:
        """Returns the site of an equation with these operands."""
        if settings.origins is None:
            return cls(settings, eqn)
        paths = [operand.paths if isinstance(operand, TrackedKernel) else () for operand in operands]
        evidence = settings.origins.evidence((*settings.enclosing, id(eqn)), paths)
        return cls(dataclasses.replace(settings, live=live and settings.live), eqn, evidence)

    def repeated(self, length: int) -> Site:
        """Returns the site for the body of a loop with `length` iterations."""
        settings = dataclasses.replace(self.settings, repeats=length * self.settings.repeats)
        return dataclasses.replace(self, settings=settings)

    def interpret(self, jaxpr: ClosedJaxpr, operands: Sequence[Value]) -> list[Value]:
        """Interprets a function inside this equation."""
        return interpret(self.inner_settings, jaxpr.jaxpr, jaxpr.consts, operands)

    @property
    def inner_settings(self) -> Settings:
        """The settings for functions inside this equation."""
        if self.settings.origins is None:
            return self.settings
        return dataclasses.replace(self.settings, enclosing=(*self.settings.enclosing, id(self.eqn)))

    def materialize_row(self, kernel: TrackedKernel) -> Value:
        """Materializes what is a row or column after a kernel lost axes; returns any other kernel as it is."""
        if not isinstance(kernel, AdaptedKernel) or {"i", "o"} <= set(kernel.roles):
            return kernel
        check_unrouted(kernel)
        self.log_use(kernel, "factored", flops=kernel.w.size * (2 * kernel.a.shape[-1] + 1))
        if is_narrow(kernel.w.dtype) and kernel.gain is None:
            return Sum(kernel.w, delta(kernel).astype(computable(kernel.w.dtype)))
        return materialize(kernel)

    def contract(self, kernel: AdaptedKernel, x: Array, contraction: Contraction, *, roles: Sequence[str]) -> Value:
        """Evaluates a contraction with a kernel in the form requested or chosen, and logs the use."""
        if reason := gain_problem(kernel, contraction, x):
            raise NoRule(reason)
        y: Any = self.eqn.outvars[0].aval
        if kernel.is_routed and (reason := routing_problem(kernel, contraction, y.shape)):
            raise NoRule(reason)
        if self.settings.observe:
            weights = weights_by_rank(kernel, x, contraction) if kernel.is_routed else None
            if weights is not None and len(kernel.experts) == 1:
                weights = weights._replace(array=weights.array[..., :1])
            return self.observe(kernel, x, contraction.base, contraction.x_times_a, weights=weights, roles=roles)
        form = form_in_training(kernel, contraction, self.settings.form)
        more = routing_flops(kernel, contraction) + (0 if kernel.gain is None else contraction.costs.y)
        flops = added_flops(form, contraction.costs) if kernel.a.shape[-1] else 0
        self.log_use(kernel, form.value, roles=roles, flops=flops + more)
        if self.settings.log is not None:  # only shapes are needed, and the base's result has the same
            return apply_to_base(lambda w, x: contraction.base(x, w), kernel.w, x)
        return evaluate_contraction(kernel, x, contraction, self.settings.form)

    def observe(
        self,
        kernel: AdaptedKernel,
        x: Array,
        base: Operation,
        x_times_a: Product,
        *others: Array,
        weights: Labeled | None = None,
        roles: Sequence[str],
    ) -> Array:
        """Evaluates the base's operation; sums `x` if it contracts the axes that are the adapter's inputs."""
        axes = zip(kernel.roles, roles, kernel.w.shape, strict=True)
        if any((role == "i") != (used_as == "i") for role, used_as, size in axes if size != 1):
            return apply_to_base(lambda w, x, *others: base(x, w, *others), kernel.w, x, *others)
        self.log_use(kernel, OBSERVED, roles=roles)
        return sum_activations(kernel.with_array(), x, base, x_times_a, *others, weights=weights)

    def log_use(self, kernel: TrackedKernel, kind: str, *, roles: Sequence[str] = (), flops: int = 0) -> None:
        """Logs that the equation consumes a kernel; `roles` are the roles of the axes of `kernel.w` in this use."""
        if self.settings.log is not None:
            self.settings.log.extend(self.make_uses(kernel, kind, roles=roles, flops=flops))

    def make_uses(
        self, kernel: TrackedKernel, kind: str, *, roles: Sequence[str] = (), flops: int = 0
    ) -> tuple[Use, ...]:
        """Returns the uses that `log_use` logs."""
        axes = tuple(zip(kernel.roles, roles, strict=True)) if roles else None
        name, line, settings = self.eqn.primitive.name, user_line(self.eqn), self.settings
        repeats, groups = settings.repeats, self.eqn.params.get("feature_group_count", 1)
        total = Use("", name, kind, axes, repeats, repeats * flops, line, live=settings.live, groups=groups)
        uses = split_by_leaf(total, kernel)
        return tuple(dataclasses.replace(use, evidence=self.evidence.get(use.path, use.evidence)) for use in uses)

    def other_operand(self, value: Value, roles: Sequence[str]) -> Array:
        """Returns the array of the operand that is not the adapted kernel; logs the use if it is a plain leaf."""
        if isinstance(value, PlainKernel):
            self.log_use(value, "factored", roles=roles)
        return as_array(base_value(value))

    def to_array(self, value: Value, reason: str) -> Array:
        """Materializes a kernel if the caller allows that, refuses it otherwise; returns an array as it is."""
        return materialize_or_refuse(self.settings, value, self.eqn.primitive.name, reason, user_line(self.eqn))


def check_unrouted(kernel: AdaptedKernel) -> None:
    """Raises `NoRule` for a kernel whose adapter differs between tokens."""
    if kernel.is_routed:
        raise NoRule(NO_TOKENS)


def split_by_leaf(use: Use, kernel: TrackedKernel) -> tuple[Use, ...]:
    """Returns the use for each leaf of a kernel, with the FLOPs in equal parts."""
    count, total = len(kernel.paths), use.flops
    shares = [total * (number + 1) // count - total * number // count for number in range(count)]
    return tuple(
        dataclasses.replace(use, path=path, flops=share) for path, share in zip(kernel.paths, shares, strict=True)
    )


def materialize_or_refuse(settings: Settings, value: Value, primitive: str, reason: str, line: str) -> Array:
    """Materializes an adapted kernel that cannot stay one, if the caller allows that.

    Raises:
      Refused: if the caller does not, and refusals are not collected.
    """
    if not isinstance(value, TrackedKernel):
        return add_pending(value)
    kind, flops = "opaque", 0
    if isinstance(value, AdaptedKernel):
        kind, flops = "materialized", value.w.size * (2 * value.a.shape[-1] + 1) + value.a.size  # product, scale, sum
        if not settings.may_materialize(value, primitive):
            if settings.refusals is None:
                raise Refused
            settings.refusals.append(Refusal(value.paths, primitive, reason, line, not value.is_routed))
            kind, flops = REFUSED, 0
    if settings.log is not None:
        use = Use("", primitive, kind, None, settings.repeats, settings.repeats * flops, line, live=settings.live)
        lookup = value.lookup if isinstance(value, PlainKernel) else ()
        settings.log.extend(lookup or split_by_leaf(use, value))
    return materialize(value)


def interpret(settings: Settings, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Value]) -> list[Value]:
    """Evaluates a jaxpr whose arguments and results may be adapted kernels."""
    values: dict[Var, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    live = live_equations(jaxpr)
    eqns = live if settings.origins is None else list(jaxpr.eqns)
    is_live = set(map(id, live))
    last = last_uses(eqns, jaxpr.outvars)
    plain: list[JaxprEqn] = []  # equations that no kernel reaches and that are not evaluated yet
    pending: dict[Var, JaxprEqn] = {}  # the equation of each `Sum`

    def read(atom: Any) -> Value:
        return atom.val if isinstance(atom, Literal) else values[atom]

    def add_if_pending(var: Var) -> None:
        """Adds a `Sum` in the context of its equation, because the one that reads it may use another mesh."""
        if var in pending:
            with context_of(pending.pop(var)):
                values[var] = add_pending(values[var])

    def free(evaluated: Sequence[JaxprEqn], done: int) -> None:
        """Deletes values that are not read after equation `done`, which frees their memory outside `jit`."""
        for var in {var for eqn in evaluated for var in variables(eqn.invars)}:
            if last[var] <= done:
                values.pop(var, None)

    def evaluate_plain(before: int) -> None:
        """Evaluates the equations in `plain`, which precede equation `before`, and keeps the results read later."""
        results = {var for eqn in plain for var in eqn.outvars}
        inputs = list(dict.fromkeys(var for eqn in plain for var in variables(eqn.invars) if var not in results))
        outputs = [var for eqn in plain for var in eqn.outvars if last.get(var, -1) >= before]
        values.update(zip(outputs, evaluate(plain, inputs, outputs, [values[var] for var in inputs]), strict=True))
        free(plain, before - 1)
        plain.clear()

    for number, eqn in enumerate(eqns):
        operands = variables(eqn.invars)
        for var in operands:
            value = values.get(var)
            if not (isinstance(value, Sum) and value.is_accepted_by(eqn.primitive.name) and last[var] == number):
                add_if_pending(var)
        if not any(isinstance(values.get(var), (TrackedKernel, Sum)) for var in operands):
            plain.append(eqn)
            continue
        if plain:
            evaluate_plain(number)
        inputs = [_fold_dropout(read(atom), number) for atom in eqn.invars]
        results = _apply_rule(Site.of(settings, eqn, inputs, live=id(eqn) in is_live), inputs)
        values.update(zip(eqn.outvars, results, strict=True))
        pending.update((var, eqn) for var, value in zip(eqn.outvars, results, strict=True) if isinstance(value, Sum))
        free([eqn], number)
    if plain:
        evaluate_plain(len(eqns))
    for var in variables(jaxpr.outvars):
        add_if_pending(var)
    return [read(atom) for atom in jaxpr.outvars]


def _fold_dropout(value: Value, number: int) -> Value:
    return value.for_use(number) if isinstance(value, TrackedKernel) else value


def _apply_rule(site: Site, operands: list[Value]) -> list[Value]:
    eqn = site.eqn
    with context_of(eqn):
        try:
            function = rule_of(eqn.primitive)
            if function is None:
                raise NoRule(CUSTOM if is_custom(eqn.primitive.name) else NO_RULE)
            out = function(site, *operands, **parameters(eqn, *parameter_names(function)))
            results = list(out) if eqn.primitive.multiple_results else [out]
        except NoRule as reason:
            arrays = [site.to_array(operand, str(reason)) for operand in operands]
            inputs = {var: x for var, x in zip(eqn.invars, arrays, strict=True) if not isinstance(var, Literal)}
            return evaluate([eqn], list(inputs), eqn.outvars, list(inputs.values()))
        for var, result in zip(eqn.outvars, results, strict=True):
            got: Any = type_of(base_value(result))
            expected: Any = var.aval
            same = (expected.shape, expected.dtype) == (got.shape, got.dtype)
            assert same, f"{eqn.primitive}: {expected} became {got}"
    return results
