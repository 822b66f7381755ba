"""A torus on which digits drift, seen through a window that moves."""
