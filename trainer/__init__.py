"""Phase two of kdcache: a student from the cache alone. No teacher is loaded, and vllm only to generate with the student."""
