"""Functions that make the rows of a mapping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from .._errors import SpecError
from ._row import Part, Row

_EXPERTS = ("gate_up_proj", "down_proj")  # as all models of `transformers` declare them


def linear(
    module: str | Part | Sequence[Part],
    *,
    axes: str | None = None,
    inputs: Sequence[int] | None = None,
    outputs: Sequence[int] | None = None,
    conv1d: bool = False,
) -> Row:
    """Makes the row of a kernel that is the weight of a `Linear`, or of several that the kernel fuses.

    >>> linear("model.layers.{i}.self_attn.o_proj", axes="iio").axes
    'iio'
    >>> [part.module for part in linear([Part("gate_proj"), Part("up_proj")], axes="oio").parts]
    ['gate_proj', 'up_proj']

    Args:
      module: the torch module's name, or a `Part`; several parts if the kernel fuses modules along its outputs. Input
        and output axes are flattened in their order, and the outputs are then divided among the parts.
      axes: the roles of the kernel's axes; None for `"io"`, after the batch axes of a stack. Needed for other kernels,
        such as `"ioo"` of attention.
      inputs: the order in which torch has the input axes, such as (1, 0); None for that of the kernel.
      outputs: as `inputs`, for the output axes.
      conv1d: whether it is a `Conv1D` of `transformers`, as in GPT-2, whose weight is `(in, out)`.

    Returns:
      The row.

    Raises:
      SpecError: if `inputs` or `outputs` is not an order of axes.
    """
    return Row(
        kind="linear",
        parts=_parts(module),
        axes=axes,
        inputs=None if inputs is None else tuple(inputs),
        outputs=None if outputs is None else tuple(outputs),
        conv1d=conv1d,
    )


def embedding(module: str, *, head: str | None = None) -> Row:
    """Makes the row of an embedding table, `(rows, features)`.

    >>> embedding("model.embed_tokens", head="lm_head").head
    'lm_head'

    Args:
      module: the torch module's name.
      head: the torch module of the output head, if it is tied to the table. An adapter of the table acts on both, so
        both are written, and a file with only one of them is refused. It is not tied if a leaf of the tree is its
        kernel.

    Returns:
      The row.
    """
    return Row(kind="embedding", parts=_parts(module), head=head)


def conv(module: str, *, axes: str | None = None) -> Row:
    """Makes the row of a convolution kernel, `(spatial…, in, out)`, in one to three dimensions and without groups.

    >>> conv("vit.embeddings.patch_embeddings.projection").kind
    'conv'

    Args:
      module: the torch module's name.
      axes: the roles of the kernel's axes; None for `"i…io"`, after the batch axes of a stack.

    Returns:
      The row.
    """
    return Row(kind="conv", parts=_parts(module), axes=axes)


def vector(
    module: str | Part | Sequence[Part],
    *,
    parameter: str = "bias",
    axes: str | None = None,
    outputs: Sequence[int] | None = None,
    keep_shape: bool = False,
) -> Row:
    """Makes the row of a bias, of a scale of a norm layer, or of another parameter of the same values in torch.

    >>> vector("model.norm", parameter="weight").parameter
    'weight'

    Args:
      module: as in `linear`; of a bias, with the parts of the kernel.
      parameter: the name of the torch parameter.
      axes: the roles of the leaf's axes; None for outputs, after the batch axes of a stack.
      outputs: as in `linear`.
      keep_shape: whether the torch parameter has the leaf's axes, such as (1, 1, features) of a class token or () of a
        scalar, rather than one axis of outputs.

    Returns:
      The row.
    """
    order = None if outputs is None else tuple(outputs)
    parts = _parts(module)
    return Row(kind="vector", parts=parts, parameter=parameter, axes=axes, outputs=order, keep_shape=keep_shape)


def experts(
    module: str | Part,
    *,
    parameter: str,
    declared: Sequence[str] = (),
    axes: str | None = None,
    stored: Literal["oi", "io"] | None = None,
    swapped: bool = False,
    experts_first: bool = False,
) -> Row:
    """Makes the row of a kernel that is a parameter without a module of its own: PEFT's `target_parameters`.

    Such are the stacked kernels of experts, `(experts, in, out)`, and the router `(in, experts)` in `transformers` 5.

    >>> experts("model.layers.{i}.mlp.experts", parameter="down_proj", stored="oi").declared
    ('gate_up_proj', 'down_proj')
    >>> experts("model.layers.{i}.mlp.gate", parameter="weight", stored="oi").declared
    ('weight',)

    Args:
      module: the torch module that has the parameter.
      parameter: the parameter's name.
      declared: the parameters of the module that may have factors, in the order in which the module declares them. It
        decides PEFT's names for their factors. If empty, `("gate_up_proj", "down_proj")` for these two, and else only
        the parameter itself.
      axes: the roles of the kernel's axes; None for `"bio"`, or `"io"` of a parameter of two axes, after the batch axes
        of a stack of layers.
      stored: the order of inputs and outputs in torch: `"oi"` for `(experts, out, in)`, as in Mixtral and most other
        models, or `"io"`, as in GPT-OSS. Needed by `export_merged` and `load_params`, for values; PEFT's factors do not
        depend on it.
      swapped: whether the parameter is stored as `"io"` by a module without the attribute `is_transposed`, as that of
        Llama 4. PEFT then takes its outputs for inputs.
      experts_first: whether the experts are the first batch axis and the layers the second, as in a stack of MaxText.

    Returns:
      The row.

    Raises:
      SpecError: if `declared` does not have the parameter, or `stored` is another text, or `"oi"` with `swapped`.
    """
    names = tuple(declared) or (_EXPERTS if parameter in _EXPERTS else (parameter,))
    if parameter not in names:
        raise SpecError(f"Expected {parameter!r} to be among the parameters of its module, `declared`; got {names}.")
    if stored not in (("io", None) if swapped else ("oi", "io", None)):
        what = "'io' or None, as swapped=True implies 'io'," if swapped else "'oi', 'io' or None"
        raise SpecError(f"Expected {what} for `stored`; got {stored!r}.")
    return Row(
        kind="swapped parameter" if swapped else "parameter",
        parts=_parts(module),
        parameter=parameter,
        axes=axes,
        declared=names,
        experts_first=experts_first,
        stored="io" if swapped else stored,
    )


def layer(path: str, module: str, *, conv1d: bool = False, axes: str | None = None) -> dict[str, Row]:
    """Makes the rows of the kernel and the bias of a linear layer.

    >>> sorted(layer("encoder/{i}/up", "encoder.layers.{i}.fc1"))
    ['encoder/{i}/up/bias', 'encoder/{i}/up/kernel']

    Args:
      path: the path of the layer; its leaves are `kernel` and `bias`.
      module: the torch module's name.
      conv1d: as in `linear`.
      axes: as in `linear`.

    Returns:
      The rows, a part of a mapping.
    """
    return {f"{path}/kernel": linear(module, conv1d=conv1d, axes=axes), f"{path}/bias": vector(module)}


def norm(path: str, module: str) -> dict[str, Row]:
    """Makes the rows of the scale and the bias of a norm layer.

    >>> norm("norm", "model.norm")["norm/scale"].parameter
    'weight'

    Args:
      path: the path of the layer; its leaves are `scale` and, unless it has none, `bias`.
      module: the torch module's name.

    Returns:
      The rows, a part of a mapping.
    """
    return {f"{path}/scale": vector(module, parameter="weight"), f"{path}/bias": vector(module)}


def _parts(module: str | Part | Sequence[Part]) -> tuple[Part, ...]:
    if isinstance(module, str):
        return (Part(module),)
    return (module,) if isinstance(module, Part) else tuple(module)
