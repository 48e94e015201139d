"""Adapters: low-rank help inside the quantizer, which merges exactly."""

from qlightning.adapters.adapter import Adapter as Adapter
from qlightning.adapters.from_peft import FromPEFT as FromPEFT
from qlightning.adapters.inside import Inside as Inside
from qlightning.adapters.lora import LoRA as LoRA
from qlightning.adapters.low_rank import LowRank as LowRank
