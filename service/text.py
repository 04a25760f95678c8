"""Prompts to token ids and tokens to text, with the model's own tokenizer file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from protos import transfuse_pb2 as pb


def eos_ids(directory: Path) -> frozenset[int]:
    """The token ids that end a sequence, from generation_config.json or config.json; none when neither says."""
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        value = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        if value is not None:
            return frozenset(value if isinstance(value, list) else [value])
    return frozenset()


class TextCodec:
    """The tokenizer of a model directory; a model without one takes and gives token ids only."""

    def __init__(self, directory: Path) -> None:
        file = directory / "tokenizer.json"
        self._tokenizer: Tokenizer | None = Tokenizer.from_file(str(file)) if file.exists() else None
        self._file = file

    def encode(self, prompt: pb.Prompt) -> Sequence[int]:
        """Token ids of one prompt; ids given by the caller are taken as they are."""
        if prompt.token_ids or not prompt.text:
            return list(prompt.token_ids)
        if self._tokenizer is None:
            raise ValueError(f"generate: this model has no {self._file.name}; send token_ids instead of text")
        ids: list[int] = self._tokenizer.encode(prompt.text, add_special_tokens=False).ids
        return ids

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental decoder, one a sequence."""
        return Detokenizer(self._tokenizer)


class Detokenizer:
    """Text as it grows. A token may end inside a UTF-8 character: its text then comes with the token that completes
    it."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = ""

    def add(self, token_id: int, *, last: bool) -> str:
        """The text that this token adds."""
        if self._tokenizer is None:
            return ""
        self._ids.append(token_id)
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if text.endswith("\ufffd") and not last:
            return ""
        added, self._given = text[len(self._given) :], text
        return added
