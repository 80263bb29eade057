"""A tiny configuration of any model type: its defaults, with every size made small.

Nothing here knows an architecture but :data:`OWN`: sizes are recognised by attribute name, lists
with an entry per layer keep the entries of the layers that stay, and the layers that stay are one
of every kind. New model types are thus covered as soon as transformers has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.survey.own import OWN

VOCABULARY = 128
HEAD = 16
WINDOW = 8

_LAYERS = """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
    num_decoder_layers num_encoder_layers num_blocks"""
_HEADS = """num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads
    encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
    swa_num_attention_heads index_n_heads linear_num_heads"""
_GROUPS = "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads"
_EXPERTS = """num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num
    linear_num_value_heads altup_num_inputs mamba_n_heads num_centroids n_groups"""
_HIDDEN = """hidden_size d_model n_embd embedding_size embedding_dim emb_dim word_embed_proj_dim
    lru_width attention_hidden_size output_embedding_size input_embedding_size
    backbone_hidden_size max_source_positions"""
_INNER = """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim dff dim_ff ffn_hidden_size
    n_inner d_inner feed_forward_size intermediate_size_mlp dense_intermediate_size"""
_SMALL = """moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
    shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size
    q_lora_rank kv_lora_rank o_lora_rank router_hidden_size hc_lowrank adapter_rank
    laurel_rank time_step_rank mamba_dt_rank hidden_size_per_layer_input ple_embed_dim
    moe_expert_intermediate_size prompt_mid_dim"""
_HEAD_WIDTHS = """head_dim swa_head_dim kv_channels v_head_dim qk_nope_head_dim index_head_dim
    linear_head_dim linear_key_head_dim linear_value_head_dim attention_head_size d_head dim_head
    mamba_head_dim mamba_headdim mamba_d_head"""
_LENGTHS = """max_position_embeddings n_positions max_seq_len n_ctx model_max_length
    max_target_positions context_length"""
_WINDOWS = """sliding_window window_size sliding_window_size attention_window_size local_attention
    keep_window_size attention_chunk_size block_size"""
_TWO = """num_experts_per_tok moe_topk moe_k num_experts_per_token o_groups num_mem_blocks
    linear_num_query_groups"""
_ONE = """n_group topk_group num_expert_group n_shared_experts num_shared_experts
    moe_num_shared_experts first_k_dense_replace num_dense_layers mamba_n_groups mamba_ngroups
    expert_layer_offset moe_layer_start_index"""
_STATE = "state_size mamba_d_state ssm_state_size qk_rope_head_dim rotary_dim d_rel"

SIZES: dict[str, int] = {
    name: value
    for names, value in (
        (_LAYERS, 2), (_HEADS, 4), (_GROUPS, 2), (_EXPERTS, 4), (_HIDDEN, 64), (_INNER, 96),
        (_SMALL, 32), (_HEAD_WIDTHS, HEAD), (_LENGTHS, 512), (_WINDOWS, WINDOW), (_TWO, 2),
        (_ONE, 1), (_STATE, 8),
        ("vocab_size decoder_vocab_size vocab_size_per_layer_input shape_vocab_size "
         "pronunciation_vocab_size encoder_hash_byte_group_vocab", VOCABULARY),
        ("chunk_size mamba_chunk_size index_topk num_random_blocks block_multiple_of", 16),
        ("log_scaling_n_floor floor_scale original_max_position_embeddings rel_extent", 64),
        ("query_pre_attn_scalar", 24),
    )
    for name in names.split()
}  # fmt: skip

_KINDS = ("layer_types", "layers_block_type", "attention_layers", "block_types", "attn_layers")


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The tiny configuration of a model type.

    Raises:
        Exception: whatever the configuration class raises for sizes that do not fit together.
    """
    kind = CONFIG_MAPPING[model_type]
    own = OWN.get(model_type, {})
    try:
        default = kind()
    except Exception:  # some have required arguments
        return kind(**own)
    return kind(**{**shrunk(default), **own})


def shrunk(default: PreTrainedConfig) -> dict[str, Any]:
    """The attributes to construct a configuration's class with, to make it tiny."""
    given = default.to_dict()
    for name in default.sub_configs:
        given[name] = getattr(default, name, None)
    keep = _kept_layers(default, given)
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, PreTrainedConfig):
            sub = {**shrunk(value), **OWN.get(value.model_type, {})}
            found[name] = type(value)(**sub).to_dict()
        else:
            small = _small(name, value, keep)
            if small != value:
                found[name] = small
    if "is_decoder" in given:
        found["is_decoder"] = True
    if "kv_lora_rank" in given and "num_key_value_heads" in given:
        found["num_key_value_heads"] = SIZES["num_attention_heads"]  # latent attention: no groups
    if "qk_rope_head_dim" in given and "head_dim" in given:
        found["head_dim"] = SIZES["qk_rope_head_dim"]
    aliases = {v: k for k, v in default.attribute_map.items() if k in found and v in found}
    return {name: value for name, value in found.items() if name not in aliases.values()}


def _kept_layers(default: PreTrainedConfig, given: Mapping[str, Any]) -> list[int]:
    """Which layers stay: the first of every kind, and at least two."""
    for name in _KINDS:
        kinds = getattr(default, name, None)
        if isinstance(kinds, (list, tuple)) and kinds:
            first = [list(kinds).index(kind) for kind in dict.fromkeys(kinds)]
            rest = [i for i in range(len(kinds)) if i not in first]
            return sorted((first + rest)[: max(2, len(first))])
    return [0, 1]


def _small(name: str, value: Any, keep: Sequence[int]) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if name.endswith(("token_id", "token_ids", "token_index", "tokens")):
        return _token(name, value)
    if name in _LAYERS.split():
        return len(keep)
    if isinstance(value, (list, tuple)):
        return _list(name, value, keep)
    if name == "per_layer_config":
        return {}
    if name.startswith("rope") and isinstance(value, dict):
        return _rope(value)
    if isinstance(value, int) and name in SIZES and value:
        return SIZES[name] if value > SIZES[name] or name in _LENGTHS.split() else value
    return value


def _list(name: str, value: Sequence[Any], keep: Sequence[int]) -> Any:
    if name in SIZES:
        return [SIZES[name]] * len(keep)
    if len(value) > max(keep) and (len(value) > 4 or name in _KINDS):
        return [value[i] for i in keep]
    return list(value)


def _token(name: str, value: Any) -> Any:
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name in special:
        return special[name]
    if isinstance(value, int):
        return value if 0 <= value < 3 else 100 + sum(map(ord, name)) % 28
    return value


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Frequencies for a short context, and lists with an entry per pair made short."""
    small: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            small[name] = _rope(value)
        elif name.endswith("original_max_position_embeddings"):
            small[name] = 64
        elif name == "mrope_section":
            small[name] = [2, 3, 3]
        elif name in ("short_factor", "long_factor"):
            small[name] = [1.0 + i / 8 for i in range(HEAD // 2)]
        else:
            small[name] = value
    return small
