"""Small programs through the real compilers, in a process of its own: JSON of what they take, for test_compilers.py."""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_llama import TINY, changed

from qlora_jax.errors import DoesNotFitError
from qlora_jax.models import ModelSpec
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.plan import (
    DEVICES,
    SIZES,
    ServeSizes,
    compile_decode_step,
    compile_serving,
    compile_train_step,
    machine_mesh,
    machine_named,
)
from qlora_jax.plan import compile as compiling
from qlora_jax.plan.compile import compile_program
from qlora_jax.plan.fit import largest_that_fits
from qlora_jax.plan.hlo import parse_program
from qlora_jax.plan.topology import context
from qlora_jax.quant import StackedTensor, matmul, quantize
from qlora_jax.train import BatchSpec, StepSpec, language_model_objective

VOCABULARY = 640  # so that nothing but the token table has as many values
MODEL = ModelSpec(llama_config(TINY | {"vocab_size": VOCABULARY}), method=LoRA(8))
SPEC = StepSpec(MODEL, language_model_objective(packed=False), BatchSpec(length=128))


def one_product(machine):
    x = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16, sharding=NamedSharding(machine_mesh(machine), P()))
    return compile_program(jax.jit(lambda x: jax.nn.silu(x @ x)), (x,), machine)


def stack_traffic(machine):
    """(bytes that a loop over a stack of matrices moves, bytes of the stack, bytes of one matrix)."""
    whole = NamedSharding(machine_mesh(machine), P())
    stack = jax.ShapeDtypeStruct((16, 1024, 2048), jnp.float32, sharding=whole)
    x = jax.ShapeDtypeStruct((2048, 1024), jnp.float32, sharding=whole)

    def loop(x, stack):
        return jax.lax.fori_loop(0, 16, lambda i, x: jnp.tanh(x + stack[i].T), x)

    program = compile_program(jax.jit(loop), (x, stack), machine)
    return program.traffic, 4 * math.prod(stack.shape), 4 * math.prod(x.shape)


def saved_stack(machine, rows):
    """The peak of a gradient through a loop that saves a stack of its inputs, or what the compiler says it needs."""
    whole = NamedSharding(machine_mesh(machine), P())
    x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16, sharding=whole)
    weights = jax.ShapeDtypeStruct((8, 4096, 4096), jnp.bfloat16, sharding=whole)

    def loss(x, weights):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False)
        return jnp.square(jax.lax.scan(body, x, weights)[0].astype(jnp.float32)).sum()

    try:
        return {"peak": compile_program(jax.jit(jax.grad(loss)), (x, weights), machine).peak}
    except DoesNotFitError as error:
        return {"needed": error.needed}


def of(plan):
    program = plan.program
    values = dataclasses.asdict(dataclasses.replace(plan, program=dataclasses.replace(program, text="")))
    del values["machine"]
    parsed = parse_program(program.text)
    loops = [trips for _, trips in parsed.loops()]
    counts = {"dense_matrices": dense_matrices(program.text), "copied_tables": copied_tables(parsed)}
    counts |= {"copied_stacks": copies(program.text, "u8", 3), "copied_caches": copies(program.text, "bf16", 5)}
    return {**values, "peak": program.peak, "loops": loops, "stack_reads": parsed.stack_reads(), **counts}


def copies(text, dtype, axes):
    """How many arrays of that kind are made outside the loops over layers, beside the arguments: stacks of packed bytes
    have three axes, keys and values of the cache five."""
    program = parse_program(text)
    entry = program.computations[program.entry].values()
    made = [x for x in entry if x.opcode not in ("parameter", "get-tuple-element", "tuple", "while", "bitcast")]
    return sum(x == dtype and len(shape) == axes for one in made for x, shape in zip(one.dtypes, one.shapes, strict=True))


def copied_tables(program):
    """How many arrays as large as the token table are made in a program or its loops. A TPU may fetch a small one into its
    own memory, which is no copy in that of the device."""
    moves = ("parameter", "get-tuple-element", "tuple", "while", "bitcast", "copy-start", "copy-done")
    size = VOCABULARY * TINY["hidden_size"]

    def bodies(name):
        return [name, *(inner for loop, _ in program.loops(name) for inner in bodies(loop.called("body")))]

    made = [x for name in bodies(program.entry) for x in program.computations[name].values() if x.opcode not in moves]
    return sum(math.prod(shape) == size for one in made for shape in one.shapes)


