"""Worker: QLoRA training with qlora_jax; hf_train.py and qwix_train.py do the same with the peers.

The programs have the same flags, draw the same tokens from the same seed, do the same number of steps and print the same
JSON line, so that scripts/benchmarks/bench.py can alternate between them. The training step is that of the package. The
peers shift their labels themselves, so that the last token of a row predicts nothing: here the loss mask has the same
effect, and the losses of the first step, where the adapters are still zero, are equal.
"""

import time

import worker


def main() -> None:
    parser = worker.train_parser(__doc__)
    parser.add_argument("--remat", choices=("full", "dots", "none"), required=True)
    arguments = worker.parse_train(parser)

    import jax
    import jax.numpy as jnp
    import numpy as np

    from qlora_jax.checkpoint.load import load_model
    from qlora_jax.checkpoint.open import open_checkpoint
    from qlora_jax.models import ModelSpec
    from qlora_jax.peft import LoRA
    from qlora_jax.train import (
        BatchSpec,
        OptimizerSpec,
        Step,
        StepSpec,
        compile_before_run,
        create_state,
        language_model_objective,
        learning_rate_schedule,
        precompile,
        split,
    )

    jax.devices()
    start = time.perf_counter()
    checkpoint, rate = open_checkpoint(arguments.model), learning_rate_schedule("constant", 2e-4, arguments.steps)
    described = ModelSpec(
        checkpoint.model_config,
        method=LoRA(rank=arguments.rank, alpha=16.0),
        dtype=arguments.dtype,
        remat=arguments.remat,
    )
    size = BatchSpec(batch_size=arguments.batch_size, length=arguments.length)
    spec = StepSpec(described, language_model_objective(packed=False), size, OptimizerSpec(max_grad_norm=0.3))
    precompiled = precompile(spec, rate)
    mask = np.ones((1, arguments.batch_size, arguments.length), np.float32)
    mask[..., -1] = 0.0
    model = load_model(
        checkpoint,
        quantization=described.quantization,
        method=described.method,
        dtype=jnp.dtype(arguments.dtype),
        remat=arguments.remat,
        progress=False,
    )
    vocabulary = model.config.vocab_size
    graphdef, adapter, frozen = split(model)
    del model
    trainable = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    tx = spec.optimizer.build(rate)
    state = create_state(tx, adapter)
    jax.block_until_ready((state, frozen))
    load_seconds = time.perf_counter() - start

    jitted = Step(spec.objective, tx, graphdef, state, frozen, spec.batch_shapes()).jit_train()
    train = compile_before_run(jitted, precompiled.programs(graphdef)[0])

    def step(tokens: np.ndarray) -> float:
        nonlocal state
        batch = {"inputs": tokens[None], "targets": np.roll(tokens, -1, axis=1)[None], "loss_mask": mask}
        state, metrics = train(state, frozen, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    found = worker.train(step, vocabulary, arguments)
    versions = worker.versions("jax", "jaxlib", "flax", "optax")
    more = {"load_seconds": load_seconds, "trainable_parameters": trainable, "versions": versions}
    worker.report(found, **more, **worker.jax_device())


if __name__ == "__main__":
    main()
