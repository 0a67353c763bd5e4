"""Weights on disk: valid files read as the reference library reads them, everything else is refused by name."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hostile_weights import FOUR, GOOD, HOSTILE, entry, hostile, raw_file
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import numpy as reference
from safetensors import torch as reference_torch

from engines.base import Engine
from engines.checkpoints import (
    as_bfloat16,
    as_float32,
    iterate_model,
    model_tensors,
    read_array,
    read_header,
    text_model_name,
    write_arrays,
    write_json,
    write_safetensors,
)
from engines.errors import CheckpointError
from engines.gemma3 import Gemma3Config, read_config

TinyFolder = Callable[..., Path]


def read_all(path: Path) -> dict[str, np.ndarray]:
    return {name: read_array(tensor) for name, tensor in read_header(path).items()}


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path)
    message = str(caught.value)
    assert path.name in message
    assert message.isprintable()
    assert len(message) < len(str(path)) + 400
    return message


# ------------------------------------------------------------------------------------------------ hostile files


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    refusal(read_header, hostile(tmp_path / "model.safetensors", kind))


@pytest.mark.parametrize("kind", ["data cut", "overlap", "negative shape", "duplicate name"])
def test_an_engine_refuses_a_hostile_file(
    engine: Engine, two_to_one: Gemma3Config, tiny_folder: TinyFolder, kind: str
) -> None:
    folder = tiny_folder(two_to_one)
    hostile(folder / "model.safetensors", kind)
    refusal(engine.load, folder)
    assert engine.model() is None


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refusal(read_header, tmp_path / "model.safetensors")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.mkdir()
    refusal(read_header, path)


def test_a_looping_link_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.symlink_to(path)
    refusal(read_header, path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a device"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    if kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    refusal(read_header if name == "model.safetensors" else lambda file: read_config(file.parent), path)


def test_a_pickle_under_a_safe_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"a": torch.zeros(4)}, path)
    refusal(read_header, path)


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD)
    tensor = read_header(path)["a"]
    path.write_bytes(GOOD[:-4])
    refusal(lambda _: read_array(tensor), path)


@pytest.mark.parametrize("dtype", ["F64", "I32", "U8", "BOOL", "F8_E4M3"])
def test_weights_that_are_no_floats_of_gemma_are_refused(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model.safetensors"
    count = {"F64": 2, "I32": 4}.get(dtype, 16)
    path.write_bytes(raw_file({"a": entry(0, 16, [count], dtype)}, FOUR))
    assert dtype in refusal(read_all, path)


@pytest.fixture(scope="session")
def mutable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated") / "model.safetensors"


@settings(max_examples=400)
@given(data=st.data())
def test_a_mutated_file_is_refused_or_read_as_the_reference_reads_it(mutable: Path, data: st.DataObject) -> None:
    whole = bytearray(
        raw_file({"a": entry(0, 16, [2, 2]), "b": entry(16, 24, [4], "F16"), "c": entry(24, 24, [0])}, FOUR + FOUR[:8])
    )
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        patch = data.draw(st.one_of(st.binary(max_size=4), st.sampled_from([b"0", b"1", b"-", b",", b"]", b'"', b" "])))
        whole[at : at + data.draw(st.integers(0, 4))] = patch
    mutable.write_bytes(whole)
    try:
        found = read_all(mutable)
    except CheckpointError as error:
        found, message = None, str(error)
    if found is None:
        assert "model.safetensors" in message
        return
    same_arrays(found, reference.load_file(mutable))


@settings(max_examples=100)
@given(tail=st.binary(max_size=300))
def test_noise_is_refused(mutable: Path, tail: bytes) -> None:
    mutable.write_bytes(raw_file(b"{" + tail))
    if not read_by_reference(mutable):
        refusal(read_header, mutable)


def read_by_reference(path: Path) -> bool:
    try:
        reference.load_file(path)
    except safetensors.SafetensorError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ valid files


def same_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.shape == expected[name].shape
        assert array.dtype == expected[name].dtype
        assert array.tobytes() == expected[name].tobytes()


def test_files_of_the_reference_library_are_read_bit_for_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        "matrix": generator.standard_normal((3, 5), np.float32),
        "half": generator.standard_normal((2, 3, 4), np.float32).astype(np.float16),
        "scalar": np.array(1.5, np.float32),
        "nothing": np.zeros((0, 7), np.float32),
        "specials": np.array([np.nan, np.inf, -np.inf, -0.0], np.float32),
    }
    path = tmp_path / "x.safetensors"
    reference.save_file(arrays, path, metadata={"format": "pt"})
    same_arrays(read_all(path), arrays)


def test_bfloat16_of_the_reference_library_is_read(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    path = tmp_path / "x.safetensors"
    reference_torch.save_file({"a": tensor}, path)
    np.testing.assert_array_equal(as_float32(read_all(path)["a"]), tensor.float().numpy())


def test_metadata_may_be_null(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file({"__metadata__": None, "a": entry(0, 16, [4])}, FOUR))
    same_arrays(read_all(path), reference.load_file(path))


def test_what_is_written_the_reference_library_reads(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "é": np.zeros((0,), np.float32)}
    write_arrays(tmp_path / "x.safetensors", arrays)
    same_arrays(reference.load_file(tmp_path / "x.safetensors"), arrays)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_bfloat16_that_is_written_the_reference_library_reads(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 5), np.float32)
    write_arrays(tmp_path / "x.safetensors", {"a": as_bfloat16(values)})
    found = reference_torch.load_file(tmp_path / "x.safetensors")["a"]
    assert torch.equal(found, torch.from_numpy(values).bfloat16())


# ------------------------------------------------------------------------------------------------ bfloat16

SPECIAL_BITS = [
    0x00000000, 0x80000000,  # zeros
    0x7F800000, 0xFF800000,  # infinities
    0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001,  # not a number, the first with nothing in its top half
    0x00000001, 0x00007FFF, 0x00008000, 0x00008001, 0x007FFFFF, 0x80018000,  # subnormal
    0x3F808000, 0x3F818000,  # ties: down to even, up to even
    0x3F807FFF, 0x3F808001,  # beside a tie
    0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF,  # the largest, and what rounds to infinity
]  # fmt: skip


def same_rounding(bits: np.ndarray) -> None:
    values = bits.astype(np.uint32).view(np.float32)
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    found = as_bfloat16(values)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(found[number], expected[number])
    assert np.isnan(as_float32(found[~number])).all()


def test_bfloat16_rounds_special_values_as_torch_does() -> None:
    same_rounding(np.array(SPECIAL_BITS))


def test_bfloat16_rounds_random_bits_as_torch_does() -> None:
    same_rounding(np.random.default_rng(0).integers(0, 1 << 32, 1_000_000, dtype=np.uint64))


def test_bfloat16_rounds_every_tie_as_torch_does() -> None:
    same_rounding((np.arange(1 << 16, dtype=np.uint64) << 16) | 0x8000)


def test_every_bfloat16_survives_the_way_through_float32() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = as_float32(bits)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(as_bfloat16(values)[number], bits[number])


# ------------------------------------------------------------------------------------------------ folders


def shard(folder: Path, places: Callable[[int], str]) -> dict[str, str]:
    """Split a model's one file into shards; returns the index's map."""
    arrays = read_all(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: places(i) for i, name in enumerate(arrays)}
    for file in set(where.values()):
        write_arrays(folder / file, {name: array for name, array in arrays.items() if where[name] == file})
    write_index(folder, where)
    return where


def write_index(folder: Path, where: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def two_shards(i: int) -> str:
    return f"model-0000{1 + i % 2}-of-00002.safetensors"


def test_a_sharded_model_equals_the_single_file(two_to_one: Gemma3Config, tiny_folder: TinyFolder) -> None:
    single, sharded = tiny_folder(two_to_one), tiny_folder(two_to_one)
    shard(sharded, two_shards)
    shapes = two_to_one.parameter_shapes()
    same_arrays(dict(iterate_model(sharded, shapes)), dict(iterate_model(single, shapes)))


def test_an_engine_loads_a_sharded_model(
    engine: Engine, two_to_one: Gemma3Config, tiny_folder: TinyFolder, tokens: Callable[..., np.ndarray]
) -> None:
    single, sharded = tiny_folder(two_to_one), tiny_folder(two_to_one)
    shard(sharded, two_shards)
    engine.load(single)
    expected = engine.logits(tokens(6))
    engine.load(sharded)
    np.testing.assert_array_equal(engine.logits(tokens(6)), expected)


@pytest.mark.parametrize(
    "place",
    [
        "../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", "model.safetensors.index.json", "",
        ".", "..", 7, None, ["x.safetensors"], {}, "a\x00.safetensors", "\ud800.safetensors",
        "n" * 300 + ".safetensors", "absent.safetensors", "a\x1b[2Jb.safetensors",
    ],
    ids=ascii,
)  # fmt: skip
def test_an_index_that_points_elsewhere_is_refused(
    two_to_one: Gemma3Config, tiny_folder: TinyFolder, place: Any
) -> None:
    folder = tiny_folder(two_to_one)
    where = shard(folder, two_shards)
    write_index(folder, {**where, "model.norm.weight": place})
    with pytest.raises(CheckpointError, match="safetensors"):
        model_tensors(folder)


def test_an_index_that_promises_too_much_is_refused(two_to_one: Gemma3Config, tiny_folder: TinyFolder) -> None:
    folder = tiny_folder(two_to_one)
    where = shard(folder, two_shards)
    write_index(folder, {**where, "model.layers.99.self_attn.q_proj.weight": two_shards(0)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.99"):
        model_tensors(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "[" * 100_000, b"\xff", '{"a": ' + "9" * 5000 + "}"],
    ids=["empty", "list", "no map", "map is a list", "map is null", "nested", "not UTF-8", "5000 digits"],
)  # fmt: skip
def test_a_file_that_is_no_index_is_refused(tmp_path: Path, text: str | bytes) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError) as caught:
        model_tensors(tmp_path)
    assert index.name in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl"])
def test_a_pickle_is_refused_and_said_so(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=f"{name}, a pickle"):
        model_tensors(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        model_tensors(tmp_path)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        model_tensors(tmp_path / "absent")


def test_a_missing_parameter_is_named(two_to_one: Gemma3Config, tiny_folder: TinyFolder) -> None:
    folder = tiny_folder(two_to_one)
    arrays = read_all(folder / "model.safetensors")
    del arrays["model.layers.1.mlp.up_proj.weight"]
    write_arrays(folder / "model.safetensors", arrays)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        next(iterate_model(folder, two_to_one.parameter_shapes()))


def test_a_parameter_of_another_shape_is_named(two_to_one: Gemma3Config, tiny_folder: TinyFolder) -> None:
    folder = tiny_folder(two_to_one)
    arrays = read_all(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    arrays[name] = np.ascontiguousarray(arrays[name].T)
    write_arrays(folder / "model.safetensors", arrays)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is \[64, 80\], its config\.json says \[80, 64\]"):
        next(iterate_model(folder, two_to_one.parameter_shapes()))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_tower_of_a_multimodal_checkpoint_is_found(
    two_to_one: Gemma3Config, tiny_folder: TinyFolder, prefix: str
) -> None:
    folder = tiny_folder(two_to_one)
    expected = read_all(folder / "model.safetensors")
    stored = {prefix + name.removeprefix("model."): array for name, array in expected.items()}
    other = np.zeros((2, 2), np.float32)
    stored["vision_tower.vision_model.post_layernorm.weight"] = other
    stored["model.vision_tower.vision_model.post_layernorm.weight"] = other
    stored["multi_modal_projector.mm_input_projection_weight"] = other
    stored["lm_head.weight"] = other
    write_arrays(folder / "model.safetensors", stored)
    same_arrays(dict(iterate_model(folder, two_to_one.parameter_shapes())), expected)


@pytest.mark.parametrize(
    ("stored", "known"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("model.vision_tower.x", None),
        ("vision_tower.x", None),
        ("lm_head.weight", None),
        ("language_model.lm_head.weight", None),
    ],
)
def test_names_of_the_text_model(stored: str, known: str | None) -> None:
    assert text_model_name(stored) == known


# ------------------------------------------------------------------------------------------------ writing

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {"a": ("F32", (2,)), "b": ("F32", (50_000,))}


def stream(error: Exception | None = None) -> Iterator[tuple[str, np.ndarray]]:
    yield "a", np.ones(2, np.float32)
    if error is not None:
        raise error
    yield "b", np.ones(50_000, np.float32)


@contextmanager
def small_disk() -> Iterator[None]:
    """Files end at 8 KiB; what is written past that fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failing_source_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be written"):
        write_safetensors(tmp_path / "x.safetensors", stream(OSError(5, "Input/output error")), SHAPES)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> Iterator[tuple[str, np.ndarray]]:
        yield "a", np.ones(2, np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "x.safetensors", interrupted(), SHAPES)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    with pytest.raises(CheckpointError):
        write_safetensors(path, stream(OSError(5, "Input/output error")), SHAPES)
    assert path.read_bytes() == GOOD
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_leaves_the_old_weights(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    with small_disk(), pytest.raises(CheckpointError, match="free some space"):
        write_safetensors(path, stream(), SHAPES)
    assert path.read_bytes() == GOOD
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_leaves_the_old_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    write_json(path, {"old": True})
    with small_disk(), pytest.raises(CheckpointError, match="free some space"):
        write_json(path, {"new": "x" * 50_000})
    assert json.loads(path.read_text()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_fails_save_model_without_a_trace(engine: Engine, two_to_one: Gemma3Config, tmp_path: Path) -> None:
    engine.initialise(two_to_one, 0)
    with small_disk(), pytest.raises(CheckpointError, match="free some space"):
        engine.save_model(tmp_path / "saved", two_to_one.to_dict())
    assert list((tmp_path / "saved").iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        write_safetensors(tmp_path / "absent" / "x.safetensors", stream(), SHAPES)


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", np.ones(2, np.float32))],
        [("b", np.ones(50_000, np.float32)), ("a", np.ones(2, np.float32))],
        [("a", np.ones(3, np.float32)), ("b", np.ones(50_000, np.float32))],
    ],
    ids=["too few", "another order", "another shape"],
)
def test_tensors_that_do_not_follow_the_header_are_not_written(
    tmp_path: Path, tensors: list[tuple[str, np.ndarray]]
) -> None:
    with pytest.raises(ValueError, match=r"header|longer"):
        write_safetensors(tmp_path / "x.safetensors", tensors, SHAPES)
    assert list(tmp_path.iterdir()) == []


def test_an_array_of_another_dtype_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="header"):
        write_safetensors(tmp_path / "x.safetensors", [("a", np.ones(2))], {"a": ("F32", (2,))})
    assert list(tmp_path.iterdir()) == []
