"""The quantised cache and the plug-back into a model's own forward and generate."""
