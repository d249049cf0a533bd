"""A short key that sorts requests with a shared beginning next to each other."""

from __future__ import annotations

from hashlib import blake2b

# Lengths, in bytes of the prompt's JSON, at which the beginning is hashed. Lines that share their
# first 1,024 bytes agree in the first two parts of the key, and so stand together whatever follows.
RUNGS = (256, 1024, 4096, 16_384)
DIGEST_BYTES = 5


def prefix_key(prompt: bytes | memoryview) -> str:
    """Key of a prompt (messages, prompt or input, as the file spells it): 40 characters.

    Ordering by the key groups prompts by the longest rung they share, as a depth-first walk of a
    prefix tree would; two prompts that differ within the first rung are in no particular order.
    """
    view = memoryview(prompt)
    hasher = blake2b(digest_size=DIGEST_BYTES)
    parts = []
    start = 0
    for rung in RUNGS:
        hasher.update(view[start:rung])
        start = rung
        parts.append(hasher.hexdigest())
    return "".join(parts)
