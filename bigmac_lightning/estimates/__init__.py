"""What a model costs before it runs: work in multiplications, the cut into stages, what each rank will need."""
