"""Adapters: low-rank help inside the quantizer, which merges exactly."""

from qlightning.adapters.adapter import Adapter as Adapter
from qlightning.adapters.inside import Inside as Inside
from qlightning.adapters.low_rank import LowRank as LowRank
