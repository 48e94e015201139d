"""What is minimised beside the task's own loss: functions of tensors, and taps that bring the tensors. Torch only."""

from qlightning.losses.features import MSE as MSE
from qlightning.losses.features import Cosine as Cosine
from qlightning.losses.kurtosis import Kurtosis as Kurtosis
from qlightning.losses.loss import Comparison as Comparison
from qlightning.losses.loss import Penalty as Penalty
from qlightning.losses.soft import KL as KL
from qlightning.losses.soft import SoftCrossEntropy as SoftCrossEntropy
