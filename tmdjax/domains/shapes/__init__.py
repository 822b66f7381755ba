"""Coloured shapes: captions, their grammar, and the check of an image against one."""
