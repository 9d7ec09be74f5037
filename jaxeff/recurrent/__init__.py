"""Nonlinear recurrent networks trained in parallel over time (ParaRNN, arXiv 2510.21450)."""

from jaxeff.recurrent.clip import clip_recurrent
from jaxeff.recurrent.diagnostics import (
    Convergence,
    LayerDiagnosis,
    diagnose_layer,
    iterations_to_tolerance,
    largest_lyapunov_exponent,
    max_recurrent_weight,
)
from jaxeff.recurrent.generic import ParallelRNN
from jaxeff.recurrent.language_model import (
    ParaRNN,
    ParaRNNConfig,
    RecurrentCache,
    count_parameters,
    list_presets,
    preset,
)
from jaxeff.recurrent.layers import ParaGRU, ParaLSTM
from jaxeff.recurrent.newton import NewtonConfig, SolveInfo, System, parallel_rnn
from jaxeff.recurrent.nonlinearities import NONLINEARITIES
from jaxeff.recurrent.structure import check_structure
from pallas_kernels import linear_recurrence

__all__ = [
    "NONLINEARITIES",
    "Convergence",
    "LayerDiagnosis",
    "NewtonConfig",
    "ParaGRU",
    "ParaLSTM",
    "ParaRNN",
    "ParaRNNConfig",
    "ParallelRNN",
    "RecurrentCache",
    "SolveInfo",
    "System",
    "check_structure",
    "clip_recurrent",
    "count_parameters",
    "diagnose_layer",
    "iterations_to_tolerance",
    "largest_lyapunov_exponent",
    "linear_recurrence",
    "list_presets",
    "max_recurrent_weight",
    "parallel_rnn",
    "preset",
]
