"""Worker: compile the training step of Qwix and Tunix, as qlora_jax_compile.py compiles that of qlora_jax.

The model is built as shapes. The step is that of Tunix' trainer, jitted over the parts of model and optimizer; the parts
that change are donated. It is compiled, and its operations and bytes are counted, by the functions that qlora_jax_compile.py
uses.
"""

import json
from typing import Any

from qlora_jax_compile import metrics_of, parser_of


def main() -> None:
    arguments = parser_of(__doc__).parse_args()

    import jax
    import jax.numpy as jnp
    import worker
    from flax import nnx
    from jax.sharding import PartitionSpec
    from tunix.models.llama3.model import Llama3  # type: ignore
    from tunix_model import batch_of, config_of, trainer, with_adapter

    from qlora_jax.errors import DoesNotFitError
    from qlora_jax.plan import SIZES, machine_mesh, machine_named
    from qlora_jax.plan.compile import compile_program, place, versions
    from qlora_jax.plan.tree_bytes import tree_bytes
    from qlora_jax.platforms import use_compilers_only

    use_compilers_only()
    machine = machine_named(arguments.device)
    if machine.count > 1:
        raise SystemExit("expected one device: this worker spreads nothing over several")
    made = []
    packages = {**versions(machine), **worker.versions("qwix", "google-tunix", "flax")}

    def build() -> tuple[Any, Any]:
        model = Llama3(config_of(SIZES[arguments.model], arguments.remat), rngs=nnx.Rngs(0))
        nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(model)))
        made.append(trainer(with_adapter(model, arguments.rank)))
        return made[0].model, made[0].optimizer

    parts = nnx.eval_shape(build)
    train = made[0].create_train_step_fn()
    changes = nnx.Any(nnx.OptState, nnx.optimizer.OptVariable, nnx.LoRAParam)
    graphdef, state, frozen = nnx.split(parts, changes, ...)

    def step(state: Any, frozen: Any, batch: Any) -> tuple[Any, Any, Any]:
        model, optimizer = nnx.merge(graphdef, state, frozen)
        loss, _, norm = train(model, optimizer, batch)
        return nnx.split((model, optimizer), changes, ...)[1], loss, norm

    mesh = machine_mesh(machine)
    shape = (arguments.batch_size, arguments.length)
    batch = jax.eval_shape(lambda: batch_of(jnp.zeros(shape, jnp.int32), jnp.ones(shape, jnp.bool_)))
    state, frozen, batch = (place(part, mesh, PartitionSpec()) for part in (state, frozen, batch))
    try:
        program = compile_program(jax.jit(step, donate_argnums=0), (state, frozen, batch), machine)
    except DoesNotFitError as error:
        print(json.dumps({"peak": None, "needed": error.needed, "why": str(error), "versions": packages}))
        return
    four_bits = sum(leaf.size for leaf in jax.tree.leaves(frozen) if leaf.dtype == jnp.uint4)
    print(json.dumps(metrics_of(program, tree_bytes(frozen) - four_bits // 2, packages)))


if __name__ == "__main__":
    main()
