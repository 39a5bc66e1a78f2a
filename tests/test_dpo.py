"""The example of preference training: its pairs and its loss."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import trained

import dpo
import lora_jax as lj
import qlora_smollm2 as qlora
import smollm2
import trec
import trec_text

pytestmark = pytest.mark.sweep

TINY = smollm2.Sizes(vocabulary=61, d_model=64, layers=2, heads=2, kv_heads=1, d_mlp=128)


class Words:
    """A tokenizer with one token for each word."""

    class Encoding(list):
        @property
        def ids(self):
            return list(self)

    def encode(self, text):
        return self.Encoding(3 + sum(map(ord, word)) % 50 for word in text.split())

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


def make_pairs(questions=12):
    names = ("HUM:ind", "LOC:city", "NUM:count")
    texts = [f"what is {'very ' * (row % 3)}number {row}" for row in range(questions)]
    labels = np.arange(questions) % len(names)
    task = trec_text.coarse(names)
    return dpo.make_pairs(trec.Questions(texts, labels), task, Words(), np.random.default_rng(0)), task, labels


def test_pairs_have_one_prompt_and_two_answers():
    pairs, task, labels = make_pairs()
    ends = pairs.at[:, :, 0]
    for row in range(12):
        prompts = [pairs.ids[kind, row, : ends[kind, row] + 1].tolist() for kind in range(2)]
        assert prompts[0] == prompts[1]
        preferred, other = (pairs.targets[kind, row][pairs.mask[kind, row]].tolist() for kind in range(2))
        assert preferred == Words().encode(f"{task.answers[labels[row]]}<|im_end|>").ids != other


def test_the_margin_is_the_difference_of_log_probabilities():
    pairs, _, _ = make_pairs()
    model = qlora.functions(smollm2.Llama(TINY, remat=True, rngs=nnx.Rngs(0)))
    found = dpo.margins(functools.partial(model.logits, model.params), pairs)
    for row in range(3):
        sums = []
        for kind in range(2):
            ids, at = pairs.ids[kind, row : row + 1], pairs.at[kind, row : row + 1]
            log_p = jax.nn.log_softmax(model.logits(model.params, ids, at))[0]
            answer = pairs.targets[kind, row][pairs.mask[kind, row]]
            sums.append(sum(float(log_p[place, token]) for place, token in enumerate(answer)))
        np.testing.assert_allclose(found[row], sums[0] - sums[1], rtol=1e-4, atol=1e-4)


def test_a_step_moves_the_policy_away_from_the_base():
    pairs, _, _ = make_pairs()
    model = qlora.functions(smollm2.Llama(TINY, remat=True, rngs=nnx.Rngs(0)))
    kernels = qlora.find_kernels(model)
    adapter = lj.init(jax.random.key(0), model.params, dpo.SPEC, kernels=kernels)
    tx = optax.adam(1e-2)
    step, state = dpo.make_step(model.logits, tx), tx.init(adapter)
    losses = []
    for _ in range(12):
        adapter, state, loss = step(adapter, state, model.params, pairs)
        losses.append(float(loss))
    np.testing.assert_allclose(losses[0], np.log(2), rtol=1e-5)  # the policy is the reference
    assert losses[-1] < losses[0] - 0.05


def test_the_loss_is_that_of_a_merged_policy_and_a_copy_of_the_base():
    pairs, _, _ = make_pairs()
    model = qlora.functions(smollm2.Llama(TINY, remat=True, rngs=nnx.Rngs(0)))
    kernels = qlora.find_kernels(model)
    adapter = trained(jax.random.key(1), lj.init(jax.random.key(0), model.params, dpo.SPEC, kernels=kernels))
    merged = lj.merge(model.params, adapter)
    margins = [dpo.margins(functools.partial(model.logits, params), pairs) for params in (merged, model.params)]
    expected = -jax.nn.log_sigmoid(dpo.BETA * (margins[0] - margins[1])).mean()
    tx = optax.sgd(0.0)
    _, _, loss = dpo.make_step(model.logits, tx)(jax.tree.map(jnp.copy, adapter), tx.init(adapter), model.params, pairs)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_the_arguments_of_the_compiled_step_hold_one_base() -> None:
    pairs, _, _ = make_pairs()
    model = qlora.functions(smollm2.Llama(TINY, remat=True, rngs=nnx.Rngs(0)))
    adapter = lj.init(jax.random.key(0), model.params, dpo.SPEC, kernels=qlora.find_kernels(model))
    tx = optax.adam(1e-2)
    arguments = adapter, tx.init(adapter), model.params, pairs
    step = dpo.make_step(model.logits, tx).lower(*arguments).compile()
    size = {
        name: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for name, tree in zip("asbp", arguments, strict=True)
    }
    found = step.memory_analysis().argument_size_in_bytes
    assert sum(size.values()) <= found < sum(size.values()) + size["b"] / 100


def test_the_loss_the_reference_and_the_step_are_less_than_sixty_lines() -> None:
    parts = (dpo.log_likelihood, dpo.margins, dpo.make_step)
    assert sum(len(inspect.getsource(part).splitlines()) for part in parts) < 60
