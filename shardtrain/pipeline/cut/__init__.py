"""A model traced as a graph of operations, and cut into stages of equal cost."""
