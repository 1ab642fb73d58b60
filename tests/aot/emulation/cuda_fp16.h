// Empty: on the host, 16-bit floats are converted by csrc/dtype.h.
