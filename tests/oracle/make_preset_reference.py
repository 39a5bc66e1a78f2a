"""Writes `tests/data/presets`: torch models with an adapter of PEFT, and what they compute.

Run it in the environment of `make test-oracle`: `PYTHONPATH=tests:. python tests/oracle/make_preset_reference.py`. It
writes PEFT's files for each model, and `reference.npz` with the weights, float16, and the logits, float32. The Flax
models are in an older version of `transformers`, where `tests/test_peft_presets.py` compares.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from torch_pairs import MODELS, config, inputs

REFERENCE = Path(__file__).parent.parent / "data" / "presets"


def torch_model(name):
    """The model with random weights that float16 holds."""
    model = getattr(transformers, MODELS[name][2])(config(transformers, name)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            mean = 1 if parameter.ndim == 1 else 0
            parameter.copy_((mean + 0.3 * torch.randn(parameter.shape, generator=generator)).half().float())
    return model


def logits(model, name):
    with torch.no_grad():
        result = model(*inputs_of(name)[:1], **more(name))
    return (result.logits_per_image if name == "clip" else result.logits).numpy()


def inputs_of(name):
    return [torch.from_numpy(array) for array in inputs(name)]


def more(name):
    names = {"clip": "pixel_values", "whisper": "decoder_input_ids"}
    return {names[name]: inputs_of(name)[1]} if name in names else {}


def write(name):
    model = torch_model(name)
    weights = {f"weights/{key}": value.numpy().astype(np.float16) for key, value in model.state_dict().items()}
    base = logits(model, name)
    torch.manual_seed(1)
    made = peft.LoraConfig(r=2, lora_alpha=3, target_modules=MODELS[name][3], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, made).eval()
        model.save_pretrained(REFERENCE / name)
    (REFERENCE / name / "README.md").unlink()
    np.savez_compressed(REFERENCE / name / "reference.npz", base=base, adapted=logits(model, name), **weights)
    print(f"{name}: {sum(file.stat().st_size for file in (REFERENCE / name).iterdir()):,} bytes")


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        write(name)
