"""The numerics as pure functions; imports nothing else of the library."""
