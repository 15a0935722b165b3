"""The policies, which place encoder and generator work around a backbone, and the algorithms that they use."""
