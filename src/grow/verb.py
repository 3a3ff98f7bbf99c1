"""Grow a recovered model back towards its parent, without training: ``python -m src.cli grow``.

``python -m src.cli grow --model RECOVERED --data rows.jsonl --sizes 13 14 15 --out DIRECTORY``

Each size is an export like any other, ``DIRECTORY/13-layers`` and so on: written under a temporary name,
proven, then renamed. ``DIRECTORY/grow.json`` holds the curve of divergence against depth. The same command
after an interruption measures again, and writes the sizes that are missing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

from rich.table import Table
from transformers import PreTrainedModel

from src.command import Parser, on_device, provenance, show
from src.data.judging import Judged, batches, judged, read_rows
from src.data.options import add_columns, read_columns
from src.errors import ConfigError
from src.export.cuts import DEPTH, public_name
from src.export.parent import true_parent
from src.export.verb import add_written
from src.export.write import Parent, check_out, write
from src.files import misfit, write_json
from src.grow.growth import Grown, growth
from src.grow.host import Host
from src.mask import WIDE, Mask
from src.models.cut import cut
from src.models.layers import num_layers
from src.models.loading import Dtype, load_config, load_model, load_tokenizer, longest_row
from src.ranges import positive
from src.units.kinds import KINDS

_GROWN = ", grown by KL"
"""How the method of a grown size's mask ends."""


def main(argv: list[str]) -> None:
    """Grow a model, write each size that is asked for, and print the curve."""
    args = _parse(argv)
    mask = _mask(args)
    if (fault := misfit(Path(args.out) / "grow.json")) is not None:
        raise ConfigError(f"--out: '{args.out}' given; {fault}.")
    sizes, parent = _sizes(args, mask), Parent.of(mask, args.parent or mask.model)
    for size in sizes:
        check_out(_place(args, size), args.force or _grown(_place(args, size)), parent.name, args.model)
    pair = Pair(args, parent, true_parent(mask, parent.name, None, any_parent=False))
    rows = _rows(args, parent)
    curve, origin = pair.measured(rows, steps=max(sizes) - mask.depth, argv=argv)
    first = {"layers": mask.depth, "put_back": "", "restored": "", "kl": curve[0].kl}
    told: list[dict[str, Any]] = [first, *map(pair.told, curve[1:])]
    wanted = [
        (grown, _place(args, facts["layers"]), facts)
        for grown, facts in zip(curve, told, strict=True)
        if facts["layers"] in sizes
    ]
    for grown, place, facts in [each for each in wanted if pair.missing(*each[:2])]:
        pair.write(grown, place, facts, f"{rows} of {public_name(args.data)}")
    write_json(Path(args.out) / "grow.json", {"model": args.model, "sizes": told, **rows.record, **origin})
    show(_table(told, f"{args.model}, grown without training; KL on {rows} of {args.data}"))


