"""A plan of the arena with a few tiny runs."""

from __future__ import annotations

from typing import Any

SEARCH: dict[str, Any] = {"configs": ["search.yaml"], "set": {"trainer.max_steps": 4}}
PLAN: dict[str, Any] = {
    "name": "tiny",
    "teacher": "teacher",
    "data": {"train": 3, "validation": 2, "test": 4, "seed": 7},
    "cache": {"configs": ["cache.yaml"]},
    "search": SEARCH,
    "recover": {"configs": ["recover.yaml"], "set": {"trainer.max_steps": 2}},
    "ratios": {0.25: [0, 1], 0.5: [0]},
    "groups": {
        "methods": {
            "reference": "ours",
            "search": {"model.init_args.draws": 2},
            "variants": {
                "ours": {"by_ratio": {0.5: {"model.init_args.draws": 8}}},
                "tail": {
                    "title": "last layers", "overlays": ["tail.yaml"], "search_once": True,
                    "search": {"trainer.max_steps": 1}, "ratios": {0.25: [0, 1]},
                },
                "cut": {"recover": False, "ratios": {0.5: [3]}},
                "soft": {"recover": {"trainer.max_steps": 9}, "ratios": {0.5: [3]}},
            },
        }
    },
}  # fmt: skip
