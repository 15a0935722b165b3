"""Generators of images: flow matching, and the codecs around it."""
