"""Worker: decode with qlora_jax; hf_decode.py does the same with transformers.

`serve.generate` continues the same prompt greedily in every row, and no token ends an answer.
"""

import time
from collections.abc import Callable

import worker


def main() -> None:
    arguments = worker.answer_parser(__doc__).parse_args()

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from qlora_jax.checkpoint.load import load_model
    from qlora_jax.checkpoint.open import open_checkpoint
    from qlora_jax.quant import Quantization
    from qlora_jax.serve.generate import generate

    jax.devices()
    start = time.perf_counter()
    model = load_model(
        open_checkpoint(arguments.model),
        quantization=Quantization("nf4", double_quantization=True) if arguments.storage == "nf4" else None,
        dtype=jnp.dtype(arguments.dtype),
        progress=False,
    )
    graphdef, state = nnx.split(model)
    jax.block_until_ready(state)
    load_seconds = time.perf_counter() - start
    prompts = [arguments.prompt] * arguments.batch_size

    def answers(mark: Callable[[], None]) -> list[int]:
        def on_token(row: int, token: int) -> None:
            if row == arguments.batch_size - 1:  # the last row of a step
                mark()

        return generate(graphdef, state, prompts, max_new_tokens=arguments.new_tokens, on_token=on_token)[0]

    found = worker.answer(answers, arguments)
    versions = worker.versions("jax", "jaxlib", "flax")
    worker.report(found, load_seconds=load_seconds, versions=versions, **worker.jax_device())


if __name__ == "__main__":
    main()
