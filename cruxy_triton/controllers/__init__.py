"""The slow loop: meta-optimization on 0-dim tensors, without reading a value back to the host."""
