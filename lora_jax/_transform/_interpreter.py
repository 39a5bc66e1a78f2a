"""The loop: evaluates a traced function in which some leaves are adapted kernels.

An equation that no adapted kernel reaches goes to JAX's own evaluator, together with its neighbours. One that a kernel
reaches goes to the rule of its primitive. Where there is no rule, or the rule does not apply, the kernel is refused,
unless the caller has allowed it to be formed there.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array

from .._adapter import AdaptedKernel, delta, materialise
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
    user_line,
    variables,
)
from .._contract import computable, is_narrow
from .._errors import UnsupportedError
from .._use import Use
from ._forms import Contraction, Sum, contract, gain_misfit, in_training, settled
from ._plan import added
from ._settings import Settings
from ._statistics import Operation, observed
from ._tokens import NO_TOKENS, misfit

Value = Any  # an Array or an AdaptedKernel; what a rule returns may also be a Sum
Rule = Callable[..., Any]


def is_adapted(value: Value) -> bool:
    """Whether a value has factors; a probe is an array whose use is noted."""
    return isinstance(value, AdaptedKernel) and not value.is_probe


def array_of(value: Value) -> Any:
    """An array of the type that the model sees."""
    return value.w if isinstance(value, AdaptedKernel) else value.base if isinstance(value, Sum) else value


Kind = typing.Literal["low-rank", "moved", "rebuilt"]

_RULES: dict[str, tuple[Kind, Rule]] = {}


def rule(primitive: Primitive | str, kind: Kind) -> Callable[[Rule], Rule]:
    """Registers how a primitive, or by its name one that JAX keeps to itself, acts on an `AdaptedKernel`.

    The kind says what becomes of the kernel: a low-rank term, a kernel again, or an operand of a function rebuilt
    around it; the first line of the rule's doc-string says how. `docs/rules.md` is made of them.

    The rule is called as `rule(site, *operands, **params)` and names every parameter of its primitive, so that one
    which a new JAX adds is an error and not dropped. It returns what the primitive would: a value, or a list of values.
    """

    name = primitive if isinstance(primitive, str) else primitive.name

    def register(function: Rule) -> Rule:
        if name in _RULES:
            _, old = _RULES[name]
            raise ValueError(f"`{name}` already has a rule: {old.__module__}.{old.__name__}.")
        _RULES[name] = kind, function
        return function

    return register


def rules() -> dict[str, tuple[Kind, str]]:
    """For each primitive with a rule: what becomes of a kernel there, and how."""
    return {name: (kind, (inspect.getdoc(function) or "").split("\n")[0]) for name, (kind, function) in _RULES.items()}


NO_RULE = "this operation has no low-rank rule"
OBSERVED = "observed"  # the kind of a use whose activations go into a statistic


class NoRule(Exception):  # noqa: N818  (not an error: it sends the equation to the refusal, with a reason)
    """Raised by a rule, before it has done anything, for a case that has no low-rank form; says why."""


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a rule acts: the equation, and what holds there."""

    settings: Settings
    eqn: JaxprEqn

    def in_turn(self, length: int) -> Site:
        """The same equation in each of the turns of its loop, which keeps for each of them what the gradient needs."""
        settings = dataclasses.replace(self.settings, times=length * self.settings.times, remat=False)
        return dataclasses.replace(self, settings=settings)

    def in_remat(self, remat: bool) -> Site:
        """The same equation, where all that is made inside is made again in the backward pass, or not all."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, remat=remat))

    def interpret(self, jaxpr: ClosedJaxpr, operands: Sequence[Value]) -> list[Value]:
        """Interprets a function inside this equation."""
        return interpret(self.settings, jaxpr.jaxpr, jaxpr.consts, operands)

    def left(self, kernel: AdaptedKernel) -> Value:
        """What is left of a kernel that lost axes; one row or one column is a look-up's result, and no kernel."""
        if kernel.is_probe or {"i", "o"} <= set(kernel.roles):
            return kernel
        on_all_tokens(kernel)
        self.used(kernel, "factored", operations=kernel.w.size * (2 * kernel.a.shape[-1] + 1))
        if is_narrow(kernel.w.dtype) and kernel.gain is None:
            return Sum(kernel.w, delta(kernel).astype(computable(kernel.w.dtype)))
        return materialise(kernel)

    def contract(self, kernel: AdaptedKernel, x: Array, contraction: Contraction, *, roles: Sequence[str]) -> Value:
        """Evaluates a contraction with a kernel in the form that is wanted, and notes the use."""
        if self.settings.statistic is not None:
            return self.observe(kernel, x, contraction.base, contraction.thin, roles=roles)
        if reason := gain_misfit(kernel, contraction, x):
            raise NoRule(reason)
        y: Any = self.eqn.outvars[0].aval
        if kernel.active is not None and (reason := misfit(kernel, contraction.y, y.shape)):
            raise NoRule(reason)
        form = in_training(kernel, contraction, self.settings.form)
        gain = 0 if kernel.gain is None else contraction.costs.y
        self.used(kernel, form.kind, roles=roles, operations=added(form, contraction.costs) + gain)
        return contract(kernel, x, contraction, self.settings.form, again=not self.settings.remat)

    def observe(
        self, kernel: AdaptedKernel, x: Array, base: Operation, thin: Operation, *others: Array, roles: Sequence[str]
    ) -> Array:
        """Evaluates the base's operation; its `x` is observed if it meets what the adapter has for inputs."""
        assert self.settings.statistic is not None
        if any((use == "i") != (its == "i") for its, use in zip(kernel.roles, roles, strict=True)):
            return base(x, kernel.w, *others)
        self.used(kernel, OBSERVED, roles=roles)
        return observed(kernel, x, base, thin, *others, statistic=self.settings.statistic)

    def used(self, kernel: AdaptedKernel, kind: str, *, roles: Sequence[str] = (), operations: int = 0) -> None:
        """Notes that the equation consumes a kernel; `roles` gives the role of each axis of `kernel.w` in this use."""
        if self.settings.log is not None:
            self.settings.log.extend(self.uses(kernel, kind, roles=roles, operations=operations))

    def uses(
        self, kernel: AdaptedKernel, kind: str, *, roles: Sequence[str] = (), operations: int = 0
    ) -> tuple[Use, ...]:
        """What `used` would note."""
        axes = tuple(zip(kernel.roles, roles, strict=True)) if roles else None
        times = self.settings.times
        use = Use("", self.eqn.primitive.name, kind, axes, times, times * operations, user_line(self.eqn))
        return of_each_leaf(use, kernel)

    def dense(self, value: Value, reason: str) -> Array:
        """Forms a kernel that the caller listed in `dense`, refuses any other; an array is returned as it is."""
        if not isinstance(value, AdaptedKernel):
            return settled(value)
        return form(self.settings, value, self.eqn.primitive.name, reason, user_line(self.eqn))


