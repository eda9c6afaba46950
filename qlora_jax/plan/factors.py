"""The measured factors of the quick plan (`plan.quick`).

Working memory is a sum of sizes that shapes give, each multiplied by a factor. scripts/benchmarks/measure_plan.py fits the
factors to compiled plans and prints this table. They belong to the training step as it is: they are measured again when it
changes.

The factors of TPUs are counts instead, of the arrays that libtpu has in memory at the peak of six programs
(`XLA_FLAGS=--xla_dump_to=DIR`, `DIR/*live-range.txt`): for v5e Llama-3.1-8B, Mistral-7B, Gemma-7B and SmolLM2-135M at
1 x 1024 tokens and Llama-3-8B at 4 x 2048, and for v5p LLaMA-65B with rank 64 at 1 x 512.

    loss     the logits of a chunk, twice unless they fit VMEM; the adapter in bfloat16; three arrays like the hidden states
    layer    six activations of the feed-forward and one dequantised matrix, or four and two, less what VMEM takes; the
             adapter in bfloat16; the sums of the softmax, which splash attention saves padded to 128 lanes; six arrays like
             the residual stream, and half of one like queries, keys and values

With residuals in host memory libtpu reports no peak, but the larger size of all temporaries. The factor of "offloaded" makes
the plan of Llama-3.1-8B at 1 x 53248 what is compiled by that size.
"""

ERROR = 0.05  # the largest relative error of the peak that the fit allows
# Bytes of working memory for each byte of a feature, by platform and moment.
FACTORS: dict[str, dict[str, dict[str, float]]] = {
    "cuda": {
        "loss": {
            "program": 0.0,
            "logits": 1.962,
            "chunks": 0.0,
            "hidden": 7.412,
            "adapter": 0.0,
            "table": 0.0,
            "hoisted": 0.0,
            "outside": 0.0,
            "padded": 0.0,
            "looped": 0.0,
        },
        "layer": {
            "program": 0.0,
            "inner": 2.159,
            "stream": 17.861,
            "held": 0.0,
            "heads": 0.433,
            "normed": 0.0,
            "matrix": 0.0,
            "adapter": 0.305,
            "wide": 0.0,
            "sums": 0.0,
            "offloaded": 0.0,
            "scores": 0.89,
            "biased": 1.0,
            "table": 0.0,
            "hoisted": 0.0,
        },
        "attention": {
            "hidden": 7.6,
            "heads": 1.83,
            "parts": 23.0,  # by packed rows of five models; that of several GPUs by two
        },
    },
    "cuda, several": {
        "loss": {
            "program": 1.141,
            "logits": 1.222,
            "chunks": 0.0,
            "hidden": 5.352,
            "adapter": 0.537,
            "table": 0.142,
            "hoisted": 0.221,
            "outside": 0.0,
            "padded": 0.0,
            "looped": 0.201,
        },
        "layer": {
            "program": 0.362,
            "inner": 4.397,
            "stream": 0.0,
            "held": 0.0,
            "heads": 4.177,
            "normed": 0.0,
            "matrix": 2.316,
            "adapter": 0.142,
            "wide": 0.0,
            "sums": 0.0,
            "offloaded": 0.0,
            "scores": 1.608,
            "biased": 1.0,
            "table": 0.028,
            "hoisted": 0.031,
        },
        "attention": {
            "hidden": 7.6,
            "heads": 1.83,
            "parts": 27.0,
        },
    },
    "tpu": {
        "loss": {
            "program": 0.0,
            "logits": 1.0,
            "outside": 1.0,
            "chunks": 0.0,
            "hidden": 3.0,
            "adapter": 0.5,
            "padded": 1.0,
            "table": 0.46,
            "hoisted": 0.4,
            "looped": 0.0,
        },
        "layer": {
            "program": 0.0,
            "inner": 0.0,
            "wide": 1.0,
            "stream": 6.0,
            "held": 0.0,
            "heads": 0.5,
            "normed": 1.0,
            "matrix": 0.0,
            "sums": 1.0,
            "offloaded": 6.5,
            "adapter": 0.5,
            "scores": 0.0,
            "biased": 1.0,
            "parts": 0.0,
            "table": 0.0,
            "hoisted": 0.0,
        },
    },
    "cpu": {
        "loss": {
            "program": 0.0,
            "logits": 3.0,
            "chunks": 0.5,
            "hidden": 2.0,
            "adapter": 0.5,
            "table": 1.0,
            "hoisted": 0.5,
            "outside": 0.0,
            "padded": 0.0,
            "looped": 0.0,
        },
        "layer": {
            "program": 0.0,
            "inner": 8.0,
            "stream": 8.0,
            "held": 0.0,
            "heads": 4.0,
            "normed": 0.0,
            "matrix": 2.0,
            "adapter": 1.0,
            "wide": 0.0,
            "sums": 0.0,
            "offloaded": 0.0,
            "scores": 4.0,
            "biased": 1.0,
            "parts": 0.0,
            "table": 1.0,
            "hoisted": 0.5,
        },
    },
}
