"""Property tests draw the same examples every time, so that a failure here is a failure everywhere."""

from hypothesis import settings

settings.register_profile("numerics", derandomize=True, deadline=None, database=None, max_examples=20)
settings.load_profile("numerics")
