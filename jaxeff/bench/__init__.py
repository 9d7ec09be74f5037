"""Every claim measured by the program itself: ``python -m jaxeff.bench``.

A *row* is one claim. To add one:

1. Write its class in ``jaxeff/bench/rows/<room>.py``: a frozen dataclass whose fields are the row's
   settings, small enough by default for a CPU, and whose ``cases(device)`` yields what to compare::

       @dataclasses.dataclass(frozen=True)
       class SortedSum:
           \"\"\"Settings: ``size``, numbers to add.\"\"\"

           size: int = 1_000_000
           ON_ACCELERATOR: ClassVar = {"size": 100_000_000}

           def cases(self, device):
               x = jax.device_put(jax.random.normal(jax.random.key(0), self.size), device)

               def variant(name, fn):
                   compiled = jax.jit(fn)
                   # prepare: called once, not timed; it returns what is run many times and timed
                   return Variant(name, prepare=lambda: lambda: compiled(x))

               yield Case(
                   name=f"{self.size} numbers",
                   technique=variant("sorted", lambda x: jnp.sort(x).sum()),
                   baselines=(variant("plain", jnp.sum),),
                   limit=1.0,
                   limit_note="every number must be read once, and the plain sum reads it once.",
               )

2. Enter it in ``jaxeff/bench/registry.py``: name, claim, paper's figure and source, and where the
   class is. Nothing is imported before the row is run.

The skeleton does the rest: warm-up, interleaved rounds, medians with their spread, the table,
``--json`` and ``--record``.
"""

from jaxeff.bench.measure import BenchError, Case, Figure, Round, Sample, Variant
from jaxeff.bench.registry import ROWS, Row, find_row

__all__ = [
    "ROWS",
    "BenchError",
    "Case",
    "Figure",
    "Round",
    "Row",
    "Sample",
    "Variant",
    "find_row",
]
