"""The measured factors of the quick plan (`plan.quick`).

Working memory is a sum of sizes that shapes give, each multiplied by a factor. scripts/benchmarks/measure_plan.py fits the
factors to compiled plans and prints this table. They belong to the training step as it is: they are measured again when it
changes.
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
            "scores": 0.89,
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
            "scores": 1.608,
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
            "program": 3.106,
            "logits": 1.116,
            "chunks": 1.937,
            "hidden": 9.816,
            "adapter": 1.116,
            "table": 0.46,
            "hoisted": 0.4,
            "looped": 0.0,
        },
        "layer": {
            "program": 0.001,
            "inner": 0.048,
            "stream": 9.415,
            "held": 20.804,
            "heads": 6.568,
            "normed": 9.18,
            "matrix": 5.372,
            "adapter": 1.198,
            "scores": 0.0,
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
            "scores": 4.0,
            "parts": 0.0,
            "table": 1.0,
            "hoisted": 0.5,
        },
    },
}
