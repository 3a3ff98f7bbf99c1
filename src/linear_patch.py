"""Give :mod:`src.repair.linear_patch` the class path ``src.linear_patch.LinearPatch``, for YAML files."""

from src.repair.linear_patch import LinearPatch as LinearPatch
