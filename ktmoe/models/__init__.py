"""Models of transformers: finding their routed experts, putting ours in their place, loading from disk."""
