"""Statistics of activations over a corpus: what passes ask for, collected in one streaming forward."""

from actgraph.calibrate.statistics import Request, Statistic, Statistics, Tokens

__all__ = ["Request", "Statistic", "Statistics", "Tokens"]
