"""Compares `Rows` with PEFT's trainable tokens, and counts of trainable parameters; `make test-oracle`."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from torch import nn

import lora_jax as lj

ROWS, WIDTH, IDS = 12, 10, (5, 8, 0)
TOKENS = np.array([[1, 5, 8], [8, 2, 0]])
TABLE = (np.random.default_rng(0).standard_normal((ROWS, WIDTH)) / 3).astype(np.float32)
CHANGE = (np.random.default_rng(1).standard_normal((len(IDS), WIDTH)) / 3).astype(np.float32)


class Net(nn.Module):
    """A table and a matrix."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(ROWS, WIDTH)
        self.embed.weight.data = torch.from_numpy(TABLE.copy())
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mix.weight.data = torch.from_numpy(TABLE[:WIDTH].T.copy())

    def forward(self, tokens):
        return torch.tanh(self.mix(self.embed(tokens)))


def net(params, tokens):
    return jnp.tanh(params["embed"][tokens] @ params["mix"])


PARAMS = {"embed": TABLE, "mix": TABLE[:WIDTH]}


def near(got, expected):
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=0, atol=2e-6)


def test_rows_match_trainable_tokens_of_peft():
    config = peft.TrainableTokensConfig(token_indices=list(IDS), target_modules=["embed"])
    model = peft.get_peft_model(Net(), config)
    rows = model.base_model.model.embed.trainable_tokens_delta["default"]
    rows.data = torch.from_numpy(TABLE[list(IDS)] + CHANGE)  # PEFT stores the rows, `Rows` the change
    start = lj.init(jax.random.key(0), PARAMS, {"embed": lj.Rows(ids=IDS)})["embed"]
    adapter = {"embed": lj.Adapter(start.variant, start.axes, rows=jnp.asarray(CHANGE))}
    expected = model(torch.from_numpy(TOKENS))
    near(lj.lora(net)(PARAMS, adapter, TOKENS), expected)
    torch.sum(torch.sin(expected)).backward()
    gradient = jax.grad(lambda ad: jnp.sum(jnp.sin(lj.lora(net)(PARAMS, ad, TOKENS))))(adapter)
    near(gradient["embed"].rows, rows.grad)
    near(lj.merge(PARAMS, adapter)["embed"], model.merge_and_unload().embed.weight)


@pytest.mark.parametrize(
    ("variant", "config"),
    [
        (lj.LoRA(rank=3, alpha=6), peft.LoraConfig(r=3, target_modules=["mix", "embed"])),
        (lj.DoRA(rank=3, alpha=6), peft.LoraConfig(r=3, target_modules=["mix", "embed"], use_dora=True)),
    ],
    ids=["LoRA", "DoRA"],
)
def test_trainable_parameters_match_peft(variant, config):
    adapter = lj.init(jax.random.key(0), PARAMS, {"*": variant})
    trainable, _ = peft.get_peft_model(Net(), config).get_nb_trainable_parameters()
    assert lj.explain(net, PARAMS, adapter, TOKENS).parameters == trainable
