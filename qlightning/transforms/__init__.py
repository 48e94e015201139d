"""Transforms: rewrites of a tensor before it is quantized."""

from qlightning.transforms.chain import Chain as Chain
from qlightning.transforms.hadamard import Hadamard as Hadamard
from qlightning.transforms.hadamard import RandomHadamard as RandomHadamard
from qlightning.transforms.norm import LayerNorm as LayerNorm
from qlightning.transforms.norm import RMSNorm as RMSNorm
