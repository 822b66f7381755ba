"""A room with blocks that move, seen by an agent that walks and turns in it."""
