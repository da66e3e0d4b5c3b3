"""What executes: the programs of stages, run tick by tick as a schedule says."""
