"""Which steps the start-up profile times, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(slots=True)
class Point:
    """One step to time: chunks of new prompts, a chunk behind context, and decodes."""

    prompts: tuple[int, ...] = ()
    num_decodes: int = 0


@dataclass(frozen=True, slots=True)
class Reach:
    """How far a profile goes, so that it ends in seconds."""

    sizes: tuple[int, ...] = (1, 16, 64, 128, 256, 512)
    counts: tuple[int, ...] = (1, 4, 8, 16, 24, 32, 48, 64)
    long_prompt: int = 2048
    long_chunk: int = 256
    warm_up_tokens: int = 64
    """Of the steps that show how far the rest may go."""
    resident_sizes: tuple[int, ...] = (32, 64, 128, 256)
    """Prompts of the requests that stay, to decode from."""
    resident_tokens: int = 1 << 20
    """Most tokens of all their prompts together."""

    def within(self, per_token_s: float, seconds: float) -> Reach:
        """As far as steps of `per_token_s` a token allow in `seconds`: sixteen of the largest
        fit, and residents and the long prompt take a quarter of the time each."""
        tokens = seconds / per_token_s if per_token_s > 0 else 1 << 20
        largest = max(16, int(tokens / 16))
        residents = tuple(n for n in self.resident_sizes if n <= largest)
        return replace(
            self,
            sizes=tuple(n for n in self.sizes if n <= largest),
            counts=tuple(n for n in self.counts if n <= largest),
            long_prompt=min(self.long_prompt, int(tokens / 4)),
            resident_sizes=residents or (16,),
            resident_tokens=min(self.resident_tokens, int(tokens / 4)),
        )


CPU_REACH = Reach()
GPU_REACH = Reach(
    sizes=(1, 64, 256, 512, 1024, 2048, 4096, 8192),
    counts=(1, 8, 32, 64, 128),
    long_prompt=16384,
    long_chunk=2048,
    warm_up_tokens=1024,
)
"""What takes a CPU core seconds takes a GPU milliseconds, and tells nothing of longer steps."""


def script(reach: Reach, most_tokens: int, num_slots: int) -> Iterator[Point]:
    """Steps in order of what they teach; it repeats itself until the time is up."""
    sizes = [n for n in reach.sizes if n <= most_tokens]
    counts = [d for d in reach.counts if d < num_slots]
    mixes = [(64, 8), (256, 16), (128, 4), (32, 24), (384, 32), (16, 4)]
    most = min(most_tokens, max(sizes))
    mixes = [(n, d) for n, d in mixes if n + d <= most_tokens and n <= most and d < num_slots]
    while True:
        for size in sizes:
            yield Point(prompts=(size,))
        for count in counts:
            yield Point(num_decodes=count)
        for size, count in mixes:
            yield Point(prompts=(size,), num_decodes=count)
        for size in sizes[2:]:
            yield Point(prompts=(size // 4,) * 4)
        if most >= 512 and most_tokens >= 1024:
            yield Point(prompts=(512, 512))
