"""Models for the laws. Each is an apply function without LoRA."""

from . import linen, nnx, others
from .model import Make as Make
from .model import Model as Model

ZOO: dict[str, Make] = {
    make.__name__: make
    for make in (
        linen.mlp,
        linen.transformer,
        linen.scanned_transformer,
        linen.tied_embedding,
        linen.conv_net,
        linen.grouped_conv,
        linen.lstm,
        linen.optimized_lstm,
        linen.gru,
        linen.experts,
        linen.decoding,
        linen.minilm_encoder,
        nnx.nnx_transformer,
        nnx.nnx_stateful,
        nnx.nnx_scanned,
        others.haiku_net,
        others.haiku_stack,
        others.equinox_net,
        others.equinox_stack,
        others.plain_function,
    )
}
