"""Measures all cases, or some: ``python -m tests.layouts [NUMBER ...]``, and writes them into docs/parallelism.md.

The numbers are those of rows, from 1; or "missing", for rows that the page has no values of. Of rows that are not
measured, the page keeps what it says. All of them take about half an hour on two cores.
"""

import argparse
import logging
import time
import warnings

import torch

from tests.layouts import table
from tests.layouts.cases import cases
from tests.layouts.measure import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help="numbers of rows, or missing")
    chosen, values = parser.parse_args().rows, table.known()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    for number, case in enumerate(cases(), 1):
        missing = values.get(str(case), table.NOT_RUN).startswith(table.NOT_RUN)
        if case.refusal or (chosen and str(number) not in chosen and not ("missing" in chosen and missing)):
            continue
        start = time.perf_counter()
        result = measure(case)
        values[str(case)] = table.of_result(result)
        print(f"{number:3} {case}: {values[str(case)]} ({time.perf_counter() - start:.0f} s)", flush=True)
        table.write(values)
    table.write(values)


if __name__ == "__main__":
    main()
