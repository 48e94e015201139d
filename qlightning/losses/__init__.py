"""What is minimised beside the task's own loss: functions of tensors, and taps that bring the tensors. Torch only."""

from qlightning.losses.features import MSE as MSE
from qlightning.losses.features import Cosine as Cosine
from qlightning.losses.kurtosis import Kurtosis as Kurtosis
from qlightning.losses.loss import Comparison as Comparison
from qlightning.losses.loss import Penalty as Penalty
from qlightning.losses.soft import KL as KL
from qlightning.losses.soft import SoftCrossEntropy as SoftCrossEntropy
from qlightning.losses.through_head import compare_through_heads as compare_through_heads
from qlightning.losses.through_head import cross_entropy_through_head as cross_entropy_through_head
