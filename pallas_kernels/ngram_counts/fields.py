"""Counters of all orders packed into one int32, as the pairwise implementations keep them.

A candidate position and a key position agree in m leading tokens, 0 <= m <= N; then the counters of
orders 1 to m go up by one. With `width` bits a counter that is one addition of `increments[m]`, and
m is found by a chain of N selections: where the first tokens differ it is 0, whatever follows.
Counters are taken out before one can overflow, after `capacity` additions.
"""

import dataclasses

import jax

MOST_ORDERS = 8


@dataclasses.dataclass(frozen=True)
class Fields:
    """Layout of the packed counters of `max_order` orders."""

    max_order: int

    @property
    def width(self) -> int:
        """Bits of a counter."""
        return min(16, 32 // self.max_order)

    @property
    def capacity(self) -> int:
        """The largest count a counter holds."""
        return 2**self.width - 1

    @property
    def increments(self) -> tuple[int, ...]:
        """What is added for 0, 1, ..., max_order agreeing tokens, as int32 values."""
        values = [sum(1 << self.width * n for n in range(m)) for m in range(self.max_order + 1)]
        return tuple(value - 2**32 if value >= 2**31 else value for value in values)

    def unpack(self, packed: jax.Array) -> list[jax.Array]:
        """Returns the counter of each order."""
        return [(packed >> self.width * n) & self.capacity for n in range(self.max_order)]
