"""What flows between stages: frozen dataclasses, no algorithms.

Images are `torch.Tensor`, volume first; geometry (affines, b-tables, rigid transforms) is float64 NumPy.
World coordinates are RAS+ mm throughout.
"""
