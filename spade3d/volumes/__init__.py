"""Volumes: files of every format and layout, prepared once into a store of compressed arrays."""
