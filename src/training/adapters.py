"""Adapters are small trained additions to the frozen weights; a search can train them beside its mask.

A mask that is learned on weights that can move is one that recovers well, not one that is good as it stands
(TinyFusion, arXiv 2412.01199). peft adds the parameters to the linear maps of the layers. When they are
switched off, the parent's own weights are at work, to the last bit: one copy of these still serves teacher
and student.

What was learned lies beside the mask in ``adapters.safetensors``, under the names of the cut model, and a
recovery may start from it (``patch: adapters``).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from src.errors import ConfigError, first_line
from src.mask import Mask
from src.models.adapters import unwrapped
from src.models.cut import kept_weights
from src.models.loading import weightless
from src.ranges import Count, Positive, Seed, checked
from src.training.ranks import total, world

if TYPE_CHECKING:
    from peft import PeftConfig

FILE = "adapters.safetensors"


class Adapters(nn.Module, ABC):
    """The base of all kinds of adapters: adds trained parameters to a network, which it does not own.

    Args:
        lr: learning rate of the adapters, in an optimiser group of their own.
        seed: seed of their first values.
    """

    @checked
    def __init__(self, lr: Positive = 1e-4, seed: Seed = 0) -> None:
        super().__init__()
        self.lr, self.seed = lr, seed
        self._network: tuple[PreTrainedModel, ...] = ()
        self._sums: list[Tensor] = []

    @abstractmethod
    def config(self) -> PeftConfig:
        """Return the settings of peft, which say what it adds to which linear maps."""

    def refuse(self, quantize: str | None) -> None:
        """Refuse weights that take no such adapters, before anything is loaded.

        Args:
            quantize: type to which the weights are quantised; None if they are not.

        Raises:
            ConfigError: peft is not installed, or these adapters need other weights.
        """
        if find_spec("peft") is None:
            raise ConfigError("model.adapters: they need peft: pip install -e '.[lora]'. Or set it to null.")

    def attach(self, network: PreTrainedModel) -> None:
        """Add the parameters to a network; its output changes only once they are trained.

        Raises:
            ConfigError: peft cannot adapt this family.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            try:
                network.add_adapter(self.config())
            except (ValueError, AttributeError) as e:
                raise ConfigError(
                    f"model.adapters: peft cannot adapt a '{network.config.model_type}': "
                    f"{str(e).splitlines()[0][:160]} Set model.adapters to null."
                ) from e
        self._network = (network,)
        self.weights = nn.ParameterDict({n.replace(".", "/"): p for n, p in self.named_weights()})

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the adapters' parameters, each with the name that the network gives it."""
        (network,) = self._network
        return ((name, p) for name, p in network.named_parameters() if p.requires_grad)

    def moving(self) -> list[nn.Parameter]:
        """Return the adapters' parameters in the order of the network."""
        return [p for _, p in self.named_weights()]

    def group(self) -> dict[str, Any]:
        """Return the optimiser group of the adapters: their parameters and learning rate."""
        return {"params": self.moving(), "lr": self.lr}

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run the network without adapters in the block."""
        (network,) = self._network
        network.disable_adapters()
        try:
            yield
        finally:
            network.enable_adapters()

    # ------------------------------------------------------------------ learning

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """Collect the gradients of one draw of the mask.

        Args:
            gradients: one for each of :meth:`moving`; None is zero.
        """
        self._sums = self._sums or [torch.zeros_like(p) for p in self.moving()]
        for sum_, gradient in zip(self._sums, gradients, strict=True):
            if gradient is not None:
                sum_ += gradient

    def surrogate(self, draws: int) -> Tensor:
        """Return a zero whose gradient is the mean of the collected gradients, and forget these.

        The mean is over draws and ranks. Every rank gets the same bits, as the mask's own parameters do.

        Args:
            draws: how many draws were collected.
        """
        mean = total(torch.cat([sum_.flatten() for sum_ in self._sums])) / (draws * world())
        self._sums = []
        flat = torch.cat([p.flatten() for p in self.moving()])
        return ((flat - flat.detach()) * mean).sum()

    # ------------------------------------------------------------------ records

    def save(self, path: Path, mask: Mask) -> None:
        """Write the adapters of the kept layers under the names of the cut model; whole or not at all.

        Args:
            path: the file.
            mask: says which layers are kept.
        """
        (network,) = self._network
        state = {name: p.detach().cpu().contiguous() for name, p in self.named_weights()}
        about = {
            "mask": json.dumps(asdict(mask)),
            "config": json.dumps(self.config().to_dict(), default=sorted),
        }
        partial = path.with_name(f".{path.name}.partial")
        save_file(kept_weights(state, network, mask), partial, about)
        partial.replace(path)


class LoRA(Adapters):
    """Adds a product of two thin matrices beside every linear map of the layers (arXiv 2106.09685).

    Args:
        rank: rank of the product.
        lr: learning rate of the adapters.
        seed: seed of their first values.
    """

    @checked
    def __init__(self, rank: Count = 8, lr: Positive = 1e-4, seed: Seed = 0) -> None:
        super().__init__(lr, seed)
        self.rank = rank

    def config(self) -> PeftConfig:
        from peft import LoraConfig

        return LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules="all-linear")


class Scales(Adapters):
    """Puts a factor, at first 1, on every output of every linear map of the layers (arXiv 2205.05638)."""

    def refuse(self, quantize: str | None) -> None:
        """Refuse what the base class refuses, and quantised weights: factors would round them again.

        Raises:
            ConfigError: see the base class; or the weights are quantised.
        """
        super().refuse(quantize)
        if quantize is not None:
            raise ConfigError(
                f"model.adapters: factors on '{quantize}' weights are not possible. Use "
                f"src.training.adapters.LoRA, or set model.quantize to null."
            )

    def config(self) -> PeftConfig:
        from peft import IA3Config

        return IA3Config(target_modules="all-linear", feedforward_modules=[])


def beside(mask_path: str | Path) -> Path:
    """Return the path of a search's adapters, in the directory of its mask.

    Args:
        mask_path: ``mask.json``; or ``mask-0.25.json``, one of several budgets, whose adapters end in
            ``-0.25`` too.
    """
    path, file = Path(mask_path), Path(FILE)
    budget = path.stem.removeprefix("mask") if path.stem.startswith("mask-") else ""
    return path.with_name(f"{file.stem}{budget}{file.suffix}")


def check_saved(path: Path, mask: Mask) -> dict[str, Any]:
    """Return peft's settings of the adapters in the file ``path``, after a check that they are of ``mask``.

    Raises:
        ConfigError: there are no adapters, or they were trained with another mask.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = cast(dict[str, str], file.metadata())
        same = json.loads(about["mask"]) == json.loads(json.dumps(asdict(mask)))
        config: dict[str, Any] = json.loads(about["config"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as e:
        raise ConfigError(
            f"model.patch: 'adapters' needs those of the mask's search in '{path}', which cannot be read. "
            f"Set model.adapters in the search (src.training.adapters.LoRA), or model.patch to null."
        ) from e
    if not same:
        raise ConfigError(
            f"model.patch: the adapters in '{path}' were trained with another mask. Give that mask, or set "
            f"model.patch to null."
        )
    return config


def merged(student: PreTrainedModel, mask: Mask, path: Path) -> PreTrainedModel:
    """Merge a search's adapters into the weights of the cut model; return it, a plain model again.

    Args:
        student: the cut model.
        mask: the mask of the search.
        path: file of the adapters.

    Raises:
        ConfigError: there are no adapters, or they are of another mask or model.
    """
    if weightless.get():
        return student  # a plan: of the same shapes
    from peft import PeftConfig, get_peft_model

    settings = check_saved(path, mask)
    try:
        wrapped = get_peft_model(student, PeftConfig.from_peft_type(**settings))
    except Exception as e:  # settings are foreign, and peft may raise anything
        raise ConfigError(
            f"model.patch: the adapters in '{path}' have settings that peft does not take: {first_line(e)}."
        ) from e
    with safe_open(path, framework="pt") as file:
        state = {f"base_model.model.{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    own = {name: p.shape for name, p in wrapped.named_parameters() if p.requires_grad}
    if {name: tensor.shape for name, tensor in state.items()} != own:
        raise ConfigError(f"model.patch: the adapters in '{path}' do not fit this model.")
    wrapped.load_state_dict(state, strict=False)
    return unwrapped(wrapped)
