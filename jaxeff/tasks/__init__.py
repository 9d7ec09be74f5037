"""Kinds of runs: what is initialised, the loss, the data, the evaluation. One file for each."""

from jaxeff.tasks.experiment import Experiment, load_experiment, make_task, make_trainer

__all__ = ["Experiment", "load_experiment", "make_task", "make_trainer"]
