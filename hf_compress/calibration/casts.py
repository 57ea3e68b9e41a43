"""Autocast while weights change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fresh_casts() -> Iterator[None]:
    """Autocast casts a weight at each use. By itself it keeps the cast until its outermost context
    ends, whatever becomes of the weight, and one that was made without gradients gives none.
    """
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)
