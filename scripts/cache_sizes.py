"""What rows of a cache weigh in each precision, by column, and what rounding them adds to the loss."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from scripts.lab.results import JSON
from src.cache.shards import Precision, Rows, decode, encode

PRECISIONS: tuple[Precision, ...] = ("float32", "float16", "compact")


def sizes(rows: Rows) -> JSON:
    """Bytes for each position and added divergence of each precision."""
    exact, found = _classes(rows), JSON()
    for precision in PRECISIONS:
        data = encode(rows, precision)
        metadata, columns = pq.read_metadata(io.BytesIO(data)), dict[str, float]()
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                name = column.path_in_schema.split(".")[0]
                columns[name] = columns.get(name, 0) + column.total_compressed_size / len(rows.entropy)
        added = (exact.exp() * (exact - _classes(decode(data, rows.ids.shape[1])))).sum(-1)
        found[precision] = {
            "bytes_per_position": len(data) / len(rows.entropy),
            "columns": {name: round(size, 2) for name, size in columns.items()},
            "added_kl_mean": float(added.mean()), "added_kl_p99": float(added.quantile(0.99)),
        }  # fmt: skip
    return {
        "positions": len(rows.entropy), "mean_entropy": float(rows.entropy.mean()),
        "mass_in_top_k": float(1 - np.exp(rows.log_rest).mean()), **found,
    }  # fmt: skip


def _classes(rows: Rows) -> Tensor:
    """The k + 1 classes of the bucket rule."""
    logs = np.concatenate([rows.log_probs, rows.log_rest[:, None]], 1)
    return torch.from_numpy(logs).double().log_softmax(-1)
