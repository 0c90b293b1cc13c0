"""Simulated subjects, images and test doubles shared by several test modules."""
