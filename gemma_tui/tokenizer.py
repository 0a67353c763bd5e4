"""Text to token ids and back.

Gemma expects exactly one ``<bos>`` at the start of a text; whatever the tokenizer file or a chat template add, this
module gives one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.foreign_json import values_in
from gemma_tui.errors import GemmaTuiError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

MAX_BYTES, MAX_VALUES, MAX_OBJECTS = 64 << 20, 2_500_000, 20_000
"""Of ``tokenizer.json``; Gemma-3's has up to 33 MB, 1.9 million values and 8,400 objects."""

MAX_GROWTH = 64
BOS, EOS, PAD, UNK, MASK = 2, 1, 0, 3, 4
START_OF_TURN, END_OF_TURN = 105, 106
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Tokenizer:
    """A model's ``tokenizer.json``; Gemma's special ids are checked when it is read."""

    backend: Backend

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids, with exactly one ``<bos>`` in front, or none. Special tokens in the text are recognised.

        Raises:
            GemmaTuiError: the text holds half a surrogate pair, as a command line that is not UTF-8 gives.
        """
        ids = self._ids(text)
        while ids and ids[0] == BOS:
            ids = ids[1:]
        return [BOS, *ids] if bos else ids

    def encode_foreign(self, text: str) -> list[int]:
        """Token ids of text that others wrote: a control token that is spelled in it stays the characters it is.

        Raises:
            GemmaTuiError: the text holds half a surrogate pair.
        """
        cuts = [start + 1 for start in self.spelled(text)]
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        return [i for part in parts for i in self._ids(part)]

    def spelled(self, text: str) -> list[int]:
        """Where a control token's name stands in a text, such as ``<end_of_turn>``; overlapping ones too."""
        firsts, lengths, names = self._controls
        return [
            match.start()
            for match in firsts.finditer(text)
            if any(text[match.start() : match.start() + length] in names for length in lengths)
        ]

    @cached_property
    def _controls(self) -> tuple[re.Pattern[str], tuple[int, ...], frozenset[str]]:
        """Of the names of control tokens: a pattern of their first characters, their lengths, and all of them.

        Tags such as ``<table>`` and runs of newlines are added tokens as well, but are text.
        """
        names = frozenset(
            token.content
            for id, token in self.backend.get_added_tokens_decoder().items()
            if len(token.content) > 1 and (token.special or id <= END_OF_TURN or token.content.startswith("<unused"))
        )
        firsts = re.compile("|".join(sorted({re.escape(name[0]) for name in names})) or "(?!)")
        return firsts, tuple(sorted({len(name) for name in names})), names

    def _ids(self, text: str) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise GemmaTuiError("the text is not valid Unicode (half a surrogate pair): mend it") from None
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens; not cleaned."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def token(self, token: int) -> str:
        """One token as it stands in the vocabulary; not cleaned."""
        return self.backend.id_to_token(token) or ""

    def vocabulary(self) -> dict[str, int]:
        """Every token with its id, added tokens included; not cleaned."""
        return self.backend.get_vocab()

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size()


class Stream:
    """Decodes a growing list of tokens piece by piece, each token once.

    The tokenizer reads a run of byte tokens as a whole, so a run waits for its end: the pieces are the whole's decode.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes; not cleaned."""
        if BYTE.fullmatch(self._tokenizer.token(token)):
            self._bytes.append(token)
            return ""
        text = self._tokenizer.decode([token])
        # Special tokens decode to nothing, and do not end a run.
        return self.flush() + text if text else ""

    def flush(self) -> str:
        """Whatever is still held back, as it is."""
        held, self._bytes = self._bytes, []
        return self._tokenizer.decode(held)


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read ``tokenizer.json`` of a model folder.

    Raises:
        GemmaTuiError: the file is missing, broken, or its special tokens are not Gemma's.
    """
    from tokenizers import Tokenizer as Backend

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise GemmaTuiError(f"{path} is missing: fetch the model again, with its tokenizer")
    if path.stat().st_size > MAX_BYTES:
        raise GemmaTuiError(f"{path} is over {MAX_BYTES >> 20} MiB, which no Gemma tokenizer is: fetch it again")
    blob = path.read_bytes()
    if values_in(blob) > MAX_VALUES or blob.count(b"{") > MAX_OBJECTS:
        raise GemmaTuiError(f"{path} is no tokenizer (more in it than any of Gemma's has): fetch it again")
    try:
        backend = Backend.from_buffer(blob)
    except BaseException as error:  # the library raises bare Exception for broken files, and for some its own panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise GemmaTuiError(f"{path} is no tokenizer ({str(error).splitlines()[0][:100]}): fetch it again") from None
    _refuse_bombs(path, backend)
    for name, token in (("<bos>", BOS), ("<eos>", EOS), ("<pad>", PAD)):
        if backend.token_to_id(name) != token:
            raise GemmaTuiError(
                f"{path}: {name} is not token {token}, so this is no Gemma tokenizer: take another model"
            )
    # Many files keep what their last use set, which would cut and pad every text.
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend)


def _refuse_bombs(path: Path, backend: Backend) -> None:
    """Refuse what would make a short text take long or become a long one: neither is in a Gemma tokenizer.

    Raises:
        GemmaTuiError: it has a regular expression, or replacements that multiply the text.
    """
    growth = 1.0
    for part in filter(None, (backend.normalizer, backend.pre_tokenizer, backend.decoder)):
        for terms in _objects(json.loads(part.__getstate__())):
            pattern = terms.get("pattern")
            if isinstance(pattern, dict) and "Regex" in pattern:
                raise GemmaTuiError(f"{path} has a regular expression, which may never end: take another tokenizer")
            if isinstance(pattern, dict) and terms.get("type") == "Replace":
                growth *= max(1, len(terms["content"]) / max(1, len(pattern["String"])))
    if growth > MAX_GROWTH:
        raise GemmaTuiError(f"{path} makes a text {growth:,.0f} times as long: take another tokenizer")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, dict):
        yield value
    for one in inner:
        yield from _objects(one)


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-fallback BPE with Gemma's special ids (0 to 4, 105, 106), as a small sibling of Gemma's own.

    Args:
        size: number of ids; 363 are taken by special tokens and bytes.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers
    from tokenizers.models import BPE

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]"]
    special += [f"<unused{i}>" for i in range(99)] + ["<start_of_turn>", "<end_of_turn>"]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Backend(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=tokens, show_progress=False, min_frequency=2)
    learner.train_from_iterator(texts, trainer)
    learner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    learner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    # The trainer keeps bytes in the vocabulary only as special tokens, which decoding would drop.
    described = json.loads(learner.to_str())
    described["added_tokens"] = [t for t in described["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer(Backend.from_str(json.dumps(described)))
