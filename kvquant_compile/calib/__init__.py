"""Calibration: windows, observation, table fits, artifacts."""
