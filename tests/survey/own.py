"""What the sizes of single model types need beyond the general rules, by ``model_type``."""

from __future__ import annotations

from typing import Any

_FULL = {"rope_type": "default", "rope_theta": 10000.0}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}

OWN: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": _FULL, "sliding_attention": _FULL},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4, "head_dim": 24},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16,
                  "ssm_multipliers": [1.0] * 5},
    # Four layers, of which the last two attend to the keys and values of the first two.
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
                     "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4,
                     "head_dim": 16, "num_key_value_heads": 2},
    "gemma4_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_unified_text": {"per_layer_config": {"01": {"head_dim": 32}}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "moshi": {"sliding_window": 512},  # as wide as the context, as in its defaults
    "musicgen": {"decoder": {}},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16,
                       "indexer_budget": 16, "indexer_compress_ratio": 4,
                       "output_gate_type": "sigmoid", "ngram_vocab_size_base": 128,
                       "split_ngram_parts": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32]},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 32, "mamba_d_state": 8, "hidden_size": 128,
               "num_key_value_heads": 4, "num_attention_heads": 4,
               "layers_block_type": ["linear_attention", "hybrid"]},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"],
              "num_hidden_layers": 3, "attention_hidden_size": 128, "attention_head_dim": 32},
}  # fmt: skip
