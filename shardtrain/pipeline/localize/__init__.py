"""Localization: a program of global arrays becomes the program of one device on its blocks."""
