"""Models that read and draw in one LLM (BAGEL, arXiv 2505.14683): the flow of a picture runs through its layers."""
