"""Nonlinear recurrent networks trained in parallel over time (ParaRNN, arXiv 2510.21450)."""

from jaxeff.recurrent.clip import clip_recurrent
from jaxeff.recurrent.language_model import (
    ParaRNN,
    ParaRNNConfig,
    RecurrentCache,
    count_parameters,
    list_presets,
    preset,
)
from jaxeff.recurrent.layers import ParaGRU, ParaLSTM
from jaxeff.recurrent.newton import NewtonConfig, SolveInfo, parallel_rnn
from pallas_kernels import linear_recurrence

__all__ = [
    "NewtonConfig",
    "ParaGRU",
    "ParaLSTM",
    "ParaRNN",
    "ParaRNNConfig",
    "RecurrentCache",
    "SolveInfo",
    "clip_recurrent",
    "count_parameters",
    "linear_recurrence",
    "list_presets",
    "parallel_rnn",
    "preset",
]
