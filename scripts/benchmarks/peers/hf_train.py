"""Worker: QLoRA training with transformers + PEFT + bitsandbytes, or with Unsloth.

It has the flags, tokens, number of steps and JSON line of qlora_jax_train.py: NF4 with double quantisation, LoRA on all
linear layers and AdamW with clipping, on the GPU if PyTorch has one. PyTorch runs eagerly on a CPU, so that the work is done
when a call returns; on a GPU, reading the loss waits for the work.

`--prepared` starts as the guide of PEFT does, with `prepare_model_for_kbit_training`: it casts to float32 everything that is
not quantised (norms, embeddings and the head) and turns checkpointing on.

The step of Unsloth has never been run, because no CUDA GPU was available: its calls follow the documentation.
"""

import argparse
import os
import time
from typing import Any

import worker

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = worker.train_parser(__doc__)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--prepared", action="store_true", help="use peft.prepare_model_for_kbit_training")
    parser.add_argument("--library", choices=("peft", "unsloth"), default="peft")
    arguments = worker.parse_train(parser)
    if arguments.prepared and (arguments.gradient_checkpointing or arguments.library == "unsloth"):
        parser.error("--prepared: expected PEFT alone, which turns checkpointing on by itself")
    if arguments.library == "unsloth":
        import unsloth  # noqa: F401  # type: ignore  # before transformers, which it changes

    import bitsandbytes  # noqa: F401
    import numpy as np
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    torch.manual_seed(0)
    model = with_unsloth(arguments) if arguments.library == "unsloth" else with_peft(arguments, device)
    vocabulary = model.config.vocab_size
    model.train()
    model.config.use_cache = False
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=2e-4, weight_decay=0.0)
    load_seconds = time.perf_counter() - start

    def step(drawn: np.ndarray) -> float:
        tokens = torch.from_numpy(drawn).long().to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    found = worker.train(step, vocabulary, arguments)
    names = ("torch", "transformers", "peft", "bitsandbytes", *(["unsloth"] * (arguments.library == "unsloth")))
    parameters = sum(parameter.numel() for parameter in trainable)
    more = {"load_seconds": load_seconds, "trainable_parameters": parameters, "versions": worker.versions(*names)}
    worker.report(found, **more, **worker.torch_device())


def with_peft(arguments: argparse.Namespace, device: str) -> Any:
    """Return the model with its adapter, made by PEFT as in the QLoRA paper."""
    import peft
    import torch
    import transformers

    dtype = getattr(torch, arguments.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model,
        dtype=dtype,
        device_map={"": device},
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    if arguments.prepared:
        model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return peft.get_peft_model(
        model,
        peft.LoraConfig(r=arguments.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def with_unsloth(arguments: argparse.Namespace) -> Any:
    """Return the model with its adapter, made by Unsloth."""
    import torch
    import unsloth  # type: ignore

    model, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=arguments.model,
        max_seq_length=arguments.length,
        dtype=getattr(torch, arguments.dtype),
        load_in_4bit=True,
    )
    return unsloth.FastLanguageModel.get_peft_model(
        model,
        r=arguments.rank,
        lora_alpha=16,
        lora_dropout=0.0,
        bias="none",
        target_modules=LINEAR,
        use_gradient_checkpointing="unsloth" if arguments.gradient_checkpointing else False,
    )


if __name__ == "__main__":
    main()
