"""PEFT's mixed batch in PyTorch: decodes one token of each row when asked to; `many_serving.py` starts it.

Reads lines `["start" or "step", method]` from the standard input, and answers each with the seconds that it took.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import peft
import torch
import transformers
from records import plural

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(sizes: dict[str, Any]) -> Any:
    """Returns a decoder of the sizes of `smollm2.Sizes`, with random weights."""
    config = transformers.LlamaConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["d_model"],
        intermediate_size=sizes["d_mlp"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        rms_norm_eps=sizes["epsilon"],
        rope_theta=sizes["theta"],
        tie_word_embeddings=True,
        pad_token_id=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def resident() -> int:
    """Returns the bytes of the parameters, buffers and all else of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Method:
    """A model, and the names of the adapters of the rows."""

    def __init__(self, model: Any, names: list[str] | None) -> None:
        self.model, self.options = model, {} if names is None else {"adapter_names": names}
        self.bytes = sum(x.numel() * x.element_size() for x in model.parameters())

    def start(self, prompts: torch.Tensor) -> None:
        self._advance(prompts, None)

    def step(self) -> None:
        self._advance(self.ids, self.cache)

    def _advance(self, ids: torch.Tensor, cache: Any) -> None:
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **self.options)
        self.ids, self.cache = out.logits[:, -1:].argmax(-1), out.past_key_values


def methods(given: dict[str, Any]) -> dict[str, Method]:
    """Returns the base, and mixed batches with each number of loaded adapters."""
    rows = given["rows"]
    found = {"torch, base": Method(llama(given["sizes"]), None)}
    for number in given["loaded"]:
        config = peft.LoraConfig(r=given["rank"], lora_alpha=16, target_modules=TARGETS, init_lora_weights=False)
        model = peft.get_peft_model(llama(given["sizes"]), config, adapter_name="0")
        for at in range(1, number):
            model.add_adapter(str(at), config)
        names = [str(at * max(number // rows, 1) % number) for at in range(rows)]
        found[f"PEFT, `adapter_names=`, {plural(number)}"] = Method(model.eval(), names)
    return found


@torch.inference_mode()
def main() -> None:
    """Answers until the standard input ends."""
    given = json.loads(sys.argv[1])
    torch.set_num_threads(os.cpu_count() or 1)
    found = methods(given)
    shape = given["rows"], given["prompt"]
    prompts = torch.randint(3, given["sizes"]["vocabulary"], shape)
    print(json.dumps({name: method.bytes for name, method in found.items()}), flush=True)
    for line in sys.stdin:
        command, name = json.loads(line)
        start = time.perf_counter()
        if command == "start":
            found[name].start(prompts)
        else:
            found[name].step()
        print(json.dumps(time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
