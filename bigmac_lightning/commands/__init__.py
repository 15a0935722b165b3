"""The commands of `bigmac`, a file for each."""
