"""Describe the YAML of ``fit`` by a JSON schema, by which editors complete keys and mark misspelt ones.

``python -m src.cli schema --out schema.json``, or ``make schema``.

jsonargparse derives a schema from its parser. It describes every class that happens to be imported, several
megabytes of PyTorch among them, and fails on a metaclass (4.53). Here it describes the classes of
:data:`ORIGINS` alone. Nothing is required, so that overlays are complete too, and a list can be appended to.
"""

from __future__ import annotations

import inspect
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

from jsonargparse._completions_jsonschema import ParserJsonschema, anyof_schema  # no public name says which
from jsonargparse._typehints import implements_protocol, is_protocol
from jsonargparse._util import get_import_path

import src
from src.command import Parser, new_file
from src.files import write_json
from src.training.parsing import parsed

Schema = dict[str, Any]
ORIGINS = ("src.", "lightning.pytorch.", "torch.optim.")
"""Packages whose classes are described; others are accepted by any class path with any arguments."""
_AS_IT_IS = ("default", "enum", "const", "type", "description")
_EXPERIMENT = Path(__file__).parents[1] / "configs" / "search" / "gumbel_topk.yaml"


class ShippedSchema(ParserJsonschema):
    """Describes the classes that a key accepts, of those that are shipped."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # it has no annotation

    def subclass_def(self, class_type: type, action: Any) -> Schema:
        """Return the schema of a class: its path, or a path with arguments, for each class that fits."""
        known = [self.class_path_schema(path, action) for path in fitting(class_type)]
        return anyof_schema([{"type": "string"}, *(known or [self.unknown_class_path_schema()])])


def fitting(kind: type) -> dict[str, type]:
    """Return the shipped classes that can stand where ``kind`` is asked for, by the path that configs use."""
    fits = implements_protocol if is_protocol(kind) else issubclass
    return {str(get_import_path(each)): each for each in _classes() if fits(each, kind)}


@cache
def _classes() -> list[type]:
    """Return the classes of :data:`ORIGINS` that an experiment can name."""
    for part in walk_packages(src.__path__, "src."):
        import_module(part.name)
    found = list[type]()
    for name, module in [*sys.modules.items()]:
        own = vars(module).values() if f"{name}.".startswith(ORIGINS) else ()
        found += [each for each in own if inspect.isclass(each) and each.__module__ == name]
    return [
        each
        for each in found
        if not (inspect.isabstract(each) or is_protocol(each) or "._" in f"{each.__module__}.{each.__name__}")
    ]


def loosened(schema: Any) -> Any:
    """Return a schema that requires no key, accepts both paths of a class, and ``key+`` where a list goes."""
    if isinstance(schema, list):
        return [loosened(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key not in ("required", "properties")}
    found = {key: value if key in _AS_IT_IS else loosened(value) for key, value in kept.items()}
    if "properties" in schema:
        parts = {key: loosened(part) for key, part in schema["properties"].items() if key != "$schema"}
        if path := parts.get("class_path", {}).get("const"):
            parts["class_path"] = {"enum": _paths(path)}
        found["properties"] = parts | {f"{key}+": part for key, part in parts.items() if _listed(part)}
    return found


def _paths(path: str) -> list[str]:
    """Return all paths of a class: that of configs, its module's, and by a module of this name in ``src``."""
    module, _, name = path.rpartition(".")
    kind = getattr(import_module(module), name)
    homes = [module, kind.__module__, f"src.{kind.__module__.rpartition('.')[2]}"]
    return [
        f"{home}.{name}"
        for home in dict.fromkeys(homes)
        if getattr(sys.modules.get(home), name, None) is kind
    ]


def _listed(schema: Schema) -> bool:
    """Return whether a value may be a list."""
    kinds = schema.get("type")
    return "array" in (kinds if isinstance(kinds, list) else [kinds]) or any(
        map(_listed, schema.get("anyOf", []))
    )


def schema() -> Schema:
    """Return the schema of the settings of ``fit``."""
    cli = parsed(["--config", str(_EXPERIMENT)])
    found: Schema = loosened(ShippedSchema().generate(cli.fit))
    return found


def main(argv: list[str]) -> None:
    """Write the schema.

    Raises:
        ConfigError: it cannot be written.
    """
    parser = Parser("schema", "Write a JSON schema of the YAML files of fit, for editors.")
    parser.add_argument(
        "--out", type=new_file, default="schema.json", metavar="FILE", help="default: schema.json"
    )
    args = parser.parse_args(argv)
    write_json(args.out, schema())
    print(f"{args.out}: name it in the first line of a YAML file, as in")
    print(f"# yaml-language-server: $schema={Path(args.out).resolve().as_uri()}")
