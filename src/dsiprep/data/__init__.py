"""Data passed between stages: frozen dataclasses without algorithms.

Images are `torch.Tensor`, volume axis first; geometry (affines, b-tables, rigid transforms) is float64 NumPy.
World coordinates are RAS+ mm throughout.
"""
