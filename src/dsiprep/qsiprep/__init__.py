"""Tools for users of QSIPrep: an image with GPU commands, and the QSIPrep command for a dataset.

The source of QSIPrep is read but never imported or run. All facts about its releases come from their wheels and source
archives on PyPI (`qsiprep/cli/parser.py`, `Dockerfile`, `pixi.lock`), and the tests check them against the wheels.
"""
