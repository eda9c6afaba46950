"""Worker: losses of texts by transformers with bitsandbytes (`load_in_4bit`).

    --kinds dense nf4 nf4-double fp4 fp4-double      all loaded from one folder; "double" is double quantisation
    --tokens FILE                                    JSON: a list of texts, each a list of token ids

Each text is read separately, without padding. The line of JSON has the summed loss of each text: `losses` by kind, computed
in float32. On a CPU with AVX512-BF16, bitsandbytes multiplies in bfloat16 when a model is in `eval()`; so the model stays in
training mode, without dropout and gradients. `losses_in_eval` are those of `eval()`, for comparison.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import worker

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face checkpoint folder")
    parser.add_argument("--tokens", required=True, type=Path)
    parser.add_argument("--kinds", required=True, nargs="+")
    arguments = parser.parse_args()

    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = json.loads(arguments.tokens.read_text(encoding="utf-8"))
    losses: dict[str, list[float]] = {}
    in_eval: dict[str, list[float]] = {}
    for kind in arguments.kinds:
        name, _, double = kind.partition("-")
        options: dict[str, Any] = {}
        if name != "dense":
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=name,
                bnb_4bit_use_double_quant=double == "double",
                bnb_4bit_compute_dtype=torch.float32,
            )
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32, device_map={"": device}, **options
        )
        for module in model.modules():  # none in most models
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        losses[kind] = losses_of(model.train(), texts, device)
        if name != "dense":
            in_eval[kind] = losses_of(model.eval(), texts, device)
        del model
    versions = worker.versions("torch", "transformers", "bitsandbytes")
    worker.report({"losses": losses, "losses_in_eval": in_eval}, versions=versions, **worker.torch_device())


def losses_of(model: Any, texts: list[list[int]], device: str) -> list[float]:
    """Return the summed loss of each text."""
    import torch

    found = []
    with torch.no_grad():
        for tokens in texts:
            row = torch.tensor([tokens], device=device)
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
            found.append(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item())
    return found


if __name__ == "__main__":
    main()
