"""Small worlds, a folder each: what is drawn, said and checked of them."""
