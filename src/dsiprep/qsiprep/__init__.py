"""For those who stay on QSIPrep: its image with GPU commands, and its command for a dataset.

QSIPrep is read, never imported and never run. What is said of its releases was read in their own wheels and source
archives on PyPI (`qsiprep/cli/parser.py`, `Dockerfile`, `pixi.lock`), and a test reads them again.
"""
