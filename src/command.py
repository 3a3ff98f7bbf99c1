"""Share what the commands beside Lightning's verbs need: short errors, loading a model, provenance."""

from __future__ import annotations

import argparse
import gc
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NoReturn, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.errors import ConfigError, did_you_mean, first_line
from src.files import misfit
from src.mask import git_sha
from src.models.costs import parameters
from src.models.finite import not_finite
from src.models.layers import num_layers
from src.models.loading import Dtype, load_model
from src.models.vocabulary import check_vocabulary
from src.training import threads
from src.training.progress import waiting


class Parser(argparse.ArgumentParser):
    """Parses options; it answers a fault with one message, not with a page of usage."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(prog=f"python -m src.cli {verb}", description=description, allow_abbrev=False)
        self.add_argument("--threads", type=threads.NUMBER, metavar="N", help=threads.HELP)

    def error(self, message: str) -> NoReturn:
        """Raise a :class:`ConfigError`; for an unknown option it names the nearest one that exists."""
        unknown = re.search(r"unrecognized arguments: (--\S+)", message)
        hint = did_you_mean(unknown.group(1), self._option_string_actions) if unknown else ""
        message = re.sub(r"invalid choice: (.*) \(choose from (.*)\)", r"\1 given; accepted: \2", message)
        raise ConfigError(f"{message}.{hint} See {self.prog} --help.")

    def add_model_options(self) -> None:
        """Add the options that say how models are loaded."""
        told = "type of the weights in memory (default: float32)"
        self.add_argument("--dtype", default="float32", choices=get_args(Dtype), help=told)
        self.add_argument(
            "--device",
            default="auto",
            help="cpu, cuda, ... (default: cuda if there is one). cuda:0,cuda:1 is one for each model, "
            "and the last for all that follow",
        )

    def add_figures_options(self) -> None:
        """Add the options that say where figures go."""
        self.add_argument("--out", type=new_file, metavar="FILE", help="write the figures as JSON")
        self.add_argument("--no-table", action="store_true", help="print no table of them; asks for --out")

    def parse_known_args(  # type: ignore[override]  # argparse has overloads
        self, *args: Any, **keys: Any
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, and compute from here on with the threads that the options say."""
        options, rest = super().parse_known_args(*args, **keys)
        threads.settle(options.threads)
        del options.threads
        if getattr(options, "no_table", False) and not options.out:
            self.error("--no-table: the figures go nowhere; add --out FILE")
        return options, rest


def named(text: str) -> str:
    """Return a name that is not empty, as ``type`` of argparse: an unset variable of a shell is no default.

    Raises:
        ArgumentTypeError: it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty name given")
    return text


def new_file(text: str) -> str:
    """Return a path if a file can be written there.

    It serves as the ``type`` of an option, so that a fault is found before any work is done.

    Raises:
        ArgumentTypeError: no file can be written there; says why.
    """
    if (fault := misfit(text)) is not None:
        raise argparse.ArgumentTypeError(f"'{text}' given; {fault}")
    return text


@waiting("the model is loaded")
def load(name: str, args: argparse.Namespace, turn: int = 0) -> PreTrainedModel:
    """Load a model as the options of :meth:`Parser.add_model_options` say.

    Args:
        name: Hub id or directory.
        args: these options.
        turn: number of the model among those of the command, from 0; it chooses among several devices.

    Raises:
        ConfigError: it cannot be loaded, holds NaN, or the device does not exist.
    """
    devices = args.device.split(",")
    device = devices[min(turn, len(devices) - 1)]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(name, dtype=args.dtype)
    if (weight := not_finite(model)) is not None:
        raise ConfigError(
            f"'{name}': its weights '{weight}' hold NaN or infinities; what it says means nothing."
        )
    return on_device(model, device)


def on_device(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """Move a model to the device of that name, and return it.

    Raises:
        ConfigError: there is no such device, or its memory is too small.
    """
    try:
        nn.Module.to(model, device)
        return model
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"--device: cannot use '{device}': {first_line(e)}") from e


def device_name(model: PreTrainedModel) -> str:
    """Return the name of the card that a model lies on, or the kind of its device."""
    device = model.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def each_model(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[dict[str, Any], PreTrainedModel]]:
    """Yield the teacher, if one is named, then each model, loaded one at a time.

    A model is gone before the next is loaded, unless the caller keeps it: two may be too large for a device.

    Args:
        args: the options ``teacher``, ``model`` and those of :meth:`Parser.add_model_options`.
        tokenizer: tokenizer of the data; its ids must mean the same tokens to every model.

    Yields:
        ``path``, ``parameters`` and ``layers`` of the model, and the model.

    Raises:
        ConfigError: a model cannot be loaded, or the tokenizer's ids mean other tokens to it.
    """
    named = [("--teacher", args.teacher)] * bool(args.teacher) + [("--model", name) for name in args.model]
    for turn, (key, name) in enumerate(named):
        model = load(name, args, turn)
        check_vocabulary(tokenizer, model, name, key=key)
        yield {"path": name, "parameters": parameters(model), "layers": num_layers(model.config)}, model
        del model
        gc.collect()


def rich_table(rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of cells, the heading first; all columns but the first stand on the right."""
    heading, *lines = rows
    table = Table(*heading)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in lines:
        table.add_row(*line)
    return table


def show(table: Table) -> None:
    """Print a table without a frame; no cell is cut short: on a narrow terminal it goes on below."""
    table.show_edge, table.title_justify = False, "left"
    plain = partial(Console, markup=False, emoji=False)  # names and paths are shown as they are
    console = plain()
    for column in table.columns:
        column.no_wrap, column.overflow = False, "fold"
    (console if console.is_terminal else plain(width=130)).print(table)


def provenance(verb: str, argv: Sequence[str], model: PreTrainedModel) -> dict[str, Any]:
    """Return where a figure comes from: command, commit, machine and library.

    Args:
        verb: verb of the command.
        argv: its arguments.
        model: a model that was measured; its device and type are noted.
    """
    return {
        "command": shlex.join(["python", "-m", "src.cli", verb, *argv]),
        "commit": git_sha(),
        "device": device_name(model),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
