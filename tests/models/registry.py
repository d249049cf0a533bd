"""Every family of models that is played, by its name in docs/models.md.

To add one: a `Family` in the file of its kind. A new kind of file goes into `KINDS`; the families
of a kind play in one process.
"""

from __future__ import annotations

from tests.models import (
    adapters,
    decoders,
    media,
    pooling,
    quantised,
    recurrent,
    speculation,
    windows,
)
from tests.models.family import Family

KINDS: dict[str, dict[str, Family]] = {
    "decoders": decoders.FAMILIES,
    "windows": windows.FAMILIES,
    "n-grams": speculation.BY_NGRAMS,
    "drafters": speculation.BY_MODEL,
    "recurrent": recurrent.FAMILIES,
    "adapters": adapters.FAMILIES,
    "quantised": quantised.FAMILIES,
    "media": media.FAMILIES,
    "pooling": pooling.FAMILIES,
}
FAMILIES = {name: family for kind in KINDS.values() for name, family in kind.items()}
KIND_OF = {name: kind for kind, families in KINDS.items() for name in families}
