"""The C library between kernels and engines: a pool of threads, and the custom operators of onnxruntime."""
