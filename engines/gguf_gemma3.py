"""A Gemma-3 text model in a GGUF file, in the Hugging Face layout: config, parameters and tokenizer.

Sources: convert_hf_to_gguf.py of ggml-org/llama.cpp (tensor names, norms, token types); transformers'
``generate_merges`` and ``GemmaConverter`` (tokeniser).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from engines.gemma3 import Gemma3Config, parse_config
from engines.gguf import GGUFFile, broken, dequantized, short, tensor_of, unsupported

MAX_PIECE = 256
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Path of a parameter inside a layer: Hugging Face's, then llama.cpp's."""

IMAGE_PARTS = ("v.", "mm.")
"""Name prefixes of a vision tower, which some files carry along and the text model does not use."""


def gemma3_config(file: GGUFFile) -> dict[str, Any]:
    """``config.json`` of a ``Gemma3ForCausalLM``, in keys that transformers 4 and 5 and mlx-lm all read.

    Raises:
        CheckpointError: by name, for another architecture, missing or odd keys, soft-capping, an unknown RoPE scaling.
    """
    model = _model(file)
    return model.to_dict() | {
        # transformers 5 refuses a float here.
        "query_pre_attn_scalar": int(model.query_pre_attn_scalar),
        "sliding_window_pattern": _key(file, "attention.sliding_window_pattern", 6),
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def gemma3_tensors(file: GGUFFile) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter of the text model: its Hugging Face name and float32 values, one at a time.

    Norm weights are stored as 1 + w by llama.cpp's converter and returned as w.

    Raises:
        CheckpointError: at once, for a missing, misshapen or left-over tensor; while iterating, for an unreadable one.
    """
    shapes = _model(file).parameter_shapes()
    sources = {name: _gguf_name(name) for name in shapes}
    for name, source in sources.items():
        found = tensor_of(file, source).shape
        if found != shapes[name]:
            raise broken(file.path, f"tensor {short(source)} has shape {found} instead of {shapes[name]}")
    for name in file.tensors.keys() - set(sources.values()):
        if not name.startswith(IMAGE_PARTS):
            reason = f"tensor {short(name)} is not a part of Gemma-3"
            raise unsupported(file.path, reason, "a plain Gemma-3 text model")
    return ((name, _parameter(file, name, source)) for name, source in sources.items())


def _parameter(file: GGUFFile, name: str, source: str) -> np.ndarray:
    values = dequantized(file, source)
    if name.endswith("norm.weight"):
        with np.errstate(invalid="ignore"):
            values -= 1.0
    return values


def _gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face parameter."""
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in top:
        return top[name]
    layer, path = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[path]}.weight"


