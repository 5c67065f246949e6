"""The files that `seqbench new` writes: working ones, here under names to be replaced."""
