"""Recipes: settings, how open ones follow the data, and everything built for one run."""
