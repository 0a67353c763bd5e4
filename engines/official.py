"""The official Gemma-3 text models by their sizes, so that one can be weighed before it is fetched.

Sources: ``config.json`` of google/gemma-3-*-pt on Hugging Face; Gemma 3 technical report (arXiv:2503.19786), table 1.
"""

from __future__ import annotations

from typing import Any

from engines.gemma3 import Gemma3Config, parse_config

_SCALED = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "max_position_embeddings": 131_072}
_WINDOWED = {"vocab_size": 262_208, "sliding_window": 1024, **_SCALED}
_SMALL = {"vocab_size": 262_144, "sliding_window": 512, "max_position_embeddings": 32_768}
_SHAPES: dict[str, dict[str, Any]] = {
    "gemma-3-270m": {
        "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256, **_SMALL,
    },
    "gemma-3-1b": {
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256, **_SMALL,
    },
    "gemma-3-4b": {
        "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, **_WINDOWED,
    },
    "gemma-3-12b": {
        "hidden_size": 3840, "intermediate_size": 15_360, "num_hidden_layers": 48, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256, **_WINDOWED,
    },
    "gemma-3-27b": {
        "hidden_size": 5376, "intermediate_size": 21_504, "num_hidden_layers": 62, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168, **_WINDOWED,
    },
}  # fmt: skip

OFFICIAL = tuple(_SHAPES)
"""Their names."""


def official_config(name: str) -> Gemma3Config:
    """The text model of one of ``OFFICIAL``."""
    return parse_config({"model_type": "gemma3_text", **_SHAPES[name]}, name)
