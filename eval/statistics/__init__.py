"""Intervals, tests, agreement of raters, length control and power."""

from cpo_pipe.eval.statistics.agreement import agreement
from cpo_pipe.eval.statistics.bootstrap import Bootstrap, Estimate, WinRate, share
from cpo_pipe.eval.statistics.length_control import length_controlled
from cpo_pipe.eval.statistics.power import examples_needed, outcome_sd
from cpo_pipe.eval.statistics.tests import holm, sign_flip_p

__all__ = [
    "Bootstrap",
    "Estimate",
    "WinRate",
    "agreement",
    "examples_needed",
    "holm",
    "length_controlled",
    "outcome_sd",
    "share",
    "sign_flip_p",
]
