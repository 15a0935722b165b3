"""Searches the layout and the schedule of a run that take the least time and fit into memory.

`space.py` says what is tried, `communication.py` what ranks send, `evaluating.py` what one choice takes by simulation,
and `search.py` which choices are looked at. Nothing is trained.
"""
