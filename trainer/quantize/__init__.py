"""Quantize students to 4 or 8 bits, and measure what that costs."""
