"""jaxeff: published efficiency techniques in JAX, trained, measured and proved in one codebase."""

__version__ = "0.1.0"
