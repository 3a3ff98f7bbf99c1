"""Entry point: ``python -m src.cli fit|validate|test|predict --config ...``."""

from __future__ import annotations

import sys

from lightning.pytorch.cli import LightningCLI


def main(argv: list[str] | None = None) -> None:
    LightningCLI(
        args=sys.argv[1:] if argv is None else argv,
        auto_configure_optimizers=False,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
    )


if __name__ == "__main__":
    main()
