"""From an example to tokens: chat templates, what is learnt, and what stands for media."""
