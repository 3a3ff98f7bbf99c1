"""A base says what its subclasses must define: without it nothing is built, and a name in YAML is refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from src.losses.terms import Term
from src.policies import MaskPolicy
from src.policies.one_shot import OneShot
from src.training.adapters import Adapters
from src.training.stage import Stage

BASES: list[tuple[type[Any], set[str]]] = [
    (Adapters, {"config"}),
    (MaskPolicy, {"sample"}),
    (OneShot, {"score"}),
    (Term, {"loss"}),
    (Stage, {"refuse"}),
]


@pytest.mark.parametrize(("base", "asked"), BASES)
def test_a_base_is_not_built_and_names_what_is_missing(base: type[Any], asked: set[str]) -> None:
    assert base.__abstractmethods__ == asked
    with pytest.raises(TypeError, match="abstract"):
        base(*["model"] * (base is Stage))


@pytest.mark.parametrize(("base", "asked"), BASES)
def test_every_subclass_that_can_be_named_defines_it(base: type[Any], asked: set[str]) -> None:
    def below(kind: type[Any]) -> set[type[Any]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    named = [
        kind for kind in below(base) if kind.__module__.startswith("src.") and not inspect.isabstract(kind)
    ]
    assert named
    for kind in named:
        for name in asked:
            assert getattr(kind, name) is not getattr(base, name), f"{kind} lacks {name}"
