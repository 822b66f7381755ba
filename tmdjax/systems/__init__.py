"""One module a paper: its rules, on the primitives of the other packages."""
