"""Parse command lines of ``fit`` as ``fit`` does, and start nothing."""

from __future__ import annotations

from collections.abc import Sequence

from src.training.arguments import PruneCLI, ShortErrors
from src.training.quiet import silent


class ParseOnly(PruneCLI):
    """Parses a command line, and builds and runs nothing.

    Attributes:
        fit: the parser, by which a part can be made later.
    """

    def before_instantiate_classes(self) -> None:
        """Do nothing, so that tokenizers and masks stay unread."""

    def instantiate_classes(self) -> None:
        """Instantiate nothing; keep the parser."""
        self.fit = self._parser("fit")

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


def parsed(argv: Sequence[str]) -> ParseOnly:
    """Parse and check the arguments of ``fit``.

    Raises:
        ConfigError: ``fit`` would refuse them.
    """
    with silent("lightning.fabric.utilities.seed"):
        return ParseOnly(
            args=["fit", *argv],
            parser_class=ShortErrors,
            auto_configure_optimizers=False,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=False,
        )
