"""Attention: where a network looks, as a map, a measure and a prior."""