@dataclass(frozen=True)
class Pair:
    """A parent and its recovered cut, each loaded where it is needed.

    Attributes:
        args: the options of the command.
        parent: the parent on the disk.
        mask: of the recovered model.
    """

    args: argparse.Namespace
    parent: Parent
    mask: Mask

    def load(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Return parent and recovered model, in one type: that asked for, or that of the recovered one."""
        student = on_device(load_model(self.args.model, dtype=self.args.dtype or "auto"), self.args.device)
        dtype = cast(Dtype, str(student.dtype).removeprefix("torch."))
        return self.parent.load(dtype, self.args), student

    def measured(self, rows: Judged, steps: int, argv: Sequence[str]) -> tuple[list[Grown], dict[str, Any]]:
        """Return the recovered model and so many sizes above it, and where these figures come from."""
        model, student = self.load()
        pad = load_tokenizer(self.parent.name, self.parent.revision).pad_token_id or 0
        _, sizes = growth(model, student, self.mask, batches(rows.rows, self.args.batch_size, pad))
        return list(islice(sizes, steps + 1)), provenance("grow", argv, model)

    def told(self, grown: Grown) -> dict[str, Any]:
        """Return a size as plain values."""
        restored = {*self.mask.keep} - grown.recovered
        everything = "everything" if not grown.recovered else ""
        return {
            "layers": replace(self.mask, keep=grown.keep).depth,
            "put_back": self._words({*grown.keep} - {*self.mask.keep}),
            "restored": everything or self._words(restored),
            "kl": grown.kl,
        }

    def of(self, grown: Grown) -> Mask:
        """Return the mask of a size."""
        method, metrics = f"{self.mask.method}{_GROWN}", {"kl": grown.kl}
        return replace(self.mask, keep=grown.keep, method=method, metrics=metrics)

    def missing(self, grown: Grown, out: Path) -> bool:
        """Return whether a size is to be written; it is not where this command has left it before.

        Raises:
            ConfigError: what lies there was grown otherwise, and is not to be replaced.
        """
        if self.args.force or not out.exists():
            return True
        there, mask = Mask.load(out / "mask.json"), self.of(grown)
        alike = math.isclose(
            there.metrics.get("kl", math.nan), grown.kl, rel_tol=1e-3
        )  # sums may be reordered
        if not alike or replace(there, metrics=mask.metrics) != mask:
            raise ConfigError(
                f"--out: '{out}' was grown otherwise (of other rows, or from another model). Give another "
                f"name, or --force to replace it."
            )
        return False

    def write(self, grown: Grown, out: Path, told: dict[str, Any], data: str) -> None:
        """Export a size: a cut of the parent that holds the recovered weights."""
        model, student = self.load()
        host = Host(model, student, self.mask)
        host.exchange(host.parts - grown.recovered)
        host.gates.remove()
        mask = self.of(grown)
        words = (
            f"from `{public_name(self.args.model)}` ({self.mask.depth} layers) without training, by the KL "
        )
        words += f"on {data}: put back {told['put_back']}"
        words += f"; with the parent's weights again {told['restored']}" if told["restored"] else ""
        student = cut(host.model, mask)
        write(out, self.parent, host.model, student, mask, self.args, changed=False, grown=words)

    def _words(self, units: Iterable[int]) -> str:
        each = KINDS[self.mask.unit].each or 1
        kinds = ("attention of ", "feed-forward of ") if each == 2 else ("",)
        return ", ".join(f"{kinds[unit % each]}{unit // each}" for unit in sorted(units))


def _mask(args: argparse.Namespace) -> Mask:
    """Read the mask of the recovered model, and check that it is.

    Raises:
        ConfigError: there is none, it is of width, or it is of another model.
    """
    file = Path(args.mask or Path(args.model) / "mask.json")
    if args.mask is None and not file.is_file():
        raise ConfigError(
            f"--mask: '{args.model}' holds no mask.json; name the mask that it was recovered with."
        )
    mask, config = Mask.load(file), load_config(args.model)
    if mask.wide:
        raise ConfigError(
            f"--model: a mask of {WIDE[mask.unit]} removed parts of every layer, which learned without them; "
            f"nothing whole is there to put back. Accepted: masks of layers or halves."
        )
    kept = (
        {kind: list(own) for kind, own in mask.kept.items()} if isinstance(mask.kept, dict) else [*mask.kept]
    )
    noted = (getattr(config, DEPTH, None) or {}).get("keep", kept)
    if num_layers(config) != mask.depth or noted != kept:
        raise ConfigError(
            f"--mask: '{file}' keeps {mask.listed}, but '{args.model}' has {num_layers(config)} layers, "
            f"kept by {noted}. Give the mask that it was recovered with."
        )
    return mask


def _sizes(args: argparse.Namespace, mask: Mask) -> list[int]:
    """Return the sizes to write, rising.

    Raises:
        ConfigError: one is not above the recovered model's, or beyond the parent's.
    """
    sizes = sorted({*(args.sizes or range(mask.depth + 1, mask.num_layers))})
    if not sizes or sizes[0] <= mask.depth or sizes[-1] > mask.num_layers:
        raise ConfigError(
            f"--sizes: {sizes or 'none'} given; accepted: whole numbers above the {mask.depth} layers of "
            f"'{args.model}', up to the {mask.num_layers} of its parent."
        )
    return sizes


def _rows(args: argparse.Namespace, parent: Parent) -> Judged:
    """Read the calibration rows.

    Raises:
        ConfigError: none has a supervised token.
    """
    length = min(args.max_length, longest_row(parent.name, parent.revision) or args.max_length)
    tokenizer, read = (
        load_tokenizer(parent.name, parent.revision),
        read_rows(args.data, args.rows, args.split),
    )
    rows = judged(tokenizer, read, read_columns(args), args.supervise, length)
    if not rows.rows:
        raise ConfigError(f"--data: {rows} of '{args.data}' can be used. See --answer and --max-length.")
    return rows


def _grown(place: Path) -> bool:
    """Return whether a size lies there that this verb has written."""
    file = place / "mask.json"
    return file.is_file() and Mask.load(file).method.endswith(_GROWN)


def _place(args: argparse.Namespace, size: int) -> Path:
    return Path(args.out) / f"{size}-layers"


def _table(told: Sequence[dict[str, Any]], title: str) -> Table:
    """Return the curve as a table."""
    table = Table("layers", "put back", "with the parent's weights again", "KL, nats", title=title)
    for row in told:
        table.add_row(str(row["layers"]), row["put_back"], row["restored"], f"{row['kl']:.4f}")
    return table


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("grow", "Put removed layers back into a recovered model, without training.")
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="the recovered model, as export wrote it")
    add("--parent", metavar="NAME", help="its parent, if not under the name the mask gives")
    add("--mask", metavar="FILE", help="its mask (default: mask.json in --model)")
    add("--sizes", nargs="+", type=positive, metavar="N", help="layers (default: every size in between)")
    add("--data", required=True, metavar="FILE", help="calibration rows, or a Hub id")
    add("--rows", type=positive, default=128, metavar="N", help="rows, at most (default: 128)")
    add_columns(parser)
    add(
        "--supervise", choices=("answer", "all"), default="answer", help="tokens that count (default: answer)"
    )
    add("--max-length", type=positive, default=1024, metavar="T", help="tokens of a row (default: 1024)")
    add("--batch-size", type=positive, default=8, metavar="B", help="rows at once (default: 8)")
    add_written(parser)
    return parser.parse_args(argv)
