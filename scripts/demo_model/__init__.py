"""The stages of ``scripts/train_demo_model.py``."""
