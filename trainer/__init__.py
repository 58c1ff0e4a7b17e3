"""Phase two: a student from the cache alone. The teacher is never loaded, and vllm only to generate with the student."""
