"""The example that exports the demo's adapter: what it writes, and what it says if PEFT answers otherwise."""

import json

import numpy as np
import pytest
from helpers import bits

import export_to_peft as example
import finetune_trec as demo
from lora_jax import peft

pytestmark = pytest.mark.sweep

TINY = demo.Scale(32, test_questions=32, steps=2, max_tokens=12, evaluations=1, expected=0.0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    return out, example.export(out, TINY, out / "none")


def test_every_leaf_of_the_demo_is_exported(exported, monkeypatch):
    adapter = peft.load(exported[0] / "adapter", example.MAPPING, params := demo.base_params())
    assert len(adapter) == 6 * 6 + 2
    monkeypatch.setattr(example, "train", lambda *arguments: adapter)
    example.export(exported[0], TINY, exported[0] / "none")
    assert bits(peft.load(exported[0] / "adapter", example.MAPPING, params)) == bits(adapter)


def test_the_questions_are_in_their_order(exported):
    out, accuracy = exported
    with np.load(out / "questions.npz") as file:
        assert {name: file[name].shape for name in file} == {
            "ids": (32, 12),
            "mask": (32, 12),
            "labels": (32,),
            "logits": (32, 50),
        }
        assert demo.accuracy(file["logits"], file["labels"]) == accuracy


@pytest.mark.parametrize(("labels", "difference"), [(0, 1e-5), (1, 1e-5), (0, 1e-2), (0, float("nan"))])
def test_other_answers_are_an_error(labels, difference, exported, capsys):
    out, accuracy = exported
    kind = {"accuracy": 0.5, "other_labels": labels, "difference": difference}
    (out / "result.json").write_text(json.dumps({"adapted": kind, "merged": kind | {"other_labels": 0}}))
    if labels == 0 and difference < 1e-4:
        example.report(out, accuracy)
        return
    with pytest.raises(RuntimeError, match=r"Expected the same labels, and logits within 0\.0001; got"):
        example.report(out, accuracy)
