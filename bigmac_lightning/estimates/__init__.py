"""What a model costs before it runs: multiplications and memory, the cut into stages, what each rank will need."""
