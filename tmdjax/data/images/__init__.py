"""Sets of images, with labels, captions or words."""
