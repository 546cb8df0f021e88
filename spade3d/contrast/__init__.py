"""Contrast: objectives, memories and the Spade task."""
