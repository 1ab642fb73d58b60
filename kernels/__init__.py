"""One folder per operation: the reference (the specification), the CPU kernel and the GPU kernel side by side."""
