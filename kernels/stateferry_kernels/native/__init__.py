"""The CPU kernels: a small C++ library (src/), found, loaded and called through ctypes."""
