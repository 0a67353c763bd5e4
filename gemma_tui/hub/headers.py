"""What a repository holds, by its config and by its weights' headers, which come alone: known before it is fetched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from engines.checkpoints import (
    MAX_HEADER_BYTES,
    StoredTensor,
    check_shards,
    header_length,
    shard_map,
    tensors_of,
    text_tensors,
)
from engines.gemma3 import Gemma3Config
from engines.quantization import check_parameters
from gemma_tui.errors import GemmaTuiError
from gemma_tui.hub.refusals import AGENT, explained
from gemma_tui.hub.remote import Remote, RemoteFile, check_access, gguf_files, look, passing_copy, remote_config, wanted
from gemma_tui.text import one_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""What a model's weights are read from: its one file, or the shards of an index, which comes first."""


@dataclass(frozen=True)
class Inside:
    """What a repository holds.

    Attributes:
        files: what is fetched; of GGUF, whose headers stay where they are, one is chosen.
        config: None of GGUF.
        dtypes: numbers that are stored, by safetensors dtype, the most frequent first.
    """

    remote: Remote
    files: tuple[RemoteFile, ...]
    config: Gemma3Config | None = None
    dtypes: Mapping[str, int] | None = None


def look_inside(repo: str, revision: str = "main") -> Inside:
    """What a repository holds, and whether it could be had and computed with; of weights nothing comes but headers.

    Raises:
        EngineError: it could not, or the hub cannot be asked.
    """
    remote = look(repo, revision)
    check_access(remote)
    if choice := gguf_files(remote):
        return Inside(remote, choice)
    files, config = wanted(remote), remote_config(remote)
    counts: Counter[str] = Counter()
    for tensor in remote_tensors(remote, files, config).values():
        counts[tensor.dtype] += prod(tensor.shape)
    return Inside(remote, files, config, dict(counts.most_common()))


def remote_tensors(remote: Remote, files: Iterable[RemoteFile], config: Gemma3Config) -> dict[str, StoredTensor]:
    """The tensors that a model of these files is read from, held against the config.

    Raises:
        CheckpointError: a header or the index is not safe, or the tensors are not those that the config asks for.
        GemmaTuiError: a file that the model is read from is not among ``files``, or its header cannot be had.
    """
    by_name = {file.path: file for file in files}
    index = by_name.get(INDEX)
    places = {} if index is None else _shard_map(remote, index)
    tensors: dict[str, StoredTensor] = {}
    for name in [SINGLE] if index is None else sorted(set(places.values())):
        if name not in by_name:
            shown = one_line(name, 80)
            raise GemmaTuiError(f"{remote.repo} has no {shown}, from which a model is read: take another repository")
        tensors |= _tensors(remote, by_name[name])
    if index is not None:
        check_shards(_where(remote, index), places, tensors)
    check_parameters(remote.repo, text_tensors(tensors), config)
    return tensors


def _shard_map(remote: Remote, index: RemoteFile) -> dict[str, str]:
    with passing_copy(remote, index.path, MAX_HEADER_BYTES) as path:
        return shard_map(_where(remote, index), path.read_bytes())


def _tensors(remote: Remote, file: RemoteFile) -> dict[str, StoredTensor]:
    with explained(remote.repo, gated=remote.gated):
        header = _header(remote, file)
    return tensors_of(_where(remote, file), header, file.size)


def _header(remote: Remote, file: RemoteFile) -> bytes:
    """What a file begins with, without the length; a server that knows no ranges is left when it has said enough."""
    from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers

    headers = {"Range": f"bytes=0-{MAX_HEADER_BYTES + 7}", "Accept-Encoding": "identity"}
    asked = build_hf_headers(**AGENT, headers=headers)
    url = hf_hub_url(remote.repo, file.path, revision=remote.commit)
    came, end = bytearray(), 8
    with get_session().stream("GET", url, headers=asked, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        pieces = response.iter_bytes()
        while len(came) < end and (piece := next(pieces, b"")):
            came += piece
            if end == 8 and len(came) >= 8:
                end += header_length(_where(remote, file), bytes(came[:8]), file.size)
    return bytes(came[8:end])


def _where(remote: Remote, file: RemoteFile) -> Path:
    return Path(remote.repo, file.path)