def _model(file: GGUFFile) -> Gemma3Config:
    """The architecture that the metadata describe; ``parse_config`` checks the type and range of each number."""
    architecture = file.metadata.get("general.architecture")
    if not _is(architecture, "gemma3"):
        raise unsupported(file.path, f"its architecture is {short(architecture)}", "a Gemma-3 model ('gemma3')")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if _key(file, key, 0) != 0:
            reason = f"gemma3.{key} is {short(_key(file, key))}, which is not a term of Gemma-3"
            raise unsupported(file.path, reason, "a plain Gemma-3 text model")
    config = {
        "model_type": "gemma3_text",
        "vocab_size": tensor_of(file, "token_embd.weight").shape[0],
        "hidden_size": _key(file, "embedding_length"),
        "intermediate_size": _key(file, "feed_forward_length"),
        "num_hidden_layers": _key(file, "block_count"),
        "num_attention_heads": _key(file, "attention.head_count"),
        "num_key_value_heads": _key(file, "attention.head_count_kv"),
        "head_dim": _key(file, "attention.key_length", 256),
        "sliding_window": _key(file, "attention.sliding_window"),
        "sliding_window_pattern": _key(file, "attention.sliding_window_pattern", 6),
        "rope_theta": _key(file, "rope.freq_base"),
        "rope_local_base_freq": _key(file, "rope.freq_base_swa", 10_000.0),
        "rope_scaling": _rope_scaling(file),
        "rms_norm_eps": _shortest(_key(file, "attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": _key(file, "context_length"),
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id", 2),
        "eos_token_id": _end_ids(file),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id", 0),
    }
    model = parse_config(config, repr(file.path.name))
    return parse_config(config | {"query_pre_attn_scalar": _query_scale(model)}, repr(file.path.name))


def _query_scale(model: Gemma3Config) -> int:
    """``query_pre_attn_scalar``, which GGUF does not store: the head size, except in the 27B model (62 layers)."""
    if model.num_hidden_layers == 62:
        return model.hidden_size // model.num_attention_heads
    return model.head_dim


def _rope_scaling(file: GGUFFile) -> dict[str, Any] | None:
    kind = _key(file, "rope.scaling.type", "linear")
    factor = _key(file, "rope.scaling.factor", 1.0)
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    if kind != "linear":
        raise unsupported(file.path, f"its RoPE scaling {short(kind)} is unknown", "a plain Gemma-3 text model")
    return {"rope_type": "linear", "factor": factor}


def _end_ids(file: GGUFFile) -> list[Any]:
    """The end of a text and, where the file names one, the end of a turn."""
    end = file.metadata.get("tokenizer.ggml.eos_token_id", 1)
    turn = file.metadata.get("tokenizer.ggml.eot_token_id", end)
    return [end] if _is(turn, end) else [end, turn]


def _shortest(value: Any) -> Any:
    """The shortest decimal of a stored float32: 1e-6, not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _key(file: GGUFFile, name: str, default: Any = None) -> Any:
    """A plain value among the architecture's keys."""
    value = file.metadata.get(f"gemma3.{name}", default)
    if value is None:
        raise broken(file.path, f"its key gemma3.{name} is missing")
    if isinstance(value, list | np.ndarray):
        raise unsupported(file.path, f"its key gemma3.{name} differs per layer", "a plain Gemma-3 text model")
    return value


def _is(value: object, wanted: object) -> bool:
    """Equality that stays a bool when the file has an array where a plain value belongs."""
    return type(value) is type(wanted) and not isinstance(value, np.ndarray) and value == wanted


def tokenizer_json(file: GGUFFile) -> dict[str, Any]:
    """``tokenizer.json`` for the ``tokenizers`` library, equal to Google's original apart from its image token.

    Raises:
        CheckpointError: the vocabulary is missing, is of another kind, too large, or inconsistent.
    """
    pieces, scores, kinds = _vocabulary(file)
    vocab = {piece: i for i, piece in enumerate(pieces) if kinds[i] != UNUSED}
    bos = pieces[_token_id(file, "bos_token_id", 2, vocab, pieces)]
    unknown = pieces[_token_id(file, "unknown_token_id", 3, vocab, pieces)]
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    second = {"SpecialToken": {"id": bos, "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(pieces, kinds),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, second, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(vocab, scores),
        },
    }  # fmt: skip


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, the best first, as transformers' ``generate_merges`` orders them.

    Sorted by score of the whole, then by the lengths of the halves, all descending; ties stay in the order of the
    pieces' ids and, inside a piece, of its halves' ids. With this order the list equals that of Google's original.
    """
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, i in vocab.items():
        score = scores[i]
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        halves = [(left, right) for left, right in splits if left in vocab and right in vocab]
        halves.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(score, len(left), len(right), left, right) for left, right in halves]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge[3:] for merge in merges]


def _added_tokens(pieces: list[str], kinds: list[int]) -> list[dict[str, Any]]:
    """The pieces that are found in a text before anything else happens to it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": piece, **flags, "special": _is_special(piece, kind)}
        for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _is_special(piece: str, kind: int) -> bool:
    """Whether decoding may leave the token out.

    llama.cpp's converter calls by their looks what Google calls otherwise: unused places become control tokens, and
    the marks around an image user-defined ones.
    """
    if piece in ("<start_of_image>", "<end_of_image>"):
        return True
    return kind != USER_DEFINED and piece != "<mask>" and not piece.startswith("<unused")


def _vocabulary(file: GGUFFile) -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and types of all tokens, as the SentencePiece model had them."""
    model = file.metadata.get("tokenizer.ggml.model")
    if not _is(model, "llama"):
        reason = f"its tokeniser is {short(model)}, not SentencePiece's ('llama')"
        raise unsupported(file.path, reason, "a Gemma-3 model")
    stored = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(stored, list) or not all(isinstance(piece, str) and len(piece) <= MAX_PIECE for piece in stored):
        raise broken(file.path, f"its tokens are not a list of strings of {MAX_PIECE} characters at most")
    scores = _per_token(file, "scores", len(stored))
    kinds = _per_token(file, "token_type", len(stored))
    if len(stored) > tensor_of(file, "token_embd.weight").shape[0]:
        raise broken(file.path, "it has more tokens than rows of token_embd.weight")
    # The converter writes runs of spaces as such, and gives user-defined pieces, which come before all merges, the
    # lowest score instead of the highest.
    marked = [p.replace(" ", "▁") if kind == USER_DEFINED else p for p, kind in zip(stored, kinds, strict=True)]
    if len(set(marked)) != len(marked):
        raise broken(file.path, "its vocabulary has a token twice")
    ranked = [score if kind == NORMAL else 0.0 for score, kind in zip(scores, kinds, strict=True)]
    return marked, ranked, kinds


def _per_token(file: GGUFFile, key: str, count: int) -> list[Any]:
    values = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, np.ndarray) or len(values) != count or not np.isfinite(values).all():
        raise broken(file.path, f"its {key} is not one number per token")
    return list(values.tolist())


def _token_id(file: GGUFFile, key: str, default: int, vocab: dict[str, int], pieces: list[str]) -> int:
    index = file.metadata.get(f"tokenizer.ggml.{key}", default)
    if type(index) is not int or not 0 <= index < len(pieces) or pieces[index] not in vocab:
        raise broken(file.path, f"its {key} {short(index)} is not the id of a token")
    return index
