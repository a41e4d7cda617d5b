"""How a call is served: which implementation, and each of them."""
