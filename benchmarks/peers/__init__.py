"""Peers side by side, with one command: the same model, data, machine and precision in one run.

    python -m benchmarks.peers            # make bench-peers
    python -m benchmarks.peers --quick    # a few cases, in minutes
    python -m benchmarks.peers --only sleep --ranks 4 --encoder 1 --generator 0 --sigma 0

`case.py` says which cases there are; `sleeping.py`, `computing.py` and `data.py` make the model and the data of a case;
`data_parallel.py`, `pipelining.py` and `bigmac.py` are the peers; `running.py` measures them; `report.py` writes the
tables.
"""
