"""``kv-pq``: a product-quantized KV cache."""
