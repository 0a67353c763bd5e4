"""``config.json``: both layouts, the multimodal text tower, transformers' own files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3Config as MultimodalConfig
from transformers import Gemma3TextConfig

from engines.errors import CheckpointError
from engines.gemma3 import GLOBAL, LOCAL, Gemma3Config, Rope, parse_config, read_config

SIZES: dict[str, dict[str, Any]] = {
    "270m": {
        "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
    },
    "1b": {
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
    },
    "4b": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024},
    "12b": {
        "hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "sliding_window": 1024,
        "num_attention_heads": 16, "num_key_value_heads": 8,
    },
    "27b": {
        "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "sliding_window": 1024,
        "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168,
    },
}  # fmt: skip
"""What Google's config files say; those of 4B and 12B leave the rest to transformers' defaults."""

OLD: dict[str, Any] = {
    "model_type": "gemma3_text", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "sliding_window": 16, "sliding_window_pattern": 6, "query_pre_attn_scalar": 12, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096, "rope_theta": 2e6, "rope_local_base_freq": 3e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "bos_token_id": 5, "eos_token_id": [1, 6], "pad_token_id": 3,
}  # fmt: skip
"""The layout of transformers 4."""

TYPES = [*[LOCAL] * 5, GLOBAL, LOCAL]


def new(**changes: Any) -> dict[str, Any]:
    """``OLD`` in the layout of transformers 5."""
    dropped = ("sliding_window_pattern", "rope_theta", "rope_local_base_freq", "rope_scaling")
    ropes = {
        GLOBAL: {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0},
        LOCAL: {"rope_type": "default", "rope_theta": 3e4},
    }
    kept = {key: value for key, value in OLD.items() if key not in dropped}
    return kept | {"layer_types": TYPES, "rope_parameters": ropes} | changes


def multimodal(size: str) -> dict[str, Any]:
    scaling = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    return {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", **SIZES[size], **scaling},
        "vision_config": {"model_type": "siglip_vision_model"},
        "eos_token_id": [1, 106],
    }


def config_of(size: str) -> Gemma3Config:
    return parse_config({"model_type": "gemma3_text", **SIZES[size]} if size in ("270m", "1b") else multimodal(size))


def written(folder: Path, text: str | bytes) -> Path:
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_config(folder)
    message = str(caught.value)
    assert str(folder / "config.json") in message
    assert "\n" not in message
    assert len(message) < len(str(folder)) + 300
    return message


# ------------------------------------------------------------------------------------------------ layouts


def test_every_key_of_the_old_layout_is_read() -> None:
    assert parse_config(OLD) == Gemma3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
        layer_types=tuple(TYPES),
        rope_global=Rope(2e6, 8.0),
        rope_local=Rope(3e4),
        query_pre_attn_scalar=12,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        bos_token_id=5,
        eos_token_ids=(1, 6),
        pad_token_id=3,
    )


def test_both_layouts_say_the_same() -> None:
    assert parse_config(new()) == parse_config(OLD)


def test_the_private_spelling_of_the_pattern_is_read() -> None:
    text = {key: value for key, value in OLD.items() if key != "sliding_window_pattern"}
    assert parse_config(text | {"_sliding_window_pattern": 3}).global_layers == (2, 5)


def test_layer_types_win_over_a_pattern() -> None:
    types = [GLOBAL, *[LOCAL] * 6]
    assert parse_config(OLD | {"layer_types": types}).global_layers == (0,)


def test_scaling_under_its_oldest_name_is_read() -> None:
    assert parse_config(OLD | {"rope_scaling": {"type": "linear", "factor": 4}}).rope_global == Rope(2e6, 4.0)


def test_a_single_end_token_is_read() -> None:
    assert parse_config(OLD | {"eos_token_id": 9}).eos_token_ids == (9,)


def test_the_multimodal_text_tower_is_read() -> None:
    config = parse_config(multimodal("4b"))
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert config.global_layers == (5, 11, 17, 23, 29)
    assert config.rope_global == Rope(1e6, 8.0)
    assert config.eos_token_ids == (1, 106)


def test_layers_know_their_window_and_rotation() -> None:
    config = parse_config(OLD)
    assert (config.window(4), config.window(5)) == (16, None)
    assert (config.rope(4), config.rope(5)) == (Rope(3e4), Rope(2e6, 8.0))


# ------------------------------------------------------------------------------------------------ transformers


def transformers_text_config(**changes: Any) -> Gemma3TextConfig:
    ropes = {
        GLOBAL: {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0},
        LOCAL: {"rope_type": "default", "rope_theta": 3e4},
    }
    terms = {key: value for key, value in OLD.items() if key not in ("model_type", "rope_theta", "rope_scaling")}
    terms = {
        key: value for key, value in terms.items() if key not in ("rope_local_base_freq", "sliding_window_pattern")
    }
    return Gemma3TextConfig(**terms, rope_parameters=ropes, layer_types=TYPES, **changes)


def test_transformers_own_dictionary_is_read() -> None:
    assert parse_config(transformers_text_config().to_dict()) == parse_config(OLD)


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    transformers_text_config().save_pretrained(tmp_path)
    assert read_config(tmp_path) == parse_config(OLD)


def test_what_transformers_saves_of_a_multimodal_model_is_read(tmp_path: Path) -> None:
    MultimodalConfig(text_config=transformers_text_config()).save_pretrained(tmp_path)
    assert read_config(tmp_path) == parse_config(OLD)


@pytest.mark.parametrize("raw", [OLD, new(), multimodal("27b"), {"model_type": "gemma3_text", **SIZES["270m"]}])
def test_a_written_config_reads_back_equal(raw: dict[str, Any]) -> None:
    config = parse_config(raw)
    assert parse_config(json.loads(json.dumps(config.to_dict()))) == config


def test_a_written_config_is_readable_by_transformers(tmp_path: Path) -> None:
    written(tmp_path, json.dumps(parse_config(OLD).to_dict()))
    theirs = Gemma3TextConfig.from_pretrained(tmp_path)
    assert theirs.layer_types == TYPES
    assert theirs.rope_parameters[GLOBAL]["rope_theta"] == 2e6
    assert theirs.rope_parameters[GLOBAL]["factor"] == 8.0
    assert theirs.rope_parameters[LOCAL] == {"rope_type": "default", "rope_theta": 3e4}
    assert (theirs.query_pre_attn_scalar, theirs.sliding_window, theirs.head_dim) == (12, 16, 8)
    assert parse_config(theirs.to_dict()) == parse_config(OLD)


# ------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize(
    ("size", "total", "without_embeddings", "global_layers"),
    [
        ("270m", 268_098_176, 100_326_016, 3),
        ("1b", 999_885_952, 697_896_064, 4),
        ("4b", 3_880_263_168, 3_209_010_688, 5),
        ("12b", 11_766_034_176, 10_759_155_456, 8),
        ("27b", 27_009_346_304, 25_599_716_096, 10),
    ],
)
def test_parameters_are_counted_as_published(
    size: str, total: int, without_embeddings: int, global_layers: int
) -> None:
    config = config_of(size)
    assert config.parameter_count() == total
    assert config.parameter_count(embeddings=False) == without_embeddings
    assert len(config.global_layers) == global_layers


def test_shapes_hold_as_many_numbers_as_are_counted(tiny_config: Gemma3Config) -> None:
    sizes = [shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in tiny_config.parameter_shapes().values()]
    assert sum(sizes) == tiny_config.parameter_count()


def test_keys_and_values_take_the_published_bytes_of_a_row() -> None:
    config = config_of("4b")
    # Room for 256 more on the 5 global layers, and for a window of 1024 more on the 29 local ones.
    assert config.cache_bytes(1, 2) == 4096 * (5 * 257 + 29 * 1025)
    # Local layers keep 1023 of what they have read, and read 512 at a time.
    assert config.cache_bytes(32768, 2, batch=3) == 3 * 4096 * (5 * (32768 + 256) + 29 * (1023 + 512 + 1024))


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"model_type": "gemma3n_text"}, "gemma3n_text"),
        ({"model_type": "../x"}, "../x"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["gemma3_text"]}, "model_type"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"hidden_activation": "silu"}, "silu"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"model_file": "evil.py"}, "model_file"),
        ({"quantization": {"bits": 4, "group_size": 48}}, "48"),
        ({"quantization_config": {"quant_method": "no-such"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "no-such"}}, "no-such"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"layer_types": TYPES[:-1]}, "layer_types"),
        ({"layer_types": "sliding_attention"}, "layer_types"),
        ({"layer_types": [*TYPES[:-1], "chunked_attention"]}, "chunked_attention"),
        ({"layer_types": [*TYPES[:-1], ["full_attention"]]}, "full_attention"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"eos_token_id": [1, -1]}, "eos_token_id"),
        ({"bos_token_id": True}, "bos_token_id"),
    ],
    ids=str,
)
def test_what_would_change_the_computation_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    assert named in refusal(written(tmp_path, json.dumps(OLD | change)))


@pytest.mark.parametrize(
    ("ropes", "named"),
    [
        ({GLOBAL: {"rope_type": "yarn", "factor": 8.0}}, "yarn"),
        ({LOCAL: {"rope_type": "linear", "factor": 8.0}}, "global layers only"),
        ({"rope_type": "default", "rope_theta": 1e6}, "rope_type"),
        ({GLOBAL: 1e6}, GLOBAL),
        ([], "rope_parameters"),
    ],
    ids=str,
)
def test_unknown_rope_parameters_are_refused(tmp_path: Path, ropes: Any, named: str) -> None:
    assert named in refusal(written(tmp_path, json.dumps(new(rope_parameters=ropes))))


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "sliding_window", "query_pre_attn_scalar", "rms_norm_eps",
        "max_position_embeddings", "rope_theta", "rope_local_base_freq",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["-1", "1" + "0" * 400, "1e999", "NaN", "true", '"8"', "[8]", "{}"])
def test_numbers_out_of_range_are_refused_by_name(tmp_path: Path, key: str, value: str) -> None:
    text = json.dumps(OLD | {key: "HERE"}).replace('"HERE"', value)
    assert key in refusal(written(tmp_path, text))


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"])
def test_what_has_no_default_must_be_there(tmp_path: Path, key: str) -> None:
    assert key in refusal(written(tmp_path, json.dumps({name: value for name, value in OLD.items() if name != key})))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        '{"hidden_size": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"model_type":' * 100_000,
        b'{"model_type": "\xff\xfe"}',
        b"\x00" * 64,
        "{}" + " " * (1 << 20),
    ],
    ids=["empty", "list", "null", "cut", "5000 digits", "lists", "objects", "not UTF-8", "zeros", "too large"],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str | bytes) -> None:
    refusal(written(tmp_path, text))


@pytest.mark.parametrize("depth", [100, 900, 975, 990])
def test_a_deeply_nested_value_is_refused(tmp_path: Path, depth: int) -> None:
    text = json.dumps(OLD | {"hidden_size": "HERE"}).replace('"HERE"', "[" * depth + "]" * depth)
    refusal(written(tmp_path, text))


@pytest.mark.parametrize("key", ["model_type", "hidden_activation", "layer_types", "rope_scaling", "rope_parameters"])
def test_a_long_value_does_not_fill_the_message(tmp_path: Path, key: str) -> None:
    long = "x" * 100_000
    values: dict[str, Any] = {
        "layer_types": [long] * 7, "rope_scaling": {"rope_type": long}, "rope_parameters": {long: {}},
    }  # fmt: skip
    refusal(written(tmp_path, json.dumps(OLD | {key: values.get(key, long)})))


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    assert "is missing" in refusal(tmp_path)


def test_a_folder_in_place_of_the_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    refusal(tmp_path)


def test_a_multimodal_config_needs_its_text_tower(tmp_path: Path) -> None:
    assert "text_config" in refusal(written(tmp_path, json.dumps({"model_type": "gemma3"})))


def test_code_asked_for_beside_the_text_tower_is_refused(tmp_path: Path) -> None:
    raw = multimodal("4b") | {"auto_map": {"AutoModel": "evil.Model"}}
    assert "auto_map" in refusal(written(tmp_path, json.dumps(raw)))
