"""Lightning's Trainer on one side, the pipeline on the other: the strategy, and what it is made of."""
