"""Lightning's side: when things happen. Importing it teaches Lightning to load converted checkpoints (`loading.py`)."""

from qlightning.callbacks.loading import install
from qlightning.callbacks.phase import Phase as Phase
from qlightning.callbacks.qat import QATCallback as QATCallback
from qlightning.callbacks.report import ReportCallback as ReportCallback

install()
