"""The sharded example: the shardings of the base, and the position in the data after resuming."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import finetune_sharded
import trec


@pytest.fixture(scope="module")
def tokens() -> trec.Tokens:
    questions = trec.read().test
    return trec.tokenize(questions)


@pytest.mark.parametrize("step", [0, 3, 17])
def test_a_resumed_run_gets_the_remaining_batches(tokens: trec.Tokens, step: int) -> None:
    straight = itertools.islice(finetune_sharded.batches_from(tokens, 32, 0), step, step + 20)
    resumed = itertools.islice(finetune_sharded.batches_from(tokens, 32, step), 20)
    assert trec.batches_per_epoch(tokens, 32) < 20  # the comparison covers more than one epoch
    for one, other in zip(straight, resumed, strict=True):
        assert all(map(np.array_equal, one, other))


@pytest.fixture(scope="module")
def shapes() -> Any:
    ids = np.zeros((1, 1), np.int32)
    return jax.eval_shape(finetune_sharded.MODEL.init, jax.random.key(0), ids, ids > 0)["params"]


@pytest.mark.parametrize("fsdp", [False, True])
def test_every_sharding_divides_the_base(fsdp: bool, shapes: Any) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    shardings = finetune_sharded.shardings_of(shapes, mesh, fsdp=fsdp)
    jax.tree.map(lambda leaf, sharding: sharding.shard_shape(leaf.shape), shapes, shardings)
    layer = shardings["encoder"]["layer_0"]
    free = "data" if fsdp else None
    assert layer["attention"]["query"]["kernel"].spec == P(free, "model", None)
    assert layer["mlp"]["down"]["kernel"].spec == P("model", free)
    assert layer["mlp"]["up"]["bias"].spec == P("model")
    assert layer["mlp_norm"]["scale"].spec == P(None)
