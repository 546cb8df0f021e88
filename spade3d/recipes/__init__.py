"""Recipes of pretraining: everything for one run in one place, what it is for, and how it follows the data."""
