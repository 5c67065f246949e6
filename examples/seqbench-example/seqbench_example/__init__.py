"""A task, a layer and a grid for seqbench, in a package of their own."""
