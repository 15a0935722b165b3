"""What only GPUs can show, on one of them or on many: ``pytest -m gpu``.

Ranks share one card by gloo. Where there are enough cards, the same tests run with NCCL and a rank on each. Most tests
run on the CPU as well (``pytest -m wide tests/gpu``), so that the tests themselves are known to work.
"""
