"""Geometry of representations: intrinsic dimension."""
