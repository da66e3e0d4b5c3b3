"""Training on a mesh with `pipe`: the step of a model that is cut into stages, and its packed state."""
