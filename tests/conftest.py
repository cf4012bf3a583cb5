"""Drawn cases are the same in every run, and may take any time, so that a red run says something about the change under
test and not about the machine.

`pytest --hypothesis-profile=default` draws new ones.
"""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
