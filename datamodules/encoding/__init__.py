"""From examples to tokens: chat templates, what is learnt, and the tokens that stand for media."""
