"""Write a model beside its final name, prove it there, describe it in a card, and only then give it the name.

Whatever the model is, a cut of its parent, recovered, repaired or grown, it is written here.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from src.command import on_device
from src.errors import ConfigError
from src.export.card import front_matter, model_card
from src.export.companions import copy_companions, parent_files, parent_tokenizer, stored_heads
from src.export.cuts import earlier_cuts, note_cut
from src.export.fresh import unique_weights
from src.export.observe import GENERATED, Finding
from src.export.proof import predicted_weights, prove
from src.files import misfit, whole
from src.mask import Mask
from src.models.cut_rules import extra_layers
from src.models.layers import num_layers
from src.models.loading import Dtype, load_config, load_model
from src.models.positions import position_limit, too_long
from src.routing.router import CARD


@dataclass(frozen=True)
class Parent:
    """The model that is cut, as it lies on the disk.

    Attributes:
        name: Hub id or directory.
        revision: its Hub revision, or None.
        config: its config.
        files: directory with its tokenizer, templates, card and licence.
        tokenizer: its tokenizer, or None if it has none.
    """

    name: str
    revision: str | None
    config: PretrainedConfig
    files: Path
    tokenizer: PreTrainedTokenizerBase | None

    @classmethod
    def of(cls, mask: Mask, name: str) -> Parent:
        """Read what is there beside the weights.

        Raises:
            ConfigError: there is no such model, or the mask is of another depth.
        """
        revision = mask.revision if name == mask.model else None
        config = load_config(name, revision)
        mask.check(num_layers(config), name)
        files = parent_files(name, revision)
        return cls(name, revision, config, files, parent_tokenizer(name, revision, files))

    def load(self, dtype: Dtype, args: argparse.Namespace) -> PreTrainedModel:
        """Load the weights to the device of the proof.

        Raises:
            ConfigError: they cannot be loaded, or the proof's sequences are too long for the model.
        """
        model = on_device(load_model(self.name, self.revision, dtype=dtype), args.device)
        limit, asked = position_limit(model), args.proof_tokens or 0
        if limit is not None and asked + GENERATED > limit:
            excess = f"--proof-tokens {asked} with the {GENERATED} generated behind them are too many: a row"
            raise too_long(f"{excess} has {asked + GENERATED} tokens", model.config.model_type, limit)
        return model

    @property
    def lost_heads(self) -> int:
        """Number of multi-token-prediction layers, which are part of no cut."""
        return max(extra_layers(self.config), stored_heads(self.files, num_layers(self.config)))


def write(
    out: Path,
    parent: Parent,
    model: PreTrainedModel,
    student: PreTrainedModel,
    mask: Mask,
    args: argparse.Namespace,
    changed: bool,
    known: Sequence[Finding] = (),
    **facts: Any,
) -> list[Finding]:
    """Write a cut model as a plain Hugging Face directory, if the proof holds.

    Args:
        out: the directory.
        parent: what the model comes from.
        model: the parent in memory; of a grown model, the parent with recovered weights.
        student: the model to write.
        mask: the units of ``model`` that it keeps.
        args: the options of :func:`src.export.verb.add_written`.
        changed: whether the student's weights are others than those of ``model``.
        known: findings from before the proof.
        facts: further arguments of :func:`src.export.card.model_card`.

    Returns:
        All findings.

    Raises:
        ConfigError: a check fails, or the directory cannot be written; then nothing is.
    """
    before = earlier_cuts(model.config)
    note_cut(student.config, mask)
    weights = unique_weights(model.state_dict()), predicted_weights(model, student, mask)
    with staged(out.resolve(), args.force) as stage:
        _save(student, mask, parent, stage)
        upcast = args.proof_dtype == "float32"
        tokens, tokenizer = args.proof_tokens, parent.tokenizer
        proven = prove(stage, model, student, mask, weights[1], changed, tokenizer, tokens, upcast)
        findings = [*known, *proven]
        if failed := [f"{f.check}: {f.detail}" for f in findings if not f.passed]:
            raise ConfigError(
                f"export: the proof failed, '{out.resolve()}' is not written. {'; '.join(failed)}."
            )
        card = model_card(
            mask,
            weights,
            findings,
            front_matter(parent.files / "README.md"),
            license_name=args.license,
            lost_heads=parent.lost_heads,
            before=before,
            **facts,
        )
        (stage / "README.md").write_text(card)
    return findings


def _save(student: PreTrainedModel, mask: Mask, parent: Parent, stage: Path) -> None:
    """Save the model, its mask and what goes along of its parent's files."""
    if (parent.files / "generation_config.json").is_file():
        student.generation_config = GenerationConfig()  # the parent's own file takes its place
    student.save_pretrained(stage)
    for file in stage.glob("*.safetensors"):  # written readable by their owner alone
        shutil.copymode(stage / "config.json", file)
    copy_companions(parent.files, stage)
    mask.save(stage / "mask.json")


@contextmanager
def staged(out: Path, force: bool) -> Iterator[Path]:
    """Give a temporary directory beside ``out``, which is renamed to ``out`` if the block ends without error.

    Args:
        out: the final name.
        force: replace what has this name.

    Raises:
        ConfigError: it cannot be written, or something else has taken the name meanwhile.
    """
    try:
        with whole(out, replace=force) as stage:
            stage.mkdir()
            yield stage
            _check_free(out, force)
    except (OSError, SafetensorError) as e:
        state = "What was there stays." if out.exists() else "Nothing is left there."
        raise ConfigError(f"--out: cannot write '{out}': {e}. {state}") from e


def check_out(out: Path, force: bool, *sources: str) -> None:
    """Refuse a directory that is not free, that touches a model it is made of, or that cannot be written.

    Raises:
        ConfigError: says which.
    """
    here = out.resolve()
    for source in sources:
        there = Path(source).resolve()
        if there.is_dir() and (here.is_relative_to(there) or there.is_relative_to(here)):
            raise ConfigError(
                f"--out: '{here}' is the directory of the parent '{source}', lies inside it or contains it; "
                f"it is not written, even by --force. Give a directory beside it."
            )
    if (fault := misfit(here / "config.json")) is not None:
        raise ConfigError(f"--out: '{out}' cannot be written: {fault}.")
    _check_free(here, force)


def _check_free(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise ConfigError(f"--out: '{out}' exists. Give another name, or --force to replace it.")
    if out.exists() and not any((out / name).is_file() for name in ("config.json", CARD)):
        raise ConfigError(
            f"--out: '{out}' holds no model (no config.json); it is not replaced, even by --force."
        )
