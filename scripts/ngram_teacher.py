"""A teacher with the skew of real text over a large vocabulary, without a large model.

Byte-pair ids from a tokenizer trained on the text; an interpolated trigram model, sharpened where it "knows"
the next token and perturbed by log-normal noise, because a network's log-probabilities are no ratios of
counts. Candidate sets, their order and their ids then vary as they do in text.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from src.cache.shards import Rows
from src.losses.signals import topk_signal

HELD_OUT = 40
"""Documents that are said by the teacher; the others make its counts."""


def ngram_rows(texts: list[str], vocabulary: int, k: int = 10, length: int = 800, seed: int = 0) -> Rows:
    """Rows of a cache: held-out documents of ``texts`` with the signal of the n-gram teacher."""
    rng = np.random.default_rng(seed)
    texts = [texts[i] for i in rng.permutation(len(texts))]
    tokenizer = _bpe(texts, vocabulary)
    unigrams = np.full(vocabulary, 0.01)
    after: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for text in texts[HELD_OUT:]:
        ids = tokenizer.encode(text).ids
        np.add.at(unigrams, ids, 1)
        for i in range(1, len(ids)):
            after[(ids[i - 1],)][ids[i]] += 1
            after[tuple(ids[max(0, i - 2) : i])][ids[i]] += 1
    unigrams /= unigrams.sum()
    noise, parts = 0.5 * rng.standard_normal(vocabulary).astype(np.float32), []
    for text in texts[:HELD_OUT]:
        ids = tokenizer.encode(text).ids[:length]
        logits = []
        for i in range(1, len(ids)):
            p = 0.15 * unigrams
            for weight, context in ((0.45, ids[i - 1 : i]), (0.6, ids[max(0, i - 2) : i])):
                if counts := after.get(tuple(context)):
                    p[list(counts)] += weight * np.array(list(counts.values())) / counts.total()
            if rng.random() < 0.5:
                p[ids[i]] += rng.exponential(1.5)
            logits.append(np.log(p, dtype=np.float32) + np.roll(noise, rng.integers(vocabulary)))
        signals = [
            topk_signal(torch.from_numpy(np.stack(logits[i : i + 128])), k)
            for i in range(0, len(logits), 128)
        ]
        said = [np.concatenate([getattr(s, f).numpy() for s in signals])
                for f in ("ids", "log_probs", "entropy", "log_rest")]  # fmt: skip
        tokens, count = np.array(ids, np.int32), np.array([len(ids) - 1])
        supervised = np.arange(len(ids)) > 0
        parts.append(
            Rows(tokens, supervised, np.array([len(ids)]), count, said[0].astype(np.int32), *said[1:])
        )
    return Rows.concatenate(parts)


def _bpe(texts: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