def on_all_tokens(kernel: AdaptedKernel) -> None:
    """Raises `NoRule` for a kernel that acts on some tokens alone, where it is not multiplied with tokens."""
    if kernel.active is not None:
        raise NoRule(NO_TOKENS)


def of_each_leaf(use: Use, kernel: AdaptedKernel) -> tuple[Use, ...]:
    """A use of a kernel, for each leaf that it is, the operations in equal parts."""
    count, total = len(kernel.paths), use.operations
    shares = [total * (number + 1) // count - total * number // count for number in range(count)]
    return tuple(
        dataclasses.replace(use, path=path, operations=share) for path, share in zip(kernel.paths, shares, strict=True)
    )


def form(settings: Settings, value: Value, primitive: str, reason: str, line: str) -> Array:
    """Forms an adapted kernel where it cannot stay one, if its path is listed in `dense`.

    Raises:
      UnsupportedError: if it is not listed.
    """
    if not isinstance(value, AdaptedKernel):
        return settled(value)
    if not settings.may_form(value):
        formed = (
            "" if value.active is not None else f", or let it be formed there: lora(apply, dense={list(value.paths)})"
        )
        raise UnsupportedError(
            f"Expected the adapted kernel {' beside '.join(map(repr, value.paths))} to be used in ways that have a "
            f"low-rank form; it reaches `{primitive}`: {reason}.",
            line,
            f"Leave it out of the spec{formed}.",
        )
    if settings.log is not None:
        # Formed: the product, its scale, the sum with the base.
        cost = 0 if value.is_probe else value.w.size * (2 * value.a.shape[-1] + 1) + value.a.size
        kind = "opaque" if value.is_probe else "dense"
        use = Use("", primitive, kind, None, settings.times, settings.times * cost, line)
        settings.log.extend(value.look_up or of_each_leaf(use, value))
    return materialise(value)


def interpret(settings: Settings, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Value]) -> list[Value]:
    """Evaluates a jaxpr whose arguments may be adapted kernels; so may its results."""
    values: dict[Var, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    eqns = live_equations(jaxpr)
    last = last_uses(eqns, jaxpr.outvars)
    plain: list[JaxprEqn] = []  # equations that no kernel reaches, not yet evaluated
    makers: dict[Var, JaxprEqn] = {}  # of sums that are not added yet

    def read(atom: Any) -> Value:
        return atom.val if isinstance(atom, Literal) else values[atom]

    def settle(var: Var) -> None:
        """Adds what is not added yet where it was made: what reads it may stand on another mesh."""
        if var in makers:
            with context_of(makers.pop(var)):
                values[var] = settled(values[var])

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
        if not any(isinstance(values.get(var), (AdaptedKernel, Sum)) for var in operands):
            plain.append(eqn)
            continue
        if plain:
            evaluate_plain(number)
        results = _apply_rule(Site(settings, eqn), [_in_use(read(atom), number) for atom in eqn.invars])
        values.update(zip(eqn.outvars, results, strict=True))
        makers.update((var, eqn) for var, its in zip(eqn.outvars, results, strict=True) if isinstance(its, Sum))
        free([eqn], number)
    if plain:
        evaluate_plain(len(eqns))
    for var in variables(jaxpr.outvars):
        settle(var)
    return [read(atom) for atom in jaxpr.outvars]


def _in_use(value: Value, number: int) -> Value:
    return value.in_use(number) if isinstance(value, AdaptedKernel) else value


def _apply_rule(site: Site, operands: list[Value]) -> list[Value]:
    eqn = site.eqn
    with context_of(eqn):
        try:
            if eqn.primitive.name not in _RULES:
                raise NoRule(_no_rule(eqn.primitive))
            _, function = _RULES[eqn.primitive.name]
            out = function(site, *operands, **eqn.params)
            results = list(out) if eqn.primitive.multiple_results else [out]
        except NoRule as reason:
            dense = [site.dense(operand, str(reason)) for operand in operands]
            given = {var: x for var, x in zip(eqn.invars, dense, strict=True) if not isinstance(var, Literal)}
            return evaluate([eqn], list(given), eqn.outvars, list(given.values()))
    for var, result in zip(eqn.outvars, results, strict=True):
        got: Any = jax.typeof(array_of(result))
        expected: Any = var.aval
        assert (expected.shape, expected.dtype) == (got.shape, got.dtype), f"{eqn.primitive}: {expected} became {got}"
    return results


def _no_rule(primitive: Primitive) -> str:
    if primitive.name.startswith(("custom_jvp", "custom_vjp")):
        return "the model's own derivative there is defined for a dense kernel"
    return NO_RULE
