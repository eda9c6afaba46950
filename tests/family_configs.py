"""Fields of config.json of a tiny model of each family."""

from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
T5 = {
    "vocab_size": 101,
    "d_model": 64,
    "d_ff": 96,
    "d_kv": 16,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0}
LONGROPE = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"rope_scaling": YARN},
    "mistral": SIZES | {"sliding_window": 9},
    "qwen2": SIZES | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "qwen3": SIZES | {"layer_types": ["full_attention"] * 4},
    "gemma": SIZES | {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": SIZES | {"sliding_window": 9, "query_pre_attn_scalar": 16, "final_logit_softcapping": 30.0},
    "gemma3_text": SIZES | {"sliding_window": 9, "sliding_window_pattern": 2, "rope_local_base_freq": 1e3},
    "phi3": SIZES | {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64},
    "smollm3": SIZES | {"no_rope_layers": [1, 0, 1, 1]},
    "gpt_neox": SIZES | {"rotary_pct": 0.5, "layer_norm_eps": 1e-5, "use_parallel_residual": True},
    "t5": T5 | {"relative_attention_num_buckets": 8, "layer_norm_epsilon": 1e-6, "decoder_start_token_id": 0},
}
