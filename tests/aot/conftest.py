from aot_fixtures import cuda, prepare_compilers, tpu

__all__ = ["cuda", "tpu"]

prepare_compilers()
