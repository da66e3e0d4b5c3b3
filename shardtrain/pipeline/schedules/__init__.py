"""Schedules as data: tables of actions, made, checked, simulated and drawn. Numbers only: no jax."""
