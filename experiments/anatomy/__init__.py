"""Anatomy of parameters: health, dead units, outliers, redundancy, superposition."""
