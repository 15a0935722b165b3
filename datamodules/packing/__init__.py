"""Which examples make up a microbatch and a step, from what is measured of them."""
