"""Scores that change when the cache is sabotaged, and codecs to compare with."""
