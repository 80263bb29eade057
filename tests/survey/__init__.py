"""Tiny random models of every causal-LM type of the installed transformers."""
