"""Turn documents into token rows: ids, and labels where a token is supervised.

A token is supervised when it lies inside a supervised span; it may also cover blanks before the span, as
many tokenizers glue a space to a word. Two more are supervised, because the model has to say them itself: the
EOS after a text, and the special token with which the assistant ends its turn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from transformers import BatchEncoding, PreTrainedTokenizerBase

from src.data.chat import Span
from src.data.documents import Document
from src.errors import ConfigError

IGNORE = -100
"""Label of a token that is not supervised (the convention of Hugging Face and of torch's
cross-entropy)."""

TooLong = Literal["truncate", "split", "error"]


@dataclass(frozen=True)
class TokenRow:
    """Holds the tokens of a document, or of a piece of one that is too long for a row.

    Attributes:
        ids: token ids.
        labels: the id where a token is supervised, :data:`IGNORE` elsewhere; not shifted.
        where: file and row that the document comes from, for messages.
        lost: in a document's first piece, how many tokens of the document are in no row.
    """

    ids: list[int]
    labels: list[int]
    where: str
    lost: int = 0


class Encoder:
    """Turns documents into token rows.

    Args:
        tokenizer: a fast tokenizer.
        max_length: tokens of the longest row.
        supervise: ``all`` tokens, or those of the ``answer`` (of the assistant in a chat).
        too_long: what becomes of a longer document: ``truncate``, ``split`` into rows, or
            ``error``.
        bos: whether a text begins with the tokenizer's BOS; None does as the tokenizer itself does.
        eos: whether a text ends with the tokenizer's EOS.

    Raises:
        ConfigError: the tokenizer lacks a token or an ability that is asked for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        supervise: Literal["all", "answer"],
        too_long: TooLong,
        bos: bool | None,
        eos: bool,
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.supervise, self.too_long = supervise, too_long
        if bos is None:
            bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        self.head = [self._special("bos")] if bos else []
        self.tail = [self._special("eos")] if eos else []
        self.special = set(tokenizer.all_special_ids) | {
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        if supervise == "answer" and not tokenizer.is_fast:
            raise ConfigError(
                "data.supervise=answer needs a fast tokenizer, which knows where its tokens lie "
                f"in the text; '{tokenizer.name_or_path}' is a slow one."
            )

    def __call__(self, documents: list[Document]) -> list[list[TokenRow]]:
        """Return the rows of each document, each of at most ``max_length`` tokens.

        A row without a supervised token after its first teaches nothing and is left out.
        """
        if not documents:
            return []
        texts, bare = [d.text for d in documents], {"return_attention_mask": False, "verbose": False}
        encoded = self.tokenizer(texts, add_special_tokens=False, return_token_type_ids=False, **bare)
        return [self._rows(encoded, i, document) for i, document in enumerate(documents)]

    def _rows(self, encoded: BatchEncoding, i: int, document: Document) -> list[TokenRow]:
        ids = list(encoded.input_ids[i])
        labels = list(ids) if self.supervise == "all" else self._supervised(encoded, i, document)
        if not document.chat:
            head, tail = self._ends(document.text)
            ids = head + ids + tail
            labels = [IGNORE] * len(head) + labels + tail
        size, lost = self.max_length, max(0, len(ids) - self.max_length)
        if lost and self.too_long == "error":
            raise ConfigError(
                f"{document.where} has {len(ids):,} tokens, more than data.max_length={size}. "
                "Raise it, or set data.too_long to 'truncate' or 'split'."
            )
        ends, missing = [0, size], lost
        if self.too_long == "split" and lost:
            ends = [*range(0, len(ids), size), len(ids)]
            ends[-2] -= ends[-1] - ends[-2] == 1  # a token alone would teach nothing
        kept = [(a, b) for a, b in pairwise(ends) if any(label != IGNORE for label in labels[a + 1 : b])]
        if self.too_long == "split" and lost:
            missing = len(ids) - sum(b - a for a, b in kept)
        pieces = [TokenRow(ids[a:b], labels[a:b], document.where) for a, b in kept]
        return [replace(piece, lost=missing) if n == 0 else piece for n, piece in enumerate(pieces)]

    def _ends(self, text: str) -> tuple[list[int], list[int]]:
        """Return the BOS and the EOS to put around a text: none that the text has already."""
        bos, eos = str(self.tokenizer.bos_token), str(self.tokenizer.eos_token)
        begun, ended = text.lstrip().startswith(bos), text.rstrip().endswith(eos)
        return [] if begun else self.head, [] if ended else self.tail

    def _supervised(self, encoded: BatchEncoding, i: int, document: Document) -> list[int]:
        if document.spans is None:
            raise ConfigError(
                f"{document.where}: the chat template rewrites what the assistant says, so its "
                "tokens cannot be told from the template's. Set data.supervise to 'all', or use "
                "columns of prompt and answer."
            )
        ids = encoded.input_ids[i]
        labels = [IGNORE] * len(ids)
        for span in document.spans:
            first, last = self._tokens(encoded, i, document.text, span)
            if document.chat:
                last = self._stop(encoded, i, document.text, last)
            labels[first:last] = ids[first:last]
        return labels

    def _tokens(self, encoded: BatchEncoding, i: int, text: str, span: Span) -> tuple[int, int]:
        """Return the half-open range of the tokens inside a span of characters."""
        start, end = span
        first = self._token_from(encoded, i, start, end)
        if first is None:
            return 0, 0
        covered = encoded.token_to_chars(i, first)
        assert covered is not None, "a token found by its character covers it"
        if text[covered.start : start].strip():
            first += 1
        last = self._token_from(encoded, i, end, len(text))
        return first, len(encoded.input_ids[i]) if last is None else last

    def _stop(self, encoded: BatchEncoding, i: int, text: str, last: int) -> int:
        """Return the end of an answer with the special token that closes it: behind it, or behind spaces."""
        ids, at = encoded.input_ids[i], last
        while at < len(ids) and ids[at] not in self.special:
            covered = encoded.token_to_chars(i, at)
            if covered is not None and text[covered.start : covered.end].strip(" "):
                return last
            at += 1
        return at + 1 if at < len(ids) else last

    def _token_from(self, encoded: BatchEncoding, i: int, start: int, end: int) -> int | None:
        """Return the token of the first character in ``[start, end)`` that has one."""
        tokens = (encoded.char_to_token(i, position) for position in range(start, end))
        return next((token for token in tokens if token is not None), None)

    def _special(self, which: str) -> int:
        token = getattr(self.tokenizer, f"{which}_token_id")
        if token is None:
            raise ConfigError(
                f"data.{which}: the tokenizer '{self.tokenizer.name_or_path}' has no "
                f"{which.upper()} token; set data.{which} to false."
            )
        return int(token)
