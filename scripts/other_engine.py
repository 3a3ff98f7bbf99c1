"""Serve exported models with an engine that shares no code with transformers, and compare greedy tokens.

    pip install 'e3pruner[engines]'
    python -m scripts.other_engine EXPORT [EXPORT ...] --out results/other_engine.json

Each directory is converted by CTranslate2's own converter, which reads the config and the weights anew. Both
engines continue the same prompts greedily and score the same texts; the prompts are drawn from the model, so
no data set is needed. The tokens must be equal, and the log-probabilities within a tolerance.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from scripts.lab.results import write
from src.errors import ConfigError
from src.models.loading import load_model, load_tokenizer

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 12, 48
TOLERANCE = 1e-3
"""Largest difference in the log-probability of a token, in nats; float32 rounding is far below."""

Tokens = list[list[int]]


def draw_prompts(model: PreTrainedModel, start: int) -> Tokens:
    """Different openings that the model itself writes, from a fixed seed."""
    torch.manual_seed(0)
    generate: Any = model.generate
    drawn = generate(
        torch.full((4 * PROMPTS, 1), start),
        generation_config=GenerationConfig(do_sample=True, max_new_tokens=PROMPT_TOKENS - 1, pad_token_id=0),
    )
    return [list(row) for row in dict.fromkeys(map(tuple, drawn.tolist()))][:PROMPTS]


@torch.no_grad()
def with_transformers(model: PreTrainedModel, prompts: Tokens) -> tuple[Tokens, list[float]]:
    """Greedy continuations, and the log-probability of each prompt's tokens after the first."""
    generate: Any = model.generate
    model.generation_config = GenerationConfig(pad_token_id=0)  # plain greedy: no stop token, no penalties
    ids_BT = torch.tensor(prompts)
    out = generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=NEW_TOKENS)
    log_probs = model(ids_BT).logits[:, :-1].log_softmax(-1)
    scores = log_probs.gather(-1, ids_BT[:, 1:, None]).sum((1, 2))
    return out[:, ids_BT.shape[1] :].tolist(), scores.tolist()


def with_ctranslate2(
    directory: Path, tokenizer: PreTrainedTokenizerBase, prompts: Tokens
) -> tuple[Tokens, list[float]]:
    """The same through CTranslate2, converted from the directory alone."""
    try:
        import ctranslate2
    except ImportError as e:
        raise ConfigError("this needs ctranslate2: pip install 'e3pruner[engines]'.") from e
    pieces = [tokenizer.convert_ids_to_tokens(prompt) for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        ctranslate2.converters.TransformersConverter(str(directory)).convert(folder, force=True)
        engine = ctranslate2.Generator(folder, device="cpu", compute_type="float32", intra_threads=1)
        results = engine.generate_batch(
            pieces, beam_size=1, max_length=NEW_TOKENS, include_prompt_in_result=False, end_token=[]
        )
        scores = engine.score_batch(pieces)
    return [r.sequences_ids[0] for r in results], [sum(s.log_probs) for s in scores]


def compare(directory: Path) -> dict[str, Any]:
    """Both engines on one exported directory."""
    model, tokenizer = load_model(str(directory)), load_tokenizer(str(directory))
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    prompts = draw_prompts(model, start)
    own, own_scores = with_transformers(model, prompts)
    other, other_scores = with_ctranslate2(directory, tokenizer, prompts)
    gaps = [abs(a - b) / (PROMPT_TOKENS - 1) for a, b in zip(own_scores, other_scores, strict=True)]
    equal = sum(a == b for a, b in zip(own, other, strict=True))
    return {
        "model": directory.name, "family": model.config.model_type, "prompts": len(prompts),
        "equal": equal, "new_tokens": NEW_TOKENS, "log_prob_gap": max(gaps),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directories", nargs="+", type=Path, metavar="EXPORT", help="exported directories")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    try:
        rows = [compare(directory) for directory in args.directories]
    except ConfigError as e:
        raise SystemExit(f"error: {e}") from e
    for row in rows:
        equal = f"{row['equal']} of {row['prompts']} continuations of {NEW_TOKENS} tokens are equal"
        gap = f"log-probabilities differ by {row['log_prob_gap']:.1e} nats per token"
        print(f"{row['model']} ({row['family']}): {equal}, {gap}")
    if args.out:
        write(args.out, {"engine": "ctranslate2", "models": rows})
    if any(row["equal"] < row["prompts"] or row["log_prob_gap"] > TOLERANCE for row in rows):
        raise SystemExit("error: the engines differ")


if __name__ == "__main__":
    main()