def kernel_reads(machine, rows, dtype):
    """(bytes that a program with the product of `rows` by a layer of a stack reads of it, bytes of the layer)."""
    stack = jax.eval_shape(quantize, jax.ShapeDtypeStruct((3, 2048, 256), jnp.float32))
    matrix = jax.eval_shape(StackedTensor, stack, jax.ShapeDtypeStruct((), jnp.int32))
    mesh = machine_mesh(machine)
    arguments = compiling.place((jax.ShapeDtypeStruct((rows, 2048), dtype), matrix), mesh, P())
    with context(mesh):
        program = compile_program(jax.jit(matmul), arguments, machine)
    return parse_program(program.text).stack_reads(), stack.nbytes // 3


def dense_matrices(text):
    """How many dense copies of layers' matrices live at most at once in a loop, in the order of its schedule: what a
    fusion makes of packed bytes, from there to where it is read last. One that multiplies as well makes no copy."""
    sizes = {a * b for a, b in ((256, 256), (256, 128), (256, 512))}
    program, most = parse_program(text), 0
    for loop, _ in program.loops():
        body = list(program.computations[loop.called("body")].values())
        alive = []
        for place, instruction in enumerate(body):
            inner = program.computations.get(instruction.called("calls") or "", {}).values()
            multiplies = any(x.opcode in ("convolution", "dot") for x in inner)
            if not multiplies and any(x.opcode == "parameter" and x.dtypes == ("u8",) for x in inner):
                arrays = zip(instruction.dtypes, instruction.shapes, strict=True)
                copies = sum(dtype == "bf16" and math.prod(shape) in sizes for dtype, shape in arrays)
                alive += [(place, last_use(body, instruction.name))] * copies
        most = max([most, *(sum(start <= place < end for start, end in alive) for place in range(len(body)))])
    return most


def last_use(body, name):
    names, last = {name}, 0
    for place, instruction in enumerate(body):
        if names & set(instruction.operands):
            last = place
            if instruction.opcode in ("bitcast", "get-tuple-element"):
                names.add(instruction.name)
    return last


def main(platform, what):
    if what == "--products":
        kinds = [name for name, device in DEVICES.items() if device.platform == platform]
        print(json.dumps({name: one_product(machine_named(name)).flops for name in kinds}))  # of all of them, or an error
        return
    result = {"traffic": stack_traffic(machine_named("h100" if platform == "cuda" else "v5e"))}
    if platform == "cuda":
        host = changed(SPEC, optimizer={"host_optimizer": True})
        result["train"] = of(compile_train_step(host, machine_named("h100")))
        result["four"] = of(compile_train_step(SPEC, machine_named("h100x4")))
        result["decode"] = of(compile_decode_step(SPEC, machine_named("h100"), capacity=256))
        sizes = [ServeSizes(tenants, 8, capacity=256, chunk=64) for tenants in (4, 64)]
        served = [compile_serving(changed(SPEC, batch={"batch_size": 4}), machine_named("h100"), one) for one in sizes]
        programs = [{name: [program.traffic, program.flops] for name, program in plan.programs.items()} for plan in served]
        result["serve"] = {"peaks": [plan.peak for plan in served], "banks": [plan.bank for plan in served]}
        result["serve"] |= {"programs": programs, "cache": served[0].cache, "arguments": served[0].decode.arguments}
        result["serve"]["aliased"] = [program.aliased for program in served[0].programs.values()]
        gpus = [machine_named(name) for name in ("h100", "a100-80", "l4")]
        cases = [(gpu, 1, "bfloat16") for gpu in gpus] + [(gpus[0], 64, "bfloat16"), (gpus[2], 8, "float32")]
        result["kernels"] = [kernel_reads(*case) for case in cases]
        asked = []

        def peak(rows):
            asked.append(rows)
            spec = changed(SPEC, batch={"batch_size": rows})
            return compile_decode_step(spec, machine_named("h100"), capacity=256).program.peak

        limit = result["decode"]["peak"] + 40 * result["decode"]["cache"]
        result["fit"] = {"found": largest_that_fits(peak, limit, start=8), "asked": asked, "limit": limit}
    else:
        result["limit"] = [saved_stack(machine_named("v5e"), rows) for rows in (166912, 170496)]
        result["train"] = of(compile_train_step(SPEC, machine_named("v5e")))
        model = ModelSpec(llama_config(SIZES["llama-3-8b"]), method=LoRA(16))
        large = StepSpec(model, language_model_objective())  # what is small lies in a TPU's own memory
        large = changed(large, batch={"batch_size": 8})  # of several rows, a compiler may order the axes of the cache anew
        result["decode"] = of(compile_decode_step(large, machine_named("v5e"), capacity=2048))
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:], *([""] * (3 - len(sys.argv))))
