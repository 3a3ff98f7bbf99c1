"""The class path ``src.linear_patch.LinearPatch`` of YAML files; :mod:`src.repair.linear_patch` has it."""

from src.repair.linear_patch import LinearPatch as LinearPatch
