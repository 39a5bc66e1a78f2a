"""The torch half of `export_to_peft.py`: its adapter in PEFT, and the logits of both. Needs no JAX.

    .venv-oracle/bin/python examples/export_to_peft_torch.py export_output

The folder has what the other half wrote: the adapter in PEFT's format, and `questions.npz` with the test questions and
the logits of JAX. Writes `result.json` there.
"""

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

BATCH = 50


class Classifier(nn.Module):
    """`minilm.Classifier` in torch: the published encoder, mean pooling and a linear head."""

    def __init__(self, weights: Path, classes: int) -> None:
        super().__init__()
        transformers.logging.set_verbosity_error()  # the file has a pooler, which is not used
        transformers.logging.disable_progress_bar()
        self.encoder = transformers.BertModel.from_pretrained(weights, add_pooling_layer=False)
        self.classifier = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns logits `(batch, classes)`; `ids` and `mask` are `(batch, tokens)`."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.classifier((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


@torch.no_grad()
def evaluate(model: nn.Module, ids: NDArray[np.int32], mask: NDArray[np.bool_], name: str) -> NDArray[np.float32]:
    """Returns the logits of all questions, `(questions, classes)`."""
    logits = []
    for start in tqdm(range(0, len(ids), BATCH), desc=name, unit=" batches", mininterval=0.5):
        part = slice(start, start + BATCH)
        logits.append(model(torch.from_numpy(ids[part]).long(), torch.from_numpy(mask[part]).long()).numpy())
    return np.concatenate(logits)


def main() -> None:
    """Loads the adapter, compares the logits and writes `result.json`."""
    parser = argparse.ArgumentParser(description="Loads an adapter of lora_jax in PEFT and compares the logits.")
    parser.add_argument("folder", type=Path, help="what export_to_peft.py wrote")
    folder = parser.parse_args().folder
    with np.load(folder / "questions.npz") as file:
        ids, mask, labels, expected = (file[name] for name in ("ids", "mask", "labels", "logits"))
    base = json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = Classifier(Path(base), expected.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of tensors that are missing or not used
        adapted = peft.PeftModel.from_pretrained(model, folder / "adapter").eval()
    logits = {"adapted": evaluate(adapted, ids, mask, "PEFT")}
    logits["merged"] = evaluate(adapted.merge_and_unload(), ids, mask, "PEFT, merged")
    result = {
        name: {
            "accuracy": float((got.argmax(1) == labels).mean()),
            "other_labels": int((got.argmax(1) != expected.argmax(1)).sum()),
            "difference": float(np.abs(got - expected).max()),
        }
        for name, got in logits.items()
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, values in result.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))


if __name__ == "__main__":
    main()
