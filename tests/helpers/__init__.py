"""Simulated subjects, images and stand-ins that several test modules share."""
