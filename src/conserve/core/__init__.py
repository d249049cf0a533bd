"""The policy: a snapshot in, a plan out. Pure: no clock, I/O, chance or engine."""
