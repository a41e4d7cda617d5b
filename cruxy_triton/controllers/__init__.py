"""Controllers above the per-step law, none of which reads a value back to the host: slow loop, layer-wise control."""
