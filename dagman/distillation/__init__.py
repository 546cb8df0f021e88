"""Distillation: a student that sees little learns from a teacher that follows it."""
