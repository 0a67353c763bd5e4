"""Gemma-3's architecture as numbers: every config layout, layer types, parameter counts and memory formulas.

Sources: Gemma 3 technical report (arXiv:2503.19786); the two layouts of ``config.json`` that Hugging Face
transformers 4 and 5 write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.cache import most_rows
from engines.errors import CheckpointError
from engines.foreign_json import read_file

MAX_CONFIG_BYTES = 1 << 20
LOCAL = "sliding_attention"
GLOBAL = "full_attention"


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer type; ``factor`` divides the positions (linear scaling, 1 for none)."""

    theta: float
    factor: float = 1.0


BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Quantization:
    """MLX's affine quantisation: numbers of ``bits``, and a scale and a bias for each ``group_size`` of a row."""

    bits: int
    group_size: int = 64

    def block(self) -> dict[str, Any]:
        """What ``config.json`` says of it; the second key is for readers that know only that."""
        block = {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}
        return {"quantization": block, "quantization_config": block}


@dataclass(frozen=True)
class Gemma3Config:
    """The text model of Gemma-3, in Hugging Face's terms.

    Attributes:
        quantization: how the matrices are packed on disk and in memory; None for plain weights.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int
    layer_types: tuple[str, ...]
    rope_global: Rope
    rope_local: Rope
    query_pre_attn_scalar: float
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    bos_token_id: int = 2
    eos_token_ids: tuple[int, ...] = (1,)
    pad_token_id: int = 0
    quantization: Quantization | None = None

    def rope(self, layer: int) -> Rope:
        """The rotary embedding of a layer."""
        return self.rope_local if self.is_local(layer) else self.rope_global

    def window(self, layer: int) -> int | None:
        """How many keys a query of this layer sees, itself included; None for all before it."""
        return self.sliding_window if self.is_local(layer) else None

    def is_local(self, layer: int) -> bool:
        """Whether a layer slides its window."""
        return self.layer_types[layer] == LOCAL

    @property
    def global_layers(self) -> tuple[int, ...]:
        """Indices of the layers that attend to everything before."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == GLOBAL)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of the seven linear maps of a layer, by their path inside it."""
        d, f = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return {
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by its Hugging Face name; the output head is tied to ``embed_tokens``."""
        d = self.hidden_size
        norms = {
            "self_attn.q_norm": (self.head_dim,),
            "self_attn.k_norm": (self.head_dim,),
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
            "pre_feedforward_layernorm": (d,),
            "post_feedforward_layernorm": (d,),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, d)}
        for i in range(self.num_hidden_layers):
            for path, shape in (self.linear_shapes() | norms).items():
                shapes[f"model.layers.{i}.{path}.weight"] = shape
        shapes["model.norm.weight"] = (d,)
        return shapes

    def parameter_count(self, embeddings: bool = True) -> int:
        """Number of parameters, with or without the embedding table."""
        d = self.hidden_size
        linears = sum(out * inner for out, inner in self.linear_shapes().values())
        layer = linears + 4 * d + 2 * self.head_dim
        table = self.vocab_size * d if embeddings else 0
        return table + self.num_hidden_layers * layer + d

    def weight_bytes(self, item: int) -> int:
        """Bytes of all weights in a dtype of ``item`` bytes; of packed matrices their scales and biases are in it."""
        plain = item * self.parameter_count()
        if (how := self.quantization) is None:
            return plain
        packed = sum(
            math.prod(s) for s in self.parameter_shapes().values() if len(s) == 2 and not s[1] % how.group_size
        )
        return plain - item * packed + packed * how.bits // 8 + 2 * item * packed // how.group_size

    def lora_count(self, rank: int, targets: tuple[str, ...]) -> int:
        """Number of adapter parameters for one rank on the named linears of every layer."""
        chosen = [s for path, s in self.linear_shapes().items() if path.split(".")[-1] in targets]
        return self.num_hidden_layers * sum(rank * (out + inner) for out, inner in chosen)

    def cache_bytes(self, length: int, item: int, batch: int = 1) -> int:
        """Bytes of the buffers of keys and values, the most that they take while ``length`` tokens are read.

        Local layers forget what their window no longer sees; what is read at a time they hold beside it.
        """
        row = 2 * self.num_key_value_heads * self.head_dim * item * batch
        whole, local = most_rows(length, None), most_rows(length, self.sliding_window)
        return row * (len(self.global_layers) * (whole - local) + self.num_hidden_layers * local)

    def to_dict(self) -> dict[str, Any]:
        """``config.json`` in the layout that transformers 4 and 5 and mlx-lm all read."""
        scaled = self.rope_global.factor != 1.0
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "sliding_window": self.sliding_window,
            "sliding_window_pattern": _pattern(self.layer_types),
            "layer_types": list(self.layer_types),
            "rope_theta": self.rope_global.theta,
            "rope_local_base_freq": self.rope_local.theta,
            "rope_scaling": {"rope_type": "linear", "factor": self.rope_global.factor} if scaled else None,
            # transformers refuses a float here, even a whole one.
            "query_pre_attn_scalar": _whole(self.query_pre_attn_scalar),
            "rms_norm_eps": self.rms_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "attention_bias": False,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids) if len(self.eos_token_ids) > 1 else self.eos_token_ids[0],
            "pad_token_id": self.pad_token_id,
        } | (self.quantization.block() if self.quantization else {})


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def read_config(folder: Path) -> Gemma3Config:
    """Read ``config.json`` of a model folder.

    Raises:
        CheckpointError: the file is missing, is no JSON object, or asks for another computation.
    """
    return parse_config(read_config_dict(folder), str(folder / "config.json"))


def read_config_dict(folder: Path, where: str = "") -> dict[str, Any]:
    """``config.json`` as it stands.

    Args:
        where: what errors call the file; its path if left out.

    Raises:
        CheckpointError: the file is missing, too large or no JSON object.
    """
    path = folder / "config.json"
    where = where or str(path)
    try:
        raw = json.loads(read_file(path, MAX_CONFIG_BYTES))
    except FileNotFoundError:
        raise CheckpointError(f"{where} is missing: name a folder that holds a Gemma-3 model") from None
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read ({error.strerror}): check the path") from None
    except (ValueError, RecursionError) as error:
        reason = str(error).split("\n", 1)[0][:80]
        raise CheckpointError(f"{where} is no model config ({reason}): fetch it again, or take another model") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where} is no JSON object: fetch it again, or take another model")
    return raw


def parse_config(raw: Mapping[str, Any], where: str = "config") -> Gemma3Config:
    """A config dictionary of either layout, of ``gemma3_text`` or the text tower of ``gemma3``.

    Raises:
        CheckpointError: by name, for anything that would change the computation and is not known here.
    """
    text = _text_tower(raw, where)
    _refuse_unknown(text, raw, where)
    layers = _integer(text, "num_hidden_layers", where, 1, 200)
    heads = _integer(text, "num_attention_heads", where, 1, 1024)
    kv_heads = _integer(text, "num_key_value_heads", where, 1, 1024)
    if heads % kv_heads:
        raise CheckpointError(f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    head_dim = _integer(text, "head_dim", where, 2, 1024, default=256)
    if head_dim % 2:
        raise CheckpointError(f"{where}: head_dim {head_dim} is odd; rotary embedding needs pairs")
    rope_global, rope_local = _ropes(text, where)
    return Gemma3Config(
        vocab_size=_integer(text, "vocab_size", where, 1, 2_000_000, default=262_208),
        hidden_size=_integer(text, "hidden_size", where, 1, 65_536),
        intermediate_size=_integer(text, "intermediate_size", where, 1, 1_000_000),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        sliding_window=_integer(text, "sliding_window", where, 1, 1_000_000, default=4096),
        layer_types=_layer_types(text, layers, where),
        rope_global=rope_global,
        rope_local=rope_local,
        query_pre_attn_scalar=_number(text, "query_pre_attn_scalar", where, 1e-6, 1e6, default=256),
        rms_norm_eps=_number(text, "rms_norm_eps", where, 0, 1, default=1e-6),
        max_position_embeddings=_integer(text, "max_position_embeddings", where, 1, 10**8, default=131_072),
        bos_token_id=_token(text, raw, "bos_token_id", where, 2),
        eos_token_ids=_tokens(text, raw, "eos_token_id", where, (1,)),
        pad_token_id=_token(text, raw, "pad_token_id", where, 0),
        quantization=_quantization(text, raw, where),
    )


def _text_tower(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    kind = raw.get("model_type")
    if kind == "gemma3_text":
        return raw
    if kind != "gemma3":
        raise CheckpointError(
            f"{where}: model_type {_short(kind)} is not Gemma-3: this program computes gemma3 and gemma3_text"
        )
    tower = raw.get("text_config")
    if not isinstance(tower, Mapping):
        raise CheckpointError(f"{where}: model_type 'gemma3' without a text_config object: fetch the model again")
    # Early multimodal configs give only what differs from the class defaults of transformers' Gemma3TextConfig.
    return {"num_attention_heads": 8, "num_key_value_heads": 4, **tower}


def _refuse_unknown(text: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> None:
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if text.get(key) is not None:
            raise CheckpointError(
                f"{where}: {key} {_short(text[key])} is not a term of Gemma-3; this model is not computed"
            )
    if text.get("use_bidirectional_attention"):
        raise CheckpointError(f"{where}: use_bidirectional_attention is not supported; take a causal Gemma-3")
    if text.get("attention_bias"):
        raise CheckpointError(f"{where}: attention_bias is not a term of Gemma-3; this model is not computed")
    if text.get("tie_word_embeddings", raw.get("tie_word_embeddings", True)) is False:
        raise CheckpointError(f"{where}: tie_word_embeddings false: a separate output head is not supported")
    activation = text.get("hidden_activation", text.get("hidden_act", "gelu_pytorch_tanh"))
    if activation not in ("gelu_pytorch_tanh", None):
        raise CheckpointError(f"{where}: hidden_activation {_short(activation)} is not Gemma-3's gelu_pytorch_tanh")
    for key in ("auto_map", "model_file"):
        if key in raw or key in text:
            raise CheckpointError(f"{where}: {key} asks to run code from the model's folder, which is never done")


def _quantization(text: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> Quantization | None:
    """MLX's ``quantization``, which mlx-lm also writes as ``quantization_config``; others' is refused."""
    mlx = raw.get("quantization") or text.get("quantization")
    other = raw.get("quantization_config") or text.get("quantization_config")
    if mlx is None and other is None:
        return None
    if not isinstance(mlx, Mapping) or other not in (None, mlx):
        method = other.get("quant_method") if isinstance(other, Mapping) else mlx
        raise CheckpointError(
            f"{where}: quantization_config of {_short(method)} is not MLX's layout; take the unquantised model"
        )
    if mlx.get("mode", "affine") != "affine":
        raise CheckpointError(
            f"{where}: quantization mode {_short(mlx['mode'])} is not affine; take the unquantised model"
        )
    single = [key for key, value in mlx.items() if isinstance(value, Mapping)]
    if single:
        raise CheckpointError(
            f"{where}: quantization has settings of its own for {_short(single[0])}; take a model with one for all"
        )
    found = Quantization(_integer(mlx, "bits", where, 2, 8), _integer(mlx, "group_size", where, 32, 128))
    if found.bits not in BITS or found.group_size not in GROUP_SIZES:
        raise CheckpointError(
            f"{where}: {found.bits} bits in groups of {found.group_size} are not MLX's; take the unquantised model"
        )
    return found


def _layer_types(text: Mapping[str, Any], layers: int, where: str) -> tuple[str, ...]:
    types = text.get("layer_types")
    if types is None:
        key = "sliding_window_pattern" if "sliding_window_pattern" in text else "_sliding_window_pattern"
        pattern = _integer(text, key, where, 1, 1000, default=6)
        return tuple(LOCAL if (i + 1) % pattern else GLOBAL for i in range(layers))
    if not isinstance(types, list) or len(types) != layers:
        raise CheckpointError(f"{where}: layer_types must name each of the {layers} layers")
    for kind in types:
        if kind not in (LOCAL, GLOBAL):
            raise CheckpointError(f"{where}: layer type {_short(kind)} is unknown; Gemma-3 has {LOCAL} and {GLOBAL}")
    return tuple(types)


def _pattern(layer_types: tuple[str, ...]) -> int:
    """The period of the global layers, for readers that know no ``layer_types``; their count plus one for none."""
    return layer_types.index(GLOBAL) + 1 if GLOBAL in layer_types else len(layer_types) + 1


def _ropes(text: Mapping[str, Any], where: str) -> tuple[Rope, Rope]:
    """Global and local rotary embeddings, from ``rope_parameters`` or from the older four keys."""
    parameters = text.get("rope_parameters")
    if parameters is None:
        global_theta = _number(text, "rope_theta", where, 1, 1e12, default=1e6)
        local_theta = _number(text, "rope_local_base_freq", where, 1, 1e12, default=1e4)
        scaling = _mapping(text, "rope_scaling", where)
        return Rope(global_theta, _rope_factor(scaling, where, "rope_scaling")), Rope(local_theta)
    if not isinstance(parameters, Mapping):
        raise CheckpointError(f"{where}: rope_parameters must be an object")
    for key in parameters:
        if key not in (LOCAL, GLOBAL):
            raise CheckpointError(f"{where}: rope_parameters for {_short(key)}: Gemma-3 has {LOCAL} and {GLOBAL}")
    ropes = []
    for kind, theta in ((GLOBAL, 1e6), (LOCAL, 1e4)):
        terms = _mapping(parameters, kind, where)
        factor = _rope_factor(terms, where, f"rope_parameters.{kind}")
        if kind == LOCAL and factor != 1:
            raise CheckpointError(f"{where}: rope_parameters.{kind}: Gemma-3 scales positions on global layers only")
        ropes.append(Rope(_number(terms, "rope_theta", where, 1, 1e12, default=theta), factor))
    return ropes[0], ropes[1]


def _rope_factor(terms: Mapping[str, Any], where: str, key: str) -> float:
    kind = terms.get("rope_type", terms.get("type", "default"))
    if kind == "default":
        return 1.0
    if kind != "linear":
        raise CheckpointError(f"{where}: {key} of type {_short(kind)} is unknown; Gemma-3 uses 'default' and 'linear'")
    return _number(terms, "factor", where, 1e-3, 1e4)


def _mapping(source: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = source.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: {key} must be an object, not {type(value).__name__}")
    return value


def _number(
    source: Mapping[str, Any], key: str, where: str, low: float, high: float, default: float | None = None
) -> float:
    value = source.get(key, default)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise CheckpointError(f"{where}: {key} is {_short(value)}; a number from {low:g} to {high:g} is needed")
    return float(value)


def _integer(source: Mapping[str, Any], key: str, where: str, low: int, high: int, default: int | None = None) -> int:
    value = source.get(key, default)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CheckpointError(f"{where}: {key} is {_short(value)}; a whole number from {low} to {high} is needed")
    return value


def _tokens(
    text: Mapping[str, Any], raw: Mapping[str, Any], key: str, where: str, default: tuple[int, ...]
) -> tuple[int, ...]:
    value = text.get(key, raw.get(key))
    ids = default if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not ids or not all(type(i) is int and 0 <= i < 2_000_000 for i in ids):
        raise CheckpointError(f"{where}: {key} is {_short(value)}; one or more token ids are needed")
    return ids


def _token(text: Mapping[str, Any], raw: Mapping[str, Any], key: str, where: str, default: int) -> int:
    return _tokens(text, raw, key, where, (default,))[0]


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
