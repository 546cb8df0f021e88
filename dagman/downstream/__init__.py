"""Downstream: what the encoder is for."""
