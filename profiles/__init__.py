"""Plain data that ships with the package: GPUs, models and measurements (`cruxy_triton.profiles`)."""
