"""Read a run from the very arguments that ``fit`` and ``predict`` accept, without starting it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT

from src.callbacks import AveragedWeights, Sparsify
from src.data.options import token_count
from src.errors import ConfigError
from src.mask import Mask, Unit
from src.models.constraints import constraints
from src.models.costs import parameters_of
from src.models.cut import cut_config
from src.models.layers import num_layers
from src.models.loading import load_config, numbers
from src.plan.shapes import Rows
from src.recover import Recovery
from src.search import MaskSearch
from src.training.parsing import parsed
from src.training.quiet import silent
from src.training.stage import Stage
from src.units.amount import Amount, Budget
from src.units.kinds import width_of
from src.units.targets import Target, spread


class Experiment:
    """Holds the parsed settings of a search, a recovery or a cache that is planned.

    Args:
        argv: arguments of ``fit``.
        ratio: share of the layers to remove, in place of the config's amount or mask; None is as configured.
        length: tokens of a row, if the data section does not say.

    Raises:
        ConfigError: ``fit`` would refuse the arguments, or they do not say how long a row is.
    """

    def __init__(self, argv: Sequence[str], ratio: float | None = None, length: int | None = None) -> None:
        self._cli = parsed(argv)
        config: Namespace = self._cli.config["fit"]
        self.config, self.trainer = config, config.trainer
        self.model = config.model.init_args
        self.ratio = ratio
        self.data = config.data.init_args if config.get("data") else Namespace()
        length = length or self.data.get("max_length")
        if length is None:
            raise ConfigError(
                "--length: the data do not say how long a row is; give it, such as --length 2048."
            )
        if self.stage in ("search", "recover", "cache"):
            load_config(self.name, self.model.get("revision"))  # before anything that takes longer
        self.rows = Rows(self.data.get("batch_size", 1), length, self.data.get("packing") == "documents")

    @property
    def stage(self) -> str:
        """The stage of the config: ``search``, ``recover`` or ``cache``; else the name of its class."""
        name: str = self.config.model.class_path.split(".")[-1]
        stages = {"MaskSearch": "search", "CacheTeacher": "cache"}
        return (stages | dict.fromkeys(("Recovery", "Interleaved", "Weighed"), "recover")).get(name, name)

    @property
    def accumulate(self) -> int:
        """Number of batches that make one step of the optimiser."""
        return int(self.trainer.accumulate_grad_batches)

    @property
    def ranks(self) -> int:
        """Number of devices of the config, on all nodes; ``auto`` counts as one."""
        devices = self.trainer.devices
        listed = len(devices) if isinstance(devices, list) else devices
        count = int(listed) if str(listed).isdigit() else 1
        return count * int(self.trainer.num_nodes)

    @property
    def repairs(self) -> bool:
        """Whether a repair changes the cut model before its first step."""
        patch = self.model.get("patch")  # text names adapters or a checkpoint
        return patch is not None and not isinstance(patch, str)

    @property
    def whole(self) -> bool:
        """Whether some part of the run needs whole weights on each device, which no sharding leaves."""
        return bool({"AveragedWeights", "Sparsify"} & {*self.callbacks}) or bool(self.model.get("closing"))

    @property
    def callbacks(self) -> dict[str, Any]:
        """Arguments of the callbacks, by the name of their class."""
        given = self.trainer.callbacks or []
        listed = given if isinstance(given, list) else [given]
        return {c.class_path.split(".")[-1]: c.get("init_args") for c in listed}

    @cached_property
    def name(self) -> str:
        """Hub id or path of the parent.

        Raises:
            ConfigError: only the mask would name it, and there is no mask yet.
        """
        name = self.model.get("model")
        if name is None and Path(self.model.mask).exists():
            name = Mask.load(self.model.mask).model
        if name is None:
            raise ConfigError(f"{self._missing} --model.init_args.model to plan without it.")
        return str(name)

    @cached_property
    def mask(self) -> Mask | None:
        """The mask that the config names, else a stand-in that removes as many units; None for a cache.

        A stand-in removes layers that lie far from each other.

        Raises:
            ConfigError: the mask of a recovery does not exist, and no ratio tells its size.
        """
        if self.stage == "cache":
            return None
        given = Path(self.model.get("mask") or "")
        if given.is_file() and self.ratio is None:
            return Mask.load(given)
        if self.ratio is None and self.stage == "recover" and "stages" not in self.model:
            raise ConfigError(f"{self._missing} --ratio 0.25 to plan without it.")
        config = load_config(self.name, self.model.get("revision"))
        layers, limits = num_layers(config), constraints(config)
        if width := width_of(config, self.unit):
            left = width.count - self.budgets[-1].remove
            keep = [layer * width.count + own for layer in range(layers) for own in range(left)]
            return Mask(self.name, layers, tuple(keep), "by hand", unit=self.unit, width=width.count)
        gone = spread(limits, layers, self.budgets[-1].remove)
        return Mask.by_hand(self.name, layers, (i for i in range(layers) if i not in gone))

    @property
    def _missing(self) -> str:
        return f"mask: '{self.model.get('mask')}' does not exist yet; give"

    @cached_property
    def budgets(self) -> tuple[Budget, ...]:
        """How much each mask that the run learns removes: as ``--ratio`` says, else as the config says."""
        given = {key: self.model.get(key) for key in ("remove", "ratio", "budgets", "target")}
        if given["target"] is not None:
            given["target"] = Target(**vars(given["target"]))
        if self.ratio is not None:
            given = {"ratio": self.ratio}
        revision = self.model.get("revision")
        stored = getattr(torch, numbers(self.name, "auto", revision))
        config = load_config(self.name, revision)
        return Amount(**given).of(config, stored, width_of(config, self.unit))

    @property
    def share(self) -> float:
        """Share of the layers, or of each layer's units of width, that goes."""
        config = load_config(self.name, self.model.get("revision"))
        width = width_of(config, self.unit)
        return self.budgets[-1].remove / (width.count if width else num_layers(config))

    @property
    def unit(self) -> Unit:
        """Kind of unit that a search removes; ``layer`` for a recovery or a cache."""
        return cast(Unit, self.model.get("unit") or "layer")

    def student_parameters(self) -> int | None:
        """Return the number of weights after the cut; None for a cache, which cuts nothing."""
        if self.mask is None:
            return None
        config = cut_config(load_config(self.name, self.model.get("revision")), self.mask)
        return parameters_of(config)

    def tokens(self, ranks: int, given: int | None, step: float | None = None) -> tuple[int, int]:
        """Return how many tokens the run processes, and its steps.

        Args:
            ranks: number of devices.
            given: number of tokens from ``--tokens``, which replaces the config's; None if not given.
            step: tokens of a step; None is those of full rows, the most there can be.

        Raises:
            ConfigError: nothing says when the run ends.
        """
        step = step or self.rows.count * self.rows.length * self.accumulate * ranks
        limit = given or token_count(self.data.get("max_tokens"))
        steps = self.trainer.max_steps if self.stage != "cache" else -1
        if limit is None and steps in (-1, None):
            raise ConfigError(
                "--tokens: nothing says when this run ends; give its tokens, such as --tokens 500M"
                f"{', or set trainer.max_steps' if self.stage != 'cache' else ''}."
            )
        if limit is not None and (given or steps in (-1, None) or limit < steps * step):
            return limit, ceil(limit / step)
        return int(steps * step), int(steps)

    @property
    def validation(self) -> tuple[int, int]:
        """Batches that a recovery trains on between two validations, and batches of each.

        The latter are 0 where the length of the text decides: validation by epochs, or of a share of it.
        """
        held_out = self.data.get("validation") or self.data.get("held_out")
        every, batches = map(_count, (self.trainer.val_check_interval, self.trainer.limit_val_batches))
        return (every, batches) if held_out and every and self.stage == "recover" else (1, 0)

    def validated(self, steps: int) -> int:
        """Return how many batches of held-out rows are validated in the course of so many steps."""
        every, batches = self.validation
        return steps * self.accumulate // every * batches

    def distinct(self, tokens: int) -> int | None:
        """Return how many of the tokens that a run processes are distinct, at most.

        It is known where each entry of ``data.train`` says how many ``rows`` of it are read, and each is one
        row of the batches; else None.
        """
        given = self.data.get("train")
        if not isinstance(given, list) or self.data.get("too_long") == "split":
            return None
        counts = [x.get("rows") if isinstance(x, dict | Namespace) else None for x in given]
        known = [count for count in counts if count]
        return min(tokens, sum(known) * self.rows.length) if len(known) == len(counts) else None

    def module(self, checkpoint: bool = False, precision: str | None = None) -> LightningModule:
        """Return the module of the config, newly made, without weights, and attached to a trainer.

        Args:
            checkpoint: whether activations are recomputed.
            precision: precision of the trainer; None is the config's.
        """
        with tempfile.TemporaryDirectory() as folder:
            model = self.config.model.clone()
            if "mask" in model.init_args and self.mask is not None:
                model.init_args.mask = str(Path(folder) / "mask.json")
                self.mask.save(model.init_args.mask)
                for key in {"remove", "ratio"} & {*vars(model.init_args)}:  # the mask says how much goes
                    model.init_args[key] = None
            if model.init_args.get("target") is not None:  # resolved once
                model.init_args.target, model.init_args.remove = None, self.budgets[-1].remove
            module: LightningModule = self._cli.fit.instantiate(Namespace(model=model)).model
        if isinstance(module, Stage):
            module.checkpoint_activations = checkpoint
        if isinstance(module, Recovery):
            module.patch = None  # it reads rows and changes weights, of which there are none, and no shape
        until = (self.callbacks.get("PruningCurriculum") or {}).get("until", 0)
        if until and isinstance(module, MaskSearch):
            module.policy.remove = 1  # the curriculum's first steps keep nearly all layers
        used = cast(_PRECISION_INPUT, precision or self.trainer.precision)
        with silent("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
            module.trainer = Trainer(
                accelerator="cpu", devices=1, precision=used, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
                callbacks=[kind() for kind in (Sparsify, AveragedWeights) if kind.__name__ in self.callbacks],
            )  # fmt: skip
        return module


def _count(given: object) -> int:
    """Return a number of batches as Lightning reads it; 0 for a share, which 1.0 is, and for a time."""
    whole = isinstance(given, int) or (isinstance(given, float) and given > 1 and given.is_integer())
    return int(cast(float, given)) if whole else 0
