"""Progress bars for what is quick on small fields and takes its time on large ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

DELAY_SECONDS = 2.0
"""Nothing is shown before."""


def with_progress(items: Collection[Item], description: str, progress: bool) -> Iterator[Item]:
    """Iterate over items; after `DELAY_SECONDS`, and if `progress`, with a bar on standard error that goes at the end."""
    return iter(tqdm(items, desc=description, disable=not progress, delay=DELAY_SECONDS, leave=False))
