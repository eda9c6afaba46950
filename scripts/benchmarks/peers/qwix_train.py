"""Worker: QLoRA training with Qwix and Tunix.

It has the flags, tokens, number of steps and JSON line of qlora_jax_train.py. The step is the one that Tunix' trainer
compiles.
"""

import json
import time
from pathlib import Path

import worker


def main() -> None:
    parser = worker.train_parser(__doc__)
    parser.add_argument("--remat", choices=("none", "block", "decoder"), required=True)
    arguments = worker.parse_train(parser)

    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from tunix.models.llama3 import params  # type: ignore
    from tunix_model import batch_of, config_of, trainer, with_adapter

    jax.devices()
    start = time.perf_counter()
    config = config_of(json.loads(Path(arguments.model, "config.json").read_text(encoding="utf-8")), arguments.remat)
    model = params.create_model_from_safe_tensors(arguments.model, config, dtype=jnp.dtype(arguments.dtype))
    model = with_adapter(model, arguments.rank)
    adapter = jax.block_until_ready(jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    train, _ = trainer(model).jit_train_and_eval_step(cache_nnx_graph=True)
    load_seconds = time.perf_counter() - start
    mask = np.ones((arguments.batch_size, arguments.length), np.bool_)

    def step(tokens: np.ndarray) -> float:
        loss, _, norm = train(batch_of(tokens, mask))
        jax.block_until_ready((norm, nnx.state(model, nnx.LoRAParam)))
        return float(loss)

    found = worker.train(step, config.vocab_size, arguments)
    parameters = sum(leaf.size for leaf in adapter)
    versions = worker.versions("jax", "jaxlib", "flax", "optax", "qwix", "google-tunix")
    more = {"load_seconds": load_seconds, "trainable_parameters": parameters, "versions": versions}
    worker.report(found, **more, **worker.jax_device())


if __name__ == "__main__":
    main()
