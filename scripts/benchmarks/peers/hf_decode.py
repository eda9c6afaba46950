"""Worker: decode with transformers, dense or in the 4 bits of bitsandbytes.

It has the flags, prompt, number of tokens and JSON line of qlora_jax_decode.py. `model.generate` continues the prompt
greedily in every row; its stopping criterion, which is called after each token, records the time and never stops.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import worker

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    arguments = worker.answer_parser(__doc__).parse_args()

    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    dtype = getattr(torch, arguments.dtype)
    options: dict[str, Any] = {}
    if arguments.storage == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=dtype, device_map={"": device}, **options
    ).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)  # no token ends an answer
    load_seconds = time.perf_counter() - start
    prompt = torch.tensor([arguments.prompt] * arguments.batch_size, device=device)

    def answers(mark: Callable[[], None]) -> list[int]:
        def known(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            tokens[-1, -1].item()  # waits for a GPU
            mark()
            return torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)

        with torch.inference_mode():
            tokens = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=arguments.new_tokens,
                stopping_criteria=[known],
            )
        return tokens[0, prompt.shape[1] :].tolist()

    found = worker.answer(answers, arguments)
    packages = ("torch", "transformers", *(["bitsandbytes"] * (arguments.storage == "nf4")))
    worker.report(found, load_seconds=load_seconds, versions=worker.versions(*packages), **worker.torch_device())


if __name__ == "__main__":
    main()
