"""Networks of videos: the transformer of Wan 2.1 and what is made of it."""
